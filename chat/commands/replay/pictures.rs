//! Curves and heat maps of replays.

use super::{
    runs::{Asked, Run},
    subject::Subject,
    table::slots,
};
use crate::plot::{Chart, Role, Series, heat::Heat};
use pregate_traces::replay::{LayerReport, Report, Warm};
use std::collections::BTreeSet;

/// Settings that differ in their slots alone.
type Key = (usize, usize, usize, usize);

fn key(run: &Run) -> Key {
    (run.job.trace, run.job.machine, run.job.policy, run.job.forecast)
}

/// The settings of `runs`, each with its runs by their slots.
fn settings<'a>(runs: &[&'a Run]) -> Vec<(Key, Vec<&'a Run>)> {
    let keys: BTreeSet<Key> = runs.iter().map(|run| key(run)).collect();
    let of = |wanted: Key| {
        let mut found: Vec<&Run> = runs.iter().copied().filter(|run| key(run) == wanted).collect();
        found.sort_by(|a, b| share(&a.report).total_cmp(&share(&b.report)));
        // Two of `--slots` may be the same number.
        found.dedup_by(|a, b| a.report.slots_per_layer == b.report.slots_per_layer);
        (wanted, found)
    };
    keys.into_iter().map(of).collect()
}

/// Slots in percent of the experts.
fn share(report: &Report) -> f64 {
    let slots: usize = report.layers.iter().map(|layer| layer.slots).sum();
    let experts: usize = report.layers.iter().map(|layer| layer.expert_accesses.len()).sum();
    slots as f64 / experts.max(1) as f64 * 100.0
}

/// What a setting is called among the others: the parts that differ.
fn name(asked: &Asked, (trace, machine, policy, forecast): Key) -> String {
    let mut parts = vec![asked.policies[policy].clone()];
    let mut add = |several: bool, part: &str| {
        if several {
            parts.push(part.to_string());
        }
    };
    add(asked.forecasts.len() > 1, &asked.forecasts[forecast]);
    add(asked.machines.len() > 1, &asked.machines[machine].name);
    add(asked.subjects.len() > 1, &short(&asked.subjects[trace]));
    parts.join(", ")
}

/// A path's end.
fn short(subject: &Subject) -> String {
    let stem = subject.path.file_stem();
    stem.map_or(subject.name.clone(), |stem| stem.to_string_lossy().into_owned())
}

/// What a picture says below its title. A synthetic trace says so first.
fn notes(asked: &Asked, keys: &[Key]) -> Vec<String> {
    let traces: BTreeSet<usize> = keys.iter().map(|key| key.0).collect();
    let machines: BTreeSet<usize> = keys.iter().map(|key| key.1).collect();
    let mut notes: Vec<String> = traces
        .into_iter()
        .map(|trace| {
            let subject = &asked.subjects[trace];
            let counted = match asked.warm(subject) {
                Warm::Cold => "cold",
                Warm::Tokens(_) | Warm::Whole => "warm",
            };
            let model = match subject.header.model.as_str() {
                "" => short(subject),
                model => model.to_string(),
            };
            let synthetic = subject.synthetic().map(|_| format!("{}; ", subject.provenance()));
            format!(
                "{}{model}: {}, {} tokens, {counted}",
                synthetic.unwrap_or_default(),
                subject.shape_words(),
                subject.tokens
            )
        })
        .collect();
    let names: Vec<&str> =
        machines.into_iter().map(|machine| asked.machines[machine].name.as_str()).collect();
    let several = asked.forecasts.len() > 1;
    let forecast =
        if several { String::new() } else { format!("; forecast {}", asked.forecasts[0]) };
    notes.push(format!("simulated on {}{forecast}", names.join(", ")));
    notes
}

/// Hits of every setting over its slots, between LRU's and Belady's; empty
/// notes and no series without runs.
pub fn hits(asked: &Asked, runs: &[&Run]) -> Chart {
    let settings = settings(runs);
    let percent = |report: &Report, hits: u64| {
        (share(report), hits as f64 / report.accesses.max(1) as f64 * 100.0)
    };
    let mut series: Vec<Series> = settings
        .iter()
        .map(|(key, runs)| Series {
            name: name(asked, *key),
            role: Role::Main,
            points: runs.iter().map(|run| percent(&run.report, run.report.hits)).collect(),
        })
        .collect();
    // The bracket is the trace's and the slots'.
    let traces: BTreeSet<usize> = settings.iter().map(|(key, _)| key.0).collect();
    for trace in &traces {
        let Some((_, first)) = settings.iter().find(|(key, _)| key.0 == *trace) else { continue };
        let of = if traces.len() > 1 {
            format!(", {}", short(&asked.subjects[*trace]))
        } else {
            String::new()
        };
        let mut add = |rule: &str, hits: fn(&Report) -> Option<u64>| {
            let points: Vec<_> = first
                .iter()
                .filter_map(|run| Some(percent(&run.report, hits(&run.report)?)))
                .collect();
            if !points.is_empty() {
                series.push(Series { name: format!("{rule}{of}"), role: Role::Reference, points });
            }
        };
        add("Belady, at best", |report| Some(report.bracket?.best_hits));
        if !asked.policies.iter().any(|policy| policy == "lru") {
            add("LRU", |report| Some(report.bracket?.lru_hits));
        }
    }
    let keys: Vec<Key> = settings.iter().map(|(key, _)| *key).collect();
    Chart {
        title: "Experts that are there when they are asked for".to_string(),
        notes: notes(asked, &keys),
        x_label: "slots, % of the experts of each layer".to_string(),
        y_label: "hits, %".to_string(),
        series,
        y_most: Some(100.0),
    }
}

