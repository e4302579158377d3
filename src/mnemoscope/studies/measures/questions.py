"""The rank of an answer in every residual of the last token of its prompt (A66, A76).

The built-in set asks in which country a city is; a user's set is jsonl of `subject`, `prompt`, `answer` and `label`. Of
an answer of several tokens the first is followed; one without a leading space is tried with one, too, and what the
model finds more probable is taken (`prediction/questions.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mnemoscope.errors import QueryError
from mnemoscope.files import from_json, json_lines, read_text
from mnemoscope.model.capture import residuals
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.running import observed
from mnemoscope.prediction.questions import Logits, ResolvedQuestion, ask
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import arrow_table
from mnemoscope.studies.measures.positions import Sizes, Work
from mnemoscope.studies.measures.reductions import ranks
from mnemoscope.studies.measures.tuned_lens import TunedLens

BUILT_IN = "city_in_country"
LENSES = ("own", "raw")
_FIELDS = ("subject", "prompt", "answer", "label")
_TOGETHER = 16  # prompts of one length in a pass


@dataclass(frozen=True)
class Question:
    """One line of a set."""

    set: str
    subject: str
    prompt: str
    answer: str
    label: str


@dataclass(frozen=True)
class Asked:
    """A question with the token that is followed, and the stream f32[point, width] at the last token of its prompt."""

    question: Question
    tokens: tuple[int, ...]
    token: int
    spaced: bool
    pieces: int
    stream: Tensor


def built_in() -> list[Question]:
    """The set of our own writing: cities of the whole world, labelled by continent."""
    text = (files("mnemoscope.studies.measures") / f"{BUILT_IN}.jsonl").read_text(encoding="utf-8")
    return [_question(BUILT_IN, number, line) for number, line in json_lines(text)]


def read(path: Path) -> list[Question]:
    """A user's set; `QueryError` with the number of the line that is no question."""
    try:
        content = read_text(path)
    except (OSError, ValueError) as error:
        raise QueryError(f"reading questions: {path} cannot be read ({error}); give a jsonl file") from error
    questions = [_question(path.stem, number, line) for number, line in json_lines(content)]
    if not questions:
        raise QueryError(f"reading questions: {path} has none; each line is {_example()}")
    return questions


def _example() -> str:
    return '{"subject": "Lyon", "prompt": "Lyon is in", "answer": " France", "label": "Europe"}'


def _question(name: str, number: int, line: str) -> Question:
    try:
        row: Any = from_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"prompt", "answer"} <= row.keys() <= {*_FIELDS}:
        raise QueryError(
            f"reading questions: line {number} of {name} is none; each line is like {_example()}"
        )
    texts = {field: row.get(field) or "" for field in _FIELDS}
    if not all(isinstance(text, str) for text in texts.values()) or not (texts["prompt"] and texts["answer"]):
        raise QueryError(
            f"reading questions: line {number} of {name} lacks a text for prompt or answer; it is like {_example()}"
        )
    return Question(name, **texts)


def measure(run: Run, model: Model, sizes: Sizes, work: Work) -> Mapping[str, list[pa.Table]]:
    """The table `question_ranks` for the built-in set and the sets in `sizes.questions`."""
    asked = ask_all(model, sizes, work.report)
    return {"question_ranks": [table(model, asked, sizes.seed, TunedLens.of(run, model))]}


def ask_all(model: Model, sizes: Sizes, report: Callable[[Progress], None]) -> list[Asked]:
    """The built-in set and the sets in `sizes.questions`, each question put to the model once."""
    asked = []
    questions = [*built_in(), *(question for path in sizes.questions for question in read(path))]
    streams = Streams(model)
    streams.read([_resolved(model, question, None).tokens for question in questions])
    for index, question in enumerate(questions):
        report(Progress("asking", index, len(questions), "questions"))
        asked.append(_ask(model, question, streams))
    report(Progress("asking", len(questions), len(questions), "questions"))
    return asked


def _ask(model: Model, question: Question, streams: Streams) -> Asked:
    lens = Lens.of(model.anatomy, "own")
    resolved = _resolved(model, question, lambda tokens: lens.logits(streams[tokens][-1:])[0])
    target, tokens = resolved.target, resolved.tokens
    assert target is not None
    spaced = target.read != question.answer
    return Asked(question, tokens, target.token, spaced, len(target.tokens), streams[tokens])


def _resolved(model: Model, question: Question, logits: Logits | None) -> ResolvedQuestion:
    """A question as tokens; without its answer where nothing says what the model finds more probable."""
    answer, logits = (None, _unasked) if logits is None else (question.answer, logits)
    try:
        return ask(model, question.prompt, answer, [], -1, logits)
    except QueryError as error:
        raise QueryError(f"{question.set}, {question.subject or question.prompt!r}: {error}") from error


