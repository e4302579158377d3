"""The runs that are served, and what is read of them more than once.

Answers by key come from the run's own tables, which are sorted by it; what goes over a whole table is read once and
kept, for as long as the run is served.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
from markupsafe import Markup

from mnemoscope.annotation.local import LocalFile, beside
from mnemoscope.annotation.notes import Notes
from mnemoscope.annotation.sheet import fingerprint
from mnemoscope.atlas.index import indexed
from mnemoscope.atlas.packages import imported
from mnemoscope.atlas.scatter import Scatter, scatter
from mnemoscope.errors import MnemoscopeError, QueryError
from mnemoscope.location import stamp
from mnemoscope.neuron.card import layer_median, usual_signs
from mnemoscope.neuron.claims import ADDRESS, within
from mnemoscope.neuron.overview import Overview, overview
from mnemoscope.records import Progress
from mnemoscope.run.schemas import MANIFEST, SCHEMAS

if TYPE_CHECKING:
    from pathlib import Path

    from mnemoscope.api.run import Run
    from mnemoscope.display import Report
    from mnemoscope.neuron.card import NeuronCard
    from mnemoscope.neuron.find import Hits
    from mnemoscope.results import Highlights

PAGE = 50  # rows of a layer's table
TOKENS = 4  # that a row shows of what a neuron promotes
STATISTICS = ("kurtosis", "min", "max", "mean", "std", "skewness", "positive_fraction")
AXES = ("max", "kurtosis")  # of the picture of a layer
COMPLETIONS = 8
CLEAREST = 24  # tested patterns that the first page shows
HEAD_START = 2.0  # seconds that the first page has before anything is read for searches
PATIENCE = 5.0  # seconds that an index has to end
OPERATORS = {
    ">=": pl.Expr.ge, "<=": pl.Expr.le, ">": pl.Expr.gt, "<": pl.Expr.lt, "=": pl.Expr.eq,
}  # fmt: skip


@dataclass(frozen=True)
class LayerPage:
    """Some rows of a layer's table: those on one page of those that fit, of all that the layer has.

    rows     id, the statistics asked for, `promotes` (labels of what the value writes at its usual sign)
    picture  all that fit, by two statistics
    """

    rows: list[dict[str, Any]]
    fitting: int
    all: int
    picture: Scatter

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        rows = [{**row, "id": str(row["id"])} for row in self.rows]
        return {"fitting": self.fitting, "all": self.all, "rows": rows}


class Shelf:
    """One run, under the name that its addresses have, and what people wrote about it.

    annotations  folder of the file in which that is kept; None for the one that the run lies in
    """

    def __init__(self, name: str, run: Run, annotations: Path | None = None) -> None:
        self.name, self.run, self.stamp = name, run, stamp(run.place / MANIFEST)
        self.file = LocalFile(beside(run.place, annotations), fingerprint(run))
        self.notes = Notes(self.file, run)
        self.preparing: Progress | None = None  # how far the index is that is being made
        self._layer = lru_cache(maxsize=64)(self._read_layer)

    @property
    def changed(self) -> bool:
        """Whether the run was written anew, or had tables added, since it was put here."""
        with suppress(OSError):  # a run that is gone says so where it is read
            return stamp(self.run.place / MANIFEST) != self.stamp
        return False

    def prepare(self, report: Report) -> None:
        """Read what searches need: the triggers by place, made first where they are not kept yet."""

        def told(step: Progress) -> None:
            self.preparing = step
            report(step)

        try:
            indexed(self.run, told)
        finally:
            self.preparing = None
        words = self.run.vocabulary
        token = next(token for token in range(len(words)) if not words.special[token])
        for kind in ("promotes", "suppresses"):  # what chance gives is counted over all values, once
            self.find(kind, words.pieces([token])[0], 1)
        for layer in self.run.manifest.model.cells.layers:
            layer_median(self.run, layer)

    def counted(self) -> dict[Hashable, Any]:
        """What is counted once of a run for all its pages (`Run.once`), as far as it is."""
        layers = range(len(self.run.manifest.model.cells.sizes))
        names = [
            ("base rate", "promote", None),
            ("base rate", "suppress", None),
            ("signs", None),
            ("stored", None),
        ]
        return {
            name: value
            for name in (*names, *(("median", layer) for layer in layers))
            if (value := self.run.kept(name)) is not None
        }

    @property
    def overview(self) -> Overview:
        """Each layer at a glance."""
        return self.run.once("overview", lambda: overview(self.run))

    @property
    def pictures(self) -> Sequence[Markup]:
        """SVG of each layer."""
        from mnemoscope.views.charts import strips

        return self.run.once("pictures", lambda: [Markup(picture) for picture in strips(self.overview)])

    @property
    def highlights(self) -> Highlights:
        """A few neurons to look at first."""
        return self.run.once("highlights", lambda: self.run.highlights(8))

    @property
    def address(self) -> str:
        """An address as one is written in this run: of some neuron of a layer in the middle."""
        cells = self.run.manifest.model.cells
        layer = cells.layers[len(cells.layers) // 2]
        return str(cells.id(layer, cells.sizes[layer] // 4))

    statistics = tuple(  # the numeric columns of `neurons`, by which a layer can be sorted
        field.name
        for field in SCHEMAS["neurons"]
        if (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)) and field.name not in ADDRESS
    )

    @property
    def tested(self) -> bool:
        """Whether patterns were looked for."""
        return "pattern_tests" in self.run.manifest.tables

    @property
    def clearest(self) -> pl.DataFrame:
        """The clearest tested patterns, no pattern and no neuron twice: rows of `Run.find(tested=True)`."""
        return self.run.once("clearest", self._clearest)

    def _clearest(self) -> pl.DataFrame:
        rows = self.run.find(tested=True, count=50 * CLEAREST).rows
        for once in (["pattern", "about"], ["neuron"]):
            rows = rows.unique(once, keep="first", maintain_order=True)
        return rows.head(CLEAREST)

    def layer(
        self,
        layer: int,
        sort: str,
        *,
        descending: bool,
        conditions: Sequence[str],
        page: int,
        axes: tuple[str, str] = AXES,
    ) -> LayerPage:
        """One page of a layer, in the order of one statistic; undefined values last.

        conditions  each a statistic, one of > >= < <= =, and a number
        page        0-based
        axes        two statistics of the picture

        `QueryError` for a layer, statistic or condition that there is not.
        """
        for name in axes:
            self.check_statistic(name)
        fitting = self.fitting(layer, sort, descending=descending, conditions=conditions)
        rows = list(self._rows(layer, fitting.slice(page * PAGE, PAGE)))
        return LayerPage(
            rows, fitting.height, self.layer_frame(layer).height, scatter(fitting.sort("neuron"), *axes)
        )

    def fitting(self, layer: int, sort: str, *, descending: bool, conditions: Sequence[str]) -> pl.DataFrame:
        """The rows of `neurons` of a layer that meet all conditions, in the order of one statistic; as `layer`."""
        fitting = self.layer_frame(layer)
        self.check_statistic(sort)
        for condition in conditions:
            fitting = fitting.filter(self.condition(condition))
        return fitting.sort(sort, "neuron", descending=[descending, False], nulls_last=True)

    def layer_frame(self, layer: int) -> pl.DataFrame:
        """The rows of `neurons` of one layer; `QueryError` if there is none."""
        sizes = self.run.manifest.model.cells.sizes
        if not 0 <= layer < len(sizes):
            raise QueryError(f"opening layer {layer}: the run has layers 0 to {len(sizes) - 1}")
        return self._layer(layer)

    def _read_layer(self, layer: int) -> pl.DataFrame:
        return within(self.run, "neurons", layer).select(*ADDRESS, *self.statistics).collect()

    def check_statistic(self, name: str) -> None:
        """`QueryError` if the run's neurons have no statistic of that name."""
        if name not in self.statistics:
            known = ", ".join(self.statistics)
            raise QueryError(f"sorting neurons by {name!r}: unknown statistic; choose one of {known}")

    def condition(self, text: str) -> pl.Expr:
        """A condition on neurons: ``kurtosis>50``, ``max <= 3``; `QueryError` if it is none."""
        sign = next((sign for sign in OPERATORS if sign in text), None)
        if sign is not None:
            name, _, number = text.partition(sign)
            self.check_statistic(name.strip())
            try:
                return OPERATORS[sign](pl.col(name.strip()), float(number))
            except ValueError:
                pass
        raise QueryError(
            f"filtering neurons by {text!r}: give a statistic, one of {' '.join(OPERATORS)}, and a number, such as "
            "kurtosis>50"
        )

    def _rows(self, layer: int, frame: pl.DataFrame) -> Iterator[dict[str, Any]]:
        cells, words = self.run.manifest.model.cells, self.run.vocabulary
        writes = self._writes(layer, frame["neuron"].to_list())
        for row in frame.iter_rows(named=True):
            tokens = [words.label(token) for token in writes.get(row["neuron"], ())]
            yield row | {"id": cells.id(layer, row["neuron"]), "promotes": tokens}

    def _writes(self, layer: int, neurons: Sequence[int]) -> Mapping[int, list[int]]:
        """The first tokens that neurons promote at their usual sign (`neuron.card`)."""
        tokens = self.run.once(("writes", layer), lambda: self._read_writes(layer))
        return {neuron: [token for token in tokens[neuron].tolist() if token >= 0] for neuron in neurons}

    def _read_writes(self, layer: int) -> np.ndarray:
        """i32[neuron, token]: what neurons of a layer promote at their usual sign, strongest first; -1 for no more."""
        values = within(self.run, "values", layer).filter(pl.col("rank") < TOKENS)
        usual = usual_signs(self.run, layer).select("neuron", polarity=pl.col("usual").cast(pl.Int8))
        rows = values.join(usual, on=["neuron", "polarity"]).select("neuron", "rank", "token").collect()
        neurons, ranks, tokens = (column.to_numpy() for column in rows.get_columns())
        writes = np.full((self.run.manifest.model.cells.sizes[layer], TOKENS), -1, np.int32)
        writes[neurons, ranks] = tokens
        return writes

    def find(self, kind: str, text: str, count: int) -> Hits:
        """Neurons by one question of `Run.find`, or by their notes."""
        if kind == "note":
            return self._noted(text, count)
        return self.run.find(**{kind: text}, count=count)  # type: ignore[arg-type]

    def _noted(self, text: str, count: int) -> Hits:
        from mnemoscope.neuron.find import Hits

        notes = [note.to_dict() for note in self.notes.having(text)]
        if not notes:
            raise QueryError(f"searching notes for {text!r}: none has it")
        rows = pl.DataFrame(notes[:count]).select("neuron", "note", "saved")
        null = "Notes are your own words; the latest are first"
        return Hits(f"{len(notes):,} of your notes have {text!r}", null, rows, len(notes))

    def completions(self, text: str) -> list[str]:
        """Tokens of the vocabulary that begin so, spaces counted, the shortest first."""
        if not text:
            return []
        first = bisect_left(self._spelled, (text,))
        longer = []
        for spelling, token in self._spelled[first : first + 4096]:
            if not spelling.startswith(text):
                break
            longer.append((len(spelling), spelling, token))
        return [spelling for _, spelling, _ in sorted(longer)[:COMPLETIONS]]

    @property
    def _spelled(self) -> list[tuple[str, int]]:
        return self.run.once("spelled", self._spell)

    def _spell(self) -> list[tuple[str, int]]:
        words = self.run.vocabulary
        tokens = list(range(self.run.manifest.model.vocabulary))
        spelled = zip(words.pieces(tokens), tokens, strict=True)
        return sorted((piece, token) for piece, token in spelled if piece and piece.isprintable())


