//! From logits to the next token.
//!
//! Order of the steps, llama.cpp's default: penalties, DRY, top-k, top-p,
//! min-p, temperature, draw.

use crate::error::{Error, Result};
use std::collections::HashMap;

/// How tokens are chosen. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// 0 chooses the most likely token (the lowest id among equals).
    pub temperature: f32,
    /// Keeps the `top_k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of most likely tokens whose probabilities sum
    /// to at least this; 1 keeps all.
    pub top_p: f32,
    /// Drops tokens less likely than this share of the most likely one.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1
    /// is off (CTRL, 1909.05858).
    pub repetition_penalty: f32,
    /// Subtracted from logits of recent tokens.
    pub presence_penalty: f32,
    /// Subtracted from logits of recent tokens, times their count.
    pub frequency_penalty: f32,
    /// Recent tokens that the penalties look at.
    pub penalty_window: usize,
    pub dry: Option<Dry>,
    pub seed: u64,
}

/// "Don't repeat yourself": a token that would continue a repetition of at
/// least `allowed_length` tokens loses
/// `multiplier * base ^ (length - allowed_length)` from its logit.
#[derive(Clone, Debug, PartialEq)]
pub struct Dry {
    pub multiplier: f32,
    pub base: f32,
    pub allowed_length: usize,
    /// Recent tokens that it looks at.
    pub window: usize,
    /// Tokens that no repetition reaches across, such as line ends.
    pub breakers: Vec<u32>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 64,
            dry: None,
            seed: 0,
        }
    }
}

impl Default for Dry {
    fn default() -> Self {
        Self { multiplier: 0.8, base: 1.75, allowed_length: 2, window: 1024, breakers: Vec::new() }
    }
}

/// Windows longer than this would only cost time.
const LONGEST_WINDOW: usize = 1 << 20;

impl SamplerOptions {
    /// Names the first option that is out of its range.
    pub fn check(&self) -> Result<()> {
        let float = |name: &str, value: f32, low: f32, high: f32| match value {
            value if value >= low && value <= high => Ok(()),
            value => Err(Error::Request(format!("{name} {value}; allowed: {low} to {high}"))),
        };
        float("temperature", self.temperature, 0.0, 100.0)?;
        // A top-p of 0 keeps one token, as most engines have it.
        float("top-p", self.top_p, 0.0, 1.0)?;
        float("min-p", self.min_p, 0.0, 1.0)?;
        float("repetition penalty", self.repetition_penalty, 0.01, 100.0)?;
        float("presence penalty", self.presence_penalty, -100.0, 100.0)?;
        float("frequency penalty", self.frequency_penalty, -100.0, 100.0)?;
        let window = |name: &str, value: usize| match value {
            value if value <= LONGEST_WINDOW => Ok(()),
            value => Err(Error::Request(format!("{name} {value}; allowed: 0 to {LONGEST_WINDOW}"))),
        };
        window("penalty window", self.penalty_window)?;
        if let Some(dry) = &self.dry {
            float("DRY multiplier", dry.multiplier, 0.0, 100.0)?;
            float("DRY base", dry.base, 1.0, 100.0)?;
            window("DRY window", dry.window)?;
        }
        Ok(())
    }
}

