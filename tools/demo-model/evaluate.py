"""Held-out figures of a model folder or of a GGUF file.

    python evaluate.py --corpus tldr_chat.jsonl --tokenizer FOLDER MODEL [MODEL ...]

loss, old windows   the first checkpoint's own measure: 128 random windows of 128 tokens of the held-out text, all tokens
loss, all tokens    the same text in windows of 128 one after another
loss, answers       answer tokens only, each pair alone, the question as in the corpus
... paraphrased     the same, the question in other words (paraphrase rules with a fixed seed)
first word          share of greedy answers whose first word (the command's name) is right, 'What is' pairs left out
wordings            the same on own_pairs.TEST
"""
import argparse
import random

import data
import numpy as np
import own_pairs
import torch
import torch.nn.functional as F
from export import read_gguf
from model import Qwen3Moe, from_hf_tensors, load_folder
from tokenizers import Tokenizer


def load(path):
    if str(path).endswith(".gguf"):
        tensors, cfg = read_gguf(path)
        model = Qwen3Moe(cfg)
        model.load_state_dict(from_hf_tensors(tensors, cfg))
    else:
        model = load_folder(path)
    return model.eval()


def device_of(model):
    return model.embed_tokens.weight.device


@torch.no_grad()
def window_loss(model, ids, starts, length=128):
    total = 0.0
    for at in range(0, len(starts), 16):
        rows = torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts[at : at + 16]])).to(device_of(model))
        total += F.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / (len(starts) * length)


def old_windows(ids, length=128):
    rng = np.random.default_rng(1)
    return np.concatenate([rng.integers(0, len(ids) - length - 1, 16) for _ in range(8)])


def all_windows(ids, length=128):
    return np.arange(0, len(ids) - length - 1, length)


def padded(rows, fill):
    width = max(map(len, rows))
    return torch.tensor([r + [fill] * (width - len(r)) for r in rows])


@torch.no_grad()
def answer_loss(model, tok, pairs):
    """Mean loss over all answer tokens (the end mark included)."""
    ask = [e.ids for e in tok.encode_batch([data.question_text(q) for q, _ in pairs])]
    reply = [e.ids[:-1] for e in tok.encode_batch([data.answer_text(a) for _, a in pairs])]  # without the line end
    order = sorted(range(len(pairs)), key=lambda i: len(ask[i]) + len(reply[i]))
    total = count = 0
    for at in range(0, len(order), 32):
        part = order[at : at + 32]
        ids = padded([ask[i] + reply[i] for i in part], 0).to(device_of(model))
        labels = padded([[data.IGNORED] * len(ask[i]) + reply[i] for i in part], data.IGNORED).to(ids.device)
        logits = model(ids[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=data.IGNORED, reduction="sum").item()
        count += sum(len(reply[i]) for i in part)
    return total / count


@torch.no_grad()
def answer(model, tok, question, limit=64, system=None, history=()):
    """Greedy answer, no cache: the model is small."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text += "".join(data.question_text(q) + data.answer_text(a) for q, a in history)
    ids, end = tok.encode(text + data.question_text(question)).ids, model.cfg.eos_token_id
    start = len(ids)
    while len(ids) < start + limit:
        best = int(model(torch.tensor([ids], device=device_of(model)))[0, -1].argmax())
        if best == end:
            break
        ids.append(best)
    return tok.decode(ids[start:])


@torch.no_grad()
def first_words(model, tok, questions, limit=12):
    """First word of each greedy answer; questions of one length go through together."""
    coded = [e.ids for e in tok.encode_batch([data.question_text(q) for q in questions])]
    out, groups = [""] * len(questions), {}
    for i, ids in enumerate(coded):
        groups.setdefault(len(ids), []).append(i)
    for members in groups.values():
        ids = torch.tensor([coded[i] for i in members], device=device_of(model))
        start, end = ids.shape[1], model.cfg.eos_token_id
        for _ in range(limit):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
            rows = [row[: row.index(end)] if end in row else row for row in ids[:, start:].tolist()]
            texts = [tok.decode(row) for row in rows]
            if all(end in full or len(text.split()) > 1 for full, text in zip(ids[:, start:].tolist(), texts)):
                break
        for i, text in zip(members, texts):
            out[i] = (text.split() or [""])[0]
    return out


def first_word_rate(model, tok, pairs):
    got = first_words(model, tok, [q for q, _ in pairs])
    return sum(g == (a.split() or [""])[0] for g, (_, a) in zip(got, pairs)) / len(pairs)


def paraphrased(pairs, seed=7):
    rng = random.Random(seed)
    return [(data.paraphrase(q, rng, keep=0.0), a) for q, a in pairs]


def report(model, tok, held, words=True):
    ids = data.flat_ids(held, tok)
    other = paraphrased(held)
    figures = {
        "loss, old windows": window_loss(model, ids, old_windows(ids)),
        "loss, all tokens": window_loss(model, ids, all_windows(ids)),
        "loss, answers": answer_loss(model, tok, held),
        "loss, answers, paraphrased": answer_loss(model, tok, other),
    }
    if words:
        commands = [i for i, (q, _) in enumerate(held) if not data.WHAT_IS.match(q)]
        figures["first word"] = first_word_rate(model, tok, [held[i] for i in commands])
        figures["first word, paraphrased"] = first_word_rate(model, tok, [other[i] for i in commands])
        figures["first word, wordings"] = first_word_rate(model, tok, own_pairs.TEST)
    return figures


@torch.no_grad()
def divergence(reference, other, ids):
    """Mean KL(reference || other) per token in nats, and how often both have the same best token."""
    kl = same = count = 0
    for s in all_windows(ids):
        row = torch.from_numpy(ids[s : s + 128])[None]
        p, q = reference(row).float().log_softmax(-1)[0], other(row).float().log_softmax(-1)[0]
        kl += (p.exp() * (p - q)).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += len(p)
    return kl / count, same / count


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("models", nargs="+")
    ap.add_argument("--corpus", required=True)
    ap.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    args = ap.parse_args()
    tok = Tokenizer.from_file(args.tokenizer + "/tokenizer.json")
    _, held = data.split(data.load_pairs(args.corpus))
    first = None
    for path in args.models:
        model = load(path)
        print(path)
        for name, value in report(model, tok, held).items():
            print(f"  {name:28} {value:.4f}", flush=True)
        if first is None:
            first = model
        else:
            kl, same = divergence(first, model, data.flat_ids(held, tok))
            print(f"  KL from {args.models[0]}: {kl:.6f} nats per token, same best token {same:.4f}", flush=True)
