//! The copy side of a device: brings blocks of host memory, experts mostly,
//! to device memory, demands before prefetches.
//!
//! A [`Transfer`] is cut into chunks of 1-2 MiB (as the options say). A few
//! chunks are with the device at a time; the rest wait here, so that a demand
//! goes before every chunk of a prefetch that is not yet with the device.
//! Every transfer that was submitted comes back as exactly one [`Landed`],
//! whatever happens to the device: this is what a mover of the expert store
//! builds on (`runtime/src/store/mover.rs`), whose terms it uses.
//!
//! A transfer owns its host memory and its span until its last chunk has
//! ended. Where that cannot be learnt, because the device failed, they are
//! leaked and [`Landed::memory`] is `None`.

use super::device::Device;
use super::error::CudaError;
use super::flight::Copies;
use super::link_state::State;
use super::memory::{HostMemory, Span};
use super::stream::Event;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Who waits for a transfer. In the order of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// The token being computed.
    Demand,
    /// Nobody yet; a forecast asked for it.
    Prefetch,
}

/// A range of the host memory and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Bytes of [`HostMemory::bytes`].
    pub from: Range<usize>,
    /// In bytes from the start of the destination.
    pub to: usize,
}

/// Host memory to bring to the device.
pub struct Transfer<M> {
    /// The caller's name for it; no two outstanding transfers have the same.
    pub key: u64,
    /// What is copied, and whatever else must live until the copy has ended.
    pub memory: M,
    /// Not empty, and disjoint where they go.
    pub parts: Vec<Part>,
    pub destination: Span,
    pub urgency: Urgency,
    /// Work that still reads what the destination held: the first chunk is
    /// copied after it.
    pub after: Option<Event>,
    /// A word of the device, 4 bytes, and what is stored there when the last
    /// byte has arrived and before the transfer lands: kernels that see the
    /// value see the destination's new contents. Stored for no transfer but
    /// those that land `Ok` (and perhaps for one whose device failed).
    pub publish: Option<(Span, u32)>,
}

/// What became of a [`Transfer`].
#[derive(Debug)]
pub struct Landed<M> {
    pub key: u64,
    /// The transfer's memory; `None` if the device may still be reading it.
    pub memory: Option<M>,
    /// `Ok`: every byte is on the device, for work on any stream.
    pub result: Result<(), LinkError>,
    /// Bytes that were copied for it, also those that are of no use any more.
    pub bytes: u64,
    /// When it was submitted, in nanoseconds on the link's clock.
    pub submitted_ns: u64,
    /// When its last chunk ended, likewise.
    pub ended_ns: u64,
}

/// Why a transfer brought nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LinkError {
    /// [`Link::discard`] came before its last chunk.
    #[error("discarded before it was copied")]
    Discarded,
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The link itself ended; it takes no more transfers.
    #[error("copies to the GPU have stopped: {0}")]
    Stopped(String),
}

/// How a [`Link`] is set up.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// The longest chunk, in bytes.
    pub chunk_bytes: usize,
    /// Chunks that are with the device at a time.
    pub in_flight: usize,
    /// Of these, how many may be prefetches: what a demand waits for at most.
    pub prefetch_in_flight: usize,
    /// Without a thread of its own the link moves only inside its methods:
    /// the order of calls is then the same in every run.
    pub thread: bool,
    /// A chunk that takes longer means that the device hangs; see
    /// [`Device::patience`].
    pub hung_after: Duration,
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self {
            chunk_bytes: 2 << 20,
            in_flight: 3,
            prefetch_in_flight: 2,
            thread: true,
            hung_after: Duration::from_secs(30),
        }
    }
}

/// What a link has done since it was made. All only grow, except
/// `outstanding`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    pub transfers: u64,
    /// Transfers that landed `Ok`, by their urgency at the end.
    pub demands_landed: u64,
    pub prefetches_landed: u64,
    pub discarded: u64,
    pub failed: u64,
    /// Chunks that ended, and their bytes.
    pub chunks: u64,
    pub bytes: u64,
    /// Of `bytes`, those of discarded and failed transfers.
    pub wasted_bytes: u64,
    /// Time with at least one chunk with the device.
    pub busy_ns: u64,
    /// Chunks that were submitted again after an error.
    pub retries: u64,
    /// Transfers that were submitted and have not come back yet.
    pub outstanding: u64,
}

