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
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT, DECODE = "prompt_tok_s", "decode_tok_s"
METRICS = (PROMPT, DECODE)
QUOTABLE_ROUNDS = 5

PREGATE, LLAMA, IK = "pregate", "llama.cpp", "ik_llama.cpp"
# Fixed settings of the peers; `--llama-setting` and `--ik-setting` replace them.
LLAMA_SETTINGS = ("repack=0: --repack 0", "repack=1: --repack 1")
IK_SETTINGS = ("rtr=0: -fmoe 1 -rtr 0", "rtr=1: -fmoe 1 -rtr 1")
# Threads of an OpenMP build wander between cores without this.
PEER_ENVIRONMENT = {"OMP_PROC_BIND": "true"}

MEMBW_LINE = re.compile(r"median\s+([0-9.]+)\s+GB/s")


class Failure(Exception):
    """An engine did not run, or printed something that is not a result."""


# ---------------------------------------------------------------- output of the engines


def first_json(text, opening):
    """The first JSON value in `text` that starts with `opening` at a line's start."""
    for match in re.finditer(rf"^\s*{re.escape(opening)}", text, re.MULTILINE):
        try:
            return json.JSONDecoder().raw_decode(text, match.end() - 1)[0]
        except json.JSONDecodeError:
            continue
    raise Failure(f"no JSON value that starts with {opening!r} in the output: {text[:200]!r}")


def parse_llama_bench(text):
    """Output of `llama-bench -o json`: one record for the prompt, one for the generation."""
    found = {}
    for record in first_json(text, "["):
        try:
            prompt, generated = record["n_prompt"], record["n_gen"]
            samples = [float(sample) for sample in record["samples_ts"]]
        except (KeyError, TypeError, ValueError) as error:
            raise Failure(f"llama-bench record without {error}") from error
        if prompt and not generated:
            found[PROMPT] = samples
        elif generated and not prompt:
            found[DECODE] = samples
        found["reported"] = {
            key: record[key] for key in ("build_commit", "build_number", "model_type") if key in record
        }
    return checked(found)


def parse_pregate(text):
    """Output of `pregate bench --json`: one object."""
    report = first_json(text, "{")
    try:
        found = {metric: [float(sample) for sample in report[metric]] for metric in METRICS}
    except (KeyError, TypeError, ValueError) as error:
        raise Failure(f"pregate's report without {error}") from error
    found["reported"] = {key: value for key, value in report.items() if key not in METRICS}
    return checked(found)


def checked(found):
    for metric in METRICS:
        samples = found.get(metric)
        if not samples or not all(sample > 0 for sample in samples):
            raise Failure(f"no positive samples of {metric}")
    return found


def parse_membw(text):
    """GB/s of one run of the bandwidth test (its median pass)."""
    match = MEMBW_LINE.search(text)
    if not match:
        raise Failure(f"no 'median X GB/s' in the bandwidth test's output: {text[:200]!r}")
    return float(match.group(1))


# ---------------------------------------------------------------- what to run


@dataclasses.dataclass(frozen=True)
class Model:
    label: str
    path: str
    ik_path: str  # a file of the same shape that ik_llama.cpp can read

    @staticmethod
    def parse(text):
        """LABEL=FILE[,ik=FILE]"""
        label, separator, files = text.partition("=")
        path, *extras = files.split(",")
        if not (label and separator and path):
            raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=FILE[,ik=FILE]")
        ik_path = path
        for extra in extras:
            key, _, value = extra.partition("=")
            if key != "ik" or not value:
                raise argparse.ArgumentTypeError(f"{extra!r} in {text!r} is not ik=FILE")
            ik_path = value
        return Model(label, path, ik_path)


@dataclasses.dataclass(frozen=True)
class Engine:
    family: str
    setting: str
    binary: str
    arguments: tuple

    @property
    def name(self):
        return f"{self.family} {self.setting}".strip()

    def command(self, model, options):
        sizes = ["-p", str(options.n_prompt), "-n", str(options.n_gen), "-t", str(options.threads), "-r", "1"]
        if self.family == PREGATE:
            return [self.binary, "bench", "--model", model.path, *sizes, *self.arguments, "--json"]
        path = model.ik_path if self.family == IK else model.path
        return [self.binary, "-m", path, *sizes, *self.arguments, "-o", "json"]

    @property
    def environment(self):
        return {} if self.family == PREGATE else PEER_ENVIRONMENT

    def parse(self, text):
        return parse_pregate(text) if self.family == PREGATE else parse_llama_bench(text)


