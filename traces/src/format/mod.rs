//! Pregate's own trace files, `*.pgtrace`.
//!
//! ```text
//! file   = MAGIC version:u32 length:u32 crc:u32 header[length] block*
//! block  = kind:u32 length:u32 rows:u32 crc:u32 payload[length]
//! ```
//! Little-endian throughout; `crc` is CRC-32 (IEEE 802.3) of the two or three
//! numbers before it and of what follows it. The header is JSON
//! ([`header`]). Blocks of kind 1 hold rows ([`row`]), each block on its own:
//! nothing in it refers to another. Kind 2 is a gap: varints of the passes and
//! tokens that the recorder had to drop here. Kind 3 ends the file: the tokens
//! in it and the passes and tokens dropped, 8 bytes each. A file without it
//! was cut off, and is read up to its last whole block. Unknown kinds and
//! versions are refused.

mod bits;
mod header;
mod reader;
mod row;
mod writer;

pub use reader::{Ending, Reader};
pub use writer::Writer;

pub(crate) use header::{Head, Measure};

/// Like PNG's: not text, and broken by what changes line ends.
pub const MAGIC: [u8; 8] = *b"\x89PGT\r\n\x1a\n";
pub const VERSION: u32 = 1;

/// Of a header: a hundred thousand sequences with labels.
const MAX_HEADER: u32 = 16 << 20;
/// Of a block's payload; a reader never holds more than one.
const MAX_BLOCK: usize = 1 << 20;
/// A block is written when it has grown to this.
const BLOCK: usize = 1 << 16;
/// Tokens of a pass.
const MAX_PASS: u32 = 1 << 24;

const ROWS: u32 = 1;
const GAP: u32 = 2;
const END: u32 = 3;
/// Bytes of the last block, with its head.
const END_BYTES: u64 = 16 + 24;

/// What the recorder had to leave out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    pub passes: u64,
    pub tokens: u64,
}

impl Dropped {
    pub fn add(&mut self, other: Self) {
        self.passes = self.passes.saturating_add(other.passes);
        self.tokens = self.tokens.saturating_add(other.tokens);
    }

    /// For a report; `None` where nothing is missing.
    pub(crate) fn notice(self) -> Option<String> {
        let Self { passes, tokens } = self;
        (passes > 0)
            .then(|| format!("{passes} passes of {tokens} tokens were dropped while recording"))
    }

    /// What came after `before`, which is a part of it.
    pub fn since(self, before: Self) -> Self {
        let passes = self.passes.saturating_sub(before.passes);
        Self { passes, tokens: self.tokens.saturating_sub(before.tokens) }
    }
}

fn checksum(numbers: &[u32], bytes: &[u8]) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    numbers.iter().for_each(|number| hash.update(&number.to_le_bytes()));
    hash.update(bytes);
    hash.finalize()
}
