//! Developer commands: `cargo xtask <command>`.

mod golden;
mod gpu_check;
mod kernels;
mod mutants;
mod ptx;

use std::path::Path;
use std::process::ExitCode;

const HELP: &str = "\
cargo xtask <command>

commands:
  golden SHARED   copy the golden models that the tests need from SHARED/golden to tests/data
  gpu-check [--dev]
                  pack target/gpu-check: tests and measurements of the kernels for a machine with a
                  GPU, which needs neither Rust nor a network
                  --dev             hardly optimised, to try the script
  kernels [--check]
                  write docs/kernels.md: what every kernel moves, takes, and should reach
                  --check           compare with the page instead
  mutants [--only TEXT] [--list] [--keep] [--scratch FOLDER]
                  run every seeded bug of tools/mutants; fails unless the tests find all
                  --only TEXT       bugs with TEXT in their name, file or list (`disk.toml`)
                  --list            their names, without running any
                  --keep            leave the scratch folder, so that the next run builds less
                  --scratch FOLDER  where to copy and build (default: mutants in the target folder)
  ptx [--check]   compile kernels/cuda to kernels/ptx, with NVRTC and ptxas from their wheels
                  --check           compare with what is checked in instead; fails on a difference
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root");
    let done = match command.as_str() {
        "golden" => match arguments.next() {
            Some(shared) => golden(&shared),
            None => return help(),
        },
        "gpu-check" => only(arguments, &["--dev"]).and_then(|dev| gpu_check::run(root, dev)),
        "kernels" => only(arguments, &["--check"]).and_then(|check| kernels::run(root, check)),
        "mutants" => {
            mutants::Options::parse(arguments).and_then(|options| mutants::run(root, options))
        }
        "ptx" => only(arguments, &["--check"]).and_then(|check| ptx::run(root, check)),
        _ => return help(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask {command}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn help() -> ExitCode {
    eprint!("{HELP}");
    ExitCode::from(2)
}

/// Whether one of `known` was given. Errors, in words: anything else was.
fn only(arguments: impl Iterator<Item = String>, known: &[&str]) -> Result<bool, String> {
    let mut given = false;
    for word in arguments {
        match known.contains(&word.as_str()) {
            true => given = true,
            false => return Err(format!("{word}: no such option")),
        }
    }
    Ok(given)
}

fn golden(shared: &str) -> Result<bool, String> {
    let report = golden::copy(shared.as_ref(), "tests/data".as_ref());
    println!("{}", report.map_err(|error| error.to_string())?);
    Ok(true)
}
