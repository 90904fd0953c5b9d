//! Reads trace files.

use super::bits::Bytes;
use super::row::Layout;
use super::{
    Dropped, END, END_BYTES, GAP, MAGIC, MAX_BLOCK, MAX_HEADER, ROWS, VERSION, checksum, header,
};
use crate::{Header, Row, Sequence, Source, TraceError};
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Result as IoResult, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Reads a file block by block; holds one block and one row.
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    pub(crate) header: Header,
    sequences: Vec<Sequence>,
    layout: Layout,
    /// Where blocks begin.
    start: u64,
    /// Of the whole file, as its end says.
    tokens: Option<u64>,
    at: Place,
}

/// How far a reader is.
#[derive(Default)]
struct Place {
    /// Of what was read from the file.
    offset: u64,
    block: Vec<u8>,
    /// Where the next row begins in `block`, and the rows left in it.
    taken: usize,
    rows: u32,
    position: u32,
    tokens: u64,
    /// Of the current pass.
    pass_left: u32,
    dropped: Dropped,
    needs_start: bool,
    ending: Option<Ending>,
}

/// How the file ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As its writer ended it.
    Whole,
    /// In the middle: its writer was stopped. What came before is whole.
    CutOff,
}

impl Reader {
    /// # Errors
    /// A file that cannot be read, or is not of this format and version.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let io = |source| TraceError::io(path, source);
        let format = |offset, what: String| TraceError::byte(path, offset, what);
        let mut file = BufReader::with_capacity(1 << 16, File::open(path).map_err(io)?);
        let mut head = [0; 20];
        let found = fill(&mut file, &mut head).map_err(io)?;
        if found < 8 || head[..8] != MAGIC {
            return Err(format(0, "not a trace file of pregate".into()));
        }
        if found < head.len() {
            return Err(format(found as u64, "the file ends within its head".into()));
        }
        let [version, length, wanted] = [8, 12, 16].map(|at| number(&head, at));
        if version != VERSION {
            let what = format!("version {version}; this pregate reads {VERSION}");
            return Err(format(8, what));
        }
        if length > MAX_HEADER {
            return Err(format(12, format!("a header of {length} bytes; {MAX_HEADER} at most")));
        }
        // As much as is there, not as the file says.
        let there = file.get_ref().metadata().map_err(io)?.len().min(length.into());
        let mut json = Vec::with_capacity(there as usize);
        file.by_ref().take(length.into()).read_to_end(&mut json).map_err(io)?;
        if json.len() < length as usize {
            return Err(format(20, "the file ends within its header".into()));
        }
        if checksum(&[version, length], &json) != wanted {
            return Err(format(20, "the header's checksum is wrong".into()));
        }
        let (header, sequences) = header::read(&json).map_err(|what| format(20, what))?;
        let start = 20 + u64::from(length);
        let tokens = last_block(&mut file, start).map_err(io)?;
        file.seek(SeekFrom::Start(start)).map_err(io)?;
        let layout = Layout::new(&header.shape);
        let at = Place { offset: start, ..Place::default() };
        let path = path.to_path_buf();
        Ok(Self { path, file, header, sequences, layout, start, tokens, at })
    }

    /// How the file ended; `None` before its end was reached.
    pub fn ending(&self) -> Option<Ending> {
        self.at.ending
    }

    /// Reads the next block of rows; `false` at the end.
    fn next_block(&mut self) -> Result<bool, TraceError> {
        while self.at.ending.is_none() {
            let at = self.at.offset;
            let io = |source| TraceError::io(&self.path, source);
            let fail = |what: String| Err(TraceError::byte(&self.path, at, what));
            let mut head = [0; 16];
            if fill(&mut self.file, &mut head).map_err(io)? < head.len() {
                self.at.ending = Some(Ending::CutOff);
                break;
            }
            let [kind, length, rows, wanted] = [0, 4, 8, 12].map(|at| number(&head, at));
            if length as usize > MAX_BLOCK {
                return fail(format!("a block of {length} bytes; {MAX_BLOCK} at most"));
            }
            let block = &mut self.at.block;
            block.clear();
            block.resize(length as usize, 0);
            if fill(&mut self.file, block).map_err(io)? < block.len() {
                self.at.ending = Some(Ending::CutOff);
                break;
            }
            if checksum(&[kind, length, rows], block) != wanted {
                return fail("a block's checksum is wrong".into());
            }
            self.at.offset += 16 + u64::from(length);
            match kind {
                ROWS if rows > 0 => {
                    (self.at.taken, self.at.rows, self.at.position) = (0, rows, 0);
                    return Ok(true);
                }
                GAP => self.gap().map_err(|what| TraceError::byte(&self.path, at, what))?,
                END => self.end().map_err(|what| TraceError::byte(&self.path, at, what))?,
                _ => return fail(format!("a block of kind {kind} with {rows} rows")),
            }
        }
        Ok(false)
    }

    fn gap(&mut self) -> Result<(), String> {
        let mut bytes = Bytes { left: &self.at.block };
        let (Some(passes), Some(tokens), []) = (bytes.varint(), bytes.varint(), bytes.left) else {
            return Err("a gap that does not say of what".into());
        };
        if self.at.pass_left > 0 {
            return Err("a gap within a pass".into());
        }
        self.at.dropped.add(Dropped { passes, tokens });
        self.at.needs_start = true;
        Ok(())
    }

    fn end(&mut self) -> Result<(), String> {
        let Place { dropped, tokens, .. } = self.at;
        let wanted = [tokens, dropped.passes, dropped.tokens].map(u64::to_le_bytes).concat();
        if self.at.block != wanted {
            return Err(format!("the end does not count {tokens} tokens, as the file has"));
        }
        if self.at.pass_left > 0 {
            return Err("the end within a pass".into());
        }
        if !matches!(fill(&mut self.file, &mut [0]), Ok(0)) {
            return Err("bytes behind the end".into());
        }
        self.at.ending = Some(Ending::Whole);
        Ok(())
    }

    fn next_row(&mut self, row: &mut Row) -> Result<(), String> {
        let at = &mut self.at;
        let mut bytes = Bytes { left: &at.block[at.taken..] };
        self.layout.read(&mut bytes, at.position, row)?;
        at.taken = at.block.len() - bytes.left.len();
        at.rows -= 1;
        if at.rows == 0 && !bytes.left.is_empty() {
            return Err("bytes behind a block's last row".into());
        }
        let is_start = row.starts_sequence || (at.tokens > 0 && !at.needs_start);
        if !is_start {
            return Err("the first token, and one after a gap, start a sequence".into());
        }
        match (at.pass_left, row.pass_tokens) {
            (0, 1..) => at.pass_left = row.pass_tokens - 1,
            (1.., 0) if !row.starts_sequence && row.served.is_empty() => at.pass_left -= 1,
            (left, tokens) => {
                return Err(format!("a pass of {tokens} tokens where {left} of another are left"));
            }
        }
        at.needs_start = false;
        at.position = row.position.wrapping_add(1);
        at.tokens += 1;
        Ok(())
    }
}

