//! Calls that fail: each ends in an error of the right kind, frees what was
//! made, and leaves the next run clean; after a sticky one the driver is
//! called no more.

use crate::world::{Drain, Fault, Settings, World, drains, pattern, standin};
use pregate_kernels::cuda::{
    CudaError, DeltaDecode, DeltaInputs, DeltaShape, Device, Graph, Landed, Link, LinkError,
    LinkOptions, Part, Pinned, Span, Transfer, Urgency, delta_decode, probe_copy, probe_empty,
};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Bytes of each step's result.
const BYTES: usize = 6000;

/// Everything that the device layer does, once: memory, copies both ways on
/// two streams with events between, a kernel, a link. What it computes.
fn everything(device: &Device) -> Result<Vec<u8>, CudaError> {
    let (compute, copy) = (device.compute(), device.copy());
    let arena = device.arena(8 * BYTES)?;
    let spans = (0..3).map(|_| arena.take(BYTES, 16)).collect::<Result<Vec<_>, _>>()?;
    let [a, b, c] = &spans[..] else { unreachable!() };
    let mut block = device.pinned(BYTES)?;
    block.copy_from_slice(&pattern(1, BYTES));

    let ticket = copy.copy_in(block, 0..BYTES, a)?;
    compute.fill(b, 0)?;
    if let Some(event) = ticket.event() {
        compute.wait(event)?;
    }
    probe_copy(device, compute, 2, a, b)?;
    let block = ticket.wait()?;
    compute.copy(b, c)?;
    copy.wait(&compute.record()?)?;
    let block = copy.copy_out(c, block, 0)?.wait()?;

    let mut bytes = block.to_vec();
    device.compute().upload(a, &pattern(2, BYTES))?;
    bytes.resize(2 * BYTES, 0);
    compute.download(a, &mut bytes[BYTES..])?;
    bytes.extend(in_place(device, a, b)?);
    bytes.extend(through_link(device, block, b)?);
    Ok(bytes)
}

/// The bytes of `a`, through a graph that a kernel of mapped memory ends.
fn in_place(device: &Device, a: &Span, b: &Span) -> Result<Vec<u8>, CudaError> {
    let compute = device.compute();
    let mapped = device.mapped(BYTES)?;
    let graph = Graph::capture(compute, || {
        probe_copy(device, compute, 2, a, b)?;
        probe_copy(device, compute, 2, b, &mapped.span())
    })?;
    graph.launch(compute)?;
    while !compute.query()? {}
    let mut bytes = vec![0; BYTES];
    mapped.read(0..BYTES, &mut bytes);
    Ok(bytes)
}

