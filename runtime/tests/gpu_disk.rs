//! Experts for which neither a GPU nor the host has room: reads that fail, that
//! never end, and frames that everybody wants. `gpu_identity.rs` has the bits
//! of many ways to place and bring them.

#[path = "support/gguf_builder.rs"]
mod gguf_builder;
#[path = "support/golden.rs"]
#[allow(dead_code)]
mod golden;
#[path = "support/scratch.rs"]
mod scratch;
#[path = "support/tiny.rs"]
mod tiny;

use golden::argmax;
use pregate_kernels::cuda::{Device, DeviceOptions, Modules};
use pregate_kernels::{Backend, Cpu, CpuOptions};
use pregate_predictor::{Ahead, ExpertId};
use pregate_runtime::gpu::{Asker, GpuRoom, GpuShare, HostFrames, NoShare};
use pregate_runtime::model::{BelowHost, Source};
use pregate_runtime::store::disk::{self, DiskOptions};
use pregate_runtime::store::frames::{ClassSpec, Frames};
use pregate_runtime::store::layout::ModelLayout;
use pregate_runtime::store::mover::{Counters, Done, Fill, MoveError, Mover, Notice, Urgency};
use pregate_runtime::{
    Error, GpuExperts, LoadOptions, Misses, Model, OpenedModel, Residency, Session, SessionOptions,
    Streaming,
};
use pregate_standin::{Drain, Exclusive, testing};
use scratch::Scratch;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Experts of a token in the tiny model.
const TOP_K: usize = 2;
const PROMPT: [u32; 3] = [5, 42, 79];
/// Greedy tokens behind it.
const ANSWER: usize = 2;
/// Logits as bits, after the prompt and after each token behind it.
type Bits = Vec<Vec<u32>>;

/// The stand-in for one test, a small model, and what the processor says.
struct World {
    standin: Exclusive<'static>,
    path: PathBuf,
    _scratch: Scratch,
    cpu: Arc<dyn Backend>,
    expected: Bits,
}

fn options() -> SessionOptions {
    SessionOptions { context: Some(16), ..SessionOptions::default() }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

fn converse(session: &mut Session) -> Result<Bits, Error> {
    let mut logits = session.feed_quietly(&PROMPT)?.to_vec();
    let mut all: Bits = vec![bits(&logits)];
    for _ in 0..ANSWER {
        logits = session.feed_quietly(&[argmax(&logits)])?.to_vec();
        all.push(bits(&logits));
    }
    Ok(all)
}

fn quick() -> DiskOptions {
    DiskOptions { measure_ns: 0, ..DiskOptions::default() }
}

impl World {
    fn new(name: &str) -> Option<Self> {
        let standin = testing::standin()?.exclusive();
        let scratch = Scratch::new(name);
        let path = scratch.write("tiny.gguf", &tiny::tiny());
        let cpu: Arc<dyn Backend> =
            Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).unwrap());
        let of_load = LoadOptions { backend: cpu.clone(), residency: Residency::Lazy };
        let model = Model::load(&path, of_load, &mut |_| {}).unwrap();
        let expected = converse(&mut Session::new(&model, options()).unwrap()).unwrap();
        Some(Self { standin, path, _scratch: scratch, cpu, expected })
    }

    fn device(&self, seed: u64) -> Device {
        self.standin.reset();
        self.standin.set_print(false);
        self.standin.set_drain(match seed % 3 {
            0 => Drain::Lazy,
            1 => Drain::Eager,
            _ => Drain::Random(seed),
        });
        Device::open(0, &DeviceOptions { modules: Modules::Named }).unwrap()
    }

    /// Three slots, and one expert of each layer on the host.
    fn load(&self, misses: Misses, seed: u64, source: Source) -> Result<Model, Error> {
        let opened = OpenedModel::open(&self.path, &mut |_| {})?;
        let (layers, classes) =
            (opened.layout().shape.layers.len(), opened.layout().class_bytes.len());
        let (kept, frames) = (vec![1; layers], vec![3; classes]);
        let below = BelowHost { kept, frames, source: Box::new(source) };
        let streaming = Streaming {
            slots: vec![3; layers],
            ring: 2,
            ahead: Ahead { threshold: 0.1, ..Ahead::default() },
            source: Source::HostAndDisk(below),
            ..Streaming::default()
        };
        let experts = GpuExperts::Moving { fixed: vec![0; layers], streaming, misses };
        let residency = Residency::Gpu { device: self.device(seed), experts };
        opened.load(LoadOptions { backend: self.cpu.clone(), residency }, &mut |_| {})
    }

    fn assert_clean(&self, at: &str) {
        let violations = self.standin.take_violations();
        assert!(violations.is_empty(), "{at}: {violations:?}");
    }
}

