//! The ledger as text, at most 100 columns wide.

use super::{Recall, Report, Rule, Traffic};
use crate::output::bytes;

/// Guesses from farther ahead have no column.
const FARTHEST: usize = 4;

impl Report {
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        self.recall_by_layer(&mut lines);
        self.recall_by_distance(&mut lines);
        self.traffic(&mut lines);
        let link = &self.link;
        let speed = link.gb_s.map_or(String::new(), |gb_s| format!(", {gb_s:.2} GB/s"));
        lines.push(format!(
            "link: {} in {:.1} ms{speed}; idle for {:.1} ms",
            bytes(link.bytes),
            link.busy_ms,
            link.idle_ms
        ));
        let rules = self.eviction.iter().map(|Rule { rule, layers }| format!("{layers} by {rule}"));
        let rules: Vec<String> = rules.collect();
        if !rules.is_empty() {
            lines.push(format!("eviction, layers: {}", rules.join(", ")));
        }
        lines.extend(self.notes.iter().map(|note| format!("note: {note}")));
        lines
    }

    /// Forecasts that were judged at all.
    fn judged(&self) -> Vec<&'static str> {
        let judged = |name: &&&str| self.totals.iter().any(|row| row.forecast == **name);
        self.columns.iter().filter(judged).copied().collect()
    }

    /// The guess that was made nearest before the layer, if there is one, else
    /// that about the next token.
    fn nearest(&self, forecast: &str, layer: Option<usize>) -> Option<&Recall> {
        let rows = if layer.is_some() { &self.forecasts } else { &self.totals };
        rows.iter()
            .filter(|row| row.forecast == forecast && row.layer == layer)
            .min_by_key(|row| (row.ahead == 0, row.ahead))
    }

    fn recall_by_layer(&self, lines: &mut Vec<String>) {
        let columns = self.judged();
        if columns.is_empty() {
            lines.push("forecasts: none was judged".to_string());
            return;
        }
        lines.push(
            "forecasts: slot recall in %, one layer ahead (own-gate, control: the layer's own \
             router)"
                .to_string(),
        );
        let mut head = "layer".to_string();
        columns.iter().for_each(|name| head.push_str(&format!(" {:>8}", short(name))));
        lines.push(head);
        let mut layers: Vec<usize> = self.forecasts.iter().filter_map(|row| row.layer).collect();
        layers.dedup();
        for layer in layers.into_iter().map(Some).chain([None]) {
            let mut line = label(layer);
            for name in &columns {
                let recall = self.nearest(name, layer).and_then(|row| row.slot_recall);
                line.push_str(&format!(" {:>8}", percent(recall)));
            }
            lines.push(line);
        }
    }

    fn recall_by_distance(&self, lines: &mut Vec<String>) {
        let most = self.totals.iter().map(|row| row.ahead).max().unwrap_or(0);
        let distances = 0..=most.min(FARTHEST);
        if self.totals.is_empty() {
            return;
        }
        lines.push("slot recall in % by layers ahead; whole sets and gate mass one ahead".into());
        let mut head = format!("{:<18}", "forecast");
        for ahead in distances.clone() {
            let name = if ahead == 0 { "next token".to_string() } else { format!("+{ahead}") };
            head.push_str(&format!(" {name:>10}"));
        }
        lines.push(format!("{head} {:>10} {:>10}", "whole set", "gate mass"));
        for name in self.judged() {
            let mut line = format!("{name:<18}");
            for ahead in distances.clone() {
                let row = self.totals.iter().find(|row| row.forecast == name && row.ahead == ahead);
                let recall = row.and_then(|row| row.slot_recall);
                line.push_str(&format!(" {:>10}", percent(recall)));
            }
            let nearest = self.nearest(name, None);
            let whole = percent(nearest.and_then(|row| row.whole_set_rate));
            let mass = percent(nearest.and_then(|row| row.gate_mass_recall));
            lines.push(format!("{line} {whole:>10} {mass:>10}"));
        }
    }

    fn traffic(&self, lines: &mut Vec<String>) {
        lines.push(
            "read ahead: times in ms, saved and lost as estimated, stalls as measured".into(),
        );
        lines.push(format!(
            "layer {:>7} {:>9} {:>10} {:>10} {:>9} {:>9} {:>9}  now",
            "issued", "precision", "useful", "wasted", "saved", "lost", "stalled"
        ));
        lines.extend(self.traffic.iter().chain([&self.traffic_total]).map(traffic_line));
        if self.kept_total.issued > 0 {
            lines.push("computed by the CPU and copied for later by an idle link".into());
            lines.extend(self.kept.iter().chain([&self.kept_total]).map(traffic_line));
        }
    }
}

