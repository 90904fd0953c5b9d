//! From recorded routing to a file of forecasts and tables for eviction, and
//! from the file to runs and replays: the same tokens, what is used, and what
//! is refused.

use pregate_predictor::Shape;
use pregate_predictor::forecast::hostile::untrained;
use pregate_predictor::forecast::learned::{Binding, Trained};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

#[path = "support/gpu.rs"]
#[allow(dead_code)]
mod gpu;

/// The last one is long: tables for eviction take some hundred tokens.
const PROMPTS: [&str; 3] =
    ["extract a tar.gz archive", "show git status", include_str!("../LICENSE-MIT")];
const BY_TABLES: &str = "value with tables of this model";

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pregate"));
    command.args(arguments).stdin(Stdio::null()).output().expect("the binary starts")
}

fn done(arguments: &[&str]) -> (String, String) {
    let output = run(arguments);
    let notes = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {notes}");
    (String::from_utf8(output.stdout).expect("UTF-8"), notes)
}

fn refused(arguments: &[&str]) -> String {
    let output = run(arguments);
    let notes = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code().is_some_and(|code| code > 0), "{arguments:?}: {notes}");
    assert!(output.stdout.is_empty() && !notes.contains("panicked"), "{notes}");
    notes
}

fn demo() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pregate-demo.gguf").display().to_string()
}

/// Bytes that a process with the demo model holds beside most of its experts.
fn short_of_memory() -> String {
    let (plan, _) = done(&["plan", "--json", "--model", &demo(), "--context", "512"]);
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let parts = plan["parts"].as_object().unwrap_or_else(|| panic!("{plan}"));
    let all: u64 = parts.values().filter_map(Value::as_u64).sum();
    (all - 6_000_000).to_string()
}

/// A trace of each prompt, then a file that was trained from all.
fn trained(folder: &Path) -> PathBuf {
    let mut traces = Vec::new();
    for (index, prompt) in PROMPTS.iter().enumerate() {
        let trace = folder.join(format!("{index}.pgtrace")).display().to_string();
        let demo = demo();
        let options = ["--model", &demo, "--temperature", "0", "--max-tokens", "30"];
        done(&[&["run", "--prompt", prompt, "--record", &trace], &options[..]].concat());
        traces.push(trace);
    }
    let file = folder.join("demo.pgpredict");
    let names: Vec<&str> = traces.iter().map(String::as_str).collect();
    let out = file.display().to_string();
    let (text, _) = done(&[&["train-predictor", "--out", &out], &names[..]].concat());
    assert!(text.contains("tables for eviction"), "{text}");
    file
}

#[test]
fn a_trained_file_changes_no_token_and_says_what_it_is_used_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = trained(folder.path());
    let name = file.display().to_string();
    let (demo, ram) = (demo(), short_of_memory());
    let answer = ["run", "--model", &demo, "--temperature", "0", "--max-tokens", "40", "--prompt"];
    let (whole, _) = done(&[&answer[..], &["extract a tar.gz archive"]].concat());
    let streamed = ["--ram", &ram, "--context", "512"];
    let asked = [&answer[..], &["extract a tar.gz archive"], &streamed].concat();
    let (without, notes) = done(&[&asked[..], &["--ledger"]].concat());
    assert!(!notes.contains("predictor: ") && !notes.contains(BY_TABLES), "{notes}");
    let (with, notes) = done(&[&asked[..], &["--ledger", "--predictor", &name]].concat());
    assert_eq!((&with, &without), (&whole, &whole));
    assert!(notes.contains("its forecasts are used, its tables for eviction are used"), "{notes}");
    assert!(notes.contains(&format!("by {BY_TABLES}")), "{notes}");
    assert!(notes.contains("learned-n"), "{notes}");
    let other = ["--predictor", &name, "--policy", "lru", "--forecast", "none"];
    let (with, notes) = done(&[&asked[..], &other].concat());
    assert_eq!(with, whole);
    assert!(notes.contains("not used (--forecast none)"), "{notes}");
    assert!(notes.contains("not used (--policy lru)"), "{notes}");

    // The same in replay.
    let trace = folder.path().join("0.pgtrace").display().to_string();
    let replay = ["replay", &trace, "--machine", "rtx3060-12gb", "--slots", "25%", "--json"];
    let line = |more: &[&str]| -> Value {
        serde_json::from_str(&done(&[&replay[..], more].concat()).0).expect("a line")
    };
    let (plain, fitted) = (line(&[]), line(&["--predictor", &name]));
    assert_eq!(plain["accesses"], fitted["accesses"]);
    assert!(plain["rules"].get(BY_TABLES).is_none(), "{plain}");
    assert!(fitted["rules"][BY_TABLES].as_u64() > Some(0), "{fitted}");

    on_a_gpu_some_experts_stay(&name);
    what_is_of_another_model_is_refused(&file, &asked, &trace);
}

