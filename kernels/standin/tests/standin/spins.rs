//! Launches that wait for the host: suspended while all their threads pause,
//! they go on at later calls, and end in a violation if nobody answers.

use crate::support::{Machine, machine};
use pregate_standin::Drain;
use std::thread;
use std::time::Duration;

const NOT_READY: u32 = 600;
const LAUNCH_FAILED: u32 = 719;
const FOR_EVER: u64 = u64::MAX;
const DRAINS: [Drain; 5] =
    [Drain::Lazy, Drain::Eager, Drain::Random(1), Drain::Random(2), Drain::Random(3)];

fn open(drain: Drain) -> Option<Machine> {
    let machine = machine()?;
    machine.standin.set_drain(drain);
    machine.open().unwrap();
    Some(machine)
}

/// A device array of `count` zeroed words of 4 bytes.
fn zeros(machine: &Machine, count: usize) -> u64 {
    machine.device(&vec![0; 4 * count])
}

#[test]
fn a_launch_that_waits_goes_on_at_later_calls() {
    for drain in DRAINS {
        let Some(machine) = open(drain) else { return };
        let (stream, other) = (machine.stream(), machine.stream());
        let (out, after, beside) = (zeros(&machine, 4), zeros(&machine, 4), zeros(&machine, 4));
        let mut flags = machine.pinned(4 * 8).unwrap();
        flags.fill(0);
        let args = [out, flags.address(), 7, FOR_EVER];
        machine.launch("standin_spin", [1, 4, 0], stream, &args).unwrap();
        machine.fill_words(after, 5, 4, stream).unwrap();
        for _ in 0..20 {
            assert_eq!(machine.query_stream(stream), Err(NOT_READY), "{drain:?}");
        }
        // Other streams do not wait for it.
        machine.fill_words(beside, 6, 4, other).unwrap();
        machine.synchronize(other).unwrap();
        assert_eq!(machine.read_words(beside, 4), [6; 4]);
        for index in 0..4 {
            for _ in 0..10 {
                assert_eq!(machine.query_stream(stream), Err(NOT_READY), "{drain:?}, {index}");
            }
            flags.store(index, 7);
        }
        assert_eq!(machine.read_words(after, 4), [0; 4], "work behind it waits");
        let done = (0..20).find(|_| machine.query_stream(stream).is_ok());
        assert!(done.is_some(), "{drain:?}");
        assert_eq!(machine.read_words(out, 4), [1; 4]);
        assert_eq!(machine.read_words(after, 4), [5; 4]);
        assert_eq!(machine.standin.launches_of("standin_spin"), 1);
        assert_eq!(machine.standin.violations(), Vec::<String>::new());
    }
}

/// What waits for a stream's end, in three ways.
fn wait(machine: &Machine, how: usize, stream: crate::support::Stream) -> Result<(), u32> {
    match how {
        0 => machine.synchronize(stream),
        1 => {
            let event = machine.event();
            machine.record(event, stream).unwrap();
            machine.synchronize_event(event)
        }
        2 => machine.synchronize_all(),
        _ => {
            // Behind the launch, through another stream.
            let (event, other) = (machine.event(), machine.stream());
            machine.record(event, stream).unwrap();
            machine.wait(other, event).unwrap();
            machine.synchronize(other)
        }
    }
}

#[test]
fn another_thread_may_answer_while_one_waits_for_the_launch() {
    for (drain, how) in DRAINS.into_iter().flat_map(|drain| (0..4).map(move |how| (drain, how))) {
        let Some(machine) = open(drain) else { return };
        let stream = machine.stream();
        let out = zeros(&machine, 2);
        let mut flags = machine.pinned(16).unwrap();
        flags.fill(0);
        let args = [out, flags.address(), 3, FOR_EVER];
        machine.launch("standin_spin", [1, 2, 0], stream, &args).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(2));
                // A call of the driver from here as well: the lock is free.
                assert!(machine.standin.calls() > 0);
                flags.store(0, 3);
                flags.store(1, 3);
            });
            wait(&machine, how, stream).unwrap();
        });
        assert_eq!(machine.read_words(out, 2), [1; 2], "{drain:?}, {how}");
    }
}

#[test]
fn a_launch_that_nobody_answers_is_a_violation() {
    for how in 0..4 {
        let Some(machine) = open(Drain::Lazy) else { return };
        machine.standin.set_spins(50);
        let stream = machine.stream();
        let out = zeros(&machine, 2);
        let mut flags = machine.pinned(16).unwrap();
        flags.fill(0);
        flags.store(0, 3);
        let args = [out, flags.address(), 3, FOR_EVER];
        machine.launch("standin_spin", [1, 2, 0], stream, &args).unwrap();
        let _ = wait(&machine, how, stream);
        assert_eq!(machine.synchronize(stream), Err(LAUNCH_FAILED), "{how}");
        let found = machine.standin.take_violations().join("\n");
        for words in
            ["standin_spin", "spins for ever", "standin_spins.cu:", "1 threads wait in pause"]
        {
            assert!(found.contains(words), "{words:?} is not in {found}");
        }
        // The machine of the launch is free for the next one.
        let stream = machine.stream();
        flags.store(1, 3);
        machine.launch("standin_spin", [1, 2, 0], stream, &args).unwrap();
        machine.synchronize(stream).unwrap();
        assert_eq!(machine.read_words(out, 2), [1; 2]);
    }
}

