//! Arenas, spans and page-locked memory.

use crate::world::{Settings, any_device, standin};
use pregate_kernels::cuda::{CudaError, Pinned, PinnedPart};
use std::sync::Arc;

#[test]
fn spans_are_aligned_disjoint_and_inside_their_arena() {
    let Some((_turn, device)) = any_device() else { return };
    let mut arena = device.arena(10_000).unwrap();
    assert_eq!(arena.bytes(), 10_000);
    let mut end = 0;
    let mut spans = Vec::new();
    for (bytes, align) in [(1, 1), (100, 16), (0, 4), (7, 256), (33, 2), (4096, 128)] {
        let span = arena.take(bytes, align).unwrap();
        assert_eq!(span.bytes(), bytes);
        assert_eq!(span.address() % align as u64, 0);
        assert!(span.address() >= end, "overlaps the span before");
        end = span.address() + bytes as u64;
        spans.push(span);
    }
    assert_eq!(arena.free_bytes() as u64, 10_000 - (end - spans[0].address()));
    // The rest, and not a byte more.
    let rest = arena.free_bytes();
    let error = arena.take(rest + 1, 1).err().unwrap();
    assert_eq!(error, CudaError::OutOfMemory { needed: rest as u64 + 1, free: rest as u64 });
    spans.push(arena.take(rest, 1).unwrap());
    for align in [0, 3, 512] {
        assert!(matches!(arena.take(0, align), Err(CudaError::Shape { .. })), "{align}");
    }

    let error = arena.rewind().unwrap_err();
    assert!(error.to_string().contains("7 of its spans"), "{error}");
    let first = spans[0].address();
    drop(spans);
    arena.rewind().unwrap();
    assert_eq!(arena.take(10_000, 1).unwrap().address(), first);
}

#[test]
fn parts_of_spans_are_checked() {
    let Some((_turn, device)) = any_device() else { return };
    let span = device.arena(100).unwrap().take(100, 1).unwrap();
    let part = span.part(10..30).part(5..20);
    assert_eq!((part.address(), part.bytes()), (span.address() + 15, 15));
    for range in [90..101, 101..101, std::ops::Range { start: 5, end: 4 }] {
        let outside = std::panic::catch_unwind(|| span.part(range.clone()));
        assert!(outside.is_err(), "{range:?}");
    }
}

#[test]
fn an_arena_lives_as_long_as_its_last_span() {
    let Some(world) = standin(Settings::default()) else { return };
    let device = world.open().unwrap();
    let arena = device.arena(1000).unwrap();
    let span = arena.take(10, 1).unwrap();
    let part = span.part(2..4);
    assert_eq!(world.alive().device_blocks, 1);
    drop((arena, span));
    device.compute().upload(&part, &[1, 2]).unwrap();
    assert_eq!(world.alive().device_blocks, 1);
    drop(part);
    assert_eq!(world.alive().device_blocks, 0);
}

#[test]
fn too_little_device_memory_is_an_ordinary_error_with_both_figures() {
    let Some(world) = standin(Settings { vram_bytes: 4 << 20, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let taken = device.arena(1 << 20).unwrap();
    match device.arena(8 << 20).err().unwrap() {
        CudaError::OutOfMemory { needed, free } => {
            assert!(needed >= 8 << 20, "{needed}");
            assert!((2 << 20..=3 << 20).contains(&free), "{free}");
        }
        error => panic!("{error}"),
    }
    assert_eq!(device.failure(), None);
    // What fits still comes, and what is given back can be had again.
    drop(device.arena(2 << 20).unwrap());
    drop(taken);
    drop(device.arena(3 << 20).unwrap());
    assert!(matches!(device.arena(usize::MAX), Err(CudaError::Shape { .. })));
}

#[test]
fn too_little_page_locked_memory_is_an_ordinary_error() {
    let settings = Settings { pinned_bytes: 1 << 20, ..Settings::default() };
    let Some(world) = standin(settings) else { return };
    let device = world.open().unwrap();
    let block = device.pinned(512 << 10).unwrap();
    let error = device.pinned(1 << 20).err().unwrap();
    let needed = 1 << 20;
    let name = "CUDA_ERROR_OUT_OF_MEMORY";
    assert_eq!(error, CudaError::OutOfPinned { needed, code: 2, name });
    drop(block);
    assert_eq!(device.pinned(1 << 20).unwrap().len(), 1 << 20);
}

#[test]
fn page_locked_memory_is_written_by_its_owner_and_read_by_parts() {
    let Some((_turn, device)) = any_device() else { return };
    let mut block: Pinned = device.pinned(1000).unwrap();
    for (i, byte) in block.iter_mut().enumerate() {
        *byte = i as u8;
    }
    let block = Arc::new(block);
    for range in [1000..1001, std::ops::Range { start: 2, end: 1 }, 0..usize::MAX] {
        assert!(PinnedPart::new(block.clone(), range).is_err());
    }
    let part = PinnedPart::new(block, 300..310).unwrap();
    let span = device.arena(4).unwrap().take(4, 1).unwrap();
    device.copy().copy_in(part, 1..5, &span).unwrap().wait().unwrap();
    let mut bytes = [0; 4];
    device.copy().download(&span, &mut bytes).unwrap();
    assert_eq!(bytes, [45, 46, 47, 48]);
    assert_eq!(device.pinned(0).unwrap().len(), 0);
}
