//! A model on a simulated machine: routing with popularity and locality,
//! caches that evict, and a decoder that a controller or a fixed rule leads.

use super::machine::{IN_THE_WAY, Machine, Rng};
use pregate_predictor::split::{Asked, Choice, Keep, Miss, Place, Spare, Split};
use pregate_predictor::{Admission, ExpertId, LayerShape, Shape};
use std::ops::Range;

/// Who is resident in one layer.
#[derive(Clone, Debug)]
struct Slots {
    resident: Vec<bool>,
    /// Token of the last use; decayed number of uses.
    used: Vec<usize>,
    uses: Vec<f64>,
    free: usize,
    /// Evict the least used instead of the least recently used; who has come
    /// stays only if it is used more.
    by_use: bool,
}

impl Slots {
    fn new(experts: usize, slots: usize, by_use: bool) -> Self {
        let resident = (0..experts).map(|expert| expert < slots).collect();
        Self { resident, used: vec![0; experts], uses: vec![0.0; experts], free: 0, by_use }
    }

    fn note(&mut self, token: usize, experts: &[u32]) {
        if self.by_use {
            self.uses.iter_mut().for_each(|uses| *uses *= 0.97);
        }
        for &expert in experts {
            self.used[expert as usize] = token;
            self.uses[expert as usize] += 1.0;
        }
    }

    /// `expert` was copied; `chosen` are the event's, which stay.
    fn admit(&mut self, layer: usize, expert: u32, chosen: &[u32]) -> Admission {
        if self.free > 0 {
            self.free -= 1;
            self.resident[expert as usize] = true;
            return Admission::Added;
        }
        let may = |&one: &usize| self.resident[one] && !chosen.contains(&(one as u32));
        let all = (0..self.resident.len()).filter(may);
        let victim = match self.by_use {
            true => all.min_by(|&a, &b| self.uses[a].total_cmp(&self.uses[b])),
            false => all.min_by_key(|&one| self.used[one]),
        };
        let worse = |one: &usize| !self.by_use || self.uses[*one] <= self.uses[expert as usize];
        let Some(victim) = victim.filter(worse) else { return Admission::Bypassed };
        self.resident[victim] = false;
        self.resident[expert as usize] = true;
        Admission::Replaced(ExpertId::new(layer, victim as u32))
    }
}

/// A model with its routing on a machine that may change.
#[derive(Clone, Debug)]
pub struct World {
    /// The machine from a token on, ascending.
    pub machines: Vec<(usize, Machine)>,
    /// `[layers]`
    pub bytes: Vec<f64>,
    pub top_k: usize,
    pub experts: usize,
    pub slots: usize,
    pub by_use: bool,
    /// Copies that a layer may order.
    pub frames: usize,
    /// `[tokens][layers]`: the chosen experts.
    routes: Vec<Vec<Vec<u32>>>,
}

impl World {
    pub fn random(seed: u64, tokens: usize) -> Self {
        let mut rng = Rng(seed);
        let rng = &mut rng;
        let machine = Machine::random(rng);
        let (bytes, other) = (rng.factor(1e6, 30e6), rng.factor(0.5, 2.0));
        let two_shapes = rng.chance(0.5);
        let layers = 16 + rng.below(17);
        let size = |index: usize| if two_shapes && index.is_multiple_of(3) { other } else { 1.0 };
        let top_k = 1 + rng.below(8);
        let experts = (top_k + 2).max(16 << rng.below(3));
        let slots = (top_k + 1).max((rng.uniform(0.05, 0.97) * experts as f64) as usize);
        let mut world = Self {
            machines: vec![(0, machine)],
            bytes: (0..layers).map(|index| (bytes * size(index)).round()).collect(),
            top_k,
            experts,
            slots: slots.min(experts - 1),
            by_use: rng.chance(0.3),
            frames: usize::MAX,
            routes: Vec::new(),
        };
        world.route(tokens, rng);
        world
    }

