"""What a run of a model larger than memory needs from the machine (Linux).

A memory-limited group for a peer, the readahead of the block device under a
file, a file that is not in the page cache, the speed of the disk, and what a
process holds and reads while it runs.
"""

import contextlib
import ctypes
import dataclasses
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from engines import Failure

# The memory controller of control groups, version 1.
GROUPS = Path("/sys/fs/cgroup/memory")
# Share of a file that may stay in the page cache after it was dropped.
CACHED_SHARE = 0.01
SAMPLE_S = 0.02
READ_BYTES = 2 << 20
READERS = 8


def stop_on_signals():
    """Terminated or hung up is an exception as an interrupt is, so that what was changed is put back."""
    def stop(number, _frame):
        sys.exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


class MemoryGroup:
    """A group of its own with at most `limit_bytes` of memory, page cache included; removed at the end."""

    def __init__(self, limit_bytes, parent=GROUPS):
        self.limit_bytes = limit_bytes
        self.path = Path(parent) / f"pregate-compare-{os.getpid()}"

    def __enter__(self):
        try:
            self.path.mkdir()
        except OSError as error:
            raise Failure(f"no memory-limited group (needs root and cgroup v1): {error}") from error
        try:
            self._file("memory.limit_in_bytes").write_text(str(self.limit_bytes), encoding="ascii")
        except OSError as error:
            self._remove()
            raise Failure(f"{self.path}: no limit of {self.limit_bytes} bytes: {error}") from error
        return self

    def __exit__(self, *_):
        # What the group still caches would be charged to nobody's account.
        with contextlib.suppress(OSError):
            self._file("memory.force_empty").write_text("0", encoding="ascii")
        self._remove()

    def _file(self, name):
        return self.path / name

    def _remove(self):
        for _ in range(50):
            try:
                return self.path.rmdir()
            except OSError as error:
                busy = error
                time.sleep(0.1)
        raise Failure(f"cannot remove {self.path}: {busy}")

    def command(self, command):
        """`command` inside the group, from its first instruction and under the same process id."""
        return ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self._file("cgroup.procs")), *command]

    def peak_bytes(self):
        return int(self._file("memory.max_usage_in_bytes").read_text(encoding="ascii"))


def readahead_setting(path, devices=Path("/sys/dev/block")):
    """The file in /sys that holds the readahead of the device below `path`."""
    device = os.stat(path).st_dev
    place = Path(os.path.realpath(devices / f"{os.major(device)}:{os.minor(device)}"))
    for folder in (place, place.parent):  # a partition has its disk's queue
        setting = folder / "queue" / "read_ahead_kb"
        if setting.is_file():
            return setting
    raise Failure(f"{path}: no block device with a readahead below it")


@contextlib.contextmanager
def readahead(setting, kib):
    """Sets a device's readahead, and puts the old value back however this process ends.

    A shell waits for the end of a pipe and restores: also when this process is killed.
    """
    if kib is None:
        yield
        return
    setting = Path(setting)
    try:
        before = setting.read_text(encoding="ascii").strip()
    except OSError as error:
        raise Failure(f"cannot read the readahead: {error}") from error
    keeper = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; echo "$0" >"$1"', before, str(setting)],
        stdin=subprocess.PIPE, start_new_session=True,
    )
    try:
        try:
            setting.write_text(f"{kib}\n", encoding="ascii")
            after = setting.read_text(encoding="ascii").strip()
        except OSError as error:
            raise Failure(f"cannot set the readahead (needs root): {error}") from error
        if after != str(kib):
            raise Failure(f"{setting}: readahead is {after} KiB, {kib} was written")
        yield
    finally:
        keeper.stdin.close()
        keeper.wait()


