"""moe-convert --to archive and back: byte-identical, goes on where it was stopped, names what is damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from convert_command import SMALL, files_of, problems_of, run_convert
from moepack.convert import archive
from moepack.convert.archive import FrameTable, TarLayout, is_archive, pack_archive, unpack_archive
from moepack.convert.shard_reader import ShardReader
from moepack.layout.errors import DamagedPack
from moepack.layout.reader import Pack
from tiny_checkpoint import write_checkpoint

GROUP = ("--group-size", 32)
VICTIM = "resident.safetensors"  # the largest file: many frames


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of 20,000 bytes, no multiple of tar's blocks: files begin and end anywhere in them."""
    monkeypatch.setattr(archive, "FRAME_BYTES", 20_000)
    monkeypatch.setattr(archive, "SYNC_FRAMES", 5)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which no test can see, and which takes most of the time


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    assert run_convert(write_checkpoint(folder / "source", SMALL), folder / "small.moepack", *GROUP).code == 0
    return folder / "small.moepack"


def nothing(size_bytes: int, total_bytes: int) -> None:
    """A progress display that shows nothing."""


@pytest.fixture
def archived(pack: Path, tmp_path: Path) -> Path:
    pack_archive(pack, tmp_path / "small.tar.zst", 2, nothing)
    return tmp_path / "small.tar.zst"


def test_there_and_back_is_the_same_pack(pack: Path, tmp_path: Path) -> None:
    packed = run_convert(pack, tmp_path / "a.tar.zst", "--to", "archive", "--json")
    assert (packed.code, packed.errors) == (0, [])
    facts = json.loads(packed.out)
    assert facts["archive_bytes"] == (tmp_path / "a.tar.zst").stat().st_size < facts["pack_bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.zst"]
    assert is_archive(tmp_path / "a.tar.zst")
    back = run_convert(tmp_path / "a.tar.zst", tmp_path / "back")
    assert (back.code, back.errors) == (0, [])
    assert files_of(tmp_path / "back") == files_of(pack)
    assert problems_of(tmp_path / "back") == []
    assert run_convert(tmp_path / "a.tar.zst", tmp_path / "back").code == 0, "again there is nothing to do"


