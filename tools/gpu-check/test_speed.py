"""speed.py with programs that behave like the real ones; `python3 -m unittest discover -s tools/gpu-check`."""

import contextlib
import io
import json
import os
import stat
import sys
import tempfile
import unittest
from unittest import mock

import engines
import report
import speed

GIB = engines.GIB

# Each notes its arguments in `calls`. The GPU's memory in use stands in `used`.
PREGATE = """
if sys.argv[1] == "doctor":
    link = {"generation": 4, "width": 8, "gt_s": 16.0, "gb_s": 15.75}
    gpu = {"name": "Test GPU", "driver": "12.4", "memory_bytes": 1 << 33, "is_standin": False, "speed": None,
           "link": {"now": link, "most": dict(link, width=16)}}
    print(json.dumps({"gpus": [gpu]}))
    sys.exit()
if "--help" in sys.argv:
    sys.exit(print("--vram --misses --graphs"))
note()
if value("--misses") == "copy":
    sys.exit("pregate: the copy failed")
speed = 20.0 if value("--forecast", "") == "none" else 30.0
n = int(value("-r"))
print(json.dumps({"prompt_tok_s": [400.0] * n, "decode_tok_s": [speed] * n, "read_bandwidth_gb_s": 500.0,
                  "placement": "gpu", "split": {"predicted_tok_s": 40.0, "binds": "link", "hit_ratio": 0.5}}))
"""

LLAMA = """
note()
ncmoe = int(value("-ncmoe"))
if ncmoe == 0:
    sys.exit("ggml: out of memory")
with open(used, "w") as file:
    file.write(str(1000 + 512 - ncmoe * 150))
time.sleep(0.6)
with open(used, "w") as file:
    file.write("1000")
n = int(value("-r"))
print("warning: a line")
print(json.dumps([{"n_prompt": 8, "n_gen": 0, "samples_ts": [90.0] * n}, {"n_prompt": 0, "n_gen": 2, "samples_ts": [10.0] * n}]))
"""

NVIDIA_SMI = """
if "memory.used" in sys.argv[1]:
    print(open(used).read())
else:
    print("550.54.14")
"""

RANDOM_MODEL = """
note()
open(sys.argv[2], "wb").write(b"x" * 100)
"""


