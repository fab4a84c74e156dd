"""moe-inspect map: the numbers that blocks are coloured by, and, where matplotlib is installed, a picture of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from golden_packs import GOLDEN, moe_inspect
from moepack.layout.geometry import LayerGeometry, Scheme
from moepack.layout.manifest import ExpertFile, Manifest, ModelShape, block_geometry
from moepack.layout.picture import colours_of_bits, colours_of_trace, draw_map
from moepack.layout.spec import PROJECTIONS
from moepack.layout.trace import ReadTime, Request, Trace


def test_blocks_are_coloured_by_their_own_bits() -> None:
    values = colours_of_bits(Manifest.read(GOLDEN / "mixed")).values
    assert len({value for row in values for value in row}) == 4  # the pack has four kinds of block
    assert values[2] == [3.0, 3.0]  # 2 bits, and a scale and a bias of 16 per group of 32


def test_a_trace_colours_by_use_hits_and_read_time() -> None:
    manifest = Manifest.read(GOLDEN / "mixed")
    requests = [Request(0, (0, 1), False, 0.0, (1,)), Request(0, (1,), False, 1.0)]
    trace = Trace(2, 2, 1, requests, reads=[ReadTime(0, (1,), 10, 0.0, 0.002, False)])
    assert colours_of_trace(manifest, trace, "use").values[0] == [1, 2]
    assert colours_of_trace(manifest, trace, "hits").values[0] == [1, 0.5]
    read = colours_of_trace(manifest, trace, "read").values[0]
    assert math.isnan(read[0])
    assert read[1] == pytest.approx(2)


def test_the_command_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    drawn = moe_inspect("map", GOLDEN / "mixed", "-o", tmp_path / "layout.png")
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--colour", "heat"], "--colour heat: expected one of bits, use, hits, read"),
        (["--colour", "use"], "--colour use needs a recorded run: give --trace FILE"),
    ],
)
def test_impossible_colours_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    refused = moe_inspect("map", GOLDEN / "mixed", "-o", tmp_path / "layout.png", *options)
    assert (refused.returncode, message in refused.stderr) == (2, True)
    assert not (tmp_path / "layout.png").exists()


def test_a_map_of_397b_is_one_page_and_every_block_can_be_seen(tmp_path: Path) -> None:
    """60 layers of 512 experts, hot ones at 4 bits: 30,720 blocks."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    manifest = Manifest.read(GOLDEN / "mixed")
    shape = ModelShape(4096, 1024, 512, 60)
    tiers = [{name: Scheme(bits, 64) for name in PROJECTIONS} for bits in (4, 2)]
    expert_tiers = tuple(int(expert % 3 > 0) for expert in range(512))
    size_bytes = LayerGeometry([block_geometry(shape, tier) for tier in tiers], expert_tiers).size_bytes
    files = [
        ExpertFile(f"experts/layer_{n:02d}.bin", n, size_bytes, "0" * 64, tuple(tiers), expert_tiers, ("0" * 64,) * 512)
        for n in range(60)
    ]
    model = {**manifest.model, "text_config": {**manifest.model["text_config"], **vars(shape)}}
    large = replace(manifest, model=model, expert_files=tuple(files))
    draw_map(large, colours_of_bits(large), tmp_path / "large.png")
    header = (tmp_path / "large.png").read_bytes()[16:24]
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
    assert 0.8 * width / 512 >= 3, "pixels of a block"
    assert 60 * 10 <= height <= width, "rows high enough to be told apart, on one page"
