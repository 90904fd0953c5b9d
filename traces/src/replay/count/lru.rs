//! Hits of least recently used, counted as fast as lists of neighbours allow.

use pregate_predictor::Shape;

/// No neighbour.
const NONE: u16 = u16::MAX;

/// One LRU cache per layer, event-atomic: what a token needs is asked for
/// together, and none of it evicts another; within an event rank 0 counts as
/// the most recent. The same hits as [`pregate_predictor::policy::Lru`] behind
/// the planner's cache (`tests/replay_counts.rs`), without what else an engine
/// keeps.
pub struct Lru {
    layers: Vec<Layer>,
}

/// Residents from the most recent, `neighbours[end].1`, to the least,
/// `neighbours[end].0`, in a ring with one place more than experts.
struct Layer {
    slots: usize,
    len: usize,
    /// `[experts + 1]`: who is before and behind; `NONE` of one that is not
    /// resident.
    neighbours: Vec<(u16, u16)>,
}

impl Layer {
    fn new(experts: usize, slots: usize) -> Self {
        let end = u16::try_from(experts).expect("a layer has fewer than 65536 experts");
        let mut neighbours = vec![(NONE, NONE); experts];
        neighbours.push((end, end));
        Self { slots, len: 0, neighbours }
    }

    fn end(&self) -> usize {
        self.neighbours.len() - 1
    }

    fn unlink(&mut self, expert: u16) {
        let (before, behind) = self.neighbours[usize::from(expert)];
        self.neighbours[usize::from(before)].1 = behind;
        self.neighbours[usize::from(behind)].0 = before;
        self.neighbours[usize::from(expert)] = (NONE, NONE);
        self.len -= 1;
    }

    fn push_front(&mut self, expert: u16) {
        let end = self.end();
        let first = self.neighbours[end].1;
        self.neighbours[usize::from(expert)] = (end as u16, first);
        self.neighbours[usize::from(first)].0 = expert;
        self.neighbours[end].1 = expert;
        self.len += 1;
    }

    fn event(&mut self, experts: &[u16]) -> usize {
        let mut hits = 0;
        for &expert in experts {
            if self.neighbours[usize::from(expert)].0 != NONE {
                self.unlink(expert);
                hits += 1;
            }
        }
        let stay = &experts[..experts.len().min(self.slots)];
        while self.len + stay.len() > self.slots {
            self.unlink(self.neighbours[self.end()].0);
        }
        stay.iter().rev().for_each(|&expert| self.push_front(expert));
        hits
    }
}

impl Lru {
    /// `slots` is `[layers]`, 0 for dense ones.
    pub fn new(shape: &Shape, slots: &[usize]) -> Self {
        let experts = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.experts);
        let layers = slots.iter().enumerate();
        Self { layers: layers.map(|(index, &slots)| Layer::new(experts(index), slots)).collect() }
    }

    pub fn contains(&self, layer: usize, expert: u16) -> bool {
        self.layers[layer].neighbours[usize::from(expert)].0 != NONE
    }

    /// `layer` needs `experts`, distinct; answers how many were there.
    pub fn event(&mut self, layer: usize, experts: &[u16]) -> usize {
        self.layers[layer].event(experts)
    }
}
