//! Golden counts: what every policy hits on the cut of a real trace at three
//! sizes, as the engine counts it. A change of a policy, the planner or the
//! drive that moves a figure is to be meant; `PREGATE_GOLDEN=write` writes the
//! file anew.

#[path = "support/small.rs"]
mod small;

use pregate_predictor::policy;
use pregate_traces::replay::{Machine, MemoryTrace, Options, Slots, replay};
use std::fmt::Write;
use std::path::Path;

const MACHINE: &str = r#"
name = "fixed"
ram_bytes = 32e9
[cpu]
expert_gbs = 30
expert_gbs_beside = 24
dense_gbs = 30
start_ns = 20000
layer_ns = 20000
gmacs = 300
[disk]
gbs = 3
latency_ns = 80000
"#;

/// Lines of policy, forecast, slots, accesses, hits, evictions, bytes.
fn found() -> String {
    let mut source = pregate_traces::open(&small::cut()).unwrap();
    let mut trace = MemoryTrace::read(&mut *source, usize::MAX).unwrap();
    let machine = Machine::from_toml(MACHINE).unwrap();
    let mut lines = String::from("policy,forecast,slots,accesses,hits,evictions,bytes\n");
    for policy in policy::NAMES {
        for slots in [4, 8, 16] {
            let options = Options {
                slots: Slots::Each(slots),
                policy: policy.to_string(),
                forecast: "none".to_string(),
                expert_bytes: Some(1_000_000),
                bracket: false,
                ..Options::default()
            };
            let report = replay(&mut trace, &machine, &options, &mut |_| {}).unwrap();
            let pregate_traces::replay::Report { accesses, hits, evictions, bytes, .. } = report;
            writeln!(lines, "{policy},none,{slots},{accesses},{hits},{evictions},{bytes}").unwrap();
        }
    }
    lines
}

#[test]
fn every_policy_hits_as_often_as_it_did() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/replay_golden.csv");
    let found = found();
    if std::env::var_os("PREGATE_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, &found).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    for (found, kept) in found.lines().zip(kept.lines()) {
        assert_eq!(found, kept, "found, kept");
    }
    assert_eq!(found.lines().count(), kept.lines().count(), "lines");
}
