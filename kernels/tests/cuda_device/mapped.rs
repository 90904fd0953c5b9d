//! Host memory that kernels use in place.

use crate::world::{Drain, Settings, any_device, pattern, standin};
use pregate_kernels::cuda::{CudaError, Graph, Mapped, probe_copy};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Accesses of several sizes are for one thread at a time.
#[test]
fn threads_hand_it_over_and_do_not_share_it() {
    struct Of<T>(PhantomData<T>);
    trait Usual {
        fn is_sync(&self) -> bool {
            false
        }
    }
    impl<T> Usual for Of<T> {}
    // Preferred to the trait's, where it exists.
    impl<T: Sync> Of<T> {
        fn is_sync(&self) -> bool {
            true
        }
    }
    assert!(Of(PhantomData::<[u8; 8]>).is_sync());
    assert!(!Of(PhantomData::<Mapped>).is_sync());
    let Some((_turn, device)) = any_device() else { return };
    let mapped = device.mapped(16).unwrap();
    mapped.write(3, &[7; 6]);
    let mapped = std::thread::spawn(move || {
        mapped.store_release(1, mapped.load_acquire(0) + mapped.load_acquire(1));
        mapped
    });
    let mapped = mapped.join().unwrap();
    let mut bytes = [0; 16];
    mapped.read(0..16, &mut bytes);
    assert_eq!(bytes, [0, 0, 0, 7, 7, 7, 7, 7, 7, 0, 0, 7, 7, 7, 7, 7]);
}

#[test]
fn kernels_read_and_write_it_in_place() {
    let Some((world, device)) = any_device() else { return };
    let mapped = device.mapped(4096).unwrap();
    let mut bytes = vec![1; 4096];
    mapped.read(0..4096, &mut bytes);
    assert_eq!(bytes, [0; 4096], "zeros at first");
    mapped.write(0, &pattern(1, 2048));
    let (from, to) = (mapped.span().part(0..2048), mapped.span().part(2048..4096));
    let stream = device.compute();
    probe_copy(&device, stream, 2, &from, &to).unwrap();
    stream.synchronize().unwrap();
    mapped.read(2048..4096, &mut bytes[..2048]);
    assert_eq!(bytes[..2048], pattern(1, 2048));
    // And back through device memory.
    let span = device.arena(2048).unwrap().take(2048, 16).unwrap();
    mapped.write(0, &pattern(2, 2048));
    probe_copy(&device, stream, 1, &from, &span).unwrap();
    probe_copy(&device, stream, 1, &span, &to).unwrap();
    while !stream.query().unwrap() {}
    mapped.read(2048..4096, &mut bytes[..2048]);
    assert_eq!(bytes[..2048], pattern(2, 2048));
    if let Some(world) = &world {
        world.assert_no_violation();
    }
}

#[test]
fn bytes_words_and_floats_are_the_same_memory() {
    let Some((_turn, device)) = any_device() else { return };
    let mapped = device.mapped(100).unwrap();
    assert_eq!((mapped.bytes(), mapped.span().bytes()), (100, 100));
    // Every start and length around the border of words.
    let mut image = [0; 100];
    for start in 0..20 {
        for length in 0..30 {
            let bytes = pattern((start * 31 + length) as u64, length);
            mapped.write(start, &bytes);
            image[start..start + length].copy_from_slice(&bytes);
            let mut found = [0; 100];
            mapped.read(0..100, &mut found);
            assert_eq!(found, image, "{length} bytes at {start}");
            let mut part = vec![0; length];
            mapped.read(start..start + length, &mut part);
            assert_eq!(part, bytes);
        }
    }
    mapped.store_release(11, 0x0102_0304_0506_0708);
    assert_eq!(mapped.load_acquire(11), 0x0102_0304_0506_0708);
    let mut word = [0; 8];
    mapped.read(88..96, &mut word);
    assert_eq!(u64::from_ne_bytes(word), 0x0102_0304_0506_0708);
    let floats = [1.5f32, -0.0, f32::MIN_POSITIVE / 4.0, 7e30];
    mapped.write_floats(84, &floats);
    let mut found = [0.0; 4];
    mapped.read_floats(84, &mut found);
    assert_eq!(found.map(f32::to_bits), floats.map(f32::to_bits));
    let mut bytes = [0; 16];
    mapped.read(84..100, &mut bytes);
    assert_eq!(bytes[..4], 1.5f32.to_ne_bytes());
}