def setting(text):
    """'LABEL: ARGUMENTS' as (label, arguments)."""
    label, separator, arguments = text.partition(":")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not 'LABEL: ARGUMENTS'")
    return label.strip(), tuple(shlex.split(arguments))


def engines(options):
    chosen = []
    if options.pregate:
        chosen.append(Engine(PREGATE, "", options.pregate, ()))
    for family, binary, settings, usual in (
        (LLAMA, options.llama_bench, options.llama_setting, LLAMA_SETTINGS),
        (IK, options.ik_llama_bench, options.ik_setting, IK_SETTINGS),
    ):
        if binary:
            named = settings or [setting(text) for text in usual]
            chosen += [Engine(family, label, binary, extra) for label, extra in named]
    return chosen


# ---------------------------------------------------------------- running


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


def run_model(model, chosen, options, keep):
    """All rounds of one model. `keep` gets the growing record after each round."""
    record = {**dataclasses.asdict(model), "bandwidth_gb_s": [], "runs": [], "failures": []}

    def bandwidth(round_number, when):
        if options.membw:
            gb_s = parse_membw(output_of([options.membw, str(options.threads)], {}, options.limit_s))
            record["bandwidth_gb_s"].append({"round": round_number, "when": when, "gb_s": gb_s})

    for round_number in range(options.rounds):
        bandwidth(round_number, "before")
        for engine in chosen:
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
            try:
                run.update(engine.parse(output_of(command, engine.environment, options.limit_s)))
                record["runs"].append(run)
            except Failure as failure:
                record["failures"].append({**run, "error": str(failure)})
                print(f"{model.label}: {engine.name}: {failure}", file=sys.stderr)
        bandwidth(round_number, "after")
        keep(record)
        print(f"{model.label}: round {round_number + 1} of {options.rounds}", file=sys.stderr)
    return record


