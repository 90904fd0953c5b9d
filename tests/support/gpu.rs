//! The binary on a machine whose GPU is the stand-in.

use pregate_standin::Standin;
use std::process::{Command, Output, Stdio};

fn demo() -> String {
    format!("{}/models/pregate-demo.gguf", env!("CARGO_MANIFEST_DIR"))
}

pub fn pregate(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pregate"));
    command.args(arguments).args(["--model", &demo()]).stdin(Stdio::null());
    command
}

/// On a machine with a GPU of these settings; `None`: there is no stand-in.
pub fn on_gpu(settings: &str, arguments: &[&str]) -> Option<Output> {
    let mut command = command(settings, arguments)?;
    Some(command.output().expect("the binary starts"))
}

/// [`on_gpu`], not started yet.
pub fn command(settings: &str, arguments: &[&str]) -> Option<Command> {
    let Some(library) = Standin::path() else {
        assert!(std::env::var_os("PREGATE_REQUIRE_STANDIN").is_none(), "no stand-in");
        println!("not run: no C++ compiler");
        return None;
    };
    if Standin::has_address_sanitizer() {
        println!("not run: the binary does not load libasan");
        return None;
    }
    let folder = library.parent().expect("a file in a folder");
    let mut command = pregate(arguments);
    command.env("LD_LIBRARY_PATH", folder).env("PREGATE_STANDIN", settings);
    Some(command)
}

/// The exit code and the only message of a run that failed.
pub fn code_and_message(output: &Output) -> (i32, String) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    let ours: Vec<&str> = text.lines().filter(|line| line.starts_with("pregate: ")).collect();
    assert_eq!(ours.len(), 1, "{text}");
    (output.status.code().expect("an exit, not a signal"), ours[0].to_string())
}