@dataclass(frozen=True)
class Twin:
    """The neuron of an address in another run of a model of the same shape.

    alike     whether the weights are the same
    common    triggers of either sign that it shares, of `stored`, and how many it would by chance: of as many positions
              drawn at random; None where the runs are not of one text
    """

    shelf: Shelf
    alike: bool
    min: float | None
    max: float | None
    kurtosis: float | None
    common: int | None
    stored: int
    expected: float | None


def twin(shelf: Shelf, other: Shelf, card: NeuronCard) -> Twin:
    """The neuron of a card of one run in another one of the same shape."""
    here, there = shelf.run, other.run
    one_text = here.manifest.corpus.sha256 == there.manifest.corpus.sha256
    one_text &= here.manifest.corpus.contexts == there.manifest.corpus.contexts
    row = {name: values[0] for name, values in there.columns("neurons", card.layer, card.neuron).items()}
    places = [_places(run, card) for run in (here, there)]
    counted = max(there.manifest.corpus.counted, 1)
    by_chance = sum(len(places[0][sign]) * len(places[1][sign]) / counted for sign in (1, -1))
    return Twin(
        other,
        here.manifest.model.weights_sha256 == there.manifest.model.weights_sha256,
        row["min"],
        row["max"],
        row["kurtosis"],
        sum(len(places[0][sign] & places[1][sign]) for sign in (1, -1)) if one_text else None,
        sum(map(len, places[0].values())),
        by_chance if one_text else None,
    )


