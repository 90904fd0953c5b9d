//! The engine for Linux: one thread with an io_uring.
//!
//! The kernel writes into a job's chunk from the moment its read is submitted
//! until its completion is seen. All `unsafe` here relies on one rule: such a
//! job lies in [`Ring::flights`], and leaves it only through its completion.
//! A ring that is dropped waits for all completions first.

use super::{
    super::frames::Frames,
    board::Take,
    job::Job,
    shared::{Shared, Wake, words},
};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::{event::EventfdFlags, fd::OwnedFd, io::Errno};
use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::{Builder, JoinHandle, sleep},
    time::Duration,
};

/// The completion that stands for a call of [`Wake`].
const WOKEN: u64 = u64::MAX;

/// Starts the thread. `register`: whether to try registered buffers. Also
/// gives out what became of that, in words.
///
/// Errors, in words: what this system lacks.
pub(super) fn start(
    shared: &Arc<Shared>,
    frames: &Arc<Frames>,
    depth: usize,
    register: bool,
) -> Result<(JoinHandle<()>, Wake, String), String> {
    let files = shared.sources.all().iter().map(|source| source.reader.file());
    let files: Option<Vec<RawFd>> = files.map(|file| Some(file?.as_raw_fd())).collect();
    let files = files.ok_or("a source that is no file")?;
    let entries = u32::try_from(depth + 1).map_err(|_| "too many reads at once")?;
    let uring = IoUring::new(entries.next_power_of_two()).map_err(|error| refusal(&error))?;
    if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
        return Err("io_uring of a kernel before 5.11".into());
    }
    let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let event = Arc::new(event.map_err(|error| format!("no eventfd: {error}"))?);
    let mut ring = Ring {
        uring,
        flights: (0..depth).map(|_| None).collect(),
        files,
        is_registered: false,
        event: event.clone(),
        is_listening: false,
        shared: shared.clone(),
        frames: frames.clone(),
    };
    let buffers = if register { ring.register() } else { "plain buffers".into() };
    let thread = Builder::new().name("pregate-disk".into()).spawn(move || ring.run());
    let thread = thread.map_err(|error| format!("no thread to read with: {error}"))?;
    let wake = move |_| {
        // Full only after 2^64 - 2 wake-ups that nobody has seen.
        let _ = rustix::io::write(&*event, &1u64.to_ne_bytes());
    };
    Ok((thread, Box::new(wake), buffers))
}

fn refusal(error: &io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::ENOSYS) => " (the kernel has none)",
        Some(libc::EPERM | libc::EACCES) => " (forbidden here; containers often do so)",
        Some(libc::ENOMEM) => " (locked memory is limited, see `ulimit -l`)",
        _ => "",
    };
    format!("io_uring: {error}{hint}")
}

struct Ring {
    uring: IoUring,
    /// Jobs that the kernel has, by `user_data`.
    flights: Vec<Option<Job>>,
    files: Vec<RawFd>,
    is_registered: bool,
    event: Arc<OwnedFd>,
    /// Whether the kernel has a poll of `event`.
    is_listening: bool,
    /// Owns the files.
    shared: Arc<Shared>,
    /// Outlives the ring that its memory is registered with.
    frames: Arc<Frames>,
}

impl Ring {
    /// Registers the frames' memory, so that the kernel need not look up and
    /// pin pages for every read.
    fn register(&mut self) -> String {
        let regions = self.frames.regions();
        let buffer = |region: &super::super::frames::Region| libc::iovec {
            iov_base: region.start.as_ptr().cast(),
            iov_len: region.bytes,
        };
        let buffers: Vec<libc::iovec> = regions.iter().map(buffer).collect();
        // SAFETY: the regions are mapped as long as `self.frames` lives, which
        // is dropped after `self.uring`, with which the registration ends.
        match unsafe { self.uring.submitter().register_buffers(&buffers) } {
            Ok(()) => {
                self.is_registered = true;
                "registered buffers".into()
            }
            Err(error) => {
                format!("plain buffers, because registering was refused: {}", refusal(&error))
            }
        }
    }

    fn run(mut self) {
        let why = match catch_unwind(AssertUnwindSafe(|| self.work())) {
            Ok(Ok(())) => "its thread has ended".into(),
            Ok(Err(error)) => format!("io_uring: {error}"),
            Err(panic) => words(&*panic),
        };
        let hand = self.drain();
        let shared = self.shared.clone();
        drop(self);
        shared.stop(why, hand);
        shared.gone();
    }

    /// Serves until the board stops and the kernel has no job any more.
    fn work(&mut self) -> io::Result<()> {
        loop {
            let wait = match self.fill_up()? {
                Some(wait) => wait,
                None if self.flights.iter().all(Option::is_none) => return Ok(()),
                None => None,
            };
            self.wait(wait)?;
            while let Some(completion) = self.completion() {
                self.completed(&completion)?;
            }
        }
    }

