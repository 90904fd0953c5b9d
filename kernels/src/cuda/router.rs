//! Launchers of `kernels/cuda/router.cu`: one token's choice in a layer and
//! the forecasts for the next ones, from the same state.

use super::args::Args;
use super::shape::fills;
use super::stream::Grid;
use super::{Arena, CudaError, Device, DeviceMatrix, Span, Stream};
use crate::format::{ActivationKind, Format};
use crate::routing::{RoutingRule, Scores};

/// Experts that a router may have.
pub const MOST_EXPERTS: usize = 512;
/// Experts that a token may get.
pub const MOST_CHOICES: usize = 16;
/// Layers that one launch forecasts.
pub const MOST_AHEAD: usize = 4;
/// Columns of a router.
pub const MOST_HIDDEN: usize = 16384;

/// Rows of a router that a block of `router_step` computes.
const ROWS_PER_BLOCK: usize = 4;
pub(super) const THREADS: u32 = 128;

/// The normalisation in front of a router.
#[derive(Clone)]
pub struct RouterNorm {
    pub kind: RouterNormKind,
    pub epsilon: f32,
    /// f32 `[hidden]`
    pub weight: Span,
    /// f32 `[hidden]`; only of [`RouterNormKind::Layer`].
    pub bias: Option<Span>,
}

/// As [`crate::ops`] defines them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterNormKind {
    /// [`crate::ops::rms_norm`]
    Rms,
    /// [`crate::ops::layer_norm`]
    Layer,
}

/// One layer's router.
#[derive(Clone)]
pub struct RouterLayer {
    pub norm: RouterNorm,
    /// `[experts, hidden]`, of any format.
    pub weight: DeviceMatrix,
    /// f32 `[experts]`
    pub bias: Option<Span>,
    /// f32 `[experts]`; only of [`RoutingRule::Scored`].
    pub selection_bias: Option<Span>,
    pub rule: RoutingRule,
}

impl RouterLayer {
    pub fn experts(&self) -> usize {
        self.weight.rows
    }

    /// Whether [`router_step`] reads the format. For the others, a layer's
    /// norm, its quantisation and its product are launches of their own, and
    /// [`super::router_chunk`] has the rest.
    pub fn is_fused(&self) -> bool {
        self.is_float() || self.weight.format == Format::Q8_0
    }

    pub(super) fn is_float(&self) -> bool {
        self.weight.format.activation() == ActivationKind::F32
    }

    /// Bytes that its logits read beside the state.
    fn bytes(&self) -> u64 {
        let spans = [Some(&self.norm.weight), self.norm.bias.as_ref()];
        let vectors = spans.into_iter().chain([self.bias.as_ref(), self.selection_bias.as_ref()]);
        self.weight.bytes() + vectors.flatten().map(|span| span.bytes() as u64).sum::<u64>()
    }

    fn check(&self, hidden: usize) -> Result<(), CudaError> {
        let fail = |problem: String| Err(CudaError::shape(CALL, problem));
        let experts = self.experts();
        self.weight.check(CALL)?;
        if self.weight.cols != hidden {
            return fail(format!("a router of {} columns for {hidden}", self.weight.cols));
        }
        if experts > MOST_EXPERTS {
            return fail(format!("{experts} experts, at most {MOST_EXPERTS}"));
        }
        if !self.weight.address().is_multiple_of(16) {
            return fail("the router does not start at a multiple of 16 bytes".to_string());
        }
        fills(CALL, "the norm's weight", &self.norm.weight, hidden)?;
        if let Some(bias) = &self.norm.bias {
            if self.norm.kind == RouterNormKind::Rms {
                return fail("an RMS norm has no bias".to_string());
            }
            fills(CALL, "the norm's bias", bias, hidden)?;
        }
        if let Some(bias) = &self.bias {
            fills(CALL, "the bias", bias, experts)?;
        }
        if let Some(bias) = &self.selection_bias {
            if !matches!(self.rule, RoutingRule::Scored { .. }) {
                return fail("this rule has no bias of the choice".to_string());
            }
            fills(CALL, "the bias of the choice", bias, experts)?;
        }
        self.check_rule()
    }

    fn check_rule(&self) -> Result<(), CudaError> {
        let fail = |problem: String| Err(CudaError::shape(CALL, problem));
        let (experts, top_k) = (self.experts(), self.rule.top_k());
        if top_k == 0 || top_k > experts.min(MOST_CHOICES) {
            return fail(format!("top {top_k} of {experts}, at most {MOST_CHOICES}"));
        }
        if let RoutingRule::Scored { groups, groups_used, .. } = self.rule
            && (groups == 0 || !experts.is_multiple_of(groups) || groups_used == 0)
        {
            return fail(format!("{groups_used} of {groups} groups of {experts} experts"));
        }
        Ok(())
    }

