//! The host's part of a token that the device computes by itself: it hears
//! what each layer's router chose, has missing experts brought or computes
//! them, and tells the device which.
//!
//! A layer's event of the store stays open until the next layer's router was
//! heard: until then the device may read what arrived for it.

use super::decider::{Decider, HostWork};
use super::host_rows::HostRows;
use super::pass::{Companions, Pass};
use super::token::{LayerMail, TokenPath};
use super::weights::{DeviceFeedForward, DeviceMoe};
use crate::error::Result;
use crate::forward::Work;
use crate::model::weights::FeedForwardWeights;
use crate::store::{Arrived, Event, Missing};
use pregate_kernels::cuda::{CudaError, Decision, Posted};
use pregate_kernels::{Choice, Grouping, Routes};
use pregate_predictor::forecast::{External, Source};
use std::time::Instant;

/// Looks at a mailbox between two questions to the driver, which say whether
/// the device still works.
const LOOKS: u64 = 1024;

/// A token's layers, served one after the other. Dropped before the last of
/// them, it answers for the rest, so that the device ends the token.
pub struct Service<'p, 'c, 'a, 'm> {
    pass: &'p Pass<'p>,
    path: &'p TokenPath,
    step: u32,
    companions: &'c mut Companions<'a, 'm>,
    buffers: &'c mut ServiceBuffers,
    /// The layer that comes next.
    next: usize,
    open: Option<Open<'p>>,
    is_over: bool,
}

/// A layer that the device may still be in.
struct Open<'p> {
    /// Dropped before the event, whose frames it pins.
    there: Vec<Arrived>,
    event: Event<'p>,
    work: HostWork,
}

/// Kept from token to token.
#[derive(Default)]
pub struct ServiceBuffers {
    posted: Posted,
    routes: Routes,
    choices: Vec<Choice>,
    ids: Vec<u32>,
    grouping: Grouping,
    rows: Vec<f32>,
    /// Empty, for the next event.
    there: Vec<Arrived>,
    /// Layers that were forecast.
    targets: Vec<usize>,
    /// The host's threads were roused for the layer that comes next.
    is_roused: bool,
}

impl<'p, 'c, 'a, 'm> Service<'p, 'c, 'a, 'm> {
    /// For step `step`, before its first launch.
    pub fn new(
        pass: &'p Pass<'p>,
        path: &'p TokenPath,
        step: u32,
        companions: &'c mut Companions<'a, 'm>,
        buffers: &'c mut ServiceBuffers,
    ) -> Self {
        Self { pass, path, step, companions, buffers, next: 0, open: None, is_over: false }
    }

    /// Serves the layers before `layer`.
    pub fn serve_before(&mut self, layer: usize) -> Result<()> {
        while self.next < layer {
            let index = self.next;
            if let Some(mail) = self.path.mail().layers[index] {
                self.serve(index, &mail)?;
            }
            self.next += 1;
        }
        Ok(())
    }

    /// The device has ended the step.
    pub fn finish(mut self) -> Result<()> {
        self.is_over = true;
        self.close(None, None);
        Ok(self.path.healthy(self.pass.device())?)
    }

    fn serve(&mut self, layer: usize, mail: &LayerMail) -> Result<()> {
        self.companions.meter.lap(Work::Overhead);
        self.hear(mail)?;
        // Behind a layer that was not answered in time all is wrong.
        self.path.healthy(self.pass.device())?;
        // Where reads from disk are waited for, walls say nothing of the workers.
        let moving = self.pass.model.moving().filter(|moving| moving.frames().is_none());
        let heard_ns = moving.map(|moving| moving.store().now_ns());
        self.companions.meter.lap(Work::Dense);
        let DeviceFeedForward::Moe(moe) = &self.pass.model.layers()[layer].feed_forward else {
            unreachable!("mail comes from layers with routers")
        };
        self.read_choices(layer, moe)?;
        let is_whole = moe.experts.is_whole();
        self.close(heard_ns, (!is_whole).then_some(layer));
        let ServiceBuffers { posted, ids, .. } = &*self.buffers;
        let position = self.pass.first_position;
        self.companions.observer.routed(layer, position, ids, &posted.weights);
        if !is_whole {
            self.answer(layer, moe, mail)?;
        }
        Ok(())
    }

