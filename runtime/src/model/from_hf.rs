//! A model description from a Hugging Face `config.json`, in the spelling of
//! transformers 4 (`rope_scaling`, `rope_theta`) or 5 (`rope_parameters`).

use super::checks;
use super::description::*;
use super::keys::{Keys, bounds};
use crate::error::{Error, Result};
use pregate_kernels::GatedActivation;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Reads and checks the description; tensor shapes are checked against it by
/// the loader.
pub fn describe(folder: &Path, config: &Map<String, Value>) -> Result<ModelDescription> {
    let file = folder.join("config.json");
    let outer = Keys::Json { file: file.clone(), path: "", map: config };
    // Multimodal repositories keep the language model's part inside.
    let keys = outer.object("text_config")?.unwrap_or(outer);
    let architecture = architecture(&keys, &file)?;
    check_quantisation(config, &file)?;
    let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
    Reader { keys, architecture, file, name }.read()
}

fn architecture(keys: &Keys<'_>, file: &Path) -> Result<Architecture> {
    let model_type = keys
        .text("model_type")?
        .ok_or_else(|| keys.invalid("model_type", "nothing", "the name of an architecture"))?;
    Architecture::ALL
        .into_iter()
        .find(|architecture| architecture.model_types().contains(&model_type))
        .ok_or_else(|| Error::Unsupported {
            file: file.to_path_buf(),
            what: "architecture",
            found: format!("{model_type:?}"),
            supported: checks::supported_architectures(),
        })
}

/// The only quantisation of Hugging Face folders that we read is MXFP4.
fn check_quantisation(config: &Map<String, Value>, file: &Path) -> Result<()> {
    let Some(quantisation) = config.get("quantization_config").filter(|value| !value.is_null())
    else {
        return Ok(());
    };
    match quantisation.get("quant_method").and_then(Value::as_str) {
        Some("mxfp4") => Ok(()),
        method => Err(Error::Unsupported {
            file: file.to_path_buf(),
            what: "quantization_config.quant_method",
            found: format!("{method:?}"),
            supported:
                "mxfp4, or unquantised F32, F16, BF16; for other quantisations use a GGUF file"
                    .to_string(),
        }),
    }
}

struct Reader<'a> {
    keys: Keys<'a>,
    architecture: Architecture,
    file: PathBuf,
    name: Option<String>,
}

