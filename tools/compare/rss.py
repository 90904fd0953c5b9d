#!/usr/bin/env python3
"""Does pregate keep to its memory budget?

Runs `pregate ARGUMENTS --model FILE --ram BYTES` at shares of the file's size
and samples the process's memory without the page cache (RssAnon + RssShmem)
every 20 ms. Prints a table; the exit status is 1 where the most that was seen
is more than the budget and the allowance.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import limits
from compare import provenance
from engines import Failure

ALLOWANCE_MIB = 64
# A prompt too: its chunks need the most memory besides the experts.
ARGUMENTS = "bench -p 256 -n 32 -r 1 --json"


def measure(pregate, arguments, model, share, limit_s):
    budget = os.path.getsize(model) * share // 100
    command = [os.path.abspath(pregate), *arguments, "--model", os.path.abspath(model), "--ram", str(budget)]
    ran = limits.watch(command, {}, limit_s)
    return {"model": model, "share": share, "budget_bytes": budget, "command": shlex.join(command),
            "peak_anonymous_bytes": ran.peak_anonymous_bytes, "samples": len(ran.read), "wall_s": ran.wall_s}


def row(found, allowance_bytes):
    """One line of the table, and whether the budget was kept."""
    kept = found["peak_anonymous_bytes"] <= found["budget_bytes"] + allowance_bytes
    over = (found["peak_anonymous_bytes"] - found["budget_bytes"]) / 2**20
    cells = [Path(found["model"]).name, f"{found['share']}%", f"{found['budget_bytes'] / 2**20:.1f}",
             f"{found['peak_anonymous_bytes'] / 2**20:.1f}", f"{over:+.1f}", "yes" if kept else "**no**"]
    return f"| {' | '.join(cells)} |", kept


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pregate", metavar="PATH", required=True)
    parser.add_argument("--model", metavar="FILE", action="append", required=True)
    parser.add_argument("--share", type=int, metavar="PERCENT", action="append", help="may be repeated (25, 50, 75)")
    parser.add_argument("--arguments", default=ARGUMENTS, help=f"what pregate does ({ARGUMENTS!r})")
    parser.add_argument("--allowance-mib", type=int, default=ALLOWANCE_MIB)
    parser.add_argument("--limit-s", type=int, default=900, help="most seconds that one run may take")
    parser.add_argument("--out", metavar="FILE", help="every figure, as JSON")
    options = parser.parse_args(argv)
    limits.stop_on_signals()

    raw = provenance({options.pregate}, argv)
    print("| model | memory | budget MiB | most seen MiB | more than the budget | kept |\n|---|---:|---:|---:|---:|---|")
    all_kept = True
    for model in options.model:
        for share in options.share or [25, 50, 75]:
            try:
                found = measure(options.pregate, shlex.split(options.arguments), model, share, options.limit_s)
            except Failure as failure:
                all_kept = False
                print(f"| {Path(model).name} | {share}% | | | | **failed**: {failure} |", flush=True)
                continue
            raw["models"].append(found)
            text, kept = row(found, options.allowance_mib << 20)
            all_kept &= kept
            print(text, flush=True)
            if options.out:
                Path(options.out).write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return 0 if all_kept else 1


if __name__ == "__main__":
    sys.exit(main())
