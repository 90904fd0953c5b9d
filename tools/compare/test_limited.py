import contextlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import compare
import engines
import limited
import limited_report
import limits
import rss

LLAMA_BENCH = '[{"n_prompt": 0, "n_gen": 8, "samples_ts": [1.5, 2.0], "build_number": 1}]'
# Two rows of `llama-sweep-bench --output-format jsonl`, among its log.
SWEEP = """\
llm_load_print_meta: n_ctx_train = 40960
{"n_kv_max": 256, "pp": 128, "tg": 8, "n_kv": 0, "t_pp": 9.5, "speed_pp": 13.4, "t_tg": 9.5, "speed_tg": 0.838538 }
{"n_kv_max": 256, "pp": 128, "tg": 8, "n_kv": 128, "t_pp": 9.5, "speed_pp": 13.4, "t_tg": 5.1, "speed_tg": 1.548842 }
"""
LAYER = {"hits": 6, "in_flight": 1, "misses": 1, "bytes_demand": 3000, "bytes_prefetch": 1000, "stall_ns": 5}
PREGATE = json.dumps({
    "decode_tok_s": [3.0], "prompt_tok_s": [], "bytes_per_token": 99,
    "stats": {"decode": {"tokens": 2, "layers": [LAYER, LAYER]}},
})


def sandbox(test):
    folder = tempfile.TemporaryDirectory()
    test.addCleanup(folder.cleanup)
    return Path(folder.name)


