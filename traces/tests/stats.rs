//! Statistics of real traces against figures of other programs.

use pregate_traces::stats::{LAGS, SHARES, Stats};
use pregate_traces::{Source, open};
use std::path::{Path, PathBuf};

fn stats(path: &Path) -> Stats {
    let mut source: Box<dyn Source> = open(path).unwrap();
    let mut last = 0;
    let stats = Stats::of(source.as_mut(), &mut |done| last = done).unwrap();
    assert!(last >= stats.tokens);
    stats
}

fn check(stats: &Stats, name: &str, wanted: f64, found: Option<f64>, tolerance: f64) {
    let found = found.unwrap_or(f64::NAN);
    assert!(
        (found - wanted).abs() <= tolerance,
        "{name} of {} tokens: {found}, not {wanted}",
        stats.tokens
    );
}

/// Made by a Python program (numpy) that shares no code with this one.
#[test]
fn the_cut_is_as_another_program_counts_it() {
    let cut =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../predictor/tests/data/gptoss20b/cut.json");
    let stats = stats(&cut);
    assert_eq!((stats.tokens, stats.sequences, stats.accesses), (313, 2, 313 * 24 * 4));
    check(&stats, "entropy", 0.8835144805081253, stats.entropy(), 1e-9);
    check(&stats, "reuse at 1", 0.413685691318328, stats.reuse[0], 1e-9);
    check(&stats, "reuse at 2", 0.36245954692556637, stats.reuse[1], 1e-9);
    check(&stats, "reuse at 4", 0.3264685792349727, stats.reuse[2], 1e-9);
    check(&stats, "reuse at 8", 0.29815516273849607, stats.reuse[3], 1e-9);
    check(&stats, "reuse at 16", 0.27869217081850534, stats.reuse[4], 1e-9);
    check(&stats, "reuse at 32", 0.29798360107095045, stats.reuse[5], 1e-9);
    check(&stats, "reuse at 64", 0.23164414414414414, stats.reuse[6], 1e-9);
    check(&stats, "static 0.1", 0.20455148619957533, stats.static_hits[0], 1e-9);
    check(&stats, "static 0.25", 0.4126857749469215, stats.static_hits[1], 1e-9);
    check(&stats, "static 0.5", 0.7476778131634818, stats.static_hits[2], 1e-9);
    check(&stats, "transition", 0.5071309886458045, stats.transition, 1e-3);
    check(&stats, "transition_2k", 0.7039601218499031, stats.transition_2k, 1e-3);
}

/// The team's traces, where they are; `golden_dev.json` lies beside them.
#[test]
fn the_golden_figures_are_met() {
    let Some(folder) = std::env::var_os("PREGATE_TRACES").map(PathBuf::from) else {
        eprintln!("not compared: $PREGATE_TRACES does not name the folder of the traces");
        return;
    };
    let text = std::fs::read_to_string(folder.join("golden_dev.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    for name in ["gptoss20b/dev_small", "dsv2lite/dev"] {
        let stats = stats(&folder.join(name).with_extension("json"));
        let golden = &golden[name];
        let number = |value: &serde_json::Value| value.as_f64().unwrap();
        check(&stats, "entropy", number(&golden["entropy_norm_mean"]), stats.entropy(), 1e-6);
        for (lag, found) in LAGS.iter().zip(stats.reuse) {
            check(&stats, "reuse", number(&golden["reuse"][lag.to_string()]), found, 1e-6);
        }
        for (share, found) in SHARES.iter().zip(stats.static_hits) {
            let wanted = number(&golden["static_hit_2nd_half"][share.to_string()]);
            check(&stats, "static hits", wanted, found, 1e-6);
        }
        // The README does not say how its table was smoothed; conditional
        // frequencies as they are come this near.
        let recall = &golden["recall"];
        check(&stats, "transition", number(&recall["trans"]), stats.transition, 2e-4);
        check(&stats, "transition", number(&recall["trans2k"]), stats.transition_2k, 2e-4);
    }
}
