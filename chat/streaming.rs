//! Memory on the command line: how much of it, and how experts come from disk
//! where a model is larger.

use crate::{output::printable, size::Size};
use clap::{
    Args, ValueEnum,
    builder::{PossibleValue, PossibleValuesParser},
};
use pregate_predictor::forecast::learned::{LIMIT_BYTES, Trained};
use pregate_predictor::{forecast, policy};
use pregate_runtime::{
    Streaming,
    model::Source,
    store::disk::{DiskChoice, DiskOptions},
};
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Clone, Debug, Default, Args)]
pub struct MemoryArgs {
    /// Memory for all that pregate holds: 6G or 6GiB (2^30 bytes each), 6GB (10^9), 800M, or 50%
    /// of the size of the model's files; a model that does not fit is streamed from disk
    /// [default: what is free, less a reserve of a tenth]
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<Size>,
    #[command(flatten)]
    pub streaming: StreamingArgs,
}

const HEADING: &str = "Streaming, for a model larger than --ram";

/// Choices that change speed, never tokens. What is not given is the
/// runtime's.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub struct StreamingArgs {
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "NAME",
        value_parser = PossibleValuesParser::new(policy::NAMES),
        help = format!("Which expert leaves memory for another [default: {}]", policy::DEFAULT)
    )]
    pub policy: Option<String>,
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "NAME",
        value_parser = PossibleValuesParser::new(forecasts()),
        help = format!(
            "What says which experts to read ahead; blend: all of them, weighed by their success \
             [default: {}]",
            Streaming::default().forecast
        )
    )]
    pub forecast: Option<String>,
    /// What was trained for this model (pregate train-predictor): its forecasts join the blend, and
    /// --forecast learned-network takes one of them alone; its tables for eviction join the
    /// policies adaptive and learned
    #[arg(long, help_heading = HEADING, value_name = "FILE", value_parser = predictor)]
    pub predictor: Option<Predictor>,
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "N",
        value_parser = horizon,
        help = format!("Layers that forecasts look ahead [default: {}]", Streaming::default().horizon)
    )]
    pub horizon: Option<usize>,
    /// Frames of each size that experts are read into, beside the slots [default: twice the
    /// experts of a token, at least 4; fewer where memory is short]
    #[arg(long, help_heading = HEADING, value_name = "N", value_parser = ring)]
    pub ring: Option<usize>,
    /// How experts are read [default: auto]
    #[arg(long, help_heading = HEADING, value_enum)]
    pub disk: Option<DiskArg>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DiskArg {
    /// The first of the others that works here
    Auto,
    /// io_uring, around the page cache
    Uring,
    /// A thread for each read, around the page cache
    Threads,
    /// A thread for each read, through the page cache
    Buffered,
}

impl From<DiskArg> for DiskChoice {
    fn from(choice: DiskArg) -> Self {
        match choice {
            DiskArg::Auto => DiskChoice::Auto,
            DiskArg::Uring => DiskChoice::Uring,
            DiskArg::Threads => DiskChoice::Threads,
            DiskArg::Buffered => DiskChoice::Buffered,
        }
    }
}

/// Those that are wrong on purpose are for tests: taken, and not shown.
fn forecasts() -> Vec<PossibleValue> {
    let (useful, wrong) = forecast::NAMES.split_at(forecast::USEFUL);
    let (learned, others) = forecast::LEARNED.split_at(forecast::LEARNED_USEFUL);
    let shown = ["blend", "none"].iter().chain(useful).chain(learned);
    let shown = shown.map(|&name| PossibleValue::new(name));
    shown
        .chain(wrong.iter().chain(others).map(|&name| PossibleValue::new(name).hide(true)))
        .collect()
}

/// A file of `--predictor`, read.
#[derive(Clone, Debug, PartialEq)]
pub struct Predictor {
    /// What must not be written over.
    pub path: PathBuf,
    pub trained: Arc<Trained>,
}

