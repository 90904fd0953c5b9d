//! Divides the memory before any large part of it is taken, and says how.

use crate::{
    device::{Device, GpuBudget, parts_line},
    exit::Failure,
    memory,
    output::bytes,
    roofline::LayerLoad,
    size::Size,
    streaming::{MemoryArgs, StreamingArgs, predictor_words},
};
use pregate_kernels::cuda::CudaError;
use pregate_runtime::{
    Error, Model, OpenedModel, Residency, SessionOptions, Streaming,
    budget::{self, Chunk, Parts, Placement, Plan, Request, Sizes},
    forward::cache::cache_bytes,
    gpu::{DiskShare, GpuParts, GpuRoom, GpuShare, HostTooSmall, NoShare, host_scratch_bytes},
    store::disk::DiskReport,
};
use serde::Serialize;

/// What a command will do with a model.
#[derive(Clone, Debug)]
pub struct Needs {
    /// `None`: what is free, less a reserve.
    pub ram: Option<Size>,
    pub streaming: StreamingArgs,
    pub session: SessionOptions,
    /// Logits that a pass is asked for: 1, or those of all its tokens.
    pub logit_rows: usize,
}

impl Needs {
    pub fn new(memory: &MemoryArgs, session: SessionOptions) -> Self {
        let MemoryArgs { ram, streaming } = memory.clone();
        Self { ram, streaming, session, logit_rows: 1 }
    }
}

/// A plan and what it rests on.
pub struct Planned {
    pub plan: Plan,
    pub sizes: Sizes,
    /// Where the budget comes from, for people.
    pub source: String,
    /// Positions of a session.
    pub context: usize,
    pub streaming: StreamingArgs,
    /// What a GPU holds, if one computes: all weights; then the plan is that
    /// of what is left for the host.
    pub gpu: Option<GpuPlan>,
}

/// What goes where in a GPU's memory.
#[derive(Clone, Debug, Serialize)]
pub struct GpuPlan {
    pub parts: GpuParts,
    pub budget_bytes: u64,
    /// Experts that stay on the device, per layer of the model.
    pub fixed: Vec<usize>,
    /// Slots that the other experts come to, per layer of the model; none
    /// where the processor computes all of them.
    pub slots: Vec<usize>,
    /// Further frames of each size, which experts come to first.
    pub ring: usize,
    /// Of the experts that do not stay there, on the host: all, or those that
    /// are not read from disk, and frames for these.
    pub host_bytes: u64,
    /// What is read from disk; `null` where the host has all.
    pub disk: Option<DiskShare>,
    /// Tokens of a prompt that go through the layers together.
    pub prefill_chunk: usize,
    #[serde(skip)]
    pub budget: GpuBudget,
    #[serde(skip)]
    pub share: GpuShare,
    /// Experts that can be on the device at once, and of the model.
    #[serde(skip)]
    pub experts: (usize, usize),
}

impl GpuPlan {
    /// See [`parts_line`].
    pub fn parts_line(&self, context: usize) -> String {
        let parts = parts_line(&self.parts, Some(self.experts), Some(context));
        format!("{parts} (prompts in passes of {} tokens)", self.prefill_chunk.min(context))
    }
}

/// What the process will hold of its own beyond what it holds when the plan
/// is made: thread stacks, the conversation, the allocator's rests.
const GROWTH_BYTES: u64 = 16 << 20;
/// What a process holds where the system does not say.
const USUAL_BYTES: u64 = 32 << 20;

/// Plans for `model`, whose weights are still on disk.
pub fn make(model: &OpenedModel, device: &Device, needs: &Needs) -> Result<Planned, Failure> {
    make_within(model, device, needs, device.gpu.as_ref().map(|gpu| gpu.budget))
}

/// The next smaller plan, after the GPU refused memory to `before`: fewer
/// experts on it, at last none.
pub fn make_smaller(
    model: &OpenedModel,
    device: &Device,
    needs: &Needs,
    before: &Planned,
    refused: &CudaError,
) -> Result<Planned, Failure> {
    let Some((gpu, plan)) = device.gpu.as_ref().zip(before.gpu.as_ref()) else {
        return Err(Error::Cuda(refused.clone()).into());
    };
    let (free_bytes, _) = gpu.device.memory().map_err(Error::Cuda)?;
    let Some(budget) = plan.budget.below(&plan.parts, free_bytes) else {
        return Err(Failure::Resources(format!(
            "--device cuda: {refused}; the smallest share of the model that works on a GPU needs \
             {} MiB of its memory ({}), and {} MiB are free: a shorter --context helps, or \
             --device cpu",
            plan.parts.total().div_ceil(1 << 20),
            plan.parts_line(before.context),
            free_bytes >> 20,
        )));
    };
    make_within(model, device, needs, Some(budget))
}

