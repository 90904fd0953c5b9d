//! What a copied expert saves later, in misses.
//!
//! A copy brings two things: this token's answer, and an expert that stays.
//! The second is learned from the routing alone, which is the same wherever
//! an expert is computed: how often a missed expert is used again at each age
//! (also if the CPU computed it, so CPU-only learns what copies would bring),
//! how often an evicted one is missed soon after, and how long an expert
//! stays unused before it has to leave.
//!
//! Without the copy the slot would keep the expert that is next to leave, so
//! a copy gains the next use of the one and loses the uses of the other until
//! then. With `u` the chance of a use before the stay ends, `l` the uses lost
//! and `miss` what a miss costs when it is dealt with as well as can be, less
//! what its own copy gains, the gain is `g = (u - l) * (miss + g)`: after each
//! use the stay begins anew. Copies are worth the same whether other misses
//! are mostly copied or mostly not.

use crate::cache::Admission;

/// Upper ends of the ages, in tokens since the miss.
const AGES: [u32; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
const OLDEST: u32 = AGES[AGES.len() - 1];
/// Misses are told apart by how much the expert was used before: below so
/// many uses, each of which fades to a half in `HEAT_HALF` tokens; then those
/// with more.
const HEATS: [f32; 5] = [0.25, 0.75, 1.5, 3.0, 6.0];
const HEAT_HALF: f32 = 24.0;
pub const GROUPS: usize = HEATS.len() + 1;
/// Ages of an evicted expert that count as what its slot still brought.
const LEFT: u32 = 16;
/// Tokens between two countings of a layer.
const COUNT_EVERY: u64 = 8;
/// Tokens of exposure that an expectation without data is worth.
const PRIOR: f64 = 32.0;
/// Observations fade to a half in so many tokens.
const HALF: f64 = 256.0;
/// The same of who is next to leave: at first that is anybody, so what was
/// seen first is forgotten soon.
const LEFT_HALF: [f64; 2] = [8.0, 128.0];
/// Evictions, lately, that are enough to learn from alone.
const EVICTIONS: f64 = 4.0;
/// The expert that is next to leave is used less than others.
const COLDEST: f64 = 0.25;
/// Misses that one copy may be worth.
const MOST_GAIN: f64 = 16.0;

/// Uses in tokens of exposure.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    uses: f64,
    tokens: f64,
}

impl Rate {
    fn or(&self, prior: f64) -> f64 {
        ((self.uses + PRIOR * prior) / (self.tokens + PRIOR)).clamp(0.0, 1.0)
    }

    /// To a half in `half` tokens.
    fn fade(&mut self, half: f64) {
        let factor = (-std::f64::consts::LN_2 / half).exp();
        self.uses *= factor;
        self.tokens *= factor;
    }
}

/// One expert of one layer; tokens count from 1.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    /// Token of the last use.
    used: u32,
    /// Uses before the last one, faded until then.
    heat: f32,
    /// Token of the miss that is watched, 0: none; its group, and how many
    /// ages of it have been counted.
    missed: u32,
    group: u8,
    counted: u32,
    /// Token in which it was evicted, or was the next to leave; 0: not
    /// lately; ages counted.
    left: u32,
    left_counted: u32,
    /// It was in VRAM when it was heard of last.
    is_resident: bool,
}

/// The experts of one layer.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    experts: Vec<Mark>,
    /// Experts in VRAM, as the caller says.
    resident: usize,
    /// First uses since the last counting that were no misses.
    first_hits: u32,
    counted: u32,
}

impl Marks {
    pub fn new(experts: usize) -> Self {
        Self { experts: vec![Mark::default(); experts], ..Self::default() }
    }
}

/// What the layers of one shape have in common.
#[derive(Clone, Debug)]
pub struct Reuse {
    again: [[Rate; AGES.len()]; GROUPS],
    left: Rate,
    /// Tokens without use after which an expert leaves.
    stay: f64,
    stays_seen: f64,
    /// Share of copies that got a slot.
    kept: [f64; GROUPS],
    /// A use by chance: experts per token of experts.
    chance: f64,
    /// `[GROUPS]`: misses that a copy saves.
    gains: [f64; GROUPS],
}

