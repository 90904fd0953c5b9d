//! The `pregate` program.

mod bandwidth;
mod cli;
mod commands;
mod demo;
mod device;
mod engine;
mod exit;
mod expert_speed;
mod ledger;
mod line_chat;
mod link_speed;
mod local;
mod memory;
mod model;
mod notices;
mod output;
mod plan;
mod plot;
mod progress;
mod record;
mod roofline;
mod save;
mod signals;
mod size;
mod slash;
mod split_speed;
mod splits;
mod statistics;
mod streaming;
mod tui;

use clap::{CommandFactory, Parser};
use cli::{Cli, Command, EvalCommand};
use exit::Failure;
use std::{
    io::{IsTerminal, stdin, stdout},
    panic,
    process::ExitCode,
};

fn main() -> ExitCode {
    quiet_panics();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match run(cli) {
        Ok(code) => code.into(),
        Err(failure) => {
            if failure.has_message() {
                eprintln!("pregate: {failure}");
            }
            failure.code().into()
        }
    }
}

fn run(cli: Cli) -> Result<u8, Failure> {
    let Some(command) = cli.command else { return bare() };
    match &command {
        Command::Inspect(args) => commands::inspect::run(args)?,
        Command::Plan(args) => commands::plan::run(args)?,
        Command::Bench(args) => commands::bench::run(args)?,
        Command::Trace(command) => commands::trace::run(command)?,
        Command::Tokenize(args) => commands::tokenize::run(args)?,
        Command::Eval(EvalCommand::Logits(args)) => commands::eval::logits(args)?,
        Command::Eval(EvalCommand::Perplexity(args)) => commands::perplexity::run(args)?,
        Command::Chat(args) => return commands::chat::run(args),
        Command::Doctor(args) => return commands::doctor::run(args),
        Command::Replay(args) => commands::replay::run(args)?,
        Command::TrainPredictor(args) => commands::train::run(args)?,
        Command::Run(args) => commands::run::run(args)?,
    }
    Ok(0)
}

/// No command: the chat where there is somebody to chat with.
fn bare() -> Result<u8, Failure> {
    if stdin().is_terminal() && stdout().is_terminal() {
        return run(Cli::parse_from(["pregate", "chat"]));
    }
    output::line(&Cli::command().render_long_help().to_string())?;
    Ok(0)
}

/// Help and version are answers; everything else is one message.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match output::line(error.to_string().trim_end()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => failure.code().into(),
        };
    }
    let text = error.to_string();
    eprintln!("pregate: {}", text.strip_prefix("error: ").unwrap_or(&text).trim_end());
    exit::USAGE.into()
}

/// A panic is our mistake; it is one message too.
fn quiet_panics() {
    panic::set_hook(Box::new(|info| {
        let place = info.location().map(|place| format!(" at {place}")).unwrap_or_default();
        let what = info.payload_as_str().unwrap_or("no message");
        eprintln!("pregate: internal error{place}: {what}; please report it");
    }));
}
