"""The conversion itself: read an expert, quantize it, write its block; layer by layer, resumable, manifest last.

Only a few experts are in memory at any time, whatever the size of the model. Workers read, quantize and hash experts
side by side, across the borders of layers; blocks are written in order past the page cache, so the output's bytes
depend on the source and the settings alone. What is finished is noted in a journal, file by file.

The source is read once. Each tensor's hash is the sha256 of the sha256 of its pieces in the order of reading (an
expert's matrix, or the rows of about 8 MiB), so that pieces may be hashed side by side and apart from each other.

    convert(plan, workers=2, on_bytes=progress.update)
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import IO, Any, TypeVar

import numpy as np

from moepack.convert.checkpoint import Rows
from moepack.convert.journal import Journal
from moepack.convert.memory import DEFAULT_MEMORY, PIECE_BYTES, fit_threads
from moepack.convert.plan import ConversionPlan, check_free_space, list_copied_files
from moepack.convert.quantizers import QUANTIZERS, measure_error, widen
from moepack.convert.report import RESIDENT, Report, Rounding
from moepack.convert.shard_reader import Record
from moepack.convert.sources import Weight
from moepack.kernels.native_quantize import RoundingError
from moepack.layout.errors import CheckpointError
from moepack.layout.geometry import Scheme
from moepack.layout.manifest import ExpertFile, Manifest, ResidentFile, block_geometry
from moepack.layout.quantized import dequantize
from moepack.layout.sizes import parse_size
from moepack.layout.spec import RESIDENT_NAME, expert_file_name
from moepack.layout.tensor_file import TensorSpec, layout_tensors
from moepack.layout.writer import (
    HashedBlock,
    assemble_block,
    copy_file,
    write_expert_file,
    write_manifest,
    write_resident_file,
)

Item = TypeVar("Item")
Result = TypeVar("Result")
SINGLE_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")  # tensors stored one by one are hashed as one, in their order


@dataclass
class Encoded:
    """What one piece of work made: the stored arrays, and how.

    arrays    name -> bytes; of an expert its whole block, under "block"
    size      bytes of the source
    rounding  projection or "resident" -> error
    """

    arrays: dict[str, memoryview]
    size: int
    rounding: dict[str, RoundingError]
    sha256: str = ""
    record: Record = field(default_factory=Record)


def convert(
    plan: ConversionPlan,
    workers: int,
    on_bytes: Callable[[int], object],
    report: Report | None = None,
    memory_bytes: int = parse_size(DEFAULT_MEMORY),
) -> Manifest:
    """Write the pack, going on where an earlier run with the same settings ended; returns its manifest.

    workers        experts quantized side by side
    on_bytes       called with source bytes as they are dealt with, those of earlier runs at once
    report         filled in as the work goes on
    memory_bytes   bound of the process's memory: fewer workers where it is small

    Raises NotEnoughSpace, CheckpointError, MemoryBudgetError or UsageError; after any of them the same call goes on.
    """
    check_free_space(plan)
    threads = fit_threads(plan, workers, memory_bytes)
    computing = min(threads, workers) if reads_ahead(plan) else threads
    with Journal.open(plan.out, plan.settings) as journal, ThreadPoolExecutor(computing) as pool:
        try:
            return _Conversion(plan, journal, pool, threads, on_bytes, report or Report()).run()
        finally:
            plan.checkpoint.reader.stop()
            pool.shutdown(cancel_futures=True)
            plan.checkpoint.reader.close()


class SourceHashes:
    """The hashes of tensors, from the digests of their pieces in order."""

    def __init__(self) -> None:
        self._running: dict[str, Any] = {}

    def add(self, record: Record) -> None:
        for tensor, digest in record.digests:
            single = SINGLE_EXPERT.fullmatch(tensor)
            name = f"{single[1]}.*" if single else tensor
            self._running.setdefault(name, hashlib.sha256()).update(digest)

    def take(self) -> dict[str, str]:
        """All of them so far, hexadecimal; the next ones begin anew."""
        running, self._running = self._running, {}
        return {name: digest.hexdigest() for name, digest in running.items()}


class _Conversion:
    """One run: the steps, each skipped where the journal says that it is done."""

    def __init__(
        self,
        plan: ConversionPlan,
        journal: Journal,
        pool: ThreadPoolExecutor,
        threads: int,
        on_bytes: Callable[[int], object],
        report: Report,
    ):
        self.plan, self.journal, self.on_bytes, self.report = plan, journal, on_bytes, report
        self.hashes, self.rounding = SourceHashes(), Rounding()  # of the file that is being written
        self.residents = ResidentEncoder(plan)
        layers = range(len(plan.source.experts))
        pending = [layer for layer in layers if find_finished(plan, journal, self.layer_file(layer)) is None]
        needs = {self.layer_file(layer): plan.layer_shards(layer) for layer in pending}
        if find_finished(plan, journal, RESIDENT_NAME) is None:
            needs[RESIDENT_NAME] = plan.resident_shards
        plan.checkpoint.reader.begin(needs)
        jobs = list_expert_jobs(plan, pending)
        if find_finished(plan, journal, RESIDENT_NAME) is None:
            jobs = chain(jobs, self.residents.list_jobs())
        self.encoded = self.taken(map_in_order(pool, lambda job: job(), jobs, threads))

    def run(self) -> Manifest:
        plan = self.plan
        expert_files: list[ExpertFile] = []
        hashes: dict[str, str] = {}
        for layer in range(len(plan.source.experts)):
            entry, layer_hashes = self.write_layer(layer)
            expert_files.append(entry)
            hashes |= layer_hashes
        resident, resident_hashes = self.write_resident()
        directory = plan.checkpoint.directory
        manifest = Manifest(
            model={"architecture": "qwen3_5_moe", "text_config": complete_text_config(plan)},
            expert_files=tuple(expert_files),
            resident=resident,
            copied_files=tuple(copy_file(path, plan.out) for path in list_copied_files(directory)),
            provenance={
                "source": os.fsencode(directory.resolve().name).decode("utf-8", "replace"),
                "settings": plan.settings,
                "source_sha256": dict(sorted((hashes | resident_hashes).items())),
                "notes": list(plan.notes),
            },
        )
        write_manifest(plan.out, manifest, when_written=self.journal.remove)
        return manifest

    def layer_file(self, layer: int) -> str:
        return expert_file_name(layer, self.plan.shape.num_hidden_layers)

    def write_layer(self, layer: int) -> tuple[ExpertFile, dict[str, str]]:
        plan, file = self.plan, self.layer_file(layer)
        self.report.step = Path(file).stem
        if record := self.resume(file, plan.layer_source_bytes[layer]):
            return ExpertFile.from_json(record["entry"], plan.shape), record["source_sha256"]
        num_experts = plan.shape.num_experts
        share = plan.layer_source_bytes[layer] // num_experts

        def blocks() -> Iterator[HashedBlock]:
            for _ in range(num_experts):
                encoded = next(self.encoded)
                yield HashedBlock(encoded.arrays["block"], encoded.sha256)
                self.report.bytes_out += len(encoded.arrays["block"])
                self.on_bytes(share)

        schemes = plan.schemes[layer]
        entry = write_expert_file(plan.out, layer, plan.shape, schemes.tiers, schemes.expert_tiers, blocks())
        return entry, self.finish(file, entry.as_json(), plan.layer_shards(layer))

    def write_resident(self) -> tuple[ResidentFile, dict[str, str]]:
        plan = self.plan
        self.report.step = RESIDENT
        if record := self.resume(RESIDENT_NAME, plan.resident_source_bytes):
            return ResidentFile.from_json(record["entry"]), record["source_sha256"]
        arrays, quantized = plan.forecast.resident_arrays, plan.forecast.quantized
        with tempfile.TemporaryFile(dir=self.journal.folder) as spill:

            def read(spec: TensorSpec) -> Iterator[memoryview]:
                for encoded, data in self.residents.read(spec, self.encoded, spill):
                    yield data
                    self.report.bytes_out += len(data)
                    self.on_bytes(encoded.size if encoded else 0)

            entry = write_resident_file(plan.out, arrays, quantized, read)
        return entry, self.finish(RESIDENT_NAME, entry.as_json(), plan.resident_shards)

    def resume(self, file: str, source_bytes: int) -> dict[str, Any] | None:
        """The record of a file that an earlier run finished, counted as dealt with."""
        record = find_finished(self.plan, self.journal, file)
        if record is not None:
            self.report.rounding.add({kind: RoundingError(*error) for kind, error in record["rounding"].items()})
            self.on_bytes(source_bytes)
        return record

    def finish(self, file: str, entry: dict[str, Any], shards: set[str]) -> dict[str, str]:
        """Note a file as finished, if what it was made from is still the same; the hashes of its tensors."""
        self.plan.check_source(shards)
        hashes = self.hashes.take()
        self.journal.put(Path(file).stem, make_record(entry, hashes, self.rounding))
        self.rounding = Rounding()
        self.plan.checkpoint.reader.finished(file)
        return hashes

    def taken(self, results: Iterator[Encoded]) -> Iterator[Encoded]:
        """Results in order, their hashes, errors and times noted; what the taker does between two counts as writing."""
        while True:
            encoded = next(results, None)
            if encoded is None:
                return
            self.hashes.add(encoded.record)
            for stage, seconds in encoded.record.seconds.items():
                self.report.seconds[stage] += seconds
            self.report.bytes_in += encoded.size
            self.rounding.add(encoded.rounding)
            self.report.rounding.add(encoded.rounding)
            with _timed(self.report, "hash and write files"):
                yield encoded


def find_finished(plan: ConversionPlan, journal: Journal, file: str) -> dict[str, Any] | None:
    """The journal's record of a file, if the file is still there in its size."""
    record, path = journal.get(Path(file).stem), plan.out / file
    if record is None or not path.exists() or path.stat().st_size != record["entry"]["size_bytes"]:
        return None
    return record