    /// The record of `routing.cuh`.
    fn words(&self) -> [u64; WORDS] {
        let address = |span: Option<&Span>| span.map_or(0, Span::address);
        let (experts, rule) = (self.experts() as u64, Words::of(self.rule));
        [
            self.norm.weight.address(),
            address(self.norm.bias.as_ref()),
            self.weight.address(),
            address(self.bias.as_ref()),
            address(self.selection_bias.as_ref()),
            u64::from(self.weight.format.ggml_type()),
            u64::from(self.norm.kind == RouterNormKind::Layer),
            u64::from(self.norm.epsilon.to_bits()),
            experts,
            self.rule.top_k() as u64,
            rule.kind,
            rule.groups as u64,
            rule.groups_used as u64,
            u64::from(rule.renormalise),
            u64::from(rule.scale.to_bits()),
            u64::from(rule.jitter.to_bits()),
        ]
    }
}

/// Words of a record: `ROUTER_WORDS` of `routing.cuh`.
const WORDS: usize = 16;
const CALL: &str = "router";

/// A rule's numbers; the kinds are those of `routing.cuh`.
struct Words {
    kind: u64,
    groups: usize,
    groups_used: usize,
    renormalise: bool,
    scale: f32,
    jitter: f32,
}

impl Words {
    fn of(rule: RoutingRule) -> Self {
        let plain = Self {
            kind: 0,
            groups: 1,
            groups_used: 1,
            renormalise: false,
            scale: 1.0,
            jitter: 0.0,
        };
        match rule {
            RoutingRule::Scored { scores, groups, groups_used, renormalise, scale, .. } => {
                let kind = match scores {
                    Scores::Softmax => 0,
                    Scores::Sigmoid => 1,
                };
                Self { kind, groups, groups_used, renormalise, scale, ..plain }
            }
            RoutingRule::SoftmaxOfTopK { .. } => Self { kind: 2, ..plain },
            RoutingRule::SparseMixer { jitter, .. } => Self { kind: 3, jitter, ..plain },
        }
    }
}

/// The routers of a model on the device, one after the other; made once.
pub struct RouterTable {
    hidden: usize,
    layers: Vec<RouterLayer>,
    /// u64 `[layers, 16]`
    records: Span,
}

impl RouterTable {
    /// Bytes that [`RouterTable::new`] takes from its arena for each layer.
    pub const LAYER_BYTES: usize = 8 * WORDS;

    /// Checks the routers and writes their records to the device.
    ///
    /// # Errors
    /// [`CudaError::Shape`] names what does not fit; [`CudaError::OutOfMemory`]
    /// when the arena's rest is too small; the driver's.
    pub fn new(
        arena: &Arena,
        stream: &Stream,
        hidden: usize,
        layers: Vec<RouterLayer>,
    ) -> Result<Self, CudaError> {
        if hidden == 0 || hidden > MOST_HIDDEN || layers.is_empty() {
            let problem = format!("{} routers of {hidden} columns", layers.len());
            return Err(CudaError::shape(CALL, problem));
        }
        let mut bytes = Vec::with_capacity(layers.len() * Self::LAYER_BYTES);
        for layer in &layers {
            layer.check(hidden)?;
            bytes.extend(layer.words().into_iter().flat_map(u64::to_ne_bytes));
        }
        let records = arena.take(bytes.len(), 128)?;
        stream.upload(&records, &bytes)?;
        Ok(Self { hidden, layers, records })
    }

    pub fn hidden(&self) -> usize {
        self.hidden
    }

    pub fn layers(&self) -> &[RouterLayer] {
        &self.layers
    }

    pub(super) fn layer(
        &self,
        call: &'static str,
        index: usize,
    ) -> Result<&RouterLayer, CudaError> {
        let problem = || format!("layer {index} of {} routers", self.layers.len());
        self.layers.get(index).ok_or_else(|| CudaError::shape(call, problem()))
    }

    /// The record of a layer, which must exist.
    pub(super) fn record(&self, index: usize) -> Span {
        self.records.part(index * Self::LAYER_BYTES..(index + 1) * Self::LAYER_BYTES)
    }
}

/// What launches of [`router_step`] on one stream share.
pub struct RouterScratch {
    /// f32 `[5, 512]`: what the last launch's routers answered, bias included:
    /// the chosen layer's if it had one, then those ahead. A host that wants
    /// the scores of all experts applies [`RoutingRule::rank`] to a row.
    pub logits: Span,
    /// u32 `[5]`: 0 between launches.
    arrived: Span,
}

impl RouterScratch {
    /// Bytes that [`RouterScratch::new`] takes from its arena.
    pub const BYTES: usize = (MOST_AHEAD + 1) * (MOST_EXPERTS * 4 + 4) + 256;

    pub fn new(arena: &Arena, stream: &Stream) -> Result<Self, CudaError> {
        let logits = arena.take((MOST_AHEAD + 1) * MOST_EXPERTS * 4, 16)?;
        let arrived = arena.take((MOST_AHEAD + 1) * 4, 16)?;
        stream.fill(&arrived, 0)?;
        Ok(Self { logits, arrived })
    }
}

/// One token's routing.
pub struct RouterStep<'a> {
    pub table: &'a RouterTable,
    pub scratch: &'a RouterScratch,
    /// f32 `[hidden]`: the residual stream in front of the norm, at a multiple
    /// of 16 bytes.
    pub state: &'a Span,
    /// The layer whose experts are chosen.
    pub chosen: Option<Chosen<'a>>,
    /// The layers that forecasts are for.
    pub ahead: Option<Ahead<'a>>,
}

