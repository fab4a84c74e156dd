"""A pack as one compressed file, to be moved: a tar in independent zstd frames, with a table of frames at its end.

Any `zstd -d | tar x` unpacks it. moepack does so on all cores, checks every byte against the manifest's hashes, names
what is damaged, and goes on where it was stopped: frames of 8 MiB are compressed alone, each with its own checksum, and
the table (the "seekable format" of zstd's contrib folder) says where they lie. The manifest is the first file in the
tar, so that the places of all others follow from it, and the last to be written when unpacking.

Quantized weights are nearly noise: at 4 bits a tenth is saved, at 2 bits a quarter.

    pack_archive(Path("demo.moepack"), Path("demo.tar.zst"), workers=2, on_bytes=progress.update)
    unpack_archive(Path("demo.tar.zst"), Path("copy.moepack"), workers=2, on_bytes=progress.update)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, BinaryIO

import zstandard

from moepack.convert.journal import JOURNAL_NAME, Journal, finish_interrupted_manifest
from moepack.convert.pipeline import map_in_order
from moepack.convert.shard_reader import ShardReader
from moepack.layout.errors import DamagedPack, NotEnoughSpace, UsageError
from moepack.layout.geometry import align_up
from moepack.layout.manifest import Manifest
from moepack.layout.reader import Pack
from moepack.layout.spec import MANIFEST_NAME, PARTIAL_SUFFIX, RESIDENT_NAME
from moepack.layout.writer import atomic_file, finish_partial, naming_failures, partial_file, sync_directory

FRAME_BYTES = 8 * 2**20
LEVEL = 3
SYNC_FRAMES = 32  # after so many the archive is flushed to the disk, and a stopped run goes on from there
TAR_BLOCK = 512
FOLDER_BYTES = 60
INDEX_SUFFIX = ".frames"  # beside an unfinished archive: the pack's hash and the sizes of its frames
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
TABLE_MAGIC, FOOTER_MAGIC = 0x184D2A5E, 0x8F92EAB1
FOOTER = struct.Struct("<IBI")  # number of frames, flags, magic
ENTRY = struct.Struct("<II")  # compressed and plain size of a frame
SKIPPABLE = struct.Struct("<II")  # magic, size of what follows


@dataclass(frozen=True)
class TarEntry:
    """A file in the tar stream: its header at offset_bytes, its data behind that."""

    name: str
    header: bytes
    offset_bytes: int
    size_bytes: int

    @property
    def start(self) -> int:
        return self.offset_bytes + len(self.header)

    @property
    def end(self) -> int:
        return self.start + self.size_bytes


@dataclass(frozen=True)
class TarLayout:
    """The whole tar stream of a pack, as it follows from the manifest alone."""

    entries: tuple[TarEntry, ...]
    size_bytes: int

    @classmethod
    def of(cls, folder: str, manifest: Manifest, manifest_bytes: int) -> TarLayout:
        entries, end = [], 0
        for name, size in {MANIFEST_NAME: manifest_bytes, **manifest.list_files()}.items():
            header = _tar_header(f"{folder}/{name}", size)
            entries.append(TarEntry(name, header, end, size))
            end = align_up(entries[-1].end, TAR_BLOCK)
        return cls(tuple(entries), align_up(end + 2 * TAR_BLOCK, tarfile.RECORDSIZE))

    @property
    def num_frames(self) -> int:
        return -(-self.size_bytes // FRAME_BYTES)

    def name_at(self, start: int, end: int) -> str:
        """What lies between two places of the stream, in words."""
        inside = [entry for entry in self.entries if entry.offset_bytes < end and entry.end > start]
        if not inside:
            return "the end of the tar"
        first = max(0, start - inside[0].start)
        return f"{inside[0].name} from byte {first}" + (f" to {inside[-1].name}" if len(inside) > 1 else "")


def is_archive(path: Path) -> bool:
    """Whether a path is a file that begins as zstd's do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC


