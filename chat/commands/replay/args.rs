//! What `pregate replay` can be asked.

use crate::{
    size::absolute,
    streaming::{Predictor, horizon, predictor},
};
use clap::{
    Args,
    builder::{PossibleValue, PossibleValuesParser},
};
use pregate_predictor::{
    forecast::{self, LEARNED, LEARNED_USEFUL},
    policy,
};
use pregate_traces::{
    MAX_EXPERT_BYTES,
    replay::{LEAST_RATE, Slots, models, presets},
};
use std::{path::PathBuf, str::FromStr};

pub const HELP: &str = "Examples:
  pregate replay trace.json --machine rtx3060-12gb,rtx4090
  pregate replay mine.pgtrace --machine rtx4070 --policy all --slots 10%,25%,50%
  pregate replay trace.json --slots 25% --policy lru --forecast none --json | jq .hits
  pregate replay trace.json --machine rtx3060-12gb,rtx5090 --compare
  pregate replay trace.json --policy lru,forecast-aware --plot hits.svg --heatmap layers.svg
  pregate replay mine.pgtrace --predictor model.pgpredict --forecast none,blend --compare
  pregate doctor --machine-file here.toml && pregate replay trace.json --machine here.toml

A trace is what a model's routers chose, token by token: a file of --record, or an rtrace-1
manifest (.json). The runtime's own planner, policy and forecasts go through it on a machine and
a clock that are simulated, so nothing of the model is needed but the sizes of its experts.

hits: experts that were in a slot when their router asked. Beside them what LRU and Belady's rule
(which knows the future) hit in the same slots, each layer its own, taking every miss in; best: the
most that any rule could hit that may share slots between layers, as this policy does or does not,
and may leave a miss out; and how much of the way from LRU to that this policy went (below LRU: none
of it). Where a GPU shares its misses with the processor, an expert that the processor computed
comes to a slot only where its copy pays, so hits may lie below LRU's and tokens come sooner. waits: for what was asked for
(demand), behind what was read ahead, for that coming late, for the processor, and for host and
GPU to hear of each other. bound: what the slowest wire of the machine allows with the bytes that
these hits leave it. Everything is counted cold, from the first token on, unless --warm says
otherwise; with --warm=whole policies and forecasts that remember have seen the very tokens that are
counted, so their hits are higher than those of a chat that goes on.";

#[derive(Clone, Debug, Args)]
pub struct ReplayArgs {
    /// Traces: files of --record, or rtrace-1 manifests (.json)
    #[arg(value_name = "TRACE", required_unless_present = "list")]
    pub traces: Vec<PathBuf>,
    /// The model, for the sizes of its experts: a .gguf file, a folder, or a name (--list)
    /// [default: what the trace says, else the model that it names]
    #[arg(short, long, value_name = "FILE|NAME")]
    pub model: Option<String>,
    /// Of each expert, instead of what the model or the trace says; for traces of models that have
    /// no name here
    #[arg(long, value_name = "SIZE", value_parser = expert_size)]
    pub expert_bytes: Option<u64>,
    /// Machines: names (--list), or .toml files as `pregate doctor --machine-file` writes
    /// [default: cpu-ddr5]
    #[arg(long, value_name = "NAME|FILE", value_delimiter = ',')]
    pub machine: Vec<String>,
    /// Instead of the machine's memory on the GPU, less what others take of it
    #[arg(long, value_name = "SIZE", value_parser = absolute)]
    pub vram: Option<u64>,
    /// Instead of the machine's memory, less what others take of it
    #[arg(long, value_name = "SIZE", value_parser = absolute)]
    pub ram: Option<u64>,
    /// Instead of the machine's disk, GB/s
    #[arg(long, value_name = "GB_S", value_parser = rate)]
    pub disk: Option<f64>,
    /// Experts of each layer that are kept: a share, a number, or `fit`: as many as the machine
    /// has room for [default: fit where a machine is named, else 10%,25%,50%]
    #[arg(long, value_name = "SHARES", value_delimiter = ',')]
    pub slots: Vec<SlotsArg>,
    /// Tokens that the KV cache holds, beside which slots have to fit; half of it is read for a
    /// token
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = positions)]
    pub context: u64,
    /// Which expert leaves its slot for another; several, or `all`
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = policy::DEFAULT,
        value_parser = PossibleValuesParser::new(policy::NAMES.into_iter().chain(["all"]))
    )]
    pub policy: Vec<String>,
    /// What says which experts to read ahead; several, or `all`
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "blend",
        value_parser = PossibleValuesParser::new(forecast_values())
    )]
    pub forecast: Vec<String>,
    /// Layers that forecasts look ahead, as run --horizon
    #[arg(long, value_name = "N", default_value_t = forecast::HORIZON, value_parser = horizon)]
    pub horizon: usize,
    /// Forecasts that were trained (pregate train-predictor); they join the blend and have names of
    /// their own
    #[arg(long, value_name = "FILE", value_parser = predictor)]
    pub predictor: Option<Predictor>,
    /// The first tokens only warm caches and forecasts; `whole`: all of them do, and are replayed
    /// once more, which flatters what remembers them [default of --warm alone: a tenth of the trace]
    #[arg(
        long,
        value_name = "TOKENS|whole",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "tenth",
        conflicts_with = "cold"
    )]
    pub warm: Option<WarmArg>,
    /// Count from the first token on [the default]
    #[arg(long)]
    pub cold: bool,
    /// One JSON object per line and setting on standard output
    #[arg(long)]
    pub json: bool,
    /// Write the curve of hits and speed over slots; without --slots over eight sizes
    #[arg(long, value_name = "OUT.svg")]
    pub plot: Option<PathBuf>,
    /// Write the hits of each layer over slots; of a single size the hits of each expert, and how
    /// often it is asked for
    #[arg(long, value_name = "OUT.svg")]
    pub heatmap: Option<PathBuf>,
    /// Two machines, policies or forecasts side by side; with --json an object for each pair
    #[arg(long)]
    pub compare: bool,
    /// The names of machines, models, policies and forecasts
    #[arg(long)]
    pub list: bool,
}

