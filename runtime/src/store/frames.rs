//! Memory for experts: frames of one size per class, aligned for O_DIRECT,
//! written and read only under the guards of [`super::slot`].

use super::slot::{Claim, Generation, Guarded, Hold, Part, Slots, Status};
use crate::error::{Error, Result};
use memory::Memory;
use pregate_kernels::cuda::{CudaError, Device, HostMemory};
use std::{ops::Deref, ops::Range, ptr::NonNull, sync::Arc};

mod memory;

/// What frames, and the pieces of files that are read into them, start at
/// multiples of: the page size and the largest logical block size of common
/// drives, which suits O_DIRECT.
pub const ALIGN_BYTES: usize = 4096;
/// io_uring registers at most so much as one buffer.
pub const REGION_BYTES: usize = 1 << 30;
/// A class starts at a multiple of this, so that its pages can be huge ones.
const CLASS_ALIGN_BYTES: usize = 2 << 20;
/// Page-locked memory that is asked for at once.
const PINNED_PIECE_BYTES: usize = 256 << 20;

/// One frame of one class.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FrameId {
    pub class: u16,
    pub index: u32,
}

/// Frames of one size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClassSpec {
    /// A multiple of [`ALIGN_BYTES`], at most [`REGION_BYTES`].
    pub frame_bytes: usize,
    pub frames: usize,
}

/// All frames of a store, allocated once.
pub struct Frames {
    classes: Vec<Class>,
    slots: Slots,
}

struct Class {
    spec: ClassSpec,
    /// So many frames in each piece of memory, but the last.
    per_piece: usize,
    pieces: Vec<Memory>,
    /// The same of what is registered as one; no more than in a piece.
    per_region: usize,
    /// Slot of its first frame, and io_uring region of its first frame.
    first_slot: usize,
    first_region: usize,
}

impl Class {
    /// Where frame `index` starts.
    fn frame(&self, index: usize) -> NonNull<u8> {
        assert!(index < self.spec.frames);
        let (piece, at) = (index / self.per_piece, index % self.per_piece);
        // SAFETY: a piece has the bytes of its frames from `start` on, or
        // frames have no bytes.
        unsafe { self.pieces[piece].start.add(at * self.spec.frame_bytes) }
    }
}

impl Guarded for Frames {
    fn slots(&self) -> &Slots {
        &self.slots
    }
}

/// How much of the memory of frames is page-locked.
#[derive(Clone, Debug, Default)]
pub struct PageLocked {
    pub pinned_bytes: u64,
    pub pageable_bytes: u64,
    /// Why some is not.
    pub refused: Option<CudaError>,
}

/// Panics, and errors, of [`Frames::new`].
fn check(specs: &[ClassSpec]) -> Result<()> {
    for &ClassSpec { frame_bytes, .. } in specs {
        assert!(frame_bytes > 0 && frame_bytes.is_multiple_of(ALIGN_BYTES));
        if frame_bytes > REGION_BYTES {
            return Err(Error::Request(format!(
                "an expert of {frame_bytes} bytes is too large for a slot (at most \
                 {REGION_BYTES} bytes)"
            )));
        }
    }
    Ok(())
}

/// Memory to register with io_uring as one buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    pub start: NonNull<u8>,
    /// At most [`REGION_BYTES`].
    pub bytes: usize,
}

impl Frames {
    /// Maps the memory of all classes; pages come when they are first written
    /// (or registered). Zeroed. Panics on sizes that no layout computes: zero,
    /// or not a multiple of [`ALIGN_BYTES`].
    ///
    /// Errors: the memory cannot be had, named in bytes; a frame larger than
    /// [`REGION_BYTES`].
    pub fn new(specs: &[ClassSpec]) -> Result<Arc<Self>> {
        check(specs)?;
        Self::build(specs, usize::MAX, Memory::mapped)
    }

