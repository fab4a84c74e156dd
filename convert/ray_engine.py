"""Convert on several machines with Ray: ranges of experts as tasks, over a source that all of them see.

Ray schedules, and runs again what was on a machine that went away: a task writes the same bytes at the same place
whenever and wherever it runs. Where a task writes is the output's business: here a directory that all machines share,
in url_output.py a place that fsspec knows. Each range of a layer writes its blocks straight to their places in the
layer's file under its temporary name; when all are there, one task reads the file once, for its hash and to see that
every block arrived, and gives it its own name. The journal gets the same record as from a conversion on one machine,
which then does the rest (resident weights, copied files, manifest): so the pack is the same, byte for byte, and either
engine goes on where the other was stopped.

    convert_layers(SharedDirectory(plan), workers=2, on_bytes=progress.update)     # then: convert(plan, ...)

A cluster is found as Ray finds it (RAY_ADDRESS, or one that runs here); without one, a local one is started.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from moepack.convert.journal import Journal
from moepack.convert.pipeline import Encoded, SourceHashes, encode_expert, find_finished, make_record
from moepack.convert.plan import ConversionPlan, check_free_space
from moepack.convert.report import Rounding
from moepack.layout.errors import CheckpointError, MoepackError, UsageError
from moepack.layout.manifest import ExpertFile
from moepack.layout.spec import PARTIAL_SUFFIX, expert_file_name
from moepack.layout.writer import finish_partial, naming_failures

RANGES = 8  # tasks of a layer: enough for a few machines, and little is done again when one is lost
READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class WrittenRange:
    """What a task tells of the experts that it wrote: all but the blocks, in their order."""

    experts: tuple[Encoded, ...]


class Output(Protocol):
    """Where tasks write. It is sent to them, and calls of it may be repeated anywhere."""

    plan: ConversionPlan

    def open(self) -> AbstractContextManager[Any]:
        """Begin or go on with the conversion; the journal. Raises UsageError if something else is there."""

    def is_finished(self, journal: Any, layer: int) -> bool:
        """Whether a layer's file is there, and the journal's record of it."""

    def write_range(self, layer: int, first: int, count: int) -> WrittenRange:
        """Encode some experts of a layer and write their blocks. Raises CheckpointError, NotEnoughSpace, WriteError."""

    def join_layer(self, layer: int, *ranges: WrittenRange) -> dict[str, Any]:
        """Make the layer's file of its ranges and return its record for the journal.

        Raises CheckpointError naming a block that is not what its task wrote.
        """

    def noted(self, layer: int) -> None:
        """The journal has the layer's record."""


def convert_layers(output: Output, workers: int, on_bytes: Callable[[int], object]) -> int:
    """Write every layer that the journal does not know as finished; returns the source bytes that were dealt with.

    workers    processors of a cluster that is started for this; one that is there has its own
    on_bytes   called with source bytes as ranges are written

    Raises UsageError without Ray, and what a conversion on one machine raises.
    """
    ray, plan = import_ray(), output.plan
    started_here = not ray.is_initialized()
    if started_here:
        _connect(ray, workers)
    counted = 0
    try:
        with output.open() as journal:
            kind = type(output)
            encode = ray.remote(num_cpus=1, max_retries=-1)(kind.write_range)
            join = ray.remote(num_cpus=1, max_retries=-1)(kind.join_layer)
            shared = ray.put(output)
            ranges: dict[Any, tuple[int, int]] = {}
            layers: dict[Any, int] = {}
            for layer in range(len(plan.source.experts)):
                if not output.is_finished(journal, layer):
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
                    output.noted(layers[ref])
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


class SharedDirectory:
    """A plan's own output, which every machine sees under the same path."""

    def __init__(self, plan: ConversionPlan):
        self.plan = plan

    def open(self) -> AbstractContextManager[Journal]:
        check_free_space(self.plan)
        return Journal.open(self.plan.out, self.plan.settings)

    def is_finished(self, journal: Journal, layer: int) -> bool:
        return find_finished(self.plan, journal, layer_file(self.plan, layer)) is not None

    def write_range(self, layer: int, first: int, count: int) -> WrittenRange:
        plan = self.plan
        path, geometry = partial_path(plan, layer), plan.schemes[layer].geometry(plan.shape)
        written = []
        with naming_failures(path):
            path.parent.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                for expert in range(first, first + count):
                    encoded = encode_expert(plan, layer, expert)
                    _write_at(descriptor, encoded.arrays.pop("block"), geometry.offsets[expert])
                    written.append(encoded)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return WrittenRange(tuple(written))

    def join_layer(self, layer: int, *ranges: WrittenRange) -> dict[str, Any]:
        path = partial_path(self.plan, layer)
        finished = path.with_name(path.name.removesuffix(PARTIAL_SUFFIX))
        # Run again after it did all but tell: the file has its name already.
        with open(path if path.exists() else finished, "rb") as file:
            pieces = iter(lambda: file.read(READ_BYTES), b"")
            record = record_layer(self.plan, layer, ranges, pieces, str(path))
        if path.exists():
            finish_partial(finished)
        return record

    def noted(self, layer: int) -> None:
        """Nothing is left to be tidied."""


def record_layer(
    plan: ConversionPlan, layer: int, ranges: Iterable[WrittenRange], pieces: Iterable[bytes], where: str
) -> dict[str, Any]:
    """A layer's record for the journal, from what its tasks tell and the bytes that its file is to have.

    Raises CheckpointError naming a block that is not what its task wrote.
    """
    geometry = plan.schemes[layer].geometry(plan.shape)
    experts = [encoded for part in ranges for encoded in part.experts]
    strides = [geometry.block(expert).block_stride for expert in range(len(experts))]
    whole, block, filled, expert = hashlib.sha256(), hashlib.sha256(), 0, 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest and expert < len(experts):
            part = rest[: strides[expert] - filled]
            whole.update(part)
            block.update(part)
            filled, rest = filled + len(part), rest[len(part) :]
            if filled == strides[expert]:
                if block.hexdigest() != experts[expert].sha256:
                    raise CheckpointError(
                        f"{where}: the block of expert {expert} is not what was written: is it shared by all?"
                    )
                block, filled, expert = hashlib.sha256(), 0, expert + 1
        if rest:
            raise CheckpointError(f"{where}: is longer than {geometry.size_bytes} bytes")
    if expert < len(experts):
        raise CheckpointError(f"{where}: the block of expert {expert} is not what was written: is it shared by all?")
    name, schemes = layer_file(plan, layer), plan.schemes[layer]
    kinds = (schemes.tiers, schemes.expert_tiers)
    digests = tuple(encoded.sha256 for encoded in experts)
    entry = ExpertFile(name, layer, geometry.size_bytes, whole.hexdigest(), *kinds, digests)
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


def _write_at(descriptor: int, data: memoryview, offset_bytes: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset_bytes)
        data, offset_bytes = data[count:], offset_bytes + count


def import_ray() -> Any:
    """The package. Raises UsageError if it is not installed."""
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
