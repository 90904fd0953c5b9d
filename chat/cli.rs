//! The command line: what can be asked, and the text of `--help`.

use crate::{
    commands::replay::args::{self as replay, ReplayArgs},
    size::Size,
    streaming::MemoryArgs,
};
use clap::{Args, Parser, Subcommand, ValueEnum};
use pregate_runtime::Misses;
use std::path::PathBuf;
use std::str::FromStr;

mod trace;

pub use trace::{
    ExportArgs, GenerateArgs, HeadArgs, ImportArgs, ImportForm, StatsArgs, TraceCommand, TraceHints,
};

const MAX_CONTEXT: usize = 1 << 24;
const MAX_THREADS: usize = 1024;

#[derive(Debug, Parser)]
#[command(
    name = "pregate",
    version,
    about = "Chat with Mixture-of-Experts language models",
    long_about = "Chat with Mixture-of-Experts language models.\n\nWithout a command, on a terminal, pregate opens the chat with the demo model that comes with it.",
    after_help = "Examples:
  pregate                                        chat with the demo model
  pregate chat --model model.gguf                chat with another model
  pregate run --prompt 'list files by size'      one answer on standard output
  git diff | pregate run --model model.gguf      the prompt from a pipe
  pregate inspect model.gguf                     what a model file holds
  pregate plan --model model.gguf --ram 8G       how it would use the memory
  pregate doctor                                 what this machine has, and lacks
  pregate replay trace.json --machine rtx4070    how fast a model would be elsewhere

A model is a .gguf file (any shard of a split one) or a Hugging Face folder with
config.json, tokenizer.json and *.safetensors.

Exit codes: 0 done, 2 wrong usage, 3 bad model file, tokenizer, template or trace,
4 not enough memory or no such device, 75 the GPU failed, 130 interrupted, 1 anything else.",
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Talk to a model in the terminal
    #[command(after_help = "Examples:
  pregate chat
  pregate chat --model model.gguf --system 'Answer in one line.' --context 4096
  printf 'first question\\nsecond question\\n' | pregate chat

In the chat, /help lists the keys and commands. Where the terminal cannot do more
(TERM=dumb, a pipe) the chat is line by line.")]
    Chat(ChatArgs),
    /// Print one answer on standard output
    #[command(after_help = "Examples:
  pregate run --prompt 'extract a tar.gz archive'
  echo 'extract a tar.gz archive' | pregate run
  pregate run --raw --prompt 'The capital of' --max-tokens 8 --temperature 0 --stats

Standard output has the answer and nothing else; notes and --stats go to standard error.")]
    Run(RunArgs),
    /// Show what a model file or folder holds
    #[command(after_help = "Examples:
  pregate inspect model.gguf
  pregate inspect --json folder/ | jq .bytes_by_kind
  pregate inspect --tensors model-00001-of-00003.gguf")]
    Inspect(InspectArgs),
    /// Show how a model would use the memory, and how fast that can be
    #[command(after_help = "Examples:
  pregate plan --model model.gguf
  pregate plan --model model.gguf --ram 50% --context 4096
  pregate plan --model model.gguf --ram 6G --json | jq .prediction
  pregate plan --model model.gguf --device cuda --vram 8G

A model that fits is used where it is mapped. Of one that does not, all weights but the
experts stay in memory, experts come from disk into slots, and every layer has slots for at
least the experts of one token. The prediction takes every expert to be as likely as every
other; real routing hits slots more often. Its bounds are memory bandwidth / bytes per token
and disk bandwidth / bytes that miss.

Where a GPU has no room for all experts, the GPU, the link and the processor are measured, alone
and at once, and the prediction is the expected time over all numbers of missing experts, in each
of which the slowest ends the layer. Copies ahead of need are left out.")]
    Plan(PlanArgs),
    /// Measure prompt and decode speed
    #[command(after_help = "Examples:
  pregate bench -p 512 -n 128 -r 5
  pregate bench --model model.gguf -t 8 --json > speed.json
  pregate bench --experts -r 15