/// Moves host memory to a device.
///
/// One owner submits and collects; no method but [`Link::next`] waits for the
/// device. Dropping a link drops what is queued and waits for the chunks that
/// the device has already (their memory belongs to it until then).
pub struct Link<M: HostMemory> {
    shared: Arc<Shared<M>>,
    worker: Option<JoinHandle<()>>,
}

struct Shared<M> {
    state: Mutex<State<M>>,
    /// A chunk went to the device, or the link is closing.
    work: Condvar,
    /// A transfer landed.
    landed: Condvar,
    clock: Instant,
    copies: Copies,
    hung_after: Duration,
}

impl<M: HostMemory> Link<M> {
    /// Starts a link over [`Device::copy`].
    ///
    /// # Errors
    /// The driver's; [`CudaError::Unsupported`] when the system refuses a
    /// thread; [`CudaError::Shape`] for options with a zero.
    pub fn new(device: &Device, options: &LinkOptions) -> Result<Self, CudaError> {
        let LinkOptions { chunk_bytes, in_flight, prefetch_in_flight, thread, hung_after } =
            *options;
        if chunk_bytes == 0 || in_flight == 0 || !(1..=in_flight).contains(&prefetch_in_flight) {
            return Err(CudaError::shape("link", format!("options {options:?}")));
        }
        let copies = Copies::new(device, in_flight);
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(chunk_bytes, in_flight, prefetch_in_flight)),
            work: Condvar::new(),
            landed: Condvar::new(),
            clock: Instant::now(),
            copies,
            hung_after,
        });
        let worker = thread.then(|| {
            let shared = shared.clone();
            let name = "pregate-link".to_string();
            thread::Builder::new().name(name).spawn(move || shared.work_until_closed())
        });
        let worker = worker.transpose().map_err(|error| {
            CudaError::unsupported(format!("the system refuses the thread for copies: {error}"))
        })?;
        Ok(Self { shared, worker })
    }

    /// Takes a transfer; it comes back from [`Link::next`] exactly once.
    ///
    /// # Panics
    /// If the key is outstanding, or the parts are none, overlap, or do not
    /// lie in the memory and the destination: mistakes of the caller.
    pub fn submit(&mut self, transfer: Transfer<M>) {
        let now = self.now_ns();
        let mut state = self.shared.lock();
        state.push(transfer, now);
        self.shared.feed(&mut state);
    }

    /// A prefetch became a demand: its chunks that are not yet with the
    /// device go behind the demands that are already queued. No effect on a
    /// transfer that is a demand or no longer outstanding.
    pub fn promote(&mut self, key: u64) {
        let mut state = self.shared.lock();
        state.promote(key);
        self.shared.feed(&mut state);
    }

    /// Drops the chunks of a transfer that are not yet with the device; it
    /// lands as [`LinkError::Discarded`] when the others have ended, or `Ok`
    /// if all were copied. No effect on one that is no longer outstanding.
    pub fn discard(&mut self, key: u64) {
        let now = self.now_ns();
        let mut state = self.shared.lock();
        state.discard(key, now);
        self.shared.feed(&mut state);
    }

    /// The next transfer that ended, in the order of ending. Waits for one
    /// for at most `wait_ns` (0: does not wait; `u64::MAX`: for ever); `None`
    /// at once if none is outstanding.
    pub fn next(&mut self, wait_ns: u64) -> Option<Landed<M>> {
        let start = Instant::now();
        loop {
            let mut state = self.shared.lock();
            if let Some(landed) = state.next() {
                return Some(landed);
            }
            if state.counters.outstanding == 0 {
                return None;
            }
            let left = Duration::from_nanos(wait_ns).checked_sub(start.elapsed());
            let left = left.filter(|left| !left.is_zero());
            if self.worker.is_none() {
                drop(state);
                if !self.shared.settle(left.is_some()) {
                    return self.shared.lock().next();
                }
                continue;
            }
            let left = left?;
            self.shared.watch(&mut state);
            if !state.has_landed() {
                // Looks at the clock of the device's patience now and then.
                let nap = left.min(self.shared.hung_after / 4).max(Duration::from_micros(1));
                drop(self.shared.landed.wait_timeout(state, nap));
            }
        }
    }

    /// Bytes that are copied before a demand submitted now: those with the
    /// device, and demands that wait.
    pub fn queued(&self) -> u64 {
        self.shared.lock().queued(None).0
    }

    /// Bytes until transfer `key` has arrived, were it a demand from now on:
    /// those before it, and its own. `None`: it is not outstanding.
    pub fn remaining(&self, key: u64) -> Option<u64> {
        let (before, own) = self.shared.lock().queued(Some(key));
        own.map(|own| before + own)
    }

    /// Nanoseconds since the link was made.
    pub fn now_ns(&self) -> u64 {
        self.shared.now_ns()
    }

    pub fn counters(&self) -> LinkCounters {
        let now = self.now_ns();
        self.shared.lock().counters_at(now)
    }
}

