//! Records of routing: what a trace is ([`Source`], [`Row`]), readers of other
//! programs' files ([`import`]), and logs in memory, one which `pregate eval
//! logits` writes out, one to replay.

mod belady;
mod bounded;
mod error;
pub mod export;
pub mod format;
mod hex;
pub mod import;
mod limits;
mod open;
mod random;
pub mod record;
pub mod replay;
mod row;
pub mod stats;
pub mod synthetic;
pub mod train;

pub use belady::{AccessLog, Hits};
pub use error::{Place, TraceError};
pub use hex::hex;
pub use limits::{MAX_EXPERT_BYTES, MAX_EXPERTS, check_remembered};
pub use open::{files, open, open_any};
pub use row::{Header, LayerServed, Provenance, Row, Sequence, Source};

use pregate_predictor::Observer;
use std::collections::BTreeMap;

/// One router answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    pub position: usize,
    /// In router order.
    pub experts: Vec<u32>,
    /// As multiplied into each expert's output.
    pub weights: Vec<f32>,
}

/// Keeps every answer, per MoE layer, in the order of arrival.
#[derive(Clone, Debug, Default)]
pub struct RoutingLog {
    layers: BTreeMap<usize, Vec<Routing>>,
}

impl RoutingLog {
    /// The MoE layers seen so far with their answers.
    pub fn layers(&self) -> impl Iterator<Item = (usize, &[Routing])> {
        self.layers.iter().map(|(layer, log)| (*layer, log.as_slice()))
    }
}

impl Observer for RoutingLog {
    fn routed(&mut self, layer: usize, position: usize, experts: &[u32], weights: &[f32]) {
        self.layers.entry(layer).or_default().push(Routing {
            position,
            experts: experts.to_vec(),
            weights: weights.to_vec(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_layers_apart_and_in_order() {
        let mut log = RoutingLog::default();
        log.routed(1, 0, &[3, 4], &[0.75, 0.25]);
        log.routed(0, 0, &[1], &[1.0]);
        log.routed(1, 1, &[5], &[1.0]);
        let seen: Vec<_> = log.layers().map(|(layer, log)| (layer, log.len())).collect();
        assert_eq!(seen, [(0, 1), (1, 2)]);
    }
}
