import argparse
import contextlib
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import compare
import engines
import report

# Captured from `llama-bench -o json`, keys that nothing reads left out.
LLAMA_BENCH = """\
[
  {
    "build_commit": "1652066",
    "build_number": 1,
    "cpu_info": "AMD EPYC",
    "model_filename": "mini-q4km.gguf",
    "model_type": "qwen3moe ?B Q4_K - Medium",
    "n_threads": 2,
    "repack": true,
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "test_time": "2026-11-22T03:22:37Z",
    "avg_ns": 3997152764,
    "stddev_ns": 0,
    "avg_ts": 128.091176,
    "stddev_ts": 0.000000,
    "samples_ns": [ 3997152764 ],
    "samples_ts": [ 128.091 ]
  },
  {
    "build_commit": "1652066",
    "build_number": 1,
    "cpu_info": "AMD EPYC",
    "model_filename": "mini-q4km.gguf",
    "model_type": "qwen3moe ?B Q4_K - Medium",
    "n_threads": 2,
    "repack": true,
    "n_prompt": 0,
    "n_gen": 32,
    "n_depth": 0,
    "test_time": "2026-11-22T03:22:45Z",
    "avg_ns": 1029058873,
    "stddev_ns": 0,
    "avg_ts": 31.096374,
    "stddev_ts": 0.000000,
    "samples_ns": [ 1029058873 ],
    "samples_ts": [ 31.0964 ]
  }
]
"""
MEMBW = "threads 2 buffer 2048 MiB huge 0: median 26.31 GB/s best 29.29 worst 17.91\n"
PREGATE = json.dumps({
    "model": "mini-q4km.gguf", "backend": "cpu avx512", "threads": 2, "n_prompt": 512, "n_gen": 64,
    "prompt_tok_s": [300.5], "decode_tok_s": [100.0], "bytes_per_token": 153719808,
    "read_bandwidth_gb_s": 26.0, "decode_bandwidth_share": 0.59,
})


def record(samples, bandwidth=(20.0,), **changes):
    """A record as run_model makes it, from (family, engine, round, prompt, decode)."""
    runs = [
        {"family": family, "engine": engine, "round": number, "others_cpu": 0.02, "reported": {},
         engines.PROMPT: [prompt], engines.DECODE: [decode]}
        for family, engine, number, prompt, decode in samples
    ]
    return {"label": "mini", "path": "mini.gguf", "ik_path": "mini.gguf", "runs": runs, "failures": [], "disturbed": [],
            "bandwidth_gb_s": [{"gb_s": gb_s} for gb_s in bandwidth], **changes}


