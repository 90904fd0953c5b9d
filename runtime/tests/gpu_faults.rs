//! What a model on a GPU does when the driver fails: every allocation, copy,
//! launch and wait of a run, once or for good, at once or late. Either the run
//! goes on with the same bits, or one error says what happened; never another
//! token, a panic, or a call after the device is gone. Each test is a row of
//! the fault table, whose number it has. `tests/gpu_faults.rs` is the same for
//! the program: its messages and exit codes, and smaller plans.
//!
//! Chunks of one transfer that fail (F14) are in
//! `kernels/tests/cuda_device/links.rs`; a driver that is not there or not
//! fit (F18) in `cuda_device/opening.rs`.

#[path = "support/gguf_builder.rs"]
mod gguf_builder;
#[path = "support/golden.rs"]
#[allow(dead_code)]
mod golden;
#[path = "support/scratch.rs"]
mod scratch;
#[path = "support/tiny.rs"]
mod tiny;
#[path = "gpu_faults/waits.rs"]
mod waits;

use golden::argmax;
use pregate_kernels::cuda::{CudaError, Device, DeviceOptions, Modules};
use pregate_kernels::{Backend, Cpu, CpuOptions};
use pregate_predictor::Ahead;
use pregate_runtime::model::Source;
use pregate_runtime::{
    Error, GpuExperts, LoadOptions, Misses, Model, OpenedModel, Residency, Session, SessionOptions,
    Streaming,
};
use pregate_standin::{Drain, Exclusive, Fault, testing};
use scratch::Scratch;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PROMPT: [u32; 3] = [5, 42, 79];
/// Greedy tokens behind it.
const ANSWER: usize = 2;
/// Logits as bits, after the prompt and after each token behind it.
type Bits = Vec<Vec<u32>>;

/// The stand-in for one test, a small model, and what the processor says.
struct World {
    standin: Exclusive<'static>,
    path: PathBuf,
    _scratch: Option<Scratch>,
    cpu: Arc<dyn Backend>,
    expected: Bits,
    /// Of each layer.
    slots: usize,
}

fn options() -> SessionOptions {
    SessionOptions { context: Some(16), ..SessionOptions::default() }
}

fn converse(session: &mut Session) -> Result<Bits, Error> {
    converse_and(session, &|_| {})
}

/// `before` hears the number of each token that is fed behind the prompt.
fn converse_and(session: &mut Session, before: &dyn Fn(usize)) -> Result<Bits, Error> {
    let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect();
    let mut logits = session.feed_quietly(&PROMPT)?.to_vec();
    let mut all: Bits = vec![bits(&logits)];
    for token in 0..ANSWER {
        before(token);
        logits = session.feed_quietly(&[argmax(&logits)])?.to_vec();
        all.push(bits(&logits));
    }
    Ok(all)
}

impl World {
    fn new(name: &str) -> Option<Self> {
        let scratch = Scratch::new(name);
        let path = scratch.write("tiny.gguf", &tiny::tiny());
        Some(Self { _scratch: Some(scratch), ..Self::of(path)? })
    }

