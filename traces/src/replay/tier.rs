//! Frames and a link that are not there: what moves bytes, chunk by chunk, on
//! a virtual clock.

use super::count::Lru;
use super::machine::Figure;
use super::report::Stall;
use pregate_predictor::drive::{Landed, Moved, Tier, Urgency};
use pregate_predictor::{ExpertId, Landing, Shape};
use std::collections::VecDeque;
use std::convert::Infallible;

/// A demand overtakes read-aheads at the border of a chunk.
const CHUNK_BYTES: u64 = 2 << 20;

/// A wire that moves one chunk at a time. What waits behind another pays no
/// start.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    pub ns_per_byte: f64,
    /// While the CPU uses the same memory.
    pub ns_per_byte_beside: f64,
    pub start_ns: u64,
}

impl Rate {
    pub fn new(gbs: &Figure, beside: &Figure, start_ns: &Figure) -> Self {
        Self {
            ns_per_byte: 1.0 / gbs.value,
            ns_per_byte_beside: 1.0 / beside.value.min(gbs.value),
            start_ns: start_ns.value as u64,
        }
    }
}

/// What lies behind the memory that the wire reads.
pub struct Below {
    pub disk: Rate,
    /// Which experts that memory has.
    pub ram: Lru,
    /// When the disk is done with what it was asked for.
    free_ns: u64,
    pub bytes: u64,
    /// What was read since its layer ran, and when it is there: a copy and the
    /// host's computation wait for the same read.
    coming: Vec<(ExpertId, u64)>,
}

impl Below {
    pub fn new(disk: Rate, ram: Lru) -> Self {
        Self { disk, ram, free_ns: 0, bytes: 0, coming: Vec::new() }
    }

    /// When the `bytes` of `id`, asked for at `now`, are in memory.
    fn read(&mut self, id: ExpertId, now: u64, bytes: u64) -> u64 {
        if self.ram.contains(id.layer(), id.expert as u16) {
            return now;
        }
        if let Some((_, ready_ns)) = self.coming.iter().find(|(other, _)| *other == id) {
            return now.max(*ready_ns);
        }
        self.bytes += bytes;
        let from = self.free_ns.max(now + self.disk.start_ns);
        self.free_ns = from + (bytes as f64 * self.disk.ns_per_byte) as u64;
        self.coming.push((id, self.free_ns));
        self.free_ns
    }

    /// Layer `layer` ran with `experts`.
    pub fn used(&mut self, layer: usize, experts: &[u16]) {
        self.ram.event(layer, experts);
        self.coming.retain(|(id, _)| id.layer() != layer);
    }
}

struct Flight {
    id: ExpertId,
    urgency: Urgency,
    /// It began as a read-ahead.
    was_ahead: bool,
    discarded: bool,
    order: u64,
    /// Not before.
    ready_ns: u64,
    left_bytes: u64,
    read_bytes: u64,
}

/// The chunk that moves.
struct Chunk {
    id: ExpertId,
    bytes: u64,
    /// It may begin later than now.
    starts_ns: u64,
    ends_ns: u64,
}

/// Frames, and the wire that fills them.
pub struct VirtualTier {
    shape: Shape,
    wire: Rate,
    pub below: Option<Below>,
    now: u64,
    /// The CPU computes until then, or a little shorter.
    cpu_until_ns: u64,
    /// Waiting until then would have been for the GPU anyway.
    pub hidden_until_ns: u64,
    pub stall: Stall,
    flights: Vec<Flight>,
    /// Whose chunk is next, as long as no flight comes, goes or is promoted;
    /// `None`: to be found.
    first: Option<usize>,
    current: Option<Chunk>,
    landed: VecDeque<Landed<Infallible>>,
    order: u64,
    /// Per class.
    free: Vec<usize>,
    limbo: Vec<usize>,
    passed: usize,
    moved: Moved,
}

impl VirtualTier {
    /// `frames` per class.
    pub fn new(shape: &Shape, wire: Rate, frames: &[usize]) -> Self {
        Self {
            shape: shape.clone(),
            wire,
            below: None,
            now: 0,
            cpu_until_ns: 0,
            hidden_until_ns: 0,
            stall: Stall::default(),
            flights: Vec::new(),
            first: None,
            current: None,
            landed: VecDeque::new(),
            order: 0,
            free: frames.to_vec(),
            limbo: vec![0; frames.len()],
            passed: usize::MAX,
            moved: Moved::default(),
        }
    }