class WholeRuns(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.write("used", "1000")
        for name, body in (("pregate", PREGATE), ("llama-bench", LLAMA), ("nvidia-smi", NVIDIA_SMI), ("random_model", RANDOM_MODEL)):
            self.write(name, f"""#!{sys.executable}
import json, sys, time
used = {self.path("used")!r}
def value(name, default=None):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default
def note():
    with open({self.path("calls")!r}, "a") as file:
        file.write(json.dumps(sys.argv) + "\\n")
{body}""")
        patched = mock.patch.dict(os.environ, PATH=f"{self.folder}:{os.environ['PATH']}")
        patched.start()
        self.addCleanup(patched.stop)

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.path(name), stat.S_IRWXU)

    def run_speed(self, *more):
        words = ["tiny", "--pregate", self.path("pregate"), "--random-model", self.path("random_model"),
                 "--out", self.folder, "--work", self.folder, "--version", "commit 1", *more]
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = speed.main(words)
        with contextlib.suppress(FileNotFoundError):
            with open(self.path("calls"), encoding="utf-8") as file:
                return code, out.getvalue() + errors.getvalue(), [json.loads(line) for line in file]
        return code, out.getvalue() + errors.getvalue(), []

    def test_pregate_beside_the_best_ncmoe_that_fits_and_interleaved(self):
        code, text, calls = self.run_speed("--llama", self.folder, "--llama-arguments=-fa 1", "--samples", "3")
        # 384 MiB: 512 - 150 fits with one layer's experts on the processor, 512 does not.
        self.assertIn("| uniform | 0.375 | llama.cpp -ncmoe 1 -fa 1 | 90.0 | 10.00 | 10.00 to 10.00 |  | 3 |", text)
        self.assertIn("| uniform | 0.375 | pregate | 400.0 | 30.00 | 30.00 to 30.00 | 75% | 3 |", text)
        self.assertIn("| local | 0.375 | pregate, no forecast | 400.0 | 20.00 | 20.00 to 20.00 | 50% | 3 |", text)
        self.assertIn("Test GPU, driver 550.54.14, PCIe 4.0 x8 (at most 4.0 x16)", text)
        measured = [os.path.basename(call[0]) for call in calls if "-r" in call and call[call.index("-n") + 1] != "1"]
        self.assertEqual(measured[:6], ["pregate", "llama-bench"] * 3)
        # One that fails is told, and the others go on.
        self.assertEqual(code, 1)
        self.assertIn("FAILED: uniform, 0.375 GiB, pregate, misses copy: exit code 1: pregate: the copy failed", text)
        with open(self.path("speed-tiny.jsonl"), encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        self.assertEqual(lines[0]["machine"]["driver"], "550.54.14")
        llama = next(line for line in lines if "gpu_bytes" in line)
        self.assertEqual(llama["gpu_bytes"], 362 << 20)
        with open(self.path("speed-tiny.md"), encoding="utf-8") as file:
            self.assertIn(file.read(), text)

    def test_a_model_is_made_for_each_routing_and_only_one_is_kept(self):
        _, _, calls = self.run_speed("--samples", "1")
        made = [call for call in calls if call[0].endswith("random_model")]
        self.assertEqual([call[call.index("--embedding") + 1] for call in made], ["4", "0.03"])
        self.assertFalse([name for name in os.listdir(self.folder) if name.endswith(".gguf")])

    def test_what_there_is_no_time_for_is_told(self):
        make, seen = speed.make_model, []

        def until_the_third(*arguments):
            seen.append(arguments)
            if len(seen) > 2:
                raise engines.NoTime
            return make(*arguments)

        with mock.patch.object(speed, "make_model", until_the_third):
            code, text, _ = self.run_speed("--samples", "2")
        self.assertEqual(code, 0)
        self.assertIn("| uniform | 0.375 | pregate | 400.0 | 30.00 | 30.00 to 30.00 | 75% | 2 |", text)
        self.assertIn("time was over in round 1 of 1: uniform, 0.375 GiB, pregate, no forecast", text)
        self.assertIn("not run, no time left: local, 0.375 GiB, pregate", text)

    def test_a_program_that_hangs_ends_with_the_limit(self):
        with self.assertRaises(engines.NoTime):
            engines.Clock(0.3).run(["sleep", "30"], expected_s=0.0)
        with self.assertRaises(engines.NoTime):
            engines.Clock(3.0).run(["sleep", "30"], expected_s=5.0)

    def test_switches_become_arguments(self):
        _, _, calls = self.run_speed("--samples", "1")
        asked = {" ".join(call[4:call.index("-p")]) for call in calls if call[0].endswith("pregate")}
        usual = "--device cuda --vram 384M --misses"
        self.assertEqual(asked, {f"{usual} auto", f"{usual} auto --forecast none", f"{usual} cpu", f"{usual} copy",
                                 f"{usual} auto --graphs off"})

    def test_a_pregate_without_graphs_is_told_and_no_failure(self):
        with open(self.path("pregate"), encoding="utf-8") as file:
            old = file.read().replace(" --graphs", "").replace('== "copy"', '== "never"')
        self.write("pregate", old)
        code, text, calls = self.run_speed("--samples", "1")
        self.assertEqual(code, 0)
        self.assertIn("not run, this pregate has no --graphs: uniform, pregate, no graph", text)
        self.assertFalse([call for call in calls if "--graphs" in call])

    def test_a_machine_without_llama_bench_or_a_gpu_is_refused(self):
        os.remove(self.path("llama-bench"))
        self.assertEqual(self.run_speed("--llama", self.folder)[0], 1)
        self.write("pregate", f"#!{sys.executable}\nprint('{{\"gpus\": []}}')\n")
        code, text, _ = self.run_speed()
        self.assertEqual(code, 1)
        self.assertIn("finds no GPU", text)


class Parts(unittest.TestCase):
    def test_the_smallest_that_fits_from_either_side(self):
        for start in range(0, 11):
            asked = []
            peak = lambda n: asked.append(n) or (1000 - 90 * n)
            self.assertEqual(engines.smallest(peak, start, 10, 500), (6, 460), start)
        with self.assertRaisesRegex(engines.Failure, "every expert"):
            engines.smallest(lambda n: 1000, 8, 10, 500)
        self.assertEqual(engines.smallest(lambda n: 5, 3, 10, 500), (0, 5))

    def test_a_guess_is_near(self):
        # 17.3 GB of which 12 GiB may be taken: a bit more than a third on the processor.
        self.assertEqual(engines.guess(17_302_547_488, 48, 12), 15)
        self.assertEqual(engines.guess(17_302_547_488, 48, 24), 0)
        self.assertEqual(engines.guess(17_302_547_488, 48, 1), 48)

    def test_reports_that_are_none_are_refused(self):
        for text in ("", "{}", '{"split": null, "prompt_tok_s": [0], "decode_tok_s": [1]}', "[]"):
            with self.assertRaises(engines.Failure, msg=text):
                engines.parse_pregate(text)
        for text in ("", "[]", '[{"n_gen": 2, "samples_ts": [1.0]}]', '[{"n_gen": 2, "samples_ts": []}]'):
            with self.assertRaises(engines.Failure, msg=text):
                engines.parse_llama(text)

    def test_groups_have_every_switch_and_size_and_begin_with_the_head_to_head(self):
        for name, shape in speed.SHAPES.items():
            groups = speed.groups(shape)
            self.assertEqual(groups[0], [engines.Config(vram_gib=shape.vram_gib)], name)
            every = [config for group in groups for config in group]
            self.assertEqual(len(every), len(set(every)), name)
            for routing in ("uniform", "local"):
                own = [config for config in every if config.routing == routing]
                self.assertEqual({c.vram_gib for c in own}, {shape.vram_gib, *shape.others_gib})
                self.assertEqual({c.misses for c in own}, {"auto", "cpu", "copy"})
                self.assertEqual({c.forecast for c in own} & {c.graphs for c in own}, {True, False})
        sizes = {config.vram_gib for group in speed.groups(speed.SHAPES["qwen"]) for config in group}
        self.assertEqual(sizes, {4, 8, 12, 16, 24})

    def test_a_link_that_is_not_known_is_said_so(self):
        self.assertEqual(report.link({"link": None}), "PCIe link unknown")


if __name__ == "__main__":
    unittest.main()
