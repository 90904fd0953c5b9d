//! Random submissions, promotions, discards and waits, on bad and good disks.

use super::{
    faults::{Act, BROKEN, FILE_BYTES, act, byte, identity_of},
    *,
};
use crate::store::{
    mover::{Counters, MoveError},
    slot::State,
};
use std::{collections::HashMap, io, sync::Mutex};

/// A disk whose every act is random.
struct Chaos(Mutex<Random>);

impl ReadAt for Chaos {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        use io::ErrorKind::{Interrupted, WouldBlock};
        let mut random = self.0.lock().unwrap();
        let next = match random.below(20) {
            // At least a block: less, three times, is the end of the file.
            0..3 => Act::Short(ALIGN_BYTES + random.below(bytes.len())),
            3..6 => BROKEN,
            6 => Act::Fail(Interrupted),
            7 => Act::Fail(WouldBlock),
            8..11 => Act::Sleep(random.below(300) as u64),
            _ => Act::Good,
        };
        drop(random);
        act(next, bytes, offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(identity_of(FILE_BYTES, 0))
    }
}

/// Random submissions, promotions, discards and waits: every fill ends exactly
/// once, with its frame readable and right or claimable again.
fn storm(mover: &mut dyn Mover, random: &mut Random, expected: &dyn Fn(usize) -> u8, bytes: usize) {
    const FRAMES: usize = 12;
    let frames = frames(16 * ALIGN_BYTES, FRAMES);
    let mut free: Vec<usize> = (0..FRAMES).collect();
    let mut outstanding: HashMap<u64, (usize, Piece)> = HashMap::new();
    let before = mover.counters();
    let mut next_key = 0;
    let mut ends = [0; 3];
    for step in 0..3000 {
        let is_over = step >= 2500;
        let a_key = next_key.max(1) - 1 - (random.below(FRAMES) as u64).min(next_key.max(1) - 1);
        match random.below(8) {
            0..4 if !is_over && !free.is_empty() => {
                let index = free.swap_remove(random.below(free.len()));
                let start = random.below(bytes / ALIGN_BYTES - 16) * ALIGN_BYTES;
                let piece = piece(start..start + 1 + random.below(16 * ALIGN_BYTES));
                let urgency = [Urgency::Demand, Urgency::Prefetch][random.below(2)];
                let ticket = frames.claim(frame(index)).expect("free frames can be claimed");
                mover.submit(fill(next_key, ticket, &[piece], urgency));
                outstanding.insert(next_key, (index, piece));
                next_key += 1;
            }
            4 => mover.promote(a_key),
            5 => mover.discard(a_key),
            _ => {
                let wait_ns = if is_over { 10 * SECOND_NS } else { random.below(200_000) as u64 };
                let Some(done) = mover.next(wait_ns) else { continue };
                let (index, piece) = outstanding.remove(&done.key).expect("one Done per fill");
                assert_eq!(done.frame, frame(index));
                match done.result {
                    Ok(()) => {
                        let pin = frames.pin(done.frame, done.generation).expect("it is ready");
                        let start = piece.offset as usize;
                        let is_right = (0..piece.needed).all(|at| pin[at] == expected(start + at));
                        assert!(is_right, "{piece:?}");
                        ends[0] += 1;
                    }
                    Err(MoveError::Discarded) => ends[1] += 1,
                    Err(MoveError::Io { .. }) => ends[2] += 1,
                    Err(error) => panic!("{error}"),
                }
                assert_ne!(frames.state(done.frame).state, State::Filling);
                free.push(index);
            }
        }
    }
    while !outstanding.is_empty() {
        let done = wait(mover);
        outstanding.remove(&done.key).expect("one Done per fill");
    }
    assert!(mover.next(0).is_none() && mover.counters().outstanding == 0);
    // How many of each depends on the speed of the disk.
    assert!(ends[0] > 10 && ends[1] > 2, "{ends:?}");
    let ended = |counters: Counters| {
        let landed = counters.demands_landed + counters.prefetches_landed;
        landed + counters.discarded + counters.failed
    };
    let counters = mover.counters();
    assert_eq!(counters.fills - before.fills, next_key);
    assert_eq!(ended(counters) - ended(before), next_key);
}

#[test]
fn every_fill_of_a_bad_disk_ends_exactly_once() {
    for seed in 1..=8 {
        let chaos = Box::new(Chaos(Mutex::new(Random(seed))));
        let mut mover = over(vec![(FILE_BYTES, chaos)], 1 + seed as usize % 4, 4 * ALIGN_BYTES);
        let expected = |offset: usize| byte(offset as u64);
        storm(&mut mover, &mut Random(seed + 100), &expected, FILE_BYTES as usize);
        assert!(mover.counters().retries > 0);
    }
}

#[test]
fn every_fill_of_a_real_disk_ends_exactly_once() {
    let scratch = Scratch::new("storm");
    let content = Random(4).bytes(8 << 20);
    let path = scratch.file("model", &content);
    for way in ways() {
        let way = DiskOptions {
            chunk_bytes: ALIGN_BYTES,
            depth: 1,
            prefetch_depth: 1,
            register: false,
            ..way
        };
        let files = with_identities(std::slice::from_ref(&path));
        let (mut mover, _) = probe(&files, &frames(64 << 10, 1), &way).unwrap();
        storm(&mut *mover, &mut Random(5), &|offset| content[offset], content.len());
    }
}
