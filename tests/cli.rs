//! The binary as its users call it: answers, exit codes, one message per
//! error, machine-readable output.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn pregate(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pregate"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    pregate(arguments).output().expect("the binary starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn root(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

fn demo() -> String {
    root("models/pregate-demo.gguf").to_string_lossy().into_owned()
}

/// The exit code and the message, which must be one line that starts with
/// the program's name.
fn failure(arguments: &[&str]) -> (i32, String) {
    let output = run(arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code().expect("an exit, not a signal");
    let ours: Vec<&str> = text.lines().filter(|line| line.starts_with("pregate: ")).collect();
    assert_eq!(ours.len(), 1, "{arguments:?}: {text}");
    assert!(!text.contains("panicked"), "{text}");
    assert!(output.stdout.is_empty(), "{arguments:?} wrote to standard output");
    (code, ours[0].to_string())
}

#[test]
fn one_answer_on_standard_output_and_the_device_on_standard_error() {
    let output = run(&["run", "--prompt", "extract a tar.gz archive", "--temperature", "0"]);
    assert!(output.status.success());
    assert!(stdout(&output).contains("tar "), "{}", stdout(&output));
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(notes.contains("device: CPU"), "{notes}");
}

#[test]
fn the_prompt_may_come_from_a_pipe_and_the_reader_may_go_away() {
    let mut child = pregate(&["run", "--prompt", "-", "--temperature", "0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"show git status\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(stdout(&output).contains("git status"), "{}", stdout(&output));

    let mut child =
        pregate(&["run", "--prompt", "list files"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(0), "a closed pipe is a quiet end");
}

#[test]
fn without_a_terminal_a_bare_call_teaches() {
    let output = run(&[]);
    assert!(output.status.success());
    let text = stdout(&output);
    for word in ["chat", "run", "inspect", "bench", "Examples"] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn mistakes_have_their_exit_codes_and_one_message() {
    let (code, text) = failure(&["run", "--prompt", "x", "--temperature", "-1"]);
    assert_eq!(code, 2, "{text}");
    let (code, text) = failure(&["inspect", "/nowhere/model.gguf"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("/nowhere/model.gguf"), "{text}");
    let (code, text) = failure(&["inspect", "/dev/zero"]);
    assert_eq!(code, 3, "{text}");
    let readme = root("README.md");
    let (code, text) = failure(&["run", "--prompt", "x", "--model", readme.to_str().unwrap()]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("found") && text.contains("allowed"), "{text}");
    let (code, _) = failure(&["run", "--prompt", "x", "--context", "99999999"]);
    assert_eq!(code, 2);
}

#[test]
fn inspect_and_tokenize_speak_json() {
    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&stdout(&run(arguments))).expect("JSON")
    };
    let report = json(&["inspect", &demo(), "--json"]);
    assert!(report.to_string().contains("\"experts\""), "{report}");
    let tokens = json(&["tokenize", "--model", &demo(), "--json", "list files"]);
    let ids: Vec<String> =
        tokens["ids"].as_array().expect("ids").iter().map(ToString::to_string).collect();
    let text = stdout(&run(&["tokenize", "--model", &demo(), "--decode", &ids.join(",")]));
    assert_eq!(text.trim_end(), "list files");
}

#[test]
fn eval_logits_writes_the_golden_layout() {
    let folder = tempfile::tempdir().unwrap();
    let (tokens, out) = (folder.path().join("ids.json"), folder.path().join("out.safetensors"));
    std::fs::write(&tokens, "[1, 5, 9, 200]").unwrap();
    let model = root("tests/data/gguf/qwen3_moe.Q8_0.gguf");
    let output = run(&[
        "eval",
        "logits",
        "--model",
        model.to_str().unwrap(),
        "--tokens",
        tokens.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--backend",
        "reference",
        "--greedy",
        "3",
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = std::fs::read(&out).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("logits").unwrap().shape(), [4, 320]);
    assert_eq!(file.tensor("greedy_ids").unwrap().shape(), [3]);
    for layer in 0..3 {
        let ids = file.tensor(&format!("router_ids.{layer}")).unwrap();
        // Four of the prompt and two of the three generated ones ran.
        assert_eq!(ids.shape()[1], 4);
        let weights = file.tensor(&format!("router_weights.{layer}")).unwrap();
        assert_eq!(weights.shape(), ids.shape());
    }
}

#[test]
fn bench_reports_raw_samples() {
    let text = stdout(&run(&[
        "bench",
        "--model",
        &demo(),
        "-p",
        "16",
        "-n",
        "4",
        "-t",
        "1",
        "-r",
        "2",
        "--json",
    ]));
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["prompt_tok_s"].as_array().unwrap().len(), 2);
    assert_eq!(report["decode_tok_s"].as_array().unwrap().len(), 2);
    for field in ["bytes_per_token", "read_bandwidth_gb_s", "decode_bandwidth_share"] {
        assert!(report[field].as_f64().unwrap() > 0.0, "{field}: {report}");
    }
}
