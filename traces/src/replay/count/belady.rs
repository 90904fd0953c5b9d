//! Hits of the best possible cache (Belady 1966), event by event.

use pregate_predictor::{Scope, Shape};
use std::collections::BinaryHeap;

/// An expert that nobody will ask for again.
pub const NEVER: u64 = u64::MAX;

/// Who leaves for a miss: the resident whose next use is farthest.
pub struct Belady {
    /// May what was asked for leave at once? Then this is the most that any
    /// cache can hit that reads an expert when it is asked for. Without, every
    /// miss takes a slot, as the other policies do (the golden counts' rule).
    may_bypass: bool,
    /// Of each layer.
    pool: Vec<usize>,
    pools: Vec<Pool>,
    /// `[layers][experts]`
    experts: Vec<Vec<State>>,
    events: u64,
    /// Scratch: of the event that runs.
    aside: Vec<Entry>,
}

/// Next use, layer, expert: the farthest first.
type Entry = (u64, u16, u16);

#[derive(Clone, Copy, Default)]
struct State {
    is_resident: bool,
    next: u64,
    /// The last event that asked for it.
    event: u64,
}

#[derive(Default)]
struct Pool {
    slots: usize,
    len: usize,
    /// Has an entry for every resident, and old ones, whose time has come or
    /// whose expert has left.
    heap: BinaryHeap<Entry>,
}

impl Belady {
    /// `slots` is `[layers]`, 0 for dense ones. With [`Scope::Pool`] layers of
    /// one class share them.
    pub fn new(shape: &Shape, slots: &[usize], scope: Scope, may_bypass: bool) -> Self {
        let class = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.class);
        let pool: Vec<usize> = match scope {
            Scope::Layer => (0..slots.len()).collect(),
            Scope::Pool => (0..slots.len()).map(class).collect(),
        };
        let count = pool.iter().max().map_or(0, |most| most + 1);
        let mut pools: Vec<Pool> = std::iter::repeat_with(Pool::default).take(count).collect();
        pool.iter().zip(slots).for_each(|(&pool, slots)| pools[pool].slots += slots);
        let experts = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.experts);
        let states = |layer: usize| vec![State::default(); experts(layer)];
        let experts = (0..slots.len()).map(states).collect();
        Self { may_bypass, pool, pools, experts, events: 0, aside: Vec::new() }
    }

    /// `layer` needs `experts`, distinct, each of which is needed again at
    /// `next`: any numbers that grow with time, and [`NEVER`]. Answers how
    /// many were there.
    pub fn event(&mut self, layer: usize, experts: &[u16], next: &[u64]) -> usize {
        self.events += 1;
        let (pool, states) = (&mut self.pools[self.pool[layer]], &mut self.experts[layer]);
        // A chunk may need more than there is room for.
        let may_bypass = self.may_bypass || experts.len() > pool.slots;
        let mut hits = 0;
        for (&expert, &next) in experts.iter().zip(next) {
            let state = &mut states[usize::from(expert)];
            let was_resident = std::mem::replace(&mut state.is_resident, true);
            (state.next, state.event) = (next, self.events);
            hits += usize::from(was_resident);
            pool.len += usize::from(!was_resident);
            pool.heap.push((next, layer as u16, expert));
        }
        while pool.len > pool.slots {
            let Some(entry) = pool.heap.pop() else { break };
            let state = &mut self.experts[usize::from(entry.1)][usize::from(entry.2)];
            if !state.is_resident || state.next != entry.0 {
                continue;
            }
            if !may_bypass && state.event == self.events {
                self.aside.push(entry);
                continue;
            }
            state.is_resident = false;
            pool.len -= 1;
        }
        pool.heap.extend(self.aside.drain(..));
        if pool.heap.len() > 4 * pool.slots + 64 {
            let experts = &self.experts;
            let is_current = |&(next, layer, expert): &Entry| {
                let state = &experts[usize::from(layer)][usize::from(expert)];
                state.is_resident && state.next == next
            };
            pool.heap.retain(is_current);
        }
        hits
    }
}
