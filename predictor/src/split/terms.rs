//! What the split and its caller tell each other.

use super::Reason;

/// Prices that the machine's probes found at start. What is not known may be
/// left at its default; hostile values are bounded.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Seed {
    /// From the decision until the CPU works, and its time per byte of an
    /// expert.
    pub cpu_start_ns: f64,
    pub cpu_ns_per_byte: f64,
    /// From the decision until a copy moves, and its time per byte.
    pub link_start_ns: f64,
    pub link_ns_per_byte: f64,
    /// How many times longer each takes while the other is busy; 1: no
    /// longer.
    pub cpu_beside_link: f64,
    pub link_beside_cpu: f64,
}

impl Default for Seed {
    /// Two channels of DDR4-3200 and PCIe 4.0 x16.
    fn default() -> Self {
        Self {
            cpu_start_ns: 25_000.0,
            cpu_ns_per_byte: 1.0 / 36.0,
            link_start_ns: 12_000.0,
            link_ns_per_byte: 1.0 / 24.0,
            cpu_beside_link: 1.0,
            link_beside_cpu: 1.0,
        }
    }
}

/// How much may be tried.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Options {
    /// What exploring may cost, as a share of the time of layers with misses,
    /// and second looks as much again.
    pub explore_share: f64,
    /// What it may cost beyond that, in times of one expert, per shape;
    /// second looks twice as much.
    pub first_explored: f64,
    /// Tokens after which a worker that was not used is measured again.
    pub retry_tokens: u64,
    /// The same for one that is at least four times slower than the best;
    /// three times as many with every time that it still is. One that has
    /// just become slow is looked at sooner.
    pub disaster_tokens: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { explore_share: 0.01, first_explored: 16.0, retry_tokens: 64, disaster_tokens: 64 }
    }
}

/// An expert that a layer needs and that is not in VRAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Miss {
    /// The router's index in the layer.
    pub expert: u32,
    /// A copy of it is under way and lands after so many ns, as far as one
    /// knows.
    pub remaining_ns: Option<u64>,
}

/// A layer's question.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Counted over all layers of the model.
    pub layer: usize,
    /// In rank order.
    pub misses: &'a [Miss],
    /// Experts of the layer that are in VRAM and may leave for others.
    pub resident: usize,
    /// Copies that could be ordered at once: free frames of the layer.
    pub frames: usize,
    /// ns until the link would start a demand.
    pub queue_ns: u64,
    /// ns that the GPU is busy with other work of this layer, so that ending
    /// earlier gains nothing.
    pub hidden_ns: u64,
}

/// Where a missing expert's row comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Cpu,
    /// A copy is to be ordered.
    Link,
    /// The copy under way is waited for.
    Wait,
}

/// The answer; used again from layer to layer, so that nothing is allocated.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// `[misses]`
    pub places: Vec<Place>,
    pub reason: Reason,
    /// ns from the decision to the last row, as expected.
    pub expected_ns: u64,
}

impl Choice {
    /// How many misses have this place.
    pub fn count(&self, place: Place) -> usize {
        self.places.iter().filter(|&&one| one == place).count()
    }
}

/// What became of a decision. A time of 0 was not measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Experts that the CPU computed, and ns from the decision to its last
    /// row.
    pub cpu: usize,
    pub cpu_ns: u64,
    /// Copies ordered, ns from the decision to the start of the first, and
    /// from there to the end of the last.
    pub copies: usize,
    pub delay_ns: u64,
    pub copy_ns: u64,
    /// Copies under way that were waited for, and ns from the decision to the
    /// end of the last.
    pub waits: usize,
    pub wait_ns: u64,
    /// ns, from the decision to the CPU's last row, in which the link moved
    /// what nobody waits for.
    pub busy_ns: u64,
    /// [`Asked::hidden_ns`], as it turned out.
    pub hidden_ns: u64,
    /// ns from the decision to the layer's last row.
    pub wall_ns: u64,
}

/// Experts and ns that any machine could mean.
const MOST_EXPERTS: usize = 1 << 16;
const MOST_NS: u64 = 1_000_000_000_000;

impl Outcome {
    /// Without what cannot be.
    pub(super) fn bounded(&self) -> Self {
        let [cpu, copies, waits] =
            [self.cpu, self.copies, self.waits].map(|count| count.min(MOST_EXPERTS));
        let times = [self.cpu_ns, self.delay_ns, self.copy_ns, self.wait_ns];
        let [cpu_ns, delay_ns, copy_ns, wait_ns] = times.map(|ns| ns.min(MOST_NS));
        let [busy_ns, hidden_ns, wall_ns] =
            [self.busy_ns, self.hidden_ns, self.wall_ns].map(|ns| ns.min(MOST_NS));
        Self { cpu, cpu_ns, copies, delay_ns, copy_ns, waits, wait_ns, busy_ns, hidden_ns, wall_ns }
    }
}
