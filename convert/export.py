"""From a pack back to a checkpoint that other programs load: mlx-lm (quantized as it is) or transformers (bf16).

    mlx   the pack's own bytes under mlx-lm's names, its 2, 3, 4 and 8 bits are ours; without the MTP head, which mlx-lm
          does not load. mlx-lm keeps 1 + w of a norm in bf16, which rounds it: so do its own conversions.
    hf    every matrix dequantized to bf16 under the names of the release, one shard a layer and one for the rest.
          From a 16-bit pack this is the original, bit for bit.

Config, tokenizer, template and generation config are copied, the index is written last. One expert is in memory at a
time for each thread. A stopped export goes on with the same command, shard by shard.

    export(Path("demo.moepack"), Path("demo-mlx"), "mlx", workers=2, on_bytes=progress.update)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moepack.convert.journal import JOURNAL_NAME, Journal
from moepack.convert.pipeline import map_in_order
from moepack.kernels.native_quantize import dequantize_bf16
from moepack.layout.errors import NotEnoughSpace, PackError, UsageError
from moepack.layout.geometry import MatrixGeometry
from moepack.layout.quantized import bf16_to_float32, float32_to_bf16
from moepack.layout.reader import Pack
from moepack.layout.spec import DTYPE_BYTES, MANIFEST_NAME, RESIDENT_NAME
from moepack.layout.tensor_file import layout_tensors
from moepack.layout.writer import atomic_file, copy_file

TARGETS = ("mlx", "hf")
CONFIG_NAME, INDEX_NAME = "config.json", "model.safetensors.index.json"
SHARD_NAMES = {  # as the two name their own
    "mlx": "model-{:05d}-of-{:05d}.safetensors",
    "hf": "model.safetensors-{:05d}-of-{:05d}.safetensors",
}
PIECE_BYTES = 8 * 2**20  # of a resident array at a time
FORMAT = {"mlx": {"format": "mlx"}, "hf": {"format": "pt"}}  # what the two loaders want to find in a shard's header
# Norms that mlx-lm keeps with 1 added, see names.py of its models.
SHIFTED_NORM = re.compile(r".*\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)\.weight|model\.norm\.weight")
QUANTIZATION_KEYS = ("quantization_config", "quantization")


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the result, and its bytes as jobs: each reads and converts one piece."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    jobs: Callable[[], Iterator[Callable[[], bytes | memoryview]]]


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
        sizes = {name: sum(_size(tensor) for tensor in tensors) for name, tensors in shards.items()}
        total = sum(sizes.values())
        check_output(out, total)

        def count(size_bytes: int) -> None:
            on_bytes(size_bytes, total)

        manifest = hashlib.sha256((source / MANIFEST_NAME).read_bytes()).hexdigest()
        with Journal.open(out, {"pack": manifest, "target": target}) as journal, ThreadPoolExecutor(workers) as pool:
            try:
                for name, tensors in shards.items():
                    if journal.get(name) is None or not (out / name).exists():
                        write_shard(out / name, tensors, FORMAT[target], pool, workers, count)
                        journal.put(name, {"size_bytes": sizes[name]})
                    else:
                        count(sizes[name])
            finally:
                pool.shutdown(cancel_futures=True)
            for entry in pack.manifest.copied_files:
                if entry.file != CONFIG_NAME:
                    copy_file(source / entry.file, out)
            _write_json(out / CONFIG_NAME, make_config(pack, target))
            weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
            metadata = {"total_size": total}
            _write_json(out / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
            journal.remove()
    return {"shards": len(shards), "tensors": len(weight_map), "total_bytes": total}


def list_shards(pack: Pack, target: str) -> dict[str, list[ExportedTensor]]:
    """File name -> its tensors: one file for each layer's experts, the last for everything else.

    Raises UsageError where a layer's experts have different bits and the target stacks them.
    """
    layers = [
        layer for layer, entry in enumerate(pack.manifest.expert_files) if target == "hf" or not _is_mtp(pack, layer)
    ]
    make = _mlx_experts if target == "mlx" else _hf_experts
    groups = [list(make(pack, layer)) for layer in layers]
    groups.append(list(_residents(pack, target)))
    return {SHARD_NAMES[target].format(n, len(groups)): group for n, group in enumerate(groups, start=1)}


def check_output(out: Path, total_bytes: int) -> None:
    """Raise UsageError unless the output is new, empty or an unfinished export, NotEnoughSpace if it will not fit."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / JOURNAL_NAME).is_dir())):
        raise UsageError(f"{out}: exists and is no unfinished export: choose another directory")
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    written = sum(path.stat().st_size for path in out.glob("*.safetensors*")) if out.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if total_bytes - written > free:
        raise NotEnoughSpace(f"{out}: {total_bytes - written:,} bytes are still to be written, {free:,} are free")