def program(folder, name, lines):
    path = folder / name
    path.write_text("#!/bin/sh\n" + lines + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def rmdir_of_a_group(path):
    """As the controller does it: a group's files go with it."""
    for file in path.iterdir():
        file.unlink()
    os.rmdir(path)


class Group(unittest.TestCase):
    """A folder stands for the controller."""

    def setUp(self):
        self.parent = sandbox(self)
        self.group = limits.MemoryGroup(12345, self.parent)
        patch = mock.patch.object(Path, "rmdir", rmdir_of_a_group)
        patch.start()
        self.addCleanup(patch.stop)

    def test_the_limit_holds_before_the_program_starts_in_the_group(self):
        with self.group as group:
            self.assertEqual((group.path / "memory.limit_in_bytes").read_text(), "12345")
            command = group.command([sys.executable, "-c", "import os, sys; print(os.getpid(), sys.argv)", "a b", "$c"])
            done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            printed = done.communicate()[0].split(maxsplit=1)
            self.assertEqual(printed[1].strip(), "['-c', 'a b', '$c']")
            member = (group.path / "cgroup.procs").read_text().strip()
            self.assertEqual([member, str(done.pid)], 2 * [printed[0]])
        self.assertEqual(list(self.parent.iterdir()), [])

    def test_it_is_removed_when_the_run_fails(self):
        with self.assertRaises(ZeroDivisionError), self.group:
            raise ZeroDivisionError
        self.assertEqual(list(self.parent.iterdir()), [])

    def test_no_controller_is_a_failure_that_says_what_is_needed(self):
        with self.assertRaisesRegex(engines.Failure, "root and cgroup v1"), limits.MemoryGroup(1, self.parent / "none"):
            pass


class ReadAhead(unittest.TestCase):
    def setUp(self):
        self.setting = sandbox(self) / "read_ahead_kb"
        self.setting.write_text("8192\n")

    def value(self):
        return self.setting.read_text().strip()

    def test_it_is_set_and_put_back(self):
        with limits.readahead(self.setting, 128):
            self.assertEqual(self.value(), "128")
        self.assertEqual(self.value(), "8192")
        with limits.readahead(self.setting, None):
            self.assertEqual(self.value(), "8192")

    def test_it_is_put_back_after_an_error(self):
        with self.assertRaises(ZeroDivisionError), limits.readahead(self.setting, 128):
            raise ZeroDivisionError
        self.assertEqual(self.value(), "8192")

    def test_it_is_put_back_after_the_process_was_killed(self):
        code = ("import sys, time, limits\n"
                "with limits.readahead(sys.argv[1], 128):\n"
                "    print('set', flush=True); time.sleep(60)")
        process = subprocess.Popen([sys.executable, "-c", code, str(self.setting)], stdout=subprocess.PIPE, text=True,
                                   cwd=Path(limits.__file__).parent)
        with process:
            self.assertEqual(process.stdout.readline().strip(), "set")
            self.assertEqual(self.value(), "128")
            process.kill()
        deadline = time.monotonic() + 10
        while self.value() != "8192" and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertEqual(self.value(), "8192")

    def test_a_device_that_takes_another_value_is_a_failure(self):
        with mock.patch.object(Path, "read_text", return_value="8192\n"):
            with self.assertRaisesRegex(engines.Failure, "128 was written"), limits.readahead(self.setting, 128):
                pass

    def test_the_setting_of_a_partition_is_its_disks(self):
        devices = sandbox(self)
        model = devices / "m"
        model.touch()
        number = os.stat(model).st_dev
        (devices / "disk/queue").mkdir(parents=True)
        (devices / "disk/part").mkdir()
        (devices / f"{os.major(number)}:{os.minor(number)}").symlink_to(devices / "disk/part")
        with self.assertRaisesRegex(engines.Failure, "no block device"):
            limits.readahead_setting(model, devices)
        (devices / "disk/queue/read_ahead_kb").touch()
        self.assertEqual(limits.readahead_setting(model, devices),
                         Path(os.path.realpath(devices)) / "disk/queue/read_ahead_kb")


class Disk(unittest.TestCase):
    def setUp(self):
        # Not in /tmp, which may be memory.
        self.folder = tempfile.TemporaryDirectory(dir=Path(__file__).parent)
        self.addCleanup(self.folder.cleanup)
        kind = subprocess.run(["stat", "-f", "-c", "%T", self.folder.name], capture_output=True, text=True, check=False)
        if kind.stdout.strip() == "tmpfs":
            self.skipTest("the checkout is in memory, not on a disk")
        self.path = Path(self.folder.name) / "file"
        self.path.write_bytes(os.urandom(3 * limits.READ_BYTES))

    def test_a_dropped_file_is_not_cached(self):
        self.path.read_bytes()
        self.assertEqual(limits.cached_share(self.path), 1.0)
        with mock.patch.object(os, "posix_fadvise"), self.assertRaisesRegex(engines.Failure, "100% of .* stay"):
            limits.drop_cache(self.path)
        limits.drop_cache(self.path)
        self.assertLess(limits.cached_share(self.path), limits.CACHED_SHARE)

    def test_bandwidth_counts_every_block_once(self):
        with mock.patch.object(limits.os, "preadv", wraps=os.preadv) as reads:
            self.assertGreater(limits.disk_gb_s(self.path, "seed", limit_s=60), 0)
        self.assertEqual(sorted(call.args[2] for call in reads.call_args_list), [i * limits.READ_BYTES for i in range(3)])

    def test_a_small_file_is_a_failure(self):
        self.path.write_bytes(b"x")
        with self.assertRaises(engines.Failure):
            limits.disk_gb_s(self.path, "seed")


class Watching(unittest.TestCase):
    def test_memory_and_output(self):
        code = "import sys, time; x = b'1' * (64 << 20); print('out'); print('err', file=sys.stderr); time.sleep(0.3); " \
               "open('left-behind', 'w')"
        ran = limits.watch([sys.executable, "-c", code], {}, 60)
        self.assertEqual((ran.stdout, ran.stderr), ("out\n", "err\n"))
        self.assertGreater(ran.peak_anonymous_bytes, 64 << 20)
        self.assertLess(ran.peak_anonymous_bytes, 128 << 20)
        self.assertGreater(ran.wall_s, 0.3)
        self.assertFalse(Path("left-behind").exists())

    def test_what_fails_or_takes_too_long_is_a_failure(self):
        with self.assertRaisesRegex(engines.Failure, "exit status 3: why"):
            limits.watch(["/bin/sh", "-c", "echo why >&2; exit 3"], {}, 60)
        started = time.monotonic()
        with self.assertRaisesRegex(engines.Failure, "ran past"):
            limits.watch(["/bin/sleep", "60"], {}, 0.2)
        self.assertLess(time.monotonic() - started, 30)
        with self.assertRaises(engines.Failure):
            limits.watch(["/no/program"], {}, 1)

    def test_bytes_of_the_last_seconds(self):
        ran = limits.Ran("", "", 10.0, 0, [(1.0, 0), (4.0, 300), (8.0, 700), (10.0, 900)])
        self.assertEqual(ran.read_in_last(2.0), 200)
        self.assertEqual(ran.read_in_last(4.0), 400)
        self.assertEqual(ran.read_in_last(60.0), 900)
        self.assertIsNone(limits.Ran("", "", 1.0, 0, []).read_in_last(1.0))

    def test_termination_is_an_exception(self):
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        self.addCleanup(lambda: [signal.signal(*pair) for pair in before.items()])
        limits.stop_on_signals()
        with self.assertRaises(SystemExit) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        self.assertEqual(stopped.exception.code, 128 + signal.SIGTERM)


class Parsing(unittest.TestCase):
    def test_sweep(self):
        self.assertEqual(limited.parse_sweep(SWEEP), [0.838538, 1.548842])
        for wrong in ("", SWEEP.splitlines()[1], '{"x": 1}\n{"x": 2}', SWEEP.replace("1.548842", "0.0"), "{"):
            with self.subTest(wrong[:20]), self.assertRaises(engines.Failure):
                limited.parse_sweep(wrong)

    def test_streaming_statistics(self):
        self.assertEqual(limited.streamed(json.loads(PREGATE)),
                         {"bytes_per_token": 4000, "hit_ratio": 0.75, "belady_hit_ratio": None})
        self.assertEqual(limited.streamed({}), {})
        self.assertEqual(limited.streamed({"stats": {"decode": {"tokens": 0, "layers": [LAYER]}}}), {})

    def test_without_a_prompt_only_decode_is_asked_for(self):
        self.assertEqual(engines.parse_pregate(PREGATE, (engines.DECODE,))[engines.DECODE], [3.0])
        with self.assertRaises(engines.Failure):
            engines.parse_pregate(PREGATE)

    def test_paths_hold_in_another_folder(self):
        here = os.path.relpath(sys.executable)
        options = limited.arguments(["--pregate", here, "--model", f"m={here}", "--out", "x"])
        self.assertEqual([options.pregate, options.model[0].path, options.model[0].ik_path, options.llama_bench],
                         [*3 * [os.path.abspath(here)], None])

    def test_shares_are_checked(self):
        for wrong in (["0"], ["101"], ["50", "50"]):
            argv = ["--pregate", sys.executable, "--model", f"m={sys.executable}", "--out", "x"]
            for share in wrong:
                argv += ["--share", share]
            with self.subTest(wrong), self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                limited.arguments(argv)


class Figures(unittest.TestCase):
    def test_the_smaller_bound_holds(self):
        self.assertEqual(limited_report.bound(250e6, 1.0, 40.0), (4.0, "disk"))
        self.assertEqual(limited_report.bound(10e6, 1.0, 40.0), (40.0, "compute"))
        self.assertEqual(limited_report.bound(0, 1.0, 40.0), (40.0, "compute"))
        self.assertIsNone(limited_report.bound(None, 1.0, 40.0))
        self.assertIsNone(limited_report.bound(10e6, None, None))

    def test_table(self):
        def run(family, engine, number, tok_s, streamed):
            return {"family": family, "engine": engine, "round": number, "others_cpu": 0.01, engines.DECODE: [tok_s],
                    "streamed": streamed, "peak_anonymous_bytes": 100 << 20}
        streamed = {"bytes_per_token": 200e6, "hit_ratio": 0.5, "belady_hit_ratio": 0.625}
        record = {
            "label": "m at 50%", "path": "m.gguf", "ik_path": "m.gguf", "share": 50, "budget_bytes": 1 << 30,
            "file_bytes": 2 << 30, "disk_gb_s": [{"gb_s": 0.9}, {"gb_s": 1.1}, {"gb_s": 1.0}], "disturbed": [],
            "failures": [],
            "runs": [run(engines.PREGATE, "pregate", 0, 4.5, streamed), run(engines.PREGATE, "pregate", 1, 4.0, streamed),
                     run(engines.LLAMA, "llama.cpp mmap", 0, 2.0, {"bytes_per_token": 400e6}),
                     run(engines.LLAMA, "llama.cpp mmap", 1, 3.0, {"bytes_per_token": 400e6}),
                     run(engines.IK, "ik_llama.cpp prefetch", 0, 2.5, {})],
        }
        text = limited_report.table(record, {"runs": [{engines.DECODE: [30.0]}, {engines.DECODE: [50.0]}]})
        self.assertIn("| pregate | 4.25 | 1.70 (1.33–2.25) | 1.70 (1.80–1.80) | 200.0 | 50.0% | 62.5% | 5.00 (disk) | 85% "
                      "| 100 |", text)
        self.assertIn("| llama.cpp mmap | 2.50 | 1.00 | 1.00 (0.80–0.80) | 400.0 | – | – | 2.50 (disk) | 100% |", text)
        self.assertIn("| ik_llama.cpp prefetch | 2.50 | 1.00 (1.25–1.25) | 1.00 | – |", text)
        self.assertIn("Memory 1024 MiB, 50% of 2.15 GB.", text)
        self.assertIn("ik_llama.cpp prefetch: 1 of the rounds.", text)
        self.assertIn("not a figure to quote", text)
        self.assertEqual(len({line.count("|") for line in text.splitlines() if line.startswith("|")}), 1)


class Running(unittest.TestCase):
    def setUp(self):
        self.folder = sandbox(self)
        self.calls = self.folder / "calls"
        self.setting = self.folder / "read_ahead_kb"
        self.setting.write_text("8192\n")
        self.groups = self.folder / "groups"
        self.groups.mkdir()

    def engine(self, name, output, status=0):
        (self.folder / f"{name}.out").write_text(output)
        log = f'echo "{name} $(cat {self.setting}) $(cat {self.groups}/*/memory.limit_in_bytes 2>/dev/null) $*"'
        return program(self.folder, name, f"{log} >>{self.calls}\ncat {self.folder}/{name}.out\nexit {status}")

    def test_rounds_alternate_and_only_peers_are_limited(self):
        model, ik = self.folder / "m.gguf", self.folder / "ik.gguf"
        model.write_bytes(bytes(1000))
        ik.write_bytes(bytes(1000))

        argv = ["--pregate", self.engine("ours", PREGATE), "--llama-bench", self.engine("llama", LLAMA_BENCH),
                "--ik-llama-bench", self.engine("ik", "", status=3), "--ik-sweep-bench", self.engine("sweep", SWEEP),
                "--model", f"m={model},ik={ik}", "--share", "25", "--share", "50", "-n", "8", "-r", "2",
                "--machine-readahead-n", "4", "--out", str(self.folder / "raw.json")]
        printed = io.StringIO()
        init = limits.MemoryGroup.__init__
        with (
            mock.patch.object(limits.MemoryGroup, "__init__", lambda group, limit: init(group, limit, self.groups)),
            mock.patch.object(Path, "rmdir", rmdir_of_a_group),
            mock.patch.object(limits.MemoryGroup, "peak_bytes", return_value=7),
            mock.patch.object(limits, "readahead_setting", return_value=self.setting),
            mock.patch.object(limits, "drop_cache") as dropped,
            mock.patch.object(limits, "disk_gb_s", return_value=1.25) as disk,
            mock.patch.object(limits, "stop_on_signals"),
            contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()),
        ):
            status = limited.main(argv)

        lines = self.calls.read_text().splitlines()
        share = lambda budget: [
            f"ours 8192  bench --model {model} --ram {budget} -p 0 -n 8 -t 2 -r 1 --json",
            f"llama 128 {budget} -m {model} -p 0 -n 8 -t 2 -r 2 --repack 0 --load-mode mmap -o json",
            f"ik 128 {budget} -m {ik} -p 0 -n 8 -t 2 -r 2 -fmoe 1 -rtr 0 -mmp 1 -o json",
            f"sweep 128 {budget} -m {ik} -c 256 -b 128 -ub 128 -n 8 -t 2 --prefetch-experts --output-format jsonl",
        ]
        whole = [f"ours 8192  bench --model {model} -p 0 -n 8 -t 2 -r 1 --json"]
        once = lambda budget: [f"llama 8192 {budget} -m {model} -p 0 -n 4 -t 2 -r 2 --repack 0 --load-mode mmap -o json"]
        self.assertEqual(lines, whole + share(250) + once(250) + share(500) + once(500) + whole + share(250) + share(500))
        self.assertEqual(dropped.call_count, len(lines))
        self.assertEqual(disk.call_count, 8)
        self.assertEqual(len({call.args[1] for call in disk.call_args_list}), 8)
        self.assertEqual(list(self.groups.iterdir()), [])
        self.assertEqual(self.setting.read_text(), "8192\n")

        self.assertEqual(status, 1)
        raw = json.loads((self.folder / "raw.json").read_text())
        self.assertEqual([made["label"] for made in raw["models"]], ["m at 25%", "m at 50%", "m resident"])
        self.assertEqual(len(raw["models"][0]["runs"]), 7)
        llama = raw["models"][0]["runs"][1]
        self.assertEqual((llama[engines.DECODE], llama["warm_up_tok_s"], llama["group_bytes"]), ([2.0], [1.5], 250))
        self.assertEqual(len(raw["models"][2]["runs"]), 2)
        self.assertIn("exit status 3", raw["models"][0]["failures"][0]["error"])
        self.assertIn("**ik_llama.cpp mmap failed**: 2 runs.", printed.getvalue())
        self.assertIn("pregate with all of it in memory 3.0 tok/s", printed.getvalue())

    def test_a_model_that_is_streamed_gives_no_compute_bound(self):
        model = engines.Model("m", sys.executable, sys.executable)
        options = limited.arguments(["--pregate", sys.executable, "--model", f"m={sys.executable}", "--out", "x"])
        for placement, failed in (("whole", False), ("streaming", True)):
            answer = json.dumps({**json.loads(PREGATE), "placement": placement})
            ours = limited.Limited(engines.PREGATE, "", self.engine("ours", answer))
            with mock.patch.object(limits, "drop_cache"), mock.patch.object(limits.MemoryGroup, "__enter__"):
                self.assertEqual("error" in limited.run_once(ours, model, None, options, 0), failed)

    def test_pregate_may_be_limited_too(self):
        options = limited.arguments(["--pregate", sys.executable, "--model", f"m={sys.executable}", "--out", "x",
                                     "--pregate-group-mib", "64"])
        self.assertEqual([engine.group_extra_bytes for engine in limited.contenders(options)], [64 << 20])


