//! A device that waits for the host, in the middle of a token: nothing is
//! called meanwhile that may wait for the device, by nobody, and a host that
//! was away for too long computes the token again.

use super::*;
use pregate_predictor::{Fed, Observer};
use pregate_runtime::gpu::{GpuRoom, GpuShare};
use pregate_runtime::{Cancel, Run};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const LOADS: [&str; 5] = [
    "cuModuleLoadDataEx",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuFuncLoad",
];

#[test]
fn kernels_of_a_token_are_loaded_before_the_first_one() {
    let Some(world) = World::new("gpu-loads") else { return };
    for (seed, graphs) in (0..6).flat_map(|seed| [(seed, true), (seed, false)]) {
        let at = format!("seed {seed}, graphs {graphs}");
        world.reset(seed);
        let device = world.device();
        let model = world.load(&device, seed).unwrap();
        let mut session = Session::new(&model, SessionOptions { graphs, ..options() }).unwrap();
        let before = LOADS.map(|name| world.count(name));
        // No prompt that would load some of them.
        let mut logits = Vec::new();
        for id in PROMPT {
            logits = session.feed_quietly(&[id]).unwrap().to_vec();
        }
        let bits: Vec<u32> = logits.iter().map(|logit| logit.to_bits()).collect();
        assert!(bits == world.expected[0], "{at}: other logits than the processor's");
        assert_eq!(LOADS.map(|name| world.count(name)), before, "{at}");
        world.assert_clean(&at);
    }
}

/// Wider tiles of attention and a launch that merges chunks, for contexts that
/// nobody reaches here: a token in the middle of an answer finds them there.
#[test]
fn kernels_of_long_contexts_are_loaded_before_the_first_token() {
    let scratch = Scratch::new("gpu-loads-long");
    let file = gguf_builder::Gguf::from_bytes(&tiny::tiny());
    let file = file.replace("qwen3moe.context_length", gguf_builder::u32(16_384));
    let Some(world) = World::of(scratch.write("long.gguf", &file.build())) else { return };
    let loads = |context: usize| {
        world.reset(0);
        let device = world.device();
        let model = world.load(&device, 0).unwrap();
        let before = world.count("cuFuncLoad");
        let options = SessionOptions { context: Some(context), ..options() };
        let session = Session::new(&model, options).unwrap();
        let loads = world.count("cuFuncLoad") - before;
        drop(session);
        loads
    };
    let [short, long] = [256, 16_384].map(loads);
    assert!(long > short, "{short} kernels for 256 positions, {long} for 16384");
}

#[test]
fn f10_kernels_that_do_not_fit_are_memory_that_was_refused() {
    let Some(world) = World::new("gpu-f10-kernels") else { return };
    for name in ["cuModuleLoadDataEx", "cuFuncLoad"] {
        for nth in spread(world.calls(name, 0), 8) {
            let at = format!("call {nth} of {name}");
            world.reset(nth);
            let device = world.device();
            world.standin.fail_call(name, nth, Fault::Once, 2);
            let error = cuda(world.run(&device, nth).unwrap_err(), &at);
            assert!(matches!(error, CudaError::OutOfMemory { .. }), "{at}: {error}");
            world.assert_bits(&world.run(&device, nth).unwrap(), &at);
            world.assert_clean(&at);
        }
    }
    // Those of a token are refused before there is a session.
    world.reset(0);
    let model = world.load(&world.device(), 0).unwrap();
    world.standin.fail_call("cuModuleLoadDataEx", 1, Fault::Once, 2);
    let error = Session::new(&model, options()).map(drop).unwrap_err();
    assert!(matches!(error, Error::Cuda(CudaError::OutOfMemory { .. })), "{error}");
}

/// Leaves the device alone while it waits, once in each of some passes.
struct Absent<'a> {
    device: &'a Device,
    /// The how-manieth they are, of those to come.
    passes: &'a [usize],
    fed: Vec<usize>,
    /// Asked of the device meanwhile, until it had ended the token.
    questions: usize,
}

