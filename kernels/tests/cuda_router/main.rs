//! `kernels/cuda/router.cu` and `router_chunk.cu` against the CPU's norms,
//! rows and rules: bits, on the stand-in or a GPU.

mod chunk;
mod step;
mod support;
