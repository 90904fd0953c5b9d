//! Graphs: the same work as launches one by one, as often as one likes, and
//! streams that are ordinary ones again whatever went wrong.

use crate::world::{Settings, World, any_device, drains, pattern, standin};
use pregate_kernels::cuda::{
    CudaError, Device, Graph, Pinned, Refused, Span, probe_copy, probe_empty, probe_read,
};
use std::panic::{AssertUnwindSafe, catch_unwind};

const BYTES: usize = 4096;

fn spans(device: &Device, count: usize) -> Vec<Span> {
    (0..count).map(|_| device.arena(BYTES).unwrap().take(BYTES, 16).unwrap()).collect()
}

fn contents(device: &Device, span: &Span) -> Vec<u8> {
    let mut bytes = vec![0; span.bytes()];
    device.compute().download(span, &mut bytes).unwrap();
    bytes
}

/// Copies each span to the next.
fn shift(device: &Device, spans: &[Span]) -> Result<(), CudaError> {
    spans
        .windows(2)
        .try_for_each(|pair| probe_copy(device, device.compute(), 2, &pair[0], &pair[1]))
}

#[test]
fn a_graph_does_what_its_launches_do_as_often_as_it_is_launched() {
    for settings in drains() {
        let Some(world) = standin(settings) else { return };
        let device = world.open().unwrap();
        let spans = spans(&device, 4);
        let stream = device.compute();
        stream.fill(&spans[3], 9).unwrap();
        let graph = Graph::capture(stream, || shift(&device, &spans)).unwrap();
        assert_eq!((graph.launches(), world.calls_of("cuLaunchKernel")), (3, 3));
        assert_eq!(contents(&device, &spans[3]), [9; BYTES], "nothing runs while it is captured");
        for seed in 0..3 {
            stream.upload(&spans[0], &pattern(seed, BYTES)).unwrap();
            graph.launch(stream).unwrap();
            assert_eq!(contents(&device, &spans[3]), pattern(seed, BYTES), "{settings:?}");
        }
        assert_eq!(world.calls_of("cuLaunchKernel"), 3);
        // Any stream of the device.
        stream.upload(&spans[0], &pattern(7, BYTES)).unwrap();
        let other = device.stream().unwrap();
        graph.launch(&other).unwrap();
        while !other.query().unwrap() {}
        assert_eq!(contents(&device, &spans[3]), pattern(7, BYTES));
        world.assert_no_violation();
    }
}

#[test]
fn a_graph_keeps_its_memory_and_its_kernels_and_nothing_more() {
    let Some(world) = standin(Settings::default()) else { return };
    let device = world.open().unwrap();
    let from = device.arena(BYTES).unwrap().take(BYTES, 16).unwrap();
    let other = device.arena(BYTES).unwrap().take(BYTES, 16).unwrap();
    let mapped = device.mapped(BYTES).unwrap();
    let stream = device.compute().clone();
    stream.upload(&from, &pattern(1, BYTES)).unwrap();
    let graph = Graph::capture(&stream, || {
        probe_copy(&device, &stream, 1, &from.part(16..48), &mapped.span().part(0..32))?;
        probe_copy(&device, &stream, 1, &from.part(64..96), &mapped.span().part(32..64))
    });
    let graph = graph.unwrap();
    drop((from, other, device));
    assert_eq!(world.alive().device_blocks, 1, "one of the two");
    graph.launch(&stream).unwrap();
    stream.synchronize().unwrap();
    let mut found = [0; 64];
    mapped.read(0..64, &mut found);
    let wanted = pattern(1, BYTES);
    assert_eq!((&found[..32], &found[32..]), (&wanted[16..48], &wanted[64..96]));
    drop(mapped);
    // The span in the graph keeps the mapped block, too.
    graph.launch(&stream).unwrap();
    drop((graph, stream));
    world.assert_nothing_alive();
}

/// The stream works, and is not captured.
fn assert_ordinary(device: &Device, spans: &[Span]) {
    let stream = device.compute();
    stream.upload(&spans[0], &pattern(3, BYTES)).unwrap();
    stream.fill(&spans[1], 0).unwrap();
    shift(device, spans).unwrap();
    assert_eq!(contents(device, &spans[1]), pattern(3, BYTES));
    let graph = Graph::capture(stream, || shift(device, spans)).unwrap();
    graph.launch(stream).unwrap();
    assert!(stream.record().and_then(|event| event.synchronize()).is_ok());
    assert!(stream.query().unwrap());
}

#[test]
fn what_cannot_be_captured_is_refused_and_spoils_nothing() {
    let Some((world, device)) = any_device() else { return };
    let spans = spans(&device, 2);
    let stream = device.compute();
    let pinned = || device.pinned(BYTES).unwrap();
    let (first, second) = (pinned(), pinned());
    stream.upload(&spans[0], &[0; BYTES]).unwrap();
    let event = device.copy().record().unwrap();
    // Freeing memory would spoil the capture.
    let mut kept = Vec::new();
    let mut keep = |refused: Refused<Pinned>| {
        kept.extend(refused.memory);
        refused.error
    };
    let graph = Graph::capture(stream, || {
        let refused = [
            ("synchronize", stream.synchronize()),
            ("query", stream.query().map(drop)),
            ("record", stream.record().map(drop)),
            ("record_timed", stream.record_timed().map(drop)),
            ("wait", stream.wait(&event)),
            ("fill", stream.fill(&spans[0], 1)),
            ("copy", stream.copy(&spans[0], &spans[1])),
            ("upload", stream.upload(&spans[0], &[1; BYTES])),
            ("download", stream.download(&spans[0], &mut [0; BYTES])),
            ("copy_in", stream.copy_in(first, 0..BYTES, &spans[0]).map_err(&mut keep).map(drop)),
            ("copy_out", stream.copy_out(&spans[0], second, 0).map_err(&mut keep).map(drop)),
            ("capture", Graph::capture(stream, || Ok(())).map(drop)),
        ];
        for (call, result) in refused {
            let error = result.expect_err(call);
            assert!(error.to_string().contains("only launches can be captured"), "{call}: {error}");
        }
        // Another stream is not captured.
        device.copy().fill(&spans[1], 5)?;
        shift(&device, &spans)
    });
    assert_eq!(graph.unwrap().launches(), 1);
    assert_eq!(kept.len(), 2, "what was refused comes back");
    device.copy().synchronize().unwrap();
    assert_eq!(contents(&device, &spans[1]), [5; BYTES]);
    assert_ordinary(&device, &spans);
    if let Some(world) = &world {
        world.assert_no_violation();
    }
}

