"""What a model still knows of a long prompt: a fact among other sentences (needle), a passage to say again (copy).

Prompts are drawn from a seed and from the words of the model's own tokenizer, so that nothing in them can be known from
elsewhere, and have the wanted number of tokens, answer included. The needle stands at five depths in turn, and its
greedy answer is right if it has the word that was asked for. A passage is words at random. Its copy is scored as its
own continuation: what greedy decoding says next is looked up at every token of the right copy, in one prefill, so that
one wrong token costs one token. A copy with none wrong is the one that greedy generation gives after the first token.

Both are asked through the chat template, thinking off; without a template the text is continued instead. No more than
a test of this one ability: real questions about long texts are harder.

    evaluate_recall(engine, RecallPlan(prompts=20, lengths=(64, 1024)))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from moepack.layout.errors import UsageError
from moepack.runtime.engine import Engine
from moepack.runtime.evaluate import check_reference, check_scores
from moepack.runtime.intervals import Interval, bootstrap, compare_rates, share_interval
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.tokenizer import Tokenizer

DEPTHS = 5  # places of the needle, and parts of a passage
LEAST_LENGTH = 64  # tokens: room for a question and its answer
ANSWER_TOKENS = 24
LEAST_WORDS = 200  # that a tokenizer must have
WORD = re.compile(rb" [a-z]{4,}")  # with the blank before it one token: part of most texts
COPY = "Repeat after me: {}"
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Jack", "Kate", "Lucy", "Max", "Nora", "Tom",
)  # fmt: skip
JOBS = ("baker", "doctor", "teacher", "sailor", "farmer", "painter", "writer", "nurse")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
THINGS = ("lamp", "kite", "coin", "scarf", "drum", "bell", "box", "book", "stone", "lantern", "map", "ring")
ANIMALS = ("fox", "rabbit", "cat", "dog", "duck", "pony", "turtle", "goose", "hen", "horse", "deer", "goat")
WEATHERS = ("sunny", "rainy", "cold", "warm", "windy")
Ask = Callable[[str, str], list[int]]  # a request, how an answer begins where there is no template -> token ids


@dataclass(frozen=True)
class RecallPlan:
    """How many prompts of each length and kind, their lengths in tokens, the seed that they are drawn from."""

    prompts: int
    lengths: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True)
class Needle:
    """A prompt that asks for one word of it, and the depth of that word: 0 to DEPTHS - 1."""

    token_ids: list[int]
    word: str
    depth: int


@dataclass(frozen=True)
class Copy:
    """A prompt that asks for a passage to be said again, and the tokens of the passage."""

    token_ids: list[int]
    passage: list[int]


@dataclass(frozen=True)
class Scored:
    """What one prompt says of one depth.

    prompt              its length in tokens and its number: a passage has a score for each depth
    correct             1 for the right answer, or the share of these tokens that are right
    reference_correct   the reference's; None without one
    identical           1 for the reference's very answer, or the share of tokens that it picks too; None without one
    """

    prompt: tuple[int, int]
    depth: int
    correct: float
    reference_correct: float | None
    identical: float | None


def choose_lengths(text: str | None, context: int, planned: int) -> tuple[int, ...]:
    """Lengths as given with commas in between, or from the least one doubled up to what is planned for.

    context   of the model, in tokens
    planned   the longest one where the user does not say

    Raises UsageError for what is no number, or outside LEAST_LENGTH to the context.
    """
    try:
        lengths = () if text is None else tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError(f"--lengths {text}: expected numbers of tokens, as in 512,1024") from None
    lengths = lengths or tuple(LEAST_LENGTH << n for n in range(32) if LEAST_LENGTH << n <= min(context, planned))
    if not lengths or not LEAST_LENGTH <= lengths[0] <= lengths[-1] <= context:
        raise UsageError(f"--lengths {text or ''}: expected {LEAST_LENGTH} to {context} tokens, the model's context")
    return lengths


def evaluate_recall(
    engine: Engine,
    plan: RecallPlan,
    reference: Engine | None = None,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Put needles and passages of every length to a model, and to a reference.

    Returns plain numbers: of each kind `correct`, the share of answers (needle) or tokens (copy) that are right, with
    its interval, which parts of a single passage have not; of copies also `exact`, the share without a wrong token;
    beside a reference also `reference_correct`, `identical`, the share of answers or tokens that are the reference's,
    and `correct_of_reference`, in pairs. The same `by_length`, in tokens, and `by_depth`, from 0 at the beginning to 1
    at the end. Every prompt counts the same.

    Raises UsageError if the tokenizer has too few words, a prompt does not fit, or the reference is another model.
    """
    check_reference(engine, reference)
    check_plan(engine, plan)
    words, ask = list_words(engine.tokenizer), make_ask(engine)
    needles: list[Scored] = []
    copies: list[Scored] = []
    for length in plan.lengths:
        for number in range(plan.prompts):
            rng = Random(f"{plan.seed} {length} {number}")
            needle = draw_needle(rng, engine.tokenizer, words, ask, length, number % DEPTHS)
            needles.append(score_needle(engine, needle, (length, number), reference))
            on_tokens(length)
            copy = draw_copy(rng, engine.tokenizer, words, ask, length)
            copies += score_copy(engine, copy, (length, number), reference)
            on_tokens(length)
    return {
        "seed": plan.seed,
        "prompts_per_length": plan.prompts,
        "needle": summarize(needles),
        "copy": summarize(copies, with_exact=True),
    }


