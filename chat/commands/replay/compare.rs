//! Two machines, policies or forecasts side by side.

use super::{
    line::Line,
    runs::{Asked, Run},
    table::{figure, render, slots},
};
use crate::exit::Failure;
use serde::Serialize;

/// What differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    Machines,
    Policies,
    Forecasts,
}

/// Two runs of `--compare --json`.
#[derive(Serialize)]
pub struct Compared<'a> {
    /// "machines", "policies" or "forecasts".
    compared: &'static str,
    /// The second's tok/s over the first's; `null`: nothing was decoded.
    speed: Option<f64>,
    first: Line<'a>,
    second: Line<'a>,
}

fn speed(a: &Run, b: &Run) -> Option<f64> {
    let speeds = [a, b].map(|run| run.report.tok_s);
    speeds.iter().all(|&tok_s| tok_s > 0.0).then(|| speeds[1] / speeds[0])
}

impl Between {
    /// The one thing of which there are two.
    pub fn of(asked: &Asked) -> Result<Self, Failure> {
        let counts = [
            (Between::Machines, asked.machines.len()),
            (Between::Policies, asked.policies.len()),
            (Between::Forecasts, asked.forecasts.len()),
        ];
        let pairs: Vec<Self> =
            counts.iter().filter(|(_, count)| *count == 2).map(|(between, _)| *between).collect();
        match pairs.as_slice() {
            [one] => Ok(*one),
            _ => {
                let [machines, policies, forecasts] = counts.map(|(_, count)| count);
                Err(Failure::Usage(format!(
                    "--compare: two machines, two policies or two forecasts are compared, and one \
                     or more than two of the others; found {machines}, {policies} and {forecasts}: \
                     name two, such as --machine rtx3060-12gb,rtx4090"
                )))
            }
        }
    }

    fn place(self, run: &Run) -> usize {
        match self {
            Between::Machines => run.job.machine,
            Between::Policies => run.job.policy,
            Between::Forecasts => run.job.forecast,
        }
    }

    /// What two runs have in common that are compared.
    fn rest(self, run: &Run) -> [usize; 5] {
        let job = &run.job;
        let mut places = [job.trace, job.size, job.machine, job.policy, job.forecast];
        places[match self {
            Between::Machines => 2,
            Between::Policies => 3,
            Between::Forecasts => 4,
        }] = 0;
        places
    }

    fn names(self, asked: &Asked) -> [String; 2] {
        let names: Vec<String> = match self {
            Between::Machines => {
                asked.machines.iter().map(|machine| machine.name.clone()).collect()
            }
            Between::Policies => asked.policies.clone(),
            Between::Forecasts => asked.forecasts.clone(),
        };
        [names[0].clone(), names[1].clone()]
    }

    /// Runs that differ in nothing else.
    fn pairs<'a>(self, runs: &[&'a Run]) -> Vec<(&'a Run, &'a Run)> {
        let of = |place: usize| runs.iter().copied().filter(move |run| self.place(run) == place);
        let pair = |a: &'a Run| Some((a, of(1).find(|b| self.rest(b) == self.rest(a))?));
        of(0).filter_map(pair).collect()
    }

    /// An object for each pair.
    pub fn lines<'a>(self, asked: &'a Asked, runs: &[&'a Run]) -> Vec<Compared<'a>> {
        let compared = |(a, b): (&'a Run, &'a Run)| Compared {
            compared: match self {
                Between::Machines => "machines",
                Between::Policies => "policies",
                Between::Forecasts => "forecasts",
            },
            speed: speed(a, b),
            first: Line::new(asked, a),
            second: Line::new(asked, b),
        };
        self.pairs(runs).into_iter().map(compared).collect()
    }

    /// A row for each pair: speed and its ratio, hits, bytes.
    pub fn table(self, asked: &Asked, runs: &[&Run]) -> String {
        let pairs = self.pairs(runs);
        let column = |name: &str, cell: &dyn Fn(&Run, &Run) -> String| {
            (name.to_string(), pairs.iter().map(|(a, b)| cell(a, b)).collect::<Vec<_>>())
        };
        let mut columns = vec![column("slots", &|a, b| {
            let [a, b] = [a, b].map(|run| slots(&run.report));
            if a == b { a } else { format!("{a} / {b}") }
        })];
        if self != Between::Machines && asked.machines.len() > 1 {
            columns.push(column("machine", &|a, _| a.report.machine.clone()));
        }
        if self != Between::Policies {
            columns.push(column("policy", &|a, _| a.report.policy.clone()));
        }
        if self != Between::Forecasts {
            columns.push(column("forecast", &|a, _| a.report.forecast.clone()));
        }
        let [first, second] = self.names(asked);
        let mut both = |what: &str, cell: &dyn Fn(&Run) -> String| {
            columns.push(column(&format!("{first} {what}"), &|a, _| cell(a)));
            columns.push(column(&format!("{second} {what}"), &|_, b| cell(b)));
        };
        both("tok/s", &|run| figure(run.report.tok_s));
        both("hits %", &|run| format!("{:.1}", run.report.hit_ratio * 100.0));
        both("MB/token", &|run| figure(run.report.bytes_per_token / 1e6));
        let ratio =
            |a: &Run, b: &Run| speed(a, b).map_or("-".to_string(), |speed| format!("{speed:.2}"));
        columns.push(column("speed, second / first", &ratio));
        render(columns)
    }
}
