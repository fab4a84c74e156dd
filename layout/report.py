"""What moe-inspect says, as lines for people, from the same facts that --json prints.

print("\n".join(describe_pack(summarize(pack))))
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from moepack.layout.difference import Difference
from moepack.layout.sizes import format_size
from moepack.layout.timeline import Timeline

Rows = list[tuple[str, ...]]


def format_table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of equal length: the first row is the heading, columns after the first stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return lines


def describe_pack(facts: dict[str, Any]) -> list[str]:
    """What summary.summarize found."""
    lines = [
        f"{facts['pack']}: {facts['architecture']}, format version {facts['format_version']}",
        f"{facts['num_hidden_layers']} layers, {facts['num_experts']} experts of "
        f"{facts['moe_intermediate_size']} x {facts['hidden_size']}, {facts['num_experts_per_tok']} per token; "
        f"{format_size(facts['size_bytes'])} in {facts['num_files']} files",
        "",
    ]
    titles = (("experts", "experts"), ("mtp experts", "mtp_experts"))
    blocks = [(title, facts[key]) for title, key in titles if facts[key]]
    rows: Rows = [("weights", "count", "size", "bits per weight")]
    for title, part in blocks:
        rows.append(_weights_row(title, part["weights"], part["payload_bytes"], part["bits_per_weight"]))
        for name, kind in part["classes"].items():
            rows.append(_weights_row(f"  {name}", kind["weights"], kind["payload_bytes"], kind["bits_per_weight"]))
    resident = facts["resident"]
    rows.append(_weights_row("resident", resident["weights"], resident["payload_bytes"], resident["bits_per_weight"]))
    for title, part in resident["classes"].items():
        rows.append(_weights_row(f"  {title}", part["weights"], part["size_bytes"], part["bits_per_weight"]))
    lines += format_table(rows)
    rows = [("blocks", "count", "bits", "groups", "stride", "padding", "share")]
    for title, part in blocks:
        for tier in part["tiers"]:
            share = tier["padding_bytes"] / tier["block_stride"]
            bits = "/".join(map(str, tier["bits"]))
            groups = "/".join(str(size or "-") for size in tier["group_sizes"])
            sizes = (format_size(tier[key]) for key in ("block_stride", "padding_bytes"))
            rows.append((title, f"{tier['blocks']:,}", bits, groups, *sizes, f"{share:.1%}"))
    lines += ["", *format_table(rows), "", f"copied files: {', '.join(facts['copied_files']) or 'none'}"]
    provenance = facts["provenance"]
    settings = _object(provenance.get("settings"))
    arguments = ", ".join(f"{key} {value}" for key, value in _object(settings.get("arguments")).items())
    lines.append(f"converted from {provenance.get('source')} by moepack {settings.get('tool_version')}: {arguments}")
    notes = provenance.get("notes")
    return lines + [f"note: {note}" for note in (notes if isinstance(notes, list) else [])]


def describe_differences(differences: list[Difference]) -> list[str]:
    """What difference.compare_packs found, under a heading for each part of a pack."""
    lines = []
    for part, group in groupby(differences, key=lambda difference: difference.part):
        lines += [f"{part}:", *(f"  {difference.text}" for difference in group)]
    return lines


def describe_errors(facts: dict[str, Any]) -> list[str]:
    """What a comparison of experts with their originals found."""
    rows: Rows = [("", "median", "99 %", "worst", "its layer and expert")]
    for name, part in facts["projections"].items():
        worst = part["worst"]
        errors = (_show_error(value) for value in (part["median"], part["p99"], worst["error"]))
        rows.append((name, *errors, f"{worst['layer']}:{worst['expert']}"))
    named = [f"{one['layer']}:{one['expert']} ({_show_error(one['error'])})" for one in facts["worst_experts"]]
    return [*format_table(rows), f"worst experts: {', '.join(named)}"]


def describe_plan(facts: dict[str, Any]) -> list[str]:
    """What planning measured, assumed, predicted and recommends."""
    lines = [f"{name}: {value}" for name, value in facts["machine"].items()]
    lines += ["", *(f"assumed: {text}" for text in facts["assumptions"]), ""]
    rows: Rows = [
        ("experts", "--memory", "in memory", "hits", "read/token", "first token", "prefill", "decode", "bound by")
    ]
    for row in facts["rows"]:
        if row["refusal"]:
            rows.append((row["experts"], format_size(row["memory_bytes"]), "too small", *["-"] * 6))
            continue
        rows.append(
            (
                row["experts"],
                format_size(row["memory_bytes"]),
                f"{row['slots']:,} of {row['all_experts']:,}",
                f"{row['hit_rate']:.0%}",
                f"{row['bytes_per_token'] / 1e6:,.0f} MB",
                f"{row['ttft_s']:.1f} s",
                f"{row['prefill_tok_s']:.1f} tok/s",
                f"{row['decode_tok_s']:.1f} tok/s",
                row["bound_by"],
            )
        )
    lines += format_table(rows)
    lines += ["", *(f"{row['experts']}: {row['refusal']}" for row in facts["rows"] if row["refusal"])]
    return [*lines, *facts["advice"]]


def describe_trace_facts(facts: dict[str, Any]) -> list[str]:
    """What trace_report.describe_trace found."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    popular = ", ".join(f"{share} of the experts {used:.0%}" for share, used in facts["popularity"].items())
    reuse, recall, spent = facts["reuse_distance"], facts["recall"], facts["time"]
    lines = [f"uses that fall on the most used: {popular}"]
    if reuse["p50"] is not None:
        lines.append(
            f"other experts between two uses of one: median {reuse['p50']:,.0f}, 10 % below {reuse['p10']:,.0f}, "
            f"90 % below {reuse['p90']:,.0f}; {percent(reuse['first_uses'])} of the uses are first ones"
        )
    lines.append(
        f"recall of guesses one layer before: {percent(recall['next_layer_guess'])}; "
        f"of the token before: {percent(recall['token_before'])}; "
        f"asked for of what was read ahead: {percent(recall['read_ahead'])}"
    )
    return [*lines, "", *describe_times(spent)] if spent else lines


