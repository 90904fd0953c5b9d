//! The CPU backend: the operations of [`Backend`] cut into units for a
//! [`pool`] of pinned threads, over the arithmetic of an instruction set
//! ([`kernels`]) that is picked at run time.
//!
//! Results do not depend on the instruction set, the number of threads or
//! the number of tokens in a call; see [`crate::contract`].

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod experts;
pub(crate) mod kernels;
mod linear;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod pool;
pub(crate) mod scalar;
mod shares;
#[cfg(test)]
mod tests;

pub use kernels::Isa;

use crate::backend::{
    AttentionCall, Backend, ExpertRows, ExpertWeights, GatedActivation, Grouping, Linear, Routes,
};
use crate::matrix::Matrix;
use kernels::{Kernels, Scratch};
use pool::{Pool, lock};
use std::sync::Mutex;

/// How a [`Cpu`] is set up.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Worker threads, the caller included; `None`: one per core.
    pub threads: Option<usize>,
    /// `None`: the fastest that this machine has.
    pub isa: Option<Isa>,
}

/// The CPU as a device.
pub struct Cpu {
    kernels: &'static dyn Kernels,
    pool: Pool,
    /// Buffers between the regions of one operation. Held during an
    /// operation, so operations of several threads take turns.
    workspace: Mutex<Workspace>,
    /// One per worker.
    scratch: Vec<Mutex<Scratch>>,
}

#[derive(Default)]
struct Workspace {
    linear: linear::Buffers,
    experts: experts::Buffers,
    attention: attention::Buffers,
}

impl Cpu {
    /// Starts the threads.
    ///
    /// # Errors
    /// The operating system refused a thread.
    ///
    /// # Panics
    /// When `options.isa` is not in [`Isa::available`].
    pub fn new(options: CpuOptions) -> std::io::Result<Self> {
        let threads = options.threads.unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
        });
        let pool = Pool::new(threads)?;
        Ok(Self {
            kernels: options.isa.unwrap_or_else(Isa::detect).kernels(),
            scratch: (0..pool.threads()).map(|_| Mutex::default()).collect(),
            pool,
            workspace: Mutex::default(),
        })
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    pub fn isa(&self) -> Isa {
        self.kernels.isa()
    }

    /// See [`Pool::pinned`].
    ///
    /// # Errors
    /// The operating system refused a thread.
    pub fn pinned<T: Send>(&self, work: impl FnOnce() -> T + Send) -> std::io::Result<T> {
        self.pool.pinned(work)
    }
}

impl Backend for Cpu {
    fn describe(&self) -> String {
        let threads = self.threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("CPU, {threads} thread{plural}, {}", self.isa().name())
    }

    fn linear(&self, x: &[f32], tokens: usize, jobs: &mut [Linear<'_>]) {
        self.linear_on(&mut lock(&self.workspace).linear, x, tokens, jobs);
    }

    fn linear_transposed(&self, x: &[f32], tokens: usize, weight: Matrix<'_>, out: &mut [f32]) {
        let _turn = lock(&self.workspace);
        self.transposed(x, tokens, weight, out);
    }

    fn expert_rows(&self, call: ExpertRows<'_>) {
        self.rows_of_experts(&mut lock(&self.workspace).experts, call);
    }

    fn combine(&self, routes: &Routes, grouping: &Grouping, answers: &[f32], out: &mut [f32]) {
        let _turn = lock(&self.workspace);
        self.combine_rows(routes, grouping, answers, out);
    }

    fn feed_forward(
        &self,
        x: &[f32],
        tokens: usize,
        weights: ExpertWeights<'_>,
        activation: GatedActivation,
        out: &mut [f32],
    ) {
        let mut workspace = lock(&self.workspace);
        self.dense(&mut workspace.experts, x, tokens, weights, activation, out);
    }

    fn attention(&self, call: AttentionCall<'_>) {
        self.attend(&mut lock(&self.workspace).attention, call);
    }

    fn rouse(&self) {
        self.pool.rouse();
    }

    fn for_each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.run(count, &|_, unit| task(unit));
    }
}
