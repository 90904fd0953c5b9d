//! Every architecture on `Cuda` has the bits of the CPU, from the prompt to
//! the last token.

#[path = "support/golden.rs"]
#[allow(dead_code)]
mod golden;

use golden::{argmax, models};
use pregate_kernels::cuda::Cuda;
use pregate_kernels::{Backend, Cpu, CpuOptions, Isa};
use pregate_runtime::{LoadOptions, Model, Residency, Session, SessionOptions};
use pregate_standin::testing;
use std::path::Path;
use std::sync::Arc;

fn scalar() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(2), isa: Some(Isa::Scalar) }).unwrap()
}

/// Logits of a prompt and of two greedy tokens behind it, as bits.
fn answer(path: &Path, backend: Arc<dyn Backend>) -> Vec<u32> {
    let options = LoadOptions { backend, residency: Residency::Lazy };
    let model = Model::load(path, options, &mut |_| {}).unwrap();
    let options = SessionOptions { prefill_chunk: 9, ..Default::default() };
    let mut session = Session::new(&model, options).unwrap();
    let vocab = model.description().vocab as u32;
    let prompt: Vec<u32> = (0..11).map(|i| (i * 37 + 5) % vocab).collect();
    let mut bits = Vec::new();
    let mut logits = session.feed_quietly(&prompt).unwrap().to_vec();
    for _ in 0..3 {
        bits.extend(logits.iter().map(|logit| logit.to_bits()));
        logits = session.feed_quietly(&[argmax(&logits)]).unwrap().to_vec();
    }
    bits
}

#[test]
fn every_architecture_has_the_bits_of_the_cpu() {
    for path in models() {
        let Some(device) = testing::device() else { return };
        let gpu = Arc::new(Cuda::new(device, scalar()));
        let found = answer(&path, gpu.clone());
        assert_eq!((gpu.failure(), gpu.on_host()), (None, 0), "{}", path.display());
        let expected = answer(&path, Arc::new(scalar()));
        assert!(found == expected, "{}: other bits", path.display());
    }
}
