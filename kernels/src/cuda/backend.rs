//! [`Backend`] on a GPU, complete and plain: each operation uploads what it
//! needs, computes on the device and downloads its result. Whole models run
//! through it with the bits of the CPU; speed is the business of a runtime
//! that keeps weights and states on the device.

use super::attention::{Attend, attend};
use super::cells::{CellFormat, DeviceCells};
use super::dense::{self, Gemv, Strides};
use super::device::Device;
use super::error::CudaError;
use super::experts::{self, Choices, Combine, Down, ExpertMatrix, GateUp};
use super::memory::Span;
use super::position::At;
use super::rows::{Input, MOST_TOKENS};
use super::workspace::{Prepared, Workspace, canonical};
use crate::backend::{
    AttentionCall, Backend, ExpertGroup, ExpertRows, ExpertWeights, GatedActivation, Grouping,
    KvCells, KvView, Linear, Routes,
};
use crate::cpu::Cpu;
use crate::matrix::Matrix;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Rows of experts of one launch.
const MOST_ROWS: usize = 4096;
/// Where matrices start in an expert's block.
const ALIGN: usize = 16;

/// A GPU as a device of the forward pass.
///
/// [`Backend`] has no errors: after one, results are NaN and
/// [`Cuda::failure`] tells it. Shapes that no kernel takes are computed by the
/// host, whose bits are the same; [`Cuda::on_host`] counts them.
pub struct Cuda {
    device: Device,
    host: Cpu,
    workspace: Mutex<Workspace>,
    failure: Mutex<Option<CudaError>>,
    on_host: AtomicU64,
}

