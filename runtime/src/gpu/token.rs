//! One token as one list of launches, mostly a CUDA graph: the device finds
//! the experts that it has by itself. Behind each router it tells the host
//! what was chosen; where something is missing, it goes on with what is there
//! and waits for the host's decision ([`super::serve`]). The protocol is that
//! of [`pregate_kernels::cuda::post`] and its neighbours.

use super::buffers::ALIGN;
use super::exchange::Exchange;
use super::pass::Pass;
use super::weights::{DeviceFeedForward, DeviceLayer, DeviceMoe, DeviceWeights};
use crate::model::description::ModelDescription;
use pregate_kernels::cuda::router::{MOST_AHEAD, MOST_EXPERTS};
use pregate_kernels::cuda::{
    AheadLogits, Arena, BeginStep, CudaError, Device, Graph, HostRows, MailboxLayout, Mapped, Post,
    STEP_WORDS, Settle, Span, StepError, StepLayout, Stream, begin_step, post, settle,
};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::iter;

/// Positions that the smallest graph is for.
const SMALLEST_GRAPH: usize = 256;

/// A session's memory for tokens of their own.
pub struct TokenPath {
    /// Of one token.
    pub exchange: Exchange,
    /// i32 `[4]`: step, position, 0, 0.
    pub words: Span,
    /// u32: the choices of a layer that were not there, and those that the
    /// host computed.
    missing: Span,
    from_host: Span,
    /// u64 `[experts]`: where the layer's experts are that were there, and
    /// those that came later.
    table: Span,
    late: Span,
    /// i32 and f32 `[ahead, 1]`: what routers of layers ahead name; not used.
    ahead: [Span; 2],
    step_layout: StepLayout,
    step_block: Mapped,
    mail: Mail,
}

/// What host and device share about the layers.
pub struct Mail {
    /// Per layer of the model; `None`: nothing is asked there.
    pub layers: Vec<Option<LayerMail>>,
    pub boxes: Mapped,
    /// A word per choice; behind the last layer's the error word.
    pub decisions: Mapped,
    /// f32 `[k, hidden]` per layer.
    pub rows: Mapped,
    error_word: usize,
}

/// A layer's places in [`Mail`].
#[derive(Clone, Copy, Debug)]
pub struct LayerMail {
    pub layout: MailboxLayout,
    /// The layers whose routers see its state, too; see [`LayerMail::ahead`].
    ahead: [Ahead; MOST_AHEAD],
    /// In bytes.
    pub mailbox: usize,
    /// In words.
    pub decisions: usize,
    /// In bytes.
    pub rows: usize,
}

/// A layer whose router is asked ahead of time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ahead {
    /// Of the model.
    pub layer: usize,
    /// Index into [`DeviceWeights::routers`].
    pub router: usize,
}

impl LayerMail {
    pub fn ahead(&self) -> &[Ahead] {
        &self.ahead[..self.layout.ahead]
    }
}

/// A step as the launches see it.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    pub path: &'a TokenPath,
    /// Positions that the launches are for.
    pub most: usize,
}

impl TokenPath {
    /// Bytes of device memory.
    pub fn device_bytes(description: &ModelDescription) -> usize {
        let experts = most_experts(description);
        let tables = 2 * (8 * experts).next_multiple_of(ALIGN);
        Exchange::bytes(description, 1) + 5 * ALIGN + tables
    }

