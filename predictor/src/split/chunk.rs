//! A prompt's chunk: an expert has many tokens. Computing it takes the CPU
//! longer for each, copying it takes the link the same for all.

use super::worker::{Other, sane};
use super::{Place, Split};

/// A token of an expert beyond the first, as a share of the first: what the
/// weights' way from memory hides. Before anything was measured.
const TOKEN_SHARE: f64 = 0.25;

/// The answer for a chunk; used again from layer to layer.
#[derive(Clone, Debug, Default)]
pub struct Chunk {
    /// `[missing experts]`, each [`Place::Cpu`] or [`Place::Link`].
    pub places: Vec<Place>,
    /// When each worker ends, ns from the decision, as expected.
    pub cpu_ns: u64,
    pub link_ns: u64,
    /// Tokens of an expert from which on it is copied; `None`: nothing is.
    pub threshold: Option<u32>,
    /// Scratch.
    order: Vec<usize>,
}

/// What a chunk's workers took. A time of 0 was not measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ChunkOutcome {
    /// Experts on the CPU, the tokens of all of them, and ns for all.
    pub cpu: usize,
    pub cpu_tokens: usize,
    pub cpu_ns: u64,
    /// Copies, and ns from the start of the first to the end of the last.
    pub copies: usize,
    pub copy_ns: u64,
}

/// What tokens of one expert cost on the CPU beyond the first.
#[derive(Clone, Debug)]
pub struct Tokens {
    share: f64,
    weight: f64,
}

impl Default for Tokens {
    fn default() -> Self {
        Self { share: TOKEN_SHARE, weight: 0.0 }
    }
}

impl Tokens {
    /// `n` experts that take `first_ns` with one token each had `tokens` more
    /// tokens in all and took `ns`.
    fn learn(&mut self, first_ns: f64, each_ns: f64, tokens: f64, ns: f64) {
        // Less than doubling the time says little about a token's price.
        let seen = ((ns - first_ns) / (each_ns * tokens)).clamp(0.0, 1e3);
        let trust = (each_ns * tokens * self.share / first_ns.max(1.0)).min(1.0);
        if trust < 0.1 {
            return;
        }
        self.weight = (self.weight + trust).min(16.0);
        let step = (seen - self.share) * trust / (0.25 + self.weight);
        // One disturbed chunk changes the price by half at most.
        self.share = (self.share + step.clamp(-0.5 * self.share, self.share)).clamp(1e-4, 1e3);
    }
}

impl Split {
    /// Shares the missing experts of a chunk in `layer`, which have
    /// `tokens[i]` tokens each: the link takes those with most tokens, as
    /// many as let both workers end soonest. `queue_ns`: until the link would
    /// start. A layer without experts leaves all to the CPU.
    pub fn choose_chunk(&mut self, layer: usize, tokens: &[u32], queue_ns: u64, out: &mut Chunk) {
        out.places.clear();
        out.places.resize(tokens.len(), Place::Cpu);
        (out.cpu_ns, out.link_ns, out.threshold) = (0, 0, None);
        let Some(given) = self.given(layer).map(|given| *given) else { return };
        let class = &self.classes[given.class];
        out.order.clear();
        out.order.extend(0..tokens.len());
        out.order.sort_unstable_by_key(|&at| (std::cmp::Reverse(tokens[at]), at));
        let copies_ns = |copies: usize| match copies {
            0 => 0.0,
            // Both are busy nearly always.
            _ => {
                let other = Other { count: tokens.len() - copies, share: 1.0 };
                let other = if other.count == 0 { Other { share: 0.0, ..other } } else { other };
                queue_ns as f64 + class.link.time(given.at, copies, other)
            }
        };
        let more = |count: u32| f64::from(count.saturating_sub(1));
        let cpu_ns = |cpu: usize, more_tokens: f64| match cpu {
            0 => 0.0,
            _ => {
                let share = if cpu < tokens.len() { 1.0 } else { 0.0 };
                let first =
                    class.cpu.time(given.at, cpu, Other { count: tokens.len() - cpu, share });
                let each = first / cpu as f64;
                sane(first + each * class.tokens.share * more_tokens)
            }
        };
        let mut rest: f64 = tokens.iter().map(|&count| more(count)).sum();
        let (mut best, mut ends) = (0, (cpu_ns(tokens.len(), rest), 0.0));
        for (at, &expert) in out.order.iter().enumerate() {
            rest -= more(tokens[expert]);
            let copies = at + 1;
            let now = (cpu_ns(tokens.len() - copies, rest.max(0.0)), copies_ns(copies));
            if now.0.max(now.1) < ends.0.max(ends.1) {
                (best, ends) = (copies, now);
            }
        }
        for &expert in &out.order[..best] {
            out.places[expert] = Place::Link;
        }
        out.threshold = best.checked_sub(1).map(|last| tokens[out.order[last]]);
        (out.cpu_ns, out.link_ns) = (ends.0 as u64, ends.1 as u64);
    }

    /// Tells what a chunk took in `layer`.
    pub fn measured_chunk(&mut self, layer: usize, told: &ChunkOutcome) {
        let Some(given) = self.given(layer).map(|given| *given) else { return };
        let class = &mut self.classes[given.class];
        let both = if told.cpu > 0 && told.copies > 0 { 1.0 } else { 0.0 };
        let more = told.cpu_tokens.saturating_sub(told.cpu);
        if told.cpu > 0 && told.cpu_ns > 0 && more > 0 {
            let other = Other { count: told.copies, share: both };
            let first = class.cpu.time(given.at, told.cpu, other);
            let each = first / told.cpu as f64;
            class.tokens.learn(first, each, more as f64, sane(told.cpu_ns as f64));
        }
        if told.copies > 0 && told.copy_ns > 0 {
            let other = Other { count: told.cpu, share: both };
            class.link.learn(given.at, told.copies, other, told.copy_ns as f64, false);
        }
    }
}
