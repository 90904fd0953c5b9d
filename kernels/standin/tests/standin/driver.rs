//! The driver's own behaviour: order and lateness of work, what a program may
//! not do with memory that work uses, limits, faults.

use crate::support::{Machine, machine};
use pregate_standin::{Drain, Fault};

const NOT_READY: u32 = 600;
const LAUNCH_FAILED: u32 = 719;
const DRAINS: [Drain; 5] =
    [Drain::Lazy, Drain::Eager, Drain::Random(1), Drain::Random(2), Drain::Random(3)];

fn open(drain: Drain) -> Option<Machine> {
    let machine = machine()?;
    machine.standin.set_drain(drain);
    machine.open().unwrap();
    Some(machine)
}

#[test]
fn copies_land_in_order_with_events_between_streams() {
    for drain in DRAINS {
        let Some(machine) = open(drain) else { return };
        let (copy, compute) = (machine.stream(), machine.stream());
        let (a, b) = (machine.allocate(8).unwrap(), machine.allocate(8).unwrap());
        let mut source = machine.pinned(8).unwrap();
        source.fill(3);
        machine.copy_in(a, &source, copy).unwrap();
        let landed = machine.event();
        machine.record(landed, copy).unwrap();
        machine.wait(compute, landed).unwrap();
        machine.launch("standin_add_u8", [1, 8, 0], compute, &[b, a, 4, 8]).unwrap();
        let mut target = machine.pinned(8).unwrap();
        machine.copy_out(&mut target, b, compute).unwrap();
        machine.synchronize(compute).unwrap();
        assert_eq!(target.to_vec(), [7; 8], "{drain:?}");
        assert_eq!(machine.standin.violations(), Vec::<String>::new());
    }
}

#[test]
fn lazy_work_waits_and_its_target_holds_poison() {
    let Some(machine) = open(Drain::Lazy) else { return };
    let stream = machine.stream();
    let address = machine.device(&[1; 16]);
    let mut target = machine.pinned(16).unwrap();
    target.fill(9);
    machine.copy_out(&mut target, address, stream).unwrap();
    assert_eq!(target.to_vec(), [0xcd; 16], "not what it was, not what it will be");
    let mut source = machine.pinned(16).unwrap();
    source.fill(5);
    let other = machine.stream();
    let unread = machine.device(&[1; 16]);
    machine.copy_in(unread, &source, other).unwrap();
    assert_eq!(machine.read(unread, 16), [0xcd; 16], "no stream was waited for");
    assert_eq!(machine.standin.count("pending_work"), 2);
    machine.synchronize(stream).unwrap();
    assert_eq!(target.to_vec(), [1; 16]);
    machine.synchronize(other).unwrap();
    assert_eq!(machine.read(unread, 16), [5; 16]);
}

#[test]
fn a_source_or_target_that_is_reused_too_early_is_found() {
    for drain in [Drain::Lazy, Drain::Random(7)] {
        let Some(machine) = open(drain) else { return };
        let stream = machine.stream();
        let address = machine.allocate(64).unwrap();
        let mut found = 0;
        for round in 0..40 {
            let mut source = machine.pinned(64).unwrap();
            source.fill(1);
            machine.copy_in(address, &source, stream).unwrap();
            source.set(17, 2);
            match machine.synchronize(stream) {
                Ok(()) => assert_ne!(drain, Drain::Lazy, "round {round}"),
                Err(code) => {
                    assert_eq!(code, LAUNCH_FAILED);
                    let text = machine.standin.take_violations().join("\n");
                    assert!(text.contains("byte 17") && text.contains("source"), "{text}");
                    found += 1;
                }
            }
            if found > 0 {
                break;
            }
        }
        assert!(found > 0, "{drain:?}");

        let stream = machine.stream();
        machine.standin.set_drain(Drain::Lazy);
        let mut target = machine.pinned(64).unwrap();
        machine.copy_out(&mut target, address, stream).unwrap();
        target.set(3, 0);
        assert_eq!(machine.synchronize(stream), Err(LAUNCH_FAILED));
        assert!(machine.standin.take_violations()[0].contains("target"));
    }
}

#[test]
fn memory_that_work_uses_is_not_freed() {
    let Some(machine) = open(Drain::Lazy) else { return };
    let stream = machine.stream();
    let address = machine.allocate(64).unwrap();
    let source = machine.pinned(64).unwrap();
    machine.copy_in(address, &source, stream).unwrap();
    machine.free_pinned(source).unwrap();
    let found = machine.standin.take_violations();
    assert!(found[0].contains("cuMemFreeHost"), "{found:?}");
    assert_eq!(machine.synchronize(stream), Err(700));
    // Freeing device memory waits for the work that uses it.
    let stream = machine.stream();
    machine.standin.take_violations();
    let source = machine.pinned(64).unwrap();
    machine.copy_in(address, &source, stream).unwrap();
    machine.free(address).unwrap();
    machine.synchronize(stream).unwrap();
    assert_eq!(machine.free(address), Err(1), "freed twice");
    assert_eq!(machine.copy_in(address, &source, stream), Err(1), "freed");
    assert_eq!(machine.standin.violations(), Vec::<String>::new());
}

