//! Who is served next: the fills that are outstanding, their jobs in two
//! queues, and what became of them. No file, thread or clock in here: an
//! engine takes a job, does it, and settles it.

use super::{
    super::{
        frames::{FrameId, Landed},
        mover::{Counters, Done, MoveError, SLOW_NS, Urgency},
        slot::Generation,
    },
    job::{Job, Verdict},
};
use std::collections::{HashMap, VecDeque};

/// What a board has for an engine that asks.
pub(super) enum Take {
    Job(Job),
    /// Nothing before this moment, unless something is submitted.
    Until(u64),
    Nothing,
}

/// A fill that is not done.
struct Progress {
    urgency: Urgency,
    /// Jobs that no engine has, in the order of reading. If there are any, the
    /// key is in its urgency's queue.
    waiting: VecDeque<Job>,
    /// Jobs that are not ended, wherever they are.
    open: usize,
    /// Why it does not land `Ok`.
    error: Option<MoveError>,
    landed: Option<Landed>,
    frame: FrameId,
    generation: Generation,
    bytes: u64,
    submitted_ns: u64,
}

/// A job that an engine has.
struct Flight {
    key: u64,
    urgency: Urgency,
    file: usize,
    offset: u64,
    since_ns: u64,
    told: bool,
}

#[derive(Default)]
pub(super) struct Board {
    /// How many prefetches engines may have at once, so that a demand finds
    /// little in front of it.
    most_prefetches: usize,
    fills: HashMap<u64, Progress>,
    demands: VecDeque<u64>,
    prefetches: VecDeque<u64>,
    /// Jobs that wait for a moment, after an error.
    later: Vec<(u64, Job)>,
    flights: Vec<Flight>,
    busy_since_ns: u64,
    done: VecDeque<Done>,
    counters: Counters,
    /// File and offset of slow reads that nobody was told of.
    slow: VecDeque<(usize, u64)>,
    /// No more fills, and why.
    stopped: Option<MoveError>,
    /// Threads that wait for jobs; kept by the engines.
    pub asleep: usize,
}

impl Board {
    pub fn new(most_prefetches: usize) -> Self {
        Self { most_prefetches, ..Self::default() }
    }

    /// Takes in a fill as its jobs, in the order of reading; at least one.
    /// With `refused` it ends at once.
    pub fn submit(
        &mut self,
        jobs: VecDeque<Job>,
        urgency: Urgency,
        refused: Option<MoveError>,
        now_ns: u64,
    ) {
        let first = jobs.front().expect("a fill has chunks");
        let key = first.key;
        assert!(!self.is_outstanding(key), "fill {key} is outstanding already");
        let progress = Progress {
            urgency,
            frame: first.chunk.frame(),
            generation: first.chunk.generation(),
            open: jobs.len(),
            waiting: jobs,
            error: None,
            landed: None,
            bytes: 0,
            submitted_ns: now_ns,
        };
        self.fills.insert(key, progress);
        self.counters.fills += 1;
        self.queue(urgency).push_back(key);
        if let Some(error) = self.stopped.clone().or(refused) {
            self.abandon(key, error, now_ns);
        }
    }

    pub fn is_outstanding(&self, key: u64) -> bool {
        self.fills.contains_key(&key)
    }

    fn queue(&mut self, urgency: Urgency) -> &mut VecDeque<u64> {
        match urgency {
            Urgency::Demand => &mut self.demands,
            Urgency::Prefetch => &mut self.prefetches,
        }
    }

    pub fn promote(&mut self, key: u64) {
        let Some(fill) = self.fills.get_mut(&key) else { return };
        if fill.urgency == Urgency::Demand {
            return;
        }
        fill.urgency = Urgency::Demand;
        let of_key = self.flights.iter_mut().filter(|flight| flight.key == key);
        of_key.for_each(|flight| flight.urgency = Urgency::Demand);
        if !fill.waiting.is_empty() {
            self.prefetches.retain(|&other| other != key);
            self.demands.push_back(key);
        }
    }