impl Observer for Absent<'_> {
    fn fed(&mut self, fed: &Fed<'_>) {
        self.fed.push(fed.first_position);
    }

    fn routed(&mut self, _: usize, _: usize, _: &[u32], _: &[f32]) {
        // In a layer that misses nothing the device does not wait.
        if self.passes.first() == Some(&self.fed.len()) {
            let questions = (1..200_000).find(|_| self.device.compute().query().unwrap());
            self.questions = questions.expect("the device ends the token");
            if self.questions >= 1000 {
                self.passes = &self.passes[1..];
            }
        }
    }
}

/// Where each pass began, questions asked while the host was away, logits.
type Conversed = (Vec<usize>, usize, Bits);

/// Feeds the prompt and the expected answer. The host is away in `passes`;
/// where each pass began, how often the device was asked meanwhile, and the
/// logits.
fn converse_absently(
    session: &mut Session,
    device: &Device,
    passes: &[usize],
) -> Result<Conversed, Error> {
    let mut absent = Absent { device, passes, fed: Vec::new(), questions: 0 };
    let bits = converse_beside(session, &mut absent)?;
    Ok((absent.fed, absent.questions, bits))
}

/// Feeds the prompt and the expected answer.
fn converse_beside(session: &mut Session, observer: &mut dyn Observer) -> Result<Bits, Error> {
    let (mut all, mut ids) = (Bits::new(), PROMPT.to_vec());
    for _ in 0..=ANSWER {
        let cancel = Cancel::new();
        let mut run = Run { observer, cancel: &cancel, progress: None };
        let logits = session.feed(&ids, &mut run)?;
        all.push(logits.iter().map(|logit| logit.to_bits()).collect());
        ids = vec![argmax(logits)];
    }
    Ok(all)
}

/// Lets the device wait in every layer of a token.
struct Dawdler;

