"""A disk that fails while an answer is being written: it ends with the block's name, and nothing takes its place.

What a single read does then is tested in test_expert_store.py; below Python, in test_disk_errors.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from conftest import budget_of
from moepack.layout.errors import DamagedPack
from moepack.runtime import Engine, SamplingParams
from served import serve
from test_expert_store import Flaky

IDS = list(range(6))
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
CONTEXT = len(IDS) + 24
NAMED = r"experts/layer_0\d.bin: layer \d expert \d at byte \d+: read of \d+ bytes failed twice: "


@pytest.fixture
def engine(tiny_copy: Path) -> Iterator[Engine]:
    """With slots for one token's experts: any token may have to read."""
    one_token = 4 * 2  # layers, experts of each
    with Engine.open(tiny_copy, max_context=CONTEXT) as roomy:
        budget = budget_of(roomy, one_token)
    with Engine.open(tiny_copy, **budget) as opened:
        assert opened.store.num_slots == one_token
        yield opened


def fail_all_reads(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(os, "preadv", Flaky(failing=range(10**9)))


def truncate_all_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for path in folder.iterdir():
        os.truncate(path, 0)


@pytest.mark.parametrize(
    ("fail", "reason"), [(fail_all_reads, "Input/output error"), (truncate_all_files, "the file ends after 0 of them")]
)
def test_an_answer_ends_where_its_experts_cannot_be_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None], reason: str
) -> None:
    """After its third token; when the disk works again, so does the engine."""
    expected, tokens = list(engine.generate(IDS, GREEDY)), list[int]()
    folder = engine.store.pack.directory / "experts"
    files = {path: path.read_bytes() for path in folder.iterdir()}

    def write() -> None:
        for token_id in engine.generate(IDS, GREEDY):
            tokens.append(token_id)
            if len(tokens) == 3:
                fail(monkeypatch, folder)

    with pytest.raises(DamagedPack, match=NAMED + reason) as caught:
        write()
    layer, expert, offset = caught.value.layer, caught.value.expert, caught.value.offset_bytes
    assert offset == engine.store.pack.geometry(layer).offsets[expert]
    assert 3 <= len(tokens) < len(expected)
    assert tokens == expected[: len(tokens)], "what was said before is the model's own"
    monkeypatch.undo()
    for path, data in files.items():
        path.write_bytes(data)
    assert list(engine.generate(IDS, GREEDY)) == expected


def test_an_answer_from_short_and_failing_reads_is_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second read gives less than was asked for, and now and then one fails, once."""
    expected = list(engine.generate(IDS, GREEDY))
    retries = engine.store.counts.retries
    flaky = Flaky(short=range(0, 10**9, 2), failing=range(1, 10**9, 50), short_bytes=4096)
    monkeypatch.setattr(os, "preadv", flaky)
    assert list(engine.generate(IDS, GREEDY)) == expected
    assert flaky.calls > 50
    assert engine.store.counts.retries > retries


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_is_told_and_the_next_one_is_served(tiny_copy: Path, stream: bool) -> None:
    files = {path: path.read_bytes() for path in (tiny_copy / "experts").iterdir()}
    with serve(tiny_copy) as served, httpx.Client(base_url=served.url, timeout=60) as client:
        form = {"model": "demo", "prompt": "the", "max_tokens": 4, "temperature": 0}
        for path in files:
            os.truncate(path, 0)
        answer = client.post("/v1/completions", json={**form, "stream": stream})
        assert answer.status_code == (200 if stream else 500), "a stream has begun"
        assert "experts/layer_00.bin: layer 0 expert" in answer.text
        assert "failed twice: the file ends after 0 of them" in answer.text
        assert '"finish_reason":"' not in answer.text, "what broke off is not an answer that ended"
        for path, data in files.items():
            path.write_bytes(data)
        again = client.post("/v1/completions", json=form)
        assert again.status_code == 200
        assert '"finish_reason":"' in again.text
