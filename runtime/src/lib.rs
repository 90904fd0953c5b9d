//! The engine and the embedded library: load a Mixture-of-Experts model, feed
//! tokens, stream answers.
//!
//! It prints nothing, reads no environment variable, holds no global and
//! never exits; a run can be cancelled from another thread.
//!
//! ```no_run
//! use pregate_kernels::{Cpu, CpuOptions};
//! use pregate_predictor::NoObserver;
//! use pregate_runtime::text::{Message, RenderOptions, encode_chat};
//! use pregate_runtime::*;
//! # fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
//! let backend = std::sync::Arc::new(Cpu::new(CpuOptions { threads: None, isa: None })?);
//! let options = LoadOptions { backend, residency: Residency::Lazy };
//! let model = Model::load("model.gguf".as_ref(), options, &mut |_| {})?;
//! let messages = [Message::new("user", "extract a tar.gz archive")];
//! let render = RenderOptions { add_generation_prompt: true, ..Default::default() };
//! let prompt = encode_chat(model.tokenizer()?, model.chat_template()?, &messages, &render)?;
//! let mut session = Session::new(&model, SessionOptions::default())?;
//! let (options, cancel) = (GenerateOptions::default(), Cancel::new());
//! session.generate(&prompt, &options, &cancel, &mut NoObserver, &mut |event| {
//!     if let Event::Text(text) = event { print!("{text}"); }
//! })?;
//! # Ok(())
//! # }
//! ```

pub mod budget;
pub mod error;
pub mod files;
pub mod forward;
pub mod generate;
pub mod gpu;
pub mod model;
pub mod sample;
pub mod session;
pub mod statistics;
pub mod store;
pub mod text;

pub use error::{Error, Result};
pub use forward::cache::KvFormat;
pub use generate::{Event, Finish, GenerateOptions, Generated};
pub use model::description::ModelDescription;
pub use model::{
    GpuExperts, LoadOptions, LoadProgress, Misses, Model, OpenedModel, Residency, Streaming,
};
pub use sample::{Dry, Sampler, SamplerOptions};
pub use session::{Cancel, Run, Session, SessionOptions};
pub use statistics::StreamStats;
