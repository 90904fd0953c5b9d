//! Records what the runtime decides, while it runs.

mod pass;
mod writing;

use crate::{Header, TraceError, format::Dropped};
use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use pass::Recorded;
use pregate_predictor::{Fed, Observer, Served};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use writing::Written;

/// What may wait for the disk.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    pub passes: usize,
    /// Of all of them; one pass is let in whatever its size.
    pub bytes: u64,
}

impl Default for Queue {
    /// Seconds of decoding.
    fn default() -> Self {
        Self { passes: 1024, bytes: 32 << 20 }
    }
}

/// An observer that writes a trace file on a thread of its own. The token's
/// thread only copies numbers into a buffer, and never waits: where the queue
/// is full, a whole pass is dropped, the file says so, and what follows starts
/// a sequence; likewise a pass with a number that the format has no room for. After the first passes the buffers are those that the writer
/// gives back.
pub struct Recorder {
    /// The pass that runs.
    pass: Box<Recorded>,
    /// Since the last pass that was queued.
    gap: Dropped,
    dropped: Dropped,
    odd_passes: u64,
    full: Option<Sender<Box<Recorded>>>,
    empty: Receiver<Box<Recorded>>,
    /// Bytes in the queue.
    queued: Arc<AtomicU64>,
    limit: Queue,
    moe_layers: usize,
    path: PathBuf,
    writer: Option<JoinHandle<Written>>,
}

/// What became of a recording.
#[derive(Debug)]
pub struct Recording {
    /// In the file.
    pub tokens: u64,
    pub dropped: Dropped,
    /// Of those, the passes with a number that the format has no room for,
    /// such as a weight that is not finite; for the others the disk was too
    /// slow.
    pub odd_passes: u64,
    /// What ended the recording early. The file is readable up to there.
    pub error: Option<TraceError>,
}

impl Recorder {
    /// Creates or overwrites the file.
    ///
    /// # Errors
    /// A file that cannot be created, or a header that the format does not
    /// hold.
    pub fn create(path: &Path, header: &Header) -> Result<Self, TraceError> {
        let io = |source| TraceError::io(path, source);
        let file = BufWriter::new(File::create(path).map_err(io)?);
        let mut recorder = Self::new(file, header, Queue::default()).map_err(io)?;
        recorder.path = path.to_path_buf();
        Ok(recorder)
    }

    /// Records to `out`.
    ///
    /// # Errors
    /// Of `out`, or of starting a thread; `InvalidData` for a header that the
    /// format does not hold.
    pub fn new(
        out: impl Write + Send + 'static,
        header: &Header,
        limit: Queue,
    ) -> io::Result<Self> {
        let writer = crate::format::Writer::new(out, header, &[])?;
        let (full, to_write) = bounded(limit.passes);
        // More than a few are only there after a jam.
        let (give_back, empty) = bounded(8);
        let queued = Arc::new(AtomicU64::new(0));
        let (bytes, shape) = (queued.clone(), header.shape.clone());
        let write = move || writing::run(writer, &shape, &to_write, &give_back, &bytes);
        let writer = std::thread::Builder::new().name("trace".into()).spawn(write)?;
        Ok(Self {
            pass: Box::default(),
            gap: Dropped::default(),
            dropped: Dropped::default(),
            odd_passes: 0,
            full: Some(full),
            empty,
            queued,
            limit,
            moe_layers: header.shape.moe().count(),
            path: PathBuf::new(),
            writer: Some(writer),
        })
    }

    /// Writes the rest and ends the file. Waits for the disk.
    pub fn finish(mut self) -> Recording {
        self.hand_over();
        let written = self.close();
        let error = written.error.map(|source| TraceError::io(&self.path, source));
        let (tokens, dropped, odd_passes) = (written.tokens, self.dropped, self.odd_passes);
        Recording { tokens, dropped, odd_passes, error }
    }

    /// Queues the pass that has run, if it is whole.
    fn hand_over(&mut self) {
        if self.pass.is_whole(self.moe_layers) {
            let (tokens, bytes) = (self.pass.tokens() as u64, self.pass.bytes());
            let queued = self.queued.load(Ordering::Relaxed);
            let fits = queued == 0 || queued + bytes <= self.limit.bytes;
            let is_odd = !self.pass.fits();
            self.odd_passes += u64::from(is_odd);
            let next = self.empty.try_recv().unwrap_or_default();
            let pass = std::mem::replace(&mut self.pass, next);
            match self.full.as_ref().filter(|_| fits && !is_odd) {
                Some(full) => match self.queue(full, pass, bytes) {
                    Ok(()) => self.gap = Dropped::default(),
                    Err(pass) => self.drop_pass(pass, tokens),
                },
                None => self.drop_pass(pass, tokens),
            }
        }
        self.pass.clear();
    }

    fn queue(
        &self,
        full: &Sender<Box<Recorded>>,
        mut pass: Box<Recorded>,
        bytes: u64,
    ) -> Result<(), Box<Recorded>> {
        pass.gap = self.gap;
        self.queued.fetch_add(bytes, Ordering::Relaxed);
        full.try_send(pass).map_err(|error| {
            self.queued.fetch_sub(bytes, Ordering::Relaxed);
            let (TrySendError::Full(pass) | TrySendError::Disconnected(pass)) = error;
            pass
        })
    }

    fn drop_pass(&mut self, pass: Box<Recorded>, tokens: u64) {
        for count in [&mut self.gap, &mut self.dropped] {
            count.passes += 1;
            count.tokens += tokens;
        }
        self.pass = pass;
    }

    fn close(&mut self) -> Written {
        // Passes that were dropped at the very end.
        let mut last = Box::<Recorded>::default();
        last.gap = self.gap;
        if let Some(full) = self.full.take().filter(|_| self.gap != Dropped::default()) {
            // Waits; nobody else does now.
            let _ = full.send(last);
        }
        let lost = || Written {
            tokens: 0,
            error: Some(io::Error::other("the writer of the trace panicked")),
        };
        self.writer.take().map_or_else(lost, |writer| writer.join().unwrap_or_else(|_| lost()))
    }
}

impl Drop for Recorder {
    /// A recording that nobody finished is ended as well as it can be.
    fn drop(&mut self) {
        if self.writer.is_some() {
            self.hand_over();
            let _ = self.close();
        }
    }
}

impl Observer for Recorder {
    fn fed(&mut self, fed: &Fed<'_>) {
        self.hand_over();
        self.pass.begin(fed);
    }

    fn routed(&mut self, layer: usize, position: usize, experts: &[u32], weights: &[f32]) {
        self.pass.routed(layer, position, experts, weights);
    }

    fn served(&mut self, served: &Served<'_>) {
        self.pass.served(served);
    }
}
