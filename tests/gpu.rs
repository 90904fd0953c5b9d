//! The binary on a GPU, which is the stand-in: the same answers as on the
//! processor, one message and one exit code for each way to fail. Says so and
//! passes where there is no C++ compiler to build the stand-in with.

#[path = "support/gpu.rs"]
mod gpu;

use gpu::{code_and_message, on_gpu, pregate};
use serde_json::Value;
use std::time::{Duration, Instant};

const ANSWER: [&str; 7] =
    ["run", "--prompt", "show git status", "--max-tokens", "4", "--temperature", "0"];

#[test]
fn a_gpu_gives_the_answer_of_the_processor() {
    let cpu = pregate(&[&ANSWER[..], &["--device", "cpu"]].concat()).output().unwrap();
    assert!(cpu.status.success());
    let arguments = [&ANSWER[..], &["--device", "cuda"]].concat();
    let rows: [(&str, &[&str], &[&str]); 4] = [
        ("drain=lazy", &["1G"], &["all weights"]),
        ("drain=eager", &["275M", "--stats"], &["of 192 experts", "decode: link busy"]),
        (
            "drain=random",
            &["270M", "--misses", "copy", "--stats", "json"],
            &["of 192 experts", "\"splits\":null", "\"pinned\":true"],
        ),
        (
            "drain=lazy",
            &["270M", "--graphs", "off", "--forecast", "none", "--ledger"],
            &["of 192 experts", "on the CPU"],
        ),
    ];
    for (settings, options, words) in rows {
        let arguments = [&arguments[..], &["--vram"], options].concat();
        let Some(gpu) = on_gpu(settings, &arguments) else { return };
        let notes = String::from_utf8_lossy(&gpu.stderr);
        assert!(gpu.status.success(), "{notes}");
        assert_eq!(gpu.stdout, cpu.stdout, "{settings}: {notes}");
        assert!(notes.contains("device: CUDA, Pregate stand-in"), "{notes}");
        assert!(notes.contains("GPU memory: "), "{notes}");
        words.iter().for_each(|word| assert!(notes.contains(word), "{word}: {notes}"));
    }
}

/// A GPU that waits for the host in a launch that does not return would wait
/// for ever; the stand-in tells of it.
#[test]
fn where_launches_block_the_host_launches_layer_by_layer_and_says_so() {
    let cpu = pregate(&[&ANSWER[..], &["--device", "cpu"]].concat()).output().unwrap();
    let arguments = [&ANSWER[..], &["--device", "cuda", "--vram", "270M"]].concat();
    let (blocking, connections) = ("CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS");
    let rows = [
        (blocking, "1", true),
        (blocking, "0", false),
        (connections, "1", true),
        (connections, "8", false),
    ];
    for (name, value, is_told) in rows {
        let Some(mut command) = gpu::command("drain=eager", &arguments) else { return };
        let output = command.env(name, value).output().unwrap();
        let notes = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && output.stdout == cpu.stdout, "{value}: {notes}");
        assert_eq!(notes.contains(&format!("{name} is set")), is_told, "{value}: {notes}");
        assert!(!notes.contains("pregate-standin: "), "{value}: {notes}");
    }
}