#[test]
fn a_launch_sees_its_clock_move_while_it_is_suspended() {
    let Some(machine) = open(Drain::Lazy) else { return };
    machine.standin.set_spins(1000);
    let stream = machine.stream();
    let out = zeros(&machine, 3);
    let mut flags = machine.pinned(24).unwrap();
    flags.fill(0);
    flags.store(1, 9);
    machine.launch("standin_spin", [1, 3, 0], stream, &[out, flags.address(), 9, 30]).unwrap();
    let rounds = (0..200).find(|_| machine.query_stream(stream).is_ok());
    assert!(rounds.is_some_and(|rounds| rounds > 25), "{rounds:?}");
    assert_eq!(machine.read_words(out, 3), [2, 1, 2]);
    assert_eq!(machine.standin.violations(), Vec::<String>::new());
}

#[test]
fn threads_that_wait_for_each_other_need_no_call() {
    let Some(machine) = open(Drain::Lazy) else { return };
    for order in 0..8 {
        machine.standin.set_order(order);
        machine.standin.set_spins(0);
        let words = machine.device(&[0; 8 * 40]);
        machine.run("standin_relay", [1, 40, 0], &[words]).unwrap();
        let found: Vec<u32> = machine.read_words(words, 80).into_iter().step_by(2).collect();
        assert_eq!(found, (1..=40).rev().collect::<Vec<u32>>(), "order {order}");
        assert_eq!(machine.standin.violations(), Vec::<String>::new());
    }
}

#[test]
fn each_launch_of_a_graph_waits_for_itself() {
    for drain in DRAINS {
        let Some(machine) = open(drain) else { return };
        let stream = machine.stream();
        let (out, sum) = (zeros(&machine, 1), machine.device(&[0; 8]));
        let mut flags = machine.pinned(8).unwrap();
        flags.fill(0);
        let graph = machine.capture(stream, || {
            let args = [out, flags.address(), 1, FOR_EVER];
            machine.launch("standin_spin", [1, 1, 0], stream, &args).unwrap();
            machine.launch("standin_add_u8", [1, 8, 0], stream, &[sum, sum, 1, 8]).unwrap();
        });
        let graph = graph.unwrap();
        for round in 1..4u8 {
            flags.store(0, 0);
            machine.launch_graph(graph, stream).unwrap();
            for _ in 0..5 {
                assert_eq!(machine.query_stream(stream), Err(NOT_READY), "{drain:?}");
            }
            flags.store(0, 1);
            machine.synchronize(stream).unwrap();
            assert_eq!(machine.read(sum, 8), [round; 8]);
        }
        assert_eq!(machine.standin.launches_of("standin_spin"), 3);
    }
}

#[test]
fn what_may_wait_for_the_device_is_not_called_while_it_waits_for_the_host() {
    for drain in DRAINS {
        let Some(machine) = open(drain) else { return };
        let stream = machine.stream();
        let out = zeros(&machine, 1);
        let mut flags = machine.pinned(8).unwrap();
        let spare = machine.pinned(8).unwrap();
        flags.fill(0);
        let args = [out, flags.address(), 3, FOR_EVER];
        machine.launch("standin_spin", [1, 1, 0], stream, &args).unwrap();
        assert_eq!(machine.query_stream(stream), Err(NOT_READY));
        let block = machine.pinned(64).unwrap();
        machine.free_pinned(spare).unwrap();
        let found = machine.standin.take_violations();
        let wanted = ["cuMemHostAlloc", "cuMemFreeHost"];
        let wanted = wanted.map(|call| format!("{call} while standin_spin waits for the host"));
        assert_eq!(found, wanted, "{drain:?}");
        // Where it was answered, nobody waits.
        flags.store(0, 3);
        machine.free_pinned(block).unwrap();
        machine.synchronize(stream).unwrap();
        assert_eq!(machine.standin.violations(), Vec::<String>::new(), "{drain:?}");
    }
}

#[test]
fn a_launch_that_returns_when_it_has_run_does_not_wait_for_the_host() {
    let Some(machine) = open(Drain::Lazy) else { return };
    machine.standin.command("blocking=1");
    let stream = machine.stream();
    let out = zeros(&machine, 1);
    let flags = machine.pinned(8).unwrap();
    let args = [out, flags.address(), 3, FOR_EVER];
    flags.store(0, 3);
    machine.launch("standin_spin", [1, 1, 0], stream, &args).unwrap();
    assert_eq!(machine.standin.count("pending_work"), 0);
    assert_eq!(machine.standin.violations(), Vec::<String>::new());
    flags.store(0, 0);
    machine.launch("standin_spin", [1, 1, 0], stream, &args).unwrap();
    let found = machine.standin.take_violations();
    assert!(matches!(&found[..], [one] if one.contains("has not returned")), "{found:?}");
    flags.store(0, 3);
    machine.synchronize(stream).unwrap();
}

#[test]
fn a_launch_that_is_suspended_goes_with_its_machine() {
    let Some(machine) = open(Drain::Lazy) else { return };
    let stream = machine.stream();
    let out = zeros(&machine, 2);
    let mut flags = machine.pinned(16).unwrap();
    flags.fill(0);
    let args = [out, flags.address(), 3, FOR_EVER];
    machine.launch("standin_spin", [1, 2, 0], stream, &args).unwrap();
    assert_eq!(machine.query_stream(stream), Err(NOT_READY));
    // Memory that it still needs is freed: it finds out when it goes on.
    machine.free_pinned(flags).unwrap();
    if !pregate_standin::Standin::has_address_sanitizer() {
        assert_eq!(machine.query_stream(stream), Err(700));
        let found = machine.standin.take_violations().join("\n");
        assert!(found.contains("standin_spin") && found.contains("freed"), "{found}");
    }
    machine.standin.reset();
    machine.open().unwrap();
    let words = machine.device(&[0; 16]);
    machine.run("standin_relay", [1, 2, 0], &[words]).unwrap();
}
