//! What a layer's wait for its misses took in wall time, and what the GPU does
//! meanwhile: from the moments at which a host hears of the layers.
//!
//! A layer without misses takes what the GPU takes for all of it. Of one with
//! misses, what comes behind the host's last answer (the layer's end, and the
//! next one up to its router) is the least that was seen there. The rest of
//! the first is the work of hits: ending before it gains nothing.

/// Layers that a mean remembers.
const MEMORY: f64 = 32.0;
/// How fast the least gives way to what is seen now: a machine changes.
const GIVES_WAY: f64 = 1.0 / 64.0;
/// Between two layers; more is not the GPU's.
const MOST_NS: u64 = 1_000_000_000;

/// The layer that was heard last.
#[derive(Clone, Copy, Debug)]
struct Last {
    heard_ns: u64,
    /// When the host's last answer was given; `None`: nothing was missing.
    told_ns: Option<u64>,
}

/// Of the layers of one model.
#[derive(Clone, Debug, Default)]
pub struct Lapse {
    last: Option<Last>,
    whole_ns: f64,
    behind_ns: f64,
}

impl Lapse {
    /// A layer was heard at `now_ns`, on any clock. The answer is the wall time
    /// of the layer before, from its hearing to its last row, if something was
    /// missing there.
    pub fn heard(&mut self, now_ns: u64) -> Option<u64> {
        let last = self.last.replace(Last { heard_ns: now_ns, told_ns: None })?;
        let lapse_ns = now_ns.checked_sub(last.heard_ns).filter(|&ns| ns < MOST_NS)? as f64;
        match last.told_ns {
            None => {
                let first = self.whole_ns == 0.0;
                let share = if first { 1.0 } else { 1.0 / MEMORY };
                self.whole_ns += share * (lapse_ns - self.whole_ns);
                None
            }
            Some(told_ns) => {
                let behind_ns = now_ns.saturating_sub(told_ns) as f64;
                let is_least = self.behind_ns == 0.0 || behind_ns < self.behind_ns;
                let share = if is_least { 1.0 } else { GIVES_WAY };
                self.behind_ns += share * (behind_ns - self.behind_ns);
                Some((lapse_ns - self.behind_ns).max(1.0) as u64)
            }
        }
    }

    /// The host has given its last answer about the layer's misses.
    pub fn told(&mut self, now_ns: u64) {
        if let Some(last) = &mut self.last {
            last.told_ns = Some(now_ns);
        }
    }

    /// What follows is no next layer.
    pub fn end(&mut self) {
        self.last = None;
    }

    /// ns that the GPU works in a layer of which the share `hits` (0..=1) of
    /// the experts is there, whatever the host does; 0: not known yet.
    pub fn hidden_ns(&self, hits: f64) -> u64 {
        if self.whole_ns == 0.0 || self.behind_ns == 0.0 {
            return 0;
        }
        ((self.whole_ns - self.behind_ns).max(0.0) * hits.clamp(0.0, 1.0)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GPU that takes `hits_ns` for hits and `behind_ns` for what follows; the
    /// host answers after `host_ns` in every second layer.
    fn run([hits_ns, behind_ns, host_ns]: [u64; 3], layers: usize) -> (Lapse, Vec<u64>) {
        let (mut lapse, mut now, mut walls) = (Lapse::default(), 0, Vec::new());
        for layer in 0..layers {
            walls.extend(lapse.heard(now));
            if layer % 2 == 0 {
                lapse.told(now + host_ns);
                now += host_ns.max(hits_ns);
            } else {
                now += hits_ns;
            }
            now += behind_ns;
        }
        (lapse, walls)
    }

    #[test]
    fn walls_and_hidden_work_are_found() {
        let (lapse, walls) = run([30_000, 100_000, 400_000], 64);
        assert_eq!(walls.len(), 32);
        assert!(walls.iter().all(|&wall| wall == 400_000), "{walls:?}");
        assert_eq!(lapse.hidden_ns(1.0), 30_000);
        assert_eq!(lapse.hidden_ns(0.5), 15_000);
    }

    #[test]
    fn a_host_that_ends_before_the_hits_hides_nothing_wrong() {
        // Nobody sees how long the GPU works on hits: it is not less.
        let (lapse, walls) = run([300_000, 100_000, 50_000], 64);
        assert!(lapse.hidden_ns(1.0) <= 300_000);
        assert!(walls.iter().all(|&wall| wall <= 300_000), "{walls:?}");
    }

    #[test]
    fn a_pause_and_a_clock_that_goes_back_are_no_layers() {
        let mut lapse = Lapse::default();
        assert_eq!(lapse.heard(5), None);
        lapse.told(7);
        assert_eq!(lapse.heard(u64::MAX), None);
        lapse.told(1);
        assert_eq!(lapse.heard(3), None);
        lapse.told(3);
        lapse.end();
        assert_eq!(lapse.heard(4), None);
        assert_eq!(lapse.hidden_ns(f64::NAN), 0);
    }
}
