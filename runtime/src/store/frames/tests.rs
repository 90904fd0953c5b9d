#![allow(clippy::single_range_in_vec_init)] // chunks come as a slice of ranges

use super::*;
use crate::store::slot::State;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

const SMALL: ClassSpec = ClassSpec { frame_bytes: 8192, frames: 3 };
const LARGE: ClassSpec = ClassSpec { frame_bytes: 3 * 4096, frames: 2 };
const FRAME: FrameId = FrameId { class: 1, index: 1 };

fn frames() -> Arc<Frames> {
    Frames::new(&[SMALL, LARGE]).unwrap()
}

/// Fills `frame` with `value` in one chunk.
fn fill(frames: &Arc<Frames>, frame: FrameId, value: u8) -> Generation {
    let ticket = frames.claim(frame).unwrap();
    let whole = 0..frames.frame_bytes(frame);
    let mut chunk = ticket.chunks(&[whole]).pop().unwrap();
    chunk.bytes_mut().fill(value);
    let landed = chunk.done().unwrap();
    assert!(landed.ok && landed.frame == frame);
    landed.generation
}

fn state(frames: &Frames) -> State {
    frames.state(FRAME).state
}

#[test]
fn frames_are_aligned_apart_and_as_large_as_asked() {
    let frames = frames();
    let all = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)];
    let all = all.map(|(class, index)| FrameId { class, index });
    let generations: Vec<_> = (1..).zip(all).map(|(v, frame)| fill(&frames, frame, v)).collect();
    for ((value, frame), generation) in (1..).zip(all).zip(generations) {
        let pin = frames.pin(frame, generation).unwrap();
        assert_eq!(pin.len(), [8192, 12288][usize::from(frame.class)]);
        assert_eq!(pin.as_ptr() as usize % ALIGN_BYTES, 0);
        assert!(pin.iter().all(|&byte| byte == value), "{frame:?} was overwritten");
    }
}

#[test]
fn ready_after_the_last_chunk_in_any_order_and_only_then() {
    let frames = frames();
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let ticket = frames.claim(FRAME).unwrap();
        let generation = ticket.generation();
        let chunks = ticket.chunks(&[4096..8192, 0..4096, 8192..12000]);
        let mut chunks: Vec<_> = chunks.into_iter().map(Some).collect();
        for (at, n) in order.into_iter().enumerate() {
            assert_eq!(state(&frames), State::Filling);
            assert!(frames.pin(FRAME, generation).is_none(), "read while being filled");
            let mut chunk = chunks[n].take().unwrap();
            let start = chunk.range().start as u8;
            chunk.bytes_mut().fill(n as u8 + start);
            let landed = chunk.done();
            let expected = Landed { frame: FRAME, generation, ok: true };
            assert_eq!(landed, (at == 2).then_some(expected));
        }
        let pin = frames.pin(FRAME, generation).unwrap();
        assert_eq!((pin[0], pin[4096], pin[8192], pin[11999]), (1, 0, 2, 2));
    }
}

#[test]
fn one_failed_or_dropped_chunk_fails_the_frame() {
    let frames = frames();
    for bad in 0..3 {
        for is_dropped in [false, true] {
            let ticket = frames.claim(FRAME).unwrap();
            let generation = ticket.generation();
            let mut landed = None;
            for (n, chunk) in ticket.chunks(&[0..1, 1..2, 2..3]).into_iter().enumerate() {
                assert_eq!(state(&frames), State::Filling);
                landed = match (n == bad, is_dropped) {
                    (false, _) => chunk.done(),
                    (true, false) => chunk.fail(),
                    (true, true) => {
                        drop(chunk);
                        None
                    }
                };
            }
            let expected = Landed { frame: FRAME, generation, ok: false };
            assert_eq!(landed, (bad < 2 || !is_dropped).then_some(expected));
            assert_eq!(state(&frames), State::Failed);
            assert!(frames.pin(FRAME, generation).is_none());
        }
    }
    // Two failures, and the frame is of use again afterwards.
    let chunks = frames.claim(FRAME).unwrap().chunks(&[0..1, 1..2]);
    let landed: Vec<_> = chunks.into_iter().filter_map(Chunk::fail).collect();
    assert!(landed.len() == 1 && !landed[0].ok);
    let generation = fill(&frames, FRAME, 9);
    assert_eq!(frames.pin(FRAME, generation).unwrap()[0], 9);
}

#[test]
fn a_dropped_ticket_frees_its_frame_as_failed() {
    let frames = frames();
    let ticket = frames.claim(FRAME).unwrap();
    assert!(frames.claim(FRAME).is_none(), "two writers");
    drop(ticket);
    assert_eq!(state(&frames), State::Failed);
    assert!(frames.release(FRAME));
    assert_eq!(state(&frames), State::Free);
    assert!(!frames.release(FRAME));
}

