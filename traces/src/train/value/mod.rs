//! Trains the value that evicts (`pregate_predictor::policy::learned`): from
//! what is known of an expert when its layer has run, how soon the layer uses
//! it again.
//!
//! Tokens go through the layers in order, as in decoding; an expert of a layer
//! and token is a sample by chance. Its target is what the definition says:
//! `discount^(d - 1)` if the layer's `d`-th token after this one is the first
//! to use it, sequences being read one behind the other as caches live on.
//! Nothing is known of cache sizes here: one network serves them all.

mod fitted;
mod network;
mod samples;

pub use fitted::{FARTHEST, Fit, fit};
pub use network::{Options, train};
pub use samples::{Collector, Samples};

use crate::{Row, Source, TraceError};

/// The tokens of the sequences that `wanted` takes, counted from 0. Memory as
/// the trace is long; for training and evaluation.
///
/// # Errors
/// What the source says.
pub fn read(
    source: &mut dyn Source,
    wanted: &dyn Fn(usize) -> bool,
) -> Result<Vec<Row>, TraceError> {
    source.rewind()?;
    let (mut rows, mut row, mut sequences) = (Vec::new(), Row::default(), 0usize);
    while source.next(&mut row)? {
        sequences += usize::from(row.starts_sequence || sequences == 0);
        if wanted(sequences - 1) {
            rows.push(row.clone());
        }
    }
    Ok(rows)
}
