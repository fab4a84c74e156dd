"""Is a pack what its writer wrote? Structure always, contents in full or by sample; every problem named, none hidden.

The parts of a pack that carry checksums (blocks, resident tensors and their header, copied files, the manifest itself)
cover every byte of it, so a changed, missing or extra byte anywhere is found. Problems are collected, not
raised; a mismatch is read a second time before it is called damage, to tell a bad disk from a bad cable. Not
checked: whether the weights are any good (that is a comparison with the source).

    for problem in verify_contents(pack, list_regions(pack)): print(problem.text)
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from moepack.layout.errors import DamagedPack
from moepack.layout.geometry import align_up
from moepack.layout.manifest import Manifest
from moepack.layout.pages import Pages
from moepack.layout.reader import REDO, Pack
from moepack.layout.spec import MANIFEST_NAME, RESIDENT_NAME
from moepack.layout.storage import DIRECT_ALIGNMENT

PIECE_BYTES = 4 * 2**20  # large enough for the disk, small enough that many workers stay within tens of MiB
AHEAD = 3  # pieces that each worker has read while it hashes another one
READERS = 2  # reads in flight: with pieces of that size, more bring nothing
REPAIR = "restore the file from a copy, or convert again: moe-convert SRC PACK --overwrite"
REREAD = "verify again; if other places fail next time, it is not the file but what lies between it and you"


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

    @property
    def repair(self) -> str:
        """What to do if it is damaged: a block can be made again alone."""
        return REPAIR if self.expert is None else f"{REDO} {self.layer}:{self.expert}"


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
    on_read: Callable[[int], object] = lambda size_bytes: None,
    workers: int | None = None,
) -> Iterator[Problem]:
    """Read regions on all cores and compare them with their checksums; problems in the order of the regions.

    on_read   called with the bytes of neighbouring regions when they have been read, from the calling thread
    workers   threads that hash; by default one for each core

    Reads go past the page cache where the file system lets them: what is checked is on the disk, not in memory. They
    run in threads of their own, a piece ahead of each worker: a thread that has just hashed is put aside by the system
    when its read is done, and the disk would wait for it.
    """
    workers = workers or os.cpu_count() or 1
    runs = _join_neighbours(regions)
    results: list[Future[list[Problem]]] = [Future() for _ in runs]
    stopped = threading.Event()
    todo = iter([*zip(runs, results)])  # a list's iterator hands out each item once, whoever asks
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(workers) as pool:
        try:
            for _ in range(workers):
                worker = pool.submit(_check_runs, pack, todo, readers, stopped)
                worker.add_done_callback(lambda ended: _pass_on_error(ended, results))
            for run, result in zip(runs, results):
                problems = result.result()
                on_read(sum(region.size_bytes for region in run))
                yield from problems
        finally:
            stopped.set()


def _pass_on_error(worker: Future[None], results: list[Future[list[Problem]]]) -> None:
    """What has ended a worker (no memory, say) ends the wait for what it had taken."""
    if error := worker.exception():
        for result in results:
            if not result.done():
                result.set_exception(error)


def _join_neighbours(regions: list[Region]) -> list[list[Region]]:
    """Regions in their order, in groups that one read brings: small ones that follow each other in a file."""
    runs: list[list[Region]] = []
    run_bytes = 0
    for region in regions:
        last = runs[-1][-1] if runs else None
        follows = last and (last.file, last.offset_bytes + last.size_bytes) == (region.file, region.offset_bytes)
        run_bytes = run_bytes + region.size_bytes if follows else region.size_bytes
        if follows and run_bytes <= PIECE_BYTES:
            runs[-1].append(region)
        else:
            runs.append([region])
            run_bytes = region.size_bytes
    return runs


def _check_runs(
    pack: Pack,
    todo: Iterator[tuple[list[Region], Future[list[Problem]]]],
    readers: ThreadPoolExecutor,
    stopped: threading.Event,
) -> None:
    """Take runs until none is left, hashing a piece while the next ones are read."""
    *memories, spare = [Pages(PIECE_BYTES) for _ in range(AHEAD + 2)]
    pieces = ((run, result, piece) for run, result in todo if not stopped.is_set() for piece in _cut(run))
    coming: deque[tuple[list[Region], Future[list[Problem]], Piece, memoryview, Future[None]]] = deque()
    findings: list[_Finding] = []
    error: OSError | None = None
    for number, piece in enumerate(chain(pieces, [None] * AHEAD)):
        if piece is not None:
            memory = memories[number % len(memories)].buffer
            coming.append((*piece, memory, readers.submit(_read_piece, pack, piece[0][0].file, piece[2], memory)))
        if coming and (piece is None or len(coming) > AHEAD):
            run, result, place, memory, reading = coming.popleft()
            if place.is_first:
                findings, error = [_Finding() for _ in run], None
            try:
                reading.result()
                _add_piece(findings, run, place, memory)
            except OSError as failure:
                error = failure
            except BaseException as bug:
                result.set_exception(bug)
                raise
            if place.is_last:
                try:
                    result.set_result(_judge_run(pack, run, None if error else findings, spare))
                except BaseException as bug:
                    result.set_exception(bug)


def _judge_run(pack: Pack, run: list[Region], findings: list[_Finding] | None, memory: Pages) -> list[Problem]:
    """Problems of neighbouring regions by their findings; None, where a read failed."""
    found = findings or _read_each(pack, run, memory)
    return [problem for region, one in zip(run, found) for problem in _judge_region(pack, region, one, memory)]


def _read_each(pack: Pack, run: list[Region], memory: Pages) -> list[_Finding | None]:
    """What each of neighbouring regions holds, of which one read of all has failed; None where it cannot be read."""
    if len(run) == 1:
        return [None]
    alone: list[_Finding | None] = []
    for region in run:
        try:
            alone.append(_read_region(pack, region, memory))
        except OSError:  # noqa: PERF203 (a disk that fails is slower)
            alone.append(None)
    return alone if None in alone else [None, *alone[1:]]  # it failed once: that is told of one of them


def _judge_region(pack: Pack, region: Region, found: _Finding | None, memory: Pages) -> list[Problem]:
    """Problems of a region by its finding; None, or a wrong checksum, is read once more."""
    path = pack.directory / region.file
    if found is None or found.sha256 != region.sha256:
        try:
            again = _read_region(pack, region, memory, is_second=True)
        except OSError as error:
            repair = region.repair if error.errno == errno.EIO else REPAIR  # a bad sector is often cured by writing
            return [_problem(path, region, f"cannot be read: {error.strerror or error}", repair)]
        if again.sha256 == region.sha256:
            text = "read twice, the second time well: suspect the cable, the disk's cache or the memory"
            return [_problem(path, region, text, REREAD)]
        found = again
        text = f"sha256 is {found.sha256[:12]}…, the manifest says {region.sha256[:12]}…; read twice, "
        return [_problem(path, region, text + "same result: damaged", region.repair)]
    text = "padding byte {} of the block is not zero"
    return [_problem(path, region, text.format(offset), region.repair) for offset in found.dirty]


def _read_region(pack: Pack, region: Region, memory: Pages, is_second: bool = False) -> _Finding:
    """What a region holds, read alone. Raises OSError saying where."""
    file = pack.open_file(region.file, direct=True)
    if is_second and not file.is_direct:
        file.drop_cache()
    finding = _Finding()
    for piece in _cut([region]):
        _read_piece(pack, region.file, piece, memory.buffer)
        _add_piece([finding], [region], piece, memory.buffer)
    return finding


class Piece(NamedTuple):
    """A part of neighbouring regions that is read at once, from a sector's start on."""

    offset_bytes: int
    size_bytes: int
    is_first: bool
    is_last: bool


