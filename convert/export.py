"""From a pack back to a checkpoint that other programs load: mlx-lm (quantized as it is) or transformers (bf16).

    mlx   the pack's own bytes under mlx-lm's names, its 2, 3, 4 and 8 bits are ours; without the MTP head, which mlx-lm
          does not load. mlx-lm keeps 1 + w of a norm in bf16, which rounds it: so do its own conversions.
    hf    every matrix dequantized to bf16 under the names of the release, one shard a layer and one for the rest.
          From a 16-bit pack this is the original, bit for bit.

Config, tokenizer, template and generation config are copied, the index is written last. One expert is in memory at a
time for each thread: its block is read once, compared with its checksum, and its parts written to the tensors that they
belong to. A shard gets its name when all of it was as the manifest says, so a damaged pack ends without an index and
with no shard that holds the damage. A stopped export goes on with the same command, shard by shard.

    export(Path("demo.moepack"), Path("demo-mlx"), "mlx", workers=2, on_bytes=progress.update)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moepack.convert.journal import JOURNAL_NAME, Journal
from moepack.convert.pipeline import map_in_order
from moepack.convert.shard_writer import ShardWriter
from moepack.kernels.native_quantize import dequantize_bf16
from moepack.layout.errors import DamagedPack, NotEnoughSpace, UsageError
from moepack.layout.geometry import BlockGeometry, MatrixGeometry, Section
from moepack.layout.manifest import CopiedFile
from moepack.layout.quantized import bf16_to_float32, float32_to_bf16
from moepack.layout.reader import Pack
from moepack.layout.spec import DTYPE_BYTES, MANIFEST_NAME, PROJECTIONS, RESIDENT_NAME
from moepack.layout.tensor_file import TensorSpec, layout_tensors
from moepack.layout.writer import atomic_file, copy_file

TARGETS = ("mlx", "hf")
CONFIG_NAME, INDEX_NAME = "config.json", "model.safetensors.index.json"
SHARD_NAMES = {  # as the two name their own
    "mlx": "model-{:05d}-of-{:05d}.safetensors",
    "hf": "model.safetensors-{:05d}-of-{:05d}.safetensors",
}
PIECE_BYTES = 8 * 2**20  # of a resident array at a time
RESTORE = "restore it from a copy or convert again, then run the same command again"
FORMAT = {"mlx": {"format": "mlx"}, "hf": {"format": "pt"}}  # what the two loaders want to find in a shard's header
# Norms that mlx-lm keeps with 1 added, see names.py of its models.
SHIFTED_NORM = re.compile(r".*\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)\.weight|model\.norm\.weight")
QUANTIZATION_KEYS = ("quantization_config", "quantization")


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the result."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Converted(NamedTuple):
    """What one job made.

    pieces     (name of a tensor of the result, its next bytes)
    resident   what it read of resident arrays, by name: they are hashed by whoever takes the results in order
    """

    pieces: Sequence[tuple[str, memoryview]]
    resident: Mapping[str, memoryview] = {}


@dataclass(frozen=True)
class Shard:
    """One file of the result, and its bytes as jobs: each reads and converts one piece of the pack."""

    tensors: tuple[ExportedTensor, ...]
    list_jobs: Callable[[], Iterator[Callable[[], Converted]]]

    @property
    def size_bytes(self) -> int:
        """Of the tensors, without the header."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    def layout(self, target: str) -> tuple[bytes, list[TensorSpec]]:
        """The file's header, and where each tensor lies."""
        return layout_tensors([(one.name, one.dtype, one.shape) for one in self.tensors], FORMAT[target])


def export(
    source: Path, out: Path, target: str, workers: int, on_bytes: Callable[[int, int], object]
) -> dict[str, Any]:
    """Write a checkpoint from a pack; returns its facts.

    target    one of TARGETS
    on_bytes  called with bytes of the result as they are written, and with how many there are in all

    Raises UsageError where the target cannot hold the pack or the output is in use, DamagedPack, NotEnoughSpace.
    """
    with Pack.open(source) as pack:
        shards = list_shards(pack, target)
        index = _make_index(pack, shards)
        facts = _describe(shards)
        total = facts["total_bytes"]
        if _is_finished(pack, out, target, shards, index):
            on_bytes(total, total)
            return facts | {"already_exported": True}
        check_output(out, total)

        def count(size_bytes: int) -> None:
            on_bytes(size_bytes, total)

        settings = {"pack": index["metadata"]["pack_manifest_sha256"], "target": target}
        with Journal.open(out, settings) as journal, ThreadPoolExecutor(workers) as pool:
            _check_resident_header(pack)
            _copy_files(pack, out)
            try:
                for name, shard in shards.items():
                    if journal.get(name) is None or not (out / name).exists():
                        write_shard(pack, out / name, shard, target, pool, workers, count)
                        journal.put(name, {"size_bytes": shard.size_bytes})
                    else:
                        count(shard.size_bytes)
            finally:
                pool.shutdown(cancel_futures=True)
            _write_json(out / CONFIG_NAME, make_config(pack, target))
            _write_json(out / INDEX_NAME, index)
            journal.remove()
    return facts | {"already_exported": False}