Prompt speed: -p tokens of pseudo-random ids in one prefill. Decode speed: -n tokens one at a
time from an empty context. Every repetition has ids of its own, the same in every run. The
read bandwidth is measured in the same run, with as many threads: the best of several passes
over 512 MiB. The share is bytes per token * median decode tok/s / bandwidth.

Where experts are streamed, the hit bound is what Belady's rule would have had in slots for the
same tokens and slots, without reading ahead. --ledger judges the forecasts: recall is the share
of the experts asked for that a guess of as many named; the control, a router on its very own
input, must show 100.

--experts needs no model: 1, 2, 4 and 8 experts of one token are drawn at random from memory far
larger than the caches and computed, in turn with plain reads of the same memory by the same
threads. A share is the median of the rounds' ratios. Rounds in which a thread waited for a
processor are left out, as far as the system tells.")]
    Bench(BenchArgs),
    /// Compute what tests and comparisons need
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Turn text into token ids, or ids into text
    #[command(after_help = "Examples:
  pregate tokenize 'Hello, world'
  pregate tokenize --model model.gguf --json < text.txt
  pregate tokenize --model model.gguf --decode 1,2,3")]
    Tokenize(TokenizeArgs),
    /// Learn from recorded routing which experts come next
    #[command(after_help = "Examples:
  pregate train-predictor chat.pgtrace --out chat.pgpredict
  pregate run --model model.gguf --ram 8G --predictor chat.pgpredict --prompt 'hello'
  pregate train-predictor trace.json --model model.gguf --out model.pgpredict
  pregate train-predictor other.pgtrace --evaluate chat.pgpredict

One in eight sequences is held out, and every forecast is judged on these: the share of the used
experts among its best k, 1.5 k and 2 k, the share of tokens and layers with all of them among the
best k (whole), the share of their gate weight (mass), how many were said to be likelier than not
(issued) and how many of these were used (right), and how far probabilities are from what came
true (ECE); for 1, 2, 4 and 8 layers ahead, and for the next token.

The file has at most 8 MiB and fits one model only: the one of the traces, or of --model where
they do not say. The same traces and seed give the same file.")]
    TrainPredictor(TrainArgs),
    /// Look into traces of routing, and bring them from and to other formats
    #[command(
        subcommand,
        after_help = "A trace says which experts every token chose. Where one comes from:
  pregate run --record chat.pgtrace --prompt 'list files by size'
  pregate trace import dev.json --out dev.pgtrace             rtrace-1, with files beside it
  pregate trace import answers.jsonl --out vllm.pgtrace       routed_experts of vLLM or SGLang
  pregate trace import routes.csv --out routes.pgtrace        a table of layer and expert"
    )]
    Trace(TraceCommand),
    /// Look at this machine: processor, memory, disk, GPU
    #[command(after_help = "Examples:
  pregate doctor
  pregate doctor --model model.gguf      the disk that this model lies on
  pregate doctor --json | jq .gpus
  pregate doctor --machine-file here.toml

One line for each finding, and what to do next. The exit code is 0 if models can run on the
processor, else 4. A machine without a GPU is well.")]
    Doctor(DoctorArgs),
    /// Predict speed and hits on other machines, from a trace of routing
    #[command(after_help = replay::HELP)]
    Replay(ReplayArgs),
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Traces of one model: of pregate run --record, or rtrace-1 manifests (.json)
    #[arg(value_name = "TRACE", required = true)]
    pub traces: Vec<PathBuf>,
    /// Where the trained forecasts go
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Judge this file on all of the traces instead of training
    #[arg(long, value_name = "FILE", conflicts_with = "out")]
    pub evaluate: Option<PathBuf>,
    /// Bind the file to this model; for traces of other programs
    #[arg(short, long, value_name = "FILE|FOLDER")]
    pub model: Option<PathBuf>,
    /// Threads that train, which do not change the result [default: 2]
    #[arg(short, long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Another seed gives another file
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Write the logits and routing of given tokens as safetensors
    #[command(after_help = "Example:
  echo '[1, 5, 9]' > ids.json
  pregate eval logits --model model.gguf --tokens ids.json --out logits.safetensors --greedy 8

