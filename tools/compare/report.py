"""Medians and the Markdown table of one model's record."""

import json
import statistics
from pathlib import Path

from engines import DECODE, IK, LLAMA, METRICS, PREGATE

QUOTABLE_ROUNDS = 5


def medians(record, metrics=METRICS):
    """Medians per engine, in the order the engines ran: {name: {family, metric: median}}."""
    samples = {}
    for run in record["runs"]:
        of_engine = samples.setdefault(run["engine"], {"family": run["family"], **{metric: [] for metric in metrics}})
        for metric in metrics:
            of_engine[metric] += run[metric]
    return {
        name: {**of_engine, **{metric: statistics.median(of_engine[metric]) for metric in metrics}}
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
        return json.loads(Path(record["path"] + ".json").read_text(encoding="utf-8"))["bytes_per_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_notes(record):
    """What limits the worth of a record's figures."""
    notes = []
    others = [run["others_cpu"] for run in record["runs"]]
    if others:
        notes.append(f"Other programs took {min(others):.0%}–{max(others):.0%} of the CPU time.")
    if record["disturbed"]:
        notes.append(f"{len(record['disturbed'])} disturbed runs left out.")
    for engine in dict.fromkeys(failure["engine"] for failure in record["failures"]):
        notes.append(f"**{engine} failed**: {sum(f['engine'] == engine for f in record['failures'])} runs.")
    if len({run["round"] for run in record["runs"]}) < QUOTABLE_ROUNDS:
        notes.append(f"**Fewer than {QUOTABLE_ROUNDS} rounds: not a figure to quote.**")
    return notes


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
    notes += run_notes(record)
    return "\n".join([*lines, "", " ".join(notes)])
