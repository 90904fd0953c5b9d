//! Files that change while they are in use.

use super::*;
use crate::store::mover::{MoveError, Notice};
use std::os::unix::fs::FileExt;

const LEN: usize = 300_000;

/// A mover over one file of sevens, with the file's path.
fn opened(scratch: &Scratch, way: &DiskOptions) -> (Box<dyn Mover>, Arc<Frames>, PathBuf) {
    let path = scratch.file("model", &[7; LEN]);
    let frames = frames(512 << 10, 4);
    let (mover, _) = probe(&with_identities(std::slice::from_ref(&path)), &frames, way).unwrap();
    (mover, frames, path)
}

fn read(mover: &mut dyn Mover, frames: &Arc<Frames>, range: Range<usize>) -> Done {
    let ticket = frames.claim(frame(0)).unwrap();
    mover.submit(fill(1, ticket, &[piece(range)], Urgency::Demand));
    let done = wait(mover);
    if done.result.is_err() {
        assert!(frames.pin(frame(0), done.generation).is_none(), "failed and readable");
    }
    done
}

fn assert_changed(result: Result<(), MoveError>, path: &Path, words: &str) {
    let Err(MoveError::Changed { file, found, .. }) = result else { panic!("{result:?}") };
    assert_eq!(file, path);
    assert!(found.contains(words), "{found}");
}

#[test]
fn a_truncated_file_is_an_error_value() {
    for way in ways() {
        let scratch = Scratch::new("truncated");
        let (mut mover, frames, path) = opened(&scratch, &way);
        read(&mut *mover, &frames, 0..LEN).result.unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100_000).unwrap();
        let words = "100000 bytes instead of 300000";
        assert_changed(read(&mut *mover, &frames, 0..LEN).result, &path, words);
        // Also of what is still there, and for ever.
        assert_changed(read(&mut *mover, &frames, 0..5000).result, &path, words);
        fs::write(&path, [7; LEN]).unwrap();
        assert_changed(read(&mut *mover, &frames, 0..5000).result, &path, words);
        assert_changed(mover.check_unchanged(), &path, words);
        assert_eq!(mover.counters().failed, 3);
    }
}

#[test]
fn a_file_that_is_written_to_is_an_error_value() {
    for way in ways() {
        let scratch = Scratch::new("written");
        let (mut mover, frames, path) = opened(&scratch, &way);
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        read(&mut *mover, &frames, 0..LEN).result.unwrap();
        mover.check_unchanged().unwrap();
        file.write_all_at(&[8], 200_000).unwrap();
        assert_changed(mover.check_unchanged(), &path, "a newer time of modification");
        assert_changed(read(&mut *mover, &frames, 0..1).result, &path, "newer time");
    }
}

#[test]
fn a_replaced_file_is_told_once_and_the_old_one_read_on() {
    for way in ways() {
        let scratch = Scratch::new("replaced");
        let (mut mover, frames, path) = opened(&scratch, &way);
        assert_eq!(mover.notice(), None);
        let other = scratch.file("other", &[8; LEN]);
        fs::rename(&other, &path).unwrap();
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(mover.notice(), Some(Notice::Replaced { file: path.clone() }));
        assert_eq!(mover.notice(), None);
        let done = read(&mut *mover, &frames, 0..LEN);
        done.result.unwrap();
        let pin = frames.pin(done.frame, done.generation).unwrap();
        assert!(pin[..LEN].iter().all(|&byte| byte == 7));
        mover.check_unchanged().unwrap();
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(mover.notice(), None, "told twice");
    }
}

/// Bytes that were read before the change do not make a fill whole together
/// with bytes that were read after it.
#[test]
fn no_fill_mixes_old_and_new_bytes() {
    for way in ways() {
        let way = DiskOptions { chunk_bytes: 4096, depth: 1, prefetch_depth: 1, ..way };
        let scratch = Scratch::new("mixed");
        let (mut mover, frames, path) = opened(&scratch, &way);
        let writer = std::thread::spawn({
            let path = path.clone();
            move || {
                std::thread::sleep(Duration::from_millis(3));
                let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(&[8; LEN], 0).unwrap();
            }
        });
        let mut landed = 0;
        let changed = loop {
            let done = read(&mut *mover, &frames, 0..LEN);
            if let Err(error) = done.result {
                break error;
            }
            landed += 1;
            assert!(mover.now_ns() < 30 * SECOND_NS, "the change was not seen");
            let pin = frames.pin(done.frame, done.generation).unwrap();
            assert!(pin[..LEN].iter().all(|&byte| byte == 7), "mixed after {landed}");
        };
        assert!(matches!(changed, MoveError::Changed { .. }), "{changed}");
        writer.join().unwrap();
    }
}
