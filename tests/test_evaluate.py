"""Evaluation: every number against numpy on the whole distributions, the intervals, and answers compared by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_pack
from moepack.layout.errors import UsageError
from moepack.runtime import evaluate
from moepack.runtime.engine import Engine
from moepack.runtime.evaluate import evaluate_text, evaluate_tools, read_tool_prompts
from moepack.runtime.intervals import bootstrap, compare_rates, share_interval

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def engines(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """The tiny model at 2 and at 16 bits."""
    folder = tmp_path_factory.mktemp("evaluate")
    packs = (make_pack(tiny_source, folder / "poor", 2, 32, 16), make_pack(tiny_source, folder / "good", 16, 32, 16))
    with Engine.open(packs[0], exact=True, threads=1) as poor, Engine.open(packs[1], exact=True, threads=1) as good:
        yield poor, good


def test_scores_are_those_of_the_whole_distributions(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "WINDOW", 37)
    ids = np.random.default_rng(0).integers(0, 256, 37 * 3 + 5).tolist()
    poor, good = engines
    found = evaluate_text(poor, ids, good)
    kl, nll, equal = [], [], []
    for first in range(0, 37 * 3, 37):
        window = ids[first : first + 37]
        p, r = (engine.logits(window)[:-1].double().log_softmax(-1).numpy() for engine in (poor, good))
        kl += (np.exp(r) * (r - p)).sum(-1).tolist()
        nll += (-p[np.arange(36), window[1:]]).tolist()
        equal += (p.argmax(-1) == r.argmax(-1)).tolist()
    assert (found.tokens, found.skipped_tokens) == (108, 5)
    expected = {
        "nll": np.mean(nll), "perplexity": np.exp(np.mean(nll)), "kl_mean": np.mean(kl), "kl_median": np.sort(kl)[53],
        "kl_p99": np.quantile(kl, 0.99), "top1_agreement": np.mean(equal),
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name in ("perplexity", "kl_mean", "top1_agreement"):
        low, high = found.intervals[name]
        assert low <= getattr(found, name) <= high
    assert evaluate_text(poor, ids, good) == found


def test_without_a_reference_nothing_is_compared(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "WINDOW", 25)
    found = evaluate_text(engines[0], list(range(50)))
    assert (found.kl_mean, found.kl_median, found.kl_p99, found.top1_agreement) == (None,) * 4
    assert set(found.intervals) == {"perplexity"}


def test_a_single_window_says_nothing_of_others(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bootstrap of one draw would have no width, as if nothing were uncertain."""
    assert evaluate_text(engines[0], list(range(50)), engines[1]).intervals == {}
    assert bootstrap(np.ones((1, 1)), lambda total: total[..., 0]) is None
    assert compare_rates([1], [1]) == (1.0, None)
    monkeypatch.setattr(evaluate, "judge_answer", lambda *_: (True, True, True))
    prompt = evaluate.ToolPrompt([{"role": "user", "content": "fox"}], [], [])
    shares = evaluate_tools(engines[1], [prompt], reference=engines[1])
    assert (shares.correct_of_reference, "correct_of_reference" in shares.intervals) == (1, False)
    assert shares.intervals["identical"] == pytest.approx((0.2065, 1), abs=1e-4)


def test_another_model_is_no_reference(engines: tuple[Engine, Engine], demo_pack: Callable[[int], Path]) -> None:
    prompts = read_tool_prompts(DATA / "tools.jsonl")[:1]
    with Engine.open(demo_pack(4), threads=1) as other, pytest.raises(UsageError, match="of the same model is needed"):
        evaluate_tools(engines[0], prompts, reference=other)


