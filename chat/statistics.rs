//! What streaming cost, for people.

use crate::output::bytes;
use pregate_runtime::{
    Model, StreamStats,
    statistics::{LayerStats, LinkStats, Phase, Time},
};
use serde::Serialize;

/// The host's memory of experts that are not on a GPU for good: copies to it
/// run at the link's speed from page-locked memory alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PageLocked {
    /// Whether all of it is.
    pub pinned: bool,
    pub pinned_bytes: u64,
    pub pageable_bytes: u64,
    /// Why some is not.
    pub refused: Option<String>,
}

impl PageLocked {
    /// `None` where no experts are copied to a GPU.
    pub fn of(model: &Model) -> Option<Self> {
        let gpu = model.gpu().filter(|gpu| gpu.store().is_some())?;
        let (pinned_bytes, refused) = gpu.host_bytes();
        let (pageable_bytes, refused) = refused.unzip();
        Some(Self {
            pinned: refused.is_none(),
            pinned_bytes,
            pageable_bytes: pageable_bytes.unwrap_or(0),
            refused,
        })
    }

    /// What there is to say on standard error.
    pub fn warning(&self) -> Option<String> {
        self.refused.as_ref().map(|why| {
            format!(
                "{} of experts are in memory that is not page-locked ({why}): copies of these to \
                 the GPU are slower",
                bytes(self.pageable_bytes)
            )
        })
    }
}

/// Experts for which neither a GPU nor the host's memory has room, since the
/// model was loaded.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FromDisk {
    /// Of those that were wanted, by copies or by the processor: in a frame
    /// already, or read.
    pub hits: u64,
    pub experts_read: u64,
    pub bytes_read: u64,
    /// With at least one read under way.
    pub busy_ms: f64,
    /// That the processor waited before it computed.
    pub waited_ms: f64,
}

impl FromDisk {
    /// `None` where there are no such experts.
    pub fn of(model: &Model) -> Option<Self> {
        let stats = model.gpu()?.host_frames()?.stats();
        Some(Self {
            hits: stats.hits,
            experts_read: stats.misses,
            bytes_read: stats.bytes_read,
            busy_ms: stats.busy_ns as f64 / 1e6,
            waited_ms: stats.waited_ns as f64 / 1e6,
        })
    }

    pub fn line(&self) -> String {
        let Self { hits, experts_read, bytes_read, busy_ms, waited_ms } = self;
        let share = *hits as f64 / (hits + experts_read).max(1) as f64 * 100.0;
        format!(
            "from disk since loading: {experts_read} experts, {}, in {busy_ms:.1} ms; {share:.1} % \
             were in memory; the processor waited {waited_ms:.1} ms",
            bytes(*bytes_read)
        )
    }
}

/// What experts come over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From disk to memory.
    Disk,
    /// From memory to a GPU.
    Link,
}

impl Way {
    pub fn of(model: &Model) -> Self {
        if model.gpu().is_some() { Way::Link } else { Way::Disk }
    }

    /// For "waiting for ...", "from ...", "... busy".
    fn words(self) -> [&'static str; 3] {
        match self {
            Way::Disk => ["waiting for the disk", "from disk", "disk"],
            Way::Link => ["waiting for copies", "copied to the GPU", "link"],
        }
    }
}

/// Lines about the passes that were made: where their time went, where their
/// experts came from, what the disk or the link did. Empty without passes.
pub fn lines(stats: &StreamStats, way: Way) -> Vec<String> {
    let phases = [("prompt", &stats.prefill), ("decode", &stats.decode)];
    phases
        .into_iter()
        .filter(|(_, phase)| phase.passes > 0)
        .flat_map(|phase| phase_lines(phase, way))
        .collect()
}

fn phase_lines((name, phase): (&str, &Phase), way: Way) -> [String; 3] {
    let [waiting, from, link] = way.words();
    [
        format!("{name}: {}", time(&phase.time, phase.tokens, waiting)),
        format!("{name}: {}", experts(&phase.total(), phase.tokens, from)),
        format!("{name}: {link} {}", busy(&phase.link, &phase.time, phase.tokens)),
    ]
}

