//! Brings experts from host memory into frames of the device.

use super::host_store::HostStore;
use super::slots::SlotTable;
use super::vram::Vram;
use crate::store::frames::Ticket;
use crate::store::mover::{Counters, Done, Fill, MoveError, Mover, Notice};
use crate::store::{expert_of, mover::Urgency};
use pregate_kernels::cuda::{
    CudaError, Device, HostMemory, HostPart, Link, LinkCounters, LinkError, LinkOptions, Part,
    Stream, Transfer, Urgency as LinkUrgency,
};
use std::collections::HashMap;
use std::sync::Arc;

/// A [`Mover`] whose source is a [`HostStore`] and whose link copies to a
/// device.
///
/// What a frame held may still be read by work that was launched: a copy
/// starts behind everything that the compute stream had when it was submitted.
/// Not so while the device computes a token by itself: then nobody leaves a
/// frame before the device has passed its layer, and a copy that waited for the
/// stream would wait for the whole token.
pub struct LinkMover {
    link: Link<HostPart>,
    store: Arc<HostStore>,
    vram: Arc<Vram>,
    slots: Arc<SlotTable>,
    compute: Stream,
    /// The device reads frames in an order of its own, and no others than the
    /// store knows.
    is_alone: bool,
    outstanding: HashMap<u64, Outstanding>,
    /// Fills that could not be given to the link.
    refused: Vec<(u64, CudaError)>,
    words: String,
}

/// A fill on its way.
struct Outstanding {
    ticket: Ticket,
    /// The copy tells the device.
    is_published: bool,
}

impl LinkMover {
    /// # Errors
    /// Those of [`Link::new`].
    pub fn new(
        device: &Device,
        store: Arc<HostStore>,
        vram: Arc<Vram>,
        slots: Arc<SlotTable>,
        options: &LinkOptions,
    ) -> Result<Self, CudaError> {
        let words = match store.pageable_bytes() {
            0 => "copies from page-locked memory".to_string(),
            _ => "copies from memory of which not all is page-locked".to_string(),
        };
        Ok(Self {
            link: Link::new(device, options)?,
            store,
            vram,
            slots,
            compute: device.compute().clone(),
            is_alone: false,
            outstanding: HashMap::new(),
            refused: Vec::new(),
            words,
        })
    }

    fn transfer(&self, fill: &Fill) -> Result<Transfer<HostPart>, CudaError> {
        let id = expert_of(fill.key);
        let memory = self.store.block(id.layer(), id.expert()).cloned();
        let memory = memory.ok_or_else(|| CudaError::unsupported("an expert without a block"))?;
        let bytes = memory.bytes().len();
        let destination = self.vram.span(fill.ticket.frame());
        let entry = self.slots.entry(&destination);
        let publish = self.slots.publish(id.layer(), id.expert()).map(|at| (at, entry));
        // A device that is alone has passed whatever read the frame before.
        let after = (!self.is_alone).then(|| self.compute.record()).transpose()?;
        Ok(Transfer {
            key: fill.key,
            memory,
            parts: vec![Part { from: 0..bytes, to: 0 }],
            destination,
            urgency: match fill.urgency {
                Urgency::Demand => LinkUrgency::Demand,
                Urgency::Prefetch => LinkUrgency::Prefetch,
            },
            after,
            publish,
        })
    }

    /// Ends a fill.
    fn done(&mut self, key: u64, result: Result<(), MoveError>, bytes: u64, ns: [u64; 2]) -> Done {
        let Outstanding { ticket, is_published } =
            self.outstanding.remove(&key).expect("the link answers what it was given");
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
}

impl Mover for LinkMover {
    fn describe(&self) -> String {
        self.words.clone()
    }

    fn submit(&mut self, fill: Fill) {
        let mut is_published = false;
        match self.transfer(&fill) {
            Ok(transfer) => {
                is_published = transfer.publish.is_some();
                self.link.submit(transfer);
            }
            Err(error) => self.refused.push((fill.key, error)),
        }
        let outstanding = Outstanding { ticket: fill.ticket, is_published };
        self.outstanding.insert(fill.key, outstanding);
    }

    fn promote(&mut self, key: u64) {
        self.link.promote(key);
    }

    fn discard(&mut self, key: u64) {
        self.link.discard(key);
    }

    fn next(&mut self, wait_ns: u64) -> Option<Done> {
        if let Some((key, error)) = self.refused.pop() {
            let now = self.link.now_ns();
            return Some(self.done(key, Err(MoveError::Cuda(error)), 0, [now, now]));
        }
        let landed = self.link.next(wait_ns)?;
        let result = landed.result.map_err(|error| match error {
            LinkError::Discarded => MoveError::Discarded,
            LinkError::Cuda(error) => MoveError::Cuda(error),
            LinkError::Stopped(why) => MoveError::Stopped(why),
        });
        let times = [landed.submitted_ns, landed.ended_ns];
        Some(self.done(landed.key, result, landed.bytes, times))
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
        Counters {
            fills: transfers,
            demands_landed,
            prefetches_landed,
            discarded,
            failed,
            reads: chunks,
            bytes,
            wasted_bytes,
            busy_ns,
            retries,
            short_reads: 0,
            slow_reads: 0,
            outstanding: outstanding + self.refused.len() as u64,
        }
    }

    fn begin_pass(&mut self, keeps_ahead: bool) {
        self.is_alone = keeps_ahead;
    }

    fn vacated(&mut self, key: u64) {
        let id = expert_of(key);
        self.slots.set(id.layer(), id.expert(), 0);
    }

    fn notice(&mut self) -> Option<Notice> {
        None
    }

    fn check_unchanged(&self) -> Result<(), MoveError> {
        Ok(())
    }
}
