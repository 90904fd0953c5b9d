//! Small programs that use the slot protocol in its dangerous corners, to be
//! run under a model checker: `loom_slots.rs` and `shuttle_slots.rs` each
//! bring a `sync` module. Beside each model stand the bugs that a check of it
//! must find; a checker that does not find them proves nothing.
//!
//! A slot's memory is two halves, filled by two chunks with the number of the
//! generation. A reader that sees anything else has read a stale or a torn
//! expert.

use crate::slot::{Bug, Claim, Generation, Guarded, Hold, Landing, Part, Slots, State, Status};
use crate::sync::{Arc, AtomicU64, Half, Ordering, spawn};
use std::{cell::Cell, cell::RefCell, collections::BTreeSet, panic::catch_unwind};

pub struct Model {
    pub name: &'static str,
    pub run: fn(),
    /// What has to happen in some interleaving, or the model is too tame.
    pub events: &'static [&'static str],
    /// What the check has to find when it is seeded.
    pub bugs: &'static [Bug],
}

thread_local! {
    // Both checkers run their threads on the one that asked for the check.
    static SEEDED: Cell<Option<Bug>> = const { Cell::new(None) };
    static SEEN: RefCell<BTreeSet<&'static str>> = const { RefCell::new(BTreeSet::new()) };
}

pub fn seeded(bug: Bug) -> bool {
    SEEDED.get() == Some(bug)
}

/// Notes that `event` has happened in this interleaving.
fn seen(event: &'static str) {
    SEEN.with_borrow_mut(|seen| seen.insert(event));
}

/// Explores `model` as it is: nothing may go wrong, and something must happen.
pub fn holds(model: &Model, explore: fn(fn())) {
    SEEN.with_borrow_mut(BTreeSet::clear);
    explore(model.run);
    for event in model.events {
        assert!(SEEN.with_borrow(|seen| seen.contains(event)), "{}: never {event}", model.name);
    }
}

/// Explores `model` with each of its bugs that `wanted` admits: each must be
/// found.
pub fn finds_bugs(model: &Model, wanted: fn(Bug) -> bool, explore: fn(fn())) {
    for bug in model.bugs.iter().copied().filter(|&bug| wanted(bug)) {
        SEEDED.set(Some(bug));
        let explored = catch_unwind(|| explore(model.run));
        SEEDED.set(None);
        assert!(explored.is_err(), "{}: {bug:?} was not found", model.name);
    }
}

/// Slots with memory of two halves each.
struct Memory {
    slots: Slots,
    halves: Vec<[Half; 2]>,
}

impl Guarded for Memory {
    fn slots(&self) -> &Slots {
        &self.slots
    }
}

impl Memory {
    /// `count` slots, free.
    fn new(count: usize) -> Arc<Self> {
        let halves = (0..count).map(|_| [Half::new(0), Half::new(0)]).collect();
        Arc::new(Self { slots: Slots::new(count), halves })
    }

    /// `count` slots, all filled once.
    fn filled(count: usize) -> Arc<Self> {
        let memory = Self::new(count);
        for index in 0..count {
            fill(&memory, index).expect("a free slot");
        }
        memory
    }

    fn status(&self, index: usize) -> Status {
        self.slots.status(index)
    }
}

/// The `n`-th generation of every slot, counted from one.
fn generation(n: usize) -> Generation {
    let scratch = Memory::new(1);
    let claim = || Claim::new(&scratch, 0).expect("an idle slot").generation();
    for _ in 1..n {
        claim();
    }
    claim()
}

/// Writes half `which` of a part's slot.
fn write(part: &Part<Memory>, which: usize) {
    part.owner().halves[part.index()][which].write(part.generation().get());
}

fn halves(claim: Claim<Memory>) -> [Part<Memory>; 2] {
    claim.split(2).try_into().ok().expect("as many parts as asked for")
}

/// Claims slot `index` and fills it on this thread; `None` if it is in use.
fn fill(memory: &Arc<Memory>, index: usize) -> Option<Landing> {
    let [first, second] = halves(Claim::new(memory, index)?);
    write(&first, 0);
    let early = first.finish(true);
    write(&second, 1);
    let landing = second.finish(true);
    Some(landing.or(early).expect("a claim lands"))
}

