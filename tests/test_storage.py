"""Reading by position, direct or buffered: whole, in pieces, past the end, and where direct reads are refused."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moepack.layout import storage
from moepack.layout.pages import HUGE_PAGE_BYTES, Pages
from moepack.layout.storage import DIRECT_ALIGNMENT, DataFile

SIZE = 5 * DIRECT_ALIGNMENT + 1000
needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs a system with O_DIRECT")


@pytest.fixture
def data() -> bytes:
    return bytes(value * 7 % 251 for value in range(SIZE))


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    return path


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def file(request: pytest.FixtureRequest, path: Path) -> DataFile:
    return DataFile(path, direct=request.param)


@pytest.fixture
def memory() -> memoryview:
    return Pages(SIZE).buffer


def test_buffers_are_filled_one_after_the_other(file: DataFile, memory: memoryview, data: bytes) -> None:
    unit = DIRECT_ALIGNMENT
    parts = [memory[3 * unit : 5 * unit], memory[:unit], memory[unit : 2 * unit]]
    file.read_into(parts, unit)
    assert b"".join(parts) == data[unit : 5 * unit]
    file.close()


def test_a_direct_read_may_be_rounded_up_past_the_end(file: DataFile, memory: memoryview, data: bytes) -> None:
    start = 4 * DIRECT_ALIGNMENT
    file.read_into([memory[: 2 * DIRECT_ALIGNMENT]], start, needed_bytes=SIZE - start)
    assert memory[: SIZE - start] == data[start:]


@pytest.mark.parametrize("offset", [0, 4, 5, 6, 9])
def test_what_the_file_lacks_is_an_error_with_what_was_there(file: DataFile, memory: memoryview, offset: int) -> None:
    there = max(0, SIZE - offset * DIRECT_ALIGNMENT)
    with pytest.raises(OSError, match=f"the file ends after {there} of them") as caught:
        file.read_into([memory[: 8 * DIRECT_ALIGNMENT]], offset * DIRECT_ALIGNMENT)
    assert caught.value.errno == errno.EIO


def spoil_after(buffers: Sequence[memoryview], count: int) -> int:
    """Make a whole read one of so many bytes: what came after them is gone."""
    left = count
    for buffer in buffers:
        kept = min(left, len(buffer))
        buffer[kept:] = b"\xaa" * (len(buffer) - kept)
        left -= kept
    return count


@pytest.mark.parametrize("pieces", [[4096, 4096], [5000], [1, 1], [8192, 100, 100], [12288]])
def test_short_reads_are_gone_on_with(
    file: DataFile, memory: memoryview, data: bytes, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct read goes on from a whole sector; where a piece brings none, that is as the end of the file."""
    preadv, left = os.preadv, list(pieces)

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        return spoil_after(buffers, min(count, left.pop(0))) if left else count

    monkeypatch.setattr(os, "preadv", short)
    buffers = [memory[: 3 * DIRECT_ALIGNMENT], memory[4 * DIRECT_ALIGNMENT : 5 * DIRECT_ALIGNMENT]]
    if file.is_direct and pieces[-1] < DIRECT_ALIGNMENT:
        with pytest.raises(OSError, match="the file ends after"):
            file.read_into(buffers, 0)
        return
    file.read_into(buffers, 0)
    assert b"".join(buffers) == data[: 4 * DIRECT_ALIGNMENT]


@needs_direct
def test_direct_is_what_the_system_was_asked_for(path: Path) -> None:
    for direct in (True, False):
        file = DataFile(path, direct)
        assert file.is_direct == bool(fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT)
        assert direct or not file.is_direct
        file.drop_cache()