/// Three transfers into a span, of which one is discarded.
fn through_link(device: &Device, block: Pinned, to: &Span) -> Result<Vec<u8>, CudaError> {
    let options = LinkOptions { chunk_bytes: 400, thread: false, ..LinkOptions::default() };
    let mut link = Link::new(device, &options)?;
    let block = std::sync::Arc::new(block);
    let words = device.arena(12)?.take(12, 4)?;
    device.copy().fill(&words, 0)?;
    for (key, urgency) in [(0, Urgency::Prefetch), (1, Urgency::Prefetch), (2, Urgency::Demand)] {
        let third = BYTES / 3;
        let from = key as usize * third..(key as usize + 1) * third;
        let memory = pregate_kernels::cuda::PinnedPart::new(block.clone(), from.clone())?;
        let parts = vec![Part { from: 0..third, to: 0 }];
        let destination = to.part(from);
        let after = Some(device.compute().record()?);
        let publish = Some((words.part(4 * key as usize..4 * key as usize + 4), 70 + key as u32));
        link.submit(Transfer { key, memory, parts, destination, urgency, after, publish });
    }
    link.discard(1);
    let (mut seen, mut published) = ([false; 3], [0u32; 3]);
    let mut failure = None;
    while let Some(landed) = link.next(u64::MAX) {
        let key = landed.key as usize;
        assert!(!std::mem::replace(&mut seen[key], true), "transfer {key} landed twice");
        match landed.result {
            Ok(()) => published[key] = 70 + key as u32,
            Err(LinkError::Discarded) => {}
            Err(LinkError::Cuda(error)) => failure = failure.or(Some(error)),
            Err(error @ LinkError::Stopped(_)) => panic!("{error}"),
        }
    }
    assert_eq!(seen, [true; 3], "every transfer lands");
    if failure.as_ref().is_none_or(|error| !error.is_sticky()) {
        let mut found = [0; 12];
        device.copy().download(&words, &mut found)?;
        assert_eq!(found.as_chunks::<4>().0, published.map(u32::to_ne_bytes), "words of what came");
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let mut bytes = vec![0; BYTES];
    device.copy().download(to, &mut bytes)?;
    bytes[BYTES / 3..2 * BYTES / 3].fill(0);
    Ok(bytes)
}

/// A run from opening to closing. `Err` with the device's own last word.
fn run(world: &World) -> Result<Vec<u8>, CudaError> {
    let device = world.open()?;
    let result = everything(&device);
    if let Err(error) = &result
        && error.is_sticky()
    {
        assert_eq!(device.failure().as_ref(), Some(error), "the first sticky error stays");
    }
    result
}

/// Whether `error` may come of a call that returned `code`.
fn fits(error: &CudaError, code: u32) -> bool {
    match error {
        CudaError::Api { code: found, .. } | CudaError::OutOfPinned { code: found, .. } => {
            *found == code
        }
        CudaError::Sticky { code: found, .. } => *found == code,
        CudaError::OutOfMemory { .. } => code == 2,
        CudaError::AfterResume => code == 999,
        CudaError::BadModule { problem, .. } => problem.contains(&format!("({code} ")),
        _ => false,
    }
}

#[test]
fn every_call_may_fail_once() {
    let Some(world) = standin(Settings::default()) else { return };
    let expected = run(&world).unwrap();
    assert!(expected[..BYTES] == pattern(1, BYTES), "through the kernel");
    assert!(expected[BYTES..2 * BYTES] == pattern(2, BYTES), "up and down");
    assert!(expected[2 * BYTES..3 * BYTES] == pattern(2, BYTES), "through a graph");
    world.assert_nothing_alive();
    let calls = world.calls();
    assert!(calls >= 200, "a run of {calls} calls");
    let mut errors = 0;
    for nth in 1..=calls {
        for code in [1, 2, 801] {
            world.reset(Settings::default());
            world.fail(nth, Fault::Once, code);
            let at = format!("call {nth} of {calls} returns {code}");
            match run(&world) {
                // The link asks twice; destructors have nobody to tell; an
                // event's error is checked against its stream.
                Ok(bytes) => assert!(bytes == expected, "{at}: wrong bytes"),
                Err(error) => {
                    errors += 1;
                    assert!(fits(&error, code), "{at}: {error}");
                    assert!(!error.is_sticky(), "{at}: {error}");
                }
            }
            world.assert_no_violation();
            // A destructor whose call fails leaves one thing, or what that
            // thing is part of.
            let alive = world.alive();
            assert!(alive.sum() <= 1, "{at}: {alive:?}");
            world.clear_faults();
            if alive.sum() == 0 {
                assert!(run(&world).unwrap() == expected, "{at}: the next run is not clean");
            }
        }
    }
    assert!(errors > calls, "only {errors} errors in {} runs", 3 * calls);
}

#[test]
fn no_call_follows_a_sticky_error() {
    let Some(world) = standin(Settings::default()) else { return };
    run(&world).unwrap();
    let calls = world.calls();
    for nth in 1..=calls {
        for code in [214, 700, 719, 999] {
            world.reset(Settings::default());
            world.fail(nth, Fault::Sticky, code);
            let at = format!("call {nth} of {calls} returns {code}");
            // Opening ends with the error; the two calls before the context
            // are made together.
            match run(&world) {
                Ok(_) => {}
                Err(error) => assert!(fits(&error, code), "{at}: {error}"),
            }
            let after = world.calls() - nth;
            assert!(after <= u64::from(nth == 1), "{at}: {after} calls came after");
            world.assert_no_violation();
        }
    }
    world.reset(Settings::default());
    run(&world).unwrap();
    world.assert_nothing_alive();
}

#[test]
fn late_errors_are_not_blamed_on_the_call_that_sees_them() {
    for settings in drains() {
        let Some(world) = standin(settings) else { return };
        run(&world).unwrap();
        let calls = world.calls();
        for nth in (1..=calls).step_by(7) {
            world.reset(settings);
            world.fail(nth, Fault::DelayedSticky, 700);
            match run(&world) {
                Ok(_) => assert!(nth > calls / 2, "call {nth} of {calls} was not noticed"),
                Err(CudaError::Sticky { code: 700, delayed, .. }) => assert!(delayed),
                Err(error) => panic!("call {nth}: {error}"),
            }
            assert!(world.calls() <= nth + 1, "calls after the error");
        }
    }
}

#[test]
fn a_failed_device_answers_everything_with_its_error_and_keeps_memory_in_use() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let span = device.arena(100).unwrap().take(100, 1).unwrap();
    let ticket = device.copy().copy_in(device.pinned(100).unwrap(), 0..100, &span).unwrap();
    let mut pinned = device.pinned(64).unwrap();
    world.fail(1, Fault::Sticky, 719);
    let error = device.compute().synchronize().unwrap_err();
    assert!(error.is_sticky());
    let calls = world.calls();
    let same = |result: Result<(), CudaError>| assert_eq!(result.unwrap_err(), error);
    same(device.compute().synchronize());
    same(device.arena(1).map(drop));
    same(device.pinned(1).map(drop));
    same(probe_empty(&device, device.compute()));
    same(device.compute().record().map(drop));
    same(device.memory().map(drop));
    same(device.compute().upload(&span, &[0; 100]));
    // The copy may be running: its memory does not come back.
    same(ticket.wait().map(drop));
    // Memory that nothing uses is still ordinary memory.
    pinned.fill(7);
    assert!(pinned.iter().all(|byte| *byte == 7));
    drop((pinned, span, device));
    assert_eq!(world.calls(), calls, "destructors called the driver");
}