The file holds logits [tokens, vocab] (F32); for each MoE layer L router_ids.L (I32) and
router_weights.L (F32) [rows, k], each row sorted by expert id; with --greedy N also
greedy_ids [N] (I32) and greedy_logits [N, vocab]. Rows are the given tokens and, with
--greedy N, the first N - 1 generated ones.")]
    Logits(LogitsArgs),
    /// Perplexity of a text
    #[command(after_help = "Example:
  pregate eval perplexity --model model.gguf --file text.txt --context 512

The text is cut into windows of --context tokens that do not overlap; every token of a window
but its first is predicted from the tokens before it in the window.")]
    Perplexity(PerplexityArgs),
}

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A .gguf file or a Hugging Face folder [default: the demo model]
    #[arg(short, long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda, or cuda:N for the GPU with that number (`pregate doctor`
    /// lists them)
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// GPU memory to take at most, so that a large card can stand for a small one: 12G, 800M, 50%
    /// of the card's [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<Size>,
    /// What becomes of an expert that a token needs and the GPU does not hold; never changes tokens
    #[arg(long, value_enum, default_value = "auto")]
    pub misses: MissesArg,
    /// Whether a GPU gets a token's kernels as one CUDA graph; never changes tokens
    #[arg(long, value_enum, default_value = "on")]
    pub graphs: Switch,
    /// Threads [default: one per core that this process may use]
    #[arg(short, long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MissesArg {
    /// Whatever is faster, as measured while running
    Auto,
    /// The processor computes it
    Cpu,
    /// It is copied to the GPU
    Copy,
}

impl From<MissesArg> for Misses {
    fn from(misses: MissesArg) -> Self {
        match misses {
            MissesArg::Auto => Misses::Auto,
            MissesArg::Cpu => Misses::Host,
            MissesArg::Copy => Misses::Copied,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The fastest device that is known to work.
    Auto,
    /// The processor.
    Cpu,
    Cuda {
        ordinal: usize,
    },
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ordinal = match text.split_once(':') {
            Some(("cuda", number)) => number.parse().ok(),
            _ => (text == "cuda").then_some(0),
        };
        match (text, ordinal) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(ordinal)) => Ok(Self::Cuda { ordinal }),
            _ => Err("auto, cpu, cuda and cuda:N are allowed".to_string()),
        }
    }
}

#[derive(Clone, Debug, Args)]
pub struct SamplingArgs {
    /// 0: always the likeliest token; higher is more varied [default: 0 for the demo model, which
    /// is too small to stray, else 0.6]
    #[arg(long, value_name = "T", value_parser = temperature)]
    pub temperature: Option<f32>,
    /// Keep only the K likeliest tokens; 0: all
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: usize,
    /// Keep the likeliest tokens that together reach this probability; 1: all
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = fraction)]
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest; 0: none
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = fraction)]
    pub min_p: f32,
    /// Divide the logits of recent tokens by this; 1: off
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = repeat_penalty)]
    pub repeat_penalty: f32,
    /// Subtract this from the logit of every recent token; 0: off
    #[arg(
        long,
        value_name = "A",
        default_value_t = 0.0,
        value_parser = penalty,
        allow_negative_numbers = true
    )]
    pub presence_penalty: f32,
    /// Subtract this once per occurrence of a recent token; 0: off
    #[arg(
        long,
        value_name = "A",
        default_value_t = 0.0,
        value_parser = penalty,
        allow_negative_numbers = true
    )]
    pub frequency_penalty: f32,
    /// DRY: subtract this times 1.75 ^ (N - 2) from a token that would continue
    /// a repetition of N tokens; 0.8 is usual, 0: off
    #[arg(long, value_name = "M", default_value_t = 0.0, value_parser = dry)]
    pub dry: f32,
    /// Same seed, same question, same answer [default: another one each time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// End the answer before this text (may be given several times)
    #[arg(long, value_name = "TEXT", value_parser = stop_text)]
    pub stop: Vec<String>,
    /// End an answer after this many tokens
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = token_count)]
    pub max_tokens: usize,
}

