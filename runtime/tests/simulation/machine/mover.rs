//! What the store and the observer of a pass see of the machine.

use super::{Filling, Machine};
use pregate_predictor::{Observer, Served};
use pregate_runtime::store::mover::{Counters, Done, Fill, MoveError, Mover, Notice, Urgency};
use pregate_runtime::store::slot::State;
use std::collections::BTreeSet;
use std::hash::Hash;

pub struct SimMover(pub Machine);

impl Mover for SimMover {
    fn describe(&self) -> String {
        "simulated".to_string()
    }

    fn submit(&mut self, fill: Fill) {
        let mut inside = self.0.lock();
        let (key, frame) = (fill.key, fill.ticket.frame());
        let generation = fill.ticket.generation();
        let inside = &mut *inside;
        let mut flights = inside.disk.flights.iter().chain(&inside.disk.ended);
        assert!(flights.all(|f| f.key != key), "I8: two fills of {key:x} are in flight");
        let mut flights = inside.disk.flights.iter().chain(&inside.disk.ended);
        assert!(flights.all(|f| f.frame != frame), "I4: two fills into {frame:?}");
        let filling = Filling { generation, key, pieces: fill.pieces.clone() };
        if let Some(before) = inside.fillings.insert(frame, filling) {
            assert!(before.generation < generation, "I5: {frame:?} is filled under an old name");
            inside.old.insert(frame, before.generation);
        }
        ("submit", key, frame, generation.get(), fill.urgency, inside.now).hash(&mut inside.log);
        inside.idle_waits = 0;
        inside.demands += u64::from(fill.urgency == Urgency::Demand);
        inside.disk.submit(inside.now, fill);
    }

    fn promote(&mut self, key: u64) {
        let mut inside = self.0.lock();
        let now = inside.now;
        ("promote", key, now).hash(&mut inside.log);
        inside.disk.promote(key);
    }

    fn discard(&mut self, key: u64) {
        let mut inside = self.0.lock();
        let now = inside.now;
        ("discard", key, now).hash(&mut inside.log);
        inside.given_up += u64::from((key >> 32) as usize != inside.layer);
        inside.disk.discard(now, key);
    }

    fn next(&mut self, wait_ns: u64) -> Option<Done> {
        let mut inside = self.0.lock();
        let inside = &mut *inside;
        inside.tick();
        if wait_ns == 0 && inside.random.one_in(8) {
            // What has just ended is not seen yet.
            return None;
        }
        let deadline = inside.now.saturating_add(wait_ns);
        let mut flights = inside.disk.flights.iter();
        let helps = flights.any(|flight| flight.urgency == Urgency::Demand || flight.discarded)
            || inside.disk.flights.is_empty()
            || !inside.disk.ended.is_empty()
            || inside.kept.is_some();
        assert!(
            wait_ns == 0 || helps,
            "I9: a wait for reads ahead that were neither promoted nor discarded"
        );
        loop {
            if let Some(done) = inside.kept.take() {
                return Some(done);
            }
            if let Some(done) = inside.disk.hand_back() {
                let frames = inside.frames.as_ref().expect("connected");
                let state = frames.state(done.frame).state;
                let right = if done.result.is_ok() { State::Ready } else { State::Failed };
                assert_eq!(state, right, "I6: {:?} after {:?}", done.frame, done.result);
                let result = done.result.as_ref().map_err(ToString::to_string);
                ("done", done.key, done.frame, done.generation.get(), result, inside.now)
                    .hash(&mut inside.log);
                return inside.tell_lie(done);
            }
            let Some(end) = inside.disk.next_end() else {
                if wait_ns > 0 {
                    inside.idle_waits += 1;
                    assert!(inside.idle_waits < 3, "I9: a wait, and nothing is on its way");
                }
                return None;
            };
            if inside.now >= deadline {
                return None;
            }
            inside.now = end.clamp(inside.now, deadline);
            inside.disk.run_until(inside.now);
            inside.check_time();
        }
    }

    fn now_ns(&self) -> u64 {
        self.0.lock().now
    }

    fn counters(&self) -> Counters {
        let inside = self.0.lock();
        Counters { outstanding: inside.disk.outstanding() as u64, ..inside.disk.counters }
    }

    fn notice(&mut self) -> Option<Notice> {
        self.0.lock().disk.notices.pop_front()
    }

    fn check_unchanged(&self) -> Result<(), MoveError> {
        self.0.lock().disk.unchanged()
    }
}

/// Sees what routers choose, so that uses can be held against it.
pub struct Watch(pub Machine);

impl Observer for Watch {
    fn routed(&mut self, layer: usize, position: usize, experts: &[u32], _: &[f32]) {
        let mut inside = self.0.lock();
        if inside.layer != layer {
            inside.forget_layer(layer);
        }
        inside.routes.push(experts.to_vec());
        (layer, position, experts).hash(&mut inside.log);
    }

    fn served(&mut self, served: &Served<'_>) {
        let mut inside = self.0.lock();
        let inside = &mut *inside;
        assert_eq!(served.layer, inside.layer);
        assert_eq!(served.tokens, inside.routes.len());
        let chosen: BTreeSet<u32> = inside.routes.iter().flatten().copied().collect();
        let told: BTreeSet<u32> = served.experts.iter().map(|&(expert, _)| expert).collect();
        assert_eq!(told.len(), served.experts.len(), "an expert has two origins");
        assert_eq!(told, chosen, "origins of layer {}", served.layer);
        assert_eq!(inside.computed, chosen, "I8: layer {}: who was computed", served.layer);
        let (demands, given_up) = (inside.demands, inside.given_up);
        assert!(given_up <= demands, "{given_up} reads ahead made room for {demands} demands");
        let origins = format!("{:?} {} {}", served.experts, served.bytes, served.stall_ns);
        ("served", served.layer, origins).hash(&mut inside.log);
        inside.served += 1;
        for &(_, origin) in served.experts {
            inside.origins[origin as usize] += 1;
        }
        inside.forget_layer(usize::MAX);
    }
}
