//! Everything that computes: tensor formats, the [`Backend`] trait, the f32
//! [`reference`] oracle, the numerical [`contract`], the [`routing`] rules, and
//! the CPU and CUDA kernels that reproduce both bit for bit.
//!
//! This crate knows no model names, opens no files (but for the developer's
//! option to compile CUDA kernels at run time) and has no policy.

pub mod backend;
pub mod block;
pub mod contract;
pub mod cpu;
pub mod cuda;
pub mod dequant;
pub mod format;
pub mod matrix;
pub mod ops;
pub mod reference;
pub mod routing;
#[doc(hidden)]
pub mod testing;

pub use backend::{
    AttentionCall, Backend, Choice, ExpertGroup, ExpertRows, ExpertWeights, GatedActivation,
    Grouping, KvCells, KvView, Linear, Routes,
};
pub use cpu::{Cpu, CpuOptions, Isa};
pub use dequant::dequantize_row;
pub use format::{ActivationKind, Format};
pub use matrix::{Matrix, ShapeError};
pub use reference::Reference;
pub use routing::RoutingRule;
