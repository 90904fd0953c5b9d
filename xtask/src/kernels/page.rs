//! The text of `docs/kernels.md`.

use super::{
    limits::{CARDS, Card, LATENCY_S, Launch, Multiprocessor, Predicted, RAMP_S, REACHABLE},
    shapes::{self, Cut, Model, POSITIONS, Step},
};
use crate::ptx::{Kernel, TARGETS, Table};
use std::fmt::Write;

const HEAD: &str = "\
# CUDA kernels

Written by `cargo xtask kernels` from `kernels/ptx/ptxas.toml` and the shapes in `xtask/src/kernels/shapes.rs`; `.ci/run` compares. **Nothing here was measured: no kernel has run on a GPU yet.** `cargo xtask gpu-check` packs what measures them on one, beside what that device reaches at best.
";

/// Errors, in words: a step's kernel is not in the table.
pub fn text(table: &Table) -> Result<String, String> {
    let mut out = HEAD.to_string();
    out += &model_of_time();
    out += "\n## Steps of a token\n\n";
    let _ = writeln!(
        out,
        "One token at a time, {POSITIONS} positions of context, one launch of each step. MB is what \
         a launch must move (powers of ten). Per card: predicted share of its specified bandwidth, \
         and microseconds.\n"
    );
    for model in shapes::models() {
        out += &steps(table, &model)?;
    }
    out += &every_kernel(table);
    Ok(out)
}

fn model_of_time() -> String {
    let mut out = String::from("\n## The model of time\n\n");
    let _ = writeln!(
        out,
        "Little's law: memory of bandwidth B that answers after a latency L is busy while L x B \
         bytes are asked for. A launch has `resident blocks x threads x bytes in flight of a \
         thread` of them; where that is less, it is so much slower. Bytes in flight: what a thread \
         stages in shared memory before it computes counts half (it asks during half of the time); \
         of two stages, one counts. Resident blocks follow from registers, shared memory and the \
         limits of the architecture (CUDA C++ Programming Guide). Assumed: L = {:.0} ns on a busy \
         device (idle, others measured 400 to 700), {:.0} % of the specified bandwidth is \
         reachable (others measured 91 to 92 % on an RTX 4090), and {:.1} us pass from one \
         launch's end until the next one's loads flow. Time = bytes / (reachable B x share in \
         flight) + that. Arithmetic is taken to hide behind the loads.\n",
        LATENCY_S * 1e9,
        REACHABLE * 100.0,
        RAMP_S * 1e6
    );
    out +=
        "| card | | multiprocessors | GB/s | bytes that a multiprocessor must have in flight |\n";
    out += "|---|---|---:|---:|---:|\n";
    for card in CARDS {
        let needed = LATENCY_S * card.gb_s * 1e9 * REACHABLE / f64::from(card.multiprocessors);
        let Card { name, sm, multiprocessors, gb_s } = card;
        let _ = writeln!(out, "| {name} | sm_{sm} | {multiprocessors} | {gb_s:.0} | {needed:.0} |");
    }
    out
}

fn steps(table: &Table, model: &Model) -> Result<String, String> {
    let mut out = format!("### {}\n\n| step | kernel | launches | MB |", model.name);
    CARDS.iter().for_each(|card| out += &format!(" {} |", card.name));
    out += "\n|---|---|---:|---:|";
    out += &"---:|".repeat(CARDS.len());
    out.push('\n');
    let mut totals = [0.0; CARDS.len()];
    let mut total_bytes = 0;
    for step in &model.steps {
        let bytes = step.work.bytes();
        total_bytes += bytes * step.times;
        let mut kernels: Vec<String> = Vec::new();
        let mut cells = String::new();
        for (card, total) in CARDS.into_iter().zip(&mut totals) {
            let cut = step.work.cut(u64::from(card.multiprocessors));
            let Predicted { seconds, share } = predicted(table, card, step, &cut)?;
            *total += seconds * step.times as f64;
            let _ = write!(cells, " {:.0} %, {:.1} |", share * 100.0, seconds * 1e6);
            if !kernels.contains(&cut.kernel) {
                kernels.push(cut.kernel);
            }
        }
        let (what, times) = (step.what, step.times);
        let kernels = kernels.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let _ =
            writeln!(out, "| {what} | {kernels} | {times} | {:.2} |{cells}", bytes as f64 / 1e6);
    }
    let _ =
        write!(out, "| all, if every expert is resident | | | {:.0} |", total_bytes as f64 / 1e6);
    for (card, seconds) in CARDS.iter().zip(totals) {
        let share = total_bytes as f64 / seconds / (card.gb_s * 1e9);
        let _ = write!(out, " {:.0} %, {:.0} |", share * 100.0, seconds * 1e6);
    }
    out += "\n\n";
    Ok(out)
}

