//! The thread that writes.

use super::pass::{Recorded, Rows};
use crate::format::{Dropped, Writer};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use pregate_predictor::Shape;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A process that is killed loses about this much.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

pub struct Written {
    /// That the disk took.
    pub tokens: u64,
    pub error: Option<io::Error>,
}

/// Writes what comes until nobody is left who could send. After an error it
/// goes on taking passes, so that the queue does not fill.
pub fn run<W: Write>(
    writer: Writer<W>,
    shape: &Shape,
    passes: &Receiver<Box<Recorded>>,
    give_back: &Sender<Box<Recorded>>,
    queued: &AtomicU64,
) -> Written {
    let mut rows = Rows::new(shape);
    let mut state = Ok(writer);
    let mut tokens = 0;
    let mut flushed = Instant::now();
    loop {
        let next = passes.recv_timeout(FLUSH_EVERY);
        match next {
            Ok(mut pass) => {
                let bytes = pass.bytes();
                state = state.and_then(|mut writer| {
                    let done = write(&mut writer, &mut rows, &pass);
                    tokens = writer.written();
                    done.map(|()| writer)
                });
                queued.fetch_sub(bytes, Ordering::Relaxed);
                pass.clear();
                let _ = give_back.try_send(pass);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if flushed.elapsed() >= FLUSH_EVERY {
            state = state.and_then(|mut writer| {
                writer.flush()?;
                tokens = writer.written();
                Ok(writer)
            });
            flushed = Instant::now();
        }
    }
    let ended = state.and_then(|writer| {
        let all = writer.tokens();
        writer.finish().map(|_| tokens = all)
    });
    Written { tokens, error: ended.err() }
}

fn write<W: Write>(writer: &mut Writer<W>, rows: &mut Rows, pass: &Recorded) -> io::Result<()> {
    if pass.gap != Dropped::default() {
        writer.gap(pass.gap)?;
    }
    rows.of(pass, |row| writer.push(row))
}