/// Reads and checks the file; whether it fits the model is known later.
pub fn predictor(path: &str) -> Result<Predictor, String> {
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    let limit = LIMIT_BYTES as u64 + 1;
    file.take(limit).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let trained = Trained::parse(&bytes).map(Arc::new).map_err(|error| error.to_string())?;
    Ok(Predictor { path: path.into(), trained })
}

/// What a file is good for beside these forecasts and policies: "trained for
/// gpt-oss-20b; forecasts are used, tables for eviction are not (lru)".
pub fn predictor_words(trained: &Trained, forecasts: &[String], policies: &[String]) -> String {
    let model = match trained.binding.model.as_str() {
        "" => "an unnamed model".to_string(),
        name => printable(name),
    };
    let is_blend = |name: &String| name == "blend" || forecast::LEARNED.contains(&name.as_str());
    let forecasts = match forecasts.iter().any(is_blend) {
        true => "its forecasts are used".to_string(),
        false => format!("its forecasts are not used (--forecast {})", forecasts.join(",")),
    };
    let takes = |name: &String| policy::takes_tables(name);
    let tables = match (&trained.value, policies.iter().any(takes)) {
        (None, _) => "it has no tables for eviction".to_string(),
        (Some(_), true) => "its tables for eviction are used where they hit more".to_string(),
        (Some(_), false) => {
            format!("its tables for eviction are not used (--policy {})", policies.join(","))
        }
    };
    format!("trained for {model}; {forecasts}, {tables}")
}

pub fn horizon(text: &str) -> Result<usize, String> {
    whole(text, forecast::MAX_HORIZON)
}

/// More frames than this are slots by another name.
const MAX_RING: usize = 4096;

fn ring(text: &str) -> Result<usize, String> {
    whole(text, MAX_RING)
}

fn whole(text: &str, most: usize) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("a whole number from 1 to {most} is allowed")),
    }
}

impl StreamingArgs {
    /// How to read.
    pub fn disk(&self) -> DiskOptions {
        let choice = self.disk.map_or_else(DiskChoice::default, DiskChoice::from);
        DiskOptions { choice, ..DiskOptions::default() }
    }

    /// For the runtime; a plan says how many slots and frames.
    pub fn streaming(&self) -> Streaming {
        let usual = Streaming::default();
        Streaming {
            policy: self.policy.clone().unwrap_or(usual.policy),
            forecast: self.forecast.clone().unwrap_or(usual.forecast),
            trained: self.predictor.as_ref().map(|file| file.trained.clone()),
            horizon: self.horizon.unwrap_or(usual.horizon),
            source: Source::Disk(self.disk()),
            ..usual
        }
    }

    /// What to say where nothing is streamed, for the reason `why`; `None` if
    /// nothing was asked for.
    pub fn without_effect(&self, why: &str) -> Option<String> {
        let given = [
            ("--policy", self.policy.is_some()),
            ("--forecast", self.forecast.is_some()),
            ("--predictor", self.predictor.is_some()),
            ("--horizon", self.horizon.is_some()),
            ("--ring", self.ring.is_some()),
            ("--disk", self.disk.is_some()),
        ];
        let given: Vec<&str> = given.iter().filter(|(_, is)| *is).map(|(name, _)| *name).collect();
        let verb = if given.len() == 1 { "has" } else { "have" };
        let names = given.join(", ");
        (!given.is_empty()).then(|| format!("{why}: {names} {verb} no effect"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_without_effect_are_named() {
        assert_eq!(StreamingArgs::default().without_effect("x"), None);
        let args = StreamingArgs {
            policy: Some("lru".to_string()),
            disk: Some(DiskArg::Threads),
            ..StreamingArgs::default()
        };
        let note = args.without_effect("x").expect("a note");
        assert!(note.ends_with(": --policy, --disk have no effect"), "{note}");
        assert_eq!(args.streaming().policy, "lru");
        assert_eq!(args.disk().choice, DiskChoice::Threads);
        assert_eq!(args.streaming().forecast, Streaming::default().forecast);
    }
}
