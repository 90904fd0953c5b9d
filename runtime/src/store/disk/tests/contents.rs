//! What arrives is what is in the files, whichever way it comes.

use super::*;
use crate::store::mover::MoveError;
use std::collections::HashMap;

/// Random pieces of random files into random frames of two classes; every
/// frame is compared byte by byte. Ends of files are among them.
#[test]
fn every_way_reads_the_bytes_of_the_files() {
    let scratch = Scratch::new("contents");
    let mut random = Random(0x5eed);
    let contents = [random.bytes((5 << 20) + 1234), random.bytes(3 << 20), random.bytes(4097)];
    let paths: Vec<PathBuf> = contents
        .iter()
        .enumerate()
        .map(|(index, bytes)| scratch.file(&index.to_string(), bytes))
        .collect();
    let files = with_identities(&paths);
    let specs = [(96 << 10, 6), (640 << 10, 4)];
    for options in ways() {
        let specs = specs.map(|(frame_bytes, frames)| ClassSpec { frame_bytes, frames });
        let frames = Frames::new(&specs).unwrap();
        let (mut mover, report) = probe(&files, &frames, &options).unwrap();
        assert_eq!((report.choice, report.refused.len()), (options.choice, 0), "{report:?}");
        let mut free: Vec<FrameId> = (0u16..2)
            .flat_map(|class| {
                (0..specs[usize::from(class)].frames).map(move |index| (class, index))
            })
            .map(|(class, index)| FrameId { class, index: index as u32 })
            .collect();
        let mut outstanding: HashMap<u64, Vec<Piece>> = HashMap::new();
        let (mut submitted, mut bytes) = (0, 0);
        while submitted < 1500 || !outstanding.is_empty() {
            while submitted < 1500 && !free.is_empty() {
                let frame = free.swap_remove(random.below(free.len()));
                let frame_bytes = specs[usize::from(frame.class)].frame_bytes;
                let pieces = pieces(&mut random, &contents, frame_bytes);
                let urgency = [Urgency::Demand, Urgency::Prefetch][random.below(2)];
                let ticket = frames.claim(frame).unwrap();
                mover.submit(fill(submitted, ticket, &pieces, urgency));
                outstanding.insert(submitted, pieces);
                submitted += 1;
            }
            let done = wait(&mut *mover);
            done.result.unwrap();
            bytes += done.bytes;
            let pin = frames.pin(done.frame, done.generation).unwrap();
            for piece in outstanding.remove(&done.key).unwrap() {
                let start = piece.offset as usize;
                let expected = &contents[piece.file][start..start + piece.needed];
                assert!(
                    pin[piece.at..][..piece.needed] == *expected,
                    "{}: {piece:?}",
                    report.words
                );
            }
            free.push(done.frame);
        }
        let counters = mover.counters();
        assert!(counters.bytes >= bytes, "{counters:?}");
        assert_eq!((counters.failed, counters.outstanding, counters.wasted_bytes), (0, 0, 0));
        assert!(counters.busy_ns > 0 && counters.busy_ns <= mover.now_ns());
    }
}

/// One to four pieces that fit into a frame one behind the other.
fn pieces(random: &mut Random, contents: &[Vec<u8>], frame_bytes: usize) -> Vec<Piece> {
    let count = 1 + random.below(4);
    let most = frame_bytes / count / ALIGN_BYTES * ALIGN_BYTES;
    let piece = |index| {
        let file = random.below(contents.len());
        let len = contents[file].len();
        // Every fourth at the end of the file.
        let block = if random.below(4) == 0 {
            (len - 1) / ALIGN_BYTES - random.below(most / ALIGN_BYTES).min((len - 1) / ALIGN_BYTES)
        } else {
            random.below(len.div_ceil(ALIGN_BYTES))
        };
        let offset = block * ALIGN_BYTES;
        let needed = 1 + random.below((len - offset).min(most));
        // The planner may ask for more than is there.
        let len = needed.next_multiple_of(ALIGN_BYTES) + random.below(2) * ALIGN_BYTES;
        Piece { file, offset: offset as u64, len: len.min(most), needed, at: index * most }
    };
    (0..count).map(piece).collect()
}

