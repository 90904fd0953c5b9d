//! A simulated machine: what missing experts take on a CPU and a link that
//! read the same memory. It knows nothing of the controller's estimates:
//! work advances piece by piece as bandwidth is shared.

use pregate_predictor::split::{Outcome, Seed};

/// SplitMix64.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Between the two, every factor alike.
    pub fn factor(&mut self, low: f64, high: f64) -> f64 {
        self.uniform(low.ln(), high.ln()).exp()
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.uniform(0.0, limit as f64) as usize
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        self.uniform(0.0, 1.0) < probability
    }

    /// About normal: the sum of twelve.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform(0.0, 1.0)).sum::<f64>() - 6.0
    }
}

/// Bandwidths in bytes per ns (GB/s), times in ns.
#[derive(Clone, Debug)]
pub struct Machine {
    pub cpu_start: f64,
    /// One expert alone, and any number together.
    pub cpu_one: f64,
    pub cpu: f64,
    pub link_start: f64,
    pub copy_start: f64,
    pub link: f64,
    /// Both together; and who gives way where that is not enough.
    pub memory: f64,
    pub link_first: bool,
    pub vram: f64,
    /// On the GPU behind a copy, beside reading the expert.
    pub late: f64,
    /// What a layer takes beyond both workers where both have experts, as a
    /// share; no worker's own time shows it.
    pub join: f64,
    /// The CPU's time while the link is busy is so many times longer, for
    /// reasons that are not bandwidth (issue #436 of FreeToken).
    pub trouble: f64,
    /// The chance that the link has other work when a layer asks, and how
    /// long at most.
    pub busy: f64,
    pub busy_ns: f64,
    /// What the GPU does between two layers of experts, in ns: neither worker
    /// is asked for anything.
    pub gap: f64,
    pub noise: f64,
    pub outliers: f64,
}

/// Bytes of copies that nobody waits for which a demand does not overtake.
pub const IN_THE_WAY: f64 = (4 << 20) as f64;

/// What a layer's decision led to.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    pub cpu: f64,
    pub link: f64,
    pub wall: f64,
    /// Bytes that nobody waits for: moved until the last row, and until the
    /// CPU's.
    pub moved: f64,
    pub beside: f64,
}

impl Machine {
    pub fn random(rng: &mut Rng) -> Self {
        let (link, cpu) = (rng.factor(3.0, 60.0), rng.factor(5.0, 120.0));
        Self {
            cpu_start: rng.factor(5e3, 50e3),
            cpu_one: cpu * rng.uniform(0.3, 1.0),
            cpu,
            link_start: rng.factor(3e3, 20e3),
            copy_start: rng.factor(2e3, 11e3),
            link,
            memory: cpu.max(link) + rng.uniform(0.0, 1.0) * cpu.min(link),
            link_first: rng.chance(0.5),
            vram: rng.factor(200.0, 1800.0),
            late: rng.factor(5e3, 30e3),
            join: if rng.chance(0.25) { rng.uniform(0.0, 0.4) } else { 0.0 },
            trouble: 1.0,
            busy: if rng.chance(0.3) { rng.uniform(0.0, 0.3) } else { 0.0 },
            busy_ns: rng.factor(20e3, 500e3),
            // Not drawn: the machines are those that they were without it.
            gap: 60e3,
            noise: rng.uniform(0.03, 0.12),
            outliers: 0.005,
        }
    }

    pub fn scale_cpu(&mut self, factor: f64) {
        self.cpu *= factor;
        self.cpu_one *= factor;
    }

    /// What probes at start would find, off by some.
    pub fn seed(&self, rng: &mut Rng) -> Seed {
        let mut off = || rng.factor(0.65, 1.5);
        Seed {
            cpu_start_ns: self.cpu_start * off(),
            cpu_ns_per_byte: off() / self.cpu,
            link_start_ns: (self.link_start + self.copy_start) * off(),
            link_ns_per_byte: off() / self.link,
            ..Seed::default()
        }
    }