/// Chooses tokens and remembers those of its sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    history: Vec<u32>,
    random: SplitMix,
    /// (logit, id) of the tokens still in the race
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.check()?;
        let random = SplitMix(options.seed);
        Ok(Self { options, history: Vec::new(), random, candidates: Vec::new() })
    }

    /// Tells the sampler of a token of the sequence: of the prompt, or the
    /// one that it chose.
    pub fn accept(&mut self, token: u32) {
        self.history.push(token);
    }

    /// The next token. `logits` is `[vocab]` and is changed by the penalties.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32> {
        if logits.iter().any(|logit| logit.is_nan()) {
            return Err(Error::NotFinite { position: self.history.len(), found: "NaN" });
        }
        self.penalise(logits);
        if let Some(dry) = &self.options.dry {
            penalise_repetition(dry, &self.history, logits);
        }
        if self.options.temperature == 0.0 {
            return Ok(greedy(logits));
        }
        self.keep_top_k(logits);
        self.keep_top_p();
        let best = self.candidates[0].0;
        let weights: Vec<f64> = self
            .candidates
            .iter()
            .map(|(logit, _)| f64::from((logit - best) / self.options.temperature).exp())
            .collect();
        let mut left = self.random.unit() * weights.iter().sum::<f64>();
        for (weight, (_, id)) in weights.iter().zip(&self.candidates) {
            left -= weight;
            if left < 0.0 {
                return Ok(*id);
            }
        }
        // Rounding can leave a crumb behind the last one.
        Ok(self.candidates[self.candidates.len() - 1].1)
    }

    fn penalise(&self, logits: &mut [f32]) {
        let o = &self.options;
        let off =
            o.repetition_penalty == 1.0 && o.presence_penalty == 0.0 && o.frequency_penalty == 0.0;
        if off {
            return;
        }
        let from = self.history.len().saturating_sub(o.penalty_window);
        let mut counts: HashMap<u32, f32> = HashMap::new();
        for &token in &self.history[from..] {
            *counts.entry(token).or_default() += 1.0;
        }
        for (token, count) in counts {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            match *logit > 0.0 {
                true => *logit /= o.repetition_penalty,
                false => *logit *= o.repetition_penalty,
            }
            *logit -= o.presence_penalty + count * o.frequency_penalty;
        }
    }

    /// Fills the candidates, most likely first, lower ids first among equals.
    fn keep_top_k(&mut self, logits: &[f32]) {
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        self.candidates.clear();
        self.candidates.extend(logits.iter().copied().zip(0..));
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, order);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(order);
    }

    /// Cuts the tail by top-p, then by min-p; both look at the probabilities
    /// at temperature 1.
    fn keep_top_p(&mut self) {
        let best = self.candidates[0].0;
        let probability = |logit: f32| f64::from(logit - best).exp();
        if self.options.top_p < 1.0 {
            let total: f64 = self.candidates.iter().map(|c| probability(c.0)).sum();
            let wanted = f64::from(self.options.top_p) * total;
            let mut sum = 0.0;
            let keep = self.candidates.iter().position(|c| {
                sum += probability(c.0);
                sum >= wanted
            });
            self.candidates.truncate(keep.map_or(self.candidates.len(), |last| last + 1));
        }
        let floor = f64::from(self.options.min_p);
        if floor > 0.0 {
            let keep = self.candidates.partition_point(|c| probability(c.0) >= floor);
            self.candidates.truncate(keep.max(1));
        }
    }
}

/// The most likely token, the lowest id among equals.
pub fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

fn penalise_repetition(dry: &Dry, history: &[u32], logits: &mut [f32]) {
    let from = history.len().saturating_sub(dry.window);
    // Newest token first: a repetition is a common prefix of this list and
    // of one of its tails.
    let recent: Vec<u32> = history[from..].iter().rev().copied().collect();
    let reach = recent.iter().position(|token| dry.breakers.contains(token));
    let reach = reach.unwrap_or(recent.len());
    let mut longest: HashMap<u32, usize> = HashMap::new();
    for (index, length) in common_prefixes(&recent).into_iter().enumerate().skip(1) {
        let length = length.min(reach);
        if length >= dry.allowed_length.max(1) {
            let entry = longest.entry(recent[index - 1]).or_default();
            *entry = (*entry).max(length);
        }
    }
    for (token, length) in longest {
        if let Some(logit) = logits.get_mut(token as usize) {
            let excess = (length - dry.allowed_length) as f32;
            // Finite, so that a long loop cannot turn logits into NaN.
            *logit -= (dry.multiplier * dry.base.powf(excess)).min(1e30);
        }
    }
}

/// For each index, how far the list's tail from there equals its start (the
/// Z function), in linear time.
fn common_prefixes(list: &[u32]) -> Vec<usize> {
    let mut lengths = vec![0; list.len()];
    let (mut left, mut right) = (0, 0);
    for i in 1..list.len() {
        let mut length = if i < right { lengths[i - left].min(right - i) } else { 0 };
        while i + length < list.len() && list[length] == list[i + length] {
            length += 1;
        }
        if i + length > right {
            (left, right) = (i, i + length);
        }
        lengths[i] = length;
    }
    lengths
}