def test_the_bytes_do_not_depend_on_the_workers(pack: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        pack_archive(pack, tmp_path / f"{workers}.tar.zst", workers, nothing)
    assert (tmp_path / "1.tar.zst").read_bytes() == (tmp_path / "3.tar.zst").read_bytes()


def test_tar_and_zstd_unpack_it_too(pack: Path, archived: Path, tmp_path: Path) -> None:
    with open(archived, "rb") as file, open(tmp_path / "plain.tar", "wb") as out:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        shutil.copyfileobj(reader, out)
    with tarfile.open(tmp_path / "plain.tar") as tar:
        tar.extractall(tmp_path / "by_tar", filter="data")
    assert files_of(tmp_path / "by_tar" / "small.moepack") == files_of(pack)


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the program zstd")
def test_the_zstd_program_finds_it_whole(archived: Path) -> None:
    assert subprocess.run(["zstd", "-t", "-q", archived], check=False).returncode == 0


def stop_after(count: int):
    """A progress display that is interrupted."""
    seen: list[int] = []

    def on_bytes(size_bytes: int, total_bytes: int) -> None:
        seen.append(size_bytes)
        if len(seen) > count:
            raise KeyboardInterrupt

    return on_bytes


def test_a_stopped_archive_goes_on_to_the_same_bytes(
    pack: Path, archived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = len(FrameTable.read(archived).ends)
    made: list[int] = []

    def make_frame(reader: ShardReader, source: Path, layout: TarLayout, number: int) -> tuple[bytes, bytes]:
        made.append(number)
        return original(reader, source, layout, number)

    original = archive._make_frame
    monkeypatch.setattr(archive, "_make_frame", make_frame)
    for count in range(0, frames, 3):
        out = tmp_path / f"{count}.tar.zst"
        with pytest.raises(KeyboardInterrupt):
            pack_archive(pack, out, 2, stop_after(count))
        assert not out.exists()
        made.clear()
        shown: list[tuple[int, int]] = []
        pack_archive(pack, out, 2, lambda *sizes, shown=shown: shown.append(sizes))
        assert out.read_bytes() == archived.read_bytes()
        assert min(made, default=frames) >= (count - 5) // 5 * 5, "what was safe on the disk was compressed again"
        assert sum(size for size, _ in shown) == shown[-1][1], "the progress does not end where it should"
        out.unlink()
    assert [path.name for path in tmp_path.iterdir()] == [archived.name]


def test_an_unfinished_archive_of_another_pack_is_started_anew(pack: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "small.moepack"
    assert run_convert(pack.parent / "source", other, *GROUP, "--bits", 2).code == 0
    with pytest.raises(KeyboardInterrupt):
        pack_archive(other, tmp_path / "a.tar.zst", 2, stop_after(8))
    pack_archive(pack, tmp_path / "a.tar.zst", 2, nothing)
    unpack_archive(tmp_path / "a.tar.zst", tmp_path / "back", 2, nothing)
    assert files_of(tmp_path / "back") == files_of(pack)


def test_a_stopped_unpacking_goes_on(pack: Path, archived: Path, tmp_path: Path) -> None:
    for count in range(0, 30, 4):
        out = tmp_path / str(count)
        with pytest.raises(KeyboardInterrupt):
            unpack_archive(archived, out, 2, stop_after(count))
        assert not (out / "manifest.json").exists()
        unpack_archive(archived, out, 2, nothing)
        assert files_of(out) == files_of(pack)


def test_every_kind_of_damage_is_found_and_named(archived: Path, tmp_path: Path) -> None:
    """A flipped bit anywhere, in frames, checksums or the table; bytes missing or added at the end."""
    whole, chance = archived.read_bytes(), random.Random(0)
    table = FrameTable.read(archived)
    victim = tmp_path / "damaged.tar.zst"
    places = [chance.randrange(len(whole)) for _ in range(60)] + [len(whole) - 1, len(whole) - 20, 0, 5]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        victim.write_bytes(damaged)
        with pytest.raises(DamagedPack) as error:
            unpack_archive(victim, tmp_path / "out", 1, nothing)
        assert str(victim) in str(error.value)
        frame = next((n for n, (end, _) in enumerate(table.ends) if place < end), None)
        if frame is not None:
            begin = table.ends[frame - 1][0] if frame else 0
            assert f"at byte {begin}" in str(error.value) or frame == 0
        assert not (tmp_path / "out" / "manifest.json").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    for content in (whole[:-1], whole[: len(whole) // 2], whole + b"x", whole[: table.ends[0][0]]):
        victim.write_bytes(content)
        result = run_convert(victim, tmp_path / "out")
        assert (result.code, result.out, len(result.errors)) == (3, "", 1)
        assert "ends without its table of frames: is the copy complete?" in result.errors[0]


def test_damage_names_the_file_in_the_pack(archived: Path, tmp_path: Path) -> None:
    table, whole = FrameTable.read(archived), bytearray(archived.read_bytes())
    whole[table.ends[-3][0] - 10] ^= 1
    archived.write_bytes(whole)
    result = run_convert(archived, tmp_path / "out")
    assert result.code == 3
    assert "experts/mtp_00.bin from byte" in result.errors[0]
    assert "copy the archive again" in result.errors[0]


def test_a_damaged_pack_is_not_archived(pack: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pack, tmp_path / "copy")
    path = copy / "experts" / "layer_01.bin"
    content = bytearray(path.read_bytes())
    content[12345] ^= 1
    path.write_bytes(content)
    result = run_convert(copy, tmp_path / "a.tar.zst", "--to", "archive")
    assert result.code == 3
    assert "layer_01.bin: its sha256 is not the manifest's" in result.errors[0]
    assert not (tmp_path / "a.tar.zst").exists()


@pytest.fixture
def copied(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A copy of the pack and what is to be its archive, of which each frame is safe on the disk at once."""
    monkeypatch.setattr(archive, "SYNC_FRAMES", 1)
    return shutil.copytree(pack, tmp_path / "copy" / pack.name), tmp_path / "copy.tar.zst"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def stop_within(copy: Path, out: Path) -> None:
    """Archive a pack until half of its largest file has gone by."""
    with Pack.open(copy) as opened:
        layout = TarLayout.of(copy.name, opened.manifest, (copy / "manifest.json").stat().st_size)
    entry = next(entry for entry in layout.entries if entry.name == VICTIM)
    stop = (entry.start + entry.end) // 2 // 20_000
    assert entry.start < (stop - 1) * 20_000 < (stop + 1) * 20_000 < entry.end, "the file is too small for this test"
    with pytest.raises(KeyboardInterrupt):
        pack_archive(copy, out, 1, stop_after(stop))
    noted = out.with_name(out.name + ".frames").stat().st_size
    assert entry.start < (noted - 32) // 4 * 20_000 < entry.end


@pytest.mark.parametrize("place", [30_000, -5])
def test_damage_is_found_in_the_file_that_a_run_stopped_in(
    pack: Path, archived: Path, copied: tuple[Path, Path], place: int
) -> None:
    """Before the place or behind it; when the pack is mended, the same command goes on to the whole archive."""
    copy, out = copied
    victim = copy / VICTIM
    if place > 0:
        flip(victim, place)
    stop_within(copy, out)
    if place < 0:
        flip(victim, place)
    for _ in range(2):
        result = run_convert(copy, out, "--to", "archive")
        assert (result.code, len(result.errors)) == (3, 1)
        assert f"{VICTIM}: its sha256 is not the manifest's" in result.errors[0]
        assert not out.exists()
    shutil.copy(pack / VICTIM, victim)
    assert run_convert(copy, out, "--to", "archive").code == 0
    assert out.read_bytes() == archived.read_bytes()


def test_a_pack_mended_while_a_run_was_stopped_makes_no_damaged_archive(
    pack: Path, archived: Path, copied: tuple[Path, Path]
) -> None:
    """What is archived of the file is damaged though the pack is not: noticed, thrown away, made anew."""
    copy, out = copied
    victim = copy / VICTIM
    flip(victim, 30_000)
    stop_within(copy, out)
    flip(victim, 30_000)
    assert run_convert(copy, out, "--to", "archive").code == 3
    assert run_convert(copy, out, "--to", "archive").code == 0
    assert out.read_bytes() == archived.read_bytes()


def test_damage_in_what_is_archived_is_named(copied: tuple[Path, Path]) -> None:
    copy, out = copied
    stop_within(copy, out)
    unfinished = out.with_name(out.name + ".partial")
    flip(unfinished, -20_000)
    result = run_convert(copy, out, "--to", "archive")
    assert (result.code, len(result.errors)) == (3, 1)
    assert f"{unfinished}: at byte " in result.errors[0]
    assert "is not what was written: check the disk, delete the file, then run again" in result.errors[0]
    unfinished.unlink()
    assert run_convert(copy, out, "--to", "archive").code == 0


def test_a_second_run_into_the_same_archive_is_refused(pack: Path, archived: Path, tmp_path: Path) -> None:
    """Whether the first has just begun or is half done; its archive is whole in the end."""
    out, refused = tmp_path / "a.tar.zst", []

    def on_bytes(size_bytes: int, total_bytes: int) -> None:
        refused.append(run_convert(pack, out, "--to", "archive"))

    pack_archive(pack, out, 1, on_bytes)
    assert len(refused) == len(FrameTable.read(archived).ends) + 1
    for result in refused:
        assert (result.code, result.out, len(result.errors)) == (2, "", 1)
        assert f"{out}: another moe-convert is at work here: wait for it" in result.errors[0]
    assert out.read_bytes() == archived.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.zst", archived.name]


def test_an_archive_finished_just_before_the_lock_is_kept(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.tar.zst"
    monkeypatch.setattr(archive.fcntl, "flock", lambda file, operation: out.write_bytes(b"of the other run"))
    result = run_convert(pack, out, "--to", "archive")
    assert (result.code, len(result.errors)) == (2, 1)
    assert f"{out}: exists: choose another name" in result.errors[0]
    assert out.read_bytes() == b"of the other run"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_is_there_is_kept(pack: Path, archived: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for arguments, expected in (
        ((pack, archived, "--to", "archive"), "exists: choose another name"),
        ((archived, tmp_path / "mine"), "is not empty and no unfinished pack"),
        ((archived, tmp_path / "out", "--to", "hf"), "needs a pack, this is an archive: unpack it first"),
    ):
        result = run_convert(*arguments)
        assert (result.code, len(result.errors)) == (2, 1)
        assert expected in result.errors[0]
    text = tmp_path / "text.zst"
    text.write_bytes(zstandard.compress(b"not a pack" * 100))
    result = run_convert(text, tmp_path / "out")
    assert (result.code, len(result.errors)) == (3, 1)
    assert not (tmp_path / "out").exists()
