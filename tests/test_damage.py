"""Damage to a pack, from a table and at random: found, named with its file and place, and ended with exit code 3 or 4.

Each row of the table damages a copy of the golden pack `mixed` and says what opening it raises (None: opening does not
read that far), and what verification reports. Each property damages a pack at any place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golden_packs import GOLDEN, NAMES, copy_pack, edit_manifest, find_problems, moe_inspect, moe_inspect_process
from moepack.layout.errors import DamagedPack, MoepackError, UnsupportedVersion
from moepack.layout.reader import Pack
from moepack.layout.spec import MANIFEST_NAME, RESIDENT_NAME

Damage = Callable[[Path], object]
DIGESTS = r"sha256 is [0-9a-f]{12}…, the manifest says [0-9a-f]{12}…; read twice, same result: damaged"
MANIFEST_ADVICE = "; the manifest is damaged: restore it or convert again"
NO_MANIFEST = r"cannot be read \(No such file or directory\): not a pack, or a conversion that has not finished; "
SIGNATURE = rf"{MANIFEST_NAME}: sha256 of the manifest is [0-9a-f]{{12}}…, it says [0-9a-f]{{12}}…{MANIFEST_ADVICE}"
LAYER_0, LAYER_1, MTP = "experts/layer_00.bin", "experts/layer_01.bin", "experts/mtp_00.bin"

bounded = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def flip(file: str, position: int, mask: int = 1) -> Damage:
    def damage(pack: Path) -> None:
        raw = bytearray((pack / file).read_bytes())
        raw[position] ^= mask
        (pack / file).write_bytes(raw)

    return damage


def resize(file: str, change: int) -> Damage:
    return lambda pack: os.truncate(pack / file, (pack / file).stat().st_size + change)


def replace(file: str, old: bytes, new: bytes) -> Damage:
    def damage(pack: Path) -> None:
        raw = (pack / file).read_bytes()
        assert raw.count(old) >= 1
        (pack / file).write_bytes(raw.replace(old, new, 1))

    return damage


def swap_blocks(file: str, first: int, second: int, size: int) -> Damage:
    def damage(pack: Path) -> None:
        raw = bytearray((pack / file).read_bytes())
        one, other = slice(first, first + size), slice(second, second + size)
        raw[one], raw[other] = raw[other], raw[one]
        (pack / file).write_bytes(raw)

    return damage


def swap_files(first: str, second: str) -> Damage:
    def damage(pack: Path) -> None:
        shutil.move(pack / first, pack / "between")
        shutil.move(pack / second, pack / first)
        shutil.move(pack / "between", pack / second)

    return damage


def link(file: str) -> Damage:
    def damage(pack: Path) -> None:
        shutil.move(pack / file, pack.parent / "moved")
        os.symlink(pack.parent / "moved", pack / file)

    return damage


@dataclass(frozen=True)
class Row:
    """One kind of damage. `found` are patterns for the report, in order, after the folder's name."""

    damage: Damage
    raises: type[MoepackError] | None
    found: tuple[str, ...]
    exit_code: int = 3


