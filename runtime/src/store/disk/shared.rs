//! What the owner of a mover and its threads share, and the [`Mover`] on top
//! of it; the engines differ in how they do a job and how they are woken.

use super::{
    super::{
        frames::{ALIGN_BYTES, Chunk},
        mover::{Counters, Done, Fill, MoveError, Mover, Notice, Piece},
    },
    board::Board,
    job::{Failure, Job, Verdict},
    source::Sources,
};
use std::{
    any::Any,
    collections::VecDeque,
    io,
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub(super) struct Shared {
    board: Mutex<Board>,
    /// A `Done` is there.
    landed: Condvar,
    pub sources: Sources,
    start: Instant,
}

impl Shared {
    pub fn new(sources: Sources, prefetch_depth: usize) -> Self {
        let (board, landed) = (Mutex::new(Board::new(prefetch_depth)), Condvar::new());
        Self { board, landed, sources, start: Instant::now() }
    }

    /// A board is whole between its methods, so one whose user panicked is
    /// still used: to end what is outstanding.
    pub fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// What follows from the answer to a read of `job`, with a look whether
    /// its file is still the one that was opened: bytes of a changed file
    /// never count.
    pub fn judge(&self, job: &mut Job, answer: io::Result<usize>) -> Verdict<MoveError> {
        if let Err(error) = self.sources.check(job.file) {
            return Verdict::Failed(error);
        }
        match job.answered(answer) {
            Verdict::Complete => Verdict::Complete,
            Verdict::Again => Verdict::Again,
            Verdict::Later(wait_ns) => Verdict::Later(wait_ns),
            Verdict::Failed(Failure::EndOfFile(offset)) => {
                let found = format!("its end at byte {offset}");
                Verdict::Failed(self.sources.changed(job.file, found))
            }
            Verdict::Failed(Failure::Io(source)) => Verdict::Failed(MoveError::Io {
                file: self.sources.all()[job.file].path.clone(),
                offset: job.position(),
                source: Arc::new(source),
            }),
        }
    }

    /// Settles a job; `Some`: read on. The owner is woken if a fill ended.
    pub fn settle(&self, job: Job, verdict: Verdict<MoveError>) -> Option<Job> {
        let job = self.board().settle(job, verdict, self.now_ns());
        self.landed.notify_all();
        job
    }

    /// A thread of the engine ends because of `why`; `hand` are the jobs that
    /// it still had and that nobody reads any more.
    pub fn stop(&self, why: String, hand: impl IntoIterator<Item = Job>) {
        let error = MoveError::Stopped(why);
        let mut board = self.board();
        for job in hand {
            let rest = board.settle(job, Verdict::Failed(error.clone()), self.now_ns());
            drop(rest);
        }
        board.stop(&error, self.now_ns());
        drop(board);
        self.landed.notify_all();
    }

    /// The last thread of the engine is gone.
    pub fn gone(&self) {
        self.stop("its threads have ended".into(), None);
        self.board().land_the_lost(self.now_ns());
        self.landed.notify_all();
    }
}

/// The words of a panic.
pub(super) fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", text.unwrap_or_else(|| "without words".into()))
}

/// Wakes up to so many sleeping threads of an engine; all for `usize::MAX`.
pub(super) type Wake = Box<dyn Fn(usize) + Send + Sync>;

/// The mover over real files, with either engine.
pub(super) struct DiskMover {
    pub shared: Arc<Shared>,
    pub threads: Vec<JoinHandle<()>>,
    pub wake: Wake,
    pub chunk_bytes: usize,
    pub words: String,
}

impl DiskMover {
    /// The chunks of `piece`, about equal and at most `chunk_bytes` long, as
    /// ranges of the piece.
    fn cut(&self, piece: &Piece) -> impl Iterator<Item = Range<usize>> + use<> {
        let count = piece.len.div_ceil(self.chunk_bytes).max(1);
        let len = piece.len;
        let step = len.div_ceil(count).next_multiple_of(ALIGN_BYTES).max(ALIGN_BYTES);
        (0..len).step_by(step).map(move |start| start..(start + step).min(len))
    }