    /// Waits for the layer's message.
    fn hear(&mut self, mail: &LayerMail) -> Result<()> {
        let Self { pass, path, step, .. } = *self;
        let boxes = &path.mail().boxes;
        let started = Instant::now();
        let (mut was_idle, mut is_late) = (false, false);
        for look in 1u64.. {
            if mail.layout.read(boxes, mail.mailbox, step, &mut self.buffers.posted) {
                break;
            }
            if look.is_multiple_of(LOOKS) {
                if self.companions.cancel.is_cancelled() {
                    return Err(crate::Error::Cancelled);
                }
                // Idle before a look that found nothing: nothing will come.
                if was_idle {
                    return Err(CudaError::unsupported("a token that ended early").into());
                }
                was_idle = pass.stream().query()?;
                // This thread may have been stopped since the look before:
                // there is one more, after the clock.
                if is_late {
                    return Err(pass.device().give_up("a token").into());
                }
                is_late = started.elapsed() > pass.device().patience();
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn read_choices(&mut self, layer: usize, moe: &DeviceMoe) -> Result<()> {
        let ServiceBuffers { posted, routes, choices, ids, .. } = &mut *self.buffers;
        ids.clear();
        choices.clear();
        for (&id, &weight) in posted.ids.iter().zip(&posted.weights) {
            let expert = u32::try_from(id).ok().filter(|&id| (id as usize) < moe.experts.count);
            let expert = expert.ok_or_else(|| {
                CudaError::unsupported(format!("a router that chose expert {id} in layer {layer}"))
            })?;
            ids.push(expert);
            choices.push(Choice { expert, weight });
        }
        routes.clear();
        routes.push(choices);
        Ok(())
    }

    /// Decides about everything that is missing.
    fn answer(&mut self, layer: usize, moe: &DeviceMoe, mail: &LayerMail) -> Result<()> {
        let pass = self.pass;
        let ServiceBuffers { routes, ids, .. } = &*self.buffers;
        let mut event = pass.model.moving().map(|moving| {
            // Nobody leaves a frame before the device has passed the layer.
            let mut leave = |missing: Missing<'_>| moving.decider().of_token(missing, true);
            moving.store().begin_shared(layer, ids, routes, &mut leave)
        });
        // What is read ahead for the next layers goes before what is kept.
        let reads_ahead = |event: &Event<'_>| mail.ahead().iter().any(|of| event.wants(of.layer));
        let keeps_at_once = !event.as_ref().is_some_and(reads_ahead);
        if let Some((event, moving)) = event.as_mut().zip(pass.model.moving())
            && keeps_at_once
        {
            moving.decider().keep(event);
        }
        let left: Vec<u32> = match &event {
            Some(event) => event.left().iter().map(|id| id.expert).collect(),
            None => ids.iter().copied().filter(|&id| !moe.experts.is_fixed(id as usize)).collect(),
        };
        let mut there = std::mem::take(&mut self.buffers.there);
        if let Some(event) = event.as_mut().filter(|event| event.has_ready()) {
            event.more(self.companions.cancel, &mut there)?;
        }
        there.iter().for_each(|arrived| self.tell_arrived(mail, arrived));
        self.companions.meter.lap(Work::Overhead);
        let waited_ns = self.compute((layer, moe), mail, &left, event.as_mut())?;
        self.companions.meter.lap(Work::Experts);
        let Some(mut event) = event else { return Ok(()) };
        // Dropped before the event, whatever fails: it pins the event's frames.
        let mut there = there;
        let ns = (event.now_ns() - event.began_ns()).saturating_sub(waited_ns);
        let mut work = HostWork {
            experts: left.len(),
            tokens: left.len(),
            ns,
            busy_ns: event.link_busy_ns(),
            is_roused: std::mem::take(&mut self.buffers.is_roused),
            told_ns: None,
        };
        self.foresee(mail, &mut event);
        if let Some(moving) = pass.model.moving().filter(|_| !keeps_at_once) {
            moving.decider().keep(&mut event);
        }
        self.companions.meter.lap(Work::Overhead);
        let before = event.waited_ns();
        loop {
            let told = there.len();
            if event.more(self.companions.cancel, &mut there)? == 0 {
                break;
            }
            there[told..].iter().for_each(|arrived| self.tell_arrived(mail, arrived));
        }
        self.companions.meter.lap_with_wait(Work::Overhead, event.waited_ns() - before);
        if let Some(moving) = pass.model.moving() {
            if self.buffers.posted.missing != 0 {
                work.told_ns = Some(moving.store().now_ns());
            }
            self.rouse(layer, &event, moving.decider());
        }
        self.open = Some(Open { there, event, work });
        Ok(())
    }

    /// While the device works on the next layer, the host's threads wake up, if
    /// they are likely to be needed there.
    fn rouse(&mut self, layer: usize, event: &Event<'_>, decider: &Decider) {
        let layers = self.path.mail().layers.iter().enumerate();
        let next = layers.skip(layer + 1).find(|(_, mail)| mail.is_some());
        let Some((next, _)) = next else { return };
        self.buffers.is_roused = decider.rouses(next, event.miss_chance(next));
        if self.buffers.is_roused {
            self.pass.engine.backend.rouse();
        }
    }

    /// What the routers of the next layers say of this layer's state: pre-gated
    /// lookahead (2308.12066) without training.
    fn foresee(&mut self, mail: &LayerMail, event: &mut Event<'_>) {
        let started = event.now_ns();
        let engine = self.pass.engine;
        let ServiceBuffers { posted, targets, .. } = &mut *self.buffers;
        targets.clear();
        for (index, target) in mail.ahead().iter().enumerate() {
            let target = target.layer;
            let FeedForwardWeights::Moe(moe) = &engine.weights.layers[target].feed_forward else {
                unreachable!("the device's layers are the model's")
            };
            if !event.wants(target) {
                continue;
            }
            let from = index * mail.layout.experts;
            let logits = &mut posted.ahead[from..from + moe.experts.len()];
            moe.rule.rank(logits);
            let ahead = (index + 1) as u8;
            let source = Source::StaleGate { ahead };
            event.foresee(&External { source, target, logits });
            targets.push(target);
        }
        if !targets.is_empty() {
            event.prefetch();
            event.spent(targets, event.now_ns() - started);
        }
    }

    /// Choice of an expert that the device did not find.
    fn missing_choice(&self, expert: u32) -> Option<usize> {
        let ServiceBuffers { posted, ids, .. } = &*self.buffers;
        let choice = ids.iter().position(|&id| id == expert)?;
        (posted.missing >> choice & 1 == 1).then_some(choice)
    }

    /// Tells the device where an expert is, if it did not find it.
    fn tell_arrived(&self, mail: &LayerMail, arrived: &Arrived) {
        let Some(choice) = self.missing_choice(arrived.expert) else { return };
        let Some(moving) = self.pass.model.moving() else { return };
        let entry = moving.entry(arrived.frame());
        let decisions = &self.path.mail().decisions;
        Decision::Resident(entry).tell(decisions, mail.decisions + choice, self.step);
    }

    /// Computes the experts `left`, and tells the device. The time that it
    /// waited for reads.
    fn compute(
        &mut self,
        (layer, moe): (usize, &DeviceMoe),
        mail: &LayerMail,
        left: &[u32],
        event: Option<&mut Event<'_>>,
    ) -> Result<u64> {
        if left.is_empty() {
            return Ok(0);
        }
        let hidden = self.pass.description.hidden;
        // One that left before its removal was told: the device has it still.
        let missing: Vec<usize> =
            left.iter().filter_map(|&expert| self.missing_choice(expert)).collect();
        let ServiceBuffers { posted, routes, choices, grouping, rows, ids, .. } =
            &mut *self.buffers;
        choices.clear();
        choices.extend(missing.iter().map(|&choice| Choice { expert: ids[choice], weight: 1.0 }));
        routes.clear();
        routes.push(choices);
        grouping.gather(routes);
        rows.resize(grouping.rows() * hidden, 0.0);
        let (pass, x, grouping) = (self.pass, &posted.x[..], &*grouping);
        let cancel = self.companions.cancel;
        let host = HostRows { pass, layer, moe, x, tokens: 1, grouping, cancel };
        let waited_ns = host.compute(rows, event)?;
        let mailed = self.path.mail();
        for (index, choice) in missing.into_iter().enumerate() {
            let row = &rows[grouping.row_of(index) * hidden..][..hidden];
            mailed.rows.write_floats(mail.rows + 4 * hidden * choice, row);
            Decision::Host.tell(&mailed.decisions, mail.decisions + choice, self.step);
        }
        Ok(waited_ns)
    }

    /// Ends the open event: the device has passed its layer, as it said at
    /// `heard_ns`. `next` is the layer with missing experts whose router was
    /// heard.
    fn close(&mut self, heard_ns: Option<u64>, next: Option<usize>) {
        let Some(moving) = self.pass.model.moving() else { return };
        let mut open = self.open.take();
        let passed = open.as_mut().map(|Open { there, event, work }| {
            there.clear();
            (event, *work)
        });
        let ServiceBuffers { ids, there, .. } = &mut *self.buffers;
        let routed = next.map(|layer| (layer, &ids[..]));
        moving.decider().next_layer(passed, heard_ns, routed);
        if let Some(open) = open {
            *there = open.there;
            open.event.finish(self.pass.first_position, 1, self.companions.observer);
        }
    }
}

impl Drop for Service<'_, '_, '_, '_> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let mail = self.path.mail();
        for layer in mail.layers[self.next..].iter().flatten() {
            let words = layer.decisions..layer.decisions + layer.layout.k;
            Decision::give_up(&mail.decisions, words, self.step);
        }
        // What it says is of no interest: the token is lost.
        let _ = self.pass.stream().synchronize();
        self.open = None;
    }
}