class Budget(unittest.TestCase):
    def test_more_than_the_budget_and_the_allowance_is_an_error(self):
        folder = sandbox(self)
        model = folder / "m.gguf"
        model.write_bytes(bytes(1000))
        code = "import sys, time; assert sys.argv[-4:] == ['--model', sys.argv[-3], '--ram', '500'], sys.argv\n" \
               "x = b'1' * (int(sys.argv[1]) << 20); time.sleep(0.1)"
        ours = program(folder, "ours", f"exec {sys.executable} -c \"{code}\" \"$@\"")
        for mib, status, answer in ((1, 0, "| yes |"), (80, 1, "| **no** |")):
            with self.subTest(mib), contextlib.redirect_stdout(io.StringIO()) as printed, \
                    mock.patch.object(limits, "stop_on_signals"):
                self.assertEqual(status, rss.main([
                    "--pregate", ours, "--model", str(model), "--share", "50", "--arguments", str(mib),
                    "--out", str(folder / "raw.json")]))
                self.assertIn(answer, printed.getvalue())
        self.assertEqual(json.loads((folder / "raw.json").read_text())["models"][0]["budget_bytes"], 500)

    def test_a_run_that_fails_is_not_a_budget_that_was_kept(self):
        folder = sandbox(self)
        model = folder / "m.gguf"
        model.write_bytes(bytes(1000))
        with contextlib.redirect_stdout(io.StringIO()) as printed, mock.patch.object(limits, "stop_on_signals"):
            self.assertEqual(1, rss.main(["--pregate", program(folder, "ours", "exit 2"), "--model", str(model)]))
        self.assertEqual(printed.getvalue().count("**failed**"), 3)


if __name__ == "__main__":
    unittest.main()
