"""How good a pack's answers are: perplexity on a text, distance to a reference pack, tool calls that come out right.

Every mean comes with its interval: intervals.py.

Text is scored in windows of 2048 tokens that do not overlap (a rest shorter than a window is left out if there is a
whole one, and said); the first token of a window is given, the others are predicted. Tool prompts are answered
greedily, with thinking off, and every call is compared with the expected one after typing by the schema. With a
reference the same prompts are put to both, and what counts is the share of the reference's own rate, in pairs.

    evaluate_text(engine, token_ids, reference=None)
    evaluate_tools(engine, prompts, reference=None)
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moepack.layout.errors import MoepackError, UsageError
from moepack.runtime.answer import parse_tool_calls
from moepack.runtime.engine import Engine
from moepack.runtime.generate import Constraint
from moepack.runtime.intervals import Interval, bootstrap, compare_rates, share_interval
from moepack.runtime.prompt import read_text
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.tokenizer import Tokenizer

WINDOW = 2048
MAX_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class TextScores:
    """nll is the mean over scored tokens, in nats; what compares is None without a reference.

    intervals   (low, high) of perplexity, kl_mean and top1_agreement; empty for a single window
    """

    tokens: int
    skipped_tokens: int
    nll: float
    perplexity: float
    kl_mean: float | None
    kl_median: float | None
    kl_p99: float | None
    top1_agreement: float | None
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class ToolPrompt:
    """A conversation with tools and the calls (name, arguments) that answer it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    expected: list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class ToolScores:
    """Shares of n prompts whose answer is well-formed, calls the right functions, and is right in every argument.

    identical             share of answers that are the reference's token for token; None without one
    reference_correct     share of the reference's own answers that are right; None without one
    correct_of_reference  correct as a share of that; None without a reference, or if it has none right
    intervals             (low, high) of each share; of correct_of_reference over the prompts in pairs, if there are two
    is_correct            of each prompt in turn, so that runs on the same prompts can be paired later
    """

    n: int
    well_formed: float
    right_function: float
    correct: float
    identical: float | None
    reference_correct: float | None
    correct_of_reference: float | None
    intervals: dict[str, Interval]
    is_correct: list[bool]