/// What a [`Bad`] disk does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Badness {
    /// The n-th read fails.
    Fails(u64),
    /// Two read-aheads never end.
    NeverAhead,
    /// Every read takes so long.
    Slow(Duration),
}

/// The disk, with something wrong.
struct Bad {
    inner: Box<dyn Mover>,
    badness: Badness,
    /// Reads that ended.
    ended: Arc<AtomicU64>,
    file: PathBuf,
    /// File offset and urgency of each fill.
    fills: HashMap<u64, (u64, Urgency)>,
    /// Held back.
    kept: Vec<Done>,
}

impl Bad {
    fn source(badness: Badness, ended: &Arc<AtomicU64>) -> Source {
        let ended = ended.clone();
        Source::Custom(Box::new(move |files, _, frames| {
            let names: Vec<_> = files.paths().iter().cloned().zip(files.identities()).collect();
            let (inner, _) = disk::probe(&names, frames, &quick())?;
            let file = names[0].0.clone();
            let (fills, kept) = (HashMap::new(), Vec::new());
            let bad = Self { inner, badness, ended, file, fills, kept };
            let started = std::time::Instant::now();
            let clock = Arc::new(move || started.elapsed().as_nanos() as u64);
            Ok((Box::new(bad), clock))
        }))
    }
}

impl Mover for Bad {
    fn describe(&self) -> String {
        format!("{:?}: {}", self.badness, self.inner.describe())
    }

    fn submit(&mut self, fill: Fill) {
        self.fills.insert(fill.key, (fill.pieces[0].offset, fill.urgency));
        self.inner.submit(fill);
    }

    fn promote(&mut self, key: u64) {
        if let Some(fill) = self.fills.get_mut(&key) {
            fill.1 = Urgency::Demand;
        }
        self.inner.promote(key);
    }

    fn discard(&mut self, key: u64) {
        self.inner.discard(key);
    }

    fn next(&mut self, wait_ns: u64) -> Option<Done> {
        let fills = &self.fills;
        let is_wanted = |done: &Done| fills[&done.key].1 == Urgency::Demand;
        if let Some(at) = self.kept.iter().position(is_wanted) {
            return Some(self.kept.remove(at));
        }
        let mut done = self.inner.next(wait_ns)?;
        let (offset, urgency) = self.fills[&done.key];
        let is_held_back = urgency == Urgency::Prefetch && done.result.is_ok();
        if self.badness == Badness::NeverAhead && is_held_back && self.kept.len() < 2 {
            self.kept.push(done);
            return None;
        }
        if let Badness::Slow(time) = self.badness {
            std::thread::sleep(time);
        }
        let nth = self.ended.fetch_add(1, Ordering::Relaxed) + 1;
        if self.badness == Badness::Fails(nth) {
            let source = Arc::new(io::Error::from_raw_os_error(5));
            done.result = Err(MoveError::Io { file: self.file.clone(), offset, source });
        }
        Some(done)
    }

    fn now_ns(&self) -> u64 {
        self.inner.now_ns()
    }

    fn counters(&self) -> Counters {
        self.inner.counters()
    }

    fn notice(&mut self) -> Option<Notice> {
        self.inner.notice()
    }

    fn check_unchanged(&self) -> Result<(), MoveError> {
        self.inner.check_unchanged()
    }
}