    /// With the model at `path`.
    fn of(path: PathBuf) -> Option<Self> {
        let standin = testing::standin()?.exclusive();
        let cpu: Arc<dyn Backend> =
            Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).unwrap());
        let options_of_load = LoadOptions { backend: cpu.clone(), residency: Residency::Lazy };
        let model = Model::load(&path, options_of_load, &mut |_| {}).unwrap();
        let expected = converse(&mut Session::new(&model, options()).unwrap()).unwrap();
        Some(Self { standin, path, _scratch: None, cpu, expected, slots: 3 })
    }

    /// A machine as new, whose work is done late, at once or in any order.
    fn reset(&self, seed: u64) {
        self.standin.reset();
        self.standin.set_print(false);
        self.standin.set_drain(match seed % 3 {
            0 => Drain::Lazy,
            1 => Drain::Eager,
            _ => Drain::Random(seed),
        });
    }

    fn device(&self) -> Device {
        Device::open(0, &DeviceOptions { modules: Modules::Named }).unwrap()
    }

    /// Some experts stay, others come and go; `seed` says whether missing ones
    /// are copied, or the host computes what it wants.
    fn load(&self, device: &Device, seed: u64) -> Result<Model, Error> {
        let opened = OpenedModel::open(&self.path, &mut |_| {})?;
        let layers = opened.layout().shape.layers.len();
        let streaming = Streaming {
            slots: vec![self.slots; layers],
            ring: 2,
            ahead: Ahead { threshold: 0.1, ..Ahead::default() },
            source: Source::Host,
            ..Streaming::default()
        };
        let misses = if seed.is_multiple_of(2) { Misses::Copied } else { Misses::Auto };
        let experts = GpuExperts::Moving { fixed: vec![1; layers], streaming, misses };
        let residency = Residency::Gpu { device: device.clone(), experts };
        opened.load(LoadOptions { backend: self.cpu.clone(), residency }, &mut |_| {})
    }

    /// From loading to the last token; nothing is left of it.
    fn run(&self, device: &Device, seed: u64) -> Result<Bits, Error> {
        let model = self.load(device, seed)?;
        converse(&mut Session::new(&model, options())?)
    }

    /// Calls of `name` (of any, for "") in a run without faults, by `seed`.
    fn calls(&self, name: &str, seed: u64) -> u64 {
        self.reset(seed);
        let device = self.device();
        let before = self.count(name);
        assert!(self.run(&device, seed).unwrap() == self.expected, "without a fault");
        self.count(name) - before
    }

    fn count(&self, name: &str) -> u64 {
        if name.is_empty() { self.standin.calls() } else { self.standin.calls_of(name) }
    }

    fn assert_clean(&self, at: &str) {
        let violations = self.standin.take_violations();
        assert!(violations.is_empty(), "{at}: {violations:?}");
    }

    fn assert_bits(&self, found: &Bits, at: &str) {
        assert!(*found == self.expected, "{at}: other logits than the processor's");
    }
}

fn cuda(error: Error, at: &str) -> CudaError {
    match error {
        Error::Cuda(error) => error,
        other => panic!("{at}: {other}"),
    }
}

/// So many of `1..=count`, evenly.
fn spread(count: u64, wanted: u64) -> impl Iterator<Item = u64> {
    let wanted = wanted.min(count);
    (0..wanted).map(move |index| 1 + index * count / wanted)
}

#[test]
fn f10_refused_memory_at_start_names_what_was_needed_and_leaves_nothing_behind() {
    let Some(world) = World::new("gpu-f10") else { return };
    let allocations = world.calls("cuMemAlloc", 0);
    assert!(allocations >= 4, "weights, experts, cache, buffers: {allocations}");
    for nth in 1..=allocations {
        let at = format!("allocation {nth} of {allocations}");
        world.reset(nth);
        let device = world.device();
        world.standin.fail_call("cuMemAlloc", nth, Fault::Once, 2);
        let error = cuda(world.run(&device, nth).unwrap_err(), &at);
        let CudaError::OutOfMemory { needed, free } = error else { panic!("{at}: {error}") };
        assert!(needed > 0 && free > needed, "{at}: {needed} of {free} bytes");
        assert!(error.to_string().contains("MiB are free"), "{at}: {error}");
        let left = ["device_bytes", "pinned_bytes"].map(|what| world.standin.count(what));
        assert!(left[0] == 0 && left[1] <= 4 << 20, "{at}: {left:?} bytes are still taken");
        world.assert_bits(&world.run(&device, nth).unwrap(), &at);
        world.assert_clean(&at);
    }
}

#[test]
fn f11_refused_memory_later_is_an_error_of_one_session() {
    let Some(world) = World::new("gpu-f11") else { return };
    world.reset(0);
    let device = world.device();
    let model = world.load(&device, 0).unwrap();
    let mut session = Session::new(&model, options()).unwrap();
    let first = argmax(session.feed_quietly(&PROMPT).unwrap());
    // Another program takes the rest.
    world.standin.set_vram(world.standin.count("device_bytes") + 100);
    for _ in 0..3 {
        let error = Session::new(&model, options()).map(drop).unwrap_err();
        assert!(matches!(error, Error::Cuda(CudaError::OutOfMemory { .. })), "{error}");
    }
    session.feed_quietly(&[first]).unwrap();
    session.reset();
    world.assert_bits(&converse(&mut session).unwrap(), "the session from before");
    world.standin.set_vram(8 << 30);
    let mut another = Session::new(&model, options()).unwrap();
    world.assert_bits(&converse(&mut another).unwrap(), "a session when there is room again");
    world.assert_clean("F11");
}

