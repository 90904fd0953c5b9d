//! A model description from GGUF metadata.

use super::checks;
use super::description::*;
use super::keys::{Keys, bounds};
use crate::error::{Error, Result};
use crate::files::{ElementType, Metadata, ModelFiles};
use pregate_kernels::GatedActivation;

/// Reads and checks the description; tensor shapes are checked against it by
/// the loader.
pub fn describe(files: &ModelFiles, metadata: &Metadata) -> Result<ModelDescription> {
    let name = metadata.string("general.architecture")?.ok_or_else(|| {
        metadata.invalid("general.architecture", "nothing", "the name of an architecture")
    })?;
    let keys = Keys::Gguf { metadata, prefix: name };
    let architecture = architecture(&keys, metadata, name)?;
    Reader { files, metadata, keys, architecture }.read()
}

fn architecture(keys: &Keys<'_>, metadata: &Metadata, name: &str) -> Result<Architecture> {
    let unsupported = |found: String| Error::Unsupported {
        file: metadata.file().clone(),
        what: "architecture",
        found,
        supported: checks::supported_architectures(),
    };
    let found = Architecture::ALL
        .into_iter()
        .find(|architecture| architecture.gguf_name() == name)
        .ok_or_else(|| unsupported(format!("{name:?}")))?;
    match found {
        Architecture::Mixtral if !keys.has("expert_count") => {
            Err(unsupported("\"llama\" without experts".to_string()))
        }
        // One GGUF name for two families: V3 says how it scores.
        Architecture::DeepSeekV2 | Architecture::DeepSeekV3 => {
            match keys.optional_size("expert_gating_func", 0..=64)? {
                None | Some(0) | Some(1) => Ok(Architecture::DeepSeekV2),
                Some(2) => Ok(Architecture::DeepSeekV3),
                Some(other) => Err(keys.invalid(
                    "expert_gating_func",
                    other.to_string(),
                    "1 (softmax) or 2 (sigmoid)",
                )),
            }
        }
        other => Ok(other),
    }
}

struct Reader<'a> {
    files: &'a ModelFiles,
    metadata: &'a Metadata,
    keys: Keys<'a>,
    architecture: Architecture,
}