#[derive(Debug, Args)]
pub struct SessionArgs {
    /// Tokens that the conversation may hold [default: the model's limit, at most 8192]
    #[arg(long, value_name = "N", value_parser = context)]
    pub context: Option<usize>,
    /// Number format of the KV cache
    #[arg(long, value_enum, default_value_t = KvChoice::F16)]
    pub kv: KvChoice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvChoice {
    F16,
    F32,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Instruction that stands before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Write every router choice, and what each expert cost, to this trace file (`pregate trace`
    /// reads it); never slows or changes the answer
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    #[command(flatten)]
    pub session: SessionArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// The question; `-` reads it from standard input, which is also read when there is no
    /// --prompt and standard input is not a terminal
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Instruction that stands before the question
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// Print tokens, speeds, memory and where the time went on standard error, as text or as one
    /// line of JSON
    #[arg(long, value_name = "FORM", value_enum, num_args = 0..=1, default_missing_value = "text")]
    pub stats: Option<StatsForm>,
    /// Print what the forecasts were worth on standard error: how often each was right, and what
    /// reading ahead saved and cost; in the JSON of --stats json
    #[arg(long)]
    pub ledger: bool,
    /// Write every router choice, and what each expert cost, to this trace file (`pregate trace`
    /// reads it); never slows or changes the answer
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    #[command(flatten)]
    pub session: SessionArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StatsForm {
    Text,
    Json,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub session: SessionArgs,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A .gguf file (any shard of a split one) or a Hugging Face folder
    #[arg(value_name = "FILE|FOLDER")]
    pub path: PathBuf,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A .gguf file or a Hugging Face folder [default: the demo model]
    #[arg(short, long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Tokens of the prompt; 0: skip
    #[arg(short = 'p', value_name = "N", default_value_t = 512, value_parser = context_or_zero)]
    pub n_prompt: usize,
    /// Tokens to decode; 0: skip
    #[arg(short = 'n', value_name = "N", default_value_t = 128, value_parser = context_or_zero)]
    pub n_gen: usize,
    /// Repetitions, after one warm-up
    #[arg(short = 'r', value_name = "N", default_value_t = 5, value_parser = repetitions)]
    pub repetitions: usize,
    /// Show what the forecasts were worth, warm-up included: how often each was right, and what
    /// reading ahead saved and cost
    #[arg(long)]
    pub ledger: bool,
    /// Write the routing of all rounds to this trace file, the warm-up's first: `pregate replay
    /// --warm=N`, of the warm-up's tokens, then counts what was measured
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// No model: how fast the processor computes experts of known models from memory, -r rounds
    /// beside a plain read
    #[arg(long, conflicts_with_all = ["model", "n_prompt", "n_gen", "ledger", "record", "vram"])]
    pub experts: bool,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// A .gguf file or a Hugging Face folder
    #[arg(short, long, value_name = "PATH")]
    pub model: PathBuf,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// A JSON array of token ids
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// The safetensors file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The oracle (weights dequantised, plain loops) or the processor's kernels
    #[arg(long, value_enum, default_value_t = BackendChoice::Cpu)]
    pub backend: BackendChoice,
    /// Continue greedily with this many tokens
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = context_or_zero)]
    pub greedy: usize,
    /// Number format of the KV cache
    #[arg(long, value_enum, default_value_t = KvChoice::F32)]
    pub kv: KvChoice,
    /// Threads [default: one per core that this process may use]
    #[arg(short, long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    Reference,
    Cpu,
}

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// The text, UTF-8
    #[arg(long, value_name = "TEXT")]
    pub file: PathBuf,
    /// Tokens of a window [default: 512, or the model's limit if that is less]
    #[arg(long, value_name = "N", value_parser = window)]
    pub context: Option<usize>,
    /// Stop after this many windows
    #[arg(long, value_name = "N", value_parser = token_count)]
    pub windows: Option<usize>,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// A .gguf file or a Hugging Face folder [default: the demo model]
    #[arg(short, long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// The text; without it, standard input is read
    #[arg(value_name = "TEXT", conflicts_with = "decode")]
    pub text: Option<String>,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
    /// Control-token text is that token, as in a rendered chat template
    #[arg(long, conflicts_with = "decode")]
    pub control: bool,
    /// Add the BOS and EOS tokens that the model wants around a document
    #[arg(long, conflicts_with_all = ["decode", "control"])]
    pub document: bool,
    /// Ids to turn into text: 1,2,3 or a JSON array
    #[arg(long, value_name = "IDS")]
    pub decode: Option<String>,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The model whose disk is tried [default: the demo model]
    #[arg(short, long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Write what was measured as a machine for `pregate replay --machine`
    #[arg(long, value_name = "OUT.toml")]
    pub machine_file: Option<PathBuf>,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

fn count(text: &str, low: usize, high: usize) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(number) if (low..=high).contains(&number) => Ok(number),
        _ => Err(format!("a whole number from {low} to {high} is allowed")),
    }
}

