//! `pregate trace`, and what other commands say of a trace that is not whole
//! or not real.

use pregate_predictor::Shape;
use pregate_traces::format::{Dropped, Writer};
use pregate_traces::{Header, Provenance, Row};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// The repository's cut of real routing: 313 tokens of gpt-oss-20b.
const TRACE: &str = "predictor/tests/data/gptoss20b/cut.json";

fn pregate(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pregate"));
    command.args(arguments).stdin(Stdio::null()).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.output().expect("the binary starts")
}

/// Standard output and error of a command that ends well.
fn said(arguments: &[&str]) -> (String, String) {
    let output = pregate(arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {errors}");
    (out, errors)
}

/// Exit code and message.
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = pregate(arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code().expect("an exit, not a signal"), text)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> String {
        self.0.path().join(name).to_string_lossy().into_owned()
    }
}

/// Sixty tokens of a small model: searches are short.
fn real(path: &Path) {
    let header = Header {
        model: "a real one".into(),
        shape: Shape::uniform(3, 8, 2, 0),
        source: Provenance::Imported { format: "somewhere".into() },
        ..Header::default()
    };
    let mut writer = Writer::new(fs::File::create(path).unwrap(), &header, &[]).unwrap();
    for token in 0..60u16 {
        let mut row = Row::default();
        (row.starts_sequence, row.pass_tokens) = (token % 20 == 0, 1);
        row.position = u32::from(token % 20);
        (0..3).for_each(|layer| row.push_layer(&[token / 3 % 6, 7 - layer % 2], &[]));
        writer.push(&row).unwrap();
    }
    writer.finish().unwrap();
}

/// Ten tokens, a gap, ten tokens, and the first two of a pass of four; without
/// an end.
fn torn(path: &Path) {
    let header = Header {
        model: "torn".into(),
        shape: Shape::uniform(2, 8, 2, 1_000_000),
        ..Header::default()
    };
    let mut writer = Writer::new(fs::File::create(path).unwrap(), &header, &[]).unwrap();
    for token in 0..22u32 {
        let mut row = Row::default();
        row.starts_sequence = token % 10 == 0;
        row.pass_tokens = [1, 4, 0][token.saturating_sub(19) as usize];
        (row.is_prompt, row.position) = (token >= 20, token % 10);
        let first = (token % 7) as u16;
        (0..2).for_each(|_| row.push_layer(&[first, first + 1], &[]));
        if token == 10 {
            writer.gap(Dropped { passes: 3, tokens: 5 }).unwrap();
        }
        writer.push(&row).unwrap();
    }
    writer.flush().unwrap();
}

#[test]
fn what_is_missing_from_a_recording_is_said_by_everybody() {
    let folder = Folder::new();
    let torn_file = folder.at("torn.pgtrace");
    torn(Path::new(&torn_file));
    let missing = ["cut off; 22 tokens", "3 passes of 5 tokens"];
    let check = |notes: &str| {
        assert!(missing.iter().all(|words| notes.contains(words)), "{notes}");
        assert_eq!(notes.matches("cut off").count(), 1, "once: {notes}");
    };
    let (line, notes) = said(&["replay", &torn_file, "--slots", "4", "--json"]);
    check(&notes);
    check(json(&line)["notice"].as_str().unwrap());
    assert_eq!(json(&line)["tokens"].as_u64().unwrap(), 20);
    check(&said(&["replay", &torn_file, "--slots", "4,6", "--policy", "lru,lfu"]).1);
    check(&said(&["trace", "stats", &torn_file]).1);
    check(&said(&["train-predictor", &torn_file, "--out", &folder.at("p.bin")]).1);
    let whole = &said(&["replay", TRACE, "--slots", "8", "--json"]).0;
    assert_eq!(json(whole)["notice"], Value::Null);

    // A copy can be read, says what it has lost, and that it has a gap.
    let copy = folder.at("copy.pgtrace");
    let (text, notes) = said(&["trace", "export", &torn_file, "--out", &copy]);
    check(&notes);
    assert!(text.contains("20 tokens to") && notes.contains("the last 2 tokens"), "{text}{notes}");
    let notes = said(&["trace", "stats", &copy]).1;
    assert!(notes.contains(missing[1]) && !notes.contains("cut off"), "{notes}");
}

