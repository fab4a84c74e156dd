"""The golden packs of format version 1: two tiny packs from a fixed integer pattern, written by the layout writer.

They are frozen. Every later moepack must read them, and its writer must reproduce them byte for byte; a new format
version adds a folder beside `golden/v1` and leaves that one alone. No quantizer and no random library is involved, so
nothing but a change of the format can change a byte. `minimal` is about the smallest pack there can be and the worked
example of FORMAT.md: one block, five rows, gaps between the sections. `mixed` has what is easily got wrong: blocks of
one file and matrices of one block at different bits, group counts that differ by matrix, blocks of one, two and three
pages, bf16 blocks, an MTP layer, odd tensor sizes, an empty copied file.

    python tests/make_golden.py --check tests/golden/v1
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moepack.layout.geometry import BlockGeometry, MatrixGeometry, Scheme
from moepack.layout.manifest import BlockSchemes, ExpertFile, Manifest, ModelShape, block_geometry
from moepack.layout.quantized import bf16_to_float32, dequantize
from moepack.layout.reader import Pack
from moepack.layout.spec import expert_file_name
from moepack.layout.tensor_file import TensorSpec
from moepack.layout.writer import assemble_block, copy_file, write_expert_file, write_manifest, write_resident_file

EXPECTED_NAME = "expected.json"
MINIMAL = ModelShape(hidden_size=32, moe_intermediate_size=5, num_experts=1, num_hidden_layers=1)
MIXED = ModelShape(hidden_size=96, moe_intermediate_size=64, num_experts=2, num_hidden_layers=2)
COPIED = {
    "config.json": '{"model_type": "qwen3_5_moe"}\n',
    "chat_template.jinja": "{{ messages[0].content }} – no line end",
    "merges.txt": "",
}


def pattern(label: str, count: int) -> np.ndarray:
    """`count` integers below 2**32 (uint64) that look random and depend on the label and their index alone."""
    values = np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(zlib.crc32(label.encode()))
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        values &= np.uint64(0xFFFFFFFF)
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values & np.uint64(0xFFFFFFFF)


def array_bytes(label: str, kind: str, dtype: str, shape: Sequence[int]) -> bytes:
    """The bytes of one array: any integers, scales of 2**-7 to 2**-5, negative biases, weights of both signs."""
    values = pattern(label, math.prod(shape))
    if kind == "scales":
        return (0x3C00 + (values & np.uint64(0xFF))).astype("<u2").tobytes()
    if kind == "biases":
        return (0xBD00 + (values & np.uint64(0xFF))).astype("<u2").tobytes()
    if dtype == "BF16":
        sign, rest = (values & np.uint64(1)) << np.uint64(15), (values >> np.uint64(1)) & np.uint64(0x1FF)
        return (sign | (0x3C00 + rest)).astype("<u2").tobytes()
    if dtype == "F32":
        return (0x3F000000 + (values & np.uint64(0x7FFFFF))).astype("<u4").tobytes()
    return values.astype("<u4").tobytes()


def write_layer(
    directory: Path, layer: int, shape: ModelShape, tiers: Sequence[BlockSchemes], expert_tiers: Sequence[int]
) -> ExpertFile:
    """One expert file, its blocks filled from the pattern."""
    blocks = []
    for expert, tier in enumerate(expert_tiers):
        geometry = block_geometry(shape, tiers[tier])
        label = f"{expert_file_name(layer, shape.num_hidden_layers)} {expert} "
        sections = {
            section.name: array_bytes(label + section.name, section.name.split(".")[1], section.dtype, section.shape)
            for section in geometry.sections
        }
        blocks.append(assemble_block(geometry, sections))
    return write_expert_file(directory, layer, shape, tiers, expert_tiers, blocks)


def write_pack(
    directory: Path,
    shape: ModelShape,
    layers: Sequence[tuple[Sequence[BlockSchemes], Sequence[int]]],
    plain: Sequence[tuple[str, str, tuple[int, ...]]],
    quantized: dict[str, MatrixGeometry],
    copied: dict[str, str],
) -> None:
    """A whole pack: `layers` are (tiers, expert_tiers), `plain` and `quantized` the resident weights."""
    directory.mkdir(parents=True)
    names = {"w_q": "weight", "scales": "scales", "biases": "biases"}
    arrays = list(plain)
    for name, matrix in quantized.items():
        arrays += [(f"{name}.{names[part]}", dtype, size) for part, dtype, size in matrix.arrays]

    def read(spec: TensorSpec) -> Iterator[bytes]:
        yield array_bytes(spec.name, spec.name.rpartition(".")[2], spec.dtype, spec.shape)

    with tempfile.TemporaryDirectory() as source:
        for name, text in copied.items():
            (Path(source) / name).write_bytes(text.encode())
        manifest = Manifest(
            model={"architecture": "qwen3_5_moe", "text_config": {**vars(shape), "num_experts_per_tok": 1}},
            expert_files=tuple(
                write_layer(directory, layer, shape, tiers, expert_tiers)
                for layer, (tiers, expert_tiers) in enumerate(layers)
            ),
            resident=write_resident_file(
                directory, arrays, {name: matrix.scheme for name, matrix in quantized.items()}, read
            ),
            copied_files=tuple(copy_file(Path(source) / name, directory) for name in copied),
            provenance={"source": "a fixed integer pattern – see make_golden.py"},
        )
    write_manifest(directory, manifest)


def write_all(directory: Path) -> None:
    """Both packs and the sums of their weights."""
    three, four, two = Scheme(3, 32), Scheme(4, 32), Scheme(2, 32)
    write_pack(
        directory / "minimal",
        MINIMAL,
        layers=[([{"gate_proj": three, "up_proj": four, "down_proj": Scheme(16, None)}], [0])],
        plain=[("model.norm.weight", "BF16", (3,))],
        quantized={},
        copied={},
    )
    blended = {"gate_proj": four, "up_proj": three, "down_proj": Scheme(2, 64)}
    eight = {"gate_proj": Scheme(8, 32), "up_proj": Scheme(8, 32), "down_proj": Scheme(8, 64)}
    bf16 = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), Scheme(16, None))
    write_pack(
        directory / "mixed",
        MIXED,
        layers=[([blended, eight], [1, 0]), ([bf16, blended], [0, 1]), ([dict.fromkeys(bf16, two)], [0, 0])],
        plain=[
            ("model.norm.weight", "BF16", (96,)),
            ("model.layers.0.linear_attn.A_log", "F32", (3,)),
            ("model.layers.0.linear_attn.conv1d.weight", "BF16", (5, 1, 3)),
            ("model.layers.0.mlp.gate.weight", "BF16", (2, 96)),
            ("mtp.norm.weight", "BF16", (1,)),
        ],
        quantized={
            "model.embed_tokens": MatrixGeometry(7, 96, Scheme(8, 32)),
            "model.layers.0.mlp.shared_expert.down_proj": MatrixGeometry(3, 128, Scheme(4, 128)),
            "mtp.fc": MatrixGeometry(5, 192, Scheme(4, 64)),
        },
        copied=COPIED,
    )
    expected = {name: measure(directory / name) for name in ("minimal", "mixed")}
    (directory / EXPECTED_NAME).write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def read_matrix(geometry: BlockGeometry, block: bytes | memoryview, projection: str) -> np.ndarray:
    """One matrix of a block as float32 [N, K], by the definition in layout/quantized.py."""
    arrays = {
        section.name.split(".")[1]: np.frombuffer(
            block, {"U32": "<u4", "BF16": "<u2"}[section.dtype], math.prod(section.shape), section.offset_bytes
        ).reshape(section.shape)
        for section in geometry.sections
        if section.name.startswith(projection + ".")
    }
    scheme = dict(geometry.matrices)[projection].scheme
    if scheme.group_size is None:
        return bf16_to_float32(arrays["weight"])
    return dequantize(**arrays, bits=scheme.bits, group_size=scheme.group_size)


def checksum(weights: np.ndarray) -> tuple[float, float]:
    """The sum of the weights, and one in which each counts by its position: both exactly rounded, on any machine."""
    values = weights.reshape(-1).astype(np.float64)
    return math.fsum(values), math.fsum(values * (np.arange(values.size) % 97 + 1))


def measure(directory: Path) -> dict[str, tuple[float, float]]:
    """Both sums of every matrix of a pack, by a name for each."""
    sums = {}
    with Pack.open(directory) as pack:
        for entry in pack.manifest.expert_files:
            layer = pack.geometry(entry.layer)
            for expert in range(layer.num_experts):
                geometry = layer.block(expert)
                block = memoryview(bytearray(geometry.block_stride))
                pack.read_block(entry.layer, expert, block)
                for projection, _ in geometry.matrices:
                    weights = read_matrix(geometry, block, projection)
                    sums[f"{entry.file} expert {expert} {projection}"] = checksum(weights)
        resident = pack.manifest.resident
        sums |= {name: checksum(pack.read_resident_matrix(name)) for name in resident.quantized}
        for name, tensor in resident.tensors.items():
            if name.rpartition(".")[0] not in resident.quantized:
                values = pack.read_resident(name)
                sums[name] = checksum(bf16_to_float32(values) if tensor.dtype == "BF16" else values)
    return sums


def find_differences(left: Path, right: Path) -> list[str]:
    """Names of the files that are not the same in two directories."""
    here, there = (
        {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (left, right)
    )
    return sorted(name for name in {*here, *there} if here.get(name) != there.get(name))


def main() -> int:
    """Write or compare; the exit code is 1 if anything differs."""
    parser = argparse.ArgumentParser(description="Write the golden packs, or compare them with what is written now.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--check", action="store_true", help="compare, write nothing there")
    arguments = parser.parse_args()
    if not arguments.check:
        if arguments.directory.exists():
            print(f"{arguments.directory}: exists already, and golden packs are frozen", file=sys.stderr)
            return 1
        write_all(arguments.directory)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        write_all(Path(scratch))
        differences = find_differences(arguments.directory, Path(scratch))
    for name in differences:
        print(f"{arguments.directory / name}: differs from what the writer makes now")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
