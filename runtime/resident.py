"""The weights that stay in memory: all that is not a routed expert, as they lie in the pack.

They are read past the page cache straight into one run of huge pages, which is locked there if the user may: weights
that are swapped out or evicted cost more than any expert. Real models' arrays start on multiples of 64 in the
file and stay where they were read to; the odd ones of small models are moved. The MTP head is left on the disk:
nothing here drafts with it.

    weights = ResidentWeights.load(pack, architecture)
    weights.matrix("model.layers.0.mlp.gate")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moepack.kernels import reference
from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.architecture import Architecture, resident_shapes
from moepack.layout.errors import DamagedPack
from moepack.layout.geometry import MatrixGeometry, align_up
from moepack.layout.pages import HUGE_PAGE_BYTES
from moepack.layout.reader import Pack
from moepack.layout.spec import PROJECTIONS, RESIDENT_NAME, SECTION_ALIGNMENT
from moepack.layout.storage import DIRECT_ALIGNMENT

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
UNUSED_PREFIX = "mtp."
READ_BYTES = 8 * 2**20  # in one call


@dataclass(frozen=True)
class _Run:
    """Arrays that follow each other in the file, with their place in memory; starts on a sector in both."""

    file_offset: int
    memory_offset: int
    size_bytes: int


class _MemoryMap:
    """Where everything lies in memory: first the runs as they are read, then the arrays that must be moved.

    runs         what to read
    offsets      name -> offset in memory where the array is used
    moves        name -> offset in memory where it is read to, if that is not aligned
    size_bytes   all of it
    """

    def __init__(self, pack: Pack):
        tensors = pack.manifest.resident.tensors
        used = sorted((t.offset_bytes, name) for name, t in tensors.items() if not name.startswith(UNUSED_PREFIX))
        self.runs: list[_Run] = []
        self.offsets: dict[str, int] = {}
        for offset, name in used:
            run = self._extend(offset, tensors[name].size_bytes)
            self.offsets[name] = run.memory_offset + offset - run.file_offset
        self.size_bytes = self._end
        self.moves = {name: place for name, place in self.offsets.items() if place % SECTION_ALIGNMENT}
        for name in self.moves:
            self.offsets[name] = align_up(self.size_bytes, SECTION_ALIGNMENT)
            self.size_bytes = self.offsets[name] + tensors[name].size_bytes

    @property
    def _end(self) -> int:
        last = self.runs[-1] if self.runs else _Run(0, 0, 0)
        return last.memory_offset + align_up(last.size_bytes, DIRECT_ALIGNMENT)

    def _extend(self, offset: int, size_bytes: int) -> _Run:
        """The run that holds these bytes of the file: the last one made longer, or another one."""
        last = self.runs[-1] if self.runs else None
        if last and offset - (last.file_offset + last.size_bytes) <= DIRECT_ALIGNMENT:
            self.runs[-1] = _Run(last.file_offset, last.memory_offset, offset + size_bytes - last.file_offset)
        else:
            start = offset // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
            self.runs.append(_Run(start, self._end, offset + size_bytes - start))
        return self.runs[-1]


class ResidentWeights:
    """Matrices and vectors by their name in the pack.

    is_locked   whether the system has promised to keep them in memory
    """

    def __init__(self, tensors: dict[str, torch.Tensor], pack: Pack, is_locked: bool):
        self._tensors, self.is_locked = tensors, is_locked
        self._quantized = pack.manifest.resident.quantized

    @classmethod
    def load(cls, pack: Pack, architecture: Architecture, ops: Any = reference) -> ResidentWeights:
        """Read every tensor that the model needs to where `ops` computes.

        Raises DamagedPack if one is missing, misshapen or unreadable.
        """
        for name, shape in resident_shapes(architecture, mtp_layers=0).items():
            found = pack.manifest.resident.shape_of(name)
            if found != shape:
                text = f"{name} is {found or 'missing'}, the config needs {shape}: convert again"
                raise DamagedPack(pack.directory / RESIDENT_NAME, text)
        memory_map = _MemoryMap(pack)
        pages = ops.new_pages(memory_map.size_bytes)
        for run in memory_map.runs:
            _read_run(pack, run, pages.buffer)
        for name, place in memory_map.moves.items():
            offset, size = memory_map.offsets[name], pack.manifest.resident.tensors[name].size_bytes
            pages.buffer[offset : offset + size] = pages.buffer[place : place + size]
        data = ops.view_pages(pages)
        tensors = {}
        for name, offset in memory_map.offsets.items():
            entry = pack.manifest.resident.tensors[name]
            raw = data[offset : offset + entry.size_bytes]
            plain = entry.dtype in TORCH_DTYPES
            tensors[name] = raw.view(TORCH_DTYPES[entry.dtype]).view(entry.shape) if plain else raw
        return cls(tensors, pack, pages.lock())

    @staticmethod
    def size_bytes(pack: Pack) -> int:
        """Memory that the weights take."""
        return align_up(_MemoryMap(pack).size_bytes, HUGE_PAGE_BYTES)

    def matrix(self, name: str) -> Matrix:
        """A matrix by its name without ".weight", as it is stored."""
        weight = self._tensors[f"{name}.weight"]
        scheme = self._quantized.get(name)
        if scheme is None or scheme.group_size is None:
            return Matrix.from_floats(weight)
        scales, biases = (self._tensors[f"{name}.{part}"] for part in ("scales", "biases"))
        geometry = MatrixGeometry(scales.shape[0], scales.shape[1] * scheme.group_size, scheme)
        return Matrix.from_arrays(geometry, [weight, scales.flatten(), biases.flatten()])

    def vector(self, name: str) -> torch.Tensor:
        """A small tensor by its full name, in float32."""
        return self._tensors[name].float()

    def expert(self, stem: str) -> Expert:
        """A shared expert."""
        return Expert(*(self.matrix(f"{stem}.{name}") for name in PROJECTIONS))


def _read_run(pack: Pack, run: _Run, memory: memoryview) -> None:
    """Read a run into its place. Raises DamagedPack naming the offset."""
    for done in range(0, run.size_bytes, READ_BYTES):
        needed, offset = min(READ_BYTES, run.size_bytes - done), run.file_offset + done
        start = run.memory_offset + done
        piece = memory[start : start + align_up(needed, DIRECT_ALIGNMENT)]
        try:
            pack.read_range(RESIDENT_NAME, offset, piece, needed_bytes=needed, direct=True)
        except OSError as error:
            text = f"read of {needed} bytes failed twice: {error.strerror}"
            raise DamagedPack(pack.directory / RESIDENT_NAME, text, offset_bytes=offset) from None
    file = pack.open_file(RESIDENT_NAME, direct=True)
    if not file.is_direct:
        file.drop_cache()