    /// Ends the jobs of `key` that no engine has with `error`; without such
    /// jobs nothing changes.
    pub fn abandon(&mut self, key: u64, error: MoveError, now_ns: u64) {
        let Some(fill) = self.fills.get_mut(&key) else { return };
        let (mut dropped, urgency) = (std::mem::take(&mut fill.waiting), fill.urgency);
        self.queue(urgency).retain(|&other| other != key);
        while let Some(index) = self.later.iter().position(|(_, job)| job.key == key) {
            dropped.push_back(self.later.swap_remove(index).1);
        }
        for job in dropped {
            self.end(job, Err(error.clone()), now_ns);
        }
    }

    /// The next job, demands first. It is the engine's until
    /// [`Board::settle`].
    pub fn take(&mut self, now_ns: u64) -> Take {
        self.wake_later(now_ns);
        let Some(key) = self.next_key() else {
            let due = self.later.iter().map(|&(due_ns, _)| due_ns).min();
            return due.map_or(Take::Nothing, Take::Until);
        };
        let fill = self.fills.get_mut(&key).expect("a queued fill is outstanding");
        let job = fill.waiting.pop_front().expect("a queued fill has jobs");
        let urgency = fill.urgency;
        if fill.waiting.is_empty() {
            self.queue(urgency).pop_front();
        }
        if self.flights.is_empty() {
            self.busy_since_ns = now_ns;
        }
        let (file, offset) = (job.file, job.offset);
        self.flights.push(Flight { key, urgency, file, offset, since_ns: now_ns, told: false });
        Take::Job(job)
    }

    fn next_key(&self) -> Option<u64> {
        let is_prefetch = |flight: &&Flight| flight.urgency == Urgency::Prefetch;
        let has_room = || self.flights.iter().filter(is_prefetch).count() < self.most_prefetches;
        let prefetch = self.prefetches.front().filter(|_| has_room());
        self.demands.front().or(prefetch).copied()
    }

    /// Puts jobs whose moment has come back to the front of the queues.
    fn wake_later(&mut self, now_ns: u64) {
        while let Some(index) = self.later.iter().position(|&(due_ns, _)| due_ns <= now_ns) {
            let (_, job) = self.later.swap_remove(index);
            let key = job.key;
            let fill = self.fills.get_mut(&key).expect("an open job's fill is outstanding");
            let (is_queued, urgency) = (!fill.waiting.is_empty(), fill.urgency);
            fill.waiting.push_front(job);
            if !is_queued {
                self.queue(urgency).push_front(key);
            }
        }
    }

    /// What became of a job that was taken. `Some`: the engine reads on.
    #[must_use]
    pub fn settle(&mut self, job: Job, verdict: Verdict<MoveError>, now_ns: u64) -> Option<Job> {
        match verdict {
            Verdict::Again => {
                self.counters.short_reads += 1;
                return Some(job);
            }
            Verdict::Later(wait_ns) => {
                self.flight_ended(&job, now_ns);
                self.counters.retries += 1;
                let error = self.fills.get(&job.key).and_then(|fill| fill.error.clone());
                match error {
                    // The rest of its fill was dropped while it was read.
                    Some(error) => self.end(job, Err(error), now_ns),
                    None => self.later.push((now_ns + wait_ns, job)),
                }
            }
            Verdict::Complete => {
                self.flight_ended(&job, now_ns);
                self.counters.reads += 1;
                self.end(job, Ok(()), now_ns);
            }
            Verdict::Failed(error) => {
                self.flight_ended(&job, now_ns);
                let key = job.key;
                self.end(job, Err(error.clone()), now_ns);
                self.abandon(key, error, now_ns);
            }
        }
        None
    }

