"""Recall of long prompts: each holds what it asks for at the place it says, and scores are those of real answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from moepack.layout.errors import MoepackError, UsageError
from moepack.runtime import recall
from moepack.runtime.engine import Engine
from moepack.runtime.recall import RecallPlan, Scored, choose_lengths, evaluate_recall, summarize
from moepack.runtime.sampling import SamplingParams


@pytest.fixture(scope="module")
def demo(demo_pack: Callable[[int], Path]) -> Iterator[Engine]:
    with Engine.open(demo_pack(16), exact=True, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def poor(demo_pack: Callable[[int], Path]) -> Iterator[Engine]:
    with Engine.open(demo_pack(2), exact=True, threads=1) as engine:
        yield engine


@pytest.mark.parametrize("length", [64, 300, 2048])
def test_a_needle_stands_once_at_its_depth(demo: Engine, length: int) -> None:
    words, ask = recall.list_words(demo.tokenizer), recall.make_ask(demo)
    for depth in range(recall.DEPTHS):
        needle = recall.draw_needle(Random(depth), demo.tokenizer, words, ask, length, depth)
        assert length - 50 < len(needle.token_ids) + recall.ANSWER_TOKENS <= length
        text = demo.tokenizer.decode(needle.token_ids)
        before, found, after = text.partition(f" from {needle.word}.")
        assert found
        assert needle.word not in before + after
        if length == 2048:
            assert len(before) / len(text) == pytest.approx((depth + 0.5) / recall.DEPTHS, abs=0.05)
        name = after.rsplit("Where is ", 1)[1].split(" from?")[0]
        assert before.rsplit(". ", 1)[-1].split("user\n")[-1].startswith(f"{name} is a ")


@pytest.mark.parametrize("length", [64, 1000, 2048])
def test_a_passage_fits_twice_and_is_not_guessed(demo: Engine, length: int) -> None:
    words, ask = recall.list_words(demo.tokenizer), recall.make_ask(demo)
    copy = recall.draw_copy(Random(1), demo.tokenizer, words, ask, length)
    assert length - 3 < len(copy.token_ids) + len(copy.passage) <= length
    passage = demo.tokenizer.decode(copy.passage)
    assert f"Repeat after me: {passage}<" in demo.tokenizer.decode(copy.token_ids).replace("\n", "<")
    assert set(passage.split(" ")) <= set(words)


def test_a_needle_is_no_word_of_the_other_sentences(demo: Engine) -> None:
    """Who is asked about a Grace from Grace answers right by her name alone."""
    words, ask = [*map(str.lower, recall.NAMES + recall.DAYS), "where", "zebra"], recall.make_ask(demo)
    for seed in range(20):
        assert recall.draw_needle(Random(seed), demo.tokenizer, words, ask, 128, 0).word == "Zebra"


def test_scores_that_are_not_finite_are_no_copy(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "iter_logits", lambda token_ids, first: iter([torch.full((3, 7), torch.nan)]))
    with pytest.raises(MoepackError, match="scores are not finite: run moe-inspect verify"):
        recall.pick_tokens(demo, recall.Copy([1], [2, 3, 4]))


def test_the_same_seed_asks_the_same(demo: Engine) -> None:
    words, ask = recall.list_words(demo.tokenizer), recall.make_ask(demo)
    first, again, other = (
        recall.draw_needle(Random(seed), demo.tokenizer, words, ask, 200, 2) for seed in ("3", "3", "4")
    )
    assert first == again != other


def test_copied_tokens_are_those_that_generation_gives(demo: Engine) -> None:
    """As far as the copy is right, greedy generation after the first token is the copy; then it leaves it as told."""
    words, ask = recall.list_words(demo.tokenizer), recall.make_ask(demo)
    runs = []
    for seed in range(8):
        copy = recall.draw_copy(Random(seed), demo.tokenizer, words, ask, 64)
        picked = recall.pick_tokens(demo, copy)
        right = [*(picked == np.array(copy.passage[1:])), False].index(False)
        sampling = SamplingParams(temperature=0, max_tokens=right + 1)
        answer = list(demo.generate([*copy.token_ids, copy.passage[0]], sampling))
        assert answer == picked[: right + 1].tolist()
        runs.append(right)
    assert max(runs) >= 3


def test_scores_and_comparison(demo: Engine, poor: Engine) -> None:
    plan = RecallPlan(5, (64, 128), seed=1)
    done: list[int] = []
    own, other = evaluate_recall(demo, plan, demo, done.append), evaluate_recall(poor, plan, demo)
    assert sum(done) == 2 * 5 * (64 + 128)
    for kind in ("needle", "copy"):
        assert own[kind]["identical"] == own[kind]["correct_of_reference"] == 1
        assert own[kind]["correct"] == other[kind]["reference_correct"]
        assert [part["length"] for part in own[kind]["by_length"]] == [64, 128]
        assert [part["depth"] for part in own[kind]["by_depth"]] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
        halves = [part["correct"] for part in other[kind]["by_length"]]
        assert other[kind]["correct"] == pytest.approx(np.mean(halves))
    assert own["needle"]["correct"] >= 0.4
    assert 0.2 < own["copy"]["correct"] < 0.8
    assert other["copy"]["identical"] < 1
    assert json.loads(json.dumps(other)) is not None
    alone = evaluate_recall(poor, plan)
    assert alone["copy"]["correct"] == other["copy"]["correct"]
    assert not {"identical", "reference_correct", "correct_of_reference"} & set(alone["needle"])


def test_prompts_count_the_same_and_hang_together() -> None:
    """Five parts of a passage are one draw: two passages, one copied and one not, say nearly nothing."""
    scored = [Scored((64, number), depth, float(number), None, None) for number in (0, 1) for depth in range(5)]
    facts = summarize(scored, with_exact=True)
    assert (facts["correct"], facts["exact"]) == (0.5, 0.5)
    assert facts["intervals"]["correct"] == pytest.approx((0.0945, 0.9055), abs=1e-3)
    assert "correct" not in summarize([Scored((64, 0), 0, 0.5, None, None)])["intervals"]
    with_parts = summarize([Scored((64, n), 0, 0.25 * n, 1.0, 0.5) for n in range(4)], with_exact=True)
    assert (with_parts["correct"], with_parts["exact"], with_parts["correct_of_reference"]) == (0.375, 0, 0.375)


def test_a_model_without_a_template_continues_the_text(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(tiny_pack, threads=1) as engine:
        monkeypatch.setattr(engine, "chat_template", lambda: None)
        ask = recall.make_ask(engine)
        assert engine.tokenizer.decode(ask("Where is Tom from?", "Tom is from")).endswith("?\n\nTom is from")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a", "expected numbers of tokens"), ("", "expected numbers"), ("32", "64 to 2048"), ("64,4096", "64 to 2048")],
)
def test_lengths_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_lengths(text, 2048, 16384)


def test_a_template_that_fills_the_length_is_refused(demo: Engine) -> None:
    words = recall.list_words(demo.tokenizer)
    with pytest.raises(UsageError, match=r"--lengths 64: a question alone takes \d+ tokens with its answer"):
        recall.draw_needle(Random(0), demo.tokenizer, words, lambda request, begins: [0] * 60, 64, 0)


def test_lengths_double_up_to_the_context() -> None:
    assert choose_lengths(None, 2048, 16384) == (64, 128, 256, 512, 1024, 2048)
    assert choose_lengths(None, 262144, 300) == (64, 128, 256)
    assert choose_lengths("512,64,512", 2048, 16384) == (64, 512)
