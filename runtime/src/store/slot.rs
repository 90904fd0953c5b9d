//! The protocol of slots: who may write the memory of an expert, who may read
//! it, and when. No memory is touched here; [`super::frames`] does that under
//! the guarantees of the three guards.
//!
//! ```text
//!            claim               last part, all well
//!   Free ──────────────> Filling ───────────────────> Ready ──> claim, release
//!   Failed ── claim ───────^  └─────────────────────> Failed    (both only
//!                               last part, one failed            without pins)
//! ```
//!
//! - [`Claim`], later cut into [`Part`]s: the right to write. There is at most
//!   one per slot, because only a slot without pins that is not already
//!   `Filling` can be claimed. It ends when the last part is finished; a part
//!   that is dropped counts as failed, so an unfinished copy keeps its
//!   destination through errors, cancellation and unwinding.
//! - [`Hold`]: the right to read. It exists only for a slot that is `Ready`
//!   with the generation that the reader asked for, and while it exists the
//!   slot cannot be claimed or released.
//!
//! State, pins and generation share one word, so each step is one
//! compare-and-exchange and no reader can slip between a check and a change.
//! `tests/loom_slots.rs` and `tests/shuttle_slots.rs` run this very file under
//! two model checkers; [`Bug`] lists what they must find.

use super::sync::{Arc, AtomicU64, Ordering, seeded};

/// What a slot is good for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Holds nothing.
    Free,
    /// Being written by the parts of one claim.
    Filling,
    /// Holds an expert that may be read.
    Ready,
    /// A copy ended badly; holds nothing.
    Failed,
}

/// Which filling of a slot: grows by one with every claim.
///
/// It has 46 bits and does not wrap: at one claim per microsecond they last
/// two years, at a disk's ten thousand experts per second two centuries, and
/// a slot that reached the end would refuse to be claimed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Generation(u64);

impl Generation {
    pub(super) const LAST: Generation = Generation((1 << (64 - GENERATION_SHIFT)) - 1);

    pub fn get(self) -> u64 {
        self.0
    }
}

const PINS_SHIFT: u32 = 2;
const GENERATION_SHIFT: u32 = 18;
const ONE_PIN: u64 = 1 << PINS_SHIFT;
const MOST_PINS: u32 = (1 << (GENERATION_SHIFT - PINS_SHIFT)) - 1;

/// A slot's word, unpacked: `generation << 18 | pins << 2 | state`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status {
    pub generation: Generation,
    /// How many [`Hold`]s there are; zero unless `Ready`.
    pub pins: u32,
    pub state: State,
}

impl Status {
    fn of(word: u64) -> Self {
        let state = match word & 3 {
            0 => State::Free,
            1 => State::Filling,
            2 => State::Ready,
            _ => State::Failed,
        };
        let pins = (word >> PINS_SHIFT) as u32 & MOST_PINS;
        Self { generation: Generation(word >> GENERATION_SHIFT), pins, state }
    }

    fn word(self) -> u64 {
        self.generation.0 << GENERATION_SHIFT
            | u64::from(self.pins) << PINS_SHIFT
            | self.state as u64
    }
}

/// One failed part in [`Slot::parts`]; the unfinished ones are counted below.
const ONE_FAILED: u64 = 1 << 32;

/// One slot: its word, and the parts of the claim that fills it.
struct Slot {
    word: AtomicU64,
    /// `failed << 32 | unfinished`; means something only while `Filling`.
    parts: AtomicU64,
}

impl Slot {
    fn new(generation: Generation) -> Self {
        let free = Status { generation, pins: 0, state: State::Free };
        Self { word: AtomicU64::new(free.word()), parts: AtomicU64::new(0) }
    }

