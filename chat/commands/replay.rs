//! `pregate replay`: what a trace would have cost on a machine that need not
//! be here.

pub mod args;
mod compare;
mod line;
mod pictures;
mod room;
mod runs;
mod subject;
mod table;

use crate::{
    exit::Failure,
    output::{self, printable},
    plot::{Chart, heat, svg, terminal},
    save,
};
use args::ReplayArgs;
use compare::Between;
use line::Line;
use runs::{Asked, Run};
use serde::Serialize;
use std::{
    env,
    io::{IsTerminal, stdout},
    path::{Path, PathBuf},
};
pub use subject::check_memory;
use subject::{Model, Subject};

pub fn run(args: &ReplayArgs) -> Result<(), Failure> {
    if args.list {
        return output::line(&args::list());
    }
    check_outputs(args)?;
    let machines = room::machines(args)?;
    let model = args.model.as_deref().map(Model::find).transpose()?;
    let subject = |path: &PathBuf| Subject::new(path, model.as_ref(), args.expert_bytes);
    let subjects = args.traces.iter().map(subject);
    let asked = Asked::new(args, subjects.collect::<Result<_, _>>()?, machines);
    asked.check_predictor()?;
    let between = args.compare.then(|| Between::of(&asked)).transpose()?;
    for subject in asked.subjects.iter().filter_map(Subject::synthetic) {
        eprintln!("note: this trace is synthetic, {}", printable(&subject));
    }
    let runs = runs::all(&asked)?;
    for (trace, subject) in asked.subjects.iter().enumerate() {
        // All runs of a trace have read the same file.
        let of_trace = runs.iter().find(|run| run.job.trace == trace);
        if let Some(notice) = of_trace.and_then(|run| run.notice.as_deref()) {
            eprintln!("warning: {}: {notice}", output::printable(&subject.name));
        }
    }
    let all: Vec<&Run> = runs.iter().collect();
    // Pictures first: a reader of the table may close the pipe.
    let drawn = draw(args, &asked, &all);
    match (args.json, between) {
        (true, Some(between)) => between.lines(&asked, &all).iter().try_for_each(object)?,
        (true, None) => runs.iter().try_for_each(|run| object(&Line::new(&asked, run)))?,
        (false, _) => output::line(text(&asked, &runs, between).trim_end())?,
    }
    drawn
}

/// Writes the pictures that were asked for.
fn draw(args: &ReplayArgs, asked: &Asked, runs: &[&Run]) -> Result<(), Failure> {
    if let Some(path) = &args.plot {
        write(path, &svg::draw(&[pictures::hits(asked, runs), pictures::speed(asked, runs)]))?;
    }
    if let Some(path) = &args.heatmap {
        write(path, &heat::draw(&pictures::maps(asked, runs)))?;
    }
    Ok(())
}

/// Pictures do not replace what is read, nor each other.
fn check_outputs(args: &ReplayArgs) -> Result<(), Failure> {
    let traces = args.traces.iter().flat_map(|trace| pregate_traces::files(trace));
    let named = args.machine.iter().chain(&args.model).map(PathBuf::from);
    let predictor = args.predictor.as_ref().map(|file| file.path.clone());
    let read: Vec<PathBuf> = traces.chain(named).chain(predictor).collect();
    let outputs = [("--plot", &args.plot), ("--heatmap", &args.heatmap)];
    for (name, path) in outputs.iter().filter_map(|(name, path)| Some((name, path.as_ref()?))) {
        if let Some(read) = read.iter().find(|read| save::is_same_file(read, path)) {
            let read = read.display();
            return Err(Failure::Usage(format!("{name} {}: is read as {read}", path.display())));
        }
        // Better now than behind minutes of replaying.
        save::check_place(path)?;
    }
    let is_one = |(plot, map): (&PathBuf, &PathBuf)| plot == map || save::is_same_file(plot, map);
    match args.plot.as_ref().zip(args.heatmap.as_ref()).is_some_and(is_one) {
        true => Err(Failure::Usage("--plot and --heatmap: two files are needed".to_string())),
        false => Ok(()),
    }
}

/// A line of `--json`.
fn object(line: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(line).map_err(|error| Failure::Internal(error.to_string()))?;
    output::line(&text)
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    save::write_whole(path, |to| to.write_all(text.as_bytes()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

/// Curves of fewer sizes say less than the table.
const LEAST_SIZES: usize = 3;

fn text(asked: &Asked, runs: &[Run], between: Option<Between>) -> String {
    let mut out = String::new();
    for (trace, subject) in asked.subjects.iter().enumerate() {
        out += &table::about_trace(asked, subject);
        let of_trace: Vec<&Run> = runs.iter().filter(|run| run.job.trace == trace).collect();
        if let Some(between) = between {
            out += &format!("\n{}\n", between.table(asked, &of_trace));
        }
        for (index, machine) in asked.machines.iter().enumerate() {
            let here: Vec<&Run> =
                of_trace.iter().copied().filter(|run| run.job.machine == index).collect();
            if between.is_none() {
                let rules = table::rules(&here).map(|rules| format!("rules     {rules}\n"));
                let table = table::of(&here, columns().unwrap_or(usize::MAX));
                let name = printable(&machine.name);
                let note = table::too_large(&here).map(|note| format!("note      {note}\n"));
                let notes = [rules, note].map(Option::unwrap_or_default).concat();
                out += &format!("machine   {name}\n{notes}\n{table}\n");
            }
        }
        if asked.sizes.len() >= LEAST_SIZES {
            out += &curve(&pictures::hits(asked, &of_trace));
        }
    }
    out
}

/// As wide as the terminal, in its colours; plain where nobody looks.
fn curve(chart: &Chart) -> String {
    let width = columns();
    let colour = width.is_some() && env::var_os("NO_COLOR").is_none();
    format!("{}\n", terminal::draw(chart, width.unwrap_or(USUAL_WIDTH), colour))
}

/// Of the terminal; `None`: standard output is none.
fn columns() -> Option<usize> {
    let size = ratatui::crossterm::terminal::size().ok();
    size.filter(|_| stdout().is_terminal()).map(|(columns, _)| usize::from(columns))
}

const USUAL_WIDTH: usize = 80;
