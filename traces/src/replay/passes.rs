//! What went through the layers together: a token, or a chunk of a prompt.

use crate::{Row, Source, TraceError};

/// A pass that says that it is longer is replayed in chunks of this: servers
/// call a whole prompt a pass, and a wrong number in a file must not take
/// memory.
const MOST_TOKENS: usize = 8192;

/// Reads a trace pass by pass.
pub struct Passes<'s> {
    source: &'s mut dyn Source,
    /// The row behind the pass, if it was read already.
    next: Row,
    has_next: bool,
    /// Tokens of the last pass that go into the next chunk.
    left: usize,
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
        Self { source, next: Row::default(), has_next: false, left: 0 }
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
        let first = &pass.rows[0];
        let goes_on = self.left > 0 && first.pass_tokens == 0 && !first.starts_sequence;
        let tokens = if goes_on { self.left } else { (first.pass_tokens as usize).max(1) };
        let here = tokens.min(MOST_TOKENS);
        self.left = tokens - here;
        while pass.len < here && self.source.next(&mut self.next)? {
            if self.next.pass_tokens > 0 || self.next.starts_sequence {
                // The pass was shorter than it said.
                (self.has_next, self.left) = (true, 0);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::MemoryTrace;

    /// Rows that say so many tokens of their pass.
    fn lengths(pass_tokens: &[u32]) -> Vec<usize> {
        let row = |&pass_tokens: &u32| {
            let mut row = Row::default();
            row.pass_tokens = pass_tokens;
            row
        };
        let rows = pass_tokens.iter().map(row).collect();
        let mut trace = MemoryTrace::new(crate::Header::default(), rows);
        let (mut passes, mut pass, mut found) =
            (Passes::new(&mut trace), Pass::default(), Vec::new());
        while passes.next(&mut pass).unwrap() {
            found.push(pass.rows().len());
        }
        found
    }

    #[test]
    fn a_long_pass_goes_in_chunks_and_nothing_of_it_is_decoded() {
        let prompt = |said: u32, there: usize| {
            let mut rows = vec![0; there];
            rows[0] = said;
            rows
        };
        let whole = [prompt(20_000, 20_000), vec![1, 1]].concat();
        assert_eq!(lengths(&whole), [8192, 8192, 3616, 1, 1]);
        assert_eq!(lengths(&[prompt(16_384, 16_384), vec![2, 0]].concat()), [8192, 8192, 2]);
        // Shorter than they say: where the next begins, and at the end.
        assert_eq!(lengths(&[prompt(20_000, 10_000), vec![1, 0]].concat()), [8192, 1808, 1, 1]);
        assert_eq!(lengths(&prompt(u32::MAX, 8193)), [8192, 1]);
    }
}
