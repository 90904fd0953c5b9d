//! How fast the disk is, measured with the reads that it will serve.

use super::super::{
    frames::{ALIGN_BYTES, FrameId, Frames},
    mover::{Fill, Mover, Piece, Urgency},
};
use std::sync::Arc;

/// What a measurement found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bandwidth {
    pub bytes: u64,
    pub elapsed_ns: u64,
    /// Of one read.
    pub read_bytes: usize,
}

impl Bandwidth {
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 * 1e9 / self.elapsed_ns.max(1) as f64
    }
}

/// Below this a figure would say more about luck than about the disk.
const LEAST_BYTES: u64 = 8 << 20;

/// Reads random ranges of the files for about `measure_ns`, at most each byte
/// about once, into frames that are not in use. `None` if there is too little
/// to read, or if a read fails: the first use will say why.
pub(super) fn measure(
    mover: &mut dyn Mover,
    frames: &Arc<Frames>,
    file_bytes: &[u64],
    read_bytes: usize,
    depth: usize,
    measure_ns: u64,
) -> Option<Bandwidth> {
    let (class, spec) = frames.classes().enumerate().max_by_key(|(_, spec)| {
        // The class with the longest reads, then the most of them.
        (spec.frame_bytes.min(read_bytes), spec.frames)
    })?;
    let read_bytes = read_bytes.min(spec.frame_bytes);
    let ranges = Ranges::new(file_bytes, read_bytes);
    if ranges.total_bytes < LEAST_BYTES {
        return None;
    }
    let mut idle: Vec<u32> = (0..spec.frames.min(2 * depth) as u32).collect();
    for &index in &idle {
        touch(frames, FrameId { class: class as u16, index }, read_bytes);
    }
    let most = ranges.total_bytes / read_bytes as u64;
    let start_ns = mover.now_ns();
    let (mut submitted, mut bytes) = (0, 0);
    let mut is_whole = true;
    loop {
        let is_over = mover.now_ns() - start_ns >= measure_ns || submitted >= most;
        while let (false, Some(index)) = (is_over, idle.pop()) {
            let frame = FrameId { class: class as u16, index };
            let Some(ticket) = frames.claim(frame) else { continue };
            let pieces = Arc::new([ranges.piece(submitted)]);
            // The frame's number is a key that no other fill has.
            mover.submit(Fill { key: u64::from(index), ticket, pieces, urgency: Urgency::Demand });
            submitted += 1;
        }
        let Some(done) = mover.next(u64::MAX) else { break };
        bytes += done.bytes;
        is_whole &= done.result.is_ok();
        frames.release(done.frame);
        idle.push(done.frame.index);
    }
    let elapsed_ns = mover.now_ns() - start_ns;
    (is_whole && bytes >= LEAST_BYTES).then_some(Bandwidth { bytes, elapsed_ns, read_bytes })
}

/// Gives a frame its pages, which is slower than a disk and not the disk's
/// fault: 0.2 GB/s were seen where the kernel looked for huge ones.
fn touch(frames: &Arc<Frames>, frame: FrameId, bytes: usize) {
    if let Some(mut ticket) = frames.claim(frame) {
        ticket.bytes_mut()[..bytes].fill(0);
    }
    frames.release(frame);
}

/// Ranges of one length all over the files.
struct Ranges {
    /// How many there are up to the end of each file.
    ends: Vec<u64>,
    read_bytes: usize,
    total_bytes: u64,
}

impl Ranges {
    fn new(file_bytes: &[u64], read_bytes: usize) -> Self {
        let mut count = 0;
        let end = |bytes: &u64| {
            count += bytes / read_bytes as u64;
            count
        };
        let ends = file_bytes.iter().map(end).collect();
        Self { ends, read_bytes, total_bytes: count * read_bytes as u64 }
    }

    /// The `n`-th of a fixed random order with repetitions.
    fn piece(&self, n: u64) -> Piece {
        // SplitMix64 (Steele, Lea, Flood 2014).
        let mut mix = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mix = (mix ^ (mix >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mix = (mix ^ (mix >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mix ^= mix >> 31;
        let range = mix % (self.total_bytes / self.read_bytes as u64);
        let file = self.ends.partition_point(|&end| end <= range);
        let first = file.checked_sub(1).map_or(0, |before| self.ends[before]);
        let offset = (range - first) * self.read_bytes as u64;
        debug_assert!(offset.is_multiple_of(ALIGN_BYTES as u64));
        Piece { file, offset, len: self.read_bytes, needed: self.read_bytes, at: 0 }
    }
}