impl Observer for Dawdler {
    fn routed(&mut self, _: usize, position: usize, _: &[u32], _: &[f32]) {
        if position >= PROMPT.len() {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn f15_a_token_that_the_host_was_late_for_is_computed_again() {
    let Some(world) = World::new("gpu-f15-late") else { return };
    for (seed, graphs) in [(0, true), (6, false), (12, true)] {
        let at = format!("seed {seed}, graphs {graphs}");
        world.reset(seed);
        // Of 30 seconds each is a millisecond.
        world.standin.command("tick=1000000");
        let device = world.device();
        let model = world.load(&device, seed).unwrap();
        let mut session = Session::new(&model, SessionOptions { graphs, ..options() }).unwrap();
        let (fed, questions, bits) = converse_absently(&mut session, &device, &[2]).unwrap();
        // Only that token, and once.
        assert_eq!(fed, [0, 3, 3, 4], "{at}");
        assert!((30_000..31_000).contains(&questions), "{at}: {questions}");
        world.assert_bits(&bits, &at);
        // The session goes on as any other.
        session.reset();
        let (fed, _, bits) = converse_absently(&mut session, &device, &[]).unwrap();
        assert_eq!(fed, [0, 3, 4], "{at}");
        world.assert_bits(&bits, &at);
        assert_eq!(device.failure(), None);
        world.assert_clean(&at);
    }
}

#[test]
fn f15_a_host_that_is_late_again_launches_layer_by_layer_and_says_why() {
    let Some(world) = World::new("gpu-f15-again") else { return };
    for seed in [0, 6] {
        let at = format!("seed {seed}");
        world.reset(seed);
        world.standin.command("tick=1000000");
        let device = world.device();
        let model = world.load(&device, seed).unwrap();
        let mut session = Session::new(&model, options()).unwrap();
        // What is computed again is a pass of its own.
        let (fed, _, bits) = converse_absently(&mut session, &device, &[2, 4]).unwrap();
        assert_eq!(fed, [0, 3, 3, 4, 4], "{at}");
        world.assert_bits(&bits, &at);
        let warning = session.warning().unwrap_or_else(|| panic!("{at}: no warning"));
        for words in ["waited 30 s", "second time", "layer by layer", "debugger"] {
            assert!(warning.contains(words), "{warning}");
        }
        // The device waits for nobody any more.
        session.reset();
        let launched = world.count("cuGraphLaunch");
        let (fed, _, bits) = converse_absently(&mut session, &device, &[2]).unwrap();
        assert_eq!(fed, [0, 3, 4], "{at}");
        world.assert_bits(&bits, &at);
        assert_eq!(world.count("cuGraphLaunch"), launched, "{at}");
        // Another session starts as any.
        let mut another = Session::new(&model, options()).unwrap();
        world.assert_bits(&converse(&mut another).unwrap(), &at);
        assert_eq!(another.warning(), None, "{at}");
        assert!(world.count("cuGraphLaunch") > launched, "{at}");
        world.assert_clean(&at);
    }
}

#[test]
fn f15_beside_a_watchdog_no_kernel_waits_for_longer_than_a_second() {
    let Some(world) = World::new("gpu-watchdog") else { return };
    world.reset(0);
    world.standin.command("tick=1000000");
    world.standin.command("watchdog=1");
    let device = world.device();
    assert!(device.info().has_watchdog);
    let model = world.load(&device, 0).unwrap();
    let mut session = Session::new(&model, options()).unwrap();
    let (_, questions, bits) = converse_absently(&mut session, &device, &[2]).unwrap();
    assert!((1000..2000).contains(&questions), "{questions}");
    world.assert_bits(&bits, "beside a watchdog");
    world.assert_clean("beside a watchdog");
}

/// The late token has changed the recurrent state: it goes back to what it was.
#[test]
fn f15_a_recurrent_state_loses_no_token_that_the_host_was_late_for() {
    let path = golden::find("hf/qwen3_5_moe_text").expect("in the repository");
    let Some(mut world) = World::of(path) else { return };
    world.slots = 4;
    for (seed, graphs, has_watchdog) in [(0, true, false), (6, false, true), (12, true, true)] {
        let at = format!("seed {seed}, graphs {graphs}");
        world.reset(seed);
        world.standin.command("tick=1000000");
        world.standin.command(&format!("watchdog={}", usize::from(has_watchdog)));
        let device = world.device();
        let model = world.load(&device, seed).unwrap();
        let mut session = Session::new(&model, SessionOptions { graphs, ..options() }).unwrap();
        let (fed, _, bits) = converse_absently(&mut session, &device, &[2, 4]).unwrap();
        assert_eq!(fed, [0, 3, 3, 4, 4], "{at}");
        world.assert_bits(&bits, &at);
        session.reset();
        world.assert_bits(&converse(&mut session).unwrap(), &at);
        world.assert_clean(&at);
    }
}

#[test]
fn the_plan_counts_the_copy_of_a_recurrent_state() {
    let path = golden::find("hf/qwen3_5_moe_text").expect("in the repository");
    let Some(mut world) = World::of(path) else { return };
    world.slots = 4;
    world.reset(0);
    let opened = OpenedModel::open(&world.path, &mut |_| {}).unwrap();
    let share = |vram_bytes: u64| {
        let (files, weights) = (opened.files(), opened.weights());
        let room = GpuRoom { vram_bytes, host_bytes: 1 << 30, ring: Some(2) };
        GpuShare::of(files, opened.description(), weights, (16, &options()), room).unwrap()
    };
    let whole = share(1 << 30);
    let some = share(whole.parts.total() - whole.parts.experts_bytes / 4);
    assert!(whole.is_whole() && some.moves(), "{some:?}");
    let taken = |model: &Model| {
        let before = world.standin.count("device_bytes");
        let session = Session::new(model, options()).unwrap();
        (world.standin.count("device_bytes") - before, drop(session)).0
    };
    let (device, scratch) = (world.device(), some.parts.scratch_bytes);
    // Allocations are padded.
    let planned = some.parts.kv_bytes + scratch..some.parts.kv_bytes + scratch + 4096;
    let found = taken(&world.load(&device, 0).unwrap());
    assert!(planned.contains(&found), "{found} bytes; {planned:?}");
    let residency = Residency::Gpu { device: device.clone(), experts: GpuExperts::All };
    let load = LoadOptions { backend: world.cpu.clone(), residency };
    let found = taken(&Model::load(&world.path, load, &mut |_| {}).unwrap());
    let planned = whole.parts.kv_bytes + scratch..whole.parts.kv_bytes + scratch + 4096;
    assert!(planned.contains(&found), "{found} bytes with all experts; {planned:?}");
    assert!(some.parts.kv_bytes > whole.parts.kv_bytes + 4096, "{some:?}");
}

#[test]
fn f15_a_process_that_was_stopped_does_not_blame_the_device() {
    let Some(world) = World::new("gpu-f15-stopped") else { return };
    for seed in [0, 2] {
        world.reset(seed);
        let device = world.device();
        let model = world.load(&device, seed).unwrap();
        let mut session = Session::new(&model, options()).unwrap();
        device.set_patience(Duration::from_millis(400));
        let stop = |token| {
            if token == 0 {
                world.standin.command("stop=cuStreamQuery:1:900");
            }
        };
        world.assert_bits(&converse_and(&mut session, &stop).unwrap(), "a stopped process");
        assert_eq!(device.failure(), None);
        world.assert_clean("a stopped process");
    }
}

/// `run` here, while `other` runs on a thread of its own, again and again: it
/// hears how often it did.
fn beside(other: impl Fn(usize) + Sync, run: impl FnOnce()) {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let is_over = AtomicBool::new(false);
    let goes_on = |_: &usize| !is_over.load(Ordering::Relaxed);
    thread::scope(|scope| {
        // Also where `run` fails: the other thread would go on for ever.
        let over = Over(&is_over);
        let others = scope.spawn(|| (0..).take_while(goes_on).map(&other).count());
        run();
        drop(over);
        assert!(others.join().unwrap() > 0);
    });
}

/// On two threads, each with a model of its own: what one captures or waits for
/// meets no launch, allocation or load of the other.
#[test]
fn models_come_and_go_on_a_device_while_another_computes() {
    let Some(world) = World::new("gpu-models") else { return };
    for seed in 0..4 {
        let at = format!("seed {seed}");
        world.reset(seed + 1);
        let device = world.device();
        let model = world.load(&device, seed).unwrap();
        let other = |models| {
            let model = world.load(&device, seed + 1).unwrap();
            if models % 4 == 0 {
                let bits = converse(&mut Session::new(&model, options()).unwrap());
                world.assert_bits(&bits.unwrap(), "the other model");
            }
        };
        beside(other, || {
            for _ in 0..4 {
                let mut session = Session::new(&model, options()).unwrap();
                let bits = converse_beside(&mut session, &mut Dawdler);
                world.assert_bits(&bits.unwrap(), &at);
            }
        });
        world.assert_clean(&at);
    }
}

#[test]
fn sessions_come_and_go_while_another_computes() {
    let Some(world) = World::new("gpu-sessions") else { return };
    for seed in 0..3 {
        let at = format!("seed {seed}");
        world.reset(seed + 1);
        let device = world.device();
        let model = world.load(&device, seed).unwrap();
        let other = |_| {
            let mut session = Session::new(&model, options()).unwrap();
            session.feed_quietly(&PROMPT[..1]).unwrap();
        };
        beside(other, || {
            for round in 0..4 {
                let mut session = Session::new(&model, options()).unwrap();
                world.assert_bits(&converse(&mut session).unwrap(), &format!("{at}, {round}"));
            }
        });
        world.assert_clean(&at);
    }
}