    /// Takes the word from what it is to `next` of that, as long as `next`
    /// allows it; answers what it became.
    fn change(&self, order: Ordering, next: impl Fn(Status) -> Option<Status>) -> Option<Status> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let changed = next(Status::of(word))?;
            match self.word.compare_exchange(word, changed.word(), order, Ordering::Relaxed) {
                Ok(_) => return Some(changed),
                Err(now) => word = now,
            }
        }
    }

    /// The writer starts: after every reader of the former content (their
    /// unpinning releases, this acquires).
    fn claim(&self) -> Option<Generation> {
        let order = if seeded(Bug::ClaimRelaxed) { Ordering::Relaxed } else { Ordering::Acquire };
        let claimed = self.change(order, |status| {
            let pinned = status.pins != 0 && !seeded(Bug::ClaimIgnoresPins);
            let filling = status.state == State::Filling && !seeded(Bug::ClaimIgnoresFilling);
            if pinned || filling || status.generation == Generation::LAST {
                return None;
            }
            let generation = Generation(status.generation.0 + 1);
            Some(Status { generation, pins: 0, state: State::Filling })
        })?;
        self.parts.store(1, Ordering::Relaxed);
        Some(claimed.generation)
    }

    /// `count` parts instead of one; their owner hands them out afterwards.
    fn split(&self, count: u32) {
        let count = u64::from(count) - u64::from(seeded(Bug::CountOffByOne));
        self.parts.store(count, Ordering::Relaxed);
    }

    /// One part is over; the last one publishes and answers whether all went
    /// well.
    fn finish(&self, generation: Generation, ok: bool) -> Option<bool> {
        // The last part acquires what the others released: their bytes.
        let order = if seeded(Bug::CountRelaxed) { Ordering::Relaxed } else { Ordering::AcqRel };
        // Count and failure in one step, so that the last sees every failure.
        let before = if ok {
            self.parts.fetch_sub(1, order)
        } else {
            self.parts.fetch_add(ONE_FAILED - 1, order)
        };
        let is_last = before % ONE_FAILED == 1 || seeded(Bug::PublishEarly);
        if !is_last {
            return None;
        }
        let all_ok = ok && before < ONE_FAILED || seeded(Bug::FailedIsReady);
        let state = if all_ok { State::Ready } else { State::Failed };
        // A plain store: while `Filling`, nobody else changes the word.
        let order = if seeded(Bug::PublishRelaxed) { Ordering::Relaxed } else { Ordering::Release };
        self.word.store(Status { generation, pins: 0, state }.word(), order);
        Some(all_ok)
    }

    /// A reader starts: after the publication of `generation` (that releases,
    /// this acquires; other readers' steps in between are read-modify-writes
    /// and keep the chain).
    fn pin(&self, generation: Generation) -> bool {
        let allowed = |status: Status| {
            let same = status.generation == generation || seeded(Bug::PinSkipsGeneration);
            status.state == State::Ready && same && status.pins < MOST_PINS
        };
        if seeded(Bug::PinWithoutRecheck) {
            let seen = Status::of(self.word.load(Ordering::Acquire));
            return allowed(seen) && self.word.fetch_add(ONE_PIN, Ordering::Acquire) > 0;
        }
        let one_more = |status: Status| Status { pins: status.pins + 1, ..status };
        let order = if seeded(Bug::PinRelaxed) { Ordering::Relaxed } else { Ordering::Acquire };
        self.change(order, |status| allowed(status).then(|| one_more(status))).is_some()
    }

    fn unpin(&self) {
        let order = if seeded(Bug::UnpinRelaxed) { Ordering::Relaxed } else { Ordering::Release };
        self.word.fetch_sub(ONE_PIN, order);
    }

    fn release(&self) -> bool {
        self.change(Ordering::Relaxed, |status| {
            let idle = matches!(status.state, State::Ready | State::Failed);
            let pinned = status.pins != 0 && !seeded(Bug::ReleaseIgnoresPins);
            (idle && !pinned).then_some(Status { pins: 0, state: State::Free, ..status })
        })
        .is_some()
    }
}

/// Slots, all free at first.
pub struct Slots(Box<[Slot]>);

impl Slots {
    pub fn new(count: usize) -> Self {
        Self::from_generation(count, Generation(0))
    }

    /// As if the slots had been claimed often before.
    pub(super) fn from_generation(count: usize, generation: Generation) -> Self {
        Self((0..count).map(|_| Slot::new(generation)).collect())
    }

    /// What slot `index` is at this moment; for decisions only under the
    /// lock that orders claims, otherwise for statistics and assertions.
    pub fn status(&self, index: usize) -> Status {
        Status::of(self.0[index].word.load(Ordering::Acquire))
    }

