"""Choose the next token from the logits.

The steps and their order are those of transformers and vLLM: repetition penalty, presence and frequency penalties,
bias, temperature, top-k, top-p, min-p, then one draw. Every quantity is float64 and every random number comes from one
generator seeded with `seed`, so the same seed and the same logits give the same tokens. The draw walks the kept tokens
from the likeliest down (equal ones by id), which the tests can follow by hand. Not here: what the grammar or the
tokenizer forbids; the caller says which tokens are allowed.

    sampler = Sampler(SamplingParams(temperature=0.7, top_k=20, seed=1), prompt_ids)
    token_id = sampler.next(logits)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepack.layout.errors import MoepackError, UsageError

GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
LARGEST_SCORE = 1e300  # what a penalty may raise a score to: beyond it lies infinity, which has no probability
MOST_LOGPROBS = 20
SMALLEST_WEIGHT = math.ulp(0.0)  # of a token that can be drawn at all


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Raises UsageError, naming the parameter, for a value outside its range.

    temperature          0 takes the likeliest token, always; 1 samples the model's distribution
    top_p                keep the likeliest tokens that together have this probability
    top_k                keep this many tokens and whatever ties with the last; 0 keeps all
    min_p                keep tokens at least this fraction as likely as the likeliest
    presence_penalty     subtracted from the score of every token already generated
    frequency_penalty    subtracted from the score of a token for each time that it was generated
    repetition_penalty   divides positive and multiplies negative scores of tokens in the prompt or generated
    logit_bias           added to the score of a token, by id
    seed                 of the random numbers
    top_logprobs         record log-probabilities: each token's and those of so many likeliest ones; None is off
    max_tokens           longest answer; None leaves it to the caller
    ignore_eos           go on after an end token
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    top_logprobs: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "a number >= 0", Real, lambda x: x >= 0)
        _check("top_p", self.top_p, "a number > 0 and <= 1", Real, lambda x: 0 < x <= 1)
        _check("top_k", self.top_k, "an integer >= 0 (0 is off)", Integral, lambda x: x >= 0)
        _check("min_p", self.min_p, "a number from 0 to 1", Real, lambda x: 0 <= x <= 1)
        _check("presence_penalty", self.presence_penalty, "a number from -2 to 2", Real, lambda x: -2 <= x <= 2)
        _check("frequency_penalty", self.frequency_penalty, "a number from -2 to 2", Real, lambda x: -2 <= x <= 2)
        _check("repetition_penalty", self.repetition_penalty, "a number > 0", Real, lambda x: x > 0)
        _check("seed", self.seed, "an integer >= 0 and < 2**64", Integral, lambda x: 0 <= x < 2**64)
        for token_id, bias in self.logit_bias.items():
            _check("a token id of logit_bias", token_id, "an integer >= 0", Integral, lambda x: x >= 0)
            _check(
                f"logit_bias of token {token_id}", bias, "a number from -100 to 100", Real, lambda x: -100 <= x <= 100
            )
        if self.top_logprobs is not None:
            most = MOST_LOGPROBS
            _check(
                "top_logprobs", self.top_logprobs, f"an integer from 0 to {most}", Integral, lambda x: 0 <= x <= most
            )
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, "an integer >= 1", Integral, lambda x: x >= 1)
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides: Any) -> SamplingParams:
        """The sampling that a generation_config.json asks for; do_sample false is temperature 0.

        overrides   fields that replace those of the file; None leaves the file's

        Raises UsageError for a value outside its range.
        """
        values = {key: config[key] for key in GENERATION_KEYS if config.get(key) is not None}
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        return cls(**values | {key: value for key, value in overrides.items() if value is not None})


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a chosen token and of the likeliest ones, as the model gives them: before temperature,
    penalties, bias and constraints."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one answer.

    State: the random generator, from which each sampled token takes one number; the ids seen in the prompt and the
    answer; how often each was generated. Nothing else, so an answer does not depend on what runs beside it.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]):
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(int(params.seed)))
        self._seen = set(prompt_ids)
        self._generated: Counter[int] = Counter()
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.intp, len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), np.float64, len(params.logit_bias))

    def next(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token id. logits float32 [V], left as they are; -inf forbids a token, as does False in allowed [V].

        Raises MoepackError if a logit is NaN or +inf, or all are -inf.
        """
        _check_largest(logits.max())
        scores = self._penalize(logits)
        if allowed is not None:
            held = np.full_like(scores, -np.inf)  # several times as fast as np.where for masks that allow few or most
            np.copyto(held, scores, where=allowed)
            scores = held
            if scores.max() == -np.inf:
                raise MoepackError("no token is both allowed here and possible to the model")
        if self.params.temperature == 0:
            token_id = int(scores.argmax())
        else:
            token_id = draw(scores, self.params, self._random.random())
        self._note(token_id)
        return token_id

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether next() returns the largest of the logits as they are, where every token is allowed."""
        p = self.params
        is_changed = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0 or p.logit_bias
        return p.temperature == 0 and not is_changed

    def take(self, token_id: int, largest: float) -> int:
        """What next() does where it takes the likeliest token, which is known already, and its logit."""
        _check_largest(largest)
        self._note(token_id)
        return token_id

    def _note(self, token_id: int) -> None:
        self._seen.add(token_id)
        self._generated[token_id] += 1

    def _penalize(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """Scores after penalties and bias, float64 [V]; the logits themselves where none is set."""
        penalty, presence = self.params.repetition_penalty, self.params.presence_penalty
        frequency = self.params.frequency_penalty
        if penalty == 1 and presence == frequency == 0 and not len(self._bias):
            return logits
        scores = logits.astype(np.float64)
        if penalty != 1:
            seen = np.fromiter(self._seen, np.intp, len(self._seen))
            values = scores[seen]
            with np.errstate(over="ignore"):
                values = np.where(values < 0, values * penalty, values / penalty)
            scores[seen] = np.minimum(values, LARGEST_SCORE)
        if presence != 0 or frequency != 0:
            generated = np.fromiter(self._generated.keys(), np.intp, len(self._generated))
            counts = np.fromiter(self._generated.values(), np.float64, len(self._generated))
            scores[generated] -= presence + frequency * counts
        scores[self._bias_ids] += self._bias
        return scores


def _check_largest(logit: float) -> None:
    if not math.isfinite(logit):  # the largest of numbers with a NaN is NaN
        raise MoepackError(f"the model's logits have no finite maximum ({logit}): run moe-inspect verify")


def measure_logprobs(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of a token and of the num_top likeliest ones (ties by id). logits float32 [V]."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= math.log(np.exp(scores).sum())
    likeliest = np.argpartition(-scores, num_top - 1)[:num_top] if num_top else np.empty(0, np.intp)
    likeliest = likeliest[np.lexsort((likeliest, -scores[likeliest]))]
    top = tuple((int(other), float(scores[other])) for other in likeliest)
    return TokenLogprobs(token_id, float(scores[token_id]), top)


def draw(scores: NDArray[Any], params: SamplingParams, random: float) -> int:
    """The token at a random number in [0, 1) of the cumulated probabilities of the kept tokens. scores [V]."""
    filtered = params.top_p < 1 or params.min_p > 0
    ids, mass, total = keep(scores, params, reach=1.0 if filtered else random)
    total = mass[-1] if filtered else total
    return int(ids[min(np.searchsorted(mass, random * total, side="right"), len(ids) - 1)])


def keep(scores: NDArray[Any], params: SamplingParams, reach: float = 1.0) -> tuple[Any, NDArray[np.float64], float]:
    """What temperature, top-k, top-p and min-p leave of scores [V].

    returns   ids [n] by descending score, then id; the cumulated weights [n] of them, the likeliest having
              weight 1; the weight of all tokens after top-k
    reach     the tail past this share of the total may be left out: sorting a quarter million tokens takes longer
              than all the rest, and those that cannot be drawn need no order
    """
    ids = None
    if 0 < params.top_k < len(scores):
        last = np.partition(scores, len(scores) - params.top_k)[len(scores) - params.top_k]
        ids = np.flatnonzero(scores >= last)
        scores = scores[ids]
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to exp(-inf)
        weights = np.exp((scores.astype(np.float64) - float(scores.max())) / params.temperature)
    total = float(weights.sum())
    # All tokens below this together weigh less than half of what lies past the reach, so none of them is within it.
    floor = (1 - min(reach, params.top_p)) * total / (2 * len(weights))
    near = np.flatnonzero(weights >= max(floor, params.min_p, SMALLEST_WEIGHT))
    # By score, not by weight: two scores one rounding apart may have weights that are equal, or not.
    near = near[np.argsort(-scores[near], kind="stable")]
    mass = np.cumsum(weights[near])
    if params.top_p < 1:
        count = int(np.searchsorted(mass, params.top_p * total, side="left")) + 1
        near, mass = near[:count], mass[:count]
    return near if ids is None else ids[near], mass, total


def _check(name: str, value: Any, allowed: str, kind: Any, is_allowed: Callable[[Any], bool]) -> None:
    """Raise UsageError unless the value is a finite number of that kind and range."""
    try:
        finite = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        finite = False
    if not finite or not is_allowed(value):
        raise UsageError(f"{name} must be {allowed}, got {value!r}")
