//! Entries of experts, which a token takes along.

use super::*;
use crate::model::Source;
use crate::{GpuExperts, LoadOptions, Misses, OpenedModel, Residency, Session, Streaming};
use pregate_kernels::cuda::{Device, DeviceOptions, Modules};
use pregate_kernels::{Cpu, CpuOptions};
use pregate_standin::{Fault, testing};
use std::path::Path;
use std::sync::Arc;

/// Where few experts fit, and kernels are launched one by one.
fn session() -> Session {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    let path = root.join("gguf/qwen3_moe.Q8_0.gguf");
    let opened = OpenedModel::open(&path, &mut |_| {}).unwrap();
    let layers = opened.layout().shape.layers.len();
    let streaming =
        Streaming { slots: vec![5; layers], ring: 2, source: Source::Host, ..Streaming::default() };
    let experts = GpuExperts::Moving { fixed: vec![1; layers], streaming, misses: Misses::Copied };
    let device = Device::open(0, &DeviceOptions { modules: Modules::Named }).unwrap();
    let residency = Residency::Gpu { device, experts };
    let backend = Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).unwrap());
    let model = opened.load(LoadOptions { backend, residency }, &mut |_| {}).unwrap();
    let options = SessionOptions { context: Some(64), graphs: false, ..SessionOptions::default() };
    Session::new(&model, options).unwrap()
}

/// Entries for the next token.
fn waiting(session: &Session) -> Vec<(u32, u32)> {
    let slots = session.model().gpu().unwrap().slots();
    let mut entries = Vec::new();
    slots.take(&mut entries);
    slots.put_back(&entries);
    entries
}

/// They would take out again what has come meanwhile.
#[test]
fn entries_that_the_first_launch_has_set_do_not_wait_again() {
    let Some(standin) = testing::standin() else { return };
    let standin = standin.exclusive();
    // The first launch, the second, and some in a later layer.
    for (nth, is_set) in [(1, false), (2, true), (25, true)] {
        standin.reset();
        standin.set_print(false);
        let mut session = session();
        let mut ids = 5..60;
        while waiting(&session).is_empty() {
            session.feed_quietly(&[ids.next().expect("experts leave")]).unwrap();
        }
        let before = waiting(&session);
        standin.fail_call("cuLaunchKernel", nth, Fault::Once, 2);
        session.feed_quietly(&[60]).unwrap_err();
        let after = waiting(&session);
        let left = before.iter().filter(|entry| after.contains(entry)).count();
        assert_eq!(left, if is_set { 0 } else { before.len() }, "launch {nth}: {after:?}");
    }
}