#[test]
fn a_module_may_be_loaded_in_a_capture() {
    let Some((_turn, device)) = any_device() else { return };
    let spans = spans(&device, 2);
    let stream = device.compute();
    stream.upload(&spans[0], &pattern(3, BYTES)).unwrap();
    // The first launch of all.
    let graph = Graph::capture(stream, || shift(&device, &spans)).unwrap();
    graph.launch(stream).unwrap();
    assert_eq!(contents(&device, &spans[1]), pattern(3, BYTES));
}

#[test]
fn a_capture_that_fails_leaves_an_ordinary_stream() {
    let Some((_turn, device)) = any_device() else { return };
    let spans = spans(&device, 2);
    let stream = device.compute();
    // The work's own error.
    let failed = Graph::capture(stream, || {
        shift(&device, &spans)?;
        probe_copy(&device, stream, 0, &spans[0], &spans[1])
    });
    assert!(matches!(failed, Err(CudaError::Shape { .. })), "{failed:?}");
    assert_ordinary(&device, &spans);
    // A panic.
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        Graph::capture(stream, || {
            shift(&device, &spans).unwrap();
            panic!("while it is captured")
        })
    }));
    assert!(panicked.is_err());
    assert_ordinary(&device, &spans);
    // Memory that is taken: the driver gives the capture up.
    let spoilt = Graph::capture(stream, || {
        shift(&device, &spans)?;
        let _ = device.arena(100);
        Ok(())
    });
    assert!(spoilt.is_err());
    assert_ordinary(&device, &spans);
    // Nothing at all is a graph, too.
    let empty = Graph::capture(stream, || Ok(())).unwrap();
    empty.launch(stream).unwrap();
    assert_eq!(empty.launches(), 0);
}

#[test]
fn other_threads_work_while_one_captures() {
    let Some((_turn, device)) = any_device() else { return };
    let spans = spans(&device, 3);
    let stream = device.compute();
    stream.upload(&spans[0], &pattern(3, BYTES)).unwrap();
    let graph = Graph::capture(stream, || {
        shift(&device, &spans[..2])?;
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                // What a capture forbids its own thread.
                let span = device.arena(BYTES).unwrap().take(BYTES, 16).unwrap();
                device.copy().upload(&span, &[1; BYTES]).unwrap();
                drop((span, device.pinned(100).unwrap()));
            });
            worker.join().unwrap();
        });
        shift(&device, &spans[1..])
    });
    graph.unwrap().launch(stream).unwrap();
    assert_eq!(contents(&device, &spans[2]), pattern(3, BYTES));
}

#[test]
fn streams_of_other_devices_are_refused() {
    let Some(world) = standin(Settings::default()) else { return };
    let (device, other) = (world.open().unwrap(), world.open().unwrap());
    let spans = spans(&device, 2);
    let graph = Graph::capture(device.compute(), || shift(&device, &spans)).unwrap();
    assert!(matches!(graph.launch(other.compute()), Err(CudaError::Shape { .. })));
    drop((graph, spans, device, other));
    world.assert_nothing_alive();
}

#[test]
fn a_question_does_not_wait_and_finds_errors() {
    let Some(world) = standin(Settings::default()) else { return };
    let device = world.open().unwrap();
    let spans = spans(&device, 2);
    let stream = device.compute();
    assert!(stream.query().unwrap(), "nothing was submitted");
    for _ in 0..3 {
        probe_empty(&device, stream).unwrap();
    }
    // Lazy streams go on by one piece a question.
    let rounds = (1..10).find(|_| stream.query().unwrap());
    assert!(rounds.is_some_and(|rounds| rounds >= 3), "{rounds:?}");
    shift(&device, &spans).unwrap();
    world.fail_call("cuStreamQuery", 1, crate::world::Fault::Sticky, 719);
    let error = stream.query().unwrap_err();
    assert!(error.is_sticky() && device.failure() == Some(error));
}

/// How often launchers had to ask the driver for a kernel.
fn lookups(world: &World) -> u64 {
    world.calls_of("cuModuleGetFunction")
}

#[test]
fn the_driver_is_asked_once_for_a_kernel() {
    let Some(world) = standin(Settings::default()) else { return };
    let device = world.open().unwrap();
    let spans = spans(&device, 2);
    let sums = device.arena(4 * 256 * 2).unwrap().take(4 * 256 * 2, 16).unwrap();
    for _ in 0..5 {
        shift(&device, &spans).unwrap();
        probe_read(&device, device.compute(), 2, &spans[0], &sums).unwrap();
    }
    assert_eq!(lookups(&world), 2);
    assert_eq!(world.calls_of("cuLaunchKernel"), 10);
    // Another device has its own.
    let other = world.open().unwrap();
    probe_empty(&other, other.compute()).unwrap();
    assert_eq!(lookups(&world), 3);
    device.compute().synchronize().unwrap();
    other.compute().synchronize().unwrap();
}