fn token32(token: u64) -> u32 {
    u32::try_from(token).unwrap_or(u32::MAX)
}

impl Reuse {
    pub fn new(top_k: usize, experts: usize) -> Self {
        Self {
            again: Default::default(),
            left: Rate::default(),
            stay: 64.0,
            stays_seen: 0.0,
            kept: [1.0; GROUPS],
            chance: (top_k as f64 / experts.max(1) as f64).min(1.0),
            gains: [0.0; GROUPS],
        }
    }

    /// Adds the ages up to `age` that were not counted yet.
    fn expose(&mut self, mark: &mut Mark, age: u32) {
        let rates = &mut self.again[usize::from(mark.group) % GROUPS];
        let mut from = 0;
        for (rate, &to) in rates.iter_mut().zip(&AGES) {
            let new = age.min(to).saturating_sub(mark.counted.max(from));
            rate.tokens += f64::from(new);
            from = to;
        }
        mark.counted = mark.counted.max(age);
    }

    fn expose_left(&mut self, mark: &mut Mark, age: u32) {
        let age = age.min(LEFT);
        self.left.tokens += f64::from(age.saturating_sub(mark.left_counted));
        mark.left_counted = mark.left_counted.max(age);
    }

    /// The router of a layer chose `experts`.
    pub fn routed(&mut self, marks: &mut Marks, token: u64, layer: usize, experts: &[u32]) {
        let now = token32(token);
        for &expert in experts {
            let Some(mark) = marks.experts.get_mut(expert as usize) else { continue };
            let age = now.saturating_sub(mark.missed);
            if mark.missed > 0 && age > 0 {
                self.expose(mark, age);
                if let Some(at) = AGES.iter().position(|&to| age <= to) {
                    self.again[usize::from(mark.group) % GROUPS][at].uses += 1.0;
                }
                mark.missed = 0;
            }
            let age = now.saturating_sub(mark.left);
            if mark.left > 0 && age > 0 {
                self.expose_left(mark, age);
                self.left.uses += f64::from(u8::from(age <= LEFT));
                mark.left = 0;
            }
            if mark.used != now {
                marks.first_hits += u32::from(mark.used == 0);
                mark.is_resident = true;
                let idle = now.saturating_sub(mark.used) as f32;
                let last = f32::from(u8::from(mark.used > 0));
                mark.heat = (mark.heat + last) * (-idle / HEAT_HALF).exp2();
                mark.used = now;
            }
        }
        if (token.wrapping_add(layer as u64)).is_multiple_of(COUNT_EVERY) {
            self.count(marks, now);
        }
    }

    /// Counts what has not been used again, too, so that rates are not those
    /// of the lucky.
    fn count(&mut self, marks: &mut Marks, now: u32) {
        let (mut known, mut next) = (0, None);
        for (at, mark) in marks.experts.iter_mut().enumerate() {
            if mark.is_resident {
                known += 1;
                let heat = (mark.heat + 1.0)
                    * (-(now.saturating_sub(mark.used) as f32) / HEAT_HALF).exp2();
                if next.is_none_or(|(least, _)| heat < least) {
                    next = Some((heat, at));
                }
            }
            let age = now.saturating_sub(mark.missed);
            if mark.missed > 0 {
                self.expose(mark, age);
                if age > OLDEST {
                    mark.missed = 0;
                }
            }
            let age = now.saturating_sub(mark.left);
            if mark.left > 0 {
                self.expose_left(mark, age);
                if age > LEFT {
                    mark.left = 0;
                }
            }
        }
        self.watch(marks, known, next, now);
    }

    /// Watches the expert whose slot the next copy would take, so that its
    /// worth is known before anything is copied: one that was never used, or
    /// the least used.
    fn watch(&mut self, marks: &mut Marks, known: usize, next: Option<(f32, usize)>, now: u32) {
        let tokens = now.saturating_sub(marks.counted).min(LEFT);
        let first_hits = std::mem::take(&mut marks.first_hits);
        marks.counted = now;
        if self.stays_seen > EVICTIONS {
            return;
        }
        let unused = marks.resident.saturating_sub(known);
        if unused > 0 {
            self.left.tokens += f64::from(tokens);
            self.left.uses += f64::from(first_hits) / (unused as f64 + f64::from(first_hits));
        } else if let Some(mark) = next.and_then(|(_, at)| marks.experts.get_mut(at))
            && mark.left == 0
        {
            let idle = f64::from(now.saturating_sub(mark.used)).min(f64::from(OLDEST));
            self.stay += (idle - self.stay).max(0.0) / 8.0;
            (mark.left, mark.left_counted) = (now.max(1), 0);
        }
    }

