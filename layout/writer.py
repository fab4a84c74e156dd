"""Write the files of a pack so that a kill at any instant leaves either the old state or the new one.

Each file goes to a temporary name, is flushed to the disk and renamed; its checksums are computed from the bytes on
their way. The manifest comes last. What order the files are written in, and what is kept of an interrupted run, is the
business of the caller (convert/pipeline.py).

    entry = write_expert_file(directory, 3, manifest_shape, tiers, expert_tiers, blocks)
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moepack.layout.errors import CheckpointError, NotEnoughSpace, UsageError, WriteError
from moepack.layout.geometry import BlockGeometry, LayerGeometry, Scheme
from moepack.layout.manifest import (
    BlockSchemes,
    CopiedFile,
    ExpertFile,
    Manifest,
    ModelShape,
    ResidentFile,
    ResidentTensor,
    block_geometry,
)
from moepack.layout.sequential import SequentialFile
from moepack.layout.spec import EXPERTS_FOLDER, MANIFEST_NAME, PARTIAL_SUFFIX, RESIDENT_NAME, expert_file_name
from moepack.layout.tensor_file import TensorSpec, layout_tensors

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COPY_CHUNK_BYTES = 2**20


class HashedBlock(NamedTuple):
    """A block whose sha256 (hexadecimal) is known already."""

    data: bytes | bytearray | memoryview
    sha256: str


def check_output(path: Path) -> None:
    """Raise UsageError where no output can be: below a file, or in a finished pack, which holds only what it lists."""
    above = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not above.is_dir():
        raise UsageError(f"{path}: {above} is a file: give a place in a directory")
    folder = Path(os.path.realpath(path)).parent
    for pack in (folder, folder.parent) if folder.name == EXPERTS_FOLDER else (folder,):
        if (pack / MANIFEST_NAME).exists() and (pack / RESIDENT_NAME).exists():
            raise UsageError(f"{path}: lies in the pack {pack}, which it would damage: give another place")


@contextmanager
def partial_file(path: Path, large: bool = False) -> Iterator[BinaryIO | SequentialFile]:
    """Write a file under its temporary name and flush it to the disk; a failure removes it.

    large   whether to write past the page cache

    Raises NotEnoughSpace where the disk, the quota or the file size limit ends, WriteError where the disk fails.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with SequentialFile(partial) if large else open(partial, "wb") as file:
            yield file
            file.flush()
            with naming_failures(path):
                os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):  # of a disk that fails: what is left is written over by the next run
            partial.unlink(missing_ok=True)
        # A large file's own errors name it; others may come from whatever gives the data.
        is_ours = isinstance(error, OSError) and error.filename in ((str(partial),) if large else (str(partial), None))
        if is_ours or (isinstance(error, OSError) and error.errno in NO_SPACE_ERRNOS):
            raise explain_failure(path, error) from None  # type: ignore[arg-type]
        raise


@contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Turn what the system says while a file is written into an error that names it: see explain_failure."""
    try:
        yield
    except OSError as error:
        raise explain_failure(path, error) from None


def explain_failure(path: Path, error: OSError) -> NotEnoughSpace | WriteError:
    """The error for a file that could not be written."""
    again = "then run the same command again to go on from here"
    if error.errno in NO_SPACE_ERRNOS:
        return NotEnoughSpace(f"{path}: {error.strerror}: make space (or raise the limit), {again}")
    return WriteError(f"{path}: cannot be written: {error.strerror}: check the disk, {again}")


@contextmanager
def atomic_file(path: Path, large: bool = False) -> Iterator[BinaryIO | SequentialFile]:
    """Write a file under a temporary name and, when it is safe on the disk, give it its own. Raises NotEnoughSpace."""
    with partial_file(path, large) as file:
        yield file
    finish_partial(path)


def finish_partial(path: Path) -> None:
    """Give a file that is safe under its temporary name its own, durably."""
    os.replace(path.with_name(path.name + PARTIAL_SUFFIX), path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def assemble_block(geometry: BlockGeometry, arrays: Mapping[str, bytes | memoryview]) -> bytearray:
    """One expert's block from its sections ("gate_proj.w_q" -> bytes): gaps and padding zero.

    Raises ValueError if a section is missing, unknown or has the wrong size.
    """
    block = bytearray(geometry.block_stride)
    if set(arrays) != {section.name for section in geometry.sections}:
        raise ValueError(f"a block needs the sections {[section.name for section in geometry.sections]}")
    for section in geometry.sections:
        data = memoryview(arrays[section.name]).cast("B")
        if len(data) != section.size_bytes:
            raise ValueError(f"section {section.name} is {section.size_bytes} bytes long, got {len(data)}")
        block[section.offset_bytes : section.offset_bytes + section.size_bytes] = data
    return block


def write_expert_file(
    directory: Path,
    layer: int,
    shape: ModelShape,
    tiers: Sequence[BlockSchemes],
    expert_tiers: Sequence[int],
    blocks: Iterable[bytes | bytearray | HashedBlock],
) -> ExpertFile:
    """Write one layer's blocks, expert 0 first, and return the manifest's entry for the file.

    Raises ValueError if a block has the wrong size or their number is wrong; NotEnoughSpace.
    """
    name = expert_file_name(layer, shape.num_hidden_layers)
    geometry = LayerGeometry([block_geometry(shape, tier) for tier in tiers], expert_tiers)
    whole = hashlib.sha256()
    digests: list[str] = []
    with atomic_file(directory / name, large=True) as file:
        for given in blocks:
            block, digest = given if isinstance(given, HashedBlock) else (given, hashlib.sha256(given).hexdigest())
            expert = len(digests)
            if expert == geometry.num_experts or len(block) != geometry.block(expert).block_stride:
                raise ValueError(f"{name}: unexpected block of {len(block)} bytes for expert {expert}")
            digests.append(digest)
            whole.update(block)
            file.write(block)
        if len(digests) != geometry.num_experts:
            raise ValueError(f"{name}: {len(digests)} blocks of {geometry.num_experts}")
    return ExpertFile(
        name, layer, geometry.size_bytes, whole.hexdigest(), tuple(tiers), tuple(expert_tiers), tuple(digests)
    )


def write_resident_file(
    directory: Path,
    arrays: Iterable[tuple[str, str, tuple[int, ...]]],
    quantized: dict[str, Scheme],
    read: Callable[[TensorSpec], Iterable[bytes | memoryview]],
) -> ResidentFile:
    """Write resident.safetensors and return the manifest's entry for it.

    arrays     (name, dtype, shape) of every array
    quantized  matrix name -> scheme
    read       gives the bytes of one array, in pieces; called in the order of the file

    Raises ValueError if an array's bytes do not have its size; NotEnoughSpace.
    """
    header, specs = layout_tensors(arrays)
    whole, tensors, size_bytes = hashlib.sha256(header), {}, len(header)
    with atomic_file(directory / RESIDENT_NAME, large=True) as file:
        file.write(header)
        for spec in specs:
            digest, written = hashlib.sha256(), 0
            for piece in read(spec):
                data = memoryview(piece).cast("B")
                file.write(data)
                digest.update(data)
                whole.update(data)
                written += len(data)
            if written != spec.size_bytes:
                raise ValueError(f"{spec.name} is {spec.size_bytes} bytes long, got {written}")
            tensors[spec.name] = ResidentTensor(
                spec.dtype, spec.shape, spec.offset_bytes, spec.size_bytes, digest.hexdigest()
            )
            size_bytes += written
    return ResidentFile(size_bytes, whole.hexdigest(), hashlib.sha256(header).hexdigest(), tensors, quantized)


def copy_file(source: Path, directory: Path) -> CopiedFile:
    """Copy a file of the source into the pack byte for byte and return the manifest's entry for it.

    Raises CheckpointError if the source cannot be read, NotEnoughSpace, WriteError.
    """
    digest, size_bytes = hashlib.sha256(), 0

    def read(origin: BinaryIO) -> bytes:
        try:
            return origin.read(COPY_CHUNK_BYTES)
        except OSError as error:
            raise CheckpointError(f"{source}: cannot be read at byte {size_bytes}: {error.strerror}") from None

    with open(source, "rb") as origin, atomic_file(directory / source.name) as file:
        while piece := read(origin):
            file.write(piece)
            digest.update(piece)
            size_bytes += len(piece)
    return CopiedFile(source.name, size_bytes, digest.hexdigest())


def write_manifest(directory: Path, manifest: Manifest, when_written: Callable[[], None] = lambda: None) -> None:
    """Write the manifest: from here on the directory is a pack.

    when_written   called when the manifest is safe on the disk under its temporary name and only the rename is left
    """
    path = directory / MANIFEST_NAME
    with partial_file(path) as file:
        file.write(manifest.to_bytes())
    when_written()
    finish_partial(path)