    /// Zipf's law in an order of each layer's own, some experts kept from
    /// token to token.
    fn route(&mut self, tokens: usize, rng: &mut Rng) {
        let (steep, stays) = (rng.uniform(0.0, 1.3), rng.uniform(0.0, 0.7));
        let mut sums: Vec<f64> = Vec::new();
        for rank in 0..self.experts {
            let below = sums.last().copied().unwrap_or(0.0);
            sums.push(below + ((rank + 1) as f64).powf(-steep));
        }
        let total = sums[self.experts - 1];
        let orders: Vec<Vec<u32>> = (self.bytes.iter())
            .map(|_| {
                let mut order: Vec<u32> = (0..self.experts as u32).collect();
                (1..self.experts).rev().for_each(|at| order.swap(at, rng.below(at + 1)));
                order
            })
            .collect();
        let mut last = vec![Vec::new(); self.bytes.len()];
        for _ in 0..tokens {
            for (order, chosen) in orders.iter().zip(&mut last) {
                let mut next: Vec<u32> = chosen.clone();
                next.retain(|_| rng.chance(stays));
                while next.len() < self.top_k {
                    let at = rng.uniform(0.0, total);
                    let expert = order[sums.partition_point(|&sum| sum < at).min(order.len() - 1)];
                    if !next.contains(&expert) {
                        next.push(expert);
                    }
                }
                *chosen = next;
            }
            self.routes.push(last.clone());
        }
    }

    pub fn shape(&self) -> Shape {
        let layer = |&bytes: &f64| LayerShape {
            experts: self.experts,
            top_k: self.top_k,
            expert_bytes: bytes as u64,
            class: 0,
        };
        Shape { layers: self.bytes.iter().map(|bytes| Some(layer(bytes))).collect() }
    }

    pub fn machine(&self, token: usize) -> &Machine {
        &self.machines.iter().rfind(|(from, _)| *from <= token).expect("a first machine").1
    }
}

/// Who says what the link brings.
pub enum Rule<'a> {
    /// A share of the misses, in rank order.
    Share(f64),
    /// For every number of misses what ends first, with the machine's own
    /// prices and without a thought of later tokens.
    Clairvoyant,
    Live(&'a mut Split, Rng),
    /// The same, and what it says is worth it is copied for later.
    Keeping(&'a mut Split, Rng),
}

impl Rule<'_> {
    /// [`Split::explored_ns`] so far.
    pub fn explored_ns(&self) -> (u64, u64) {
        match self {
            Self::Live(split, _) | Self::Keeping(split, _) => split.explored_ns(),
            Self::Share(_) | Self::Clairvoyant => (0, 0),
        }
    }

    fn split(&mut self) -> Option<(&mut Split, &mut Rng)> {
        match self {
            Self::Live(split, rng) | Self::Keeping(split, rng) => Some((split, rng)),
            Self::Share(_) | Self::Clairvoyant => None,
        }
    }
}

/// ns of layers, noise-free.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Of all layers, from the decision to the last row, and of those with
    /// misses.
    pub wall: f64,
    pub asked: f64,
    /// What the same decisions would have taken as best as can be, all on
    /// the CPU, all over the link.
    pub best: f64,
    pub cpu_only: f64,
    pub link_only: f64,
    pub misses: usize,
    pub copies: usize,
    /// Copied for later.
    pub kept: usize,
    pub events: usize,
    /// Decisions that took at least four times the best of that moment.
    pub disasters: usize,
    pub disaster_ns: f64,
}

/// A run that can go on.
pub struct Decoder<'a> {
    world: &'a World,
    caches: Vec<Slots>,
    token: usize,
    choice: Choice,
    list: Vec<Miss>,
    /// What [`Rule::Share`] has left over, in experts.
    rest: f64,
    /// The other work of the link: the same under every rule.
    traffic: Rng,
    /// On their way for later: layer, expert, bytes left.
    spare: Vec<(usize, u32, f64)>,
    keeps: Vec<Keep>,
    computed: Vec<u32>,
    /// The CPU's work and all time, lately, in ns.
    lately: [f64; 2],
}

