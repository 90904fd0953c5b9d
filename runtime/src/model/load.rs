//! Binds a description to the tensors of its files.

use super::description::*;
use super::experts;
use super::router::router_for;
use super::tensors::{Name, Tensors};
use super::weights::*;
use crate::error::Result;
use crate::files::ModelFiles;

/// Finds and checks every tensor that `description` needs, and refuses files
/// with tensors that it does not explain. `progress` is told the layers done.
pub fn load_weights(
    files: &ModelFiles,
    description: &ModelDescription,
    progress: &mut dyn FnMut(usize),
) -> Result<ModelWeights> {
    let tensors = Tensors::new(files);
    let loader = Loader { tensors: &tensors, description };
    let mut layers = Vec::with_capacity(description.layers.len());
    for index in 0..description.layers.len() {
        layers.push(loader.layer(index)?);
        progress(index + 1);
    }
    let (vocab, hidden) = (description.vocab, description.hidden);
    let embedding_name =
        tensors.global(Name { gguf: "token_embd.weight", hf: "embed_tokens.weight" });
    let head_name = tensors.global(Name { gguf: "output.weight", hf: "lm_head.weight" });
    let head_bias = tensors.global(Name { gguf: "output.bias", hf: "lm_head.bias" });
    // Without a head of its own the model uses its embedding for both.
    let head = if tensors.has(&head_name) { &head_name } else { &embedding_name };
    let weights = ModelWeights {
        embedding: tensors.matrix(&embedding_name, vocab, hidden)?,
        head: tensors.projection(head, Some(&head_bias), vocab, hidden)?,
        final_norm: loader.norm_named(
            &tensors.global(Name { gguf: "output_norm.weight", hf: "norm.weight" }),
            hidden,
        )?,
        layers,
    };
    let own = description.layers.len();
    tensors.check_all_used(own..own + description.extra_layers)?;
    Ok(weights)
}

struct Loader<'a> {
    tensors: &'a Tensors<'a>,
    description: &'a ModelDescription,
}

