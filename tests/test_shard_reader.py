"""Reading byte ranges of shards: any range, memory used again only when nothing refers to it, digests as recorded."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moepack.convert.shard_reader import ShardReader

SIZE = 3 * 2**20 + 1234


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (1, 4096), (4095, 2), (4096, 8192), (77, 2**20), (SIZE - 9, 9), (5, 0)]
)
def test_any_range_has_the_bytes_of_the_file(shard: Path, offset: int, size: int) -> None:
    raw = ShardReader().read(shard, offset, size, "a")
    assert raw.tobytes() == shard.read_bytes()[offset : offset + size]
    assert not raw.flags.writeable


def test_a_range_beyond_the_end_is_an_error(shard: Path) -> None:
    with pytest.raises(OSError, match="the file ends after"):
        ShardReader().read(shard, SIZE - 100, 101, "a")


def test_memory_is_used_again_when_it_is_free_and_not_before(shard: Path) -> None:
    reader, content = ShardReader(), shard.read_bytes()
    first = reader.read(shard, 10, 1000, "a")
    view = first.view("<u2")[3:50].reshape(47, 1)
    address = first.ctypes.data
    del first
    second = reader.read(shard, 5010, 1000, "a")
    assert view.tobytes() == content[16:110], "a view keeps its memory"
    assert second.ctypes.data != address
    del view
    third = reader.read(shard, 10, 1000, "a")
    assert third.ctypes.data == address


def test_each_thread_records_what_it_reads_itself(shard: Path) -> None:
    reader, content = ShardReader(), shard.read_bytes()

    def read(number: int) -> list[tuple[str, bytes]]:
        with reader.recording() as record:
            for part in range(5):
                reader.read(shard, number * 1000 + part, 500, f"tensor {number}")
        assert record.seconds["read"] > 0
        return record.digests

    with ThreadPoolExecutor(4) as pool:
        for number, digests in enumerate(pool.map(read, range(40))):
            starts = [number * 1000 + part for part in range(5)]
            expected = [hashlib.sha256(content[start : start + 500]).digest() for start in starts]
            assert digests == [(f"tensor {number}", digest) for digest in expected]
    reader.read(shard, 0, 10, "outside")


def test_closed_it_opens_its_files_again(shard: Path) -> None:
    reader = ShardReader()
    before = reader.read(shard, 0, 100, "a").tobytes()
    reader.close()
    assert reader.read(shard, 0, 100, "a").tobytes() == before


def test_what_is_read_ahead_is_given_once_and_its_errors_too(shard: Path) -> None:
    reader, raw = ShardReader(), shard.read_bytes()
    reader.prefetch(shard, 5000, 300)
    reader._coming[shard, 5000, 300].result()
    with open(shard, "r+b") as file:
        file.write(bytes(len(raw)))
    first, again = (reader.read(shard, 5000, 300, "t").tobytes() for _ in range(2))
    assert (first, again) == (raw[5000:5300], bytes(300)), "read before the file changed, and after"
    reader.prefetch(shard, len(raw), 10)
    with pytest.raises(OSError, match="the file ends after"):
        reader.read(shard, len(raw), 10, "t")
    reader.prefetch(shard, 0, 10)
    reader.close()
    assert not reader._coming
