//! What a layer's cache would have hit under each ranking, without experts:
//! only who would be there.

use super::Ranking;

/// What an event's part in the count of hits keeps with each event after it.
const MEMORY: f32 = 1.0 - 1.0 / 512.0;

/// Another ranking takes over when it hits more by so much of all uses, ...
const MARGIN: f32 = 0.005;

/// ... once so many events were seen, and since the last change.
const PATIENCE: u32 = 128;

/// Says what each expert of a list is worth under a ranking.
pub type Rank<'a> = dyn FnMut(Ranking, &mut Vec<(f32, u32)>) + 'a;

struct Shadow {
    ranking: Ranking,
    /// `[experts]`
    is_here: Vec<bool>,
    here: usize,
    /// Hits, recent ones counting more.
    hits: f32,
}

/// One layer's shadows.
pub struct Shadows {
    slots: usize,
    shadows: Vec<Shadow>,
    chosen: usize,
    /// As the shadows' hits: all uses.
    uses: f32,
    /// Events since the choice could last change.
    waited: u32,
    /// Scratch: who may leave, by rank.
    leaving: Vec<(f32, u32)>,
}

impl Shadows {
    /// The first of `rankings` is chosen until another is better.
    pub fn new(experts: usize, slots: usize, rankings: &[Ranking]) -> Self {
        let shadow = |&ranking: &Ranking| Shadow {
            ranking,
            is_here: vec![false; experts],
            here: 0,
            hits: 0.0,
        };
        Self {
            slots,
            shadows: rankings.iter().map(shadow).collect(),
            chosen: 0,
            uses: 0.0,
            waited: 0,
            leaving: Vec::new(),
        }
    }

    /// The ranking that hits most, as far as that is sure.
    pub fn ranking(&self) -> Ranking {
        self.shadows[self.chosen].ranking
    }

    /// A token used `experts`, distinct. `rank` says what each of a list is
    /// worth now, the smallest leaving first; it may strike out experts that
    /// will not be the smallest.
    pub fn used(&mut self, experts: &[u32], rank: &mut Rank<'_>) {
        self.uses = self.uses * MEMORY + experts.len() as f32;
        for shadow in &mut self.shadows {
            let hits = experts.iter().filter(|&&expert| shadow.is_here[expert as usize]).count();
            shadow.hits = shadow.hits * MEMORY + hits as f32;
            let misses = experts.len() - hits;
            let over = (shadow.here + misses).saturating_sub(self.slots);
            if over > 0 {
                self.leaving.clear();
                for (expert, &is_here) in shadow.is_here.iter().enumerate() {
                    let expert = expert as u32;
                    if is_here && !experts.contains(&expert) {
                        self.leaving.push((0.0, expert));
                    }
                }
                rank(shadow.ranking, &mut self.leaving);
                let over = over.min(self.leaving.len());
                if over > 0 && over < self.leaving.len() {
                    let order =
                        |a: &(f32, u32), b: &(f32, u32)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
                    self.leaving.select_nth_unstable_by(over - 1, order);
                }
                for &(_, expert) in &self.leaving[..over] {
                    shadow.is_here[expert as usize] = false;
                }
                shadow.here -= over;
            }
            for &expert in experts {
                // An event larger than the slots: the rest does not stay.
                let joins = !shadow.is_here[expert as usize] && shadow.here < self.slots;
                if joins {
                    shadow.is_here[expert as usize] = true;
                    shadow.here += 1;
                }
            }
        }
        self.choose();
    }

    fn choose(&mut self) {
        self.waited = self.waited.saturating_add(1);
        if self.waited < PATIENCE {
            return;
        }
        let hits = |index: usize| self.shadows[index].hits;
        let others = (0..self.shadows.len()).rev();
        let Some(best) = others.max_by(|&a, &b| hits(a).total_cmp(&hits(b))) else { return };
        if hits(best) > hits(self.chosen) + MARGIN * self.uses {
            self.chosen = best;
            self.waited = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks by expert number: under `Recency` the smallest leaves first,
    /// under `Value` the largest.
    fn by_number(ranking: Ranking, experts: &mut [(f32, u32)]) {
        let sign = if ranking == Ranking::Value { -1.0 } else { 1.0 };
        experts.iter_mut().for_each(|(worth, expert)| *worth = sign * *expert as f32);
    }

    #[test]
    fn the_ranking_that_hits_more_takes_over_and_is_left_again() {
        let rankings = [Ranking::Value, Ranking::Recency];
        let mut shadows = Shadows::new(8, 2, &rankings);
        let mut feed = |expert: u32, times: u32| {
            for time in 0..times {
                shadows.used(
                    &[if time % 2 == 0 { expert } else { time / 2 % 6 + 1 }],
                    &mut |ranking, list| by_number(ranking, list),
                );
            }
            shadows.ranking()
        };
        // Expert 7 every other time, among others: who keeps large ones hits.
        assert_eq!(feed(7, 100), Ranking::Value, "too early to say");
        assert_eq!(feed(7, 400), Ranking::Recency);
        assert_eq!(feed(0, 3000), Ranking::Value);
    }

    #[test]
    fn a_little_more_is_no_reason_to_change() {
        let mut shadows = Shadows::new(8, 2, &[Ranking::Value, Ranking::Recency]);
        let mut other = 0;
        for time in 0..4000u32 {
            // Both keep what comes twice in a row; once in 500, only one does.
            let experts: &[u32] = match time % 500 {
                498 => &[5],
                499 => &[6],
                _ => &[2, 3],
            };
            shadows.used(experts, &mut |ranking, list| by_number(ranking, list));
            other += u32::from(shadows.ranking() != Ranking::Value);
        }
        assert_eq!(other, 0);
    }
}