/// Neither the GPU nor the memory that is allowed has room for all experts.
#[test]
fn experts_come_from_disk_where_memory_is_short() {
    let cpu = pregate(&[&ANSWER[..], &["--device", "cpu"]].concat()).output().unwrap();
    let least = ["--device", "cuda", "--vram", "270M", "--context", "512"];
    let tiny = [&ANSWER[..], &least[..], &["--ram", "1M"]].concat();
    let Some(output) = on_gpu("", &tiny) else { return };
    let (code, message) = code_and_message(&output);
    assert!(code == 4 && message.contains("need frames of"), "{message}");
    let plan = |ram: &str| -> Value {
        let arguments = [&["plan", "--json"], &least[..], &["--ram", ram]].concat();
        let output = on_gpu("", &arguments).expect("it was there");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    };
    let parts = plan("4G")["parts"].clone();
    let part = |name: &str| parts[name].as_u64().unwrap();
    // Most of the experts have no room; a process varies by less than that.
    let ram = part("process_bytes") + part("scratch_bytes") + part("weights_bytes") / 4;
    let ram = ram.to_string();
    let below = plan(&ram);
    assert!(below["gpu"]["disk"]["on_disk"].as_u64().unwrap_or(0) > 50, "{below}");
    assert!(below["prediction"].is_null() && below["split"].is_null(), "{below}");
    assert!(below["not_predicted"].as_str().is_some_and(|why| why.contains("disk")), "{below}");
    for misses in ["auto", "cpu"] {
        let more = ["--ram", &ram, "--misses", misses, "--stats"];
        let arguments = [&ANSWER[..], &least[..], &more[..]].concat();
        let gpu = on_gpu("drain=lazy", &arguments).expect("it was there");
        let notes = String::from_utf8_lossy(&gpu.stderr);
        assert!(gpu.status.success(), "{notes}");
        assert_eq!(gpu.stdout, cpu.stdout, "{notes}");
        for word in ["experts on disk behind", "disk: ", "from disk since loading: "] {
            assert!(notes.contains(word), "{word}: {notes}");
        }
    }
}

#[test]
fn the_plan_tells_what_a_gpu_holds() {
    let arguments = ["plan", "--json", "--device", "cuda:0", "--vram", "400M", "--context", "512"];
    let Some(output) = on_gpu("", &arguments) else { return };
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["placement"], "gpu", "{plan}");
    let number = |name: &str| plan["gpu"]["parts"][name].as_u64().unwrap();
    let weights = number("weights_bytes") + number("experts_bytes");
    assert!(weights > 11_000_000 && number("kv_bytes") > 0, "{plan}");
    assert_eq!(plan["gpu"]["budget_bytes"], (400 - 256) << 20);
    assert!(plan["model_bytes"].as_u64().unwrap() > 12_000_000, "{plan}");
    assert!(plan["prediction"]["bound_tok_s"].as_f64().unwrap() > 0.0, "{plan}");
    let split = ["plan", "--json", "--device", "cuda:0", "--vram", "270M", "--context", "512"];
    let Some(output) = on_gpu("", &split) else { return };
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(plan["prediction"].is_null() && plan["not_predicted"].is_null(), "{plan}");
    let speed = &plan["split"];
    let number = |name: &str| speed[name].as_f64().unwrap_or(f64::NAN);
    assert!(number("predicted_tok_s") > 0.0, "{plan}");
    assert!(number("all_on_gpu_tok_s") > 0.0, "{plan}");
    for part in ["gpu_allows_tok_s", "visits_allow_tok_s"] {
        assert!(number(part) >= number("predicted_tok_s") * 0.999999, "{part}: {plan}");
    }
    assert!((0.01..0.99).contains(&number("hit_ratio")), "{plan}");
    assert_eq!(speed["facts"]["is_standin"], true, "{plan}");
    let link = &speed["facts"]["link"];
    for name in ["pinned_gb_s", "pageable_gb_s", "copy_us", "visit_us"] {
        assert!(link[name].as_f64().is_some_and(|value| value > 0.0), "{name}: {plan}");
    }
    let words = ["plan", "--device", "cuda:0", "--vram", "270M", "--context", "512"];
    let Some(output) = on_gpu("", &words) else { return };
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("tok/s without prefetch; the "), "{text}");
    assert!(text.contains("mean nothing"), "{text}");
}