impl Reader<'_> {
    fn read(&self) -> Result<ModelDescription> {
        let keys = &self.keys;
        let all_layers = keys.size("block_count", bounds::LAYERS)?;
        // Multi-token-prediction layers stand behind the model's own.
        let extra = keys.optional_size("nextn_predict_layers", 0..=1024)?.unwrap_or(0);
        if extra >= all_layers {
            return Err(keys.invalid(
                "nextn_predict_layers",
                extra.to_string(),
                "fewer than the layers",
            ));
        }
        let layers = all_layers - extra;
        let hidden = keys.size("embedding_length", bounds::WIDTH)?;
        let vocab = self.vocab()?;
        let context_limit = keys.size("context_length", bounds::CONTEXT)?;
        let norm = match keys.optional_float("attention.layer_norm_rms_epsilon", bounds::EPSILON)? {
            Some(epsilon) if self.architecture != Architecture::PhiMoe => {
                NormKind::Rms { epsilon: epsilon as f32 }
            }
            Some(epsilon) => NormKind::Layer { epsilon: epsilon as f32 },
            None => NormKind::Layer {
                epsilon: keys.float("attention.layer_norm_epsilon", bounds::EPSILON)? as f32,
            },
        };
        let scale = |key| Ok::<_, Error>(keys.optional_float(key, bounds::FACTOR)?.unwrap_or(1.0));
        let rope = self.rope(hidden)?;
        let layers = (0..layers)
            .map(|layer| {
                Ok(LayerDescription {
                    mixer: self.mixer(layer, hidden, &rope)?,
                    feed_forward: self.feed_forward(layer)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(ModelDescription {
            architecture: self.architecture,
            name: self.metadata.string("general.name")?.map(str::to_string),
            vocab,
            hidden,
            context_limit,
            norm,
            embedding_scale: scale("embedding_scale")? as f32,
            residual_scale: scale("residual_scale")? as f32,
            logit_scale: match self.architecture {
                // Granite divides.
                Architecture::GraniteMoe => (1.0 / scale("logit_scale")?) as f32,
                _ => scale("logit_scale")? as f32,
            },
            ropes: vec![rope],
            layers,
            extra_layers: extra,
        })
    }

    /// Rows of the embedding: the vocabulary key may be missing.
    fn vocab(&self) -> Result<usize> {
        let rows = self.files.tensor("token_embd.weight").and_then(|t| t.shape.first().copied());
        let key = self.keys.optional_size("vocab_size", bounds::VOCAB)?;
        rows.or(key).filter(|rows| bounds::VOCAB.contains(rows)).ok_or_else(|| {
            Error::invalid(self.metadata.file(), None, "token_embd.weight", "nothing", "a matrix")
        })
    }

    /// A per-layer value that some files store as an array.
    fn per_layer(&self, key: &str, layer: usize) -> Result<Option<usize>> {
        use crate::files::Value;
        let full = format!("{}.{key}", self.architecture.gguf_name());
        match self.metadata.get(&full) {
            Some(Value::Array(_)) => {
                let list = self.keys.sizes(key)?.unwrap_or_default();
                match list.get(layer) {
                    Some(&value) if bounds::HEADS.contains(&value) => Ok(Some(value)),
                    found => Err(self.keys.invalid(
                        key,
                        found.map_or("too few entries".to_string(), |value| value.to_string()),
                        "a number of heads for every layer",
                    )),
                }
            }
            _ => self.keys.optional_size(key, bounds::HEADS),
        }
    }

    fn heads(&self, layer: usize, hidden: usize) -> Result<(usize, usize, usize)> {
        let heads = self
            .per_layer("attention.head_count", layer)?
            .ok_or_else(|| self.keys.invalid("attention.head_count", "nothing", "a number"))?;
        let kv_heads = self.per_layer("attention.head_count_kv", layer)?.unwrap_or(heads);
        let head_dim = match self.keys.optional_size("attention.key_length", bounds::WIDTH)? {
            Some(length) => length,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(self.keys.invalid(
                    "attention.head_count",
                    heads.to_string(),
                    format!("a divisor of the width {hidden}"),
                ));
            }
        };
        let value_length = self.keys.optional_size("attention.value_length", bounds::WIDTH)?;
        if value_length.is_some_and(|length| length != head_dim) && !self.is_latent() {
            return Err(self.keys.invalid(
                "attention.value_length",
                value_length.unwrap_or(0).to_string(),
                format!("the key length {head_dim}"),
            ));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(self.keys.invalid(
                "attention.head_count_kv",
                kv_heads.to_string(),
                format!("a divisor of the {heads} heads"),
            ));
        }
        Ok((heads, kv_heads, head_dim))
    }

    fn is_latent(&self) -> bool {
        matches!(self.architecture, Architecture::DeepSeekV2 | Architecture::DeepSeekV3)
    }

    fn mixer(&self, layer: usize, hidden: usize, rope: &RopeDescription) -> Result<Mixer> {
        if self.is_latent() {
            return self.latent(rope).map(Mixer::Latent);
        }
        if self.architecture == Architecture::Qwen35Moe && self.is_recurrent(layer)? {
            return self.delta_net().map(Mixer::DeltaNet);
        }
        let (heads, kv_heads, head_dim) = self.heads(layer, hidden)?;
        checks::rope_fits(&self.keys, "rope.dimension_count", rope.dim, head_dim)?;
        let scale = self.keys.optional_float("attention.scale", bounds::FACTOR)?;
        let window = match self.architecture {
            // Even layers slide, odd ones see everything.
            Architecture::GptOss if layer.is_multiple_of(2) => {
                self.keys.optional_size("attention.sliding_window", bounds::CONTEXT)?
            }
            _ => None,
        };
        Ok(Mixer::Attention(AttentionDescription {
            heads,
            kv_heads,
            head_dim,
            rope: 0,
            qk_norm: match self.architecture {
                Architecture::Qwen3Moe | Architecture::Qwen35Moe => QkNorm::PerHead,
                Architecture::Glm4Moe if self.has_layer_tensor(layer, "attn_q_norm.weight") => {
                    QkNorm::PerHead
                }
                Architecture::Olmoe => QkNorm::Whole,
                _ => QkNorm::None,
            },
            scale: scale.unwrap_or_else(|| (head_dim as f64).powf(-0.5)) as f32,
            window,
            sinks: self.architecture == Architecture::GptOss,
            output_gate: self.architecture == Architecture::Qwen35Moe,
            clip_qkv: self
                .keys
                .optional_float("attention.clamp_kqv", bounds::FACTOR)?
                .map(|limit| limit as f32),
        }))
    }

    fn has_layer_tensor(&self, layer: usize, name: &str) -> bool {
        self.files.tensor(&format!("blk.{layer}.{name}")).is_some()
    }

    fn is_recurrent(&self, layer: usize) -> Result<bool> {
        let key = format!("{}.attention.recurrent_layers", self.architecture.gguf_name());
        if let Some(list) = self.metadata.bools(&key)? {
            return list.get(layer).copied().ok_or_else(|| {
                self.metadata.invalid(
                    &key,
                    format!("{} entries", list.len()),
                    "one for every layer",
                )
            });
        }
        let interval = self.keys.size("full_attention_interval", bounds::LAYERS)?;
        Ok(!(layer + 1).is_multiple_of(interval))
    }

    fn latent(&self, rope: &RopeDescription) -> Result<LatentDescription> {
        let keys = &self.keys;
        let heads = keys.size("attention.head_count", bounds::HEADS)?;
        let kv_rank = keys.size("attention.kv_lora_rank", bounds::WIDTH)?;
        // Files made before the absorbed form give the head sizes in
        // key_length and value_length.
        let length = |new: &str, old: &str| match keys.optional_size(new, bounds::WIDTH)? {
            Some(length) => Ok(length),
            None => keys.size(old, bounds::WIDTH),
        };
        let key_dim = length("attention.key_length_mla", "attention.key_length")?;
        let value_dim = length("attention.value_length_mla", "attention.value_length")?;
        if rope.dim >= key_dim {
            return Err(keys.invalid(
                "rope.dimension_count",
                rope.dim.to_string(),
                format!("less than the key length {key_dim}"),
            ));
        }
        let log_multiplier =
            keys.optional_float("rope.scaling.yarn_log_multiplier", 0.0..=10.0)?.unwrap_or(0.0);
        Ok(LatentDescription {
            heads,
            q_rank: keys
                .optional_size("attention.q_lora_rank", 0..=1 << 20)?
                .filter(|&rank| rank > 0),
            kv_rank,
            nope_dim: key_dim - rope.dim,
            rope_dim: rope.dim,
            value_dim,
            rope: 0,
            // The file keeps 0.1 * mscale_all_dim.
            scale: checks::latent_scale(key_dim, &rope.scaling, log_multiplier * 10.0),
        })
    }

    fn delta_net(&self) -> Result<DeltaNetDescription> {
        let keys = &self.keys;
        let value_heads = keys.size("ssm.time_step_rank", bounds::HEADS)?;
        let key_heads = keys.size("ssm.group_count", bounds::HEADS)?;
        let inner = keys.size("ssm.inner_size", bounds::WIDTH)?;
        if !inner.is_multiple_of(value_heads) || !value_heads.is_multiple_of(key_heads) {
            return Err(keys.invalid(
                "ssm.time_step_rank",
                value_heads.to_string(),
                format!("a divisor of {inner} and a multiple of {key_heads}"),
            ));
        }
        Ok(DeltaNetDescription {
            key_heads,
            value_heads,
            key_dim: keys.size("ssm.state_size", bounds::WIDTH)?,
            value_dim: inner / value_heads,
            conv_kernel: keys.size("ssm.conv_kernel", 1..=64)?,
            head_order: HeadOrder::Tiled,
            norm_epsilon: keys.float("attention.layer_norm_rms_epsilon", bounds::EPSILON)? as f32,
        })
    }

    fn rope(&self, hidden: usize) -> Result<RopeDescription> {
        let keys = &self.keys;
        let dim = match keys.optional_size("rope.dimension_count", bounds::WIDTH)? {
            Some(dim) => dim,
            None => self.heads(0, hidden)?.2,
        };
        checks::even(keys, "rope.dimension_count", dim)?;
        let pairs = match self.architecture {
            // The converter permutes Llama-style projections to neighbours.
            Architecture::Mixtral
            | Architecture::GraniteMoe
            | Architecture::DeepSeekV2
            | Architecture::DeepSeekV3 => RopePairs::Neighbours,
            _ => RopePairs::Halves,
        };
        let base = keys.optional_float("rope.freq_base", bounds::ROPE_BASE)?.unwrap_or(10000.0);
        Ok(RopeDescription { dim, pairs, base, scaling: self.rope_scaling(dim)? })
    }

    fn rope_scaling(&self, dim: usize) -> Result<RopeScaling> {
        let keys = &self.keys;
        let factor = keys.optional_float("rope.scaling.factor", bounds::FACTOR)?;
        let kind = keys.text("rope.scaling.type")?;
        if let Some(long) = self.factors("rope_factors_long.weight", dim)? {
            let short = self.factors("rope_factors_short.weight", dim)?.ok_or_else(|| {
                Error::invalid(
                    self.metadata.file(),
                    None,
                    "rope_factors_short.weight",
                    "nothing",
                    "a list beside rope_factors_long.weight",
                )
            })?;
            let original = keys.size("rope.scaling.original_context_length", bounds::CONTEXT)?;
            let scale = keys.optional_float("rope.scaling.attn_factor", bounds::FACTOR)?;
            let context = keys.size("context_length", bounds::CONTEXT)?;
            let scale = scale.unwrap_or_else(|| checks::long_rope_scale(context, original));
            return Ok(RopeScaling::Long {
                original_context: original,
                short_factors: short,
                long_factors: long,
                short_scale: scale,
                long_scale: scale,
            });
        }
        if let Some(factors) = self.factors("rope_freqs.weight", dim)? {
            return Ok(RopeScaling::Factors(factors));
        }
        match (kind, factor) {
            (None | Some("none"), _) | (_, None) => Ok(RopeScaling::None),
            (Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
            (Some("yarn"), Some(factor)) => Ok(RopeScaling::Yarn {
                factor,
                original_context: keys
                    .size("rope.scaling.original_context_length", bounds::CONTEXT)?
                    as f64,
                beta_fast: keys
                    .optional_float("rope.scaling.yarn_beta_fast", bounds::FACTOR)?
                    .unwrap_or(32.0),
                beta_slow: keys
                    .optional_float("rope.scaling.yarn_beta_slow", bounds::FACTOR)?
                    .unwrap_or(1.0),
                // GGUF has no key for it; gpt-oss was trained without.
                truncate: self.architecture != Architecture::GptOss,
                attention_factor: if self.is_latent() {
                    // mscale equals mscale_all_dim in every published file;
                    // the scale of the logits carries it.
                    1.0
                } else {
                    keys.optional_float("rope.scaling.attn_factor", bounds::FACTOR)?
                        .unwrap_or_else(|| checks::yarn_scale(factor, 1.0))
                },
            }),
            (Some(other), _) => Err(Error::Unsupported {
                file: self.metadata.file().clone(),
                what: "rope scaling",
                found: format!("{other:?}"),
                supported: "none, linear, yarn, and factor tensors".to_string(),
            }),
        }
    }

    /// A list of positive factors, one per pair.
    fn factors(&self, name: &str, dim: usize) -> Result<Option<Vec<f64>>> {
        let Some(tensor) = self.files.tensor(name) else { return Ok(None) };
        let wrong = |found: String| {
            Error::invalid(
                &self.files.paths()[tensor.file],
                Some(tensor.offset),
                name,
                found,
                format!("{} positive F32 values", dim / 2),
            )
        };
        if tensor.element != ElementType::Format(pregate_kernels::Format::F32)
            || tensor.shape.iter().product::<usize>() != dim / 2
        {
            return Err(wrong(format!("{:?} {:?}", tensor.element, tensor.shape)));
        }
        let list: Vec<f64> = self
            .files
            .bytes(tensor)
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect();
        match list.iter().find(|factor| !bounds::FACTOR.contains(*factor)) {
            Some(bad) => Err(wrong(bad.to_string())),
            None => Ok(Some(list)),
        }
    }

    fn feed_forward(&self, layer: usize) -> Result<FeedForward> {
        let keys = &self.keys;
        let leading = keys.optional_size("leading_dense_block_count", 0..=1024)?.unwrap_or(0);
        // Qwen3-MoE files mark single dense layers only by their tensors.
        let dense = layer < leading || self.has_layer_tensor(layer, "ffn_gate.weight");
        if dense {
            return Ok(FeedForward::Dense {
                inner: keys.size("feed_forward_length", bounds::WIDTH)?,
            });
        }
        let experts = keys.size("expert_count", bounds::EXPERTS)?;
        let top_k = keys.size("expert_used_count", 1..=experts)?;
        let inner = match keys.optional_size("expert_feed_forward_length", bounds::WIDTH)? {
            Some(inner) => inner,
            None => keys.size("feed_forward_length", bounds::WIDTH)?,
        };
        let activation = match self.architecture {
            Architecture::GptOss => GatedActivation::ClampedSwiglu { alpha: 1.702, limit: 7.0 },
            _ => GatedActivation::Silu,
        };
        Ok(FeedForward::Moe(MoeDescription {
            experts,
            top_k,
            inner,
            activation,
            router: self.router(layer, experts)?,
            shared: self.shared(layer, inner)?,
        }))
    }

    fn shared(&self, layer: usize, inner: usize) -> Result<Option<SharedExpert>> {
        if !self.has_layer_tensor(layer, "ffn_gate_shexp.weight") {
            return Ok(None);
        }
        let own = self.keys.optional_size("expert_shared_feed_forward_length", 0..=1 << 20)?;
        let count = self.keys.optional_size("expert_shared_count", 0..=1024)?.unwrap_or(1);
        Ok(Some(SharedExpert {
            inner: own.filter(|&inner| inner > 0).unwrap_or(inner * count),
            gated: self.has_layer_tensor(layer, "ffn_gate_inp_shexp.weight"),
        }))
    }

    fn router(&self, layer: usize, experts: usize) -> Result<RouterKind> {
        let keys = &self.keys;
        let scale = keys.optional_float("expert_weights_scale", 0.0..=1e6)?;
        // Converters write 0 for "not scaled".
        let scale = scale.filter(|&scale| scale > 0.0).unwrap_or(1.0) as f32;
        let renormalise = keys.flag("expert_weights_norm")?;
        let (groups, groups_used) =
            checks::groups(keys, "expert_group_count", "expert_group_used_count", experts)?;
        Ok(match self.architecture {
            Architecture::Mixtral => RouterKind::Softmax { renormalise: true, scale },
            Architecture::Qwen3Moe | Architecture::Qwen35Moe => {
                RouterKind::Softmax { renormalise: renormalise.unwrap_or(true), scale }
            }
            Architecture::Qwen2Moe | Architecture::Olmoe => {
                RouterKind::Softmax { renormalise: renormalise.unwrap_or(false), scale }
            }
            Architecture::DeepSeekV2 => {
                if self.has_layer_tensor(layer, "exp_probs_b.bias") {
                    // A V3 file without its scoring rule: softmax instead of
                    // sigmoid would answer nonsense.
                    return Err(keys.invalid(
                        "expert_gating_func",
                        "nothing",
                        "2 (sigmoid) beside exp_probs_b.bias",
                    ));
                }
                let renormalise = renormalise.unwrap_or(false);
                RouterKind::GroupedSoftmax { groups, groups_used, renormalise, scale }
            }
            Architecture::DeepSeekV3 | Architecture::Glm4Moe => {
                let renormalise = renormalise.unwrap_or(false);
                RouterKind::BiasedSigmoid { groups, groups_used, renormalise, scale }
            }
            Architecture::GptOss | Architecture::GraniteMoe => RouterKind::SoftmaxOfTopK,
            Architecture::PhiMoe => RouterKind::SparseMixer { jitter: 0.01 },
        })
    }
}
