//! What people read: a header for each trace and machine, and a row for each
//! setting.

use super::{
    line::wire,
    runs::{Asked, Run},
    subject::Subject,
};
use crate::{output::printable, streaming};
use pregate_traces::replay::{Cause, Report, Warm};
use std::fmt::Write;
use unicode_width::UnicodeWidthStr;

/// What is said of a trace before its figures.
pub fn about_trace(asked: &Asked, subject: &Subject) -> String {
    let model = match subject.header.model.as_str() {
        "" => "unnamed model",
        name => name,
    };
    let counted = match asked.warm(subject) {
        Warm::Cold => "cold: from the first token on".to_string(),
        Warm::Tokens(tokens) => format!("warm: behind the first {tokens} tokens"),
        Warm::Whole => "warm: behind one replay of the whole trace".to_string(),
    };
    let mut out = String::new();
    let mut add = |label: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{label:<9} {}", printable(value));
    };
    add("trace", &format!("{}, {}", subject.name, subject.provenance()));
    add("model", &format!("{model}: {}, {} tokens", subject.shape_words(), subject.tokens));
    add("weights", &subject.weights.line(&subject.header));
    add("counted", &counted);
    if let Some(trained) = &asked.predictor {
        add("predictor", &streaming::predictor_words(trained, &asked.forecasts, &asked.policies));
    }
    out
}

/// A column: its name, and its cell for a report; `None` is left blank.
type Column = (&'static str, fn(&Report) -> Option<String>);

const COLUMNS: [Column; 21] = [
    ("slots", |report| Some(slots(report))),
    ("policy", |report| Some(report.policy.clone())),
    ("forecast", |report| Some(report.forecast.clone())),
    ("hits %", |report| Some(percent(report.hits, report.accesses))),
    ("LRU %", |report| Some(percent(report.bracket?.lru_hits, report.accesses))),
    ("Belady %", |report| Some(percent(report.bracket?.belady_hits, report.accesses))),
    ("best %", |report| Some(percent(report.bracket?.best_hits, report.accesses))),
    ("of gap %", gap),
    ("misses", |report| Some(report.misses.to_string())),
    ("MB/token", |report| Some(figure(report.bytes_per_token / 1e6))),
    ("wait ms/token", |report| Some(figure(ms(report.decode.stall.total_ns(), report)))),
    ("demand", |report| stalled(report, Cause::Demand)),
    ("behind", |report| stalled(report, Cause::BehindReadAhead)),
    ("late", |report| stalled(report, Cause::LateReadAhead)),
    ("CPU", |report| stalled(report, Cause::Cpu)),
    ("visits", |report| stalled(report, Cause::Visits)),
    ("ms/token", |report| Some(figure(report.tpot.median_ns as f64 / 1e6))),
    ("p95", |report| Some(figure(report.tpot.p95_ns as f64 / 1e6))),
    ("TTFT ms", |report| Some(figure(report.ttft?.median_ns as f64 / 1e6))),
    ("tok/s", |report| Some(figure(report.tok_s))),
    ("bound", |report| {
        let bound = &report.bound;
        Some(format!("{} {}", figure(bound.tok_s), wire(bound.wire)))
    }),
];

/// How many of [`COLUMNS`] name the row, and how many of the others are about
/// hits; the rest is about time.
const NAMES: usize = 3;
const HITS: usize = 7;

/// Columns whose text begins at the left.
const LEFT: [&str; 4] = ["slots", "policy", "forecast", "bound"];

/// "8 of 32"
pub fn slots(report: &Report) -> String {
    let most = report.layers.iter().map(|layer| layer.expert_accesses.len()).max().unwrap_or(0);
    format!("{} of {most}", report.slots_per_layer)
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.1}", part as f64 / whole.max(1) as f64 * 100.0)
}