fn traffic_line(row: &Traffic) -> String {
    let state = match (row.on, row.switched_off) {
        (None, 0) => String::new(),
        (None, times) => format!("  switched off {times} times"),
        (Some(on), times) => {
            let state = if on { "on" } else { "off" };
            if times == 0 { format!("  {state}") } else { format!("  {state}, {times}x off") }
        }
    };
    format!(
        "{} {:>7} {:>9} {:>10} {:>10} {:>9.1} {:>9.1} {:>9.1}{state}",
        label(row.layer),
        row.issued,
        percent(row.precision),
        bytes(row.useful_bytes),
        bytes(row.wasted_bytes),
        row.saved_ms,
        row.lost_ms,
        row.stall_ms,
    )
}

fn label(layer: Option<usize>) -> String {
    layer.map_or_else(|| format!("{:<5}", "all"), |layer| format!("{layer:>5}"))
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_string(), |share| format!("{:.1}", share * 100.0))
}

/// At most eight columns.
fn short(forecast: &str) -> &str {
    match forecast {
        "previous-token" => "previous",
        "frequency" => "frequent",
        "transition" => "transit.",
        "naive-bayes" => "bayes",
        "stale-gate" => "stale",
        "stale-gate-shared" => "stale+sh",
        other => other.get(..8).unwrap_or(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::LinkUse;

    fn recall(forecast: &'static str, layer: Option<usize>, ahead: usize, share: f64) -> Recall {
        let share = Some(share);
        Recall {
            forecast,
            layer,
            ahead,
            guesses: 9,
            slot_recall: share,
            whole_set_rate: share,
            gate_mass_recall: share,
        }
    }

    fn report() -> Report {
        let columns = vec![
            "previous-token",
            "frequency",
            "transition",
            "naive-bayes",
            "token",
            "stale-gate",
            "stale-gate-shared",
            "own-gate",
            "control",
            "blend",
        ];
        let both = |layer| {
            let near = columns.iter().map(move |name| recall(name, layer, 1, 0.75));
            near.chain([recall("blend", layer, 0, 0.5), recall("control", layer, 0, 1.0)])
        };
        let traffic = Traffic {
            layer: Some(47),
            issued: 1_234_567,
            issued_bytes: 0,
            precision: Some(1.0),
            useful_bytes: 999_900_000_000,
            wasted_bytes: 999_900_000_000,
            saved_ms: 999_999.9,
            lost_ms: 999_999.9,
            stall_ms: 999_999.9,
            on: Some(false),
            switched_off: 12,
        };
        Report {
            forecasts: both(Some(47)).collect(),
            totals: both(None).collect(),
            columns: columns.clone(),
            traffic_total: Traffic { layer: None, on: None, ..traffic.clone() },
            kept_total: Traffic { layer: None, on: None, ..traffic.clone() },
            kept: vec![traffic.clone()],
            traffic: vec![traffic],
            link: LinkUse { bytes: 1_000_000, busy_ms: 1.0, idle_ms: 2.5, gb_s: Some(1.0) },
            eviction: ["value with tables of this model", "value", "frequency", "recency"]
                .map(|rule| Rule { rule, layers: 24 })
                .to_vec(),
            notes: vec!["something".to_string()],
        }
    }

    #[test]
    fn the_widest_tables_fit_a_terminal() {
        let lines = report().lines();
        for line in &lines {
            assert!(line.chars().count() <= 100, "{}: {line}", line.chars().count());
        }
        let text = lines.join("\n");
        assert!(text.contains("copied for later by an idle link\n   47"), "{text}");
        assert!(text.contains("eviction, layers: 24 by value with tables of this model, 24 by"));
        for part in ["   47     75.0", "off, 12x off", "+1", "note: something", "idle for 2.5 ms"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        // Guesses about the next token have a column of their own.
        assert!(text.contains("blend                    50.0       75.0"), "{text}");
    }

    #[test]
    fn a_run_without_forecasts_has_no_tables_of_them() {
        let report = Report { columns: vec![], forecasts: vec![], totals: vec![], ..report() };
        let text = report.lines().join("\n");
        assert!(text.starts_with("forecasts: none was judged\nread ahead"), "{text}");
    }
}