ROWS = {
    "a_byte_of_a_block": Row(
        flip(LAYER_1, 49152 + 100), None, (rf"{LAYER_1}: layer 1 expert 1 at byte 49152: {DIGESTS}",)
    ),
    "the_top_bit_of_the_last_byte": Row(
        flip(LAYER_0, -1, 0x80), None, (rf"{LAYER_0}: layer 0 expert 1 at byte 32768: {DIGESTS}",)
    ),
    "a_byte_of_the_padding": Row(flip(MTP, 16383), None, (rf"{MTP}: layer 2 expert 0 at byte 0: {DIGESTS}",)),
    "two_blocks_swapped": Row(
        swap_blocks(MTP, 0, 16384, 16384),
        None,
        (rf"{MTP}: layer 2 expert 0 at byte 0: {DIGESTS}", rf"{MTP}: layer 2 expert 1 at byte 16384: {DIGESTS}"),
    ),
    "two_files_swapped": Row(
        swap_files(LAYER_0, LAYER_1),
        DamagedPack,
        (
            f"{LAYER_0}: is 65536 bytes long, expected 49152: extended",
            f"{LAYER_1}: is 49152 bytes long, expected 65536: truncated",
        ),
    ),
    "expert_file_truncated": Row(
        resize(LAYER_0, -1), DamagedPack, (f"{LAYER_0}: is 49151 bytes long, expected 49152: truncated",)
    ),
    "expert_file_a_block_short": Row(
        resize(MTP, -16384), DamagedPack, (f"{MTP}: is 16384 bytes long, expected 32768: truncated",)
    ),
    "expert_file_empty": Row(resize(MTP, -32768), DamagedPack, (f"{MTP}: is 0 bytes long, expected 32768: truncated",)),
    "expert_file_extended": Row(
        resize(LAYER_0, 1), DamagedPack, (f"{LAYER_0}: is 49153 bytes long, expected 49152: extended",)
    ),
    "expert_file_missing": Row(
        lambda pack: (pack / MTP).unlink(), DamagedPack, (f"{MTP}: is missing or no plain file, expected 32768 bytes",)
    ),
    "experts_missing": Row(
        lambda pack: shutil.rmtree(pack / "experts"),
        DamagedPack,
        tuple(f"{name}: is missing or no plain file, expected" for name in (LAYER_0, LAYER_1, MTP)),
    ),
    "expert_file_linked": Row(
        link(LAYER_1), DamagedPack, (f"{LAYER_1}: is missing or no plain file, expected 65536 bytes",)
    ),
    "resident_header_length": Row(
        flip(RESIDENT_NAME, 0), DamagedPack, (rf"{RESIDENT_NAME}: Extra data: line 1 column",)
    ),
    "resident_header_text": Row(
        replace(RESIDENT_NAME, b'"mtp.fc.scales"', b'"mtp.fc.Scales"'),
        DamagedPack,
        (
            rf"{RESIDENT_NAME}: tensor mtp\.fc\.Scales: the file has \('BF16', \(5, 3\), 3368, 30\), the manifest None",
            rf"{RESIDENT_NAME}: tensor mtp\.fc\.scales: the file has None, the manifest \('BF16', \(5, 3\), 3368, 30\)",
        ),
    ),
    "resident_header_blank": Row(
        replace(RESIDENT_NAME, b"  ", b" \t"), None, (rf"{RESIDENT_NAME}: header at byte 0: {DIGESTS}",)
    ),
    "resident_array": Row(
        flip(RESIDENT_NAME, -1), None, (rf"{RESIDENT_NAME}: tensor mtp\.norm\.weight at byte 3398: {DIGESTS}",)
    ),
    "resident_truncated": Row(
        resize(RESIDENT_NAME, -1), DamagedPack, (f"{RESIDENT_NAME}: is 3399 bytes long, expected 3400: truncated",)
    ),
    "resident_missing": Row(
        lambda pack: (pack / RESIDENT_NAME).unlink(),
        DamagedPack,
        (f"{RESIDENT_NAME}: is missing or no plain file, expected 3400 bytes",),
    ),
    "copied_file": Row(flip("config.json", 3), None, (rf"config\.json: file at byte 0: {DIGESTS}",)),
    "copied_file_grown_from_nothing": Row(
        resize("merges.txt", 1), DamagedPack, (r"merges\.txt: is 1 bytes long, expected 0: extended",)
    ),
    "copied_files_swapped": Row(
        swap_files("config.json", "chat_template.jinja"),
        DamagedPack,
        (r"config\.json: is 41 bytes", r"chat_template\.jinja: is 30"),
    ),
    "stray_file": Row(lambda pack: (pack / "x.bin").touch(), None, (r"x\.bin: is not part of the pack",)),
    "stray_partial_file": Row(
        lambda pack: (pack / f"{LAYER_0}.partial").touch(), None, (rf"{LAYER_0}\.partial: is not part of the pack",)
    ),
    "manifest_missing": Row(
        lambda pack: (pack / MANIFEST_NAME).unlink(), DamagedPack, (f"{MANIFEST_NAME}: {NO_MANIFEST}",)
    ),
    "manifest_linked": Row(link(MANIFEST_NAME), DamagedPack, (rf"{MANIFEST_NAME}: cannot be read \(no plain file\)",)),
    "manifest_empty": Row(
        resize(MANIFEST_NAME, -(GOLDEN / "mixed" / MANIFEST_NAME).stat().st_size),
        DamagedPack,
        (rf"{MANIFEST_NAME}: Expecting value: line 1 column 1 \(char 0\){MANIFEST_ADVICE}",),
    ),
    "manifest_truncated": Row(resize(MANIFEST_NAME, -40), DamagedPack, (rf"{MANIFEST_NAME}: .* line \d+ column",)),
    "manifest_line_end_missing": Row(resize(MANIFEST_NAME, -1), DamagedPack, (SIGNATURE,)),
    "manifest_blank_more": Row(replace(MANIFEST_NAME, b'"page_size": ', b'"page_size":  '), DamagedPack, (SIGNATURE,)),
    "manifest_number": Row(
        replace(MANIFEST_NAME, b'"size_bytes": 49152', b'"size_bytes": 49153'),
        DamagedPack,
        (SIGNATURE,),
    ),
    "manifest_number_signed": Row(
        lambda pack: edit_manifest(pack, lambda m: m["expert_files"][0].update(size_bytes=49153)),
        DamagedPack,
        (rf"{MANIFEST_NAME}: expert_files\.0\.size_bytes: the blocks need 49152, found 49153{MANIFEST_ADVICE}",),
    ),
    "manifest_key_twice": Row(
        replace(MANIFEST_NAME, b'"layer": 0,', b'"layer": 0, "layer": 0,'),
        DamagedPack,
        (f"{MANIFEST_NAME}: key 'layer' stands twice{MANIFEST_ADVICE}",),
    ),
    "manifest_of_another_pack": Row(
        lambda pack: shutil.copy(GOLDEN / "minimal" / MANIFEST_NAME, pack / MANIFEST_NAME),
        DamagedPack,
        (
            f"{RESIDENT_NAME}: is 3400 bytes long, expected 134: extended",
            f"{LAYER_0}: is 49152 bytes long, expected 16384: extended",
        ),
    ),
    "manifest_not_text": Row(
        flip(MANIFEST_NAME, 10, 0x80), DamagedPack, (f"{MANIFEST_NAME}: not UTF-8 text: byte 10 of 6861",)
    ),
    "magic": Row(
        replace(MANIFEST_NAME, b'"moepack"', b'"moepacK"'),
        DamagedPack,
        (f"{MANIFEST_NAME}: magic: expected 'moepack', found 'moepacK'{MANIFEST_ADVICE}",),
    ),
    "version_of_tomorrow": Row(
        replace(MANIFEST_NAME, b'"format_version": 1', b'"format_version": 2'),
        UnsupportedVersion,
        (f"{MANIFEST_NAME}: format version 2, but this moepack reads version 1: install a newer moepack or convert",),
        exit_code=4,
    ),
}


