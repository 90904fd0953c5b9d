//! The engine on traces of which everything is known.

#[path = "support/small.rs"]
mod small;

use pregate_predictor::forecast::{self, Forecast, Forecaster, Known};
use pregate_predictor::{Ahead, Shape, policy};
use pregate_traces::replay::{
    Machine, MemoryTrace, Misses, Options, ReplayError, Report, Slots, Warm, Wire, replay,
    replay_with,
};
use pregate_traces::{Row, Source};
use std::sync::{Arc, Mutex};

const CPU: &str = r#"
name = "cpu"
ram_bytes = 32e9
[cpu]
expert_gbs = 10
expert_gbs_beside = 5
dense_gbs = 20
start_ns = 100
layer_ns = 1000
gmacs = 1e9
[disk]
gbs = 1
latency_ns = 500
"#;

const GPU: &str = r#"
name = "gpu"
ram_bytes = 32e9
[gpu]
vram_bytes = 12e9
vram_gbs = 100
layer_ns = 1000
visit_ns = 3000
gmacs = 1e9
[link]
gbs = 2
gbs_beside_cpu = 2
start_ns = 500
[cpu]
expert_gbs = 4
expert_gbs_beside = 4
dense_gbs = 20
start_ns = 100
layer_ns = 1000
gmacs = 1e9
[disk]
gbs = 1
latency_ns = 500
"#;

fn cpu() -> Machine {
    Machine::from_toml(CPU).unwrap()
}

fn gpu() -> Machine {
    Machine::from_toml(GPU).unwrap()
}

/// LRU without forecasts, experts of 100 kB.
fn plain(slots: usize) -> Options {
    Options {
        slots: Slots::Each(slots),
        policy: "lru".to_string(),
        forecast: "none".to_string(),
        expert_bytes: Some(100_000),
        ..Options::default()
    }
}

fn run(trace: &mut dyn Source, machine: &Machine, options: &Options) -> Report {
    replay(trace, machine, options, &mut |_| {}).unwrap()
}

fn cut() -> MemoryTrace {
    MemoryTrace::read(&mut *pregate_traces::open(&small::cut()).unwrap(), usize::MAX).unwrap()
}

/// One layer of four experts, top-1.
fn one_layer(experts: &[u16]) -> MemoryTrace {
    let tokens = experts.iter().map(|&one| vec![vec![one]]).collect();
    small::decoded(&Shape::uniform(1, 4, 1, 0), tokens)
}

#[test]
fn the_engine_hits_as_the_golden_counts_say() {
    let mut trace = cut();
    for (slots, lru, belady) in [(4, 12391, 12391), (8, 19198, 22531), (16, 26087, 27817)] {
        for machine in [cpu(), gpu()] {
            // With everything copied all that is missed asks for a slot.
            let options = Options { misses: Misses::Link, ring: Some(8), ..plain(slots) };
            let report = run(&mut trace, &machine, &options);
            assert_eq!(report.hits, lru, "{slots} slots, {}", machine.name);
            assert_eq!(report.accesses, report.hits + report.misses);
            assert_eq!(report.bytes, report.misses * 100_000);
            assert_eq!(report.slots_per_layer, slots);
            let bracket = report.bracket.unwrap();
            assert_eq!((bracket.lru_hits, bracket.this_hits), (lru, lru));
            assert_eq!(bracket.belady_hits, belady);
            assert!(bracket.best_hits >= belady);
            let of_layers: u64 = report.layers.iter().map(|layer| layer.counts.hits).sum();
            let of_experts: u32 = report.layers.iter().flat_map(|layer| &layer.expert_hits).sum();
            assert_eq!((of_layers, u64::from(of_experts)), (lru, lru));
        }
    }
}

#[test]
fn time_is_what_the_bytes_take() {
    // Three misses, two hits. A miss: its layer, 500 ns and 100 us of the
    // disk, 100 ns and 10 us on the CPU.
    let options = Options { dense_bytes: 200_000, ..plain(2) };
    let report = run(&mut one_layer(&[0, 1, 0, 2, 2]), &cpu(), &options);
    let (dense, wait, compute) = (11_000, 100_500, 10_100);
    assert_eq!((report.hits, report.misses, report.evictions), (2, 3, 1));
    assert_eq!(report.decode.time_ns, 5 * (dense + compute) + 3 * wait);
    assert_eq!(report.decode.stall.demand_ns, 3 * wait);
    assert_eq!(report.decode.stall.total_ns(), 3 * wait);
    assert_eq!(report.tok_s, 1e9 / (report.decode.time_ns as f64 / 5.0));
    // Most are misses: the median is one's time, to a twentieth of a percent.
    let miss = (dense + wait + compute) as f64;
    assert!((report.tpot.median_ns as f64 / miss - 1.0).abs() < 5e-4, "{:?}", report.tpot);
    // The disk is busy for 60 us of each token on average.
    assert_eq!(report.bound.wire, Wire::Disk);
    assert_eq!(report.bound.tok_s, 1e9 / 60_000.0);
    assert!(report.tok_s < report.bound.tok_s);
}

