"""States of prompts already read, so that what a conversation repeats is not computed again.

Every turn of a conversation begins with the turns before it, and every conversation with the same system message and
tools. A recurrent state cannot be cut back to where two prompts part, so states are kept where prompts are expected
to: after the first turn and before the answer.

Going on from a snapshot gives the same bits as reading the whole prompt: only states that a prefill has made are kept,
at multiples of DeltaNet's chunk. A decoded token is summed in another order, so with the state after an answer a
request's tokens would depend on whether that was still in memory. Nor would it help often: the template drops the
reasoning of the turns before. Instead an answer is read once more as the next prompt will have it, by the server while
nobody waits and by a chat while the user types (Engine.read_ahead); what comes first ends that.

A snapshot is found by the sha256 of the tokens before it, the pack and the arithmetic. In memory the least recently
used one makes room; with a directory they outlive the process, compressed and with a checksum.

    snapshots = Snapshots(budget_bytes=2**28, identity=b"pack and arithmetic", turn_ends=tokenizer.stop_token_ids)
    done = snapshots.restore(token_ids, state)          # tokens that need not be computed
    for position in snapshots.points(token_ids): ...    # snapshots.keep(token_ids[:position], state) when it is there
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import zstandard

from moepack.kernels.reference import DELTA_CHUNK
from moepack.layout.spec import PARTIAL_SUFFIX
from moepack.runtime.state import SequenceState

MAGIC = b"moepack state 1\n"
SUFFIX = ".state"
DEFAULT_DISK_BYTES = 8 * 2**30
FEWEST_LEFT = 2  # one token alone is computed as a decoded one is, in another order
COMPRESSION_LEVEL = 1  # states are nearly random: more effort finds no more
BLOCK_BYTES = 2**20
ABANDONED_S = 3600  # since the last write to a file that is not whole


class Snapshots:
    """Kept states of one engine.

    budget_bytes   of the states in memory; a larger one is kept on disk only
    identity       of whatever decides what a state is: pack, arithmetic, experts per token
    turn_ends      ids that end a turn of a conversation
    directory      where states outlive the process; None keeps them in memory only
    disk_bytes     of the files there, all engines' together: the least recently used are deleted
    """

    def __init__(
        self,
        budget_bytes: int,
        identity: bytes,
        turn_ends: Collection[int],
        directory: Path | None = None,
        disk_bytes: int = DEFAULT_DISK_BYTES,
    ):
        self.budget_bytes, self.directory, self.disk_bytes = budget_bytes, directory, disk_bytes
        self._identity, self._turn_ends = identity, np.array(sorted(turn_ends), np.int64)
        self._states: OrderedDict[str, list[torch.Tensor]] = OrderedDict()
        self._bytes = 0
        self._unwritten: list[str] = []

    @property
    def is_off(self) -> bool:
        """Whether nothing can be kept anywhere."""
        return not self.budget_bytes and self.directory is None

    def points(self, token_ids: Sequence[int]) -> list[int]:
        """Positions of a prompt at which its state is worth keeping, ascending."""
        if self.is_off:
            return []
        after_turns = np.flatnonzero(np.isin(np.asarray(token_ids, np.int64), self._turn_ends)) + 1
        first_and_last = {*after_turns[:1].tolist(), *after_turns[-1:].tolist()}
        last = len(token_ids) - FEWEST_LEFT
        return sorted({min(point, last) // DELTA_CHUNK * DELTA_CHUNK for point in first_and_last} - {0})

    def restore(self, token_ids: Sequence[int], state: SequenceState) -> int:
        """Bring a new state to the longest prefix of a prompt that is kept; returns its length, 0 if there is none."""
        if self.is_off:
            return 0
        digests = self._digests(token_ids, len(token_ids) - FEWEST_LEFT)
        for position, digest in reversed(digests.items()):
            kept = self._states.get(digest)
            if kept is not None:
                self._states.move_to_end(digest)
                state.fill(position, kept)
                return position
            if self.directory is not None and self._read(self._path(digest), state, position):
                self._remember(digest, state)
                return position
        return 0

    def keep(self, token_ids: Sequence[int], state: SequenceState) -> None:
        """Keep a state that has read exactly these tokens, as many as a multiple of DeltaNet's chunk."""
        digest = self._digests(token_ids, len(token_ids))[len(token_ids)]
        if digest in self._states:
            return
        is_in_memory = self._remember(digest, state)
        if self.directory is not None and not self._path(digest).exists():
            if is_in_memory:
                self._unwritten.append(digest)  # flush() writes it when nobody waits for a token
            else:
                self._write(digest, state.pieces())

    def flush(self) -> None:
        """Write to disk what is in memory only."""
        while self._unwritten and self.directory is not None:
            digest = self._unwritten.pop()
            if digest in self._states:
                self._write(digest, self._states[digest])

    def _digests(self, token_ids: Sequence[int], end: int) -> dict[int, str]:
        """The name of every prefix whose length is a multiple of the chunk, up to a length."""
        digest, names = hashlib.sha256(self._identity), {}
        ids = np.asarray(token_ids, "<i8")
        for position in range(DELTA_CHUNK, end + 1, DELTA_CHUNK):
            digest.update(ids[position - DELTA_CHUNK : position].tobytes())
            names[position] = digest.hexdigest()
        return names

    def _remember(self, digest: str, state: SequenceState) -> bool:
        """Copy a state if it fits the budget, room made first: the promise on memory holds while it is copied, too."""
        pieces = state.pieces()
        size_bytes = sum(piece.nbytes for piece in pieces)
        if size_bytes > self.budget_bytes:
            return False
        while self._bytes + size_bytes > self.budget_bytes:
            _, oldest = self._states.popitem(last=False)
            self._bytes -= sum(piece.nbytes for piece in oldest)
        self._states[digest] = [piece.cpu().clone() for piece in pieces]
        self._bytes += size_bytes
        return True

    # Files: MAGIC, sha256 of the name and the frame, one zstd frame of all pieces

    def _path(self, digest: str) -> Path:
        assert self.directory is not None
        return self.directory / (digest + SUFFIX)

    def _write(self, digest: str, pieces: Sequence[torch.Tensor]) -> None:
        """A failure to write loses a saving of time, nothing else: it is said, and no more files are written."""
        path = self._path(digest)
        partial = path.with_suffix(f".{os.getpid()}{PARTIAL_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # prompts are private
            with open(partial, "wb") as file:
                checksum = hashlib.sha256(digest.encode())
                file.write(MAGIC + bytes(checksum.digest_size))
                for block in _compress(pieces):
                    checksum.update(block)
                    file.write(block)
                file.seek(len(MAGIC))
                file.write(checksum.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            self._delete_oldest()
        except BaseException as error:  # of Ctrl-C, too, nothing is left: states are large, and private
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            note = f"note: {path}: cannot be written ({error.strerror}): prompts are remembered in memory only"
            print(note, file=sys.stderr, flush=True)
            self.directory = None

    def _read(self, path: Path, state: SequenceState, position: int) -> bool:
        """Bring a state to a file's, if there is a whole one; a damaged one is deleted, and the prompt computed."""
        try:
            with open(path, "rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise ValueError("no state of this version")
                expected, found = file.read(hashlib.sha256().digest_size), hashlib.sha256(path.stem.encode())
                start = file.tell()
                while block := file.read(BLOCK_BYTES):
                    found.update(block)
                if found.digest() != expected:
                    raise ValueError("its checksum is wrong")
                file.seek(start)
                with zstandard.ZstdDecompressor().stream_reader(file) as frame:
                    state.fill(position, _read_pieces(frame, state.pieces(position)))
            os.utime(path)
            return True
        except OSError:  # most often: there is none
            return False
        except (ValueError, zstandard.ZstdError) as error:
            note = f"note: {path}: not used, and deleted ({error}): the prompt is computed"
            print(note, file=sys.stderr, flush=True)
            path.unlink(missing_ok=True)
            state.clear()
            return False

    def _delete_oldest(self) -> None:
        """Other processes may write and delete here at the same time. What one of them left when it was killed goes."""
        assert self.directory is not None
        files = []
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == SUFFIX:
                    files.append((status.st_mtime, status.st_size, path))
                elif path.suffix == PARTIAL_SUFFIX and status.st_mtime < time.time() - ABANDONED_S:
                    path.unlink()
        files.sort()
        total = sum(size_bytes for _, size_bytes, _ in files)
        for _, size_bytes, path in files[:-1]:
            if total <= self.disk_bytes:
                return
            total -= size_bytes
            path.unlink(missing_ok=True)


def _compress(pieces: Sequence[torch.Tensor]) -> Iterator[bytes]:
    """One zstd frame of all pieces, block by block: a whole piece can be as large as a budget."""
    compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compressobj()
    for piece in pieces:
        raw = _bytes_of(piece.cpu())
        for start in range(0, len(raw), BLOCK_BYTES):
            yield compressor.compress(raw[start : start + BLOCK_BYTES])
    yield compressor.flush()


def _read_pieces(frame: BinaryIO, pieces: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The pieces of a file, of the shapes given. Raises ValueError if it is of another length."""
    for piece in pieces:
        read = torch.empty(piece.shape, dtype=piece.dtype)
        buffer = _bytes_of(read)
        done = 0
        while done < len(buffer):
            count = frame.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not count:
                raise ValueError("it ends early")
            done += count
        yield read
    if frame.read(1):
        raise ValueError("it goes on past its end")


def _bytes_of(piece: torch.Tensor) -> memoryview:
    return piece.contiguous().view(-1).view(torch.uint8).numpy().data
