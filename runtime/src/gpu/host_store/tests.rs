//! Memory that the system does not page-lock, or not in one piece.

use super::*;
use crate::OpenedModel;
use pregate_kernels::cuda::{DeviceOptions, Modules};
use pregate_standin::{Fault, Standin, testing};
use std::path::Path;

fn opened() -> OpenedModel {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    OpenedModel::open(&root.join("gguf/qwen3_moe.Q8_0.gguf"), &mut |_| {}).unwrap()
}

fn device() -> Device {
    Device::open(0, &DeviceOptions { modules: Modules::Named }).unwrap()
}

fn fill(device: &Device, opened: &OpenedModel, pieces: Pieces) -> Result<HostStore, CudaError> {
    let first = vec![1; opened.weights().layers.len()];
    let mut told = vec![0];
    let (files, weights) = (opened.files(), opened.weights());
    let store = HostStore::fill(device, files, weights, &first, pieces, &mut |done, all| {
        assert!(done <= all && told.last().is_some_and(|before| *before < done));
        told.push(done);
    })?;
    assert_eq!(told.last(), Some(&(store.pinned_bytes() + store.pageable_bytes())));
    Ok(store)
}

fn blocks(store: &HostStore) -> Vec<Vec<&[u8]>> {
    let layers = store.layers.iter();
    layers.map(|layer| layer.blocks.iter().map(|block| block.bytes()).collect()).collect()
}

/// Calls that asked for page-locked memory while `run`.
fn asked<T>(standin: &Standin, run: impl FnOnce() -> T) -> (T, u64) {
    let before = standin.calls_of("cuMemHostAlloc");
    let found = run();
    (found, standin.calls_of("cuMemHostAlloc") - before)
}

#[test]
fn refused_pieces_are_halved_down_to_the_least_and_the_rest_is_pageable() {
    let Some(standin) = testing::standin() else { return };
    let standin = standin.exclusive();
    let (opened, device) = (opened(), device());
    let (whole, calls) = asked(&standin, || fill(&device, &opened, Pieces::default()).unwrap());
    assert_eq!((calls, whole.pageable_bytes(), whole.refused()), (1, 0, None));
    let all = whole.pinned_bytes();
    let one = blocks(&whole)[0][0].len() as u64;
    assert!(all >= 16 * one, "{all} bytes of blocks of {one}");

    let pieces = Pieces { most_bytes: all as usize, least_bytes: all as usize / 16 };
    // Its room, and that of the store from before.
    standin.set_pinned(all + all * 5 / 8);
    let (some, calls) = asked(&standin, || fill(&device, &opened, pieces).unwrap());
    // All, 1/2 of it, 1/2 again, 1/4, 1/8, and once more.
    assert_eq!(calls, 6);
    assert!((all / 2..=all * 5 / 8).contains(&some.pinned_bytes()), "{}", some.pinned_bytes());
    assert_eq!(some.pinned_bytes() + some.pageable_bytes(), all);
    assert!(matches!(some.refused(), Some(CudaError::OutOfPinned { .. })));
    assert!(blocks(&some) == blocks(&whole), "other bytes");
    drop(some);

    standin.set_pinned(all);
    let (none, calls) = asked(&standin, || fill(&device, &opened, pieces).unwrap());
    assert_eq!((calls, none.pinned_bytes()), (4, 0));
    assert!(blocks(&none) == blocks(&whole), "other bytes");
}

#[test]
fn one_refusal_costs_smaller_pieces_and_a_failed_device_is_an_error() {
    let Some(standin) = testing::standin() else { return };
    let standin = standin.exclusive();
    let (opened, device) = (opened(), device());
    let pieces = Pieces { most_bytes: usize::MAX, least_bytes: 1 };
    // Some systems call it an invalid value.
    standin.fail_call("cuMemHostAlloc", 1, Fault::Once, 1);
    let (store, calls) = asked(&standin, || fill(&device, &opened, pieces).unwrap());
    assert!((3..=4).contains(&calls), "{calls}");
    assert_eq!((store.pageable_bytes(), store.refused()), (0, None));
    standin.fail_call("cuMemHostAlloc", 1, Fault::Sticky, 719);
    let error = fill(&device, &opened, pieces).map(drop).unwrap_err();
    assert!(error.is_sticky(), "{error}");
}
