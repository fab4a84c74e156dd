"""Writing from start to end past the page cache: any sizes give the same bytes, on file systems that refuse it too."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from moepack.layout import sequential
from moepack.layout.sequential import SequentialFile
from moepack.layout.storage import DIRECT_ALIGNMENT

PIECES = (1, 4095, 4096, 0, 70_001, 8192, 3, 250_000)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two MiB is the smallest there is: cut, so that it fills often."""
    pages = sequential.Pages

    class Cut(pages):  # type: ignore[misc, valid-type]
        def __init__(self, size_bytes: int):
            super().__init__(size_bytes)
            self.buffer = self.buffer[: 16 * DIRECT_ALIGNMENT]

    monkeypatch.setattr(sequential, "Pages", Cut)


def pieces() -> list[bytes]:
    chance = np.random.default_rng(0)
    return [chance.bytes(size) for size in PIECES]


def write(path: Path, data: list[bytes]) -> None:
    with SequentialFile(path) as file:
        for piece in data:
            assert file.write(piece) == memoryview(piece).nbytes
        file.flush()


def test_any_pieces_give_the_same_bytes(tmp_path: Path) -> None:
    for count in range(len(PIECES) + 1):
        write(tmp_path / "file", pieces()[:count])
        assert (tmp_path / "file").read_bytes() == b"".join(pieces()[:count])


def test_it_takes_what_has_wider_elements(tmp_path: Path) -> None:
    array = np.arange(100_000, dtype=np.uint32)
    write(tmp_path / "file", [array.data])  # type: ignore[list-item]
    assert (tmp_path / "file").read_bytes() == array.tobytes()


@pytest.mark.parametrize("refusal", ["open", "write"])
def test_where_direct_writes_are_refused_it_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("needs a system with O_DIRECT")
    real_open, real_write, refused = os.open, os.write, []

    def refuse_open(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    def refuse_write(descriptor: int, data: bytes) -> int:
        if not refused:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    monkeypatch.setattr(os, refusal, refuse_open if refusal == "open" else refuse_write)
    write(tmp_path / "file", pieces())
    assert refused
    assert (tmp_path / "file").read_bytes() == b"".join(pieces())


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a signal or a nearly full disk cuts one between two sectors, the rest cannot be direct."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[: max(1, len(data) * 2 // 3)]))
    write(tmp_path / "file", pieces())
    assert (tmp_path / "file").read_bytes() == b"".join(pieces())


def test_errors_come_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device at byte 0") as found:
        write(tmp_path / "file", pieces())
    assert found.value.filename == str(tmp_path / "file")
