//! The ledger of forecasts, for people and for scripts: how often each was
//! right, what reading ahead moved, saved and cost.

use pregate_predictor::{
    Planner,
    forecast::{Fault, Forecaster},
    ledger::{self, LayerPrice, Ledger, Link, Tally},
};
use pregate_runtime::Model;
use serde::Serialize;

mod table;

/// What `--ledger` prints; scripts read the fields by name. Counted since the
/// model was loaded, over tokens that were decoded one at a time.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// As in `forecasts`, in the order of the tables.
    pub columns: Vec<&'static str>,
    /// Per layer, forecast and distance.
    pub forecasts: Vec<Recall>,
    /// All layers together.
    pub totals: Vec<Recall>,
    pub traffic: Vec<Traffic>,
    pub traffic_total: Traffic,
    /// Experts that the CPU computed for a GPU and an idle link copied for
    /// later tokens; `stall_ms` is 0.
    pub kept: Vec<Traffic>,
    pub kept_total: Traffic,
    pub link: LinkUse,
    /// What layers go by now where the policy has several rules, with how many
    /// layers each.
    pub eviction: Vec<Rule>,
    /// What forecasts did that they must not do.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Recall {
    pub forecast: &'static str,
    /// `null`: all layers.
    pub layer: Option<usize>,
    /// Layers ahead of its layer that it was made; 0: about the next token,
    /// or by the layer's own router.
    pub ahead: usize,
    /// Guesses that were judged.
    pub guesses: u64,
    /// Shares, 0 to 1: of the experts asked for, of the guesses that named all
    /// of them, of the gate weight.
    pub slot_recall: Option<f64>,
    pub whole_set_rate: Option<f64>,
    pub gate_mass_recall: Option<f64>,
}

/// Read-aheads for one layer, or for all.
#[derive(Clone, Debug, Serialize)]
pub struct Traffic {
    pub layer: Option<usize>,
    pub issued: u64,
    pub issued_bytes: u64,
    /// Useful bytes of all that are settled.
    pub precision: Option<f64>,
    pub useful_bytes: u64,
    pub wasted_bytes: u64,
    /// Estimates at the link's speed.
    pub saved_ms: f64,
    pub lost_ms: f64,
    /// Measured.
    pub stall_ms: f64,
    /// Of a layer: reading ahead is on now.
    pub on: Option<bool>,
    /// How often it was switched off.
    pub switched_off: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct LinkUse {
    pub bytes: u64,
    pub busy_ms: f64,
    pub idle_ms: f64,
    pub gb_s: Option<f64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Rule {
    pub rule: &'static str,
    pub layers: usize,
}

/// `None` where the whole model is in memory: nothing is forecast.
pub fn report(model: &Model) -> Option<Report> {
    model.store().map(|store| store.with_planner(Report::of))
}

/// What forecasts did that they must not do.
pub fn faults(model: &Model) -> Vec<String> {
    let of = |planner: &Planner| planner.forecaster().map(notes).unwrap_or_default();
    model.store().map(|store| store.with_planner(of)).unwrap_or_default()
}

/// What to say where there is no ledger to show.
pub const NOTHING: &str =
    "note: --ledger: the whole model is in memory, and nothing is forecast or read ahead";

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

impl Recall {
    fn new(row: &ledger::Recall) -> Self {
        let tally: &Tally = &row.tally;
        Self {
            forecast: row.forecast,
            layer: row.layer,
            ahead: row.ahead,
            guesses: tally.guesses,
            slot_recall: tally.slot_recall(),
            whole_set_rate: tally.whole_set_rate(),
            gate_mass_recall: tally.gate_mass_recall(),
        }
    }
}

impl Traffic {
    fn new(traffic: &ledger::Traffic) -> Self {
        Self {
            layer: None,
            issued: traffic.issued,
            issued_bytes: traffic.issued_bytes,
            precision: traffic.precision(),
            useful_bytes: traffic.useful_bytes,
            wasted_bytes: traffic.wasted_bytes,
            saved_ms: ms(traffic.saved_ns),
            lost_ms: ms(traffic.lost_ns),
            stall_ms: ms(traffic.stall_ns),
            on: None,
            switched_off: 0,
        }
    }

    fn of_layer(price: &LayerPrice) -> Self {
        Self {
            layer: Some(price.layer),
            on: Some(price.on),
            switched_off: price.switched_off,
            ..Self::new(&price.traffic)
        }
    }
}

impl LinkUse {
    fn new(link: &Link) -> Self {
        Self {
            bytes: link.bytes,
            busy_ms: ms(link.busy_ns),
            idle_ms: ms(link.idle_ns),
            gb_s: (link.busy_ns > 0).then(|| link.bytes as f64 / link.busy_ns as f64),
        }
    }
}

impl Report {
    fn of(planner: &Planner) -> Self {
        let mut report = Self::new(planner.ledger());
        if let Some(forecaster) = planner.forecaster() {
            report.notes = notes(forecaster);
        }
        let rules = planner.cache().rules().into_iter();
        report.eviction = rules.map(|(rule, layers)| Rule { rule, layers }).collect();
        report
    }

    fn new(ledger: &Ledger) -> Self {
        let prices = ledger.prices();
        let traffic: Vec<Traffic> = prices.iter().map(Traffic::of_layer).collect();
        let kept = ledger.kept_prices();
        let off = |prices: &[LayerPrice]| prices.iter().map(|price| price.switched_off).sum();
        let switched_off = off(&prices);
        Self {
            columns: ledger.columns().to_vec(),
            forecasts: ledger.recalls().iter().map(Recall::new).collect(),
            totals: ledger.totals().iter().map(Recall::new).collect(),
            traffic_total: Traffic { switched_off, ..Traffic::new(&ledger.traffic()) },
            traffic,
            kept: kept.iter().map(Traffic::of_layer).collect(),
            kept_total: Traffic {
                switched_off: off(&kept),
                ..Traffic::new(&ledger.kept_traffic())
            },
            link: LinkUse::new(&ledger.link_use()),
            eviction: Vec::new(),
            notes: Vec::new(),
        }
    }
}

fn notes(forecaster: &Forecaster) -> Vec<String> {
    let mut notes: Vec<String> = forecaster.faults().map(|fault| fault_note(&fault)).collect();
    if forecaster.refused() > 0 {
        notes.push(format!("{} scores did not fit their layer", forecaster.refused()));
    }
    notes
}

fn fault_note(fault: &Fault) -> String {
    let Fault { forecast, panicked, unclean_answers } = *fault;
    match (panicked, unclean_answers) {
        (true, _) => format!("the forecast {forecast} panicked and is not asked any more"),
        (false, count) => {
            format!("the forecast {forecast} gave {count} answers with numbers out of range")
        }
    }
}
