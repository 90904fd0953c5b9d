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
    best.clear();
    if count == 0 {
        return;
    }
    for (expert, &score) in scores.iter().enumerate() {
        if best.len() == count {
            if score <= scores[best[count - 1] as usize] {
                continue;
            }
            best.pop();
        }
        let at = best.iter().rposition(|&other| scores[other as usize] >= score);
        best.insert(at.map_or(0, |at| at + 1), expert as u32);
    }
}
