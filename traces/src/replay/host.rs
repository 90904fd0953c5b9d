//! The host beside a GPU, as the runtime has it: computes some of the misses,
//! has others copied, and what it computes for later.

use super::machine::{Cpu, Gpu, Link};
use super::options::Misses;
use super::tier::VirtualTier;
use pregate_predictor::decider::{Bring, Decider, Ended, HostWork};
use pregate_predictor::drive::{Drive, Missing, Open, Tier};
use pregate_predictor::split::Seed;
use pregate_predictor::{ExpertId, Shape};

/// Multiply-adds of a token with so many bytes of weights: 4.5 bits each, what
/// files of models larger than memory have.
pub fn macs(bytes: f64) -> f64 {
    bytes * 8.0 / 4.5
}

/// The runtime's decisions about misses, and what its answers take.
pub struct Host {
    decider: Decider,
    shape: Shape,
    gpu: Gpu,
    cpu: Cpu,
    /// Of the event that is open: what the host did for it. The device may
    /// still be in its layer.
    work: Option<HostWork>,
}

impl From<Misses> for Bring {
    fn from(misses: Misses) -> Self {
        match misses {
            Misses::Auto => Bring::Auto,
            Misses::Cpu => Bring::Host,
            Misses::Link => Bring::Link,
        }
    }
}

/// What became of an event.
fn ended(open: &Open, work: HostWork) -> Ended {
    let (layer, began_ns) = (open.layer(), open.began_ns());
    let (copied, delay_ns) = (open.copied(), open.delay_ns());
    Ended { layer, began_ns, work, copied, delay_ns, waited_for: open.waited_for() }
}

impl Host {
    pub fn new(
        shape: &Shape,
        (gpu, link, cpu): (&Gpu, &Link, &Cpu),
        misses: Misses,
        slots: &[usize],
    ) -> Self {
        let beside = |alone: f64, beside: f64| (alone / beside).max(1.0);
        let seed = Seed {
            cpu_start_ns: cpu.start_ns.value,
            cpu_ns_per_byte: 1.0 / cpu.expert_gbs.value,
            link_start_ns: link.start_ns.value,
            link_ns_per_byte: 1.0 / link.gbs.value,
            cpu_beside_link: beside(cpu.expert_gbs.value, cpu.expert_gbs_beside.value),
            link_beside_cpu: beside(link.gbs.value, link.gbs_beside_cpu.value),
        };
        Self {
            decider: Decider::new(misses.into(), shape, slots, &seed),
            shape: shape.clone(),
            gpu: gpu.clone(),
            cpu: cpu.clone(),
            work: None,
        }
    }

    /// A token enters the first layer.
    pub fn next_token(&mut self) {
        self.decider.next_token();
    }

    /// Of what is missing, what the host computes. `counts`, `[experts]`:
    /// tokens that chose each.
    pub fn leave(&mut self, missing: &Missing<'_>, counts: &[u32], tokens: usize) -> Vec<ExpertId> {
        match tokens {
            // Nobody leaves a frame before the device has passed the layer.
            1 => self.decider.of_token(missing, true),
            _ => self.decider.of_chunk(missing, |expert| counts[expert as usize]),
        }
    }

    /// The device has passed the layer of the open event, if there is one:
    /// `next` is the layer of a token that was heard, with what its router
    /// chose; `None`: the token has ended.
    pub fn hear(&mut self, drive: &mut Drive<VirtualTier>, next: Option<(usize, &[u32])>) {
        let tier = drive.tier();
        // Where reads from disk are waited for, walls say nothing of the workers.
        let says = next.is_some() && tier.below.is_none();
        let heard_ns = says.then(|| tier.now_ns());
        let event = self.work.take().map(|work| ended(drive.open(), work));
        self.decider.passed(event.as_ref(), heard_ns);
        if event.is_some() {
            self.decider.admitted(drive.settled());
            drive.end();
        }
        if let Some((layer, experts)) = next {
            self.decider.routed(layer, experts);
        }
    }

    /// A token's layer, whose event has begun: the device computes what is
    /// there, then, once it was told all, what came. The event stays open.
    pub fn serve(&mut self, drive: &mut Drive<VirtualTier>, layer: usize, counts: &[u32]) {
        let bytes = self.bytes(layer);
        // What is read ahead for the next layers goes before what is kept.
        let keeps_at_once = !drive.planner().reads_ahead();
        if keeps_at_once {
            self.keep(drive);
        }
        let mut gpu_until = drive.tier().now_ns();
        if drive.open().has_ready() {
            let Ok(handed) = drive.more(u64::MAX, &mut || Ok(()));
            gpu_until += self.gpu_ns(bytes, handed, counts);
        }
        let mut work = self.compute(drive, bytes, counts, gpu_until);
        if !keeps_at_once {
            drive.prefetch();
            self.keep(drive);
        }
        let mut late_ns = 0;
        loop {
            drive.tier_mut().hidden_until_ns = gpu_until;
            let Ok(handed) = drive.more(u64::MAX, &mut || Ok(()));
            if handed.is_empty() {
                break;
            }
            late_ns += self.gpu_ns(bytes, handed, counts);
        }
        let told_ns = drive.tier().now_ns();
        drive.tier_mut().work(gpu_until.saturating_sub(told_ns) + late_ns);
        if self.visit(drive) {
            work.told_ns = Some(told_ns);
        }
        self.work = Some(work);
    }