    /// `Ready` or `Failed` without pins becomes `Free`; `false` for any other
    /// state, which stays as it is.
    pub fn release(&self, index: usize) -> bool {
        self.0[index].release()
    }
}

/// Memory that is guarded by slots. Guards own an [`Arc`] of it, so it outlives
/// every copy and every reader.
pub trait Guarded {
    fn slots(&self) -> &Slots;
}

/// What the last part of a claim reports, once per claim.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Landing {
    pub index: usize,
    pub generation: Generation,
    /// Every part succeeded and the slot is `Ready`; otherwise it is `Failed`.
    pub ok: bool,
}

/// The right to write slot `index`, before it is cut into parts. Dropped, it
/// leaves the slot `Failed`.
pub struct Claim<G: Guarded> {
    whole: Part<G>,
}

impl<G: Guarded> Claim<G> {
    /// `None` if the slot is pinned or being filled.
    pub fn new(owner: &Arc<G>, index: usize) -> Option<Self> {
        let generation = owner.slots().0[index].claim()?;
        Some(Self { whole: Part { owner: owner.clone(), index, generation, is_open: true } })
    }

    pub fn owner(&self) -> &Arc<G> {
        &self.whole.owner
    }

    pub fn index(&self) -> usize {
        self.whole.index
    }

    pub fn generation(&self) -> Generation {
        self.whole.generation
    }

    /// `count` parts, at least one, which may finish in any order and on any
    /// thread.
    pub fn split(self, count: u32) -> Vec<Part<G>> {
        assert!(count > 0, "a slot is filled by at least one part");
        self.whole.slot().split(count);
        let another = |whole: &Part<G>| Part { owner: whole.owner.clone(), ..*whole };
        let mut parts: Vec<_> = (1..count).map(|_| another(&self.whole)).collect();
        parts.push(self.whole);
        parts
    }
}

/// The right to write a part of a slot. Dropped without [`Part::finish`], it
/// has failed.
pub struct Part<G: Guarded> {
    owner: Arc<G>,
    index: usize,
    generation: Generation,
    is_open: bool,
}

impl<G: Guarded> Part<G> {
    pub fn owner(&self) -> &Arc<G> {
        &self.owner
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Nothing writes this part any more. The last part of a claim gets the
    /// landing of all.
    pub fn finish(mut self, ok: bool) -> Option<Landing> {
        self.is_open = false;
        let ok = self.slot().finish(self.generation, ok)?;
        Some(Landing { index: self.index, generation: self.generation, ok })
    }

    fn slot(&self) -> &Slot {
        &self.owner.slots().0[self.index]
    }
}

impl<G: Guarded> Drop for Part<G> {
    fn drop(&mut self) {
        if self.is_open {
            self.slot().finish(self.generation, seeded(Bug::DropIsSuccess));
        }
    }
}

/// The right to read slot `index`: it is `Ready` and stays as it is.
pub struct Hold<G: Guarded> {
    owner: Arc<G>,
    index: usize,
}

impl<G: Guarded> Hold<G> {
    /// `None` unless the slot is `Ready` with this generation.
    pub fn new(owner: &Arc<G>, index: usize, generation: Generation) -> Option<Self> {
        let is_pinned = owner.slots().0[index].pin(generation);
        is_pinned.then(|| Self { owner: owner.clone(), index })
    }

    pub fn owner(&self) -> &Arc<G> {
        &self.owner
    }

    pub fn index(&self) -> usize {
        self.index
    }
}

impl<G: Guarded> Drop for Hold<G> {
    fn drop(&mut self) {
        self.owner.slots().0[self.index].unpin();
    }
}

/// Bugs that the model checks seed, each to prove that they would find it.
/// Outside of them `seeded` is `false` for all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    // A check that is left out.
    ClaimIgnoresPins,
    ClaimIgnoresFilling,
    ReleaseIgnoresPins,
    PinSkipsGeneration,
    PinWithoutRecheck,
    // A wrong count or result.
    CountOffByOne,
    PublishEarly,
    FailedIsReady,
    DropIsSuccess,
    // A memory order that is too weak.
    ClaimRelaxed,
    CountRelaxed,
    PublishRelaxed,
    PinRelaxed,
    UnpinRelaxed,
}
