//! Replay of a GPU that shares its misses with the processor: what the runtime
//! does there is done here, on the cut of a real trace.

#[path = "support/small.rs"]
mod small;

use pregate_traces::replay::{
    Counts, MemoryTrace, Misses, Options, Report, Slots, models, presets, replay,
};

fn cut() -> MemoryTrace {
    MemoryTrace::read(&mut *pregate_traces::open(&small::cut()).unwrap(), usize::MAX).unwrap()
}

fn options(policy: &str, forecast: &str, share: f64) -> Options {
    let model = models::by_name("gpt-oss-20b").unwrap();
    Options {
        slots: Slots::Share(share),
        policy: policy.to_string(),
        forecast: forecast.to_string(),
        expert_bytes: Some(model.expert_bytes()),
        dense_bytes: model.other_bytes(),
        ..Options::default()
    }
}

fn run(trace: &mut MemoryTrace, machine: &str, options: &Options) -> Report {
    let machine = presets::preset(machine).unwrap();
    replay(trace, &machine, options, &mut |_| {}).unwrap()
}

#[test]
fn what_the_processor_computes_is_there_later() {
    let mut trace = cut();
    for share in [0.25, 0.5] {
        // The link of this one is slow: the processor computes most misses.
        let auto = run(&mut trace, "laptop-8gb", &options("lru", "none", share));
        let counts = auto.decode.counts;
        assert!(counts.left > counts.misses / 3, "{share}: {counts:?}");
        assert!(counts.bytes_ahead > 0, "{share}: nothing is kept");
        let lru = auto.bracket.unwrap().lru_hits;
        // A copy is ordered where it pays, not for every miss.
        assert!(auto.hits as f64 > 0.9 * lru as f64, "{share}: {} of {lru}", auto.hits);
        let all = Options { misses: Misses::Cpu, ..options("lru", "none", share) };
        let computed = run(&mut trace, "laptop-8gb", &all);
        assert_eq!((computed.hits, computed.bytes), (0, 0));
        assert!(auto.tok_s > computed.tok_s, "{share}: {} {}", auto.tok_s, computed.tok_s);
    }
}

#[test]
fn layers_that_share_their_slots_get_them_back() {
    // While a device runs ahead, nobody of the layers before it may leave.
    let mut trace = cut();
    for share in [0.25, 0.5] {
        let mut of = |policy| run(&mut trace, "rtx4090", &options(policy, "none", share));
        let (pool, layers) = (of("adaptive"), of("adaptive-layer"));
        assert!(pool.hits * 100 > layers.hits * 99, "{share}: {} {}", pool.hits, layers.hits);
        let lru = pool.bracket.unwrap().lru_hits;
        assert!(pool.hits as f64 > 0.98 * lru as f64, "{share}: {} {lru}", pool.hits);
    }
}

#[test]
fn who_came_has_left_or_is_still_there() {
    let mut trace = cut();
    for policy in ["adaptive", "lru", "frequency-layer"] {
        for forecast in ["none", "blend"] {
            let report = run(&mut trace, "rtx4090", &options(policy, forecast, 0.25));
            let [decode, prompts] = [report.decode, report.prompts].map(|phase| phase.counts);
            let sum = |of: fn(&Counts) -> u64| of(&decode) + of(&prompts);
            let size = models::by_name("gpt-oss-20b").unwrap().expert_bytes();
            let came = report.bytes - sum(|one| one.bytes_wasted);
            assert_eq!(came % size, 0, "{policy} {forecast}: half of an expert");
            let stayed = came / size - sum(|one| one.bypassed);
            let slots: u64 = report.layers.iter().map(|layer| layer.slots as u64).sum();
            // What was brought for later and has not left by the end is in a
            // slot, or in the ring.
            let there = stayed.checked_sub(sum(|one| one.evictions));
            let most = slots + 8;
            assert!(there.is_some_and(|there| there <= most), "{policy} {forecast}: {there:?}");
            assert!(
                there.is_some_and(|there| there >= slots / 2),
                "{policy} {forecast}: {there:?}"
            );
        }
    }
}

#[test]
fn a_forecast_that_prices_itself_costs_next_to_nothing() {
    let mut trace = cut();
    for machine in ["rtx4090", "rtx3090", "laptop-8gb"] {
        for share in [0.25, 0.5] {
            let mut speed = |forecast| {
                let asked = Options { bracket: false, ..options("adaptive", forecast, share) };
                run(&mut trace, machine, &asked).tok_s
            };
            let none = speed("none");
            for forecast in ["blend", "transition", "previous-token"] {
                let ratio = speed(forecast) / none;
                assert!(ratio > 0.99, "{machine} {share} {forecast}: {ratio:.4}");
            }
        }
    }
}
