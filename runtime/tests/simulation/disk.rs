//! The simulated disk: fills become reads, reads take virtual time, and bytes
//! land when the mode of copying says so.

mod flight;

use super::faults::{Fault, Plan};
use super::random::Random;
use flight::{CopyTo, Flight, Read, Stage};
use pregate_runtime::store::frames::Chunk;
use pregate_runtime::store::mover::{
    Counters, Done, Fill, MoveError, Notice, Piece, SLOW_NS, Urgency,
};
use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// When bytes arrive in a frame, between the moment a fill is submitted
/// (which poisons the frame) and the moment it is handed back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Copies {
    /// All at once, when the fill is submitted.
    Eager,
    /// At the last legal moment: when the fill is handed back.
    Lazy,
    /// In pieces, at moments of their own.
    Random,
}

impl Copies {
    pub const ALL: [Copies; 3] = [Copies::Eager, Copies::Lazy, Copies::Random];
}

/// What connects the disk to memory.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Until the first byte, at most; seeded below.
    pub latency_ns: u64,
    pub bytes_per_us: u64,
    /// Reads that the disk works on at the same time.
    pub depth: usize,
    /// Longest read, a multiple of 4096.
    pub chunk_bytes: usize,
}

impl Link {
    /// The longest that one read without faults takes, behind a full queue.
    pub fn read_ns(&self) -> u64 {
        self.latency_ns + self.depth as u64 * self.transfer_ns(self.chunk_bytes)
    }

    fn transfer_ns(&self, bytes: usize) -> u64 {
        bytes as u64 * 1000 / self.bytes_per_us
    }
}

/// A poisoned byte: four of them are no number, two of them neither, and as a
/// scale they make a block none.
pub const POISON: u8 = 0xff;

pub struct Disk {
    pub files: Vec<(PathBuf, Arc<[u8]>)>,
    pub link: Link,
    pub copies: Copies,
    pub plan: Plan,
    pub flights: Vec<Flight>,
    pub ended: VecDeque<Flight>,
    pub counters: Counters,
    pub notices: VecDeque<Notice>,
    /// Reads that were started: the number of fault points so far.
    pub points: u64,
    /// Faults that happened.
    pub hit: Vec<(u64, Fault)>,
    random: Random,
    order: u64,
    at: u64,
    link_free: u64,
    busy_until: u64,
    changed: bool,
    stopped: bool,
}

impl Disk {
    pub fn new(
        files: Vec<(PathBuf, Arc<[u8]>)>,
        link: Link,
        copies: Copies,
        plan: Plan,
        seed: u64,
    ) -> Self {
        Self {
            files,
            link,
            copies,
            plan,
            flights: Vec::new(),
            ended: VecDeque::new(),
            counters: Counters::default(),
            notices: VecDeque::new(),
            points: 0,
            hit: Vec::new(),
            random: Random::new(seed),
            order: 0,
            at: 0,
            link_free: 0,
            busy_until: 0,
            changed: false,
            stopped: false,
        }
    }

    pub fn unchanged(&self) -> Result<(), MoveError> {
        if !self.changed {
            return Ok(());
        }
        let file = self.files[0].0.clone();
        Err(changed(file))
    }

    pub fn outstanding(&self) -> usize {
        self.flights.len() + self.ended.len()
    }

    pub fn submit(&mut self, now: u64, fill: Fill) {
        let Fill { key, mut ticket, pieces, urgency } = fill;
        self.order += 1;
        self.counters.fills += 1;
        let (frame, generation) = (ticket.frame(), ticket.generation());
        ticket.bytes_mut().fill(POISON);
        let cuts: Vec<_> = pieces.iter().flat_map(|piece| self.cut(piece)).collect();
        let ranges: Vec<Range<usize>> = cuts.iter().map(|cut| cut.0.clone()).collect();
        let reads = ticket.chunks(&ranges).into_iter().zip(cuts).map(|(chunk, cut)| Read {
            chunk: Some(chunk),
            file: cut.1,
            offset: cut.2,
            needed: cut.3,
            stage: Stage::Queued,
        });
        let mut flight = Flight {
            key,
            frame,
            generation,
            urgency,
            discarded: false,
            order: self.order,
            reads: reads.collect(),
            error: None,
            submitted_ns: now,
            ended_ns: now,
            bytes: 0,
            landed: None,
        };
        if self.copies == Copies::Eager {
            for read in &mut flight.reads {
                self.files[read.file].1.copy_to(read, usize::MAX);
            }
        }
        if self.stopped {
            flight.give_up(stopped());
        }
        self.flights.push(flight);
        self.run_until(now);
    }

