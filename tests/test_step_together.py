"""Steps that several answers take together: each gets the tokens that it gets alone, whatever the others are and do."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fake_cuda
from conftest import budget_of
from moepack.layout.errors import DamagedPack
from moepack.runtime.constrain import AnswerConstraint, Grammars
from moepack.runtime.engine import Engine
from moepack.runtime.expert_store import ExpertStore
from moepack.runtime.generate import Generation, step_together
from moepack.runtime.sampling import SamplingParams

PROMPTS = [[1, 2, 3], [7] * 40, [9, 8] * 30, [200]]
SAMPLINGS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=1, seed=5, max_tokens=14, ignore_eos=True, top_logprobs=2),
    SamplingParams(temperature=0.7, seed=6, max_tokens=3, ignore_eos=True, presence_penalty=1),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}


def give_slots(engine: Engine, slots: int) -> None:
    """Another store for an engine, of a size that no budget would give it."""
    engine.store.close()
    engine.store = engine.model.store = ExpertStore(engine.pack, slots, verify_reads=True)
    for layer in engine.model.layers:
        layer.experts.store = engine.store


@pytest.fixture
def open_engine(tiny_pack: Path) -> Iterator[Callable[..., Engine]]:
    opened: list[Engine] = []

    def make(pack: Path = tiny_pack, slots: int | None = None, **options: Any) -> Engine:
        engine = Engine.open(pack, **{"sequences": 4, "max_context": 128, "threads": 1, **options})
        opened.append(engine)
        if slots is not None:
            give_slots(engine, slots)
        return engine

    yield make
    for engine in opened:
        engine.close()


def take(generation: Generation) -> DamagedPack | bool:
    """Whether it has a next token, or what ended it."""
    try:
        return next(generation, None) is not None
    except DamagedPack as error:
        return error


def run_together(generations: Sequence[Generation], most: int = 100) -> dict[int, DamagedPack]:
    """Take steps together until all have ended or `most` have been taken; the errors by place."""
    running, errors = dict(enumerate(generations)), dict[int, DamagedPack]()
    for _ in range(most):
        step_together(list(running.values()))
        outcomes = {place: take(generation) for place, generation in running.items()}
        errors |= {place: found for place, found in outcomes.items() if isinstance(found, DamagedPack)}
        running = {place: running[place] for place, found in outcomes.items() if found is True}
    return errors


def start_all(engine: Engine) -> list[Generation]:
    return [engine.generate(prompt, sampling) for prompt, sampling in zip(PROMPTS, SAMPLINGS)]


@pytest.mark.parametrize("slots", [2, 8, 24])
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"prefetch": True}, {"device": "reference"}])
def test_together_is_as_alone(open_engine: Callable[..., Engine], options: dict[str, Any], slots: int) -> None:
    """With less slots than experts are chosen, with those of one token, with all; greedy and by chance."""
    engine = open_engine(slots=slots, **options)
    calls: list[int] = []
    together, alone = start_all(engine), start_all(engine)
    engine.store.on_fetch = lambda layer, expert_ids, in_order: calls.append(len(expert_ids))
    assert run_together(together) == {}
    assert max(calls) > 2, "some were fetched for several"
    for one, expected in zip(together, alone):
        assert one.token_ids == list(expected)
        assert one.logprobs == expected.logprobs
        assert one.finish_reason == expected.finish_reason
        stats, lone = one.stats(), expected.stats()
        assert stats.expert_hits + stats.expert_misses == lone.expert_hits + lone.expert_misses


def test_an_answer_held_to_a_form_and_one_that_is_given_up(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(slots=8)
    grammars = Grammars(engine.tokenizer, engine.architecture.vocab_size)

    def start() -> list[Generation]:
        held = AnswerConstraint(grammars, False, [TOOL], "required")
        return [*start_all(engine)[:3], engine.generate(PROMPTS[3], SAMPLINGS[3], constraint=held)]

    together, alone = start(), start()
    run_together(together, most=5)
    given_up = together.pop(1)
    run_together(together)
    tokens = [list(one) for one in alone]
    assert given_up.token_ids == tokens.pop(1)[:5]
    assert [one.token_ids for one in together] == tokens
    assert engine.tokenizer.decode(tokens[-1]).lstrip().startswith("<tool_call>")


def list_uses(engine: Engine, generation: Generation) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(layer, expert) that the prompt of an answer reads, and that its further tokens do."""
    uses = set[tuple[int, int]](), set[tuple[int, int]]()

    def note(layer: int, expert_ids: Sequence[int], in_order: bool) -> None:
        uses[bool(generation.token_ids)].update((layer, expert_id) for expert_id in expert_ids)

    engine.store.on_fetch = note
    assert list(generation)
    engine.store.on_fetch = None
    return uses


