//! The simulated machine: one clock for everything, the disk, and checks of
//! every expert at the moment of its use. One thread, no real time; the same
//! seed gives the same run.

mod mover;

pub use mover::Watch;

use super::disk::{Copies, Disk, Link};
use super::faults::Plan;
use super::random::Random;
use mover::SimMover;
use pregate_runtime::Cancel;
use pregate_runtime::files::ModelFiles;
use pregate_runtime::store::Clock;
use pregate_runtime::store::frames::{FrameId, Frames};
use pregate_runtime::store::mover::{Done, Mover, Piece, Urgency};
use pregate_runtime::store::slot::{Generation, State};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a machine is made from.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub seed: u64,
    pub link: Link,
    pub copies: Copies,
    pub plan: Plan,
    /// The most that passes between two looks at the clock.
    pub step_ns: u64,
    pub compute: Compute,
}

/// What computing takes beside that.
#[derive(Clone, Copy, Debug, Default)]
pub struct Compute {
    /// Of an expert, whatever its tokens.
    pub expert_ns: u64,
    /// Of a layer's attention.
    pub attention_ns: u64,
}

/// A lie about what landed, for the checks that must see it (F26).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// The generation of an earlier filling of the frame.
    StaleGeneration,
    /// The frame of another fill.
    WrongFrame,
}

/// What was last put into a frame.
#[derive(Clone)]
struct Filling {
    generation: Generation,
    key: u64,
    pieces: Arc<[Piece]>,
}

pub struct Inside {
    pub disk: Disk,
    now: u64,
    random: Random,
    step_ns: u64,
    pub compute: Compute,
    /// Looks at the clock and at the mover.
    pub calls: u64,
    cancel: Option<(u64, Cancel)>,
    /// The virtual time at which the pass that runs must be over.
    pub limit_ns: u64,
    idle_waits: u32,
    log: DefaultHasher,
    frames: Option<Arc<Frames>>,
    /// Address of the first frame, bytes of a frame, frames; per class.
    classes: Vec<(usize, usize, usize)>,
    fillings: BTreeMap<FrameId, Filling>,
    layer: usize,
    /// Of the layer that runs: per token of the chunk.
    routes: Vec<Vec<u32>>,
    computed: BTreeSet<u32>,
    /// Of the layer that runs: demands that were submitted, and reads ahead
    /// for other layers that were discarded.
    demands: u64,
    given_up: u64,
    /// Experts that were checked at their use.
    pub uses: u64,
    pub served: u64,
    /// Experts that the observer was told of, by [`Origin`].
    pub origins: [u64; 4],
    /// From now on, one in so many landings is lied about.
    pub lie: Option<(Lie, u64)>,
    pub lies: u64,
    kept: Option<Done>,
    old: BTreeMap<FrameId, Generation>,
}

/// A handle; clones share the machine.
#[derive(Clone)]
pub struct Machine(Arc<Mutex<Inside>>);

impl Machine {
    pub fn new(settings: Settings, files: Vec<(PathBuf, Arc<[u8]>)>) -> Self {
        let Settings { seed, link, copies, plan, step_ns, compute } = settings;
        Self(Arc::new(Mutex::new(Inside {
            disk: Disk::new(files, link, copies, plan, seed ^ 0xd15c),
            now: 0,
            random: Random::new(seed),
            step_ns,
            compute,
            calls: 0,
            cancel: None,
            limit_ns: u64::MAX,
            idle_waits: 0,
            log: DefaultHasher::new(),
            frames: None,
            classes: Vec::new(),
            fillings: BTreeMap::new(),
            layer: usize::MAX,
            routes: Vec::new(),
            computed: BTreeSet::new(),
            demands: 0,
            given_up: 0,
            uses: 0,
            served: 0,
            origins: [0; 4],
            lie: None,
            lies: 0,
            kept: None,
            old: BTreeMap::new(),
        })))
    }

    /// Virtual time, in ns.
    pub fn now(&self) -> u64 {
        self.lock().now
    }

