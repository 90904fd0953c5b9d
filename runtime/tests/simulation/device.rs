//! A device that computes as another one does, and holds every expert against
//! the file before it is used. This stands for the checksum that a slot
//! carries in simulations: it sees a wrong bit, a wrong expert, a frame that
//! is not `Ready`, and bytes that came too early or too late.

use super::machine::Machine;
use pregate_kernels::{
    AttentionCall, Backend, ExpertRows, ExpertWeights, GatedActivation, Grouping, Linear, Matrix,
    Routes,
};
use std::sync::Arc;

pub struct Checked {
    pub inner: Arc<dyn Backend>,
    pub machine: Machine,
}

fn address(matrix: Matrix<'_>) -> usize {
    let (bytes, _) = matrix.canonical_rows().expect("GGUF files hold rows");
    bytes.as_ptr().addr()
}

impl Backend for Checked {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn linear(&self, x: &[f32], tokens: usize, jobs: &mut [Linear<'_>]) {
        self.inner.linear(x, tokens, jobs);
    }

    fn linear_transposed(&self, x: &[f32], tokens: usize, weight: Matrix<'_>, out: &mut [f32]) {
        self.inner.linear_transposed(x, tokens, weight, out);
    }

    fn expert_rows(&self, call: ExpertRows<'_>) {
        let mut machine = self.machine.lock();
        machine.work(0);
        let work_ns = call.groups.len() as u64 * machine.compute.expert_ns;
        for group in call.groups {
            let ExpertWeights { gate, up, down, .. } = group.weights;
            let addresses = [gate, up, down].map(address);
            machine.check_use(&addresses, group.tokens, group.first_row);
        }
        drop(machine);
        self.inner.expert_rows(call);
        self.machine.lock().work(work_ns);
    }

    fn combine(&self, routes: &Routes, grouping: &Grouping, answers: &[f32], out: &mut [f32]) {
        self.inner.combine(routes, grouping, answers, out);
    }

    fn feed_forward(
        &self,
        x: &[f32],
        tokens: usize,
        weights: ExpertWeights<'_>,
        activation: GatedActivation,
        out: &mut [f32],
    ) {
        self.inner.feed_forward(x, tokens, weights, activation, out);
    }

    fn attention(&self, call: AttentionCall<'_>) {
        self.inner.attention(call);
        let mut machine = self.machine.lock();
        let ns = machine.compute.attention_ns;
        if ns > 0 {
            machine.work(ns);
        }
    }

    fn for_each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        self.inner.for_each(count, task);
    }
}
