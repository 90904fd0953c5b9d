//! Copies, tickets, streams and events.

use crate::world::{Drain, Settings, any_device, drains, pattern, standin};
use pregate_kernels::cuda::{CudaError, Device, Pinned, Refused, Span};
use std::panic::{AssertUnwindSafe, catch_unwind};

fn span(device: &Device, bytes: usize) -> Span {
    device.arena(bytes).unwrap().take(bytes, 1).unwrap()
}

fn filled(device: &Device, seed: u64, bytes: usize) -> Pinned {
    let mut block = device.pinned(bytes).unwrap();
    block.copy_from_slice(&pattern(seed, bytes));
    block
}

fn contents(device: &Device, span: &Span) -> Vec<u8> {
    let mut bytes = vec![0; span.bytes()];
    device.stream().unwrap().download(span, &mut bytes).unwrap();
    bytes
}

#[test]
fn uploads_and_downloads_keep_every_byte() {
    let Some((_turn, device)) = any_device() else { return };
    const STAGING: usize = 1 << 20;
    for bytes in [0, 1, 3, 4096, STAGING - 1, STAGING, STAGING + 1, 3 * STAGING + 17] {
        let span = span(&device, bytes);
        let data = pattern(bytes as u64, bytes);
        device.compute().upload(&span, &data).unwrap();
        let mut back = vec![0; bytes];
        device.compute().download(&span, &mut back).unwrap();
        assert!(back == data, "{bytes} bytes");
    }
    let span = span(&device, 10);
    for wrong in [9, 11] {
        let error = device.compute().upload(&span, &vec![0; wrong]).unwrap_err();
        assert!(matches!(error, CudaError::Shape { .. }), "{error}");
        let error = device.compute().download(&span, &mut vec![0; wrong]).unwrap_err();
        assert!(matches!(error, CudaError::Shape { .. }), "{error}");
    }
}

#[test]
fn a_ticket_gives_its_memory_back_when_the_copy_has_ended() {
    for settings in drains() {
        let Some(world) = standin(settings) else { return };
        let device = world.open().unwrap();
        let target = span(&device, 5000);
        let mut ticket = device.copy().copy_in(filled(&device, 1, 6000), 100..5100, &target);
        for round in 2..6 {
            // The same block again, which the ticket gives out only when
            // nothing reads it any more: with lazy streams, writing it
            // earlier would change what the round before copied.
            let mut block = ticket.unwrap().wait().unwrap();
            let copied = contents(&device, &target);
            assert!(copied == pattern(round - 1, 6000)[100..5100], "round {round}");
            block.copy_from_slice(&pattern(round, 6000));
            ticket = device.copy().copy_in(block, 100..5100, &target);
        }
        let back = filled(&device, 0, 8000);
        let source = target.part(1000..3000);
        drop(ticket.unwrap());
        let back = device.copy().copy_out(&source, back, 500).unwrap().wait().unwrap();
        assert!(back[500..2500] == pattern(5, 6000)[1100..3100]);
        assert!(back[..500] == pattern(0, 8000)[..500] && back[2500..] == pattern(0, 8000)[2500..]);
        drop((back, source, target, device));
        world.assert_nothing_alive();
    }
}

#[test]
fn a_ticket_that_is_dropped_waits_for_its_copy() {
    // A lazy stream has not begun the copy when the ticket goes; freeing the
    // block under it would be a violation that the stand-in reports.
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let target = span(&device, 300);
    device.compute().fill(&target, 0).unwrap();
    device.compute().synchronize().unwrap();
    drop(device.copy().copy_in(filled(&device, 7, 300), 0..300, &target).unwrap());
    assert_eq!(world.alive().pinned_blocks, 0);
    assert!(contents(&device, &target) == pattern(7, 300));

    // Also while a panic unwinds, and also when both ends go with it.
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let other = span(&device, 300);
        let _out = device.copy().copy_out(&target, device.pinned(300).unwrap(), 0).unwrap();
        let _in = device.copy().copy_in(filled(&device, 8, 300), 0..300, &other).unwrap();
        drop(other);
        panic!("in the middle of two copies");
    }));
    assert!(unwound.is_err());
    assert!(world.alive().pinned_blocks <= 1, "only what downloads go through");
    drop((target, device));
    world.assert_nothing_alive();
}

