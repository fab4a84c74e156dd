"""The conversion itself: read an expert, quantize it, write its block; layer by layer, resumable, manifest last.

Only a few experts are in memory at any time, whatever the size of the model. Workers quantize experts side by side;
blocks are written in order, so the output's bytes depend on the source and the settings alone. What is finished is
noted in a journal, file by file.

    convert(plan, workers=2, on_bytes=progress.update)
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moepack.convert.checkpoint import Rows
from moepack.convert.journal import Journal
from moepack.convert.plan import ConversionPlan, check_free_space, list_copied_files
from moepack.convert.quantizers import QUANTIZERS
from moepack.layout.errors import CheckpointError
from moepack.layout.geometry import Scheme
from moepack.layout.manifest import ExpertFile, Manifest, ResidentFile, block_geometry
from moepack.layout.spec import RESIDENT_NAME, expert_file_name
from moepack.layout.tensor_file import TensorSpec
from moepack.layout.writer import assemble_block, copy_file, write_expert_file, write_manifest, write_resident_file

PIECE_BYTES = 8 * 2**20  # source bytes of a resident matrix dealt with at a time
Item = TypeVar("Item")
Result = TypeVar("Result")


def convert(plan: ConversionPlan, workers: int, on_bytes: Callable[[int], object]) -> Manifest:
    """Write the pack, going on where an earlier run with the same settings ended; returns its manifest.

    on_bytes   called with source bytes as they are dealt with, those of earlier runs at once

    Raises NotEnoughSpace, CheckpointError or UsageError; after any of them the same call goes on.
    """
    check_free_space(plan)
    with Journal.open(plan.out, plan.settings) as journal, ThreadPoolExecutor(workers) as pool:
        try:
            return _Conversion(plan, journal, pool, workers, on_bytes).run()
        finally:
            pool.shutdown(cancel_futures=True)


class _Conversion:
    """One run: the steps, each skipped where the journal says that it is done."""

    def __init__(
        self,
        plan: ConversionPlan,
        journal: Journal,
        pool: ThreadPoolExecutor,
        workers: int,
        on_bytes: Callable[[int], object],
    ):
        self.plan, self.journal, self.pool, self.workers, self.on_bytes = plan, journal, pool, workers, on_bytes

    def run(self) -> Manifest:
        plan = self.plan
        expert_files = tuple(self.write_layer(layer) for layer in range(len(plan.source.experts)))
        resident = self.write_resident()
        hashes = {shard: self.hash_shard(shard) for shard in plan.checkpoint.shards}
        directory = plan.checkpoint.directory
        manifest = Manifest(
            model={"architecture": "qwen3_5_moe", "text_config": complete_text_config(plan)},
            expert_files=expert_files,
            resident=resident,
            copied_files=tuple(copy_file(path, plan.out) for path in list_copied_files(directory)),
            provenance={
                "source": os.fsencode(directory.resolve().name).decode("utf-8", "replace"),
                "settings": plan.settings,
                "source_sha256": hashes,
                "notes": list(plan.notes),
            },
        )
        write_manifest(plan.out, manifest, when_written=self.journal.remove)
        return manifest

    def write_layer(self, layer: int) -> ExpertFile:
        plan = self.plan
        name = expert_file_name(layer, plan.shape.num_hidden_layers)
        step = Path(name).stem
        record = self.journal.get(step)
        if record is not None and _has_size(plan.out / name, record["size_bytes"]):
            self.on_bytes(plan.layer_source_bytes[layer])
            return ExpertFile.from_json(record, plan.shape)
        experts = range(plan.shape.num_experts)
        blocks = map_in_order(self.pool, lambda expert: encode_expert(plan, layer, expert), experts, self.workers)
        share = plan.layer_source_bytes[layer] // len(experts)
        entry = write_expert_file(
            plan.out,
            layer,
            plan.shape,
            tiers=(plan.recipe.expert_schemes,),
            expert_tiers=(0,) * len(experts),
            blocks=self.counted(blocks, lambda _: share),
        )
        self.journal.put(step, entry.as_json())
        return entry

    def write_resident(self) -> ResidentFile:
        plan = self.plan
        record = self.journal.get("resident")
        if record is not None and _has_size(plan.out / RESIDENT_NAME, record["size_bytes"]):
            self.on_bytes(plan.resident_source_bytes)
            return ResidentFile.from_json(record)
        encoder = ResidentEncoder(plan, self.on_bytes)
        entry = write_resident_file(plan.out, plan.forecast.resident_arrays, plan.forecast.quantized, encoder.read)
        self.journal.put("resident", entry.as_json())
        return entry

    def hash_shard(self, shard: str) -> str:
        step = f"sha256 {shard}"
        record = self.journal.get(step)
        size_bytes = self.plan.shard_bytes[shard]
        if record is not None:
            self.on_bytes(size_bytes)
            return str(record["sha256"])
        digest = hashlib.sha256()
        with open(self.plan.checkpoint.directory / shard, "rb") as file:
            for piece in self.counted(iter(lambda: file.read(PIECE_BYTES), b""), len):
                digest.update(piece)
        self.journal.put(step, {"sha256": digest.hexdigest()})
        return digest.hexdigest()

    def counted(self, items: Iterable[Item], size_of: Callable[[Item], int]) -> Iterator[Item]:
        for item in items:
            yield item
            self.on_bytes(size_of(item))


def complete_text_config(plan: ConversionPlan) -> dict[str, Any]:
    """The source's text config, with what it leaves to the family's defaults and the format needs filled in."""
    config = plan.checkpoint.config
    own = config.get("text_config", config)
    filled = {
        "model_type": "qwen3_5_moe_text",
        "tie_word_embeddings": plan.architecture.tie_word_embeddings,
        "num_experts_per_tok": plan.architecture.num_experts_per_tok,
        **vars(plan.shape),
    }
    return filled | {key: value for key, value in own.items() if value is not None}


def encode_expert(plan: ConversionPlan, layer: int, expert: int) -> bytearray:
    """Read one expert and make its block. Raises CheckpointError naming a tensor that is not finite."""
    block = block_geometry(plan.shape, plan.recipe.expert_schemes)
    arrays: dict[str, memoryview] = {}
    for projection, matrix in block.matrices:
        place = plan.source.experts[layer][expert][projection]
        rows = plan.checkpoint.read_rows(place.name, place.first_row, matrix.out_features)
        where = f"{plan.checkpoint.directory}: {place.name} (expert {expert})"
        for name, array in _encode(plan, rows, matrix.scheme, where).items():
            arrays[f"{projection}.{name}"] = array.data.cast("B")
    return assemble_block(block, arrays)


class ResidentEncoder:
    """Gives the arrays of resident.safetensors piece by piece, in whatever order the file wants them.

    A quantized matrix makes three arrays that lie far apart in the file: the source is quantized once for the
    integers, and the scales and biases, small, are kept until their turn.
    """

    def __init__(self, plan: ConversionPlan, on_bytes: Callable[[int], object]):
        self.plan, self.on_bytes = plan, on_bytes
        self.kept: dict[str, list[np.ndarray]] = {}

    def read(self, spec: TensorSpec) -> Iterator[memoryview]:
        """The bytes of one array."""
        matrix, _, part = spec.name.rpartition(".")
        scheme = self.plan.forecast.quantized.get(matrix)
        where = f"{self.plan.checkpoint.directory}: {spec.name}"
        if scheme is None:
            for rows in self._read_source(spec.name):
                _check_finite(rows, where)
                yield rows.values.data.cast("B")
        elif part != "weight":
            yield from (array.data.cast("B") for array in self.kept.pop(spec.name))
        else:
            scales: list[np.ndarray] = self.kept.setdefault(f"{matrix}.scales", [])
            biases: list[np.ndarray] = self.kept.setdefault(f"{matrix}.biases", [])
            for rows in self._read_source(spec.name):
                arrays = _encode(self.plan, rows, scheme, where)
                scales.append(arrays["scales"])
                biases.append(arrays["biases"])
                yield arrays["w_q"].data.cast("B")

    def _read_source(self, name: str) -> Iterator[Rows]:
        original = self.plan.source.residents[name]
        spec = self.plan.checkpoint.tensors[original]
        rows = spec.size_bytes // (spec.shape[-1] * self.plan.checkpoint.item_bytes(original))
        step = max(1, PIECE_BYTES * rows // max(1, spec.size_bytes))
        for first in range(0, rows, step):
            piece = self.plan.checkpoint.read_rows(original, first, min(step, rows - first))
            yield piece
            self.on_bytes(piece.values.nbytes)


def map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Like pool.map, but at most `ahead` + 1 results exist before they are taken: memory stays bounded."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def estimate_seconds(plan: ConversionPlan, workers: int) -> float:
    """Expected time of the whole conversion, from encoding one real expert just now."""
    started = time.perf_counter()
    encode_expert(plan, 0, 0)
    per_expert = time.perf_counter() - started
    share = plan.layer_source_bytes[0] / plan.shape.num_experts
    return per_expert * plan.bytes_to_read / share / workers


def _encode(plan: ConversionPlan, rows: Rows, scheme: Scheme, where: str) -> dict[str, np.ndarray]:
    """The stored arrays of some rows of a matrix by name. Raises CheckpointError if a weight is not finite."""
    if scheme.group_size is None:
        _check_finite(rows, where)
        return {"weight": rows.to_bf16()}
    try:
        return QUANTIZERS[plan.recipe.quantizer](rows.values, scheme.bits, scheme.group_size).arrays
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}: the file is damaged, download it again") from None


def _check_finite(rows: Rows, where: str) -> None:
    if not np.isfinite(rows.to_float32()).all():
        raise CheckpointError(f"{where} holds NaN or infinity: the file is damaged, download it again")


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.exists() and path.stat().st_size == size_bytes
