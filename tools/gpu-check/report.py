"""Results of speed.py as JSON lines and as a table for docs/measurements.md."""

import json
import platform
import statistics


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} threads"
    except (OSError, IndexError):
        return platform.machine()


def link(gpu):
    """The link to the host in words, from an entry of `pregate doctor --json`."""
    if not gpu.get("link"):
        return "PCIe link unknown"
    now, most = gpu["link"]["now"], gpu["link"]["most"]
    words = f"PCIe {now['generation']}.0 x{now['width']}"
    if most and most != now:
        words += f" (at most {most['generation']}.0 x{most['width']})"
    return words


def machine(doctor, version):
    """What stands in the first line of the JSON lines. `doctor`: `pregate doctor --json`."""
    gpu = (doctor.get("gpus") or [{}])[0]
    return {
        "device": gpu.get("name"),
        "driver": gpu.get("driver_version") or f"CUDA {gpu.get('driver')}",
        "link": link(gpu),
        "memory_bytes": gpu.get("memory_bytes"),
        "is_standin": gpu.get("is_standin"),
        "speed": gpu.get("speed"),
        "cpu": processor(),
        "version": version,
    }


class Results:
    """Samples by (routing, GiB, name) in the order in which they were first measured."""

    def __init__(self, path, facts):
        self.facts, self.rows, self.notes = facts, {}, []
        self.file = open(path, "w", encoding="utf-8")
        self.line({"machine": facts})

    def line(self, value):
        self.file.write(json.dumps(value) + "\n")
        self.file.flush()

    def add(self, key, found, more):
        """`found`: of a parse function; `more`: what else the line says."""
        self.line({"routing": key[0], "vram_gib": key[1], "name": key[2], **found, **more})
        row = self.rows.setdefault(key, {"prompt_tok_s": [], "decode_tok_s": [], "predicted_tok_s": []})
        for field in ("prompt_tok_s", "decode_tok_s"):
            row[field] += found[field]
        if found.get("predicted_tok_s"):
            row["predicted_tok_s"].append(found["predicted_tok_s"])

    def note(self, text):
        self.notes.append(text)
        self.line({"note": text})

    def decode(self, key):
        return statistics.median(self.rows[key]["decode_tok_s"])

    def markdown(self, title):
        facts = self.facts
        lines = [f"### {title}", ""]
        if facts["is_standin"]:
            lines += ["**Over the stand-in: these figures mean nothing.**", ""]
        lines += [
            f"{facts['device']}, driver {facts['driver']}, {facts['link']}; {facts['cpu']}; {facts['version']}",
            "",
            "| routing | GPU memory, GiB | | prompt tok/s | decode tok/s | lowest to highest | of the prediction | samples |",
            "|---|---:|---|---:|---:|---:|---:|---:|",
        ]
        for (routing, vram, name), row in self.rows.items():
            prompt, decode = row["prompt_tok_s"], row["decode_tok_s"]
            middle, share = statistics.median(decode), ""
            if row["predicted_tok_s"]:
                share = f"{middle / statistics.median(row['predicted_tok_s']):.0%}"
            lines.append(
                f"| {routing} | {vram:g} | {name} | {statistics.median(prompt):.1f} | {middle:.2f} "
                f"| {min(decode):.2f} to {max(decode):.2f} | {share} | {len(decode)} |"
            )
        lines += [""] + [f"- {note}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"