#[test]
fn the_default_probe_measures_and_leaves_the_frames_free() {
    let scratch = Scratch::new("default");
    let path = scratch.file("model", &Random(1).bytes(20 << 20));
    let frames = frames(1 << 20, 3);
    let files = with_identities(&[path]);
    let (mover, report) = probe(&files, &frames, &DiskOptions::default()).unwrap();
    let measured = report.measured.expect("20 MiB can be measured");
    assert!(measured.bytes_per_second() > 1e6 && measured.bytes >= 8 << 20, "{report:?}");
    assert_eq!(measured.read_bytes, 1 << 20);
    assert_eq!(mover.describe(), report.words);
    for index in 0..3 {
        let state = frames.state(frame(index)).state;
        assert_eq!(state, crate::store::slot::State::Free, "frame {index}");
    }
    if cfg!(target_os = "linux") {
        assert!(report.words.starts_with("io_uring, O_DIRECT, registered buffers"), "{report:?}");
        assert_eq!((report.choice, report.refused.len()), (DiskChoice::Uring, 0));
    }
}

/// A file system without O_DIRECT: sysfs.
#[cfg(target_os = "linux")]
#[test]
fn a_way_that_is_asked_for_and_impossible_is_an_error() {
    let path = PathBuf::from("/sys/kernel/mm/transparent_hugepage/enabled");
    let files = with_identities(&[path]);
    for choice in [DiskChoice::Uring, DiskChoice::Threads] {
        let Err(error) = probe(&files, &frames(8192, 1), &options(choice)) else {
            panic!("{choice} works on sysfs")
        };
        let (error, way) = (error.to_string(), choice.to_string());
        assert!(error.contains("no O_DIRECT") && error.contains(&way), "{error}");
        assert!(!error.contains("page cache"), "{choice} fell back: {error}");
    }
}

#[test]
fn options_and_files_are_checked() {
    let scratch = Scratch::new("checked");
    let path = scratch.file("model", &[7; 5000]);
    let mut files = with_identities(&[path]);
    let good = options(DiskChoice::Threads);
    for bad in [
        DiskOptions { depth: 0, ..good.clone() },
        DiskOptions { depth: 65, ..good.clone() },
        DiskOptions { prefetch_depth: 0, ..good.clone() },
        DiskOptions { prefetch_depth: 5, ..good.clone() },
        DiskOptions { chunk_bytes: 0, ..good.clone() },
        DiskOptions { chunk_bytes: 5000, ..good.clone() },
        DiskOptions { chunk_bytes: 128 << 20, ..good.clone() },
    ] {
        assert!(probe(&files, &frames(8192, 1), &bad).is_err(), "{bad:?}");
    }
    assert!(probe(&files, &frames(8192, 0), &good).is_err(), "no frames");
    assert!(probe(&files, &frames(8192, 1), &good).is_ok());
    files[0].1.len -= 1;
    let Err(error) = probe(&files, &frames(8192, 1), &good) else { panic!("another length") };
    assert!(error.to_string().contains("5000 bytes instead of 4999"), "{error}");
}

#[test]
fn mistakes_of_the_caller_panic_and_end_no_other_fill() {
    let scratch = Scratch::new("mistakes");
    let path = scratch.file("model", &[7; 50_000]);
    let frames = frames(64 << 10, 2);
    let way = options(DiskChoice::Threads);
    let (mut mover, _) = probe(&with_identities(&[path]), &frames, &way).unwrap();
    let good = piece(0..50_000);
    let at = |at| Piece { at, len: 4096, needed: 4096, ..good };
    for bad in [
        vec![],
        vec![Piece { file: 1, ..good }],
        vec![Piece { offset: 512, ..good }],
        vec![Piece { len: 50_000, ..good }],
        vec![Piece { needed: 50_001, ..good }],
        vec![Piece { needed: 0, ..good }],
        vec![Piece { at: 100, ..good }],
        vec![at(64 << 10)],
        vec![at(0), at(0)],
    ] {
        let ticket = frames.claim(frame(0)).unwrap();
        let submit = std::panic::AssertUnwindSafe(|| {
            mover.submit(fill(1, ticket, &bad, Urgency::Demand));
        });
        assert!(std::panic::catch_unwind(submit).is_err(), "{bad:?}");
        assert!(mover.next(SECOND_NS).is_none(), "{bad:?} is outstanding");
    }
    mover.submit(fill(1, frames.claim(frame(0)).unwrap(), &[good], Urgency::Demand));
    let done = wait(&mut *mover);
    assert!(!matches!(done.result, Err(MoveError::Discarded)) && done.result.is_ok());
}