    /// As [`Frames::new`], in memory that copies to `device` run from at full
    /// speed, as far as the system gives such; from its first refusal on, or
    /// with `refused` from the first byte on, in other memory.
    pub fn page_locked(
        specs: &[ClassSpec],
        device: &Device,
        refused: Option<CudaError>,
    ) -> Result<(Arc<Self>, PageLocked)> {
        check(specs)?;
        let mut found = PageLocked { refused, ..PageLocked::default() };
        let frames = Self::build(specs, PINNED_PIECE_BYTES, |bytes| {
            if found.refused.is_none() {
                match device.pinned(bytes + ALIGN_BYTES) {
                    Ok(block) => {
                        found.pinned_bytes += bytes as u64;
                        return Ok(Memory::page_locked(block, ALIGN_BYTES));
                    }
                    Err(error) if error.is_sticky() => return Err(error.into()),
                    Err(error) => found.refused = Some(error),
                }
            }
            found.pageable_bytes += bytes as u64;
            Memory::mapped(bytes)
        })?;
        Ok((frames, found))
    }

    /// So many frames per class whose memory is elsewhere, on a device: they
    /// have states and guards, and no bytes.
    pub fn without_memory(frames: &[usize]) -> Arc<Self> {
        let spec = |&frames: &usize| ClassSpec { frame_bytes: 0, frames };
        let specs: Vec<ClassSpec> = frames.iter().map(spec).collect();
        Self::build(&specs, usize::MAX, |_| Ok(Memory::none())).expect("nothing is allocated")
    }

    /// `memory` answers for pieces of at most `piece_bytes`, or of one frame.
    fn build(
        specs: &[ClassSpec],
        piece_bytes: usize,
        mut memory: impl FnMut(usize) -> Result<Memory>,
    ) -> Result<Arc<Self>> {
        assert!(specs.len() <= usize::from(u16::MAX), "{} classes of frames", specs.len());
        let mut classes: Vec<Class> = Vec::with_capacity(specs.len());
        let (mut slots, mut regions) = (0, 0);
        for &spec in specs {
            let ClassSpec { frame_bytes, frames } = spec;
            assert!(u32::try_from(frames).is_ok(), "{frames} frames in a class");
            let most = |bytes: usize| bytes.checked_div(frame_bytes).unwrap_or(usize::MAX).max(1);
            let (per_piece, per_region) = (most(piece_bytes), most(piece_bytes.min(REGION_BYTES)));
            let pieces = (0..frames)
                .step_by(per_piece)
                .map(|first| memory(per_piece.min(frames - first).saturating_mul(frame_bytes)));
            let pieces = pieces.collect::<Result<Vec<_>>>()?;
            let (first_slot, first_region) = (slots, regions);
            slots += frames;
            regions += frames.div_ceil(per_region);
            let class = Class { spec, per_piece, pieces, per_region, first_slot, first_region };
            classes.push(class);
        }
        Ok(Arc::new(Self { classes, slots: Slots::new(slots) }))
    }

    /// What each class has, in the order of [`Frames::new`].
    pub fn classes(&self) -> impl ExactSizeIterator<Item = ClassSpec> {
        self.classes.iter().map(|class| class.spec)
    }

    /// The right to fill `frame`, under a new generation. `None` while it is
    /// pinned or being filled. Former content is lost.
    pub fn claim(self: &Arc<Self>, frame: FrameId) -> Option<Ticket> {
        let claim = Claim::new(self, self.slot(frame))?;
        Some(Ticket { claim, frame })
    }

    /// Takes a `Ready` or `Failed` frame without pins back to `Free`; `false`
    /// if it is pinned, being filled or free already.
    pub fn release(&self, frame: FrameId) -> bool {
        self.slots.release(self.slot(frame))
    }

