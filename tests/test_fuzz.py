"""Damaged and hostile bytes, in manifests and safetensors headers: an error of ours comes out, cheaply, or a good pack.

Two kinds of change: to the bytes as they lie (flips, splices, huge numbers, deep nesting), and to what they say, with
the manifest's digest renewed, so that the numbers themselves are all that is wrong. The short version runs in the fast
suite; the long one is told its seconds: MOEPACK_FUZZ_SECONDS=600 pytest -m fuzz tests/test_fuzz.py
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from golden_packs import GOLDEN, NAMES, copy_pack, find_problems, read_everything, read_manifest, sign, to_bytes
from moepack.layout.errors import MoepackError
from moepack.layout.manifest import Manifest
from moepack.layout.reader import Pack
from moepack.layout.summary import summarize
from moepack.layout.tensor_file import read_tensor_header

SHORT_ROUNDS = 240  # of each kind
LONG_SECONDS = float(os.environ.get("MOEPACK_FUZZ_SECONDS", "60"))
PEAK_PER_BYTE = 40  # JSON of empty objects takes 27 times its length as Python objects, and is checked level by level
PEAK_CONSTANT_BYTES = 512 * 1024  # reading a golden pack, its largest block and the interpreter's own
MESSAGE_CHARACTERS = 1000

NUMBERS = ["0", "-1", "1", "7", "16384", str(2**31), str(2**50), str(2**63 - 1), str(2**64), "9" * 400, "1e999", "0.5"]
TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"\0",
        b"\xff",
        b"null",
        b"true",
        b"NaN",
    ),
    *(
        b"[" * 70,
        b'{"a":' * 70,
        b"[" * 20000,
        b'"a":1,' * 2000,
        b"\\n" * 20000,
        b"\n",
        b"../",
        b"\xf0\x9f\x98\x80",
        b"layer",
        b"size_bytes",
    ),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 31, 32, 64, 128, 16383, 16384, 2**24, 2**24 + 1, 2**31, 2**50, 2**63, 10**300),
    *(
        0.0,
        1.5,
        "",
        "x",
        "0" * 64,
        "f" * 64,
        "U32",
        "BF16",
        "F8_E4M3",
        "../x",
        "experts/layer_00.bin",
        "\ud800",
        "a\nb",
    ),
    *([], [0], [[]], [2**24] * 8, [2**24] * 9, [1] * 100, {}, {"bits": 16}, {"bits": 4, "group_size": 32}),
]


def mutate_bytes(raw: bytes, chance: random.Random) -> bytes:
    """One to three changes to bytes: a flip, a cut, a copy of another part, a token, another number."""
    changed = bytearray(raw)
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(changed) + 1)
        stop = min(len(changed), start + chance.choice([0, 1, 2, 8, 64, 1000]))
        kind = chance.randrange(5)
        if kind == 0 and start < len(changed):
            changed[start] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[start:stop]
        elif kind == 2:
            other = chance.randrange(len(changed) + 1)
            changed[start:stop] = changed[other : other + chance.choice([1, 10, 300])]
        elif kind == 3:
            changed[start:start] = chance.choice(TOKENS)
        else:
            digits = [index for index, byte in enumerate(changed) if 48 <= byte < 58]
            if digits:
                place = chance.choice(digits)
                changed[place : place + chance.randint(1, 5)] = chance.choice(NUMBERS).encode()
    return bytes(changed)


def mutate_tree(tree: Any, chance: random.Random) -> Any:
    """One to three changes to a JSON tree: a value replaced, moved, doubled, removed, or changed a little."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.randint(1, 3)):
        holder, key = _pick(tree, chance)
        if holder is None:
            return chance.choice(VALUES)
        value, kind = holder[key], chance.randrange(5)
        if kind == 0:
            holder[key] = copy.deepcopy(chance.choice(VALUES))
        elif kind == 1:
            del holder[key]
        elif kind == 2:
            other, source = _pick(tree, chance)
            holder[key] = copy.deepcopy(other[source]) if other is not None else {}
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(value))
        elif type(value) is int:
            holder[key] = value + chance.choice([-1, 1, 32, -32, 16384, -16384, value, 2**32])
        elif isinstance(holder, dict):
            holder[chance.choice(["x", "", "__metadata__", "model.norm", "a\nb", "\ud800", "weight"])] = value
    return tree


def _pick(tree: Any, chance: random.Random) -> tuple[Any, Any]:
    """A random place in a tree: its holder and key. Deep places are as likely as shallow ones."""
    holder, key = None, None
    while isinstance(tree, (dict, list)) and tree:
        holder, key = tree, chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        tree = holder[key]
        if chance.random() < 0.1:
            break
    return holder, key


def check_refusal(error: Exception) -> None:
    text = str(error)
    assert text, "says what is wrong"
    assert text.isprintable(), f"one line: {text[:200]!r}"
    assert len(text) < MESSAGE_CHARACTERS


def use(pack: Path) -> None:
    """All that can be done with a pack whose manifest is accepted."""
    Manifest.from_bytes(Manifest.read(pack).to_bytes())
    problems = find_problems(pack)
    assert all(problem.text.isprintable() for problem in problems)
    with Pack.open(pack) as opened:
        json.dumps(summarize(opened))
    read_everything(pack)


