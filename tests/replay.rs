//! `pregate replay` as its users call it: counts, JSON, pictures, messages.

#[path = "support/xml.rs"]
mod xml;

use pregate_predictor::{LayerShape, Shape};
use pregate_traces::{Header, Provenance, Row, format::Writer};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The repository's cut of real routing: 313 tokens of gpt-oss-20b.
const TRACE: &str = "predictor/tests/data/gptoss20b/cut.json";

fn root(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

fn replay(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pregate"));
    command.arg("replay").args(arguments).stdin(Stdio::null());
    command.current_dir(root("")).output().expect("the binary starts")
}

fn stdout(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn lines(arguments: &[&str]) -> Vec<Value> {
    let text = stdout(&replay(arguments));
    text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect()
}

/// Exit code and message, which is one line.
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = replay(arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.stdout.is_empty() && !text.contains("panicked"), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    (output.status.code().expect("an exit, not a signal"), text)
}

/// Hits of LRU with `slots` per layer as the README of the traces defines it,
/// by the plainest means: an expert is there if fewer than `slots` others were
/// used since.
fn lru_by_hand(slots: usize) -> (u64, u64) {
    let ids = std::fs::read(root("predictor/tests/data/gptoss20b/cut.ids.u8")).unwrap();
    let mut recent: Vec<Vec<u8>> = vec![Vec::new(); 24];
    let (mut hits, mut accesses) = (0, 0);
    for event in ids.chunks(4).enumerate() {
        let (layer, experts) = (&mut recent[event.0 % 24], event.1);
        let experts: Vec<u8> = experts.iter().copied().filter(|&id| id != 255).collect();
        let is_there = |id: &&u8| layer.iter().take(slots).any(|found| found == *id);
        hits += experts.iter().filter(is_there).count() as u64;
        accesses += experts.len() as u64;
        // Rank 0 ends up in front.
        for id in experts.iter().rev() {
            layer.retain(|found| found != id);
            layer.insert(0, *id);
        }
    }
    (accesses, hits)
}

#[test]
fn one_object_per_line_with_exact_counts() {
    let found = lines(&[
        TRACE,
        "--policy",
        "lru",
        "--forecast",
        "none",
        "--slots",
        "12.5%,25%,16",
        "--json",
    ]);
    assert_eq!(found.len(), 3);
    for (line, slots) in found.iter().zip([4, 8, 16]) {
        let number = |key: &str| line[key].as_u64().unwrap_or_else(|| panic!("{key}: {line}"));
        let (accesses, hits) = lru_by_hand(slots as usize);
        assert_eq!((number("accesses"), number("hits")), (accesses, hits), "{line}");
        assert_eq!((number("slots_per_layer"), number("lru_hits")), (slots, hits));
        assert_eq!(number("misses"), accesses - hits);
        assert!(number("belady_hits") >= hits && number("no_cache_hits") == 0);
        assert_eq!(number("tokens"), 313);
        for (key, wanted) in [("trace", TRACE), ("policy", "lru"), ("forecast", "none")] {
            assert_eq!(line[key], wanted);
        }
        assert_eq!((&line["warm"], &line["synthetic_from"]), (&Value::Bool(false), &Value::Null));
        // 13,219,200 bytes an expert: what gpt-oss-20b has, and that is said.
        assert!(line["weights"].as_str().unwrap().contains("assumed"), "{line}");
        let tok_s = line["tok_s"].as_f64().unwrap();
        assert!(tok_s > 0.0 && tok_s <= line["bound_tok_s"].as_f64().unwrap() * 1.001, "{line}");
    }
    assert_eq!(found[0]["gap_closed"].as_f64(), Some(0.0), "LRU went no way from LRU");
    // Of the golden counts' rules; `cargo run --example golden` has the large
    // traces.
    let belady: Vec<_> = found.iter().map(|line| line["belady_hits"].as_u64().unwrap()).collect();
    assert!(belady.is_sorted() && found[0]["belady_hits"] == found[0]["lru_hits"], "{belady:?}");
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<String> = ["a.svg", "b.svg", "c.svg", "d.svg"]
        .iter()
        .map(|name| folder.path().join(name).to_string_lossy().into_owned())
        .collect();
    let once = |plot: &str, map: &str| {
        let more = ["--slots", "25%,50%", "--policy", "lru,frequency", "--plot", plot];
        let all = [&[TRACE, "--json", "--heatmap", map][..], &more].concat();
        stdout(&replay(&all))
    };
    let (first, second) = (once(&paths[0], &paths[1]), once(&paths[2], &paths[3]));
    assert_eq!(first, second);
    assert_eq!(first.lines().count(), 4);
    let read = |path: &String| std::fs::read_to_string(path).unwrap();
    let [curve, map] = [0, 1].map(|index| read(&paths[index]));
    assert_eq!([&curve, &map], [&read(&paths[2]), &read(&paths[3])]);
    for picture in [&curve, &map] {
        xml::check(picture).unwrap_or_else(|error| panic!("{error}: {picture}"));
        assert!(picture.contains("prefers-color-scheme") && picture.contains("gpt-oss-20b"));
        assert!(!picture.contains("href") && !picture.contains("url("), "nothing from outside");
    }
    for name in ["lru", "frequency", "Belady", "tok/s", "cpu-ddr5"] {
        assert!(curve.contains(name), "{name}");
    }
    // Two settings, each with a cell for 24 layers and two sizes, and numbers.
    assert_eq!(map.matches("class=\"middle on-").count(), 2 * 24 * 2);
    // Of one size, hits of each expert and how often it is asked for.
    let one = [TRACE, "--json", "--slots", "25%", "--policy", "lru", "--heatmap", &paths[1]];
    stdout(&replay(&one));
    let map = read(&paths[1]);
    xml::check(&map).unwrap_or_else(|error| panic!("{error}: {map}"));
    for words in ["Hits of each expert", "slots: 8 of 32", "How often each expert is asked for"] {
        assert!(map.contains(words), "{words}: {map}");
    }
    assert_eq!(map.matches("24 MoE layers").count(), 2, "each says whose it is");
}

#[test]
fn people_get_a_table_a_curve_and_what_was_assumed() {
    let text = stdout(&replay(&[TRACE, "--slots", "10%,25%,50%", "--policy", "lru"]));
    for words in ["imported from rtrace-1", "top-4 of 32", "assumed", "cold", "8 of 32", "Belady"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(text.contains('┤') && !text.contains('\x1b'), "{text}");
    assert!(text.lines().filter(|line| line.contains('│')).all(|line| line.chars().count() <= 80));

    let compared = ["--machine", "rtx3060-12gb,rtx5090", "--slots", "25%", "--compare"];
    let text = stdout(&replay(&[&[TRACE][..], &compared].concat()));
    assert!(text.contains("rtx3060-12gb tok/s") && text.contains("rtx5090 tok/s"), "{text}");
    let (code, text) = refused(&[TRACE, "--compare"]);
    assert!(code == 2 && text.contains("two machines"), "{text}");
    let found = lines(&[&[TRACE, "--json"][..], &compared].concat());
    let [pair] = found.as_slice() else { panic!("{found:?}") };
    let tok_s = ["first", "second"].map(|run| pair[run]["tok_s"].as_f64().unwrap());
    // Numbers are read back from JSON to the last bit but one.
    let speed = pair["speed"].as_f64().unwrap() * tok_s[0] / tok_s[1];
    assert!((speed - 1.0).abs() < 1e-12, "{pair}");
    assert_eq!(
        (&pair["compared"], &pair["second"]["machine"]),
        (&json!("machines"), &json!("rtx5090"))
    );
    assert_eq!(pair["first"]["trace"], TRACE);
}

#[test]
fn without_decoded_tokens_there_is_no_ratio() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.pgtrace");
    let header = Header { shape: Shape::uniform(2, 8, 2, 1_000_000), ..Header::default() };
    written(&path, &header, 8);
    let compared = [path.to_str().unwrap(), "--slots", "4", "--policy", "lru,lfu", "--compare"];
    let text = stdout(&replay(&compared));
    assert!(text.contains("second / first") && !text.contains("NaN"), "{text}");
    assert!(text.lines().any(|line| line.trim_end().ends_with('-')), "{text}");
    let line = &lines(&[&compared[..], &["--json"]].concat())[0];
    assert_eq!((&line["speed"], &line["compared"]), (&Value::Null, &json!("policies")));
}

#[test]
fn warmth_is_told_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.pgtrace");
    let name = path.to_str().unwrap();
    let mut shape = Shape::uniform(2, 8, 2, 1_000_000);
    shape.layers[1] = shape.layers[1].map(|layer| LayerShape { top_k: 1, ..layer });
    shape.layers[1].as_mut().unwrap().expert_bytes = 2_000_000;
    written(&path, &Header { shape, ..Header::default() }, 40);
    let told = |warm: &[&str]| {
        let line = &lines(&[&[name, "--slots", "4", "--json"][..], warm].concat())[0];
        let number = |key: &str| line[key].as_u64().unwrap();
        let counted = number("tokens") + number("prompt_tokens");
        (line["warm"].as_bool().unwrap(), number("warm_tokens"), counted)
    };
    assert_eq!(told(&[]), (false, 0, 40));
    assert_eq!(told(&["--warm=0"]), (false, 0, 40));
    // The first pass has eight of them.
    assert_eq!(told(&["--warm"]), (true, 4, 32));
    assert_eq!(told(&["--warm=whole"]), (true, 40, 40));
    let text = stdout(&replay(&[name, "--slots", "4"]));
    let words = ["2 MoE layers, top-2 of 8, top-1 of 8 experts, 40 tokens", "1.0 MB to 2.0 MB"];
    assert!(words.iter().all(|words| text.contains(words)), "{text}");
    // A file that was cut off does not say how many tokens it has.
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert_eq!(pregate_traces::open(&path).unwrap().tokens(), None);
    assert_eq!(told(&["--warm"]), (true, 4, 32));
}

#[test]
fn what_is_read_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (trace, machine) = (path("t.pgtrace"), path("m.toml"));
    synthetic(Path::new(&trace));
    let text = std::fs::read_to_string(root("traces/src/replay/presets/cpu-ddr5.toml")).unwrap();
    std::fs::write(&machine, text).unwrap();
    let before = [&trace, &machine].map(|path| std::fs::read(path).unwrap());
    let twice = path("twice.svg");
    for outputs in [
        &["--plot", &trace][..],
        &["--heatmap", &trace],
        &["--machine", &machine, "--plot", &machine],
        &["--plot", &twice, "--heatmap", &twice],
    ] {
        let (code, text) = refused(&[&[&trace, "--slots", "4"][..], outputs].concat());
        assert!(code == 2 && text.contains(outputs[outputs.len() - 2]), "{text}");
    }
    assert_eq!([&trace, &machine].map(|path| std::fs::read(path).unwrap()), before);
    assert!(!Path::new(&twice).exists());
}

