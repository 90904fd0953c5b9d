"""Trains the demo model, from a model folder or from scratch; stop it and start it again as you like.

    python train.py --corpus tldr_chat.jsonl --start FOLDER --run RUN --hours 1.25

RUN/state.pt holds everything needed to go on (weights, averaged weights, optimiser, position in the data, elapsed time),
RUN/best/ the averaged weights with the lowest held-out answer loss so far, RUN/log.txt one line per check. The schedule
runs on training time, not on steps, because it is made for a shared machine whose speed is not known beforehand.

The batch is cut into one share per worker thread, each with a copy of the model that shares the weights: on CPU that
needs one meeting of the threads per step instead of one per operation. Set OMP_NUM_THREADS=1 with --workers 2.
"""
import argparse
import copy
import json
import math
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data
import evaluate
import torch
import torch.nn.functional as F
from model import Config, Qwen3Moe, load_folder, save_folder
from tokenizers import Tokenizer


def arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--corpus", required=True, help="tldr_chat.jsonl: lines of {user, assistant}")
    ap.add_argument("--start", required=True, help="folder with tokenizer.json, tokenizer_config.json and, unless --scratch, the first weights")
    ap.add_argument("--run", required=True)
    ap.add_argument("--scratch", action="store_true", help="random first weights")
    ap.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    ap.add_argument("--bf16", action="store_true", help="bf16 products; on CPU f32 was faster for these sizes")
    ap.add_argument("--hours", type=float, default=1.25, help="training time of the whole schedule, over all starts")
    ap.add_argument("--workers", type=int, default=2)
    ap.add_argument("--rows", type=int, default=8, help="rows per worker and step")
    ap.add_argument("--row", type=int, default=192, help="tokens per row")
    ap.add_argument("--lr", type=float, default=1e-3)
    ap.add_argument("--warmup", type=float, default=0.02, help="share of the schedule")
    ap.add_argument("--hold", type=float, default=0.35, help="share of the schedule before the decay starts")
    ap.add_argument("--weight-decay", type=float, default=0.1)
    ap.add_argument("--dropout", type=float, default=0.1)
    ap.add_argument("--question-share", type=float, default=0.3, help="share of the question tokens that are trained on")
    ap.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    ap.add_argument("--average", type=float, default=0.995, help="decay of the averaged weights per step")
    ap.add_argument("--check-minutes", type=float, default=8)
    ap.add_argument("--seed", type=int, default=1)
    return ap.parse_args()


def rate(progress, args):
    """Warm up, hold, then fall to zero along a cosine."""
    if progress < args.warmup:
        return max(progress / args.warmup, 0.02)
    fall = max(0.0, progress - args.hold) / (1 - args.hold)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))


