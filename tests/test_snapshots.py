"""States of earlier prompts: the same bits as without them, within their budget, whole or not at all."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moepack.layout.errors import MemoryBudgetError, UsageError
from moepack.runtime import snapshots as snapshots_module
from moepack.runtime.engine import Engine
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.snapshots import SUFFIX, Snapshots
from moepack.runtime.state import SequenceState
from tiny_checkpoint import TOKEN_IDS

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
END = TOKEN_IDS["<|im_end|>"]
ROOM = 64 * 2**20


def turn(length: int, seed: int) -> list[int]:
    """A turn of a conversation: random words and the end token."""
    return [*random.Random(seed).choices(range(10, 250), k=length - 1), END]


SYSTEM, QUESTION, ANSWER, AGAIN = turn(100, 0), turn(150, 1), turn(90, 2), turn(40, 3)
OPENING = [7, 8, 9]  # what the template puts before an answer
FIRST = SYSTEM + QUESTION + OPENING
SECOND = SYSTEM + QUESTION + ANSWER + AGAIN + OPENING


def hidden_bits(engine: Engine, ids: list[int]) -> list[int]:
    """Tokens sampled at a high temperature: they depend on every score, not on the largest alone."""
    return list(engine.generate(ids, SamplingParams(temperature=3, seed=5, max_tokens=8, ignore_eos=True)))


@pytest.mark.parametrize("exact", [False, True])
def test_a_second_turn_computes_what_is_new_and_gives_the_same_tokens(tiny_pack: Path, exact: bool) -> None:
    cold, warm = (Engine.open(tiny_pack, exact=exact, snapshot_bytes=size) for size in (0, ROOM))
    first = warm.generate(FIRST, GREEDY)
    assert list(first) == list(cold.generate(FIRST, GREEDY))
    assert first.cached_tokens == 0
    second = warm.generate(SECOND, GREEDY)
    assert list(second) == list(cold.generate(SECOND, GREEDY))
    assert second.cached_tokens == 192  # the turn ends after 250 tokens: the last multiple of 64 before that
    assert second.stats().cached_tokens == 192
    other = warm.generate(SYSTEM + turn(70, 9) + OPENING, GREEDY)
    assert list(other) == list(cold.generate(SYSTEM + turn(70, 9) + OPENING, GREEDY))
    assert other.cached_tokens == 64  # the system message, up to the last multiple of 64 in its 100 tokens


@pytest.mark.parametrize("exact", [False, True])
def test_what_was_read_ahead_is_not_read_again_and_gives_the_same_tokens(tiny_pack: Path, exact: bool) -> None:
    """The answer as the next prompt has it, read while nobody waited."""
    cold, warm = (Engine.open(tiny_pack, exact=exact, snapshot_bytes=size) for size in (0, ROOM))
    list(warm.generate(FIRST, GREEDY))
    progress: list[float] = []
    assert warm.read_ahead(SYSTEM + QUESTION + ANSWER, progress.append) == 320  # of 340 tokens
    assert round(sum(progress)) == 320 - 192, "from the snapshot before the answer on"
    assert warm.read_ahead(SYSTEM + QUESTION + ANSWER, progress.append) == 320
    assert round(sum(progress)) == 320 - 192, "once"
    second = warm.generate(SECOND, GREEDY)
    assert list(second) == list(cold.generate(SECOND, GREEDY))
    assert second.cached_tokens == 320
    assert cold.read_ahead(SECOND) == 0
    assert warm.read_ahead(SECOND[:63]) == 0


@pytest.mark.parametrize("length", [65, 66, 127, 128, 129, 130, 193, 257])
def test_going_on_is_reading_all_bit_for_bit(tiny_pack: Path, length: int) -> None:
    ids = turn(length, 4)
    engine = Engine.open(tiny_pack, snapshot_bytes=ROOM)
    with torch.inference_mode():
        whole = engine.new_state(length)
        expected = [hidden[-1:].clone() for hidden in engine.prefill(ids, whole)][-1]
        part = engine.new_state(length)
        points = engine.snapshots.points(ids)
        for hidden in engine.prefill(ids, part, cuts=points):
            found = hidden[-1:].clone()
        assert torch.equal(found, expected)
        list(engine.generate(ids, GREEDY))  # keeps what points() names
        restored = engine.new_state(length)
        done = engine.snapshots.restore(ids, restored)
        assert done == (points[-1] if points else 0)
        for hidden in engine.prefill(ids[done:], restored):
            found = hidden[-1:].clone()
    assert torch.equal(found, expected)
    for ours, theirs in zip(restored.pieces(), whole.pieces()):
        assert torch.equal(ours, theirs)


def test_sampling_after_a_snapshot_is_sampling_without(demo_pack: Callable[[int], Path]) -> None:
    cold, warm = (Engine.open(demo_pack(4), snapshot_bytes=size) for size in (0, ROOM))
    ends = sorted(cold.tokenizer.stop_token_ids)[:1]
    ids = cold.tokenizer.encode("Once upon a time there was a fox. " * 12) + ends
    more = ids + cold.tokenizer.encode("And then it rained for a day. " * 3) + ends
    assert hidden_bits(warm, ids) == hidden_bits(cold, ids)
    assert hidden_bits(warm, more) == hidden_bits(cold, more)


def test_snapshots_stay_within_their_budget(tiny_pack: Path) -> None:
    engine = Engine.open(tiny_pack, snapshot_bytes=ROOM)
    list(engine.generate(FIRST, GREEDY))
    one = sum(piece.nbytes for piece in next(iter(engine.snapshots._states.values())))
    small = Engine.open(tiny_pack, snapshot_bytes=2 * one)
    for seed in range(5):
        list(small.generate(turn(130, seed) + OPENING, GREEDY))
        held = sum(piece.nbytes for pieces in small.snapshots._states.values() for piece in pieces)
        assert held == small.snapshots._bytes <= 2 * one
    latest = small.generate(turn(130, 4) + OPENING, GREEDY)
    list(latest)
    assert latest.cached_tokens == 128
    oldest = small.generate(turn(130, 0) + OPENING, GREEDY)
    list(oldest)
    assert oldest.cached_tokens == 0


def test_the_budget_is_part_of_the_plan(tiny_pack: Path) -> None:
    plan = Engine.open(tiny_pack, max_context=64).memory_plan
    common: dict[str, Any] = {"max_context": 64, "process_bytes": plan.process_bytes}
    with pytest.raises(MemoryBudgetError):
        Engine.open(tiny_pack, memory=plan.total_bytes, snapshot_bytes=2**30, **common)
    roomy = Engine.open(tiny_pack, memory=plan.total_bytes + ROOM, snapshot_bytes=ROOM, **common)
    assert roomy.memory_plan.total_bytes == plan.total_bytes + ROOM


def test_they_outlive_the_process_in_a_directory(tiny_pack: Path, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    with Engine.open(tiny_pack, snapshot_bytes=ROOM, snapshot_directory=folder) as engine:
        expected = list(engine.generate(FIRST, GREEDY))
    assert {path.suffix for path in folder.iterdir()} == {SUFFIX}
    for budget in (ROOM, 0):  # on disk only, too
        with Engine.open(tiny_pack, snapshot_bytes=budget, snapshot_directory=folder) as engine:
            generation = engine.generate(FIRST, GREEDY)
            assert list(generation) == expected
            assert generation.cached_tokens == 192


def test_states_of_other_arithmetic_are_not_used(tiny_pack: Path, tmp_path: Path) -> None:
    with Engine.open(tiny_pack, snapshot_directory=tmp_path) as engine:
        list(engine.generate(FIRST, GREEDY))
    others: list[dict[str, Any]] = [{"exact": True}, {"experts_per_token": 1}]
    for options in others:
        with Engine.open(tiny_pack, snapshot_directory=tmp_path, **options) as engine:
            generation = engine.generate(FIRST, GREEDY)
            list(generation)
            assert generation.cached_tokens == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "rename", "empty", "magic"])
def test_a_damaged_file_is_not_used(
    tiny_pack: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Engine.open(tiny_pack, snapshot_directory=tmp_path) as engine:
        expected = list(engine.generate(FIRST, GREEDY))
    paths = sorted(tmp_path.iterdir())
    raws = [bytearray(path.read_bytes()) for path in paths]
    for path, raw, other in zip(paths, raws, raws[::-1]):
        changed = {
            "flip": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
            "truncate": raw[:-20],
            "extend": raw + b"x",
            "rename": other,
            "empty": b"",
            "magic": b"M" + raw[1:],
        }[damage]
        path.write_bytes(changed)
    with Engine.open(tiny_pack, snapshot_directory=tmp_path) as engine:
        generation = engine.generate(FIRST, GREEDY)
        assert list(generation) == expected
        assert generation.cached_tokens == 0
    assert "not used" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_costs_nothing_but_time(
    tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with Engine.open(tiny_pack, snapshot_bytes=ROOM, snapshot_directory=blocked / "states") as engine:
        plain = Engine.open(tiny_pack)
        assert list(engine.generate(FIRST, GREEDY)) == list(plain.generate(FIRST, GREEDY))
        generation = engine.generate(FIRST, GREEDY)
        list(generation)
        assert generation.cached_tokens == 192
    assert "cannot be written" in capsys.readouterr().err


def read_state(engine: Engine, seed: int = 0) -> SequenceState:
    """The state behind a turn of 64 tokens."""
    state = engine.new_state(64)
    with torch.inference_mode():
        list(engine.prefill(turn(64, seed), state))
    return state


def test_the_directory_has_a_limit(tiny_pack: Path, tmp_path: Path) -> None:
    with Engine.open(tiny_pack) as engine:
        snapshots = Snapshots(0, b"", [END], tmp_path, disk_bytes=1)
        for seed in range(3):
            snapshots.keep(turn(64, seed), read_state(engine, seed))
            assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_write_leaves_nothing(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(pieces: Sequence[torch.Tensor]) -> Iterator[bytes]:
        yield b"some"
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshots_module, "_compress", compress)
    with Engine.open(tiny_pack) as engine, pytest.raises(KeyboardInterrupt):
        Snapshots(0, b"", [END], tmp_path).keep(turn(64, 0), read_state(engine))
    assert not list(tmp_path.iterdir())


def test_other_processes_write_and_delete_in_the_directory(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What vanishes meanwhile is no failure; what a killed one has left goes, what one is writing stays."""
    for name, age in (("left.1.partial", 7200), ("written.2.partial", 0), ("gone.state", 0)):
        (tmp_path / name).write_bytes(b"state")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    stat = Path.stat

    def vanish(path: Path, **options: bool) -> os.stat_result:
        if path.name == "gone.state":
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", vanish)
    with Engine.open(tiny_pack) as engine:
        snapshots = Snapshots(0, b"", [END], tmp_path)
        snapshots.keep(turn(64, 0), read_state(engine))
        assert snapshots.directory == tmp_path
    assert not capsys.readouterr().err
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[-1] == "written.2.partial"
    assert [Path(name).suffix for name in names] == [".state", ".partial"]


def test_a_state_too_small_refuses_a_snapshot(tiny_pack: Path) -> None:
    engine = Engine.open(tiny_pack, snapshot_bytes=ROOM)
    list(engine.generate(FIRST, GREEDY))
    with pytest.raises(UsageError, match="the state holds 64 positions: make a new one for 192"):
        engine.snapshots.restore(FIRST, engine.new_state(64))
