//! `pregate trace`.

use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum TraceCommand {
    /// Read a trace of another program and write one of ours
    #[command(after_help = "Examples:
  pregate trace import shared/traces/gptoss20b/dev.json --out gptoss.pgtrace
  pregate trace import --top-k 8 moe_trace.csv --out qwen.pgtrace
  pregate trace import --form responses --layers 48 --top-k 8 answers.jsonl --out sglang.pgtrace

Tables are read by the names of their columns: layer and expert are enough; token (or step),
rank (or slot), weight, phase, sequence (or turn) and token_id are used where they are. Experts
may also be a list in one cell, in quotes where commas separate the cells. Answers are those of
servers started with --enable-return-routed-experts: base64 of an .npy file or of 32-bit numbers,
or lists. Also read are rtrace-1 (its digests are checked), our own JSON lines, and
moe-cache-eval's manifest.json. --model names any trace; the other options say what a file does
not, and are refused where it says something else. A failed import leaves an older file as it was.")]
    Import(ImportArgs),
    /// Write a trace in another format: .pgtrace, .json (rtrace-1), .jsonl, .csv
    #[command(after_help = "Examples:
  pregate trace export chat.pgtrace --out chat.csv
  pregate trace export chat.pgtrace --out - | jq .experts[0]

rtrace-1 (.json) has room for 255 experts, and none for passes and what they cost; tables (.csv)
have no costs. Both have layers of one kind. What else is left out is said.")]
    Export(ExportArgs),
    /// Print how even, repetitive and predictable the routing of a trace is
    #[command(after_help = "Examples:
  pregate trace stats chat.pgtrace
  pregate trace stats --json dev.json | jq .reuse

Reuse is the share of a token's experts that an earlier token of its sequence chose too. Static
hits keep the experts that the first half of the trace used most, and are counted on the second.
The last figures guess a layer's experts from those of the layer before, by frequencies of the
first half, on the second. Layers weigh the same.")]
    Stats(StatsArgs),
    /// Print the first tokens of a trace
    Head(HeadArgs),
    /// Make a trace up for a model of another shape, after the statistics of a real one
    #[command(after_help = "Example:
  pregate trace generate --from gptoss20b/dev.json --experts 128 --top-k 8 --layers 48 \\
    --tokens 10000 --seed 1 --out wide.pgtrace

Logits are drawn from a model with five weights, which are searched for until entropy, reuse,
hits of LRU and of Belady's rule at 25 and 50 %, and the recall of transitions are those of the
real trace: first in its own shape, then in the wanted one. The table shows how near both came.
The file says that it is synthetic, and so does every report about it.")]
    Generate(GenerateArgs),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImportForm {
    /// By what the file begins with
    Auto,
    /// A table
    Csv,
    /// JSON answers of vLLM, SGLang or Dynamo
    Responses,
}

/// What a file of another program may not say.
#[derive(Debug, Default, Args)]
pub struct TraceHints {
    /// Name of the model
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Layers of the model, dense ones too, where the file does not say
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Experts of a layer [default: what the file says, else one more than the largest chosen]
    #[arg(long, value_name = "N")]
    pub experts: Option<usize>,
    /// Experts of a token, where the file does not say
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The trace
    pub file: PathBuf,
    /// The file to write; .pgtrace
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
    /// What the file is
    #[arg(long, value_enum, default_value = "auto")]
    pub form: ImportForm,
    #[command(flatten)]
    pub hints: TraceHints,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The trace
    pub file: PathBuf,
    /// The file to write; `-`: JSON lines to standard output
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
}

#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The trace
    pub file: PathBuf,
    /// One line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct HeadArgs {
    /// The trace
    pub file: PathBuf,
    /// How many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 3)]
    pub tokens: usize,
    /// A line of JSON for each
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The real trace
    #[arg(long, value_name = "TRACE")]
    pub from: PathBuf,
    /// Experts of a layer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1024))]
    pub experts: u32,
    /// Experts of a token
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=128))]
    pub top_k: u32,
    /// MoE layers
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub layers: u32,
    /// How long the trace becomes
    #[arg(
        long, value_name = "N", default_value_t = 10_000,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000_000),
    )]
    pub tokens: u64,
    /// Bytes of an expert, as replay counts them
    #[arg(
        long, value_name = "N", default_value_t = 0,
        value_parser = clap::value_parser!(u64).range(..=pregate_traces::MAX_EXPERT_BYTES),
    )]
    pub expert_bytes: u64,
    /// Same seed, same trace
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// The file to write; .pgtrace keeps the label
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
}
