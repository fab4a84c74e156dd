"""Is a pack what its writer wrote? Structure always, contents in full or by sample; every problem named, none hidden.

The parts of a pack that carry checksums (blocks, resident tensors and their header, copied files, the manifest itself)
cover every byte of it, so a changed, missing or extra byte anywhere is found. Problems are collected, not
raised; a mismatch is read a second time before it is called damage, to tell a bad disk from a bad cable. Not
checked: whether the weights are any good (that is a comparison with the source).

    for problem in verify_contents(pack, list_regions(pack)): print(problem.text)
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moepack.layout.errors import DamagedPack
from moepack.layout.manifest import Manifest
from moepack.layout.reader import Pack
from moepack.layout.spec import MANIFEST_NAME, RESIDENT_NAME

PIECE_BYTES = 4 * 2**20  # large enough for the disk, small enough that many workers stay within tens of MiB
REPAIR = "restore the file from a copy, or convert again: moe-convert SRC PACK --overwrite"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a pack; `text` is one line with the place, `repair` what to do about it."""

    text: str
    file: str
    layer: int | None = None
    expert: int | None = None
    offset_bytes: int | None = None
    repair: str = REPAIR

    @classmethod
    def of(cls, error: DamagedPack, repair: str = REPAIR) -> Problem:
        return cls(str(error), error.file, error.layer, error.expert, error.offset_bytes, repair)


@dataclass(frozen=True)
class Region:
    """A run of bytes with a checksum: an expert's block, a resident tensor, a whole copied file.

    padding   (start, end) runs, counted from the region's start, that must be zero
    """

    file: str
    what: str
    offset_bytes: int
    size_bytes: int
    sha256: str
    layer: int | None = None
    expert: int | None = None
    padding: tuple[tuple[int, int], ...] = ()


def verify_structure(directory: Path) -> tuple[Pack, list[Problem]]:
    """Check manifest, sizes, stray files and the resident header, without reading the data.

    Raises DamagedPack if there is no readable manifest and UnsupportedVersion; everything else is in the list.
    """
    pack = Pack(directory, Manifest.read(directory))
    problems = [Problem.of(error) for error in pack.find_size_problems()]
    broken = {problem.file for problem in problems}
    if str(directory / RESIDENT_NAME) not in broken:
        problems += [Problem.of(error) for error in pack.find_header_problems()]
    return pack, problems + _find_strays(pack)


def list_regions(pack: Pack, sample: float = 1.0, seed: int | None = None) -> list[Region]:
    """All regions of a pack, or a random share of the blocks (`sample` of 1) with everything else.

    sample   share of blocks to take, at least one; the resident weights and copied files are always included
    """
    manifest = pack.manifest
    blocks = [
        Region(
            entry.file,
            "block",
            geometry.offsets[expert],
            geometry.block(expert).block_stride,
            entry.block_sha256[expert],
            entry.layer,
            expert,
            geometry.block(expert).padding,
        )
        for entry in manifest.expert_files
        for geometry in (pack.geometry(entry.layer),)
        for expert in range(geometry.num_experts)
    ]
    if sample < 1:
        count = max(1, round(sample * len(blocks)))
        blocks = sorted(random.Random(seed).sample(blocks, count), key=lambda block: (block.file, block.offset_bytes))
    tensors = manifest.resident.tensors
    header_bytes = min((tensor.offset_bytes for tensor in tensors.values()), default=manifest.resident.size_bytes)
    header = Region(RESIDENT_NAME, "header", 0, header_bytes, manifest.resident.header_sha256)
    return [
        *(Region(entry.file, "file", 0, entry.size_bytes, entry.sha256) for entry in manifest.copied_files),
        header,
        *(
            Region(RESIDENT_NAME, f"tensor {name}", tensor.offset_bytes, tensor.size_bytes, tensor.sha256)
            for name, tensor in tensors.items()
        ),
        *blocks,
    ]


def verify_contents(
    pack: Pack,
    regions: list[Region],
    on_read: Callable[[int], None] = lambda size_bytes: None,
    workers: int | None = None,
) -> Iterator[Problem]:
    """Read regions on all cores and compare them with their checksums; problems in the order of the regions.

    on_read   called with the bytes of each region when it has been read, from the calling thread
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            for region, problems in zip(regions, pool.map(lambda region: _check_region(pack, region), regions)):
                on_read(region.size_bytes)
                yield from problems
        finally:
            pool.shutdown(cancel_futures=True)


def _check_region(pack: Pack, region: Region) -> list[Problem]:
    path = pack.directory / region.file
    try:
        found, dirty = _read_region(path, region)
        note = ""
        if found != region.sha256:
            again, dirty = _read_region(path, region, past_cache=True)
            if again == region.sha256:
                note = "read twice, the second time well: suspect the cable, the disk's cache or the memory"
            found = found if note else again
    except OSError as error:
        return [_problem(path, region, f"cannot be read: {error.strerror or error}")]
    if note:
        return [_problem(path, region, note)]
    if found != region.sha256:
        text = f"sha256 is {found[:12]}…, the manifest says {region.sha256[:12]}…; read twice, same result: damaged"
        return [_problem(path, region, text)]
    return [_problem(path, region, f"padding byte {offset} of the block is not zero") for offset in dirty]


def _read_region(path: Path, region: Region, past_cache: bool = False) -> tuple[str, list[int]]:
    """The sha256 of a region and the first non-zero byte of each padding run."""
    digest, dirty = hashlib.sha256(), []
    with open(path, "rb", buffering=0) as file:
        if past_cache and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), region.offset_bytes, region.size_bytes, os.POSIX_FADV_DONTNEED)
        file.seek(region.offset_bytes)
        done = 0
        while done < region.size_bytes:
            piece = file.read(min(PIECE_BYTES, region.size_bytes - done))
            if not piece:
                raise OSError(0, f"the file ends {region.size_bytes - done} bytes early")
            digest.update(piece)
            for start, end in region.padding:
                zeros = piece[max(0, start - done) : max(0, end - done)]
                if zeros.count(0) != len(zeros):
                    first = next(index for index, value in enumerate(zeros) if value)
                    dirty.append(max(start, done) + first)
            done += len(piece)
    return digest.hexdigest(), dirty


def _problem(path: Path, region: Region, text: str) -> Problem:
    if region.expert is None:
        return Problem(
            f"{path}: {region.what} at byte {region.offset_bytes}: {text}", str(path), None, None, region.offset_bytes
        )
    error = DamagedPack(path, text, layer=region.layer, expert=region.expert, offset_bytes=region.offset_bytes)
    return Problem.of(error)


def _find_strays(pack: Pack) -> list[Problem]:
    listed = {*pack.manifest.list_files(), MANIFEST_NAME}
    folders = {str(Path(name).parent) for name in listed} | {"."}
    problems: list[Problem] = []

    def unlisted(error: OSError) -> None:
        problems.append(Problem(f"{error.filename}: cannot be listed: {error.strerror}", str(error.filename)))

    for parent, directories, files in os.walk(pack.directory, onerror=unlisted):
        place = Path(parent).relative_to(pack.directory)
        linked = [name for name in directories if (pack.directory / place / name).is_symlink()]
        unknown = [name for name in directories if name in linked or str(place / name) not in folders]
        directories[:] = [name for name in directories if name not in unknown]
        for name in sorted(unknown + [name for name in files if str(place / name) not in listed]):
            path = str(pack.directory / place / name)
            shown = path if path.isprintable() else ascii(path)  # one line, whatever the name
            problems.append(Problem(f"{shown}: is not part of the pack", path, repair="move it away or delete it"))
    return problems