def make_record(entry: dict[str, Any], hashes: dict[str, str], rounding: Rounding) -> dict[str, Any]:
    """What the journal keeps of a finished file: its entry in the manifest, and what went into it."""
    errors = {kind: list(vars(error).values()) for kind, error in rounding.items()}
    return {"entry": entry, "source_sha256": hashes, "rounding": errors}


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


def reads_ahead(plan: ConversionPlan) -> bool:
    """Whether others read what a piece of work needs: then there is no gain in more of them than cores."""
    weights = (place.weight for layer in plan.source.experts for place in layer[0].values())
    return plan.checkpoint.reader.reads_ahead and all(weight.reads_ahead for weight in weights)


def list_expert_jobs(plan: ConversionPlan, layers: Iterable[int]) -> Iterator[Callable[[], Encoded]]:
    """Pieces of work, an expert each; what it reads is read ahead from when it is taken from here."""
    for layer in layers:
        matrices = block_geometry(plan.shape, plan.schemes[layer][0]).matrices  # of the same sizes in every expert
        for expert in range(plan.shape.num_experts):
            for projection, matrix in matrices:
                place = plan.source.experts[layer][expert][projection]
                place.weight.prefetch(plan.checkpoint, place.first_row, matrix.out_features)
            yield partial(encode_expert, plan, layer, expert)


