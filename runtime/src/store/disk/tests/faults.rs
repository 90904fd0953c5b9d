//! Disks that fail, stall and panic.

use super::*;
use crate::store::{
    mover::{Counters, MoveError},
    slot::State,
};
use std::{
    collections::HashMap,
    io,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

const FILE_BYTES: u64 = 64 << 20;

fn identity_of(len: u64, inode: u64) -> Identity {
    Identity { len, modified: None, device: 1, inode }
}

fn byte(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn write(bytes: &mut [u8], offset: u64) {
    bytes.iter_mut().zip(offset..).for_each(|(to, offset)| *to = byte(offset));
}

/// What a read of a [`Plan`] does.
#[derive(Clone, Copy)]
enum Act {
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

fn act(act: Act, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
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

const BROKEN: Act = Act::Fail(io::ErrorKind::Other);

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
    let disk = BadBlock { offset: 2 * ALIGN as u64, reads: reads.clone() };
    let mut mover = over(vec![(FILE_BYTES, Box::new(disk))], 1, ALIGN);
    let frames = frames(200 * ALIGN, 1);
    let ticket = frames.claim(frame(0)).unwrap();
    mover.submit(fill(1, ticket, &[piece(0..200 * ALIGN)], Urgency::Demand));
    let done = wait(&mut mover);
    let Err(MoveError::Io { offset, .. }) = done.result else { panic!("{done:?}") };
    assert_eq!(offset, 2 * ALIGN as u64);
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
        let mut mover = over(vec![(FILE_BYTES, Box::new(plan))], depth, ALIGN);
        let frames = frames(8 * ALIGN, 10);
        for key in 0..10 {
            let ticket = frames.claim(frame(key)).unwrap();
            mover.submit(fill(key as u64, ticket, &[piece(0..8 * ALIGN)], Urgency::Demand));
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

/// A disk whose every act is random.
struct Chaos(Mutex<Random>);

impl ReadAt for Chaos {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        use io::ErrorKind::{Interrupted, WouldBlock};
        let mut random = self.0.lock().unwrap();
        let next = match random.below(20) {
            // At least a block: less, three times, is the end of the file.
            0..3 => Act::Short(ALIGN + random.below(bytes.len())),
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
    let frames = frames(16 * ALIGN, FRAMES);
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
                let start = random.below(bytes / ALIGN - 16) * ALIGN;
                let piece = piece(start..start + 1 + random.below(16 * ALIGN));
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
        let mut mover = over(vec![(FILE_BYTES, chaos)], 1 + seed as usize % 4, 4 * ALIGN);
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
        let way =
            DiskOptions { chunk_bytes: ALIGN, depth: 1, prefetch_depth: 1, register: false, ..way };
        let files = with_identities(std::slice::from_ref(&path));
        let (mut mover, _) = probe(&files, &frames(64 << 10, 1), &way).unwrap();
        storm(&mut *mover, &mut Random(5), &|offset| content[offset], content.len());
    }
}

/// The real disk's errors come through the real engines: a file descriptor
/// that is not open for reading.
#[test]
fn errors_of_the_system_come_through() {
    let scratch = Scratch::new("errors");
    let path = scratch.file("model", &[7; 10_000]);
    let identity = identity(&path);
    let file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let sources = [(path.clone(), identity, Box::new(file) as Box<dyn ReadAt>)];
    let shared = Arc::new(Shared::new(Sources::new(sources).unwrap(), 1));
    let frames = frames(16 << 10, 1);
    let (threads, wake) = started(&shared, &frames);
    let words = String::new();
    let mut mover = DiskMover { shared, threads, wake, chunk_bytes: 1 << 20, words };
    let ticket = frames.claim(frame(0)).unwrap();
    mover.submit(fill(1, ticket, &[piece(0..10_000)], Urgency::Demand));
    let done = wait(&mut mover);
    let Err(MoveError::Io { file, offset: 0, .. }) = done.result else { panic!("{done:?}") };
    assert_eq!(file, path);
    assert_eq!(mover.counters().retries, 2);
    assert!(frames.claim(frame(0)).is_some());
}

type Started = (Vec<std::thread::JoinHandle<()>>, crate::store::disk::shared::Wake);

#[cfg(target_os = "linux")]
fn started(shared: &Arc<Shared>, frames: &Arc<Frames>) -> Started {
    let (thread, wake, _) = crate::store::disk::uring::start(shared, frames, 2, true).unwrap();
    (vec![thread], wake)
}

#[cfg(not(target_os = "linux"))]
fn started(shared: &Arc<Shared>, _: &Arc<Frames>) -> Started {
    threads::start(shared, 2).unwrap()
}

/// A file whose look-ups, which follow every read, are slow and panic in the
/// end.
struct Haunted {
    file: fs::File,
    look_ups: Arc<AtomicUsize>,
    look_up_ms: u64,
    panics_at: usize,
}

impl ReadAt for Haunted {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(bytes, offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        let count = self.look_ups.fetch_add(1, Ordering::Relaxed);
        assert!(count < self.panics_at, "the file is haunted");
        std::thread::sleep(Duration::from_millis(self.look_up_ms));
        self.file.identity()
    }

    fn file(&self) -> Option<&fs::File> {
        Some(&self.file)
    }
}

/// A mover over such a file with eight prefetches of eight blocks; the count
/// of its look-ups.
fn haunted(
    scratch: &Scratch,
    look_up_ms: u64,
    panics_at: usize,
) -> (DiskMover, Arc<Frames>, Arc<AtomicUsize>) {
    let look_ups = Arc::new(AtomicUsize::new(0));
    let path = scratch.file("model", &[7; 64 * ALIGN]);
    let (identity, file) = (identity(&path), fs::File::open(&path).unwrap());
    let reader = Haunted { file, look_ups: look_ups.clone(), look_up_ms, panics_at };
    let sources = [(path, identity, Box::new(reader) as Box<dyn ReadAt>)];
    let shared = Arc::new(Shared::new(Sources::new(sources).unwrap(), 2));
    let frames = frames(8 * ALIGN, 8);
    let (threads, wake) = started(&shared, &frames);
    let words = String::new();
    let mut mover = DiskMover { shared, threads, wake, chunk_bytes: ALIGN, words };
    for key in 0..8 {
        let ticket = frames.claim(frame(key)).unwrap();
        mover.submit(fill(key as u64, ticket, &[piece(0..8 * ALIGN)], Urgency::Prefetch));
    }
    (mover, frames, look_ups)
}

#[test]
fn a_panic_of_the_real_engine_ends_every_fill() {
    let scratch = Scratch::new("haunted");
    let (mut mover, frames, _) = haunted(&scratch, 2, 20);
    let (mut good, mut stopped) = (0, 0);
    for _ in 0..8 {
        let done = wait(&mut mover);
        match done.result {
            Ok(()) => {
                let pin = frames.pin(done.frame, done.generation).unwrap();
                assert!(pin[..8 * ALIGN].iter().all(|&byte| byte == 7));
                good += 1;
            }
            Err(MoveError::Stopped(why)) => {
                assert!(why.contains("the file is haunted"), "{why}");
                assert!(frames.claim(done.frame).is_some(), "its frame is stuck");
                stopped += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    // Nineteen blocks were read well: two fills of eight, and a bit.
    assert!(good <= 2 && good + stopped == 8, "{good} good, {stopped} stopped");
    assert!(mover.next(u64::MAX).is_none());
}

#[test]
fn a_dropped_real_engine_gives_all_frames_back() {
    let scratch = Scratch::new("dropped");
    let (mover, frames, look_ups) = haunted(&scratch, 20, usize::MAX);
    while look_ups.load(Ordering::Relaxed) < 3 {
        std::thread::yield_now();
    }
    drop(mover);
    // One look-up at the start, and one for each of 64 blocks if it read on.
    let look_ups = look_ups.load(Ordering::Relaxed);
    assert!(look_ups < 60, "it read on: {look_ups}");
    for key in 0..8 {
        let state = frames.state(frame(key)).state;
        assert!(state != State::Filling, "frame {key}");
    }
    assert_eq!(Arc::strong_count(&frames), 1, "somebody still has the frames");
}