def evaluate_text(
    engine: Engine,
    token_ids: Sequence[int],
    reference: Engine | None = None,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> TextScores:
    """Score a text, and compare the distribution of every position with a reference engine's.

    Raises UsageError if there are fewer than two tokens or the reference is another model.
    """
    check_reference(engine, reference)
    windows, skipped = split_windows(token_ids, min(WINDOW, engine.max_context))
    sums, divergences = [], []  # of each window: scored tokens, nll, KL, agreements
    for window in windows:
        nll, agreements, in_window = 0.0, 0, []
        for targets, scores, reference_scores in _scored_pieces(engine, reference, window):
            log_p = _log_softmax(scores, engine)
            nll -= log_p.gather(1, targets[:, None]).double().sum().item()
            if reference_scores is not None:
                log_r = _log_softmax(reference_scores, reference)
                in_window.append((log_r.exp() * (log_r - log_p)).sum(-1).double())
                agreements += int((scores.argmax(-1) == reference_scores.argmax(-1)).sum())
            on_tokens(len(targets))
        divergences += in_window
        sums.append((len(window) - 1, nll, sum(float(part.sum()) for part in in_window), agreements))
    table = np.array(sums)  # [windows, 4]
    scored, nll, kl_sum, agreed = table.sum(0)
    kl = torch.cat(divergences) if divergences else None
    found = {"perplexity": bootstrap(table, lambda total: np.exp(total[..., 1] / total[..., 0]))}
    if kl is not None:
        found["kl_mean"] = bootstrap(table, lambda total: total[..., 2] / total[..., 0])
        found["top1_agreement"] = bootstrap(table, lambda total: total[..., 3] / total[..., 0])
    return TextScores(
        tokens=int(scored),
        skipped_tokens=skipped,
        nll=nll / scored,
        perplexity=math.exp(nll / scored),
        kl_mean=None if kl is None else kl_sum / scored,
        kl_median=None if kl is None else kl.median().item(),
        kl_p99=None if kl is None else np.quantile(kl.numpy(), 0.99).item(),
        top1_agreement=None if kl is None else agreed / scored,
        intervals={name: interval for name, interval in found.items() if interval},
    )


def check_reference(engine: Engine, reference: Engine | None) -> None:
    """Raise UsageError if the reference is another model."""
    if reference and reference.architecture.vocab_size != engine.architecture.vocab_size:
        raise UsageError(
            f"--reference: vocabulary of {reference.architecture.vocab_size}, expected "
            f"{engine.architecture.vocab_size}: a pack of the same model is needed"
        )


def encode_text(tokenizer: Tokenizer, text: str, where: str | Path = "text") -> Sequence[int]:
    """Token ids of a long text, four bytes each: a list of Python's integers would burst a small budget.

    where   the text's name in the UsageError for one of fewer than two tokens, which no window can be made of
    """
    ids = array("I")
    for piece in tokenizer.encode_pieces(text):
        ids.extend(piece)
    if len(ids) < 2:
        raise UsageError(f"{where}: {len(ids)} tokens, expected at least two: give more text")
    return ids


def split_windows(token_ids: Sequence[int], size: int) -> tuple[list[Sequence[int]], int]:
    """Windows of `size` tokens and the number of tokens left out. Raises UsageError below two tokens."""
    if len(token_ids) < 2 or size < 2:
        raise UsageError(f"{len(token_ids)} tokens in windows of {size}: expected at least two of both")
    whole = len(token_ids) // size
    if not whole:
        return [list(token_ids)], 0
    return [list(token_ids[size * index : size * (index + 1)]) for index in range(whole)], len(token_ids) - size * whole


def _scored_pieces(
    engine: Engine, reference: Engine | None, window: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(targets, scores, reference scores) of the positions of a window that have a next token, piece by piece."""
    targets = torch.tensor(window[1:])
    references = reference.iter_logits(window) if reference else iter(lambda: None, 0)
    done = 0
    for scores, reference_scores in zip(engine.iter_logits(window), references):
        wanted = targets[done : done + len(scores)]
        done += len(scores)
        if len(wanted):
            kept = None if reference_scores is None else reference_scores[: len(wanted)].cpu()
            yield wanted, scores[: len(wanted)].cpu(), kept


def _log_softmax(scores: torch.Tensor, engine: Engine | None) -> torch.Tensor:
    check_scores(scores, engine)
    return scores.log_softmax(-1)


def check_scores(scores: torch.Tensor, engine: Engine | None) -> None:
    """Raise MoepackError for scores that are not finite, of which any token could be called the likeliest."""
    if not scores.isfinite().all():
        place = engine.pack.directory if engine else "the model"
        raise MoepackError(f"{place}: scores are not finite: run moe-inspect verify on the pack")


def read_tool_prompts(path: Path) -> list[ToolPrompt]:
    """Prompts with expected calls, one JSON object a line: messages, tools, expected_calls. Raises UsageError."""
    lines = read_text(path).splitlines()
    prompts = [
        _parse_prompt(line, f"{path}: line {number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not prompts:
        raise UsageError(f"{path}: holds no prompts")
    return prompts


def evaluate_tools(
    engine: Engine,
    prompts: Sequence[ToolPrompt],
    on_prompt: Callable[[int], object] = lambda count: None,
    is_constrained: bool = False,
    reference: Engine | None = None,
) -> ToolScores:
    """Answer tool prompts greedily and compare the calls, and the answers with the reference's own.

    is_constrained   hold answers to well-formed calls, and to calling at all where a call is expected

    Raises UsageError if the pack has no chat template, a prompt does not fit the context, or the reference is another
    model.
    """
    check_reference(engine, reference)
    verdicts, reference_verdicts, identical = [], [], []
    hold = _make_constraints(engine) if is_constrained else lambda prompt: None
    for prompt in prompts:
        answer = answer_prompt(engine, prompt, hold(prompt))
        verdicts.append(judge_answer(engine, prompt, answer))
        if reference is not None:
            other = answer_prompt(reference, prompt, hold(prompt))
            reference_verdicts.append(judge_answer(reference, prompt, other))
            identical.append(other == answer)
        on_prompt(1)
    well_formed, right_function, correct = map(list, zip(*verdicts))
    columns = {"well_formed": well_formed, "right_function": right_function, "correct": correct}
    reference_correct = [verdict[2] for verdict in reference_verdicts]
    if reference is not None:
        columns |= {"identical": identical, "reference_correct": reference_correct}
    shares: dict[str, Any] = {name: sum(column) / len(prompts) for name, column in columns.items()}
    intervals = {name: share_interval(sum(column), len(prompts)) for name, column in columns.items()}
    compared = compare_rates(correct, reference_correct) if reference is not None else None
    if compared:
        shares["correct_of_reference"], interval = compared
        intervals |= {"correct_of_reference": interval} if interval else {}
    missing = {"identical": None, "reference_correct": None, "correct_of_reference": None}
    return ToolScores(n=len(prompts), **{**missing, **shares}, intervals=intervals, is_correct=correct)


def judge_answer(engine: Engine, prompt: ToolPrompt, answer: Sequence[int]) -> tuple[bool, bool, bool]:
    """Whether an answer is well-formed, calls the right functions, and is right in every argument."""
    rest, calls = parse_tool_calls(engine.tokenizer.decode(answer), prompt.tools)
    expected = prompt.expected
    is_whole = "<tool_call>" not in rest and bool(calls or not expected)
    right_function = is_whole and [call.name for call in calls] == [name for name, _ in expected]
    correct = is_whole and [(call.name, call.arguments) for call in calls] == expected
    return is_whole, right_function, correct


def answer_prompt(engine: Engine, prompt: ToolPrompt, constraint: Constraint | None = None) -> list[int]:
    """The greedy answer's tokens, thinking off. Raises UsageError as evaluate_tools does."""
    sampling = SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS)
    return list(engine.generate(render_prompt(engine, prompt), sampling, constraint=constraint))


def render_prompt(engine: Engine, prompt: ToolPrompt) -> list[int]:
    """What an answer follows, thinking off. Raises UsageError if the pack has no chat template."""
    template = engine.chat_template()
    if template is None:
        raise UsageError(f"{engine.pack.directory}: has no chat template, tool prompts need one")
    return engine.tokenizer.encode(template.render(prompt.messages, tools=prompt.tools, enable_thinking=False))


def _make_constraints(engine: Engine) -> Callable[[ToolPrompt], Constraint]:
    """What makes the constraint of a prompt. Raises UsageError without the library for it."""
    try:
        from moepack.runtime.constrain import AnswerConstraint, Grammars
    except ModuleNotFoundError as error:
        raise UsageError(f"--constrained: {error.name} is not installed: pip install 'moepack[serve]'") from None
    grammars = Grammars(engine.tokenizer, engine.architecture.vocab_size)

    def hold(prompt: ToolPrompt) -> Constraint:
        return AnswerConstraint(grammars, False, prompt.tools, "required" if prompt.expected else "auto")

    return hold


def _parse_prompt(line: str, where: str) -> ToolPrompt:
    try:
        prompt = json.loads(line)
        functions = [call["function"] for call in prompt["expected_calls"]]
        expected = [(function["name"], _as_object(function["arguments"])) for function in functions]
        messages, tools = prompt["messages"], prompt["tools"]
        for entries in (messages, tools):
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise TypeError("messages and tools are lists of objects")
        if not messages:
            raise ValueError("messages is empty")
        for function in (*functions, *(tool.get("function", tool) for tool in tools)):
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise TypeError("every tool and every call has a function with a name")
        return ToolPrompt(messages, tools, expected)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{where}: expected an object with messages, tools, expected_calls: {error!r}") from None


def _as_object(arguments: str | dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object; OpenAI's form has them as JSON text."""
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        raise TypeError("arguments are an object")
    return value