def describe_times(spent: dict[str, Any]) -> list[str]:
    """Where a token's time went, beside what the machine could do at most."""
    rate = "" if spent["disk_gb_s"] is None else f" at {spent['disk_gb_s']:.2f} GB/s"
    ahead = "" if spent["read_ahead_share"] is None else f", {spent['read_ahead_share']:.0%} of it read ahead"
    lines = [
        f"a token: {spent['token_ms']:.1f} ms = computing {spent['computing_ms']:.1f} + waiting for reads "
        f"{spent['waiting_ms']:.1f}; disk busy {spent['disk_busy_ms']:.1f} ms with "
        f"{spent['read_bytes'] / 1e6:.1f} MB{rate}{ahead}; "
        f"at least {spent['least_ms']:.1f} ms if the two overlapped wholly"
    ]
    limits = spent["limits"]
    if not limits["least_ms"]:
        return [
            *lines,
            "the machine's limits are unknown: run moe-inspect plan PACK first, or give --ssd-gbps, --mem-gbps",
        ]
    rows: Rows = [("of it, in ms", "limit", "bytes", "at the limit", "beyond it", "not at work")]
    for title, name in (("disk", "disk"), ("cores and memory", "memory")):
        if part := limits[name]:
            times = (f"{part[key]:.1f}" for key in ("at_limit_ms", "beyond_ms", "idle_ms"))
            rows.append((title, f"{part['gb_s']:.2f} GB/s", f"{part['bytes'] / 1e6:,.1f} MB", *times))
    least, share = limits["least_ms"], limits["share"]
    return [*lines, *format_table(rows), f"no token can take less than {least:.1f} ms here: {share:.0%} of that speed"]


def describe_timeline(timeline: Timeline) -> list[str]:
    """A token layer by layer."""
    rows: Rows = [("layer", "from", "computing", "waiting", "read", "of it ahead")]
    for one in timeline.layers:
        ahead = sum(read.size_bytes for read in one.reads if read.is_ahead)
        times = (1e3 * (one.start_s - timeline.start_s), one.computing_ms, one.waiting_ms)
        sizes = (f"{size / 1e6:.1f} MB" for size in (one.read_bytes, ahead))
        rows.append((str(one.layer), *(f"{value:.2f} ms" for value in times), *sizes))
    return [f"token {timeline.token}: {1e3 * (timeline.end_s - timeline.start_s):.1f} ms", *format_table(rows)]


def _object(value: Any) -> dict[str, Any]:
    """Provenance is free-form: what is no object counts as an empty one."""
    return value if isinstance(value, dict) else {}


def _weights_row(title: str, weights: int, size_bytes: int, bits_per_weight: float) -> tuple[str, ...]:
    return title, f"{weights:,}", format_size(size_bytes), f"{bits_per_weight:.3f}"


def _show_error(error: float | None) -> str:
    return "infinite" if error is None else f"{error:.4f}"