impl Reader<'_> {
    fn read(self) -> Result<ModelDescription> {
        let keys = &self.keys;
        let count = keys.size("num_hidden_layers", bounds::LAYERS)?;
        let hidden = keys.size("hidden_size", bounds::WIDTH)?;
        let epsilon = keys.float("rms_norm_eps", bounds::EPSILON)? as f32;
        if let Some(activation) = keys.text("hidden_act")?
            && activation != "silu"
        {
            return Err(keys.invalid("hidden_act", activation, "silu"));
        }
        let scale = |key| Ok::<_, Error>(keys.optional_float(key, bounds::FACTOR)?.unwrap_or(1.0));
        let rope = self.rope(hidden)?;
        let layers = (0..count)
            .map(|layer| {
                Ok(LayerDescription {
                    mixer: self.mixer(layer, hidden, &rope)?,
                    feed_forward: self.feed_forward(layer)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(ModelDescription {
            architecture: self.architecture,
            vocab: keys.size("vocab_size", bounds::VOCAB)?,
            hidden,
            context_limit: keys.size("max_position_embeddings", bounds::CONTEXT)?,
            norm: match self.architecture {
                Architecture::PhiMoe => NormKind::Layer { epsilon },
                _ => NormKind::Rms { epsilon },
            },
            embedding_scale: scale("embedding_multiplier")? as f32,
            residual_scale: scale("residual_multiplier")? as f32,
            logit_scale: (1.0 / scale("logits_scaling")?) as f32,
            ropes: vec![rope],
            layers,
            extra_layers: keys.optional_size("num_nextn_predict_layers", 0..=1024)?.unwrap_or(0),
            name: self.name.clone(),
        })
    }

    fn mixer(&self, layer: usize, hidden: usize, rope: &RopeDescription) -> Result<Mixer> {
        match self.architecture {
            Architecture::DeepSeekV2 | Architecture::DeepSeekV3 => {
                return self.latent(rope).map(Mixer::Latent);
            }
            Architecture::Qwen35Moe if self.layer_type(layer)? == Some("linear_attention") => {
                return self.delta_net().map(Mixer::DeltaNet);
            }
            _ => {}
        }
        let keys = &self.keys;
        let (heads, kv_heads, head_dim) = self.heads(hidden)?;
        checks::rope_fits(keys, "head_dim", rope.dim, head_dim)?;
        Ok(Mixer::Attention(AttentionDescription {
            heads,
            kv_heads,
            head_dim,
            rope: 0,
            qk_norm: match self.architecture {
                Architecture::Qwen3Moe | Architecture::Qwen35Moe => QkNorm::PerHead,
                Architecture::Glm4Moe if keys.flag("use_qk_norm")?.unwrap_or(false) => {
                    QkNorm::PerHead
                }
                Architecture::Olmoe => QkNorm::Whole,
                _ => QkNorm::None,
            },
            scale: match keys.optional_float("attention_multiplier", bounds::FACTOR)? {
                Some(scale) => scale as f32,
                None => (head_dim as f64).powf(-0.5) as f32,
            },
            window: self.window(layer)?,
            sinks: self.architecture == Architecture::GptOss,
            output_gate: self.architecture == Architecture::Qwen35Moe,
            clip_qkv: keys.optional_float("clip_qkv", bounds::FACTOR)?.map(|limit| limit as f32),
        }))
    }

    fn heads(&self, hidden: usize) -> Result<(usize, usize, usize)> {
        let keys = &self.keys;
        let heads = keys.size("num_attention_heads", bounds::HEADS)?;
        let kv_heads = keys.optional_size("num_key_value_heads", bounds::HEADS)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let allowed = format!("a divisor of the {heads} heads");
            return Err(keys.invalid("num_key_value_heads", kv_heads.to_string(), allowed));
        }
        match keys.optional_size("head_dim", bounds::WIDTH)? {
            Some(head_dim) => Ok((heads, kv_heads, head_dim)),
            None if hidden.is_multiple_of(heads) => Ok((heads, kv_heads, hidden / heads)),
            None => Err(keys.invalid(
                "num_attention_heads",
                heads.to_string(),
                format!("a divisor of hidden_size {hidden}"),
            )),
        }
    }

    fn layer_type(&self, layer: usize) -> Result<Option<&str>> {
        let Some(types) = self.keys.texts("layer_types")? else { return Ok(None) };
        match types.get(layer).copied() {
            Some(known @ ("full_attention" | "sliding_attention" | "linear_attention")) => {
                Ok(Some(known))
            }
            Some(other) => Err(self.keys.invalid(
                "layer_types",
                other,
                "full_attention, sliding_attention, linear_attention",
            )),
            None => {
                let found = format!("{} entries", types.len());
                Err(self.keys.invalid("layer_types", found, "one for every layer"))
            }
        }
    }

    fn window(&self, layer: usize) -> Result<Option<usize>> {
        let keys = &self.keys;
        let window = keys.optional_size("sliding_window", 0..=1 << 28)?.filter(|&size| size > 0);
        match self.layer_type(layer)? {
            Some("sliding_attention") => window.map(Some).ok_or_else(|| {
                keys.invalid("sliding_window", "nothing", "the window of the sliding layers")
            }),
            Some(_) => Ok(None),
            // Qwen keeps the size beside a switch that is off.
            None if keys.flag("use_sliding_window")? == Some(false) => Ok(None),
            None if self.architecture == Architecture::GptOss => {
                Ok(window.filter(|_| layer.is_multiple_of(2)))
            }
            None => Ok(window),
        }
    }

    fn latent(&self, rope: &RopeDescription) -> Result<LatentDescription> {
        let keys = &self.keys;
        let nope_dim = keys.size("qk_nope_head_dim", bounds::WIDTH)?;
        let rope_dim = keys.size("qk_rope_head_dim", bounds::WIDTH)?;
        let all_dim = match self.rope_object()? {
            Some(rope) => rope.optional_float("mscale_all_dim", 0.0..=10.0)?.unwrap_or(0.0),
            None => 0.0,
        };
        Ok(LatentDescription {
            heads: keys.size("num_attention_heads", bounds::HEADS)?,
            q_rank: keys.optional_size("q_lora_rank", bounds::WIDTH)?,
            kv_rank: keys.size("kv_lora_rank", bounds::WIDTH)?,
            nope_dim,
            rope_dim,
            value_dim: keys.size("v_head_dim", bounds::WIDTH)?,
            rope: 0,
            scale: checks::latent_scale(nope_dim + rope_dim, &rope.scaling, all_dim),
        })
    }

    fn delta_net(&self) -> Result<DeltaNetDescription> {
        let keys = &self.keys;
        let key_heads = keys.size("linear_num_key_heads", bounds::HEADS)?;
        let value_heads = keys.size("linear_num_value_heads", bounds::HEADS)?;
        if !value_heads.is_multiple_of(key_heads) {
            let allowed = format!("a multiple of linear_num_key_heads {key_heads}");
            return Err(keys.invalid("linear_num_value_heads", value_heads.to_string(), allowed));
        }
        Ok(DeltaNetDescription {
            key_heads,
            value_heads,
            key_dim: keys.size("linear_key_head_dim", bounds::WIDTH)?,
            value_dim: keys.size("linear_value_head_dim", bounds::WIDTH)?,
            conv_kernel: keys.size("linear_conv_kernel_dim", 1..=64)?,
            head_order: HeadOrder::Grouped,
            norm_epsilon: keys.float("rms_norm_eps", bounds::EPSILON)? as f32,
        })
    }

    fn rope_object(&self) -> Result<Option<Keys<'_>>> {
        match self.keys.object("rope_parameters")? {
            Some(rope) => Ok(Some(rope)),
            None => self.keys.object("rope_scaling"),
        }
    }

    fn rope(&self, hidden: usize) -> Result<RopeDescription> {
        let keys = &self.keys;
        let object = self.rope_object()?;
        // transformers 5 moved the base and the rotated share inside.
        let float = |key: &str, range: std::ops::RangeInclusive<f64>| match &object {
            Some(rope) if rope.has(key) => rope.optional_float(key, range),
            _ => keys.optional_float(key, range),
        };
        let base = float("rope_theta", bounds::ROPE_BASE)?.ok_or_else(|| {
            keys.invalid("rope_theta", "nothing", "the base of the rotary embedding")
        })?;
        let latent =
            matches!(self.architecture, Architecture::DeepSeekV2 | Architecture::DeepSeekV3);
        let dim = if latent {
            keys.size("qk_rope_head_dim", bounds::WIDTH)?
        } else {
            let share = float("partial_rotary_factor", 1e-6..=1.0)?.unwrap_or(1.0);
            (self.heads(hidden)?.2 as f64 * share) as usize
        };
        checks::even(keys, "head_dim", dim)?;
        Ok(RopeDescription {
            dim,
            pairs: if latent && keys.flag("rope_interleave")? != Some(false) {
                RopePairs::Neighbours
            } else {
                RopePairs::Halves
            },
            base,
            scaling: self.rope_scaling(object.as_ref(), dim)?,
        })
    }

    fn rope_scaling(&self, rope: Option<&Keys<'_>>, dim: usize) -> Result<RopeScaling> {
        let Some(rope) = rope else { return Ok(RopeScaling::None) };
        // Before transformers 4.43 the key was "type".
        let kind = match rope.text("rope_type")? {
            Some(kind) => kind,
            None => rope.text("type")?.unwrap_or("default"),
        };
        match kind {
            "default" | "mrope" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: rope.float("factor", bounds::FACTOR)? }),
            "yarn" => self.yarn(rope),
            "longrope" | "su" => self.long_rope(rope, dim),
            other => Err(Error::Unsupported {
                file: self.file.clone(),
                what: "rope_type",
                found: format!("{other:?}"),
                supported: "default, linear, yarn, longrope".to_string(),
            }),
        }
    }

    fn original_context(&self, rope: &Keys<'_>) -> Result<usize> {
        let key = "original_max_position_embeddings";
        match rope.optional_size(key, bounds::CONTEXT)? {
            Some(size) => Ok(size),
            None => self.keys.size(key, bounds::CONTEXT),
        }
    }

    fn yarn(&self, rope: &Keys<'_>) -> Result<RopeScaling> {
        let factor = rope.float("factor", bounds::FACTOR)?;
        let multiplier = |key| rope.optional_float(key, 0.0..=10.0);
        let attention_factor = match rope.optional_float("attention_factor", bounds::FACTOR)? {
            Some(factor) => factor,
            None => match (multiplier("mscale")?, multiplier("mscale_all_dim")?) {
                (Some(one), Some(all)) if one > 0.0 && all > 0.0 => {
                    checks::yarn_scale(factor, one) / checks::yarn_scale(factor, all)
                }
                _ => checks::yarn_scale(factor, 1.0),
            },
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_context: self.original_context(rope)? as f64,
            beta_fast: rope.optional_float("beta_fast", bounds::FACTOR)?.unwrap_or(32.0),
            beta_slow: rope.optional_float("beta_slow", bounds::FACTOR)?.unwrap_or(1.0),
            truncate: rope.flag("truncate")?.unwrap_or(true),
            attention_factor,
        })
    }

    fn long_rope(&self, rope: &Keys<'_>, dim: usize) -> Result<RopeScaling> {
        let factors = |key: &str| {
            let list = rope.floats(key)?.unwrap_or_default();
            if list.len() != dim / 2 || list.iter().any(|f| !bounds::FACTOR.contains(f)) {
                let found = format!("{} numbers", list.len());
                return Err(rope.invalid(key, found, format!("{} positive numbers", dim / 2)));
            }
            Ok(list)
        };
        let original = self.original_context(rope)?;
        let context = self.keys.size("max_position_embeddings", bounds::CONTEXT)?;
        let common = match rope.optional_float("attention_factor", bounds::FACTOR)? {
            Some(scale) => scale,
            None => checks::long_rope_scale(context, original),
        };
        let scale =
            |key| Ok::<_, Error>(rope.optional_float(key, bounds::FACTOR)?.unwrap_or(common));
        let (short_factors, long_factors) = (factors("short_factor")?, factors("long_factor")?);
        Ok(RopeScaling::Long {
            original_context: original,
            // transformers (5.23) changes Phi-MoE's magnitude beyond the
            // original context but keeps the short factors; folders are
            // computed as it computes them.
            long_factors: match self.architecture {
                Architecture::PhiMoe => short_factors.clone(),
                _ => long_factors,
            },
            short_factors,
            short_scale: scale("short_mscale")?,
            long_scale: scale("long_mscale")?,
        })
    }

    fn feed_forward(&self, layer: usize) -> Result<FeedForward> {
        let keys = &self.keys;
        if self.is_dense(layer)? {
            return Ok(FeedForward::Dense {
                inner: keys.size("intermediate_size", bounds::WIDTH)?,
            });
        }
        let experts = self.expert_count()?;
        let top_k = keys.size("num_experts_per_tok", 1..=experts)?;
        let inner = match keys.optional_size("moe_intermediate_size", bounds::WIDTH)? {
            Some(inner) => inner,
            None => keys.size("intermediate_size", bounds::WIDTH)?,
        };
        let activation = match self.architecture {
            Architecture::GptOss => GatedActivation::ClampedSwiglu {
                alpha: keys.optional_float("swiglu_alpha", bounds::FACTOR)?.unwrap_or(1.702) as f32,
                limit: keys.optional_float("swiglu_limit", bounds::FACTOR)?.unwrap_or(7.0) as f32,
            },
            _ => GatedActivation::Silu,
        };
        Ok(FeedForward::Moe(MoeDescription {
            experts,
            top_k,
            inner,
            activation,
            router: self.router(experts)?,
            shared: self.shared(inner)?,
        }))
    }

    fn expert_count(&self) -> Result<usize> {
        for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
            if let Some(count) = self.keys.optional_size(key, bounds::EXPERTS)? {
                return Ok(count);
            }
        }
        Err(self.keys.invalid("num_local_experts", "nothing", "the number of experts"))
    }

    fn is_dense(&self, layer: usize) -> Result<bool> {
        let keys = &self.keys;
        if let Some(leading) = keys.optional_size("first_k_dense_replace", 0..=1024)? {
            let every = keys.optional_size("moe_layer_freq", 1..=1024)?.unwrap_or(1);
            return Ok(layer < leading || !layer.is_multiple_of(every));
        }
        if keys.sizes("mlp_only_layers")?.is_some_and(|dense| dense.contains(&layer)) {
            return Ok(true);
        }
        let step = keys.optional_size("decoder_sparse_step", 1..=1024)?.unwrap_or(1);
        Ok(!(layer + 1).is_multiple_of(step))
    }

    fn shared(&self, inner: usize) -> Result<Option<SharedExpert>> {
        let keys = &self.keys;
        for key in ["shared_expert_intermediate_size", "shared_intermediate_size"] {
            if let Some(inner) = keys.optional_size(key, 0..=1 << 20)?.filter(|&inner| inner > 0) {
                let gated = key == "shared_expert_intermediate_size";
                return Ok(Some(SharedExpert { inner, gated }));
            }
        }
        let count = keys.optional_size("n_shared_experts", 0..=1024)?.unwrap_or(0);
        Ok((count > 0).then_some(SharedExpert { inner: inner * count, gated: false }))
    }

    fn router(&self, experts: usize) -> Result<RouterKind> {
        let keys = &self.keys;
        let scale =
            keys.optional_float("routed_scaling_factor", bounds::FACTOR)?.unwrap_or(1.0) as f32;
        let renormalise = keys.flag("norm_topk_prob")?;
        let (groups, groups_used) = checks::groups(keys, "n_group", "topk_group", experts)?;
        let scoring = keys.text("scoring_func")?;
        let expect_scoring = |expected: &str| match scoring {
            Some(found) if found != expected => Err(keys.invalid(
                "scoring_func",
                found,
                format!("{expected} for this architecture"),
            )),
            _ => Ok(()),
        };
        Ok(match self.architecture {
            Architecture::Mixtral => RouterKind::Softmax { renormalise: true, scale },
            Architecture::Qwen35Moe => RouterKind::Softmax { renormalise: true, scale },
            Architecture::Qwen3Moe | Architecture::Qwen2Moe | Architecture::Olmoe => {
                RouterKind::Softmax { renormalise: renormalise.unwrap_or(false), scale }
            }
            Architecture::DeepSeekV2 => {
                expect_scoring("softmax")?;
                let (groups, groups_used) = match keys.text("topk_method")? {
                    Some("group_limited_greedy") => (groups, groups_used),
                    None | Some("greedy") => (1, 1),
                    Some(other) => {
                        return Err(keys.invalid(
                            "topk_method",
                            other,
                            "greedy, group_limited_greedy",
                        ));
                    }
                };
                // The published code never renormalises, whatever the flag.
                RouterKind::GroupedSoftmax { groups, groups_used, renormalise: false, scale }
            }
            Architecture::DeepSeekV3 | Architecture::Glm4Moe => {
                // transformers 5 writes no scoring_func: these
                // architectures have sigmoid scores by definition.
                expect_scoring("sigmoid")?;
                let renormalise = renormalise.unwrap_or(true);
                RouterKind::BiasedSigmoid { groups, groups_used, renormalise, scale }
            }
            Architecture::GptOss | Architecture::GraniteMoe => RouterKind::SoftmaxOfTopK,
            Architecture::PhiMoe => RouterKind::SparseMixer {
                jitter: keys.optional_float("router_jitter_noise", 0.0..=1.0)?.unwrap_or(0.01)
                    as f32,
            },
        })
    }
}