/// "9 tokens, 41.20 ms each: compute 12.10, ..."
fn time(time: &Time, tokens: u64, waiting: &str) -> String {
    let each = |ns: u64| ns as f64 / tokens.max(1) as f64 / 1e6;
    let Time { compute_ns, experts_ns, wait_disk_ns, copy_ns, overhead_ns, total_ns } = *time;
    let parts = [
        ("compute", compute_ns),
        ("experts", experts_ns),
        (waiting, wait_disk_ns),
        ("copies", copy_ns),
        ("planning", overhead_ns),
        ("other", time.unattributed_ns()),
    ];
    let parts: Vec<String> =
        parts.iter().map(|(name, ns)| format!("{name} {:.2}", each(*ns))).collect();
    format!("{tokens} tokens, {:.2} ms each: {}", each(total_ns), parts.join(", "))
}

/// "experts 55.2 % in slots, ..."
fn experts(total: &LayerStats, tokens: u64, from: &str) -> String {
    let share = |part: u64| part as f64 / total.requests().max(1) as f64 * 100.0;
    let each = |count: u64| bytes(count / tokens.max(1));
    let left = match total.left {
        0 => String::new(),
        some => format!(" ({:.1} % computed by the processor)", share(some)),
    };
    format!(
        "experts {:.1} % in slots, {:.1} % on their way, {:.1} % missed{left}; {from} {} a \
         token, {} of it ahead ({} never used)",
        share(total.hits),
        share(total.in_flight),
        share(total.misses),
        each(total.bytes_read()),
        each(total.bytes_prefetch),
        each(total.bytes_wasted),
    )
}

/// "busy 2.00 ms a token (20 % of the time), 1.9 GB/s while busy"
fn busy(link: &LinkStats, time: &Time, tokens: u64) -> String {
    let each = link.busy_ns as f64 / tokens.max(1) as f64 / 1e6;
    let share = link.busy_ns as f64 / time.total_ns.max(1) as f64 * 100.0;
    let speed = link.bytes_per_s().map_or(String::new(), |bytes_per_s| {
        format!(", {}/s while busy", bytes(bytes_per_s as u64))
    });
    format!("busy {each:.2} ms a token ({share:.0} % of the time){speed}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_per_token() {
        let mut stats = StreamStats::new(2);
        let lines = |stats: &StreamStats| super::lines(stats, Way::Disk);
        assert!(lines(&stats).is_empty());
        stats.decode.passes = 4;
        stats.decode.tokens = 4;
        stats.decode.time = Time {
            compute_ns: 4_000_000,
            experts_ns: 8_000_000,
            wait_disk_ns: 12_000_000,
            copy_ns: 0,
            overhead_ns: 400_000,
            total_ns: 40_000_000,
        };
        stats.decode.link = LinkStats { bytes: 16_000_000, busy_ns: 8_000_000 };
        for layer in &mut stats.decode.layers {
            layer.hits = 5;
            layer.in_flight = 2;
            layer.misses = 3;
            layer.bytes_demand = 6_000_000;
            layer.bytes_prefetch = 2_000_000;
            layer.bytes_wasted = 1_000_000;
        }
        let [time, experts, disk] = lines(&stats).try_into().expect("three lines");
        assert_eq!(
            time,
            "decode: 4 tokens, 10.00 ms each: compute 1.00, experts 2.00, waiting for the disk \
             3.00, copies 0.00, planning 0.10, other 3.90"
        );
        assert_eq!(
            experts,
            "decode: experts 50.0 % in slots, 20.0 % on their way, 30.0 % missed; from disk 4.0 MB \
             a token, 1.0 MB of it ahead (500.0 kB never used)"
        );
        assert_eq!(
            disk,
            "decode: disk busy 2.00 ms a token (20 % of the time), 2.0 GB/s while busy"
        );
    }
}
