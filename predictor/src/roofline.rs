//! How fast a token can be decoded where a GPU holds some of a model's
//! experts, the processor computes others, and a link copies the rest: bytes
//! over wires, and what it costs to start.
//!
//! A token goes through the layers one after the other. In each the GPU reads
//! the weights that every token needs, then the router's choices decide: the
//! experts that are there, those that the processor computes beside it, and
//! those that are copied first. The layer ends with the last of them. How many
//! are missing differs from layer to layer and from token to token; the time
//! is the expected one over all cases, as the slowest worker decides each.
//!
//! Copies ahead of need are left out: they hide time where the link is idle.

use crate::split::Seed;

/// What a machine's wires carry, as measured. Rates are in bytes per
/// nanosecond (GB/s) and above 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    /// The GPU reading weights in its memory.
    pub gpu_rate: f64,
    /// The processor computing experts.
    pub cpu: Worker,
    /// The link copying experts to the GPU.
    pub link: Worker,
    /// What a layer with misses takes beyond its workers: the host learns of
    /// them and answers.
    pub visit_ns: f64,
}

/// Who brings experts that are not there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worker {
    pub rate: f64,
    /// While the other one works too: both read the same memory.
    pub beside: f64,
    /// From the order until the first byte.
    pub start_ns: f64,
}

impl From<&Machine> for Seed {
    /// What the split of misses starts from.
    fn from(machine: &Machine) -> Self {
        let Machine { cpu, link, .. } = machine;
        Self {
            cpu_start_ns: cpu.start_ns,
            cpu_ns_per_byte: 1.0 / cpu.rate,
            link_start_ns: link.start_ns,
            link_ns_per_byte: 1.0 / link.rate,
            cpu_beside_link: (cpu.rate / cpu.beside).max(1.0),
            link_beside_cpu: (link.rate / link.beside).max(1.0),
        }
    }
}

/// One MoE layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerLoad {
    pub experts: usize,
    /// Of one token; at most `experts`.
    pub top_k: usize,
    /// Experts that are on the GPU at once; at most `experts`.
    pub there: usize,
    pub expert_bytes: u64,
}

/// How often a chosen expert is on the GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Hits {
    /// As often as experts have room there: what can be said before the first
    /// token. Real routing hits more often.
    Uniform,
    /// This share of the choices, each alone: what was measured or replayed.
    Ratio(f64),
}

/// Who may bring the experts that are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bring {
    Cpu,
    Link,
    /// In each case the way of sharing that ends first.
    Best,
}

/// A part of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Gpu,
    Cpu,
    Link,
    /// Between the GPU and the host.
    Visits,
}

impl Part {
    pub fn name(self) -> &'static str {
        match self {
            Part::Gpu => "GPU",
            Part::Cpu => "processor",
            Part::Link => "link",
            Part::Visits => "way between GPU and host",
        }
    }
}

/// What is expected of a token. Bytes are weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// Share of the chosen experts that are on the GPU.
    pub hit_ratio: f64,
    /// Read by the GPU, also of experts that were copied to it.
    pub gpu_bytes: f64,
    pub cpu_bytes: f64,
    pub link_bytes: f64,
    /// What each part is busy, were the others infinitely fast.
    pub gpu_ns: f64,
    pub cpu_ns: f64,
    pub link_ns: f64,
    pub visits_ns: f64,
    /// What is waited for each part: the token's time, divided.
    pub waited_ns: [f64; 4],
    /// Were all experts on the GPU.
    pub all_on_gpu_ns: f64,
}

impl Prediction {
    pub fn token_ns(&self) -> f64 {
        self.waited_ns.iter().sum()
    }

    pub fn tok_s(&self) -> f64 {
        1e9 / self.token_ns()
    }

    /// The part that most of the token's time is waited for.
    pub fn binds(&self) -> Part {
        let longest = PARTS.iter().zip(self.waited_ns).max_by(|a, b| a.1.total_cmp(&b.1));
        longest.map_or(Part::Gpu, |(part, _)| *part)
    }

    /// Tok/s that this part alone would allow; `None`: it has nothing to do.
    pub fn allows(&self, part: Part) -> Option<f64> {
        let busy = match part {
            Part::Gpu => self.gpu_ns,
            Part::Cpu => self.cpu_ns,
            Part::Link => self.link_ns,
            Part::Visits => self.visits_ns,
        };
        (busy > 0.0).then(|| 1e9 / busy)
    }
}

