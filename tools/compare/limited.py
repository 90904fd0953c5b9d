#!/usr/bin/env python3
"""Compare decode speed of models larger than the memory they may use.

`pregate bench --ram SIZE` beside llama.cpp and ik_llama.cpp, each peer mapped
in a memory-limited group of the same size, in one alternating run. Needs root:
it makes groups of its own and sets the readahead of the model's disk while a
peer runs. README.md beside this file says how to read the figures.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import limits
from compare import add_run, check, common_arguments, provenance, wait_until_quiet, OthersCpu
from engines import DECODE, IK, LLAMA, PREGATE, Engine, Failure, Model, parse_llama_bench, parse_pregate, setting
from limited_report import STREAMED, table

# Weights stay in the mapping: a copy of them would not fit.
LLAMA_SETTING = "mmap: --repack 0 --load-mode mmap"
IK_SETTING = "mmap: -fmoe 1 -rtr 0 -mmp 1"
IK_SWEEP_SETTING = "prefetch: --prefetch-experts"
# ik_llama.cpp rounds a context up to this.
SWEEP_CONTEXT = 256


@dataclasses.dataclass(frozen=True)
class Limited(Engine):
    """An engine under a memory limit: a row of the table."""

    readahead_kib: int | None = None  # None: as the machine has it
    rounds: int | None = None  # only the first ones
    n_gen: int | None = None  # other than the comparison's
    sweep: bool = False  # llama-sweep-bench instead of llama-bench
    group_extra_bytes: int | None = 0  # limit of its group beyond the budget; None: no group

    def command(self, model, options, budget_bytes=None):
        """Decodes as many tokens to warm up as are then measured."""
        path, n_gen, threads = self.path(model), self.n_gen or options.n_gen, str(options.threads)
        if self.family == PREGATE:
            limit = ["--ram", str(budget_bytes)] if budget_bytes else []
            sizes = ["-p", "0", "-n", str(n_gen), "-t", threads, "-r", "1"]
            return [self.binary, "bench", "--model", path, *limit, *sizes, *self.arguments, "--json"]
        if self.sweep:
            # Decodes at depth 0, reads one prompt, decodes behind it: the first is the warm-up.
            block = max(n_gen, SWEEP_CONTEXT // 2)
            sizes = ["-c", str(2 * block), "-b", str(block), "-ub", str(block), "-n", str(n_gen), "-t", threads]
            return [self.binary, "-m", path, *sizes, *self.arguments, "--output-format", "jsonl"]
        sizes = ["-p", "0", "-n", str(n_gen), "-t", threads, "-r", "2"]
        return [self.binary, "-m", path, *sizes, *self.arguments, "-o", "json"]

    def path(self, model):
        return model.ik_path if self.family == IK else model.path

    def samples(self, ran):
        """Every repetition, the first one included, and what the engine says of itself."""
        if self.family == PREGATE:
            found = parse_pregate(ran.stdout, (DECODE,))
        elif self.sweep:
            found = {DECODE: parse_sweep(ran.stdout + ran.stderr), "reported": {}}
        else:
            found = parse_llama_bench(ran.stdout, (DECODE,))
        return found[DECODE], found["reported"]


def parse_sweep(text):
    """Output of ik_llama.cpp's `llama-sweep-bench --output-format jsonl`: decode tok/s of each row."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(float(json.loads(line)["speed_tg"]))
            except (ValueError, KeyError, TypeError) as error:
                raise Failure(f"llama-sweep-bench row without a speed: {line[:200]!r}") from error
    if len(found) < 2 or not all(speed > 0 for speed in found):
        raise Failure(f"llama-sweep-bench gave {found} instead of two speeds")
    return found


def streamed(reported):
    """Of pregate's report, per decoded token and over all layers: bytes from disk, and the hit ratio."""
    try:
        decode = reported["stats"]["decode"]
        total = {name: sum(layer[name] for layer in decode["layers"]) for name in
                 ("hits", "in_flight", "misses", "bytes_demand", "bytes_prefetch")}
        requests = total["hits"] + total["in_flight"] + total["misses"]
        return {
            "bytes_per_token": (total["bytes_demand"] + total["bytes_prefetch"]) / decode["tokens"],
            "hit_ratio": total["hits"] / requests,
            "belady_hit_ratio": reported.get("belady_hit_ratio"),
        }
    except (KeyError, TypeError, ZeroDivisionError):
        return {}


