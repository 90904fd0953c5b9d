//! What a tensor is for, by its name in GGUF files and Hugging Face folders.

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Experts,
    SharedExperts,
    Router,
    DenseFeedForward,
    Attention,
    LinearAttention,
    Embedding,
    Output,
    Norms,
    Other,
}

impl Kind {
    pub fn title(self) -> &'static str {
        match self {
            Kind::Experts => "experts",
            Kind::SharedExperts => "shared experts",
            Kind::Router => "routers",
            Kind::DenseFeedForward => "dense feed-forward",
            Kind::Attention => "attention",
            Kind::LinearAttention => "linear attention",
            Kind::Embedding => "embedding",
            Kind::Output => "output",
            Kind::Norms => "norms",
            Kind::Other => "other",
        }
    }
}

/// The first rule that fits decides.
pub fn kind(name: &str) -> Kind {
    let has = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    // GGUF files of old keep one tensor per expert: blk.0.ffn_gate.3.weight.
    let numbered_expert = name.split_once(".ffn_").is_some_and(|(_, rest)| {
        rest.split('.').nth(1).is_some_and(|part| part.parse::<u32>().is_ok())
    });
    if has(&["_shexp", "shared_expert", "shared_mlp"]) {
        Kind::SharedExperts
    } else if numbered_expert
        || has(&["_exps", ".experts.", "block_sparse_moe.input_linear"])
        || has(&["block_sparse_moe.output_linear"])
    {
        Kind::Experts
    } else if has(&["ffn_gate_inp", "exp_probs_b", "mlp.gate.", ".router.", "sparse_moe.gate."]) {
        Kind::Router
    } else if has(&["norm"]) {
        Kind::Norms
    } else if has(&["ssm_", "linear_attn"]) {
        Kind::LinearAttention
    } else if has(&["attn", "attention"]) {
        Kind::Attention
    } else if has(&["ffn_", ".mlp."]) {
        Kind::DenseFeedForward
    } else if has(&["token_embd", "embed_tokens"]) {
        Kind::Embedding
    } else if has(&["lm_head"]) || name.starts_with("output.") {
        Kind::Output
    } else {
        Kind::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_both_worlds() {
        for (name, expected) in [
            ("blk.3.ffn_gate_exps.weight", Kind::Experts),
            ("blk.3.ffn_gate.7.weight", Kind::Experts),
            ("model.layers.0.mlp.experts.5.up_proj.weight", Kind::Experts),
            ("model.layers.0.mlp.experts.gate_up_proj_blocks", Kind::Experts),
            ("blk.3.ffn_gate_shexp.weight", Kind::SharedExperts),
            ("blk.3.ffn_gate_inp_shexp.weight", Kind::SharedExperts),
            ("model.layers.0.mlp.shared_expert_gate.weight", Kind::SharedExperts),
            ("blk.3.ffn_gate_inp.weight", Kind::Router),
            ("blk.3.exp_probs_b.bias", Kind::Router),
            ("model.layers.0.mlp.gate.weight", Kind::Router),
            ("model.layers.0.block_sparse_moe.gate.weight", Kind::Router),
            ("blk.0.ffn_gate.weight", Kind::DenseFeedForward),
            ("model.layers.0.mlp.gate_proj.weight", Kind::DenseFeedForward),
            ("blk.0.attn_q_norm.weight", Kind::Norms),
            ("blk.0.attn_q.weight", Kind::Attention),
            ("model.layers.0.self_attn.q_proj.weight", Kind::Attention),
            ("model.layers.0.linear_attn.in_proj_qkv.weight", Kind::LinearAttention),
            ("blk.0.ssm_out.weight", Kind::LinearAttention),
            ("token_embd.weight", Kind::Embedding),
            ("output.weight", Kind::Output),
            ("output_norm.weight", Kind::Norms),
            ("rope_freqs.weight", Kind::Other),
        ] {
            assert_eq!(kind(name), expected, "{name}");
        }
    }
}