class Parsing(unittest.TestCase):
    def test_llama_bench(self):
        found = engines.parse_llama_bench(LLAMA_BENCH)
        self.assertEqual(found[engines.PROMPT], [128.091])
        self.assertEqual(found[engines.DECODE], [31.0964])
        self.assertEqual(found["reported"]["build_commit"], "1652066")

    def test_lines_around_the_json_are_skipped(self):
        noisy = "[load] 3 tensors\nggml: note [1]\n" + LLAMA_BENCH + "\ndone [x]\n"
        self.assertEqual(engines.parse_llama_bench(noisy), engines.parse_llama_bench(LLAMA_BENCH))

    def test_pregate(self):
        found = engines.parse_pregate(PREGATE + "\n")
        self.assertEqual((found[engines.PROMPT], found[engines.DECODE]), ([300.5], [100.0]))
        self.assertEqual(found["reported"]["bytes_per_token"], 153719808)

    def test_bandwidth_is_the_median(self):
        self.assertEqual(engines.parse_membw(MEMBW), 26.31)

    def test_what_is_no_result_is_a_failure(self):
        prompt_only = json.dumps(json.loads(LLAMA_BENCH)[:1])
        for parse, text in (
            (engines.parse_llama_bench, ""),
            (engines.parse_llama_bench, "error: no model\n"),
            (engines.parse_llama_bench, prompt_only),
            (engines.parse_llama_bench, '[{"n_prompt": 512}]'),
            (engines.parse_pregate, LLAMA_BENCH.replace("[", "").replace("]", "")),
            (engines.parse_pregate, PREGATE.replace("100.0", "0.0")),
            (engines.parse_membw, "threads 2"),
        ):
            with self.subTest(parse=parse.__name__, text=text[:30]), self.assertRaises(engines.Failure):
                parse(text)

    def test_help_can_be_printed(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed, self.assertRaises(SystemExit):
            compare.arguments(["--help"])
        self.assertIn("--ik-llama-bench", printed.getvalue())

    def test_setting_argument(self):
        self.assertEqual(engines.setting("a b: -x 1 -y"), ("a b", ("-x", "1", "-y"), ()))
        self.assertEqual(engines.setting("a: A_B=c.d=1 E= -x F=1"), ("a", ("-x", "F=1"), (("A_B", "c.d=1"), ("E", ""))))
        huge = engines.Engine(engines.IK, *[(label, "ik", *rest) for label, *rest in
                                            map(engines.setting, engines.IK_SETTINGS)][1])
        self.assertEqual(huge.environment["GLIBC_TUNABLES"], "glibc.malloc.hugetlb=1")
        self.assertEqual(huge.environment["OMP_PROC_BIND"], "true")
        with self.assertRaises(argparse.ArgumentTypeError):
            engines.setting("-rtr 1")

    def test_model_argument(self):
        self.assertEqual(engines.Model.parse("a=x.gguf"), engines.Model("a", "x.gguf", "x.gguf"))
        self.assertEqual(engines.Model.parse("a=x.gguf,ik=y.gguf"), engines.Model("a", "x.gguf", "y.gguf"))
        for wrong in ("x.gguf", "=x.gguf", "a=", "a=x,y", "a=x,ik="):
            with self.subTest(wrong), self.assertRaises(argparse.ArgumentTypeError):
                engines.Model.parse(wrong)


class Figures(unittest.TestCase):
    samples = [
        (engines.PREGATE, "pregate", 0, 300, 60),
        (engines.LLAMA, "llama.cpp repack=0", 0, 200, 30),
        (engines.LLAMA, "llama.cpp repack=1", 0, 150, 40),
        (engines.IK, "ik_llama.cpp rtr=0", 0, 400, 50),
        (engines.PREGATE, "pregate", 1, 100, 20),
        (engines.LLAMA, "llama.cpp repack=0", 1, 100, 10),
        (engines.LLAMA, "llama.cpp repack=1", 1, 75, 16),
        (engines.IK, "ik_llama.cpp rtr=0", 1, 200, 25),
        (engines.PREGATE, "pregate", 2, 310, 58),
        (engines.LLAMA, "llama.cpp repack=0", 2, 190, 31),
        (engines.LLAMA, "llama.cpp repack=1", 2, 155, 38),
    ]

    def test_medians(self):
        rows = report.medians(record(self.samples))
        self.assertEqual(rows["pregate"][engines.PROMPT], 300)
        self.assertEqual(rows["pregate"][engines.DECODE], 58)
        self.assertEqual(rows["ik_llama.cpp rtr=0"][engines.PROMPT], 300)  # of two: their mean

    def test_the_best_setting_is_chosen_per_metric(self):
        rows = report.medians(record(self.samples))
        self.assertEqual(report.best_of(rows, engines.LLAMA, engines.PROMPT), "llama.cpp repack=0")
        self.assertEqual(report.best_of(rows, engines.LLAMA, engines.DECODE), "llama.cpp repack=1")
        self.assertIsNone(report.best_of(rows, "other", engines.DECODE))

    def test_round_ratios_leave_out_rounds_that_one_engine_missed(self):
        ratios = report.round_ratios(record(self.samples), "pregate", "ik_llama.cpp rtr=0", engines.DECODE)
        self.assertEqual(ratios, [1.2, 0.8])

    def test_table(self):
        made = record(self.samples)
        made["runs"][0]["reported"] = {"bytes_per_token": 200_000_000}
        text = report.table(made)
        self.assertIn(
            "| pregate | 300.0 | 1.58 (1.00–1.63) | 1.00 (0.50–0.75) | 58.0 | 1.53 (1.25–1.53) | 1.55 (0.80–1.20) "
            "| 11.6 | 58% |", text)
        self.assertIn("| llama.cpp repack=1 | 150.0 | 0.79 (0.75–0.82) |", text)
        self.assertIn("not a figure to quote", text)
        widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        self.assertEqual(len(widths), 1)

    def test_what_is_not_known_is_a_dash(self):
        text = report.table(record(self.samples[:1], bandwidth=()))
        self.assertIn("| pregate | 300.0 | – | – | 60.0 | – | – | – | – |", text)


class Running(unittest.TestCase):
    @unittest.skipUnless(Path("/proc/stat").exists(), "counts CPU time as Linux reports it")
    def test_cpu_time_of_children_is_not_that_of_others(self):
        with mock.patch.object(compare, "read_text", return_value="cpu  100 0 0 900 0 0 0 0\n"):
            others = compare.OthersCpu()
        subprocess.run([sys.executable, "-c", "for i in range(3_000_000): pass"], check=True)
        with mock.patch.object(compare, "read_text", return_value="cpu  100 0 0 900 0 0 0 0\n"):
            self.assertEqual(others.share(), 0)
        with mock.patch.object(compare, "read_text", return_value="cpu  100000 0 0 900 0 0 0 0\n"):
            self.assertGreater(others.share(), 0)

    def test_rounds_interleave_the_engines_and_keep_failures(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            calls = folder / "calls"

            def program(name, output, status=0):
                path = folder / name
                (folder / f"{name}.out").write_text(output)
                log = f'echo "{name} $OMP_PROC_BIND $*" >>{calls}'
                path.write_text(f"#!/bin/sh\n{log}\ncat {path}.out\nexit {status}\n")
                path.chmod(path.stat().st_mode | stat.S_IXUSR)
                return str(path)

            model = folder / "m.gguf"
            model.touch()
            argv = ["--pregate", program("ours", PREGATE), "--llama-bench", program("llama", LLAMA_BENCH),
                    "--ik-llama-bench", program("ik", "", status=3), "--membw", program("membw", MEMBW),
                    "--ik-setting", "best: -rtr 1", "--model", f"m={model}", "-r", "2",
                    "--out", str(folder / "raw.json")]
            printed = io.StringIO()
            with (
                mock.patch.dict(os.environ),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                os.environ.pop("OMP_PROC_BIND", None)
                status = compare.main(argv)

            names = [line.split()[0] for line in calls.read_text().splitlines()]
            self.assertEqual(names, 2 * ["membw", "ours", "llama", "llama", "llama", "llama", "ik", "membw"])
            lines = calls.read_text().splitlines()
            self.assertEqual(lines[1], f"ours  bench --model {model} -p 512 -n 64 -t 2 -r 1 --json")
            self.assertEqual(lines[2], f"llama true -m {model} -p 512 -n 64 -t 2 -r 1 --repack 0 -o json")
            self.assertEqual(lines[6], f"ik true -m {model} -p 512 -n 64 -t 2 -r 1 -rtr 1 -o json")

            self.assertEqual(status, 1)
            raw = json.loads((folder / "raw.json").read_text())
            self.assertEqual(len(raw["models"][0]["runs"]), 10)
            self.assertEqual(len(raw["models"][0]["failures"]), 2)
            self.assertIn("exit status 3", raw["models"][0]["failures"][0]["error"])
            self.assertIn("**ik_llama.cpp best failed**: 2 runs.", printed.getvalue())
            self.assertIn("| pregate | 300.5 | 2.35 (2.35–2.35) |", printed.getvalue())

    def test_disturbed_runs_are_repeated_and_left_out(self):
        speeds = iter([10.0, 300.0, 20.0, 310.0] + compare.ATTEMPTS * [30.0])
        shares = iter([0.9, 0.1, 0.5, 0.2] + compare.ATTEMPTS * [0.6])

        class Ours(engines.Engine):
            def parse(self, text):
                speed = next(speeds)
                return {engines.PROMPT: [speed], engines.DECODE: [speed], "reported": {}}

        with tempfile.NamedTemporaryFile() as model:
            options = compare.arguments([
                "--pregate", sys.executable, "--model", f"m={model.name}", "-r", "3", "--others-limit", "0.25",
                "--out", "raw.json"])
        with (
            mock.patch.object(compare, "output_of", return_value=""),
            mock.patch.object(compare.OthersCpu, "share", lambda self: next(shares)),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            ours = Ours(engines.PREGATE, "", sys.executable, ())
            made = compare.run_model(options.model[0], [ours], options, lambda record: None)
        self.assertEqual([run[engines.PROMPT] for run in made["runs"]], [[300.0], [310.0]])
        self.assertEqual([run["round"] for run in made["disturbed"]], [0, 1] + compare.ATTEMPTS * [2])
        self.assertIn("7 disturbed runs left out.", report.table(made))
        self.assertIn("**pregate failed**: 1 runs.", report.table(made))


if __name__ == "__main__":
    unittest.main()