def run_once(engine, model, budget_bytes, options, round_number):
    """One run: the sample after the warm-up, or its `error`."""
    wait_until_quiet(options.wait_quiet_s)
    path = engine.path(model)
    command = engine.command(model, options, budget_bytes)
    run = {
        "engine": engine.name, "family": engine.family, "round": round_number, "load": os.getloadavg(),
        "time": time.time(), "environment": engine.environment, "command": shlex.join(command),
        "n_gen": engine.n_gen or options.n_gen, "readahead_kib": engine.readahead_kib,
    }
    try:
        limits.drop_cache(path)
        grouped = budget_bytes is not None and engine.group_extra_bytes is not None
        group = limits.MemoryGroup(budget_bytes + engine.group_extra_bytes) if grouped else nullcontext()
        device = limits.readahead_setting(path) if engine.readahead_kib else None
        others = OthersCpu()
        with group, limits.readahead(device, engine.readahead_kib):
            if grouped:
                run |= {"group_bytes": group.limit_bytes}
            ran = limits.watch(group.command(command) if grouped else command, engine.environment, options.limit_s)
            if grouped:
                run |= {"group_peak_bytes": group.peak_bytes()}
        run |= {"others_cpu": others.share(), "wall_s": ran.wall_s, "peak_anonymous_bytes": ran.peak_anonymous_bytes}
        samples, reported = engine.samples(ran)
        if budget_bytes is None and reported.get("placement", "whole") != "whole":
            raise Failure("the model does not fit this machine's memory: --no-resident")
    except Failure as failure:
        return {**run, "error": str(failure)}
    return {**run, DECODE: samples[-1:], "warm_up_tok_s": samples[:-1], "reported": reported,
            STREAMED: of_disk(engine, ran, samples[-1], run["n_gen"], reported)}


def of_disk(engine, ran, tok_s, n_gen, reported):
    """What one measured token cost the disk. A peer's last repetition is the last thing that it does."""
    if engine.family == PREGATE:
        return streamed(reported)
    if engine.sweep:  # a prompt follows the last decode
        return {}
    return {"bytes_per_token": ran.read_in_last(n_gen / tok_s) / n_gen}


def contenders(options):
    """What the command line asks for, in the order of a round."""
    chosen = []
    if options.pregate:
        extra = options.pregate_group_mib
        for label, *rest in options.pregate_setting or [("", (), ())]:
            chosen.append(Limited(PREGATE, label, options.pregate, *rest,
                                  group_extra_bytes=None if extra is None else extra << 20))
    kib = options.readahead_kib
    for family, binary, settings, usual, sweep in (
        (LLAMA, options.llama_bench, options.llama_setting, LLAMA_SETTING, False),
        (IK, options.ik_llama_bench, options.ik_setting, IK_SETTING, False),
        (IK, options.ik_sweep_bench, options.ik_sweep_setting, IK_SWEEP_SETTING, True),
    ):
        if binary:
            for label, *rest in settings or [setting(usual)]:
                chosen.append(Limited(family, label, binary, *rest, readahead_kib=kib, sweep=sweep))
    if options.llama_bench and options.machine_readahead_rounds:
        for engine in [engine for engine in chosen if engine.family == LLAMA]:
            chosen.append(dataclasses.replace(
                engine, setting=f"{engine.setting}, the machine's readahead", readahead_kib=None,
                rounds=options.machine_readahead_rounds, n_gen=options.machine_readahead_n))
    return chosen


