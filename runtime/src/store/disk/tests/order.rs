//! Who is served when.

use super::*;
use crate::store::{
    disk::{
        board::{Board, Take},
        job::{Job, Verdict},
    },
    mover::{MoveError, SLOW_NS},
};
use std::{
    io,
    sync::{Condvar, Mutex},
};

/// A disk whose bytes are the number of their block, that writes down the
/// offsets that were read and stands still until it is let go.
#[derive(Default)]
struct Gate {
    offsets: Mutex<Vec<u64>>,
    is_open: Mutex<bool>,
    opened: Condvar,
}

const FILE_BYTES: u64 = 1 << 30;

impl Gate {
    fn open(&self) {
        *self.is_open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn offsets(&self) -> Vec<u64> {
        self.offsets.lock().unwrap().clone()
    }

    /// Waits until so many reads have come to the gate.
    fn await_reads(&self, count: usize) {
        let start = std::time::Instant::now();
        while self.offsets().len() < count {
            assert!(start.elapsed() < Duration::from_secs(30), "{:?}", self.offsets());
            std::thread::yield_now();
        }
    }
}

impl ReadAt for Arc<Gate> {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.offsets.lock().unwrap().push(offset);
        let mut is_open = self.is_open.lock().unwrap();
        while !*is_open {
            is_open = self.opened.wait(is_open).unwrap();
        }
        bytes.fill((offset / ALIGN_BYTES as u64) as u8);
        Ok(bytes.len())
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity { len: FILE_BYTES, modified: None, device: 1, inode: 0 })
    }
}

/// One thread on a closed gate; chunks are blocks.
fn gated() -> (Arc<Gate>, DiskMover) {
    let gate = Arc::new(Gate::default());
    let mover = over(vec![(FILE_BYTES, Box::new(gate.clone()))], 1, ALIGN_BYTES);
    (gate, mover)
}

/// A fill of `blocks` blocks from block `first` on, in frame `key`.
fn submit(mover: &mut dyn Mover, frames: &Arc<Frames>, key: u64, first: usize, urgency: Urgency) {
    let ticket = frames.claim(frame(key as usize)).unwrap();
    let piece = piece(first * ALIGN_BYTES..(first + 3) * ALIGN_BYTES);
    mover.submit(fill(key, ticket, &[piece], urgency));
}

fn blocks(gate: &Gate) -> Vec<u64> {
    gate.offsets().iter().map(|offset| offset / ALIGN_BYTES as u64).collect()
}

#[test]
fn a_demand_overtakes_prefetches_at_the_border_of_a_chunk() {
    let (gate, mut mover) = gated();
    let frames = frames(4 * ALIGN_BYTES, 4);
    submit(&mut mover, &frames, 0, 10, Urgency::Prefetch);
    submit(&mut mover, &frames, 1, 20, Urgency::Prefetch);
    gate.await_reads(1);
    submit(&mut mover, &frames, 2, 30, Urgency::Demand);
    submit(&mut mover, &frames, 3, 40, Urgency::Demand);
    gate.open();
    let ended: Vec<u64> = (0..4).map(|_| wait(&mut mover).key).collect();
    assert_eq!(ended, [2, 3, 0, 1]);
    assert_eq!(blocks(&gate), [10, 30, 31, 32, 40, 41, 42, 11, 12, 20, 21, 22]);
    let counters = mover.counters();
    assert_eq!((counters.demands_landed, counters.prefetches_landed), (2, 2));
}

#[test]
fn a_promoted_prefetch_goes_behind_the_demands() {
    let (gate, mut mover) = gated();
    let frames = frames(4 * ALIGN_BYTES, 4);
    for (key, first) in [(0, 10), (1, 20), (2, 30)] {
        submit(&mut mover, &frames, key, first, Urgency::Prefetch);
    }
    gate.await_reads(1);
    submit(&mut mover, &frames, 3, 40, Urgency::Demand);
    mover.promote(2);
    mover.promote(2);
    mover.promote(77);
    gate.open();
    let ended: Vec<u64> = (0..4).map(|_| wait(&mut mover).key).collect();
    assert_eq!(ended, [3, 2, 0, 1]);
    assert_eq!(blocks(&gate), [10, 40, 41, 42, 30, 31, 32, 11, 12, 20, 21, 22]);
    assert_eq!(mover.counters().demands_landed, 2);
}

