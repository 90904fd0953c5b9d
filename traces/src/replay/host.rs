//! The host beside a GPU: computes some of the misses, has others copied.

use super::engine::cpu_ns;
use super::machine::{Cpu, Gpu, Link};
use super::options::Misses;
use super::tier::VirtualTier;
use pregate_predictor::drive::{Drive, Missing, Tier};
use pregate_predictor::split::{
    Asked, Choice, Chunk, ChunkOutcome, Miss, Options, Outcome, Place, Seed, Split,
};
use pregate_predictor::{ExpertId, Shape};

/// Multiply-adds of a token with so many bytes of weights: 4.5 bits each, what
/// files of models larger than memory have.
pub fn macs(bytes: f64) -> f64 {
    bytes * 8.0 / 4.5
}

/// The runtime's split of misses, and what its answers take.
pub struct Host {
    pub split: Split,
    shape: Shape,
    gpu: Gpu,
    cpu: Cpu,
    misses: Misses,
    slots: Vec<usize>,
    choice: Choice,
    chunk: Chunk,
    /// Scratch.
    list: Vec<Miss>,
    tokens: Vec<u32>,
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
            split: Split::new(shape, &seed, Options::default()),
            shape: shape.clone(),
            gpu: gpu.clone(),
            cpu: cpu.clone(),
            misses,
            slots: slots.to_vec(),
            choice: Choice::default(),
            chunk: Chunk::default(),
            list: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// Of what is missing, what the host computes. `bounded`: no frame becomes
    /// free before the layer has ended.
    pub fn leave(
        &mut self,
        missing: &Missing<'_>,
        counts: &[u32],
        (tokens, bounded): (usize, bool),
    ) -> Vec<ExpertId> {
        let &Missing { layer, missing: ids, free, .. } = missing;
        let most = if bounded { free } else { ids.len() };
        match self.misses {
            Misses::Cpu => return ids.to_vec(),
            Misses::Link => return ids[most.min(ids.len())..].to_vec(),
            Misses::Auto => {}
        }
        let Self { split, choice, chunk, list, .. } = self;
        if tokens > 1 {
            self.tokens.clear();
            self.tokens.extend(ids.iter().map(|id| counts[id.expert()]));
            split.choose_chunk(layer, &self.tokens, 0, chunk);
            let all = ids.iter().zip(&chunk.places);
            return all.filter(|(_, place)| **place == Place::Cpu).map(|(id, _)| *id).collect();
        }
        list.clear();
        list.extend(ids.iter().map(|id| Miss { expert: id.expert, remaining_ns: None }));
        let resident = self.slots[layer];
        let asked =
            Asked { layer, misses: list, resident, frames: most, queue_ns: 0, hidden_ns: 0 };
        split.choose(&asked, choice);
        let mut copies = 0;
        let is_left = |(id, place): (&ExpertId, &Place)| {
            copies += usize::from(*place != Place::Cpu);
            (*place == Place::Cpu || copies > most).then_some(*id)
        };
        ids.iter().zip(&choice.places).filter_map(is_left).collect()
    }

    /// From the decision to the last row of the layer.
    pub fn serve(
        &mut self,
        drive: &mut Drive<VirtualTier>,
        layer: usize,
        counts: &[u32],
        tokens: usize,
    ) {
        let bytes = self.shape.layer(layer).map_or(0, |layer| layer.expert_bytes) as f64;
        let began_ns = drive.tier().now_ns();
        let mut gpu_until = began_ns;
        if drive.open().has_ready() {
            let Ok(handed) = drive.more(u64::MAX, &mut || Ok(()));
            gpu_until += self.gpu_ns(bytes, handed, counts);
            drive.settle();
        }
        let cpu_ns = self.compute(drive, (layer, bytes), counts, gpu_until);
        loop {
            drive.tier_mut().hidden_until_ns = gpu_until;
            let Ok(handed) = drive.more(u64::MAX, &mut || Ok(()));
            if handed.is_empty() {
                break;
            }
            let ns = self.gpu_ns(bytes, handed, counts);
            gpu_until = gpu_until.max(drive.tier().now_ns()) + ns;
            drive.settle();
        }
        let request = drive.open().request();
        let visits = !request.missing.is_empty() || !request.in_flight.is_empty();
        let tier = drive.tier_mut();
        tier.work(gpu_until.saturating_sub(tier.now_ns()));
        if visits {
            let visit_ns = self.gpu.visit_ns.value as u64;
            tier.stall.visits_ns += visit_ns;
            tier.work(visit_ns);
        }
        self.learn(drive, (layer, tokens), counts, cpu_ns);
    }

    /// What the GPU takes for experts that are there.
    fn gpu_ns(&self, bytes: f64, experts: &[ExpertId], counts: &[u32]) -> u64 {
        let uses: u64 = experts.iter().map(|id| u64::from(counts[id.expert()])).sum();
        let read = experts.len() as f64 * bytes / self.gpu.vram_gbs.value;
        // A token's are read once each; more meet the same bytes.
        let computed = macs(bytes) * uses as f64 / self.gpu.gmacs.value;
        read.max(computed) as u64
    }

    /// The CPU computes what was left to it; the time that it took.
    fn compute(
        &mut self,
        drive: &mut Drive<VirtualTier>,
        (layer, bytes): (usize, f64),
        counts: &[u32],
        gpu_until: u64,
    ) -> u64 {
        let left = drive.open().left();
        if left.is_empty() {
            return 0;
        }
        let (many, mut uses) = (left.len() as f64, 0);
        let mut experts: Vec<ExpertId> = Vec::with_capacity(left.len());
        experts.extend_from_slice(left);
        let tier = drive.tier_mut();
        let began_ns = tier.now_ns();
        let mut there_ns = began_ns;
        for id in experts {
            debug_assert_eq!(id.layer(), layer);
            uses += u64::from(counts[id.expert()]);
            there_ns = there_ns.max(tier.in_ram_ns(id));
        }
        let ns = cpu_ns(&self.cpu, (bytes, many), uses, tier.is_busy()) + there_ns - began_ns;
        tier.cpu_until_ns = began_ns + ns;
        let waited = (began_ns + ns).saturating_sub(gpu_until.max(began_ns));
        tier.stall.cpu_ns += waited;
        tier.work(ns);
        ns
    }

    /// Tells the split what its decision led to, as the runtime does.
    fn learn(
        &mut self,
        drive: &mut Drive<VirtualTier>,
        (layer, tokens): (usize, usize),
        counts: &[u32],
        cpu_ns: u64,
    ) {
        let open = drive.open();
        let (cpu, (copies, copy_ns)) = (open.left().len(), open.copied());
        if self.misses.is_auto() && cpu + copies > 0 {
            if tokens > 1 {
                let of = |id: &ExpertId| counts[id.expert()] as usize;
                let cpu_tokens = open.left().iter().map(of).sum();
                let told = ChunkOutcome { cpu, cpu_tokens, cpu_ns, copies, copy_ns };
                self.split.measured_chunk(layer, &told);
            } else {
                let wall_ns = cpu_ns.max(copy_ns);
                let told = Outcome { cpu, cpu_ns, copies, copy_ns, wall_ns, ..Outcome::default() };
                self.split.measured(layer, &told);
            }
        }
        for (id, admission) in open.admitted() {
            self.split.admitted(layer, id.expert, admission);
        }
    }
}