#[test]
fn a_made_up_trace_is_called_so_wherever_it_goes() {
    let folder = Folder::new();
    let (real_file, wide) = (folder.at("real.pgtrace"), folder.at("wide.pgtrace"));
    real(Path::new(&real_file));
    let generate = [
        "trace",
        "generate",
        "--from",
        &real_file,
        "--experts",
        "16",
        "--top-k",
        "2",
        "--layers",
        "3",
        "--tokens",
        "60",
        "--expert-bytes",
        "1000000",
        "--seed",
        "4",
        "--out",
    ];
    let (text, _) = said(&[&generate[..], &[&wide]].concat());
    assert!(text.contains("60 SYNTHETIC tokens") && text.contains("after a real one"), "{text}");
    // Target, the fit in the trace's shape, the fit in this one.
    let lines: Vec<Vec<&str>> =
        text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert!(lines.iter().any(|line| line.starts_with(&["entropy"]) && line.len() == 4), "{text}");
    let again = folder.at("again.pgtrace");
    said(&[&generate[..], &[&again]].concat());
    assert_eq!(fs::read(&wide).unwrap(), fs::read(&again).unwrap(), "the same seed");

    let check = |trace: &str| {
        let stats = json(&said(&["trace", "stats", "--json", trace]).0);
        assert_eq!(
            (stats["tokens"].as_u64(), stats["layers"].as_array().unwrap().len()),
            (Some(60), 3)
        );
        let provenance = stats["provenance"].as_str().unwrap();
        assert!(
            provenance.contains("SYNTHETIC") && provenance.contains("seed 4"),
            "{trace}: {stats}"
        );
        let head = said(&["trace", "head", "--json", "-n", "2", trace]).0;
        let labelled = head.lines().all(|line| json(line)["synthetic_from"] == "a real one");
        assert!(labelled, "{trace}: {head}");
    };
    check(&wide);
    for name in ["w.json", "w.csv", "w.jsonl"] {
        let (out, back) = (folder.at(name), folder.at("back.pgtrace"));
        said(&["trace", "export", &wide, "--out", &out]);
        check(&out);
        said(&["trace", "import", &out, "--out", &back]);
        check(&back);
    }
    let notes = said(&["train-predictor", &wide, "--out", &folder.at("p.bin")]).1;
    assert!(notes.contains("SYNTHETIC"), "{notes}");

    let (code, text) = refused(&[&generate[..], &[&folder.at("w.json")]].concat());
    assert!(code == 2 && text.contains(".pgtrace"), "{text}");
    let empty = folder.at("empty.pgtrace");
    let header = Header { shape: Shape::uniform(2, 8, 2, 0), ..Header::default() };
    Writer::new(fs::File::create(&empty).unwrap(), &header, &[]).unwrap().finish().unwrap();
    let shape = ["--experts", "4", "--top-k", "2", "--layers", "2"];
    let from = |from: &str, out: &str| {
        refused(&[&["trace", "generate", "--from", from, "--out", out], &shape[..]].concat())
    };
    let (code, text) = from(&empty, &folder.at("x.pgtrace"));
    assert!(code == 2 && text.contains("no tokens"), "{text}");
    let before = fs::read(&wide).unwrap();
    let (code, text) = from(&wide, &wide);
    assert!(code == 2 && text.contains("the trace that is read"), "{text}");
    assert_eq!(fs::read(&wide).unwrap(), before, "and is as it was");
}

#[test]
fn a_recording_does_not_overwrite_its_model() {
    let folder = Folder::new();
    let model = folder.at("m.gguf");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pregate-demo.gguf");
    fs::copy(demo, &model).unwrap();
    let size = fs::metadata(&model).unwrap().len();
    let run = ["run", "--model", &model, "--prompt", "x", "--max-tokens", "1", "--record", &model];
    let (code, text) = refused(&run);
    assert!(code == 2 && text.contains("a file of the model"), "{text}");
    assert_eq!(fs::metadata(&model).unwrap().len(), size);
}

#[test]
fn an_import_checks_digests_and_tells_the_right_error() {
    let folder = Folder::new();
    let out = folder.at("out.pgtrace");
    let (source, trace) = (Path::new(TRACE), folder.at("t.json"));
    let exported = folder.at("a.pgtrace");
    said(&["trace", "import", &source.to_string_lossy(), "--out", &exported]);
    said(&["trace", "export", &exported, "--out", &trace]);
    said(&["trace", "import", &trace, "--out", &out]);
    let ids = folder.at("t.ids.u8");
    let mut bytes = fs::read(&ids).unwrap();
    bytes.swap(0, 1);
    fs::write(&ids, bytes).unwrap();
    let (code, text) = refused(&["trace", "import", &trace, "--out", &out]);
    assert!(code == 3 && text.contains("SHA-256") && text.contains("t.ids.u8"), "{text}");

    // SGLang's ids say no shape: the message names the command that takes it.
    let answer = folder.at("answer.json");
    fs::write(&answer, r#"{"meta_info":{"routed_experts":"AAAAAAEAAAACAAAAAwAAAA=="}}"#).unwrap();
    for command in ["stats", "head"] {
        let (code, text) = refused(&["trace", command, &answer]);
        assert!(code == 3 && text.contains("trace import needs --layers and --top-k"), "{text}");
    }
    let import = ["trace", "import", "--layers", "1", "--top-k", "2", &answer, "--out", &out];
    assert!(said(&import).0.contains("2 tokens"));
    let (_, text) =
        refused(&["trace", "import", "--layers", "2", "--top-k", "3", &answer, "--out", &out]);
    assert!(text.contains("4 ids in the shape"), "{text}");
}

/// All files of a folder with what is in them.
fn everything(folder: &Path) -> Vec<(String, Option<Vec<u8>>)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let mut all: Vec<_> = entries.map(|path| (name(&path), fs::read(&path).ok())).collect();
    all.sort();
    all
}