def _places(run: Run, card: NeuronCard) -> dict[int, set[tuple[int, int]]]:
    """Where the triggers of a neuron are, by their sign."""
    columns = run.columns("triggers", card.layer, card.neuron)
    places: dict[int, set[tuple[int, int]]] = {1: set(), -1: set()}
    for sign, *place in zip(*(columns[name] for name in ("polarity", "context", "position")), strict=True):
        places[sign].add((place[0], place[1]))
    return places


class Library:
    """The runs of one server, each under the name of its folder; `annotations` as of a `Shelf`."""

    def __init__(self, runs: Sequence[Run], annotations: Path | None = None) -> None:
        self.shelves: dict[str, Shelf] = {}
        self.annotations = annotations
        self._lock = threading.Lock()
        for run in runs:
            name = self._name(run.place.resolve().name)
            self.shelves[name] = Shelf(name, run, annotations)

    def _name(self, folder: str) -> str:
        plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in folder) or "run"
        names = (plain, *(f"{plain}-{number}" for number in range(2, len(self.shelves) + 2)))
        return next(name for name in names if name not in self.shelves)

    def others(self, shelf: Shelf) -> list[Shelf]:
        """The other runs of models of the same shape, whose neurons have the same addresses."""

        def shape(of: Shelf) -> tuple[Any, ...]:
            model = of.run.manifest.model
            return model.family, model.cells.sizes, model.experts, model.units and model.units.sha256

        names = [
            name
            for name, other in self.shelves.items()
            if other is not shelf and shape(other) == shape(shelf)
        ]
        return [self[name] for name in names]

    def __getitem__(self, name: str) -> Shelf:
        if name not in self.shelves:
            raise QueryError(
                f"opening the run {name!r}: this server has none of that name; it has {', '.join(self.shelves)}"
            )
        with self._lock:
            if self.shelves[name].changed:
                run = self.shelves[name].run
                run.reopen()
                self.shelves[name] = Shelf(name, run, self.annotations)
            return self.shelves[name]


class _Ended(BaseException):
    """The server ends."""


@contextmanager
def preparing(library: Library, report: Report | None, then: Callable[[], None]) -> Iterator[None]:
    """While the block runs, a thread reads what searches need of each run, and does something `then`; what is not done
    at its end is given up."""
    ended = threading.Event()

    def told(step: Progress) -> None:
        if ended.is_set():
            raise _Ended
        if report:
            report(step)

    def prepare() -> None:
        if ended.wait(HEAD_START):
            return
        imported()
        for shelf in library.shelves.values():
            try:
                shelf.prepare(told)
            except _Ended:
                return
            except (
                OSError,
                MnemoscopeError,
                pa.ArrowException,
            ) as error:  # of a run that is gone, the pages say so
                told(
                    Progress(
                        "index of triggers", 0, 0, "", note=f"{shelf.run.path}: no index was made: {error}"
                    )
                )
        if not ended.is_set():
            then()

    thread = threading.Thread(target=prepare, name="index", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(PATIENCE)