#[test]
fn pageable_sources_are_taken_at_once() {
    for drain in DRAINS {
        let Some(machine) = open(drain) else { return };
        let stream = machine.stream();
        let address = machine.allocate(8).unwrap();
        let mut source = vec![4; 8];
        machine.copy_in_pageable(address, &source, stream).unwrap();
        source.fill(0);
        machine.synchronize(stream).unwrap();
        assert_eq!(machine.read(address, 8), [4; 8]);
    }
}

#[test]
fn sizes_and_addresses_are_checked_when_work_is_submitted() {
    let Some(machine) = open(Drain::Lazy) else { return };
    let stream = machine.stream();
    let address = machine.allocate(64).unwrap();
    assert_eq!(address % 256, 0);
    assert_ne!(address % 512, 0, "no more aligned than promised");
    let source = machine.pinned(65).unwrap();
    assert_eq!(machine.copy_in(address, &source, stream), Err(1));
    assert_eq!(machine.fill(address + 1, 0, 64, stream), Err(1));
    machine.fill(address, 0, 64, stream).unwrap();
    machine.standin.set_vram(1000);
    machine.standin.set_pinned(1000);
    assert_eq!(machine.allocate(1000), Err(2));
    machine.allocate(900).unwrap();
    assert_eq!(machine.allocate(100), Err(2));
    assert_eq!(machine.pinned(1001).err(), Some(2));
}

#[test]
fn modules_are_names_or_ptx_that_fits_the_sources() {
    let Some(machine) = open(Drain::Lazy) else { return };
    machine.standin.set_capability(8, 6);
    let ptx = |version: &str, target: &str, params: &str| {
        format!(
            ".version {version}\n.target {target}\n.address_size 64\n\
             .visible .entry standin_bounded(\n{params}\n)\n{{\n ret;\n}}\n"
        )
    };
    let good = "\t.param .u64 .ptr .global .align 1 standin_bounded_param_0";
    let module = machine.load(&ptx("8.4", "sm_80", good)).unwrap();
    machine.function(module, "standin_bounded").unwrap();
    assert_eq!(machine.function(module, "standin_order").err(), Some(500), "not in this module");
    assert_eq!(machine.load(&ptx("8.5", "sm_80", good)).err(), Some(222));
    machine.standin.set_driver_version(12_050);
    machine.load(&ptx("8.5", "sm_80", good)).unwrap();
    assert_eq!(machine.load(&ptx("8.4", "sm_90", good)).err(), Some(218));
    for wrong in [".param .u32 a", ".param .u64 a,\n.param .u32 b", ""] {
        assert_eq!(machine.load(&ptx("8.4", "sm_80", wrong)).err(), Some(218), "{wrong}");
    }
    assert_eq!(machine.load("standin_nothing").err(), Some(200));
    let named = machine.load("standin_words").unwrap();
    machine.function(named, "standin_order").unwrap();
    assert_eq!(machine.function(named, "standin_reverse").err(), Some(500), "another file's");
}

#[test]
fn faults_meet_the_call_that_they_are_meant_for() {
    let Some(machine) = open(Drain::Lazy) else { return };
    let standin = &machine.standin;
    standin.fail(2, Fault::Once, 2);
    assert!(machine.allocate(8).is_ok());
    assert_eq!(machine.allocate(8), Err(2));
    let kept = machine.allocate(8).unwrap();
    standin.fail_call("cuMemAlloc", 2, Fault::Once, 801);
    machine.free(kept).unwrap();
    assert!(machine.allocate(8).is_ok());
    let calls = standin.calls();
    assert_eq!(machine.allocate(8), Err(801));
    assert_eq!(standin.calls(), calls + 1);
    assert_eq!(standin.calls_of("cuMemAlloc"), 5);

    standin.fail(1, Fault::Delayed, 719);
    assert!(machine.allocate(8).is_ok());
    assert_eq!(machine.allocate(8), Err(719));
    assert!(machine.allocate(8).is_ok());

    standin.fail(1, Fault::DelayedSticky, 700);
    assert!(machine.allocate(8).is_ok());
    for _ in 0..3 {
        assert_eq!(machine.allocate(8), Err(700));
    }
    standin.clear_faults();
    assert!(machine.allocate(8).is_ok());

    let stream = machine.stream();
    let mut target = machine.pinned(8).unwrap();
    let address = machine.device(&[1; 8]);
    machine.copy_out(&mut target, address, stream).unwrap();
    standin.fail(1, Fault::Sticky, 999);
    assert_eq!(machine.synchronize(stream), Err(999));
    assert_eq!(machine.allocate(8), Err(999));
    assert_eq!(target.to_vec(), [0xcd; 8], "what was under way is lost");
    standin.set_init_code(803);
    standin.clear_faults();
    assert_eq!(machine.open(), Err(803));
    standin.set_init_code(0);
    standin.set_devices(0);
    assert_eq!(machine.open(), Err(100));
}