impl<'a> Decoder<'a> {
    pub fn new(world: &'a World) -> Self {
        let slots = Slots::new(world.experts, world.slots, world.by_use);
        Self {
            world,
            caches: vec![slots; world.bytes.len()],
            token: 0,
            choice: Choice::default(),
            list: Vec::new(),
            rest: 0.0,
            traffic: Rng(77),
            spare: Vec::new(),
            keeps: Vec::new(),
            computed: Vec::new(),
            lately: [0.0; 2],
        }
    }

    pub fn run(&mut self, tokens: Range<usize>, rule: &mut Rule<'_>) -> Totals {
        assert_eq!(tokens.start, self.token);
        let mut totals = Totals::default();
        for token in tokens {
            if let Some((split, _)) = rule.split() {
                split.next_token();
            }
            for layer in 0..self.world.bytes.len() {
                self.layer(token, layer, rule, &mut totals);
            }
            self.token += 1;
        }
        totals
    }

    /// `bytes` of what nobody waits for have moved: what is there is admitted.
    fn moved(&mut self, token: usize, mut bytes: f64, rule: &mut Rule<'_>) {
        while let Some(first) = self.spare.first_mut() {
            first.2 -= bytes;
            if first.2 > 1.0 {
                break;
            }
            bytes = -first.2;
            let (layer, expert, _) = self.spare.remove(0);
            // As in the store: a demand has brought it, or this token needs it.
            let chosen = &self.world.routes[token][layer];
            if !self.caches[layer].resident[expert as usize] {
                let got = self.caches[layer].admit(layer, expert, chosen);
                if let Some((split, _)) = rule.split() {
                    split.admitted(layer, expert, &got);
                }
            }
        }
    }

    /// What the CPU computes in `layer`, and is worth it, goes to the link.
    fn keep(&mut self, layer: usize, rule: &mut Rule<'_>) -> usize {
        let Rule::Keeping(split, _) = rule else { return 0 };
        self.computed.clear();
        let on_cpu = self.list.iter().zip(&self.choice.places);
        let on_cpu =
            on_cpu.filter(|(miss, place)| **place == Place::Cpu && miss.remaining_ns.is_none());
        self.computed.extend(on_cpu.map(|(miss, _)| miss.expert));
        // A frame at a time.
        let frames = usize::from(self.spare.is_empty()).min(self.world.frames);
        let cpu_share = self.lately[0] / self.lately[1].max(1.0);
        let spare = Spare { layer, computed: &self.computed, frames, cpu_share };
        split.keep(&spare, &mut self.keeps);
        let bytes = self.world.bytes[layer];
        self.spare.extend(self.keeps.iter().map(|keep| (layer, keep.expert, bytes)));
        self.keeps.len()
    }

