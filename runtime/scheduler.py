"""One thread owns the engine; requests wait for it in a bounded queue, every client in turn.

A few answers are written at the same time, a token of each in turn: nobody waits for another's long answer to end.
Where experts are read from the disk they take the steps together (generate.py), so that what all of them miss is read
at the same time; where all experts fit in memory that would only cost more calls, and each computes its own. Each has a
state of its own, and a token is computed as it would be alone, so who else is served changes no answer; a block that
cannot be read ends the answers that need it, and no other. A prompt is read in one go, the others wait meanwhile.

A client that sends fifty requests does not keep another one waiting for all of them: the queue goes round the clients
and takes the oldest request of each. What a request's tokens become is its own business: on_token runs in the engine's
thread, right after the token, and ends the answer by returning False, so where an answer ends depends on no timing.

    scheduler = Scheduler(engine, max_waiting=256)
    job = scheduler.submit(Job(prompt_ids, sampling, client="...", on_token=..., on_end=...))
    job.cancel()                                        # takes effect within a step, or a layer of the prefill

While nobody waits for an answer the thread can work ahead (do_when_idle), until the next job comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moepack.layout.errors import MoepackError
from moepack.runtime.generate import Constraint, Generation, step_together
from moepack.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from moepack.runtime.engine import Engine

ENDED = object()
IdleTask = Callable[[Callable[[float], None]], object]
PAUSE_SECONDS = 0.5  # without a job before work ahead begins: a client that asks on and on need not wait for its layer
logger = logging.getLogger("moepack.serve")


class QueueFull(MoepackError):
    """As many requests wait as are let in."""


class Cancelled(Exception):
    """Nobody waits for this answer any more."""


class OutOfTime(MoepackError):
    """The prompt alone took longer than a request may."""


@dataclass(eq=False)
class Job:
    """One answer to be made.

    on_token       called in the engine's thread with each token and the generation; False ends the answer
    on_end         called there once, with the generation (None if it never began) and the error, None if it went well;
                   a job that was cancelled ends with Cancelled
    client         requests of one client wait for each other, those of several are taken in turn
    max_seconds    the answer ends there, as if its tokens were used up
    prefilled      prompt tokens read so far
    generation     the answer, once it has begun
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    on_token: Callable[[int, Generation], bool]
    on_end: Callable[[Generation | None, Exception | None], object]
    client: str = ""
    constraint: Constraint | None = None
    max_seconds: float = 3600.0
    prefilled: float = 0.0
    generation: Generation | None = None
    created: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """End this job soon; nothing happens if it has ended."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


class Scheduler:
    """Runs jobs in a thread of its own. Close it when done.

    running    the jobs that are being answered, oldest first
    waiting    how many jobs wait
    """

    def __init__(self, engine: Engine, max_waiting: int = 256, max_running: int = 1):
        self.engine, self.max_waiting, self.max_running = engine, max_waiting, max_running
        self.running: tuple[Job, ...] = ()
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()  # by client, whose turn is next first
        self._changed = threading.Condition()
        self._is_closed = False
        self._idle_task: IdleTask | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(map(len, self._queues.values()))

    def submit(self, job: Job) -> Job:
        """Queue a job. Raises QueueFull with the numbers."""
        with self._changed:
            if self._is_closed:
                raise QueueFull("the server is shutting down")
            self._drop_cancelled()
            waiting = sum(map(len, self._queues.values()))
            if waiting >= self.max_waiting:
                raise QueueFull(f"{waiting} requests are waiting, at most {self.max_waiting} may: try again later")
            self._queues.setdefault(job.client, deque()).append(job)
            self._changed.notify()
        return job

    def count_ahead(self, job: Job) -> int:
        """How many jobs will run before this one, as things stand."""
        with self._changed:
            own = self._queues.get(job.client, deque())
            if job not in own:
                return 0
            place = own.index(job)
            others = [jobs for client, jobs in self._queues.items() if client != job.client]
            return place + sum(min(len(jobs), place + 1) for jobs in others) + len(self.running)

    def do_when_idle(self, task: IdleTask) -> None:
        """Work for the engine's thread while there is no job: of several that have not begun, the newest.

        task   called with a check to call now and then, which raises Cancelled once a job has come
        """
        with self._changed:
            self._idle_task = task
            self._changed.notify()

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._is_closed = True
            for job in [*(job for jobs in self._queues.values() for job in jobs), *self.running]:
                job.cancel()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        answers: list[Iterator[None]] = []
        while True:
            with self._changed:
                while not (answers or self._queues or self._is_closed):
                    if not self._changed.wait(PAUSE_SECONDS if self._idle_task else None):
                        break
                if not (answers or self._queues) and self._is_closed:
                    return
                while self._queues and len(answers) < self.max_running:
                    job = self._take()
                    self.running = (*self.running, job)
                    answers.append(self._answer(job))
            if not answers:
                self._work_ahead()
            elif not self.engine.store.has_room_for_all:
                step_together([job.generation for job in self.running if job.generation])
            answers = [answer for answer in answers if next(answer, ENDED) is not ENDED]

    def _work_ahead(self) -> None:
        task, self._idle_task = self._idle_task, None

        def check(_: float = 0.0) -> None:
            if self._queues or self._is_closed:
                raise Cancelled

        try:
            if task is not None:
                task(check)
        except Cancelled:
            pass
        except Exception:  # nobody waits for it, and whoever needs the same finds the same error
            logger.warning("what was to be done while idle failed", exc_info=True)

    def _take(self) -> Job:
        """The oldest job of the client whose turn it is; that client comes last then."""
        client, jobs = self._queues.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._queues[client] = jobs
        return job

    def _drop_cancelled(self) -> None:
        """Cancelled jobs hold no place that another could have."""
        for client, jobs in list(self._queues.items()):
            for job in [job for job in jobs if job.is_cancelled]:
                jobs.remove(job)
                self._end(job, None, Cancelled())
            if not jobs:
                del self._queues[client]

    @staticmethod
    def _end(job: Job, generation: Generation | None, error: Exception | None) -> None:
        try:
            job.on_end(generation, error)
        except Exception:  # one request's trouble: the engine's thread goes on with the others
            logger.exception("the end of an answer could not be told")

    def _answer(self, job: Job) -> Iterator[None]:
        """One job, a token at a time: pauses after each, with everything ready for the next."""
        error: Exception | None = None
        deadline = time.monotonic() + job.max_seconds

        def check(tokens: float = 0.0) -> None:
            job.prefilled += tokens
            if job.is_cancelled:
                raise Cancelled
            if tokens and time.monotonic() > deadline:
                raise OutOfTime(f"the prompt was not read within {job.max_seconds:g} s: shorten it")

        try:
            check()
            job.generation = self.engine.generate(job.prompt_ids, job.sampling, check, job.constraint)
            for token_id in job.generation:
                if not job.on_token(token_id, job.generation):
                    break
                check()
                if time.monotonic() > deadline:
                    break
                yield
        except (Cancelled, MoepackError) as caught:
            error = caught
        except Exception as caught:
            logger.exception("a generation failed")
            error = caught
        self.running = tuple(other for other in self.running if other is not job)
        if job.generation is not None:
            job.generation.close()  # a state of as many as the budget plans: not until the collector comes by
        self._end(job, job.generation, error)
