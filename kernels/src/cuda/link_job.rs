//! A transfer on its way: how far it is, and how it is cut.

use super::link::{LinkError, Transfer};
use super::memory::HostMemory;

pub(super) struct Job<M> {
    pub transfer: Transfer<M>,
    /// The part that is being cut, and the bytes of it that were started.
    pub part: usize,
    pub at: usize,
    /// Chunks that are with the device.
    pub flying: usize,
    /// Bytes that have arrived.
    pub bytes: u64,
    pub submitted_ns: u64,
    /// The last chunk was refused once.
    pub retried: bool,
    /// Why it brings nothing.
    pub failure: Option<LinkError>,
}

impl<M> Job<M> {
    pub fn new(transfer: Transfer<M>, failure: Option<LinkError>, submitted_ns: u64) -> Self {
        Self {
            transfer,
            part: 0,
            at: 0,
            flying: 0,
            bytes: 0,
            submitted_ns,
            retried: false,
            failure,
        }
    }

    pub fn has_more(&self) -> bool {
        self.part < self.transfer.parts.len()
    }

    /// Bytes that are not with the device yet.
    pub fn left(&self) -> u64 {
        let parts = self.transfer.parts[self.part.min(self.transfer.parts.len())..].iter();
        let bytes: usize = parts.map(|part| part.from.len()).sum();
        bytes.saturating_sub(self.at) as u64
    }

    /// Bytes of the next chunk: parts are cut evenly, at whole pages.
    pub fn chunk(&self, longest: usize) -> usize {
        const PAGE: usize = 4096;
        let part = self.transfer.parts[self.part].from.len();
        let even = part.div_ceil(part.div_ceil(longest)).next_multiple_of(PAGE);
        even.min(longest).min(part - self.at)
    }

    pub fn advance(&mut self, bytes: usize) {
        self.at += bytes;
        if self.at == self.transfer.parts[self.part].from.len() {
            (self.part, self.at) = (self.part + 1, 0);
        }
    }

    /// Whether a chunk of so many bytes is the last.
    pub fn is_last(&self, bytes: usize) -> bool {
        let part = self.transfer.parts[self.part].from.len();
        self.part + 1 == self.transfer.parts.len() && self.at + bytes == part
    }
}

/// Mistakes of the caller.
pub(super) fn check<M: HostMemory>(transfer: &Transfer<M>) {
    let Transfer { key, memory, parts, destination, publish, .. } = transfer;
    let (bytes, room) = (memory.bytes().len(), destination.bytes());
    assert!(!parts.is_empty(), "transfer {key} has no parts");
    let mut targets = Vec::with_capacity(parts.len());
    for part in parts {
        assert!(part.from.start < part.from.end, "transfer {key}: an empty part");
        assert!(part.from.end <= bytes, "transfer {key}: a part ends behind its memory");
        let end = part.to.checked_add(part.from.len());
        assert!(
            end.is_some_and(|end| end <= room),
            "transfer {key}: a part does not lie in its destination"
        );
        targets.push(part.to..part.to + part.from.len());
    }
    targets.sort_unstable_by_key(|target| target.start);
    let disjoint = targets.windows(2).all(|pair| pair[0].end <= pair[1].start);
    assert!(disjoint, "transfer {key}: parts overlap");
    if let Some((word, _)) = publish {
        let is_word = word.bytes() == 4 && word.address().is_multiple_of(4);
        assert!(is_word, "transfer {key}: what it publishes in is no word");
    }
}