#[test]
fn a_panic_between_copies_frees_everything() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    for steps in 0..6 {
        let unwound = catch_unwind(AssertUnwindSafe(|| {
            let device = world.open().unwrap();
            let span = device.arena(300).unwrap().take(300, 1).unwrap();
            let mut tickets = Vec::new();
            for step in 0..steps {
                let block = device.pinned(300).unwrap();
                let part = span.part(step * 10..300);
                tickets.push(device.copy().copy_in(block, 0..300 - step * 10, &part).unwrap());
            }
            let mut link = Link::new(&device, &LinkOptions::default()).unwrap();
            link.submit(Transfer {
                key: 1,
                memory: device.pinned(10).unwrap(),
                parts: vec![Part { from: 0..10, to: 0 }],
                destination: span.part(0..10),
                urgency: Urgency::Demand,
                after: None,
                publish: None,
            });
            panic!("with copies in flight");
        }));
        assert!(unwound.is_err());
        world.assert_nothing_alive();
    }
}

#[test]
fn launches_that_do_not_fit_are_refused_before_the_driver_sees_them() {
    let Some(world) = standin(Settings::default()) else { return };
    let device = world.open().unwrap();
    let arena = device.arena(4096).unwrap();
    let (from, to) = (arena.take(64, 16).unwrap(), arena.take(64, 16).unwrap());
    let stream = device.compute();
    probe_copy(&device, stream, 1, &from, &to).unwrap();
    let calls = world.calls_of("cuLaunchKernel");
    let other = world.open().unwrap();
    for refused in [
        probe_copy(&device, stream, 0, &from, &to),
        probe_copy(&device, stream, u32::MAX, &from, &to),
        probe_copy(&device, stream, 1, &from, &to.part(0..63)),
        probe_copy(&device, stream, 1, &from.part(0..60), &to),
        probe_copy(&device, stream, 1, &from.part(8..24), &to),
        probe_copy(&other, stream, 1, &from, &to),
        probe_copy(&other, other.compute(), 1, &from, &to),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, CudaError::Shape { .. }), "{error}");
    }
    assert_eq!(world.calls_of("cuLaunchKernel"), calls);
}