def machine():
    cpu = re.findall(r"^model name\s*:\s*(.+)$", read_text("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    return {
        "system": platform.platform(),
        "cpu": cpu[0] if cpu else platform.processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
    }


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def commit():
    """The commit of the checkout that this script is in, marked when it has changes."""
    try:
        here = str(Path(__file__).resolve().parent)
        return output_of(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"], {}, 30).strip()
    except Failure:
        return None


def fingerprint(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------- the table


def medians(record):
    """Medians per engine, in the order the engines ran: {name: {family, metric: median}}."""
    samples = {}
    for run in record["runs"]:
        of_engine = samples.setdefault(run["engine"], {"family": run["family"], **{metric: [] for metric in METRICS}})
        for metric in METRICS:
            of_engine[metric] += run[metric]
    return {
        name: {**of_engine, **{metric: statistics.median(of_engine[metric]) for metric in METRICS}}
        for name, of_engine in samples.items()
    }


def best_of(rows, family, metric):
    """Name of the family's fastest setting for one metric, None when it did not run."""
    names = [name for name, row in rows.items() if row["family"] == family]
    return max(names, key=lambda name: rows[name][metric], default=None)


def round_ratios(record, name, other, metric):
    """Ratio of two engines in every round that both finished: their spread shows the drift of the machine."""
    by_round = {}
    for run in record["runs"]:
        by_round.setdefault(run["round"], {})[run["engine"]] = statistics.median(run[metric])
    return [of_round[name] / of_round[other] for of_round in by_round.values() if {name, other} <= of_round.keys()]


def ratio_cell(record, rows, name, other, metric):
    if other is None:
        return "–"
    cell = f"{rows[name][metric] / rows[other][metric]:.2f}"
    spread = round_ratios(record, name, other, metric)
    if name != other and spread:
        cell += f" ({min(spread):.2f}–{max(spread):.2f})"
    return cell


def bytes_per_token(record):
    """As pregate reports it, else from the FILE.json that the maker of a benchmark file leaves beside it."""
    for run in record["runs"]:
        if run["family"] == PREGATE and run["reported"].get("bytes_per_token"):
            return run["reported"]["bytes_per_token"]
    try:
        return json.loads(read_text(record["path"] + ".json"))["bytes_per_token"]
    except (ValueError, KeyError, TypeError):
        return None


def table(record):
    rows = medians(record)
    measured = [sample["gb_s"] for sample in record["bandwidth_gb_s"]]
    bandwidth = statistics.median(measured) if measured else None
    per_token = bytes_per_token(record)

    heading = ["engine"]
    for title in ("prompt", "decode"):
        heading += [f"{title} tok/s", "/ best llama.cpp", "/ best ik"]
    heading += ["read GB/s", "share of bandwidth"]
    lines = [f"### {record['label']}", "", f"| {' | '.join(heading)} |", "|---" + "|---:" * (len(heading) - 1) + "|"]
    for name, row in rows.items():
        cells = [name]
        for metric in METRICS:
            cells.append(f"{row[metric]:.1f}")
            for family in (LLAMA, IK):
                cells.append(ratio_cell(record, rows, name, best_of(rows, family, metric), metric))
        read = row[DECODE] * per_token / 1e9 if per_token else None
        cells.append(f"{read:.1f}" if read else "–")
        cells.append(f"{read / bandwidth:.0%}" if read and bandwidth else "–")
        lines.append("| " + " | ".join(cells) + " |")

    rounds = len({run["round"] for run in record["runs"]})
    notes = [f"Medians of {rounds} rounds; in brackets the lowest and highest ratio within a round."]
    if bandwidth:
        spread = f"{min(measured):.1f}–{max(measured):.1f}, {len(measured)} measurements"
        notes.append(f"Read bandwidth {bandwidth:.1f} GB/s ({spread}).")
    if per_token:
        notes.append(f"{per_token / 1e6:.1f} MB per token.")
    if record["ik_path"] != record["path"]:
        notes.append(f"ik_llama.cpp read {Path(record['ik_path']).name}.")
    loads = [run["load"][0] for run in record["runs"]]
    if loads:
        notes.append(f"Load average {min(loads):.1f}–{max(loads):.1f}.")
    for engine in dict.fromkeys(failure["engine"] for failure in record["failures"]):
        notes.append(f"**{engine} failed**: {sum(f['engine'] == engine for f in record['failures'])} runs.")
    if rounds < QUOTABLE_ROUNDS:
        notes.append(f"**Fewer than {QUOTABLE_ROUNDS} rounds: not a figure to quote.**")
    return "\n".join([*lines, "", " ".join(notes)])


# ---------------------------------------------------------------- command line


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pregate", metavar="PATH")
    parser.add_argument("--llama-bench", metavar="PATH", help="llama-bench of llama.cpp")
    parser.add_argument("--ik-llama-bench", metavar="PATH", help="llama-bench of ik_llama.cpp")
    parser.add_argument("--membw", metavar="PATH", help="bandwidth test: `membw THREADS` prints 'median X GB/s'")
    parser.add_argument("--model", metavar="LABEL=FILE[,ik=FILE]", type=Model.parse, action="append", required=True)
    parser.add_argument("--llama-setting", metavar="'LABEL: ARGS'", type=setting, action="append",
                        help=f"replaces {', '.join(LLAMA_SETTINGS)}; may be repeated")
    parser.add_argument("--ik-setting", metavar="'LABEL: ARGS'", type=setting, action="append",
                        help=f"replaces {', '.join(IK_SETTINGS)}; may be repeated")
    parser.add_argument("-t", dest="threads", type=int, default=2)
    parser.add_argument("-p", dest="n_prompt", type=int, default=512)
    parser.add_argument("-n", dest="n_gen", type=int, default=64)
    parser.add_argument("-r", dest="rounds", type=int, default=QUOTABLE_ROUNDS)
    parser.add_argument("--limit-s", type=int, default=900, help="most seconds that one run may take")
    parser.add_argument("--out", required=True, metavar="FILE", help="every sample, as JSON")
    options = parser.parse_args(argv)
    if not (options.pregate or options.llama_bench or options.ik_llama_bench):
        parser.error("name at least one engine")
    for number in ("threads", "n_prompt", "n_gen", "rounds", "limit_s"):
        if getattr(options, number) < 1:
            parser.error(f"{number} must be at least 1")
    given = [options.pregate, options.llama_bench, options.ik_llama_bench, options.membw]
    for path in [*filter(None, given), *(path for model in options.model for path in (model.path, model.ik_path))]:
        if not Path(path).is_file():
            parser.error(f"no file {path}")
    return options


def main(argv=None):
    options = arguments(argv)
    chosen = engines(options)
    binaries = {engine.binary for engine in chosen} | ({options.membw} if options.membw else set())
    raw = {
        "machine": machine(),
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([sys.executable, *(sys.argv if argv is None else [__file__, *argv])]),
        "binaries": {path: fingerprint(path) for path in sorted(binaries)},
        "models": [],
    }

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
