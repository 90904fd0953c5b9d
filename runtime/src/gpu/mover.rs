//! Brings experts from host memory into frames of the device; those without a
//! block there are read from disk first.

use super::experts::BlockShape;
use super::host_frames::{Asker, HostFrames};
use super::host_store::{HostStore, write_matrices};
use super::slots::SlotTable;
use super::vram::Vram;
use crate::store::frames::{Pin, Ticket};
use crate::store::mover::{Counters, Done, Fill, MoveError, Mover, Notice};
use crate::store::{expert_of, mover::Urgency};
use pregate_kernels::Matrix;
use pregate_kernels::cuda::{
    CudaError, Device, Event, ExpertMatrix, HostMemory, HostPart, Link, LinkCounters, LinkError,
    LinkOptions, Part, Transfer, Urgency as LinkUrgency,
};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// A wait while both the disk and the link may end something.
const SLICE_NS: u64 = 100_000;

/// Where experts are on the host.
#[derive(Clone)]
pub struct HostTiers {
    pub blocks: Arc<HostStore>,
    /// What is read for experts without a block; `None`: all have one.
    pub frames: Option<Arc<HostFrames>>,
    /// Of the experts of each layer of the model.
    pub shapes: Arc<[Option<BlockShape>]>,
}

/// A [`Mover`] whose source is a [`HostStore`], or files, and whose link copies
/// to a device.
///
/// What a frame held may still be read by work that was launched: a copy
/// starts behind the last of it ([`Vram::reader`]). A token that the device
/// computes by itself says nothing there: nobody leaves a frame before the
/// device has passed its layer, and the host waits for its end.
///
/// A read's frame is given to the copy, which keeps it until it has ended.
/// Reads that landed become copies inside of these methods.
pub struct LinkMover {
    link: Link<Box<dyn HostMemory>>,
    host: HostTiers,
    vram: Arc<Vram>,
    slots: Arc<SlotTable>,
    /// Fills that wait for a read, demands first.
    reading: VecDeque<Reading>,
    /// Copies from host frames that are with the link, per class of these.
    lent: Vec<usize>,
    outstanding: HashMap<u64, Outstanding>,
    /// Fills that ended without the link.
    ended: VecDeque<(u64, MoveError)>,
    words: String,
}

/// A fill whose expert comes from disk.
struct Reading {
    key: u64,
    urgency: Urgency,
    after: Option<Event>,
}

/// A fill on its way.
struct Outstanding {
    ticket: Ticket,
    /// The copy tells the device.
    is_published: bool,
    /// Of the host frame that it is copied from.
    class: Option<usize>,
}

impl LinkMover {
    /// # Errors
    /// Those of [`Link::new`].
    pub fn new(
        device: &Device,
        host: HostTiers,
        vram: Arc<Vram>,
        slots: Arc<SlotTable>,
        options: &LinkOptions,
    ) -> Result<Self, CudaError> {
        let words = match host.blocks.pageable_bytes() {
            0 => "copies from page-locked memory".to_string(),
            _ => "copies from memory of which not all is page-locked".to_string(),
        };
        let words = match &host.frames {
            Some(frames) => format!("{words}; from disk before: {}", frames.describe()),
            None => words,
        };
        let classes = host.frames.as_ref().map_or(0, |frames| frames.layout().class_bytes.len());
        Ok(Self {
            link: Link::new(device, options)?,
            host,
            vram,
            slots,
            reading: VecDeque::new(),
            lent: vec![0; classes],
            outstanding: HashMap::new(),
            ended: VecDeque::new(),
            words,
        })
    }

    /// Gives a fill that is outstanding to the link, or asks for its read.
    fn start(&mut self, key: u64, urgency: Urgency) -> Result<(), CudaError> {
        let frame = self.outstanding.get(&key).map(|fill| fill.ticket.frame());
        let after = frame.and_then(|frame| self.vram.reader(frame));
        let id = expert_of(key);
        if let Some(block) = self.host.blocks.block(id.layer(), id.expert()).cloned() {
            let whole = vec![Part { from: 0..block.bytes().len(), to: 0 }];
            self.copy(key, urgency, after, (Box::new(block), whole));
            return Ok(());
        }
        let Some(frames) = &self.host.frames else {
            return Err(CudaError::unsupported("an expert without a block"));
        };
        frames.ask(key, Asker::Copy(urgency));
        self.queue(Reading { key, urgency, after });
        Ok(())
    }