    /// A layer of a chunk, whose event has begun, until its end.
    pub fn serve_chunk(&mut self, drive: &mut Drive<VirtualTier>, layer: usize, counts: &[u32]) {
        let bytes = self.bytes(layer);
        let mut gpu_until = drive.tier().now_ns();
        if drive.open().has_ready() {
            let Ok(handed) = drive.more(u64::MAX, &mut || Ok(()));
            gpu_until += self.gpu_ns(bytes, handed, counts);
        }
        let work = self.compute(drive, bytes, counts, gpu_until);
        loop {
            drive.tier_mut().hidden_until_ns = gpu_until;
            drive.settle();
            let Ok(handed) = drive.more(u64::MAX, &mut || Ok(()));
            if handed.is_empty() {
                break;
            }
            let ns = self.gpu_ns(bytes, handed, counts);
            gpu_until = gpu_until.max(drive.tier().now_ns()) + ns;
        }
        let tier = drive.tier_mut();
        tier.work(gpu_until.saturating_sub(tier.now_ns()));
        self.visit(drive);
        let tokens = drive.tokens();
        self.decider.ended(&ended(drive.open(), work), tokens);
        self.decider.admitted(drive.settled());
        drive.end();
    }

    fn bytes(&self, layer: usize) -> f64 {
        self.shape.layer(layer).map_or(0, |layer| layer.expert_bytes) as f64
    }

    /// What the host computes and is worth it comes over an idle link for
    /// later tokens.
    fn keep(&mut self, drive: &mut Drive<VirtualTier>) {
        let open = drive.open();
        let keeps = self.decider.keeps(open.layer(), open.left(), drive.room_to_keep());
        drive.keep(keeps);
    }

    /// Host and device told each other about misses, if there were any.
    fn visit(&self, drive: &mut Drive<VirtualTier>) -> bool {
        let request = drive.open().request();
        let is_visited = !request.missing.is_empty() || !request.in_flight.is_empty();
        if is_visited {
            let (tier, visit_ns) = (drive.tier_mut(), self.gpu.visit_ns.value as u64);
            tier.stall.visits_ns += visit_ns;
            tier.work(visit_ns);
        }
        is_visited
    }

    /// What the GPU takes for experts that are there.
    fn gpu_ns(&self, bytes: f64, experts: &[ExpertId], counts: &[u32]) -> u64 {
        let uses: u64 = experts.iter().map(|id| u64::from(counts[id.expert()])).sum();
        let read = experts.len() as f64 * bytes / self.gpu.vram_gbs.value;
        // A token's are read once each; more meet the same bytes.
        let computed = macs(bytes) * uses as f64 / self.gpu.gmacs.value;
        read.max(computed) as u64
    }

    /// The CPU computes what was left to it.
    fn compute(
        &mut self,
        drive: &mut Drive<VirtualTier>,
        bytes: f64,
        counts: &[u32],
        gpu_until: u64,
    ) -> HostWork {
        let left = drive.open().left();
        let of = |id: &ExpertId| counts[id.expert()] as usize;
        let (experts, tokens) = (left.len(), left.iter().map(of).sum());
        let ids = left.to_vec();
        let tier = drive.tier_mut();
        let began_ns = tier.now_ns();
        let there_ns = ids.iter().map(|&id| tier.in_ram_ns(id)).max().unwrap_or(began_ns);
        tier.work(there_ns - began_ns);
        if experts > 0 {
            let read = experts as f64 * bytes / self.cpu.expert_gbs.value;
            let computed = macs(bytes) * tokens as f64 / self.cpu.gmacs.value;
            // Beside the link only reading takes longer.
            let beside = experts as f64 * bytes / self.cpu.expert_gbs_beside.value;
            let alone = self.cpu.start_ns.value + read.max(computed);
            tier.compute(alone, (self.cpu.start_ns.value + beside.max(computed)) / alone);
        }
        let now_ns = tier.now_ns();
        tier.stall.cpu_ns += now_ns.saturating_sub(gpu_until.max(began_ns));
        let ns = now_ns - there_ns;
        let busy_ns = drive.link_busy_ns().min(ns);
        HostWork { experts, tokens, ns, busy_ns, is_roused: false, told_ns: None }
    }
}
