"""The demo model: a small Qwen3-MoE in plain PyTorch, with loading from and saving to the Hugging Face layout.

Parameters carry the Hugging Face names except the experts, which are stacked per layer so that one batched
matrix product serves all of them:
  mlp.gate_up [expert, hidden, 2 * ffn]   columns: first gate_proj, then up_proj
  mlp.down    [expert, ffn, hidden]
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass
class Config:
    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 96
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    bos_token_id: int = 1
    eos_token_id: int = 4
    pad_token_id: int = 0
    dropout: float = 0.0  # training only, never exported

    @classmethod
    def from_dict(cls, values):
        return cls(**{k: values[k] for k in cls.__dataclass_fields__ if k in values})

    def to_hf(self):
        hf = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "dropout"}
        hf.update(
            architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", torch_dtype="bfloat16", hidden_act="silu",
            intermediate_size=4 * self.moe_intermediate_size, num_local_experts=self.num_experts, norm_topk_prob=True,
            decoder_sparse_step=1, mlp_only_layers=[], rope_scaling=None, tie_word_embeddings=True, attention_bias=False,
        )
        return hf


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rotate(x, cos, sin):
    """Rotary position embedding, halves layout (value j is paired with value j + head_dim / 2)."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        queries, keys = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, cfg.hidden_size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps), RMSNorm(cfg.head_dim, cfg.rms_norm_eps)

    def forward(self, x, cos, sin):
        batch, time, _ = x.shape
        split = lambda y: y.view(batch, time, -1, self.cfg.head_dim)
        q, k, v = self.q_norm(split(self.q_proj(x))), self.k_norm(split(self.k_proj(x))), split(self.v_proj(x))
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        share = self.cfg.num_attention_heads // self.cfg.num_key_value_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))


class GroupedProduct(torch.autograd.Function):
    """Rows sorted by group times that group's own matrix: y[rows of g] = x[rows of g] @ w[g].

    A padded batched product is shorter to write, but costs as much as if every expert had the busiest one's load."""

    @staticmethod
    def forward(ctx, x, w, counts):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        wx = w.to(x.dtype)
        y = x.new_empty(x.shape[0], w.shape[-1])
        for rows, out, weight in zip(x.split(counts), y.split(counts), wx):
            torch.mm(rows, weight, out=out)
        ctx.save_for_backward(x, wx)
        ctx.counts, ctx.w_type = counts, w.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dy = dy.to(x.dtype)
        dx, dw = torch.empty_like(x), torch.empty_like(w)
        for g, (rows, grad, out) in enumerate(zip(x.split(ctx.counts), dy.split(ctx.counts), dx.split(ctx.counts))):
            torch.mm(grad, w[g].t(), out=out)
            torch.mm(rows.t(), grad, out=dw[g])
        return dx, dw.to(ctx.w_type), None


class MoE(nn.Module):
    """Softmax router in f32, the best k experts with weights that sum to one; every token is served (no drops)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(cfg.num_experts, cfg.hidden_size, 2 * cfg.moe_intermediate_size))
        self.down = nn.Parameter(torch.empty(cfg.num_experts, cfg.moe_intermediate_size, cfg.hidden_size))
        self.balance = torch.zeros(())  # load-balancing loss of the last forward pass; 1.0 is an even load

    def forward(self, x):
        shape, experts, k = x.shape, self.cfg.num_experts, self.cfg.num_experts_per_tok
        x = x.reshape(-1, shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.float(), self.gate.weight.float()).softmax(-1)
        weight, chosen = probs.topk(k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        load = torch.bincount(chosen.flatten(), minlength=experts)
        self.balance = experts * (probs.mean(0) * load / load.sum()).sum()

        order = chosen.flatten().argsort(stable=True)  # (token, expert) pairs, expert by expert
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        counts = load.tolist()
        gate, up = GroupedProduct.apply(x[order // k], self.gate_up, counts).chunk(2, -1)
        out = GroupedProduct.apply(F.silu(gate) * up, self.down, counts)[back]
        out = out.view(-1, k, shape[-1]) * weight.to(out.dtype).unsqueeze(-1)
        return out.sum(1).view(shape)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MoE(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, cos, sin):
        x = x + self.drop(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))


class Qwen3Moe(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        for name, p in self.named_parameters():
            if p.ndim >= 2:  # the two products that write to the residual stream start smaller
                writes = name.endswith(("o_proj.weight", "mlp.down"))
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * cfg.num_hidden_layers) if writes else 0.02)

    def forward(self, ids, where=None):
        """Logits of every position, or of the positions where `where` is true (flattened)."""
        half = torch.arange(0, self.cfg.head_dim, 2, device=ids.device).float() / self.cfg.head_dim
        angle = torch.arange(ids.shape[1], device=ids.device).float()[:, None] * self.cfg.rope_theta ** -half
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return F.linear(self.norm(x if where is None else x[where]), self.embed_tokens.weight)

    def balance(self):
        return torch.stack([layer.mlp.balance for layer in self.layers]).mean()

    def sizes(self):
        total = sum(p.numel() for p in self.parameters())
        experts = sum(layer.mlp.gate_up.numel() + layer.mlp.down.numel() for layer in self.layers)
        return total, total - experts + experts * self.cfg.num_experts_per_tok // self.cfg.num_experts


def to_hf_tensors(state, cfg):
    """Our state dict -> Hugging Face tensor names, one tensor per expert."""
    out, ffn = {}, cfg.moe_intermediate_size
    for name, p in state.items():
        base = "model." + name.rsplit(".", 1)[0] + ".experts"
        if name.endswith("mlp.gate_up"):
            for e in range(cfg.num_experts):
                out[f"{base}.{e}.gate_proj.weight"] = p[e, :, :ffn].t()
                out[f"{base}.{e}.up_proj.weight"] = p[e, :, ffn:].t()
        elif name.endswith("mlp.down"):
            for e in range(cfg.num_experts):
                out[f"{base}.{e}.down_proj.weight"] = p[e].t()
        else:
            out["model." + name] = p
    return {k: v.contiguous() for k, v in out.items()}


def from_hf_tensors(tensors, cfg):
    out = {k.removeprefix("model."): v.float() for k, v in tensors.items() if ".experts." not in k}
    for layer in range(cfg.num_hidden_layers):
        part = lambda e, n: tensors[f"model.layers.{layer}.mlp.experts.{e}.{n}.weight"].float().t()
        ids = range(cfg.num_experts)
        out[f"layers.{layer}.mlp.gate_up"] = torch.stack([torch.cat([part(e, "gate_proj"), part(e, "up_proj")], 1) for e in ids])
        out[f"layers.{layer}.mlp.down"] = torch.stack([part(e, "down_proj") for e in ids])
    return out


def load_folder(folder, dropout=0.0):
    """A model in f32 from config.json and model.safetensors."""
    folder = Path(folder)
    cfg = Config.from_dict(json.loads((folder / "config.json").read_text()))
    cfg.dropout = dropout
    model = Qwen3Moe(cfg)
    model.load_state_dict(from_hf_tensors(load_file(folder / "model.safetensors"), cfg))
    return model


def save_folder(state, cfg, folder):
    """config.json and model.safetensors (bf16); the tokenizer's two files are copied by the caller."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.bfloat16() for k, v in to_hf_tensors(state, cfg).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(cfg.to_hf(), indent=1) + "\n")
