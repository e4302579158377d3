"""Questions that take a while: one at a time, in order, with progress; whoever goes away stops theirs.

Most are put to the model of a run, which is loaded on the first of them, by the one thread that computes, and kept
until another run asks.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from mnemoscope.atlas.packages import imported
from mnemoscope.errors import MnemoscopeError, QueryError
from mnemoscope.records import Progress

if TYPE_CHECKING:
    from mnemoscope.api.run import Run
    from mnemoscope.display import Report

MOST_WAITING = 16
KEPT = 8  # answers, the latest: an answer that was given is there again for its data, its files and a page opened anew
PATIENCE = 5.0  # seconds that the last question has to end
BEAT = 0.5  # seconds between two looks at whether the asker is still there


# An answer, made with a run whose model is there.
Compute: TypeAlias = "Callable[[Run, Report], Any]"


_STOPPED = "asking: the question was stopped; ask it again"


class Event(NamedTuple):
    """What an asker is told: `waiting` (how many are before, the one that is computed among them), `progress`, and last
    `answer` or `failure`."""

    kind: str
    value: Any


class _Stopped(BaseException):
    """The asker went away."""


@dataclass
class LiveQuestion:
    """One question: what to compute with a run whose model is there, and what was said of it so far.

    key      the same for the same question; None for one whose answer is not kept
    address  of the page on which it was asked
    model    whether the model is needed
    """

    run: Run
    compute: Compute
    key: Hashable = None
    address: str = ""
    model: bool = True
    stopped: threading.Event = field(default_factory=threading.Event)
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)

    def tell(self, progress: Progress) -> None:
        """Pass on how far it is; ends the work if nobody waits for it any more."""
        if self.stopped.is_set():
            raise _Stopped
        self.events.put(Event("progress", progress))

    def stop(self) -> None:
        """Nobody waits for the answer."""
        self.stopped.set()


class Answered(NamedTuple):
    """An answer that is kept, and the address of the page on which it was asked for."""

    run: Run
    address: str
    answer: Any


class Desk:
    """Where questions are put: answered one after another by one thread, which holds one model.

    source  where to load models from; None for where each run's came from
    """

    def __init__(self, source: str | None = None) -> None:
        self._source = source
        self._waiting: deque[LiveQuestion] = deque()
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._current: LiveQuestion | None = None
        self._loaded: Run | None = None
        self._weights = ""  # of the model that is loaded
        self._kept: OrderedDict[Hashable, Answered] = OrderedDict()

    def lacks(self, run: Run) -> str | None:
        """Why the model of a run cannot be asked, as far as that is known before it is loaded."""
        place = run.manifest.model.path
        if self._source is not None or place is None or Path(place).exists():
            return None
        return (
            f"it was read from {place}, which is not there any more; serve the run with --model and its place"
        )

    def ask(
        self, run: Run, compute: Compute, key: Hashable = None, address: str = "", *, model: bool = True
    ) -> LiveQuestion:
        """Put a question, which is answered at once where its answer is kept; `QueryError` if too many wait already."""
        question = LiveQuestion(run, compute, key, address, model)
        with self._changed:
            if key in self._kept:
                self._kept.move_to_end(key)
                question.events.put(Event("answer", self._kept[key].answer))
                return question
            self._leave_out_stopped()
            if len(self._waiting) >= MOST_WAITING:
                raise QueryError(f"asking: {MOST_WAITING} questions wait already; ask again later")
            self._waiting.append(question)
            if self._current or len(self._waiting) > 1:
                self._tell_place(len(self._waiting) - 1)
            self._changed.notify()
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="model", daemon=True)
                self._worker.start()
        return question

    def _leave_out_stopped(self) -> None:
        """Nobody waits for these: they take no place in the line."""
        for question in self._waiting:
            if question.stopped.is_set():
                question.events.put(Event("failure", _STOPPED))
        self._waiting = deque(question for question in self._waiting if not question.stopped.is_set())

    def _tell_place(self, first: int) -> None:
        """Tell those who wait, from the one at this place on, how many are before."""
        before = 0 if self._current is None else 1
        for place, question in enumerate(self._waiting):
            if place >= first:
                question.events.put(Event("waiting", place + before))

    def close(self) -> None:
        """Stop everything, and let go of the model."""
        with self._changed:
            self._closed = True
            for question in [*self._waiting, *([self._current] if self._current else ())]:
                question.stop()
            for question in self._waiting:  # whoever waits for the answer waits no more
                question.events.put(Event("failure", _STOPPED))
            self._waiting.clear()
            self._changed.notify()
        if self._worker:
            self._worker.join(timeout=PATIENCE)

    def _work(self) -> None:
        imported()
        while not self._closed:
            with self._changed:
                while not (self._waiting or self._closed):
                    self._changed.wait()
                self._current = None if self._closed else self._waiting.popleft()
                self._tell_place(0)
            if self._current:
                self._answer(self._current)
                self._current = None
        self._loaded = None

    def _answer(self, question: LiveQuestion) -> None:
        try:
            question.tell(Progress("loading the model" if question.model else "reading", 0, 0, ""))
            if question.key in self._kept:  # somebody asked the same just before
                question.events.put(Event("answer", self._kept[question.key].answer))
                return
            run = self._with_model(question.run) if question.model else question.run
            answer = question.compute(run, question.tell)
            self._keep(question, answer)
            question.events.put(Event("answer", answer))
        except _Stopped:
            question.events.put(Event("failure", _STOPPED))
        except MnemoscopeError as error:
            question.events.put(Event("failure", str(error)))
        except Exception as error:  # a defect: the desk goes on, and the asker is told
            question.events.put(Event("failure", f"this failed: {type(error).__name__}: {error}"))

    def recent(self, run: Run) -> list[Answered]:
        """The answers about a run that are kept, the latest first."""
        with self._changed:
            return [answered for answered in reversed(self._kept.values()) if answered.run is run]

    def _keep(self, question: LiveQuestion, answer: Any) -> None:
        if question.key is None:
            return
        with self._changed:
            self._kept[question.key] = Answered(question.run, question.address, answer)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    def _with_model(self, run: Run) -> Run:
        wanted = run.manifest.model.weights_sha256  # another's, where the run was built anew in its folder
        if self._loaded is not run or self._weights != wanted:
            if self._loaded is not None:
                self._loaded._model = None  # one model at a time
            self._loaded = None
            run._model = run.load_model(self._source)
            self._loaded, self._weights = run, wanted
        return run


async def told(question: LiveQuestion) -> AsyncIterator[Event | None]:
    """What is said of a question, up to its answer; None every now and then, to see whether the asker is there."""
    while True:
        try:
            event = await asyncio.to_thread(question.events.get, True, BEAT)
        except queue.Empty:
            yield None
            continue
        yield event
        if event.kind in ("answer", "failure"):
            return


async def awaited(question: LiveQuestion, gone: Callable[[], Awaitable[bool]]) -> Any:
    """Wait for the answer as long as the asker is there; `QueryError` with what failed."""
    try:
        async for event in told(question):
            if event is not None and event.kind == "answer":
                return event.value
            if event is not None and event.kind == "failure":
                raise QueryError(event.value)
            if await gone():
                break
    finally:
        question.stop()
    raise QueryError(_STOPPED)


def answered(question: LiveQuestion) -> Any:
    """Wait for the answer; `QueryError` with what failed."""
    while True:
        event = question.events.get()
        if event.kind == "answer":
            return event.value
        if event.kind == "failure":
            raise QueryError(event.value)
