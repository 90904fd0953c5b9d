//! Writes trace files.

use super::bits::put_varint;
use super::row::Layout;
use super::{BLOCK, Dropped, END, GAP, Head, MAGIC, MAX_BLOCK, ROWS, VERSION, checksum};
use crate::{Header, Row, Sequence};
use std::io::{Error, ErrorKind, Result, Write};

/// Of a row. Written anew at a block's start, it may have to say its position.
const MAX_ROW: usize = MAX_BLOCK - 5;

/// Writes rows in blocks. Without [`Self::finish`] the file says that it was
/// cut off, which is what happened then.
pub struct Writer<W: Write> {
    out: W,
    layout: Layout,
    block: Vec<u8>,
    rows: u32,
    position: u32,
    tokens: u64,
    /// Of those, in blocks that `out` took.
    written: u64,
    /// Of the current pass.
    pass_left: u32,
    dropped: Dropped,
}

impl<W: Write> Writer<W> {
    /// Writes the header. `sequences` are labels known beforehand, or empty.
    ///
    /// # Errors
    /// Of `out`; `InvalidData` for a header that the format does not hold.
    pub fn new(mut out: W, header: &Header, sequences: &[Sequence]) -> Result<Self> {
        let head = Head::new(header, sequences).map_err(invalid)?;
        let length = head.length().ok_or_else(|| invalid("a header of more than 16 MiB".into()))?;
        out.write_all(&MAGIC)?;
        let numbers = [VERSION, length, head.checksum(&[VERSION, length])];
        numbers.iter().try_for_each(|number| out.write_all(&number.to_le_bytes()))?;
        head.write(&mut out)?;
        let layout = Layout::new(&header.shape);
        let (block, dropped) = (Vec::with_capacity(BLOCK * 2), Dropped::default());
        let (rows, position, tokens, written, pass_left) = (0, 0, 0, 0, 0);
        #[rustfmt::skip]
        let writer = Self {
            out, layout, block, rows, position, tokens, written, pass_left, dropped,
        };
        Ok(writer)
    }

    /// Appends a row.
    ///
    /// # Errors
    /// Of `out`; `InvalidData` for a row that breaks the header or the pass
    /// before it, which leaves the file as it was.
    pub fn push(&mut self, row: &Row) -> Result<()> {
        let pass_left = self.joins(row).map_err(invalid)?;
        let before = self.block.len();
        let written = self.layout.write(row, self.position, &mut self.block);
        let size = self.block.len() - before;
        let fits = written.and_then(|()| match size <= MAX_ROW {
            true => Ok(()),
            false => Err(format!("a row of {size} bytes; {MAX_ROW} are allowed")),
        });
        if let Err(what) = fits {
            self.block.truncate(before);
            return Err(invalid(what));
        }
        if self.block.len() > MAX_BLOCK {
            // It does not join the rows before it, and is written anew: its
            // first bytes depend on its place.
            self.block.truncate(before);
            self.flush_rows()?;
            self.layout.write(row, self.position, &mut self.block).map_err(invalid)?;
        }
        self.rows += 1;
        self.tokens += 1;
        self.position = row.position.wrapping_add(1);
        self.pass_left = pass_left;
        match self.block.len() >= BLOCK {
            true => self.flush_rows(),
            false => Ok(()),
        }
    }

    /// How many tokens of its pass are left behind `row`.
    fn joins(&self, row: &Row) -> std::result::Result<u32, String> {
        match (self.pass_left, row.pass_tokens) {
            (0, 1..) => Ok(row.pass_tokens - 1),
            (1.., 0) if !row.starts_sequence && row.served.is_empty() => Ok(self.pass_left - 1),
            (left, tokens) => {
                Err(format!("a pass of {tokens} tokens where {left} of another are left"))
            }
        }
    }

    fn between_passes(&self, what: &str) -> Result<()> {
        match self.pass_left {
            0 => Ok(()),
            left => Err(invalid(format!("{what} where {left} tokens of a pass are left"))),
        }
    }

    /// Says that something is missing here. The next row starts a sequence.
    ///
    /// # Errors
    /// Of `out`; `InvalidData` within a pass.
    pub fn gap(&mut self, dropped: Dropped) -> Result<()> {
        self.between_passes("a gap")?;
        self.flush_rows()?;
        self.dropped.add(dropped);
        let mut payload = Vec::new();
        put_varint(&mut payload, dropped.passes);
        put_varint(&mut payload, dropped.tokens);
        self.write_block(GAP, 0, &payload)
    }

    /// Hands everything to `out`: what comes after a crash.
    ///
    /// # Errors
    /// Of `out`.
    pub fn flush(&mut self) -> Result<()> {
        self.flush_rows()?;
        self.out.flush()
    }

    /// Ends the file.
    ///
    /// # Errors
    /// Of `out`; `InvalidData` within a pass.
    pub fn finish(mut self) -> Result<W> {
        self.between_passes("the end")?;
        self.flush_rows()?;
        let numbers = [self.tokens, self.dropped.passes, self.dropped.tokens];
        self.write_block(END, 0, &numbers.map(u64::to_le_bytes).concat())?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// Rows so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Of those, the ones that `out` has taken.
    pub fn written(&self) -> u64 {
        self.written
    }

    fn flush_rows(&mut self) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        let mut block = std::mem::take(&mut self.block);
        let written = self.write_block(ROWS, self.rows, &block);
        block.clear();
        (self.block, self.rows, self.position) = (block, 0, 0);
        written.inspect(|()| self.written = self.tokens)
    }

    fn write_block(&mut self, kind: u32, rows: u32, payload: &[u8]) -> Result<()> {
        let length = u32::try_from(payload.len()).expect("a block is at most 1 MiB");
        let checksum = checksum(&[kind, length, rows], payload);
        let head = [kind, length, rows, checksum];
        head.iter().try_for_each(|number| self.out.write_all(&number.to_le_bytes()))?;
        self.out.write_all(payload)
    }
}

fn invalid(what: String) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}