/// Each read of a run fails once. Whoever waits for it has an error with file
/// and offset, and the session goes on.
#[test]
fn a_read_that_fails_is_an_error_and_the_next_try_works() {
    let Some(world) = World::new("gpu-disk-faults") else { return };
    for (seed, misses) in [(0, Misses::Copied), (1, Misses::Host), (2, Misses::Auto)] {
        let ended = Arc::default();
        let clean = world.load(misses, seed, Bad::source(Badness::Fails(0), &ended)).unwrap();
        let at_start = ended.load(Ordering::Relaxed);
        let found = converse(&mut Session::new(&clean, options()).unwrap()).unwrap();
        assert!(found == world.expected, "{misses:?}");
        drop(clean);
        let all = ended.load(Ordering::Relaxed);
        assert!(at_start > 0 && all > at_start + 4, "{misses:?}: {at_start} of {all} reads");
        let mut failed = 0;
        for nth in (1..=all).step_by(1 + all as usize / 12) {
            let at = format!("{misses:?}, read {nth} of {all}");
            let ended = Arc::default();
            let source = Bad::source(Badness::Fails(nth), &ended);
            let model = match world.load(misses, seed, source) {
                Err(Error::Move(MoveError::Io { offset, .. })) if nth <= at_start => {
                    assert!(offset > 0, "{at}");
                    continue;
                }
                other => other.unwrap_or_else(|error| panic!("{at}: {error}")),
            };
            let mut session = Session::new(&model, options()).unwrap();
            let found = match converse(&mut session) {
                Ok(found) => found,
                Err(Error::Move(MoveError::Io { file, offset, .. })) => {
                    assert!(file == world.path && offset > 0, "{at}: {file:?} {offset}");
                    failed += 1;
                    session.reset();
                    converse(&mut session).unwrap_or_else(|error| panic!("{at}: {error}"))
                }
                Err(other) => panic!("{at}: {other}"),
            };
            assert!(found == world.expected, "{at}: other logits");
            drop((session, model));
            world.assert_clean(&at);
        }
        assert!(failed > 2, "{misses:?}: {failed} of {all} reads were noticed");
    }
}

/// A model file that is cut short under a session is an error, not a signal.
#[test]
fn a_file_that_changes_is_an_error_that_names_it() {
    let Some(world) = World::new("gpu-disk-changed") else { return };
    for (seed, misses) in [(0, Misses::Copied), (1, Misses::Host)] {
        let whole = std::fs::read(&world.path).unwrap();
        let model = world.load(misses, seed, Source::Disk(quick())).unwrap();
        let mut session = Session::new(&model, options()).unwrap();
        let file = std::fs::File::options().write(true).open(&world.path).unwrap();
        file.set_len(whole.len() as u64 / 2).unwrap();
        match converse(&mut session) {
            // An expert, or the row of a token.
            Err(error @ (Error::Move(MoveError::Changed { .. }) | Error::Invalid(_))) => {
                let text = error.to_string();
                assert!(text.contains("tiny.gguf") && text.contains("open"), "{text}");
            }
            Err(other) => panic!("{misses:?}: {other}"),
            Ok(_) => panic!("{misses:?}: nobody noticed"),
        }
        drop((session, model));
        world.assert_clean("changed");
        std::fs::write(&world.path, &whole).unwrap();
    }
}

/// Read-aheads that never end delay nobody, and are outstanding when the model
/// is dropped, as are copies.
#[test]
fn a_model_is_dropped_while_reads_and_copies_are_under_way() {
    let Some(world) = World::new("gpu-disk-drop") else { return };
    for (seed, misses) in [(0, Misses::Copied), (1, Misses::Auto), (2, Misses::Host)] {
        let ended = Arc::default();
        let source = Bad::source(Badness::NeverAhead, &ended);
        let model = world.load(misses, seed, source).unwrap();
        let mut session = Session::new(&model, options()).unwrap();
        let found = converse(&mut session).unwrap();
        assert!(found == world.expected, "{misses:?}: other logits");
        let reads = model.gpu().unwrap().host_frames().unwrap().stats();
        assert!(reads.misses > 0, "{reads:?}");
        drop((session, model));
        let left = world.standin.count("device_bytes");
        assert_eq!(left, 0, "{misses:?}: bytes of the device are still taken");
        world.assert_clean("dropped");
    }
}