/// One of `--slots`.
#[derive(Clone, Debug, PartialEq)]
pub enum SlotsArg {
    Of(Slots),
    /// What the machine has room for.
    Fit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarmArg {
    Tokens(u64),
    Tenth,
    Whole,
}

/// Of a curve that nobody chose sizes for, in percent.
const CURVE: [f64; 8] = [6.25, 12.5, 18.75, 25.0, 37.5, 50.0, 62.5, 75.0];
const USUAL: [f64; 3] = [10.0, 25.0, 50.0];

impl ReplayArgs {
    /// The sizes that are replayed.
    pub fn sizes(&self) -> Vec<SlotsArg> {
        let shares = |percents: &[f64]| {
            percents.iter().map(|percent| SlotsArg::Of(Slots::Share(percent / 100.0))).collect()
        };
        let about_machine = !self.machine.is_empty() || self.vram.is_some() || self.ram.is_some();
        match (self.slots.is_empty(), self.plot.is_some(), about_machine) {
            (false, _, _) => self.slots.clone(),
            (true, true, _) => shares(&CURVE),
            (true, false, true) => vec![SlotsArg::Fit],
            (true, false, false) => shares(&USUAL),
        }
    }

    pub fn policies(&self) -> Vec<String> {
        chosen(&self.policy, policy::NAMES.into_iter())
    }

    pub fn forecasts(&self) -> Vec<String> {
        let learned = LEARNED.into_iter().take(LEARNED_USEFUL);
        let learned = learned.filter(|_| self.predictor.is_some());
        chosen(&self.forecast, forecasts().chain(learned))
    }
}

/// What `all` stands for, and each name once.
fn chosen(asked: &[String], all: impl Iterator<Item = &'static str>) -> Vec<String> {
    let mut names: Vec<String> = match asked.iter().any(|name| name == "all") {
        true => all.map(str::to_string).collect(),
        false => asked.to_vec(),
    };
    let mut seen = std::collections::HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

/// Those that may be of use.
fn forecasts() -> impl Iterator<Item = &'static str> {
    ["none", "blend"].into_iter().chain(forecast::NAMES.into_iter().take(forecast::USEFUL))
}

/// Those that are wrong on purpose are for tests: taken, and not shown.
fn forecast_values() -> Vec<PossibleValue> {
    let shown = forecasts().chain(["all"]).map(PossibleValue::new);
    let wrong = forecast::NAMES.into_iter().skip(forecast::USEFUL).chain(LEARNED);
    shown.chain(wrong.map(|name| PossibleValue::new(name).hide(true))).collect()
}

/// Everything that has a name, for `--list`.
pub fn list() -> String {
    let join = |names: Vec<&str>| names.join(", ");
    format!(
        "machines   {}\nmodels     {}\npolicies   {}\nforecasts  {}",
        join(presets::names().collect()),
        join(models::names().collect()),
        join(policy::NAMES.to_vec()),
        join(forecasts().chain(LEARNED.into_iter().take(LEARNED_USEFUL)).collect()),
    )
}

impl FromStr for SlotsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = || "a share (25%), a number of experts of each layer (8), or fit".to_string();
        let text = text.trim();
        if text == "fit" {
            return Ok(Self::Fit);
        }
        match text.strip_suffix('%') {
            Some(percent) => match percent.trim().parse::<f64>() {
                Ok(percent) if percent > 0.0 && percent <= 100.0 => {
                    Ok(Self::Of(Slots::Share(percent / 100.0)))
                }
                _ => Err(allowed()),
            },
            None => match text.parse::<usize>() {
                Ok(slots) if (1..=usize::from(u16::MAX)).contains(&slots) => {
                    Ok(Self::Of(Slots::Each(slots)))
                }
                _ => Err(allowed()),
            },
        }
    }
}

