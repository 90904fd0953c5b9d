//! A pass after the other through the virtual machine.

use super::count::Lru;
use super::host::{self, Host};
use super::machine::{Cpu, Machine};
use super::options::{Options, ReplayError};
use super::passes::Pass;
use super::report::{Bound, PhaseReport};
use super::run::bound_of;
use super::tier::{Below, Rate, VirtualTier};
use super::totals::Totals;
use pregate_predictor::drive::{Drive, LayerCounts, Missing, Pass as Begun, Tier, Wanted};
use pregate_predictor::forecast::Forecaster;
use pregate_predictor::{Cache, LayerShape, Planner, Policy, Shape};

/// Frames of a class that are no slots, where nobody says how many: the
/// runtime's number.
fn usual_ring(shape: &Shape) -> usize {
    let top_k = shape.moe().map(|(_, layer)| layer.top_k).max().unwrap_or(0);
    (2 * top_k).max(4)
}

/// The runtime's planner and drive on a machine that is not there.
pub struct Engine {
    shape: Shape,
    machine: Machine,
    pub(super) drive: Drive<VirtualTier>,
    host: Option<Host>,
    pub(super) totals: Totals,
    dense_bytes_per_layer: f64,
    forecast_ns: u64,
    has_forecasts: bool,
    /// Scratch.
    ids: Vec<u32>,
    experts: Vec<u32>,
    weights: Vec<f32>,
    targets: Vec<usize>,
    counts: Vec<u32>,
}