    /// Something is computed for `ns`, while the wire goes on.
    pub fn work(&mut self, ns: u64) {
        self.now += ns;
        self.run();
    }

    /// The CPU computes for what takes it `alone_ns`, and while the wire moves
    /// anything `slower` times as long; the wire goes on.
    pub fn compute(&mut self, alone_ns: f64, slower: f64) {
        let (mut left, slower) = (alone_ns, slower.max(1.0));
        while left > 0.0 {
            self.cpu_until_ns = self.now + (left * slower) as u64;
            self.run();
            let beside = self.next_end().map(|ends_ns| (ends_ns - self.now) as f64);
            let ns = beside.map_or(left, |ns| ns.min(left * slower));
            left -= beside.map_or(left, |_| ns / slower);
            self.now += ns.ceil().max(1.0) as u64;
        }
        self.cpu_until_ns = self.now;
        self.run();
    }

    /// Is anything on its way?
    pub fn is_busy(&self) -> bool {
        self.current.is_some()
    }

    /// The CPU wants `id` in memory; when it is there.
    pub fn in_ram_ns(&mut self, id: ExpertId) -> u64 {
        let bytes = self.bytes_of(id);
        self.below.as_mut().map_or(self.now, |below| below.read(id, self.now, bytes))
    }

    fn class(&self, id: ExpertId) -> usize {
        self.shape.layer(id.layer()).map_or(0, |layer| layer.class)
    }

    /// Bytes that are moved before a demand of now: the chunk that moves, and
    /// demands other than `but`.
    fn before(&self, but: Option<ExpertId>) -> u64 {
        let moves = self.current.as_ref().map_or(0, |chunk| chunk.bytes);
        let waits = |flight: &&Flight| flight.urgency == Urgency::Demand && Some(flight.id) != but;
        moves + self.flights.iter().filter(waits).map(|flight| flight.left_bytes).sum::<u64>()
    }

    /// Everything that the wire does up to now.
    fn run(&mut self) {
        while let Some(ends_ns) = self.next_end() {
            if ends_ns > self.now {
                break;
            }
            self.end_chunk();
        }
    }

    /// When the chunk ends that moves; begins one if none does.
    fn next_end(&mut self) -> Option<u64> {
        if self.current.is_none() {
            self.start_chunk(self.now, true);
        }
        self.current.as_ref().map(|chunk| chunk.ends_ns)
    }

    /// Whose chunk is the first that can begin at `at` or later, and when.
    fn find_first(&mut self, at: u64) -> Option<(usize, u64)> {
        if let Some(first) = self.first {
            return Some((first, at));
        }
        let soonest = self.flights.iter().map(|flight| flight.ready_ns).min()?;
        let at = at.max(soonest);
        let ready = self.flights.iter().enumerate().filter(|(_, flight)| flight.ready_ns <= at);
        let first = ready.clone().min_by_key(|(_, flight)| (flight.urgency, flight.order));
        let (first, _) = first?;
        // One that is not ready may come before it when it is.
        self.first = (ready.count() == self.flights.len()).then_some(first);
        Some((first, at))
    }

    /// `at`: when the wire became free.
    fn start_chunk(&mut self, at: u64, was_idle: bool) {
        let Some((first, at)) = self.find_first(at) else { return };
        let flight = &mut self.flights[first];
        let bytes = flight.left_bytes.min(CHUNK_BYTES);
        flight.left_bytes -= bytes;
        let start_ns = if was_idle { self.wire.start_ns } else { 0 };
        let each = match at < self.cpu_until_ns {
            true => self.wire.ns_per_byte_beside,
            false => self.wire.ns_per_byte,
        };
        let ns = start_ns + ((bytes as f64 * each) as u64).max(1);
        self.moved.busy_ns += ns;
        self.current = Some(Chunk { id: flight.id, bytes, starts_ns: at, ends_ns: at + ns });
    }

    fn end_chunk(&mut self) {
        let Some(Chunk { id, bytes, ends_ns, .. }) = self.current.take() else { return };
        self.moved.bytes += bytes;
        let likely = self.first.filter(|&index| self.flights[index].id == id);
        let index = likely.or_else(|| self.flights.iter().position(|flight| flight.id == id));
        let index = index.expect("a chunk belongs to a fill");
        self.flights[index].read_bytes += bytes;
        let flight = &self.flights[index];
        if flight.left_bytes == 0 || flight.discarded {
            self.land(index, ends_ns);
        }
        self.start_chunk(ends_ns, false);
    }

