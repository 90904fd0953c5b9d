//! The planner's invariants under random events, failures, discards and
//! prefetches, with a model of the frames that the runtime owns.

use pregate_predictor::forecast::{Forecaster, NAMES};
use pregate_predictor::ledger::Traffic;
use pregate_predictor::policy;
use pregate_predictor::{
    Admission, Ahead, Arrival, Cache, ExpertId, Landing, LayerShape, Planner, Request, Retire,
    Room, Shape,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Prefetched and not used yet, at most.
const MOST_AHEAD: usize = 8;
/// Layers that are looked ahead.
const HORIZON: usize = 2;

/// What the runtime knows: frames per class, and who is in them.
struct Machine {
    shape: Shape,
    planner: Planner,
    frames: Vec<usize>,
    /// Experts with a frame, ready.
    ready: BTreeSet<ExpertId>,
    /// Fills in flight; `true`: their discard was ordered.
    flight: BTreeMap<ExpertId, bool>,
    computed: BTreeSet<ExpertId>,
    /// `[layers]`: residents that a layer had and may not lose, up to top-k.
    floors: Vec<usize>,
    /// Fills that were ever started ahead.
    prefetched: u64,
    /// Of these, neither asked for nor given up.
    ahead: BTreeSet<ExpertId>,
    random: u64,
}

impl Machine {
    fn new(
        shape: Shape,
        slots: usize,
        ring: usize,
        [policy, forecast]: [&str; 2],
        seed: u64,
    ) -> Self {
        let forecaster = Forecaster::by_name(forecast, &shape, HORIZON);
        let limits = Ahead { threshold: 0.3, most: MOST_AHEAD, priced: true };
        let per_layer: Vec<usize> =
            shape.layers.iter().map(|layer| layer.map_or(0, |l| slots.max(l.top_k))).collect();
        let cache = Cache::new(&shape, &per_layer, policy::by_name(policy).unwrap()).unwrap();
        let mut frames = vec![ring; shape.classes()];
        shape.moe().for_each(|(index, layer)| frames[layer.class] += per_layer[index]);
        Self {
            floors: vec![0; shape.layers.len()],
            prefetched: 0,
            ahead: BTreeSet::new(),
            planner: Planner::new(&shape, cache, forecaster, limits),
            shape,
            frames,
            ready: BTreeSet::new(),
            flight: BTreeMap::new(),
            computed: BTreeSet::new(),
            random: seed | 1,
        }
    }

    /// splitmix64, below `limit`.
    fn below(&mut self, limit: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }

    fn class(&self, id: ExpertId) -> usize {
        self.shape.layer(id.layer()).unwrap().class
    }

    fn room(&self) -> Vec<usize> {
        let mut room = self.frames.clone();
        for &id in self.ready.iter().chain(self.flight.keys()) {
            room[self.class(id)] =
                room[self.class(id)].checked_sub(1).expect("more experts than frames");
        }
        room
    }

    fn start(&mut self, id: ExpertId) {
        assert!(self.room()[self.class(id)] > 0, "{id} has no frame");
        assert!(!self.ready.contains(&id), "{id} is there and is filled");
        assert!(self.flight.insert(id, false).is_none(), "two fills of {id}");
    }

    fn demand(&mut self, id: ExpertId) {
        self.start(id);
        self.planner.filling(id);
    }

    fn release(&mut self, id: ExpertId) {
        assert!(self.ready.remove(&id), "{id} is released and has no frame");
    }

    fn retire(&mut self, retire: &Retire) {
        for id in retire.release.iter().chain(&retire.discard) {
            self.ahead.remove(id);
        }
        retire.release.iter().for_each(|&id| self.release(id));
        for id in &retire.discard {
            *self.flight.get_mut(id).expect("a fill to discard") = true;
        }
    }

    /// One fill lands, whichever. `Some`: the open event's, with what to do.
    fn land(&mut self, faults: bool) -> Option<(ExpertId, Arrival)> {
        let ids: Vec<ExpertId> = self.flight.keys().copied().collect();
        let id = ids[self.below(ids.len())];
        let discarded = self.flight.remove(&id).unwrap();
        let landing = match self.below(10) {
            0 if faults => Landing::Failed,
            0..6 if discarded => Landing::Discarded,
            _ => Landing::Ready,
        };
        if landing == Landing::Ready {
            self.ready.insert(id);
        }
        let arrival = self.planner.arrived(id, landing);
        match arrival {
            Arrival::Release => self.release(id),
            Arrival::Again => self.demand(id),
            Arrival::Use | Arrival::Keep => assert_eq!(landing, Landing::Ready),
            Arrival::Fail | Arrival::Nothing => assert_ne!(landing, Landing::Ready),
        }
        if arrival == Arrival::Nothing {
            self.ahead.remove(&id);
        }
        matches!(arrival, Arrival::Use | Arrival::Fail).then_some((id, arrival))
    }

    fn admit(&mut self, id: ExpertId, event: &BTreeSet<ExpertId>) {
        assert!(self.computed.insert(id), "{id} twice");
        let computed = &self.computed;
        let admission =
            self.planner.admit(id, &|other| event.contains(&other) && !computed.contains(&other));
        match admission {
            Admission::Added => {}
            Admission::Bypassed => self.release(id),
            Admission::Replaced(victim) => {
                assert!(!event.contains(&victim) || self.computed.contains(&victim));
                self.release(victim);
            }
        }
    }

    fn prefetch(&mut self, layer: usize) {
        let (room, mut issued) = (self.room(), Vec::new());
        if self.below(2) == 0 {
            self.planner.prefetch(&|class| room[class], &mut issued);
            // Of the next layers, the nearest first.
            assert!(issued.is_sorted_by_key(|id| id.layer()), "{issued:?}");
            assert!(issued.iter().all(|id| (1..=HORIZON).contains(&(id.layer() - layer))));
            self.start_ahead(&issued);
            return;
        }
        let layers = self.shape.layers.len();
        // Guesses of every quality, some of them about nothing that exists.
        let wanted: Vec<ExpertId> = (0..self.below(6))
            .map(|_| ExpertId::new(layer + self.below(layers + 1), self.below(40) as u32))
            .collect();
        self.planner.fetch_ahead(wanted, &|class| room[class], &mut issued);
        self.start_ahead(&issued);
    }

    fn start_ahead(&mut self, issued: &[ExpertId]) {
        for &id in issued {
            self.start(id);
            assert!(self.ahead.insert(id), "{id} is fetched ahead twice");
        }
        self.prefetched += issued.len() as u64;
        assert!(self.ahead.len() <= MOST_AHEAD, "too much is fetched ahead");
    }

    /// One event from request to end. An expert that cannot be read, or
    /// `cancelled`, ends it early.
    fn event(&mut self, layer: usize, experts: &[u32], faults: bool, cancelled: bool) {
        let event: BTreeSet<ExpertId> =
            experts.iter().map(|&expert| ExpertId::new(layer, expert)).collect();
        self.computed.clear();
        let mut request = Request::default();
        self.planner.request(layer, experts, &mut request);
        let Request { resident, early, in_flight, missing, fixed, retire } = request;
        assert!(fixed.is_empty(), "nothing was fixed");
        let all: BTreeSet<ExpertId> =
            resident.iter().chain(&early).chain(&in_flight).chain(&missing).copied().collect();
        assert_eq!(all, event);
        assert_eq!(all.len(), [&resident, &early, &in_flight, &missing].map(Vec::len).iter().sum());
        for id in early.iter().chain(&in_flight) {
            self.ahead.remove(id);
        }
        self.retire(&retire);
        self.check_layer(layer, &event);
        resident.iter().chain(&early).for_each(|id| assert!(self.ready.contains(id), "{id}"));
        in_flight.iter().for_each(|id| assert!(self.flight.contains_key(id), "{id}"));
        for &id in &resident {
            self.planner.computed(id);
            self.computed.insert(id);
        }
        early.iter().for_each(|&id| self.admit(id, &event));
        let mut missing = missing.into_iter().peekable();
        let mut steps = 0;
        while self.computed.len() < event.len() && !(cancelled && self.below(4) == 0) {
            steps += 1;
            assert!(steps < 10_000, "no progress");
            while let Some(id) = missing.next_if(|&id| self.room()[self.class(id)] > 0) {
                self.demand(id);
            }
            if let Some(&id) = missing.peek() {
                match self.planner.make_room(self.class(id)) {
                    Some(Room::Released(other)) => {
                        self.ahead.remove(&other);
                        self.release(other);
                        continue;
                    }
                    Some(Room::Discard(other)) => {
                        self.ahead.remove(&other);
                        *self.flight.get_mut(&other).unwrap() = true;
                    }
                    None => {}
                }
            }
            if self.below(2) == 0 {
                self.prefetch(layer);
            }
            assert!(!self.flight.is_empty(), "{layer}: waits for nothing");
            match self.land(faults) {
                Some((id, Arrival::Use)) => self.admit(id, &event),
                Some((_, _)) => break,
                None => {}
            }
        }
        let mut retire = Retire::default();
        self.planner.end(layer, 0, 0, &mut retire);
        self.retire(&retire);
        self.check_layer(layer, &BTreeSet::new());
        self.check();
    }

    /// `layer` has frames for its residents and `event` only, and nothing is
    /// read for anybody else.
    fn check_layer(&self, layer: usize, event: &BTreeSet<ExpertId>) {
        let cache = self.planner.cache();
        let others = |id: &&ExpertId| id.layer() == layer && !event.contains(id);
        for id in self.ready.iter().filter(others) {
            assert!(cache.contains(*id), "{id} keeps its frame and nobody wants it");
        }
        for (id, discarded) in self.flight.iter().filter(|(id, _)| others(id)) {
            assert!(*discarded, "{id} is read and nobody wants it");
        }
    }

    /// Every frame is accounted for.
    fn check(&mut self) {
        let cache = self.planner.cache();
        let mut free = vec![0; self.shape.classes()];
        for (layer, shape) in self.shape.moe() {
            free[shape.class] += cache.slots(layer) as isize - cache.len(layer) as isize;
            let (len, floor) = (cache.len(layer), &mut self.floors[layer]);
            *floor = shape.top_k.min(len.max(*floor));
            assert!(len >= *floor, "layer {layer} fell to {len}");
            for expert in 0..shape.experts {
                let id = ExpertId::new(layer, expert as u32);
                if cache.contains(id) {
                    assert!(self.ready.contains(&id), "{id} is resident without a frame");
                    assert!(!self.flight.contains_key(&id), "{id} is resident and in flight");
                }
            }
        }
        let ledger = self.planner.ledger();
        let books = [ledger.traffic(), ledger.chunk_traffic()];
        assert_eq!(books.iter().map(|traffic| traffic.issued).sum::<u64>(), self.prefetched);
        for traffic in books {
            assert!(traffic.useful + traffic.wasted <= traffic.issued, "{traffic:?}");
        }
        assert!(free.iter().all(|&free| free >= 0), "more residents than slots");
    }
}

fn model(layers: usize, experts: usize, top_k: usize) -> Shape {
    let layer = |index: usize| LayerShape {
        experts,
        top_k,
        expert_bytes: 1,
        // Every third layer has larger experts; the first is dense.
        class: usize::from(index % 3 == 2),
    };
    Shape { layers: (0..layers).map(|index| (index > 0).then(|| layer(index))).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_and_every_demand_completes(
        seed in any::<u64>(),
        layers in 2..7usize,
        experts in 2..20usize,
        top_k in 1..5usize,
        more_slots in 0..6usize,
        ring in 1..6usize,
        forecast in 0..NAMES.len() + 2,
        policy in 0..policy::NAMES.len(),
        faults in any::<bool>(),
    ) {
        let top_k = top_k.min(experts);
        let shape = model(layers, experts, top_k);
        let forecast = NAMES.get(forecast).copied().unwrap_or("blend");
        let mut machine = Machine::new(
            shape,
            top_k + more_slots,
            ring,
            [policy::NAMES[policy], forecast],
            seed,
        );
        for token in 0..12 {
            let chunk = machine.below(4) == 0;
            match chunk {
                true => machine.planner.begin_chunk(&[token; 5]),
                false => machine.planner.begin_token(token),
            }
            for layer in 1..layers {
                let most = if chunk { experts } else { top_k };
                let mut ids: Vec<u32> = (0..experts as u32).collect();
                for at in (1..ids.len()).rev() {
                    ids.swap(at, machine.below(at + 1));
                }
                ids.truncate(1 + machine.below(most));
                // A chunk's tokens share the experts out.
                for row in ids.chunks(if chunk { ids.len().div_ceil(5) } else { ids.len() }) {
                    machine.planner.routed(layer, row, &vec![0.5; row.len()]);
                }
                let cancelled = faults && machine.below(8) == 0;
                machine.event(layer, &ids, faults, cancelled);
            }
        }
    }
}

/// A planner for chunks of four layers with 8 experts, of which a token takes
/// one; 2 slots each.
fn for_chunks(forecast: &str, horizon: usize) -> Planner {
    let shape = Shape::uniform(4, 8, 1, 1);
    let cache = Cache::new(&shape, &[2; 4], policy::by_name("frequency").unwrap()).unwrap();
    let forecaster = Forecaster::by_name(forecast, &shape, horizon);
    Planner::new(&shape, cache, forecaster, Ahead::default())
}

/// A chunk whose tokens choose `experts` in every layer, one each; everything
/// that is asked for lands at once.
fn run_chunk(planner: &mut Planner, experts: &[u32]) {
    let (mut request, mut retire) = (Request::default(), Retire::default());
    planner.begin_chunk(&vec![0; experts.len()]);
    for layer in 0..4 {
        experts.iter().for_each(|&expert| planner.routed(layer, &[expert], &[1.0]));
        let needed: Vec<u32> = BTreeSet::from_iter(experts.iter().copied()).into_iter().collect();
        planner.request(layer, &needed, &mut request);
        request.resident.iter().for_each(|&id| planner.computed(id));
        for &id in &request.missing {
            planner.filling(id);
            assert_eq!(planner.arrived(id, Landing::Ready), Arrival::Use);
            let _ = planner.admit(id, &|_| false);
        }
        planner.end(layer, 0, 0, &mut retire);
    }
}

/// What a chunk of eight tokens fetches ahead before its first layer, into
/// `room` frames.
fn ahead_of_chunk(planner: &mut Planner, room: usize) -> Vec<ExpertId> {
    let mut issued = Vec::new();
    planner.begin_chunk(&[0; 8]);
    planner.prefetch(&|_| room, &mut issued);
    issued
}

#[test]
fn a_chunk_fetches_ahead_what_chunks_use_and_is_nowhere() {
    let ids = |layer: usize, experts: &[u32]| -> Vec<ExpertId> {
        experts.iter().map(|&expert| ExpertId::new(layer, expert)).collect()
    };
    // 5 in half of the tokens, 2 and 7 in a sixth, others hardly ever.
    let often: Vec<u32> =
        (0..96).map(|token| [5, 2, 5, 7, 5, token / 24][token as usize % 6]).collect();
    for room in [0, 1, 2, 20] {
        let mut planner = for_chunks("frequency", 1);
        (0..20).for_each(|_| run_chunk(&mut planner, &often));
        let absent: Vec<u32> = [5, 2, 7]
            .into_iter()
            .filter(|&e| !planner.cache().contains(ExpertId::new(0, e)))
            .collect();
        assert!(!absent.is_empty(), "two slots hold three experts");
        let mut want = ids(0, &absent);
        want.truncate(room);
        assert_eq!(ahead_of_chunk(&mut planner, room), want, "{room} frames");
    }
    // Further layers where the horizon says so; none without forecasts.
    let layers = |horizon| {
        let mut planner = for_chunks("frequency", horizon);
        let issued = ahead_of_chunk(&mut planner, 99);
        BTreeSet::from_iter(issued.iter().map(|id| id.layer())).len()
    };
    assert_eq!([layers(0), layers(1), layers(3)], [1, 1, 3]);
    assert!(ahead_of_chunk(&mut for_chunks("none", 3), 99).is_empty());
    // Nobody knows anything of a pass without tokens.
    let mut planner = for_chunks("frequency", 1);
    planner.begin_chunk(&[]);
    let mut issued = Vec::new();
    planner.prefetch(&|_| 99, &mut issued);
    assert!(issued.is_empty());
}

#[test]
fn what_a_pass_leaves_behind_is_in_no_later_passs_books() {
    let mut planner = for_chunks("frequency", 1);
    let issued = ahead_of_chunk(&mut planner, 4).len() as u64;
    assert!(issued >= 2);
    // Its layer runs for a token: one is asked for, the others are given up.
    let mut request = Request::default();
    planner.begin_token(0);
    planner.routed(0, &[0], &[1.0]);
    planner.request(0, &[0], &mut request);
    assert_eq!([request.in_flight.len(), request.retire.discard.len() + 1], [1, issued as usize]);
    assert_eq!(planner.arrived(ExpertId::new(0, 0), Landing::Ready), Arrival::Use);
    planner.end(0, 0, 0, &mut Retire::default());
    let ledger = planner.ledger();
    assert_eq!(ledger.traffic(), Traffic::default());
    assert_eq!(
        ledger.chunk_traffic(),
        Traffic { issued, issued_bytes: issued, ..Traffic::default() }
    );
}
