"""The decode loop: prefill the prompt, then one token at a time until an end token or a limit.

A Generation is an iterator of token ids that knows afterwards (and meanwhile) why it ended and what it cost. Only the
time spent in here is counted, not what the caller does between two tokens.

    generation = engine.generate(prompt_ids, sampling)
    for token_id in generation: ...
    generation.finish_reason, generation.stats()

Several answers can take their steps together, so that their experts are read at the same time; each token is what it
would be alone, and a read that fails ends the answers that need it.

    step_together([one, another])       # next(one) and next(another) then take their tokens from it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moepack.layout.errors import UsageError
from moepack.layout.process import peak_rss_bytes
from moepack.runtime.expert_store import StoreCounts
from moepack.runtime.sampling import Sampler, SamplingParams, TokenLogprobs, measure_logprobs
from moepack.runtime.state import SequenceState
from moepack.runtime.stats import GenerationStats

if TYPE_CHECKING:
    from moepack.runtime.engine import Engine

DEFAULT_MAX_TOKENS = 2048


class _Step(NamedTuple):
    """An answer's part of a step that it took with others: its hidden state [1, D] or why it has none, and its cost."""

    outcome: torch.Tensor | Exception
    seconds: float
    counts: StoreCounts


class Constraint(Protocol):
    """What may come next in one answer."""

    def list_allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next, bool [V]; None if all may."""

    def push(self, token_id: int) -> None:
        """Take note of the token that was chosen."""


class Generation(Iterator[int]):
    """One answer in the making.

    finish_reason   "stop" at an end token, "length" at max_tokens or the end of the context, None before
    token_ids       what has been generated so far, an end token included
    logprobs        of each of them, if the sampling asks for it
    cached_tokens   how many of the prompt's tokens a snapshot has spared; known with the first token
    """

    def __init__(
        self,
        engine: Engine,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        on_prefill: Callable[[float], object] = lambda tokens: None,
        constraint: Constraint | None = None,
    ):
        self.finish_reason: str | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self._constraint = constraint
        self.cached_tokens = 0
        self._engine, self._prompt_ids, self._sampling = engine, list(prompt_ids), sampling
        unknown = [token_id for token_id in sampling.logit_bias if token_id >= engine.architecture.vocab_size]
        if unknown:
            raise UsageError(
                f"logit_bias of token {unknown[0]}: outside the vocabulary of {engine.architecture.vocab_size}"
            )
        self._limit = answer_limit(len(self._prompt_ids), sampling.max_tokens, engine.max_context)
        self._stop_ids = frozenset() if sampling.ignore_eos else engine.tokenizer.stop_token_ids
        self._prefill_counts, self._decode_counts = StoreCounts(), StoreCounts()
        self._step_seconds: list[float] = []  # the first includes the prefill
        self._state: SequenceState | None = None  # from the first token to the last
        self._joint: _Step | None = None
        self._steps = self._run(on_prefill)

    def __next__(self) -> int:
        joint, started, before = self._joint, time.perf_counter(), self._engine.store.counts.copy()
        with torch.inference_mode():
            token_id = next(self._steps)
        seconds, spent = time.perf_counter() - started, self._engine.store.counts.since(before)
        if joint:
            seconds, spent = seconds + joint.seconds, spent + joint.counts
        if self._step_seconds:  # what others cost in between does not count
            self._decode_counts += spent
        else:
            self._prefill_counts = spent
        self._step_seconds.append(seconds)
        return token_id

    def close(self) -> None:
        """End it here: its state is let go at once. Its numbers stay."""
        self._steps.close()
        self._state = self._joint = None

    def stats(self) -> GenerationStats:
        """What the generation has cost so far."""
        engine, decode = self._engine, self._decode_counts
        total = self._prefill_counts + decode
        seconds, decoded = self._step_seconds, len(self.token_ids) - 1
        decode_s = sum(seconds[1:])
        return GenerationStats(
            prompt_tokens=len(self._prompt_ids),
            cached_tokens=self.cached_tokens,
            generated_tokens=len(self.token_ids),
            ttft_s=seconds[0] if seconds else None,
            prefill_tok_s=(len(self._prompt_ids) - self.cached_tokens) / seconds[0] if seconds else None,
            decode_tok_s=decoded / decode_s if decode_s else None,
            bytes_read=total.bytes_read,
            bytes_per_token=decode.bytes_read / decoded if decoded > 0 else None,
            expert_hits=total.hits,
            expert_misses=total.misses,
            io_wait_s=total.io_wait_s,
            compute_s=sum(seconds) - total.io_wait_s,
            peak_rss_bytes=peak_rss_bytes(),
            memory_budget_bytes=engine.memory_plan.budget_bytes,
            experts_per_token=engine.architecture.num_experts_per_tok,
            device=engine.device,
        )

    def _run(self, on_prefill: Callable[[float], object]) -> Generator[int, None, None]:
        engine = self._engine
        state = engine.new_state(len(self._prompt_ids) + self._limit - 1)  # the last token is not fed back
        sampler = Sampler(self._sampling, self._prompt_ids)
        last = self._prefill(state, on_prefill)
        self._state = state
        while True:
            scores = engine.model.logits(last)
            if sampler.takes_the_likeliest and self._constraint is None and self._sampling.top_logprobs is None:
                token_id = sampler.take(*engine.model.ops.argmax(scores))  # where the scores are: they are not copied
            else:
                logits = scores[0].cpu().numpy()
                token_id = sampler.next(logits, self._constraint.list_allowed() if self._constraint else None)
                if self._sampling.top_logprobs is not None:
                    self.logprobs.append(measure_logprobs(logits, token_id, self._sampling.top_logprobs))
            self.token_ids.append(token_id)
            if self._constraint:
                self._constraint.push(token_id)
            if token_id in self._stop_ids:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self._limit:
                self.finish_reason = "length"
            if self.finish_reason:
                self._state = None
            yield token_id
            if self.finish_reason:
                engine.snapshots.flush()
                return
            last = self._take_step(state)

    def _take_step(self, state: SequenceState) -> torch.Tensor:
        """The hidden state [1, D] behind the last token: now, unless it has been computed together with others'."""
        joint, self._joint = self._joint, None
        if joint is None:
            return self._engine.model(torch.tensor(self.token_ids[-1:]), state)
        if isinstance(joint.outcome, Exception):
            raise joint.outcome
        return joint.outcome

    def _prefill(self, state: SequenceState, on_prefill: Callable[[float], object]) -> torch.Tensor:
        """Run the prompt from the longest snapshot on, keeping snapshots of it; the last hidden state [1, D]."""
        prompt_ids, engine, snapshots = self._prompt_ids, self._engine, self._engine.snapshots
        position = self.cached_tokens = snapshots.restore(prompt_ids, state)
        if position:
            on_prefill(position)
        points = [point for point in snapshots.points(prompt_ids) if point > position]
        for hidden in engine.prefill(prompt_ids[position:], state, on_prefill, [point - position for point in points]):
            position += len(hidden)
            if position in points:
                snapshots.keep(prompt_ids[:position], state)
        return hidden[-1:].clone()  # a view would keep all of the chunk