/// Three threads, two of them for prefetches.
#[test]
fn a_demand_finds_a_place_while_prefetches_are_read() {
    let gate = Arc::new(Gate::default());
    let mut mover = over(vec![(FILE_BYTES, Box::new(gate.clone()))], 3, ALIGN_BYTES);
    let frames = frames(4 * ALIGN_BYTES, 3);
    submit(&mut mover, &frames, 0, 10, Urgency::Prefetch);
    submit(&mut mover, &frames, 1, 20, Urgency::Prefetch);
    gate.await_reads(2);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(gate.offsets().len(), 2, "a third prefetch at once");
    submit(&mut mover, &frames, 2, 30, Urgency::Demand);
    gate.await_reads(3);
    assert!(blocks(&gate).contains(&30));
    gate.open();
    (0..3).for_each(|_| wait(&mut mover).result.unwrap());
}

#[test]
fn a_promoted_prefetch_is_read_at_once_if_a_thread_is_idle() {
    let gate = Arc::new(Gate::default());
    let mut mover = over(vec![(FILE_BYTES, Box::new(gate.clone()))], 2, ALIGN_BYTES);
    let frames = frames(4 * ALIGN_BYTES, 2);
    submit(&mut mover, &frames, 0, 10, Urgency::Prefetch);
    submit(&mut mover, &frames, 1, 20, Urgency::Prefetch);
    gate.await_reads(1);
    std::thread::sleep(Duration::from_millis(20));
    mover.promote(1);
    gate.await_reads(2);
    assert_eq!(blocks(&gate), [10, 20]);
    gate.open();
    (0..2).for_each(|_| wait(&mut mover).result.unwrap());
}

#[test]
fn a_discarded_fill_gives_up_what_is_not_read_yet() {
    let (gate, mut mover) = gated();
    let frames = frames(4 * ALIGN_BYTES, 3);
    submit(&mut mover, &frames, 0, 10, Urgency::Prefetch);
    submit(&mut mover, &frames, 1, 20, Urgency::Prefetch);
    gate.await_reads(1);
    mover.discard(1);
    // Nothing of it was with the disk, so it lands at once.
    let done = mover.next(0).unwrap();
    assert_eq!((done.key, done.bytes), (1, 0));
    assert!(matches!(done.result, Err(MoveError::Discarded)));
    assert!(frames.claim(frame(1)).is_some(), "its frame is free");
    // One block of the other is with the disk: the frame is not free yet.
    mover.discard(0);
    assert!(mover.next(0).is_none());
    assert!(frames.claim(frame(0)).is_none(), "a frame that is being written was given out");
    gate.open();
    let done = wait(&mut mover);
    assert_eq!((done.key, done.bytes), (0, ALIGN_BYTES as u64));
    assert!(matches!(done.result, Err(MoveError::Discarded)));
    assert!(frames.claim(frame(0)).is_some());
    assert_eq!(blocks(&gate), [10]);
    let counters = mover.counters();
    assert_eq!((counters.discarded, counters.wasted_bytes), (2, ALIGN_BYTES as u64));
    // Its last block already with the disk, a fill lands whole.
    submit(&mut mover, &frames, 2, 50, Urgency::Demand);
    wait(&mut mover).result.unwrap();
    mover.discard(2);
    assert!(mover.next(0).is_none(), "a second Done");
}

#[test]
fn a_fill_whose_reads_are_all_with_the_disk_lands_in_spite_of_a_discard() {
    let gate = Arc::new(Gate::default());
    let mut mover = over(vec![(FILE_BYTES, Box::new(gate.clone()))], 3, ALIGN_BYTES);
    let frames = frames(4 * ALIGN_BYTES, 1);
    submit(&mut mover, &frames, 0, 10, Urgency::Demand);
    gate.await_reads(3);
    mover.discard(0);
    gate.open();
    let done = wait(&mut mover);
    done.result.unwrap();
    let pin = frames.pin(done.frame, done.generation).unwrap();
    assert_eq!([pin[0], pin[ALIGN_BYTES], pin[2 * ALIGN_BYTES]], [10, 11, 12]);
}