    /// Range in the frame, file, offset and needed bytes of each read.
    fn cut(&self, piece: &Piece) -> Vec<(Range<usize>, usize, u64, usize)> {
        let step = self.link.chunk_bytes;
        let starts = (0..piece.len).step_by(step);
        let cut = |start: usize| {
            let end = (start + step).min(piece.len);
            let needed = piece.needed.clamp(start, end) - start;
            let offset = piece.offset + start as u64;
            (piece.at + start..piece.at + end, piece.file, offset, needed)
        };
        starts.map(cut).collect()
    }

    pub fn promote(&mut self, key: u64) {
        self.order += 1;
        let order = self.order;
        let flight = self.flights.iter_mut().find(|flight| flight.key == key);
        if let Some(flight) = flight.filter(|flight| flight.urgency == Urgency::Prefetch) {
            flight.urgency = Urgency::Demand;
            flight.order = order;
        }
    }

    pub fn discard(&mut self, now: u64, key: u64) {
        let accepted = self.random.one_in(4);
        for flight in self.flights.iter_mut().chain(&mut self.ended) {
            if flight.key == key {
                flight.discarded = true;
            }
        }
        let Some(flight) = self.flights.iter_mut().find(|flight| flight.key == key) else { return };
        // Or the system has just accepted all of it.
        if !accepted {
            flight.drop_queued();
        }
        self.run_until(now);
    }

    /// When the next read ends.
    pub fn next_end(&self) -> Option<u64> {
        let reads = self.flights.iter().flat_map(|flight| &flight.reads);
        reads.filter_map(Read::ends).min()
    }

    /// Everything that the disk does up to `now`.
    pub fn run_until(&mut self, now: u64) {
        loop {
            self.end_flights();
            self.start_reads();
            match self.next_end() {
                Some(end) if end <= now => {
                    self.at = self.at.max(end);
                    self.end_read(end);
                }
                _ => break,
            }
        }
        self.at = self.at.max(now);
        if self.copies == Copies::Random {
            self.copy_somewhere();
        }
    }

    /// Demands first, each in the order of asking.
    fn start_reads(&mut self) {
        let reading = |flight: &Flight| flight.reads.iter().filter_map(Read::ends).count();
        while self.flights.iter().map(reading).sum::<usize>() < self.link.depth {
            let waits =
                |flight: &&mut Flight| flight.reads.iter().any(|read| read.stage == Stage::Queued);
            let first = self.flights.iter_mut().filter(waits);
            let Some(flight) = first.min_by_key(|flight| (flight.urgency, flight.order)) else {
                return;
            };
            let fault = self.plan.at(self.points, flight.urgency);
            if fault != Fault::None {
                self.hit.push((self.points, fault));
            }
            self.points += 1;
            let queued = |read: &&mut Read| read.stage == Stage::Queued;
            let Some(read) = flight.reads.iter_mut().find(queued) else { return };
            let latency = self.link.latency_ns / 2
                + self.random.below(self.link.latency_ns / 2 + 1)
                + self.counters.delay(fault, self.link.latency_ns);
            if latency >= SLOW_NS {
                let file = self.files[read.file].0.clone();
                self.notices.push_back(Notice::Slow { file, offset: read.offset });
            }
            if fault == Fault::Replaced {
                let file = self.files[read.file].0.clone();
                self.notices.push_back(Notice::Replaced { file });
            }
            let len = read.chunk.as_ref().map_or(0, Chunk::len);
            let from = (self.at + latency).max(self.link_free.min(self.at + self.link.read_ns()));
            let ends = from + self.link.transfer_ns(len);
            if fault.is_brief() {
                self.link_free = ends;
            }
            self.counters.busy_ns += ends.saturating_sub(self.busy_until.max(self.at));
            self.busy_until = self.busy_until.max(ends);
            read.stage = Stage::Reading { ends, fault };
        }
    }