#[test]
fn a_run_is_judged_by_the_prediction_for_the_hits_that_it_had() {
    let few = ["--vram", "264M", "-p", "0", "-n", "2", "-r", "1"];
    let Some(output) = on_gpu("", &[&["bench", "--json", "--device", "cuda"], &few[..]].concat())
    else {
        return;
    };
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let predicted = number(&report["split"]["predicted_tok_s"]);
    let share = number(&report["decode_prediction_share"]);
    let decode = number(&report["decode_tok_s"][0]);
    assert!((share * predicted / decode - 1.0).abs() < 1e-6, "{report}");
    assert_eq!(report["split"]["hits_measured"], true, "{report}");
    assert!(report["decode_bandwidth_share"].is_null(), "{report}");
}

#[test]
fn the_doctor_measures_the_link_and_says_what_a_stand_in_is() {
    for settings in ["drain=lazy", "drain=eager"] {
        let Some(output) = on_gpu(settings, &["doctor", "--json"]) else { return };
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let gpu = &report["gpus"][0];
        assert_eq!(gpu["is_standin"], true, "{report}");
        for name in ["read_gb_s", "pinned_gb_s", "pageable_gb_s", "copy_us", "visit_us"] {
            let value = gpu["speed"][name].as_f64();
            assert!(value.is_some_and(|value| value > 0.0), "{name}: {report}");
        }
        let both = &gpu["speed"]["both"];
        for name in ["cpu_gb_s", "link_gb_s"] {
            assert!(both[name].as_f64().is_some_and(|value| value > 0.0), "{name}: {report}");
        }
        let findings = report["findings"].as_array().unwrap().iter();
        let link: Vec<_> = findings.filter(|finding| finding["about"] == "link").collect();
        assert_eq!(link.len(), 1, "{report}");
        assert!(link[0]["next"].as_str().unwrap().contains("mean nothing"), "{report}");
    }
}

#[test]
fn each_failure_has_its_exit_code_and_says_what_to_do() {
    let no_driver = code_and_message(
        &pregate(&[&ANSWER[..], &["--device", "cuda"]].concat())
            .env("LD_LIBRARY_PATH", "/nowhere")
            .output()
            .unwrap(),
    );
    // A machine with a driver has another answer.
    if no_driver.1.contains("no CUDA driver") {
        assert_eq!(no_driver.0, 4, "{}", no_driver.1);
        assert!(no_driver.1.contains("550"), "{}", no_driver.1);
    }
    let cases: [(&str, &[&str], i32, &[&str]); 6] = [
        ("devices=0", &["cuda"], 4, &["--device cuda"]),
        ("", &["cuda:3"], 4, &["no GPU 3"]),
        ("driver=11080", &["cuda"], 4, &["550"]),
        ("init=999", &["cuda"], 4, &["nvidia_uvm"]),
        ("vram=260M", &["cuda"], 4, &["GPU memory", "--context", "--device cpu"]),
        ("", &["cuda", "--vram", "257M"], 4, &["--vram", "weights without experts"]),
    ];
    for (settings, device, code, words) in cases {
        let arguments = [&ANSWER[..], &["--device"], device].concat();
        let Some(output) = on_gpu(settings, &arguments) else { return };
        let (found, message) = code_and_message(&output);
        assert_eq!(found, code, "{settings} {device:?}: {message}");
        for word in words {
            assert!(message.contains(word), "{settings} {device:?}: {message}");
        }
    }
}

#[test]
fn a_gpu_that_fails_ends_the_process_at_once() {
    // At several places of a run: while loading, computing, copying back.
    for fault in ["cuLaunchKernel:3:719", "cuLaunchKernel:150:700", "cuMemcpyDtoHAsync:3:999"] {
        let arguments = [&ANSWER[..], &["--device", "cuda"]].concat();
        let started = Instant::now();
        let Some(output) = on_gpu(&format!("sticky={fault}"), &arguments) else { return };
        assert!(started.elapsed() < Duration::from_secs(60), "{fault}");
        let (code, message) = code_and_message(&output);
        assert_eq!(code, 75, "{fault}: {message}");
        assert!(message.contains("GPU"), "{fault}: {message}");
    }
}
