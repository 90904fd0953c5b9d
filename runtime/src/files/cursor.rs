//! A bounds-checked reader of little-endian headers.

use crate::error::{Error, Result};
use std::path::Path;

/// Walks over the bytes of a file; every error names file, offset and field.
///
/// `budget` bounds the memory that decoded values may take: a file can hold
/// a value in fewer bytes than our memory does (an empty string: 8 bytes in
/// the file, 24 in a `Vec<String>`), so the file's size is no bound.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
    budget: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(file: &'a Path, bytes: &'a [u8], budget: usize) -> Self {
        Self { file, bytes, at: 0, budget }
    }

    /// Bytes read so far: the offset of what is read next.
    pub fn offset(&self) -> u64 {
        self.at as u64
    }

    pub fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// An error about `field` at `offset`.
    pub fn invalid_at(
        &self,
        offset: u64,
        field: &str,
        found: impl Into<String>,
        allowed: impl Into<String>,
    ) -> Error {
        Error::invalid(self.file, Some(offset), field, found, allowed)
    }

    pub fn take(&mut self, count: u64, field: &str) -> Result<&'a [u8]> {
        let taken = usize::try_from(count)
            .ok()
            .and_then(|count| self.at.checked_add(count))
            .and_then(|end| self.bytes.get(self.at..end));
        let Some(taken) = taken else {
            return Err(self.invalid_at(
                self.offset(),
                field,
                format!("{count} bytes wanted"),
                format!("at most {}, where the file ends", self.left()),
            ));
        };
        self.at += taken.len();
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let mut value = [0; N];
        value.copy_from_slice(self.take(N as u64, field)?);
        Ok(value)
    }

    pub fn u32(&mut self, field: &str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: &str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// Notes that `count` values of `size` bytes are about to be kept.
    pub fn charge(&mut self, count: u64, size: u64, field: &str) -> Result<()> {
        let left = count
            .checked_mul(size)
            .and_then(|wanted| usize::try_from(wanted).ok())
            .and_then(|wanted| self.budget.checked_sub(wanted));
        let Some(left) = left else {
            return Err(self.invalid_at(
                self.offset(),
                field,
                format!("{count} values of {size} bytes in memory"),
                format!("what is left of the limit for keys, {} bytes", self.budget),
            ));
        };
        self.budget = left;
        Ok(())
    }

    /// A 64-bit length and that many bytes of UTF-8.
    pub fn string(&mut self, field: &str, longest: u64) -> Result<String> {
        let start = self.offset();
        let len = self.u64(field)?;
        if len > longest {
            return Err(self.invalid_at(
                start,
                field,
                format!("a string of {len} bytes"),
                format!("at most {longest} bytes"),
            ));
        }
        let bytes = self.take(len, field)?;
        self.charge(1, len, field)?;
        // Checks the copy: the mapped bytes may change between check and use.
        match String::from_utf8(bytes.to_vec()) {
            Ok(text) => Ok(text),
            Err(error) => Err(self.invalid_at(
                start.saturating_add(8).saturating_add(error.utf8_error().valid_up_to() as u64),
                field,
                "bytes that are not UTF-8",
                "UTF-8",
            )),
        }
    }
}