def write_shard(
    path: Path,
    tensors: list[ExportedTensor],
    metadata: dict[str, str],
    pool: ThreadPoolExecutor,
    workers: int,
    on_bytes: Callable[[int], object],
) -> None:
    """One safetensors file, its pieces made side by side and written in order."""
    header, specs = layout_tensors([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], metadata)
    by_name = {tensor.name: tensor for tensor in tensors}
    jobs = (job for spec in specs for job in by_name[spec.name].jobs())
    with atomic_file(path, large=True) as file:
        file.write(header)
        for piece in map_in_order(pool, lambda job: job(), jobs, workers):
            file.write(piece)
            on_bytes(len(piece))


def make_config(pack: Pack, target: str) -> dict[str, Any]:
    """The source's config with the quantization that the result has; that of the source's own files is dropped."""
    config = json.loads(pack.read_file(CONFIG_NAME) or b"{}")
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


def _mlx_experts(pack: Pack, layer: int) -> Iterator[ExportedTensor]:
    """Three arrays of each projection, stacked over the experts: a block's sections as they are."""
    entry, geometry = pack.manifest.expert_files[layer], pack.geometry(layer)
    if len({geometry.block(expert) for expert in range(geometry.num_experts)}) > 1:
        raise UsageError(
            f"{pack.directory / entry.file}: its experts have different bits, mlx-lm stacks them: "
            "convert with the same bits for all"
        )
    for number, section in enumerate(geometry.block(0).sections):
        projection, _, part = section.name.partition(".")
        name = f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}.{'weight' if part == 'w_q' else part}"
        yield ExportedTensor(
            name,
            section.dtype,
            (geometry.num_experts, *section.shape),
            lambda number=number: (  # type: ignore[misc]
                partial(_read_section, pack, layer, expert, number) for expert in range(geometry.num_experts)
            ),
        )


def _hf_experts(pack: Pack, layer: int) -> Iterator[ExportedTensor]:
    """gate_up_proj and down_proj of a layer, or every expert's matrices by name where the source had them so."""
    shape, num_experts = pack.manifest.shape, pack.geometry(layer).num_experts
    hidden, inner = shape.hidden_size, shape.moe_intermediate_size
    stem = f"{_hf_prefix(pack)}layers.{layer}.mlp.experts"
    if _is_mtp(pack, layer):
        stem = f"mtp.layers.{layer - shape.num_hidden_layers}.mlp.experts"
    sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if f"{stem}.*" in pack.manifest.provenance.get("source_sha256", {}):
        for expert in range(num_experts):
            for projection, size in sizes.items():
                jobs = partial(_matrix_jobs, pack, layer, [expert], [projection])
                yield ExportedTensor(f"{stem}.{expert}.{projection}.weight", "BF16", size, jobs)
        return
    experts = list(range(num_experts))
    fused = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}
    for name, projections in fused.items():
        rows, columns = sizes[projections[0]]
        jobs = partial(_matrix_jobs, pack, layer, experts, projections)
        yield ExportedTensor(f"{stem}.{name}", "BF16", (num_experts, rows * len(projections), columns), jobs)


def _matrix_jobs(
    pack: Pack, layer: int, experts: list[int], projections: list[str]
) -> Iterator[Callable[[], memoryview]]:
    return (partial(_read_matrix, pack, layer, expert, name) for expert in experts for name in projections)


