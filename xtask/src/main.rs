//! Developer commands: `cargo xtask <command>`.

mod golden;
mod mutants;

use std::path::Path;
use std::process::ExitCode;

const HELP: &str = "\
cargo xtask <command>

commands:
  golden SHARED   copy the golden models that the tests need from SHARED/golden to tests/data
  mutants [--only TEXT] [--list] [--keep] [--scratch FOLDER]
                  run every seeded bug of tools/mutants; fails unless the tests find all
                  --only TEXT       bugs with TEXT in their name, file or list (`disk.toml`)
                  --list            their names, without running any
                  --keep            leave the scratch folder, so that the next run builds less
                  --scratch FOLDER  where to copy and build (default: mutants in the target folder)
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("golden") => match arguments.next() {
            Some(shared) => golden(&shared),
            None => help(),
        },
        Some("mutants") => match mutants::Options::parse(arguments) {
            Ok(options) => mutants(options),
            Err(error) => {
                eprintln!("xtask mutants: {error}");
                help()
            }
        },
        _ => help(),
    }
}

fn help() -> ExitCode {
    eprint!("{HELP}");
    ExitCode::from(2)
}

fn golden(shared: &str) -> ExitCode {
    match golden::copy(shared.as_ref(), "tests/data".as_ref()) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("xtask golden: {error}");
            ExitCode::FAILURE
        }
    }
}

fn mutants(options: mutants::Options) -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root");
    match mutants::run(root, options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask mutants: {error}");
            ExitCode::FAILURE
        }
    }
}