def pack_archive(source: Path, out: Path, workers: int, on_bytes: Callable[[int, int], object]) -> dict[str, int]:
    """Write the archive of a pack; returns its sizes. A stopped run goes on with the same call.

    on_bytes   called with bytes of the pack as they are dealt with, and with how many there are in all

    Raises UsageError if the output exists or another process writes it, DamagedPack if a file of the pack is not what
    its manifest says, NotEnoughSpace or WriteError.
    """
    _refuse_existing(out)
    with Pack.open(source) as pack:
        raw = (source / MANIFEST_NAME).read_bytes()
        layout = TarLayout.of(_folder_name(source), pack.manifest, len(raw))
        hashes = expected_hashes(pack.manifest)
    unfinished, index = (out.with_name(out.name + suffix) for suffix in (PARTIAL_SUFFIX, INDEX_SUFFIX))
    identity = hashlib.sha256(raw + layout.entries[0].header).digest()
    with naming_failures(out), _hold_unfinished(out, unfinished) as file:
        sizes = _resume(unfinished, index, identity, layout)
        check = _hash_archived(unfinished, sizes, source, layout, hashes, on_bytes)
        _write_frames(file, index, sizes, check, workers, on_bytes)
        file.write(_make_table(sizes, layout.size_bytes))
        file.flush()
        os.fsync(file.fileno())
        size = unfinished.stat().st_size
        finish_partial(out)  # still held: whoever waits for the lock finds the archive finished
        index.unlink()
        sync_directory(out.parent)
    total = sum(entry.size_bytes for entry in layout.entries)
    return {"files": len(layout.entries), "pack_bytes": total, "archive_bytes": size}


def unpack_archive(source: Path, out: Path, workers: int, on_bytes: Callable[[int, int], object]) -> dict[str, int]:
    """Write the pack that an archive holds; returns its sizes. A stopped run goes on with the same call, file by file.

    on_bytes   called with bytes of the pack as they are written, and with how many there are in all

    Raises DamagedPack naming what is damaged, UsageError if the output holds anything else, NotEnoughSpace.
    """
    frames = FrameTable.read(source)
    folder, raw = _read_manifest(frames)
    manifest = Manifest.from_bytes(raw, source)
    layout = TarLayout.of(folder, manifest, len(raw))
    if layout.size_bytes != frames.ends[-1][1]:
        raise DamagedPack(source, f"unpacks to {frames.ends[-1][1]} bytes, its manifest needs {layout.size_bytes}")
    finish_interrupted_manifest(out)
    total = sum(entry.size_bytes for entry in layout.entries)
    facts = {"files": len(layout.entries), "pack_bytes": total, "archive_bytes": source.stat().st_size}

    def count(size_bytes: int) -> None:
        on_bytes(size_bytes, total)

    if (out / MANIFEST_NAME).exists():
        if (out / MANIFEST_NAME).read_bytes() != raw:
            raise UsageError(f"{out}: holds another pack: choose another directory")
        count(total)
        return facts
    if out.exists() and any(out.iterdir()) and not (out / JOURNAL_NAME).is_dir():
        raise UsageError(f"{out}: is not empty and no unfinished pack: choose another directory")
    _check_space(out, layout)
    hashes = expected_hashes(manifest)
    with Journal.open(out, {"archive": hashlib.sha256(raw).hexdigest()}) as journal:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for entry in layout.entries[1:]:
                    step, path = entry.name.replace("/", " "), out / entry.name
                    if journal.get(step) is None or not path.exists():
                        _unpack_file(frames, layout, entry, path, hashes[entry.name], pool, workers, count)
                        journal.put(step, {"size_bytes": entry.size_bytes})
                    else:
                        count(entry.size_bytes)
                for number in range(layout.entries[-1].end // FRAME_BYTES, len(frames.ends)):  # what no file reaches
                    frames.decompress(number, lambda: "the end of the tar")
            finally:
                pool.shutdown(cancel_futures=True)
        with partial_file(out / MANIFEST_NAME) as file:
            file.write(raw)
        journal.remove()
        finish_partial(out / MANIFEST_NAME)
        count(len(raw))
    return facts


@dataclass(frozen=True)
class FrameTable:
    """Where the frames of an archive lie: for each, the ends of its compressed and of its plain bytes."""

    path: Path
    ends: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, path: Path) -> FrameTable:
        """Raises DamagedPack if the table is missing or does not describe this file."""
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - FOOTER.size))
            footer = file.read(FOOTER.size)
            number, flags, magic = FOOTER.unpack(footer) if len(footer) == FOOTER.size else (0, 0, 0)
            table_bytes = number * ENTRY.size + FOOTER.size
            if magic != FOOTER_MAGIC or flags or not number or table_bytes + SKIPPABLE.size > size:
                raise DamagedPack(path, "ends without its table of frames: is the copy complete?")
            file.seek(size - table_bytes - SKIPPABLE.size)
            start = SKIPPABLE.unpack(file.read(SKIPPABLE.size))
            entries = list(ENTRY.iter_unpack(file.read(number * ENTRY.size)))
        ends = tuple(zip(accumulate(packed for packed, _ in entries), accumulate(plain for _, plain in entries)))
        if start != (TABLE_MAGIC, table_bytes) or ends[-1][0] + SKIPPABLE.size + table_bytes != size:
            raise DamagedPack(path, "its table of frames does not describe it: copy the archive again")
        if any(plain != FRAME_BYTES for _, plain in entries[:-1]) or not 0 < entries[-1][1] <= FRAME_BYTES:
            raise DamagedPack(path, f"its frames are not of {FRAME_BYTES} bytes each: is no archive of a pack")
        return cls(path, ends)

    def decompress(self, number: int, what: Callable[[], str]) -> bytes:
        """One frame. Raises DamagedPack with what it holds."""
        (begin, start), (end, stop) = self.ends[number - 1] if number else (0, 0), self.ends[number]
        try:
            with open(self.path, "rb") as file:
                data = os.pread(file.fileno(), end - begin, begin)
            size = zstandard.get_frame_parameters(data).content_size  # looked at before anything is allocated by it
            plain = zstandard.ZstdDecompressor().decompress(data) if size == stop - start else b""
        except (OSError, zstandard.ZstdError) as error:
            reason = str(error).splitlines()[0]
            raise DamagedPack(self.path, f"{what()}: {reason}: copy the archive again", offset_bytes=begin) from None
        if len(plain) != stop - start:
            text = f"{what()}: a frame of {size} bytes, expected {stop - start}: copy the archive again"
            raise DamagedPack(self.path, text, offset_bytes=begin)
        return plain


