//! The program on a GPU whose driver fails: smaller plans and the same answer
//! where there is a way on, else one message and an exit code that a
//! supervisor understands: 4, the machine lacks something; 75, the GPU failed
//! and a new process may have more luck. Each test is a row of the fault
//! table, whose number it has; `runtime/tests/gpu_faults.rs` tries more places.

#[path = "support/gpu.rs"]
mod gpu;

use gpu::{code_and_message, on_gpu, pregate};
use serde_json::Value;
use std::io::Write;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

const ANSWER: [&str; 10] = [
    "run",
    "--prompt",
    "git",
    "--raw",
    "--max-tokens",
    "2",
    "--temperature",
    "0",
    "--context",
    "64",
];

/// What the processor answers.
fn expected() -> Vec<u8> {
    let output = pregate(&[&ANSWER[..], &["--device", "cpu"]].concat()).output().unwrap();
    assert!(output.status.success());
    output.stdout
}

fn answer(settings: &str, more: &[&str]) -> Option<Output> {
    on_gpu(settings, &[&ANSWER[..], &["--device", "cuda"], more].concat())
}

fn notes(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Lines of standard error that say that the plan was made smaller.
fn smaller(output: &Output) -> Vec<String> {
    let notes = notes(output);
    let lines = notes.lines().filter(|line| line.contains("less is used of it"));
    lines.map(str::to_string).collect()
}

/// The first `count` allocations of device memory are refused.
fn refuse(count: usize) -> String {
    format!("drain=eager;{}", "fail=cuMemAlloc:1:2;".repeat(count))
}

#[test]
fn f10_refused_memory_makes_the_plan_smaller_until_nothing_is_left_out() {
    let expected = expected();
    let Some(clean) = answer("drain=eager;log=1", &[]) else { return };
    assert!(clean.status.success() && smaller(&clean).is_empty(), "{}", notes(&clean));
    let allocations = notes(&clean).lines().filter(|line| line.ends_with(" cuMemAlloc")).count();
    assert!(allocations >= 4, "weights, experts, cache, buffers: {allocations}");
    for nth in 1..=allocations {
        let output = answer(&format!("drain=eager;fail=cuMemAlloc:{nth}:2"), &[]).unwrap();
        let (notes, lines) = (notes(&output), smaller(&output));
        assert!(output.status.success(), "allocation {nth}: {notes}");
        assert_eq!(output.stdout, expected, "allocation {nth}: {notes}");
        assert_eq!(lines.len(), 1, "allocation {nth}: {notes}");
        assert!(lines[0].contains("MiB were asked for"), "{notes}");
        assert!(lines[0].contains("of 192 experts"), "{notes}");
    }
    // One step after the other: fewer slots, then experts that stay, then
    // none on the GPU; always the same answer.
    let mut experts = Vec::new();
    for count in [1, 2, 3, 5, 8] {
        let output = answer(&refuse(count), &[]).unwrap();
        let (notes, lines) = (notes(&output), smaller(&output));
        assert!(output.status.success() && output.stdout == expected, "{count}: {notes}");
        assert_eq!(lines.len(), 1, "{count}: {notes}");
        let words: Vec<&str> = lines[0].split(' ').collect();
        let at = words.iter().position(|word| *word == "192").expect("of 192 experts");
        experts.push(words[at - 2].parse::<usize>().unwrap());
    }
    assert!(experts.is_sorted_by(|before, after| before > after), "{experts:?}");
    assert!(experts[0] < 192, "{experts:?}");
    let (code, message) = code_and_message(&answer(&refuse(40), &[]).unwrap());
    assert_eq!(code, 4, "{message}");
    for word in ["MiB were asked for", "MiB of its memory", "MiB are free", ", 0 of 192 experts"] {
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn f12_without_page_locked_memory_the_answer_is_the_same_and_one_warning_says_so() {
    let expected = expected();
    let part = ["--vram", "266M", "--stats", "json"];
    for (settings, pinned) in
        [("pinned=8G", true), ("pinned=0", false), ("fail=cuMemHostAlloc:2:1", false)]
    {
        let Some(output) = answer(settings, &part) else { return };
        let notes = notes(&output);
        assert!(output.status.success() && output.stdout == expected, "{settings}: {notes}");
        let warnings: Vec<&str> =
            notes.lines().filter(|line| line.starts_with("warning: ")).collect();
        // That tokens need the host in every layer is another matter.
        let of_experts = |line: &&str| line.contains("experts are in memory that is not page");
        assert!(pinned || warnings.len() <= 2, "{settings}: {notes}");
        let warnings: Vec<&str> = match pinned {
            true => warnings,
            false => warnings.into_iter().filter(of_experts).collect(),
        };
        assert_eq!(warnings.len(), usize::from(!pinned), "{settings}: {notes}");
        let stats: Value = serde_json::from_str(notes.lines().last().unwrap()).unwrap();
        let memory = &stats["host_memory"];
        assert_eq!(memory["pinned"], pinned, "{settings}: {stats}");
        let [locked, pageable] =
            ["pinned_bytes", "pageable_bytes"].map(|name| memory[name].as_u64().unwrap());
        assert!(if pinned { locked > 0 && pageable == 0 } else { pageable > 0 }, "{stats}");
        if !pinned {
            assert!(warnings[0].contains("page-locked memory"), "{notes}");
        }
    }
}

#[test]
fn f14_without_a_graph_the_answer_is_the_same_and_one_warning_says_so() {
    let longer = |arguments: &[&'static str]| {
        let mut all = [&ANSWER[..], arguments].concat();
        all[5] = "4";
        all
    };
    let expected = pregate(&longer(&["--device", "cpu"])).output().unwrap();
    let refused = "drain=eager;fail=cuGraphInstantiateWithFlags:1:2";
    for (settings, warnings) in [("drain=eager", 0), (refused, 1)] {
        let Some(output) = on_gpu(settings, &longer(&["--device", "cuda"])) else { return };
        let notes = notes(&output);
        assert!(output.status.success() && output.stdout == expected.stdout, "{notes}");
        let told = notes.lines().filter(|line| line.starts_with("warning: "));
        let told: Vec<&str> = told.collect();
        assert_eq!(told.len(), warnings, "{notes}");
        let of_graph = |line: &&str| line.contains("CUDA graph") && line.contains("2 CUDA_ERROR");
        assert!(told.iter().all(of_graph), "{notes}");
    }
}

/// A run that fails for good at the `nth` call of `failing`, which takes no
/// more than 5 s longer than one without a fault: its message.
fn fails(settings: &str, (failing, nth): (&str, usize), clean: Duration) -> Option<String> {
    let started = Instant::now();
    let output = answer(&format!("{settings};log=1"), &["--vram", "266M"])?;
    let took = started.elapsed();
    assert!(took < clean + Duration::from_secs(5), "{settings}: {took:?}");
    let (code, message) = code_and_message(&output);
    assert_eq!(code, 75, "{settings}: {message}");
    assert!(output.stdout.is_empty() || output.stdout.ends_with(b"\n"), "half a line");
    let notes = notes(&output);
    let calls: Vec<&str> = notes
        .lines()
        .filter_map(|line| line.strip_prefix("pregate-standin: ")?.split(' ').nth(1))
        .collect();
    let mut places = calls.iter().enumerate().filter(|(_, name)| **name == failing);
    let (at, _) = places.nth(nth - 1).expect("the call that fails");
    let after = &calls[at + 1..];
    // A late error shows at the next call; the link's thread may be in one.
    let late = usize::from(settings.contains("delayed"));
    assert!(after.len() <= late + 1, "{settings}: {after:?} after the error");
    Some(message)
}

#[test]
fn f16_f17_f19_a_gpu_that_fails_ends_the_program_with_one_message_and_no_more_calls() {
    let started = Instant::now();
    let Some(_) = answer("drain=eager;log=1", &["--vram", "266M"]) else { return };
    let clean = started.elapsed();
    for (kind, call, nth, code) in [
        ("sticky", "cuLaunchKernel", 1, 700),
        ("sticky", "cuLaunchKernel", 40, 719),
        ("sticky", "cuMemcpyHtoDAsync", 5, 700),
        ("sticky", "cuMemcpyDtoHAsync", 2, 999),
        ("sticky", "cuMemAlloc", 3, 719),
        ("sticky", "cuMemHostAlloc", 2, 700),
        ("sticky", "cuGraphLaunch", 1, 719),
        ("delayed_sticky", "cuLaunchKernel", 25, 719),
        ("delayed_sticky", "cuMemcpyHtoDAsync", 12, 700),
        ("delayed_sticky", "cuEventRecord", 20, 999),
    ] {
        let settings = format!("drain=eager;{kind}={call}:{nth}:{code}");
        let Some(message) = fails(&settings, (call, nth), clean) else { return };
        assert!(message.contains("GPU") && message.contains(&code.to_string()), "{message}");
        let hint = if code == 999 { "nvidia_uvm" } else { "caused by earlier work" };
        assert!(message.contains(hint) && message.contains("Xid"), "{settings}: {message}");
    }
}

#[test]
fn f16_a_chat_ends_with_its_gpu() {
    let arguments = ["chat", "--device", "cuda", "--context", "256", "--max-tokens", "2"];
    let settings = "drain=eager;sticky=cuLaunchKernel:40:719";
    let Some(mut command) = gpu::command(settings, &arguments) else { return };
    let mut chat = (command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))
        .spawn()
        .expect("the binary starts");
    // The second question is never asked.
    chat.stdin.take().unwrap().write_all(b"one\ntwo\n").unwrap();
    let output = chat.wait_with_output().unwrap();
    let (code, message) = code_and_message(&output);
    assert_eq!(code, 75, "{message}");
    assert!(message.contains("719"), "{message}");
}

#[test]
fn f18_each_way_to_have_no_gpu_has_its_message_and_auto_says_why_it_takes_the_processor() {
    let cases = [
        ("devices=0", "sees no GPU", "CPU because no GPU"),
        ("init=100", "sees no GPU", "CPU because no GPU"),
        ("init=803", "restart the machine", "CPU because"),
        ("init=999", "nvidia_uvm", "CPU because"),
        ("init=34", "driver 550 or newer", "CPU because no driver"),
        ("driver=11080", "CUDA 11.8, 12.4 is needed", "CPU because"),
        ("capability=6.1", "compute capability 6.1", "CPU because"),
    ];
    let tokenless = ["plan", "--context", "64", "--device"];
    let mut messages = Vec::new();
    for (settings, words, _) in cases {
        let Some(output) = on_gpu(settings, &[&tokenless[..], &["cuda"]].concat()) else { return };
        let (code, message) = code_and_message(&output);
        assert_eq!(code, 4, "{settings}: {message}");
        assert!(message.contains(words), "{settings}: {message}");
        messages.push(message);
    }
    messages.sort();
    messages.dedup();
    assert_eq!(messages.len(), cases.len() - 1, "both ways to see no GPU say the same");

    let expected = expected();
    for (settings, _, why) in cases {
        let output = on_gpu(settings, &[&ANSWER[..], &["--device", "auto"]].concat()).unwrap();
        let notes = notes(&output);
        assert!(output.status.success() && output.stdout == expected, "{settings}: {notes}");
        let device = notes.lines().find(|line| line.starts_with("device: CPU")).expect("a device");
        assert!(device.contains(why), "{settings}: {device}");
    }
    // Nothing that answers to the name of a driver.
    let none = |device| {
        let mut command = pregate(&[&ANSWER[..], &["--device", device]].concat());
        command.env("LD_LIBRARY_PATH", "/nowhere").output().unwrap()
    };
    let (code, message) = code_and_message(&none("cuda"));
    // A machine with a driver has another answer.
    if message.contains("no CUDA driver") {
        assert_eq!(code, 4, "{message}");
        assert!(message.contains("install NVIDIA's driver 550 or newer"), "{message}");
        let output = none("auto");
        assert!(output.status.success() && output.stdout == expected);
        assert!(notes(&output).contains("CPU because no driver"), "{}", notes(&output));
    }
}
