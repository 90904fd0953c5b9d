//! What went through the layers together: a token, or a chunk of a prompt.

use crate::{Row, Source, TraceError};

/// A pass that says that it is longer is cut: nobody's chunks are, and a wrong
/// number in a file must not take memory.
const MOST_TOKENS: usize = 8192;

/// Reads a trace pass by pass.
pub struct Passes<'s> {
    source: &'s mut dyn Source,
    /// The row behind the pass, if it was read already.
    next: Row,
    has_next: bool,
}

/// The rows of one pass, at least one.
#[derive(Default)]
pub struct Pass {
    rows: Vec<Row>,
    len: usize,
    /// Scratch: tokens of the pass that chose each expert of a layer.
    counts: Vec<u32>,
    distinct: Vec<u16>,
}

impl<'s> Passes<'s> {
    /// From where `source` is.
    pub fn new(source: &'s mut dyn Source) -> Self {
        Self { source, next: Row::default(), has_next: false }
    }

    /// Fills `pass` with the next one; `false` behind the last.
    ///
    /// # Errors
    /// Those of the source.
    pub fn next(&mut self, pass: &mut Pass) -> Result<bool, TraceError> {
        pass.len = 0;
        if pass.rows.is_empty() {
            pass.rows.push(Row::default());
        }
        if std::mem::take(&mut self.has_next) {
            std::mem::swap(&mut pass.rows[0], &mut self.next);
        } else if !self.source.next(&mut pass.rows[0])? {
            return Ok(false);
        }
        pass.len = 1;
        let tokens = (pass.rows[0].pass_tokens as usize).clamp(1, MOST_TOKENS);
        while pass.len < tokens && self.source.next(&mut self.next)? {
            if self.next.pass_tokens > 0 || self.next.starts_sequence {
                // The pass was shorter than it said.
                self.has_next = true;
                break;
            }
            if pass.rows.len() == pass.len {
                pass.rows.push(Row::default());
            }
            std::mem::swap(&mut pass.rows[pass.len], &mut self.next);
            pass.len += 1;
        }
        Ok(true)
    }
}

impl Pass {
    pub fn rows(&self) -> &[Row] {
        &self.rows[..self.len]
    }

    pub fn first(&self) -> &Row {
        &self.rows[0]
    }

    /// The experts that `layer` needs, distinct: a token's in rank order, a
    /// chunk's in the order of their numbers, which is that of files.
    pub fn experts(&mut self, layer: usize) -> &[u16] {
        if self.len == 1 {
            return self.rows[0].experts(layer);
        }
        let Self { rows, len, counts, distinct, .. } = self;
        distinct.clear();
        for row in &rows[..*len] {
            for &expert in row.experts(layer) {
                if counts.len() <= usize::from(expert) {
                    counts.resize(usize::from(expert) + 1, 0);
                }
                if counts[usize::from(expert)] == 0 {
                    distinct.push(expert);
                }
                counts[usize::from(expert)] += 1;
            }
        }
        distinct.sort_unstable();
        distinct.iter().for_each(|&expert| counts[usize::from(expert)] = 0);
        distinct
    }
}
