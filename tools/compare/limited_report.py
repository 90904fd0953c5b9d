"""Medians and the Markdown table of one model in one memory budget."""

import statistics
from pathlib import Path

from engines import DECODE, IK, LLAMA
from report import best_of, medians, ratio_cell, run_notes

STREAMED = "streamed"


def median_of(runs, key):
    """Median of what the engines streamed per token, None where none of them says."""
    known = [run[STREAMED][key] for run in runs if run[STREAMED].get(key) is not None]
    return statistics.median(known) if known else None


def bound(bytes_per_token, disk_gb_s, resident_tok_s):
    """(tok/s, what sets it): min(disk, compute) for the bytes that a token really read."""
    bounds = []
    if bytes_per_token and disk_gb_s:
        bounds.append((disk_gb_s * 1e9 / bytes_per_token, "disk"))
    if resident_tok_s:
        bounds.append((resident_tok_s, "compute"))
    return min(bounds) if bounds and (bytes_per_token is not None) else None


def cell(value, pattern="{:.1f}"):
    return "–" if value is None else pattern.format(value)


def table(record, resident):
    rows = medians(record, (DECODE,))
    disk = [sample["gb_s"] for sample in record["disk_gb_s"]]
    disk_gb_s = statistics.median(disk) if disk else None
    whole = [sample for run in resident["runs"] for sample in run[DECODE]]
    resident_tok_s = statistics.median(whole) if whole else None

    heading = ["engine", "decode tok/s", "/ best llama.cpp", "/ best ik", "from disk MB/token", "hit ratio", "Belady's",
               "bound tok/s", "share of bound", "anonymous MiB"]
    lines = [f"### {record['label']}", "", f"| {' | '.join(heading)} |", "|---" + "|---:" * (len(heading) - 1) + "|"]
    for name, row in rows.items():
        runs = [run for run in record["runs"] if run["engine"] == name]
        per_token = median_of(runs, "bytes_per_token")
        most = bound(per_token, disk_gb_s, resident_tok_s)
        cells = [name, f"{row[DECODE]:.2f}"]
        cells += [ratio_cell(record, rows, name, best_of(rows, family, DECODE), DECODE) for family in (LLAMA, IK)]
        cells += [
            cell(per_token and per_token / 1e6),
            cell(median_of(runs, "hit_ratio"), "{:.1%}"),
            cell(median_of(runs, "belady_hit_ratio"), "{:.1%}"),
            cell(most and f"{most[0]:.2f} ({most[1]})", "{}"),
            cell(most and row[DECODE] / most[0], "{:.0%}"),
            cell(max(run["peak_anonymous_bytes"] for run in runs) / 2**20, "{:.0f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")

    rounds = len({run["round"] for run in record["runs"]})
    notes = [
        f"Memory {record['budget_bytes'] / 2**20:.0f} MiB, {record['share']}% of {record['file_bytes'] / 1e9:.2f} GB.",
        f"Medians of {rounds} rounds; in brackets the lowest and highest ratio within a round.",
    ]
    if disk:
        notes.append(f"Disk {disk_gb_s:.2f} GB/s ({min(disk):.2f}–{max(disk):.2f}, {len(disk)} measurements).")
    if whole:
        notes.append(f"pregate with all of it in memory {resident_tok_s:.1f} tok/s ({min(whole):.1f}–{max(whole):.1f}).")
    for name in rows:
        once = {run["round"] for run in record["runs"] if run["engine"] == name}
        if len(once) < rounds:
            notes.append(f"{name}: {len(once)} of the rounds.")
    if record["ik_path"] != record["path"]:
        notes.append(f"ik_llama.cpp read {Path(record['ik_path']).name}.")
    return "\n".join([*lines, "", " ".join([*notes, *run_notes(record)])])