    fn flight_ended(&mut self, job: &Job, now_ns: u64) {
        let is_it = |flight: &Flight| {
            (flight.key, flight.file, flight.offset) == (job.key, job.file, job.offset)
        };
        let index = self.flights.iter().position(is_it).expect("a settled job was taken");
        self.look_for_slow(now_ns);
        self.flights.swap_remove(index);
        if self.flights.is_empty() {
            self.counters.busy_ns += now_ns.saturating_sub(self.busy_since_ns);
        }
    }

    /// Ends a job that neither a queue nor an engine has any more.
    fn end(&mut self, job: Job, result: Result<(), MoveError>, now_ns: u64) {
        let key = job.key;
        let fill = self.fills.get_mut(&key).expect("an open job's fill is outstanding");
        fill.open -= 1;
        fill.bytes += job.filled() as u64;
        self.counters.bytes += job.filled() as u64;
        let landed = match result {
            Ok(()) => job.chunk.done(),
            Err(error) => {
                fill.error.get_or_insert(error);
                job.chunk.fail()
            }
        };
        fill.landed = fill.landed.take().or(landed);
        if fill.open == 0 {
            self.land(key, now_ns);
        }
    }

    fn land(&mut self, key: u64, now_ns: u64) {
        let Some(fill) = self.fills.remove(&key) else { return };
        let counters = &mut self.counters;
        let result = match fill.error {
            None if fill.landed.is_some_and(|landed| landed.ok) => Ok(()),
            None => Err(MoveError::Stopped("a read got lost".into())),
            Some(error) => Err(error),
        };
        match (&result, fill.urgency) {
            (Ok(()), Urgency::Demand) => counters.demands_landed += 1,
            (Ok(()), Urgency::Prefetch) => counters.prefetches_landed += 1,
            (Err(MoveError::Discarded), _) => counters.discarded += 1,
            (Err(_), _) => counters.failed += 1,
        }
        if result.is_err() {
            counters.wasted_bytes += fill.bytes;
        }
        self.done.push_back(Done {
            key,
            frame: fill.frame,
            generation: fill.generation,
            result,
            bytes: fill.bytes,
            submitted_ns: fill.submitted_ns,
            ended_ns: now_ns,
        });
    }

    /// The next fill that ended, in that order.
    pub fn next(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    /// Whether nothing is outstanding and no `Done` is left.
    pub fn is_idle(&self) -> bool {
        self.fills.is_empty() && self.done.is_empty()
    }

    /// Takes no more fills and ends all jobs that no engine has.
    pub fn stop(&mut self, error: &MoveError, now_ns: u64) {
        self.stopped.get_or_insert_with(|| error.clone());
        let keys: Vec<u64> = self.fills.keys().copied().collect();
        for key in keys {
            self.abandon(key, error.clone(), now_ns);
        }
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// Lands what is still outstanding, after the last engine is gone.
    pub fn land_the_lost(&mut self, now_ns: u64) {
        let keys: Vec<u64> = self.fills.keys().copied().collect();
        for key in keys {
            let fill = self.fills.get_mut(&key).expect("just listed");
            fill.error = fill.error.take().or_else(|| self.stopped.clone());
            self.land(key, now_ns);
        }
    }

    pub fn counters(&self, now_ns: u64) -> Counters {
        let mut counters = self.counters;
        counters.outstanding = self.fills.len() as u64;
        if !self.flights.is_empty() {
            counters.busy_ns += now_ns.saturating_sub(self.busy_since_ns);
        }
        counters
    }

    /// File and offset of a slow read that was not told before.
    pub fn slow(&mut self, now_ns: u64) -> Option<(usize, u64)> {
        self.look_for_slow(now_ns);
        self.slow.pop_front()
    }

    fn look_for_slow(&mut self, now_ns: u64) {
        let is_slow =
            |flight: &&mut Flight| !flight.told && now_ns.saturating_sub(flight.since_ns) > SLOW_NS;
        for flight in self.flights.iter_mut().filter(is_slow) {
            flight.told = true;
            self.counters.slow_reads += 1;
            self.slow.push_back((flight.file, flight.offset));
        }
    }
}