/// Pins and reads slot `index`; `false` if it does not hold `wanted`.
fn read(memory: &Arc<Memory>, index: usize, wanted: Generation) -> bool {
    let Some(hold) = Hold::new(memory, index, wanted) else { return false };
    for half in &hold.owner().halves[hold.index()] {
        assert_eq!(half.read(), wanted.get(), "a stale or torn expert");
    }
    true
}

/// A reader, a filler that fills twice, and an evictor.
fn fill_read_evict() {
    let memory = Memory::filled(1);
    let wanted = [generation(1), generation(2)];
    let shared = memory.clone();
    let reader = spawn(move || {
        for (wanted, event) in wanted.into_iter().zip(["read the first", "read the second"]) {
            if read(&shared, 0, wanted) {
                seen(event);
            }
        }
    });
    let shared = memory.clone();
    let evictor = spawn(move || {
        if shared.slots.release(0) {
            seen("evicted");
        }
    });
    for _ in 0..2 {
        if fill(&memory, 0).is_none() {
            seen("refused while pinned");
        }
    }
    reader.join();
    evictor.join();
    assert_eq!(memory.status(0).pins, 0);
}

/// Two readers of one slot, and a copy into it of which one half fails.
fn two_readers_and_a_failure() {
    let memory = Memory::filled(1);
    let (old, new) = (generation(1), generation(2));
    let readers = [0, 1].map(|_| {
        let shared = memory.clone();
        spawn(move || {
            if read(&shared, 0, old) {
                seen("read the old");
            }
            assert!(!read(&shared, 0, new), "a copy that failed was read");
        })
    });
    match Claim::new(&memory, 0) {
        None => seen("refused while pinned"),
        Some(claim) => {
            let [first, second] = halves(claim);
            first.finish(false);
            write(&second, 1);
            second.finish(true);
            seen("failed");
        }
    }
    for reader in readers {
        reader.join();
    }
    let Status { state, pins, .. } = memory.status(0);
    assert!(pins == 0 && matches!(state, State::Ready | State::Failed));
    fill(&memory, 0).expect("a slot that failed can be filled");
    assert_eq!(memory.status(0).state, State::Ready);
}

/// A ring of two slots and three copies, whose chunks complete on two threads
/// in opposite orders; whoever completes the first copy reads it and starts
/// the third. Another reader looks for both.
fn ring_of_two() {
    let memory = Memory::new(2);
    let landings = Arc::new(AtomicU64::new(0));
    let [a0, a1] = halves(Claim::new(&memory, 0).expect("a free slot"));
    let [b0, b1] = halves(Claim::new(&memory, 1).expect("a free slot"));
    let wanted = a0.generation();
    let worker = |parts: [(Part<Memory>, usize); 2]| {
        let (memory, landings) = (memory.clone(), landings.clone());
        move || {
            for (part, which) in parts {
                write(&part, which);
                let Some(landing) = part.finish(true) else { continue };
                assert!(read(&memory, landing.index, landing.generation), "landed, not ready");
                if landings.fetch_add(1, Ordering::AcqRel) == 0 {
                    seen(["the first slot first", "the second slot first"][landing.index]);
                    match fill(&memory, landing.index) {
                        None => seen("refused while pinned"),
                        Some(third) => assert!(read(&memory, third.index, third.generation)),
                    }
                }
            }
        }
    };
    let other = spawn(worker([(b0, 0), (a1, 1)]));
    let shared = memory.clone();
    let reader = spawn(move || {
        for index in [1, 0] {
            if read(&shared, index, wanted) {
                seen("read on arrival");
            }
        }
    });
    worker([(a0, 0), (b1, 1)])();
    other.join();
    reader.join();
    assert_eq!(landings.load(Ordering::Acquire), 2, "one landing per copy");
    for index in 0..2 {
        let Status { state, pins, .. } = memory.status(index);
        assert!(state == State::Ready && pins == 0);
    }
}