def forecast(source: Path, out: Path, target: str) -> dict[str, Any]:
    """The facts of an export that is not made: what it would take, and what is free. Raises as `export` does."""
    with Pack.open(source) as pack:
        shards = list_shards(pack, target)
        facts = _describe(shards)
        finished = _is_finished(pack, out, target, shards, _make_index(pack, shards))
    needed, free = (0, _free_bytes(out)) if finished else check_output(out, facts["total_bytes"])
    return facts | {"already_exported": finished, "needed_bytes": needed, "free_bytes": free}


def list_shards(pack: Pack, target: str) -> dict[str, Shard]:
    """File name -> what is in it: one file for each layer's experts, the last for everything else.

    Raises UsageError where a layer's experts have different bits and the target stacks them, DamagedPack if the config
    is not what it was.
    """
    layers = [
        layer for layer, entry in enumerate(pack.manifest.expert_files) if target == "hf" or not _is_mtp(pack, layer)
    ]
    make = _mlx_experts if target == "mlx" else _hf_experts
    shards = [make(pack, layer) for layer in layers]
    shards.append(_residents(pack, target))
    return {SHARD_NAMES[target].format(n, len(shards)): shard for n, shard in enumerate(shards, start=1)}


def check_output(out: Path, total_bytes: int) -> tuple[int, int]:
    """(bytes still to write, bytes free). Raises NotEnoughSpace with both where they do not fit.

    Raises UsageError unless the output is new, empty or an unfinished export.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / JOURNAL_NAME).is_dir())):
        raise UsageError(f"{out}: exists and is no unfinished export: choose another directory")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors*")) if out.is_dir() else 0
    needed, free = max(0, total_bytes - written), _free_bytes(out)
    if needed > free:
        raise NotEnoughSpace(f"{out}: {needed:,} bytes are still to be written, {free:,} are free")
    return needed, free


def write_shard(
    pack: Pack,
    path: Path,
    shard: Shard,
    target: str,
    pool: ThreadPoolExecutor,
    workers: int,
    on_bytes: Callable[[int], object],
) -> None:
    """One safetensors file, its pieces made side by side and written in order.

    Raises DamagedPack, and there is no file, if what was read is not what the manifest says.
    """
    check = _ResidentCheck(pack)
    with atomic_file(path) as file, ShardWriter(file.fileno(), *shard.layout(target)) as writer:
        for converted in map_in_order(pool, lambda job: job(), shard.list_jobs(), workers):
            for name, data in converted.resident.items():
                check.update(name, data)
            for name, data in converted.pieces:
                writer.write(name, data)
                on_bytes(len(data))


def make_config(pack: Pack, target: str) -> dict[str, Any]:
    """The source's config with the quantization that the result has; that of the source's own files is dropped."""
    config = _read_config(pack)
    for holder in (config, config.get("text_config", {})):
        for key in QUANTIZATION_KEYS:
            holder.pop(key, None)
    if target == "hf":
        return config
    modules: dict[str, Any] = {}
    for layer, entry in enumerate(pack.manifest.expert_files):
        if not _is_mtp(pack, layer):
            for projection, scheme in entry.tiers[0].items():
                modules[f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}"] = scheme
    for name, scheme in pack.manifest.resident.quantized.items():
        if not name.startswith("mtp."):
            modules[_mlx_name(name)] = scheme
    quantized = {name: scheme for name, scheme in modules.items() if scheme.is_quantized}
    if quantized:
        first = next(iter(quantized.values()))
        general = {"group_size": first.group_size, "bits": first.bits, "mode": "affine"}
        special = {
            name: {"group_size": scheme.group_size, "bits": scheme.bits}
            for name, scheme in quantized.items()
            if scheme != first
        }
        config["quantization"] = config["quantization_config"] = general | special
    return config


def _mlx_experts(pack: Pack, layer: int) -> Shard:
    """Three arrays of each projection, stacked over the experts: a block's sections as they are."""
    entry, geometry = pack.manifest.expert_files[layer], pack.geometry(layer)
    if len({geometry.block(expert) for expert in range(geometry.num_experts)}) > 1:
        raise UsageError(
            f"{pack.directory / entry.file}: its experts have different bits, mlx-lm stacks them: "
            "convert with the same bits for all"
        )
    sections, tensors = geometry.block(0).sections, []
    for section in sections:
        projection, _, part = section.name.partition(".")
        name = f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}.{'weight' if part == 'w_q' else part}"
        tensors.append(ExportedTensor(name, section.dtype, (geometry.num_experts, *section.shape)))

    def cut(expert: int, block: memoryview) -> list[tuple[str, memoryview]]:
        return [(tensor.name, _section(block, section)) for tensor, section in zip(tensors, sections)]

    return Shard(tuple(tensors), partial(_block_jobs, pack, layer, cut))


