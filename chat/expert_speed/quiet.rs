//! Whether other programs took the processor while something was measured.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// Of the time that a measurement took, what its threads may have waited for
/// a processor.
const MOST_WAITED: f64 = 0.02;

/// Watches this process's threads from [`Watch::start`] on.
pub struct Watch {
    started: Instant,
    waited: Option<Duration>,
}

impl Watch {
    pub fn start() -> Self {
        let waited = waited(Path::new("/proc/self/task"));
        Self { started: Instant::now(), waited }
    }

    /// Whether the threads had the processor whenever they could run, as far
    /// as the system says.
    pub fn was_quiet(&self) -> bool {
        let took = self.started.elapsed();
        is_quiet(self.waited, waited(Path::new("/proc/self/task")), took)
    }
}

fn is_quiet(before: Option<Duration>, after: Option<Duration>, took: Duration) -> bool {
    let more = before.zip(after).map(|(before, after)| after.saturating_sub(before));
    more.is_none_or(|more| more.as_secs_f64() <= MOST_WAITED * took.as_secs_f64())
}

/// How long the threads of `tasks` could have run and did not; `None` where
/// the system does not say (schedstat: time on the processor, time waiting,
/// turns).
fn waited(tasks: &Path) -> Option<Duration> {
    let mut sum = 0;
    for task in fs::read_dir(tasks).ok()? {
        // A thread that has just ended waits no more.
        let Ok(line) = fs::read_to_string(task.ok()?.path().join("schedstat")) else { continue };
        sum += line.split_whitespace().nth(1)?.parse::<u64>().ok()?;
    }
    Some(Duration::from_nanos(sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_summed_over_the_threads_there_are() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(waited(&folder.path().join("none")), None);
        for (name, line) in [("7", "100 2000 3\n"), ("8", "5 30000 1\n")] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("schedstat"), line).unwrap();
        }
        fs::create_dir(folder.path().join("9")).unwrap();
        assert_eq!(waited(folder.path()), Some(Duration::from_nanos(32_000)));
        fs::write(folder.path().join("9/schedstat"), "of another form").unwrap();
        assert_eq!(waited(folder.path()), None);
    }

    #[test]
    fn a_measurement_is_quiet_unless_its_threads_waited() {
        let ms = Duration::from_millis;
        let quiet = |before, after| is_quiet(before, after, ms(100));
        assert!(quiet(Some(ms(500)), Some(ms(502))));
        assert!(!quiet(Some(ms(500)), Some(ms(503))));
        assert!(quiet(Some(ms(500)), Some(ms(400))), "a thread ended");
        assert!(quiet(None, Some(ms(3))) && quiet(Some(ms(3)), None), "nobody says");
    }
}