#[test]
fn text_of_files_moves_no_cursor() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (trace, machine) = (path("t.pgtrace"), path("m.toml"));
    synthetic(Path::new(&trace));
    let preset = std::fs::read_to_string(root("traces/src/replay/presets/cpu-ddr5.toml")).unwrap();
    let hostile = preset.replacen("name = \"cpu-ddr5\"", "name = \"a\\u001b[2Jb\"", 1);
    assert_ne!(hostile, preset);
    std::fs::write(&machine, &hostile).unwrap();
    let plain = |text: &str, wanted: &str| {
        assert!(text.contains(wanted), "{wanted}: {text:?}");
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    };
    let two = format!("cpu-ddr5,{machine}");
    plain(&stdout(&replay(&[&trace, "--machine", &machine, "--slots", "4"])), "[2Jb");
    let compared = [&trace, "--machine", &two, "--slots", "4", "--compare"];
    plain(&stdout(&replay(&compared)), "[2Jb tok/s");
    plain(&refused(&[TRACE, "--machine", &machine, "--ram", "1M"]).1, "[2Jb");
    std::fs::write(&machine, format!("\"x\\u001b[2J\" = 1\n{preset}")).unwrap();
    plain(&refused(&[&trace, "--machine", &machine]).1, "[2J");
    for command in ["stats", "head"] {
        let mut pregate = Command::new(env!("CARGO_BIN_EXE_pregate"));
        let output = pregate.args(["trace", command, &trace]).output().unwrap();
        plain(&stdout(&output), "<script>");
    }
}

