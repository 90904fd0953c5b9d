//! What the prefetches of one kind of pass moved, saved and cost, and their
//! switches, layer by layer.

use super::{Pricing, Switch};

/// What a layer's prefetches moved, saved and cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Prefetches that were ordered.
    pub issued: u64,
    pub issued_bytes: u64,
    /// Those that the layer asked for.
    pub useful: u64,
    pub useful_bytes: u64,
    /// Those that the layer did not ask for; `issued - useful - wasted` are
    /// still open.
    pub wasted: u64,
    pub wasted_bytes: u64,
    /// Stall that useful ones saved, estimated at the link's speed.
    pub saved_ns: u64,
    /// Stall that useless ones caused, estimated at the link's speed, and the
    /// time of forecasting itself, measured.
    pub lost_ns: u64,
    /// Time that the layer waited for experts, measured.
    pub stall_ns: u64,
}

impl Traffic {
    /// The share of the bytes that were asked for, of those that are settled:
    /// precision at the issued budget.
    pub fn precision(&self) -> Option<f64> {
        let settled = self.useful_bytes.saturating_add(self.wasted_bytes);
        (settled > 0).then(|| self.useful_bytes as f64 / settled as f64)
    }

    fn add(&mut self, other: &Traffic) {
        self.issued = self.issued.saturating_add(other.issued);
        self.issued_bytes = self.issued_bytes.saturating_add(other.issued_bytes);
        self.useful = self.useful.saturating_add(other.useful);
        self.useful_bytes = self.useful_bytes.saturating_add(other.useful_bytes);
        self.wasted = self.wasted.saturating_add(other.wasted);
        self.wasted_bytes = self.wasted_bytes.saturating_add(other.wasted_bytes);
        self.saved_ns = self.saved_ns.saturating_add(other.saved_ns);
        self.lost_ns = self.lost_ns.saturating_add(other.lost_ns);
        self.stall_ns = self.stall_ns.saturating_add(other.stall_ns);
    }
}

/// One layer of the price list.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LayerPrice {
    pub layer: usize,
    pub traffic: Traffic,
    /// Prefetching for this layer is on.
    pub on: bool,
    /// How often it was switched off.
    pub switched_off: u64,
    /// Saved less lost time in the window.
    pub balance_ns: f64,
}

/// `[layers]`.
pub struct Books {
    traffic: Vec<Traffic>,
    switches: Vec<Switch>,
    pricing: Pricing,
}

impl Books {
    pub fn new(layers: usize, pricing: Pricing) -> Self {
        let traffic = vec![Traffic::default(); layers];
        Self { traffic, switches: vec![Switch::new(&pricing); layers], pricing }
    }

    pub fn issued(&mut self, layer: usize, bytes: u64) {
        let Some(traffic) = self.traffic.get_mut(layer) else { return };
        traffic.issued += 1;
        traffic.issued_bytes = traffic.issued_bytes.saturating_add(bytes);
    }

    /// `is_priced`: the link's speed is known, so that a time is one.
    pub fn useful(&mut self, layer: usize, bytes: u64, saved_ns: u64, is_priced: bool) {
        let (Some(traffic), Some(switch)) =
            (self.traffic.get_mut(layer), self.switches.get_mut(layer))
        else {
            return;
        };
        traffic.useful += 1;
        traffic.useful_bytes = traffic.useful_bytes.saturating_add(bytes);
        traffic.saved_ns = traffic.saved_ns.saturating_add(saved_ns);
        if is_priced {
            switch.settled(saved_ns as f64);
        }
    }

    /// `in_the_way_bytes` were moved while a demand waited, for `ns_per_byte`.
    pub fn wasted(&mut self, layer: usize, bytes: u64, in_the_way_bytes: u64, ns_per_byte: f64) {
        let surcharge = self.pricing.surcharge * bytes as f64;
        let lost_ns = ((in_the_way_bytes as f64 + surcharge) * ns_per_byte) as u64;
        let (Some(traffic), Some(switch)) =
            (self.traffic.get_mut(layer), self.switches.get_mut(layer))
        else {
            return;
        };
        traffic.wasted += 1;
        traffic.wasted_bytes = traffic.wasted_bytes.saturating_add(bytes);
        traffic.lost_ns = traffic.lost_ns.saturating_add(lost_ns);
        if ns_per_byte > 0.0 {
            switch.settled(-(lost_ns as f64));
        }
    }

    pub fn spent(&mut self, layer: usize, ns: u64) {
        let (Some(traffic), Some(switch)) =
            (self.traffic.get_mut(layer), self.switches.get_mut(layer))
        else {
            return;
        };
        traffic.lost_ns = traffic.lost_ns.saturating_add(ns);
        switch.spent(ns as f64);
    }

    pub fn stalled(&mut self, layer: usize, stall_ns: u64) {
        if let Some(traffic) = self.traffic.get_mut(layer) {
            traffic.stall_ns = traffic.stall_ns.saturating_add(stall_ns);
        }
    }

    pub fn next_pass(&mut self) {
        self.switches.iter_mut().for_each(|switch| switch.next_token(&self.pricing));
    }

    pub fn allows(&self, layer: usize) -> bool {
        self.switches.get(layer).is_some_and(Switch::on)
    }

    /// Of the layers that prefetched something or stalled.
    pub fn prices(&self) -> Vec<LayerPrice> {
        let layers = self.traffic.iter().zip(&self.switches).enumerate();
        let used = layers.filter(|(_, (traffic, _))| **traffic != Traffic::default());
        let price = |(layer, (traffic, switch)): (usize, (&Traffic, &Switch))| LayerPrice {
            layer,
            traffic: *traffic,
            on: switch.on(),
            switched_off: switch.switched_off(),
            balance_ns: switch.balance_ns(),
        };
        used.map(price).collect()
    }

    /// All layers together.
    pub fn traffic(&self) -> Traffic {
        let mut total = Traffic::default();
        self.traffic.iter().for_each(|traffic| total.add(traffic));
        total
    }
}