impl FromStr for WarmArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("tenth", _) => Ok(Self::Tenth),
            ("whole", _) => Ok(Self::Whole),
            (_, Ok(tokens)) => Ok(Self::Tokens(tokens)),
            _ => Err("a number of tokens or `whole` is allowed".to_string()),
        }
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (LEAST_RATE..=1e6).contains(&rate) => Ok(rate),
        _ => Err(format!(
            "a number of GB/s from {LEAST_RATE} on is allowed, with a point as decimal mark"
        )),
    }
}

fn expert_size(text: &str) -> Result<u64, String> {
    match absolute(text)? {
        bytes @ ..=MAX_EXPERT_BYTES => Ok(bytes),
        _ => Err(format!("an expert has {MAX_EXPERT_BYTES} bytes at most")),
    }
}

fn positions(text: &str) -> Result<u64, String> {
    match text.parse::<u64>() {
        Ok(tokens) if (1..=1 << 24).contains(&tokens) => Ok(tokens),
        _ => Err("a whole number from 1 to 16777216 is allowed".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn parse(arguments: &[&str]) -> Result<ReplayArgs, String> {
        let all = ["pregate", "replay"].iter().chain(arguments);
        match Cli::try_parse_from(all).map_err(|error| error.to_string())?.command {
            Some(Command::Replay(args)) => Ok(args),
            _ => Err("another command".to_string()),
        }
    }

    #[test]
    fn sizes_follow_from_what_is_asked() {
        let sizes = |arguments: &[&str]| parse(arguments).unwrap().sizes();
        let of = |percent: f64| SlotsArg::Of(Slots::Share(percent / 100.0));
        assert_eq!(sizes(&["t.json"]), [of(10.0), of(25.0), of(50.0)]);
        assert_eq!(sizes(&["t.json", "--machine", "rtx4090"]), [SlotsArg::Fit]);
        assert_eq!(sizes(&["t.json", "--vram", "8G"]), [SlotsArg::Fit]);
        assert_eq!(sizes(&["t.json", "--machine", "rtx4090", "--plot", "x.svg"]).len(), 8);
        let each = SlotsArg::Of(Slots::Each(8));
        assert_eq!(sizes(&["t.json", "--slots", "8,12.5%,fit"]), [each, of(12.5), SlotsArg::Fit]);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            &["t", "--slots", "0"][..],
            &["t", "--slots", "0%"],
            &["t", "--slots", "101%"],
            &["t", "--slots", "nan%"],
            &["t", "--slots", "99999999999"],
            &["t", "--disk", "0"],
            &["t", "--disk", "1e-4"],
            &["t", "--disk", "inf"],
            &["t", "--context", "0"],
            &["t", "--vram", "50%"],
            &["t", "--expert-bytes", "0"],
            &["t", "--expert-bytes", "900T"],
            &["t", "--policy", "belady"],
            &["t", "--forecast", "oracle"],
            &["t", "--warm=lots"],
            &["t", "--warm", "--cold"],
            &[],
        ] {
            assert!(parse(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(parse(&["--list"]).is_ok());
        let warm = |text: &str| {
            let args = parse(&[text, "t.json"]).unwrap();
            (args.warm, args.traces.len())
        };
        assert_eq!(warm("--warm"), (Some(WarmArg::Tenth), 1));
        assert_eq!(warm("--warm=whole"), (Some(WarmArg::Whole), 1));
        assert_eq!(warm("--warm=7"), (Some(WarmArg::Tokens(7)), 1));
    }

    #[test]
    fn all_is_everything_that_may_be_of_use_and_each_once() {
        let args = parse(&["t", "--policy", "lru,all,lru", "--forecast", "none,none"]).unwrap();
        assert_eq!(args.policies(), policy::NAMES);
        assert_eq!(args.forecasts(), ["none"]);
        let all = parse(&["t", "--forecast", "all"]).unwrap().forecasts();
        assert_eq!(all.len(), 2 + forecast::USEFUL);
        assert!(!all.iter().any(|name| name == "panicking"));
    }
}
