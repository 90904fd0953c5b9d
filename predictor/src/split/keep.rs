//! Whether an expert that the CPU computes comes to VRAM for later tokens.
//!
//! A miss that the CPU computes does not enter VRAM by itself. What it would
//! save there is known ([`super::reuse`]); what its copy costs, as nobody
//! waits for it, is what it takes from others:
//!
//! - the CPU, which reads the same memory: while the copy moves, the CPU is
//!   slower by what both at once were measured to be, for the share of the
//!   time in which it works;
//! - demands that come meanwhile, which wait for the chunks that are with the
//!   device already, as often as layers order copies.
//!
//! What is worth more than that is kept, as far as there is idle link time and
//! a frame; the share that gets both is learned, and what it will bring counts
//! for the CPU where it and a copy at once are compared (`class.rs`).

use super::Class;
use super::way::{CPU, DISASTER, Mean};

/// Experts that were worth keeping, of which the share that was kept is the
/// mean.
const SHARE_MEMORY: f64 = 64.0;

/// What a layer's CPU work leaves to be kept.
#[derive(Clone, Copy, Debug)]
pub struct Spare<'a> {
    /// Counted over all layers of the model.
    pub layer: usize,
    /// The experts that the CPU computes.
    pub computed: &'a [u32],
    /// Copies that could begin now with nobody waiting for the link: free
    /// frames beyond those that demands will want.
    pub frames: usize,
    /// The share of the time, lately, in which the CPU computed experts,
    /// 0..=1.
    pub cpu_share: f64,
}

/// An expert that is worth a copy which nobody waits for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Keep {
    pub expert: u32,
    /// What its next use saves, in ns: the price of a miss.
    pub saves_ns: u64,
}

/// What a class knows of keeping.
#[derive(Clone, Debug, Default)]
pub struct Keeping {
    /// Of what was worth it, the share that was kept.
    share: Mean,
    /// Decisions that ordered copies, as a share of all.
    ordered: Mean,
    /// As told last.
    cpu_share: f64,
}

impl Class {
    /// A decision ordered copies, or none.
    pub fn ordered(&mut self, any: bool) {
        self.keeping.ordered.note_within(f64::from(u8::from(any)), SHARE_MEMORY);
    }

    /// What a copy costs that nobody waits for, in ns; infinite where both at
    /// once are a disaster.
    fn keep_ns(&self, layer: usize) -> f64 {
        let slower = self.cpu.slower();
        let is_left = self.trials().is_left(CPU, true);
        if slower >= DISASTER || is_left {
            return f64::INFINITY;
        }
        let copy_ns = self.link.alone(layer, 1);
        let from_cpu = copy_ns * (1.0 - 1.0 / slower) * self.keeping.cpu_share;
        // Chunk by chunk all of it may be in somebody's way.
        from_cpu + copy_ns * self.keeping.ordered.mean
    }

    /// Is an expert that saves so many misses worth a copy that nobody waits
    /// for? The answer is what it brings, in ns.
    fn worth_ns(&self, layer: usize, gain: f64) -> f64 {
        gain * self.miss_ns(layer) - self.keep_ns(layer)
    }

    /// What an expert that the CPU computes will bring by being kept, as far
    /// as such experts are.
    pub fn kept_ns(&self, layer: usize, gain: f64) -> f64 {
        let share = self.keeping.share.mean;
        if share > 0.0 { share * self.worth_ns(layer, gain).max(0.0) } else { 0.0 }
    }

    /// Picks of `gains` (of experts, any order) what is kept in `layer` of the
    /// class: the ranks, best first, into `out`.
    pub fn keep(&mut self, layer: usize, spare: &Spare<'_>, gains: &[f64], out: &mut Vec<usize>) {
        let share = spare.cpu_share;
        self.keeping.cpu_share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 1.0 };
        out.clear();
        // Beside a copy, what has no price alone would be learned wrong.
        if !self.cpu.is_known(gains.len()) || self.trials().are_wanted() {
            return;
        }
        out.extend((0..gains.len()).filter(|&rank| self.worth_ns(layer, gains[rank]) > 0.0));
        out.sort_unstable_by(|&a, &b| gains[b].total_cmp(&gains[a]).then(a.cmp(&b)));
        for at in 0..out.len() {
            let kept = f64::from(u8::from(at < spare.frames));
            self.keeping.share.note_within(kept, SHARE_MEMORY);
        }
        out.truncate(spare.frames);
    }
}