#[test]
fn f12_refused_page_locked_memory_changes_no_bit() {
    let Some(world) = World::new("gpu-f12") else { return };
    let asked = world.calls("cuMemHostAlloc", 0);
    assert!(asked >= 2, "staging and experts: {asked}");
    let mut pageable = 0;
    for (nth, code) in (1..=asked).flat_map(|nth| [(nth, 1), (nth, 2)]) {
        let at = format!("page-locked block {nth} of {asked} returns {code}");
        world.reset(nth);
        let device = world.device();
        world.standin.fail_call("cuMemHostAlloc", nth, Fault::Once, code);
        let model = world.load(&device, nth).unwrap();
        let found = converse(&mut Session::new(&model, options()).unwrap()).unwrap();
        world.assert_bits(&found, &at);
        let (pinned, refused) = model.gpu().unwrap().host_bytes();
        if let Some((bytes, why)) = refused {
            assert!(bytes > 0 && why.contains("page-locked"), "{at}: {bytes} {why}");
            pageable += 1;
        } else {
            assert!(pinned > 0, "{at}");
        }
        world.assert_clean(&at);
    }
    assert!(pageable > 0, "no refusal met the experts");
    // None at all, from the start.
    world.reset(1);
    world.standin.set_pinned(0);
    world.assert_bits(&world.run(&world.device(), 0).unwrap(), "no page-locked memory");
}

#[test]
fn f13_a_copy_that_is_refused_leaves_no_part_of_an_expert() {
    let Some(world) = World::new("gpu-f13") else { return };
    let copies = [world.calls("cuMemcpyHtoDAsync", 0), world.calls("cuMemcpyHtoDAsync", 1)];
    assert!(copies[0] > 60, "{copies:?}");
    let (mut unnoticed, mut errors) = (0, 0);
    for times in [1, 2] {
        for (index, nth) in spread(copies[0].max(copies[1]), 24).enumerate() {
            let (seed, code) = (index as u64, [1, 2][index / 2 % 2]);
            let at = format!("copy {nth} of {copies:?} is refused {times} times with {code}");
            world.reset(seed);
            let device = world.device();
            for _ in 0..times {
                world.standin.fail_call("cuMemcpyHtoDAsync", nth, Fault::Once, code);
            }
            let refused = |error| {
                let error = cuda(error, &at);
                assert!(!error.is_sticky(), "{at}: {error}");
                assert!(error.to_string().contains(&format!("{code} CUDA_ERROR")), "{at}: {error}");
            };
            let mut session = match world.load(&device, seed) {
                Ok(model) => Session::new(&model, options()).unwrap(),
                Err(error) => {
                    refused(error);
                    errors += 1;
                    continue;
                }
            };
            match converse(&mut session) {
                Ok(found) => {
                    unnoticed += 1;
                    world.assert_bits(&found, &at);
                }
                Err(error) => {
                    refused(error);
                    errors += 1;
                }
            }
            // The same model, the same slots.
            session.reset();
            world.standin.clear_faults();
            world.assert_bits(&converse(&mut session).unwrap(), &at);
            world.assert_clean(&at);
        }
    }
    assert!(unnoticed >= 8 && errors >= 8, "{unnoticed} were tried again, {errors} were errors");
}