def _read_section(pack: Pack, layer: int, expert: int, number: int) -> memoryview:
    """The bytes of one section of one block. Raises DamagedPack."""
    geometry = pack.geometry(layer)
    section = geometry.block(expert).sections[number]
    buffer = memoryview(bytearray(section.size_bytes))
    try:
        pack.read_range(pack.manifest.expert_files[layer].file, geometry.offsets[expert] + section.offset_bytes, buffer)
    except OSError as error:
        raise pack.damaged_block(layer, expert, f"{section.name} cannot be read: {error.strerror}") from None
    return buffer


def _read_matrix(pack: Pack, layer: int, expert: int, projection: str) -> memoryview:
    """One matrix of one expert as bf16. Raises DamagedPack."""
    block = pack.geometry(layer).block(expert)
    numbers = [n for n, section in enumerate(block.sections) if section.name.startswith(f"{projection}.")]
    arrays = [_read_section(pack, layer, expert, number) for number in numbers]
    return _widen(dict(block.matrices)[projection], arrays)


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


def _residents(pack: Pack, target: str) -> Iterator[ExportedTensor]:
    """Every array outside the routed experts by the target's names and types."""
    resident = pack.manifest.resident
    for name, tensor in resident.tensors.items():
        matrix, _, part = name.rpartition(".")
        scheme = resident.quantized.get(matrix)
        if target == "mlx":
            if name.startswith("mtp."):
                continue
            shape = (tensor.shape[0], tensor.shape[2], 1) if name.endswith("conv1d.weight") else tensor.shape
            convert = _add_one if SHIFTED_NORM.fullmatch(name) else None
            jobs = partial(_array_jobs, pack, name, tensor.dtype, convert)
            yield ExportedTensor(_mlx_name(name), tensor.dtype, shape, jobs)
        elif scheme is None:
            yield ExportedTensor(_hf_name(pack, name), tensor.dtype, tensor.shape, partial(_array_jobs, pack, name))
        elif part == "weight":
            geometry = MatrixGeometry(tensor.shape[0], tensor.shape[1] * 32 // scheme.bits, scheme)
            size = (geometry.out_features, geometry.in_features)
            yield ExportedTensor(_hf_name(pack, name), "BF16", size, partial(_row_jobs, pack, matrix, geometry))


def _array_jobs(
    pack: Pack, name: str, dtype: str = "", convert: Callable[[memoryview, str], memoryview] | None = None
) -> Iterator[Callable[[], memoryview]]:
    """The pieces of an array of the resident file."""
    tensor = pack.manifest.resident.tensors[name]

    def read(first: int) -> memoryview:
        data = _read_resident(pack, name, first, min(PIECE_BYTES, tensor.size_bytes - first))
        return convert(data, dtype) if convert else data

    return (partial(read, first) for first in range(0, tensor.size_bytes, PIECE_BYTES))


def _row_jobs(pack: Pack, matrix: str, geometry: MatrixGeometry) -> Iterator[Callable[[], memoryview]]:
    """A quantized resident matrix as bf16, some rows at a time."""
    names = [f"{matrix}.{part}" for part in ("weight", "scales", "biases")]
    step = max(1, PIECE_BYTES // (2 * geometry.in_features))

    def read(first: int, count: int) -> memoryview:
        part = MatrixGeometry(count, geometry.in_features, geometry.scheme)
        arrays = []
        for name in names:
            tensor = pack.manifest.resident.tensors[name]
            row_bytes = tensor.size_bytes // geometry.out_features
            arrays.append(_read_resident(pack, name, first * row_bytes, count * row_bytes))
        return _widen(part, arrays)

    rows = geometry.out_features
    return (partial(read, first, min(step, rows - first)) for first in range(0, rows, step))


def _read_resident(pack: Pack, name: str, first: int, size: int) -> memoryview:
    buffer = memoryview(bytearray(size))
    try:
        pack.read_range(RESIDENT_NAME, pack.manifest.resident.tensors[name].offset_bytes + first, buffer)
    except OSError as error:
        raise PackError(pack.directory / RESIDENT_NAME, f"tensor {name} cannot be read: {error.strerror}") from None
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
    nested = "text_config" in json.loads(pack.read_file(CONFIG_NAME) or b"{}")
    return "model.language_model." if nested else "model."


def _hf_name(pack: Pack, name: str) -> str:
    return _hf_prefix(pack) + name.removeprefix("model.") if name.startswith("model.") else name


def _size(tensor: ExportedTensor) -> int:
    return math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