    /// # Errors
    /// The system refuses page-locked memory, or the device fails.
    pub fn new(
        device: &Device,
        arena: &Arena,
        description: &ModelDescription,
        weights: &DeviceWeights,
        horizon: usize,
    ) -> Result<Self, CudaError> {
        let tables = 8 * most_experts(description);
        let input_bytes = Exchange::inputs_bytes(description, 1);
        let step_layout = StepLayout { updates: weights.slots.all().bytes() / 4, input_bytes };
        let named = || arena.take(4 * MOST_AHEAD, ALIGN);
        Ok(Self {
            exchange: Exchange::new(arena, description, 1)?,
            words: arena.take(4 * STEP_WORDS, ALIGN)?,
            missing: arena.take(4, ALIGN)?,
            from_host: arena.take(4, ALIGN)?,
            table: arena.take(tables, ALIGN)?,
            late: arena.take(tables, ALIGN)?,
            ahead: [named()?, named()?],
            step_block: device.mapped(step_layout.bytes())?,
            step_layout,
            mail: Mail::new(device, description, weights, horizon)?,
        })
    }

    /// Room for what `count` routers ahead name: i32 and f32 `[count, 1]`.
    pub fn named_ahead(&self, count: usize) -> [Span; 2] {
        self.ahead.each_ref().map(|span| span.part(0..4 * count))
    }

    pub fn mail(&self) -> &Mail {
        &self.mail
    }

    /// Says what the next step is: to be called between steps.
    pub fn write_step(
        &self,
        step: u32,
        position: usize,
        updates: &[(u32, u32)],
        inputs: &[u8],
    ) -> Result<(), CudaError> {
        self.step_layout.write(&self.step_block, step, position, updates)?;
        self.step_block.write(self.step_layout.inputs_at(), inputs);
        // What went wrong with a step before was told then.
        self.mail.decisions.store_release(self.mail.error_word, 0);
        Ok(())
    }

    /// Whether the device has found nothing wrong with the step so far.
    ///
    /// # Errors
    /// [`CudaError::Late`]: it has waited for the host in vain.
    pub fn healthy(&self, device: &Device) -> Result<(), CudaError> {
        match self.mail.error() {
            None => Ok(()),
            Some(StepError::Late { .. }) => {
                let seconds = device.kernel_patience().as_secs();
                Err(CudaError::Late { what: "a token", seconds })
            }
            Some(error) => Err(CudaError::unsupported(format!("a token: {error:?}"))),
        }
    }

    /// The first launch.
    pub fn begin(&self, pass: &Pass<'_>) -> Result<(), CudaError> {
        let inputs = &self.exchange.inputs;
        let call = BeginStep {
            layout: self.step_layout,
            block: &self.step_block.span(),
            slot_of: pass.model.slots().all(),
            words: &self.words,
            inputs,
        };
        begin_step(pass.device(), pass.stream(), call)
    }

    /// Tells the host what a layer's router chose, and finds those of them
    /// that are there. The answer is where: u64 `[experts]`.
    pub fn post(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        moe: &DeviceMoe,
        mail: &LayerMail,
    ) -> Result<Span, CudaError> {
        let k = 4 * moe.top_k;
        let chosen = &self.exchange.choices[moe.router];
        let table = self.table.part(0..8 * moe.experts.count);
        let slots = pass.model.slots();
        let (from, bytes) = (mail.mailbox, mail.layout.bytes());
        let (all, pitch) = (&pass.buffers.router_scratch.logits, MOST_EXPERTS);
        // Behind the row of the layer's own router.
        let logits = all.part(4 * pitch..all.bytes());
        let call = Post {
            layout: mail.layout,
            mailbox: &self.mail.boxes.span().part(from..from + bytes),
            words: &self.words,
            ids: &chosen.ids.part(0..k),
            weights: &chosen.weights.part(0..k),
            slot_of: &slots.of_layer(layer),
            arena: slots.arena(moe.experts.shape.block_bytes),
            table: &table,
            missing: &self.missing,
            ahead: (mail.layout.ahead > 0).then_some(AheadLogits { logits: &logits, pitch }),
            x: &pass.buffers.normed.part(0..4 * pass.description.hidden),
        };
        post(pass.device(), pass.stream(), call)?;
        Ok(table)
    }