#[test]
fn an_import_or_export_that_fails_leaves_older_files_as_they_were() {
    let folder = Folder::new();
    let bad = folder.at("bad.pgtrace");
    said(&["trace", "import", TRACE, "--out", &bad]);
    let olds = ["old.pgtrace", "old.jsonl", "old.csv", "old.json", "old.w.f16"];
    olds.iter().for_each(|old| fs::write(folder.at(old), "older").unwrap());
    for old in ["old.ids.u8", "old.tok.u32"] {
        fs::write(folder.at(old), "older").unwrap();
    }
    fs::create_dir(folder.at("folder.json")).unwrap();
    let mut bytes = fs::read(&bad).unwrap();
    let middle = bytes.len() * 3 / 4;
    bytes[middle] ^= 1;
    fs::write(&bad, bytes).unwrap();
    let before = everything(folder.0.path());
    for (command, old) in [
        ("import", "old.pgtrace"),
        ("export", "old.jsonl"),
        ("export", "old.csv"),
        ("import", "old.json"),
    ] {
        let (code, text) = refused(&["trace", command, &bad, "--out", &folder.at(old)]);
        assert!(code == 3 && text.contains("checksum"), "{old}: {text}");
        assert_eq!(everything(folder.0.path()), before, "{old}");
    }
    let (code, _) = refused(&["trace", "export", TRACE, "--out", &folder.at("folder.json")]);
    assert_eq!((code, everything(folder.0.path())), (1, before));
    // A good one replaces them, and takes away what is not its own.
    said(&["trace", "export", TRACE, "--out", &folder.at("old.json")]);
    said(&["trace", "export", &folder.at("old.json"), "--out", &folder.at("old.csv")]);
    let after = everything(folder.0.path());
    let names: Vec<&str> = after.iter().map(|(name, _)| name.as_str()).collect();
    let wanted = [
        "bad.pgtrace",
        "folder.json",
        "old.csv",
        "old.ids.u8",
        "old.json",
        "old.jsonl",
        "old.pgtrace",
        "old.tok.u32",
    ];
    assert_eq!(names, wanted, "the trace has no weights");
}

#[test]
fn no_file_of_a_trace_is_written_over() {
    let folder = Folder::new();
    let manifest = r#"{"model":{"num_layers":1,"num_experts_per_layer":4},"scheduler_steps":[]}"#;
    fs::write(folder.at("manifest.json"), manifest).unwrap();
    fs::write(folder.at("events.csv"), "token,layer,expert\n0,0,1\n1,0,2\n").unwrap();
    let before = everything(folder.0.path());
    let from = folder.at("manifest.json");
    for out in ["events.csv", "manifest.json"] {
        let (code, text) = refused(&["trace", "import", &from, "--out", &folder.at(out)]);
        assert!(code == 2 && text.contains("the trace that is read"), "{text}");
        assert_eq!(everything(folder.0.path()), before, "{out}");
    }
}

/// Layers of unlike width: each has a chance of its own.
#[test]
fn statistics_know_the_width_of_every_layer() {
    let folder = Folder::new();
    let layers = r#"[{"experts":4,"top_k":1},{"experts":200,"top_k":1}]"#;
    let about = format!(r#"{{"format":"pregate-trace-jsonl-1","layers":{layers}}}"#);
    let token = r#"{"starts_sequence":true,"pass_tokens":1,"experts":[[1],[2]]}"#;
    fs::write(folder.at("t.jsonl"), format!("{about}\n{token}\n")).unwrap();
    let (text, _) = said(&["trace", "stats", &folder.at("t.jsonl")]);
    for chance in ["(25.0 % if all were alike)", "(0.5 % if all were alike)"] {
        assert!(text.contains(chance), "{text}");
    }
}

#[test]
#[cfg(unix)]
fn a_pipe_is_told_to_be_none() {
    for form in ["auto", "csv"] {
        let out = Folder::new().at("t.pgtrace");
        let (code, text) =
            refused(&["trace", "import", "--form", form, "/dev/stdin", "--out", &out]);
        assert!(code == 3 && text.contains("it has to be a file"), "{text}");
    }
}