/// In the order of [`Prediction::waited_ns`].
const PARTS: [Part; 4] = [Part::Gpu, Part::Cpu, Part::Link, Part::Visits];

/// `dense_bytes` are read by the GPU for every token: all but routed experts,
/// the KV cache if it is large.
pub fn predict(
    dense_bytes: u64,
    layers: &[LayerLoad],
    hits: Hits,
    bring: Bring,
    machine: &Machine,
) -> Prediction {
    let dense = dense_bytes as f64;
    let mut found = Prediction { gpu_bytes: dense, ..Prediction::default() };
    found.waited_ns[0] = dense / machine.gpu_rate;
    found.all_on_gpu_ns = found.waited_ns[0];
    let (mut asked, mut missed) = (0.0, 0.0);
    for layer in layers {
        let size = layer.expert_bytes as f64;
        asked += layer.top_k as f64;
        found.all_on_gpu_ns += layer.top_k as f64 * size / machine.gpu_rate;
        for (missing, chance) in misses(layer, hits).into_iter().enumerate() {
            let way = Way::of(layer, missing, bring, machine);
            missed += chance * missing as f64;
            found.add(chance, size, (layer.top_k - missing, missing), &way, machine);
        }
    }
    found.hit_ratio = if asked > 0.0 { 1.0 - missed / asked } else { 1.0 };
    found.gpu_ns = found.gpu_bytes / machine.gpu_rate;
    found
}

impl Prediction {
    /// A layer that has `there` of a token's experts and `missing` of them not,
    /// with this chance.
    fn add(
        &mut self,
        chance: f64,
        size: f64,
        (there, missing): (usize, usize),
        way: &Way,
        machine: &Machine,
    ) {
        let copied = way.copied as f64;
        let computed = (missing - way.copied) as f64;
        self.gpu_bytes += chance * size * (there as f64 + copied);
        self.cpu_bytes += chance * size * computed;
        self.link_bytes += chance * size * copied;
        self.cpu_ns += chance * machine.cpu.alone(computed * size);
        self.link_ns += chance * machine.link.alone(copied * size);
        let [gpu, cpu, link] = way.ends_ns;
        // Equal ends are the first one's: no part can be faster for it.
        let last = if gpu >= cpu && gpu >= link { 0 } else { 1 + usize::from(link > cpu) };
        self.waited_ns[last] += chance * way.ends_ns[last];
        if missing > 0 {
            self.waited_ns[3] += chance * machine.visit_ns;
            self.visits_ns += chance * machine.visit_ns;
        }
    }
}

/// How a layer's misses are brought.
struct Way {
    copied: usize,
    /// When the GPU, the processor and the link are done.
    ends_ns: [f64; 3],
}

impl Way {
    fn of(layer: &LayerLoad, missing: usize, bring: Bring, machine: &Machine) -> Self {
        let way = |copied: usize| {
            let size = layer.expert_bytes as f64;
            let on_gpu = (layer.top_k - missing + copied) as f64;
            let bytes = [(missing - copied) as f64 * size, copied as f64 * size];
            let [cpu, link] = together([&machine.cpu, &machine.link], bytes);
            Self { copied, ends_ns: [on_gpu * size / machine.gpu_rate, cpu, link] }
        };
        match bring {
            Bring::Cpu => way(0),
            Bring::Link => way(missing),
            Bring::Best => {
                let first = |a: &Way, b: &Way| a.end().total_cmp(&b.end());
                (0..=missing).map(way).min_by(first).expect("no copies is a way")
            }
        }
    }

    fn end(&self) -> f64 {
        self.ends_ns.iter().copied().fold(0.0, f64::max)
    }
}

impl Worker {
    fn alone(&self, bytes: f64) -> f64 {
        if bytes > 0.0 { self.start_ns + bytes / self.rate } else { 0.0 }
    }
}

/// When each of two workers that start together has moved its bytes: beside
/// each other, until the first is done.
fn together(workers: [&Worker; 2], bytes: [f64; 2]) -> [f64; 2] {
    if bytes.contains(&0.0) {
        return [workers[0].alone(bytes[0]), workers[1].alone(bytes[1])];
    }
    let beside = [0, 1].map(|i| workers[i].start_ns + bytes[i] / workers[i].beside);
    let first = usize::from(beside[1] < beside[0]);
    let (other, end) = (1 - first, beside[first]);
    let moved = (end - workers[other].start_ns).max(0.0) * workers[other].beside;
    let mut ends = beside;
    let begun = end.max(workers[other].start_ns);
    ends[other] = begun + (bytes[other] - moved).max(0.0) / workers[other].rate;
    ends
}