    /// Waits for the host's decisions about a layer. The answer is where
    /// experts are that came meanwhile: u64 `[experts]`.
    pub fn settle(
        &self,
        pass: &Pass<'_>,
        moe: &DeviceMoe,
        mail: &LayerMail,
    ) -> Result<Span, CudaError> {
        let (k, late) = (moe.top_k, self.late.part(0..8 * moe.experts.count));
        let word = |first: usize, count: usize| {
            self.mail.decisions.span().part(8 * first..8 * (first + count))
        };
        let call = Settle {
            words: &self.words,
            missing: &self.missing,
            ids: &self.exchange.choices[moe.router].ids.part(0..4 * k),
            k,
            decisions: &word(mail.decisions, k),
            arena: pass.model.slots().arena(moe.experts.shape.block_bytes),
            // A graph keeps that of its capture.
            patience: pass.device().kernel_patience(),
            error: &word(self.mail.error_word, 1),
            late: &late,
            from_host: &self.from_host,
        };
        settle(pass.device(), pass.stream(), call)?;
        Ok(late)
    }

    /// The rows that the host computed, `[k, hidden]`, and which they are.
    pub fn host_rows(&self, mail: &LayerMail) -> [Span; 2] {
        let bytes = 4 * mail.layout.k * mail.layout.hidden;
        [self.mail.rows.span().part(mail.rows..mail.rows + bytes), self.from_host.clone()]
    }
}

/// The next layers of experts whose routers can see the state of `layer`, with
/// their number of experts.
fn asked_ahead(
    weights: &DeviceWeights,
    layer: usize,
    horizon: usize,
) -> impl Iterator<Item = (Ahead, usize)> {
    let fused = |index: usize| {
        let router = weights.routers.as_ref().and_then(|table| table.layers().get(index));
        router.is_some_and(|router| router.is_fused())
    };
    let router = |layer: &DeviceLayer| match &layer.feed_forward {
        DeviceFeedForward::Moe(moe) => Some((moe.router, moe.experts.count)),
        DeviceFeedForward::Dense(_) => None,
    };
    let own = router(&weights.layers[layer]).is_some_and(|(index, _)| fused(index));
    let ahead = weights.layers.iter().enumerate().skip(layer + 1);
    let ahead = ahead.filter_map(move |(layer, of)| {
        let (router, experts) = router(of)?;
        Some((Ahead { layer, router }, experts))
    });
    // All or none of a launch's routers are of its kind.
    let ahead = ahead.take_while(move |(ahead, _)| own && fused(ahead.router));
    ahead.take(horizon.min(MOST_AHEAD))
}

/// What [`pregate_kernels::cuda::Combine`] takes of [`TokenPath::host_rows`].
pub fn host_rows([rows, from_host]: &[Span; 2]) -> HostRows<'_> {
    HostRows { rows, from_host }
}

fn most_experts(description: &ModelDescription) -> usize {
    description.moe_layers().map(|(_, moe)| moe.experts).max().unwrap_or(1)
}

impl Mail {
    fn new(
        device: &Device,
        description: &ModelDescription,
        weights: &DeviceWeights,
        horizon: usize,
    ) -> Result<Self, CudaError> {
        let is_whole = weights.is_whole();
        let (mut boxes, mut words, mut rows) = (0, 0, 0);
        let hidden = description.hidden;
        let mut mail = |(index, layer): (usize, &DeviceLayer)| {
            let DeviceFeedForward::Moe(moe) = &layer.feed_forward else { return None };
            let mut ahead = [Ahead::default(); MOST_AHEAD];
            let (mut count, mut experts) = (0, 0);
            for (place, (of, width)) in ahead.iter_mut().zip(asked_ahead(weights, index, horizon)) {
                *place = of;
                (count, experts) = (count + 1, experts.max(width));
            }
            let layout = MailboxLayout { k: moe.top_k, hidden, ahead: count, experts };
            let mail = LayerMail { layout, ahead, mailbox: boxes, decisions: words, rows };
            boxes += layout.bytes();
            words += moe.top_k;
            rows += (4 * moe.top_k * hidden).next_multiple_of(ALIGN);
            Some(mail)
        };
        let layers = weights.layers.iter().enumerate();
        let layers: Vec<Option<LayerMail>> =
            layers.map(|layer| if is_whole { None } else { mail(layer) }).collect();
        Ok(Self {
            layers,
            boxes: device.mapped(boxes.max(8))?,
            decisions: device.mapped(8 * (words + 1))?,
            rows: device.mapped(rows.max(8))?,
            error_word: words,
        })
    }