/// Predicted speed of every setting over its slots; of a single one with what
/// the machine's wires allow.
pub fn speed(asked: &Asked, runs: &[&Run]) -> Chart {
    let settings = settings(runs);
    let points = |runs: &[&Run], of: fn(&Report) -> f64| {
        runs.iter().map(|run| (share(&run.report), of(&run.report))).collect()
    };
    let mut series: Vec<Series> = settings
        .iter()
        .map(|(key, runs)| Series {
            name: name(asked, *key),
            role: Role::Main,
            points: points(runs, |report| report.tok_s),
        })
        .collect();
    if let [(_, runs)] = settings.as_slice() {
        series.push(Series {
            name: "bound of the wires".to_string(),
            role: Role::Reference,
            points: points(runs, |report| report.bound.tok_s),
        });
    }
    let keys: Vec<Key> = settings.iter().map(|(key, _)| *key).collect();
    Chart {
        title: "Predicted speed of decoding".to_string(),
        notes: notes(asked, &keys),
        x_label: "slots, % of the experts of each layer".to_string(),
        y_label: "tok/s".to_string(),
        series,
        y_most: None,
    }
}

/// Maps for each setting: hits of layers over slots where there are several
/// sizes, else over experts, with how often each is asked for.
pub fn maps(asked: &Asked, runs: &[&Run]) -> Vec<Heat> {
    let map = |(key, runs): (Key, Vec<&Run>)| {
        let about = notes(asked, &[key]);
        let trace = about.iter().take(1).cloned().collect();
        let notes = [vec![name(asked, key)], about].concat();
        match runs.as_slice() {
            [one] => vec![of_experts(&one.report, notes), uses(&one.report, trace)],
            several => vec![over_slots(several, notes)],
        }
    };
    settings(runs).into_iter().flat_map(map).collect()
}

/// The layers that have experts.
fn moe_layers(report: &Report) -> impl Iterator<Item = usize> + '_ {
    (0..report.layers.len()).filter(|&layer| !report.layers[layer].expert_accesses.is_empty())
}

fn over_slots(runs: &[&Run], notes: Vec<String>) -> Heat {
    let first = &runs[0].report;
    let hits = |layer: usize| {
        runs.iter()
            .map(|run| {
                let counts = run.report.layers.get(layer)?.counts;
                (counts.accesses > 0).then(|| counts.hit_ratio() * 100.0)
            })
            .collect()
    };
    Heat {
        title: "Hits of each layer".to_string(),
        notes,
        row_label: "layer".to_string(),
        column_label: "slots of each layer".to_string(),
        columns: runs.iter().map(|run| run.report.slots_per_layer.to_string()).collect(),
        rows: moe_layers(first).map(|layer| (layer.to_string(), hits(layer))).collect(),
        ends: (0.0, 100.0),
        unit: "%".to_string(),
    }
}

/// Of each expert, how often it was in a slot when it was asked for; blank
/// where it never was.
fn of_experts(report: &Report, mut notes: Vec<String>) -> Heat {
    notes.push(format!("slots: {}; blank: never asked for", slots(report)));
    let ratio = |(&accesses, &hits): (&u32, &u32)| {
        (accesses > 0).then(|| f64::from(hits) / f64::from(accesses) * 100.0)
    };
    let row = |layer: &LayerReport| {
        layer.expert_accesses.iter().zip(&layer.expert_hits).map(ratio).collect()
    };
    over_experts("Hits of each expert", notes, report, &row, ((0.0, 100.0), "%"))
}

fn uses(report: &Report, notes: Vec<String>) -> Heat {
    let row = |layer: &LayerReport| -> Vec<Option<f64>> {
        let accesses = &layer.expert_accesses;
        let all: u64 = accesses.iter().map(|&uses| u64::from(uses)).sum();
        let times = |uses: u32| f64::from(uses) * accesses.len() as f64 / all.max(1) as f64;
        accesses.iter().map(|&uses| Some(times(uses))).collect()
    };
    let scale = ((0.0, 4.0), "times its even share");
    over_experts("How often each expert is asked for", notes, report, &row, scale)
}

fn over_experts(
    title: &str,
    notes: Vec<String>,
    report: &Report,
    row: &dyn Fn(&LayerReport) -> Vec<Option<f64>>,
    (ends, unit): ((f64, f64), &str),
) -> Heat {
    let layers = || moe_layers(report).map(|layer| (layer, &report.layers[layer]));
    let experts = layers().map(|(_, layer)| layer.expert_accesses.len()).max().unwrap_or(0);
    Heat {
        title: title.to_string(),
        notes,
        row_label: "layer".to_string(),
        column_label: "expert".to_string(),
        columns: (0..experts).map(|expert| expert.to_string()).collect(),
        rows: layers().map(|(index, layer)| (index.to_string(), row(layer))).collect(),
        ends,
        unit: unit.to_string(),
    }
}
