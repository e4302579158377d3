"""Questions that take a while: one at a time, in order, with progress; whoever goes away stops theirs.

Most are put to the model of a run, which is loaded on the first of them, by the one thread that computes, and kept
until another run asks.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Hashable
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
    """What an asker is told: `waiting` (how many are before), `progress`, and last `answer` or `failure`."""

    kind: str
    value: Any


class _Stopped(BaseException):
    """The asker went away."""


@dataclass
class LiveQuestion:
    """One question: what to compute with a run whose model is there, and what was said of it so far.

    key    the same for the same question; None for one whose answer is not kept
    model  whether the model is needed
    """

    run: Run
    compute: Compute
    key: Hashable = None
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
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def lacks(self, run: Run) -> str | None:
        """Why the model of a run cannot be asked, as far as that is known before it is loaded."""
        place = run.manifest.model.path
        if self._source is not None or place is None or Path(place).exists():
            return None
        return (
            f"it was read from {place}, which is not there any more; serve the run with --model and its place"
        )

    def ask(self, run: Run, compute: Compute, key: Hashable = None, *, model: bool = True) -> LiveQuestion:
        """Put a question, which is answered at once where its answer is kept; `QueryError` if too many wait already."""
        question = LiveQuestion(run, compute, key, model)
        with self._changed:
            if key in self._kept:
                self._kept.move_to_end(key)
                question.events.put(Event("answer", self._kept[key]))
                return question
            if len(self._waiting) >= MOST_WAITING:
                raise QueryError(f"asking: {MOST_WAITING} questions wait already; ask again later")
            if self._waiting or self._worker:
                question.events.put(Event("waiting", len(self._waiting)))
            self._waiting.append(question)
            self._changed.notify()
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="model", daemon=True)
                self._worker.start()
        return question

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
            if self._current:
                self._answer(self._current)
                self._current = None
        self._loaded = None

    def _answer(self, question: LiveQuestion) -> None:
        try:
            question.tell(Progress("loading the model" if question.model else "reading", 0, 0, ""))
            run = self._with_model(question.run) if question.model else question.run
            answer = question.compute(run, question.tell)
            self._keep(question.key, answer)
            question.events.put(Event("answer", answer))
        except _Stopped:
            question.events.put(Event("failure", _STOPPED))
        except MnemoscopeError as error:
            question.events.put(Event("failure", str(error)))
        except Exception as error:  # a defect: the desk goes on, and the asker is told
            question.events.put(Event("failure", f"this failed: {type(error).__name__}: {error}"))

    def _keep(self, key: Hashable, answer: Any) -> None:
        if key is None:
            return
        with self._changed:
            self._kept[key] = answer
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    def _with_model(self, run: Run) -> Run:
        if self._loaded is not run:
            if self._loaded is not None:
                self._loaded._model = None  # one model at a time
            run._model = run.load_model(self._source)
            self._loaded = run
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


def answered(question: LiveQuestion) -> Any:
    """Wait for the answer; `QueryError` with what failed."""
    while True:
        event = question.events.get()
        if event.kind == "answer":
            return event.value
        if event.kind == "failure":
            raise QueryError(event.value)
