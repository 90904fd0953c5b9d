//! Attention kernels against the CPU backend and the operations of the
//! forward pass, in bits.

mod attend;
mod graph;
#[path = "../lab/mod.rs"]
mod lab;
mod prepare;
mod steps;
mod support;
