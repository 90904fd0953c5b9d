//! The layouts in which files keep routed experts.

use super::description::MoeDescription;
use super::tensors::{Name, Tensors};
use super::weights::{GatedBlock, Place, Projection, Weight};
use crate::error::Result;
use crate::files::ElementType;
use pregate_kernels::Format;

/// All experts of a layer, whichever layout the file has.
pub fn load(
    tensors: &Tensors<'_>,
    layer: usize,
    moe: &MoeDescription,
    hidden: usize,
) -> Result<Vec<GatedBlock>> {
    let full = |gguf: &'static str, hf: &'static str| tensors.in_layer(layer, Name { gguf, hf });
    let bank = Bank { tensors, experts: moe.experts, inner: moe.inner, hidden };
    if tensors.is_gguf() {
        if tensors.has(&full("ffn_gate_exps.weight", "")) {
            return bank.stacked(
                &full("ffn_gate_exps.", ""),
                &full("ffn_up_exps.", ""),
                &full("ffn_down_exps.", ""),
            );
        }
        if tensors.has(&full("ffn_gate_up_exps.weight", "")) {
            return bank
                .fused(&full("ffn_gate_up_exps.weight", ""), &full("ffn_down_exps.weight", ""));
        }
        // Mixtral files of 2023: a tensor per expert.
        if tensors.has(&full("ffn_gate.0.weight", "")) {
            return bank.separate(&|expert, part| {
                let name = ["ffn_gate", "ffn_up", "ffn_down"][part];
                format!("{}{name}.{expert}.weight", full("", ""))
            });
        }
        return bank.stacked(
            &full("ffn_gate_exps.", ""),
            &full("ffn_up_exps.", ""),
            &full("ffn_down_exps.", ""),
        );
    }
    if tensors.has(&full("", "mlp.experts.gate_up_proj_blocks")) {
        return bank.mxfp4_pairs(&full("", "mlp.experts."));
    }
    if tensors.has(&full("", "mlp.experts.gate_up_proj_bias")) {
        return bank.transposed(&full("", "mlp.experts."));
    }
    if tensors.has(&full("", "mlp.experts.gate_up_proj")) {
        return bank
            .fused(&full("", "mlp.experts.gate_up_proj"), &full("", "mlp.experts.down_proj"));
    }
    if tensors.has(&full("", "block_sparse_moe.input_linear.weight")) {
        return bank.fused(
            &full("", "block_sparse_moe.input_linear.weight"),
            &full("", "block_sparse_moe.output_linear.weight"),
        );
    }
    let mixtral = tensors.has(&full("", "block_sparse_moe.experts.0.w1.weight"));
    bank.separate(&|expert, part| match mixtral {
        true => {
            let name = ["w1", "w3", "w2"][part];
            format!("{}{expert}.{name}.weight", full("", "block_sparse_moe.experts."))
        }
        false => {
            let name = ["gate_proj", "up_proj", "down_proj"][part];
            format!("{}{expert}.{name}.weight", full("", "mlp.experts."))
        }
    })
}

/// A single block whose gate and up are one tensor `[2 * inner, hidden]`.
pub fn fused_block(
    tensors: &Tensors<'_>,
    gate_up: &str,
    down: &str,
    inner: usize,
    hidden: usize,
) -> Result<GatedBlock> {
    let blocks = Bank { tensors, experts: 1, inner, hidden }.fused(gate_up, down)?;
    Ok(blocks.into_iter().next().expect("a bank of one expert"))
}

struct Bank<'a> {
    tensors: &'a Tensors<'a>,
    experts: usize,
    inner: usize,
    hidden: usize,
}

fn bare(weight: Weight) -> Projection {
    Projection { weight, bias: None }
}

