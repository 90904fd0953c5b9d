//! Chooses how to read: the best way that works here, tried on the model's own
//! files, or the one that was asked for.

use super::{
    super::{
        frames::{ALIGN_BYTES, FrameId, Frames},
        mover::{Fill, Mover, Piece, Urgency},
    },
    measure::{Bandwidth, measure},
    shared::{DiskMover, Shared},
    source::{ReadAt, Sources, open_buffered, open_direct},
    threads,
};
use crate::{
    error::{Error, Result},
    files::Identity,
};
use std::{fmt, fs::File, path::PathBuf, sync::Arc};

/// A way to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskChoice {
    /// The first of the others that works.
    #[default]
    Auto,
    /// One thread with io_uring, around the page cache.
    Uring,
    /// A thread for each read, around the page cache.
    Threads,
    /// A thread for each read, through the page cache.
    Buffered,
}

impl fmt::Display for DiskChoice {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            DiskChoice::Auto => "auto",
            DiskChoice::Uring => "io_uring, O_DIRECT",
            DiskChoice::Threads => "threads, O_DIRECT",
            DiskChoice::Buffered => "threads, page cache",
        })
    }
}

#[derive(Clone, Debug)]
pub struct DiskOptions {
    pub choice: DiskChoice,
    /// The longest single read; a multiple of [`ALIGN_BYTES`], at most 64 MiB.
    pub chunk_bytes: usize,
    /// Reads at once, 1 to 64.
    pub depth: usize,
    /// Of these, prefetches at most, 1 to `depth`: a demand finds a place at
    /// once, and not too much of the disk's time is promised to others.
    pub prefetch_depth: usize,
    /// Whether to register the frames with io_uring.
    pub register: bool,
    /// How long to measure; 0: not at all.
    pub measure_ns: u64,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            choice: DiskChoice::Auto,
            chunk_bytes: 2 << 20,
            depth: 4,
            prefetch_depth: 2,
            register: true,
            measure_ns: 300_000_000,
        }
    }
}

impl DiskOptions {
    fn check(&self) -> Result<()> {
        let chunk_bytes = self.chunk_bytes;
        if chunk_bytes == 0 || !chunk_bytes.is_multiple_of(ALIGN_BYTES) || chunk_bytes > 64 << 20 {
            return Err(Error::Request(format!(
                "reads of {chunk_bytes} bytes from disk: it must be a multiple of {ALIGN_BYTES}, \
                 at most 64 MiB"
            )));
        }
        if !(1..=64).contains(&self.depth) {
            return Err(Error::Request(format!(
                "{} reads from disk at once: it must be 1 to 64",
                self.depth
            )));
        }
        if !(1..=self.depth).contains(&self.prefetch_depth) {
            return Err(Error::Request(format!(
                "{} prefetches from disk at once: it must be 1 to {}",
                self.prefetch_depth, self.depth
            )));
        }
        Ok(())
    }
}

/// What was chosen, and why.
#[derive(Clone, Debug)]
pub struct DiskReport {
    /// Never [`DiskChoice::Auto`].
    pub choice: DiskChoice,
    /// The same in words, with buffers, length and number of reads.
    pub words: String,
    /// Why better ways were not chosen, one sentence each.
    pub refused: Vec<String>,
    pub measured: Option<Bandwidth>,
}

/// Makes a mover for the files of a model, which were opened as these
/// identities, into `frames`. Every frame must be free; some are used for
/// trial reads and are free again afterwards.
///
/// Errors: options out of range, no frames, a file that changed or cannot be
/// opened, or nothing that works of what `options.choice` allows.
pub fn probe(
    files: &[(PathBuf, Identity)],
    frames: &Arc<Frames>,
    options: &DiskOptions,
) -> Result<(Box<dyn Mover>, DiskReport)> {
    options.check()?;
    let choices: &[DiskChoice] = match &options.choice {
        DiskChoice::Auto => &[DiskChoice::Uring, DiskChoice::Threads, DiskChoice::Buffered],
        one => std::slice::from_ref(one),
    };
    let mut refused = Vec::new();
    for &choice in choices {
        let tried = start(choice, files, frames, options)?.and_then(|mut mover| {
            trial(&mut mover, files, frames)?;
            Ok(mover)
        });
        let mut mover = match tried {
            Ok(mover) => mover,
            Err(why) => {
                refused.push(format!("{choice}: {why}"));
                continue;
            }
        };
        let file_bytes: Vec<u64> = files.iter().map(|(_, identity)| identity.len).collect();
        let measured = match options.measure_ns {
            0 => None,
            ns => measure(&mut mover, frames, &file_bytes, options.chunk_bytes, options.depth, ns),
        };
        let words = mover.describe();
        return Ok((Box::new(mover), DiskReport { choice, words, refused, measured }));
    }
    Err(Error::Request(format!("no way to read experts from disk works: {}", refused.join("; "))))
}