#[test]
fn on_a_gpu_the_slower_worker_ends_a_layer() {
    let mut trace = one_layer(&[0, 1, 0, 2, 2]);
    // A hit: 1 us of launches and 1 us of reading. A miss that is copied:
    // 500 ns, 50 us, the reading, 3 us between host and GPU.
    let copied = run(&mut trace, &gpu(), &Options { misses: Misses::Link, ..plain(2) });
    assert_eq!(copied.decode.time_ns, 5 * 1_000 + 2 * 1_000 + 3 * (50_500 + 1_000 + 3_000));
    assert_eq!(copied.decode.stall.demand_ns, 3 * 50_500);
    assert_eq!(copied.decode.stall.visits_ns, 3 * 3_000);
    // The CPU needs 100 ns and 25 us; nothing comes to VRAM, so nothing hits.
    let computed = run(&mut trace, &gpu(), &Options { misses: Misses::Cpu, ..plain(2) });
    assert_eq!((computed.hits, computed.bytes, computed.decode.counts.left), (0, 0, 5));
    assert_eq!(computed.decode.time_ns, 5 * (1_000 + 25_100 + 3_000));
    assert_eq!(computed.decode.stall.cpu_ns, 5 * 25_100);
    // Behind a RAM that holds nothing the disk comes first.
    let options = Options { misses: Misses::Link, ram_share: Some(0.0), ..plain(2) };
    let below = run(&mut trace, &gpu(), &options);
    assert_eq!(below.decode.time_ns, copied.decode.time_ns + 3 * 100_500);
    let half = Options { ram_share: Some(0.25), ..options };
    assert!(run(&mut trace, &gpu(), &half).decode.time_ns < below.decode.time_ns);
}

#[test]
fn a_chunk_asks_once_for_what_its_tokens_share() {
    let mut trace = one_layer(&[0, 1, 0, 2, 2]);
    for (row, tokens) in trace.rows.iter_mut().zip([3, 0, 0, 1, 1]) {
        (row.pass_tokens, row.is_prompt) = (tokens, tokens != 1);
    }
    let report = run(&mut trace, &cpu(), &plain(2));
    assert_eq!((report.prompts.tokens, report.decode.tokens), (3, 2));
    assert_eq!(report.prompts.counts.accesses, 2);
    assert_eq!((report.accesses, report.misses, report.hits), (4, 3, 1));
    let ttft = report.ttft.unwrap();
    assert_eq!(ttft.mean_ns, report.prompts.time_ns as f64);
    assert_eq!(report.tpot.mean_ns, report.decode.time_ns as f64 / 2.0);
}

#[test]
fn the_last_token_of_a_prompt_is_not_a_decoded_one() {
    // A prompt of three in chunks of two, then two tokens; and two of a single
    // token, with nothing behind them.
    let mut trace = one_layer(&[0, 1, 3, 2, 2, 0, 1]);
    for (index, tokens) in [2, 0, 1, 1, 1, 1, 1].into_iter().enumerate() {
        let row = &mut trace.rows[index];
        row.pass_tokens = tokens;
        row.is_prompt = !(3..5).contains(&index);
        row.starts_sequence = [0, 5, 6].contains(&index);
    }
    let options = Options { misses: Misses::Link, ..plain(1) };
    for machine in [cpu(), gpu()] {
        let report = run(&mut trace, &machine, &options);
        let (prompts, decode) = (report.prompts, report.decode);
        assert_eq!((prompts.tokens, prompts.passes), (5, 4), "{}", machine.name);
        assert_eq!((decode.tokens, decode.passes), (2, 2));
        assert_eq!((prompts.counts.accesses, decode.counts.accesses), (5, 2));
        assert_eq!((prompts.counts.hits, decode.counts.hits), (0, 1));
        assert_eq!(report.tpot.mean_ns, decode.time_ns as f64 / 2.0);
        assert_eq!(report.ttft.unwrap().mean_ns, prompts.time_ns as f64 / 3.0);
        let stalls: u64 = report.layers.iter().map(|layer| layer.stall.total_ns()).sum();
        assert_eq!(prompts.stall.total_ns() + decode.stall.total_ns(), stalls);
        assert!(prompts.stall.total_ns() > decode.stall.total_ns());
    }
}