#[test]
fn mistakes_say_what_to_do_next() {
    let (code, text) = refused(&[TRACE, "--machine", "rtx3"]);
    assert!(code == 2 && text.contains("rtx4060ti-16gb") && text.contains("doctor"), "{text}");
    let (code, text) = refused(&[TRACE, "--model", "qwen3-30b-a3b"]);
    assert!(code == 2 && text.contains("24 MoE layers") && text.contains("48 MoE"), "{text}");
    let (code, text) = refused(&[TRACE, "--forecast", "learned-network"]);
    assert!(code == 2 && text.contains("train-predictor"), "{text}");
    assert_eq!(refused(&["/nowhere/trace.json"]).0, 2);
    let (code, text) = refused(&["README.md"]);
    assert!(code == 3 && text.contains("not a trace"), "{text}");
    let (code, text) = refused(&[TRACE, "--machine", "rtx4090", "--vram", "2G"]);
    assert!(code == 4 && text.contains("too little"), "{text}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.toml");
    let name = path.to_str().unwrap();
    for (contents, wanted) in [
        (&b"name = \"x\"\nram_bytes = \"lots\"\n"[..], "line 2: ram_bytes"),
        (b"\xff\xfe", "line 1: found bytes"),
        (b"name = [[[[", "line 1"),
    ] {
        std::fs::write(&path, contents).unwrap();
        let (code, text) = refused(&[TRACE, "--machine", name]);
        assert!(code == 3 && text.contains(name) && text.contains(wanted), "{text}");
    }
}