class Trainer:
    def __init__(self, args):
        self.args, self.run = args, Path(args.run)
        self.run.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.tok = Tokenizer.from_file(f"{args.start}/tokenizer.json")
        pairs, self.held = data.split(data.load_pairs(args.corpus))
        self.streams = [data.Stream(pairs, self.tok, args.row, args.seed * 1000 + w) for w in range(args.workers)]
        if args.scratch:
            self.model = Qwen3Moe(Config(dropout=args.dropout))
        else:
            self.model = load_folder(args.start, args.dropout)
        self.model.to(args.device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.params = list(self.model.parameters())
        matrices, vectors = [p for p in self.params if p.ndim >= 2], [p for p in self.params if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.step = self.tokens = 0
        self.elapsed = self.cpu = 0.0
        self.best = math.inf
        if (self.run / "state.pt").exists():
            self.load()
        self.copies = [self.model] + [self.shared_copy() for _ in range(args.workers - 1)]
        self.pool = ThreadPoolExecutor(args.workers)

    def shared_copy(self):
        """Its own activations, the same weights."""
        other = copy.deepcopy(self.model)
        for mine, theirs in zip(self.model.parameters(), other.parameters()):
            theirs.data = mine.data
        return other

    def state(self):
        return {
            "model": self.model.state_dict(), "average": self.average.state_dict(), "optimiser": self.optimiser.state_dict(),
            "step": self.step, "tokens": self.tokens, "elapsed": self.elapsed, "cpu": self.cpu, "best": self.best,
            "streams": [s.rng.getstate() for s in self.streams], "torch_rng": torch.get_rng_state(),
        }

    def save(self):
        torch.save(self.state(), self.run / "state.part")
        os.replace(self.run / "state.part", self.run / "state.pt")

    def load(self):
        s = torch.load(self.run / "state.pt", map_location=self.args.device, weights_only=False)  # our own file
        self.model.load_state_dict(s["model"])
        self.average.load_state_dict(s["average"])
        self.optimiser.load_state_dict(s["optimiser"])
        self.step, self.tokens, self.elapsed, self.cpu, self.best = s["step"], s["tokens"], s["elapsed"], s["cpu"], s["best"]
        for stream, rng in zip(self.streams, s["streams"]):
            stream.rng.setstate(rng)
        torch.set_rng_state(s["torch_rng"].cpu())
        print(f"going on at step {self.step}, {self.tokens} tokens, {self.elapsed:.0f} s", flush=True)

    def share(self, worker):
        """One worker's loss and gradients. Question tokens are sampled, which stands for a lower weight and saves work."""
        args, model = self.args, self.copies[worker]
        rows, answers = self.streams[worker].rows(args.rows)
        rows, answers = torch.from_numpy(rows).to(args.device), torch.from_numpy(answers).to(args.device)
        where = answers | (torch.rand(answers.shape, device=args.device) < args.question_share)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(model(rows[:, :-1], where).float(), rows[:, 1:][where])
            total = loss + args.balance * model.balance()
        return loss.item(), torch.autograd.grad(total, list(model.parameters()))

    def train_step(self):
        args = self.args
        for group in self.optimiser.param_groups:
            group["lr"] = args.lr * rate(self.elapsed / (3600 * args.hours), args)
        shares = list(self.pool.map(self.share, range(args.workers)))
        for i, p in enumerate(self.params):
            p.grad = sum((grads[i] for _, grads in shares[1:]), shares[0][1][i]) / args.workers
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimiser.step()
        keep = min(args.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), self.params, 1 - keep)
        self.step += 1
        self.tokens += args.workers * args.rows * args.row
        return sum(loss for loss, _ in shares) / args.workers

    def check(self, loss):
        figures = evaluate.report(self.average, self.tok, self.held, words=False)
        score = figures["loss, answers"] + figures["loss, answers, paraphrased"]
        line = {"step": self.step, "tokens": self.tokens, "seconds": round(self.elapsed), "cpu_seconds": round(self.cpu), "train": round(loss, 3)}
        line |= {k: round(v, 4) for k, v in figures.items()}
        if score < self.best:
            self.best = score
            save_folder(self.average.state_dict(), self.model.cfg, self.run / "best")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(f"{self.args.start}/{name}", self.run / "best" / name)
            line["best"] = True
        with open(self.run / "log.txt", "a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        self.save()

    def train(self):
        stop = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.append(True))
        mean, last, last_cpu = None, time.monotonic(), time.process_time()
        next_check = self.elapsed + 60 * self.args.check_minutes
        while self.elapsed < 3600 * self.args.hours:
            loss = self.train_step()
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            now, cpu = time.monotonic(), time.process_time()
            self.elapsed, self.cpu, last, last_cpu = self.elapsed + now - last, self.cpu + cpu - last_cpu, now, cpu
            if self.step % 20 == 0:
                print(f"step {self.step} tokens {self.tokens / 1e6:.2f}M time {self.elapsed:.0f}s cpu {self.cpu:.0f}s loss {mean:.3f}", flush=True)
            if self.elapsed >= next_check:
                self.check(mean)
                next_check = self.elapsed + 60 * self.args.check_minutes
                last, last_cpu = time.monotonic(), time.process_time()
            if stop:
                self.save()
                print("stopped; the same command goes on from here", flush=True)
                return
        self.check(mean if mean is not None else math.nan)


if __name__ == "__main__":
    Trainer(arguments()).train()