    fn land(&mut self, index: usize, ended_ns: u64) {
        let flight = self.flights.remove(index);
        self.first = None;
        let landing = match flight.left_bytes {
            0 => Landing::Ready,
            _ => Landing::Discarded,
        };
        if landing == Landing::Discarded {
            let class = self.class(flight.id);
            self.free[class] += 1;
        }
        let Flight { id, read_bytes: bytes, ready_ns: submitted_ns, .. } = flight;
        self.landed.push_back(Landed { id, landing, bytes, submitted_ns, ended_ns, error: None });
    }

    /// The open event waited from now to `until`: for what?
    fn stalled(&mut self, until: u64) {
        let ns = until.saturating_sub(self.now.max(self.hidden_until_ns));
        let flight = self.current.as_ref().map(|chunk| chunk.id);
        let flight = flight.and_then(|id| self.flights.iter().find(|flight| flight.id == id));
        let cause = match flight {
            Some(flight) if flight.urgency == Urgency::Prefetch || flight.discarded => {
                &mut self.stall.behind_read_ahead_ns
            }
            Some(flight) if flight.was_ahead => &mut self.stall.late_read_ahead_ns,
            _ => &mut self.stall.demand_ns,
        };
        *cause += ns;
    }
}

impl Tier for VirtualTier {
    type Error = Infallible;

    fn free(&self, class: usize) -> usize {
        self.free[class]
    }

    fn bytes_of(&self, id: ExpertId) -> u64 {
        self.shape.layer(id.layer()).map_or(0, |layer| layer.expert_bytes)
    }

    fn submit(&mut self, id: ExpertId, urgency: Urgency) {
        self.order += 1;
        let (class, bytes) = (self.class(id), self.bytes_of(id));
        self.free[class] -= 1;
        let ready_ns = self.in_ram_ns(id);
        self.first = None;
        self.flights.push(Flight {
            id,
            urgency,
            was_ahead: urgency == Urgency::Prefetch,
            discarded: false,
            order: self.order,
            ready_ns,
            left_bytes: bytes,
            read_bytes: 0,
        });
        // A wire that is idle begins with the first that it is given.
        self.run();
    }

    fn promote(&mut self, id: ExpertId) {
        self.order += 1;
        let order = self.order;
        if let Some(flight) = self.flights.iter_mut().find(|flight| flight.id == id) {
            (flight.urgency, flight.order) = (Urgency::Demand, order);
            self.first = None;
        }
    }

    fn discard(&mut self, id: ExpertId) {
        let Some(index) = self.flights.iter().position(|flight| flight.id == id) else { return };
        let moves = self.current.as_ref().is_some_and(|chunk| chunk.id == id);
        match moves {
            // Its last chunk brings it all the same.
            true => self.flights[index].discarded = true,
            false => self.land(index, self.now),
        }
    }

    fn vacate(&mut self, id: ExpertId) {
        let class = self.class(id);
        match id.layer() < self.passed {
            true => self.free[class] += 1,
            false => self.limbo[class] += 1,
        }
    }

    fn next(&mut self, wait_ns: u64) -> Option<Landed<Infallible>> {
        self.run();
        let deadline = self.now.saturating_add(wait_ns);
        while self.landed.is_empty() {
            let ends_ns = self.next_end()?;
            if self.now >= deadline {
                return None;
            }
            let until = ends_ns.min(deadline);
            self.stalled(until);
            self.now = until;
            self.run();
        }
        self.landed.pop_front()
    }

    fn now_ns(&self) -> u64 {
        self.now
    }

    fn moved(&self) -> Moved {
        let ahead = |chunk: &Chunk| chunk.ends_ns.saturating_sub(chunk.starts_ns.max(self.now));
        let ahead_ns = self.current.as_ref().map_or(0, ahead);
        Moved { busy_ns: self.moved.busy_ns - ahead_ns, ..self.moved }
    }

    fn queued(&self) -> u64 {
        self.before(None)
    }

    fn remaining(&self, id: ExpertId) -> Option<u64> {
        let flight = self.flights.iter().find(|flight| flight.id == id)?;
        Some(self.before(Some(id)) + flight.left_bytes)
    }

    fn begin_pass(&mut self) {
        self.passed = usize::MAX;
        for (free, limbo) in self.free.iter_mut().zip(&mut self.limbo) {
            *free += std::mem::take(limbo);
        }
    }

    fn passed(&mut self, layer: usize) {
        self.passed = layer;
    }
}

#[cfg(test)]
mod tests;
