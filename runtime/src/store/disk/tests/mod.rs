//! The disk tier on real files, and on disks that misbehave.

#[cfg(unix)]
mod changes;
mod contents;
mod engine;
mod faults;
mod order;
mod storm;

use super::{
    super::{
        frames::{ALIGN_BYTES, ClassSpec, FrameId, Frames, Ticket},
        mover::{Done, Fill, Mover, Piece, Urgency},
    },
    DiskChoice, DiskOptions, probe,
    shared::{DiskMover, Shared},
    source::{ReadAt, Sources},
    threads,
};
use crate::files::Identity;
use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

const SECOND_NS: u64 = 1_000_000_000;

/// A folder beside the test's binary, hence on a real file system, that goes
/// with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let binary = std::env::current_exe().unwrap();
        let folder = binary.with_file_name(format!("disk-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        // So that a later write has another time of modification, whatever
        // the system's clock tick is.
        std::thread::sleep(Duration::from_millis(20));
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A generator of numbers that are spread well enough for tests.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        // xorshift64* (Vigna 2016).
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }
}

fn identity(path: &Path) -> Identity {
    Identity::of(&fs::metadata(path).unwrap())
}

fn with_identities(paths: &[PathBuf]) -> Vec<(PathBuf, Identity)> {
    paths.iter().map(|path| (path.clone(), identity(path))).collect()
}

fn options(choice: DiskChoice) -> DiskOptions {
    DiskOptions {
        choice,
        chunk_bytes: 64 << 10,
        depth: 4,
        prefetch_depth: 3,
        register: true,
        measure_ns: 0,
    }
}

/// All the ways to read that this system has to have, with options for small
/// files.
fn ways() -> Vec<DiskOptions> {
    let plain = DiskOptions { register: false, ..options(DiskChoice::Uring) };
    let all = [DiskChoice::Threads, DiskChoice::Buffered].map(options);
    let mut ways = all.to_vec();
    if cfg!(target_os = "linux") {
        ways.extend([options(DiskChoice::Uring), plain]);
    }
    ways
}

fn frames(frame_bytes: usize, frames: usize) -> Arc<Frames> {
    Frames::new(&[ClassSpec { frame_bytes, frames }]).unwrap()
}

fn frame(index: usize) -> FrameId {
    FrameId { class: 0, index: index as u32 }
}

/// The whole blocks around `range` of file 0, at the start of the frame.
fn piece(range: Range<usize>) -> Piece {
    let start = range.start / ALIGN_BYTES * ALIGN_BYTES;
    let len = (range.end - start).next_multiple_of(ALIGN_BYTES);
    Piece { file: 0, offset: start as u64, len, needed: range.end - start, at: 0 }
}

fn fill(key: u64, ticket: Ticket, pieces: &[Piece], urgency: Urgency) -> Fill {
    Fill { key, ticket, pieces: pieces.into(), urgency }
}

/// Threads over `readers`, all but one at most for prefetches, in the places of files of these lengths.
fn over(readers: Vec<(u64, Box<dyn ReadAt>)>, depth: usize, chunk_bytes: usize) -> DiskMover {
    let sources = readers.into_iter().enumerate().map(|(index, (len, reader))| {
        let identity = Identity { len, modified: None, device: 1, inode: index as u64 };
        (PathBuf::from(format!("/nowhere/{index}.gguf")), identity, reader)
    });
    let shared = Arc::new(Shared::new(Sources::new(sources).unwrap(), 1.max(depth - 1)));
    let (threads, wake) = threads::start(&shared, depth).unwrap();
    DiskMover { shared, threads, wake, chunk_bytes, words: "threads over a test".into() }
}

fn wait(mover: &mut dyn Mover) -> Done {
    mover.next(60 * SECOND_NS).expect("a fill is outstanding and ends")
}
