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

/// On a machine without CUDA it says so, and is well.
#[test]
fn doctor_looks_at_everything_and_a_gpu_is_no_must() {
    let output = run(&["doctor"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for about in ["processor", "experts", "memory", "pinning", "model", "disk", "gpu"] {
        let lines = text.lines().filter(|line| line.split_whitespace().nth(1) == Some(about));
        assert!(lines.count() >= 1, "nothing about {about}: {text}");
    }
    let report: serde_json::Value =
        serde_json::from_str(&stdout(&run(&["doctor", "--json"]))).expect("JSON");
    assert_eq!(report["can_run"], true);
    assert!(
        report["cpu_experts"]["line"]["gb_s"].as_f64().is_some_and(|gb_s| gb_s > 0.0),
        "{report}"
    );
    let gpus = report["gpus"].as_array().expect("a list");
    let of_gpu = report["findings"].as_array().expect("a list").iter();
    let of_gpu: Vec<_> = of_gpu.filter(|finding| finding["about"] == "gpu").collect();
    assert_eq!(of_gpu.len(), gpus.len().max(1), "{report}");
    if gpus.is_empty() {
        assert_eq!(of_gpu[0]["state"], "note", "{report}");
        let words = of_gpu[0].to_string();
        assert!(words.contains("driver"), "{words}");
    }

    let output = run(&["doctor", "--model", "/nowhere/model.gguf"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(stdout(&output).contains("BAD   model"), "{}", stdout(&output));
    assert!(output.stderr.is_empty());
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

fn plan_json(arguments: &[&str]) -> serde_json::Value {
    let output = run(&[&["plan", "--json", "-t", "1"], arguments].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&stdout(&output)).expect("JSON")
}

/// The sum of the object's numbers.
fn sum(object: &serde_json::Value) -> u64 {
    object.as_object().expect("an object").values().map(|v| v.as_u64().expect("bytes")).sum()
}

#[test]
fn plans_account_for_the_budget_and_slots_follow_it() {
    let all = plan_json(&["--context", "256"]);
    assert_eq!(all["placement"], "whole", "{all}");
    assert_eq!(all["slots"], serde_json::Value::Null);
    assert_eq!(all["prediction"]["hit_ratio"], 1.0);
    assert_eq!(all["prediction"]["binds"], "memory");

    // What the process itself holds is not ours to say: the budget is the
    // parts of the whole model, less some of its weights.
    let whole = sum(&all["parts"]);
    let budget = |less: u64| format!("{}", whole - less);
    let plan = plan_json(&["--context", "256", "--ram", &budget(4_000_000)]);
    assert_eq!(plan["placement"], "streaming", "{plan}");
    assert_eq!(plan["budget_bytes"], whole - 4_000_000);
    let placed = sum(&plan["parts"]) + plan["left_bytes"].as_u64().unwrap();
    assert_eq!(placed, whole - 4_000_000, "{plan}");
    let slots: Vec<u64> =
        plan["slots"].as_array().unwrap().iter().map(|slots| slots.as_u64().unwrap()).collect();
    let experts = plan["experts"].as_array().unwrap();
    assert_eq!(slots.len(), experts.len());
    for (slots, experts) in slots.iter().zip(experts) {
        assert!((4..=experts.as_u64().unwrap()).contains(slots), "{plan}");
    }
    let hits = plan["prediction"]["hit_ratio"].as_f64().unwrap();
    assert!(hits > 0.1 && hits < 1.0, "{plan}");
    assert!(plan["prediction"]["disk_bytes_per_token"].as_u64().unwrap() > 0, "{plan}");

    let text = run(&["plan", "--context", "256", "-t", "1", "--ram", &budget(4_000_000)]);
    let text = stdout(&text);
    for part in ["budget", "[w", "slots", "ring", "KV cache, 256 tokens", "prediction"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_budget_that_is_too_small_is_refused_with_the_one_that_works() {
    for command in [
        &["plan"][..],
        &["run", "--prompt", "x"],
        &["bench", "-p", "4", "-n", "0"],
        &["eval", "perplexity", "--file", "README.md"],
        &["chat"],
    ] {
        let (code, text) = failure(&[command, &["--ram", "10M", "-t", "1"]].concat());
        assert_eq!(code, 4, "{text}");
        assert!(text.contains("too small") && text.contains("--context"), "{text}");
        for part in ["weights", "KV cache", "scratch", "slots", "ring"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
    for nonsense in ["0", "lots", "1,5G", "0%", "1e9"] {
        let (code, text) = failure(&["plan", "--ram", nonsense]);
        assert_eq!(code, 2, "{text}");
    }
    let (code, text) = failure(&["plan", "--context", "99999", "--ram", "10M"]);
    assert_eq!(code, 2, "not a matter of memory: {text}");

    // The figure of the message works, with what a process's size varies.
    let (_, text) = failure(&["plan", "--ram", "10M", "-t", "1"]);
    let figure = text.split("works is ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let ram = format!("{}MB", figure.parse::<f64>().unwrap() + 1.0);
    let plan = plan_json(&["--ram", &ram]);
    let experts_of_a_token = 4;
    for slots in plan["slots"].as_array().unwrap() {
        assert!(slots.as_u64().unwrap() <= experts_of_a_token + 3, "{plan}");
    }
}

#[test]
fn statistics_have_two_forms() {
    let prompt = "extract a tar.gz archive";
    let question = ["run", "--prompt", prompt, "--temperature", "0", "--max-tokens", "4"];
    let answer = |more: &[&str]| {
        let output = run(&[&question[..], more].concat());
        let notes = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{notes}");
        (stdout(&output), notes)
    };
    let json = |notes: &str| -> serde_json::Value {
        let line = notes.lines().find(|line| line.starts_with('{')).expect(notes);
        serde_json::from_str(line).expect("JSON")
    };
    let (whole, notes) = answer(&["--stats"]);
    assert!(notes.contains("stats: 17 prompt tokens") && notes.contains("memory: "), "{notes}");
    let (_, notes) = answer(&["--stats", "json"]);
    let stats = json(&notes);
    assert_eq!(stats["tokens"], 4);
    assert!(stats["decode_tok_s"].as_f64().unwrap() > 0.0, "{stats}");
    assert_eq!(stats["stream"], serde_json::Value::Null);

    // A budget that this process cannot hold the whole model in.
    let plan = plan_json(&["--context", "128"]);
    let ram = format!("{}", sum(&plan["parts"]) - 6_000_000);
    let limited = ["--ram", &ram, "--context", "128", "-t", "1", "--stats"];
    let (streamed, notes) = answer(&limited);
    assert_eq!(streamed, whole, "placement changes speed, never tokens");
    assert!(notes.contains("stats: decode: 3 tokens, "), "{notes}");
    assert!(notes.contains("waiting for the disk") && notes.contains("% in slots"), "{notes}");
    let (_, notes) = answer(&[&limited[..], &["json"]].concat());
    let stats = json(&notes);
    let decode = &stats["stream"]["decode"];
    assert_eq!(decode["tokens"], 3, "the first token comes from the prompt's last pass");
    let asked = decode["layers"].as_array().unwrap().iter().map(|layer| {
        ["hits", "in_flight", "misses"]
            .map(|name| layer[name].as_u64().unwrap())
            .iter()
            .sum::<u64>()
    });
    assert_eq!(asked.sum::<u64>(), 3 * 6 * 4, "3 tokens, 6 layers, 4 experts: {decode}");
    let total = decode["time"]["total_ns"].as_u64().unwrap();
    assert!(decode["time"]["wait_disk_ns"].as_u64().unwrap() < total, "{decode}");
    let [bytes, busy] = ["bytes", "busy_ns"].map(|name| decode["link"][name].as_u64().unwrap());
    assert!(bytes > 0 && (1..2 * total).contains(&busy), "{decode}");
    let held = stats["held_bytes"].as_u64().unwrap();
    assert!(held <= ram.parse::<u64>().unwrap() + (64 << 20), "{held} bytes held, budget {ram}");
}

/// A `--ram` for the demo model that is `less` bytes too small for all of it.
fn ram_without(less: u64, context: &str) -> String {
    format!("{}", sum(&plan_json(&["--context", context])["parts"]) - less)
}

#[test]
fn streaming_options_are_checked_and_followed() {
    for (option, bad, allowed) in [
        ("--policy", "belady", "frequency"),
        ("--forecast", "oracle", "previous-token"),
        ("--disk", "tape", "uring"),
        ("--horizon", "0", "1 to 16"),
        ("--ring", "0", "1 to "),
    ] {
        let output = run(&["plan", option, bad]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.starts_with("pregate: ") && text.contains(allowed), "{text}");
        assert!(!text.contains("panicking"), "hostile forecasts are not offered: {text}");
    }
    let output = run(&["plan", "-t", "1", "--policy", "lru", "--ring", "5"]);
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(notes.contains("note: the whole model fits"), "{notes}");
    assert!(notes.contains("--policy, --ring have no effect"), "{notes}");

    let ram = ram_without(6_000_000, "128");
    let limited = ["--ram", &ram, "--context", "128"];
    assert_eq!(plan_json(&[&limited[..], &["--ring", "5"]].concat())["ring"], 5);
    let buffered = plan_json(&[&limited[..], &["--disk", "buffered"]].concat());
    let path = buffered["disk"]["path"].as_str().unwrap();
    assert!(path.contains("page cache"), "{buffered}");
    let output = run(&[&["plan", "-t", "1", "--ring", "4000"], &limited[..]].concat());
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(notes.contains("note: --ring 4000: there is memory for "), "{notes}");

    // Whoever steers, the tokens are those of the whole model.
    let question =
        ["run", "--prompt", "list files", "--temperature", "0", "--max-tokens", "6", "-t", "1"];
    let whole = stdout(&run(&question));
    for steered in [
        &["--policy", "lru", "--forecast", "none", "--disk", "threads"][..],
        &["--policy", "least-stale-pool", "--forecast", "token", "--horizon", "1", "--ring", "2"],
        &["--forecast", "inverse", "--disk", "buffered"],
    ] {
        let output = run(&[&question[..], &limited, steered].concat());
        let notes = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{notes}");
        assert!(notes.contains("experts from disk"), "{notes}");
        assert_eq!(stdout(&output), whole, "{steered:?}");
    }
}

#[test]
fn the_ledger_judges_forecasts_and_its_control_is_right() {
    let ram = ram_without(6_000_000, "128");
    let bench = ["bench", "-p", "0", "-n", "64", "-r", "1", "-t", "1", "--ram", &ram];
    let answer = |more: &[&str]| {
        let output = run(&[&bench[..], more].concat());
        let notes = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{notes}");
        (stdout(&output), notes)
    };
    let (text, _) = answer(&["--ledger", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let ledger = &report["ledger"];
    let of = |name: &str| -> Vec<&serde_json::Value> {
        let rows = ledger["forecasts"].as_array().unwrap().iter();
        rows.filter(|row| row["forecast"] == name && row["guesses"].as_u64() > Some(0)).collect()
    };
    let control = of("control");
    assert!(!control.is_empty(), "{ledger}");
    for row in control {
        for measure in ["slot_recall", "whole_set_rate", "gate_mass_recall"] {
            assert_eq!(row[measure], 1.0, "{measure}: {row}");
        }
    }
    assert!(!of("blend").is_empty() && !of("previous-token").is_empty(), "{ledger}");
    let total = &ledger["traffic_total"];
    let sum: u64 =
        ledger["traffic"].as_array().unwrap().iter().map(|r| r["issued"].as_u64().unwrap()).sum();
    assert_eq!(total["issued"], sum);
    assert!(ledger["link"]["bytes"].as_u64().unwrap() > 0, "{ledger}");

    let (text, _) = answer(&["--ledger"]);
    let table: Vec<&str> =
        text.lines().skip_while(|line| !line.starts_with("forecasts: slot recall")).collect();
    let column = table[1].split_whitespace().position(|name| name == "control").expect(&text);
    let rows = table[2..].iter().take_while(|line| !line.starts_with("slot recall"));
    let control: Vec<&str> =
        rows.map(|line| line.split_whitespace().nth(column).unwrap()).collect();
    assert!(control.contains(&"100.0"), "{text}");
    assert!(control.iter().all(|cell| ["100.0", "-"].contains(cell)), "{text}");
    assert!(table.iter().all(|line| line.chars().count() <= 100), "{text}");
    assert!(text.contains("hit bound") && text.contains("\nlink: "), "{text}");

    // Without reading ahead no policy beats Belady's rule.
    let (text, _) = answer(&["--forecast", "none", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let layers = report["stats"]["decode"]["layers"].as_array().unwrap();
    let count = |name: &str| layers.iter().map(|l| l[name].as_f64().unwrap()).sum::<f64>();
    let requests = count("hits") + count("in_flight") + count("misses");
    assert_eq!(requests, 64.0 * 6.0 * 4.0, "{report}");
    let bound = report["belady_hit_ratio"].as_f64().unwrap();
    assert!(count("hits") / requests <= bound && bound < 1.0, "{bound}: {report}");
    assert_eq!(report["ledger"], serde_json::Value::Null);

    // A forecast that breaks is named, and nothing else happens.
    let (_, notes) = answer(&["--forecast", "out-of-range"]);
    assert!(notes.contains("note: the forecast out-of-range gave "), "{notes}");
    let output = run(&["run", "--prompt", "x", "--max-tokens", "1", "--ledger"]);
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(notes.contains("note: --ledger: the whole model is in memory"), "{notes}");
}

/// What a run says and how it ends when `spoil` does something to its model
/// file while it generates.
#[cfg(unix)]
fn spoiled(ram: &str, spoil: impl FnOnce(&Path)) -> (Option<i32>, String) {
    use std::io::Read;
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    std::fs::copy(demo(), &model).unwrap();
    // Any token is as likely as any other: it would go on for long.
    let mut child = pregate(&["run", "--raw", "--prompt", "x", "--temperature", "100"])
        .args(["--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "1"])
        .args(["--max-tokens", "2000", "--context", "2048", "-t", "1", "--ram", ram])
        .args(["--model".as_ref(), model.as_os_str()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).expect("an answer begins");
    spoil(&model);
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[cfg(unix)]
#[test]
fn a_model_file_that_changes_while_it_is_used_is_an_error_and_no_signal() {
    use std::os::unix::fs::FileExt;
    let open = |path: &Path| std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let ram = &ram_without(6_000_000, "2048");
    let (code, text) = spoiled(ram, |path| open(path).set_len(1 << 20).unwrap());
    assert_eq!(code, Some(3), "truncated: {text}");
    assert!(text.contains("the model file changed while it was in use"), "{text}");
    assert!(text.contains("1048576 bytes instead of"), "{text}");

    let (code, text) = spoiled(ram, |path| {
        let len = std::fs::metadata(path).unwrap().len();
        let garbage = vec![0xa5; 1 << 20];
        for offset in (1 << 20..len - (1 << 20)).step_by(1 << 20) {
            open(path).write_all_at(&garbage, offset).unwrap();
        }
    });
    assert_eq!(code, Some(3), "overwritten: {text}");
    assert!(text.contains("a newer time of modification"), "{text}");

    // Another file under the same name harms nobody, and is told.
    let (code, text) = spoiled(ram, |path| {
        let other = path.with_extension("new");
        std::fs::write(&other, "another file").unwrap();
        std::fs::rename(other, path).unwrap();
    });
    assert_eq!(code, Some(0), "replaced: {text}");
    assert_eq!(text.matches("another file has this name now").count(), 1, "{text}");
}

#[test]
fn a_run_is_recorded_and_its_trace_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (trace, table) = (at("run.pgtrace"), at("run.csv"));
    let question =
        ["run", "--temperature", "0", "--max-tokens", "8", "--prompt", "extract a tar.gz archive"];
    let plain = run(&question);
    let streamed = ["--ram", "40M", "--model"];
    let recorded = run(&[&question[..], &streamed, &[&demo(), "--record", &trace]].concat());
    assert!(recorded.status.success(), "{recorded:?}");
    assert_eq!(recorded.stdout, plain.stdout, "recording changes nothing");
    let notes = String::from_utf8_lossy(&recorded.stderr).into_owned();
    assert!(notes.contains("recorded ") && notes.contains("run.pgtrace"), "{notes}");

    let json = |arguments: &[&str]| -> serde_json::Value {
        let output = run(arguments);
        serde_json::from_str(&stdout(&output)).unwrap_or_else(|_| panic!("{output:?}"))
    };
    let stats = json(&["trace", "stats", "--json", &trace]);
    // Traces and trained forecasts are bound to it, so it must not change.
    let fingerprint = "050ce99215a8f8ddd0a08845ef238813d51a7a1b320b4b1a4d2b9724cc0b2f88";
    assert_eq!(stats["fingerprint"], fingerprint, "{stats}");
    assert_eq!(stats["sequences"], 1);
    let first = json(&["trace", "head", "--json", "-n", "1", &trace]);
    assert_eq!((&first["position"], &first["is_prompt"]), (&0.into(), &true.into()));
    let prompt = first["pass_tokens"].as_u64().unwrap();
    assert!(prompt > 1 && prompt < stats["tokens"].as_u64().unwrap(), "prompt, then decoding");
    let served = first["served"].as_array().unwrap();
    assert_eq!(served.len(), stats["layers"].as_array().unwrap().len());
    let bytes: u64 = served.iter().map(|layer| layer["bytes"].as_u64().unwrap()).sum();
    assert!(bytes > 0, "experts came from disk");

    assert!(run(&["trace", "export", &trace, "--out", &table]).status.success());
    let back = at("back.pgtrace");
    assert!(run(&["trace", "import", &table, "--out", &back]).status.success());
    let again = json(&["trace", "stats", "--json", &back]);
    assert_eq!(again["reuse"], stats["reuse"]);
    let text = stdout(&run(&["trace", "stats", &back]));
    assert!(text.contains("imported from csv"), "{text}");

    let (code, text) = failure(&["trace", "stats", &demo()]);
    assert_eq!(code, 3, "{text}");
    let (code, text) = failure(&["trace", "export", &trace, "--out", &trace]);
    assert!(code == 2 && text.contains("that is read"), "{text}");
    let (code, text) = failure(&["trace", "export", &trace, "--out", &at("x.doc")]);
    assert!(code == 2 && text.contains(".pgtrace"), "{text}");
    assert_eq!(failure(&["run", "--prompt", "x", "--record", "/nowhere/x"]).0, 2);
}