fn predicted(table: &Table, card: Card, step: &Step, cut: &Cut) -> Result<Predicted, String> {
    let named = |(file, name, _): &(&str, &str, &Kernel)| *file == cut.file && *name == cut.kernel;
    let (_, _, kernel) = table
        .kernels()
        .find(named)
        .ok_or(format!("{}/{} of step {} is not in the table", cut.file, cut.kernel, step.what))?;
    let at = target(card.sm);
    let launch = Launch {
        blocks: cut.blocks,
        threads: cut.threads,
        registers: kernel.registers[at],
        shared_bytes: kernel.shared[at] + cut.dynamic_shared_bytes,
        in_flight: cut.in_flight,
        bytes: step.work.bytes(),
    };
    card.predict(launch).ok_or(format!("{} does not fit {}", cut.kernel, card.name))
}

fn target(sm: u32) -> usize {
    TARGETS.iter().position(|target| target.sm == sm).expect("cards are of the targets")
}

fn every_kernel(table: &Table) -> String {
    let mut out = String::from("## Every kernel\n\n");
    out += "As ptxas says, for sm_75, sm_80, sm_86, sm_89, sm_90, sm_120 (one number where all are \
            equal): registers of a thread, static shared bytes and local bytes; then resident \
            blocks of the largest size that the kernel allows, without dynamic shared memory, and \
            the share of the multiprocessor's warps that is. Each source says what its kernels move. \
            No kernel spills a register.\n\n";
    out += "| kernel | threads | registers | shared | local | blocks | warps |\n";
    out += "|---|---:|---|---|---|---|---|\n";
    let mut file_before = "";
    for (file, name, kernel) in table.kernels() {
        if file != file_before {
            let _ = writeln!(out, "| **{file}.cu** | | | | | | |");
            file_before = file;
        }
        let threads = kernel.threads.unwrap_or(1024);
        let resident = std::array::from_fn(|at| {
            let sm = Multiprocessor::of(TARGETS[at].sm).expect("targets are known");
            let blocks = sm.resident(threads, kernel.registers[at], kernel.shared[at]);
            (blocks, blocks * threads.div_ceil(32) * 100 / sm.warps)
        });
        let _ = writeln!(
            out,
            "| `{name}` | {} | {} | {} | {} | {} | {} |",
            kernel.threads.map_or("any".to_string(), |threads| threads.to_string()),
            numbers(kernel.registers, ""),
            numbers(kernel.shared, ""),
            numbers(kernel.stack, ""),
            numbers(resident.map(|(blocks, _)| blocks), ""),
            numbers(resident.map(|(_, share)| share), " %"),
        );
    }
    out
}

/// One number if all are equal, else all of them.
fn numbers(all: [u32; TARGETS.len()], unit: &str) -> String {
    match all.iter().all(|number| *number == all[0]) {
        true => format!("{}{unit}", all[0]),
        false => all.map(|number| number.to_string()).join(" ") + unit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_names_a_kernel_of_the_table() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let table = std::fs::read_to_string(root.join(crate::ptx::TABLE)).unwrap();
        let page = text(&Table::parse(&table).unwrap()).unwrap();
        for words in ["Qwen3-30B-A3B", "RTX 4090", "| `probe_copy` |", "Little's law"] {
            assert!(page.contains(words), "{words}");
        }
        assert_eq!(text(&Table::default()).unwrap_err().matches("is not in the table").count(), 1);
    }

    #[test]
    fn equal_numbers_are_said_once() {
        assert_eq!(numbers([7; 6], " %"), "7 %");
        assert_eq!(numbers([1, 2, 2, 2, 2, 3], ""), "1 2 2 2 2 3");
    }
}