def expected_hashes(manifest: Manifest) -> dict[str, str]:
    """sha256 of every file of a pack but the manifest."""
    experts = {entry.file: entry.sha256 for entry in manifest.expert_files}
    copied = {entry.file: entry.sha256 for entry in manifest.copied_files}
    return {**copied, RESIDENT_NAME: manifest.resident.sha256, **experts}


class _Hashes:
    """Checks the files of a pack as their bytes go by; those that begin before the position are passed."""

    def __init__(self, source: Path, layout: TarLayout, hashes: dict[str, str], position: int):
        self.source, self.layout, self.hashes, self.position = source, layout, hashes, position
        self.digest = hashlib.sha256()
        self.entries = [entry for entry in layout.entries if entry.start >= position and entry.name in hashes]

    def update(self, plain: bytes) -> None:
        """Raises DamagedPack naming a file whose hash is not the manifest's."""
        end = self.position + len(plain)
        while self.entries and self.entries[0].start < end:
            entry = self.entries[0]
            first, last = max(entry.start, self.position), min(entry.end, end)
            self.digest.update(memoryview(plain)[first - self.position : last - self.position])
            if entry.end > end:
                break
            if self.digest.hexdigest() != self.hashes[entry.name]:
                raise DamagedPack(
                    self.source / entry.name,
                    "its sha256 is not the manifest's: no archive is made of a damaged pack: mend it, then run again",
                )
            self.digest = hashlib.sha256()
            self.entries.pop(0)
        self.position = end


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out}: exists: choose another name, or delete it first")


