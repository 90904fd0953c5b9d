//! Host memory that kernels read and write while they run, and so does the
//! host.
//!
//! Guarantee that the `unsafe` blocks rely on: the block is page-locked, begins
//! at a page, holds some bytes from the start, and lives as long as its span.
//! [`Mapped`] is the only way of the host to its bytes, and is not [`Sync`]: one
//! thread at a time has it, and who gets it next sees what was done before. So
//! bytes may be touched in pieces of 1, 4 and 8, although Rust's memory model
//! has no races of atomics of different sizes: between threads of the host
//! there are no races at all.
//!
//! The device is no thread of Rust's; it reads and writes meanwhile. For its
//! sake all accesses are atomic: each is made once, as a whole, and a read
//! gives some bytes whatever the device does. Which ones is for words of 8
//! bytes to say. What was written before [`Mapped::store_release`] is seen by
//! the device once it has read that word with `ld.acquire.sys`; what the device
//! wrote before its `st.release.sys` of a word is seen behind a
//! [`Mapped::load_acquire`] that gives that value. That is the system scope of
//! the PTX memory model, which counts the host's threads in, and on the way the
//! link's order of writes. Both sides touch such a word with all of its 8
//! bytes. Beyond that, a launch sees what was written before it was submitted,
//! and the host what was written by work whose end it has seen.

use super::driver::Driver;
use super::error::CudaError;
use super::memory::{PADDING_BYTES, Span};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Page-locked host memory that the device uses in place, across the link.
/// All zeros at first. Spans of it go where launchers take device memory;
/// copies and fills refuse them. Freed when it and its last span are gone,
/// after everything that the device was given has ended.
/// One thread of the host has it at a time: it is not [`Sync`].
pub struct Mapped {
    span: Span,
    /// Of the host; the span keeps it alive.
    pointer: *mut u8,
}

// SAFETY: the memory belongs to no thread. (Not `Sync`: see the head of this
// file.)
unsafe impl Send for Mapped {}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({} bytes)", self.bytes())
    }
}

impl Mapped {
    pub(super) fn new(driver: &Arc<Driver>, bytes: usize) -> Result<Self, CudaError> {
        let padded = bytes
            .checked_add(PADDING_BYTES)
            .ok_or_else(|| CudaError::shape("mapped", format!("{bytes} bytes overflow")))?;
        let block = driver.allocate_mapped(padded)?;
        let pointer = block.pointer();
        // SAFETY: a new block of that many bytes, which nobody else knows.
        unsafe { pointer.write_bytes(0, padded) };
        Ok(Self { span: Span::of_mapped(driver, block, bytes), pointer })
    }

    pub fn bytes(&self) -> usize {
        self.span.bytes()
    }

    /// All of it, for launchers.
    pub fn span(&self) -> Span {
        self.span.clone()
    }

    /// Word `word` of 8 bytes; what was written before it was stored with
    /// release order can be read then.
    ///
    /// # Panics
    /// When there is no such word, as slices do. So do all methods.
    pub fn load_acquire(&self, word: usize) -> u64 {
        self.word(word).load(Ordering::Acquire)
    }

    /// Stores word `word` of 8 bytes behind all that was written before.
    pub fn store_release(&self, word: usize, value: u64) {
        self.word(word).store(value, Ordering::Release);
    }

    /// Copies bytes `range` out. They are those that were there when a word
    /// was loaded with acquire order, unless they are being written.
    pub fn read(&self, range: Range<usize>, out: &mut [u8]) {
        assert_eq!(range.len(), out.len(), "bytes {range:?} into {}", out.len());
        self.check(&range);
        for (at, piece) in pieces(range.start, out.len()) {
            let from = range.start + at;
            if piece == 8 {
                let word = self.word(from / 8).load(Ordering::Relaxed);
                out[at..at + 8].copy_from_slice(&word.to_ne_bytes());
            } else {
                out[at] = self.byte(from).load(Ordering::Relaxed);
            }
        }
    }

    /// Copies bytes in, from byte `at` on; the device sees them when it reads a
    /// word that is stored afterwards, or in work that is submitted afterwards.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        self.check(&(at..at.saturating_add(bytes.len())));
        for (from, piece) in pieces(at, bytes.len()) {
            if piece == 8 {
                let mut word = [0; 8];
                word.copy_from_slice(&bytes[from..from + 8]);
                self.word((at + from) / 8).store(u64::from_ne_bytes(word), Ordering::Relaxed);
            } else {
                self.byte(at + from).store(bytes[from], Ordering::Relaxed);
            }
        }
    }

    /// [`Mapped::read`] of f32 from byte `at` on, a multiple of 4.
    pub fn read_floats(&self, at: usize, out: &mut [f32]) {
        for (index, value) in out.iter_mut().enumerate() {
            *value = f32::from_bits(self.half_word(at, index).load(Ordering::Relaxed));
        }
    }

    /// [`Mapped::read`] of i32 from byte `at` on, a multiple of 4.
    pub fn read_ints(&self, at: usize, out: &mut [i32]) {
        for (index, value) in out.iter_mut().enumerate() {
            *value = self.half_word(at, index).load(Ordering::Relaxed).cast_signed();
        }
    }

    /// [`Mapped::write`] of f32 from byte `at` on, a multiple of 4.
    pub fn write_floats(&self, at: usize, values: &[f32]) {
        for (index, value) in values.iter().enumerate() {
            self.half_word(at, index).store(value.to_bits(), Ordering::Relaxed);
        }
    }

    fn check(&self, range: &Range<usize>) {
        let bytes = self.bytes();
        assert!(
            range.start <= range.end && range.end <= bytes,
            "bytes {range:?} of {bytes} mapped ones"
        );
    }

    fn word(&self, word: usize) -> &AtomicU64 {
        self.check(&(word.saturating_mul(8)..word.saturating_mul(8).saturating_add(8)));
        // SAFETY: in the block, at a multiple of 8 from a page's start; see
        // the head of this file.
        unsafe { AtomicU64::from_ptr(self.pointer.add(8 * word).cast()) }
    }

    /// The 4 bytes of element `index` of those that begin at byte `at`.
    fn half_word(&self, at: usize, index: usize) -> &AtomicU32 {
        let from = index.saturating_mul(4).saturating_add(at);
        self.check(&(from..from.saturating_add(4)));
        assert!(from.is_multiple_of(4), "4 bytes at byte {from}");
        // SAFETY: in the block, at a multiple of 4; as above.
        unsafe { AtomicU32::from_ptr(self.pointer.add(from).cast()) }
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        self.check(&(at..at.saturating_add(1)));
        // SAFETY: in the block; as above.
        unsafe { AtomicU8::from_ptr(self.pointer.add(at)) }
    }
}

/// How `count` bytes from byte `start` on are moved: whole aligned words, and
/// single bytes around them. Each piece's place and length, 8 or 1.
fn pieces(start: usize, count: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let from = at;
        let left = count - from;
        let piece = if left >= 8 && (start + from).is_multiple_of(8) { 8 } else { 1 };
        at += piece.min(left);
        (left > 0).then_some((from, piece))
    })
}