impl Loader<'_> {
    fn layer(&self, index: usize) -> Result<LayerWeights> {
        let description = &self.description.layers[index];
        let hidden = self.description.hidden;
        let mixer_norm =
            self.norm(index, Name { gguf: "attn_norm.weight", hf: "input_layernorm.weight" })?;
        // GGUF converters use one of two names for the second norm.
        let own = Name { gguf: "ffn_norm.weight", hf: "post_attention_layernorm.weight" };
        let other = Name { gguf: "post_attention_norm.weight", ..own };
        let second = if self.has(index, own) { own } else { other };
        Ok(LayerWeights {
            mixer_norm,
            mixer: match &description.mixer {
                Mixer::Attention(attention) => {
                    MixerWeights::Attention(Box::new(self.attention(index, attention)?))
                }
                Mixer::Latent(latent) => {
                    MixerWeights::Latent(Box::new(self.latent(index, latent)?))
                }
                Mixer::DeltaNet(delta) => {
                    MixerWeights::DeltaNet(Box::new(self.delta_net(index, delta)?))
                }
            },
            feed_forward_norm: self.norm(index, second)?,
            feed_forward: match &description.feed_forward {
                FeedForward::Dense { inner } => {
                    FeedForwardWeights::Dense(Box::new(self.gated(index, DENSE, *inner, hidden)?))
                }
                FeedForward::Moe(moe) => FeedForwardWeights::Moe(Box::new(self.moe(index, moe)?)),
            },
        })
    }

    fn name(&self, layer: usize, name: Name) -> String {
        self.tensors.in_layer(layer, name)
    }

    fn has(&self, layer: usize, name: Name) -> bool {
        self.tensors.has(&self.name(layer, name))
    }

    fn norm(&self, layer: usize, name: Name) -> Result<Norm> {
        self.norm_named(&self.name(layer, name), self.description.hidden)
    }

    fn norm_named(&self, name: &str, width: usize) -> Result<Norm> {
        let mut norm = self.tensors.norm(name, width)?;
        self.unfold_offset(&mut norm.weight);
        Ok(norm)
    }

    /// Qwen3.5 folders store `weight - 1`; GGUF files the weight itself.
    fn unfold_offset(&self, weight: &mut [f32]) {
        if self.description.architecture == Architecture::Qwen35Moe && !self.tensors.is_gguf() {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
    }

    /// `stem` is the name without `weight`.
    fn projection(&self, layer: usize, stem: Name, rows: usize, cols: usize) -> Result<Projection> {
        let stem = self.name(layer, stem);
        let (weight, bias) = (format!("{stem}weight"), format!("{stem}bias"));
        self.tensors.projection(&weight, Some(&bias), rows, cols)
    }

    fn vector(&self, layer: usize, name: Name, len: usize) -> Result<Vec<f32>> {
        self.tensors.vector(&self.name(layer, name), len)
    }

    fn attention(&self, layer: usize, a: &AttentionDescription) -> Result<AttentionWeights> {
        let hidden = self.description.hidden;
        let (q_rows, kv_rows) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let gated_rows = if a.output_gate { 2 * q_rows } else { q_rows };
        let (q_width, k_width) = match a.qk_norm {
            QkNorm::Whole => (q_rows, kv_rows),
            QkNorm::PerHead | QkNorm::None => (a.head_dim, a.head_dim),
        };
        let qk_norm = |gguf, hf, width| match a.qk_norm {
            QkNorm::None => Ok::<_, crate::Error>(None),
            QkNorm::Whole | QkNorm::PerHead => {
                let mut weight = self.vector(layer, Name { gguf, hf }, width)?;
                self.unfold_offset(&mut weight);
                Ok(Some(weight))
            }
        };
        Ok(AttentionWeights {
            q: self.projection(
                layer,
                Name { gguf: "attn_q.", hf: "self_attn.q_proj." },
                gated_rows,
                hidden,
            )?,
            k: self.projection(
                layer,
                Name { gguf: "attn_k.", hf: "self_attn.k_proj." },
                kv_rows,
                hidden,
            )?,
            v: self.projection(
                layer,
                Name { gguf: "attn_v.", hf: "self_attn.v_proj." },
                kv_rows,
                hidden,
            )?,
            output: self.projection(layer, OUTPUT, hidden, q_rows)?,
            q_norm: qk_norm("attn_q_norm.weight", "self_attn.q_norm.weight", q_width)?,
            k_norm: qk_norm("attn_k_norm.weight", "self_attn.k_norm.weight", k_width)?,
            sinks: match a.sinks {
                true => Some(self.vector(
                    layer,
                    Name { gguf: "attn_sinks.weight", hf: "self_attn.sinks" },
                    a.heads,
                )?),
                false => None,
            },
        })
    }

    fn latent(&self, layer: usize, l: &LatentDescription) -> Result<LatentWeights> {
        let hidden = self.description.hidden;
        let q_rows = l.heads * (l.nope_dim + l.rope_dim);
        let query = match l.q_rank {
            None => LatentQuery::Full(self.projection(
                layer,
                Name { gguf: "attn_q.", hf: "self_attn.q_proj." },
                q_rows,
                hidden,
            )?),
            Some(rank) => LatentQuery::LowRank {
                down: self.projection(
                    layer,
                    Name { gguf: "attn_q_a.", hf: "self_attn.q_a_proj." },
                    rank,
                    hidden,
                )?,
                norm: self.vector(
                    layer,
                    Name { gguf: "attn_q_a_norm.weight", hf: "self_attn.q_a_layernorm.weight" },
                    rank,
                )?,
                up: self.projection(
                    layer,
                    Name { gguf: "attn_q_b.", hf: "self_attn.q_b_proj." },
                    q_rows,
                    rank,
                )?,
            },
        };
        let (key_up, value_up) = self.latent_up(layer, l)?;
        Ok(LatentWeights {
            query,
            kv_down: self.projection(
                layer,
                Name { gguf: "attn_kv_a_mqa.", hf: "self_attn.kv_a_proj_with_mqa." },
                l.kv_rank + l.rope_dim,
                hidden,
            )?,
            kv_norm: self.vector(
                layer,
                Name { gguf: "attn_kv_a_norm.weight", hf: "self_attn.kv_a_layernorm.weight" },
                l.kv_rank,
            )?,
            key_up,
            value_up,
            output: self.projection(layer, OUTPUT, hidden, l.heads * l.value_dim)?,
        })
    }

    /// The up projections per head: packed `[heads * (nope + value), rank]`,
    /// or GGUF's split tensors, whose keys are transposed.
    fn latent_up(&self, layer: usize, l: &LatentDescription) -> Result<(Vec<KeyUp>, Vec<Weight>)> {
        let tensors = self.tensors;
        let packed =
            self.name(layer, Name { gguf: "attn_kv_b.weight", hf: "self_attn.kv_b_proj.weight" });
        if tensors.has(&packed) {
            let (index, tensor) = tensors.require(&packed)?;
            let per_head = l.nope_dim + l.value_dim;
            let format = tensors.check(tensor, &[l.heads * per_head, l.kv_rank])?;
            let part = |rows, first| tensors.part(index, format, rows, l.kv_rank, first, 1);
            let keys = (0..l.heads).map(|head| Ok(KeyUp::Rows(part(l.nope_dim, head * per_head)?)));
            let values = (0..l.heads).map(|head| part(l.value_dim, head * per_head + l.nope_dim));
            return Ok((keys.collect::<Result<_>>()?, values.collect::<Result<_>>()?));
        }
        let split = |name, rows, cols| -> Result<Vec<Weight>> {
            let (index, tensor) =
                tensors.require(&self.name(layer, Name { gguf: name, hf: "" }))?;
            let format = tensors.check(tensor, &[l.heads, rows, cols])?;
            (0..l.heads)
                .map(|head| tensors.part(index, format, rows, cols, head * rows, 1))
                .collect()
        };
        let keys = split("attn_k_b.weight", l.kv_rank, l.nope_dim)?;
        let values = split("attn_v_b.weight", l.value_dim, l.kv_rank)?;
        Ok((keys.into_iter().map(KeyUp::Transposed).collect(), values))
    }

    fn delta_net(&self, layer: usize, d: &DeltaNetDescription) -> Result<DeltaNetWeights> {
        let hidden = self.description.hidden;
        let values = d.value_heads * d.value_dim;
        let channels = 2 * d.key_heads * d.key_dim + values;
        let projection = |gguf, hf, rows| self.projection(layer, Name { gguf, hf }, rows, hidden);
        let vector = |gguf, hf, len| self.vector(layer, Name { gguf, hf }, len);
        let decay = match self.tensors.is_gguf() {
            true => vector("ssm_a", "", d.value_heads)?,
            false => {
                let mut log = vector("", "linear_attn.A_log", d.value_heads)?;
                log.iter_mut().for_each(|a| *a = -a.exp());
                log
            }
        };
        Ok(DeltaNetWeights {
            qkv: projection("attn_qkv.", "linear_attn.in_proj_qkv.", channels)?,
            gate: projection("attn_gate.", "linear_attn.in_proj_z.", values)?,
            alpha: projection("ssm_alpha.", "linear_attn.in_proj_a.", d.value_heads)?,
            beta: projection("ssm_beta.", "linear_attn.in_proj_b.", d.value_heads)?,
            conv: vector(
                "ssm_conv1d.weight",
                "linear_attn.conv1d.weight",
                channels * d.conv_kernel,
            )?,
            decay,
            decay_bias: vector("ssm_dt.bias", "linear_attn.dt_bias", d.value_heads)?,
            norm: vector("ssm_norm.weight", "linear_attn.norm.weight", d.value_dim)?,
            output: self.projection(
                layer,
                Name { gguf: "ssm_out.", hf: "linear_attn.out_proj." },
                hidden,
                values,
            )?,
        })
    }

    fn moe(&self, layer: usize, moe: &MoeDescription) -> Result<MoeWeights> {
        let hidden = self.description.hidden;
        let router = [
            Name { gguf: "ffn_gate_inp.", hf: "mlp.gate." },
            Name { gguf: "ffn_gate_inp.", hf: "mlp.router." },
            Name { gguf: "ffn_gate_inp.", hf: "block_sparse_moe.gate." },
            Name { gguf: "ffn_gate_inp.", hf: "block_sparse_moe.router.layer." },
        ]
        .into_iter()
        .find(|stem| self.tensors.has(&format!("{}weight", self.name(layer, *stem))))
        .unwrap_or(Name { gguf: "ffn_gate_inp.", hf: "mlp.gate." });
        let bias = Name { gguf: "exp_probs_b.bias", hf: "mlp.gate.e_score_correction_bias" };
        let selection_bias = match moe.router {
            RouterKind::BiasedSigmoid { .. } => Some(self.vector(layer, bias, moe.experts)?),
            _ => None,
        };
        let shared = match moe.shared {
            Some(shared) => Some(self.shared(layer, shared, hidden)?),
            None => None,
        };
        let shared_gate = match moe.shared {
            Some(SharedExpert { gated: true, .. }) => {
                let name =
                    Name { gguf: "ffn_gate_inp_shexp.weight", hf: "mlp.shared_expert_gate.weight" };
                Some(self.tensors.matrix(&self.name(layer, name), 1, hidden)?)
            }
            _ => None,
        };
        Ok(MoeWeights {
            router: self.projection(layer, router, moe.experts, hidden)?,
            rule: router_for(moe, selection_bias),
            experts: experts::load(self.tensors, layer, moe, hidden)?,
            shared,
            shared_gate,
        })
    }

    fn shared(&self, layer: usize, shared: SharedExpert, hidden: usize) -> Result<GatedBlock> {
        let fused = self.name(layer, Name { gguf: "", hf: "shared_mlp.input_linear.weight" });
        if !self.tensors.is_gguf() && self.tensors.has(&fused) {
            let down = self.name(layer, Name { gguf: "", hf: "shared_mlp.output_linear.weight" });
            return experts::fused_block(self.tensors, &fused, &down, shared.inner, hidden);
        }
        let plural = Name { gguf: "ffn_gate_shexp.", hf: "mlp.shared_experts.gate_proj." };
        let names = match self.tensors.has(&format!("{}weight", self.name(layer, plural))) {
            true => SHARED_PLURAL,
            false => SHARED_SINGLE,
        };
        self.gated(layer, names, shared.inner, hidden)
    }

    /// A block of three plain matrices; `names` are stems of gate, up, down.
    fn gated(
        &self,
        layer: usize,
        names: [Name; 3],
        inner: usize,
        hidden: usize,
    ) -> Result<GatedBlock> {
        Ok(GatedBlock {
            gate: self.projection(layer, names[0], inner, hidden)?,
            up: self.projection(layer, names[1], inner, hidden)?,
            down: self.projection(layer, names[2], hidden, inner)?,
        })
    }
}

const OUTPUT: Name = Name { gguf: "attn_output.", hf: "self_attn.o_proj." };

const DENSE: [Name; 3] = [
    Name { gguf: "ffn_gate.", hf: "mlp.gate_proj." },
    Name { gguf: "ffn_up.", hf: "mlp.up_proj." },
    Name { gguf: "ffn_down.", hf: "mlp.down_proj." },
];

const SHARED_PLURAL: [Name; 3] = [
    Name { gguf: "ffn_gate_shexp.", hf: "mlp.shared_experts.gate_proj." },
    Name { gguf: "ffn_up_shexp.", hf: "mlp.shared_experts.up_proj." },
    Name { gguf: "ffn_down_shexp.", hf: "mlp.shared_experts.down_proj." },
];

const SHARED_SINGLE: [Name; 3] = [
    Name { gguf: "ffn_gate_shexp.", hf: "mlp.shared_expert.gate_proj." },
    Name { gguf: "ffn_up_shexp.", hf: "mlp.shared_expert.up_proj." },
    Name { gguf: "ffn_down_shexp.", hf: "mlp.shared_expert.down_proj." },
];