    fn group(marks: &Marks, expert: u32) -> usize {
        let heat = marks.experts.get(expert as usize).map_or(0.0, |mark| mark.heat);
        HEATS.iter().position(|&below| heat < below).unwrap_or(HEATS.len())
    }

    /// Misses that a copy of `expert`, which is missing now, is expected to
    /// save; below 0 where the one that leaves for it is worth more.
    pub fn gain(&self, marks: &Marks, expert: u32) -> f64 {
        self.gains[Self::group(marks, expert)]
    }

    /// Of `resident` experts in VRAM none is `expert`, which is needed.
    pub fn missed(&mut self, marks: &mut Marks, token: u64, expert: u32, resident: usize) {
        let group = Self::group(marks, expert) as u8;
        marks.resident = resident;
        if let Some(mark) = marks.experts.get_mut(expert as usize) {
            let is_first = mark.heat == 0.0 && mark.is_resident;
            marks.first_hits = marks.first_hits.saturating_sub(u32::from(is_first));
            mark.is_resident = false;
            (mark.missed, mark.group, mark.counted) = (token32(token), group, 0);
        }
    }

    /// What the cache did with a copied expert.
    pub fn admitted(&mut self, marks: &mut Marks, expert: u32, got: &Admission) {
        let kept = !matches!(got, Admission::Bypassed);
        let share = &mut self.kept[Self::group(marks, expert)];
        *share += (f64::from(u8::from(kept)) - *share) / 32.0;
        if let Some(mark) = marks.experts.get_mut(expert as usize) {
            mark.is_resident = kept;
        }
    }

    /// `expert`, whose layer `marks` has, left for a copied one.
    pub fn evicted(&mut self, marks: &mut Marks, token: u64, expert: u32) {
        let Some(mark) = marks.experts.get_mut(expert as usize) else { return };
        let now = token32(token);
        let idle = f64::from(now.saturating_sub(mark.used)).min(f64::from(OLDEST));
        self.stays_seen = (self.stays_seen + 1.0).min(32.0);
        self.stay += (idle - self.stay) / (1.0 + self.stays_seen);
        (mark.left, mark.left_counted) = (now.max(1), 0);
        mark.is_resident = false;
    }

    /// A token begins: what was learned becomes the gains.
    pub fn refresh(&mut self, token: u64) {
        let mut all = [Rate::default(); AGES.len()];
        for rates in &mut self.again {
            for (rate, sum) in rates.iter_mut().zip(&mut all) {
                rate.fade(HALF);
                sum.uses += rate.uses;
                sum.tokens += rate.tokens;
            }
        }
        let [least, most] = LEFT_HALF;
        self.left.fade((0.5 * token as f64).clamp(least, most));
        self.stays_seen *= 0.97;
        let lost = self.left.or(COLDEST * self.chance);
        for group in 0..GROUPS {
            let (mut unused, mut used, mut tokens, mut from) = (1.0, 0.0, 0.0, 0.0);
            for (at, &to) in AGES.iter().enumerate() {
                let width = (f64::from(to).min(self.stay) - from).max(0.0);
                let rate = self.again[group][at].or(all[at].or(self.chance)).max(1e-6);
                let later = unused * (1.0 - rate.min(0.999_999)).powf(width);
                used += unused - later;
                tokens += (unused - later) / rate;
                (unused, from) = (later, f64::from(to));
            }
            let net = used - lost * tokens;
            let gain = net / (1.0 - net).max(1.0 / MOST_GAIN) * self.kept[group];
            // What did not stay once may stay later.
            self.kept[group] += (1.0 - self.kept[group]) / HALF;
            self.gains[group] = gain.clamp(-MOST_GAIN, MOST_GAIN);
        }
    }
}