def test_a_block_that_cannot_be_read_ends_those_who_need_it(
    open_engine: Callable[..., Engine], tiny_copy: Path
) -> None:
    """Each ends as it would alone: with its error, at its token; who does not need the block goes on."""
    engine = open_engine(tiny_copy, slots=8)

    def start() -> list[Generation]:
        return [engine.generate([first], replace(SAMPLINGS[0], max_tokens=4)) for first in (3, 50, 120, 200)]

    uses = [list_uses(engine, generation) for generation in start()]
    wanted = [prompt | decode for prompt, decode in uses]
    late = [decode - prompt for prompt, decode in uses]
    layer, expert = next(key for key in sorted(set().union(*late)) if sum(key in some for some in wanted) < len(wanted))
    with open(engine.pack.directory / engine.pack.manifest.expert_files[layer].file, "r+b") as file:
        file.seek(engine.pack.geometry(layer).offsets[expert])
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    together, alone = start(), start()
    errors = run_together(together)
    assert errors.keys() == {place for place, some in enumerate(wanted) if (layer, expert) in some}
    for place, (one, lone) in enumerate(zip(together, alone)):
        error = run_together([lone]).get(0)
        assert (one.token_ids, str(errors.get(place))) == (lone.token_ids, str(error))
        assert error is None or (error.layer, error.expert) == (layer, expert)


def test_a_defect_ends_the_answers_of_its_step_alone(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    together, later = start_all(engine), start_all(engine)[0]
    for generation in together:
        next(generation)
    monkeypatch.setattr(engine.model.layers[2].experts, "add_tokens", None)
    step_together(together)
    for generation in together:
        with pytest.raises(TypeError):
            next(generation)
    assert list(later), "a token alone does not go that way"


def test_an_answer_that_has_ended_keeps_no_state(open_engine: Callable[..., Engine]) -> None:
    """The budget holds the states of so many answers as are written at the same time, and no others."""
    engine = open_engine(slots=8)
    generations = start_all(engine)
    states = []
    for generation in generations:
        next(generation)
        states += [weakref.ref(tensor) for layer in generation._state.tensors for tensor in layer]
    assert run_together(generations) == {}
    assert [state() for state in states if state() is not None] == []


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("device", "slots", "prefetch"),
    [("metal-emulated", 12, False), ("metal-emulated", 24, True), ("cuda", 12, True), ("cuda", 24, False)],
)
def test_together_is_as_alone_on_a_gpu(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, device: str, slots: int, prefetch: bool
) -> None:
    """With few slots, where each layer's experts make room for the next one's, and with all; answers end one by one."""
    expected = open_engine(exact=True, max_context=64)
    if device == "cuda":
        fake_cuda.install(monkeypatch)
    engine = open_engine(**budget_of(expected, slots), device=device, exact=True, prefetch=prefetch)
    assert engine.store.num_slots == slots
    calls: list[int] = []
    engine.store.on_fetch = lambda layer, expert_ids, in_order: calls.append(0 if in_order else len(expert_ids))
    samplings = [replace(sampling, temperature=0, presence_penalty=0) for sampling in SAMPLINGS[:3]]
    together, alone = (
        [
            one.generate([first], replace(sampling, max_tokens=4 + place))
            for place, (first, sampling) in enumerate(zip((3, 50, 120), samplings))
        ]
        for one in (engine, expected)
    )
    assert run_together(together) == {}
    assert max(calls) > engine.architecture.num_experts_per_tok, "some were fetched for several"
    assert [one.token_ids for one in together] == [list(one) for one in alone]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")
def test_a_lane_of_a_gpu_whose_experts_cannot_be_read_leaves_the_others(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have run some of their experts by then, and run all of them once more."""
    expected = open_engine(exact=True, max_context=64)
    engine = open_engine(**budget_of(expected, 12), device="metal-emulated", exact=True, prefetch=False)
    together = [engine.generate([first], replace(SAMPLINGS[0], max_tokens=6)) for first in (3, 50)]
    alone = [expected.generate([first], replace(SAMPLINGS[0], max_tokens=6)) for first in (3, 50)]
    for generation in together:
        next(generation)
    moe = engine.model.layers[2].experts
    run, failed = moe._run, []

    def fail(chosen: dict[int, list[int]]) -> None:
        if chosen.keys() == {0}:
            failed.append(0)
            raise DamagedPack(engine.pack.directory, "a block is damaged")
        run(chosen)
        if len(chosen) == 2 and not failed:
            raise DamagedPack(engine.pack.directory, "a block is damaged")

    monkeypatch.setattr(moe, "_run", fail)
    step_together(together)
    monkeypatch.undo()
    assert failed
    with pytest.raises(DamagedPack):
        next(together[0])
    assert [together[1].token_ids[0], *together[1]] == list(alone[1])