def find_texts(pack: Path) -> tuple[int, list[str]]:
    """Exit code and lines of the report, as the command would have them."""
    try:
        problems = find_problems(pack)
    except MoepackError as error:
        return error.exit_code, [str(error).removeprefix(f"{pack}/")]
    return 3 if problems else 0, [problem.text.removeprefix(f"{pack}/") for problem in problems]


@pytest.mark.parametrize("name", ROWS)
def test_f28_damage_is_named(name: str, tmp_path: Path) -> None:
    row, pack = ROWS[name], copy_pack("mixed", tmp_path)
    row.damage(pack)
    exit_code, texts = find_texts(pack)
    assert exit_code == row.exit_code
    for pattern in row.found:
        assert any(re.match(pattern, text) for text in texts), (pattern, texts)
    assert all(text.isprintable() for text in texts), "one line each"
    if row.raises is None:
        Pack.open(pack).close()
    else:
        with pytest.raises(row.raises) as caught:
            Pack.open(pack)
        assert caught.value.exit_code == row.exit_code
        assert str(caught.value).removeprefix(f"{pack}/") in texts


COMMAND_ROWS = ("two_blocks_swapped", "stray_file", "resident_array")
REFUSED_ROWS = ("manifest_missing", "manifest_number", "manifest_key_twice", "magic", "version_of_tomorrow")


@pytest.mark.parametrize("name", COMMAND_ROWS)
def test_f28_the_command_reports_on_stdout(name: str, tmp_path: Path) -> None:
    row, pack = ROWS[name], copy_pack("mixed", tmp_path)
    row.damage(pack)
    ended = moe_inspect_process("verify", pack)
    *lines, verdict = ended.stdout.splitlines()
    assert (ended.returncode, len(lines)) == (3, len(row.found))
    for line, pattern in zip(lines, row.found):
        assert re.match(pattern, line.removeprefix(f"{pack}/")), line
    assert re.fullmatch(rf"{pack}: {len(lines)} problems? \(\d blocks, [\d.]+ KiB read\)", verdict)
    advice = {
        "stray_file": "move it away or delete it",
        "two_blocks_swapped": f"moe-convert SRC {pack} --redo 2:0 --redo 2:1",
    }
    default = "restore the file from a copy, or convert again"
    assert f"for {len(lines)} of them: {advice.get(name, default)}" in ended.stderr