    pub fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What [`pregate_runtime::model::MakeMover`] asks for.
    pub fn connect(&self, files: &ModelFiles, frames: &Arc<Frames>) -> (Box<dyn Mover>, Clock) {
        let mut inside = self.lock();
        assert_eq!(files.paths().len(), inside.disk.files.len());
        let regions = frames.regions();
        let first = |class: usize| frames.region_of(FrameId { class: class as u16, index: 0 });
        inside.classes = frames
            .classes()
            .enumerate()
            .map(|(class, spec)| {
                let start = regions[first(class)].start.as_ptr().addr();
                (start, spec.frame_bytes, spec.frames)
            })
            .collect();
        inside.frames = Some(frames.clone());
        drop(inside);
        let clock = self.clone();
        (Box::new(SimMover(self.clone())), Arc::new(move || clock.lock().tick()))
    }

    /// Cancels at the `calls`-th look at clock or mover from now.
    pub fn cancel_after(&self, calls: u64, cancel: &Cancel) {
        let mut inside = self.lock();
        inside.cancel = Some((inside.calls + calls, cancel.clone()));
    }

    /// A pass begins, which takes at most `limit_ns`; what was left of an
    /// earlier one is forgotten.
    pub fn begin(&self, limit_ns: u64) {
        let mut inside = self.lock();
        inside.limit_ns = inside.now.saturating_add(limit_ns);
        inside.forget_layer(usize::MAX);
    }

    /// No pass runs any more.
    pub fn end(&self) {
        let mut inside = self.lock();
        inside.limit_ns = u64::MAX;
        inside.cancel = None;
    }

    /// Everything that could be observed so far.
    pub fn hash(&self) -> u64 {
        let inside = self.lock();
        let mut log = inside.log.clone();
        (inside.now, inside.calls, inside.uses, inside.disk.points).hash(&mut log);
        format!("{:?} {:?}", inside.disk.counters, inside.disk.hit).hash(&mut log);
        log.finish()
    }

    pub fn note(&self, what: impl Hash) {
        what.hash(&mut self.lock().log);
    }

    /// I3, I5, I11, I12: what must hold whenever no pass runs. `residents`
    /// are the keys that the planner believes in.
    pub fn check_rest(&self, residents: &BTreeSet<u64>, reads_ahead: bool) {
        let inside = self.lock();
        let frames = inside.frames.as_ref().expect("connected");
        let flights = inside.disk.flights.iter().chain(&inside.disk.ended);
        let mut filling = BTreeSet::new();
        for flight in flights {
            let wanted = flight.urgency == Urgency::Demand && !flight.discarded;
            assert!(!wanted, "I12: nobody waits for {:x}, which is on its way", flight.key);
            assert!(filling.insert(flight.frame), "I4: two fills into {:?}", flight.frame);
        }
        let mut ready: BTreeMap<u64, FrameId> = BTreeMap::new();
        for (class, &(_, _, count)) in inside.classes.iter().enumerate() {
            for index in 0..count as u32 {
                let frame = FrameId { class: class as u16, index };
                let status = frames.state(frame);
                assert_eq!(status.pins, 0, "I12: {frame:?} is pinned, and nothing runs");
                if status.state == State::Ready && !filling.contains(&frame) {
                    let held = &inside.fillings[&frame];
                    assert_eq!(held.generation, status.generation, "I5: {frame:?}");
                    let before = ready.insert(held.key, frame);
                    assert!(before.is_none(), "I8: {:x} is in two frames", held.key);
                }
                if status.state == State::Filling {
                    assert!(filling.contains(&frame), "I4: nobody fills {frame:?}");
                }
            }
        }
        let lost: Vec<_> = residents.iter().filter(|key| !ready.contains_key(key)).collect();
        assert!(lost.is_empty(), "I5: resident without a frame: {lost:x?}");
        if !reads_ahead {
            assert_eq!(ready.len(), residents.len(), "I11: frames that nobody remembers");
        }
    }
}

impl Inside {
    /// A look at the clock: computing since the last one took some time.
    fn tick(&mut self) -> u64 {
        self.calls += 1;
        self.now += self.random.below(self.step_ns + 1);
        if let Some((at, cancel)) = &self.cancel
            && self.calls >= *at
        {
            cancel.cancel();
            self.cancel = None;
        }
        self.disk.run_until(self.now);
        self.check_time();
        self.now
    }

