//! The arguments of a launch.

use super::memory::Span;

/// Parameters that a kernel may have.
pub(super) const MOST: usize = 40;

/// A kernel's arguments in the order of its parameters. Holds the spans that
/// it names.
#[derive(Default)]
pub(super) struct Args {
    /// One cell per argument, its bytes first in memory.
    cells: Vec<u64>,
    /// Bytes of each argument.
    sizes: Vec<u8>,
    spans: Vec<Span>,
}

impl Args {
    pub fn new() -> Self {
        Self::default()
    }

    /// A pointer to the start of a span.
    pub fn span(mut self, span: &Span) -> Self {
        self.spans.push(span.clone());
        self.address(span.address())
    }

    /// A pointer; 0 is the null pointer. The caller keeps its memory alive
    /// until the kernel has ended.
    pub fn address(self, address: u64) -> Self {
        self.push(address, 8)
    }

    pub fn u64(self, value: u64) -> Self {
        self.push(value, 8)
    }

    pub fn i32(self, value: i32) -> Self {
        self.push(first_in_memory(value.to_ne_bytes()), 4)
    }

    pub fn f32(self, value: f32) -> Self {
        self.push(first_in_memory(value.to_ne_bytes()), 4)
    }

    fn push(mut self, cell: u64, bytes: u8) -> Self {
        self.cells.push(cell);
        self.sizes.push(bytes);
        self
    }

    pub(super) fn cells(&self) -> &[u64] {
        &self.cells
    }

    pub(super) fn sizes(&self) -> impl Iterator<Item = usize> {
        self.sizes.iter().map(|bytes| usize::from(*bytes))
    }

    pub(super) fn spans(&self) -> &[Span] {
        &self.spans
    }
}

/// Four bytes at a cell's address, whatever the byte order.
fn first_in_memory([a, b, c, d]: [u8; 4]) -> u64 {
    u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0])
}