    fn end_read(&mut self, end: u64) {
        let Some((flight, index)) = self.flights.iter_mut().find_map(|flight| {
            let index = flight.reads.iter().position(|read| read.ends() == Some(end))?;
            Some((flight, index))
        }) else {
            return;
        };
        let Stage::Reading { fault, .. } = flight.reads[index].stage else { return };
        let len = flight.reads[index].chunk.as_ref().map_or(0, Chunk::len) as u64;
        let file = self.files[flight.reads[index].file].0.clone();
        let offset = flight.reads[index].offset;
        self.changed |= fault == Fault::Changed;
        self.stopped |= fault == Fault::Stop;
        let error = match fault {
            _ if self.stopped => Some(stopped()),
            _ if self.changed => Some(changed(file)),
            Fault::Io => {
                let source = Arc::new(std::io::Error::from_raw_os_error(5));
                Some(MoveError::Io { file, offset, source })
            }
            _ => None,
        };
        if let Some(error) = error {
            flight.reads[index].stage = Stage::Dropped;
            flight.give_up(error);
            if self.stopped {
                // The thread is gone, and with it everything it held.
                self.flights.iter_mut().for_each(|flight| {
                    flight.reads.iter_mut().for_each(Read::abandon);
                    flight.give_up(stopped());
                });
            }
            return;
        }
        flight.bytes += len;
        self.counters.reads += 1;
        self.counters.bytes += len;
        let flip = if let Fault::Flip(bit) = fault { Some(bit) } else { None };
        flight.reads[index].stage = Stage::Read { flip };
        let publishes = match self.copies {
            Copies::Eager => true,
            Copies::Lazy => false,
            Copies::Random => self.random.one_in(2),
        };
        if publishes {
            flight.publish(index, &self.files);
        }
    }

    fn end_flights(&mut self) {
        let mut index = 0;
        while index < self.flights.len() {
            if self.flights[index].reads.iter().all(Read::is_over) {
                let mut flight = self.flights.remove(index);
                flight.ended_ns = self.at;
                self.ended.push_back(flight);
            } else {
                index += 1;
            }
        }
    }

    /// Some bytes of some read arrive, before anybody may look at them.
    fn copy_somewhere(&mut self) {
        if self.flights.is_empty() {
            return;
        }
        let flight = self.random.below(self.flights.len() as u64) as usize;
        let reads = &mut self.flights[flight].reads;
        let read = self.random.below(reads.len() as u64) as usize;
        let some = self.random.below(self.link.chunk_bytes as u64) as usize;
        self.files[reads[read].file].1.copy_to(&mut reads[read], some);
    }

    /// The next fill that ended. Whatever has not landed of it lands now.
    pub fn hand_back(&mut self) -> Option<Done> {
        let mut flight = self.ended.pop_front()?;
        (0..flight.reads.len()).for_each(|index| flight.publish(index, &self.files));
        let all_read = flight.reads.iter().all(|read| matches!(read.stage, Stage::Read { .. }));
        let result = match flight.error.take() {
            Some(error) => Err(error),
            None if all_read => Ok(()),
            None => Err(MoveError::Discarded),
        };
        let landed = flight.landed.expect("I6: the last chunk lands the frame");
        assert_eq!(landed.generation, flight.generation, "I5: {:?}", flight.frame);
        assert_eq!(landed.ok, result.is_ok(), "I6: {:?} after {result:?}", flight.frame);
        let counters = &mut self.counters;
        match (&result, flight.urgency) {
            (Ok(()), Urgency::Demand) => counters.demands_landed += 1,
            (Ok(()), Urgency::Prefetch) => counters.prefetches_landed += 1,
            (Err(MoveError::Discarded), _) => counters.discarded += 1,
            (Err(_), _) => counters.failed += 1,
        }
        if result.is_err() {
            counters.wasted_bytes += flight.bytes;
        }
        Some(Done {
            key: flight.key,
            frame: flight.frame,
            generation: flight.generation,
            result,
            bytes: flight.bytes,
            submitted_ns: flight.submitted_ns,
            ended_ns: flight.ended_ns,
        })
    }
}

fn stopped() -> MoveError {
    MoveError::Stopped("the simulated thread panicked".to_string())
}

fn changed(file: PathBuf) -> MoveError {
    MoveError::Changed { file, expected: "one size".into(), found: "another size".into() }
}

impl Fault {
    /// It does not keep the link from the reads behind it.
    fn is_brief(self) -> bool {
        !matches!(self, Fault::Slow(_) | Fault::Retried(_) | Fault::Io)
    }
}

/// What a fault costs and counts as.
trait Cost {
    fn delay(&mut self, fault: Fault, latency_ns: u64) -> u64;
}

impl Cost for Counters {
    fn delay(&mut self, fault: Fault, latency_ns: u64) -> u64 {
        const PAUSES_NS: [u64; 2] = [1_000_000, 10_000_000];
        let tries = match fault {
            Fault::Retried(tries) => tries as usize,
            Fault::Io => 2,
            _ => 0,
        };
        self.retries += tries as u64;
        self.short_reads += u64::from(fault == Fault::Short);
        let pauses: u64 = PAUSES_NS[..tries].iter().sum();
        match fault {
            Fault::Slow(ns) => {
                self.slow_reads += u64::from(ns >= SLOW_NS);
                ns
            }
            Fault::Short => latency_ns,
            _ => pauses,
        }
    }
}
