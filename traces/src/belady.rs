//! How many hits the best possible cache would have had.

use crate::replay::count::{Belady, NEVER};
use pregate_predictor::{CapacityError, Observer, Scope, Shape};

/// What routers asked for, one token at a time, in the order in which the
/// layers ran. Two bytes an expert and eight a token and layer.
#[derive(Clone, Debug, Default)]
pub struct AccessLog {
    /// Layer, and where its experts end in `experts`.
    events: Vec<(u32, u32)>,
    experts: Vec<u16>,
    /// Events that only warm the cache.
    warm_up: usize,
}

/// Experts asked for, and those of them that were in a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    pub requests: u64,
    pub hits: u64,
}

impl Hits {
    /// `None` before the first request.
    pub fn ratio(&self) -> Option<f64> {
        (self.requests > 0).then(|| self.hits as f64 / self.requests as f64)
    }
}

impl AccessLog {
    /// What was logged so far warms the cache and is not counted.
    pub fn end_warm_up(&mut self) {
        self.warm_up = self.events.len();
    }

    /// The hits of [`Belady`] on these accesses with `slots` per layer, 0 for
    /// dense ones. Layers of one class share their slots, and an expert that
    /// is used later than all residents does not stay: the most that any
    /// policy could reach which reads an expert when it is asked for, and not
    /// ahead.
    ///
    /// # Errors
    /// `slots` that no cache can work with.
    ///
    /// # Panics
    /// If a layer or expert of the log is not in `shape`.
    pub fn belady(&self, shape: &Shape, slots: &[usize]) -> Result<Hits, CapacityError> {
        CapacityError::check(shape, slots)?;
        let mut belady = Belady::new(shape, slots, Scope::Pool, true);
        let (next, mut total) = (self.next_uses(shape), Hits::default());
        let mut start = 0;
        for (index, &(layer, end)) in self.events.iter().enumerate() {
            let range = start..end as usize;
            start = range.end;
            let (experts, next) = (&self.experts[range.clone()], &next[range]);
            let hits = belady.event(layer as usize, experts, next);
            if index >= self.warm_up {
                total.requests += experts.len() as u64;
                total.hits += hits as u64;
            }
        }
        Ok(total)
    }

    /// `[experts]`: the event that asks for each next.
    fn next_uses(&self, shape: &Shape) -> Vec<u64> {
        let experts = |layer: usize| shape.layer(layer).map_or(0, |layer| layer.experts);
        let never = |layer| vec![NEVER; experts(layer)];
        let mut after: Vec<Vec<u64>> = (0..shape.layers.len()).map(never).collect();
        let mut next = vec![NEVER; self.experts.len()];
        for (index, &(layer, end)) in self.events.iter().enumerate().rev() {
            let start = index.checked_sub(1).map_or(0, |before| self.events[before].1);
            let range = start as usize..end as usize;
            for (next, &expert) in next[range.clone()].iter_mut().zip(&self.experts[range]) {
                let after = &mut after[layer as usize][usize::from(expert)];
                *next = std::mem::replace(after, index as u64);
            }
        }
        next
    }
}

impl Observer for AccessLog {
    fn routed(&mut self, layer: usize, _position: usize, experts: &[u32], _weights: &[f32]) {
        let id = |&expert| u16::try_from(expert).expect("a layer has fewer than 65536 experts");
        self.experts.extend(experts.iter().map(id));
        let index = |count| u32::try_from(count).expect("logs are shorter than 2^32 experts");
        self.events.push((index(layer), index(self.experts.len())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(events: &[(usize, u32)]) -> AccessLog {
        let mut log = AccessLog::default();
        events.iter().for_each(|&(layer, expert)| log.routed(layer, 0, &[expert], &[1.0]));
        log
    }

    #[test]
    fn an_expert_that_is_used_later_than_the_residents_does_not_stay() {
        // One slot: keeping 0 throughout is best; evicting for 1, 2 and 3
        // would hit never.
        let mut log = log(&[(0, 0), (0, 1), (0, 0), (0, 2), (0, 0), (0, 3), (0, 0)]);
        let shape = Shape::uniform(1, 4, 1, 1);
        let hits = log.belady(&shape, &[1]).unwrap();
        assert_eq!(hits, Hits { requests: 7, hits: 3 });
        // Two slots, three experts in turns: 2 never stays.
        let turns = self::log(&[(0, 0), (0, 1), (0, 2), (0, 0), (0, 1), (0, 2)]);
        assert_eq!(turns.belady(&shape, &[2]).unwrap().hits, 2);
        // What came before the mark is warmth only.
        log.end_warm_up();
        assert_eq!(log.belady(&shape, &[1]).unwrap().ratio(), None);
        log.routed(0, 7, &[0], &[1.0]);
        log.routed(0, 8, &[2], &[1.0]);
        let hits = log.belady(&shape, &[1]).unwrap();
        assert_eq!((hits.requests, hits.ratio()), (2, Some(0.5)));
    }

    #[test]
    fn layers_share_their_slots() {
        // Layer 0 needs one of its two slots, layer 1 one more than it has.
        let turn = |expert| [(0, 0), (1, expert)];
        let log = log(&[turn(0), turn(1), turn(0), turn(1)].concat());
        let hits = log.belady(&Shape::uniform(2, 2, 1, 1), &[2, 1]).unwrap();
        assert_eq!(hits, Hits { requests: 8, hits: 5 });
        assert!(log.belady(&Shape::uniform(2, 2, 1, 1), &[2, 0]).is_err());
    }
}