/// Where a layer's choice goes, in router order.
pub struct Chosen<'a> {
    /// Index into the table.
    pub layer: usize,
    /// i32 `[top_k]`
    pub ids: &'a Span,
    /// f32 `[top_k]`
    pub weights: &'a Span,
}

/// Where forecasts go.
pub struct Ahead<'a> {
    /// One to four indices into the table.
    pub layers: &'a [usize],
    /// Experts to name for each, at most [`MOST_EXPERTS`].
    pub experts: usize,
    /// i32 `[layers, experts]`: by [`RoutingRule::rank`], best first; -1 behind
    /// the last expert of a layer that has fewer.
    pub ids: &'a Span,
    /// f32 `[layers, experts]`: what [`RoutingRule::rank`] makes of the logits.
    pub scores: &'a Span,
}

impl RouterStep<'_> {
    /// Indices into the table, in the order of the launch.
    fn targets(&self) -> impl Iterator<Item = usize> {
        let chosen = self.chosen.as_ref().map(|chosen| chosen.layer);
        let ahead = self.ahead.iter().flat_map(|ahead| ahead.layers.iter().copied());
        chosen.into_iter().chain(ahead)
    }

    /// Bytes that must move: each router with its norm and biases, the state,
    /// the answers.
    pub fn bytes(&self) -> u64 {
        let layers = self.targets().filter_map(|index| self.table.layers.get(index));
        let routers: u64 = layers.map(RouterLayer::bytes).sum();
        let chosen = self.chosen.as_ref().map_or(0, |c| c.ids.bytes() + c.weights.bytes());
        let ahead = self.ahead.as_ref().map_or(0, |a| a.ids.bytes() + a.scores.bytes());
        routers + self.state.bytes() as u64 + (chosen + ahead) as u64
    }

    fn check(&self) -> Result<(), CudaError> {
        let call = "router_step";
        fills(call, "the state", self.state, self.table.hidden)?;
        if !self.state.address().is_multiple_of(16) {
            let problem = "the state does not start at a multiple of 16 bytes";
            return Err(CudaError::shape(call, problem));
        }
        if let Some(chosen) = &self.chosen {
            let top_k = self.table.layer(call, chosen.layer)?.rule.top_k();
            fills(call, "the ids", chosen.ids, top_k)?;
            fills(call, "the weights", chosen.weights, top_k)?;
        }
        if let Some(ahead) = &self.ahead {
            let layers = ahead.layers.len();
            let named = 1..=MOST_EXPERTS;
            if layers == 0 || layers > MOST_AHEAD || !named.contains(&ahead.experts) {
                let problem = format!("{} experts of {layers} layers ahead", ahead.experts);
                return Err(CudaError::shape(call, problem));
            }
            for &layer in ahead.layers {
                self.table.layer(call, layer)?;
            }
            let count = layers * ahead.experts;
            fills(call, "the forecasts' ids", ahead.ids, count)?;
            fills(call, "the forecasts' scores", ahead.scores, count)?;
        }
        Ok(())
    }
}

/// Chooses a layer's experts and forecasts the next layers', in one launch.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit, [`CudaError::Unsupported`] for a
/// router of another format ([`RouterLayer::is_fused`]); the driver's.
pub fn router_step(
    device: &Device,
    stream: &Stream,
    call: RouterStep<'_>,
) -> Result<(), CudaError> {
    call.check()?;
    let targets: Vec<usize> = call.targets().collect();
    let layers = || targets.iter().map(|&index| &call.table.layers[index]);
    let Some(experts) = layers().map(RouterLayer::experts).max() else { return Ok(()) };
    if let Some(other) = layers().find(|layer| !layer.is_fused()) {
        let format = other.weight.format;
        return Err(CudaError::unsupported(format!("router_step of a {format} router")));
    }
    let RouterStep { table, scratch, state, chosen, ahead } = &call;
    let mut args = Args::new()
        .span(&table.records)
        .span(state)
        .i32(table.hidden as i32)
        .i32(i32::from(chosen.is_some()));
    for slot in 0..=MOST_AHEAD {
        args = args.i32(targets.get(slot).map_or(0, |&index| index as i32));
    }
    args = args
        .i32(ahead.as_ref().map_or(0, |ahead| ahead.experts as i32))
        .span(&scratch.logits)
        .span(&scratch.arrived);
    args = match chosen {
        Some(chosen) => args.span(chosen.ids).span(chosen.weights),
        None => args.address(0).address(0),
    };
    args = match ahead {
        Some(ahead) => args.span(ahead.ids).span(ahead.scores),
        None => args.address(0).address(0),
    };
    let blocks = [experts.div_ceil(ROWS_PER_BLOCK) as u32, targets.len() as u32, 1];
    let grid = Grid { blocks, threads: [THREADS, 1, 1], shared_bytes: 0 };
    stream.launch(&device.kernel("router", &["router_step"])?, grid, args)
}