def _unasked(tokens: tuple[int, ...]) -> Tensor:
    raise AssertionError("without a target nothing is asked of the model")


class Streams:
    """The residual stream at the last of some tokens, f32[2 layer + 1, width]: Lin0, then Lres and Lout of every layer
    (A30), computed in fp32."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._read: dict[tuple[int, ...], Tensor] = {}

    def __getitem__(self, tokens: tuple[int, ...]) -> Tensor:
        if tokens not in self._read:
            self.read([tokens])
        return self._read[tokens]

    def read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Read prompts, those of one length together."""
        for length in sorted({len(tokens) for tokens in prompts}):
            alike = [*dict.fromkeys(tokens for tokens in prompts if len(tokens) == length)]
            for first in range(0, len(alike), _TOGETHER):
                self._pass(alike[first : first + _TOGETHER])

    def _pass(self, prompts: Sequence[tuple[int, ...]]) -> None:
        model = self._model
        with model.running(), observed(model.hf, upcast=model.upcast, attention=None):
            points = residuals(model, torch.tensor(prompts))
        last = {name: value[:, :, -1].float() for name, value in points.items()}
        pairs = torch.stack([last["Lres"], last["Lout"]], dim=1).flatten(0, 1)
        streams = torch.cat([last["Lin"][:1], pairs]).transpose(0, 1).contiguous()
        self._read |= dict(zip(prompts, streams, strict=True))


def table(model: Model, asked: list[Asked], seed: int, tuned: TunedLens | None = None) -> pa.Table:
    """The rows of `question_ranks`; under the tuned lens, if there is one, those of the points that it is fitted to."""
    others = _others(asked, np.random.default_rng(seed))
    lenses = [Lens.of(model.anatomy, name) for name in LENSES]
    parts = []
    for index, (question, other) in enumerate(zip(asked, others, strict=True)):
        wanted = torch.tensor([question.token, max(other, 0)], device=question.stream.device)
        fixed = {"question": index, **_about(question)}
        for lens in lenses:
            points = torch.arange(len(question.stream))
            parts.append(
                _rows(fixed | {"lens": lens.name}, points, _read(lens, question.stream), wanted, other)
            )
        if tuned is not None:
            points = torch.cat(
                [torch.arange(1, len(question.stream), 2), torch.tensor([len(question.stream) - 1])]
            )
            parts.append(
                _rows(fixed | {"lens": "tuned"}, points, tuned.stream(question.stream), wanted, other)
            )
    columns = {name: np.concatenate([rows[name] for rows in parts]) for name in parts[0]}
    columns["null_rank"] = np.ma.array(columns["null_rank"], mask=columns["null_rank"] < 0)
    return arrow_table("question_ranks", columns)


def _about(asked: Asked) -> dict[str, Any]:
    return {
        **asdict(asked.question), "token": asked.token, "spaced": asked.spaced, "pieces": asked.pieces
    }  # fmt: skip


def _read(lens: Lens, stream: Tensor) -> Tensor:
    with torch.inference_mode():
        logits = lens.logits(stream)
        return lens.cap(logits) if lens.name == "raw" and lens.bands is None else logits


def _rows(
    fixed: dict[str, Any], points: Tensor, logits: Tensor, wanted: Tensor, other: int
) -> dict[str, np.ndarray]:
    """Columns of the table for some points of the stream, from their logits; `other` is -1 if there is no null."""
    with torch.inference_mode():
        place = ranks(logits, wanted.expand(len(logits), 2)).int().cpu().numpy()
        log_p = (logits[:, fixed["token"]].double() - logits.double().logsumexp(1)).float().cpu().numpy()
    count, point = len(log_p), points.cpu().numpy()
    return {
        **{name: np.full(count, value) for name, value in fixed.items()},
        "point": point,
        "layer": (point + 1) // 2 - 1,
        "part": np.where(point == 0, "embedding", np.where(point % 2 == 1, "attention", "ffn")),
        "rank": place[:, 0],
        "log_probability": log_p,
        "null_rank": place[:, 1] if other >= 0 else np.full(count, -1),
    }


def _others(asked: list[Asked], generator: np.random.Generator) -> list[int]:
    """The answer of another question of the set and label (of the set, where the label has but one); -1 if none."""
    tokens = []
    for question in asked:
        of_set = [
            other
            for other in asked
            if other.question.set == question.question.set and other.token != question.token
        ]
        of_label = [other.token for other in of_set if other.question.label == question.question.label]
        choice = of_label or [other.token for other in of_set]
        tokens.append(int(generator.choice(choice)) if choice else -1)
    return tokens