#[test]
fn a_ticket_that_is_forgotten_leaks_its_memory() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let target = span(&device, 64);
    std::mem::forget(device.copy().copy_in(filled(&device, 3, 64), 0..64, &target).unwrap());
    assert_eq!(world.alive().pinned_blocks, 1);
    device.copy().synchronize().unwrap();
    assert!(contents(&device, &target) == pattern(3, 64));
    world.assert_no_violation();
}

#[test]
fn a_destination_is_read_after_its_event_and_not_before() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let (a, b, c) = (span(&device, 64), span(&device, 64), span(&device, 64));
    let ticket = device.copy().copy_in(filled(&device, 1, 64), 0..64, &a).unwrap();
    // Without the event, another stream may run before the copy; a lazy
    // driver does that.
    device.compute().copy(&a, &b).unwrap();
    device.compute().synchronize().unwrap();
    assert!(contents(&device, &b) != pattern(1, 64), "the stand-in is not lazy");
    assert!(!ticket.is_complete().unwrap() || contents(&device, &b) != pattern(1, 64));
    device.compute().wait(ticket.event().unwrap()).unwrap();
    device.compute().copy(&a, &c).unwrap();
    device.compute().synchronize().unwrap();
    assert!(contents(&device, &c) == pattern(1, 64));
    assert!(ticket.is_complete().unwrap());
}

#[test]
fn streams_wait_for_events_of_others() {
    for settings in drains() {
        let Some(world) = standin(settings) else { return };
        let device = world.open().unwrap();
        let spans: Vec<Span> = (0..20).map(|_| span(&device, 32)).collect();
        device.compute().upload(&spans[0], &pattern(9, 32)).unwrap();
        let streams = [device.compute().clone(), device.copy().clone(), device.stream().unwrap()];
        for (i, pair) in spans.windows(2).enumerate() {
            // Each copies what another stream wrote.
            let stream = &streams[i % 3];
            stream.copy(&pair[0], &pair[1]).unwrap();
            streams[(i + 1) % 3].wait(&stream.record().unwrap()).unwrap();
        }
        streams[19 % 3].synchronize().unwrap();
        assert!(contents(&device, &spans[19]) == pattern(9, 32));
    }
}

#[test]
fn refused_copies_give_their_memory_back() {
    let Some((_turn, device)) = any_device() else { return };
    let target = span(&device, 10);
    for range in [0..11, 0..9, 95..105, 20..usize::MAX] {
        let Err(refused) = device.copy().copy_in(filled(&device, 4, 100), range, &target) else {
            panic!("a copy that does not fit was taken");
        };
        assert!(matches!(refused.error, CudaError::Shape { .. }), "{}", refused.error);
        assert!(*refused.memory.unwrap() == *pattern(4, 100));
    }
    for at in [91, 101, usize::MAX] {
        let Err(Refused { error, memory }) =
            device.copy().copy_out(&target, filled(&device, 4, 100), at)
        else {
            panic!("a copy that does not fit was taken");
        };
        assert!(matches!(error, CudaError::Shape { .. }), "{error}");
        assert!(memory.is_some());
    }
    let error = device.compute().copy(&target, &target.part(0..9)).unwrap_err();
    assert!(matches!(error, CudaError::Shape { .. }), "{error}");
}

#[test]
fn events_tell_the_time_when_they_were_asked_to() {
    let Some((_turn, device)) = any_device() else { return };
    let stream = device.compute();
    let first = stream.record_timed().unwrap();
    stream.fill(&span(&device, 1 << 20), 1).unwrap();
    let last = stream.record_timed().unwrap();
    last.synchronize().unwrap();
    let seconds = last.seconds_since(&first).unwrap();
    assert!((0.0..10.0).contains(&seconds), "{seconds}");
    let plain = stream.record().unwrap();
    plain.synchronize().unwrap();
    assert!(matches!(plain.seconds_since(&first), Err(CudaError::Shape { .. })));
}

#[test]
fn events_are_made_once_and_used_again() {
    let Some(world) = standin(Settings::default()) else { return };
    let device = world.open().unwrap();
    let target = span(&device, 64);
    let mut block = filled(&device, 1, 64);
    for _ in 0..50 {
        block = device.copy().copy_in(block, 0..64, &target).unwrap().wait().unwrap();
    }
    assert_eq!(world.alive().events, 1);
}
