//! Which worker takes which unit of a region: each has a run of neighbours,
//! which it takes front to back, and then helps the others from behind.
//!
//! Units beside each other mostly read memory beside each other, so that a
//! worker's prefetching runs on into what it needs next.

use std::sync::atomic::{AtomicU64, Ordering};

/// The first unit of a run that is left, and the end, in 32 bits each.
///
/// A cache line of its own, as its owner writes it all the time.
#[repr(align(128))]
struct Run(AtomicU64);

/// The units of a region that nobody has taken yet.
pub struct Shares(Vec<Run>);

fn pack(first: u64, end: u64) -> u64 {
    first << 32 | end
}

fn unpack(run: u64) -> (u64, u64) {
    (run >> 32, run & u64::from(u32::MAX))
}

impl Shares {
    pub fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| Run(AtomicU64::new(0))).collect())
    }

    /// Deals units `0 .. units`. Nobody may take meanwhile.
    ///
    /// # Panics
    /// With more units than 32 bits count.
    pub fn deal(&self, units: usize) {
        let units = u64::from(u32::try_from(units).expect("units in 32 bits"));
        let workers = self.0.len() as u64;
        for (worker, run) in (0u64..).zip(&self.0) {
            let bound = |worker: u64| worker * units / workers;
            run.0.store(pack(bound(worker), bound(worker + 1)), Ordering::Relaxed);
        }
    }

    /// A unit for `worker` that was not taken before; `None`: none is left.
    /// What was dealt must be visible to it.
    pub fn take(&self, worker: usize) -> Option<usize> {
        let own = self.0[worker].take(|first, end| (first, pack(first + 1, end)));
        own.or_else(|| {
            let (before, behind) = self.0.split_at(worker);
            let mut others = behind[1..].iter().chain(before);
            others.find_map(|run| run.take(|first, end| (end - 1, pack(first, end - 1))))
        })
    }

    /// Takes what is left.
    pub fn clear(&self) {
        self.0.iter().for_each(|run| run.0.store(0, Ordering::Relaxed));
    }
}

impl Run {
    /// `cut` names a unit of `first .. end`, which is not empty, and the rest.
    fn take(&self, cut: impl Fn(u64, u64) -> (u64, u64)) -> Option<usize> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let (first, end) = unpack(seen);
            if first >= end {
                return None;
            }
            let (unit, rest) = cut(first, end);
            // A run only shrinks while it is taken from, so an equal word is
            // the same run.
            match self.0.compare_exchange_weak(seen, rest, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(unit as usize),
                Err(now) => seen = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_goes_through_its_own_run_and_then_helps_from_behind() {
        let shares = Shares::new(3);
        shares.deal(8);
        let take = |worker| shares.take(worker);
        // Runs 0..2, 2..5, 5..8.
        assert_eq!([take(1), take(1)], [Some(2), Some(3)]);
        assert_eq!([take(0), take(0)], [Some(0), Some(1)]);
        assert_eq!(take(0), Some(4), "the next worker's last");
        assert_eq!([take(1), take(1)], [Some(7), Some(6)]);
        assert_eq!([take(2), take(2)], [Some(5), None]);
        assert_eq!([take(0), take(1)], [None, None]);
    }

    #[test]
    fn every_unit_is_taken_once() {
        for (workers, units) in [(1, 5), (2, 1), (3, 2), (4, 1000), (7, 7), (5, 0)] {
            let shares = Shares::new(workers);
            shares.deal(units);
            let shares = &shares;
            let taken = std::thread::scope(|scope| {
                let take = |worker| {
                    move || -> Vec<usize> { std::iter::from_fn(|| shares.take(worker)).collect() }
                };
                let all: Vec<_> = (0..workers).map(|worker| scope.spawn(take(worker))).collect();
                all.into_iter().flat_map(|taker| taker.join().unwrap()).collect::<Vec<_>>()
            });
            let mut sorted = taken.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..units).collect::<Vec<_>>(), "{workers} workers");
        }
    }

    #[test]
    fn nothing_is_left_of_what_was_cleared() {
        let shares = Shares::new(2);
        shares.deal(100);
        assert!(shares.take(0).is_some());
        shares.clear();
        assert_eq!([shares.take(0), shares.take(1)], [None, None]);
    }
}