def refuse_open(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    opened = os.open

    def refuse(path: object, flags: int, *rest: int, **options: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return opened(path, flags, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)


def refuse_read(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    preadv = os.preadv

    def refuse(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)


@needs_direct
@pytest.mark.parametrize("refuse", [refuse_open, refuse_read])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_reads_is_read_through_the_cache(
    path: Path,
    memory: memoryview,
    data: bytes,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[pytest.MonkeyPatch, int], None],
    number: int,
) -> None:
    refuse(monkeypatch, number)
    file = DataFile(path, direct=True)
    file.read_into([memory[:SIZE]], 0)
    assert memory[:SIZE] == data
    assert not file.is_direct


@needs_direct
def test_threads_that_are_refused_at_once_all_read_through_the_cache(
    path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that hears of it last finds that the other has given up direct reads already."""
    both, preadv = threading.Barrier(2, timeout=10), os.preadv

    def refuse(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            is_last = both.wait() == 1
            until = time.monotonic() + 10
            while is_last and file.is_direct and time.monotonic() < until:
                time.sleep(0.001)
            raise OSError(errno.EINVAL, "refused")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    file = DataFile(path, direct=True)

    def read(part: int) -> bytes:
        buffer = memoryview(bytearray(4096))
        file.read_into([buffer], part * 4096)
        return bytes(buffer)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(read, (0, 1))) == [data[:4096], data[4096:8192]]
    assert not file.is_direct


@needs_direct
def test_other_errors_are_not_taken_for_a_refusal(
    path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = DataFile(path, direct=True)
    refuse_read(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        file.read_into([memory[:4096]], 0)
    assert file.is_direct
    refuse_open(monkeypatch, errno.EACCES)
    with pytest.raises(PermissionError):
        DataFile(path, direct=True)


def test_pages_start_on_a_huge_page_and_are_zero() -> None:
    for size in (1, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1):
        for huge in (True, False):
            pages = Pages(size, huge)
            values = np.frombuffer(pages.buffer, np.uint8)
            assert values.ctypes.data % HUGE_PAGE_BYTES == 0
            assert values.size == pages.size_bytes == -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
            assert not values.any()
            assert huge or not pages.is_huge


def test_memory_without_huge_pages_is_memory_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr("moepack.layout.pages.THP_SETTING", setting)
    assert not Pages(100).is_huge
    setting.unlink()  # a kernel built without them
    pages = Pages(100)
    assert not pages.is_huge
    pages.buffer[:3] = b"abc"
    assert isinstance(pages.lock(), bool)
    assert pages.is_locked == pages.lock()


class Radvisory(ctypes.Structure):
    """As macOS documents it in fcntl(2)."""

    _fields_ = [("ra_offset", ctypes.c_int64), ("ra_count", ctypes.c_int)]


def test_macos_is_told_in_its_own_structure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, bytes]] = []
    file = DataFile(path)
    monkeypatch.setattr(storage.sys, "platform", "darwin")
    monkeypatch.setattr(storage.fcntl, "fcntl", lambda descriptor, command, argument: told.append((command, argument)))
    assert file.takes_advice
    file.advise(5 * 2**33 + 16384, 7077888)
    ((command, raw),) = told
    assert command == 44
    assert len(raw) == ctypes.sizeof(Radvisory)
    found = Radvisory.from_buffer_copy(raw)
    assert (found.ra_offset, found.ra_count) == (5 * 2**33 + 16384, 7077888)


def refuse(*arguments: object) -> None:
    raise OSError(errno.ENOTSUP, "no")


def test_advice_that_is_refused_is_no_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = DataFile(path)
    monkeypatch.setattr(storage.sys, "platform", "darwin")
    monkeypatch.setattr(storage.fcntl, "fcntl", refuse)
    file.advise(0, SIZE)


@needs_direct
def test_linux_is_told_of_reads_through_its_cache_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, ...]] = []
    buffered, direct = DataFile(path), DataFile(path, direct=True)
    monkeypatch.setattr(storage.os, "posix_fadvise", lambda *arguments: told.append(arguments))
    for file in (buffered, direct):
        file.advise(4096, 8192)
    assert told == [(buffered.fileno(), 4096, 8192, os.POSIX_FADV_WILLNEED)]
    assert buffered.takes_advice
    assert not direct.takes_advice


@pytest.mark.parametrize("part", [(0, 0), (4096, 8192), (4096, 0), (4096, 2**40)])
def test_what_macos_is_asked_to_forget_stays_in_the_file(path: Path, data: bytes, part: tuple[int, int]) -> None:
    """The calls are those of any Unix; whether they empty the cache only a Mac can tell. A refusal is no error."""
    file = DataFile(path)
    storage.invalidate(file.fileno(), *part)
    assert path.read_bytes() == data
