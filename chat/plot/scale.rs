//! Numbers that people find on axes.

/// 1, 2 or 5 times a power of ten: at least `range / parts`.
fn step(range: f64, parts: usize) -> f64 {
    let least = (range / parts.max(1) as f64).max(1e-12);
    let power = 10f64.powf(least.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    power * factors.into_iter().find(|factor| factor * power >= least * 0.999).unwrap_or(10.0)
}

/// Where an axis that has to show `most` ends.
pub fn nice_top(most: f64) -> f64 {
    match most > 0.0 && most.is_finite() {
        true => {
            let step = step(most, 5);
            step * (most / step - 1e-9).ceil()
        }
        false => 1.0,
    }
}

/// About `parts` marks from 0 to `top`.
pub fn ticks(top: f64, parts: usize) -> Vec<f64> {
    let step = step(top, parts);
    let count = (top / step + 1e-9).floor() as usize;
    (0..=count.min(100)).map(|index| index as f64 * step).collect()
}

/// As few digits as tell marks apart that lie `top / 5` from each other.
pub fn number(value: f64, top: f64) -> String {
    match top {
        _ if top > 5.0 => format!("{value:.0}"),
        _ if top > 0.5 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A number that is in the data: with a tenth, if it is not whole.
pub fn tenths(value: f64) -> String {
    format!("{}", (10.0 * value).round() / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_few_experts_are_not_rounded_away() {
        let labels = [12.5, 25.0, 33.333, 49.99, 0.0].map(tenths);
        assert_eq!(labels, ["12.5", "25", "33.3", "50", "0"]);
    }

    #[test]
    fn axes_end_above_their_data_at_numbers_that_people_know() {
        for (most, top) in [(0.93, 1.0), (1.0, 1.0), (37.0, 40.0), (101.0, 150.0), (0.0, 1.0)] {
            assert!((nice_top(most) - top).abs() < 1e-9, "{most}: {}", nice_top(most));
        }
        assert_eq!(nice_top(f64::NAN), 1.0);
        assert_eq!(ticks(100.0, 5), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(40.0, 4), [0.0, 10.0, 20.0, 30.0, 40.0]);
        assert_eq!(number(20.0, 100.0), "20");
        assert_eq!(number(0.2, 1.0), "0.2");
    }
}
