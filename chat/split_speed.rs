//! How fast a model can be decoded whose experts a GPU and the processor
//! share: what is measured, and what is said of it.

use crate::{
    device::{self, Gpu},
    exit::Failure,
    expert_speed::{self, AT_ONCE, Experts, Line, Shape, USUAL},
    link_speed::{self, LinkSpeed},
    output::bytes,
    plan::{GpuPlan, Planned},
};
use pregate_kernels::Backend;
use pregate_predictor::roofline::{self, Bring, Hits, LayerLoad, Part, Prediction};
use pregate_runtime::{OpenedModel, model::Misses};
use serde::Serialize;

/// What was measured of this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// The GPU reading its own memory, GB/s.
    pub gpu_read_gb_s: f64,
    /// The experts that were computed.
    pub experts: Shape,
    pub cpu: Line,
    pub link: LinkSpeed,
    /// The tests' stand-in, whose times mean nothing.
    pub is_standin: bool,
}

impl Facts {
    /// Takes a second or two; `gpu_read_gb_s` is known.
    pub fn measure(
        gpu: &Gpu,
        gpu_read_gb_s: f64,
        backend: &dyn Backend,
        model: &OpenedModel,
    ) -> Result<Self, Failure> {
        let failed = |error: pregate_kernels::cuda::CudaError| Failure::Runtime(error.into());
        let pool = expert_speed::pool()?;
        let fits = |shape: &Shape| AT_ONCE * shape.bytes() <= pool.bytes().len() / 2;
        let shape = of_model(model).filter(fits).unwrap_or(USUAL);
        let (cpu, _) = expert_speed::line(backend, &pool, shape)?;
        let mut experts = Experts::new(shape, pool.bytes(), AT_ONCE)?;
        let link =
            link_speed::measure(&gpu.device, backend, &mut experts, AT_ONCE).map_err(failed)?;
        let is_standin = device::is_standin(gpu.device.info());
        Ok(Self { gpu_read_gb_s, experts: shape, cpu, link, is_standin })
    }

    /// As predictions take it, and the split of misses.
    pub fn machine(&self) -> roofline::Machine {
        self.link.machine(self.gpu_read_gb_s, &self.cpu)
    }
}

/// The experts of the first layer that has some.
fn of_model(model: &OpenedModel) -> Option<Shape> {
    let (_, moe) = model.weights().moe_layers().next()?;
    let expert = moe.experts.first()?.view(model.files());
    let shape = Shape {
        of: "this model",
        hidden: expert.gate.cols(),
        inner: expert.gate.rows(),
        gate_up: expert.gate.format(),
        down: expert.down.format(),
    };
    (shape.bytes() > 0).then_some(shape)
}

/// What is expected of a token; the fields of `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct SplitSpeed {
    pub predicted_tok_s: f64,
    /// "GPU", "processor", "link" or "way between GPU and host".
    pub binds: &'static str,
    pub hit_ratio: f64,
    /// Whether this is what a run had; else what uniform routing would have.
    pub hits_measured: bool,
    /// Weights that a token reads or moves.
    pub gpu_bytes_per_token: u64,
    pub cpu_bytes_per_token: u64,
    pub link_bytes_per_token: u64,
    /// What each part alone would allow; `null`: it has nothing to do.
    pub gpu_allows_tok_s: Option<f64>,
    pub cpu_allows_tok_s: Option<f64>,
    pub link_allows_tok_s: Option<f64>,
    pub visits_allow_tok_s: Option<f64>,
    /// Were all experts on the GPU.
    pub all_on_gpu_tok_s: f64,
    pub facts: Facts,
}

impl SplitSpeed {
    fn new(found: &Prediction, hits: Hits, facts: &Facts) -> Self {
        Self {
            predicted_tok_s: found.tok_s(),
            hits_measured: hits != Hits::Uniform,
            binds: found.binds().name(),
            hit_ratio: found.hit_ratio,
            gpu_bytes_per_token: found.gpu_bytes.round() as u64,
            cpu_bytes_per_token: found.cpu_bytes.round() as u64,
            link_bytes_per_token: found.link_bytes.round() as u64,
            gpu_allows_tok_s: found.allows(Part::Gpu),
            cpu_allows_tok_s: found.allows(Part::Cpu),
            link_allows_tok_s: found.allows(Part::Link),
            visits_allow_tok_s: found.allows(Part::Visits),
            all_on_gpu_tok_s: 1e9 / found.all_on_gpu_ns,
            facts: facts.clone(),
        }
    }
}

/// `bytes_per_token` are a token's weights with all its experts.
pub fn predict(
    planned: &Planned,
    gpu: &GpuPlan,
    misses: Misses,
    bytes_per_token: u64,
    hits: Hits,
    facts: &Facts,
) -> SplitSpeed {
    let layers = planned.sizes.shape.moe();
    let layers: Vec<LayerLoad> = layers
        .map(|(index, layer)| LayerLoad {
            experts: layer.experts,
            top_k: layer.top_k,
            there: (gpu.fixed[index] + gpu.slots[index]).min(layer.experts),
            expert_bytes: layer.expert_bytes,
        })
        .collect();
    let routed: u64 = layers.iter().map(|layer| layer.top_k as u64 * layer.expert_bytes).sum();
    let bring = match misses {
        // Experts that never move are computed where they are.
        _ if !gpu.share.moves() => Bring::Cpu,
        Misses::Host => Bring::Cpu,
        Misses::Copied => Bring::Link,
        Misses::Auto => Bring::Best,
    };
    let machine = facts.machine();
    let dense = bytes_per_token.saturating_sub(routed);
    let found = roofline::predict(dense, &layers, hits, bring, &machine);
    SplitSpeed::new(&found, hits, facts)
}

