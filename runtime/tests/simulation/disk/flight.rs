//! One fill on its way, cut into reads.

use super::Fault;
use pregate_runtime::store::frames::{Chunk, FrameId, Landed};
use pregate_runtime::store::mover::{MoveError, Urgency};
use pregate_runtime::store::slot::Generation;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Queued,
    Reading {
        ends: u64,
        fault: Fault,
    },
    /// All there, perhaps with a wrong bit.
    Read {
        flip: Option<u64>,
    },
    Dropped,
}

pub struct Read {
    /// `None`: published.
    pub chunk: Option<Chunk>,
    pub file: usize,
    pub offset: u64,
    /// Bytes to bring, from `offset`.
    pub needed: usize,
    pub stage: Stage,
}

pub struct Flight {
    pub key: u64,
    pub frame: FrameId,
    pub generation: Generation,
    pub urgency: Urgency,
    pub discarded: bool,
    pub order: u64,
    pub reads: Vec<Read>,
    pub error: Option<MoveError>,
    pub submitted_ns: u64,
    pub ended_ns: u64,
    pub bytes: u64,
    pub landed: Option<Landed>,
}

pub trait CopyTo {
    fn copy_to(&self, read: &mut Read, at_most: usize);
}

impl CopyTo for Arc<[u8]> {
    /// The first `at_most` bytes of a read. What is not needed stays poisoned,
    /// as behind the end of a file.
    fn copy_to(&self, read: &mut Read, at_most: usize) {
        let Some(chunk) = &mut read.chunk else { return };
        let start = read.offset as usize;
        let len = read.needed.min(at_most);
        chunk.bytes_mut()[..len].copy_from_slice(&self[start..start + len]);
    }
}

impl Flight {
    pub fn publish(&mut self, index: usize, files: &[(PathBuf, Arc<[u8]>)]) {
        if let Some(landed) = self.reads[index].publish(files) {
            let is_last = self.reads.iter().all(|read| read.chunk.is_none());
            assert!(is_last, "I6: {:?} lands before its last chunk", self.frame);
            self.landed = Some(landed);
        }
    }

    pub fn drop_queued(&mut self) {
        let queued = self.reads.iter_mut().filter(|read| read.stage == Stage::Queued);
        queued.for_each(|read| read.stage = Stage::Dropped);
    }

    pub fn give_up(&mut self, error: MoveError) {
        self.error.get_or_insert(error);
        self.drop_queued();
    }
}

impl Read {
    pub fn ends(&self) -> Option<u64> {
        match self.stage {
            Stage::Reading { ends, .. } => Some(ends),
            _ => None,
        }
    }

    pub fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Read { .. } | Stage::Dropped)
    }

    pub fn abandon(&mut self) {
        if !self.is_over() {
            self.stage = Stage::Dropped;
        }
    }

    /// Ends the chunk: with its bytes, or without.
    pub fn publish(&mut self, files: &[(PathBuf, Arc<[u8]>)]) -> Option<Landed> {
        let Stage::Read { flip } = self.stage else {
            return self.chunk.take().and_then(Chunk::fail);
        };
        files[self.file].1.copy_to(self, usize::MAX);
        let mut chunk = self.chunk.take()?;
        if let Some(bit) = flip.filter(|_| self.needed > 0) {
            let bit = bit as usize % (8 * self.needed);
            chunk.bytes_mut()[bit / 8] ^= 1 << (bit % 8);
        }
        chunk.done()
    }
}
