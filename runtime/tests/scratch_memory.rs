//! `budget::scratch_bytes` against what sessions really allocate.

#[path = "support/counting_allocator.rs"]
mod counting_allocator;

use counting_allocator::peak_bytes;
use pregate_kernels::{Cpu, CpuOptions, Isa};
use pregate_runtime::budget::{Chunk, scratch_bytes};
use pregate_runtime::{LoadOptions, Model, Residency, Session, SessionOptions};
use std::path::Path;
use std::sync::Arc;

#[global_allocator]
static ALLOCATOR: counting_allocator::Counting = counting_allocator::Counting;

/// A model on one thread, so that all its memory is this thread's.
fn load(path: &str, isa: Option<Isa>) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    let backend = Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa }).expect("one thread"));
    Model::load(&path, LoadOptions { backend, residency: Residency::Lazy }, &mut |_| {})
        .expect("a model of this repository")
}

/// Bytes predicted and held at once, for a prompt of `tokens` tokens and some
/// tokens more.
fn measure(path: &str, tokens: usize, isa: Option<Isa>) -> [usize; 2] {
    let model = load(path, isa);
    let context = (tokens + 4).max(300).min(model.description().context_limit);
    let chunk = Chunk { tokens, logit_rows: 1, context, threads: 1 };
    let predicted = scratch_bytes(model.description(), model.weights(), chunk);
    let options =
        SessionOptions { context: Some(context), prefill_chunk: tokens, ..Default::default() };
    let mut session = Session::new(&model, options).expect("a session");
    let vocab = model.description().vocab as u32;
    let ids: Vec<u32> = (0..tokens as u32 + 4).map(|i| i * 7919 % vocab).collect();
    let ((), peak) = peak_bytes(|| {
        session.feed_quietly(&ids[..tokens]).expect("logits");
        for id in &ids[tokens..] {
            session.feed_quietly(&[*id]).expect("logits");
        }
    });
    [predicted as usize, peak]
}

const MODELS: [&str; 17] = [
    "models/pregate-demo.gguf",
    "tests/data/gguf/deepseek_v2_lite.f32.gguf",
    "tests/data/gguf/deepseek_v3.Q8_0.gguf",
    "tests/data/gguf/gpt_oss_mxfp4.MXFP4.gguf",
    "tests/data/gguf/granitemoe.f32.gguf",
    "tests/data/gguf/mixtral.Q8_0.gguf",
    "tests/data/gguf/olmoe.f32.gguf",
    "tests/data/gguf/qwen2_moe.f32.gguf",
    "tests/data/gguf/qwen3_moe.Q4_1.gguf",
    "tests/data/gguf/qwen3_moe_k256.Q2_K.gguf",
    "tests/data/gguf/qwen3_moe_k256.IQ4_XS.gguf",
    "tests/data/gguf/qwen3_moe_k256.Q4_K_M.gguf",
    "tests/data/hf/glm4_moe",
    "tests/data/hf/gpt_oss",
    "tests/data/hf/gpt_oss_mxfp4",
    "tests/data/hf/granitemoeshared",
    "tests/data/hf/qwen3_5_moe_text",
];

#[test]
fn no_session_takes_more_than_the_formula_and_none_much_less() {
    for isa in Isa::available() {
        for path in MODELS {
            for tokens in [1, 128] {
                let [predicted, peak] = measure(path, tokens, Some(isa));
                let what = format!("{path}, {tokens} tokens, {}", isa.name());
                assert!(peak <= predicted, "{what}: {peak} bytes, predicted {predicted}");
                // Tiny models have hardly more than the fixed part of it.
                let most = 2 * peak + (256 << 10);
                assert!(predicted <= most, "{what}: {peak} bytes, predicted {predicted}");
            }
        }
    }
}