    /// Behind those that are as urgent.
    fn queue(&mut self, fill: Reading) {
        let at = self.reading.partition_point(|other| other.urgency <= fill.urgency);
        self.reading.insert(at, fill);
    }

    fn copy(
        &mut self,
        key: u64,
        urgency: Urgency,
        after: Option<Event>,
        (memory, parts): (Box<dyn HostMemory>, Vec<Part>),
    ) {
        let Some(outstanding) = self.outstanding.get_mut(&key) else {
            unreachable!("a fill is outstanding until it is answered")
        };
        let id = expert_of(key);
        let destination = self.vram.span(outstanding.ticket.frame());
        let entry = self.slots.entry(&destination);
        let publish = self.slots.publish(id.layer(), id.expert()).map(|at| (at, entry));
        outstanding.is_published = publish.is_some();
        let urgency = match urgency {
            Urgency::Demand => LinkUrgency::Demand,
            Urgency::Prefetch => LinkUrgency::Prefetch,
        };
        self.link.submit(Transfer { key, memory, parts, destination, urgency, after, publish });
    }

    /// Gives the link what was read, and asks again for what had no frame.
    fn advance(&mut self) {
        let Some(frames) = self.host.frames.clone().filter(|_| !self.reading.is_empty()) else {
            return;
        };
        frames.collect(0);
        for fill in std::mem::take(&mut self.reading) {
            let class = frames.class(fill.key);
            if self.lent[class] >= frames.copies(class) {
                self.reading.push_back(fill);
                continue;
            }
            match frames.take(fill.key) {
                Ok(Some(pin)) => {
                    self.lent[class] += 1;
                    if let Some(outstanding) = self.outstanding.get_mut(&fill.key) {
                        outstanding.class = Some(class);
                    }
                    let memory = self.of_frame(&frames, fill.key, pin);
                    self.copy(fill.key, fill.urgency, fill.after, memory);
                }
                Ok(None) => self.reading.push_back(fill),
                Err(error) => self.ended.push_back((fill.key, error)),
            }
        }
        for fill in &self.reading {
            frames.ask(fill.key, Asker::Copy(fill.urgency));
        }
    }

    /// What a copy of an expert in a frame reads: the matrices where they are,
    /// or where one does not lie row after row a block of its own.
    fn of_frame(
        &self,
        frames: &HostFrames,
        key: u64,
        pin: Pin,
    ) -> (Box<dyn HostMemory>, Vec<Part>) {
        let Some(shape) = self.host.shapes[expert_of(key).layer()] else {
            unreachable!("what moves has a shape")
        };
        let matrices = frames.matrices(key, &pin);
        let places = [shape.gate, shape.up, shape.down];
        let part = |(matrix, place): (&Matrix<'_>, ExpertMatrix)| {
            let (bytes, stride) = matrix.canonical_rows()?;
            let start = bytes.as_ptr().addr() - pin.as_ptr().addr();
            let from = start..start + matrix.weight_bytes();
            (stride == matrix.row_bytes()).then_some(Part { from, to: place.offset })
        };
        if let Some(parts) = matrices.iter().zip(places).map(part).collect() {
            return (Box::new(pin), parts);
        }
        let mut block = vec![0; shape.block_bytes];
        write_matrices(&mut block, &shape, matrices.each_ref());
        let whole = vec![Part { from: 0..block.len(), to: 0 }];
        (Box::new(HostPart::Pageable(block.into())), whole)
    }

    /// Ends a fill.
    fn done(&mut self, key: u64, result: Result<(), MoveError>, bytes: u64, ns: [u64; 2]) -> Done {
        let Outstanding { ticket, is_published, class } =
            self.outstanding.remove(&key).expect("the link answers what it was given");
        if let Some(class) = class {
            self.lent[class] -= 1;
        }
        if result.is_ok() && !is_published {
            let (id, block) = (expert_of(key), self.vram.span(ticket.frame()));
            self.slots.set(id.layer(), id.expert(), self.slots.entry(&block));
        }
        let (frame, generation) = (ticket.frame(), ticket.generation());
        let whole = ticket.chunks(std::slice::from_ref(&(0..0))).pop();
        whole.and_then(|chunk| if result.is_ok() { chunk.done() } else { chunk.fail() });
        let [submitted_ns, ended_ns] = ns;
        Done { key, frame, generation, result, bytes, submitted_ns, ended_ns }
    }