#[test]
fn a_kernel_gets_its_shared_memory_once_for_all_launches() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let span = device.arena(1 << 16).unwrap().take(1 << 16, 16).unwrap();
    let decode = |key_dim: usize| {
        let shape =
            DeltaShape { key_heads: 1, value_heads: 1, key_dim, value_dim: 4, is_tiled: false };
        let part = |floats: usize| span.part(0..4 * floats);
        let (one, values) = (&part(1), &part(4));
        let inputs = DeltaInputs {
            shape,
            tokens: 1,
            mixed: &part(shape.channels()),
            alpha: one,
            beta: one,
            decay: one,
            decay_bias: one,
            norm: values,
            norm_epsilon: 1e-5,
            gate: values,
            memory: &part(4 * key_dim),
            answers: values,
        };
        let call = DeltaDecode { inputs, counters: one };
        device.compute().rehearse(|| delta_decode(&device, device.compute(), call))
    };
    // Beyond 48 KiB, less and more.
    for key_dim in [500, 400, 700] {
        decode(key_dim).unwrap();
    }
    assert_eq!(world.calls_of("cuFuncSetAttribute"), 1);
    let error = decode(1000).unwrap_err();
    assert!(matches!(error, CudaError::Unsupported { .. }), "{error}");
}

#[test]
fn a_process_that_was_stopped_does_not_blame_the_device() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let patience = std::time::Duration::from_millis(60);
    let options = LinkOptions { hung_after: patience, ..LinkOptions::default() };
    let span = device.arena(100).unwrap().take(100, 1).unwrap();
    let mut link = Link::new(&device, &options).unwrap();
    let memory = device.pinned(10).unwrap();
    world.stop("cuEventQuery", 200);
    link.submit(Transfer {
        key: 0,
        memory,
        parts: vec![Part { from: 0..10, to: 0 }],
        destination: span.part(0..10),
        urgency: Urgency::Demand,
        after: None,
        publish: None,
    });
    let landed = link.next(u64::MAX).unwrap();
    assert!(landed.result.is_ok() && landed.memory.is_some(), "{:?}", landed.result);
    device.set_patience(patience);
    device.compute().fill(&span, 1).unwrap();
    let mark = device.compute().record().unwrap();
    world.stop("cuEventQuery", 200);
    mark.synchronize().unwrap();
    assert_eq!(device.failure(), None);
    drop((link, mark, span, landed, device));
    world.assert_nothing_alive();
}

#[test]
fn a_device_that_hangs_is_given_up() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let span = device.arena(100).unwrap().take(100, 1).unwrap();
    let hung_after = std::time::Duration::from_millis(60);
    let options = LinkOptions { hung_after, ..LinkOptions::default() };
    let mut link = Link::new(&device, &options).unwrap();
    world.hang();
    for key in 0..2 {
        link.submit(Transfer {
            key,
            memory: device.pinned(10).unwrap(),
            parts: vec![Part { from: 0..10, to: 0 }],
            destination: span.part(key as usize * 10..key as usize * 10 + 10),
            urgency: Urgency::Demand,
            after: None,
            publish: None,
        });
    }
    for _ in 0..2 {
        let Landed { memory, result, .. } = link.next(u64::MAX).unwrap();
        assert!(memory.is_none(), "the device may still read it");
        assert!(matches!(result, Err(LinkError::Cuda(CudaError::Hung { .. }))), "{result:?}");
    }
    assert!(link.next(u64::MAX).is_none());
    assert!(device.failure().is_some());
    // Goes without waiting for the thread that waits for the device.
    drop(link);
    world.release();
}
