//! `kernels/cuda/router.cu` and `router_chunk.cu` against the CPU's norms,
//! rows and rules: bits, on the stand-in or a GPU.

mod chunk;
#[path = "../lab/mod.rs"]
mod lab;
mod step;
mod support;