/// A file of another model, of this shape or not, is refused before a token.
fn what_is_of_another_model_is_refused(file: &Path, asked: &[&str], trace: &str) {
    let at = file.with_file_name("other.pgpredict");
    let name = at.display().to_string();
    let with = [asked, &["--predictor", &name]].concat();
    let mut trained = Trained::parse(&std::fs::read(file).unwrap()).unwrap();
    trained.binding.fingerprint = Some([9; 32]);
    std::fs::write(&at, trained.to_bytes()).unwrap();
    let text = refused(&with);
    assert!(text.contains("tables for eviction") && text.contains("another model"), "{text}");
    trained.value = None;
    std::fs::write(&at, trained.to_bytes()).unwrap();
    let text = refused(&with);
    assert!(text.contains("fingerprint 0909") && text.contains("train again"), "{text}");
    let text = refused(&["replay", trace, "--predictor", &name]);
    assert!(text.contains("fingerprint 0909"), "{text}");
    let shape = Shape::uniform(6, 31, 4, 1);
    let narrower = untrained(&shape, Binding::default(), [0, 0, 1, 4, 1, 0, 0]);
    std::fs::write(&at, narrower.to_bytes()).unwrap();
    let text = refused(&with);
    assert!(text.contains("top-4 of 31 experts"), "{text}");
    std::fs::write(&at, b"pgpredct").unwrap();
    assert!(refused(&with).contains("not a file of trained forecasts"));
}

/// Of a layer's experts some stay on the GPU for good: the file is for all of
/// them, so it is left unused, and one line says so.
fn on_a_gpu_some_experts_stay(file: &str) {
    let plan = |ram: u64| {
        let ram = ram.to_string();
        let least = ["plan", "--json", "--device", "cuda", "--vram", "270M"];
        let more = ["--context", "512", "--ram", &ram, "--predictor", file];
        let output = gpu::on_gpu("", &[&least[..], &more].concat())?;
        let notes = String::from_utf8_lossy(&output.stderr).into_owned();
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let sum = |name: &str| {
            let layers = plan["gpu"][name].as_array().cloned().unwrap_or_default();
            layers.iter().filter_map(Value::as_u64).sum::<u64>()
        };
        let parts = ["process_bytes", "scratch_bytes", "weights_bytes"];
        let bytes: u64 = parts.iter().filter_map(|name| plan["parts"][name].as_u64()).sum();
        Some((sum("fixed"), sum("slots"), bytes, notes))
    };
    let says = "--predictor has no effect: it was trained for all experts of a layer";
    let Some((fixed, slots, bytes, notes)) = plan(4 << 30) else { return };
    assert!(fixed == 0 && slots > 0 && !notes.contains(says), "{notes}");
    // The host has room for all experts but some.
    let (fixed, slots, _, notes) = plan(bytes - 1_500_000).expect("it was there");
    assert!(fixed > 0 && slots > 0, "{fixed} fixed, {slots} slots: {notes}");
    assert_eq!(notes.matches(says).count(), 1, "{notes}");
}