/// The chance that so many of a token's experts are missing, `0 ..= top_k`.
fn misses(layer: &LayerLoad, hits: Hits) -> Vec<f64> {
    let absent = layer.experts.saturating_sub(layer.there) as f64;
    let mut chances = vec![1.0];
    for drawn in 0..layer.top_k {
        let mut next = vec![0.0; chances.len() + 1];
        for (missing, chance) in chances.into_iter().enumerate() {
            let miss = match hits {
                // A token chooses each expert at most once.
                Hits::Uniform => {
                    let left = layer.experts.saturating_sub(drawn).max(1) as f64;
                    ((absent - missing as f64) / left).clamp(0.0, 1.0)
                }
                Hits::Ratio(ratio) => 1.0 - ratio.clamp(0.0, 1.0),
            };
            next[missing] += chance * (1.0 - miss);
            next[missing + 1] += chance * miss;
        }
        chances = next;
    }
    chances
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GPU of 100 GB/s, a processor of 10, a link of 5.
    const MACHINE: Machine = Machine {
        gpu_rate: 100.0,
        cpu: Worker { rate: 10.0, beside: 8.0, start_ns: 100.0 },
        link: Worker { rate: 5.0, beside: 4.0, start_ns: 50.0 },
        visit_ns: 1000.0,
    };

    fn layer(experts: usize, top_k: usize, there: usize) -> LayerLoad {
        LayerLoad { experts, top_k, there, expert_bytes: 10_000 }
    }

    fn close(found: f64, wanted: f64) {
        assert!((found - wanted).abs() <= 1e-9 * wanted.abs().max(1.0), "{found} {wanted}");
    }

    #[test]
    fn what_is_all_on_the_gpu_is_its_bandwidth_over_bytes() {
        let layers = [layer(8, 2, 8); 3];
        let found = predict(40_000, &layers, Hits::Uniform, Bring::Best, &MACHINE);
        close(found.token_ns(), (40_000.0 + 6.0 * 10_000.0) / 100.0);
        close(found.tok_s(), 1e6);
        close(found.all_on_gpu_ns, found.token_ns());
        assert_eq!((found.hit_ratio, found.binds()), (1.0, Part::Gpu));
        assert_eq!((found.allows(Part::Cpu), found.allows(Part::Link)), (None, None));
        assert_eq!(found.allows(Part::Visits), None);
        assert_eq!(predict(1, &[], Hits::Uniform, Bring::Cpu, &MACHINE).hit_ratio, 1.0);
    }

    #[test]
    fn one_expert_of_two_by_hand() {
        // Half of the tokens miss: 100 ns, then 1000 ns of computing; the
        // others read it in 100 ns. 200 ns of other weights.
        let layers = [layer(2, 1, 1)];
        let found = predict(20_000, &layers, Hits::Uniform, Bring::Cpu, &MACHINE);
        close(found.hit_ratio, 0.5);
        close(found.token_ns(), 200.0 + 0.5 * 100.0 + 0.5 * (1100.0 + 1000.0));
        close(found.cpu_bytes, 5_000.0);
        close(found.gpu_bytes, 25_000.0);
        close(found.allows(Part::Cpu).unwrap(), 1e9 / 550.0);
        close(found.allows(Part::Gpu).unwrap(), 1e9 / 250.0);
        close(found.allows(Part::Visits).unwrap(), 1e9 / 500.0);
        assert_eq!(found.binds(), Part::Cpu);
        close(found.all_on_gpu_ns, 300.0);

        // The link takes 50 + 2000 ns, and the GPU reads what it brought.
        let found = predict(20_000, &layers, Hits::Uniform, Bring::Link, &MACHINE);
        close(found.token_ns(), 200.0 + 0.5 * 100.0 + 0.5 * (2050.0 + 1000.0));
        close(found.link_bytes, 5_000.0);
        close(found.gpu_bytes, 30_000.0);
        assert_eq!(found.binds(), Part::Link);
        let best = predict(20_000, &layers, Hits::Uniform, Bring::Best, &MACHINE);
        close(best.token_ns(), 200.0 + 50.0 + 0.5 * 2100.0);
    }

    #[test]
    fn misses_are_shared_where_that_ends_first() {
        // Three are missing: 3100 ns on the processor. One of them on the
        // link: both run until 2550 ns (50 + 10000 / 4), the processor then
        // has 20000 - 2450 * 8 left, which takes 40 ns.
        let layers = [layer(3, 3, 0)];
        let found = predict(0, &layers, Hits::Uniform, Bring::Best, &MACHINE);
        close(found.token_ns(), 2550.0 + 40.0 + 1000.0);
        close(found.link_bytes, 10_000.0);
        close(found.cpu_bytes, 20_000.0);
        let cpu = predict(0, &layers, Hits::Uniform, Bring::Cpu, &MACHINE);
        close(cpu.token_ns(), 3100.0 + 1000.0);
    }

    #[test]
    fn chances_are_those_of_drawing_without_putting_back() {
        // Two of four, one is absent: it is drawn in half of the cases.
        assert_eq!(misses(&layer(4, 2, 3), Hits::Uniform), [0.5, 0.5, 0.0]);
        assert_eq!(misses(&layer(4, 2, 3), Hits::Ratio(0.5)), [0.25, 0.5, 0.25]);
        for (experts, top_k, there) in [(64, 8, 10), (128, 8, 100), (8, 2, 0), (8, 8, 3)] {
            let layer = layer(experts, top_k, there);
            let chances = misses(&layer, Hits::Uniform);
            close(chances.iter().sum(), 1.0);
            let mean: f64 = chances.iter().zip(0..).map(|(p, q)| p * f64::from(q)).sum();
            close(mean, top_k as f64 * (1.0 - there as f64 / experts as f64));
            let found = predict(0, &[layer], Hits::Uniform, Bring::Best, &MACHINE);
            close(found.hit_ratio, there as f64 / experts as f64);
            close(predict(0, &[layer], Hits::Ratio(0.9), Bring::Cpu, &MACHINE).hit_ratio, 0.9);
        }
    }

    #[test]
    fn parts_of_the_time_make_up_the_token_and_sharing_never_loses() {
        for there in 0..=16 {
            let layers = [layer(16, 4, there), layer(16, 2, there / 2)];
            let of = |bring| predict(7_000, &layers, Hits::Uniform, bring, &MACHINE);
            let [cpu, link, best] = [Bring::Cpu, Bring::Link, Bring::Best].map(of);
            assert!(best.token_ns() <= cpu.token_ns().min(link.token_ns()) + 1e-9);
            for found in [cpu, link, best] {
                let all = [found.gpu_ns, found.cpu_ns, found.link_ns, found.visits_ns];
                let longest = all.into_iter().fold(0.0, f64::max);
                assert!(found.token_ns() + 1e-9 >= longest, "{found:?}");
                assert!(found.token_ns() <= all.iter().sum::<f64>() * 1.25 + 1e-9, "{found:?}");
            }
        }
    }

    #[test]
    fn a_faster_machine_or_more_room_is_never_slower() {
        let faster: [fn(&mut Machine); 6] = [
            |machine| machine.gpu_rate *= 1.5,
            |machine| (machine.cpu.rate, machine.cpu.beside) = (15.0, 12.0),
            |machine| (machine.link.rate, machine.link.beside) = (7.5, 6.0),
            |machine| machine.cpu.start_ns = 0.0,
            |machine| machine.link.start_ns = 0.0,
            |machine| machine.visit_ns = 0.0,
        ];
        for bring in [Bring::Cpu, Bring::Link, Bring::Best] {
            let mut before = f64::INFINITY;
            for there in 0..=32 {
                let layers = [layer(32, 6, there); 4];
                let found = predict(5_000, &layers, Hits::Uniform, bring, &MACHINE).token_ns();
                assert!(found <= before + 1e-9, "{bring:?}, {there} there: {found} {before}");
                before = found;
                for change in &faster {
                    let mut machine = MACHINE;
                    change(&mut machine);
                    let now = predict(5_000, &layers, Hits::Uniform, bring, &machine).token_ns();
                    assert!(now <= found + 1e-9, "{bring:?}, {there} there: {machine:?}");
                }
            }
        }
    }

    #[test]
    fn the_split_starts_from_the_same_figures() {
        let seed = Seed::from(&MACHINE);
        assert_eq!((seed.cpu_ns_per_byte, seed.link_ns_per_byte), (0.1, 0.2));
        assert_eq!((seed.cpu_beside_link, seed.link_beside_cpu), (1.25, 1.25));
        assert_eq!((seed.cpu_start_ns, seed.link_start_ns), (100.0, 50.0));
    }
}