    /// What the device has found wrong with the step that was written last.
    fn error(&self) -> Option<StepError> {
        StepError::read(&self.decisions, self.error_word)
    }
}

/// Graphs of tokens, by the positions that they are for.
#[derive(Default)]
pub struct Graphs {
    /// `None`: the driver refused one for so many positions.
    made: HashMap<usize, Option<Graph>>,
    /// Why the first one was refused.
    refusal: Option<CudaError>,
}

impl Graphs {
    /// Positions that the launches of a token are for: as few sizes as leave
    /// at most half of them behind the context.
    pub fn most(position: usize, capacity: usize) -> usize {
        let most = (position + 1).next_power_of_two().max(SMALLEST_GRAPH).min(capacity);
        assert!(position < most, "position {position} of {capacity}");
        most
    }

    /// All values of [`Graphs::most`].
    pub fn sizes(capacity: usize) -> impl Iterator<Item = usize> {
        let next = move |&most: &usize| (most < capacity).then(|| Self::most(most, capacity));
        iter::successors(Some(Self::most(0, capacity)), next)
    }

    /// Makes the graph for `most` positions, of what `launch` launches, unless
    /// it was made or refused before.
    ///
    /// # Errors
    /// Those that end the device, and our own. What the driver only refuses
    /// (memory, mostly) is kept as [`Graphs::refusal`]: launches one by one do
    /// the same.
    pub fn make(
        &mut self,
        pass: &Pass<'_>,
        most: usize,
        launch: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let Entry::Vacant(room) = self.made.entry(most) else { return Ok(()) };
        match Graph::capture(pass.stream(), launch) {
            Ok(graph) => {
                room.insert(Some(graph));
                Ok(())
            }
            Err(error) => self.refuse(most, error),
        }
    }

    /// Submits the graph for `most` positions. `false`: there is none, and
    /// nothing was submitted.
    ///
    /// # Errors
    /// As [`Graphs::make`].
    pub fn submit(&mut self, stream: &Stream, most: usize) -> Result<bool, CudaError> {
        let Some(Some(graph)) = self.made.get(&most) else { return Ok(false) };
        match graph.launch(stream) {
            Ok(()) => Ok(true),
            // It takes memory when it is launched for the first time.
            Err(error) => self.refuse(most, error).map(|()| false),
        }
    }

    /// Why some tokens are launched kernel by kernel.
    pub fn refusal(&self) -> Option<&CudaError> {
        self.refusal.as_ref()
    }

    fn refuse(&mut self, most: usize, error: CudaError) -> Result<(), CudaError> {
        let CudaError::Api { .. } = error else { return Err(error) };
        self.made.insert(most, None);
        self.refusal.get_or_insert(error);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_graph_is_for_its_position_and_all_before() {
        let most = |position| Graphs::most(position, 1000);
        assert_eq!([0, 255, 256, 511, 512, 999].map(most), [256, 256, 512, 512, 1000, 1000]);
        assert_eq!(Graphs::sizes(1000).collect::<Vec<_>>(), [256, 512, 1000]);
        assert_eq!(Graphs::sizes(256).collect::<Vec<_>>(), [256]);
        assert_eq!(Graphs::most(0, 1), 1);
        assert_eq!(Graphs::most(31, 32), 32);
    }
}