#[test]
fn what_does_not_lie_in_it_is_refused() {
    let Some((_turn, device)) = any_device() else { return };
    let mapped = device.mapped(100).unwrap();
    let outside = |use_it: &dyn Fn()| {
        assert!(catch_unwind(AssertUnwindSafe(use_it)).is_err());
    };
    for word in [12, 13, usize::MAX, usize::MAX / 8, usize::MAX / 8 + 1] {
        outside(&|| assert_eq!(mapped.load_acquire(word), 0));
        outside(&|| mapped.store_release(word, 1));
    }
    for at in [97, 100, 101, usize::MAX, usize::MAX - 2] {
        outside(&|| mapped.write(at, &[1; 4]));
        outside(&|| mapped.read(at..at.saturating_add(4), &mut [0; 4]));
        outside(&|| mapped.write_floats(at, &[1.0]));
        outside(&|| mapped.read_floats(at, &mut [0.0]));
    }
    outside(&|| mapped.write_floats(2, &[1.0]));
    outside(&|| mapped.read(0..4, &mut [0; 5]));
    let mut bytes = [1; 100];
    mapped.read(0..100, &mut bytes);
    assert_eq!(bytes, [0; 100], "nothing was written");
    assert!(matches!(device.mapped(usize::MAX), Err(CudaError::Shape { .. })));
}

#[test]
fn copies_and_fills_refuse_it() {
    let Some((_turn, device)) = any_device() else { return };
    let mapped = device.mapped(64).unwrap();
    let span = device.arena(64).unwrap().take(64, 16).unwrap();
    let stream = device.compute();
    for refused in [
        stream.fill(&mapped.span(), 1),
        stream.copy(&mapped.span(), &span),
        stream.copy(&span, &mapped.span()),
        stream.upload(&mapped.span(), &[1; 64]),
        stream.download(&mapped.span(), &mut [0; 64]),
        stream
            .copy_in(device.pinned(64).unwrap(), 0..64, &mapped.span())
            .map(drop)
            .map_err(CudaError::from),
    ] {
        let error = refused.unwrap_err();
        assert!(error.to_string().contains("mapped memory"), "{error}");
    }
}

#[test]
fn it_is_freed_behind_all_work_when_its_last_span_goes() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let span = device.arena(64).unwrap().take(64, 16).unwrap();
    let mapped = device.mapped(64).unwrap();
    let part = mapped.span().part(0..64);
    assert_eq!(world.alive().pinned_blocks, 1);
    drop(mapped);
    assert_eq!(world.alive().pinned_blocks, 1);
    probe_copy(&device, device.compute(), 1, &part, &span).unwrap();
    drop(part);
    assert_eq!(world.alive().pinned_blocks, 0);
    let mut bytes = [1; 64];
    device.compute().download(&span, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 64], "the kernel read it before it went");
    world.assert_no_violation();
}

#[test]
fn it_waits_for_streams_that_nobody_has_any_more() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let span = device.arena(64).unwrap().take(64, 16).unwrap();
    let streams = world.alive().streams;
    let (mapped, stream) = (device.mapped(64).unwrap(), device.stream().unwrap());
    let part = mapped.span().part(0..64);
    drop(mapped);
    for _ in 0..4 {
        probe_copy(&device, &stream, 1, &part, &span).unwrap();
    }
    drop(stream);
    drop(part);
    assert_eq!(world.alive().pinned_blocks, 0);
    assert_eq!(world.alive().streams, streams, "those of the device");
    drop((span, device));
    world.assert_nothing_alive();
}

#[test]
fn it_stays_where_nobody_can_tell_that_the_device_is_done_with_it() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let arena = device.arena(256).unwrap();
    let spans = [(); 2].map(|()| arena.take(64, 16).unwrap());
    let mapped = device.mapped(64).unwrap();
    // A question would spoil the capture.
    let graph = Graph::capture(device.compute(), || {
        drop(mapped);
        probe_copy(&device, device.compute(), 1, &spans[0], &spans[1])
    });
    graph.unwrap().launch(device.compute()).unwrap();
    assert_eq!((world.alive().pinned_blocks, device.failure()), (1, None));
    let mapped = device.mapped(64).unwrap();
    device.set_patience(Duration::from_millis(60));
    world.hang();
    let mark = device.compute().record().unwrap();
    let started = Instant::now();
    drop(mapped);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(world.alive().pinned_blocks, 2);
    assert!(matches!(device.failure(), Some(CudaError::Hung { .. })));
    drop(mark);
    world.release();
}

#[test]
fn too_little_page_locked_memory_is_an_ordinary_error() {
    let settings = Settings { pinned_bytes: 1 << 20, ..Settings::default() };
    let Some(world) = standin(settings) else { return };
    let device = world.open().unwrap();
    let error = device.mapped(2 << 20).err().unwrap();
    assert!(matches!(error, CudaError::OutOfPinned { .. }), "{error}");
    assert_eq!(device.failure(), None);
    drop(device.mapped(1 << 19).unwrap());
    drop(device);
    world.assert_nothing_alive();
}
