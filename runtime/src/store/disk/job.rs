//! One read: a chunk of a frame, where its bytes are, and what follows from
//! the system's answers.

use super::super::frames::{ALIGN_BYTES, Chunk};
use std::io;

/// Waiting times before the second and third try of a read, in nanoseconds.
pub(super) const RETRY_NS: [u64; 2] = [1_000_000, 10_000_000];
/// How often in a row the system may ask to come back (EAGAIN, 1 ms each;
/// EINTR) before that is an error as well.
pub(super) const MAX_BUSY: u32 = 1000;

pub(super) struct Job {
    pub key: u64,
    pub chunk: Chunk,
    pub file: usize,
    /// In the file, of the chunk's first byte; a multiple of [`ALIGN_BYTES`].
    pub offset: u64,
    /// Bytes of the chunk that must arrive.
    needed: usize,
    /// Bytes that have arrived. A multiple of [`ALIGN_BYTES`] as long as some are
    /// missing, so that every read is aligned.
    filled: usize,
    errors: u32,
    busy: u32,
}

/// What follows from the answer to a read; `E` says why it failed.
#[derive(Debug)]
pub(super) enum Verdict<E> {
    /// Everything that was needed has arrived.
    Complete,
    /// Something has; read on from there at once.
    Again,
    /// Read again after so many nanoseconds.
    Later(u64),
    Failed(E),
}

#[derive(Debug)]
pub(super) enum Failure {
    Io(io::Error),
    /// The file has no byte at this offset.
    EndOfFile(u64),
}

impl Job {
    pub fn new(key: u64, chunk: Chunk, file: usize, offset: u64, needed: usize) -> Self {
        debug_assert!(needed <= chunk.len());
        Self { key, chunk, file, offset, needed, filled: 0, errors: 0, busy: 0 }
    }

    /// Where in the file the next read starts.
    pub fn position(&self) -> u64 {
        self.offset + self.filled as u64
    }

    /// What the next read writes.
    pub fn rest(&mut self) -> &mut [u8] {
        &mut self.chunk.bytes_mut()[self.filled..]
    }

    /// As [`Job::rest`], for the kernel: address and length.
    #[cfg(target_os = "linux")]
    pub fn rest_raw(&mut self) -> (*mut u8, usize) {
        (self.chunk.as_mut_ptr().wrapping_add(self.filled), self.chunk.len() - self.filled)
    }

    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Takes in the answer to a read of [`Job::rest`].
    pub fn answered(&mut self, answer: io::Result<usize>) -> Verdict<Failure> {
        use io::ErrorKind::{Interrupted, WouldBlock};
        match answer {
            Ok(bytes) if self.filled + bytes >= self.needed => {
                self.filled += bytes;
                Verdict::Complete
            }
            Ok(0) => Verdict::Failed(Failure::EndOfFile(self.position())),
            Ok(bytes) => {
                let aligned = (self.filled + bytes) / ALIGN_BYTES * ALIGN_BYTES;
                if aligned > self.filled {
                    (self.filled, self.errors, self.busy) = (aligned, 0, 0);
                    return Verdict::Again;
                }
                // Less than a block: the end of the file, or a hiccup.
                self.failed(Failure::EndOfFile(self.position() + bytes as u64))
            }
            Err(error) if matches!(error.kind(), Interrupted | WouldBlock) => {
                self.busy += 1;
                match error.kind() {
                    _ if self.busy > MAX_BUSY => Verdict::Failed(Failure::Io(error)),
                    Interrupted => Verdict::Later(0),
                    _ => Verdict::Later(RETRY_NS[0]),
                }
            }
            Err(error) => self.failed(Failure::Io(error)),
        }
    }

    fn failed(&mut self, failure: Failure) -> Verdict<Failure> {
        let wait_ns = RETRY_NS.get(self.errors as usize);
        self.errors += 1;
        wait_ns.map_or(Verdict::Failed(failure), |&wait_ns| Verdict::Later(wait_ns))
    }
}
