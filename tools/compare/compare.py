#!/usr/bin/env python3
"""Compare `pregate bench` with llama-bench of llama.cpp and of ik_llama.cpp on one machine.

Runs the binaries it is given, round-robin: one repetition of every engine and
setting per round, with the read bandwidth of the machine measured before and
after each round. Prints a Markdown table of medians and writes every sample to
a JSON file. README.md beside this file says how to read the figures.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from engines import IK_SETTINGS, LLAMA_SETTINGS, Failure, Model, engines, parse_membw, setting
from report import QUOTABLE_ROUNDS, table

# MiB to read, and 2 MiB pages: small pages can halve what a virtual machine reads.
MEMBW_ARGUMENTS = ("2048", "1")
# "Quiet": other programs use less than this share of the machine's CPU time.
QUIET_SHARE = 0.05
# How often a run is repeated that other programs disturbed (`--others-limit`).
ATTEMPTS = 5


def output_of(command, environment, limit_s):
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"ran past {limit_s} s") from error
    except OSError as error:
        raise Failure(str(error)) from error
    if done.returncode:
        raise Failure(f"exit status {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


class OthersCpu:
    """Share of the machine's CPU time that other programs took since this object was made.

    Niced programs are left out where `niced` is false: they yield to a benchmark.
    """

    def __init__(self, niced=True):
        self.niced = niced
        self.start = self.now()

    def now(self):
        # man 5 proc: user, nice, system, idle, iowait, irq, softirq, steal, in ticks
        fields = read_text("/proc/stat").partition("\n")[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields or [0] * 8)
        ticks = user + system + irq + softirq + steal + (nice if self.niced else 0)
        own = sum(os.times()[:4])
        return ticks / os.sysconf("SC_CLK_TCK") - own, time.monotonic()

    def share(self):
        busy_s, wall_s = (now - then for now, then in zip(self.now(), self.start))
        return max(0.0, busy_s / (wall_s * os.cpu_count()))


def wait_until_quiet(limit_s):
    """Returns when other programs leave the machine alone for two seconds, or after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        others = OthersCpu(niced=False)
        time.sleep(2)
        if others.share() < QUIET_SHARE:
            return


def run_once(engine, model, options, round_number):
    """One run: its samples, or its `error`."""
    wait_until_quiet(options.wait_quiet_s)
    command = engine.command(model, options)
    run = {
        "engine": engine.name,
        "family": engine.family,
        "round": round_number,
        "load": os.getloadavg(),
        "time": time.time(),
        "environment": engine.environment,
        "command": shlex.join(command),
    }
    others = OthersCpu()
    try:
        output = output_of(command, engine.environment, options.limit_s)
        run["others_cpu"] = others.share()
        return {**run, **engine.parse(output)}
    except Failure as failure:
        return {**run, "error": str(failure)}


def add_run(record, options, attempt):
    """Adds what `attempt` gives to the record; it is repeated while other programs take too much."""
    for _ in range(ATTEMPTS):
        run = attempt()
        if run.get("others_cpu", 0) <= options.others_limit:
            break
        record["disturbed"].append(run)
    else:
        run = {**run, "error": f"others took more than {options.others_limit:.0%} of the CPU in every attempt"}
    record["failures" if "error" in run else "runs"].append(run)
    if "error" in run:
        print(f"{record['label']}: {run['engine']}: {run['error']}", file=sys.stderr)