def encode_expert(plan: ConversionPlan, layer: int, expert: int) -> Encoded:
    """Read one expert and make its block. Raises CheckpointError naming a tensor that is not finite."""
    geometry = block_geometry(plan.shape, plan.schemes[layer][expert])
    arrays: dict[str, memoryview] = {}
    rounding: dict[str, RoundingError] = {}
    size = 0
    with plan.checkpoint.reader.recording() as record:
        for projection, matrix in geometry.matrices:
            place = plan.source.experts[layer][expert][projection]
            where = f"{plan.checkpoint.directory}: {place.weight.name} (expert {expert})"
            rows = (place.first_row, matrix.out_features)
            encoded, error = _encode(
                plan, record, place.weight, *rows, matrix.scheme, where, (layer, expert, projection)
            )
            arrays |= {f"{projection}.{name}": _bytes_of(array) for name, array in encoded.items()}
            rounding |= {projection: error} if error else {}
            size += place.weight.source_bytes * matrix.out_features // place.weight.num_rows
        block = assemble_block(geometry, arrays)
        (digest,) = record.hash(block)
    return Encoded({"block": memoryview(block)}, size, rounding, digest, record)


class ResidentEncoder:
    """Gives the arrays of resident.safetensors piece by piece, in the order of the file.

    A quantized matrix makes three arrays that lie far apart in the file: the source is quantized once for the
    integers, and the scales and biases wait for their turn in a temporary file, for there are hundreds of megabytes.
    """

    def __init__(self, plan: ConversionPlan):
        self.plan = plan
        self.spilled: dict[str, list[tuple[int, int]]] = {}  # array -> (offset, size) of its pieces

    def list_jobs(self) -> Iterator[Callable[[], Encoded]]:
        """The pieces of work in the order in which `read` wants their results."""
        for spec in layout_tensors(self.plan.forecast.resident_arrays)[1]:
            yield from (partial(self._encode, spec.name, first, count) for first, count in self._list_pieces(spec.name))

    def read(
        self, spec: TensorSpec, encoded: Iterator[Encoded], spill: IO[bytes]
    ) -> Iterator[tuple[Encoded | None, memoryview]]:
        """The bytes of one array, each with the piece of work that they come from, if they come fresh."""
        for offset, size in self.spilled.pop(spec.name, ()):
            spill.seek(offset)
            yield None, memoryview(spill.read(size))
        for _ in self._list_pieces(spec.name):
            piece = next(encoded)
            yield piece, piece.arrays.pop("weight")
            matrix = spec.name.rpartition(".")[0]
            for name, data in piece.arrays.items():
                self.spilled.setdefault(f"{matrix}.{name}", []).append((spill.seek(0, os.SEEK_END), len(data)))
                spill.write(data)

    def _list_pieces(self, name: str) -> Iterator[tuple[int, int]]:
        """(first row, rows) of each piece of a tensor; none for the scales and biases that come with one."""
        weight = self.plan.source.residents.get(name)
        if weight is not None:
            yield from weight.list_pieces(PIECE_BYTES)

    def _encode(self, name: str, first: int, count: int) -> Encoded:
        scheme = self.plan.forecast.quantized.get(name.removesuffix(".weight"))
        where = f"{self.plan.checkpoint.directory}: {name}"
        with self.plan.checkpoint.reader.recording() as record:
            weight = self.plan.source.residents[name]
            if scheme is None:
                rows = weight.read_rows(self.plan.checkpoint, first, count)
                _check_finite(rows, where)
                arrays, error = {"weight": rows.as_dtype(weight.dtype)}, None
            else:
                arrays, error = _encode(self.plan, record, weight, first, count, scheme, where)
                arrays["weight"] = arrays.pop("w_q")
        data = {name: _bytes_of(array) for name, array in arrays.items()}
        total, rows_in_all = weight.source_bytes, weight.num_rows  # pieces add up to it, whatever is left over
        size = total * (first + count) // rows_in_all - total * first // rows_in_all
        return Encoded(data, size, {RESIDENT: error} if error else {}, record=record)


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