    /// The right to read `frame`; `None` unless it is `Ready` with this
    /// generation.
    pub fn pin(self: &Arc<Self>, frame: FrameId, generation: Generation) -> Option<Pin> {
        let hold = Hold::new(self, self.slot(frame), generation)?;
        Some(Pin { hold, frame, generation })
    }

    /// State, generation and pins at this moment.
    pub fn state(&self, frame: FrameId) -> Status {
        self.slots.status(self.slot(frame))
    }

    /// All frames, cut between frames into regions of at most
    /// [`REGION_BYTES`], for registering with io_uring. They are valid as long
    /// as these frames live; [`Frames::region_of`] tells which is whose.
    pub fn regions(&self) -> Vec<Region> {
        let of_class = |class: &Class| -> Vec<Region> {
            let (frames, per_region) = (class.spec.frames, class.per_region);
            (0..frames)
                .step_by(per_region)
                .map(|first| Region {
                    start: class.frame(first),
                    bytes: per_region.min(frames - first) * class.spec.frame_bytes,
                })
                .collect()
        };
        self.classes.iter().flat_map(of_class).collect()
    }

    /// Position in [`Frames::regions`] of the region with `frame` in it.
    pub fn region_of(&self, frame: FrameId) -> usize {
        let class = &self.classes[usize::from(frame.class)];
        class.first_region + frame.index as usize / class.per_region
    }

    fn slot(&self, frame: FrameId) -> usize {
        let class = &self.classes[usize::from(frame.class)];
        let index = frame.index as usize;
        assert!(index < class.spec.frames, "{frame:?} of {:?}", class.spec);
        class.first_slot + index
    }

    fn start(&self, frame: FrameId) -> NonNull<u8> {
        self.classes[usize::from(frame.class)].frame(frame.index as usize)
    }

    fn frame_bytes(&self, frame: FrameId) -> usize {
        self.classes[usize::from(frame.class)].spec.frame_bytes
    }
}

/// The right to fill a frame. Dropped, it leaves the frame `Failed`.
pub struct Ticket {
    claim: Claim<Frames>,
    frame: FrameId,
}

impl Ticket {
    pub fn frame(&self) -> FrameId {
        self.frame
    }

    pub fn generation(&self) -> Generation {
        self.claim.generation()
    }

    /// The whole frame, `[frame_bytes]`; its content is whatever was there.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let frames = self.claim.owner();
        let (start, len) = (frames.start(self.frame), frames.frame_bytes(self.frame));
        // SAFETY: the memory is mapped (or of no bytes) as long as the claim's
        // `Arc` lives. A claim is the only one of its slot and excludes every hold, and it is
        // borrowed mutably and not yet cut.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) }
    }

    /// Cuts the ticket into chunks, in the order of `ranges` (byte ranges of
    /// the frame). The frame is `Ready` when all of them are done. Bytes
    /// outside of them keep what they had. Panics if there is no range, or if
    /// ranges overlap or leave the frame.
    pub fn chunks(self, ranges: &[Range<usize>]) -> Vec<Chunk> {
        let frame_bytes = self.claim.owner().frame_bytes(self.frame);
        let mut sorted: Vec<&Range<usize>> = ranges.iter().collect();
        sorted.sort_unstable_by_key(|range| (range.start, range.end));
        let mut free_from = 0;
        for range in sorted {
            let fits = free_from <= range.start && range.end <= frame_bytes;
            assert!(fits && range.start <= range.end, "{range:?} in {ranges:?} of {frame_bytes}");
            free_from = range.end;
        }
        let count = u32::try_from(ranges.len()).expect("fewer chunks than bytes of a region");
        let parts = self.claim.split(count);
        let cut = |(part, range): (Part<Frames>, &Range<usize>)| Chunk {
            part,
            frame: self.frame,
            at: range.start,
            len: range.len(),
        };
        parts.into_iter().zip(ranges).map(cut).collect()
    }
}

