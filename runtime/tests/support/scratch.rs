//! Folders for the files of a test, and a clock that forgives a busy machine.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A folder of its own for a test, removed at the end.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        // Only where it was built: `cargo xtask gpu-check` carries tests away.
        let built = Some(PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
        let parent = built.filter(|folder| folder.is_dir()).unwrap_or_else(std::env::temp_dir);
        let folder = parent.join(format!("{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let file = self.0.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, bytes).unwrap();
        file
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether `work` stays within `limit` at least once in three times. Counts
/// the thread's own time on a processor where the system tells, because other
/// processes of a busy machine are not what a test is about.
pub fn best_of_three<T>(limit: Duration, work: impl Fn() -> T) -> bool {
    (0..3).any(|_| {
        let (wall, cpu) = (Instant::now(), processor_time());
        work();
        let elapsed = match (cpu, processor_time()) {
            (Some(start), Some(end)) => end.saturating_sub(start),
            _ => wall.elapsed(),
        };
        elapsed <= limit
    })
}

fn processor_time() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    stat.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}