/// A copy that is cancelled while one of its chunks is still being written.
fn cancelled_while_filling() {
    let memory = Memory::new(1);
    let [writing, cancelled] = halves(Claim::new(&memory, 0).expect("a free slot"));
    let old = writing.generation();
    let writer = spawn(move || {
        write(&writing, 0);
        if writing.finish(true).is_some_and(|landing| !landing.ok) {
            seen("cancelled first");
        }
    });
    drop(cancelled);
    match fill(&memory, 0) {
        None => seen("refused while filling"),
        Some(landing) => {
            seen("filled again");
            assert!(read(&memory, 0, landing.generation));
        }
    }
    assert!(!read(&memory, 0, old), "read what was cancelled");
    writer.join();
    assert!(matches!(memory.status(0).state, State::Failed | State::Ready));
}

/// The end: a reader, a late reader and a ticket go away in any order while
/// every slot that is idle is taken out of service and its memory overwritten.
fn shutdown() {
    let memory = Memory::filled(2);
    let wanted = generation(1);
    let pin = Hold::new(&memory, 0, wanted).expect("a ready slot");
    let ticket = Claim::new(&memory, 1).expect("an idle slot");
    let late = memory.clone();
    let reader = spawn(move || {
        assert_eq!(pin.owner().halves[0][0].read(), wanted.get(), "overwritten while pinned");
        drop(pin);
        if read(&late, 0, wanted) {
            seen("late reader");
        }
    });
    let filler = spawn(move || {
        let [first, second] = &ticket.owner().halves[1];
        first.write(7);
        second.write(7);
        assert_eq!(first.read(), 7, "overwritten while being filled");
        drop(ticket);
    });
    for index in [1, 0] {
        match Claim::new(&memory, index) {
            None => seen("still in use"),
            Some(claim) => {
                claim.owner().halves[index].iter().for_each(|half| half.write(u64::MAX));
                seen("out of service");
            }
        }
    }
    reader.join();
    filler.join();
    for index in 0..2 {
        let Status { state, pins, .. } = memory.status(index);
        assert!(pins == 0 && state != State::Filling, "slot {index} is never idle again");
    }
}

pub const MODELS: [Model; 5] = [
    Model {
        name: "fill_read_evict",
        run: fill_read_evict,
        events: &["read the first", "read the second", "evicted", "refused while pinned"],
        bugs: &[
            Bug::ClaimIgnoresPins,
            Bug::ReleaseIgnoresPins,
            Bug::PinSkipsGeneration,
            Bug::PinWithoutRecheck,
            Bug::CountOffByOne,
            Bug::ClaimRelaxed,
            Bug::PublishRelaxed,
            Bug::PinRelaxed,
            Bug::UnpinRelaxed,
        ],
    },
    Model {
        name: "two_readers_and_a_failure",
        run: two_readers_and_a_failure,
        events: &["read the old", "failed", "refused while pinned"],
        bugs: &[
            Bug::ClaimIgnoresPins,
            Bug::FailedIsReady,
            Bug::PinWithoutRecheck,
            Bug::UnpinRelaxed,
        ],
    },
    Model {
        name: "ring_of_two",
        run: ring_of_two,
        events: &[
            "the first slot first",
            "the second slot first",
            "read on arrival",
            "refused while pinned",
        ],
        bugs: &[
            Bug::ClaimIgnoresPins,
            Bug::CountOffByOne,
            Bug::PublishEarly,
            Bug::CountRelaxed,
            Bug::PublishRelaxed,
        ],
    },
    Model {
        name: "cancelled_while_filling",
        run: cancelled_while_filling,
        events: &["cancelled first", "refused while filling", "filled again"],
        bugs: &[Bug::ClaimIgnoresFilling, Bug::DropIsSuccess, Bug::CountOffByOne],
    },
    Model {
        name: "shutdown",
        run: shutdown,
        events: &["late reader", "still in use", "out of service"],
        bugs: &[Bug::ClaimIgnoresPins, Bug::ClaimIgnoresFilling, Bug::UnpinRelaxed],
    },
];