def _hf_experts(pack: Pack, layer: int) -> Shard:
    """gate_up_proj and down_proj of a layer, or every expert's matrices by name where the source had them so."""
    shape, geometry = pack.manifest.shape, pack.geometry(layer)
    hidden, inner, num_experts = shape.hidden_size, shape.moe_intermediate_size, geometry.num_experts
    stem = f"{_hf_prefix(pack)}layers.{layer}.mlp.experts"
    if _is_mtp(pack, layer):
        stem = f"mtp.layers.{layer - shape.num_hidden_layers}.mlp.experts"
    if f"{stem}.*" in pack.manifest.provenance.get("source_sha256", {}):
        names = {projection: f"{stem}.{{}}.{projection}.weight" for projection in PROJECTIONS}
        sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        tensors = [
            ExportedTensor(names[projection].format(expert), "BF16", size)
            for expert in range(num_experts)
            for projection, size in sizes.items()
        ]
    else:
        fused = f"{stem}.gate_up_proj"  # an expert's gate, then its up: as they lie in the block
        names = {"gate_proj": fused, "up_proj": fused, "down_proj": f"{stem}.down_proj"}
        tensors = [
            ExportedTensor(fused, "BF16", (num_experts, 2 * inner, hidden)),
            ExportedTensor(names["down_proj"], "BF16", (num_experts, hidden, inner)),
        ]

    def cut(expert: int, block: memoryview) -> list[tuple[str, memoryview]]:
        return [
            (names[projection].format(expert), _read_matrix(geometry.block(expert), projection, block))
            for projection in PROJECTIONS
        ]

    return Shard(tuple(tensors), partial(_block_jobs, pack, layer, cut))


def _block_jobs(
    pack: Pack, layer: int, cut: Callable[[int, memoryview], list[tuple[str, memoryview]]]
) -> Iterator[Callable[[], Converted]]:
    """An expert each: its block is read, checked and cut."""
    return (
        lambda expert=expert: Converted(cut(expert, _read_block(pack, layer, expert)))  # type: ignore[misc]
        for expert in range(pack.geometry(layer).num_experts)
    )


def _read_block(pack: Pack, layer: int, expert: int) -> memoryview:
    """One block, as the manifest has it. Raises DamagedPack."""
    block = memoryview(bytearray(pack.geometry(layer).block(expert).block_stride))
    pack.read_block(layer, expert, block)
    pack.check_block(layer, expert, block)
    return block


def _section(block: memoryview, section: Section) -> memoryview:
    return block[section.offset_bytes : section.offset_bytes + section.size_bytes]


def _read_matrix(geometry: BlockGeometry, projection: str, block: memoryview) -> memoryview:
    """One matrix of a block as bf16."""
    arrays = [_section(block, one) for one in geometry.sections if one.name.startswith(f"{projection}.")]
    return _widen(dict(geometry.matrices)[projection], arrays)


def _widen(matrix: MatrixGeometry, arrays: list[memoryview]) -> memoryview:
    """The bytes of a matrix in bf16 from those of its arrays."""
    if matrix.scheme.group_size is None:
        return arrays[0]
    typed = [
        np.frombuffer(data, "<u4" if dtype == "U32" else "<u2").reshape(shape)
        for data, (_, dtype, shape) in zip(arrays, matrix.arrays)
    ]
    weights = dequantize_bf16(*typed, bits=matrix.scheme.bits, group_size=matrix.scheme.group_size)
    return weights.view(np.uint8).data.cast("B")