/// SplitMix64 (Steele, Lea, Flood 2014): the same numbers on every machine.
#[derive(Clone, Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In 0..1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(options: SamplerOptions, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(options).unwrap();
        (0..count).map(|_| sampler.sample(&mut logits.to_vec()).unwrap()).collect()
    }

    fn warm() -> SamplerOptions {
        SamplerOptions { temperature: 1.0, seed: 7, ..Default::default() }
    }

    #[test]
    fn splitmix_gives_the_published_numbers() {
        let mut random = SplitMix(1234567);
        let numbers: Vec<u64> = (0..3).map(|_| random.next()).collect();
        let published = [6457827717110365317, 3203168211198807973, 9817491932198370423];
        assert_eq!(numbers, published);
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        assert_eq!(draws(SamplerOptions::default(), &[0.0, 3.0, 3.0, 1.0], 2), [1, 1]);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let logits = [0.0f32, 2f32.ln(), 5f32.ln()];
        let found = draws(warm(), &logits, 8000);
        assert_eq!(found, draws(warm(), &logits, 8000));
        assert_ne!(found, draws(SamplerOptions { seed: 8, ..warm() }, &logits, 8000));
        for (token, share) in [(0, 0.125), (1, 0.25), (2, 0.625)] {
            let count = found.iter().filter(|&&t| t == token).count() as f64 / 8000.0;
            // Five standard deviations of the widest share.
            assert!((count - share).abs() < 0.028, "{token}: {count}");
        }
    }

    #[test]
    fn cuts_keep_what_they_say() {
        let logits = [1.0, 4.0, 3.0, 2.0, -f32::INFINITY];
        let kept = |options: SamplerOptions| {
            let mut found = draws(options, &logits, 4000);
            found.sort_unstable();
            found.dedup();
            found
        };
        assert_eq!(kept(SamplerOptions { top_k: 2, ..warm() }), [1, 2]);
        assert_eq!(kept(SamplerOptions { top_p: 0.7, ..warm() }), [1, 2]);
        assert_eq!(kept(SamplerOptions { top_p: 0.0, ..warm() }), [1]);
        assert_eq!(kept(SamplerOptions { min_p: 0.3, ..warm() }), [1, 2]);
        assert_eq!(kept(warm()), [0, 1, 2, 3]);
    }

    #[test]
    fn penalties_move_repeated_tokens_down() {
        let choose = |options: SamplerOptions| {
            let mut sampler = Sampler::new(options).unwrap();
            sampler.accept(1);
            sampler.accept(1);
            sampler.sample(&mut [1.0, 1.5, 0.5]).unwrap()
        };
        let base = SamplerOptions::default();
        assert_eq!(choose(base.clone()), 1);
        assert_eq!(choose(SamplerOptions { repetition_penalty: 2.0, ..base.clone() }), 0);
        assert_eq!(choose(SamplerOptions { presence_penalty: 0.6, ..base.clone() }), 0);
        assert_eq!(choose(SamplerOptions { frequency_penalty: 0.3, ..base.clone() }), 0);
        assert_eq!(choose(SamplerOptions { frequency_penalty: 0.2, ..base.clone() }), 1);
        let outside = SamplerOptions { presence_penalty: 9.0, penalty_window: 0, ..base };
        assert_eq!(choose(outside), 1);
    }

    #[test]
    fn dry_stops_a_loop_and_respects_breakers() {
        let next = |dry: Dry, history: &[u32]| {
            let options = SamplerOptions { dry: Some(dry), ..Default::default() };
            let mut sampler = Sampler::new(options).unwrap();
            history.iter().for_each(|&token| sampler.accept(token));
            sampler.sample(&mut [0.0, 0.1, 0.2, 2.0]).unwrap()
        };
        // 0 1 3 0 1 3 0 1: the loop would go on with 3.
        let history = [0, 1, 3, 0, 1, 3, 0, 1];
        assert_eq!(next(Dry::default(), &history), 2);
        assert_eq!(next(Dry { allowed_length: 9, ..Dry::default() }, &history), 3);
        assert_eq!(next(Dry { breakers: vec![1], ..Dry::default() }, &history), 3);
        let endless = [0u32; 100_000];
        assert_eq!(next(Dry { window: 100_000, ..Dry::default() }, &endless), 3);
    }

    #[test]
    fn common_prefixes_equal_their_definition() {
        let list: Vec<u32> = (0..200).map(|i: u32| (i * i / 7) % 3).collect();
        for (i, length) in common_prefixes(&list).into_iter().enumerate().skip(1) {
            let want = list.iter().zip(&list[i..]).take_while(|(a, b)| a == b).count();
            assert_eq!(length, want, "at {i}");
        }
    }

    #[test]
    fn bad_numbers_are_named() {
        for (options, name) in [
            (SamplerOptions { temperature: f32::NAN, ..Default::default() }, "temperature"),
            (SamplerOptions { temperature: -1.0, ..Default::default() }, "temperature"),
            (SamplerOptions { top_p: 2.0, ..Default::default() }, "top-p"),
            (SamplerOptions { min_p: -0.1, ..Default::default() }, "min-p"),
            (SamplerOptions { repetition_penalty: 0.0, ..Default::default() }, "repetition"),
            (SamplerOptions { penalty_window: usize::MAX, ..Default::default() }, "window"),
        ] {
            let text = Sampler::new(options).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains("allowed"), "{text}");
        }
        let mut sampler = Sampler::new(warm()).unwrap();
        assert!(matches!(sampler.sample(&mut [0.0, f32::NAN]), Err(Error::NotFinite { .. })));
    }
}
