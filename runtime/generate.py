"""The decode loop: prefill the prompt, then one token at a time until an end token or a limit.

A Generation is an iterator of token ids that knows afterwards (and meanwhile) why it ended and what it cost. Only the
time spent in here is counted, not what the caller does between two tokens.

    generation = engine.generate(prompt_ids, sampling)
    for token_id in generation: ...
    generation.finish_reason, generation.stats()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

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
        self._steps = self._run(on_prefill)

    def __next__(self) -> int:
        started, before = time.perf_counter(), self._engine.store.counts.copy()
        with torch.inference_mode():
            token_id = next(self._steps)
        spent = self._engine.store.counts.since(before)  # in here only: other answers may be written in between
        if self._step_seconds:
            self._decode_counts += spent
        else:
            self._prefill_counts = spent
        self._step_seconds.append(time.perf_counter() - started)
        return token_id

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

    def _run(self, on_prefill: Callable[[float], object]) -> Iterator[int]:
        engine = self._engine
        state = engine.new_state(len(self._prompt_ids) + self._limit - 1)  # the last token is not fed back
        sampler = Sampler(self._sampling, self._prompt_ids)
        last = self._prefill(state, on_prefill)
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
            yield token_id
            if self.finish_reason:
                engine.snapshots.flush()
                return
            last = engine.model(torch.tensor([token_id]), state)

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
        return hidden[-1:]


def answer_limit(num_prompt_tokens: int, max_tokens: int | None, max_context: int) -> int:
    """Tokens that an answer may have: what was asked for, or a default, as far as the context goes; at least one."""
    wanted = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    return max(1, min(wanted, max_context - num_prompt_tokens))