    fn layer(&mut self, token: usize, layer: usize, rule: &mut Rule<'_>, totals: &mut Totals) {
        let (machine, bytes) = (self.world.machine(token), self.world.bytes[layer]);
        let chosen = &self.world.routes[token][layer];
        let cache = &mut self.caches[layer];
        cache.note(token + 1, chosen);
        self.list.clear();
        let missing = chosen.iter().filter(|&&expert| !cache.resident[expert as usize]);
        // What is under way for later lands behind what is before it.
        let under_way = |expert: u32| {
            let at = self.spare.iter().position(|one| (one.0, one.1) == (layer, expert))?;
            let bytes: f64 = self.spare[..=at].iter().map(|one| one.2).sum();
            Some((bytes / machine.link) as u64)
        };
        let miss = |&expert: &u32| Miss { expert, remaining_ns: under_way(expert) };
        self.list.extend(missing.map(miss));
        let q = self.list.len();
        let most = q.min(self.world.frames);
        let busy = self.traffic.chance(machine.busy);
        let queue = if busy { self.traffic.uniform(0.0, machine.busy_ns) } else { 0.0 };
        let gpu = machine.late + (chosen.len() - q) as f64 * bytes / machine.vram;
        if let Some((split, _)) = rule.split() {
            split.routed(layer, chosen);
        }
        if q == 0 {
            totals.wall += gpu;
            self.lately[1] += gpu + machine.gap;
            self.moved(token, (gpu + machine.gap) * machine.link, rule);
            return;
        }
        let before: f64 = self.spare.iter().map(|one| one.2).sum();
        let wall =
            |copies: usize| machine.ends(bytes, (q - copies, copies), queue, gpu, before).wall;
        let places = &mut self.choice.places;
        match rule {
            Rule::Share(share) => {
                self.rest += *share * q as f64;
                let copies = (self.rest.round() as usize).min(most);
                // What found no frame is not caught up on.
                self.rest = (self.rest - copies as f64).min(1.0);
                places.clear();
                places.resize(copies, Place::Link);
            }
            Rule::Clairvoyant => {
                let copies = (0..=most).min_by(|&a, &b| wall(a).total_cmp(&wall(b))).unwrap_or(0);
                places.clear();
                places.resize(copies, Place::Link);
            }
            Rule::Live(split, _) | Rule::Keeping(split, _) => {
                let asked = Asked {
                    layer,
                    misses: &self.list,
                    resident: self.world.slots,
                    frames: most,
                    queue_ns: (queue + before.min(IN_THE_WAY) / machine.link) as u64,
                    hidden_ns: gpu as u64,
                };
                split.choose(&asked, &mut self.choice);
            }
        }
        let waits = self.choice.count(Place::Wait);
        let copies = self.choice.count(Place::Link) + waits;
        let best = (0..=most).map(wall).fold(f64::INFINITY, f64::min);
        let pure = [wall(0), wall(q)];
        // What is waited for is a demand now, as long as any.
        let places = self.list.iter().zip(&self.choice.places);
        for (miss, _) in places.filter(|(_, place)| **place == Place::Wait) {
            self.spare.retain(|one| (one.0, one.1) != (layer, miss.expert));
        }
        let kept = self.keep(layer, rule);
        let spare: f64 = self.spare.iter().map(|one| one.2).sum();
        let counts = (q - copies, copies);
        let ends = machine.ends(bytes, counts, queue, gpu, spare);
        let now = ends.wall;
        totals.wall += now;
        totals.kept += kept;
        totals.asked += now;
        totals.events += 1;
        totals.misses += q;
        totals.copies += copies;
        self.lately = self.lately.map(|ns| 0.99 * ns);
        self.lately[0] += ends.cpu;
        self.lately[1] += now + machine.gap;
        if let Some((split, rng)) = rule.split() {
            totals.best += best;
            totals.cpu_only += pure[0];
            totals.link_only += pure[1];
            if now >= 4.0 * best {
                totals.disasters += 1;
                totals.disaster_ns += now - best;
            }
            let mut told = machine.told(bytes, counts, queue, gpu, spare, rng);
            if waits > 0 {
                let wait_ns = told.delay_ns + told.copy_ns;
                (told.copies, told.waits, told.wait_ns) = (copies - waits, waits, wait_ns);
                told.copy_ns *= u64::from(copies > waits);
            }
            split.measured(layer, &told);
        }
        for (miss, place) in self.list.iter().zip(&self.choice.places) {
            if *place != Place::Cpu {
                let got = self.caches[layer].admit(layer, miss.expert, chosen);
                if let Some((split, _)) = rule.split() {
                    split.admitted(layer, miss.expert, &got);
                }
            }
        }
        self.moved(token, ends.moved + machine.gap * machine.link, rule);
    }
}

/// What fixed rules take before `window` and in it, in ns: one for each of
/// `shares` of the misses that the link brings, then the clairvoyant.
pub fn fixed(world: &World, window: &Range<usize>, shares: &[f64]) -> Vec<[f64; 2]> {
    let walls = |mut rule: Rule<'_>| {
        let mut decoder = Decoder::new(world);
        [0..window.start, window.clone()].map(|tokens| decoder.run(tokens, &mut rule).wall)
    };
    let shares = shares.iter().map(|&share| walls(Rule::Share(share)));
    shares.chain([walls(Rule::Clairvoyant)]).collect()
}
