//! The DRY penalty.

use super::options::Dry;
use std::collections::HashMap;

/// Lowers the logits of tokens that would continue a repetition of the end of
/// `history` (oldest first).
///
/// For every earlier position `i`, the length of the longest common suffix of
/// `history[..=i]` and `history` is found for all `i` at once, in O(window), by
/// the Z-function of the reversed history. The token behind `i` then is one
/// that would repeat that much.
pub fn apply(dry: &Dry, history: &[u32], logits: &mut [f32]) {
    if dry.multiplier == 0.0 || history.len() <= dry.allowed_length {
        return;
    }
    let reversed: Vec<u32> = history.iter().rev().copied().collect();
    // A breaker ends a repetition: only what follows the last one counts.
    let longest =
        reversed.iter().position(|token| dry.breakers.contains(token)).unwrap_or(reversed.len());
    if longest < dry.allowed_length {
        return;
    }
    let mut lengths: HashMap<u32, usize> = HashMap::new();
    for (at, &common) in z_function(&reversed).iter().enumerate().skip(1) {
        let length = common.min(longest);
        if length >= dry.allowed_length {
            // `reversed[at - 1]` followed the repeated part.
            let most = lengths.entry(reversed[at - 1]).or_insert(0);
            *most = (*most).max(length);
        }
    }
    for (token, length) in lengths {
        if dry.breakers.contains(&token) {
            continue;
        }
        if let Some(logit) = logits.get_mut(token as usize) {
            // Large enough to exclude the token, small enough to stay finite.
            const MOST: f32 = 1e30;
            let mut penalty = dry.multiplier;
            for _ in dry.allowed_length..length {
                penalty *= dry.base;
                if penalty >= MOST || dry.base == 1.0 {
                    break;
                }
            }
            *logit -= penalty.min(MOST);
        }
    }
}

/// `z[i]`: how much of `text[i..]` equals the beginning of `text`. Source:
/// Gusfield 1997, "Algorithms on Strings, Trees, and Sequences", section 1.4.
fn z_function(text: &[u32]) -> Vec<usize> {
    let mut z = vec![0; text.len()];
    let (mut left, mut right) = (0, 0);
    for at in 1..text.len() {
        if at < right {
            z[at] = z[at - left].min(right - at);
        }
        while at + z[at] < text.len() && text[z[at]] == text[at + z[at]] {
            z[at] += 1;
        }
        if at + z[at] > right {
            (left, right) = (at, at + z[at]);
        }
    }
    z
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn penalties(dry: &Dry, history: &[u32]) -> Vec<f32> {
        let mut logits = vec![0.0; 8];
        apply(dry, history, &mut logits);
        logits.iter().map(|logit| -logit).collect()
    }

    #[test]
    fn the_penalty_grows_with_the_repetition() {
        let dry = Dry { multiplier: 1.0, base: 2.0, allowed_length: 2, ..Dry::default() };
        // "1 2 3 | 1 2": 3 would make three of three.
        assert_eq!(penalties(&dry, &[1, 2, 3, 1, 2])[3], 1.0);
        assert_eq!(penalties(&dry, &[5, 1, 2, 3, 5, 1, 2])[3], 2.0);
        assert_eq!(penalties(&dry, &[1, 2, 3, 4, 2])[3], 0.0);
        let broken = Dry { breakers: vec![1], ..dry };
        assert_eq!(penalties(&broken, &[5, 1, 2, 3, 5, 1, 2])[3], 0.0);
    }

    #[test]
    fn long_repetitions_stay_finite() {
        let dry = Dry { multiplier: 100.0, base: 100.0, ..Dry::default() };
        let penalty = penalties(&dry, &vec![1; 4000])[1];
        assert!(penalty.is_finite() && penalty > 1e20, "{penalty}");
    }

    proptest! {
        #[test]
        fn lengths_are_those_of_a_plain_search(
            history in proptest::collection::vec(0_u32..4, 0..40),
            allowed in 1_usize..4,
            breaker in proptest::option::of(0_u32..4),
        ) {
            let dry = Dry {
                multiplier: 1.0,
                base: 2.0,
                allowed_length: allowed,
                breakers: breaker.into_iter().collect(),
                window: 1000,
            };
            let mut expected = vec![0.0_f32; 8];
            for at in 1..history.len() {
                let length = (1..=at)
                    .take_while(|&back| {
                        history[at - back] == history[history.len() - back]
                            && Some(history[at - back]) != breaker
                    })
                    .count();
                if length >= allowed && Some(history[at]) != breaker {
                    let penalty = 2.0_f32.powi((length - allowed) as i32);
                    let slot = &mut expected[history[at] as usize];
                    *slot = slot.max(penalty);
                }
            }
            prop_assert_eq!(penalties(&dry, &history), expected);
        }
    }
}
