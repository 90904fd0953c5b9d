//! The best few of a row of scores.

/// The largest magnitude that a score keeps; what is larger, infinite or not
/// a number is brought into this range.
pub const LIMIT: f32 = 1e4;

/// Makes every score finite and at most [`LIMIT`] in magnitude; not a number
/// becomes the lowest. Answers whether something had to be changed.
pub fn sanitise(scores: &mut [f32]) -> bool {
    let mut changed = false;
    for score in scores {
        let clean = if score.is_nan() { -LIMIT } else { score.clamp(-LIMIT, LIMIT) };
        changed |= clean != *score;
        *score = clean;
    }
    changed
}

/// Writes the `count` best experts to `best`, best first, the lower index
/// first among equals; fewer if there are fewer. Scores must be finite.
pub fn best(scores: &[f32], count: usize, best: &mut Vec<u32>) {
    let count = count.min(scores.len());
    best.clear();
    if count == 0 {
        return;
    }
    best.resize(count, 0);
    let (mut filled, mut least) = (0, f32::NEG_INFINITY);
    for (expert, &score) in scores.iter().enumerate() {
        if filled == count && score <= least {
            continue;
        }
        let mut at = if filled < count { filled } else { count - 1 };
        filled = (filled + 1).min(count);
        while at > 0 && scores[best[at - 1] as usize] < score {
            best[at] = best[at - 1];
            at -= 1;
        }
        best[at] = expert as u32;
        least = scores[best[filled - 1] as usize];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_agrees_with_sorting() {
        let mut state = 1u32;
        for round in 0..500 {
            let length = round % 40;
            let mut next = || {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                state >> 28
            };
            let scores: Vec<f32> = (0..length).map(|_| next() as f32 - 8.0).collect();
            let mut sorted: Vec<u32> = (0..length as u32).collect();
            sorted.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
            for count in 0..length + 2 {
                let mut answer = vec![7; 3];
                best(&scores, count, &mut answer);
                assert_eq!(answer, sorted[..count.min(length)]);
            }
        }
    }
}