#[test]
fn the_bound_counts_the_bytes_of_each_layer() {
    // Top-1 of experts of 100 kB, and of 10 kB.
    let mut shape = Shape::uniform(2, 4, 1, 100_000);
    shape.layers[1].as_mut().unwrap().expert_bytes = 10_000;
    let tokens = [0, 1, 2].map(|one| vec![vec![one], vec![one]]).to_vec();
    let mut trace = small::decoded(&shape, tokens);
    let options = Options { expert_bytes: None, ..plain(4) };
    // Read from VRAM at 100 bytes a ns, and from RAM at 10.
    let bound = |machine: &Machine, trace: &mut MemoryTrace| {
        let options = Options { misses: Misses::Link, ..options.clone() };
        run(trace, machine, &options).bound.busy_ns
    };
    assert_eq!(bound(&gpu(), &mut trace)[0], 1100.0);
    assert_eq!(bound(&cpu(), &mut trace)[2], 11_000.0);
    // What the processor computes is not read from VRAM.
    let options = Options { misses: Misses::Cpu, ..options };
    let busy = run(&mut trace, &gpu(), &options).bound.busy_ns;
    assert_eq!([busy[0], busy[2]], [0.0, 110_000.0 / 4.0]);
}

#[test]
fn two_replays_are_the_same_in_every_byte() {
    let mut trace = cut();
    trace.rows.truncate(150);
    for machine in [cpu(), gpu()] {
        for forecast in ["none", "blend"] {
            let options = Options {
                forecast: forecast.to_string(),
                policy: policy::DEFAULT.to_string(),
                ..plain(8)
            };
            let text = |trace: &mut MemoryTrace| {
                serde_json::to_string(&run(trace, &machine, &options)).unwrap()
            };
            assert_eq!(text(&mut trace), text(&mut trace), "{} {forecast}", machine.name);
        }
    }
}

#[test]
fn warmth_is_what_the_trace_itself_left() {
    let mut trace = one_layer(&[0, 1, 0, 2, 2, 1]);
    let of = |trace: &mut MemoryTrace, warm| {
        let report = run(trace, &cpu(), &Options { warm, ..plain(3) });
        (report.accesses, report.hits, report.bracket.unwrap().lru_hits, report.warm)
    };
    assert_eq!(of(&mut trace, Warm::Cold), (6, 3, 3, false));
    assert_eq!(of(&mut trace, Warm::Tokens(0)), (6, 3, 3, false));
    assert_eq!(of(&mut trace, Warm::Tokens(2)), (4, 3, 3, true));
    assert_eq!(of(&mut trace, Warm::Whole), (6, 6, 6, true));
    let all = Options { warm: Warm::Tokens(6), ..plain(3) };
    let none = replay(&mut trace, &cpu(), &all, &mut |_| {}).unwrap_err();
    assert!(matches!(none, ReplayError::Empty));
}

#[test]
fn reading_ahead_what_comes_saves_its_wait() {
    // Two layers; the second one's expert follows from the first one's.
    let token = |at: usize| vec![vec![(at % 4) as u16], vec![(at * 3 % 4) as u16]];
    let shape = Shape::uniform(2, 4, 1, 0);
    let mut trace = small::decoded(&shape, (0..400).map(token).collect());
    let dense = Options { dense_bytes: 8_000_000, ring: Some(4), ..plain(1) };
    let without = run(&mut trace, &cpu(), &dense);
    let options = Options { forecast: "transition".to_string(), forecast_ns: 10, ..dense };
    let with = run(&mut trace, &cpu(), &options);
    assert!(with.ahead_useful > 300, "{}", with.ahead_useful);
    assert!(with.tok_s > 1.1 * without.tok_s, "{} {}", with.tok_s, without.tok_s);
    assert_eq!(with.accesses, without.accesses);
    let counts = with.decode.counts;
    assert_eq!(counts.accesses, counts.hits + counts.early + counts.in_flight + counts.misses);
    assert!(with.bracket.unwrap().best_hits >= with.hits);
}

