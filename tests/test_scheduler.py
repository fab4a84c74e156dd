"""Answers written side by side: the same tokens as alone, nobody waits for another's end, every client has its turn."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moepack.runtime.engine import Engine
from moepack.runtime.generate import Generation
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.scheduler import Cancelled, Job, QueueFull, Scheduler
from moepack.runtime.state import SequenceState
from test_step_together import give_slots

PROMPTS = [[1, 2, 3], [7] * 40, [9, 8] * 50]


@pytest.fixture(scope="module", params=[24, 8], ids=["all experts fit", "experts make room"])
def engine(request: pytest.FixtureRequest, tiny_pack: Path) -> Iterator[Engine]:
    """With a slot for each expert, where a token of each comes in turn, and without, where steps are taken together."""
    with Engine.open(tiny_pack, sequences=3, max_context=512, threads=1) as opened:
        give_slots(opened, request.param)
        yield opened


class Answer:
    """A job whose tokens and end are noted in a journal shared by several."""

    def __init__(self, name: str, journal: list[str], prompt: list[int], tokens: int, client: str = ""):
        self.name, self.journal, self.tokens = name, journal, list[int]()
        self.ended = threading.Event()
        self.error: Exception | None = None
        sampling = SamplingParams(temperature=1, seed=3, max_tokens=tokens, ignore_eos=True)
        self.job = Job(prompt, sampling, self.take, self.end, client)

    def take(self, token_id: int, generation: Generation) -> bool:
        self.tokens.append(token_id)
        self.journal.append(self.name)
        return True

    def end(self, generation: Generation | None, error: Exception | None) -> None:
        self.error = error
        self.journal.append(f"{self.name} ends")
        self.ended.set()


def start_together(scheduler: Scheduler, answers: list[Answer]) -> None:
    """Submit all before the first one runs, so that what happens depends on no timing."""
    with scheduler._changed:  # the engine's thread waits for this lock
        for answer in answers:
            scheduler._queues.setdefault(answer.job.client, deque()).append(answer.job)
        scheduler._changed.notify()
    for answer in answers:
        assert answer.ended.wait(60)


def test_side_by_side_gives_the_tokens_and_counts_of_alone(engine: Engine) -> None:
    journal: list[str] = []
    answers = [Answer(str(n), journal, prompt, 12, client=str(n)) for n, prompt in enumerate(PROMPTS)]
    scheduler = Scheduler(engine, max_running=3)
    start_together(scheduler, answers)
    scheduler.close()
    assert journal[:6] == ["0", "1", "2", "0", "1", "2"]
    for answer, prompt in zip(answers, PROMPTS):
        alone = engine.generate(prompt, answer.job.sampling)
        assert answer.tokens == list(alone)
        together = answer.job.generation
        assert together is not None
        stats, expected = together.stats(), alone.stats()
        assert stats.expert_hits + stats.expert_misses == expected.expert_hits + expected.expert_misses


def test_a_short_answer_does_not_wait_for_a_long_one(engine: Engine) -> None:
    journal: list[str] = []
    answers = [Answer("long", journal, PROMPTS[0], 60, "a"), Answer("short", journal, PROMPTS[1], 3, "b")]
    scheduler = Scheduler(engine, max_running=2)
    start_together(scheduler, answers)
    scheduler.close()
    assert journal.index("short ends") < journal.index("long ends")
    assert journal.count("long") == 60


def test_an_answer_that_ends_early_lets_its_state_go(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself: the budget has room for no more states than answers are written at the same time."""
    states, new_state = list[weakref.ref[SequenceState]](), engine.new_state

    def watched(max_positions: int) -> SequenceState:
        state = new_state(max_positions)
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(engine, "new_state", watched)
    monkeypatch.setattr(Answer, "take", lambda answer, token_id, generation: False)  # as at a stop string
    scheduler = Scheduler(engine, max_running=1)
    gc.disable()
    try:
        answers = [Answer(name, [], PROMPTS[0], 50) for name in "ab"]
        start_together(scheduler, answers)
    finally:
        gc.enable()
        scheduler.close()
    assert len(states) == 2
    assert not any(state() for state in states)
    assert all(answer.job.generation is not None and len(answer.job.generation.token_ids) == 1 for answer in answers)


def test_clients_take_turns(engine: Engine) -> None:
    journal: list[str] = []
    many = [Answer(f"a{n}", journal, PROMPTS[0], 2, "a") for n in range(3)]
    scheduler = Scheduler(engine, max_running=1)
    start_together(scheduler, [*many, Answer("b0", journal, PROMPTS[0], 2, "b")])
    scheduler.close()
    assert [entry for entry in journal if "ends" in entry] == ["a0 ends", "b0 ends", "a1 ends", "a2 ends"]


def test_idle_work_ends_when_a_job_comes(engine: Engine) -> None:
    scheduler, begun, ends = Scheduler(engine), threading.Event(), list[str]()

    def work(check: Callable[[float], None]) -> None:
        begun.set()
        try:
            while True:
                check(0.0)
        finally:
            ends.append("idle work")

    scheduler.do_when_idle(work)
    assert begun.wait(60)
    start_together(scheduler, [Answer("a", ends, PROMPTS[0], 2)])
    assert ends == ["idle work", "a", "a", "a ends"]
    begun.clear()
    scheduler.do_when_idle(lambda check: 1 / 0)
    scheduler.do_when_idle(work)
    assert begun.wait(60), "a task that fails is logged, and no more"
    scheduler.close()
    assert ends[4:] == ["idle work"]


def test_closing_cancels_what_runs_and_what_waits(engine: Engine) -> None:
    journal: list[str] = []
    answers = [Answer(str(n), journal, PROMPTS[0], 400) for n in range(3)]
    scheduler = Scheduler(engine, max_running=2)
    for answer in answers:
        scheduler.submit(answer.job)
    scheduler.close()
    for answer in answers:
        assert answer.ended.is_set()
        assert isinstance(answer.error, Cancelled)
    with pytest.raises(QueueFull):
        scheduler.submit(answers[0].job)


def test_a_full_queue_says_how_full(engine: Engine) -> None:
    scheduler = Scheduler(engine, max_waiting=1)
    answers = [Answer(str(n), [], PROMPTS[0], 400) for n in range(8)]

    def submit_all() -> None:
        for answer in answers:
            scheduler.submit(answer.job)

    with pytest.raises(QueueFull, match="1 requests are waiting, at most 1 may"):
        submit_all()
    scheduler.close()


def test_memory_is_planned_for_all_of_them(tiny_pack: Path) -> None:
    one, three = (Engine.open(tiny_pack, max_context=512, sequences=n).memory_plan.state_bytes for n in (1, 3))
    assert three == 3 * one