#[test]
fn f14_a_refused_graph_is_launched_kernel_by_kernel_with_one_warning() {
    let Some(world) = World::new("gpu-f14") else { return };
    let begun = |world: &World| world.count("cuStreamBeginCapture");
    let calls = [
        ("cuStreamBeginCapture", 1),
        ("cuLaunchKernel", 1),
        ("cuLaunchKernel", 9),
        ("cuGraphInstantiateWithFlags", 1),
        ("cuGraphLaunch", 1),
    ];
    for (index, (name, nth)) in calls.into_iter().enumerate() {
        for (seed, code) in [(0, 2), (1, 801), (2, 304)] {
            let at = format!("call {nth} of {name} for a graph returns {code}");
            world.reset(seed + 3 * index as u64);
            let device = world.device();
            let model = world.load(&device, seed).unwrap();
            let mut session = Session::new(&model, options()).unwrap();
            let before = begun(&world);
            let fail = |token| {
                if token == 0 {
                    world.standin.fail_call(name, nth, Fault::Once, code);
                }
            };
            world.assert_bits(&converse_and(&mut session, &fail).unwrap(), &at);
            let warning = session.warning().unwrap_or_else(|| panic!("{at}: no warning"));
            assert!(warning.contains(&format!("{code} CUDA_ERROR")), "{at}: {warning}");
            assert!(warning.contains("one by one"), "{at}: {warning}");
            // It is not asked for with every token, and nothing is left.
            session.reset();
            world.assert_bits(&converse(&mut session).unwrap(), &at);
            assert_eq!(begun(&world) - before, 1, "{at}");
            assert_eq!(session.warning(), Some(warning), "{at}");
            assert_eq!(device.failure(), None, "{at}");
            // Another session has its graph.
            let mut another = Session::new(&model, options()).unwrap();
            world.assert_bits(&converse(&mut another).unwrap(), &at);
            assert_eq!((another.warning(), begun(&world) - before), (None, 2), "{at}");
            drop((session, another, model));
            assert_eq!(world.standin.count("graphs"), 0, "{at}");
            world.assert_clean(&at);
        }
    }
}

#[test]
fn f15_a_device_that_never_ends_its_work_is_given_up() {
    let Some(world) = World::new("gpu-f15") else { return };
    let records = world.calls("cuEventRecord", 0);
    let mut hung = 0;
    for nth in spread(records, 12) {
        let at = format!("event {nth} of {records} never completes");
        world.reset(nth);
        let device = world.device();
        device.set_patience(Duration::from_millis(60));
        world.standin.command(&format!("hang={nth}"));
        let started = Instant::now();
        let result = world.run(&device, nth);
        assert!(started.elapsed() < Duration::from_secs(5), "{at}: {:?}", started.elapsed());
        let calls = world.standin.calls();
        world.standin.release();
        let error = match result {
            // One that nobody waits for.
            Ok(found) => {
                world.assert_bits(&found, &at);
                continue;
            }
            Err(error) => cuda(error, &at),
        };
        hung += 1;
        assert!(matches!(error, CudaError::Hung { .. }), "{at}: {error}");
        let text = error.to_string();
        assert!(text.contains("Xid") && text.contains("dmesg"), "{text}");
        assert_eq!(device.failure(), Some(error));
        drop(device);
        // The link's thread may have been in one.
        assert!(world.standin.calls() <= calls + 1, "{at}: a call after that");
    }
    assert!(hung >= 6, "only {hung} events were waited for");
}

#[test]
fn f15_a_token_whose_launches_never_begin_is_given_up() {
    let Some(world) = World::new("gpu-f15-token") else { return };
    for seed in 0..3 {
        world.reset(seed);
        let device = world.device();
        let model = world.load(&device, seed).unwrap();
        let mut session = Session::new(&model, options()).unwrap();
        let mut next = argmax(session.feed_quietly(&PROMPT).unwrap());
        (0..seed).for_each(|_| next = argmax(session.feed_quietly(&[next]).unwrap()));
        device.set_patience(Duration::from_millis(60));
        world.standin.command("hang=1");
        let mark = device.compute().record().unwrap();
        let started = Instant::now();
        let error = cuda(session.feed_quietly(&[next]).map(drop).unwrap_err(), "a token");
        assert!(matches!(error, CudaError::Hung { .. }), "{seed}: {error}");
        assert_eq!(device.failure(), Some(error));
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        world.standin.release();
        drop((mark, session, model));
        world.assert_clean("a token that hangs");
    }
}