def cached_share(path):
    """Share of a file's pages that are in the page cache (mincore, see man 2 mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    for function in (libc.mincore, libc.munmap):
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p][:3 if function is libc.mincore else 2]
    size = os.path.getsize(path)
    if not size:
        return 0.0
    file = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    finally:
        os.close(file)
    if address == ctypes.c_void_p(-1).value:
        raise Failure(f"cannot map {path}: {os.strerror(ctypes.get_errno())}")
    try:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        if libc.mincore(address, size, pages):
            raise Failure(f"mincore of {path}: {os.strerror(ctypes.get_errno())}")
        return bytes(page & 1 for page in pages).count(1) / len(pages)
    finally:
        libc.munmap(address, size)


def drop_cache(path):
    """Takes a file out of the page cache, so that nobody starts with pages that are not on its account."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # dirty pages stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    share = cached_share(path)
    if share > CACHED_SHARE:
        raise Failure(f"{share:.0%} of {path} stay in the page cache: does another program map it?")


def disk_gb_s(path, seed, limit_s=2.0, readers=READERS):
    """GB/s (10^9 bytes) of random 2 MiB O_DIRECT reads of a file by several threads, until `limit_s` or its end."""
    blocks = list(range(os.path.getsize(path) // READ_BYTES))
    random.Random(seed).shuffle(blocks)
    if not blocks:
        raise Failure(f"{path} is too small to measure the disk with")
    order, lock, failures = iter(blocks), threading.Lock(), []
    read, started = [0] * readers, time.monotonic()

    def work(number, file):
        buffer = mmap.mmap(-1, READ_BYTES)  # page-aligned, as O_DIRECT asks for
        while time.monotonic() - started < limit_s:
            with lock:
                block = next(order, None)
            if block is None:
                return
            try:
                read[number] += os.preadv(file, [buffer], block * READ_BYTES)
            except OSError as error:
                failures.append(error)
                return

    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise Failure(f"{path} cannot be read past the page cache: {error}") from error
    try:
        threads = [threading.Thread(target=work, args=(number, file)) for number in range(readers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.close(file)
    if failures:
        raise Failure(f"reading {path} past the page cache: {failures[0]}")
    return sum(read) / (time.monotonic() - started) / 1e9


@dataclasses.dataclass(frozen=True)
class Ran:
    """One finished program. `read` are (seconds since its start, bytes it had read from disk)."""

    stdout: str
    stderr: str
    wall_s: float
    peak_anonymous_bytes: int
    read: list

    def read_in_last(self, seconds):
        """Bytes read from disk in the last seconds of its life."""
        if not self.read:
            return None
        border = max(0.0, self.wall_s - seconds)
        before = (0.0, 0)
        for sample in self.read:
            if sample[0] >= border:
                step = sample[0] - before[0]
                part = (border - before[0]) / step if step else 1.0
                return round(self.read[-1][1] - before[1] - part * (sample[1] - before[1]))
            before = sample
        return 0


def held_bytes(process):
    """RssAnon + RssShmem of a process: its memory without the page cache (man 5 proc_pid_status)."""
    kib = 0
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kib += int(line.split()[1])
    return kib * 1024


def read_bytes(process):
    """Bytes that a process had fetched from storage, page faults and readahead included (man 5 proc_pid_io)."""
    for line in Path(f"/proc/{process}/io").read_text(encoding="ascii").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def watch(command, environment, limit_s):
    """Runs a program to its end, in a folder of its own, and samples what it holds and reads."""
    peak, read = 0, []
    with (
        tempfile.TemporaryDirectory() as folder,  # llama-sweep-bench leaves a log where it runs
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        started = time.monotonic()
        try:
            process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=out, stderr=err,
                                       stdin=subprocess.DEVNULL, cwd=folder)
        except OSError as error:
            raise Failure(str(error)) from error
        try:
            ended = False
            while not ended:
                # Not reaped yet, so that its last figures can be read.
                ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
                wall_s = time.monotonic() - started
                peak = max(peak, held_bytes(process.pid))
                read.append((wall_s, read_bytes(process.pid)))
                if wall_s > limit_s:
                    raise Failure(f"ran past {limit_s} s")
                if not ended:
                    time.sleep(SAMPLE_S)
        finally:
            if not ended:
                process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        ran = Ran(out.read(), err.read(), wall_s, peak, read)
    if process.returncode:
        raise Failure(f"exit status {process.returncode}: {ran.stderr.strip()[-400:]}")
    return ran
