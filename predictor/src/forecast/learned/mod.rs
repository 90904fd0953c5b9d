//! Forecasts that were trained from traces (`pregate train-predictor`), and
//! the file that holds them.

mod at_work;
mod file;
pub mod input;
pub mod matrix;
mod neighbours;
pub mod network;
pub mod path;
mod running;
mod simd;
mod sizes;
mod tables;
mod whole;

pub use file::{Binding, FileError, LIMIT_BYTES, Trained, VERSION};
pub use path::LearnedPath;
pub use running::LearnedNetwork;
pub use sizes::{Dimensions, PLACES};
pub use tables::LearnedTables;