/// Passes of a prompt over more tokens than usual, the most first.
const LONG_PASSES: [usize; 2] = [2048, 1024];
/// As many of these buffers as GPU memory divided by this are worth it.
const PASS_SHARE: u64 = 16;

/// Where experts are copied to the GPU while it computes, the tokens of a pass
/// share the copies: it takes as many as have room.
fn make_within(
    model: &OpenedModel,
    device: &Device,
    needs: &Needs,
    gpu_budget: Option<GpuBudget>,
) -> Result<Planned, Failure> {
    let usual = make_with(model, device, needs, gpu_budget)?;
    let moves = |planned: &Planned| planned.gpu.as_ref().is_some_and(|gpu| gpu.share.moves());
    let asked = needs.session.prefill_chunk;
    if !moves(&usual) || asked != SessionOptions::default().prefill_chunk {
        return Ok(usual);
    }
    let longer = LONG_PASSES.into_iter().filter(|tokens| tokens / 2 < usual.context);
    let with = |prefill_chunk| {
        let session = SessionOptions { prefill_chunk, ..needs.session };
        make_with(model, device, &Needs { session, ..needs.clone() }, gpu_budget).ok()
    };
    let is_small = |planned: &Planned| {
        let room = |gpu: &GpuPlan| gpu.parts.scratch_bytes <= gpu.budget_bytes / PASS_SHARE;
        moves(planned) && planned.gpu.as_ref().is_some_and(room)
    };
    Ok(longer.filter_map(with).find(is_small).unwrap_or(usual))
}

fn make_with(
    model: &OpenedModel,
    device: &Device,
    needs: &Needs,
    gpu_budget: Option<GpuBudget>,
) -> Result<Planned, Failure> {
    let context = needs.session.positions(model.description())?;
    let sizes = Sizes::of(model);
    let held = memory::held_bytes().unwrap_or(USUAL_BYTES);
    let (budget_bytes, source) = match needs.ram {
        Some(size) => (size.of(sizes.whole_bytes), asked_for(size, sizes.whole_bytes)),
        None => default_budget(held),
    };
    let tokens = needs.session.prefill_chunk.min(context);
    let chunk = Chunk {
        tokens,
        logit_rows: needs.logit_rows.min(tokens),
        context,
        threads: device.threads,
    };
    let mut request = Request {
        budget_bytes,
        process_bytes: held + GROWTH_BYTES,
        kv_bytes: cache_bytes(model.description(), context, needs.session.kv),
        scratch_bytes: budget::scratch_bytes(model.description(), model.weights(), chunk),
        ring: needs.streaming.ring,
    };
    let mut on_host = sizes.clone();
    let mut gpu_plan = None;
    if let Some(budget) = gpu_budget {
        // The host keeps what it sends and gets, and the experts that do not
        // stay on the GPU; other weights pass through its page cache.
        let (session, rows) = (&needs.session, chunk.logit_rows);
        let sent = host_scratch_bytes(model.description(), session, context, rows) + STAGING_BYTES;
        let beside = request.process_bytes + sent + request.scratch_bytes;
        let room = GpuRoom {
            vram_bytes: budget.bytes(),
            host_bytes: budget_bytes.saturating_sub(beside),
            ring: needs.streaming.ring,
        };
        let plan = on_gpu(model, budget, needs, context, room)?;
        on_host.whole_bytes = plan.host_bytes;
        request.kv_bytes = 0;
        request.scratch_bytes = sent + if plan.host_bytes == 0 { 0 } else { request.scratch_bytes };
        gpu_plan = Some(plan);
    }
    let plan = budget::divide(&on_host, &request)
        .map_err(|error| Failure::Resources(format!("{source}: {error} (--ram, --context)")))?;
    if gpu_plan.is_some() && !plan.is_whole() {
        return Err(Failure::Resources(format!(
            "--device cuda: the experts that the GPU has no room for take {} of memory, which is \
             more than {source} leaves: --device cpu streams them from disk",
            bytes(on_host.whole_bytes)
        )));
    }
    let streaming = needs.streaming.clone();
    Ok(Planned { plan, sizes, source, context, streaming, gpu: gpu_plan })
}

/// What a GPU's driver keeps of this process's memory for copies.
const STAGING_BYTES: u64 = 16 << 20;