/// Hears which tokens begin; says nothing.
struct Heard(Arc<Mutex<Vec<u32>>>);

impl Forecast for Heard {
    fn name(&self) -> &'static str {
        "heard"
    }

    fn scores(&mut self, _: usize, _: &Known<'_>, _: &mut [f32]) -> bool {
        false
    }

    fn routed(&mut self, _: usize, _: &[u32], _: &[f32]) {}

    fn begin_token(&mut self, token: u32) {
        self.0.lock().unwrap().push(token);
    }

    fn new_sequence(&mut self) {}
}

#[test]
fn tokens_without_ids_are_tokens_that_nobody_knows() {
    let mut trace = one_layer(&[0, 1, 2, 3, 0, 1, 2, 3]);
    let heard = |trace: &mut MemoryTrace| {
        let ids = Arc::new(Mutex::new(Vec::new()));
        let forecasts: Vec<Box<dyn Forecast>> = vec![Box::new(Heard(ids.clone()))];
        let shape = trace.header.shape.clone();
        let forecaster = Forecaster::with(&shape, forecast::Options::default(), forecasts);
        let rule = policy::by_name("lru").unwrap();
        let (machine, options) = (cpu(), plain(2));
        replay_with(trace, &machine, &options, rule, Some(forecaster), &mut |_| {}).unwrap();
        ids.lock().unwrap().clone()
    };
    assert_eq!(heard(&mut trace), [0, 1, 2, 3, 4, 5, 6, 0]);
    trace.rows.iter_mut().for_each(|row| row.token = None);
    let mut ids = heard(&mut trace);
    assert_eq!(ids.len(), 8);
    // No vocabulary is so large, and none of them comes twice.
    assert!(ids.iter().all(|&id| id > 1 << 31), "{ids:?}");
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 8);
}

#[test]
fn beside_a_gpu_nothing_is_read_ahead_for_a_tokens_first_layer() {
    let mut trace = cut();
    let ahead = Ahead { threshold: 0.05, priced: false, ..Ahead::default() };
    let options = Options {
        forecast: "previous-token".to_string(),
        ahead,
        misses: Misses::Link,
        ring: Some(16),
        ..plain(8)
    };
    let mut came_ahead = |machine| {
        let report = run(&mut trace, &machine, &options);
        let counts = |layer: usize| report.layers[layer].counts;
        [0, 1].map(|layer| counts(layer).early + counts(layer).in_flight)
    };
    let [first, second] = came_ahead(gpu());
    assert!(first == 0 && second > 0, "{first} {second}");
    let [first, second] = came_ahead(cpu());
    assert!(first > 0 && second > 0, "{first} {second}");
}

#[test]
fn a_trace_without_tokens_has_no_speed() {
    let mut prompt = one_layer(&[0, 1, 2, 3]);
    for (at, row) in prompt.rows.iter_mut().enumerate() {
        (row.is_prompt, row.pass_tokens) = (true, if at == 0 { 4 } else { 0 });
    }
    let report = run(&mut prompt, &cpu(), &plain(8));
    assert_eq!((report.decode.tokens, report.tok_s, report.bound.tok_s), (0, 0.0, 0.0));
}

#[test]
fn what_cannot_be_replayed_says_why() {
    let mut trace = one_layer(&[0, 1]);
    let fails = |trace: &mut MemoryTrace, options: &Options| {
        replay(trace, &cpu(), options, &mut |_| {}).unwrap_err().to_string()
    };
    let named = |policy: &str, forecast: &str| Options {
        policy: policy.to_string(),
        forecast: forecast.to_string(),
        ..plain(2)
    };
    assert!(fails(&mut trace, &named("best", "none")).contains("no policy is called best"));
    assert!(fails(&mut trace, &named("lru", "oracle")).contains("no forecast is called oracle"));
    let unknown = Options { expert_bytes: None, ..plain(2) };
    assert!(fails(&mut trace, &unknown).contains("bytes"));
    let few = Options { slots: Slots::Layers(vec![0]), ..plain(2) };
    assert!(fails(&mut trace, &few).contains("at least 1"));
    let mut empty = MemoryTrace::new(trace.header.clone(), Vec::<Row>::new());
    assert!(fails(&mut empty, &plain(2)).contains("without tokens"));
}
