"""Resident weights in memory: the file's bytes, aligned, without the MTP head; an error where they are not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_pack
from moepack.layout.errors import DamagedPack
from moepack.layout.pages import HUGE_PAGE_BYTES
from moepack.layout.reader import Pack
from moepack.layout.spec import RESIDENT_NAME
from moepack.runtime.engine import read_architecture
from moepack.runtime.resident import ResidentWeights
from tiny_checkpoint import TinyModel, write_checkpoint


def load(directory: Path) -> tuple[Pack, ResidentWeights]:
    pack = Pack.open(directory)
    return pack, ResidentWeights.load(pack, read_architecture(pack))


def check_weights(directory: Path) -> int:
    """Compare every tensor with the file; how many were read to a place that is not aligned."""
    pack, weights = load(directory)
    entries = pack.manifest.resident.tensors
    assert weights._tensors.keys() == {name for name in entries if not name.startswith("mtp.")}
    ends = []
    for name, tensor in weights._tensors.items():
        expected = pack.read_resident(name)
        found = tensor.view(torch.uint8).flatten().numpy()
        np.testing.assert_array_equal(found, np.frombuffer(expected.tobytes(), np.uint8), err_msg=name)
        assert tensor.data_ptr() % 64 == 0, name
        ends.append((tensor.data_ptr(), tensor.data_ptr() + found.size))
    ends.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(ends)), "no two overlap"
    size = ResidentWeights.size_bytes(pack)
    assert ends[-1][1] - ends[0][0] <= size
    assert size % HUGE_PAGE_BYTES == 0
    return sum(entries[name].offset_bytes % 64 > 0 for name in weights._tensors)


def test_weights_are_the_files(tiny_pack: Path) -> None:
    check_weights(tiny_pack)


@pytest.mark.parametrize("bits", [4, 16])
def test_weights_of_the_demo_model_are_the_files(demo_pack: Callable[[int], Path], bits: int) -> None:
    check_weights(demo_pack(bits))


def test_arrays_of_odd_sizes_are_moved_to_aligned_places(tmp_path: Path) -> None:
    model = TinyModel(layers=2, full_attention_interval=2, experts=3, linear_key_heads=1, linear_value_heads=3)
    source = write_checkpoint(tmp_path / "source", model)
    assert check_weights(make_pack(source, tmp_path / "pack", resident_bits=16)) > 0


def test_a_file_system_without_direct_reads_gives_the_same(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, direct = os.open, getattr(os, "O_DIRECT", 0)

    def refuse(path: object, flags: int, *rest: int, **options: int) -> int:
        if direct and flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    check_weights(tiny_pack)


def test_a_file_truncated_since_it_was_opened_is_named(tiny_copy: Path) -> None:
    pack = Pack.open(tiny_copy)
    os.truncate(tiny_copy / RESIDENT_NAME, 20000)
    text = rf"{RESIDENT_NAME}: at byte \d+: read of \d+ bytes failed twice: the file ends after \d+ of them"
    with pytest.raises(DamagedPack, match=text):
        ResidentWeights.load(pack, read_architecture(pack))


def test_a_failed_read_is_tried_once_more(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, preadv = iter([True]), os.preadv

    def flaky(*arguments: object) -> int:
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error")
        return preadv(*arguments)  # type: ignore[arg-type]

    pack = Pack.open(tiny_pack)
    monkeypatch.setattr(os, "preadv", flaky)
    weights = ResidentWeights.load(pack, read_architecture(pack))
    assert next(failures, None) is None
    assert torch.equal(weights.vector("model.norm.weight"), load(tiny_pack)[1].vector("model.norm.weight"))


def test_memory_that_may_not_be_locked_is_no_error(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load(tiny_pack)[1].is_locked, bool)
    monkeypatch.setattr("moepack.layout.pages.Pages.lock", lambda pages: False)
    assert load(tiny_pack)[1].is_locked is False