fn on_gpu(
    model: &OpenedModel,
    budget: GpuBudget,
    needs: &Needs,
    context: usize,
    room: GpuRoom,
) -> Result<GpuPlan, Failure> {
    let (description, weights) = (model.description(), model.weights());
    let session = (context, &needs.session);
    let share = GpuShare::of(model.files(), description, weights, session, room);
    let share = share.map_err(|none| match none {
        NoShare::Device(smallest) => budget.too_small(&smallest),
        NoShare::Host(HostTooSmall { needed_bytes, room_bytes }) => Failure::Resources(format!(
            "--device cuda: neither the GPU nor this machine's memory has room for all \
                 experts; those that come from disk need frames of {} in memory, {} more than is \
                 left for them (--ram, --context)",
            bytes(needed_bytes),
            bytes(needed_bytes - room_bytes),
        )),
    })?;
    let all = description.moe_layers().map(|(_, moe)| moe.experts).sum();
    let there = share.fixed.iter().chain(&share.slots).sum();
    let GpuShare { parts, ref fixed, ref slots, ring, host_bytes, ref disk } = share;
    Ok(GpuPlan {
        parts,
        budget_bytes: budget.bytes(),
        fixed: fixed.clone(),
        slots: slots.clone(),
        ring,
        host_bytes,
        disk: disk.clone(),
        prefill_chunk: needs.session.prefill_chunk,
        budget,
        share,
        experts: (there, all),
    })
}

fn asked_for(size: Size, model_bytes: u64) -> String {
    match size {
        Size::Bytes(count) => format!("--ram of {}", bytes(count)),
        Size::Share(share) => {
            format!("--ram of {}% of the model's {}", share * 100.0, bytes(model_bytes))
        }
    }
}

/// What is free and what this process holds already, less a tenth for
/// everybody else, at least 256 MiB, at most 2 GiB.
fn default_budget(held: u64) -> (u64, String) {
    let available = memory::available();
    if available.bytes == u64::MAX {
        return (u64::MAX, "this system does not say what is free".to_string());
    }
    let reserve = reserve(available.bytes);
    let source = format!(
        "{} by {}, less a reserve of {}",
        bytes(available.bytes),
        available.according_to,
        bytes(reserve)
    );
    (available.bytes - reserve + held, source)
}

/// What is left to everybody else of so much free memory.
pub fn reserve(free_bytes: u64) -> u64 {
    (free_bytes / 10).clamp(256 << 20, 2 << 30).min(free_bytes / 2)
}

/// "900 experts on disk behind 40 + 12 frames, 1.1 GB".
pub fn disk_words(disk: &DiskShare) -> String {
    let frames: Vec<String> = disk.frames.iter().map(usize::to_string).collect();
    format!(
        "{} experts on disk behind {} frames, {}",
        disk.on_disk,
        frames.join(" + "),
        bytes(disk.frames_bytes)
    )
}

/// How experts are read, and how fast, as measured.
pub fn disk_line(disk: &DiskReport) -> String {
    let speed = disk.measured.map_or_else(
        || ", too little to measure".to_string(),
        |measured| format!(", {:.2} GB/s", measured.bytes_per_second() / 1e9),
    );
    let refused: String = disk.refused.iter().map(|why| format!(" (not {why})")).collect();
    format!("{}{speed}{refused}", disk.words)
}

impl Planned {
    /// Says on standard error what goes where.
    pub fn announce(&self) {
        if let Some(gpu) = &self.gpu {
            eprintln!("GPU memory: {}: {}", gpu.budget.words(), gpu.parts_line(self.context));
        }
        eprintln!("{}", self.summary());
        self.notes();
    }

    /// Says on standard error which wishes the plan does not follow.
    pub fn notes(&self) {
        let note = match &self.plan.placement {
            Placement::Whole if self.gpu.as_ref().is_some_and(|gpu| gpu.share.moves()) => {
                let given = self.streaming.disk.is_some() && self.on_disk().is_none();
                given.then(|| "experts come from memory: --disk has no effect".to_string())
            }
            Placement::Whole if self.is_split() => {
                self.streaming.without_effect("no expert leaves its place: the GPU has no room")
            }
            Placement::Whole => self.streaming.without_effect("the whole model fits in memory"),
            Placement::Streaming { ring, .. } => {
                let short = self.streaming.ring.filter(|asked| asked > ring);
                short.map(|asked| format!("--ring {asked}: there is memory for {ring}"))
            }
        };
        note.iter().for_each(|note| eprintln!("note: {note}"));
        if self.streaming.predictor.is_some() && self.is_fixed_in_part() {
            eprintln!(
                "note: --predictor has no effect: it was trained for all experts of a layer, and \
                 some stay on the GPU for good"
            );
        }
    }

