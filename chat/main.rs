//! The `pregate` program.

mod cli;
mod engine;
mod exit;
mod save;
mod signals;
mod slash;
mod tui;

fn main() {}
