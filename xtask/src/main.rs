//! Developer commands: `cargo xtask <command>`.

mod golden;

use std::process::ExitCode;

const HELP: &str = "\
cargo xtask <command>

commands:
  golden SHARED   copy the golden models that the tests need from SHARED/golden to tests/data
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("golden"), Some(shared)) => {
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
        _ => {
            eprint!("{HELP}");
            ExitCode::from(2)
        }
    }
}