#[test]
fn an_unwinding_copy_fails_its_frame() {
    let frames = frames();
    let chunks = frames.claim(FRAME).unwrap().chunks(&[0..4096, 4096..8192]);
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let mut chunks = chunks;
        chunks[0].bytes_mut().fill(1);
        panic!("a copy that goes wrong");
    }));
    assert!(unwound.is_err());
    assert_eq!(state(&frames), State::Failed);
}

#[test]
fn pinned_frames_are_neither_claimed_nor_released() {
    let frames = frames();
    let generation = fill(&frames, FRAME, 5);
    let (one, two) = (frames.pin(FRAME, generation).unwrap(), frames.pin(FRAME, generation));
    assert_eq!(frames.state(FRAME).pins, 2);
    drop(one);
    assert!(frames.claim(FRAME).is_none());
    assert!(!frames.release(FRAME));
    assert!(two.unwrap().iter().all(|&byte| byte == 5));
    assert_eq!(frames.state(FRAME), Status { generation, pins: 0, state: State::Ready });
    assert!(frames.release(FRAME));
    assert!(frames.pin(FRAME, generation).is_none(), "a released frame was read");
}

#[test]
fn a_stale_generation_reads_nothing() {
    let frames = frames();
    let old = fill(&frames, FRAME, 1);
    let new = fill(&frames, FRAME, 2);
    assert!(old < new);
    assert!(frames.pin(FRAME, old).is_none());
    assert_eq!(frames.pin(FRAME, new).unwrap()[0], 2);
}

#[test]
fn pins_never_spill_into_the_generation() {
    let frames = frames();
    let generation = fill(&frames, FRAME, 1);
    let pins: Vec<_> = (0..65_535).map(|_| frames.pin(FRAME, generation).unwrap()).collect();
    assert!(frames.pin(FRAME, generation).is_none());
    assert_eq!(frames.state(FRAME), Status { generation, pins: 65_535, state: State::Ready });
    drop(pins);
    assert_eq!(frames.state(FRAME).pins, 0);
}

#[test]
fn the_last_generation_is_never_followed_by_the_first() {
    let slots = Slots::from_generation(1, Generation::LAST);
    let class = Class {
        spec: SMALL,
        per_piece: 3,
        pieces: vec![Memory::mapped(3 * 8192).unwrap()],
        per_region: 3,
        first_slot: 0,
        first_region: 0,
    };
    let frames = Arc::new(Frames { classes: vec![class], slots });
    assert!(frames.claim(FrameId { class: 0, index: 0 }).is_none());
}

#[test]
fn chunks_and_pins_outlive_the_store() {
    let frames = frames();
    let generation = fill(&frames, FrameId { class: 0, index: 0 }, 7);
    let pin = frames.pin(FrameId { class: 0, index: 0 }, generation).unwrap();
    let mut chunk = frames.claim(FRAME).unwrap().chunks(&[0..100]).pop().unwrap();
    drop(frames);
    chunk.bytes_mut().fill(1);
    assert!(chunk.done().unwrap().ok);
    assert!(std::thread::spawn(move || pin.iter().all(|&byte| byte == 7)).join().unwrap());
}

/// The models check the protocol; this checks the addresses under it, on real
/// threads: three writers and three readers of three frames.
#[test]
fn readers_see_whole_experts_while_frames_are_refilled() {
    const FILLS: u64 = 3_000;
    let frames = frames();
    let filled: [AtomicU64; 3] = Default::default();
    let reads = AtomicU64::new(0);
    let write = |index: u32| {
        let frame = FrameId { class: 0, index };
        for _ in 0..FILLS {
            let ticket = loop {
                if let Some(ticket) = frames.claim(frame) {
                    break ticket;
                }
                std::thread::yield_now();
            };
            let value = ticket.generation().get() as u8;
            let mut landed = None;
            for mut chunk in ticket.chunks(&[4096..8192, 0..4096]) {
                chunk.bytes_mut().fill(value);
                landed = chunk.done();
            }
            assert!(landed.unwrap().ok);
            filled[index as usize].fetch_add(1, Ordering::Release);
        }
    };
    let read = |index: u32| {
        let frame = FrameId { class: 0, index };
        loop {
            let is_last = filled[index as usize].load(Ordering::Acquire) == FILLS;
            let generation = frames.state(frame).generation;
            if let Some(pin) = frames.pin(frame, generation) {
                let value = generation.get() as u8;
                assert!(pin.iter().all(|&byte| byte == value), "a torn or stale expert");
                reads.fetch_add(1, Ordering::Relaxed);
            }
            if is_last {
                break;
            }
        }
    };
    std::thread::scope(|scope| {
        for index in 0..3 {
            scope.spawn(move || write(index));
            scope.spawn(move || read(index));
        }
    });
    assert!(reads.load(Ordering::Relaxed) >= 3, "each frame is read at the end at least");
}

