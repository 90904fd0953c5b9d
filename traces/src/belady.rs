//! How many hits the best possible cache would have had.

use pregate_predictor::{
    Admission, Cache, CapacityError, ExpertId, NoOutlook, Observer, Scope, Shape,
    policy::{Belady, Event},
};

/// What routers asked for, one token at a time, in the order in which the
/// layers ran. Four bytes an expert and eight a token and layer.
#[derive(Clone, Debug, Default)]
pub struct AccessLog {
    /// Layer, and where its experts end in `experts`.
    events: Vec<(u32, u32)>,
    experts: Vec<u32>,
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

    /// Layer and experts of every event.
    fn events(&self) -> impl Iterator<Item = (usize, &[u32])> {
        let mut start = 0;
        self.events.iter().map(move |&(layer, end)| {
            let experts = &self.experts[start..end as usize];
            start = end as usize;
            (layer as usize, experts)
        })
    }

    /// The hits of Belady's rule (evict what is used again last; Belady 1966)
    /// on these accesses with `slots` per layer, 0 for dense ones. Layers of
    /// one class share their slots, and an expert that is used later than all
    /// residents does not stay: the most that any policy could reach which
    /// reads an expert when it is asked for, and not ahead.
    ///
    /// # Errors
    /// `slots` that no cache can work with.
    ///
    /// # Panics
    /// If a layer or expert of the log is not in `shape`.
    pub fn belady(&self, shape: &Shape, slots: &[usize]) -> Result<Hits, CapacityError> {
        let mut rule = Belady::new(Scope::Pool, true);
        self.events().for_each(|(layer, experts)| rule.foresee(layer, experts));
        let mut cache = Cache::new(shape, slots, Box::new(rule))?;
        let mut counts = Vec::new();
        let mut total = Hits::default();
        for (index, (layer, experts)) in self.events().enumerate() {
            let resident = |expert: u32| cache.contains(ExpertId::new(layer, expert));
            let hits = experts.iter().filter(|&&expert| resident(expert)).count();
            if index >= self.warm_up {
                total.requests += experts.len() as u64;
                total.hits += hits as u64;
            }
            counts.resize(experts.len(), 1);
            cache.used(&Event { layer, experts, counts: &counts, tokens: 1 });
            for &expert in experts {
                let id = ExpertId::new(layer, expert);
                if !cache.contains(id) {
                    let _: Admission = cache.admit(id, &|_| false, &NoOutlook);
                }
            }
        }
        Ok(total)
    }
}

impl Observer for AccessLog {
    fn routed(&mut self, layer: usize, _position: usize, experts: &[u32], _weights: &[f32]) {
        self.experts.extend_from_slice(experts);
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