def _cut(run: list[Region]) -> Iterator[Piece]:
    end = run[-1].offset_bytes + run[-1].size_bytes
    first = run[0].offset_bytes // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
    for start in range(first, max(end, first + 1), PIECE_BYTES):
        yield Piece(start, min(PIECE_BYTES, end - start), start == first, start + PIECE_BYTES >= end)


def _read_piece(pack: Pack, file: str, piece: Piece, memory: memoryview) -> None:
    buffer = memory[: align_up(piece.size_bytes, DIRECT_ALIGNMENT)]
    try:
        pack.open_file(file, direct=True).read_into([buffer], piece.offset_bytes, needed_bytes=piece.size_bytes)
    except OSError as error:
        if error.filename:  # it cannot be opened
            raise
        text = f"{piece.size_bytes} bytes at byte {piece.offset_bytes}: {error.strerror}"
        raise OSError(error.errno, text) from None


def _add_piece(findings: list[_Finding], run: list[Region], piece: Piece, memory: memoryview) -> None:
    end = piece.offset_bytes + piece.size_bytes
    for region, finding in zip(run, findings):
        first = max(piece.offset_bytes, region.offset_bytes)
        last = min(end, region.offset_bytes + region.size_bytes)
        if first < last:
            part = memory[first - piece.offset_bytes : last - piece.offset_bytes]
            finding.add(part, first - region.offset_bytes, region)


class _Finding:
    """What a region was found to hold, taken in part by part: its digest, and each first byte of padding not zero."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.dirty: list[int] = []

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, part: memoryview, offset_bytes: int, region: Region) -> None:
        """The next bytes of the region, which start at this offset in it."""
        self._digest.update(part)
        for start, end in region.padding:
            zeros = bytes(part[max(0, start - offset_bytes) : max(0, end - offset_bytes)])
            if zeros.count(0) != len(zeros):
                first = next(index for index, value in enumerate(zeros) if value)
                self.dirty.append(max(start, offset_bytes) + first)


def _problem(path: Path, region: Region, text: str, repair: str = REPAIR) -> Problem:
    if region.expert is None:
        where = f"{path}: {region.what} at byte {region.offset_bytes}"
        return Problem(f"{where}: {text}", str(path), None, None, region.offset_bytes, repair)
    error = DamagedPack(path, text, layer=region.layer, expert=region.expert, offset_bytes=region.offset_bytes)
    return Problem.of(error, repair)


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
