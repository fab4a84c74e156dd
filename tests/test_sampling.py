"""Sampling: ranges of the parameters, hand-computed cases, frequencies, and the kept tokens of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.layout.errors import MoepackError, UsageError
from moepack.runtime.sampling import Sampler, SamplingParams, draw, keep, measure_logprobs

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
INFINITY = math.inf
# Chi-square of 7 degrees of freedom passes this with probability 1e-6; the seed is fixed, so it fails or it does not.
CHI_SQUARE_LIMIT = 40.5


def floats(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


def log_of(*probabilities: float) -> Any:
    return floats(*(math.log(p) for p in probabilities))


def probabilities(logits: Any, **params: Any) -> dict[int, float]:
    """The tokens that can be drawn and how likely each is."""
    ids, mass, _ = keep(logits, SamplingParams(**params))
    return dict(zip(ids.tolist(), (np.diff(mass, prepend=0) / mass[-1]).tolist()))


# Parameters


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("temperature", [-0.1, math.nan, INFINITY, "1", True, None, 10**400], "a number >= 0"),
        ("top_p", [0, -1, 1.01, math.nan, "x"], "a number > 0 and <= 1"),
        ("top_k", [-1, 1.5, 20.0, True, INFINITY], "an integer >= 0 (0 is off)"),
        ("min_p", [-0.01, 1.01, math.nan], "a number from 0 to 1"),
        ("presence_penalty", [-2.1, 2.1, math.nan, None], "a number from -2 to 2"),
        ("frequency_penalty", [-2.1, 2.1, math.nan, None], "a number from -2 to 2"),
        ("top_logprobs", [-1, 21, 1.0, True], "an integer from 0 to 20"),
        ("repetition_penalty", [0, -1, math.nan, INFINITY], "a number > 0"),
        ("seed", [-1, 2**64, 0.5, None], "an integer >= 0 and < 2**64"),
        ("max_tokens", [0, -5, 1.5, "9"], "an integer >= 1"),
        ("ignore_eos", [1, None, "yes"], "true or false"),
    ],
)
def test_values_outside_the_range_are_named(name: str, bad: list[Any], allowed: str) -> None:
    for value in bad:
        with pytest.raises(UsageError) as caught:
            SamplingParams(**{name: value})
        assert str(caught.value) == f"{name} must be {allowed}, got {value!r}"


@pytest.mark.parametrize("bias", [{-1: 0}, {1.0: 0}, {0: 101}, {0: math.nan}, {0: "1"}, {0: True}])
def test_a_bias_outside_the_range_is_named(bias: dict[Any, Any]) -> None:
    with pytest.raises(UsageError, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    SamplingParams(frequency_penalty=2, logit_bias={0: -100, np.int64(7): 100.0}, top_logprobs=20)
    SamplingParams(temperature=0, top_p=1e-300, top_k=0, min_p=0, presence_penalty=-2, repetition_penalty=1e-300)
    SamplingParams(temperature=1e300, top_p=1, top_k=10**9, min_p=1, presence_penalty=2, seed=2**64 - 1, max_tokens=1)
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3))


def test_generation_config_and_overrides() -> None:
    config = json.loads((DEMO / "generation_config.json").read_text())
    assert SamplingParams.from_generation_config(config) == SamplingParams(temperature=0.7, top_p=0.8, top_k=20)
    assert SamplingParams.from_generation_config({}) == SamplingParams()
    changed = SamplingParams.from_generation_config(config, temperature=0, top_p=None, top_k=0, seed=7, max_tokens=5)
    assert changed == SamplingParams(temperature=0, top_p=0.8, seed=7, max_tokens=5)
    full = {"min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 1.5, "top_k": None, "eos_token_id": 3}
    assert SamplingParams.from_generation_config(full) == SamplingParams(
        min_p=0.1, repetition_penalty=1.2, presence_penalty=1.5
    )


def test_do_sample_false_is_greedy_unless_overridden() -> None:
    config = {"do_sample": False, "temperature": 0.6}
    assert SamplingParams.from_generation_config(config).temperature == 0
    assert SamplingParams.from_generation_config(config, temperature=0.8).temperature == 0.8


def test_a_bad_generation_config_is_named() -> None:
    with pytest.raises(UsageError, match="top_p must be a number > 0 and <= 1, got 3"):
        SamplingParams.from_generation_config({"top_p": 3})


# Hand-computed


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    sampler = Sampler(SamplingParams(temperature=0), [])
    assert [sampler.next(floats(1, 3, 2, 3)) for _ in range(3)] == [1, 1, 1]


def test_temperature() -> None:
    # halving the temperature squares the probabilities: 4, 9 and 1 parts become 16, 81 and 1
    found = probabilities(log_of(4, 9, 1), temperature=0.5)
    assert list(found) == [1, 0, 2]
    assert found == pytest.approx({1: 81 / 98, 0: 16 / 98, 2: 1 / 98})


def test_top_k_keeps_ties_with_the_last() -> None:
    assert list(probabilities(log_of(1, 4, 2, 2, 3), top_k=1)) == [1]
    assert list(probabilities(log_of(1, 4, 2, 2, 3), top_k=3)) == [1, 4, 2, 3]
    assert list(probabilities(log_of(1, 4, 2), top_k=50)) == [1, 2, 0]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = log_of(0.1, 0.5, 0.25, 0.15)
    assert list(probabilities(logits, top_p=1e-9)) == [1]
    assert list(probabilities(logits, top_p=0.49)) == [1]
    assert probabilities(logits, top_p=0.7) == pytest.approx({1: 2 / 3, 2: 1 / 3})
    assert list(probabilities(logits, top_p=0.76)) == [1, 2, 3]
    assert list(probabilities(logits, top_p=0.999)) == [1, 2, 3, 0]


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    # of all, 0.4 and 0.3 are 0.7; of the three of top-k they are 0.7 / 0.9 = 0.78
    assert list(probabilities(log_of(0.4, 0.3, 0.2, 0.1), top_p=0.75)) == [0, 1, 2]
    assert list(probabilities(log_of(0.4, 0.3, 0.2, 0.1), top_p=0.75, top_k=3)) == [0, 1]


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = log_of(0.5, 0.3, 0.15, 0.05)
    assert list(probabilities(logits, min_p=0.29)) == [0, 1, 2]
    assert list(probabilities(logits, min_p=0.31)) == [0, 1]
    assert list(probabilities(logits, min_p=1)) == [0]
    assert list(probabilities(floats(2, 2, 1), min_p=1)) == [0, 1]


def test_min_p_does_not_change_what_top_p_keeps() -> None:
    # top-p first: 0.5 and 0.3 reach 0.79. Had min-p come first, 0.5 alone would be 0.625 of the rest.
    assert list(probabilities(log_of(0.5, 0.3, 0.15, 0.05), top_p=0.79, min_p=0.1)) == [0, 1]
    assert list(probabilities(log_of(0.5, 0.3, 0.15, 0.05), top_p=0.79, min_p=0.61)) == [0]


def test_repetition_penalty_covers_prompt_and_answer() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2), [0, 0, 3])
    logits = floats(4, 3, 1, -1)
    assert sampler.next(logits) == 1  # 4/2 < 3
    assert sampler.next(logits) == 0  # 4/2 > 3/2
    assert sampler._penalize(logits).tolist() == [2, 1.5, 1, -2]


def test_frequency_penalty_grows_with_each_use() -> None:
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=1), [0, 0, 0])
    logits = floats(3, 1.5, 0)
    assert [sampler.next(logits) for _ in range(6)] == [0, 0, 1, 0, 1, 0]  # the last: 0 and 2 are equal, the first wins


def test_bias_is_added_after_the_penalties() -> None:
    params = SamplingParams(temperature=0, presence_penalty=1, logit_bias={1: 2.5, 2: -100})
    sampler = Sampler(params, [])
    assert [sampler.next(floats(1, 0, 50)) for _ in range(3)] == [1, 1, 1]
    assert Sampler(SamplingParams(logit_bias={2: 100}), []).next(floats(9, 9, 0, 9)) == 2


def test_only_allowed_tokens_are_chosen() -> None:
    logits, allowed = floats(5, 4, 3, 2), np.array([False, True, False, True])
    assert Sampler(SamplingParams(temperature=0), []).next(logits, allowed) == 1
    sampler = Sampler(SamplingParams(temperature=5, presence_penalty=1), [])
    assert {sampler.next(logits, allowed) for _ in range(60)} == {1, 3}
    assert logits.tolist() == [5, 4, 3, 2]
    with pytest.raises(MoepackError, match="no token is both allowed"):
        sampler.next(logits, np.zeros(4, bool))


def test_logprobs_are_the_models_own() -> None:
    logits = log_of(0.1, 0.4, 0.4, 0.05, 0.05)
    found = measure_logprobs(logits, 3, 3)
    assert found.token_id == 3
    assert found.logprob == pytest.approx(math.log(0.05), abs=1e-6)
    assert [token_id for token_id, _ in found.top] == [1, 2, 0]
    assert [value for _, value in found.top] == pytest.approx([math.log(p) for p in (0.4, 0.4, 0.1)], abs=1e-6)
    assert measure_logprobs(logits, 0, 0).top == ()
    banned = measure_logprobs(floats(0, -INFINITY), 1, 1)
    assert (banned.logprob, banned.top) == (-INFINITY, ((0, 0.0),))


def test_presence_penalty_covers_the_answer_only_and_once() -> None:
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=1.5), [0, 1, 2])
    logits = floats(1, 3, 4)
    assert [sampler.next(logits) for _ in range(4)] == [2, 1, 2, 2]
    assert sampler._penalize(logits).tolist() == [1, 1.5, 2.5]


def test_draw_walks_the_cumulated_probabilities() -> None:
    logits = log_of(0.125, 0.5, 0.25, 0.125)  # in order: 1, 2, then 0 before 3
    expected = [(0.0, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 0), (0.87, 0), (0.88, 3), (1 - 2**-53, 3)]
    for random, token_id in expected:
        assert draw(logits, SamplingParams(), random) == token_id
    assert draw(floats(0, 0), SamplingParams(), 0.5) == 1  # a border belongs to the next token


def test_masked_tokens_are_never_drawn() -> None:
    logits = floats(-INFINITY, 0, -INFINITY, 0)
    for params in (SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.9), SamplingParams(min_p=0.5)):
        assert {draw(logits, params, random) for random in (0.0, 0.3, 0.7, 1 - 2**-53)} == {1, 3}
        assert keep(logits, params)[0].tolist() == [1, 3]
    assert Sampler(SamplingParams(temperature=0, repetition_penalty=2), [0, 1]).next(floats(-INFINITY, -9)) == 1


def test_the_logits_are_left_as_they_are() -> None:
    logits = floats(1, 2, 3)
    Sampler(SamplingParams(presence_penalty=1, repetition_penalty=2, top_k=2), [0, 1]).next(logits)
    assert logits.tolist() == [1, 2, 3]


@pytest.mark.parametrize("bad", [[1, math.nan], [INFINITY, 1], [-INFINITY, -INFINITY]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(bad: list[float], temperature: float) -> None:
    with pytest.raises(MoepackError, match="no finite maximum"):
        Sampler(SamplingParams(temperature=temperature), []).next(floats(*bad))


def test_a_likeliest_token_found_elsewhere_is_taken_where_nothing_changes_the_scores() -> None:
    assert Sampler(SamplingParams(temperature=0, top_k=2), [0, 1]).takes_the_likeliest
    for changed in (
        {"temperature": 1},
        {"repetition_penalty": 2},
        {"presence_penalty": 1},
        {"frequency_penalty": -1},
        {"logit_bias": {1: 5}},
    ):
        assert not Sampler(SamplingParams(**{"temperature": 0, **changed}), [0, 1]).takes_the_likeliest
    sampler = Sampler(SamplingParams(temperature=0), [])
    assert sampler.take(2, 3.0) == sampler.next(floats(1, 2, 3))
    for bad in (math.nan, INFINITY, -INFINITY):
        with pytest.raises(MoepackError, match="no finite maximum"):
            sampler.take(0, bad)


def test_extreme_parameters_still_choose() -> None:
    logits = floats(1, 2, 3)
    for params in (
        SamplingParams(temperature=1e-320),
        SamplingParams(temperature=5e-324, top_p=1e-300),
        SamplingParams(temperature=1e-300, repetition_penalty=1e-320),
        SamplingParams(min_p=1, repetition_penalty=1e300),
    ):
        assert Sampler(params, [2]).next(logits) in (1, 2)


# Randomness


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = np.random.default_rng(0).standard_normal((200, 50)).astype(np.float32)

    def answer(seed: int, prompt: list[int]) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), prompt)
        return [sampler.next(row) for row in logits]

    assert answer(5, []) == answer(5, [1, 2])
    assert answer(5, []) != answer(6, [])


def test_the_generator_is_pcg64_with_one_number_per_token() -> None:
    numbers = np.random.Generator(np.random.PCG64(42))
    logits = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    sampler = Sampler(SamplingParams(seed=42, top_k=30), [])
    assert [sampler.next(logits) for _ in range(20)] == [
        draw(logits, sampler.params, numbers.random()) for _ in range(20)
    ]


@pytest.mark.parametrize("params", [{}, {"top_k": 8}, {"top_p": 0.999999}, {"min_p": 1e-6}, {"temperature": 0.7}])
def test_frequencies_are_the_probabilities(params: dict[str, Any]) -> None:
    logits = log_of(0.3, 0.02, 0.2, 0.05, 0.1, 0.13, 0.08, 0.12)
    sampler = Sampler(SamplingParams(seed=2024, **params), [])
    num_draws = 20_000
    counts = np.bincount([sampler.next(logits) for _ in range(num_draws)], minlength=8)
    weights = np.exp(logits.astype(np.float64) / params.get("temperature", 1.0))
    expected = num_draws * weights / weights.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < CHI_SQUARE_LIMIT


# Properties

logit_lists = st.lists(st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -INFINITY]), min_size=1, max_size=40)
some_params = st.builds(
    SamplingParams,
    temperature=st.floats(0.01, 5),
    top_p=st.floats(0.01, 1) | st.just(1.0),
    top_k=st.integers(0, 45),
    min_p=st.floats(0, 1) | st.just(0.0),
)


def by_definition(logits: Any, params: SamplingParams) -> tuple[list[int], list[float]]:
    """The kept tokens and their weights one rule after the other, in the words of the SamplingParams docstring."""
    # numpy's exp, as in keep(): math.exp may round the other way, and a threshold would then tell them apart.
    scaled = [(float(x) - float(max(logits))) / params.temperature for x in logits]
    weights = np.exp(np.array(scaled)).tolist()
    order = sorted((i for i, weight in enumerate(weights) if weight > 0), key=lambda i: (-logits[i], i))
    if 0 < params.top_k < len(logits):
        last = sorted(logits, reverse=True)[params.top_k - 1]
        order = [i for i in order if logits[i] >= last]
    if params.top_p < 1:
        mass = np.cumsum([weights[i] for i in order])
        order = [i for i, before in zip(order, [0, *mass]) if before < params.top_p * mass[-1] * (1 - 1e-12)]
    order = [i for i in order if weights[i] >= params.min_p]
    return order, [weights[i] for i in order]


@given(logit_lists.filter(lambda values: max(values) > -INFINITY), some_params, st.floats(0, 1, exclude_max=True))
def test_kept_tokens_and_draws_follow_the_definition(
    values: list[float], params: SamplingParams, random: float
) -> None:
    logits = floats(*values)
    ids, mass, _ = keep(logits, params)
    order, weights = by_definition(logits, params)
    if params.top_p < 1 and abs(len(order) - len(ids)) == 1:  # rounding decides whether top-p is reached
        assert ids.tolist()[: len(order)] == order[: len(ids)]
        return
    assert ids.tolist() == order
    assert mass == pytest.approx(np.cumsum(weights))
    # Leaving out what a number cannot reach must not change what it draws.
    target = np.cumsum(weights) / sum(weights)
    if min(abs(target - random)) > 1e-9:
        assert draw(logits, params, random) == order[int(np.searchsorted(target, random, side="right"))]


def test_a_large_vocabulary_is_sorted_only_where_it_matters() -> None:
    logits = (np.random.default_rng(3).standard_normal(50_000) * 4).astype(np.float32)
    params = SamplingParams()
    ids, mass, total = keep(logits, params)
    assert len(ids) == len(logits)
    assert mass[-1] == pytest.approx(total)
    for random in (0.0, 0.1, 0.5, 0.9, 0.999, 0.999999):
        few, _, _ = keep(logits, params, reach=random)
        assert len(few) < len(ids)
        assert draw(logits, params, random) == ids[np.searchsorted(mass, random * total, side="right")]


# Against transformers


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.95, "top_k": 40, "min_p": 0.1, "repetition_penalty": 0.8},
    ],
)
def test_probabilities_are_those_of_transformers(params: dict[str, Any], seed: int) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install moepack[parity]")
    import torch
    from transformers.generation import logits_process as theirs

    random = np.random.default_rng(seed)
    logits = (random.standard_normal(1000) * 3).astype(np.float32)
    logits[random.integers(0, 1000, 100)] = np.float32(2.5)  # ties
    prompt = random.integers(0, 1000, 50).tolist()
    steps = [
        theirs.RepetitionPenaltyLogitsProcessor(float(params.get("repetition_penalty", 1.0))),
        theirs.TemperatureLogitsWarper(params.get("temperature", 1.0)),
        theirs.TopKLogitsWarper(params.get("top_k", 1000)),
        theirs.TopPLogitsWarper(params.get("top_p", 1.0)),
        theirs.MinPLogitsWarper(params.get("min_p", 0.0)),
    ]
    scores = theirs.LogitsProcessorList(steps)(torch.tensor([prompt]), torch.from_numpy(logits)[None])
    expected = scores[0].double().softmax(-1).numpy()
    found = probabilities(Sampler(SamplingParams(**params), prompt)._penalize(logits), **params)
    assert set(found) == set(np.flatnonzero(expected).tolist())
    assert [found[i] for i in sorted(found)] == pytest.approx(expected[sorted(found)], rel=1e-4)
