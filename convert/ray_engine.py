"""Convert on several machines with Ray: ranges of experts as tasks, over directories that all of them see.

Ray schedules, and runs again what was on a machine that went away: a task writes the same bytes at the same place
whenever and wherever it runs. Each range of a layer writes its blocks straight to their places in the layer's file
under its temporary name; when all are there, one task reads the file once, for its hash and to see that every block
arrived, and gives it its own name. The journal gets the same record as from a conversion on one machine, which then
does the rest (resident weights, copied files, manifest): so the pack is the same, byte for byte, and either engine goes
on where the other was stopped.

    convert_layers(plan, workers=2, on_bytes=progress.update)     # then: convert(plan, ...)

A cluster is found as Ray finds it (RAY_ADDRESS, or one that runs here); without one, a local one is started.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moepack.convert.journal import Journal
from moepack.convert.pipeline import Encoded, SourceHashes, encode_expert, find_finished, make_record
from moepack.convert.plan import ConversionPlan, check_free_space
from moepack.convert.report import Rounding
from moepack.layout.errors import CheckpointError, MoepackError, NotEnoughSpace, UsageError
from moepack.layout.geometry import LayerGeometry
from moepack.layout.manifest import ExpertFile, block_geometry
from moepack.layout.spec import PARTIAL_SUFFIX, expert_file_name
from moepack.layout.writer import NO_SPACE_ERRNOS, finish_partial

RANGES = 8  # tasks of a layer: enough for a few machines, and little is done again when one is lost
READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class WrittenRange:
    """What a task tells of the experts that it wrote: all but the blocks, in their order."""

    experts: tuple[Encoded, ...]


def convert_layers(plan: ConversionPlan, workers: int, on_bytes: Callable[[int], object]) -> int:
    """Write every layer that the journal does not know as finished; returns the source bytes that were dealt with.

    workers    processors of a cluster that is started for this; one that is there has its own
    on_bytes   called with source bytes as ranges are written

    Raises UsageError without Ray, and what a conversion on one machine raises.
    """
    ray = _import_ray()
    check_free_space(plan)
    started_here = not ray.is_initialized()
    if started_here:
        _connect(ray, workers)
    counted = 0
    try:
        with Journal.open(plan.out, plan.settings) as journal:
            encode = ray.remote(num_cpus=1, max_retries=-1)(write_range)
            join = ray.remote(num_cpus=1, max_retries=-1)(join_layer)
            shared = ray.put(plan)
            ranges: dict[Any, tuple[int, int]] = {}
            layers: dict[Any, int] = {}
            for layer in range(len(plan.source.experts)):
                if find_finished(plan, journal, layer_file(plan, layer)) is None:
                    (plan.out / layer_file(plan, layer)).parent.mkdir(exist_ok=True)
                    parts = {encode.remote(shared, layer, *part): part for part in split_layer(plan)}
                    ranges |= {ref: (layer, count) for ref, (_, count) in parts.items()}
                    layers[join.remote(shared, layer, *parts)] = layer
            waiting = [*ranges, *layers]
            while waiting:
                (ref,), waiting = ray.wait(waiting)
                result = _get(ray, ref)
                if ref in layers:
                    plan.check_source(plan.layer_shards(layers[ref]))
                    journal.put(Path(layer_file(plan, layers[ref])).stem, result)
                else:
                    layer, count = ranges[ref]
                    size = plan.layer_source_bytes[layer] * count // plan.shape.num_experts
                    on_bytes(size)
                    counted += size
    finally:
        if started_here:
            ray.shutdown()
    return counted


def split_layer(plan: ConversionPlan) -> list[tuple[int, int]]:
    """(first expert, experts) of each range."""
    experts, ranges = plan.shape.num_experts, min(RANGES, plan.shape.num_experts)
    bounds = [experts * part // ranges for part in range(ranges + 1)]
    return [(first, end - first) for first, end in pairwise(bounds)]


def write_range(plan: ConversionPlan, layer: int, first: int, count: int) -> WrittenRange:
    """Encode some experts of a layer and write their blocks to their places. Runs on any machine, any number of times.

    Raises CheckpointError, NotEnoughSpace.
    """
    path, geometry = partial_path(plan, layer), layer_geometry(plan)
    written = []
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            for expert in range(first, first + count):
                encoded = encode_expert(plan, layer, expert)
                _write_at(descriptor, encoded.arrays.pop("block"), geometry.offsets[expert])
                written.append(encoded)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            raise NotEnoughSpace(f"{path}: {error.strerror}: make space, then run the same command again") from None
        raise
    return WrittenRange(tuple(written))


def join_layer(plan: ConversionPlan, layer: int, *ranges: WrittenRange) -> dict[str, Any]:
    """Read a layer's file once for its hash, give it its name, and return its record for the journal.

    Raises CheckpointError naming a block that is not what its task wrote.
    """
    path, geometry = partial_path(plan, layer), layer_geometry(plan)
    experts = [encoded for part in ranges for encoded in part.experts]
    finished = path.with_name(path.name.removesuffix(PARTIAL_SUFFIX))
    whole = hashlib.sha256()
    # Run again after it did all but tell: the file has its name already.
    with open(path if path.exists() else finished, "rb") as file:
        for expert, encoded in enumerate(experts):
            block = hashlib.sha256()
            left = geometry.block(expert).block_stride
            while left and (piece := file.read(min(READ_BYTES, left))):
                block.update(piece)
                whole.update(piece)
                left -= len(piece)
            if block.hexdigest() != encoded.sha256:
                raise CheckpointError(
                    f"{path}: the block of expert {expert} is not what was written: is it shared by all?"
                )
        if file.read(1):
            raise CheckpointError(f"{path}: is longer than {geometry.size_bytes} bytes")
    if path.exists():
        finish_partial(finished)
    name, tiers = layer_file(plan, layer), (plan.recipe.expert_schemes,)
    digests = tuple(encoded.sha256 for encoded in experts)
    entry = ExpertFile(name, layer, geometry.size_bytes, whole.hexdigest(), tiers, (0,) * len(experts), digests)
    hashes, rounding = SourceHashes(), Rounding()
    for encoded in experts:
        hashes.add(encoded.record)
        rounding.add(encoded.rounding)
    return make_record(entry.as_json(), hashes.take(), rounding)


def layer_file(plan: ConversionPlan, layer: int) -> str:
    """A layer's file by its place in the pack."""
    return expert_file_name(layer, plan.shape.num_hidden_layers)


def partial_path(plan: ConversionPlan, layer: int) -> Path:
    """Where a layer's file is written before it is whole."""
    return plan.out / (layer_file(plan, layer) + PARTIAL_SUFFIX)


def layer_geometry(plan: ConversionPlan) -> LayerGeometry:
    """Where the blocks of a layer's file lie."""
    return LayerGeometry([block_geometry(plan.shape, plan.recipe.expert_schemes)], (0,) * plan.shape.num_experts)


def _write_at(descriptor: int, data: memoryview, offset_bytes: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset_bytes)
        data, offset_bytes = data[count:], offset_bytes + count


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise UsageError("--engine ray needs the package ray: pip install 'moepack[ray]'") from None


def _connect(ray: Any, workers: int) -> None:
    """Join the cluster that RAY_ADDRESS names or that runs on this machine; start one if there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    with contextlib.suppress(ConnectionError):
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **{**options, "include_dashboard": None})
        return
    ray.init(num_cpus=workers, object_store_memory=128 * 2**20, **options)


def _get(ray: Any, ref: Any) -> Any:
    """A task's result; its error as the task raised it."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, MoepackError) else error) from None