def run_model(model, chosen, options, keep):
    """All rounds of one model: a record for each share of its size, and one for all of it in memory."""
    size = os.path.getsize(model.path)

    def record(label, share):
        return {**dataclasses.asdict(model), "label": label, "file_bytes": size, "share": share,
                "budget_bytes": share and size * share // 100, "disk_gb_s": [],
                "runs": [], "disturbed": [], "failures": []}

    def disk(limited, round_number, when):
        seed = f"{limited['label']} {round_number} {when}"
        limited["disk_gb_s"].append({"round": round_number, "when": when, "gb_s": limits.disk_gb_s(model.path, seed)})

    def run(engine, of, round_number):
        add_run(of, options, lambda: run_once(engine, model, of["budget_bytes"], options, round_number))

    records = [record(f"{model.label} at {share}%", share) for share in options.share]
    resident = record(f"{model.label} resident", None)
    whole = Limited(PREGATE, "resident", options.pregate, group_extra_bytes=None)
    for round_number in range(options.rounds):
        if options.resident:
            run(whole, resident, round_number)
        for limited in records:
            disk(limited, round_number, "before")
            for engine in chosen:
                if engine.rounds is None or round_number < engine.rounds:
                    run(engine, limited, round_number)
            disk(limited, round_number, "after")
        keep([*records, resident])
        print(f"{model.label}: round {round_number + 1} of {options.rounds}", file=sys.stderr)
    return records, resident


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--ik-sweep-bench", metavar="PATH", help="llama-sweep-bench of ik_llama.cpp: its expert prefetch")
    parser.add_argument("--share", type=int, action="append", metavar="PERCENT",
                        help="memory as a share of the file; may be repeated (25, 50 and 75)")
    for name, usual in (("pregate", "its defaults"), ("llama", LLAMA_SETTING), ("ik", IK_SETTING),
                        ("ik-sweep", IK_SWEEP_SETTING)):
        parser.add_argument(f"--{name}-setting", metavar="'LABEL: [NAME=VALUE] ARGS'", type=setting, action="append",
                            help=f"replaces {usual!r}; may be repeated")
    parser.add_argument("--no-resident", dest="resident", action="store_false",
                        help="leave out pregate with the whole model in memory, the compute bound")
    parser.add_argument("--pregate-group-mib", type=int, metavar="MIB",
                        help="pregate too in a group, of its budget and MIB more")
    parser.add_argument("--readahead-kib", type=int, default=128, help="readahead of the disk while a peer runs")
    parser.add_argument("--machine-readahead-rounds", type=int, default=1, metavar="N",
                        help="rounds in which llama.cpp also runs with the machine's own readahead")
    parser.add_argument("--machine-readahead-n", type=int, default=8, metavar="N", help="tokens of those runs")
    options = parser.parse_args(argv)
    options.share = options.share or [25, 50, 75]
    options.resident = options.resident and bool(options.pregate)
    given = [options.pregate, options.llama_bench, options.ik_llama_bench, options.ik_sweep_bench]
    if not any(given):
        parser.error("name at least one engine")
    if not all(0 < share <= 100 for share in options.share) or len(set(options.share)) < len(options.share):
        parser.error("shares are different percentages between 1 and 100")
    check(parser, options, given, ("threads", "n_gen", "rounds", "limit_s", "readahead_kib", "machine_readahead_n"))
    # Runs have another working folder.
    for binary in ("pregate", "llama_bench", "ik_llama_bench", "ik_sweep_bench"):
        setattr(options, binary, getattr(options, binary) and os.path.abspath(getattr(options, binary)))
    options.model = [Model(model.label, os.path.abspath(model.path), os.path.abspath(model.ik_path))
                     for model in options.model]
    return options


def main(argv=None):
    options = arguments(argv)
    limits.stop_on_signals()
    chosen = contenders(options)
    raw = provenance({engine.binary for engine in chosen}, argv)

    def keep(records):
        labels = {record["label"] for record in records}
        raw["models"] = [done for done in raw["models"] if done["label"] not in labels] + records
        Path(options.out).write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    print(f"{raw['machine']['cpu']}, {options.threads} of {raw['machine']['cpus']} CPUs; decode {options.n_gen} tokens "
          f"after as many to warm up; commit {raw['commit']}\n")
    failed = False
    for model in options.model:
        try:
            records, resident = run_model(model, chosen, options, keep)
        except Failure as failure:
            sys.exit(f"{model.label}: {failure}")
        failed |= any(record["failures"] for record in [*records, resident])
        for record in records:
            print(table(record, resident) + "\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
