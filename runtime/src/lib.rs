//! The engine and the embedded library.

pub mod error;
pub mod files;
pub mod forward;
pub mod generate;
pub mod model;
pub mod sample;
pub mod session;
pub mod text;

pub use error::{Error, Result};
pub use forward::cache::KvFormat;
pub use generate::{Event, Finish, GenerateOptions, Generated};
pub use model::description::ModelDescription;
pub use model::{LoadOptions, LoadProgress, Model, Residency};
pub use sample::{Dry, Sampler, SamplerOptions};
pub use session::{Cancel, Run, Session, SessionOptions};