impl Source for Reader {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        row.clear();
        if self.at.rows == 0 && !self.next_block()? {
            return Ok(false);
        }
        self.next_row(row).map_err(|what| {
            let offset = self.at.offset - (self.at.block.len() - self.at.taken) as u64;
            TraceError::byte(&self.path, offset, what)
        })?;
        Ok(true)
    }

    fn tokens(&self) -> Option<u64> {
        self.tokens
    }

    fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        let seek = self.file.seek(SeekFrom::Start(self.start));
        seek.map_err(|source| TraceError::io(&self.path, source))?;
        let block = std::mem::take(&mut self.at.block);
        self.at = Place { offset: self.start, block, ..Place::default() };
        Ok(())
    }

    fn dropped(&self) -> Dropped {
        self.at.dropped
    }

    fn may_end_within_pass(&self) -> bool {
        self.tokens.is_none()
    }

    fn notice(&self) -> Option<String> {
        let Place { ending, dropped, tokens, .. } = &self.at;
        let cut = (*ending == Some(Ending::CutOff))
            .then(|| format!("the recording was cut off; {tokens} tokens before that were read"));
        let notices: Vec<String> = cut.into_iter().chain(dropped.notice()).collect();
        (!notices.is_empty()).then(|| notices.join("; "))
    }
}

/// The tokens that the file's last block counts, if it ended well. A guess for
/// progress bars; reading checks it.
fn last_block(file: &mut BufReader<File>, start: u64) -> IoResult<Option<u64>> {
    let size = file.get_ref().metadata()?.len();
    if size < start.saturating_add(END_BYTES) {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(size - END_BYTES))?;
    let mut block = [0; END_BYTES as usize];
    let found = fill(file, &mut block)?;
    let [kind, length, rows, wanted] = [0, 4, 8, 12].map(|at| number(&block, at));
    let payload = &block[16..];
    let is_end = found == block.len()
        && (kind, length as usize, rows) == (END, payload.len(), 0)
        && checksum(&[kind, length, rows], payload) == wanted;
    let tokens = payload.first_chunk().copied().map(u64::from_le_bytes);
    Ok(tokens.filter(|_| is_end))
}

/// Fills `bytes` as far as the file goes.
fn fill(file: &mut impl Read, bytes: &mut [u8]) -> IoResult<usize> {
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// `bytes` has four at `at`.
fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
