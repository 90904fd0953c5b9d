//! Disks that fail, stall and panic.

use super::*;
use crate::store::{mover::MoveError, slot::State};
use std::{
    io,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

pub(super) const FILE_BYTES: u64 = 64 << 20;

pub(super) fn identity_of(len: u64, inode: u64) -> Identity {
    Identity { len, modified: None, device: 1, inode }
}

pub(super) fn byte(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn write(bytes: &mut [u8], offset: u64) {
    bytes.iter_mut().zip(offset..).for_each(|(to, offset)| *to = byte(offset));
}

/// What a read of a [`Plan`] does.
#[derive(Clone, Copy)]
pub(super) enum Act {
    Good,
    Short(usize),
    Fail(io::ErrorKind),
    Sleep(u64),
    Panic,
}

/// A disk that follows a list of acts, then is good; it counts reads.
struct Plan {
    acts: Mutex<Vec<Act>>,
    reads: AtomicUsize,
}

impl Plan {
    fn new(acts: &[Act]) -> Arc<Self> {
        let acts = Mutex::new(acts.iter().rev().copied().collect());
        Arc::new(Self { acts, reads: AtomicUsize::new(0) })
    }
}

pub(super) fn act(act: Act, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let len = match act {
        Act::Good => bytes.len(),
        Act::Short(len) => len.min(bytes.len()),
        Act::Fail(kind) => return Err(kind.into()),
        Act::Sleep(us) => {
            std::thread::sleep(Duration::from_micros(us));
            bytes.len()
        }
        Act::Panic => panic!("the disk is on fire"),
    };
    write(&mut bytes[..len], offset);
    Ok(len)
}

impl ReadAt for Arc<Plan> {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let next = self.acts.lock().unwrap().pop();
        act(next.unwrap_or(Act::Good), bytes, offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(identity_of(FILE_BYTES, 0))
    }
}

/// One fill of 200,000 bytes from byte 8192 on in one read; how it ended, and
/// how many reads that took.
fn one(acts: &[Act]) -> (Done, usize, DiskMover, Arc<Frames>) {
    let plan = Plan::new(acts);
    let mut mover = over(vec![(FILE_BYTES, Box::new(plan.clone()))], 1, 1 << 20);
    let frames = frames(256 << 10, 2);
    let ticket = frames.claim(frame(0)).unwrap();
    mover.submit(fill(1, ticket, &[piece(8192..208_192)], Urgency::Demand));
    let done = wait(&mut mover);
    if done.result.is_ok() {
        let pin = frames.pin(frame(0), done.generation).unwrap();
        let mut expected = vec![0; 200_000];
        write(&mut expected, 8192);
        assert!(pin[..200_000] == expected);
    } else {
        assert_eq!(frames.state(frame(0)).state, State::Failed);
    }
    (done, plan.reads.load(Ordering::Relaxed), mover, frames)
}

pub(super) const BROKEN: Act = Act::Fail(io::ErrorKind::Other);

#[test]
fn short_reads_and_interruptions_go_on_to_the_full_length() {
    use io::ErrorKind::{Interrupted, WouldBlock};
    let again = [Act::Fail(Interrupted), Act::Fail(WouldBlock), Act::Fail(Interrupted)];
    let (done, reads, mover, _) = one(&again);
    assert!(done.result.is_ok() && reads == 4);
    assert_eq!(mover.counters().retries, 3);
    // After 5000 bytes it goes on at 4096, so that reads stay aligned.
    let (done, reads, mover, _) = one(&[Act::Short(5000), Act::Short(8192), Act::Short(100_000)]);
    assert!(done.result.is_ok() && reads == 4);
    assert_eq!(mover.counters().short_reads, 3);
    // Less than a block is a hiccup first, ...
    let (done, reads, ..) = one(&[Act::Short(100), Act::Short(511)]);
    assert!(done.result.is_ok() && reads == 3);
    // ... and then the end of the file.
    for acts in [&[Act::Short(100); 3][..], &[Act::Short(0)]] {
        let (done, reads, ..) = one(acts);
        assert_eq!(reads, acts.len());
        let Err(MoveError::Changed { found, .. }) = done.result else { panic!("{done:?}") };
        let end = if acts.len() == 3 { 8292 } else { 8192 };
        assert_eq!(found, format!("its end at byte {end}"));
    }
}

#[test]
fn an_error_is_tried_three_times() {
    for (acts, is_ok) in [(1, true), (2, true), (3, false)] {
        let (done, reads, mut mover, frames) = one(&vec![BROKEN; acts]);
        assert_eq!(done.result.is_ok(), is_ok);
        assert_eq!(reads, (acts + 1).min(3));
        assert_eq!(mover.counters().retries, acts.min(2) as u64);
        let waited_ns = done.ended_ns - done.submitted_ns;
        let least_ns = [1_000_000, 11_000_000, 11_000_000][acts - 1];
        assert!((least_ns..SECOND_NS).contains(&waited_ns), "{waited_ns} ns");
        if let Err(error) = done.result {
            let MoveError::Io { file, offset, source } = error else { panic!("{error}") };
            assert_eq!((file.to_str(), offset), (Some("/nowhere/0.gguf"), 8192));
            assert_eq!(source.kind(), io::ErrorKind::Other);
        }
        // The next one is read as if nothing had been.
        let ticket = frames.claim(frame(0)).unwrap();
        mover.submit(fill(1, ticket, &[piece(0..9)], Urgency::Demand));
        wait(&mut mover).result.unwrap();
    }
}

#[test]
fn a_disk_that_is_always_busy_is_an_error_in_the_end() {
    let (done, reads, ..) = one(&vec![Act::Fail(io::ErrorKind::Interrupted); 2000]);
    assert!(matches!(done.result, Err(MoveError::Io { .. })) && reads == 1001, "{reads}");
}

/// With a single thread: the failed read waits, the thread does not.
#[test]
fn other_reads_go_on_while_one_waits_for_its_next_try() {
    let plan = Plan::new(&[BROKEN, BROKEN]);
    let mut mover = over(vec![(FILE_BYTES, Box::new(plan.clone()))], 1, 1 << 20);
    let frames = frames(8192, 2);
    for key in [0, 1] {
        let ticket = frames.claim(frame(key)).unwrap();
        let start = key * 8192;
        mover.submit(fill(key as u64, ticket, &[piece(start..start + 8192)], Urgency::Demand));
    }
    // Both fail once or the first twice; nobody fails for good.
    for _ in 0..2 {
        wait(&mut mover).result.unwrap();
    }
    let plan = Plan::new(&[BROKEN]);
    let mut mover = over(vec![(FILE_BYTES, Box::new(plan))], 1, 1 << 20);
    for key in [0, 1] {
        let ticket = frames.claim(frame(key)).unwrap();
        mover.submit(fill(key as u64, ticket, &[piece(0..8192)], Urgency::Demand));
    }
    assert_eq!([wait(&mut mover).key, wait(&mut mover).key], [1, 0], "the second did not pass");
}

/// A disk with one bad block, on which every read takes a millisecond.
struct BadBlock {
    offset: u64,
    reads: Arc<AtomicUsize>,
}

impl ReadAt for BadBlock {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let next = if offset == self.offset { BROKEN } else { Act::Sleep(1000) };
        act(next, bytes, offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(identity_of(FILE_BYTES, 0))
    }
}

#[test]
fn the_first_error_of_a_fill_ends_its_other_reads() {
    let reads = Arc::new(AtomicUsize::new(0));
    let disk = BadBlock { offset: 2 * ALIGN_BYTES as u64, reads: reads.clone() };
    let mut mover = over(vec![(FILE_BYTES, Box::new(disk))], 1, ALIGN_BYTES);
    let frames = frames(200 * ALIGN_BYTES, 1);
    let ticket = frames.claim(frame(0)).unwrap();
    mover.submit(fill(1, ticket, &[piece(0..200 * ALIGN_BYTES)], Urgency::Demand));
    let done = wait(&mut mover);
    let Err(MoveError::Io { offset, .. }) = done.result else { panic!("{done:?}") };
    assert_eq!(offset, 2 * ALIGN_BYTES as u64);
    // Three tries take 11 ms, in which the others went on.
    let reads = reads.load(Ordering::Relaxed);
    assert!((5..100).contains(&reads), "{reads} reads");
    assert!(mover.next(50_000_000).is_none(), "a second Done");
    assert!(frames.claim(frame(0)).is_some());
}

#[test]
fn a_panic_ends_every_fill_and_every_later_one() {
    for depth in [1, 3] {
        let mut acts = vec![Act::Sleep(2000); 4];
        acts.push(Act::Panic);
        let plan = Plan::new(&acts);
        let mut mover = over(vec![(FILE_BYTES, Box::new(plan))], depth, ALIGN_BYTES);
        let frames = frames(8 * ALIGN_BYTES, 10);
        for key in 0..10 {
            let ticket = frames.claim(frame(key)).unwrap();
            mover.submit(fill(key as u64, ticket, &[piece(0..8 * ALIGN_BYTES)], Urgency::Demand));
        }
        let mut keys = Vec::new();
        for _ in 0..10 {
            let done = wait(&mut mover);
            keys.push(done.key);
            match done.result {
                Err(MoveError::Stopped(why)) => assert!(why.contains("disk is on fire"), "{why}"),
                // Other threads read on until they are told.
                result => assert!(result.is_ok() && depth > 1, "{result:?}"),
            }
            assert!(frames.claim(done.frame).is_some(), "its frame is stuck");
        }
        keys.sort_unstable();
        assert_eq!(keys, (0..10).collect::<Vec<u64>>());
        let ticket = frames.claim(frame(0)).unwrap();
        mover.submit(fill(99, ticket, &[piece(0..5)], Urgency::Prefetch));
        let done = mover.next(0).expect("it ends at once");
        assert!(matches!(done.result, Err(MoveError::Stopped(_))) && done.key == 99);
    }
}