impl Bank<'_> {
    /// Gate, up and down, each one tensor `[experts, rows, cols]`, with
    /// optional biases `[experts, rows]`; the names are stems.
    fn stacked(&self, gate: &str, up: &str, down: &str) -> Result<Vec<GatedBlock>> {
        let part = |stem: &str, rows: usize, cols: usize| -> Result<Vec<Projection>> {
            let (index, tensor) = self.tensors.require(&format!("{stem}weight"))?;
            let format = self.tensors.check(tensor, &[self.experts, rows, cols])?;
            let bias_name = format!("{stem}bias");
            let bias = match self.tensors.has(&bias_name) {
                true => Some(self.tensors.vector(&bias_name, self.experts * rows)?),
                false => None,
            };
            (0..self.experts)
                .map(|expert| {
                    let weight = self.tensors.part(index, format, rows, cols, expert * rows, 1)?;
                    let bias =
                        bias.as_ref().map(|all| all[expert * rows..(expert + 1) * rows].to_vec());
                    Ok(Projection { weight, bias })
                })
                .collect()
        };
        let gates = part(gate, self.inner, self.hidden)?;
        let ups = part(up, self.inner, self.hidden)?;
        let downs = part(down, self.hidden, self.inner)?;
        Ok(gates
            .into_iter()
            .zip(ups)
            .zip(downs)
            .map(|((gate, up), down)| GatedBlock { gate, up, down })
            .collect())
    }

    /// `[experts, 2 * inner, hidden]` with gate rows first, and
    /// `[experts, hidden, inner]`.
    fn fused(&self, gate_up: &str, down: &str) -> Result<Vec<GatedBlock>> {
        let (inner, hidden) = (self.inner, self.hidden);
        let (gate_up, gate_up_tensor) = self.tensors.require(gate_up)?;
        let (down, down_tensor) = self.tensors.require(down)?;
        let in_format = self.tensors.check(gate_up_tensor, &[self.experts, 2 * inner, hidden])?;
        let out_format = self.tensors.check(down_tensor, &[self.experts, hidden, inner])?;
        (0..self.experts)
            .map(|expert| {
                let first = expert * 2 * inner;
                let rows = |first| self.tensors.part(gate_up, in_format, inner, hidden, first, 1);
                let down =
                    self.tensors.part(down, out_format, hidden, inner, expert * hidden, 1)?;
                Ok(GatedBlock {
                    gate: bare(rows(first)?),
                    up: bare(rows(first + inner)?),
                    down: bare(down),
                })
            })
            .collect()
    }

    /// A tensor per expert and part (gate, up, down).
    fn separate(&self, name: &dyn Fn(usize, usize) -> String) -> Result<Vec<GatedBlock>> {
        let matrix = |expert, part, rows, cols| {
            Ok::<_, crate::Error>(bare(self.tensors.matrix(&name(expert, part), rows, cols)?))
        };
        (0..self.experts)
            .map(|expert| {
                Ok(GatedBlock {
                    gate: matrix(expert, 0, self.inner, self.hidden)?,
                    up: matrix(expert, 1, self.inner, self.hidden)?,
                    down: matrix(expert, 2, self.hidden, self.inner)?,
                })
            })
            .collect()
    }

    /// gpt-oss, unquantised: `[experts, hidden, 2 * inner]` with gate and up
    /// in turn, `[experts, inner, hidden]`, and biases.
    fn transposed(&self, stem: &str) -> Result<Vec<GatedBlock>> {
        let (inner, hidden) = (self.inner, self.hidden);
        let (gate_up, gate_up_tensor) = self.tensors.require(&format!("{stem}gate_up_proj"))?;
        let (down, down_tensor) = self.tensors.require(&format!("{stem}down_proj"))?;
        let in_format = self.tensors.check(gate_up_tensor, &[self.experts, hidden, 2 * inner])?;
        let out_format = self.tensors.check(down_tensor, &[self.experts, inner, hidden])?;
        if in_format.block_len() != 1 || out_format.block_len() != 1 {
            return Err(self.tensors.mismatch(gate_up_tensor, "F32, F16 or BF16"));
        }
        let biases = self.interleaved_biases(stem)?;
        Ok(biases
            .into_iter()
            .enumerate()
            .map(|(expert, [gate_bias, up_bias, down_bias])| {
                let element = in_format.block_bytes();
                let start = expert * hidden * 2 * inner * element;
                let columns = |offset: usize, bias| Projection {
                    weight: Weight {
                        tensor: gate_up,
                        format: in_format,
                        rows: inner,
                        cols: hidden,
                        place: Place::Columns {
                            start: start + offset * element,
                            pitch: 2 * inner,
                            step: 2,
                        },
                    },
                    bias: Some(bias),
                };
                let down_start = expert * inner * hidden * out_format.block_bytes();
                let down = Weight {
                    tensor: down,
                    format: out_format,
                    rows: hidden,
                    cols: inner,
                    place: Place::Columns { start: down_start, pitch: hidden, step: 1 },
                };
                GatedBlock {
                    gate: columns(0, gate_bias),
                    up: columns(1, up_bias),
                    down: Projection { weight: down, bias: Some(down_bias) },
                }
            })
            .collect())
    }

    /// gpt-oss, MXFP4: blocks `[experts, rows, groups, 16]` and scales
    /// `[experts, rows, groups]`, gate and up rows in turn, and biases.
    fn mxfp4_pairs(&self, stem: &str) -> Result<Vec<GatedBlock>> {
        let (inner, hidden) = (self.inner, self.hidden);
        let pair = |name: &str, rows: usize, cols: usize| -> Result<(usize, usize)> {
            let (blocks, blocks_tensor) = self.tensors.require(&format!("{stem}{name}_blocks"))?;
            let (scales, scales_tensor) = self.tensors.require(&format!("{stem}{name}_scales"))?;
            let groups = cols / 32;
            for (tensor, shape) in [
                (blocks_tensor, vec![self.experts, rows, groups, 16]),
                (scales_tensor, vec![self.experts, rows, groups]),
            ] {
                if tensor.element != ElementType::U8
                    || tensor.shape != shape
                    || !cols.is_multiple_of(32)
                {
                    return Err(self.tensors.mismatch(tensor, format!("U8 {shape:?}")));
                }
            }
            Ok((blocks, scales))
        };
        let gate_up = pair("gate_up_proj", 2 * inner, hidden)?;
        let down = pair("down_proj", hidden, inner)?;
        let weight = |(blocks, scales), rows, cols: usize, first_row: usize, step| Weight {
            tensor: blocks,
            format: Format::Mxfp4,
            rows,
            cols,
            place: Place::Pairs {
                start: first_row * cols / 32 * 16,
                scales,
                scales_start: first_row * cols / 32,
                step,
            },
        };
        let biases = self.interleaved_biases(stem)?;
        Ok(biases
            .into_iter()
            .enumerate()
            .map(|(expert, [gate_bias, up_bias, down_bias])| GatedBlock {
                gate: Projection {
                    weight: weight(gate_up, inner, hidden, expert * 2 * inner, 2),
                    bias: Some(gate_bias),
                },
                up: Projection {
                    weight: weight(gate_up, inner, hidden, expert * 2 * inner + 1, 2),
                    bias: Some(up_bias),
                },
                down: Projection {
                    weight: weight(down, hidden, inner, expert * hidden, 1),
                    bias: Some(down_bias),
                },
            })
            .collect())
    }

    /// Gate, up and down biases per expert from gpt-oss's two tensors.
    fn interleaved_biases(&self, stem: &str) -> Result<Vec<[Vec<f32>; 3]>> {
        let (inner, hidden) = (self.inner, self.hidden);
        let gate_up =
            self.tensors.vector(&format!("{stem}gate_up_proj_bias"), self.experts * 2 * inner)?;
        let down = self.tensors.vector(&format!("{stem}down_proj_bias"), self.experts * hidden)?;
        let every_other =
            |slice: &[f32], first| slice.iter().skip(first).step_by(2).copied().collect();
        Ok((0..self.experts)
            .map(|expert| {
                let both = &gate_up[expert * 2 * inner..(expert + 1) * 2 * inner];
                let down = down[expert * hidden..(expert + 1) * hidden].to_vec();
                [every_other(both, 0), every_other(both, 1), down]
            })
            .collect())
    }
}