    /// Takes as many jobs as the kernel may have. `None`: the board has
    /// stopped; otherwise how long to wait at most.
    fn fill_up(&mut self) -> io::Result<Option<Option<Duration>>> {
        if !self.is_listening {
            let event = types::Fd(self.event.as_raw_fd());
            let poll = opcode::PollAdd::new(event, libc::POLLIN as u32).build().user_data(WOKEN);
            // SAFETY: a poll has no buffer.
            unsafe { push(&mut self.uring, &poll)? };
            self.is_listening = true;
        }
        let shared = self.shared.clone();
        let mut board = shared.board();
        board.asleep = 0;
        while let Some(free) = self.flights.iter().position(Option::is_none) {
            if board.is_stopped() {
                return Ok(None);
            }
            match board.take(shared.now_ns()) {
                Take::Job(job) => self.read(free, job)?,
                take => {
                    // From here on a submission has to wake this thread.
                    board.asleep = 1;
                    let Take::Until(due_ns) = take else { return Ok(Some(None)) };
                    let wait = due_ns.saturating_sub(shared.now_ns());
                    return Ok(Some(Some(Duration::from_nanos(wait))));
                }
            }
        }
        Ok(if board.is_stopped() { None } else { Some(None) })
    }

    /// Gives the rest of `job` to the kernel, as `flights[index]`.
    fn read(&mut self, index: usize, mut job: Job) -> io::Result<()> {
        let (start, len) = job.rest_raw();
        let (offset, file) = (job.position(), types::Fd(self.files[job.file]));
        let len = u32::try_from(len).map_err(io::Error::other)?;
        let region = u16::try_from(job.chunk.region());
        let entry = match region {
            Ok(region) if self.is_registered => {
                opcode::ReadFixed::new(file, start, len, region).offset(offset).build()
            }
            _ => opcode::Read::new(file, start, len).offset(offset).build(),
        };
        self.flights[index] = Some(job);
        // SAFETY: `start` is `len` bytes of the chunk of a job that stays in
        // `flights`, untouched, until its completion was seen.
        let pushed = unsafe { push(&mut self.uring, &entry.user_data(index as u64)) };
        if pushed.is_err() {
            // The kernel does not have it, so no completion would come.
            self.flights[index] = None;
        }
        pushed
    }

    /// Submits, and waits for a completion or until the time is over.
    fn wait(&mut self, wait: Option<Duration>) -> io::Result<()> {
        let submitted = match wait {
            None => self.uring.submit_and_wait(1),
            Some(wait) => {
                let time = types::Timespec::from(wait);
                let args = types::SubmitArgs::new().timespec(&time);
                self.uring.submitter().submit_with_args(1, &args)
            }
        };
        match submitted.map_err(|error| error.raw_os_error()) {
            // The time is over, a signal came, or completions have to be
            // taken first.
            Ok(_) | Err(Some(libc::ETIME | libc::EINTR | libc::EBUSY)) => Ok(()),
            Err(Some(libc::EAGAIN)) => {
                sleep(Duration::from_millis(1));
                Ok(())
            }
            Err(Some(code)) => Err(io::Error::from_raw_os_error(code)),
            Err(None) => Err(io::ErrorKind::Other.into()),
        }
    }

    fn completion(&mut self) -> Option<cqueue::Entry> {
        self.uring.completion().next()
    }

    fn completed(&mut self, completion: &cqueue::Entry) -> io::Result<()> {
        if completion.user_data() == WOKEN {
            self.is_listening = false;
            let mut count = [0; 8];
            return match rustix::io::read(&*self.event, &mut count) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
                Err(error) => Err(error.into()),
            };
        }
        let index = completion.user_data() as usize;
        let mut job = self.flights[index].take().expect("a completion has its job");
        let verdict = self.shared.judge(&mut job, answer(completion));
        match self.shared.settle(job, verdict) {
            Some(job) => self.read(index, job),
            None => Ok(()),
        }
    }

    /// Waits until the kernel has finished with all jobs, and gives them out
    /// as they are.
    fn drain(&mut self) -> Vec<Job> {
        let mut hand = Vec::new();
        let mut patience = 100;
        while self.flights.iter().any(Option::is_some) {
            match self.uring.submit_and_wait(1) {
                Ok(_) => {}
                Err(_) if patience > 0 => {
                    patience -= 1;
                    sleep(Duration::from_millis(10));
                }
                // The kernel may write into their memory for ever, so that
                // memory is never used again.
                Err(_) => self.flights.drain(..).for_each(std::mem::forget),
            }
            while let Some(completion) = self.completion() {
                let index = completion.user_data() as usize;
                hand.extend(self.flights.get_mut(index).and_then(Option::take));
            }
        }
        hand
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        drop(self.drain());
    }
}

fn answer(completion: &cqueue::Entry) -> io::Result<usize> {
    let result = completion.result();
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

/// Queues `entry`, after a submission if the queue is full.
///
/// # Safety
/// What `entry` points to must stay as it is until its completion.
unsafe fn push(uring: &mut IoUring, entry: &squeue::Entry) -> io::Result<()> {
    // SAFETY: the caller's promise.
    if unsafe { uring.submission().push(entry) }.is_ok() {
        return Ok(());
    }
    uring.submit()?;
    // SAFETY: the caller's promise.
    unsafe { uring.submission().push(entry) }.map_err(io::Error::other)
}
