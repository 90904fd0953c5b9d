//! What brings experts from the model's files into frames: the interface
//! between the store, which decides what comes, and the disk (or the simulated
//! disk of the tests), which knows how.
//!
//! A [`Fill`] is one expert on its way: the ticket of its frame and the
//! [`Piece`]s of the files that belong there. The mover cuts pieces into
//! chunks of 1-2 MiB; at the borders of chunks a demand overtakes prefetches.
//! Every fill that was submitted comes back as exactly one [`Done`], whatever
//! happens to the disk, the file, or the mover itself.

use super::frames::{FrameId, Ticket};
use super::slot::Generation;
use pregate_kernels::cuda::CudaError;
pub use pregate_predictor::drive::Urgency;
use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};
use thiserror::Error;

/// One contiguous range of a file that goes to one range of a frame.
///
/// `offset`, `len` and `at` are multiples of [`ALIGN_BYTES`], which O_DIRECT asks
/// for. An expert's tensor that starts in the middle of a block is therefore
/// read from that block's start, and lies in the frame as far behind `at` as
/// it lies behind `offset` in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which of the files that the mover was made with.
    pub file: usize,
    /// In bytes from the start of the file.
    pub offset: u64,
    /// In bytes; may reach behind the end of the file.
    pub len: usize,
    /// Bytes from `offset` on that must arrive, at most `len`: the end of a
    /// file is seldom the end of a block.
    pub needed: usize,
    /// In bytes from the start of the frame.
    pub at: usize,
}

impl Piece {
    /// Where it ends in the file.
    pub fn end(&self) -> u64 {
        self.offset + self.len as u64
    }
}

/// One expert to bring.
pub struct Fill {
    /// The caller's name for it; no two outstanding fills have the same.
    pub key: u64,
    pub ticket: Ticket,
    pub pieces: Arc<[Piece]>,
    pub urgency: Urgency,
}

/// What became of a [`Fill`].
#[derive(Debug)]
pub struct Done {
    pub key: u64,
    pub frame: FrameId,
    pub generation: Generation,
    /// `Ok`: the frame is Ready, with every byte that was needed. Otherwise
    /// it is Failed, and claimable again at once.
    pub result: Result<(), MoveError>,
    /// Bytes that were read for it, also those that are of no use any more.
    pub bytes: u64,
    /// When it was submitted, on the mover's clock.
    pub submitted_ns: u64,
    /// When its last chunk ended, on the mover's clock.
    pub ended_ns: u64,
}

/// Why a fill brought no expert.
#[derive(Clone, Debug, Error)]
pub enum MoveError {
    /// [`Mover::discard`] came before its last chunk.
    #[error("discarded before it was read")]
    Discarded,

    /// The system refused, also after two more tries.
    #[error("{}: read at byte {offset}: {source}", file.display())]
    Io { file: PathBuf, offset: u64, source: Arc<io::Error> },

    /// The file is no longer what was opened. Nothing more can be read from
    /// it.
    #[error(
        "{}: the model file changed while it was in use: {found}; \
         expected {expected}; open the model again",
        file.display()
    )]
    Changed { file: PathBuf, expected: String, found: String },

    /// The GPU that experts are copied to.
    #[error(transparent)]
    Cuda(#[from] CudaError),

    /// The mover itself ended; it takes no more fills.
    #[error("reading from disk has stopped: {0}")]
    Stopped(String),
}

/// Something that the user should know and that stops nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The file's name stands for another file now. Reading goes on from the
    /// file that was opened.
    Replaced { file: PathBuf },
    /// A read takes longer than [`SLOW_NS`]; told once per read.
    Slow { file: PathBuf, offset: u64 },
}

impl Notice {
    pub fn file(&self) -> &Path {
        match self {
            Notice::Replaced { file } | Notice::Slow { file, .. } => file,
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file().display())?;
        match self {
            Notice::Replaced { .. } => f.write_str(
                "another file has this name now; reading goes on from the one that was opened",
            ),
            Notice::Slow { offset, .. } => write!(
                f,
                "a read at byte {offset} takes longer than {} s: the disk is slow or busy",
                SLOW_NS / 1_000_000_000
            ),
        }
    }
}

/// A read that takes longer is reported.
pub const SLOW_NS: u64 = 5_000_000_000;

/// What a mover has done since it was made. All only grow, except
/// `outstanding`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub fills: u64,
    /// Fills that landed `Ok`, by their urgency at the end.
    pub demands_landed: u64,
    pub prefetches_landed: u64,
    pub discarded: u64,
    pub failed: u64,
    /// Reads that ended with data, and their bytes.
    pub reads: u64,
    pub bytes: u64,
    /// Of `bytes`, those of discarded and failed fills.
    pub wasted_bytes: u64,
    /// Time with at least one read in flight.
    pub busy_ns: u64,
    /// Reads that were repeated after an error.
    pub retries: u64,
    /// Reads that ended early and went on where they ended.
    pub short_reads: u64,
    /// Reads that took longer than [`SLOW_NS`].
    pub slow_reads: u64,
    /// Fills that were submitted and are not `Done` yet.
    pub outstanding: u64,
}

/// Moves experts from files into frames.
///
/// One owner submits and collects; the reading happens elsewhere, so no
/// method but [`Mover::next`] waits. Dropping a mover drops what is queued,
/// waits for the reads that the system has already accepted (their buffers
/// belong to the system until then) and fails the rest.
pub trait Mover: Send {
    /// How it reads, in words for the plan.
    fn describe(&self) -> String;

    /// Takes a fill; it comes back from [`Mover::next`] exactly once.
    ///
    /// # Panics
    /// If the key is outstanding, or the pieces overlap, are not aligned, name
    /// a file that is not there, or do not lie in the frame: mistakes of the
    /// caller.
    fn submit(&mut self, fill: Fill);

    /// A prefetch became a demand: its chunks that are not yet with the system
    /// go behind the demands that are already queued. No effect on a fill that
    /// is a demand or no longer outstanding.
    fn promote(&mut self, key: u64);

    /// Drops the chunks of a fill that are not yet with the system; it lands
    /// as [`MoveError::Discarded`] when the others have ended, or `Ok` if all
    /// were read. No effect on a fill that is no longer outstanding.
    fn discard(&mut self, key: u64);

    /// The next fill that ended, in the order of ending. Waits for one for at
    /// most `wait_ns` (0: does not wait; `u64::MAX`: for ever); `None` at once
    /// if none is outstanding.
    fn next(&mut self, wait_ns: u64) -> Option<Done>;

    /// The mover's clock, in nanoseconds from some fixed moment: real, or the
    /// simulated machine's.
    fn now_ns(&self) -> u64;

    fn counters(&self) -> Counters;

    /// Bytes that would be moved before a demand submitted now; 0: not known.
    fn queued(&self) -> u64 {
        0
    }

    /// Bytes until fill `key` lands, were it a demand from now on; `None`: not
    /// known, or it is not outstanding.
    fn remaining(&self, key: u64) -> Option<u64> {
        let _ = key;
        None
    }

    /// The frame of fill `key`, which had landed, holds its expert no longer:
    /// the next fill may overwrite it.
    fn vacated(&mut self, key: u64) {
        let _ = key;
    }

    /// Something to tell the user; each is given out once.
    fn notice(&mut self) -> Option<Notice>;

    /// An error if a model file was written to or resized since it was opened.
    /// Also checked between reads at most every 50 ms and after every error,
    /// so that a changed file fails fills by itself.
    fn check_unchanged(&self) -> Result<(), MoveError>;
}