def test_f28_the_command_reports_as_json(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)
    ROWS["a_byte_of_a_block"].damage(pack)
    ended = moe_inspect("verify", pack, "--json")
    report = json.loads(ended.stdout)
    (problem,) = report["problems"]
    assert (ended.returncode, report["ok"], report["blocks"]) == (3, False, 6)
    assert {key: problem[key] for key in ("file", "layer", "expert", "offset_bytes")} == {
        "file": str(pack / LAYER_1),
        "layer": 1,
        "expert": 1,
        "offset_bytes": 49152,
    }


@pytest.mark.parametrize(("name", "command"), [*zip(REFUSED_ROWS, ("verify", "show", "verify", "show", "verify"))])
def test_f28_the_command_refuses_in_one_line(name: str, command: str, tmp_path: Path) -> None:
    row, pack = ROWS[name], copy_pack("mixed", tmp_path)
    row.damage(pack)
    run = moe_inspect_process if name in ("manifest_missing", "version_of_tomorrow") else moe_inspect
    ended = run(command, pack)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (row.exit_code, "", 1)
    assert re.match(row.found[0], ended.stderr.removeprefix(f"error: {pack}/")), ended.stderr


# At any place


@pytest.fixture(scope="module", params=NAMES)
def spare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy that tests damage and put right again."""
    pack = copy_pack(request.param, tmp_path_factory.mktemp("spare"))
    yield pack
    assert find_problems(pack) == []


def files_of(pack: Path) -> list[Path]:
    return sorted(path for path in pack.rglob("*") if path.is_file())


def check_named(pack: Path, path: Path, position: int | None) -> None:
    """Whatever is wrong in this file is found, is all that is found, and is named with its block if it has one."""
    if path.name == MANIFEST_NAME:
        with pytest.raises((DamagedPack, UnsupportedVersion)) as caught:
            find_problems(pack)
        assert str(caught.value).startswith(f"{path}: ")
        return
    problems = find_problems(pack)
    assert problems, f"{path.name} at {position}: not found"
    assert {problem.file for problem in problems} == {str(path)}
    if path.parent.name == "experts" and position is not None:
        with Pack.open(pack) as opened:
            entry = next(entry for entry in opened.manifest.expert_files if Path(entry.file).name == path.name)
            offsets = opened.geometry(entry.layer).offsets
        expert = max(expert for expert, offset in enumerate(offsets) if offset <= position)
        (problem,) = problems
        assert (problem.layer, problem.expert, problem.offset_bytes) == (entry.layer, expert, offsets[expert])


@bounded
@given(st.data())
def test_f29_any_changed_byte_is_found(spare: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([path for path in files_of(spare) if path.stat().st_size]))
    raw = path.read_bytes()
    position, mask = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(1, 255))
    try:
        path.write_bytes(raw[:position] + bytes([raw[position] ^ mask]) + raw[position + 1 :])
        check_named(spare, path, position)
    finally:
        path.write_bytes(raw)


@bounded
@given(st.data())
def test_f29_any_missing_or_extra_bytes_are_found(spare: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files_of(spare)))
    raw = path.read_bytes()
    start, extra = data.draw(st.integers(0, len(raw))), data.draw(st.binary(max_size=40))
    stop = data.draw(st.integers(start, len(raw)))
    changed = raw[:start] + extra + raw[stop:]
    if len(changed) == len(raw):
        return
    try:
        path.write_bytes(changed)
        check_named(spare, path, None)
    finally:
        path.write_bytes(raw)


@bounded
@given(st.data())
def test_f29_any_two_pages_swapped_are_found(spare: Path, data: st.DataObject) -> None:
    """Within a file or between two: misplaced writes keep every size."""
    files = [path for path in files_of(spare) if path.parent.name == "experts"]
    first, second = data.draw(st.sampled_from(files)), data.draw(st.sampled_from(files))
    before = {path: path.read_bytes() for path in (first, second)}
    after = {path: bytearray(raw) for path, raw in before.items()}
    one, other = (16384 * data.draw(st.integers(0, len(before[path]) // 16384 - 1)) for path in (first, second))
    after[first][one : one + 16384] = before[second][other : other + 16384]
    after[second][other : other + 16384] = before[first][one : one + 16384]
    if after == before:
        return
    try:
        for path, raw in after.items():
            path.write_bytes(raw)
        assert {problem.file for problem in find_problems(spare)} == {
            str(path) for path in after if after[path] != before[path]
        }
    finally:
        for path, raw in before.items():
            path.write_bytes(raw)


def test_f29_every_byte_of_the_resident_header_counts(tmp_path: Path) -> None:
    pack = copy_pack("minimal", tmp_path)
    path = pack / RESIDENT_NAME
    raw = path.read_bytes()
    for position in range(len(raw)):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 0x10]) + raw[position + 1 :])
        check_named(pack, path, position)