/// Label and text of each line.
pub fn lines(speed: &SplitSpeed) -> Vec<(&'static str, String)> {
    let Facts { gpu_read_gb_s, cpu, link, .. } = &speed.facts;
    let hits = if speed.hits_measured { "as measured" } else { "if routing is uniform" };
    let mut lines = vec![
        ("hit ratio", format!("{:.1} % {hits}", speed.hit_ratio * 100.0)),
        (
            "read per token",
            format!(
                "{} by the GPU, {} by the processor, {} over the link",
                bytes(speed.gpu_bytes_per_token),
                bytes(speed.cpu_bytes_per_token),
                bytes(speed.link_bytes_per_token)
            ),
        ),
    ];
    let mut add = |label, allows: Option<f64>, why: String| {
        lines.extend(allows.map(|tok_s| (label, format!("{tok_s:.1} tok/s ({why})"))));
    };
    add(
        "GPU allows",
        speed.gpu_allows_tok_s,
        format!("{gpu_read_gb_s:.1} GB/s; with all experts there {:.1}", speed.all_on_gpu_tok_s),
    );
    add(
        "processor allows",
        speed.cpu_allows_tok_s,
        format!(
            "experts at {:.1} GB/s, {:.1} beside copies, {:.0} us to start",
            cpu.gb_s, link.both.cpu_gb_s, cpu.start_us
        ),
    );
    let from = if link.pinned_gb_s.is_some() { "page-locked" } else { "pageable" };
    add(
        "link allows",
        speed.link_allows_tok_s,
        format!(
            "{:.1} GB/s from {from} memory, {:.1} beside the processor, {:.0} us to start",
            link.copy_gb_s(),
            link.both.link_gb_s,
            link.copy_us
        ),
    );
    add(
        "visits allow",
        speed.visits_allow_tok_s,
        format!("{:.0} us in each layer that misses experts", link.visit_us),
    );
    let found = format!("{:.1} tok/s without prefetch; {}", speed.predicted_tok_s, binds(speed));
    lines.push(("prediction", found));
    lines
}

/// "44.1 tok/s with 36.5 % of the experts on the GPU; the link binds".
pub fn in_short(speed: &SplitSpeed) -> String {
    let (tok_s, hits) = (speed.predicted_tok_s, speed.hit_ratio * 100.0);
    format!("{tok_s:.1} tok/s with {hits:.1} % of the experts on the GPU; {}", binds(speed))
}

fn binds(speed: &SplitSpeed) -> String {
    let standin = match speed.facts.is_standin {
        true => "; a stand-in for a GPU: its times mean nothing",
        false => "",
    };
    format!("the {} binds{standin}", speed.binds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link_speed::Both;

    fn facts() -> Facts {
        let link = LinkSpeed {
            pinned_gb_s: Some(20.0),
            pin_refused: None,
            pageable_gb_s: 9.0,
            copy_us: 10.0,
            visit_us: 5.0,
            both: Both { cpu_gb_s: 30.0, link_gb_s: 18.0 },
        };
        let cpu = Line { gb_s: 40.0, start_us: 2.0, measured_gb_s: 40.0 };
        Facts { gpu_read_gb_s: 800.0, experts: USUAL, cpu, link, is_standin: false }
    }

    #[test]
    fn every_part_that_works_has_a_line_with_its_figures() {
        let facts = facts();
        let layer = LayerLoad { experts: 8, top_k: 2, there: 4, expert_bytes: 4_000_000 };
        let machine = facts.link.machine(facts.gpu_read_gb_s, &facts.cpu);
        let of = |bring| {
            let found = roofline::predict(80_000_000, &[layer; 8], Hits::Uniform, bring, &machine);
            SplitSpeed::new(&found, Hits::Uniform, &facts)
        };
        let speed = of(Bring::Cpu);
        assert_eq!((speed.hit_ratio, speed.link_allows_tok_s), (0.5, None));
        assert_eq!((speed.cpu_bytes_per_token, speed.link_bytes_per_token), (32_000_000, 0));
        let lines = |speed: &SplitSpeed| -> Vec<&'static str> {
            super::lines(speed).into_iter().map(|(label, _)| label).collect()
        };
        let [hit, read, gpu, cpu, visits, end] = lines(&speed)[..] else { panic!("{speed:?}") };
        assert_eq!(
            [hit, read, gpu, cpu],
            ["hit ratio", "read per token", "GPU allows", "processor allows"]
        );
        assert_eq!([visits, end], ["visits allow", "prediction"]);
        let text = format!("{:?}", super::lines(&speed));
        for words in
            ["50.0 %", "800.0 GB/s", "40.0 GB/s, 30.0 beside", "2 us to start", "processor binds"]
        {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(!text.contains("stand-in") && text.contains("if routing is uniform"));
        assert!(in_short(&speed).contains("with 50.0 % of the experts on the GPU; the processor"));
        let measured = SplitSpeed { hits_measured: true, ..speed };
        assert!(format!("{:?}", super::lines(&measured)).contains("50.0 % as measured"));
        let copied = of(Bring::Link);
        assert!(lines(&copied).contains(&"link allows") && copied.cpu_allows_tok_s.is_none());
        let facts = Facts { is_standin: true, ..facts.clone() };
        let standin = format!("{:?}", super::lines(&SplitSpeed { facts, ..copied }));
        assert!(standin.contains("mean nothing") && standin.contains("20.0 GB/s from page-locked"));
    }
}