def _residents(pack: Pack, target: str) -> Shard:
    """Every array outside the routed experts by the target's names and types."""
    resident, prefix = pack.manifest.resident, _hf_prefix(pack)
    tensors: list[ExportedTensor] = []
    jobs: list[Callable[[], Iterator[Callable[[], Converted]]]] = []
    for name, tensor in resident.tensors.items():
        matrix, _, part = name.rpartition(".")
        scheme = resident.quantized.get(matrix)
        if target == "mlx":
            if name.startswith("mtp."):
                continue
            shape = (tensor.shape[0], tensor.shape[2], 1) if name.endswith("conv1d.weight") else tensor.shape
            tensors.append(ExportedTensor(_mlx_name(name), tensor.dtype, shape))
            convert = partial(_add_one, dtype=tensor.dtype) if SHIFTED_NORM.fullmatch(name) else None
            jobs.append(partial(_array_jobs, pack, name, _mlx_name(name), convert))
        elif scheme is None:
            tensors.append(ExportedTensor(_hf_name(prefix, name), tensor.dtype, tensor.shape))
            jobs.append(partial(_array_jobs, pack, name, tensors[-1].name))
        elif part == "weight":
            geometry = MatrixGeometry(tensor.shape[0], tensor.shape[1] * 32 // scheme.bits, scheme)
            size = (geometry.out_features, geometry.in_features)
            tensors.append(ExportedTensor(_hf_name(prefix, name), "BF16", size))
            jobs.append(partial(_row_jobs, pack, matrix, tensors[-1].name, geometry))
    return Shard(tuple(tensors), lambda: (job for list_jobs in jobs for job in list_jobs()))


def _array_jobs(
    pack: Pack, name: str, new_name: str, convert: Callable[[memoryview], memoryview] | None = None
) -> Iterator[Callable[[], Converted]]:
    """The pieces of an array of the resident file."""
    size_bytes = pack.manifest.resident.tensors[name].size_bytes

    def read(first: int) -> Converted:
        data = _read_resident(pack, name, first, min(PIECE_BYTES, size_bytes - first))
        return Converted([(new_name, convert(data) if convert else data)], {name: data})

    return (partial(read, first) for first in range(0, size_bytes, PIECE_BYTES))


def _row_jobs(pack: Pack, matrix: str, new_name: str, geometry: MatrixGeometry) -> Iterator[Callable[[], Converted]]:
    """A quantized resident matrix as bf16, some rows at a time."""
    names = [f"{matrix}.{part}" for part in ("weight", "scales", "biases")]
    step = max(1, PIECE_BYTES // (geometry.in_features * DTYPE_BYTES["BF16"]))

    def read(first: int, count: int) -> Converted:
        part = MatrixGeometry(count, geometry.in_features, geometry.scheme)
        arrays = {}
        for name in names:
            row_bytes = pack.manifest.resident.tensors[name].size_bytes // geometry.out_features
            arrays[name] = _read_resident(pack, name, first * row_bytes, count * row_bytes)
        return Converted([(new_name, _widen(part, list(arrays.values())))], arrays)

    rows = geometry.out_features
    return (partial(read, first, min(step, rows - first)) for first in range(0, rows, step))


class _ResidentCheck:
    """Compares resident arrays with their checksums as their pieces go by, each array's in order."""

    def __init__(self, pack: Pack):
        self.pack = pack
        self.running: dict[str, tuple[Any, int]] = {}

    def update(self, name: str, data: memoryview) -> None:
        """Raises DamagedPack naming an array that ends here and is not what the manifest says."""
        tensor = self.pack.manifest.resident.tensors[name]
        digest, size_bytes = self.running.pop(name, (hashlib.sha256(), 0))
        digest.update(data)
        if size_bytes + len(data) < tensor.size_bytes:
            self.running[name] = digest, size_bytes + len(data)
        elif digest.hexdigest() != tensor.sha256:
            what = f"tensor {name}: {_name_digests(digest.hexdigest(), tensor.sha256)}: {RESTORE}"
            raise DamagedPack(self.pack.directory / RESIDENT_NAME, what, offset_bytes=tensor.offset_bytes)


def _check_resident_header(pack: Pack) -> None:
    """Raises DamagedPack; its tensors are compared as they are read."""
    resident, path = pack.manifest.resident, pack.directory / RESIDENT_NAME
    size = min((tensor.offset_bytes for tensor in resident.tensors.values()), default=resident.size_bytes)
    found = hashlib.sha256(_read_resident_range(pack, "header", 0, size)).hexdigest()
    if found != resident.header_sha256:
        raise DamagedPack(path, f"header: {_name_digests(found, resident.header_sha256)}: {RESTORE}")


def _read_resident(pack: Pack, name: str, first: int, size: int) -> memoryview:
    offset = pack.manifest.resident.tensors[name].offset_bytes
    return _read_resident_range(pack, f"tensor {name}", offset + first, size)


def _read_resident_range(pack: Pack, what: str, offset: int, size: int) -> memoryview:
    buffer = memoryview(bytearray(size))
    try:
        pack.read_range(RESIDENT_NAME, offset, buffer)
    except OSError as error:
        text = f"{what} cannot be read, tried twice: {error.strerror}"
        raise DamagedPack(pack.directory / RESIDENT_NAME, text, offset_bytes=offset) from None
    return buffer


def _add_one(data: memoryview, dtype: str) -> memoryview:
    if dtype == "BF16":
        return float32_to_bf16(bf16_to_float32(np.frombuffer(data, "<u2")) + np.float32(1)).data.cast("B")
    values = np.frombuffer(data, "<f2" if dtype == "F16" else "<f4")
    return (values + values.dtype.type(1)).data.cast("B")


def _is_mtp(pack: Pack, layer: int) -> bool:
    return layer >= pack.manifest.shape.num_hidden_layers


def _mlx_name(name: str) -> str:
    return f"language_model.{name}"


def _hf_prefix(pack: Pack) -> str:
    """model. in a checkpoint of the text model alone, model.language_model. where vision stands beside it."""
    nested = "text_config" in _read_config(pack)
    return "model.language_model." if nested else "model."


def _hf_name(prefix: str, name: str) -> str:
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


def _read_config(pack: Pack) -> dict[str, Any]:
    """The source's config, empty where there is none. Raises DamagedPack."""
    raw = pack.read_file(CONFIG_NAME) or b"{}"
    for entry in pack.manifest.copied_files:
        if entry.file == CONFIG_NAME:
            _check_copied(pack, entry, hashlib.sha256(raw).hexdigest())
    return json.loads(raw)


def _copy_files(pack: Pack, out: Path) -> None:
    """The files that go along as they are, first of all: damage in them is told before the hours of the weights.

    Raises DamagedPack.
    """
    for entry in pack.manifest.copied_files:
        if entry.file != CONFIG_NAME:
            copy = copy_file(pack.directory / entry.file, out)
            try:
                _check_copied(pack, entry, copy.sha256)
            except DamagedPack:
                (out / entry.file).unlink()
                raise


def _check_copied(pack: Pack, entry: CopiedFile, found: str) -> None:
    if found != entry.sha256:
        raise DamagedPack(pack.directory / entry.file, f"{_name_digests(found, entry.sha256)}: {RESTORE}")


def _name_digests(found: str, expected: str) -> str:
    return f"sha256 is {found[:12]}…, the manifest says {expected[:12]}…"


def _describe(shards: dict[str, Shard]) -> dict[str, Any]:
    sizes = [tensor.size_bytes for shard in shards.values() for tensor in shard.tensors]
    return {"shards": len(shards), "tensors": len(sizes), "total_bytes": sum(sizes)}


def _make_index(pack: Pack, shards: dict[str, Shard]) -> dict[str, Any]:
    """Which tensor is in which file, and of which pack: by that a finished export is known again."""
    weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard.tensors}
    manifest = hashlib.sha256((pack.directory / MANIFEST_NAME).read_bytes()).hexdigest()
    metadata = {"total_size": _describe(shards)["total_bytes"], "pack_manifest_sha256": manifest}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _is_finished(pack: Pack, out: Path, target: str, shards: dict[str, Shard], index: dict[str, Any]) -> bool:
    """Whether the output is this export, ended well, with every file still there in its size."""
    try:
        if (out / JOURNAL_NAME).exists() or json.loads((out / INDEX_NAME).read_bytes()) != index:
            return False
    except (OSError, ValueError):
        return False
    sizes = {name: len(shard.layout(target)[0]) + shard.size_bytes for name, shard in shards.items()}
    sizes |= {one.file: one.size_bytes for one in pack.manifest.copied_files if one.file != CONFIG_NAME}
    paths = {out / name: size for name, size in sizes.items()}
    return (out / CONFIG_NAME).is_file() and all(
        path.is_file() and path.stat().st_size == size for path, size in paths.items()
    )


def _free_bytes(out: Path) -> int:
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(folder).free


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
