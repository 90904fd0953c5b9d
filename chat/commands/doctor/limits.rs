//! What the system lets a program page-lock.

use super::{Finding, State};
use crate::output::bytes;
use serde::Serialize;
use std::fs;

/// For `--json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// RLIMIT_MEMLOCK as it is; `null`: none, or the system does not say.
    pub locked_bytes: Option<u64>,
    /// Windows Subsystem for Linux.
    pub wsl: bool,
}

pub fn look() -> (Limits, Finding) {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let limits = Limits { locked_bytes: locked(&limits), wsl: is_wsl(&release) };
    (limits, finding(limits))
}

fn finding(limits: Limits) -> Finding {
    let about = "pinning";
    let limit = match limits.locked_bytes {
        Some(most) => format!("this user may lock {} of memory (ulimit -l)", bytes(most)),
        None => "no limit of locked memory (ulimit -l)".to_string(),
    };
    if limits.wsl {
        let found = format!("WSL, where Windows decides how much can be page-locked; {limit}");
        return Finding::new(about, State::Note, found).next(
            "experts beyond that are copied from ordinary memory, more slowly; memory= in \
             .wslconfig raises what WSL has",
        );
    }
    Finding::new(about, State::Ok, limit)
}

/// The soft limit of `/proc/self/limits`; `None`: unlimited, or not there.
fn locked(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Both versions name Microsoft in the kernel's release.
fn is_wsl(release: &str) -> bool {
    release.to_ascii_lowercase().contains("microsoft")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_of_linux() {
        let table = "Limit                     Soft Limit           Hard Limit           Units\n\
                     Max stack size            8388608              unlimited            bytes\n\
                     Max locked memory         65536                16777216             bytes\n";
        assert_eq!(locked(table), Some(65536));
        assert_eq!(locked("Max locked memory  unlimited  unlimited  bytes"), None);
        assert_eq!(locked(""), None);
        assert!(is_wsl("5.15.153.1-microsoft-standard-WSL2\n"));
        assert!(is_wsl("4.4.0-19041-Microsoft"));
        assert!(!is_wsl("6.8.0-45-generic"));
    }

    #[test]
    fn windows_has_the_last_word() {
        let of = |locked_bytes, wsl| finding(Limits { locked_bytes, wsl });
        assert_eq!((of(None, false).state, of(None, false).next), (State::Ok, None));
        assert!(of(Some(8 << 20), false).found.contains("8.4 MB"));
        let wsl = of(None, true);
        assert_eq!(wsl.state, State::Note);
        assert!(wsl.found.contains("WSL") && wsl.next.unwrap().contains(".wslconfig"));
    }
}