/// A made-up trace with a prompt, from somebody whose names are markup.
fn synthetic(path: &Path) {
    let header = Header {
        model: "<script>&\u{1b}[2J".to_string(),
        shape: Shape::uniform(2, 8, 2, 1_000_000),
        source: Provenance::Synthetic { from: "a]]> real one".to_string(), seed: 7 },
        ..Header::default()
    };
    written(path, &header, 40);
}

/// A prompt of 8 tokens, then decoded ones, `tokens` in all.
fn written(path: &Path, header: &Header, tokens: u32) {
    let mut writer = Writer::new(std::fs::File::create(path).unwrap(), header, &[]).unwrap();
    for position in 0..tokens {
        let is_prompt = position < 8;
        let mut row = Row::default();
        row.starts_sequence = position == 0;
        row.pass_tokens = if is_prompt { 8 * u32::from(position == 0) } else { 1 };
        (row.is_prompt, row.position, row.token) = (is_prompt, position, Some(position));
        for (layer, shape) in header.shape.moe() {
            let first = ((position + layer as u32) % 7) as u16;
            let experts: Vec<u16> = (first..).take(shape.top_k).collect();
            row.push_layer(&experts, &[]);
        }
        writer.push(&row).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_synthetic_trace_is_called_so_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (trace, curve, map) = (path("t.pgtrace"), path("c.svg"), path("m.svg"));
    synthetic(Path::new(&trace));
    let output = replay(&[&trace, "--slots", "4,5,6", "--plot", &curve, "--heatmap", &map]);
    let (text, notes) = (stdout(&output), String::from_utf8(output.stderr).unwrap());
    assert!(text.contains("SYNTHETIC: made up after a]]> real one, seed 7"), "{text}");
    assert!(text.contains("TTFT ms") && !text.contains('\x1b'), "{text}");
    assert!(notes.contains("synthetic"), "{notes}");
    for picture in [curve, map] {
        let picture = std::fs::read_to_string(picture).unwrap();
        xml::check(&picture).unwrap_or_else(|error| panic!("{error}: {picture}"));
        assert!(picture.contains("SYNTHETIC") && picture.contains("&lt;script&gt;"), "{picture}");
    }
    let line = &lines(&[&trace, "--slots", "4", "--json", "--warm=10"])[0];
    assert_eq!(line["synthetic_from"], "a]]> real one");
    assert_eq!((&line["warm"], line["warm_tokens"].as_u64()), (&Value::Bool(true), Some(10)));
    assert_eq!((line["tokens"].as_u64(), line["ttft_ms"].is_null()), (Some(30), true), "{line}");
}

#[test]
fn what_doctor_measured_is_a_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("here.toml");
    let name = path.to_str().unwrap();
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_pregate"));
    let output = doctor.args(["doctor", "--machine-file", name]).output().unwrap();
    assert!(output.status.success());
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("measured by pregate doctor") && text.contains("assumed"), "{text}");
    let found = lines(&[TRACE, "--machine", name, "--slots", "25%", "--json"]);
    assert_eq!(found[0]["machine"], "here");
    assert!(found[0]["tok_s"].as_f64().unwrap() > 0.0);
}