def check_plan(engine: Engine, plan: RecallPlan) -> None:
    """Raise UsageError if the tokenizer has too few words, or the shortest length has no room for a question."""
    words, ask = list_words(engine.tokenizer), make_ask(engine)
    draw_needle(Random(0), engine.tokenizer, words, ask, plan.lengths[0], 0)


def list_words(tokenizer: Tokenizer) -> list[str]:
    """Words of plain small letters that are one token with the blank before them. Raises UsageError if they are few."""
    tokens = (tokenizer.describe(token_id)[1] for token_id in range(tokenizer.vocab_size))
    words = [token.decode().strip() for token in tokens if WORD.fullmatch(token)]
    if len(words) < LEAST_WORDS:
        raise UsageError(f"--recall: the tokenizer has {len(words)} words of small letters, expected {LEAST_WORDS}")
    return words


def make_ask(engine: Engine) -> Ask:
    """What turns a request into token ids: through the chat template, or with the beginning of the answer after it."""
    template, encode = engine.chat_template(), engine.tokenizer.encode

    def ask(request: str, begins: str) -> list[int]:
        if template is None:
            return encode(f"{request}\n\n{begins}")
        return encode(template.render([{"role": "user", "content": request}], enable_thinking=False))

    return ask


def draw_needle(rng: Random, tokenizer: Tokenizer, words: Sequence[str], ask: Ask, length: int, depth: int) -> Needle:
    """A text about people in which one sentence says where somebody is from, in a word that is no place's name.

    Raises UsageError if the length has no room for the question and its answer.
    """
    names = rng.sample(NAMES, len(NAMES))
    word, others = rng.choice(words).title(), names[1:]
    while word in {*names, *DAYS, "Where"}:  # which stand elsewhere in the text, and in wrong answers
        word = rng.choice(words).title()
    fact, question = f"{names[0]} is a {rng.choice(JOBS)} from {word}.", f"Where is {names[0]} from?"
    sentences: list[str] = []
    begins = f"{names[0]} is from"
    room = length - ANSWER_TOKENS - len(ask(f"{fact}\n\n{question}", begins))
    if room < 0:
        raise UsageError(
            f"--lengths {length}: a question alone takes {length - room} tokens with its answer: give more"
        )
    while True:
        sentence = draw_sentence(rng, others)
        room -= len(tokenizer.encode(f" {sentence}"))
        if room < 0:
            break
        sentences.append(sentence)
    place = round((depth + 0.5) / DEPTHS * len(sentences))
    text = " ".join([*sentences[:place], fact, *sentences[place:]])
    return Needle(ask(f"{text}\n\n{question}", begins), word, depth)


def draw_sentence(rng: Random, names: Sequence[str]) -> str:
    """A sentence about one of the people that says nothing of where they are from."""
    name, other = rng.sample(names, 2)
    return rng.choice(
        (
            f"On {rng.choice(DAYS)} {name} bought a {rng.choice(THINGS)} for {other}.",
            f"{name} has a {rng.choice(ANIMALS)} that is {rng.randint(2, 12)} years old.",
            f"The weather was {rng.choice(WEATHERS)}.",
        )
    )