def accepts(action: Callable[[], object], refusal: type[Exception], size_bytes: int) -> bool:
    """Whether `action` accepts its input. It may raise `refusal` alone, and allocate in proportion to its input.

    Above the bound it is measured once more: the interpreter's own tables (that of interned strings, say) double
    at some attempt, whichever that is, and a reader that allocates too much does so both times.
    """
    bound = PEAK_CONSTANT_BYTES + PEAK_PER_BYTE * size_bytes
    peaks = []
    while not peaks or (peaks[-1] >= bound and len(peaks) < 2):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        accepted = True
        try:
            action()
        except refusal as error:
            check_refusal(error)
            accepted = False
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    assert peaks[-1] < bound, f"{peaks} bytes for {size_bytes}"
    return accepted


def try_manifest(pack: Path, raw: bytes) -> bool:
    """Use a pack with this manifest; whether it was accepted. Anything but a MoepackError fails the test."""
    (pack / "manifest.json").write_bytes(raw)
    return accepts(lambda: use(pack), MoepackError, len(raw))


def try_header(path: Path, raw: bytes) -> bool:
    """Read a safetensors file of these bytes; whether it was accepted. Anything but a ValueError fails the test."""
    path.write_bytes(raw)

    def read() -> None:
        header = read_tensor_header(path)
        assert sum(spec.size_bytes for spec in header.tensors.values()) + header.header_bytes == len(raw)

    return accepts(read, ValueError, len(raw))


def with_length(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


class Attack:
    """The four kinds of attack on a golden pack; each call is one attempt that a seed repeats."""

    def __init__(self, name: str, folder: Path):
        self.pack = copy_pack(name, folder)
        self.tree = read_manifest(self.pack)
        self.raw = (self.pack / "manifest.json").read_bytes()
        self.resident = (self.pack / "resident.safetensors").read_bytes()
        (length,) = struct.unpack_from("<Q", self.resident)
        self.header, self.data = self.resident[8 : 8 + length], self.resident[8 + length :]
        self.file = folder / f"{name}.safetensors"

    def manifest_bytes(self, chance: random.Random) -> bool:
        """Bytes changed, signed again half of the time."""
        changed = mutate_bytes(self.raw, chance)
        return try_manifest(self.pack, sign(changed) if chance.random() < 0.5 else changed)

    def manifest_tree(self, chance: random.Random) -> bool:
        """A manifest whose digest is right and whose contents are wrong."""
        return try_manifest(self.pack, to_bytes(mutate_tree(self.tree, chance)))

    def header_bytes(self, chance: random.Random) -> bool:
        """A safetensors file changed anywhere, its length field right half of the time."""
        if chance.random() < 0.5:
            return try_header(self.file, mutate_bytes(self.resident, chance))
        return try_header(self.file, with_length(mutate_bytes(self.header, chance), self.data))

    def header_tree(self, chance: random.Random) -> bool:
        """A header that is good JSON and says what is not so."""
        header = json.dumps(mutate_tree(json.loads(self.header), chance)).encode()
        return try_header(self.file, with_length(header, self.data))


ATTACKS: dict[str, Callable[[Attack, random.Random], bool]] = {
    kind: getattr(Attack, kind) for kind in ("manifest_bytes", "manifest_tree", "header_bytes", "header_tree")
}


def attempt(attack: Attack, kind: str, seed: int) -> bool:
    try:
        return ATTACKS[kind](attack, random.Random(seed))
    except BaseException as error:
        error.add_note(f"to repeat: {kind}, seed {seed}") if hasattr(error, "add_note") else None
        raise


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("name", NAMES)
def test_f27_damaged_bytes_give_errors_of_ours(name: str, kind: str, tmp_path: Path) -> None:
    attack = Attack(name, tmp_path)
    rounds = SHORT_ROUNDS if name == "minimal" else SHORT_ROUNDS // 4
    tracemalloc.start()
    try:
        accepted = sum(attempt(attack, kind, seed) for seed in range(rounds))
    finally:
        tracemalloc.stop()
    assert accepted < rounds / 2, "most changes matter"


@pytest.mark.fuzz
@pytest.mark.timeout(LONG_SECONDS + 300)
def test_f27_damaged_bytes_for_as_long_as_told(tmp_path: Path) -> None:
    attacks = [Attack(name, tmp_path) for name in NAMES]
    seed, end = SHORT_ROUNDS, time.monotonic() + LONG_SECONDS
    tracemalloc.start()
    try:
        while time.monotonic() < end:
            for attack in attacks:
                for kind in ATTACKS:
                    attempt(attack, kind, seed)
            seed += 1
    finally:
        tracemalloc.stop()
    print(f"{(seed - SHORT_ROUNDS) * len(attacks) * len(ATTACKS)} attempts, the last with seed {seed - 1}")


def test_golden_packs_stay_within_the_bound(tmp_path: Path) -> None:
    """The bound is one that a good pack keeps, so that a refusal above it is dear."""
    tracemalloc.start()
    try:
        for name in NAMES:
            assert try_manifest(copy_pack(name, tmp_path), (GOLDEN / name / "manifest.json").read_bytes())
    finally:
        tracemalloc.stop()