    fn forget_layer(&mut self, next: usize) {
        self.layer = next;
        self.routes.clear();
        self.computed.clear();
        (self.demands, self.given_up) = (0, 0);
    }

    fn check_time(&self) {
        assert!(self.now <= self.limit_ns, "I9: the pass is not over at {} ns", self.now);
    }

    fn frame_at(&self, address: usize) -> Option<FrameId> {
        self.classes.iter().enumerate().find_map(|(class, &(start, bytes, frames))| {
            let index = address.checked_sub(start)? / bytes;
            (index < frames).then_some(FrameId { class: class as u16, index: index as u32 })
        })
    }

    /// The expert whose answers begin at `row`: rows are by expert, rising.
    fn expert_of_row(&self, row: usize) -> Option<u32> {
        let mut all: Vec<u32> = self.routes.iter().flatten().copied().collect();
        all.sort_unstable();
        all.get(row).copied()
    }

    /// An expert is about to be computed for `tokens` of the chunk, with
    /// weights at `addresses`; its answers begin at `row`.
    pub fn check_use(&mut self, addresses: &[usize], tokens: &[u32], row: usize) {
        let frames = self.frames.clone().expect("connected");
        let frame = self.frame_at(addresses[0]).expect("I5: weights outside of all frames");
        for &address in addresses {
            assert_eq!(self.frame_at(address), Some(frame), "I5: weights of two frames");
        }
        let status = frames.state(frame);
        assert_eq!(status.state, State::Ready, "I5, I6: {frame:?} is computed");
        assert!(status.pins > 0, "I3: {frame:?} is computed without a pin");
        let filling = self.fillings.get(&frame).expect("I5: a frame that nobody filled").clone();
        assert_eq!(filling.generation, status.generation, "I5: {frame:?} is of another time");
        let (layer, expert) = ((filling.key >> 32) as usize, filling.key as u32);
        assert_eq!(layer, self.layer, "I5: {frame:?} belongs to another layer");
        for &token in tokens {
            let chosen = &self.routes[token as usize];
            assert!(chosen.contains(&expert), "I5: token {token} did not choose {expert}");
        }
        let right = self.expert_of_row(row);
        assert_eq!(Some(expert), right, "I5: {frame:?} holds another expert of layer {layer}");
        assert!(self.computed.insert(expert), "{expert} of layer {layer} is computed twice");
        let pin = frames.pin(frame, filling.generation).expect("Ready");
        for piece in filling.pieces.iter() {
            let found = &pin[piece.at..piece.at + piece.needed];
            let start = piece.offset as usize;
            let want = &self.disk.files[piece.file].1[start..start + piece.needed];
            assert!(found == want, "I6: {frame:?} does not hold expert {expert} of layer {layer}");
        }
        self.uses += 1;
    }

    /// Before and after a computation time passes, and the disk works; during
    /// it at least `ns`.
    pub fn work(&mut self, ns: u64) {
        self.now += ns;
        self.tick();
    }

    fn tell_lie(&mut self, mut done: Done) -> Option<Done> {
        let Some((lie, one_in)) = self.lie else { return Some(done) };
        if done.result.is_err() {
            return Some(done);
        }
        match lie {
            Lie::StaleGeneration => {
                if let Some(&old) = self.old.get(&done.frame)
                    && self.random.one_in(one_in)
                {
                    done.generation = old;
                    self.lies += 1;
                }
                Some(done)
            }
            Lie::WrongFrame => {
                // It takes two: the next one that ends.
                let mut other = loop {
                    if let Some(other) = self.disk.hand_back() {
                        break other;
                    }
                    let Some(end) = self.disk.next_end() else { return Some(done) };
                    self.now = self.now.max(end);
                    self.disk.run_until(self.now);
                };
                let alike = other.result.is_ok() && other.frame.class == done.frame.class;
                if alike && self.random.one_in(one_in) {
                    std::mem::swap(&mut done.frame, &mut other.frame);
                    std::mem::swap(&mut done.generation, &mut other.generation);
                    self.lies += 1;
                }
                self.kept = Some(other);
                Some(done)
            }
        }
    }
}