    /// When the CPU has computed `cpu` experts of `bytes`, and when as many as
    /// `copies` have landed if the link is free after `queue` ns. Of `spare`
    /// bytes that nobody waits for, what is with the device goes first and the
    /// rest last. The answer has them as moved until each of the two, and in
    /// all until `until`.
    fn workers(
        &self,
        bytes: f64,
        (cpu, copies): (usize, usize),
        queue: f64,
        spare: f64,
        until: impl Fn([f64; 2]) -> f64,
    ) -> ([f64; 2], [f64; 2]) {
        let trouble = if copies > 0 || spare > 0.0 { self.trouble } else { 1.0 };
        let cpu_rate = (self.cpu_one * cpu as f64).min(self.cpu) / trouble;
        // CPU, what a demand cannot overtake, demands, the rest.
        let first = spare.min(IN_THE_WAY);
        let mut left = [cpu as f64 * bytes, first, copies as f64 * bytes, spare - first];
        let orders = queue + self.link_start + copies as f64 * self.copy_start;
        let starts = [self.cpu_start, 0.0, orders, 0.0];
        let (mut now, mut ends, mut moved, mut beside) = (0.0, [0.0; 2], 0.0, 0.0);
        let limit = |ends: [f64; 2], left: &[f64; 4]| match left[0] > 0.0 || left[2] > 0.0 {
            true => f64::INFINITY,
            false => until(ends),
        };
        while left.iter().any(|&left| left > 0.0) && now < limit(ends, &left) {
            // The link has one thing at a time: the first that is there.
            let link = (1..4).find(|&at| left[at] > 0.0 && now >= starts[at]);
            let cpu_on = left[0] > 0.0 && now >= starts[0];
            let wish = [if cpu_on { cpu_rate } else { 0.0 }, link.map_or(0.0, |_| self.link)];
            let scale = (self.memory / (wish[0] + wish[1]).max(1e-9)).min(1.0);
            let rates = match self.link_first {
                true => [wish[0].min(self.memory - wish[1]), wish[1]],
                false => wish.map(|wish| wish * scale),
            };
            // Until the next start or end.
            let mut step = limit(ends, &left) - now;
            for at in 0..4 {
                if left[at] > 0.0 && now < starts[at] {
                    step = step.min(starts[at] - now);
                }
            }
            if cpu_on {
                step = step.min(left[0] / rates[0].max(1e-9));
            }
            if let Some(at) = link {
                step = step.min(left[at] / rates[1].max(1e-9));
            }
            now += step;
            let mut advance = |at: usize, rate: f64| {
                left[at] -= step * rate;
                if left[at] <= 1e-6 * bytes {
                    left[at] = 0.0;
                }
                left[at] == 0.0
            };
            if cpu_on && advance(0, rates[0]) {
                ends[0] = now;
            }
            if let Some(at) = link {
                if advance(at, rates[1]) && at == 2 {
                    ends[1] = now;
                }
                moved += if at == 2 { 0.0 } else { step * rates[1] };
                beside += if at != 2 && cpu_on { step } else { 0.0 };
            }
        }
        (ends, [moved.min(spare), beside])
    }

    fn wall(&self, bytes: f64, (cpu, copies): (usize, usize), ends: [f64; 2], gpu: f64) -> f64 {
        let late = copies as f64 * bytes / self.vram + self.late;
        let link = if copies > 0 { ends[1] + late } else { 0.0 };
        let join = if cpu > 0 && copies > 0 { self.join } else { 0.0 };
        (ends[0].max(link) * (1.0 + join)).max(gpu)
    }

    /// A layer without noise; the GPU is busy for `gpu` ns anyhow, and the link
    /// has `spare` bytes that nobody waits for.
    pub fn ends(
        &self,
        bytes: f64,
        counts: (usize, usize),
        queue: f64,
        gpu: f64,
        spare: f64,
    ) -> Ends {
        let wall = |ends: [f64; 2]| self.wall(bytes, counts, ends, gpu);
        let (ends, [moved, beside]) = self.workers(bytes, counts, queue, spare, wall);
        Ends { cpu: ends[0], link: ends[1], wall: wall(ends), moved, beside }
    }

    /// What a controller would be told.
    pub fn told(
        &self,
        bytes: f64,
        (cpu, copies): (usize, usize),
        queue: f64,
        gpu: f64,
        spare: f64,
        rng: &mut Rng,
    ) -> Outcome {
        let ends = self.ends(bytes, (cpu, copies), queue, gpu, spare);
        let queue = queue + spare.min(IN_THE_WAY) / self.link;
        let mut noisy = |ns: f64| {
            let outlier = if rng.chance(self.outliers) { 20.0 } else { 1.0 };
            ns * outlier * (1.0 + self.noise * rng.normal()).max(0.3)
        };
        let copy_ns = noisy((ends.link - queue).max(0.0));
        let (cpu_ns, link) = (noisy(ends.cpu), queue + copy_ns);
        let wall = self.wall(bytes, (cpu, copies), [cpu_ns, link], gpu);
        Outcome {
            cpu,
            cpu_ns: cpu_ns as u64,
            copies,
            delay_ns: queue as u64,
            copy_ns: copy_ns as u64,
            busy_ns: ends.beside as u64,
            hidden_ns: gpu as u64,
            wall_ns: wall as u64,
            ..Outcome::default()
        }
    }
}