def _encode(
    plan: ConversionPlan,
    record: Record,
    weight: Weight,
    first: int,
    count: int,
    scheme: Scheme,
    where: str,
    place: tuple[int, int, str] | None = None,
) -> tuple[dict[str, np.ndarray], RoundingError | None]:
    """The stored arrays of some rows of a weight by name, and what rounding cost.

    place   layer, expert and projection, of a routed expert: what calibration knows of it is used

    Raises CheckpointError if a weight is not finite.
    """
    tuned = plan.calibration.tuned_matrix(*place) if plan.calibration and place else None
    if tuned is not None:
        rows = weight.read_rows(plan.checkpoint, first, count)
        with record.timed("quantize"):
            _check_finite(rows, where)
            assert scheme.group_size is not None
            meant = dequantize(**tuned, bits=scheme.bits, group_size=scheme.group_size)
            return tuned, measure_error(widen(rows.values), meant)
    if scheme.group_size is not None and weight.keeps_integers(scheme):
        kept = weight.read_integers(plan.checkpoint, first, count, scheme.group_size)
        for values in (kept.scales, kept.biases):
            _check_finite(Rows("BF16", values), where)
        return kept.arrays, None
    rows = weight.read_rows(plan.checkpoint, first, count)
    try:
        with record.timed("quantize"):
            if scheme.group_size is None:
                _check_finite(rows, where)
                return {"weight": rows.to_bf16()}, None
            moments = plan.calibration.moments(*place) if plan.calibration and place else None
            quantized = QUANTIZERS[plan.recipe.quantizer](rows.values, scheme.bits, scheme.group_size, moments)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}: the file is damaged, download it again") from None
    return quantized.arrays, quantized.error


def _check_finite(rows: Rows, where: str) -> None:
    exponents = rows.values & np.uint16(0x7F80) if rows.dtype == "BF16" else None
    finite = np.isfinite(rows.values).all() if exponents is None else (exponents != 0x7F80).all()
    if not finite:
        raise CheckpointError(f"{where} holds NaN or infinity: the file is damaged, download it again")


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).data.cast("B")


@contextmanager
def _timed(report: Report, stage: str) -> Iterator[None]:
    started = perf_counter()
    try:
        yield
    finally:
        report.seconds[stage] += perf_counter() - started