fn threads(text: &str) -> Result<usize, String> {
    count(text, 1, MAX_THREADS)
}

fn context(text: &str) -> Result<usize, String> {
    count(text, 1, MAX_CONTEXT)
}

fn window(text: &str) -> Result<usize, String> {
    count(text, 2, MAX_CONTEXT)
}

fn token_count(text: &str) -> Result<usize, String> {
    count(text, 1, MAX_CONTEXT)
}

fn context_or_zero(text: &str) -> Result<usize, String> {
    count(text, 0, MAX_CONTEXT)
}

fn repetitions(text: &str) -> Result<usize, String> {
    count(text, 1, 10_000)
}

fn number(text: &str, allowed: &str, accept: impl Fn(f32) -> bool) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if accept(value) => Ok(value),
        _ => Err(format!("a number {allowed} is allowed, with a point as decimal mark")),
    }
}

fn temperature(text: &str) -> Result<f32, String> {
    number(text, "from 0 to 100", |value| (0.0..=100.0).contains(&value))
}

fn fraction(text: &str) -> Result<f32, String> {
    number(text, "from 0 to 1", |value| (0.0..=1.0).contains(&value))
}

fn repeat_penalty(text: &str) -> Result<f32, String> {
    number(text, "from 0.1 to 10", |value| (0.1..=10.0).contains(&value))
}

fn penalty(text: &str) -> Result<f32, String> {
    number(text, "from -10 to 10", |value| (-10.0..=10.0).contains(&value))
}

fn dry(text: &str) -> Result<f32, String> {
    number(text, "from 0 to 10", |value| (0.0..=10.0).contains(&value))
}

fn stop_text(text: &str) -> Result<String, String> {
    match text.len() {
        1..=1024 => Ok(text.to_string()),
        _ => Err("1 to 1024 bytes are allowed".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for bad in [
            ["--temperature", "nan"],
            ["--temperature", "-1"],
            ["--temperature", "0,5"],
            ["--top-p", "1.5"],
            ["--context", "0"],
            ["--context", "12Q"],
            ["--context", "99999999999999999999"],
            ["--threads", "0"],
            ["--max-tokens", "-1"],
            ["--stop", ""],
            ["--device", "gpu"],
            ["--device", "cuda:"],
            ["--device", "cuda:x"],
            ["--vram", "lots"],
            ["--ram", "0"],
            ["--ram", "lots"],
            ["--ram", "-1G"],
            ["--stats", "xml"],
            ["--policy", "belady"],
            ["--forecast", "oracle"],
            ["--horizon", "0"],
            ["--ring", "0"],
            ["--disk", "tape"],
        ] {
            let command = ["pregate", "run", "--prompt", "x", bad[0], bad[1]];
            assert!(Cli::try_parse_from(command).is_err(), "{bad:?} was accepted");
        }
    }
}
