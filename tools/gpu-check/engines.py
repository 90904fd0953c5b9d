"""What is measured: `pregate bench`, and llama.cpp's `llama-bench` at the same GPU memory."""

import dataclasses
import json
import os
import shlex
import subprocess
import threading
import time

GIB = 1 << 30
# llama-bench's settings, each with its own sweep. A long -ub makes prompts
# faster and takes GPU memory from experts, so which is best is not known.
LLAMA_SETTINGS = ("-fa 1", "-fa 1 -ub 2048")


class Failure(Exception):
    """A program did not run, or printed something that is not a result."""


class NoTime(Exception):
    """What is left of the limit is not enough for another run."""


class Clock:
    """The limit of a whole call, in seconds."""

    def __init__(self, limit_s):
        self.end = time.monotonic() + limit_s

    def left_s(self):
        return self.end - time.monotonic()

    def run(self, command, environment=None, expected_s=5.0):
        """(exit code, standard output, standard error). Raises NoTime: fewer than
        `expected_s` are left, or none are before it ends."""
        if self.left_s() < expected_s:
            raise NoTime
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=self.left_s(),
                env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as late:
            raise NoTime from late
        except OSError as error:
            raise Failure(f"{command[0]}: {error}") from error
        return done.returncode, done.stdout, done.stderr


@dataclasses.dataclass(frozen=True)
class Config:
    """One setting of pregate."""

    routing: str = "uniform"
    vram_gib: float = 12
    forecast: bool = True
    misses: str = "auto"
    graphs: bool = True

    @property
    def name(self):
        parts = [] if self.forecast else ["no forecast"]
        parts += [] if self.misses == "auto" else [f"misses {self.misses}"]
        parts += [] if self.graphs else ["no graph"]
        return ", ".join(["pregate", *parts])

    def arguments(self):
        words = ["--device", "cuda", "--vram", f"{round(self.vram_gib * 1024)}M", "--misses", self.misses]
        words += [] if self.forecast else ["--forecast", "none"]
        return words + ([] if self.graphs else ["--graphs", "off"])


def tail(text):
    lines = text.strip().splitlines()
    return " / ".join(lines[-3:])[-300:]


def samples(values, what):
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and v > 0 for v in values):
        raise Failure(f"no positive samples of {what}: {values!r}")
    return [float(value) for value in values]


def parse_pregate(text):
    """`pregate bench --json`: samples, and what was predicted."""
    try:
        report = json.loads(text)
        split = report["split"] or {}
        return {
            "prompt_tok_s": samples(report["prompt_tok_s"], "prompt"),
            "decode_tok_s": samples(report["decode_tok_s"], "decode"),
            "predicted_tok_s": split.get("predicted_tok_s"),
            "binds": split.get("binds"),
            "hit_ratio": split.get("hit_ratio"),
            "read_bandwidth_gb_s": report["read_bandwidth_gb_s"],
            "placement": report["placement"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"not a report of pregate's: {error!r}") from error


def parse_llama(text):
    """`llama-bench -o json`: one record for the prompt, one for generation."""
    found = {}
    try:
        for record in json.loads(text[text.index("["):]):
            kind = "decode_tok_s" if record["n_gen"] else "prompt_tok_s"
            found[kind] = samples(record["samples_ts"], kind)
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"not a report of llama-bench's: {error!r}") from error
    if len(found) != 2:
        raise Failure("llama-bench reports no prompt or no decoding")
    return found


def gpu_bytes():
    """GPU memory in use, of all programs."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(text.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise Failure(f"nvidia-smi does not say how much memory is in use: {error}") from error


class Peak:
    """The most GPU memory that was taken while this is open, beyond what was before."""

    def __enter__(self):
        self.before, self.most, self.error = gpu_bytes(), 0, None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.1):
            try:
                self.most = max(self.most, gpu_bytes() - self.before)
            except Failure as error:
                self.error = error
                return

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


class Llama:
    """`llama-bench` of a folder, with as many layers' experts on the processor as it must."""

    def __init__(self, folder, clock, sizes):
        self.binary = os.path.join(folder, "llama-bench")
        if not os.path.exists(self.binary):
            raise Failure(f"{self.binary}: not there")
        path = [os.path.abspath(folder), os.environ.get("LD_LIBRARY_PATH", "")]
        self.environment = {"LD_LIBRARY_PATH": ":".join(filter(None, path))}
        self.clock, self.sizes = clock, sizes
        self.found = {}

    def command(self, model, setting, ncmoe, sizes):
        words = [self.binary, "-m", model, "-ngl", "99", "-ncmoe", str(ncmoe), *shlex.split(setting)]
        n_prompt, n_gen, repetitions = sizes
        return words + ["-p", str(n_prompt), "-n", str(n_gen), "-r", str(repetitions), "-o", "json"]

    def peak_bytes(self, model, setting, ncmoe):
        """GPU memory that it takes; infinity where the card has less."""
        command = self.command(model, setting, ncmoe, (self.sizes[0], 1, 1))
        with Peak() as peak:
            code, _, errors = self.clock.run(command, self.environment)
        if code != 0 and ("out of memory" in errors or "failed to allocate" in errors):
            return float("inf")
        if code != 0:
            raise Failure(f"llama-bench -ncmoe {ncmoe}: exit code {code}: {tail(errors)}")
        if peak.error:
            raise peak.error
        if peak.most <= 0:
            raise Failure("llama-bench took no GPU memory: is it built with CUDA?")
        return peak.most

    def best(self, model, setting, layers, vram_gib):
        """The smallest -ncmoe whose memory was measured to fit, and that memory."""
        key = (model, setting, vram_gib)
        if key not in self.found:
            measured = {}

            def peak(ncmoe):
                if ncmoe not in measured:
                    measured[ncmoe] = self.peak_bytes(model, setting, ncmoe)
                return measured[ncmoe]

            self.found[key] = smallest(peak, guess(os.path.getsize(model), layers, vram_gib), layers, vram_gib * GIB)
        return self.found[key]

    def measure(self, model, setting, ncmoe, repetitions):
        command = self.command(model, setting, ncmoe, (*self.sizes, repetitions))
        code, output, errors = self.clock.run(command, self.environment)
        if code != 0:
            raise Failure(f"llama-bench: exit code {code}: {tail(errors)}")
        return parse_llama(output), command


def guess(model_bytes, layers, vram_gib):
    """-ncmoe to begin with: experts are about 0.94 of these files, and 1.5 GiB is for the rest."""
    layer = 0.94 * model_bytes / layers
    return min(layers, max(0, layers - int((vram_gib - 1.5) * GIB / layer)))


def smallest(peak, start, layers, limit_bytes):
    """(n, peak(n)) with the smallest n whose peak is within the limit; more n take less."""
    n = start
    while peak(n) > limit_bytes:
        n += 1
        if n > layers:
            raise Failure("llama-bench does not fit even with every expert on the processor")
    while n > 0 and peak(n - 1) <= limit_bytes:
        n -= 1
    return n, peak(n)
