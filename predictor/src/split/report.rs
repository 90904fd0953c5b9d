//! What the split did, layer by layer, for `--stats` and `plan`.

use super::{Reason, Split, reason};
use std::fmt;

/// One layer of the report.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LayerSplit {
    pub layer: usize,
    /// Times that something was missing, and how much in all.
    pub decisions: u64,
    pub misses: u64,
    /// Shares of the misses, 0..=1; the rest came over new copies.
    pub cpu_share: f64,
    pub wait_share: f64,
    /// Of the misses, those that the CPU computed and that were copied for
    /// later tokens.
    pub kept_share: f64,
    /// One expert of this layer on either worker, alone, in ns.
    pub copy_ns: f64,
    pub cpu_ns: f64,
    /// Measurements of the layer's shape.
    pub copy_samples: u64,
    pub cpu_samples: u64,
    /// Mean of the measured walls of this layer, in ns; `None` without one.
    pub wall_ns: Option<u64>,
    /// Of the last decision.
    pub reason: Reason,
}

impl fmt::Display for LayerSplit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cpu, wait) = (100.0 * self.cpu_share, 100.0 * self.wait_share);
        let link = (100.0 - cpu - wait).max(0.0);
        write!(
            f,
            "layer {}: {} misses, {cpu:.0} % on the CPU, {link:.0} % over the link, \
             {wait:.0} % already under way",
            self.layer, self.misses
        )?;
        if self.kept_share > 0.0 {
            write!(f, ", {:.0} % copied for later", 100.0 * self.kept_share)?;
        }
        write!(f, " ({})", self.reason)
    }
}

impl Split {
    /// Every MoE layer, in order.
    pub fn report(&self) -> Vec<LayerSplit> {
        let layers = self.layers.iter().enumerate();
        let layers = layers.filter_map(|(layer, given)| Some((layer, given.as_ref()?)));
        let line = |(layer, given): (usize, &super::Given)| {
            let class = &self.classes[given.class];
            let prices = reason::prices(class, given.at);
            let share = |part: u64| part as f64 / given.misses.max(1) as f64;
            LayerSplit {
                layer,
                decisions: given.decisions,
                misses: given.misses,
                cpu_share: share(given.cpu),
                wait_share: share(given.waits),
                kept_share: share(given.kept),
                copy_ns: prices.copy_ns,
                cpu_ns: prices.cpu_ns,
                copy_samples: class.link.seen(),
                cpu_samples: class.cpu.seen(),
                wall_ns: given.wall_ns.checked_div(given.measured),
                reason: given.reason,
            }
        };
        layers.map(line).collect()
    }
}
