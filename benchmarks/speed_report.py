"""Results of speed.py for people: medians in a Markdown table, and tokens per second against the memory cap.

from speed_report import format_table
print(format_table(json.loads(Path("speed.json").read_text())))
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from contenders import MOEPACK_4
from laps import QUIET_CORES

MIB = 2**20
COLUMNS = (
    "phase", "cap MiB", "engine", "tok/s (range)", "quiet runs", "moepack 4 bit is", "cold tok/s", "read MB/token",
    "of the limit", "cores", "peak RSS MiB",
)  # fmt: skip


def format_table(results: dict[str, Any]) -> str:
    """One line per phase and engine, with what the columns mean below."""
    machine, lines = results["machine"], [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for name, entry in results["phases"].items():
        lines += [f"| {' | '.join(row)} |" for row in _phase_rows(name, entry, results["plan"])]
    limits = [one for entry in results["phases"].values() for one in entry["limits"] if _is_quiet(one)]
    keys = [key for key in (limits[0] if limits else {}) if key != "others_cores"]
    ranges = [f"{key} {min(one[key] for one in limits):.1f} to {max(one[key] for one in limits):.1f}" for key in keys]
    lines += [
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}; {machine['threads']} threads; readahead {machine['readahead_kib']} KiB unless said "
        "otherwise.",
        "",
        f"Medians of the runs in which other processes took at most {QUIET_CORES} cores; the JSON file has all.",
        "",
        f"Limits, over the pairs: {', '.join(ranges) or 'none measured on a quiet machine'}.",
        "",
        "Of the limit, medians over a phase: in memory the weights that a token touches, times tok/s, of the speed of "
        "reading memory; under a cap what was read from the disk of the speed of direct random reads.",
    ]
    return "\n".join(lines) + "\n"


def median(samples: list[dict[str, Any]], key: str) -> float | None:
    """Median over the samples that have the value; None if none has."""
    values = [sample[key] for sample in samples if sample.get(key) is not None]
    return statistics.median(values) if values else None


def draw_plot(results: dict[str, Any], path: Path) -> None:
    """Decode speed against the memory cap, a line per engine, as PNG; skipped, with a word, without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("note: no plot, it needs matplotlib: pip install 'moepack[plot]'", file=sys.stderr)
        return
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, entry in results["phases"].items():
        if not name.startswith("decode"):
            continue
        cap = entry["cap_bytes"] or results["plan"]["fixed_bytes"] + results["plan"]["all_experts_bytes"]
        for engine, samples in entry["samples"].items():
            rate = median([sample for sample in samples if _is_quiet(sample)], "tok_s")
            if rate:
                curves.setdefault(engine, []).append((cap / MIB, rate))
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for engine, points in curves.items():
        axes.plot(*zip(*sorted(points)), marker="o", linestyle="-" if "moepack" in engine else "--", label=engine)
    axes.set(xlabel="memory cap, MiB (rightmost: everything in memory)", ylabel="decode, tok/s", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _phase_rows(name: str, entry: dict[str, Any], plan: dict[str, Any]) -> list[list[str]]:
    quiet = {
        engine: [sample for sample in samples if _is_quiet(sample)] for engine, samples in entry["samples"].items()
    }
    ours, rows = median(quiet.get(MOEPACK_4.name, []), "tok_s"), []
    for engine, samples in entry["samples"].items():
        chosen = quiet[engine]
        rate, cold, peak_rss = (median(chosen, key) for key in ("tok_s", "cold_tok_s", "peak_rss_bytes"))
        cap = f"{entry['cap_bytes'] / MIB:.0f}" if entry["cap_bytes"] else "none"
        if rate is None:
            failures = [sample["failed"] for sample in samples if "failed" in sample]
            why = failures[-1] if failures else "none quiet"
            rows.append([name, cap, engine, why, f"0 of {len(samples)}", *["-"] * (len(COLUMNS) - 5)])
            continue
        rates = [sample["tok_s"] for sample in chosen]
        rows.append([
            name, cap, engine,
            f"{rate:.1f} ({min(rates):.1f} to {max(rates):.1f})",
            f"{len(chosen)} of {len(samples)}",
            f"{ours / rate:.2f}x" if ours and engine != MOEPACK_4.name else "-",
            f"{cold:.1f}" if cold and entry["cap_bytes"] else "-",
            f"{(median(chosen, 'read_bytes_per_token') or 0) / 1e6:.1f}",
            _limit_share(name, entry, chosen, rate, plan),
            f"{median(chosen, 'cores') or 0:.2f}",
            f"{(peak_rss or 0) / MIB:.0f}",
        ])  # fmt: skip
    return rows


def _is_quiet(measured: dict[str, Any]) -> bool:
    return "failed" not in measured and measured["others_cores"] <= QUIET_CORES


def _limit_share(
    name: str, entry: dict[str, Any], samples: list[dict[str, Any]], rate: float, plan: dict[str, Any]
) -> str:
    """How much of what bounds the phase is used; nothing bounds a prefill in memory but arithmetic."""
    limits = [one for one in entry["limits"] if _is_quiet(one)]
    if not limits:
        return "-"
    if entry["cap_bytes"]:
        disk_gb_s = statistics.median(max(one["disk_read_gb_s_1"], one["disk_read_gb_s_2"]) for one in limits)
        return f"disk {(median(samples, 'read_bytes_per_token') or 0) * rate / 1e9 / disk_gb_s:.0%}"
    if name.startswith("decode"):
        memory_gb_s = statistics.median(one["memory_read_gb_s"] for one in limits)
        touched = median(samples, "touched_bytes_per_token") or plan["touched_bytes_per_token"]  # the peer's: 4 bits
        return f"memory {touched * rate / 1e9 / memory_gb_s:.0%}"
    return "-"
