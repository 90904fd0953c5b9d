//! The engine and the embedded library.

pub mod error;
pub mod files;

pub use error::{Error, Result};