def step_together(generations: Sequence[Generation]) -> None:
    """The next step of those that are past their prompt and not at their end, with the fetches of all in one.

    Each takes its token, or its error, with its next(). Does nothing for less than two, and where the backend has
    memory for one token only. Generations of one engine.
    """
    ready = [(one, one._state) for one in generations if one._state is not None and one._joint is None]
    if not ready:
        return
    engine = ready[0][0]._engine
    lanes = engine.model.lanes
    for first in range(0, len(ready), lanes):
        some = ready[first : first + lanes]
        if len(some) > 1:
            _step(engine, [one for one, _ in some], [state for _, state in some])


def _step(engine: Engine, generations: Sequence[Generation], states: Sequence[SequenceState]) -> None:
    started, before = time.perf_counter(), engine.store.counts.copy()
    outcomes: Sequence[torch.Tensor | Exception]
    try:
        with torch.inference_mode():
            outcomes = engine.model.step_together([one.token_ids[-1] for one in generations], states)
    except Exception as error:  # a defect of ours: the states are half a token on
        outcomes = [error] * len(generations)
    seconds, spent = time.perf_counter() - started, engine.store.counts.since(before)
    for place, (one, outcome) in enumerate(zip(generations, outcomes)):
        one._joint = _Step(outcome, seconds, spent.share(place, len(generations)))


def answer_limit(num_prompt_tokens: int, max_tokens: int | None, max_context: int) -> int:
    """Tokens that an answer may have: what was asked for, or a default, as far as the context goes; at least one."""
    wanted = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    return max(1, min(wanted, max_context - num_prompt_tokens))