/// Three digits or a little more.
pub fn figure(value: f64) -> String {
    match value {
        _ if value >= 99.95 => format!("{value:.0}"),
        _ if value >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// How much of the way from LRU to the best; of a short way it means nothing.
fn gap(report: &Report) -> Option<String> {
    let bracket = report.bracket?;
    let gap = bracket.best_hits.saturating_sub(bracket.lru_hits);
    let is_wide = gap as f64 >= LEAST_GAP * report.accesses as f64;
    let cell = |closed: f64| match closed < 0.0 {
        true => "below LRU".to_string(),
        false => format!("{:.0}", closed * 100.0),
    };
    bracket.closed().filter(|_| is_wide).map(cell)
}

/// Of the accesses.
const LEAST_GAP: f64 = 0.005;

/// Of a decoded token.
fn ms(ns: u64, report: &Report) -> f64 {
    ns as f64 / 1e6 / report.decode.tokens.max(1) as f64
}

fn stalled(report: &Report, cause: Cause) -> Option<String> {
    let (_, ns) = report.decode.stall.causes().into_iter().find(|(found, _)| *found == cause)?;
    (ns > 0).then(|| figure(ms(ns, report)))
}

/// One row for each report; columns that are blank everywhere are left out,
/// and so are names that are the same for all (see [`rules`]). What is wider
/// than `width` becomes two tables, hits and times.
pub fn of(runs: &[&Run], width: usize) -> String {
    let cells = |column: &Column| -> Option<(String, Vec<String>)> {
        let cells: Vec<Option<String>> = runs.iter().map(|run| column.1(&run.report)).collect();
        let some = cells.iter().any(Option::is_some);
        let cells = cells.into_iter().map(Option::unwrap_or_default).collect();
        some.then_some((column.0.to_string(), cells))
    };
    let told = usize::from(rules(runs).is_some()) * (NAMES - 1);
    let names: Vec<_> = COLUMNS[..NAMES - told].iter().filter_map(cells).collect();
    let [hits, times] = [&COLUMNS[NAMES..NAMES + HITS], &COLUMNS[NAMES + HITS..]]
        .map(|part| part.iter().filter_map(cells).collect::<Vec<_>>());
    let one = render([names.clone(), hits.clone(), times.clone()].concat());
    match one.lines().all(|line| line.width() <= width) {
        true => one,
        false => {
            let [hits, times] = [hits, times].map(|part| render([names.clone(), part].concat()));
            format!("{hits}\n{times}")
        }
    }
}

/// Policy and forecast in words, where they are the same for all.
pub fn rules(runs: &[&Run]) -> Option<String> {
    let of = |run: &Run| (run.report.policy.clone(), run.report.forecast.clone());
    let (policy, forecast) = of(runs.first()?);
    let same = runs.iter().all(|run| of(run) == (policy.clone(), forecast.clone()));
    same.then(|| format!("policy {policy}, forecast {forecast}"))
}

/// What is said of settings that the machine has no memory for.
pub fn too_large(runs: &[&Run]) -> Option<String> {
    let (least, most) = runs
        .iter()
        .filter(|run| !run.fits())
        .map(|run| (run.report.slots_per_layer, run.job.most))
        .min()?;
    let what = if most == 0 { "no token's experts".to_string() } else { format!("{most}") };
    Some(format!(
        "from {least} slots a layer on they do not fit this machine, which has memory for {what}"
    ))
}

/// Columns side by side; names of others are made [`printable`].
pub fn render(columns: Vec<(String, Vec<String>)>) -> String {
    let plain = |(name, cells): (String, Vec<String>)| {
        (printable(&name), cells.iter().map(|cell| printable(cell)).collect::<Vec<_>>())
    };
    let columns: Vec<_> = columns.into_iter().map(plain).collect();
    let rows = columns.iter().map(|(_, cells)| cells.len()).max().unwrap_or(0);
    let mut lines = vec![String::new(); rows + 1];
    for (name, cells) in &columns {
        let widths = cells.iter().map(|cell| cell.width()).chain([name.width()]);
        let width = widths.max().unwrap_or(0);
        let empty = String::new();
        for (row, line) in lines.iter_mut().enumerate() {
            let text = if row == 0 { name } else { cells.get(row - 1).unwrap_or(&empty) };
            let fill = " ".repeat(width - text.width());
            if !line.is_empty() {
                line.push_str("  ");
            }
            match LEFT.contains(&name.as_str()) {
                true => *line += &format!("{text}{fill}"),
                false => *line += &format!("{fill}{text}"),
            }
        }
    }
    lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_figures_short() {
        let column = |name: &str, cells: &[&str]| {
            (name.to_string(), cells.iter().map(|cell| cell.to_string()).collect())
        };
        let text =
            render(vec![column("policy", &["lru", "äöü"]), column("tok/s", &["1.00", "123456"])]);
        assert_eq!(text, "policy   tok/s\nlru       1.00\näöü     123456\n");
        let hostile = render(vec![column("a\x1b[2J", &["\u{9b}2J"])]);
        assert!(hostile.chars().all(|c| c == '\n' || !c.is_control()), "{hostile:?}");
        assert_eq!(
            [0.0, 9.99, 9.996, 99.94, 99.96].map(figure),
            ["0.00", "9.99", "10.0", "99.9", "100"]
        );
    }
}