def test_a_bootstrap_is_as_wide_as_the_spread_says() -> None:
    """Of a mean of 400 normal numbers: four standard errors between the ends, which is 0.2."""
    rows = np.random.default_rng(1).standard_normal((400, 1))
    low, high = bootstrap(rows, lambda total: total[..., 0] / 400)
    assert high - low == pytest.approx(0.196, rel=0.12)
    assert bootstrap(rows, lambda total: total[..., 0] / 400) == (low, high)
    assert bootstrap(np.ones((5, 1)), lambda total: total[..., 0] / 5) == (1.0, 1.0)


def test_a_share_has_an_interval_at_none_and_at_all() -> None:
    """Wilson's values, as statistical tables have them."""
    assert share_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert share_interval(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)
    assert share_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_rates_are_compared_in_pairs() -> None:
    """Who is right on the same prompts but for ten of a thousand differs by those alone, not by their spread."""
    rng = np.random.default_rng(2)
    reference = rng.random(1000) < 0.7
    own = reference.copy()
    own[np.flatnonzero(reference)[:10]] = False
    share, (low, high) = compare_rates(own.tolist(), reference.tolist())
    assert share == own.sum() / reference.sum()
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(10) / reference.sum(), rel=0.15)
    unpaired = compare_rates(rng.permutation(own).tolist(), reference.tolist())[1]
    assert unpaired[1] - unpaired[0] > 5 * (high - low)
    assert compare_rates([True, False], [False, False]) is None
    assert np.isfinite(compare_rates([True, False], [True, False])[1]).all()  # some draws have no right one
    with pytest.raises(ValueError, match="inhomogeneous"):
        compare_rates([True], [True, False])


def test_answers_are_compared_with_the_references(demo_pack, tmp_path: Path) -> None:
    lines = (DATA / "tools.jsonl").read_text().splitlines()[:4]
    (tmp_path / "tools.jsonl").write_text("\n".join(lines))
    prompts = read_tool_prompts(tmp_path / "tools.jsonl")
    with Engine.open(demo_pack(16), exact=True, threads=1) as good, Engine.open(demo_pack(2), threads=1) as poor:
        own, other = (evaluate_tools(engine, prompts, reference=good) for engine in (good, poor))
        assert own.identical == 1
        assert other.identical == np.mean(
            [evaluate.answer_prompt(poor, p) == evaluate.answer_prompt(good, p) for p in prompts]
        )
        assert own.correct_of_reference == 1
        assert own.intervals["correct_of_reference"] == (1, 1)
        assert other.reference_correct == own.correct == np.mean(own.is_correct)
        assert other.correct_of_reference == other.correct / own.correct
        shares = {"well_formed", "right_function", "correct", "identical"}
        assert set(own.intervals) == {*shares, "reference_correct", "correct_of_reference"}
        assert json.dumps(vars(own))
        alone = evaluate_tools(poor, prompts)
        assert (alone.correct, alone.is_correct) == (other.correct, other.is_correct)
        assert (alone.identical, alone.reference_correct, alone.correct_of_reference) == (None, None, None)
    assert own.n == 4


@pytest.mark.parametrize(("changed", "message"), [
    ({"messages": []}, "messages is empty"),
    ({"tools": [{"x": 1}]}, "every tool and every call has a function with a name"),
    ({"tools": [{"function": 5}]}, "every tool and every call has a function with a name"),
    ({"expected_calls": [{"function": {"name": 5, "arguments": {}}}]}, "every call has a function with a name"),
    ({"expected_calls": [{"function": {"name": "a", "arguments": "[1]"}}]}, "arguments are an object"),
])  # fmt: skip
def test_prompts_that_could_not_be_judged_are_refused_with_their_line(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    good = {"messages": [{"role": "user", "content": "fox"}], "tools": [{"name": "a"}], "expected_calls": []}
    (tmp_path / "tools.jsonl").write_text("\n".join(map(json.dumps, (good, {**good, **changed}))))
    with pytest.raises(UsageError, match=rf"tools.jsonl: line 2: expected an object with .*{message}"):
        read_tool_prompts(tmp_path / "tools.jsonl")