    /// Some experts come and go on a GPU, and others stay there for good.
    fn is_fixed_in_part(&self) -> bool {
        let moving = self.gpu.as_ref().filter(|gpu| gpu.share.moves());
        moving.is_some_and(|gpu| gpu.fixed.iter().any(|&fixed| fixed > 0))
    }

    /// Says on standard error what a file of `--predictor` is used for in
    /// `model`; [`Planned::notes`] said where it is not.
    pub fn predictor_note(&self, model: &Model) {
        let file = self.streaming.predictor.as_ref().filter(|_| !self.is_fixed_in_part());
        if let Some(file) = file.filter(|_| model.store().is_some()) {
            let Streaming { policy, forecast, .. } = self.streaming.streaming();
            let words = predictor_words(&file.trained, &[forecast], &[policy]);
            eprintln!("predictor: {words}");
        }
    }

    /// What to load the model with.
    pub fn residency(&self, device: &Device) -> Residency {
        if let Some((gpu, plan)) = device.gpu.as_ref().zip(self.gpu.as_ref()) {
            let experts = plan.share.experts(self.streaming.streaming(), gpu.misses);
            return Residency::Gpu { device: gpu.device.clone(), experts };
        }
        self.plan.residency_with(self.streaming.streaming())
    }

    /// The plan in a line or two.
    fn summary(&self) -> String {
        let Parts {
            process_bytes,
            weights_bytes,
            kv_bytes,
            scratch_bytes,
            slots_bytes,
            ring_bytes,
        } = self.plan.parts;
        let rest = format!(
            "KV cache for {} tokens {}, scratch {}, program {}",
            self.context,
            bytes(kv_bytes),
            bytes(scratch_bytes),
            bytes(process_bytes),
        );
        let budget = match self.plan.budget_bytes {
            u64::MAX => self.source.clone(),
            known => format!("{} ({})", bytes(known), self.source),
        };
        match &self.plan.placement {
            Placement::Whole if self.gpu.is_some() => {
                let disk = self.on_disk().map(disk_words);
                format!(
                    "memory: {budget}: experts {}, scratch {}, program {}{}",
                    bytes(weights_bytes),
                    bytes(scratch_bytes),
                    bytes(process_bytes),
                    disk.map_or(String::new(), |disk| format!("; {disk}")),
                )
            }
            Placement::Whole => {
                format!("memory: {budget}: all weights {}, {rest}", bytes(weights_bytes))
            }
            Placement::Streaming { ring, .. } => format!(
                "memory: {budget}: weights without experts {}, {rest}\n        experts from disk: \
                 {} in slots, {}; ring of {ring} more, {}",
                bytes(weights_bytes),
                self.slots(),
                bytes(slots_bytes),
                bytes(ring_bytes),
            ),
        }
    }

    /// Experts that neither a GPU nor the host keeps, if there are some.
    pub fn on_disk(&self) -> Option<&DiskShare> {
        self.gpu.as_ref()?.disk.as_ref()
    }

    /// Whether a GPU and the processor share the experts: then no one memory
    /// says how fast they are read.
    pub fn is_split(&self) -> bool {
        self.gpu.as_ref().is_some_and(|gpu| !gpu.share.is_whole())
    }

    /// "gpu", "whole" or "streaming".
    pub fn placement(&self) -> &'static str {
        match (&self.gpu, self.plan.is_whole()) {
            (Some(_), _) => "gpu",
            (None, true) => "whole",
            (None, false) => "streaming",
        }
    }

    /// "8 to 9 of 64 in each layer (13 %)".
    pub fn slots(&self) -> String {
        let loads = self.loads();
        let range = |of: fn(&LayerLoad) -> usize| {
            let least = loads.iter().map(of).min().unwrap_or(0);
            let most = loads.iter().map(of).max().unwrap_or(0);
            if least == most { least.to_string() } else { format!("{least} to {most}") }
        };
        let sum = |of: fn(&LayerLoad) -> usize| loads.iter().map(of).sum::<usize>() as f64;
        format!(
            "{} of {} in each layer ({:.0} %)",
            range(|load| load.slots),
            range(|load| load.experts),
            sum(|load| load.slots) / sum(|load| load.experts).max(1.0) * 100.0,
        )
    }

    /// The MoE layers, in the order of the model.
    pub fn loads(&self) -> Vec<LayerLoad> {
        let slots = self.plan.slots();
        let load = |(index, layer): (usize, &pregate_predictor::LayerShape)| LayerLoad {
            experts: layer.experts,
            top_k: layer.top_k,
            slots: slots.map_or(layer.experts, |slots| slots[index]),
            expert_bytes: layer.expert_bytes,
        };
        self.sizes.shape.moe().map(load).collect()
    }
}
