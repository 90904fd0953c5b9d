//! Experts in slots: memory for them, who may write and read it, and what
//! brings them.

pub mod disk;
pub mod frames;
pub mod mover;
pub mod slot;
mod sync;
