//! The tier below the host's store: experts for which the host has no block
//! are read from the model's files into frames of host memory, from where
//! copies to the device start and the host computes.
//!
//! A frame keeps its expert until another needs it: of those that nobody uses,
//! the one whose last use is longest ago leaves. Whoever wants an expert asks
//! for it ([`HostFrames::ask`]) until it can be taken ([`HostFrames::take`]);
//! a [`Pin`] keeps it in its frame, for copies until their event has
//! completed.
//!
//! Copies have at most half of a class's frames at a time, and so have
//! read-aheads ([`HostFrames::copies`]); the host may take a frame from an expert that
//! a copy still waits for, which is then read again. So the host always gets a
//! frame, though the ends of copies are heard by the thread that waits for it.

use crate::model::weights::{ModelWeights, Weight};
use crate::store::expert_of;
use crate::store::frames::{FrameId, Frames, Pin};
use crate::store::layout::ModelLayout;
use crate::store::mover::{Counters, Done, Fill, MoveError, Mover, Notice, Urgency};
use crate::store::slot::Generation;
use pregate_kernels::Matrix;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Frames of host memory, and what reads experts into them.
pub struct HostFrames {
    layout: ModelLayout,
    /// Gate, up and down, per layer of the model and expert.
    matrices: Vec<Vec<[Weight; 3]>>,
    frames: Arc<Frames>,
    inner: Mutex<Inner>,
}

/// What was done since loading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostFramesStats {
    /// Experts that were in a frame when somebody first wanted them, and that
    /// were not.
    pub hits: u64,
    pub misses: u64,
    /// From disk, and the time with at least one read under way.
    pub bytes_read: u64,
    pub busy_ns: u64,
    /// That the host waited for reads before it computed, in nanoseconds.
    pub waited_ns: u64,
}

struct Inner {
    mover: Box<dyn Mover>,
    /// Per class.
    free: Vec<Vec<FrameId>>,
    held: HashMap<u64, Held>,
    /// Per class: what is in its frames, by the last use.
    order: Vec<BTreeMap<u64, u64>>,
    /// Per class: frames of read-aheads, until somebody takes or demands them.
    ahead: Vec<usize>,
    /// Reads that failed, until somebody hears of it.
    failed: HashMap<u64, MoveError>,
    /// Counts uses.
    uses: u64,
    stats: HostFramesStats,
    /// What the mover had done before: the disk's probe reads as well.
    before: Counters,
}

struct Held {
    frame: FrameId,
    state: State,
    /// Its place in [`Inner::order`].
    used: u64,
    /// Somebody asked for it and has not taken it.
    wanted: Option<Urgency>,
    /// Counted in [`Inner::ahead`].
    is_ahead: bool,
}

#[derive(PartialEq, Eq)]
enum State {
    Reading,
    /// As `Reading`, and given up.
    Dropped,
    Ready(Generation),
}

/// Who asks for an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// The host, which will compute with it.
    Host,
    /// A copy to the device.
    Copy(Urgency),
}

impl HostFrames {
    /// All of `frames`, whose classes are the layout's, are free; `mover`
    /// reads into them.
    pub fn new(
        layout: ModelLayout,
        weights: &ModelWeights,
        frames: Arc<Frames>,
        mover: Box<dyn Mover>,
    ) -> Self {
        let mut matrices: Vec<Vec<[Weight; 3]>> = vec![Vec::new(); weights.layers.len()];
        for (index, moe) in weights.moe_layers() {
            let of = moe.experts.iter();
            matrices[index] = of.map(|e| [e.gate.weight, e.up.weight, e.down.weight]).collect();
        }
        let free = frames.classes().enumerate().map(|(class, spec)| {
            let frame = |index| FrameId { class: class as u16, index };
            (0..spec.frames as u32).rev().map(frame).collect()
        });
        let inner = Inner {
            before: mover.counters(),
            mover,
            free: free.collect(),
            held: HashMap::new(),
            order: vec![BTreeMap::new(); frames.classes().len()],
            ahead: vec![0; frames.classes().len()],
            failed: HashMap::new(),
            uses: 0,
            stats: HostFramesStats::default(),
        };
        Self { layout, matrices, frames, inner: Mutex::new(inner) }
    }

