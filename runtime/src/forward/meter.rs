//! Where a streamed pass's time goes.

use crate::statistics::Time;
use crate::store::ExpertStore;

/// What the token's thread has been doing since the last lap.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// All that reads no routed expert.
    Dense,
    Experts,
    Overhead,
}

/// Attributes the time of a pass, if experts are streamed; else does nothing.
pub struct Meter<'a> {
    store: Option<&'a ExpertStore>,
    started_ns: u64,
    last_ns: u64,
    time: Time,
}

impl<'a> Meter<'a> {
    pub fn start(store: Option<&'a ExpertStore>) -> Self {
        let now = store.map_or(0, ExpertStore::now_ns);
        Self { store, started_ns: now, last_ns: now, time: Time::default() }
    }

    /// Everything since the last lap was `work`.
    pub fn lap(&mut self, work: Work) {
        self.lap_with_wait(work, 0);
    }

    /// As [`Meter::lap`], but `waited_ns` of it went to waiting for the disk.
    pub fn lap_with_wait(&mut self, work: Work, waited_ns: u64) {
        let Some(store) = self.store else { return };
        let now = store.now_ns();
        let passed = (now - self.last_ns).saturating_sub(waited_ns);
        self.last_ns = now;
        self.time.wait_disk_ns += waited_ns;
        *match work {
            Work::Dense => &mut self.time.compute_ns,
            Work::Experts => &mut self.time.experts_ns,
            Work::Overhead => &mut self.time.overhead_ns,
        } += passed;
    }

    /// Ends the pass and hands its times to the store.
    pub fn finish(mut self) {
        let Some(store) = self.store else { return };
        self.lap(Work::Dense);
        self.time.total_ns = self.last_ns - self.started_ns;
        store.end_pass(self.time);
    }
}
