#!/usr/bin/env python3
"""Speed of models of real shape on this machine's GPU. Needs Python 3.9, and nvidia-smi for llama.cpp.

speed.py SHAPE --pregate FILE --random-model FILE [--llama FOLDER] [--out FOLDER] [--limit SECONDS]

SHAPE: qwen (Qwen3-30B-A3B, 17 GB), olmoe (4 GB), tiny (to try this). Makes the model with random
weights, uniform or local routing, measures settings in the order of their importance until the time
is over, and says which were left out. The first group, pregate beside llama.cpp, is interleaved:
five rounds with a process each. In the others a process takes all samples of a setting, since
loading the model takes most of the time. FOLDER/speed-SHAPE.jsonl has every run,
FOLDER/speed-SHAPE.md the table for docs/measurements.md.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time

from engines import LLAMA_SETTINGS, Clock, Config, Failure, Llama, NoTime, parse_pregate, tail
from report import Results, machine

SIZES_GIB = (4, 8, 16, 24)


@dataclasses.dataclass(frozen=True)
class Shape:
    preset: str
    format: str
    layers: int
    n_prompt: int
    n_gen: int
    # Where the switches are tried, and pregate beside llama.cpp.
    vram_gib: float
    others_gib: tuple


SHAPES = {
    "qwen": Shape("qwen3-30b-a3b", "Q4_0", 48, 2048, 128, 12, SIZES_GIB),
    # Whole in more than 4 GiB, so that is where something is missing.
    "olmoe": Shape("olmoe", "Q4_K", 16, 2048, 128, 4, (8, 12)),
    "tiny": Shape("tiny", "Q4_0", 2, 8, 2, 0.375, ()),
}

# Deviation of the embedding's elements: large ones outweigh what layers add,
# and each token has a routing of its own; with small ones neighbours share it.
EMBEDDING = {"uniform": "4", "local": "0.03"}


def groups(shape):
    """Groups of settings, the most important first. One group has one routing."""
    usual = Config(vram_gib=shape.vram_gib)
    change = dataclasses.replace
    switches = [change(usual, forecast=False), change(usual, misses="cpu"), change(usual, misses="copy"),
                change(usual, graphs=False)]
    sizes = [change(usual, vram_gib=size) for size in shape.others_gib]
    uniform = [[usual], switches, sizes]
    local = [[change(config, routing="local") for config in group] for group in ([usual, switches[0]], switches[1:], sizes)]
    return uniform + local


def make_model(options, clock, shape, routing):
    """Path of a model with this routing; another one is removed first, for room."""
    path = os.path.join(options.work, f"{options.shape}-{routing}.gguf")
    if not os.path.exists(path):
        for name in os.listdir(options.work):
            if name.startswith(f"{options.shape}-") and name.endswith(".gguf"):
                os.remove(os.path.join(options.work, name))
        command = [options.random_model, shape.preset, path, "--format", shape.format, "--embedding", EMBEDDING[routing]]
        started = time.monotonic()
        code, _, errors = clock.run(command)
        if code != 0:
            raise Failure(f"random_model: exit code {code}: {tail(errors)}")
        print(f"{path}: {os.path.getsize(path) / 1e9:.1f} GB in {time.monotonic() - started:.0f} s", flush=True)
    return path


class Session:
    def __init__(self, options, clock, results):
        self.options, self.clock, self.results = options, clock, results
        self.shape = SHAPES[options.shape]
        sizes = (self.shape.n_prompt, self.shape.n_gen)
        self.llama = Llama(options.llama, clock, sizes) if options.llama else None
        self.settings = options.llama_arguments or LLAMA_SETTINGS
        # Older ones have no such option.
        self.has_graphs = "--graphs" in clock.run([options.pregate, "bench", "--help"])[1]
        # Seconds that the last run took: with fewer left none is begun.
        self.took_s, self.failed = 5.0, False

    def pregate(self, model, config, repetitions):
        if not config.graphs and not self.has_graphs:
            self.results.note(f"not run, this pregate has no --graphs: {config.routing}, {config.name}")
            return
        command = [self.options.pregate, "bench", "--model", model, *config.arguments()]
        command += ["-p", str(self.shape.n_prompt), "-n", str(self.shape.n_gen), "-r", str(repetitions), "--json"]
        code, output, errors = self.clock.run(command, expected_s=self.took_s)
        if code != 0:
            raise Failure(f"exit code {code}: {tail(errors)}")
        self.results.add((config.routing, config.vram_gib, config.name), parse_pregate(output), {"command": command})

    def beside(self, model, config, setting, repetitions):
        ncmoe, peak = self.llama.best(model, setting, self.shape.layers, config.vram_gib)
        found, command = self.llama.measure(model, setting, ncmoe, repetitions)
        name = f"llama.cpp -ncmoe {ncmoe} {setting}"
        self.results.add((config.routing, config.vram_gib, name), found, {"command": command, "gpu_bytes": peak})

    def runs(self, group, is_first):
        """(name, what to call with a model and repetitions) of one round."""
        found = []
        for config in group:
            name = f"{config.routing}, {config.vram_gib:g} GiB, "
            found.append((name + config.name, lambda model, n, config=config: self.pregate(model, config, n)))
            plain = config == Config(config.routing, config.vram_gib)
            if self.llama and plain and config.routing == "uniform":
                # Its speed does not depend on the routing.
                for setting in self.settings if is_first else self.settings[:1]:
                    run = lambda model, n, config=config, setting=setting: self.beside(model, config, setting, n)
                    found.append((f"{name}llama.cpp {setting}", run))
        return found

    def measure(self):
        """All groups, or as many as there is time for."""
        over = False
        for at, group in enumerate(groups(self.shape)):
            runs, count = self.runs(group, at == 0), self.options.samples
            rounds, repetitions = (count, 1) if at == 0 else (1, count)
            broken = set()
            for number in range(rounds):
                for name, run in runs:
                    if over or name in broken:
                        if over and number == 0:
                            self.results.note(f"not run, no time left: {name}")
                        continue
                    try:
                        over = not self.one(group[0].routing, name, run, repetitions)
                    except Failure as failure:
                        self.failed = True
                        broken.add(name)
                        self.results.note(f"FAILED: {name}: {failure}")
                        print(f"FAILED: {name}: {failure}", flush=True)
                    if over:
                        self.results.note(f"time was over in round {number + 1} of {rounds}: {name}")

    def one(self, routing, name, run, repetitions):
        """Whether there was time for it."""
        started = time.monotonic()
        try:
            run(make_model(self.options, self.clock, self.shape, routing), repetitions)
        except NoTime:
            return False
        self.took_s = time.monotonic() - started
        print(f"{name}: {self.took_s:.0f} s, {self.clock.left_s():.0f} s left", flush=True)
        return True


def facts(options, clock):
    code, output, errors = clock.run([options.pregate, "doctor", "--json"])
    try:
        doctor = json.loads(output)
    except ValueError as error:
        raise Failure(f"pregate doctor: exit code {code}: {tail(errors)}") from error
    if not doctor.get("gpus"):
        raise Failure("pregate doctor finds no GPU")
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        doctor["gpus"][0]["driver_version"] = driver
    except (OSError, subprocess.SubprocessError):
        pass  # `pregate doctor` tells the CUDA version of the driver.
    return machine(doctor, options.version)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--pregate", required=True, metavar="FILE")
    parser.add_argument("--random-model", required=True, metavar="FILE")
    parser.add_argument("--llama", metavar="FOLDER", help="with llama-bench, built with CUDA")
    parser.add_argument("--llama-arguments", action="append", metavar="TEXT",
                        help=f"a setting of llama-bench; several are tried (default: {', '.join(map(repr, LLAMA_SETTINGS))})")
    parser.add_argument("--out", default=".", metavar="FOLDER")
    parser.add_argument("--work", metavar="FOLDER", help="where models are made (default: a temporary folder)")
    parser.add_argument("--limit", type=float, default=540, metavar="SECONDS")
    parser.add_argument("--samples", type=int, default=5, metavar="N")
    parser.add_argument("--version", default="version unknown", metavar="TEXT", help="what the table says of pregate's")
    return parser.parse_args(arguments)


def main(arguments):
    options = parse(arguments)
    clock = Clock(options.limit)
    stem = os.path.join(options.out, f"speed-{options.shape}")
    try:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            options.work = folder
            results = Results(f"{stem}.jsonl", facts(options, clock))
            session = Session(options, clock, results)
            session.measure()
    except (Failure, NoTime, OSError) as error:
        print(f"speed.py: {error or 'no time left'}", file=sys.stderr)
        return 1
    table = results.markdown(f"{SHAPES[options.shape].preset}, random weights, on a GPU")
    with open(f"{stem}.md", "w", encoding="utf-8") as file:
        file.write(table)
    print(table)
    return 1 if session.failed or not results.rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