#[test]
fn a_dropped_mover_waits_for_its_reads_and_drops_the_rest() {
    let (gate, mut mover) = gated();
    let frames = frames(4 * ALIGN_BYTES, 2);
    submit(&mut mover, &frames, 0, 10, Urgency::Demand);
    submit(&mut mover, &frames, 1, 20, Urgency::Prefetch);
    gate.await_reads(1);
    let opener = std::thread::spawn({
        let (gate, frames) = (gate.clone(), frames.clone());
        move || {
            std::thread::sleep(Duration::from_millis(30));
            assert!(frames.claim(frame(0)).is_none(), "its read is still going on");
            gate.open();
        }
    });
    drop(mover);
    opener.join().unwrap();
    assert_eq!(blocks(&gate), [10], "reads that were not needed any more");
    assert!(frames.claim(frame(0)).is_some() && frames.claim(frame(1)).is_some());
}

/// With the real engines: of 64 prefetches, a demand that comes last is not
/// last.
#[test]
fn every_way_lets_a_demand_overtake() {
    let scratch = Scratch::new("overtake");
    let path = scratch.file("model", &Random(3).bytes(16 << 20));
    for way in ways() {
        let way = DiskOptions { depth: 1, prefetch_depth: 1, ..way };
        let frames = frames(256 << 10, 65);
        let files = with_identities(std::slice::from_ref(&path));
        let (mut mover, report) = probe(&files, &frames, &way).unwrap();
        let range = |key: usize| (key % 64) * (256 << 10)..(key % 64 + 1) * (256 << 10);
        for key in 0..65 {
            let ticket = frames.claim(frame(key)).unwrap();
            let urgency = if key == 64 { Urgency::Demand } else { Urgency::Prefetch };
            mover.submit(fill(key as u64, ticket, &[piece(range(key))], urgency));
        }
        let ended: Vec<u64> = (0..65).map(|_| wait(&mut *mover).key).collect();
        let place = ended.iter().position(|&key| key == 64).unwrap();
        assert!(place < 60, "{}: place {place}", report.words);
        assert!(ended.iter().filter(|&&key| key < 64).is_sorted(), "{ended:?}");
    }
}

#[test]
fn next_waits_as_long_as_it_is_told() {
    let (gate, mut mover) = gated();
    let frames = frames(4 * ALIGN_BYTES, 1);
    let start_ns = mover.now_ns();
    assert!(mover.next(u64::MAX).is_none(), "nothing is outstanding");
    assert!(mover.now_ns() - start_ns < SECOND_NS);
    submit(&mut mover, &frames, 0, 10, Urgency::Demand);
    gate.await_reads(1);
    assert!(mover.next(0).is_none());
    let start_ns = mover.now_ns();
    assert!(mover.next(20_000_000).is_none());
    let waited_ns = mover.now_ns() - start_ns;
    assert!((20_000_000..SECOND_NS).contains(&waited_ns), "{waited_ns} ns");
    gate.open();
    let done = wait(&mut mover);
    assert!(done.submitted_ns <= done.ended_ns && done.ended_ns <= mover.now_ns());
    assert!(mover.counters().busy_ns >= 20_000_000);
}

/// A read that takes longer than five seconds is told while it goes on, once.
#[test]
fn a_slow_read_is_told_once() {
    let frames = frames(4 * ALIGN_BYTES, 2);
    let mut board = Board::new(1);
    for key in [0, 1] {
        let ticket = frames.claim(frame(key)).unwrap();
        let chunk = ticket.chunks(&[0..ALIGN_BYTES, ALIGN_BYTES..2 * ALIGN_BYTES]).into_iter();
        let job = |chunk| Job::new(key as u64, chunk, 3, 8192, ALIGN_BYTES);
        board.submit(chunk.map(job).collect(), Urgency::Demand, None, 0);
    }
    let Take::Job(slow) = board.take(1000) else { panic!("there are four jobs") };
    let Take::Job(mut fast) = board.take(1000) else { panic!("there are four jobs") };
    assert!(matches!(fast.answered(Ok(ALIGN_BYTES)), Verdict::Complete));
    assert!(board.settle(fast, Verdict::Complete, 2000).is_none());
    assert_eq!(board.slow(1000 + SLOW_NS), None);
    assert_eq!(board.slow(1001 + SLOW_NS), Some((3, 8192)));
    assert_eq!(board.slow(1001 + 9 * SLOW_NS), None);
    assert!(board.settle(slow, Verdict::Complete, 20 * SLOW_NS).is_none());
    assert_eq!((board.slow(u64::MAX), board.counters(0).slow_reads), (None, 1));
    assert_eq!(board.counters(0).busy_ns, 20 * SLOW_NS - 1000);
}