impl Engine {
    /// `shape` has the bytes of experts. `policy` and `forecaster` are new.
    ///
    /// # Errors
    /// Machines and slots that cannot be.
    pub fn new(
        shape: &Shape,
        machine: &Machine,
        options: &Options,
        policy: Box<dyn Policy>,
        forecaster: Option<Forecaster>,
    ) -> Result<Self, ReplayError> {
        machine.check()?;
        if shape.moe().any(|(_, layer)| layer.expert_bytes == 0) {
            return Err(ReplayError::NoExpertBytes);
        }
        let slots = options.slots.per_layer(shape);
        let cache = Cache::new(shape, &slots, policy)?;
        let mut frames = vec![options.ring.unwrap_or(usual_ring(shape)).max(1); shape.classes()];
        shape.moe().for_each(|(index, layer)| frames[layer.class] += slots[index]);
        let Machine { cpu, disk, .. } = machine;
        let read = Rate::new(&disk.gbs, &disk.gbs, &disk.latency_ns);
        let mut tier = match &machine.link {
            Some(link) if machine.gpu.is_some() => {
                let copy = Rate::new(&link.gbs, &link.gbs_beside_cpu, &link.start_ns);
                VirtualTier::new(shape, copy, &frames)
            }
            _ => VirtualTier::new(shape, read, &frames),
        };
        if let Some(share) = options.ram_share.filter(|&share| share < 1.0 && machine.gpu.is_some())
        {
            let room = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.experts);
            let room = |layer: usize| (share.max(0.0) * room(layer) as f64) as usize;
            let rooms: Vec<usize> = (0..slots.len()).map(room).collect();
            let mut ram = Lru::new(shape, &rooms);
            // Filled from the front of the file when the model was loaded.
            for (layer, &room) in rooms.iter().enumerate() {
                ram.event(layer, &(0..room as u16).collect::<Vec<_>>());
            }
            tier.below = Some(Below::new(read, ram));
        }
        let has_forecasts = forecaster.as_ref().is_some_and(|one| one.horizon() > 0);
        let mut planner = Planner::new(shape, cache, forecaster, options.ahead);
        // What a byte costs before the first was moved: as a probe says.
        let wire = match &machine.link {
            Some(link) if machine.gpu.is_some() => &link.gbs,
            _ => &disk.gbs,
        };
        planner.link(1 << 30, ((1u64 << 30) as f64 / wire.value) as u64, 0);
        let host = (machine.gpu.as_ref().zip(machine.link.as_ref()))
            .map(|(gpu, link)| Host::new(shape, (gpu, link, cpu), options.misses, &slots));
        let layers = shape.layers.len().max(1);
        Ok(Self {
            totals: Totals::new(shape, &slots),
            drive: Drive::new(shape, planner, tier, &frames),
            host,
            dense_bytes_per_layer: options.dense_bytes as f64 / layers as f64,
            forecast_ns: options.forecast_ns,
            has_forecasts,
            shape: shape.clone(),
            machine: machine.clone(),
            ids: Vec::new(),
            experts: Vec::new(),
            weights: Vec::new(),
            targets: Vec::new(),
            counts: Vec::new(),
        })
    }

    /// What was seen so far only warms caches and forecasts.
    pub fn begin_counting(&mut self) {
        self.drive.begin_counting();
        self.totals.begin_counting();
        if let Some(below) = &mut self.drive.tier_mut().below {
            below.bytes = 0;
        }
    }

    /// One pass through all layers.
    pub fn pass(&mut self, pass: &mut Pass) {
        let tokens = pass.rows().len();
        self.ids.clear();
        // Without ids every token is a new one, and none that was trained.
        let unknown = self.totals.tokens_seen() as u32;
        let new = |at: u32| u32::MAX - unknown.wrapping_add(at);
        let id = |(row, at): (&crate::Row, u32)| row.token.unwrap_or_else(|| new(at));
        self.ids.extend(pass.rows().iter().zip(0..).map(id));
        let is_start = pass.first().starts_sequence;
        // A chunk is a prompt's; so may a single token be, behind its others.
        let is_prompt = tokens > 1 || pass.first().is_prompt;
        // A GPU goes through a token's layers by itself.
        let keeps_ahead = tokens == 1 && self.host.is_some();
        let began_ns = self.now();
        let begun = Begun { ids: &self.ids, session: 0, is_start, keeps_ahead };
        self.drive.begin_pass(&begun);
        if is_prompt {
            self.drive.count_as_prompt();
        }
        self.totals.begin_pass(is_start, is_prompt);
        if let Some(host) = self.host.as_mut().filter(|_| tokens == 1) {
            host.next_token();
        }
        let first = self.shape.moe().next().map(|(index, _)| index);
        for layer in 0..self.shape.layers.len() {
            // Beside a GPU the runtime asks first when its first layer is heard.
            let asks_first =
                tokens == 1 && self.has_forecasts && self.host.is_none() && first == Some(layer);
            if asks_first && self.drive.planner().wants(layer) {
                self.drive.foresee_now(None);
            }
            let ns = self.dense_ns(tokens);
            self.drive.tier_mut().work(ns);
            self.layer(pass, layer);
        }
        if let Some(host) = &mut self.host {
            host.hear(&mut self.drive, None);
        }
        let passed_ns = self.now() - began_ns;
        self.drive.passed(passed_ns);
        self.totals.passed(tokens, passed_ns);
    }

    /// What the wires had to do for the decoded tokens.
    pub(super) fn bound(&self, decode: &PhaseReport) -> Bound {
        if decode.tokens == 0 {
            return bound_of([0.0; 4]);
        }
        let tokens = decode.tokens as f64;
        let counts = &decode.counts;
        let bytes = |experts: fn(&LayerCounts) -> u64| -> f64 {
            let of = |(index, layer): (usize, &LayerShape)| {
                experts(&self.drive.counts(true)[index]) as f64 * layer.expert_bytes as f64
            };
            self.shape.moe().map(of).sum::<f64>() / tokens
        };
        let dense = self.dense_bytes_per_layer * self.shape.layers.len() as f64;
        let all = bytes(|counts| counts.hits + counts.early + counts.in_flight + counts.misses);
        let left = bytes(|counts| counts.left);
        let moved = counts.bytes() as f64 / tokens;
        let Machine { gpu, link, cpu, disk, .. } = &self.machine;
        let below = self.drive.tier().below.as_ref().map_or(0, |below| below.bytes);
        bound_of(match (gpu, link) {
            (Some(gpu), Some(link)) => [
                (dense + all - left) / gpu.vram_gbs.value,
                moved / link.gbs.value,
                left / cpu.expert_gbs.value,
                below as f64 / tokens / disk.gbs.value,
            ],
            _ => [
                0.0,
                0.0,
                dense / cpu.dense_gbs.value + all / cpu.expert_gbs.value,
                moved / disk.gbs.value,
            ],
        })
    }

    fn now(&self) -> u64 {
        self.drive.tier().now_ns()
    }

    /// Everything of a layer but routed experts.
    fn dense_ns(&self, tokens: usize) -> u64 {
        let bytes = self.dense_bytes_per_layer;
        let Machine { cpu, gpu, .. } = &self.machine;
        let (gbs, layer_ns, gmacs) = match gpu {
            Some(gpu) => (&gpu.vram_gbs, &gpu.layer_ns, &gpu.gmacs),
            None => (&cpu.dense_gbs, &cpu.layer_ns, &cpu.gmacs),
        };
        let many = if tokens > 1 { host::macs(bytes) * tokens as f64 / gmacs.value } else { 0.0 };
        (layer_ns.value + (bytes / gbs.value).max(many)) as u64
    }

    fn layer(&mut self, pass: &mut Pass, layer: usize) {
        self.experts.clear();
        self.experts.extend(pass.experts(layer).iter().map(|&id| u32::from(id)));
        if self.experts.is_empty() {
            return;
        }
        let stall = self.drive.tier().stall;
        match self.host.take() {
            Some(mut host) => {
                self.on_gpu(pass, layer, &mut host);
                self.host = Some(host);
            }
            None => self.on_cpu(pass, layer),
        }
        let tier = self.drive.tier_mut();
        if let Some(below) = &mut tier.below {
            below.used(layer, pass.experts(layer));
        }
        let stalled = tier.stall.since(&stall);
        self.totals.served(layer, self.drive.open().request(), stalled);
    }

    /// Streaming from disk: the token's thread computes.
    fn on_cpu(&mut self, pass: &mut Pass, layer: usize) {
        let Self { drive, machine, experts, weights, ids, .. } = self;
        let rows = pass.rows();
        let mut tell = |planner: &mut Planner| tell_routes(planner, rows, layer, (ids, weights));
        drive.tier_mut().work(machine.cpu.plan_ns.value as u64);
        drive.begin(Wanted { layer, experts }, &mut tell, None);
        if self.has_forecasts && rows.len() == 1 {
            self.forecast(layer);
        }
        self.count_tokens(pass, layer);
        let Self { drive, machine, shape, counts, .. } = self;
        let bytes = shape.layer(layer).map_or(0, |layer| layer.expert_bytes) as f64;
        loop {
            drive.settle();
            let Ok(handed) = drive.more(u64::MAX, &mut || Ok(()));
            if handed.is_empty() {
                break;
            }
            let uses: u64 = handed.iter().map(|id| u64::from(counts[id.expert()])).sum();
            let many = handed.len() as f64;
            let is_beside = drive.tier().is_busy();
            let ns = cpu_ns(&machine.cpu, (bytes, many), uses, is_beside);
            drive.tier_mut().work(ns);
        }
        drive.settle();
        drive.end();
    }

    /// As the runtime forecasts beside the shared experts.
    fn forecast(&mut self, layer: usize) {
        let Self { drive, targets, .. } = self;
        let planner = drive.planner();
        targets.clear();
        if let Some(forecaster) = planner.forecaster() {
            let ahead = forecaster.ahead(Some(layer)).iter().copied();
            targets.extend(ahead.filter(|&layer| planner.wants(layer)));
        }
        drive.prefetch();
        if !targets.is_empty() {
            drive.tier_mut().work(self.forecast_ns);
            drive.spent(targets, self.forecast_ns);
        }
    }

    /// `[experts]`: tokens of the pass that chose each.
    fn count_tokens(&mut self, pass: &Pass, layer: usize) {
        let experts = self.shape.layer(layer).map_or(0, |layer| layer.experts);
        self.counts.clear();
        self.counts.resize(experts, 0);
        for row in pass.rows() {
            row.experts(layer).iter().for_each(|&id| self.counts[usize::from(id)] += 1);
        }
    }

    /// A GPU that shares its misses with the host.
    fn on_gpu(&mut self, pass: &mut Pass, layer: usize, host: &mut Host) {
        self.count_tokens(pass, layer);
        let Self { drive, experts, weights, ids, counts, .. } = self;
        let rows = pass.rows();
        let tokens = rows.len();
        if tokens == 1 {
            host.hear(drive, Some((layer, experts)));
        }
        let mut leave = |missing: Missing<'_>| host.leave(&missing, counts, tokens);
        let mut tell = |planner: &mut Planner| tell_routes(planner, rows, layer, (ids, weights));
        drive.begin(Wanted { layer, experts }, &mut tell, Some(&mut leave));
        match tokens {
            1 => host.serve(drive, layer, counts),
            _ => host.serve_chunk(drive, layer, counts),
        }
    }
}

/// What the CPU takes for `many` experts of `bytes` that `uses` tokens share.
fn cpu_ns(cpu: &Cpu, (bytes, many): (f64, f64), uses: u64, is_beside: bool) -> u64 {
    let gbs = match is_beside {
        true => cpu.expert_gbs_beside.value.min(cpu.expert_gbs.value),
        false => cpu.expert_gbs.value,
    };
    let computed = host::macs(bytes) * uses as f64 / cpu.gmacs.value;
    (cpu.start_ns.value + (many * bytes / gbs).max(computed)) as u64
}

/// What the router of `layer` chose for each token.
fn tell_routes(
    planner: &mut Planner,
    rows: &[crate::Row],
    layer: usize,
    (ids, weights): (&mut Vec<u32>, &mut Vec<f32>),
) {
    for row in rows {
        let experts = row.experts(layer);
        if experts.is_empty() {
            continue;
        }
        ids.clear();
        ids.extend(experts.iter().map(|&id| u32::from(id)));
        weights.clear();
        match row.weights(layer) {
            [] => weights.resize(experts.len(), 1.0 / experts.len() as f32),
            recorded => weights.extend_from_slice(recorded),
        }
        planner.routed(layer, ids, weights);
    }
}
