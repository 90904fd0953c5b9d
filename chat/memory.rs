//! How much memory this machine has to spare, and how much this process
//! holds.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Memory that programs can take without pushing others out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Available {
    pub bytes: u64,
    /// Who says so, for people.
    pub according_to: &'static str,
}

/// The smaller of what Linux calls MemAvailable and what is left of the
/// limits of this process's control groups. Without these figures, all there
/// could be: the operating system then decides what stays in memory.
pub fn available() -> Available {
    let report = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let machine = Available {
        bytes: kilobytes(&report, "MemAvailable:").unwrap_or(u64::MAX),
        according_to: "free memory",
    };
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    match left_in_groups(Path::new("/sys/fs/cgroup"), &groups) {
        Some(bytes) if bytes < machine.bytes => {
            Available { bytes, according_to: "the control group's limit" }
        }
        _ => machine,
    }
}

/// What this process holds of its own: anonymous and shared memory, without
/// the page cache of mapped files. `None` where the system does not say.
pub fn held_bytes() -> Option<u64> {
    let report = fs::read_to_string("/proc/self/status").ok()?;
    let anonymous = kilobytes(&report, "RssAnon:")?;
    Some(anonymous + kilobytes(&report, "RssShmem:").unwrap_or(0))
}

/// A line `name  number kB`, in bytes.
fn kilobytes(report: &str, name: &str) -> Option<u64> {
    let line = report.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The least that any of the groups in `groups` (`/proc/self/cgroup`) has
/// left; `None` without a limit. The page cache is not counted: the kernel
/// gives it up first.
fn left_in_groups(root: &Path, groups: &str) -> Option<u64> {
    groups
        .lines()
        .filter_map(|line| {
            // hierarchy : controllers : path
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let is_memory = controllers.split(',').any(|controller| controller == "memory");
            match (controllers, is_memory) {
                ("", _) => left_up_to_root(root.to_path_buf(), path, &VERSION_2),
                (_, true) => left_up_to_root(root.join("memory"), path, &VERSION_1),
                _ => None,
            }
        })
        .min()
}

/// The names of a control group's files.
struct Names {
    limit: &'static str,
    usage: &'static str,
    cache: [&'static str; 2],
}

const VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};
const VERSION_2: Names =
    Names { limit: "memory.max", usage: "memory.current", cache: ["inactive_file", "active_file"] };

/// The least that the group at `path` or one of those around it has left.
fn left_up_to_root(root: PathBuf, path: &str, names: &Names) -> Option<u64> {
    let path = Path::new(path.trim_start_matches('/'));
    // `..` leads to groups outside of this name space, which it cannot read.
    let own = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    let groups = if own { path.ancestors().collect() } else { vec![Path::new("")] };
    groups.into_iter().filter_map(|group| left(&root.join(group), names)).min()
}

fn left(group: &Path, names: &Names) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number, and no limit.
    let (limit, usage) = (number(names.limit)?, number(names.usage)?);
    let report = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache: u64 = names
        .cache
        .iter()
        .filter_map(|name| {
            let line =
                report.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
            line.trim().parse::<u64>().ok()
        })
        .fold(0, u64::saturating_add);
    Some(limit.saturating_sub(usage.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_reports_are_read() {
        let report = "MemTotal:       24600000 kB\nMemAvailable:    1000 kB\n";
        assert_eq!(kilobytes(report, "MemAvailable:"), Some(1_024_000));
        assert_eq!(kilobytes("MemAvailable: lots", "MemAvailable:"), None);
        assert_eq!(kilobytes(report, "RssAnon:"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_that_is_written_is_held_and_mapped_files_are_not() {
        let before = held_bytes().unwrap();
        let block = vec![1u8; 64 << 20];
        let held = held_bytes().unwrap() - before;
        // Other tests run beside this one.
        assert!((48 << 20..192 << 20).contains(&held), "{held} for {} bytes", block.len());
        assert!(available().bytes > 0);
    }

    /// A control group with its files.
    fn group(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_group_counts_and_its_page_cache_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        group(root, &[]);
        let stat = "anon 300\ninactive_file 150\nactive_file 50\ninactive_file_x 9\n";
        group(
            &root.join("user/app"),
            &[("memory.max", "max\n"), ("memory.current", "500\n"), ("memory.stat", stat)],
        );
        assert_eq!(left_in_groups(root, "0::/user/app\n"), None);
        group(
            &root.join("user"),
            &[("memory.max", "1000\n"), ("memory.current", "500\n"), ("memory.stat", stat)],
        );
        assert_eq!(left_in_groups(root, "0::/user/app\n"), Some(700));
        group(&root.join("user/app"), &[("memory.max", "310\n")]);
        assert_eq!(left_in_groups(root, "0::/user/app\n"), Some(10));
        group(&root.join("user/app"), &[("memory.max", "200\n")]);
        assert_eq!(left_in_groups(root, "0::/user/app\n"), Some(0), "over its limit");
        assert_eq!(left_in_groups(root, "0::/../elsewhere\nnonsense\n"), None);
    }

    #[test]
    fn version_1_has_a_hierarchy_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        group(
            &folder.path().join("memory/docker"),
            &[
                ("memory.limit_in_bytes", "4000"),
                ("memory.usage_in_bytes", "3000"),
                ("memory.stat", "inactive_file 1\ntotal_inactive_file 500\ntotal_active_file 0\n"),
            ],
        );
        let groups = "5:cpu,cpuacct:/docker\n4:memory:/docker\n";
        assert_eq!(left_in_groups(folder.path(), groups), Some(1500));
        assert_eq!(left_in_groups(folder.path(), "5:cpu,cpuacct:/docker\n"), None);
    }
}
