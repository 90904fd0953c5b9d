//! Experts that the host computes for a device: with their blocks in host
//! memory, with what is read from disk into a frame, or with the mapped files.

use super::host_frames::{Asker, HostFrames};
use super::moving::Moving;
use super::pass::Pass;
use super::weights::DeviceMoe;
use crate::error::{Error, Result};
use crate::model::weights::{FeedForwardWeights, MoeWeights};
use crate::session::Cancel;
use crate::store::frames::Pin;
use crate::store::{Event, key_of};
use pregate_kernels::{ExpertGroup, ExpertRows, ExpertWeights, Grouping};
use pregate_predictor::ExpertId;

/// A wait for a read, after which copies are looked at.
const SLICE_NS: u64 = 200_000;

/// What the host computes of a layer.
pub struct HostRows<'a> {
    pub pass: &'a Pass<'a>,
    pub layer: usize,
    pub moe: &'a DeviceMoe,
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    pub tokens: usize,
    pub grouping: &'a Grouping,
    pub cancel: &'a Cancel,
}

/// An expert without a block: its group, and what it is called.
#[derive(Clone, Copy)]
struct Absent {
    group: usize,
    expert: u32,
    key: u64,
}

impl HostRows<'_> {
    /// What experts answer to `x`, in the order of `grouping`. `event`, of the
    /// same layer, goes on while reads are waited for; the answer is for how
    /// long, in nanoseconds.
    ///
    /// # Errors
    /// A read that failed, of an expert here or of the event;
    /// [`Error::Cancelled`].
    pub fn compute(&self, answers: &mut [f32], mut event: Option<&mut Event<'_>>) -> Result<u64> {
        let moving = self.pass.model.moving();
        let below = moving.and_then(|moving| Some((moving, moving.frames()?)));
        let (mut at_hand, mut absent) = (Vec::new(), Vec::new());
        for (group, expert) in self.grouping.experts().enumerate() {
            match below {
                Some((moving, _)) if !moving.has_block(self.layer, expert as usize) => {
                    let key = key_of(ExpertId::new(self.layer, expert));
                    absent.push(Absent { group, expert, key });
                }
                _ => at_hand.push((group, expert)),
            }
        }
        let Some((moving, frames)) = below else {
            self.rows(&at_hand, &[], answers);
            return Ok(0);
        };
        // The reads begin before anything is computed.
        let mut wanted = Wanted { frames, rest: absent };
        let mut pins = wanted.take()?;
        self.rows(&at_hand, &pins, answers);
        let mut waited_ns = 0;
        while !wanted.rest.is_empty() {
            drop(pins);
            pins = wanted.take()?;
            if !pins.is_empty() {
                self.rows(&[], &pins, answers);
                continue;
            }
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let before = moving.store().now_ns();
            frames.collect(SLICE_NS);
            waited_ns += moving.store().now_ns() - before;
            if let Some(event) = &mut event {
                event.go_on()?;
            }
        }
        frames.waited(waited_ns);
        Ok(waited_ns)
    }

    fn rows(&self, at_hand: &[(usize, u32)], pins: &[(Absent, Pin)], answers: &mut [f32]) {
        let Self { pass, layer, moe, x, tokens, grouping, .. } = *self;
        let engine = pass.engine;
        let FeedForwardWeights::Moe(weights) = &engine.weights.layers[layer].feed_forward else {
            unreachable!("the device's layers are the model's")
        };
        let at_hand = at_hand
            .iter()
            .map(|&(group, expert)| grouping.group(group, self.block(weights, expert as usize)));
        let frames = pass.model.moving().and_then(Moving::frames);
        let read = pins.iter().zip(frames.into_iter().cycle()).map(|((absent, pin), frames)| {
            let expert = absent.expert as usize;
            let view = frames.layout().layers[layer][expert].view(&weights.experts[expert], pin);
            grouping.group(absent.group, view)
        });
        let mut groups: Vec<ExpertGroup<'_>> = at_hand.chain(read).collect();
        if groups.is_empty() {
            return;
        }
        groups.sort_unstable_by_key(|group| group.first_row);
        let (groups, activation) = (&groups[..], moe.activation);
        engine.backend.expert_rows(ExpertRows { x, tokens, groups, activation, answers });
    }

    /// An expert in memory.
    fn block<'a>(&'a self, weights: &'a MoeWeights, expert: usize) -> ExpertWeights<'a> {
        let (files, block) = (self.pass.engine.files, &weights.experts[expert]);
        match self.pass.model.moving() {
            Some(moving) => moving.view(files, (self.layer, expert), block),
            None => block.view(files),
        }
    }
}

/// Experts that are read; dropped, they are wanted no longer.
struct Wanted<'a> {
    frames: &'a HostFrames,
    rest: Vec<Absent>,
}

impl Wanted<'_> {
    /// Those that are in a frame; the rest is asked for.
    fn take(&mut self) -> Result<Vec<(Absent, Pin)>> {
        let (mut there, mut at) = (Vec::new(), 0);
        while let Some(one) = self.rest.get(at) {
            match self.frames.take(one.key)? {
                Some(pin) => there.push((self.rest.remove(at), pin)),
                None => at += 1,
            }
        }
        // Not before all that are there are pinned: asking takes frames.
        self.rest.iter().for_each(|one| _ = self.frames.ask(one.key, Asker::Host));
        Ok(there)
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.rest.iter().for_each(|one| self.frames.give_up(one.key));
    }
}
