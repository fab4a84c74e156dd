"""What a writer does: temporary names, flushes and renames in order, the manifest last, nothing that does not fit."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

import make_golden
from golden_packs import GOLDEN, copy_pack, read_everything, read_manifest
from moepack.layout import spec
from moepack.layout.errors import DamagedPack, NotEnoughSpace
from moepack.layout.geometry import BlockGeometry, MatrixGeometry, Scheme
from moepack.layout.manifest import Manifest, ModelShape
from moepack.layout.reader import Pack
from moepack.layout.writer import (
    assemble_block,
    atomic_file,
    copy_file,
    write_expert_file,
    write_manifest,
    write_resident_file,
)

FORMAT = (Path(spec.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to files, in order: flushes, renames."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        seen.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        seen.append(f"rename {Path(source).name} {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    return seen


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc to name what is flushed")
def test_f30_temporary_name_flush_rename_flush(tmp_path: Path, calls: list[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.json").write_text("{}")
    pack = tmp_path / "pack"
    copy_file(source / "a.json", pack)
    assert calls == ["fsync a.json.partial", "rename a.json.partial a.json", "fsync pack"]
    calls.clear()
    make_golden.write_all(tmp_path / "golden")
    for file in ("experts/layer_00.bin", "resident.safetensors", "manifest.json"):
        name = Path(file).name
        rename = calls.index(f"rename {name}.partial {name}")
        assert calls[rename - 1] == f"fsync {name}.partial"
        assert calls[rename + 1].startswith("fsync ")


def test_f30_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    seen = []

    def write(error: Exception) -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"ne")
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            raise error

    with pytest.raises(RuntimeError, match="half way"):
        write(RuntimeError("half way"))
    with pytest.raises(NotEnoughSpace, match="No space left on device: make space"):
        write(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert seen == [["a", "a.partial"]] * 2
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_f31_the_manifest_makes_the_pack(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)
    manifest = Manifest.read(pack)
    (pack / "manifest.json").unlink()
    states = []

    def look() -> None:
        states.append(sorted(path.name for path in pack.glob("manifest*")))
        with pytest.raises(DamagedPack, match="a conversion that has not finished; run moe-convert to the end"):
            Pack.open(pack)

    write_manifest(pack, manifest, when_written=look)
    assert states == [["manifest.json.partial"]]
    read_everything(pack)


def test_f32_keys_stand_in_the_order_of_the_tables() -> None:
    manifest = read_manifest(GOLDEN / "mixed")
    tables = [re.findall(r"^\| `(\w+)` \| ", part, re.MULTILINE) for part in re.split(r"\n\n(?=\| key)", FORMAT)]
    top, resident, copied = list(manifest), list(manifest["resident"]), list(manifest["copied_files"][0])
    experts, array = list(manifest["expert_files"][0]), list(manifest["resident"]["tensors"]["mtp.norm.weight"])
    listed = [tuple(keys) for keys in tables]
    for keys in (top, resident, copied, experts, array):
        assert any(table[: len(keys)] == tuple(keys) for table in listed), keys
    offsets = [tensor["offset_bytes"] for tensor in manifest["resident"]["tensors"].values()]
    assert offsets == sorted(offsets)
    assert list(manifest["resident"]["quantized"]) == sorted(manifest["resident"]["quantized"])


def test_f33_writer_refuses_blocks_that_do_not_fit(tmp_path: Path) -> None:
    shape, tier = ModelShape(32, 5, 2, 1), dict.fromkeys(spec.PROJECTIONS, Scheme(16, None))
    block = bytes(16384)
    for blocks, reason in (
        ([block], "experts/layer_00.bin: 1 blocks of 2"),
        ([block] * 3, "experts/layer_00.bin: unexpected block of 16384 bytes for expert 2"),
        ([block, block + b"0"], "experts/layer_00.bin: unexpected block of 16385 bytes for expert 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(reason)):
            write_expert_file(tmp_path, 0, shape, [tier], [0, 0], blocks)
        assert list((tmp_path / "experts").iterdir()) == []
    geometry = BlockGeometry.of(32, 5, tier)
    sections = {section.name: bytes(section.size_bytes) for section in geometry.sections}
    assert assemble_block(geometry, sections) == block
    with pytest.raises(ValueError, match="a block needs the sections"):
        assemble_block(geometry, {**sections, "more": b""})
    with pytest.raises(ValueError, match=r"section up_proj\.weight is 320 bytes long, got 319"):
        assemble_block(geometry, {**sections, "up_proj.weight": bytes(319)})


def test_f33_writer_refuses_arrays_that_do_not_fit(tmp_path: Path) -> None:
    for pieces in ([b"123"], [b"1234", b"5"]):
        with pytest.raises(ValueError, match=rf"t is 4 bytes long, got {sum(map(len, pieces))}"):
            write_resident_file(tmp_path, [("t", "F32", (1,))], {}, lambda spec, pieces=pieces: pieces)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="a matrix needs rows and columns, got 0 x 32"):
        MatrixGeometry(0, 32, Scheme(4, 32))
    with pytest.raises(ValueError, match="a block needs exactly"):
        BlockGeometry.of(32, 32, {"gate_proj": Scheme(4, 32)})