/// What is read beside what the command line names: columns of a manifest, and
/// the file of `--predictor`.
#[test]
fn nothing_that_is_read_is_drawn_over() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["cut.json", "cut.ids.u8", "cut.tok.u32"] {
        let from = root("predictor/tests/data/gptoss20b").join(name);
        std::fs::copy(from, folder.path().join(name)).unwrap();
    }
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (trace, ids, nowhere) = (at("cut.json"), at("cut.ids.u8"), at("no/such.svg"));
    for out in [&trace, &ids] {
        let (code, text) = refused(&[&trace, "--slots", "4", "--plot", out]);
        assert!(code == 2 && text.contains("is read as"), "{text}");
    }
    // Told before anything is replayed: no line is on standard output.
    let (code, text) = refused(&[&trace, "--slots", "4", "--heatmap", &nowhere]);
    assert!(code != 0 && text.contains("such.svg"), "{text}");
    assert!(lines(&[&trace, "--slots", "4", "--json"])[0]["hits"].as_u64().unwrap() > 0);

    let model = at("model.gguf");
    std::fs::copy(root("models/pregate-demo.gguf"), &model).unwrap();
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_pregate"));
    doctor.args(["doctor", "--model", &model, "--machine-file", &model]);
    let output = doctor.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && text.contains("a file of the model"), "{text}");
    let read = |path: &str| std::fs::read(path).unwrap();
    assert!(read(&model) == std::fs::read(root("models/pregate-demo.gguf")).unwrap());
}

#[test]
fn experts_may_have_any_size_and_what_does_not_fit_says_so() {
    let same = ["--slots", "8", "--policy", "lru", "--forecast", "none", "--json"];
    let sized = |size: &[&str]| lines(&[&[TRACE], &same[..], size].concat()).remove(0);
    let (usual, small) = (sized(&[]), sized(&["--expert-bytes", "1MB"]));
    assert_eq!((&usual["hits"], &usual["fits"]), (&small["hits"], &Value::Bool(true)));
    assert_eq!(small["bytes"].as_u64(), Some(1_000_000 * small["misses"].as_u64().unwrap()));
    assert!(small["weights"].as_str().unwrap().starts_with("as --expert-bytes says"), "{small}");
    let little = ["--machine", "rtx3060-12gb", "--vram", "4GB"];
    assert_eq!(sized(&little)["fits"], Value::Bool(false));
    let text = stdout(&replay(&[&[TRACE, "--slots", "8,32"], &little[..]].concat()));
    assert!(text.contains("note      from 8 slots a layer on they do not fit"), "{text}");
}

/// The best that any rule could do bounds every policy, as the table says.
#[test]
fn no_policy_is_above_the_best() {
    for line in lines(&[
        TRACE,
        "--machine",
        "rtx3060-12gb",
        "--slots",
        "4,8,16",
        "--policy",
        "all",
        "--forecast",
        "none",
        "--json",
    ]) {
        let count = |name: &str| line[name].as_u64().unwrap();
        assert!(count("lru_hits") <= count("best_hits"), "{line}");
        assert!(count("hits") <= count("best_hits"), "{line}");
        assert!(line["gap_closed"].as_f64().is_none_or(|share| share <= 1.0), "{line}");
    }
}
