//! Errors and panics in the engine of this system, on a real file.

use super::*;
use crate::store::{mover::MoveError, slot::State};
use std::{
    io,
    sync::atomic::{AtomicUsize, Ordering},
};

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
    let path = scratch.file("model", &[7; 64 * ALIGN_BYTES]);
    let (identity, file) = (identity(&path), fs::File::open(&path).unwrap());
    let reader = Haunted { file, look_ups: look_ups.clone(), look_up_ms, panics_at };
    let sources = [(path, identity, Box::new(reader) as Box<dyn ReadAt>)];
    let shared = Arc::new(Shared::new(Sources::new(sources).unwrap(), 2));
    let frames = frames(8 * ALIGN_BYTES, 8);
    let (threads, wake) = started(&shared, &frames);
    let words = String::new();
    let mut mover = DiskMover { shared, threads, wake, chunk_bytes: ALIGN_BYTES, words };
    for key in 0..8 {
        let ticket = frames.claim(frame(key)).unwrap();
        mover.submit(fill(key as u64, ticket, &[piece(0..8 * ALIGN_BYTES)], Urgency::Prefetch));
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
                assert!(pin[..8 * ALIGN_BYTES].iter().all(|&byte| byte == 7));
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
