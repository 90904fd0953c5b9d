"""The engines that are compared: how each is called, and how its output is read."""

import argparse
import dataclasses
import itertools
import json
import re
import shlex

PROMPT, DECODE = "prompt_tok_s", "decode_tok_s"
METRICS = (PROMPT, DECODE)

PREGATE, LLAMA, IK = "pregate", "llama.cpp", "ik_llama.cpp"
# Settings of the peers; `--llama-setting` and `--ik-setting` replace them.
# "huge": weights in memory that glibc asks 2 MiB pages for, instead of a
# mapping of the file in 4 KiB pages.
HUGE = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
LLAMA_SETTINGS = (
    "repack=0: --repack 0",
    f"repack=0 huge: {HUGE} --repack 0 --load-mode none",
    "repack=1: --repack 1",
    f"repack=1 huge: {HUGE} --repack 1",
)
IK_SETTINGS = (
    "rtr=0: -fmoe 1 -rtr 0",
    f"rtr=0 huge: {HUGE} -fmoe 1 -rtr 0 -mmp 0",
    "rtr=1: -fmoe 1 -rtr 1",
    f"rtr=1 huge: {HUGE} -fmoe 1 -rtr 1",
)
# Threads of an OpenMP build wander between cores without this.
PEER_ENVIRONMENT = {"OMP_PROC_BIND": "true"}

MEMBW_LINE = re.compile(r"median\s+([0-9.]+)\s+GB/s")


class Failure(Exception):
    """An engine did not run, or printed something that is not a result."""


def first_json(text, opening):
    """The first JSON value in `text` that starts with `opening` at a line's start."""
    for match in re.finditer(rf"^\s*{re.escape(opening)}", text, re.MULTILINE):
        try:
            return json.JSONDecoder().raw_decode(text, match.end() - 1)[0]
        except json.JSONDecodeError:
            continue
    raise Failure(f"no JSON value that starts with {opening!r} in the output: {text[:200]!r}")


def parse_llama_bench(text, metrics=METRICS):
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
    return checked(found, metrics)


def parse_pregate(text, metrics=METRICS):
    """Output of `pregate bench --json`: one object."""
    report = first_json(text, "{")
    try:
        found = {metric: [float(sample) for sample in report[metric]] for metric in metrics}
    except (KeyError, TypeError, ValueError) as error:
        raise Failure(f"pregate's report without {error}") from error
    found["reported"] = {key: value for key, value in report.items() if key not in METRICS}
    return checked(found, metrics)


def checked(found, metrics):
    for metric in metrics:
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


@dataclasses.dataclass(frozen=True)
class Model:
    """A file to measure with, under the name that the table gives it."""

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
    """One binary in one setting: a row of the table."""

    family: str
    setting: str
    binary: str
    arguments: tuple = ()
    variables: tuple = ()  # of the environment, as (name, value)

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
        return dict(self.variables) if self.family == PREGATE else {**PEER_ENVIRONMENT, **dict(self.variables)}

    def parse(self, text):
        return parse_pregate(text) if self.family == PREGATE else parse_llama_bench(text)


def setting(text):
    """'LABEL: [NAME=VALUE ...] ARGUMENTS' as (label, arguments, variables)."""
    label, separator, rest = text.partition(":")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not 'LABEL: [NAME=VALUE ...] ARGUMENTS'")
    words = shlex.split(rest)
    variables = list(itertools.takewhile(re.compile(r"[A-Z_]+=").match, words))
    pairs = (tuple(variable.split("=", 1)) for variable in variables)
    return label.strip(), tuple(words[len(variables):]), tuple(pairs)


def engines(options):
    """What the command line asks for, in the order of a round."""
    chosen = []
    if options.pregate:
        chosen.append(Engine(PREGATE, "", options.pregate))
    for family, binary, settings, usual in (
        (LLAMA, options.llama_bench, options.llama_setting, LLAMA_SETTINGS),
        (IK, options.ik_llama_bench, options.ik_setting, IK_SETTINGS),
    ):
        if binary:
            named = settings or [setting(text) for text in usual]
            chosen += [Engine(family, label, binary, *extra) for label, *extra in named]
    return chosen
