//! What experts cost by their number.

use serde::Serialize;

/// What experts cost the processor: `start_us + bytes / gb_s`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Line {
    pub gb_s: f64,
    pub start_us: f64,
    /// With [`AT_ONCE`] of them, the start included.
    pub measured_gb_s: f64,
}

/// Experts that a line is measured with, beside one alone.
pub const AT_ONCE: usize = 4;

impl Line {
    /// Through the times of one expert of `bytes` and of [`AT_ONCE`].
    pub fn through(bytes: usize, one_gb_s: f64, some_gb_s: f64) -> Self {
        let one_ns = bytes as f64 / one_gb_s;
        let some_ns = (AT_ONCE * bytes) as f64 / some_gb_s;
        // More experts take longer, by less than as many times one.
        let each_ns = (some_ns - one_ns) / (AT_ONCE - 1) as f64;
        let each_ns = each_ns.clamp(one_ns / 4.0, one_ns);
        Self {
            gb_s: bytes as f64 / each_ns,
            start_us: (one_ns - each_ns) / 1e3,
            measured_gb_s: some_gb_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_through_both_times() {
        // 10 + 20 us each: 30 and 90 us for 600 kB each.
        let line = Line::through(600_000, 20.0, 2_400_000.0 / 90_000.0);
        assert!((line.gb_s - 30.0).abs() < 1e-9 && (line.start_us - 10.0).abs() < 1e-9);
        // Four that are slower than four times one are no line.
        let noisy = Line::through(600_000, 20.0, 10.0);
        assert_eq!((noisy.gb_s, noisy.start_us), (20.0, 0.0));
        let noisy = Line::through(600_000, 20.0, 1000.0);
        assert!(noisy.gb_s <= 80.0 && noisy.start_us > 0.0);
    }
}
