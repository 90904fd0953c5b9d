//! What comes ahead of its layer, and what gives way again.

use super::{Planner, Purpose, Retire, Room, State};
use crate::vocabulary::ExpertId;

impl Planner {
    /// Gives up prefetches of `layer` that are not part of the open event.
    pub(super) fn retire(&mut self, layer: usize, out: &mut Retire) {
        out.clear();
        let mut ahead = std::mem::take(&mut self.ahead);
        ahead.retain(|&id| {
            let stays = match self.state(id) {
                State::Early | State::Filling(Purpose::Prefetch) => layer != id.layer(),
                _ => return false,
            };
            if !stays {
                self.give_up(id, out);
            }
            stays
        });
        self.ahead = ahead;
    }

    /// The prefetch of `id` was for nothing.
    fn give_up(&mut self, id: ExpertId, out: &mut Retire) {
        self.wasted(id);
        if self.state(id) == State::Early {
            self.set(id, State::Absent);
            out.release.push(id);
        } else {
            self.set(id, State::Filling(Purpose::Dropped));
            out.discard.push(id);
        }
    }

    pub(super) fn wasted(&mut self, id: ExpertId) {
        self.accounts.gave_up(id, &self.shape, &mut self.ledger);
    }

    /// Is a forecast for `layer` worth its time: could a read-ahead follow?
    pub fn wants(&self, layer: usize) -> bool {
        self.forecaster.is_some() && (!self.limits.priced || self.ledger.allows(layer))
    }

    /// May read-aheads follow, now that the layer that was routed last is known?
    pub fn reads_ahead(&self) -> bool {
        let Some(forecaster) = &self.forecaster else { return false };
        forecaster.ahead(self.after).iter().any(|&layer| self.wants(layer))
    }

    /// Forecasting for `layer` took the token's thread `ns`: a price that its
    /// read-aheads have to earn.
    pub fn spent(&mut self, layer: usize, ns: u64) {
        if self.limits.priced {
            self.ledger.spent(layer, ns);
        }
    }

    /// The chance that a token misses something in `layer`, which is ahead, as
    /// far as forecasts say: one of its experts is nowhere. `None`: they say
    /// nothing.
    pub fn miss_chance(&self, layer: usize) -> Option<f64> {
        let forecaster = self.forecaster.as_ref()?;
        let probabilities = forecaster.probabilities(layer).filter(|all| !all.is_empty())?;
        let there = |expert: u32| {
            let id = ExpertId::new(layer, expert);
            self.cache.contains(id) || self.state(id) != State::Absent
        };
        let nowhere = (0..).zip(probabilities).filter(|(expert, _)| !there(*expert));
        // One after the other: which goes with which is not known.
        let none: f64 = nowhere.map(|(_, &p)| 1.0 - f64::from(p).clamp(0.0, 1.0)).product();
        Some(1.0 - none)
    }

    /// Which experts of later layers are worth a fill now? They are marked as
    /// in flight; `out` gets them, best first. Takes free frames only,
    /// `room(class)` many. May be called whenever the link is idle.
    ///
    /// Of a chunk of a prompt it is not asked what forecasts say of a token:
    /// so many tokens need an expert unless hardly any ever does.
    pub fn prefetch(&mut self, room: &dyn Fn(usize) -> usize, out: &mut Vec<ExpertId>) {
        out.clear();
        if self.forecaster.is_none() {
            return;
        }
        match &self.prompt {
            Some(_) => self.look_ahead_of_prompt(room),
            None => self.look_ahead(),
        }
        let wanted = std::mem::take(&mut self.wanted);
        self.fetch_ahead(wanted.iter().map(|&(_, id)| id), room, out);
        self.wanted = wanted;
    }

    /// Fills `wanted` for the chunk of a prompt that is under way.
    fn look_ahead_of_prompt(&mut self, room: &dyn Fn(usize) -> usize) {
        self.wanted.clear();
        let (Some(forecaster), Some(prompt)) = (&self.forecaster, &self.prompt) else { return };
        let (after, horizon) = (self.after, forecaster.horizon().max(1));
        let later = self.shape.moe().filter(|&(layer, _)| after.is_none_or(|l| layer > l));
        let pays = |layer: usize| !self.limits.priced || self.ledger.allows(layer);
        for (index, layer) in later.take(if prompt.len() > 0 { horizon } else { 0 }) {
            if pays(index) && room(layer.class) > 0 {
                let likely =
                    self.shares.needed((index, layer), prompt.len(), self.limits.threshold);
                self.wanted.extend(likely.into_iter().map(|(p, e)| (p, ExpertId::new(index, e))));
            }
        }
    }

