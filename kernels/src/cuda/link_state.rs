//! What a [`super::Link`] knows: transfers, their order, and the chunks that
//! are with the device. No threads and no clock.

use super::error::CudaError;
use super::flight::{Copies, Start};
use super::link::{Landed, LinkCounters, LinkError, Transfer, Urgency};
use super::link_job::{Job, check};
use super::memory::HostMemory;
use super::stream::Event;
use std::collections::{HashMap, VecDeque};
use std::mem;

pub(super) struct State<M> {
    chunk_bytes: usize,
    in_flight: usize,
    prefetch_in_flight: usize,
    jobs: HashMap<u64, Job<M>>,
    /// Keys of the jobs with chunks left to start, demands and prefetches.
    queues: [VecDeque<u64>; 2],
    /// Chunks that are with the device, the oldest first.
    flights: VecDeque<Flight>,
    landed: VecDeque<Landed<M>>,
    stopped: Option<LinkError>,
    closed: bool,
    /// Of the next flight.
    number: u64,
    busy_since_ns: Option<u64>,
    pub counters: LinkCounters,
}

struct Flight {
    /// Counts chunks: the worker names the one that it waited for.
    number: u64,
    key: u64,
    bytes: usize,
    prefetch: bool,
    since_ns: u64,
    mark: Event,
}

impl<M: HostMemory> State<M> {
    pub fn new(chunk_bytes: usize, in_flight: usize, prefetch_in_flight: usize) -> Self {
        Self {
            chunk_bytes,
            in_flight,
            prefetch_in_flight,
            jobs: HashMap::new(),
            queues: [VecDeque::new(), VecDeque::new()],
            flights: VecDeque::new(),
            landed: VecDeque::new(),
            stopped: None,
            closed: false,
            number: 0,
            busy_since_ns: None,
            counters: LinkCounters::default(),
        }
    }

    pub fn push(&mut self, transfer: Transfer<M>, now_ns: u64) {
        check(&transfer);
        let key = transfer.key;
        assert!(!self.jobs.contains_key(&key), "transfer {key} is outstanding");
        self.counters.transfers += 1;
        self.counters.outstanding += 1;
        let queue = transfer.urgency as usize;
        let job = Job::new(transfer, self.stopped.clone(), now_ns);
        let stopped = job.failure.is_some();
        self.jobs.insert(key, job);
        if stopped {
            self.land_job(key, now_ns);
        } else {
            self.queues[queue].push_back(key);
        }
    }

