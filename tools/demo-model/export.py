"""Writes a model folder (config.json, model.safetensors, tokenizer*.json) as one GGUF file, matrices in Q8_0.

    python export.py FOLDER OUT.gguf

Names and metadata keys are those that llama.cpp writes for Qwen3MoE. Norms and the router stay in f32. The output
matrix is the embedding (tied), so it is not written a second time.
"""
import argparse
import json
import os
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from model import Config
from safetensors.torch import load_file

# llama.cpp's pre-tokenizer "qwen2": the tokenizer must split exactly like it, or the ids in the file are wrong.
# llama.cpp spells the case-insensitive first group out; the rest is the same text.
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SOURCE = "https://github.com/tldr-pages/tldr"
ATTRIBUTION = (
    "Trained on English pages of tldr-pages (commit 08e345f) by the tldr-pages team and contributors, CC BY 4.0, "
    "reformatted to questions and answers, and on question wordings and a few hand-written pairs of the Pregate project."
)


def check_tokenizer(tok):
    split, bytelevel = tok["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == QWEN2_SPLIT and split["behavior"] == "Isolated" and not split["invert"], split
    assert bytelevel["type"] == "ByteLevel" and not bytelevel["add_prefix_space"] and not bytelevel["use_regex"], bytelevel
    bpe = tok["model"]
    assert bpe["type"] == "BPE" and not bpe["ignore_merges"] and not bpe["byte_fallback"] and tok["normalizer"] is None


def add_tokenizer(w, folder, cfg):
    tok = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    check_tokenizer(tok)
    names = {i: t for t, i in tok["model"]["vocab"].items()} | {t["id"]: t["content"] for t in tok["added_tokens"]}
    special = {t["id"] for t in tok["added_tokens"] if t["special"]}
    assert sorted(names) == list(range(cfg.vocab_size)), "the vocabulary has holes"
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list([names[i] for i in range(cfg.vocab_size)])
    w.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(cfg.vocab_size)])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tok["model"]["merges"]])
    w.add_bos_token_id(cfg.bos_token_id)
    w.add_eos_token_id(cfg.eos_token_id)
    w.add_pad_token_id(cfg.pad_token_id)
    w.add_add_bos_token(False)
    w.add_chat_template(settings["chat_template"])


def add_metadata(w, cfg):
    w.add_type(gguf.GGUFType.MODEL)
    w.add_name("Pregate demo")
    w.add_basename("pregate-demo")
    w.add_size_label("32x0.4M")
    w.add_description("A small mixture-of-experts model that answers questions about command-line tools; a demo of the Pregate runtime.")
    w.add_license("cc-by-4.0")
    w.add_license_name("Creative Commons Attribution 4.0 International")
    w.add_license_link("https://creativecommons.org/licenses/by/4.0/")
    w.add_dataset_count(1)
    w.add_dataset_name(0, "tldr-pages, English, commit 08e345f")
    w.add_dataset_author(0, "tldr-pages team and contributors")
    w.add_dataset_repo_url(0, SOURCE)
    w.add_string("general.attribution", ATTRIBUTION)
    w.add_tags(["text-generation", "command-line", "demo"])
    w.add_languages(["en"])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(cfg.max_position_embeddings)
    w.add_embedding_length(cfg.hidden_size)
    w.add_block_count(cfg.num_hidden_layers)
    w.add_feed_forward_length(4 * cfg.moe_intermediate_size)  # intermediate_size; no layer uses it
    w.add_head_count(cfg.num_attention_heads)
    w.add_head_count_kv(cfg.num_key_value_heads)
    w.add_key_length(cfg.head_dim)
    w.add_value_length(cfg.head_dim)
    w.add_rope_freq_base(cfg.rope_theta)
    w.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    w.add_vocab_size(cfg.vocab_size)
    w.add_expert_count(cfg.num_experts)
    w.add_expert_used_count(cfg.num_experts_per_tok)
    w.add_expert_feed_forward_length(cfg.moe_intermediate_size)


def gguf_tensors(hf, cfg):
    """(GGUF name, f32 array, keep in f32), in the order of the layers."""
    yield "token_embd.weight", hf["model.embed_tokens.weight"], False
    for layer in range(cfg.num_hidden_layers):
        src, dst = f"model.layers.{layer}", f"blk.{layer}"
        yield f"{dst}.attn_norm.weight", hf[f"{src}.input_layernorm.weight"], True
        for ours, theirs in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_output", "o_proj")):
            yield f"{dst}.{ours}.weight", hf[f"{src}.self_attn.{theirs}.weight"], False
        for ours, theirs in (("attn_q_norm", "q_norm"), ("attn_k_norm", "k_norm")):
            yield f"{dst}.{ours}.weight", hf[f"{src}.self_attn.{theirs}.weight"], True
        yield f"{dst}.ffn_norm.weight", hf[f"{src}.post_attention_layernorm.weight"], True
        yield f"{dst}.ffn_gate_inp.weight", hf[f"{src}.mlp.gate.weight"], True
        for kind in ("gate", "up", "down"):
            experts = [hf[f"{src}.mlp.experts.{e}.{kind}_proj.weight"] for e in range(cfg.num_experts)]
            yield f"{dst}.ffn_{kind}_exps.weight", torch.stack(experts), False
    yield "output_norm.weight", hf["model.norm.weight"], True


def write_gguf(folder, out):
    folder, out = Path(folder), Path(out)
    cfg = Config.from_dict(json.loads((folder / "config.json").read_text()))
    w = gguf.GGUFWriter(None, "qwen3moe")
    add_metadata(w, cfg)
    add_tokenizer(w, folder, cfg)
    for name, tensor, keep in gguf_tensors(load_file(folder / "model.safetensors"), cfg):
        array = tensor.float().contiguous().numpy()
        if keep:
            w.add_tensor(name, array)
        else:
            w.add_tensor(name, gguf.quants.quantize(array, Type.Q8_0), raw_dtype=Type.Q8_0)
    part = out.with_suffix(".part")
    w.write_header_to_file(part)
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.replace(part, out)


def read_gguf(path):
    """The file's weights as Hugging Face tensors in f32, so that a test can compare what was really written."""
    reader = gguf.GGUFReader(path)
    got = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    field = lambda key: reader.fields["qwen3moe." + key].contents()
    cfg = Config(
        vocab_size=field("vocab_size"), hidden_size=field("embedding_length"), num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"), num_key_value_heads=field("attention.head_count_kv"),
        head_dim=field("attention.key_length"), num_experts=field("expert_count"),
        num_experts_per_tok=field("expert_used_count"), moe_intermediate_size=field("expert_feed_forward_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"), rope_theta=field("rope.freq_base"),
        max_position_embeddings=field("context_length"),
    )
    hf = {"model.embed_tokens.weight": got["token_embd.weight"], "model.norm.weight": got["output_norm.weight"]}
    for layer in range(cfg.num_hidden_layers):
        src, dst = f"blk.{layer}", f"model.layers.{layer}"
        for ours, theirs in (
            ("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"), ("ffn_gate_inp", "mlp.gate"),
            ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"), ("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"),
        ):
            hf[f"{dst}.{theirs}.weight"] = got[f"{src}.{ours}.weight"]
        for kind in ("gate", "up", "down"):
            for e, expert in enumerate(got[f"{src}.ffn_{kind}_exps.weight"]):
                hf[f"{dst}.mlp.experts.{e}.{kind}_proj.weight"] = expert
    return hf, cfg


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder")
    ap.add_argument("out")
    args = ap.parse_args()
    write_gguf(args.folder, args.out)
    print(f"{args.out}: {os.path.getsize(args.out)} bytes")