impl Cuda {
    /// `host` runs [`Backend::for_each`], and what no kernel takes.
    pub fn new(device: Device, host: Cpu) -> Self {
        let workspace = Mutex::new(Workspace::new(&device));
        Self { device, host, workspace, failure: Mutex::new(None), on_host: AtomicU64::new(0) }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The first error; results since are NaN.
    pub fn failure(&self) -> Option<CudaError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Operations that the host computed because no kernel takes their shape.
    pub fn on_host(&self) -> u64 {
        self.on_host.load(Ordering::Relaxed)
    }

    /// Runs an operation on the device.
    fn run(&self, operation: impl FnOnce(&mut Workspace) -> Result<(), CudaError>) -> Outcome {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_some() {
            return Outcome::Failed;
        }
        match workspace.clear().and_then(|()| operation(&mut workspace)) {
            Ok(()) => Outcome::Done,
            Err(CudaError::Unsupported { .. }) => {
                self.on_host.fetch_add(1, Ordering::Relaxed);
                Outcome::ForHost
            }
            Err(error) => {
                *failure = Some(error);
                Outcome::Failed
            }
        }
    }

    /// One job; `tiles` has the input of every eight tokens.
    fn product(
        &self,
        workspace: &mut Workspace,
        tiles: &[Prepared],
        job: &mut Linear<'_>,
    ) -> Result<(), CudaError> {
        let weight = workspace.matrix(&job.weight)?;
        let bias = job.bias.map(|bias| workspace.upload_floats(bias)).transpose()?;
        for (input, out) in tiles.iter().zip(job.out.chunks_mut(MOST_TOKENS * weight.rows)) {
            let tokens = out.len() / weight.rows;
            let span = workspace.floats(&[tokens, weight.rows])?;
            let call = Gemv::one(&weight, tokens, input.as_input(), bias.as_ref(), &span);
            dense::gemv(&self.device, self.device.compute(), call)?;
            workspace.download(&span, out)?;
        }
        Ok(())
    }

    /// Experts on rows of their own: row `n` of `x` `[rows, hidden]` goes
    /// through the expert `ids[n]` of `weights`; `[rows, hidden]` comes back.
    fn experts(
        &self,
        workspace: &mut Workspace,
        weights: &[ExpertWeights<'_>],
        activation: GatedActivation,
        x: &[f32],
        ids: &[i32],
        answers: &mut [f32],
    ) -> Result<(), CudaError> {
        let stream = self.device.compute();
        let resident = Resident::upload(workspace, weights)?;
        let (hidden, inner) = (weights[0].down.rows(), weights[0].down.cols());
        let pieces = ids.chunks(MOST_ROWS).zip(x.chunks(MOST_ROWS * hidden));
        for ((ids, x), answers) in pieces.zip(answers.chunks_mut(MOST_ROWS * hidden)) {
            let rows = ids.len();
            let ids = workspace.upload_words(ids)?;
            let x = workspace.upload_floats(x)?;
            let input = workspace.input(&x, rows, hidden, resident.gate.format)?;
            let vectors = workspace.floats(&[rows, inner])?;
            let out = workspace.floats(&[rows, hidden])?;
            let choices = Choices {
                table: &resident.table,
                experts: weights.len(),
                block_bytes: resident.block_bytes,
                tokens: rows,
                k: 1,
                ids: Some(&ids),
                chosen: None,
            };
            let gate_up = GateUp {
                choices,
                gate: resident.gate,
                up: resident.up,
                gate_bias: resident.gate_bias.as_ref(),
                up_bias: resident.up_bias.as_ref(),
                activation,
                x: input.as_input(),
                hidden,
                inner,
                out: &vectors,
            };
            experts::gate_up(&self.device, stream, gate_up)?;
            let (down, bias) = (resident.down, resident.down_bias.as_ref());
            let (vectors, out) = (&vectors, &out);
            let down = Down { choices, down, bias, hidden, inner, vectors, answers: out };
            experts::down(&self.device, stream, down)?;
            workspace.download(out, answers)?;
        }
        Ok(())
    }

    fn attend(
        &self,
        workspace: &mut Workspace,
        call: &mut AttentionCall<'_>,
    ) -> Result<(), CudaError> {
        let AttentionCall { tokens, heads, kv_heads, .. } = *call;
        let (key_width, value_width) = (call.keys.width, call.values.width);
        let keys = upload_cells(workspace, &call.keys)?;
        let values = upload_cells(workspace, &call.values)?;
        let sinks = call.sinks.map(|sinks| workspace.upload_floats(sinks)).transpose()?;
        let few = tokens.min(MOST_TOKENS);
        let positions = call.first_position + tokens;
        let scratch = workspace.room(Attend::scratch_bytes(few, heads, value_width, positions))?;
        let counters = workspace.room(4 * few * heads)?;
        self.device.compute().fill(&counters, 0)?;
        for first in (0..tokens).step_by(MOST_TOKENS) {
            let tokens = (tokens - first).min(MOST_TOKENS);
            let q_row = heads * key_width;
            let q = workspace.upload_floats(&call.q[first * q_row..(first + tokens) * q_row])?;
            let out = workspace.floats(&[tokens, heads, value_width])?;
            let attend_call = Attend {
                q: &q,
                tokens,
                heads,
                kv_heads,
                keys: &keys,
                values: &values,
                at: At::Host(call.first_position + first),
                scale: call.scale,
                window: call.window,
                sinks: sinks.as_ref(),
                gate: None,
                out: &out,
                scratch: &scratch,
                counters: &counters,
                plan: None,
            };
            attend(&self.device, self.device.compute(), attend_call)?;
            let row = heads * value_width;
            workspace.download(&out, &mut call.out[first * row..(first + tokens) * row])?;
        }
        Ok(())
    }
}

enum Outcome {
    Done,
    ForHost,
    /// Now or before.
    Failed,
}

/// Experts of one shape on the device, and where their matrices are.
struct Resident {
    table: Span,
    block_bytes: usize,
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
    gate_bias: Option<Span>,
    up_bias: Option<Span>,
    down_bias: Option<Span>,
    /// What the table points at.
    _blocks: Vec<Span>,
}

impl Resident {
    fn upload(workspace: &mut Workspace, weights: &[ExpertWeights<'_>]) -> Result<Self, CudaError> {
        let first = &weights[0];
        let formats = |w: &ExpertWeights<'_>| [w.gate, w.up, w.down].map(|m| m.format());
        if weights.iter().any(|other| formats(other) != formats(first)) {
            return Err(CudaError::unsupported("experts of different formats in one call"));
        }
        let mut offset = 0;
        let mut place = |matrix: &Matrix<'_>| {
            let placed = ExpertMatrix { format: matrix.format(), offset };
            offset = (offset + matrix.weight_bytes()).next_multiple_of(ALIGN);
            placed
        };
        let (gate, up, down) = (place(&first.gate), place(&first.up), place(&first.down));
        let block_bytes = offset;
        let mut blocks = Vec::with_capacity(weights.len());
        let mut table = Vec::with_capacity(8 * weights.len());
        for expert in weights {
            let mut block = vec![0; block_bytes];
            for (matrix, at) in
                [(&expert.gate, gate.offset), (&expert.up, up.offset), (&expert.down, down.offset)]
            {
                let bytes = canonical(matrix);
                block[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            let block = workspace.bytes(&block)?;
            table.extend_from_slice(&block.address().to_ne_bytes());
            blocks.push(block);
        }
        Ok(Self {
            table: workspace.bytes(&table)?,
            block_bytes,
            gate,
            up,
            down,
            gate_bias: biases(workspace, weights, |w| w.gate_bias)?,
            up_bias: biases(workspace, weights, |w| w.up_bias)?,
            down_bias: biases(workspace, weights, |w| w.down_bias)?,
            _blocks: blocks,
        })
    }
}

/// `[experts, rows]`, where experts have them.
fn biases<'a>(
    workspace: &mut Workspace,
    weights: &[ExpertWeights<'a>],
    of: impl Fn(&ExpertWeights<'a>) -> Option<&'a [f32]>,
) -> Result<Option<Span>, CudaError> {
    let given: Vec<&[f32]> = weights.iter().filter_map(of).collect();
    match given.len() {
        0 => Ok(None),
        n if n == weights.len() => workspace.upload_floats(&given.concat()).map(Some),
        _ => Err(CudaError::unsupported("experts with and without biases in one call")),
    }
}

fn upload_cells(workspace: &mut Workspace, view: &KvView<'_>) -> Result<DeviceCells, CudaError> {
    let (format, span) = match view.cells {
        KvCells::F16(cells) => (CellFormat::F16, workspace.upload_halves(cells)?),
        KvCells::F32(cells) => (CellFormat::F32, workspace.upload_floats(cells)?),
    };
    let KvView { head_stride, position_stride, width, .. } = *view;
    Ok(DeviceCells { format, span, head_stride, position_stride, width })
}

impl Backend for Cuda {
    fn describe(&self) -> String {
        self.device.info().describe()
    }

    fn linear(&self, x: &[f32], tokens: usize, jobs: &mut [Linear<'_>]) {
        if tokens == 0 || jobs.is_empty() {
            return;
        }
        let cols = jobs[0].weight.cols();
        assert_eq!(x.len(), tokens * cols, "input [tokens, cols]");
        for job in jobs.iter() {
            assert_eq!(job.weight.cols(), cols, "jobs of one input");
            assert_eq!(job.out.len(), tokens * job.weight.rows(), "output [tokens, rows]");
            assert!(job.bias.is_none_or(|b| b.len() == job.weight.rows()), "bias [rows]");
        }
        let outcome = self.run(|workspace| {
            let mut inputs: Vec<(_, Vec<Prepared>)> = Vec::new();
            for job in jobs.iter_mut() {
                let format = job.weight.format();
                let kind = format.activation();
                if !inputs.iter().any(|(of, _)| *of == kind) {
                    let tiles = x.chunks(MOST_TOKENS * cols).map(|tile| {
                        let span = workspace.upload_floats(tile)?;
                        workspace.input(&span, tile.len() / cols, cols, format)
                    });
                    inputs.push((kind, tiles.collect::<Result<_, CudaError>>()?));
                }
                for (_, tiles) in inputs.iter().filter(|(of, _)| *of == kind) {
                    self.product(workspace, tiles, job)?;
                }
            }
            Ok(())
        });
        match outcome {
            Outcome::Done => {}
            Outcome::ForHost => self.host.linear(x, tokens, jobs),
            Outcome::Failed => jobs.iter_mut().for_each(|job| job.out.fill(f32::NAN)),
        }
    }

    fn linear_transposed(&self, x: &[f32], tokens: usize, weight: Matrix<'_>, out: &mut [f32]) {
        let (rows, cols) = (weight.rows(), weight.cols());
        assert_eq!(x.len(), tokens * rows, "input [tokens, rows]");
        assert_eq!(out.len(), tokens * cols, "output [tokens, cols]");
        if tokens == 0 {
            return;
        }
        let outcome = self.run(|workspace| {
            let matrix = workspace.matrix(&weight)?;
            let tiles = x.chunks(MOST_TOKENS * rows).zip(out.chunks_mut(MOST_TOKENS * cols));
            for (x, out) in tiles {
                let tokens = x.len() / rows;
                let x = workspace.upload_floats(x)?;
                let y = workspace.floats(&[tokens, cols])?;
                let call = Gemv {
                    x_strides: Strides { token: rows, matrix: 0 },
                    out_strides: Strides { token: cols, matrix: 0 },
                    ..Gemv::one(&matrix, tokens, Input::Floats(&x), None, &y)
                };
                dense::transposed(&self.device, self.device.compute(), call)?;
                workspace.download(&y, out)?;
            }
            Ok(())
        });
        match outcome {
            Outcome::Done => {}
            Outcome::ForHost => self.host.linear_transposed(x, tokens, weight, out),
            Outcome::Failed => out.fill(f32::NAN),
        }
    }

    fn expert_rows(&self, call: ExpertRows<'_>) {
        let ExpertRows { x, tokens, groups, activation, answers } = call;
        let Some(first) = groups.first() else { return };
        let hidden = first.weights.down.rows();
        assert_eq!(x.len(), tokens * hidden, "input [tokens, hidden]");
        // A row of the device's answers per token of each group.
        let mut ids = Vec::new();
        let mut rows_of_x = Vec::new();
        for (id, group) in groups.iter().enumerate() {
            for token in group.tokens {
                ids.push(id as i32);
                let at = *token as usize * hidden;
                rows_of_x.extend_from_slice(&x[at..at + hidden]);
            }
        }
        let mut found = vec![f32::NAN; rows_of_x.len()];
        let weights: Vec<ExpertWeights<'_>> = groups.iter().map(|group| group.weights).collect();
        let outcome = self.run(|workspace| {
            self.experts(workspace, &weights, activation, &rows_of_x, &ids, &mut found)
        });
        if let Outcome::ForHost = outcome {
            return self.host.expert_rows(ExpertRows { x, tokens, groups, activation, answers });
        }
        let mut found = found.as_slice();
        for ExpertGroup { tokens, first_row, .. } in groups {
            let (rows, rest) = found.split_at(tokens.len() * hidden);
            answers[first_row * hidden..][..rows.len()].copy_from_slice(rows);
            found = rest;
        }
    }

    fn combine(&self, routes: &Routes, grouping: &Grouping, answers: &[f32], out: &mut [f32]) {
        let tokens = routes.tokens();
        if tokens == 0 {
            return;
        }
        let hidden = out.len() / tokens;
        assert_eq!(out.len(), tokens * hidden, "output [tokens, hidden]");
        // Lists are of any length; a launch takes tokens with as many choices.
        let mut first = 0;
        while first < tokens {
            let k = routes.of(first).len();
            let same = (first..tokens).take_while(|token| routes.of(*token).len() == k).count();
            let part = &mut out[first * hidden..(first + same) * hidden];
            if k == 0 {
                part.fill(0.0);
            } else {
                let start = routes.start(first);
                let choices = &routes.all()[start..start + same * k];
                let rows = (start..start + choices.len()).map(|choice| grouping.row_of(choice));
                let rows: Vec<f32> = rows
                    .flat_map(|row| &answers[row * hidden..(row + 1) * hidden])
                    .copied()
                    .collect();
                let weights: Vec<f32> = choices.iter().map(|choice| choice.weight).collect();
                let outcome = self.run(|workspace| {
                    let span = workspace.floats(&[same, hidden])?;
                    let call = Combine {
                        tokens: same,
                        k,
                        hidden,
                        answers: &workspace.upload_floats(&rows)?,
                        weights: &workspace.upload_floats(&weights)?,
                        shared: None,
                        residual: None,
                        out: Some(&span),
                        host: None,
                    };
                    experts::combine(&self.device, self.device.compute(), call)?;
                    workspace.download(&span, part)
                });
                match outcome {
                    Outcome::Done => {}
                    Outcome::ForHost => return self.host.combine(routes, grouping, answers, out),
                    Outcome::Failed => return out.fill(f32::NAN),
                }
            }
            first += same;
        }
    }

    fn feed_forward(
        &self,
        x: &[f32],
        tokens: usize,
        weights: ExpertWeights<'_>,
        activation: GatedActivation,
        out: &mut [f32],
    ) {
        if tokens == 0 {
            return;
        }
        let hidden = weights.down.rows();
        assert_eq!(x.len(), tokens * hidden, "input [tokens, hidden]");
        assert_eq!(out.len(), tokens * hidden, "output [tokens, hidden]");
        let ids = vec![0; tokens];
        let outcome =
            self.run(|workspace| self.experts(workspace, &[weights], activation, x, &ids, out));
        match outcome {
            Outcome::Done => {}
            Outcome::ForHost => self.host.feed_forward(x, tokens, weights, activation, out),
            Outcome::Failed => out.fill(f32::NAN),
        }
    }

    fn attention(&self, mut call: AttentionCall<'_>) {
        match self.run(|workspace| self.attend(workspace, &mut call)) {
            Outcome::Done => {}
            Outcome::ForHost => self.host.attention(call),
            Outcome::Failed => call.out.fill(f32::NAN),
        }
    }

    fn for_each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        self.host.for_each(count, task);
    }
}
