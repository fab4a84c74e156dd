"""moe-inspect map: the numbers that blocks are coloured by, and, where matplotlib is installed, a picture of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from golden_packs import GOLDEN, moe_inspect
from moepack.layout.manifest import Manifest
from moepack.layout.picture import colours_of_bits, colours_of_trace
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