/// Both ways to bring an expert wait for its read: it is in the price of
/// neither, or one would be left for what the other costs as well.
#[test]
fn a_slow_disk_makes_no_way_to_bring_an_expert_dear() {
    let Some(world) = World::new("gpu-disk-slow") else { return };
    let slow = Duration::from_millis(40);
    let source = Bad::source(Badness::Slow(slow), &Arc::default());
    let model = world.load(Misses::Auto, 1, source).unwrap();
    let mut session = Session::new(&model, options()).unwrap();
    let mut next = 5;
    // Until some layer has measured both ways; which it takes is its choice.
    let measured = || {
        let splits = model.gpu().unwrap().splits().unwrap();
        splits.iter().any(|layer| layer.cpu_samples > 1 && layer.copy_samples > 1)
    };
    for token in 0.. {
        if token >= 6 && measured() {
            break;
        }
        assert!(token < 64, "{:?}", model.gpu().unwrap().splits());
        next = argmax(session.feed_quietly(&[next]).unwrap());
    }
    let stats = model.gpu().unwrap().host_frames().unwrap().stats();
    assert!(stats.misses > 15, "{stats:?}");
    let splits = model.gpu().unwrap().splits().unwrap();
    let splits: Vec<_> = splits.iter().filter(|layer| layer.misses > 0).collect();
    for layer in splits {
        let most = slow.as_nanos() as f64 / 2.0;
        assert!(layer.cpu_ns < most && layer.copy_ns < most, "{layer:?}");
    }
}

/// The experts of one class of the tiny model, over frames of its layout.
fn host_frames(path: &std::path::Path, frames: usize) -> HostFrames {
    let opened = OpenedModel::open(path, &mut |_| {}).unwrap();
    let (files, weights) = (opened.files(), opened.weights());
    let layout = ModelLayout::new(files, weights, |_| TOP_K);
    let spec = |&frame_bytes: &usize| ClassSpec { frame_bytes, frames };
    let specs: Vec<ClassSpec> = layout.class_bytes.iter().map(spec).collect();
    let memory = Frames::new(&specs).unwrap();
    let names: Vec<_> = files.paths().iter().cloned().zip(files.identities()).collect();
    let (mover, _) = disk::probe(&names, &memory, &quick()).unwrap();
    HostFrames::new(layout, weights, memory, mover)
}

fn key(expert: u32) -> u64 {
    pregate_runtime::store::key_of(ExpertId::new(0, expert))
}

const SECOND_NS: u64 = Duration::from_secs(1).as_nanos() as u64;

/// Waits until an expert that was asked for is there.
fn read(frames: &HostFrames, expert: u32, asker: Asker) {
    assert!(frames.ask(key(expert), asker), "{expert}");
    frames.collect(10 * SECOND_NS);
}

#[test]
fn whoever_was_used_longest_ago_leaves_and_pins_and_wishes_are_kept() {
    let scratch = Scratch::new("host-frames");
    let path = scratch.write("tiny.gguf", &tiny::tiny());
    let frames = host_frames(&path, 3);
    let copy = Asker::Copy;
    for expert in 0..3 {
        read(&frames, expert, Asker::Host);
        assert!(frames.take(key(expert)).unwrap().is_some(), "{expert}");
    }
    // 1 is the oldest now.
    assert!(frames.take(key(0)).unwrap().is_some());
    read(&frames, 3, copy(Urgency::Demand));
    assert!(frames.take(key(1)).unwrap().is_none());
    let there = [0, 2, 3].map(|expert| frames.take(key(expert)).unwrap());
    assert!(there.iter().all(Option::is_some));
    // All are pinned: nobody gets a frame.
    assert!(!frames.ask(key(4), copy(Urgency::Demand)) && !frames.ask(key(4), Asker::Host));
    drop(there);
    // All are wanted: a copy takes none that a demand wants, the host does.
    for expert in 4..7 {
        read(&frames, expert, copy(if expert == 5 { Urgency::Prefetch } else { Urgency::Demand }));
        // One of three, for guesses.
        assert!(expert < 5 || !frames.ask(key(7), copy(Urgency::Prefetch)));
    }
    read(&frames, 7, copy(Urgency::Demand));
    assert!(frames.take(key(5)).unwrap().is_none(), "a forecast's");
    assert!(!frames.ask(key(8), copy(Urgency::Demand)));
    read(&frames, 8, Asker::Host);
    assert!(frames.take(key(4)).unwrap().is_none());
    assert!(frames.take(key(8)).unwrap().is_some());
    let stats = frames.stats();
    assert_eq!((stats.hits, stats.misses), (3, 9));
    assert_eq!(frames.copies(0), 1);
}