/// Fails a run at `count` places; how many of them it noticed. `see` looks at
/// each error.
fn fail_for_good(
    world: &World,
    name: &str,
    (count, fault): (u64, Fault),
    codes: &[u32],
    see: &dyn Fn(&CudaError, u32, &str),
) -> u64 {
    let calls = [world.calls(name, 0), world.calls(name, 1)];
    let (mut noticed, mut tried) = (0, 0);
    for (index, nth) in spread(calls[0].min(calls[1]), count).enumerate() {
        let (seed, code) = (index as u64, codes[index % codes.len()]);
        let at = format!("call {nth} of {calls:?} of {name:?} returns {code} ({fault:?})");
        world.reset(seed);
        let device = world.device();
        match name {
            "" => world.standin.fail(nth, fault, code),
            name => world.standin.fail_call(name, nth, fault, code),
        }
        let started = Instant::now();
        let result = world.run(&device, seed);
        let took = started.elapsed();
        tried += 1;
        match result {
            // Where only a destructor saw it, or nothing came after it.
            Ok(found) => world.assert_bits(&found, &at),
            Err(error) => {
                let error = cuda(error, &at);
                assert!(error.is_sticky(), "{at}: {error}");
                assert_eq!(device.failure().as_ref(), Some(&error), "{at}");
                see(&error, code, &at);
                noticed += 1;
            }
        }
        drop(device);
        assert!(took < Duration::from_secs(5), "{at}: {took:?}");
        // The driver answers every call after the first with the same code;
        // the link's thread may have been in one.
        let refused = world.standin.count("calls_after_sticky");
        assert!(refused <= 1, "{at}: {refused} calls after the error");
        world.assert_clean(&at);
    }
    assert!(tried >= count.min(calls[0].min(calls[1])), "{tried}");
    noticed
}

#[test]
fn f16_no_call_follows_an_error_that_ends_the_device() {
    let Some(world) = World::new("gpu-f16") else { return };
    let see = |error: &CudaError, code: u32, at: &str| {
        let text = error.to_string();
        assert!(text.contains(&format!("{code} CUDA_ERROR")), "{at}: {text}");
        assert!(text.contains("start it again"), "{at}: {text}");
    };
    let codes = [700, 719, 999, 214, 716];
    let noticed = fail_for_good(&world, "", (60, Fault::Sticky), &codes, &see);
    assert!(noticed > 50, "{noticed}");
    let names = [
        "cuLaunchKernel",
        "cuGraphInstantiateWithFlags",
        "cuGraphLaunch",
        "cuMemcpyHtoDAsync",
        "cuMemAlloc",
        "cuMemHostAlloc",
    ];
    for name in names {
        let noticed = fail_for_good(&world, name, (10, Fault::Sticky), &codes, &see);
        assert!(noticed > 0, "{name}");
    }
}

#[test]
fn f17_an_error_that_shows_later_is_said_to_be_of_earlier_work() {
    let Some(world) = World::new("gpu-f17") else { return };
    let see = |error: &CudaError, code: u32, at: &str| {
        assert!(
            matches!(error, CudaError::Sticky { code: found, delayed: true, .. } if *found == code),
            "{at}: {error}"
        );
        assert!(error.to_string().contains("caused by earlier work"), "{at}: {error}");
    };
    let late = (40, Fault::DelayedSticky);
    let noticed = fail_for_good(&world, "", late, &[700, 719, 716], &see);
    assert!(noticed > 30, "{noticed}");
    assert!(fail_for_good(&world, "cuLaunchKernel", (12, late.1), &[700, 719], &see) > 8);
}

#[test]
fn f19_a_gpu_that_is_gone_has_a_hint() {
    let Some(world) = World::new("gpu-f19") else { return };
    let see = |error: &CudaError, _: u32, at: &str| {
        let text = error.to_string();
        assert!(text.contains("nvidia_uvm") && text.contains("Xid"), "{at}: {text}");
    };
    let noticed = fail_for_good(&world, "", (20, Fault::Sticky), &[999], &see);
    assert!(noticed > 15, "{noticed}");
}