    /// Fills `wanted` for the token that is under way, unless no more is known
    /// than when that was done. Which layers pay is settled between tokens.
    fn look_ahead(&mut self) {
        let Some(forecaster) = &mut self.forecaster else { return };
        if std::mem::replace(&mut self.has_looked, true) {
            return;
        }
        let (ledger, priced) = (&self.ledger, self.limits.priced);
        let pays = |layer: &usize| !priced || ledger.allows(*layer);
        // Where no layer ahead pays, the guess is not worth its time.
        let any_pays = forecaster.ahead(self.after).iter().any(pays);
        if any_pays && std::mem::take(&mut self.ask) {
            forecaster.forecast(self.after, &pays);
        }
        self.wanted.clear();
        for &layer in forecaster.ahead(self.after).iter().filter(|layer| pays(layer)) {
            let start = self.wanted.len();
            let probabilities = forecaster.probabilities(layer).unwrap_or_default();
            let likely = probabilities.iter().zip(0..);
            let likely = likely.filter(|&(&p, _)| p >= self.limits.threshold);
            self.wanted.extend(likely.map(|(&p, expert)| (p, ExpertId::new(layer, expert))));
            self.wanted[start..].sort_by(|a, b| b.0.total_cmp(&a.0));
        }
    }

    /// Marks those of `wanted` (best first) that are nowhere as in flight, as
    /// long as their class has frames left, `room(class)`; `out` gets them.
    /// Nothing is evicted for them. What the model does not have is left out.
    pub fn fetch_ahead(
        &mut self,
        wanted: impl IntoIterator<Item = ExpertId>,
        room: &dyn Fn(usize) -> usize,
        out: &mut Vec<ExpertId>,
    ) {
        out.clear();
        self.room.clear();
        self.room.extend((0..self.shape.classes()).map(room));
        if self.room.iter().all(|&room| room == 0) {
            return;
        }
        for id in wanted {
            let Some(layer) = self.shape.layer(id.layer()) else { continue };
            let is_free = id.expert() < layer.experts
                && self.room[layer.class] > 0
                && self.ahead.len() < self.limits.most
                && self.open.layer != Some(id.layer())
                && self.state(id) == State::Absent
                && !self.cache.contains(id);
            if is_free {
                self.room[layer.class] -= 1;
                self.accounts.issued(id, layer.expert_bytes, &mut self.ledger);
                self.set(id, State::Filling(Purpose::Prefetch));
                self.ahead.push(id);
                out.push(id);
            }
        }
    }

    /// No frame of `class` is free for a demand: which prefetch gives way?
    /// `None`: none is left, or enough are about to; a frame becomes free
    /// when a fill lands or an expert that was computed is admitted.
    pub fn make_room(&mut self, class: usize) -> Option<Room> {
        let current = self.open.layer?;
        let is_needed = |expert: &&u32| self.states[current][**expert as usize] == State::Needed;
        if self.open.experts.iter().filter(is_needed).count() <= self.dropped[class] {
            return None;
        }
        let of_class = |id: &ExpertId| self.class(id.layer()) == class;
        // The farthest goes first; of these, one that frees its frame at once.
        let layers = self.shape.layers.len();
        let distance = |id: ExpertId| (id.layer() + layers - current) % layers;
        let index = (0..self.ahead.len())
            .filter(|&index| of_class(&self.ahead[index]))
            .max_by_key(|&index| {
                let id = self.ahead[index];
                (distance(id), self.state(id) == State::Early)
            })?;
        let id = self.ahead.remove(index);
        let mut retire = Retire::default();
        self.give_up(id, &mut retire);
        Some(if retire.release.is_empty() { Room::Discard(id) } else { Room::Released(id) })
    }
}