/// The right to fill a part of a frame, on any thread. Dropped, it has failed.
///
/// Whoever gives its address to the kernel keeps the chunk until the kernel
/// has finished with it, and does not call [`Chunk::bytes_mut`] meanwhile.
#[must_use]
pub struct Chunk {
    part: Part<Frames>,
    frame: FrameId,
    /// Byte in the frame where it starts.
    at: usize,
    len: usize,
}

impl Chunk {
    pub fn frame(&self) -> FrameId {
        self.frame
    }

    pub fn generation(&self) -> Generation {
        self.part.generation()
    }

    /// The bytes of the frame that it covers.
    pub fn range(&self) -> Range<usize> {
        self.at..self.at + self.len
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Position of its memory in [`Frames::regions`].
    pub fn region(&self) -> usize {
        self.part.owner().region_of(self.frame)
    }

    /// Address of [`Chunk::len`] bytes, which only this chunk may write.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        let start = self.part.owner().start(self.frame);
        // SAFETY: `Ticket::chunks` checked that the range is in the frame.
        unsafe { start.add(self.at) }.as_ptr()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the memory is mapped as long as the part's `Arc` lives. The
        // slot is `Filling` until this part is finished, so there is no other
        // claim and no hold; the ranges of the claim's parts are disjoint; the
        // chunk is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }

    /// The bytes are there. The last chunk of a ticket gets the landing.
    pub fn done(self) -> Option<Landed> {
        self.finish(true)
    }

    /// The bytes are not there and nobody writes them any more. The last chunk
    /// of a ticket gets the landing.
    pub fn fail(self) -> Option<Landed> {
        self.finish(false)
    }

    fn finish(self, ok: bool) -> Option<Landed> {
        let landing = self.part.finish(ok)?;
        Some(Landed { frame: self.frame, generation: landing.generation, ok: landing.ok })
    }
}

/// What became of a ticket. Given out once, by its last chunk; not if that one
/// was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Landed {
    pub frame: FrameId,
    pub generation: Generation,
    /// Every chunk was done and the frame is `Ready`; otherwise it is `Failed`.
    pub ok: bool,
}

/// A frame that may be read, on any thread: `[frame_bytes]`.
pub struct Pin {
    hold: Hold<Frames>,
    frame: FrameId,
    generation: Generation,
}

impl Pin {
    pub fn frame(&self) -> FrameId {
        self.frame
    }

    pub fn generation(&self) -> Generation {
        self.generation
    }
}

impl Deref for Pin {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let frames = self.hold.owner();
        let (start, len) = (frames.start(self.frame), frames.frame_bytes(self.frame));
        // SAFETY: the memory is mapped as long as the hold's `Arc` lives. The
        // slot is `Ready` and cannot be claimed while it is held, so nobody
        // writes; all of it is initialised (zeros at first).
        unsafe { std::slice::from_raw_parts(start.as_ptr(), len) }
    }
}

// SAFETY: the frame's memory stays where it is as long as the hold's `Arc`
// lives, and nobody writes to it while it is held.
unsafe impl HostMemory for Pin {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A cheap 64-bit checksum, for checks in debug builds and simulations that an
/// expert is the one that was read from the file. Every change within one
/// aligned group of eight bytes changes it; it is no protection against
/// somebody who forges bytes.
pub fn checksum(bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    // Each step is a bijection of the state and of the word.
    let step = |state: u64, word: u64| (state ^ word).wrapping_mul(ODD).rotate_left(29);
    let word = |group: &[u8]| {
        let mut word = [0; 8];
        word[..group.len()].copy_from_slice(group);
        u64::from_le_bytes(word)
    };
    let mut lanes = [1u64, 2, 3, 4];
    for group in bytes.chunks(32) {
        for (lane, group) in lanes.iter_mut().zip(group.chunks(8)) {
            *lane = step(*lane, word(group));
        }
    }
    lanes.into_iter().fold(bytes.len() as u64, step)
}

#[cfg(test)]
mod tests;
