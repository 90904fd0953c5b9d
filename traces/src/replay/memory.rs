//! A trace that is held in memory.

use crate::{Header, Row, Source, TraceError};

/// Rows, for a trace that was just made or is replayed again and again.
#[derive(Clone, Debug, Default)]
pub struct MemoryTrace {
    pub header: Header,
    pub rows: Vec<Row>,
    next: usize,
}

impl MemoryTrace {
    pub fn new(header: Header, rows: Vec<Row>) -> Self {
        Self { header, rows, next: 0 }
    }

    /// The first `most` rows of `source`, from where it is.
    ///
    /// # Errors
    /// Those of the source.
    pub fn read(source: &mut dyn Source, most: usize) -> Result<Self, TraceError> {
        let mut trace = Self::new(source.header().clone(), Vec::new());
        let mut row = Row::default();
        while trace.rows.len() < most && source.next(&mut row)? {
            trace.rows.push(row.clone());
        }
        Ok(trace)
    }
}

impl Source for MemoryTrace {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        let Some(next) = self.rows.get(self.next) else {
            row.clear();
            return Ok(false);
        };
        row.clone_from(next);
        self.next += 1;
        Ok(true)
    }

    fn tokens(&self) -> Option<u64> {
        Some(self.rows.len() as u64)
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.next = 0;
        Ok(())
    }
}