/// A mover of one kind, not yet tried. The inner error says in words what is
/// missing for it.
fn start(
    choice: DiskChoice,
    files: &[(PathBuf, Identity)],
    frames: &Arc<Frames>,
    options: &DiskOptions,
) -> Result<std::result::Result<DiskMover, String>> {
    let mut opened: Vec<(PathBuf, Identity, Box<dyn ReadAt>)> = Vec::new();
    for (path, identity) in files {
        let file = match choice {
            DiskChoice::Buffered => open_buffered(path).map_err(|source| Error::Io {
                file: path.clone(),
                action: "open",
                source,
            })?,
            _ => match open_direct(path) {
                Ok(file) => file,
                Err(error) => {
                    return Ok(Err(format!("{}: no O_DIRECT: {error}", path.display())));
                }
            },
        };
        opened.push((path.clone(), *identity, Box::new(file)));
    }
    let shared = Arc::new(Shared::new(Sources::new(opened)?, options.prefetch_depth));
    let kib = options.chunk_bytes >> 10;
    let (depth, prefetch_depth) = (options.depth, options.prefetch_depth);
    let reads = format!("{kib} KiB reads, {depth} at once ({prefetch_depth} prefetches)");
    let started = match choice {
        DiskChoice::Uring => uring(&shared, frames, options),
        _ => threads::start(&shared, options.depth)
            .map(|(threads, wake)| (threads, wake, choice.to_string()))
            .map_err(|error| error.to_string()),
    };
    Ok(started.map(|(threads, wake, words)| DiskMover {
        shared,
        threads,
        wake,
        chunk_bytes: options.chunk_bytes,
        words: format!("{words}; {reads}"),
    }))
}

type Started = (Vec<std::thread::JoinHandle<()>>, super::shared::Wake, String);

#[cfg(target_os = "linux")]
fn uring(
    shared: &Arc<Shared>,
    frames: &Arc<Frames>,
    options: &DiskOptions,
) -> std::result::Result<Started, String> {
    let (thread, wake, buffers) =
        super::uring::start(shared, frames, options.depth, options.register)?;
    Ok((vec![thread], wake, format!("{}, {buffers}", DiskChoice::Uring)))
}

#[cfg(not(target_os = "linux"))]
fn uring(
    _: &Arc<Shared>,
    _: &Arc<Frames>,
    _: &DiskOptions,
) -> std::result::Result<Started, String> {
    Err("io_uring is Linux's".into())
}

/// The longest read of a trial.
const TRIAL_BYTES: usize = 256 << 10;
/// How long a trial waits for one read.
const TRIAL_NS: u64 = 30_000_000_000;

/// Reads the start and the end of every file with `mover` and compares them
/// with what the page cache says.
fn trial(
    mover: &mut DiskMover,
    files: &[(PathBuf, Identity)],
    frames: &Arc<Frames>,
) -> std::result::Result<(), String> {
    let classes = frames.classes().enumerate().filter(|(_, spec)| spec.frames > 0);
    let (class, spec) =
        classes.max_by_key(|(_, spec)| spec.frame_bytes).ok_or("there are no frames")?;
    let frame = FrameId { class: class as u16, index: 0 };
    for (file, (path, identity)) in files.iter().enumerate() {
        let len = TRIAL_BYTES.min(spec.frame_bytes);
        let last = identity.len.saturating_sub(len as u64).next_multiple_of(ALIGN_BYTES as u64);
        for offset in [0, last] {
            let there = usize::try_from(identity.len - offset).unwrap_or(usize::MAX);
            let piece = Piece { file, offset, len, needed: len.min(there), at: 0 };
            try_piece(mover, frames, frame, piece)
                .map_err(|why| format!("trial at byte {offset} of {}: {why}", path.display()))?;
        }
    }
    Ok(())
}

fn try_piece(
    mover: &mut DiskMover,
    frames: &Arc<Frames>,
    frame: FrameId,
    piece: Piece,
) -> std::result::Result<(), String> {
    if piece.needed == 0 {
        return Ok(());
    }
    let ticket = frames.claim(frame).ok_or("the frames are in use already")?;
    let pieces = Arc::new([piece]);
    mover.submit(Fill { key: 0, ticket, pieces, urgency: Urgency::Demand });
    let done = mover.next(TRIAL_NS).ok_or("no answer within 30 s")?;
    done.result.map_err(|error| error.to_string())?;
    let pin = frames.pin(frame, done.generation).ok_or("the frame is not ready")?;
    let mut expected = vec![0; piece.needed];
    let buffered = File::open(&mover.shared.sources.all()[piece.file].path);
    let is_read = buffered.and_then(|file| read_exact(&file, &mut expected, piece.offset));
    is_read.map_err(|error| format!("the same through the page cache: {error}"))?;
    let is_equal = pin[..piece.needed] == expected;
    drop(pin);
    frames.release(frame);
    is_equal.then_some(()).ok_or_else(|| "other bytes than through the page cache".into())
}

fn read_exact(file: &dyn ReadAt, mut bytes: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match file.read_at(bytes, offset) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                bytes = &mut bytes[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
