"""Pictures: a pack as it lies on the disk, every file a row, and a token's way through the layers, every layer a row.

Needs matplotlib (the extra `plot`), which nothing else here does. Rows share the picture's height, so that a pack of 60
layers with 512 experts each stays one page; blocks are drawn without borders.

    draw_map(pack.manifest, colours_of_bits(pack.manifest), Path("layout.png"))
    draw_timeline(trace_token(trace, 17), Path("token.png"))
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack.layout.errors import UsageError
from moepack.layout.manifest import Manifest
from moepack.layout.timeline import LayerTime, Timeline, assign_lanes, subtract_spans
from moepack.layout.trace import Trace

WIDTH_INCHES, ROW_INCHES, DPI = 14, 0.13, 150
TIME_ROW_INCHES = 0.2  # one for the layer's own time and, below it, one for its reads
TIME_COLOURS = {"computing": "#31688e", "waiting": "#d1495b", "read": "#5a5a5a", "read ahead": "#a8c686"}
KINDS = ("bits", "use", "hits", "read")


@dataclass(frozen=True)
class Colours:
    """A number for each block, by layer and expert, and what it is; nan where there is nothing to say."""

    title: str
    values: list[list[float]]
    is_logarithmic: bool = False


def colours_of_bits(manifest: Manifest) -> Colours:
    """Bits per weight of every block, scales and biases included."""
    values = []
    for entry in manifest.expert_files:
        geometry = manifest.layer_geometry(entry.layer)
        bits = [8 * tier.payload_bytes / tier.num_weights for tier in geometry.tiers]
        values.append([bits[tier] for tier in entry.expert_tiers])
    return Colours("bits per weight", values)


def colours_of_trace(manifest: Manifest, trace: Trace, kind: str) -> Colours:
    """Uses, share of uses that found the block in memory, or median time of its reads in ms."""
    uses = Counter((one.layer, expert) for one in trace.requests for expert in one.expert_ids)
    missed = Counter((one.layer, expert) for one in trace.requests for expert in one.missing)
    times: dict[tuple[int, int], list[float]] = {}
    for read in trace.reads:
        for expert in read.expert_ids:
            times.setdefault((read.layer, expert), []).append(1e3 * (read.end_s - read.start_s))

    def value(key: tuple[int, int]) -> float:
        if kind == "use":
            return float(uses[key]) or float("nan")
        if kind == "hits":
            return 1 - missed[key] / uses[key] if uses[key] else float("nan")
        return statistics.median(times[key]) if key in times else float("nan")

    titles = {"use": "times used", "hits": "share of uses found in memory", "read": "median read, ms"}
    layers = range(len(manifest.expert_files))
    values = [[value((layer, expert)) for expert in range(manifest.shape.num_experts)] for layer in layers]
    return Colours(titles[kind], values, is_logarithmic=kind == "use")


def draw_map(manifest: Manifest, colours: Colours, path: Path) -> None:
    """Draw the expert files into a PNG file. Raises UsageError without matplotlib, OSError if it cannot be written."""
    pyplot, collections, colors = _load_matplotlib()
    rows, values = [], []
    for entry, row_values in zip(manifest.expert_files, colours.values):
        geometry = manifest.layer_geometry(entry.layer)
        for expert, offset in enumerate(geometry.offsets):
            end, top = offset + geometry.block(expert).block_stride, entry.layer
            rows.append([(x / 2**20, y) for x, y in ((offset, top), (end, top), (end, top + 0.9), (offset, top + 0.9))])
            values.append(row_values[expert])
    count = len(manifest.expert_files)
    figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, max(2.5, 1.5 + ROW_INCHES * count)))
    norm = colors.LogNorm() if colours.is_logarithmic and any(value > 0 for value in values) else None
    blocks = collections.PolyCollection(rows, array=values, cmap="viridis", norm=norm, linewidths=0)
    axes.set_facecolor("0.88")  # a block without a value shows it
    axes.add_collection(blocks)
    axes.set(xlim=(0, max(entry.size_bytes for entry in manifest.expert_files) / 2**20), ylim=(count, 0))
    axes.set(xlabel="offset in the file, MiB", title=f"{count} expert files, {len(rows):,} blocks: {colours.title}")
    step = max(1, count // 30)
    named = list(range(0, count, step))
    axes.set_yticks([layer + 0.45 for layer in named], [Path(manifest.expert_files[n].file).stem for n in named])
    axes.tick_params(axis="y", labelsize=7)
    figure.colorbar(blocks, ax=axes, label=colours.title, pad=0.01, fraction=0.025)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, format="png")
    pyplot.close(figure)


def draw_timeline(timeline: Timeline, path: Path) -> None:
    """Draw a token into a PNG file: what each layer did with its time and, below it, when its blocks were read.

    Raises UsageError without matplotlib, OSError if the file cannot be written.
    """
    pyplot, *_ = _load_matplotlib()
    count, start = len(timeline.layers), timeline.start_s
    figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, max(2.5, 1.5 + TIME_ROW_INCHES * count)))
    for row, layer in enumerate(timeline.layers):
        for kind, spans in list_bars(layer).items():
            axes.broken_barh(
                [(1e3 * (first - start), 1e3 * (last - first)) for first, last in spans],
                (row + 0.05, 0.4),
                color=TIME_COLOURS[kind],
            )
        lanes = assign_lanes((read.start_s, read.end_s) for read in layer.reads)
        height = 0.5 / (max(lanes, default=0) + 1)
        for lane, read in zip(lanes, layer.reads):
            place = (1e3 * (read.start_s - start), 1e3 * (read.end_s - read.start_s))
            kind = "read ahead" if read.is_ahead else "read"
            axes.broken_barh([place], (row + 0.45 + lane * height, 0.85 * height), color=TIME_COLOURS[kind])
    total_ms = 1e3 * (timeline.end_s - start)
    axes.set(xlim=(0, total_ms), ylim=(count, 0), xlabel="ms since the first layer asked for its experts")
    waiting = sum(one.waiting_ms for one in timeline.layers)
    size = sum(one.read_bytes for one in timeline.layers) / 1e6
    parts = f"computing {total_ms - waiting:.1f}, waiting {waiting:.1f}, {size:.1f} MB read"
    axes.set_title(f"token {timeline.token}: {total_ms:.1f} ms, {parts}")
    step = max(1, count // 30)
    named = list(range(0, count, step))
    axes.set_yticks([row + 0.5 for row in named], [f"layer {timeline.layers[row].layer}" for row in named])
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in TIME_COLOURS.values()]
    figure.legend(handles, TIME_COLOURS, loc="lower right", ncols=len(TIME_COLOURS), fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, format="png")
    pyplot.close(figure)


def list_bars(layer: LayerTime) -> dict[str, Sequence[tuple[float, float]]]:
    """A layer's own time, in parts."""
    return {"computing": subtract_spans(layer.start_s, layer.end_s, layer.waits), "waiting": layer.waits}


def _load_matplotlib() -> Sequence[Any]:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import collections, colors, pyplot
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'moepack[plot]'") from None
    return pyplot, collections, colors