def draw_copy(rng: Random, tokenizer: Tokenizer, words: Sequence[str], ask: Ask, length: int) -> Copy:
    """As many words at random as fit twice."""
    chosen = [rng.choice(words)]
    room = length - len(ask(COPY.format(chosen[0]), "")) - len(tokenizer.encode(chosen[0]))
    while room >= 2 or len(chosen) < 2:
        chosen.append(rng.choice(words))
        room -= 2  # such a word is one token, in the request and in the copy
    passage = " ".join(chosen)
    return Copy(ask(COPY.format(passage), ""), tokenizer.encode(passage))


def score_needle(engine: Engine, needle: Needle, prompt: tuple[int, int], reference: Engine | None) -> Scored:
    """Answer greedily and look for the word."""
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    wanted = re.compile(rf"\b{needle.word}\b")
    answers = [list(one.generate(needle.token_ids, sampling)) for one in (engine, reference) if one]
    correct = [float(bool(wanted.search(engine.tokenizer.decode(answer)))) for answer in answers]
    compared = (correct[1], float(answers[0] == answers[1])) if reference else (None, None)
    return Scored(prompt, needle.depth, correct[0], *compared)


def score_copy(engine: Engine, copy: Copy, prompt: tuple[int, int], reference: Engine | None) -> list[Scored]:
    """Look up what greedy decoding says next at each token of the passage but the first: a score for each depth."""
    picked = pick_tokens(engine, copy)
    other = None if reference is None else pick_tokens(reference, copy)
    scores = []
    for depth, places in enumerate(np.array_split(np.arange(len(picked)), DEPTHS)):
        if not len(places):
            continue
        right, own = np.array(copy.passage[1:])[places], picked[places]
        compared = (None, None) if other is None else (_equal(other[places], right), _equal(own, other[places]))
        scores.append(Scored(prompt, depth, _equal(own, right), *compared))
    return scores


def pick_tokens(engine: Engine, copy: Copy) -> np.ndarray:
    """The likeliest token at each place of the passage but the first, after the right ones before it."""
    token_ids = [*copy.token_ids, *copy.passage[:-1]]
    picked = []
    for scores in engine.iter_logits(token_ids, first=len(copy.token_ids)):
        check_scores(scores, engine)
        picked.append(scores.argmax(-1).cpu().numpy())
    return np.concatenate(picked)


def _equal(some: np.ndarray, others: np.ndarray) -> float:
    return float((some == others).mean())


def summarize(scored: Sequence[Scored], with_exact: bool = False) -> dict[str, Any]:
    """Shares over all prompts, by length and by depth, as evaluate_recall returns them."""
    facts = _shares(scored, with_exact)
    lengths, depths = sorted({one.prompt[0] for one in scored}), sorted({one.depth for one in scored})
    facts["by_length"] = [
        {"length": length, **_shares([one for one in scored if one.prompt[0] == length], with_exact)}
        for length in lengths
    ]
    facts["by_depth"] = [
        {"depth": (depth + 0.5) / DEPTHS, **_shares([one for one in scored if one.depth == depth])} for depth in depths
    ]
    return facts


def _shares(scored: Sequence[Scored], with_exact: bool = False) -> dict[str, Any]:
    """Means over prompts, each the mean of its scores, with their intervals."""
    of_prompt: dict[tuple[int, int], list[Scored]] = {}
    for one in scored:
        of_prompt.setdefault(one.prompt, []).append(one)
    columns = {
        name: [float(np.mean([getattr(one, name) for one in some])) for some in of_prompt.values()]
        for name in ("correct", "reference_correct", "identical")
        if getattr(scored[0], name) is not None
    }
    compared = compare_rates(columns["correct"], columns["reference_correct"]) if len(columns) > 1 else None
    if with_exact:
        columns["exact"] = [float(value == 1) for value in columns["correct"]]
    facts: dict[str, Any] = {name: sum(column) / len(column) for name, column in columns.items()}
    intervals = {name: _interval(column) for name, column in columns.items()}
    if compared:
        facts["correct_of_reference"], intervals["correct_of_reference"] = compared
    facts["intervals"] = {name: interval for name, interval in intervals.items() if interval}
    return facts


def _interval(values: Sequence[float]) -> Interval | None:
    """Of the mean of what prompts score: all or nothing is a share, parts are drawn again, if there are two prompts."""
    if set(values) <= {0.0, 1.0}:
        return share_interval(sum(values), len(values))
    return bootstrap(np.array(values)[:, None], lambda total: total[..., 0] / len(values))
