//! How much memory this machine has to spare.

use std::fs;

/// Bytes that programs can take without pushing others out: what Linux calls
/// MemAvailable. Without that figure, all there could be: the operating
/// system then decides what stays in memory.
pub fn available_bytes() -> u64 {
    let report = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    parse(&report).unwrap_or(u64::MAX)
}

fn parse(report: &str) -> Option<u64> {
    let line = report.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernels_report_is_read() {
        let report = "MemTotal:       24600000 kB\nMemAvailable:    1000 kB\n";
        assert_eq!(super::parse(report), Some(1_024_000));
        assert_eq!(super::parse("MemAvailable: lots"), None);
    }
}