#[test]
fn overlapping_or_outlying_chunks_are_refused() {
    let frames = frames();
    #[allow(clippy::reversed_empty_ranges)]
    let refused: [&[Range<usize>]; 5] =
        [&[], &[0..4096, 4095..5000], &[4096..4097, 0..12288], &[0..12289], &[5..3]];
    for ranges in refused {
        let ticket = frames.claim(FRAME).unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| ticket.chunks(ranges))).is_err(), "{ranges:?}");
        assert_eq!(state(&frames), State::Failed);
    }
}

#[test]
fn regions_hold_whole_frames_and_all_of_them() {
    // Mapped, never touched.
    let spec = ClassSpec { frame_bytes: 384 << 20, frames: 5 };
    let frames = Frames::new(&[SMALL, spec]).unwrap();
    let regions = frames.regions();
    let sizes: Vec<_> = regions.iter().map(|region| region.bytes).collect();
    assert_eq!(sizes, [3 * 8192, 768 << 20, 768 << 20, 384 << 20]);
    for (class, count) in [(0, 3), (1, 5)] {
        for index in 0..count {
            let frame = FrameId { class, index };
            let region = regions[frames.region_of(frame)];
            let start = frames.start(frame).as_ptr() as usize;
            let first = region.start.as_ptr() as usize;
            assert!(first <= start);
            assert!(start + frames.frame_bytes(frame) <= first + region.bytes, "{frame:?}");
        }
    }
    let chunk = frames.claim(FrameId { class: 1, index: 4 }).unwrap().chunks(&[0..1]).pop();
    assert_eq!(chunk.unwrap().region(), 3);
}

/// Page-locked memory comes in pieces.
#[test]
fn frames_of_several_pieces_are_apart_and_in_regions_of_their_own() {
    let mut asked = Vec::new();
    let frames = Frames::build(&[SMALL, LARGE], 2 * 8192 + 4096, |bytes| {
        asked.push(bytes);
        Memory::mapped(bytes)
    });
    let frames = frames.unwrap();
    assert_eq!(asked, [2 * 8192, 8192, 12288, 12288]);
    assert_eq!(frames.regions().len(), 4);
    let all: Vec<_> = [(0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 0, 2), (1, 1, 3)]
        .map(|(class, index, region)| (FrameId { class, index }, region))
        .into_iter()
        .zip(1..)
        .map(|((frame, region), value)| {
            assert_eq!(frames.region_of(frame), region, "{frame:?}");
            (frame, value, fill(&frames, frame, value))
        })
        .collect();
    for (frame, value, generation) in all {
        let pin = frames.pin(frame, generation).unwrap();
        assert!(pin.iter().all(|&byte| byte == value), "{frame:?} was overwritten");
    }
}

#[test]
fn memory_that_cannot_be_had_is_an_error_with_its_bytes() {
    for frames in [1 << 30, u32::MAX as usize] {
        let spec = ClassSpec { frame_bytes: 1 << 30, frames };
        let error = Frames::new(&[spec]).err().expect("2^60 bytes").to_string();
        assert!(error.starts_with(&(frames << 30).to_string()), "{error}");
    }
    let spec = ClassSpec { frame_bytes: REGION_BYTES + 4096, frames: 1 };
    let error = Frames::new(&[spec]).err().unwrap().to_string();
    assert!(error.contains("1073745920 bytes is too large"), "{error}");
}

#[test]
fn a_checksum_sees_flips_swaps_and_lengths() {
    let mut bytes: Vec<u8> =
        (0..1003u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let clean = checksum(&bytes);
    for at in 0..bytes.len() {
        bytes[at] ^= 1 << (at % 8);
        assert_ne!(checksum(&bytes), clean, "byte {at}");
        bytes[at] ^= 1 << (at % 8);
    }
    assert_eq!(checksum(&bytes), clean);
    for distance in [8, 32, 512] {
        bytes.swap(100, 100 + distance);
        assert_ne!(bytes[100], bytes[100 + distance]);
        assert_ne!(checksum(&bytes), clean);
        bytes.swap(100, 100 + distance);
    }
    assert_ne!(checksum(&[0; 8]), checksum(&[0; 16]));
    assert_ne!(checksum(&[0; 8]), checksum(&[0; 7]));
}