#[test]
fn what_was_given_up_may_be_asked_for_again() {
    let scratch = Scratch::new("host-frames-again");
    let path = scratch.write("tiny.gguf", &tiny::tiny());
    let frames = host_frames(&path, 2);
    for round in 0..50 {
        let expert = key(round % 16);
        assert!(frames.ask(expert, Asker::Copy(Urgency::Prefetch)));
        frames.give_up(expert);
        // It lands first.
        while !frames.ask(expert, Asker::Host) {
            frames.collect(SECOND_NS);
        }
        let mut pin = frames.take(expert).unwrap();
        while pin.is_none() {
            frames.collect(SECOND_NS);
            pin = frames.take(expert).unwrap();
        }
    }
}

/// The smallest host room that works does, with the processor's bits, and a
/// byte less is refused with what is missing.
#[test]
fn the_least_room_of_the_host_is_named_and_works() {
    let Some(world) = World::new("gpu-disk-share") else { return };
    let opened = OpenedModel::open(&world.path, &mut |_| {}).unwrap();
    let share = |host_bytes, vram_bytes| {
        let room = GpuRoom { vram_bytes, host_bytes, ring: Some(2) };
        let (files, weights) = (opened.files(), opened.weights());
        GpuShare::of(files, opened.description(), weights, (16, &options()), room)
    };
    let whole = share(u64::MAX, u64::MAX).unwrap();
    assert!(whole.is_whole() && whole.disk.is_none());
    let experts = whole.parts.experts_bytes;
    // Half of the experts' memory on the device, and all of them on the host.
    let vram = whole.parts.total() - experts / 2;
    assert!(share(experts, vram).unwrap().disk.is_none());
    // What the host has no room for fits the device.
    let fixed = share(experts * 3 / 4, vram).unwrap();
    assert!(fixed.disk.is_none() && fixed.fixed.iter().sum::<usize>() > 0);
    let Err(NoShare::Host(small)) = share(0, vram) else { panic!("no room is too small") };
    assert_eq!(small.room_bytes, 0);
    let Err(NoShare::Host(_)) = share(small.needed_bytes - 1, vram) else { panic!("a byte less") };
    for room in [small.needed_bytes, experts * 9 / 20] {
        let share = share(room, vram).unwrap();
        assert!(share.moves() && share.host_bytes <= room, "{share:?}");
        let disk = share.disk.as_ref().unwrap();
        assert!(disk.on_disk > 0 && disk.frames.iter().all(|&frames| frames > TOP_K), "{disk:?}");
        let streaming = Streaming { source: Source::Disk(quick()), ..Streaming::default() };
        let residency = Residency::Gpu {
            device: world.device(room),
            experts: share.experts(streaming, Misses::Auto),
        };
        let options_of_load = LoadOptions { backend: world.cpu.clone(), residency };
        let model = Model::load(&world.path, options_of_load, &mut |_| {}).unwrap();
        let (pinned, pageable) = model.gpu().unwrap().host_bytes();
        assert!(pinned <= room && pageable.is_none(), "{pinned} of {room}");
        let found = converse(&mut Session::new(&model, options()).unwrap()).unwrap();
        assert!(found == world.expected, "{share:?}");
        drop(model);
        world.assert_clean("share");
    }
}