impl<M: HostMemory> Drop for Link<M> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.close();
        drop(state);
        self.shared.work.notify_all();
        match self.worker.take() {
            // A worker that waits for a device that hangs never comes back;
            // what it holds is leaked with it.
            Some(worker) => {
                if !self.shared.copies.hangs() || worker.is_finished() {
                    let _ = worker.join();
                }
            }
            None => while self.shared.settle(true) {},
        }
    }
}

impl<M: HostMemory> Shared<M> {
    fn lock(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Gives the device what it may have.
    fn feed(&self, state: &mut State<M>) {
        state.feed(&self.copies, || self.now_ns());
        if state.has_flights() {
            self.work.notify_one();
        }
        if state.has_landed() {
            self.landed.notify_all();
        }
    }

    /// Waits for the oldest chunk that is with the device, or only looks at
    /// it, and gives the device the next. Whether a chunk ended.
    fn settle(&self, wait: bool) -> bool {
        let Some((number, mark)) = self.lock().oldest() else { return false };
        let ended = if wait { mark.synchronize().map(|()| true) } else { mark.is_complete() };
        let mut state = self.lock();
        match ended {
            Ok(false) => return false,
            Ok(true) => state.land(number, Ok(()), &self.copies, self.now_ns()),
            Err(error) => state.land(number, Err(error), &self.copies, self.now_ns()),
        }
        self.feed(&mut state);
        true
    }

    /// The worker's life.
    fn work_until_closed(&self) {
        let ended = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let mut state = self.lock();
                while !state.has_flights() {
                    if state.is_closed() {
                        return;
                    }
                    state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                drop(state);
                self.settle(true);
            }
        }));
        if ended.is_err() {
            let why = LinkError::Stopped("its thread panicked".to_string());
            self.lock().stop(&why, self.now_ns());
            self.landed.notify_all();
        }
    }

    /// Ends everything if the oldest chunk takes too long. One that has ended
    /// did not, whatever the clock says: this process may have been stopped,
    /// and the worker may not have landed it yet.
    fn watch(&self, state: &mut State<M>) {
        let patience = u64::try_from(self.hung_after.as_nanos()).unwrap_or(u64::MAX);
        let now = self.now_ns();
        let is_late = |since: u64| now.saturating_sub(since) > patience;
        if !state.oldest_since_ns().is_some_and(is_late) {
            return;
        }
        let Some((number, mark)) = state.oldest() else { return };
        match mark.is_complete() {
            Ok(true) => {
                state.land(number, Ok(()), &self.copies, now);
                self.feed(state);
            }
            Ok(false) => {
                let error = self.copies.give_up(self.hung_after);
                state.stop(&LinkError::Cuda(error), now);
            }
            // The worker hears of it, too.
            Err(_) => {}
        }
    }
}