    fn check(&self, piece: &Piece) {
        let sources = self.shared.sources.all();
        assert!(piece.file < sources.len(), "{piece:?} of {} files", sources.len());
        let is_aligned = piece.offset.is_multiple_of(ALIGN_BYTES as u64)
            && piece.len.is_multiple_of(ALIGN_BYTES)
            && piece.at.is_multiple_of(ALIGN_BYTES);
        let end = piece.offset.checked_add(piece.needed as u64);
        let is_there = end.is_some_and(|end| end <= sources[piece.file].len());
        let fits = 0 < piece.needed && piece.needed <= piece.len;
        assert!(is_aligned && is_there && fits, "{piece:?}");
    }

    fn jobs(&self, fill: Fill) -> VecDeque<Job> {
        let mut reads = Vec::new();
        let mut ranges = Vec::new();
        for piece in fill.pieces.iter() {
            self.check(piece);
            for range in self.cut(piece) {
                let needed = piece.needed.min(range.end).saturating_sub(range.start);
                // Nothing of it is needed: it may lie behind the file's end.
                if needed > 0 {
                    reads.push((piece.file, piece.offset + range.start as u64, needed));
                    ranges.push(piece.at + range.start..piece.at + range.end);
                }
            }
        }
        let chunks: Vec<Chunk> = fill.ticket.chunks(&ranges);
        let job = |(chunk, (file, offset, needed))| Job::new(fill.key, chunk, file, offset, needed);
        chunks.into_iter().zip(reads).map(job).collect()
    }
}

impl Mover for DiskMover {
    fn describe(&self) -> String {
        self.words.clone()
    }

    fn submit(&mut self, fill: Fill) {
        let (key, urgency) = (fill.key, fill.urgency);
        let changed =
            fill.pieces.iter().find_map(|piece| self.shared.sources.known_change(piece.file));
        let jobs = self.jobs(fill);
        let mut board = self.shared.board();
        assert!(!board.is_outstanding(key), "fill {key} is outstanding already");
        let count = jobs.len();
        board.submit(jobs, urgency, changed, self.shared.now_ns());
        let asleep = board.asleep;
        drop(board);
        if asleep > 0 {
            (self.wake)(count.min(asleep));
        }
    }

    fn promote(&mut self, key: u64) {
        let mut board = self.shared.board();
        board.promote(key);
        // There may be room for it, and for other prefetches in its place.
        let asleep = board.asleep;
        drop(board);
        if asleep > 0 {
            (self.wake)(asleep);
        }
    }

    fn discard(&mut self, key: u64) {
        self.shared.board().abandon(key, MoveError::Discarded, self.shared.now_ns());
    }

    fn next(&mut self, wait_ns: u64) -> Option<Done> {
        let until = Instant::now().checked_add(Duration::from_nanos(wait_ns));
        let mut board = self.shared.board();
        loop {
            if let Some(done) = board.next() {
                return Some(done);
            }
            if board.is_idle() || wait_ns == 0 {
                return None;
            }
            let left = until.map_or(Duration::from_secs(3600), |until| {
                until.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return None;
            }
            let waited = self.shared.landed.wait_timeout(board, left);
            board = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn now_ns(&self) -> u64 {
        self.shared.now_ns()
    }

    fn counters(&self) -> Counters {
        self.shared.board().counters(self.shared.now_ns())
    }

    fn notice(&mut self) -> Option<Notice> {
        let now_ns = self.shared.now_ns();
        let sources = &self.shared.sources;
        let slow = self.shared.board().slow(now_ns);
        let slow = slow
            .map(|(file, offset)| Notice::Slow { file: sources.all()[file].path.clone(), offset });
        slow.or_else(|| sources.replaced(now_ns))
    }

    fn check_unchanged(&self) -> Result<(), MoveError> {
        (0..self.shared.sources.all().len()).try_for_each(|file| self.shared.sources.check(file))
    }
}

impl Drop for DiskMover {
    fn drop(&mut self) {
        self.shared.stop("the mover is dropped".into(), None);
        (self.wake)(usize::MAX);
        for thread in self.threads.drain(..) {
            // A panic of its own was caught and told there.
            let _ = thread.join();
        }
    }
}
