//! Loads a model and streams an answer: `cargo run --release --example stream`.

use pregate_kernels::{Cpu, CpuOptions};
use pregate_runtime::{
    Cancel, Event, GenerateOptions, LoadOptions, Model, Residency, Session, SessionOptions,
};
use std::{path::Path, sync::Arc};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let backend = Arc::new(Cpu::new(CpuOptions { threads: None, isa: None })?);
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/pregate-demo.gguf"));
    let model =
        Model::load(path, LoadOptions { backend, residency: Residency::Lazy }, &mut |_| {})?;
    let mut session = Session::new(&model, SessionOptions::default())?;
    let prompt = "<|im_start|>user\nextract a tar.gz archive<|im_end|>\n<|im_start|>assistant\n";
    let prompt = model.tokenizer()?.encode(prompt, pregate_runtime::text::TextKind::Rendered)?;
    let options = GenerateOptions { max_tokens: 64, ..Default::default() };
    let mut observer = pregate_predictor::NoObserver;
    let done =
        session.generate(&prompt, &options, &Cancel::new(), &mut observer, &mut |event| {
            if let Event::Text(text) = event {
                print!("{text}");
            }
        })?;
    println!("\n{:?}, {:.1} tok/s", done.finish, done.decode_tok_s().unwrap_or(0.0));
    Ok(())
}
