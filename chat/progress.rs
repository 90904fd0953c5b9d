//! Progress bars on standard error, for what takes longer than a moment.

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::time::{Duration, Instant};

/// Work shorter than this shows no bar.
const PATIENCE: Duration = Duration::from_millis(500);

/// A bar that appears after a moment, if standard error is a terminal, and is
/// gone when it is dropped.
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
    shown: bool,
}

impl Progress {
    /// `unit` is what is counted: "tokens".
    pub fn new(doing: &'static str, unit: &str, total: usize) -> Self {
        let template = format!("{{msg}} {{bar:30}} {{pos}}/{{len}} {unit}, {{eta}} left");
        Self::with(doing, Some(total as u64), &template)
    }

    /// The same, with how many a second. Without a `total` there is no bar, as
    /// nobody knows how much is left.
    pub fn with_rate(doing: &'static str, unit: &str, total: Option<u64>) -> Self {
        let rate = "{rate} a second";
        match total {
            Some(_) => {
                let counts = format!("{{human_pos}}/{{human_len}} {unit}, {rate}, {{eta}} left");
                Self::with(doing, total, &format!("{{msg}} {{bar:30}} {counts}"))
            }
            None => Self::with(doing, None, &format!("{{msg}} {{human_pos}} {unit}, {rate}")),
        }
    }

    fn with(doing: &'static str, total: Option<u64>, template: &str) -> Self {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::hidden());
        // The template is ours; a wrong one would show in the first test.
        if let Ok(style) = ProgressStyle::with_template(template) {
            let rate = |state: &ProgressState, to: &mut dyn std::fmt::Write| {
                // A failed write leaves a gap in the bar.
                let _ = write!(to, "{}", HumanCount(state.per_sec() as u64));
            };
            bar.set_style(style.with_key("rate", rate).progress_chars("=> "));
        }
        bar.set_message(doing);
        Self { bar, started: Instant::now(), shown: false }
    }

    pub fn set(&mut self, done: usize) {
        if !self.shown && self.started.elapsed() >= PATIENCE {
            self.shown = true;
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_position(done as u64);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