    pub fn promote(&mut self, key: u64) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        if job.transfer.urgency == Urgency::Demand {
            return;
        }
        job.transfer.urgency = Urgency::Demand;
        if job.has_more() && job.failure.is_none() {
            self.unqueue(key);
            self.queues[Urgency::Demand as usize].push_back(key);
        }
    }

    pub fn discard(&mut self, key: u64, now_ns: u64) {
        if self.jobs.get(&key).is_some_and(|job| job.has_more() && job.failure.is_none()) {
            self.fail(key, LinkError::Discarded, now_ns);
        }
    }

    /// Starts no more chunks; what waited for its first lands at once.
    pub fn close(&mut self) {
        self.closed = true;
        let queued: Vec<u64> = self.queues.iter().flatten().copied().collect();
        for key in queued {
            self.fail(key, LinkError::Discarded, 0);
        }
    }

    pub fn is_closed(&self) -> bool {
        self.closed
    }

    pub fn has_flights(&self) -> bool {
        !self.flights.is_empty()
    }

    pub fn has_landed(&self) -> bool {
        !self.landed.is_empty()
    }

    /// The chunk that ends next: its number and the mark to wait for.
    pub fn oldest(&self) -> Option<(u64, Event)> {
        self.flights.front().map(|flight| (flight.number, flight.mark.clone()))
    }

    pub fn oldest_since_ns(&self) -> Option<u64> {
        self.flights.front().map(|flight| flight.since_ns)
    }

    pub fn next(&mut self) -> Option<Landed<M>> {
        let landed = self.landed.pop_front()?;
        self.counters.outstanding -= 1;
        Some(landed)
    }

    /// Bytes that a demand submitted now would wait for: what is with the
    /// device, and demands; and those of transfer `key` that would be left
    /// then, if it is outstanding.
    pub fn queued(&self, key: Option<u64>) -> (u64, Option<u64>) {
        let flying: usize = self.flights.iter().map(|flight| flight.bytes).sum();
        let left = |key: &u64| self.jobs.get(key).map_or(0, Job::left);
        let demands = self.queues[Urgency::Demand as usize].iter().filter(|of| Some(**of) != key);
        let before = flying as u64 + demands.map(left).sum::<u64>();
        (before, key.and_then(|key| Some(self.jobs.get(&key)?.left())))
    }

    pub fn counters_at(&self, now_ns: u64) -> LinkCounters {
        let busy = self.busy_since_ns.map_or(0, |since| now_ns.saturating_sub(since));
        LinkCounters { busy_ns: self.counters.busy_ns + busy, ..self.counters }
    }

    /// Gives the device chunks until it has as many as it may.
    pub fn feed(&mut self, copies: &Copies, now_ns: impl Fn() -> u64) {
        while let Some(key) = self.pick() {
            self.start(key, copies, now_ns());
        }
    }

    /// Whose chunk goes next.
    fn pick(&self) -> Option<u64> {
        if self.flights.len() >= self.in_flight {
            return None;
        }
        let prefetches = self.flights.iter().filter(|flight| flight.prefetch).count();
        let open = if prefetches < self.prefetch_in_flight { 2 } else { 1 };
        let mut queued = self.queues[..open].iter().flatten();
        let ready = queued.clone().find(|key| self.is_ready(**key));
        // Where all must wait for work on the device, and nothing flies whose
        // end would look again, the first waits in the stream.
        ready.or_else(|| queued.next().filter(|_| self.flights.is_empty())).copied()
    }

    /// Whether nothing uses its destination any more. An error shows when its
    /// chunk is started.
    fn is_ready(&self, key: u64) -> bool {
        let after = self.jobs.get(&key).and_then(|job| job.transfer.after.as_ref());
        after.is_none_or(|event| event.is_complete().unwrap_or(true))
    }

    /// Starts the next chunk of a job. Afterwards the chunk is with the
    /// device, was refused once, has landed, or its job is queued no more.
    fn start(&mut self, key: u64, copies: &Copies, now_ns: u64) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return self.unqueue(key);
        };
        let bytes = job.chunk(self.chunk_bytes);
        let Transfer { memory, parts, destination, after, urgency, publish, .. } = &job.transfer;
        let part = &parts[job.part];
        let from = part.from.start + job.at..part.from.start + job.at + bytes;
        let to = destination.part(part.to + job.at..part.to + job.at + bytes);
        let prefetch = *urgency == Urgency::Prefetch;
        let publish = publish.as_ref().filter(|_| job.is_last(bytes));
        match copies.start(memory, from, &to, after.as_ref(), publish) {
            Ok(mark) => {
                job.transfer.after = None;
                job.retried = false;
                job.flying += 1;
                job.advance(bytes);
                if !job.has_more() {
                    self.unqueue(key);
                }
                self.busy_since_ns.get_or_insert(now_ns);
                let (number, since_ns) = (self.number, now_ns);
                self.number += 1;
                self.flights.push_back(Flight { number, key, bytes, prefetch, since_ns, mark });
            }
            Err(Start::Refused(error)) if error.is_sticky() => {
                // The call may have started it.
                job.flying += 1;
                self.stop(&error.into(), now_ns);
            }
            Err(Start::Refused(_)) if !job.retried => {
                job.retried = true;
                self.counters.retries += 1;
            }
            Err(Start::Refused(error)) => {
                self.fail(key, error.into(), now_ns);
            }
            Err(Start::Unmarked(error)) => {
                job.flying += 1;
                match copies.finish_all() {
                    // It has ended, and so have those before it.
                    Ok(()) => {
                        job.transfer.after = None;
                        job.advance(bytes);
                        if !job.has_more() {
                            self.unqueue(key);
                        }
                        self.arrive_all(now_ns);
                        self.arrive(key, bytes, now_ns);
                        self.counters.retries += 1;
                    }
                    Err(worse) => self.stop_after(error, worse, now_ns),
                }
            }
            Err(Start::Unpublished(error)) => match copies.finish_all() {
                // The chunk has ended and counts for nothing: once more.
                Ok(()) => {
                    let retried = mem::replace(&mut job.retried, true);
                    self.arrive_all(now_ns);
                    if retried {
                        self.fail(key, error.into(), now_ns);
                    } else {
                        self.counters.retries += 1;
                    }
                }
                Err(worse) => {
                    job.flying += 1;
                    self.stop_after(error, worse, now_ns);
                }
            },
        }
    }

    /// The mark of chunk `number`, the oldest, was waited for.
    pub fn land(
        &mut self,
        number: u64,
        ended: Result<(), CudaError>,
        copies: &Copies,
        now_ns: u64,
    ) {
        if self.flights.front().is_none_or(|flight| flight.number != number) {
            // It has landed meanwhile, with others.
            return;
        }
        let error = match ended {
            Ok(()) => None,
            Err(error) if error.is_sticky() => Some(error),
            // An error of the mark alone says nothing of the copy.
            Err(error) => {
                copies.finish_all().err().map(|worse| if worse.is_sticky() { worse } else { error })
            }
        };
        match error {
            Some(error) => self.stop(&error.into(), now_ns),
            None => {
                if let Some(flight) = self.flights.pop_front() {
                    self.arrive(flight.key, flight.bytes, now_ns);
                }
            }
        }
    }

    /// All chunks have ended.
    fn arrive_all(&mut self, now_ns: u64) {
        while let Some(flight) = self.flights.pop_front() {
            self.arrive(flight.key, flight.bytes, now_ns);
        }
    }

    /// A chunk has ended.
    fn arrive(&mut self, key: u64, bytes: usize, now_ns: u64) {
        self.counters.chunks += 1;
        self.counters.bytes += bytes as u64;
        if self.flights.is_empty() {
            self.rest(now_ns);
        }
        if let Some(job) = self.jobs.get_mut(&key) {
            job.flying -= 1;
            job.bytes += bytes as u64;
            if job.flying == 0 && (job.failure.is_some() || !job.has_more()) {
                self.land_job(key, now_ns);
            }
        }
    }

    fn rest(&mut self, now_ns: u64) {
        let since = self.busy_since_ns.take();
        self.counters.busy_ns += since.map_or(0, |since| now_ns.saturating_sub(since));
    }

    /// No chunk of this job is started any more.
    fn fail(&mut self, key: u64, error: LinkError, now_ns: u64) {
        self.unqueue(key);
        if let Some(job) = self.jobs.get_mut(&key) {
            job.failure = Some(error);
            if job.flying == 0 {
                self.land_job(key, now_ns);
            }
        }
    }

    /// Ends everything, after an error behind which waiting failed as well.
    fn stop_after(&mut self, error: CudaError, worse: CudaError, now_ns: u64) {
        let error = if worse.is_sticky() { worse } else { error };
        self.stop(&error.into(), now_ns);
    }

    /// Ends everything, after an error that leaves the device's state in the
    /// dark.
    pub fn stop(&mut self, error: &LinkError, now_ns: u64) {
        self.stopped.get_or_insert_with(|| error.clone());
        self.queues.iter_mut().for_each(VecDeque::clear);
        self.flights.clear();
        self.rest(now_ns);
        let mut keys: Vec<u64> = self.jobs.keys().copied().collect();
        keys.sort_unstable();
        for key in keys {
            if let Some(job) = self.jobs.get_mut(&key) {
                job.failure.get_or_insert_with(|| error.clone());
            }
            self.land_job(key, now_ns);
        }
    }

    fn unqueue(&mut self, key: u64) {
        self.queues.iter_mut().for_each(|queue| queue.retain(|queued| *queued != key));
    }

    fn land_job(&mut self, key: u64, now_ns: u64) {
        let Some(job) = self.jobs.remove(&key) else { return };
        let Job { transfer, flying, bytes, submitted_ns, failure, .. } = job;
        let counter = match (&failure, transfer.urgency) {
            (None, Urgency::Demand) => &mut self.counters.demands_landed,
            (None, Urgency::Prefetch) => &mut self.counters.prefetches_landed,
            (Some(LinkError::Discarded), _) => &mut self.counters.discarded,
            (Some(_), _) => &mut self.counters.failed,
        };
        *counter += 1;
        if failure.is_some() {
            self.counters.wasted_bytes += bytes;
        }
        let Transfer { memory, destination, publish, .. } = transfer;
        let memory = if flying == 0 {
            Some(memory)
        } else {
            // The device may be reading and writing them for ever.
            mem::forget((memory, destination, publish));
            None
        };
        let result = failure.map_or(Ok(()), Err);
        self.landed.push_back(Landed {
            key,
            memory,
            result,
            bytes,
            submitted_ns,
            ended_ns: now_ns,
        });
    }
}

impl<M> Drop for State<M> {
    fn drop(&mut self) {
        // Only when nobody could wait for them: an unwinding owner, a device
        // that failed.
        for (_, job) in self.jobs.drain() {
            if job.flying > 0 {
                mem::forget(job.transfer);
            }
        }
    }
}
