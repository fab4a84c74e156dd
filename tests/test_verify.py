"""Verification and reading: strays, links, headers, padding, second reads, samples, and what the command prints."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from golden_packs import (
    GOLDEN,
    NAMES,
    copy_pack,
    edit_manifest,
    find_problems,
    moe_inspect,
    moe_inspect_process,
    read_everything,
    read_manifest,
)
from moepack.layout import verify
from moepack.layout.errors import DamagedPack
from moepack.layout.manifest import Manifest
from moepack.layout.reader import Pack
from moepack.layout.verify import list_regions, verify_contents, verify_structure
from moepack.layout.writer import write_expert_file, write_manifest

NO_PACK = "cannot be read ({}): not a pack, or a conversion that has not finished; run moe-convert to the end"


def texts(pack: Path) -> list[str]:
    """What verification says, without the folder of the test."""
    found = [problem.text for problem in find_problems(pack)]
    assert all(text.isprintable() for text in found), "one line each"
    return [text.removeprefix(f"{pack}/") for text in found]


def test_f1_a_directory_without_a_manifest_is_no_pack(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "No such file or directory"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(DamagedPack) as caught:
            Pack.open(path)
        assert str(caught.value) == f"{path / 'manifest.json'}: {NO_PACK.format(reason)}"
        assert caught.value.exit_code == 3


def test_f1_strays_are_named(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)
    for name in ("resident.safetensors.partial", "experts/layer_02.bin", "experts/.DS_Store", "notes.txt"):
        (pack / name).touch()
    (pack / "more" / "deep").mkdir(parents=True)
    (pack / "more" / "deep" / "file").touch()
    (pack / ".convert").mkdir()
    os.symlink("nowhere", pack / "dangling")
    found = texts(pack)
    strays = [".convert", "dangling", "more", "notes.txt", "resident.safetensors.partial"]
    strays += ["experts/.DS_Store", "experts/layer_02.bin"]
    assert sorted(found) == sorted(f"{name}: is not part of the pack" for name in strays)
    assert {problem.repair for problem in find_problems(pack)} == {"move it away or delete it"}


def test_f1_a_stray_of_any_name_is_one_line(tmp_path: Path) -> None:
    pack = copy_pack("minimal", tmp_path)
    for name in (b"\xff\xfe", b"two\nlines", b"\x1b[2J"):
        with contextlib.suppress(OSError):  # some file systems take UTF-8 only
            Path(os.fsdecode(bytes(pack) + b"/" + name)).touch()
    assert len(texts(pack)) >= 2
    checked = moe_inspect_process("verify", pack)
    assert (checked.returncode, "Traceback" in checked.stderr) == (3, False)
    assert checked.stdout.count("\n") == len(texts(pack)) + 1
    assert json.loads(moe_inspect("verify", pack, "--json").stdout)["ok"] is False


def test_f2_links_are_no_plain_files(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)
    shutil.move(pack / "config.json", tmp_path / "config.json")
    os.symlink(tmp_path / "config.json", pack / "config.json")
    expected = "is missing or no plain file, expected 30 bytes"
    assert texts(pack) == [f"config.json: {expected}"]
    with pytest.raises(DamagedPack, match=expected):
        Pack.open(pack)


def test_f2_a_linked_folder_is_found(tmp_path: Path) -> None:
    pack = copy_pack("minimal", tmp_path)
    shutil.move(pack / "experts", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", pack / "experts")
    assert texts(pack) == ["experts: is not part of the pack"]


def test_f2_a_manifest_that_is_no_plain_file(tmp_path: Path) -> None:
    pack = copy_pack("minimal", tmp_path)
    shutil.move(pack / "manifest.json", tmp_path / "manifest.json")
    makers = [lambda path: os.symlink(tmp_path / "manifest.json", path), os.mkfifo, os.mkdir]
    for make in makers:
        make(pack / "manifest.json")
        outcome: list[BaseException] = []

        def read(outcome: list[BaseException] = outcome) -> None:
            try:
                Manifest.read(pack)
            except DamagedPack as error:
                outcome.append(error)

        reader = threading.Thread(target=read, daemon=True)  # a pipe without a writer would never open
        reader.start()
        reader.join(5)
        assert outcome, "refused at once"
        assert "not a pack" in str(outcome[0])
        os.rmdir(pack / "manifest.json") if make is os.mkdir else os.unlink(pack / "manifest.json")


def test_f2_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    pack = copy_pack("minimal", tmp_path)
    (pack / "resident.safetensors").unlink()
    (pack / "resident.safetensors").mkdir()
    assert "resident.safetensors: is missing or no plain file, expected 134 bytes" in texts(pack)


def test_f15_padding_that_is_not_zero_is_found_though_its_digest_is_right(tmp_path: Path) -> None:
    """A writer's mistake, not the disk's: the first such byte of each run is named."""
    pack = copy_pack("minimal", tmp_path)
    manifest = Manifest.read(pack)
    entry = manifest.expert_files[0]
    block = bytearray((pack / entry.file).read_bytes())
    dirty = [62, 74, 272, 16383]
    for position in (*dirty, 273):
        block[position] = 1
    entry = write_expert_file(pack, 0, manifest.shape, entry.tiers, entry.expert_tiers, [block])
    write_manifest(pack, Manifest(manifest.model, (entry,), manifest.resident, (), {}))
    for piece_bytes in (verify.PIECE_BYTES, 4096):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "PIECE_BYTES", piece_bytes)
            found = texts(pack)
        for position in dirty:
            where = "experts/layer_00.bin: layer 0 expert 0 at byte 0"
            assert f"{where}: padding byte {position} of the block is not zero" in found


def test_f16_f25_f26_regions_cover_every_byte_once() -> None:
    for name in NAMES:
        with Pack.open(GOLDEN / name) as pack:
            regions, sizes = list_regions(pack), pack.manifest.list_files()
        for file, size in sizes.items():
            runs = sorted((r.offset_bytes, r.offset_bytes + r.size_bytes) for r in regions if r.file == file)
            assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
            assert runs[-1][1] == size


def test_f16_a_wrong_block_digest_names_the_block(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)
    edit_manifest(pack, lambda m: m["expert_files"][2]["block_sha256"].reverse())
    assert [text.split(": sha256")[0] for text in texts(pack)] == [
        "experts/mtp_00.bin: layer 2 expert 0 at byte 0",
        "experts/mtp_00.bin: layer 2 expert 1 at byte 16384",
    ]


def test_f22_manifest_and_header_must_agree(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)

    def rename(manifest: dict) -> None:
        tensors = manifest["resident"]["tensors"]
        tensors["model.norm.other"] = tensors.pop("model.norm.weight")

    edit_manifest(pack, rename)
    found = texts(pack)
    assert [text.split(": the file has")[0] for text in found] == [
        "resident.safetensors: tensor model.norm.other",
        "resident.safetensors: tensor model.norm.weight",
    ]
    assert "the file has None" in found[0]
    assert "the manifest None" in found[1]


def test_f22_an_array_that_the_manifest_leaves_out_is_found(tmp_path: Path) -> None:
    pack = copy_pack("minimal", tmp_path)
    edit_manifest(pack, lambda m: m["resident"]["tensors"].clear())
    assert [text.split(": the file has")[0] for text in texts(pack)] == [
        "resident.safetensors: tensor model.norm.weight"
    ]


def test_f25_wrong_digests_of_header_and_arrays(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)
    edit_manifest(pack, lambda m: m["resident"].update(header_sha256="0" * 63 + "1"))
    edit_manifest(pack, lambda m: m["resident"]["tensors"]["mtp.norm.weight"].update(sha256="f" * 64))
    offset = read_manifest(pack)["resident"]["tensors"]["mtp.norm.weight"]["offset_bytes"]
    assert [text.split(": sha256")[0] for text in texts(pack)] == [
        "resident.safetensors: header at byte 0",
        f"resident.safetensors: tensor mtp.norm.weight at byte {offset}",
    ]


def test_f28_a_short_read_names_the_block(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path / "a: b")  # a colon in the path must not confuse the message
    with Pack.open(pack) as opened:
        os.truncate(pack / "experts/layer_01.bin", 49152 + 100)
        buffer = memoryview(bytearray(16384))
        with pytest.raises(DamagedPack) as caught:
            opened.read_block(1, 1, buffer)
        reason = "read of 16384 bytes failed twice: the file ends after 100 of them"
        assert str(caught.value) == f"{pack}/experts/layer_01.bin: layer 1 expert 1 at byte 49152: {reason}"
        assert (caught.value.layer, caught.value.expert, caught.value.offset_bytes) == (1, 1, 49152)
        os.truncate(pack / "resident.safetensors", 10)
        expected = r"resident\.safetensors: at byte \d+: tensor model\.norm\.weight cannot be read, tried twice: "
        with pytest.raises(DamagedPack, match=expected + "the file ends after 0 of them"):
            opened.read_resident("model.norm.weight")


def test_f28_a_failed_read_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([True, False])
    preadv = os.preadv

    def flaky(*arguments: object) -> int:
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    with Pack.open(GOLDEN / "mixed") as pack:
        block = memoryview(bytearray(32768))
        assert pack.read_block(0, 0, block) == 32768
        pack.check_block(0, 0, block)


def test_f28_a_buffer_that_is_too_small_is_refused() -> None:
    with (
        Pack.open(GOLDEN / "mixed") as pack,
        pytest.raises(ValueError, match="the block of layer 0 expert 0 has 32768 bytes, the buffer 32767"),
    ):
        pack.read_block(0, 0, memoryview(bytearray(32767)))


def test_check_block_tells_one_block_from_another() -> None:
    with Pack.open(GOLDEN / "mixed") as pack:
        block = memoryview(bytearray(16384))
        pack.read_block(2, 0, block)
        pack.check_block(2, 0, block)
        with pytest.raises(DamagedPack, match=r"layer 2 expert 1 at byte 16384: sha256 is [0-9a-f]{12}…, the manifest"):
            pack.check_block(2, 1, block)


def test_a_pack_is_read_by_many_threads_at_once() -> None:
    with Pack.open(GOLDEN / "mixed") as pack, ThreadPoolExecutor(8) as pool:
        places = [(layer, expert) for layer in range(3) for expert in range(2)] * 20

        def check(place: tuple[int, int]) -> None:
            block = memoryview(bytearray(pack.geometry(place[0]).block(place[1]).block_stride))
            pack.read_block(*place, block)
            pack.check_block(*place, block)

        list(pool.map(check, places))
        assert len(pack._files) == 3


def test_copied_files_are_read_by_name() -> None:
    with Pack.open(GOLDEN / "mixed") as pack:
        assert pack.read_file("chat_template.jinja") == "{{ messages[0].content }} – no line end".encode()
        assert pack.read_file("merges.txt") == b""
        assert pack.read_file("manifest.json") is None


def test_f29_all_problems_are_reported(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)
    (pack / "config.json").unlink()
    (pack / "stray").touch()
    for file, position in (("experts/layer_00.bin", 5), ("experts/layer_00.bin", 40000), ("experts/mtp_00.bin", 7)):
        with open(pack / file, "r+b") as opened:
            opened.seek(position)
            opened.write(b"\x55\xaa")
    os.truncate(pack / "resident.safetensors", 3000)
    assert [text.split(": ")[0] + ": " + text.split(": ")[1] for text in texts(pack)] == [
        "config.json: is missing or no plain file, expected 30 bytes",
        "resident.safetensors: is 3000 bytes long, expected 3400",
        "stray: is not part of the pack",
        "experts/layer_00.bin: layer 0 expert 0 at byte 0",
        "experts/layer_00.bin: layer 0 expert 1 at byte 32768",
        "experts/mtp_00.bin: layer 2 expert 0 at byte 0",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="tells files by /proc")
def test_f29_a_region_that_reads_well_the_second_time_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = copy_pack("minimal", tmp_path)
    preadv, reads = os.preadv, []

    def unlucky(descriptor: int, buffers: list, offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".bin"):
            reads.append(offset)
            buffers[0][5] ^= len(reads) == 1
        return count

    monkeypatch.setattr(os, "preadv", unlucky)
    note = "read twice, the second time well: suspect the cable, the disk's cache or the memory"
    assert texts(pack) == [f"experts/layer_00.bin: layer 0 expert 0 at byte 0: {note}"]
    assert reads == [0, 0]
    reads.clear()
    assert {problem.repair for problem in find_problems(pack)} == {verify.REREAD}


def test_f29_a_read_that_fails_once_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = copy_pack("mixed", tmp_path)
    failures = iter([True])
    preadv = os.preadv

    def flaky(*arguments: object) -> int:
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    (problem,) = find_problems(pack)
    assert problem.text.endswith("read twice, the second time well: suspect the cable, the disk's cache or the memory")


def test_f29_a_damaged_block_is_repaired_alone(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)
    for file, position in (("experts/layer_01.bin", 5), ("experts/mtp_00.bin", 16384), ("config.json", 3)):
        with open(pack / file, "r+b") as opened:
            opened.seek(position)
            opened.write(b"\x55\xaa")
    repairs = {problem.file.removeprefix(f"{pack}/"): problem.repair for problem in find_problems(pack)}
    assert repairs == {
        "config.json": verify.REPAIR,
        "experts/layer_01.bin": "moe-convert SRC PACK --redo 1:0",
        "experts/mtp_00.bin": "moe-convert SRC PACK --redo 2:1",
    }
    checked = moe_inspect("verify", pack)
    assert checked.returncode == 3
    assert checked.stderr.splitlines()[-2:] == [
        f"for 1 of them: {verify.REPAIR}",
        f"for 2 of them: moe-convert SRC {pack} --redo 1:0 --redo 2:1",
    ]


def test_small_neighbours_are_read_together_and_large_regions_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "PIECE_BYTES", 32768)
    sizes = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list, offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    with Pack.open(GOLDEN / "mixed") as pack:
        regions = list_regions(pack)
        assert list(verify_contents(pack, regions, workers=1)) == []
    assert max(sizes) == 32768
    assert len(sizes) < len(regions)


def test_f29_a_file_that_vanishes_while_it_is_verified_is_named(tmp_path: Path) -> None:
    pack = copy_pack("minimal", tmp_path)
    opened, problems = verify_structure(pack)
    assert problems == []
    (pack / "resident.safetensors").unlink()
    os.truncate(pack / "experts/layer_00.bin", 100)
    found = [problem.text.removeprefix(f"{pack}/") for problem in verify_contents(opened, list_regions(opened))]
    assert found == [
        "resident.safetensors: header at byte 0: cannot be read: No such file or directory",
        "resident.safetensors: tensor model.norm.weight at byte 128: cannot be read: No such file or directory",
        "experts/layer_00.bin: layer 0 expert 0 at byte 0: cannot be read: 16384 bytes at byte 0: the file ends after "
        "100 of them",
    ]


def test_a_sample_takes_a_share_of_the_blocks_and_all_else() -> None:
    with Pack.open(GOLDEN / "mixed") as pack:
        everything = list_regions(pack)
        for share, count in ((0.01, 1), (0.5, 3), (1.0, 6)):
            regions = list_regions(pack, share, seed=1)
            blocks = [region for region in regions if region.what == "block"]
            assert len(blocks) == count
            assert [r for r in regions if r.what != "block"] == [r for r in everything if r.what != "block"]
            assert set(blocks) <= set(everything)
        assert list_regions(pack, 0.5, seed=1) == list_regions(pack, 0.5, seed=1)


def test_the_command_says_well_and_how_much_it_read() -> None:
    whole = moe_inspect_process("verify", GOLDEN / "mixed")
    assert (whole.returncode, whole.stdout) == (0, f"{GOLDEN / 'mixed'}: well (6 blocks, 147.39 KiB read)\n")
    quick = moe_inspect("verify", GOLDEN / "mixed", "--quick")
    assert (quick.returncode, quick.stdout) == (0, f"{GOLDEN / 'mixed'}: well (structure only)\n")
    report = json.loads(moe_inspect("verify", GOLDEN / "mixed", "--sample", "50%", "--json").stdout)
    assert (report["ok"], report["blocks"], report["problems"]) == (True, 3, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "0"], "error: --sample 0: expected a share of the blocks such as 5% or 0.05\n"),
        (["--sample", "nan"], "error: --sample nan: expected a share of the blocks such as 5% or 0.05\n"),
        (
            ["--sample", "5%", "--quick"],
            "error: --quick reads no blocks: leave out --sample and --source, or --quick\n",
        ),
    ],
)
def test_the_command_refuses_a_wrong_request(arguments: list[str], message: str) -> None:
    refused = moe_inspect("verify", GOLDEN / "minimal", *arguments)
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", message)


def test_show_takes_any_provenance(tmp_path: Path) -> None:
    """Provenance and the architecture's name are free: odd ones are shown as well as they can be."""
    pack = copy_pack("minimal", tmp_path)
    deep: list = []
    for _ in range(50):
        deep = [deep]
    odd = {"settings": {"arguments": 5}, "notes": [deep, "\u001b", "\u2028"], "source": ["–"]}
    for provenance in (odd, {"settings": 5, "notes": 5}, {"settings": None, "notes": {"a": 1}}, {}):
        edit_manifest(pack, lambda m, provenance=provenance: m.update(provenance=provenance))
        edit_manifest(pack, lambda m: m["model"].update(architecture=["no name"]))
        read_everything(pack)
    edit_manifest(pack, lambda m: m.update(provenance=odd))
    for options in ([], ["--json"]):
        shown = moe_inspect("show", pack, *options)
        assert (shown.returncode, shown.stderr) == (0, "")
    edit_manifest(pack, lambda m: m.update(provenance={"settings": 5, "notes": 5}))
    assert moe_inspect("show", pack).returncode == 0


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs a user whom file permissions bind")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    pack = copy_pack("minimal", tmp_path)
    os.chmod(pack / "experts/layer_00.bin", 0)
    assert texts(pack) == [
        "experts/layer_00.bin: layer 0 expert 0 at byte 0: cannot be read: Permission denied",
    ]
