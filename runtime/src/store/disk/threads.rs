//! The engine that works everywhere: threads that read by position.

use super::{
    board::Take,
    job::{Job, Verdict},
    shared::{Shared, Wake, words},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

/// Starts `depth` threads, each with one read at a time.
///
/// Errors: the system gives no more threads; those that were started end.
pub(super) fn start(
    shared: &Arc<Shared>,
    depth: usize,
) -> std::io::Result<(Vec<JoinHandle<()>>, Wake)> {
    let pool = Arc::new(Pool { work: Condvar::new(), running: AtomicUsize::new(depth) });
    let mut threads = Vec::with_capacity(depth);
    for index in 0..depth {
        let (shared, pool) = (shared.clone(), pool.clone());
        let builder = Builder::new().name(format!("pregate-disk-{index}"));
        let thread = builder.spawn({
            let (shared, pool) = (shared.clone(), pool.clone());
            move || pool.run(&shared)
        });
        match thread {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                shared.stop(format!("no thread to read with: {error}"), None);
                pool.work.notify_all();
                return Err(error);
            }
        }
    }
    let wake = move |count| match count {
        usize::MAX => pool.work.notify_all(),
        count => (0..count).for_each(|_| pool.work.notify_one()),
    };
    Ok((threads, Box::new(wake)))
}

struct Pool {
    /// There is work, or the board has stopped.
    work: Condvar,
    running: AtomicUsize,
}

impl Pool {
    fn run(&self, shared: &Shared) {
        let mut hand = None;
        let end = catch_unwind(AssertUnwindSafe(|| self.work(shared, &mut hand)));
        if let Err(panic) = end {
            shared.stop(words(&*panic), hand);
            self.work.notify_all();
        }
        if self.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            shared.gone();
        }
    }

    /// Takes and does jobs until the board stops. `hand` is the job being
    /// done, so that it outlives a panic.
    fn work(&self, shared: &Shared, hand: &mut Option<Job>) {
        while let Some(job) = self.take(shared) {
            *hand = Some(job);
            while let Some(job) = hand {
                let (file, position) = (job.file, job.position());
                let answer = shared.sources.all()[file].reader.read_at(job.rest(), position);
                let verdict = shared.judge(job, answer);
                let is_for_later = matches!(verdict, Verdict::Later(_));
                *hand = hand.take().and_then(|job| shared.settle(job, verdict));
                if is_for_later {
                    // This thread may be busy then; another one keeps the time.
                    self.work.notify_one();
                }
            }
        }
    }

    /// Waits for a job; `None` once the board has stopped.
    fn take(&self, shared: &Shared) -> Option<Job> {
        let mut board = shared.board();
        loop {
            if board.is_stopped() {
                return None;
            }
            let wait = match board.take(shared.now_ns()) {
                Take::Job(job) => return Some(job),
                Take::Until(due_ns) => {
                    Some(Duration::from_nanos(due_ns.saturating_sub(shared.now_ns())))
                }
                Take::Nothing => None,
            };
            board.asleep += 1;
            board = match wait {
                Some(wait) => {
                    self.work.wait_timeout(board, wait).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.work.wait(board).unwrap_or_else(PoisonError::into_inner),
            };
            board.asleep -= 1;
        }
    }
}