    pub fn layout(&self) -> &ModelLayout {
        &self.layout
    }

    /// Gate, up and down of an expert in a frame that holds it.
    pub fn matrices<'a>(&self, key: u64, frame: &'a [u8]) -> [Matrix<'a>; 3] {
        let id = expert_of(key);
        let layout = &self.layout.layers[id.layer()][id.expert()];
        let bytes = |tensor, start| layout.part(tensor, start, frame);
        self.matrices[id.layer()][id.expert()].map(|weight| weight.view_of(&bytes))
    }

    /// Class of the frames of an expert.
    pub fn class(&self, key: u64) -> usize {
        let layer = self.layout.shape.layer(expert_of(key).layer());
        layer.map_or(0, |layer| layer.class)
    }

    /// Frames of a class that copies may hold at a time, and that may be read
    /// ahead into.
    pub fn copies(&self, class: usize) -> usize {
        let frames = self.frames.classes().nth(class).map_or(0, |spec| spec.frames);
        (frames / 2).max(1)
    }

    /// The expert, if it is in a frame; what was read for it counts as wanted
    /// no longer.
    ///
    /// # Errors
    /// Why the last read of it failed, once.
    pub fn take(&self, key: u64) -> Result<Option<Pin>, MoveError> {
        let mut inner = self.lock();
        if let Some(error) = inner.failed.remove(&key) {
            return Err(error);
        }
        let class = self.class(key);
        let Some(held) = inner.held.get_mut(&key) else { return Ok(None) };
        let State::Ready(generation) = held.state else { return Ok(None) };
        let wanted = held.wanted.take();
        let (frame, used) = (held.frame, held.used);
        inner.stats.hits += u64::from(wanted.is_none());
        inner.is_ahead_no_more(class, key);
        inner.touch(class, key, used);
        Ok(self.frames.pin(frame, generation))
    }

    /// Has the expert read, unless it is there or on its way. `false`: there is
    /// no frame for it now; ask again.
    pub fn ask(&self, key: u64, asker: Asker) -> bool {
        let urgency = match asker {
            Asker::Host => Urgency::Demand,
            Asker::Copy(urgency) => urgency,
        };
        let (class, inner) = (self.class(key), &mut *self.lock());
        if let Some(held) = inner.held.get_mut(&key) {
            if held.state == State::Dropped {
                // It lands first.
                return false;
            }
            let before = held.wanted;
            held.wanted = Some(before.map_or(urgency, |before| before.min(urgency)));
            inner.stats.hits += u64::from(before.is_none());
            if urgency == Urgency::Demand {
                if before == Some(Urgency::Prefetch) && held.state == State::Reading {
                    inner.mover.promote(key);
                }
                inner.is_ahead_no_more(class, key);
            }
            return true;
        }
        let is_ahead = urgency == Urgency::Prefetch;
        if is_ahead && inner.ahead[class] >= self.copies(class) {
            return false;
        }
        let Some(frame) = inner.room(&self.frames, class, asker) else { return false };
        let Some(ticket) = self.frames.claim(frame) else {
            unreachable!("a free frame is neither pinned nor being filled")
        };
        let id = expert_of(key);
        let pieces = self.layout.layers[id.layer()][id.expert()].pieces();
        let used = inner.next_use();
        inner.order[class].insert(used, key);
        let held = Held { frame, state: State::Reading, used, wanted: Some(urgency), is_ahead };
        inner.ahead[class] += usize::from(is_ahead);
        inner.held.insert(key, held);
        inner.failed.remove(&key);
        inner.stats.misses += 1;
        inner.mover.submit(Fill { key, ticket, pieces, urgency });
        true
    }

    /// Nobody wants the expert any more.
    pub fn give_up(&self, key: u64) {
        let inner = &mut *self.lock();
        inner.failed.remove(&key);
        let Some(held) = inner.held.get_mut(&key) else { return };
        held.wanted = None;
        match held.state {
            State::Reading => {
                held.state = State::Dropped;
                inner.mover.discard(key);
            }
            State::Dropped => {}
            State::Ready(_) => inner.is_ahead_no_more(self.class(key), key),
        }
    }

    /// Books the reads that have ended; waits for the first of them for at
    /// most `wait_ns`.
    pub fn collect(&self, wait_ns: u64) {
        let inner = &mut *self.lock();
        let mut next = inner.mover.next(wait_ns);
        while let Some(done) = next {
            inner.land(self.class(done.key), done);
            next = inner.mover.next(0);
        }
    }

    /// The host waited so long for a read.
    pub fn waited(&self, ns: u64) {
        self.lock().stats.waited_ns += ns;
    }

    pub fn stats(&self) -> HostFramesStats {
        let inner = self.lock();
        let (before, now) = (&inner.before, inner.mover.counters());
        HostFramesStats {
            bytes_read: now.bytes - before.bytes,
            busy_ns: now.busy_ns - before.busy_ns,
            ..inner.stats
        }
    }

    /// How it reads, in words.
    pub fn describe(&self) -> String {
        self.lock().mover.describe()
    }

    /// As [`Mover::notice`].
    pub fn notice(&self) -> Option<Notice> {
        self.lock().mover.notice()
    }

    /// As [`Mover::check_unchanged`].
    pub fn check_unchanged(&self) -> Result<(), MoveError> {
        self.lock().mover.check_unchanged()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Whole between its methods.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn next_use(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }

    /// The expert was used now, and before at `used`.
    fn touch(&mut self, class: usize, key: u64, used: u64) {
        let now = self.next_use();
        self.order[class].remove(&used);
        self.order[class].insert(now, key);
        if let Some(held) = self.held.get_mut(&key) {
            held.used = now;
        }
    }

    fn is_ahead_no_more(&mut self, class: usize, key: u64) {
        let held = self.held.get_mut(&key);
        if held.is_some_and(|held| std::mem::take(&mut held.is_ahead)) {
            self.ahead[class] -= 1;
        }
    }

    /// A free frame, or one that its expert leaves: first those that nobody
    /// asked for, then such as were asked for by a forecast, then, for the
    /// host, any.
    fn room(&mut self, frames: &Frames, class: usize, asker: Asker) -> Option<FrameId> {
        if let Some(frame) = self.free[class].pop() {
            return Some(frame);
        }
        let allowed: &[Option<Urgency>] = match asker {
            Asker::Copy(Urgency::Prefetch) => &[None],
            Asker::Copy(Urgency::Demand) => &[None, Some(Urgency::Prefetch)],
            Asker::Host => &[None, Some(Urgency::Prefetch), Some(Urgency::Demand)],
        };
        let leaves = |allowed: &Option<Urgency>| {
            self.order[class].values().copied().find(|key| {
                self.held.get(key).is_some_and(|held| {
                    let is_ready = matches!(held.state, State::Ready(_));
                    is_ready && held.wanted == *allowed && frames.release(held.frame)
                })
            })
        };
        let key = allowed.iter().find_map(leaves)?;
        Some(self.forget(class, key)?.frame)
    }

    /// `key` has no frame any more.
    fn forget(&mut self, class: usize, key: u64) -> Option<Held> {
        self.is_ahead_no_more(class, key);
        let held = self.held.remove(&key)?;
        self.order[class].remove(&held.used);
        Some(held)
    }

    fn land(&mut self, class: usize, done: Done) {
        let Done { key, frame, generation, result, .. } = done;
        match result {
            Ok(()) => {
                let Some(held) = self.held.get_mut(&key) else { return };
                let before = std::mem::replace(&mut held.state, State::Ready(generation));
                if before == State::Dropped {
                    self.is_ahead_no_more(class, key);
                }
            }
            Err(error) => {
                self.free[class].push(frame);
                let held = self.forget(class, key);
                // Whoever gave it up does not ask why.
                if held.is_some_and(|held| held.wanted.is_some()) {
                    self.failed.insert(key, error);
                }
            }
        }
    }
}
