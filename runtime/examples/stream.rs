//! Loads a model and streams an answer: `cargo run --release --package
//! pregate-runtime --example stream`.

use pregate_kernels::{Cpu, CpuOptions};
use pregate_predictor::NoObserver;
use pregate_runtime::text::{Message, RenderOptions, encode_chat};
use pregate_runtime::{
    Cancel, Event, GenerateOptions, LoadOptions, Model, Residency, Session, SessionOptions,
};
use std::{path::Path, sync::Arc};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let backend = Arc::new(Cpu::new(CpuOptions { threads: None, isa: None })?);
    let options = LoadOptions { backend, residency: Residency::Lazy };
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/pregate-demo.gguf"));
    let model = Model::load(path, options, &mut |_| {})?;
    let messages = [Message::new("user", "extract a tar.gz archive")];
    let render = RenderOptions { add_generation_prompt: true, ..Default::default() };
    let prompt = encode_chat(model.tokenizer()?, model.chat_template()?, &messages, &render)?;

    let mut session = Session::new(&model, SessionOptions::default())?;
    let (options, cancel) = (GenerateOptions::default(), Cancel::new());
    session.generate(&prompt, &options, &cancel, &mut NoObserver, &mut |event| {
        if let Event::Text(text) = event {
            print!("{text}");
        }
    })?;
    println!();
    Ok(())
}