@contextmanager
def _hold_unfinished(out: Path, unfinished: Path) -> Iterator[BinaryIO]:
    """The unfinished archive, to append to, held against other processes.

    Raises UsageError if another one holds it or has finished it just now, OSError if it cannot be opened.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(unfinished, "ab") as file:
        # Not the journal's lock, which opens what it locks to read it: a file on NFS must be open for writing.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out}: another moe-convert is at work here: wait for it") from None
        try:
            _refuse_existing(out)  # once more: it may have been finished between the first look and the lock
        except UsageError:
            if not os.fstat(file.fileno()).st_size:  # ours, made in vain
                unfinished.unlink(missing_ok=True)
            raise
        yield file


def _hash_archived(
    unfinished: Path,
    sizes: list[int],
    source: Path,
    layout: TarLayout,
    hashes: dict[str, str],
    on_bytes: Callable[[int, int], object],
) -> _Hashes:
    """The hashes where an earlier run stopped: what is archived of the file that it stopped in is hashed again.

    Raises DamagedPack if what is archived is not what was written.
    """
    # Files that ended before were compared by the run that wrote them: a frame is written after its bytes went by.
    # This one is read from the archive, for that is what will be unpacked: the pack may have been mended since.
    position = len(sizes) * FRAME_BYTES
    stopped = (entry for entry in layout.entries if entry.name in hashes and entry.start < position < entry.end)
    first = next((entry.start // FRAME_BYTES for entry in stopped), len(sizes))
    ends = ((packed, (number + 1) * FRAME_BYTES) for number, packed in enumerate(accumulate(sizes)))
    frames = FrameTable(unfinished, tuple((packed, min(plain, layout.size_bytes)) for packed, plain in ends))
    on_bytes(min(layout.size_bytes, first * FRAME_BYTES), layout.size_bytes)
    check = _Hashes(source, layout, hashes, first * FRAME_BYTES)
    for number in range(first, len(sizes)):
        try:
            plain = frames.decompress(number, lambda: "")
        except DamagedPack as error:
            text = "is not what was written: check the disk, delete the file, then run again"
            raise DamagedPack(unfinished, text, offset_bytes=error.offset_bytes) from None
        check.update(plain)
        on_bytes(len(plain), layout.size_bytes)
    return check


def _write_frames(
    file: BinaryIO,
    index: Path,
    sizes: list[int],
    check: _Hashes,
    workers: int,
    on_bytes: Callable[[int, int], object],
) -> None:
    """Write the frames that are still missing, and add their sizes. Raises DamagedPack."""
    layout, reader = check.layout, ShardReader()
    make = partial(_make_frame, reader, check.source, layout)
    try:
        with open(index, "ab") as noted, ThreadPoolExecutor(workers) as pool:
            try:
                pending: list[int] = []
                for plain, packed in map_in_order(pool, make, range(len(sizes), layout.num_frames), workers):
                    try:
                        check.update(plain)
                    except DamagedPack:  # kept, its first frames would make the mended file's archive a damaged one
                        _cut(Path(file.name), index, sizes[: check.entries[0].start // FRAME_BYTES])
                        raise
                    file.write(packed)
                    pending.append(len(packed))
                    if len(pending) == SYNC_FRAMES:
                        sizes += _note(file, noted, pending)
                    on_bytes(len(plain), layout.size_bytes)
                sizes += _note(file, noted, pending)
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        reader.close()


def _make_frame(reader: ShardReader, source: Path, layout: TarLayout, number: int) -> tuple[bytes, bytes]:
    """One frame of the stream, plain and compressed. Raises DamagedPack if a file cannot be read."""
    start = number * FRAME_BYTES
    plain = bytearray(min(FRAME_BYTES, layout.size_bytes - start))
    end = start + len(plain)
    for entry in layout.entries:
        if entry.offset_bytes >= end or entry.end <= start:
            continue
        head = entry.header[max(0, start - entry.offset_bytes) : max(0, end - entry.offset_bytes)]
        place = max(entry.offset_bytes, start) - start
        plain[place : place + len(head)] = head
        first, last = max(entry.start, start), min(entry.end, end)
        if first < last:
            try:
                data = reader.read(source / entry.name, first - entry.start, last - first, entry.name)
            except OSError as error:
                raise DamagedPack(source / entry.name, f"cannot be read: {error.strerror}") from None
            plain[first - start : last - start] = data.data
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True)
    return bytes(plain), compressor.compress(plain)


def _unpack_file(
    frames: FrameTable,
    layout: TarLayout,
    entry: TarEntry,
    path: Path,
    sha256: str,
    pool: ThreadPoolExecutor,
    workers: int,
    on_bytes: Callable[[int], object],
) -> None:
    first, last = entry.offset_bytes // FRAME_BYTES, max(entry.start, entry.end - 1) // FRAME_BYTES
    digest = hashlib.sha256()

    def decompress(number: int) -> bytes:
        start = number * FRAME_BYTES
        return frames.decompress(number, lambda: layout.name_at(start, start + FRAME_BYTES))

    with atomic_file(path, large=True) as file:
        position = first * FRAME_BYTES
        for plain in map_in_order(pool, decompress, range(first, last + 1), workers):
            head = plain[max(0, entry.offset_bytes - position) : max(0, entry.start - position)]
            begin = max(0, position - entry.offset_bytes)
            if head != entry.header[begin : begin + len(head)]:
                raise DamagedPack(frames.path, f"{entry.name}: its tar header is not that of a pack")
            data = memoryview(plain)[max(0, entry.start - position) : max(0, entry.end - position)]
            digest.update(data)
            file.write(data)
            on_bytes(len(data))
            position += len(plain)
        if digest.hexdigest() != sha256:
            raise DamagedPack(frames.path, f"{entry.name}: its sha256 is not the manifest's: archive the pack again")


def _read_manifest(frames: FrameTable) -> tuple[str, bytes]:
    """The name of the folder in the tar, and the manifest's bytes. Raises DamagedPack."""
    plain = frames.decompress(0, lambda: MANIFEST_NAME)
    try:
        info = tarfile.TarInfo.frombuf(plain[:TAR_BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        raise DamagedPack(frames.path, "does not begin as the tar of a pack") from None
    folder, _, name = info.name.rpartition("/")
    if name != MANIFEST_NAME or _tar_header(info.name, info.size) != plain[:TAR_BLOCK]:
        raise DamagedPack(frames.path, f"begins with {info.name}, expected {MANIFEST_NAME}: is no archive of a pack")
    number = 1
    while len(plain) < TAR_BLOCK + info.size and number < len(frames.ends):
        plain += frames.decompress(number, lambda: MANIFEST_NAME)
        number += 1
    return folder, plain[TAR_BLOCK : TAR_BLOCK + info.size]


def _resume(unfinished: Path, index: Path, identity: bytes, layout: TarLayout) -> list[int]:
    """Sizes of the frames that an earlier run of the same pack left safe on the disk; anything else is started anew."""
    noted = index.read_bytes() if index.exists() else b""
    if noted[: len(identity)] == identity:
        body = noted[len(identity) :]
        sizes = [size for (size,) in struct.iter_unpack("<I", body[: len(body) // 4 * 4])][: layout.num_frames]
        if sum(sizes) <= unfinished.stat().st_size:
            _cut(unfinished, index, sizes)
            return sizes
    os.truncate(unfinished, 0)  # not deleted: it holds the lock
    index.write_bytes(identity)
    return []


def _cut(unfinished: Path, index: Path, sizes: list[int]) -> None:
    """Keep these frames of an unfinished archive only."""
    os.truncate(index, hashlib.sha256().digest_size + 4 * len(sizes))  # first: frames may go unnoted, never the reverse
    os.truncate(unfinished, sum(sizes))


def _note(file: IO[bytes], noted: IO[bytes], pending: list[int]) -> list[int]:
    """Flush frames to the disk, then note their sizes; returns them and empties the list."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    noted.write(struct.pack(f"<{len(pending)}I", *pending))
    noted.flush()
    os.fsync(noted.fileno())
    done = list(pending)
    pending.clear()
    return done


def _make_table(sizes: list[int], plain_bytes: int) -> bytes:
    """A skippable frame with the sizes of all frames: zstd's seekable format."""
    plain = [min(FRAME_BYTES, plain_bytes - number * FRAME_BYTES) for number in range(len(sizes))]
    entries = b"".join(ENTRY.pack(*pair) for pair in zip(sizes, plain))
    return SKIPPABLE.pack(TABLE_MAGIC, len(entries) + FOOTER.size) + entries + FOOTER.pack(len(sizes), 0, FOOTER_MAGIC)


def _check_space(out: Path, layout: TarLayout) -> None:
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.is_dir() else 0
    needed, free = layout.size_bytes - written, shutil.disk_usage(folder).free
    if needed > free:
        raise NotEnoughSpace(f"{out}: {needed:,} bytes are still to be written, {free:,} are free: make space")


def _folder_name(source: Path) -> str:
    """The folder in the tar: the pack's own name, short enough for a header of one block."""
    name = os.fsencode(source.resolve().name)[:FOLDER_BYTES].decode("utf-8", "ignore")
    return name if name.isprintable() and name else "pack"


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