def run_model(model, chosen, options, keep):
    """All rounds of one model. `keep` gets the growing record after each round."""
    record = {**dataclasses.asdict(model), "bandwidth_gb_s": [], "runs": [], "disturbed": [], "failures": []}

    def bandwidth(round_number, when):
        if options.membw:
            gb_s = parse_membw(output_of([options.membw, str(options.threads), *MEMBW_ARGUMENTS], {}, options.limit_s))
            record["bandwidth_gb_s"].append({"round": round_number, "when": when, "gb_s": gb_s})

    for round_number in range(options.rounds):
        bandwidth(round_number, "before")
        for engine in chosen:
            add_run(record, options, lambda: run_once(engine, model, options, round_number))
        bandwidth(round_number, "after")
        keep(record)
        print(f"{model.label}: round {round_number + 1} of {options.rounds}", file=sys.stderr)
    return record


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def machine():
    cpu = re.findall(r"^model name\s*:\s*(.+)$", read_text("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    return {
        "system": platform.platform(),
        "cpu": cpu[0] if cpu else platform.processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
    }


def commit():
    """The commit of the checkout that this script is in, marked when it has changes."""
    try:
        here = str(Path(__file__).resolve().parent)
        return output_of(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"], {}, 30).strip()
    except Failure:
        return None


def fingerprint(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def common_arguments(parser):
    """What every comparison asks for: models, sizes, quiet, output."""
    parser.add_argument("--pregate", metavar="PATH")
    parser.add_argument("--llama-bench", metavar="PATH", help="llama-bench of llama.cpp")
    parser.add_argument("--ik-llama-bench", metavar="PATH", help="llama-bench of ik_llama.cpp")
    parser.add_argument("--model", metavar="LABEL=FILE[,ik=FILE]", type=Model.parse, action="append", required=True)
    parser.add_argument("-t", dest="threads", type=int, default=2)
    parser.add_argument("-n", dest="n_gen", type=int, default=64)
    parser.add_argument("-r", dest="rounds", type=int, default=QUOTABLE_ROUNDS)
    parser.add_argument("--limit-s", type=int, default=900, help="most seconds that one run may take")
    parser.add_argument("--wait-quiet-s", type=int, default=0, metavar="N",
                        help=f"before each run wait up to N seconds until others use under {100 * QUIET_SHARE:.0f} "
                             "percent of the CPU time (niced ones not counted)")
    parser.add_argument("--others-limit", type=float, default=float("inf"), metavar="SHARE",
                        help="repeat a run during which other programs took more of the CPU time than this (0 to 1; "
                             f"at most {ATTEMPTS} attempts)")
    parser.add_argument("--out", required=True, metavar="FILE", help="every sample, as JSON")


def check(parser, options, binaries, numbers):
    """Ends with a usage error where a number is below 1 or a file is missing."""
    for number in numbers:
        if getattr(options, number) < 1:
            parser.error(f"{number} must be at least 1")
    for path in [*filter(None, binaries), *(path for model in options.model for path in (model.path, model.ik_path))]:
        if not Path(path).is_file():
            parser.error(f"no file {path}")


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--membw", metavar="PATH", help="bandwidth test: `membw THREADS MIB 1` prints 'median X GB/s'")
    parser.add_argument("--llama-setting", metavar="'LABEL: [NAME=VALUE] ARGS'", type=setting, action="append",
                        help=f"replaces {', '.join(map(repr, LLAMA_SETTINGS))}; may be repeated")
    parser.add_argument("--ik-setting", metavar="'LABEL: [NAME=VALUE] ARGS'", type=setting, action="append",
                        help=f"replaces {', '.join(map(repr, IK_SETTINGS))}; may be repeated")
    parser.add_argument("-p", dest="n_prompt", type=int, default=512)
    options = parser.parse_args(argv)
    given = [options.pregate, options.llama_bench, options.ik_llama_bench]
    if not any(given):
        parser.error("name at least one engine")
    check(parser, options, [*given, options.membw], ("threads", "n_prompt", "n_gen", "rounds", "limit_s"))
    return options


def provenance(binaries, argv):
    """Machine, commit, command and binaries: the head of a raw file."""
    return {
        "machine": machine(),
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([sys.executable, *(sys.argv if argv is None else [__file__, *argv])]),
        "binaries": {path: fingerprint(path) for path in sorted(binaries)},
        "models": [],
    }


def main(argv=None):
    options = arguments(argv)
    chosen = engines(options)
    binaries = {engine.binary for engine in chosen} | ({options.membw} if options.membw else set())
    raw = provenance(binaries, argv)

    def keep(record):
        raw["models"] = [done for done in raw["models"] if done["label"] != record["label"]] + [record]
        Path(options.out).write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    print(f"{raw['machine']['cpu']}, {options.threads} of {raw['machine']['cpus']} CPUs; "
          f"prompt {options.n_prompt}, decode {options.n_gen} tokens; commit {raw['commit']}\n")
    failed = False
    for model in options.model:
        try:
            record = run_model(model, chosen, options, keep)
        except Failure as failure:
            sys.exit(f"{options.membw}: {failure}")
        failed |= bool(record["failures"])
        print(table(record) + "\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
