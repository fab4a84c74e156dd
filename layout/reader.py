"""Open a pack and read from it: blocks of experts, resident tensors, copied files.

Opening checks the manifest and the size of every file, so that nothing is allocated or read by a number that the disk
does not bear out. Reading does not check contents: verify.py does, and `Pack.check_block` for one block.

    pack = Pack.open("model.moepack")
    block = memoryview(bytearray(pack.geometry(3).block(17).block_stride))
    pack.read_block(3, 17, block)
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from moepack.layout.errors import DamagedPack
from moepack.layout.geometry import LayerGeometry
from moepack.layout.manifest import Manifest
from moepack.layout.quantized import bf16_to_float32, dequantize
from moepack.layout.spec import RESIDENT_NAME
from moepack.layout.storage import DataFile
from moepack.layout.tensor_file import read_tensor_header

REDO = "moe-convert SRC PACK --redo"  # layer:expert behind it makes a block again
NUMPY_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}  # BF16 and the F8 types come as their bit patterns, numpy has no such types


class Pack:
    """A pack on disk, opened for reading. Safe to use from several threads; close it or use it in a `with`."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self._geometries = [manifest.layer_geometry(layer) for layer in range(len(manifest.expert_files))]
        self._files: dict[tuple[str, bool], DataFile] = {}

    @classmethod
    def open(cls, directory: str | Path) -> Pack:
        """Open a pack directory.

        Raises DamagedPack if the manifest is missing or wrong or a file is missing or has another size, and
        UnsupportedVersion.
        """
        directory = Path(directory)
        pack = cls(directory, Manifest.read(directory))
        for problem in pack.find_size_problems() or pack.find_header_problems():
            raise problem
        return pack

    def find_size_problems(self) -> list[DamagedPack]:
        """Files that are missing or whose size differs from the manifest's, without reading them."""
        problems = []
        for name, expected in self.manifest.list_files().items():
            path = self.directory / name
            try:
                found = path.stat().st_size if path.is_file() and not path.is_symlink() else None
            except OSError as error:
                problems.append(DamagedPack(path, f"cannot be read: {error.strerror}"))
                continue
            if found is None:
                problems.append(DamagedPack(path, f"is missing or no plain file, expected {expected} bytes"))
            elif found != expected:
                change = "truncated" if found < expected else "extended"
                problems.append(DamagedPack(path, f"is {found} bytes long, expected {expected}: {change}"))
        return problems

    def find_header_problems(self) -> list[DamagedPack]:
        """Where the header of the resident file and the manifest disagree."""
        path, listed = self.directory / RESIDENT_NAME, self.manifest.resident.tensors
        try:
            found = read_tensor_header(path).tensors
        except OSError as error:
            return [DamagedPack(path, f"cannot be read: {error.strerror}")]
        except ValueError as error:
            return [DamagedPack(path, str(error))]
        facts = {name: (spec.dtype, spec.shape, spec.offset_bytes, spec.size_bytes) for name, spec in found.items()}
        stated = {name: (t.dtype, t.shape, t.offset_bytes, t.size_bytes) for name, t in listed.items()}
        return [
            DamagedPack(path, f"tensor {name}: the file has {facts.get(name)}, the manifest {stated.get(name)}")
            for name in sorted({*facts, *stated})
            if facts.get(name) != stated.get(name)
        ]

    def geometry(self, layer: int) -> LayerGeometry:
        """Where the blocks of one layer lie."""
        return self._geometries[layer]

    def read_block(self, layer: int, expert: int, into: memoryview) -> int:
        """Read one expert's block, padding included, into the start of a writable buffer; returns its bytes.

        A failed read is tried once more. Raises DamagedPack naming layer, expert and offset, and ValueError if the
        buffer is too small.
        """
        geometry = self._geometries[layer]
        size = geometry.block(expert).block_stride
        if into.nbytes < size:
            raise ValueError(f"the block of layer {layer} expert {expert} has {size} bytes, the buffer {into.nbytes}")
        name = self.manifest.expert_files[layer].file
        try:
            self.read_range(name, geometry.offsets[expert], into[:size])
        except OSError as error:
            raise self.damaged_block(layer, expert, f"read of {size} bytes failed twice: {error.strerror}") from None
        return size

    def check_block(self, layer: int, expert: int, block: memoryview) -> None:
        """Compare a block that was read with its checksum. Raises DamagedPack naming layer, expert and offset."""
        found, expected = hashlib.sha256(block).hexdigest(), self.manifest.expert_files[layer].block_sha256[expert]
        if found != expected:
            text = f"sha256 is {found[:12]}…, the manifest says {expected[:12]}…: {REDO} {layer}:{expert} mends it"
            raise self.damaged_block(layer, expert, text)

    def damaged_block(self, layer: int, expert: int, text: str) -> DamagedPack:
        """The error that says what is wrong with one block, and where it lies."""
        path, offset = self.directory / self.manifest.expert_files[layer].file, self._geometries[layer].offsets[expert]
        return DamagedPack(path, text, layer=layer, expert=expert, offset_bytes=offset)

    def open_file(self, name: str, direct: bool = False) -> DataFile:
        """A file of the pack, opened once for each way of reading it."""
        file = self._files.get((name, direct))
        if file is None:
            opened = DataFile(self.directory / name, direct)
            file = self._files.setdefault((name, direct), opened)
            if file is not opened:  # another thread was first
                opened.close()
        return file

    def read_resident(self, name: str, into: memoryview | None = None) -> np.ndarray:
        """One array of the resident weights, by its name in the manifest (BF16 as uint16 bit patterns).

        into   a writable buffer of the array's size to read into, if the caller owns the memory
        """
        tensor = self.manifest.resident.tensors[name]
        buffer = into if into is not None else memoryview(bytearray(tensor.size_bytes))
        try:
            self.read_range(RESIDENT_NAME, tensor.offset_bytes, buffer)
        except OSError as error:
            text = f"tensor {name} cannot be read, tried twice: {error.strerror}"
            raise DamagedPack(self.directory / RESIDENT_NAME, text, offset_bytes=tensor.offset_bytes) from None
        return np.frombuffer(buffer, dtype=NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)

    def read_resident_matrix(self, name: str) -> np.ndarray:
        """A resident matrix as float32 [N, K], dequantized if it is quantized. `name` without ".weight"."""
        scheme = self.manifest.resident.quantized.get(name)
        if scheme is None or scheme.group_size is None:
            values = self.read_resident(f"{name}.weight")
            is_bf16 = self.manifest.resident.tensors[f"{name}.weight"].dtype == "BF16"
            return bf16_to_float32(values) if is_bf16 else values.astype(np.float32)
        w_q, scales, biases = (self.read_resident(f"{name}.{suffix}") for suffix in ("weight", "scales", "biases"))
        return dequantize(w_q, scales, biases, bits=scheme.bits, group_size=scheme.group_size)

    def read_file(self, name: str) -> bytes | None:
        """The bytes of a copied file, None if the pack has none of that name."""
        for entry in self.manifest.copied_files:
            if entry.file == name:
                buffer = bytearray(entry.size_bytes)
                try:
                    self.read_range(name, 0, memoryview(buffer))
                except OSError as error:
                    text = f"cannot be read, tried twice: {error.strerror}"
                    raise DamagedPack(self.directory / name, text) from None
                return bytes(buffer)
        return None

    def read_range(
        self, name: str, offset: int, into: memoryview, *, needed_bytes: int | None = None, direct: bool = False
    ) -> None:
        """Fill a buffer from a file of the pack; a failed or short read is tried once more.

        needed_bytes   how much of it must be there, where a direct read is rounded up past the end of the file

        Raises OSError.
        """
        try:
            self.open_file(name, direct).read_into([into], offset, needed_bytes)
        except OSError:
            self.open_file(name, direct).read_into([into], offset, needed_bytes)

    def close(self) -> None:
        """Close the files. Reading afterwards opens them again."""
        files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