/// A board with room for one prefetch, and prefetches of `jobs` blocks each.
fn board_of_prefetches(frames: &Arc<Frames>, fills: usize, jobs: usize) -> Board {
    let mut board = Board::new(1);
    for key in 0..fills {
        let ticket = frames.claim(frame(key)).unwrap();
        let ranges: Vec<_> = (0..jobs).map(|i| i * ALIGN_BYTES..(i + 1) * ALIGN_BYTES).collect();
        let job = |chunk| Job::new(key as u64, chunk, 0, 0, ALIGN_BYTES);
        let jobs = ticket.chunks(&ranges).into_iter().map(job).collect();
        board.submit(jobs, Urgency::Prefetch, None, 0);
    }
    board
}

#[test]
fn a_promoted_read_leaves_its_place_to_another_prefetch() {
    let frames = frames(4 * ALIGN_BYTES, 2);
    let mut board = board_of_prefetches(&frames, 2, 1);
    let Take::Job(first) = board.take(0) else { panic!("there are two jobs") };
    assert!(matches!(board.take(0), Take::Nothing), "two prefetches at once");
    board.promote(first.key);
    let Take::Job(second) = board.take(0) else { panic!("there is a place") };
    assert_ne!(first.key, second.key);
}

#[test]
fn a_discard_ends_a_job_that_waits_for_its_next_try() {
    let frames = frames(4 * ALIGN_BYTES, 1);
    let mut board = board_of_prefetches(&frames, 1, 2);
    let Take::Job(job) = board.take(0) else { panic!("there are two jobs") };
    assert!(board.settle(job, Verdict::Later(1000), 0).is_none());
    board.abandon(0, MoveError::Discarded, 10);
    let done = board.next().expect("no engine has any of its jobs");
    assert!(matches!(done.result, Err(MoveError::Discarded)), "{done:?}");
    assert!(matches!(board.take(1_000_000), Take::Nothing), "it is tried again");
}

/// Panics when block 10 is read; other reads stand at the gate.
struct Trap(Arc<Gate>);

impl ReadAt for Trap {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        assert_ne!(offset, 10 * ALIGN_BYTES as u64, "a trap");
        self.0.read_at(bytes, offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        self.0.identity()
    }
}

/// It does not wait until the last thread is gone.
#[test]
fn what_a_thread_was_reading_ends_with_its_panic() {
    let gate = Arc::new(Gate::default());
    let mut mover = over(vec![(FILE_BYTES, Box::new(Trap(gate.clone())))], 2, ALIGN_BYTES);
    let frames = frames(4 * ALIGN_BYTES, 2);
    let mut submit = |key: u64, block: usize| {
        let ticket = frames.claim(frame(key as usize)).unwrap();
        let piece = piece(block * ALIGN_BYTES..(block + 1) * ALIGN_BYTES);
        mover.submit(fill(key, ticket, &[piece], Urgency::Demand));
    };
    submit(0, 20);
    gate.await_reads(1);
    submit(1, 10);
    let done = mover.next(5 * SECOND_NS);
    gate.open();
    let done = done.expect("it ends while the other thread stands at the gate");
    let Err(MoveError::Stopped(why)) = done.result else { panic!("{done:?}") };
    assert_eq!(done.key, 1);
    assert!(why.contains("a trap"), "{why}");
    assert_eq!(wait(&mut mover).key, 0);
}