#[test]
fn a_hung_event_never_completes_until_it_is_released() {
    for drain in DRAINS {
        let Some(machine) = open(drain) else { return };
        let stream = machine.stream();
        let (before, hung) = (machine.event(), machine.event());
        machine.standin.hang(2);
        machine.record(before, stream).unwrap();
        machine.record(hung, stream).unwrap();
        let address = machine.device(&[1; 8]);
        machine.fill(address, 2, 8, stream).unwrap();
        let done = (0..50).find(|_| machine.query(before).is_ok());
        assert!(done.is_some(), "the event before it completes");
        for _ in 0..50 {
            assert_eq!(machine.query(hung), Err(NOT_READY));
        }
        assert_eq!(machine.read(address, 8), [1; 8], "what comes after it does not run");
        machine.standin.release();
        machine.synchronize(stream).unwrap();
        assert_eq!(machine.query(hung), Ok(()));
        assert_eq!(machine.read(address, 8), [2; 8]);
    }
}

#[test]
fn asking_completes_an_event_but_not_at_once() {
    let Some(machine) = open(Drain::Lazy) else { return };
    let (stream, event) = (machine.stream(), machine.event());
    machine.record(event, stream).unwrap();
    assert_eq!(machine.query(event), Err(NOT_READY));
    assert!((0..10).any(|_| machine.query(event).is_ok()));
}

#[test]
fn a_failed_launch_ends_its_stream_and_no_other() {
    let Some(machine) = open(Drain::Lazy) else { return };
    if pregate_standin::Standin::has_address_sanitizer() {
        return;
    }
    let (bad, good) = (machine.stream(), machine.stream());
    let (input, out) = (machine.device(&[1; 8]), machine.device(&[0; 8]));
    machine.launch("standin_add_u8", [1, 32, 0], bad, &[out, input, 1, 9]).unwrap();
    let after = machine.event();
    machine.record(after, bad).unwrap();
    assert_eq!(machine.synchronize(bad), Err(700));
    assert_eq!(machine.synchronize(bad), Err(700));
    assert_eq!(machine.query(after), Err(700));
    machine.launch("standin_add_u8", [1, 32, 0], good, &[out, input, 1, 8]).unwrap();
    machine.synchronize(good).unwrap();
    assert_eq!(machine.read(out, 8), [2; 8]);
}

#[test]
fn a_graph_repeats_what_was_captured_on_both_streams() {
    for drain in DRAINS {
        let Some(machine) = open(drain) else { return };
        let (first, second) = (machine.stream(), machine.stream());
        let a = machine.device(&[1; 8]);
        let (fork, join) = (machine.event(), machine.event());
        let add = |stream| {
            machine.launch("standin_add_u8", [1, 8, 0], stream, &[a, a, 3, 8]).unwrap();
        };
        let captured = machine.capture(first, || {
            add(first);
            machine.record(fork, first).unwrap();
            machine.wait(second, fork).unwrap();
            add(second);
            machine.record(join, second).unwrap();
            machine.wait(first, join).unwrap();
        });
        let graph = captured.unwrap();
        assert_eq!(machine.read(a, 8), [1; 8], "capturing runs nothing");
        for _ in 0..3 {
            machine.launch_graph(graph, first).unwrap();
        }
        machine.synchronize(first).unwrap();
        assert_eq!(machine.read(a, 8), [19; 8]);
        assert_eq!(machine.standin.launches_of("standin_add_u8"), 6);
        // The streams are ordinary ones again.
        add(second);
        machine.synchronize(second).unwrap();
        assert_eq!(machine.read(a, 8), [22; 8]);
    }
}

#[test]
fn threads_need_the_context_and_a_reset_forgets_everything() {
    let Some(machine) = open(Drain::Lazy) else { return };
    let address = machine.allocate(64).unwrap();
    let elsewhere = std::thread::scope(|scope| {
        scope
            .spawn(|| cudarc::driver::result::mem_get_info().err().map(|error| error.0 as u32))
            .join()
    });
    assert_eq!(elsewhere.unwrap(), Some(201));
    machine.standin.reset();
    assert_eq!(machine.standin.count("device_bytes"), 0);
    assert_eq!(machine.allocate(8), Err(3), "not initialised");
    machine.open().unwrap();
    assert_eq!(machine.free(address), Err(1), "of the machine before");
}