    /// What has ended by now.
    fn ended(&mut self, wait_ns: u64) -> Option<Done> {
        if let Some((key, error)) = self.ended.pop_front() {
            let now = self.link.now_ns();
            return Some(self.done(key, Err(error), 0, [now, now]));
        }
        // Dropped here: the frame that it was copied from.
        let landed = self.link.next(wait_ns)?;
        let result = landed.result.map_err(|error| match error {
            LinkError::Discarded => MoveError::Discarded,
            LinkError::Cuda(error) => MoveError::Cuda(error),
            LinkError::Stopped(why) => MoveError::Stopped(why),
        });
        let times = [landed.submitted_ns, landed.ended_ns];
        Some(self.done(landed.key, result, landed.bytes, times))
    }
}

impl Mover for LinkMover {
    fn describe(&self) -> String {
        self.words.clone()
    }

    fn submit(&mut self, fill: Fill) {
        let Fill { key, ticket, urgency, .. } = fill;
        self.outstanding.insert(key, Outstanding { ticket, is_published: false, class: None });
        if let Err(error) = self.start(key, urgency) {
            self.ended.push_back((key, MoveError::Cuda(error)));
        }
    }

    fn promote(&mut self, key: u64) {
        match self.reading.iter().position(|fill| fill.key == key) {
            Some(index) => {
                if let Some(fill) = self.reading.remove(index) {
                    self.queue(Reading { urgency: Urgency::Demand, ..fill });
                }
                if let Some(frames) = &self.host.frames {
                    frames.ask(key, Asker::Copy(Urgency::Demand));
                }
            }
            None => self.link.promote(key),
        }
    }

    fn discard(&mut self, key: u64) {
        match self.reading.iter().position(|fill| fill.key == key) {
            Some(index) => {
                self.reading.remove(index);
                if let Some(frames) = &self.host.frames {
                    frames.give_up(key);
                }
                self.ended.push_back((key, MoveError::Discarded));
            }
            None => self.link.discard(key),
        }
    }

    fn next(&mut self, wait_ns: u64) -> Option<Done> {
        let until_ns = self.link.now_ns().saturating_add(wait_ns);
        loop {
            self.advance();
            if let Some(done) = self.ended(0) {
                return Some(done);
            }
            let left_ns = until_ns.saturating_sub(self.link.now_ns());
            if left_ns == 0 || self.outstanding.is_empty() {
                return None;
            }
            let on_link = self.outstanding.len() > self.reading.len();
            match self.host.frames.as_ref().filter(|_| !self.reading.is_empty()) {
                Some(frames) if on_link => frames.collect(left_ns.min(SLICE_NS)),
                Some(frames) => {
                    frames.collect(left_ns);
                    continue;
                }
                None => return self.ended(left_ns),
            }
            let left_ns = until_ns.saturating_sub(self.link.now_ns());
            if let Some(done) = self.ended(left_ns.min(SLICE_NS)) {
                return Some(done);
            }
        }
    }

    fn now_ns(&self) -> u64 {
        self.link.now_ns()
    }

    fn counters(&self) -> Counters {
        let LinkCounters {
            transfers,
            demands_landed,
            prefetches_landed,
            discarded,
            failed,
            chunks,
            bytes,
            wasted_bytes,
            busy_ns,
            retries,
            outstanding,
        } = self.link.counters();
        // What is slower bounds both: the price of a byte is its.
        let disk = self.host.frames.as_ref().map_or(0, |frames| frames.stats().busy_ns);
        Counters {
            fills: transfers,
            demands_landed,
            prefetches_landed,
            discarded,
            failed,
            reads: chunks,
            bytes,
            wasted_bytes,
            busy_ns: busy_ns.max(disk),
            retries,
            short_reads: 0,
            slow_reads: 0,
            outstanding: outstanding + (self.reading.len() + self.ended.len()) as u64,
        }
    }

    fn queued(&self) -> u64 {
        self.link.queued()
    }

    fn remaining(&self, key: u64) -> Option<u64> {
        self.link.remaining(key)
    }

    fn vacated(&mut self, key: u64) {
        let id = expert_of(key);
        self.slots.set(id.layer(), id.expert(), 0);
    }

    fn notice(&mut self) -> Option<Notice> {
        self.host.frames.as_ref()?.notice()
    }

    fn check_unchanged(&self) -> Result<(), MoveError> {
        self.host.frames.as_ref().map_or(Ok(()), |frames| frames.check_unchanged())
    }
}
