"""Find the patterns of every neuron of a run, test them both ways on held-out text, and add what was found to the run.

    search      triggers of the discovery half            -> candidates of each unit         (no model)
    confirm     triggers of the test half                 -> their p-values there            (no model)
    whole look  the model on text of the discovery half   -> candidates that triggers cannot certify
    first look  the model on text of the discovery half   -> the best candidate and its threshold, by F1
    second look the model on text of the test half        -> everything about that claim

Units are neurons of either polarity, and pseudo-neurons of the nulls that the run was built with: the same code does
the same to both. Work in progress lies in `.patterns` inside the run, and goes with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from scipy.sparse import hstack
from scipy.stats import false_discovery_control

from mnemoscope import files
from mnemoscope.arguments import check_budget
from mnemoscope.mine import loop
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.neuron.twoway import LEAST_DOCUMENTS, MARGIN, NULL_LEVEL, RESAMPLES, Rule
from mnemoscope.patterns.columns import spans
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.search import FOUND, Options, search
from mnemoscope.patterns.triggers import addressed
from mnemoscope.patterns.whole import Language, by_document
from mnemoscope.records import MAIN, NEURON, NEXT, POSITION, WHOLE, Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.run.text import Text
from mnemoscope.run.writing import add_tables
from mnemoscope.text.split import half, halves
from mnemoscope.trials.ground import Ground, Half, last_tokens, read_half
from mnemoscope.trials.heldout import beyond, confirm, numbered, together
from mnemoscope.trials.looks import Chosen, Claims, FirstLook, SecondLook, Tally, WholeLook
from mnemoscope.trials.outcomes import Outcomes, Tested, best, in_order, proposals, table, thresholds

WORK = ".patterns"
BUDGET = 65_536  # tokens of each half that the model reads
WHOLE_BUDGET = 32_768  # tokens, at most, on which candidates of the family `whole` are looked for
LEVEL = 0.05  # of p_family: units whose best pattern drawn sets equal more often are not tested further
TABLES = {"patterns", "pattern_tests", "calibration"}
FURTHER = (pl.col("p_family").first() <= LEVEL).over("unit", "tests")
TESTED = {MAIN: 10, NEXT: 2, POSITION: 1, WHOLE: 7}  # candidates of a unit that are counted in the first look
_RATES = ("test_p", "token_p", "q", "token_q")  # which are 1 where they were not asked for
CONFIRMED = {  # how `trials.heldout` calls columns, and how the table does
    "n_test": "test_triggers",
    "hits_test": "test_hits",
    "where_test": "test_where",
    "base_test": "test_base_rate",
    "p_test": "test_p",
}

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Settings:
    """What must be the same for an interrupted job to go on.

    budget  tokens of each half of the documents that the model reads, in whole documents
    seed    of the drawn sets, of which documents are read and of which are drawn again
    """

    budget: int = BUDGET
    seed: int = 0


def patterns(
    run: Run, model: Model, settings: Settings | None = None, *, report: Report | None = None
) -> Run:
    """Add the tables `patterns`, `pattern_tests` and `calibration` to a run; goes on where it was interrupted. What was
    found with the same settings stays as it is.

    Raises RunMismatch when the model is not the run's, PatternError when the text is too small.
    """
    model.check_built(run, "testing patterns of")
    settings, work = settings or Settings(), run.path / WORK
    check_budget(settings.budget)
    if known(run, settings):
        return run
    halves(run.table("contexts").select("document").collect().to_series().to_numpy())
    files.check_folder(run.path, "adding patterns to the run")
    work.mkdir(exist_ok=True)
    with model.running(), loop.locked(work / "lock", run.path):
        found = _Job(run, model, settings, work, report or (lambda _: None)).run()
    shutil.rmtree(work)
    return found


def estimate(run: Run, settings: Settings) -> float:
    """Seconds that the job may take on two cores, an order of magnitude: as measured with the sample model, by neurons
    and text; the model's own passes by what they read."""
    model, corpus = run.manifest.model, run.manifest.corpus
    neurons = model.layers * model.neurons / 46_080
    search = 60 + 240 * min(1.0, corpus.tokens / 1_000_000)
    passes = 120 * (2 * settings.budget + min(settings.budget, WHOLE_BUDGET)) / (2 * BUDGET + WHOLE_BUDGET)
    return neurons * (search + passes)


def known(run: Run, settings: Settings) -> bool:
    """Whether the run has the patterns that these settings give."""
    about = run.manifest.options.get("patterns", {})
    return run.manifest.tables.keys() >= TABLES and _recipe(settings).items() <= about.items()


def _recipe(settings: Settings) -> dict[str, Any]:
    """What results depend on besides the run."""
    return asdict(settings) | asdict(Rule()) | {
        "level": LEVEL, "null_level": NULL_LEVEL, "resamples": RESAMPLES, "least_documents": LEAST_DOCUMENTS,
        "exact_ends": True, "mnemoscope": version("mnemoscope"),
    }  # fmt: skip


class _Job:
    """The stages, in order."""

    def __init__(self, run: Run, model: Model, settings: Settings, work: Path, report: Report) -> None:
        self._run, self._model, self._settings, self._work, self._report = run, model, settings, work, report

    def run(self) -> Run:
        self._claim()
        self._text = Text.of(self._run)
        self._units = addressed(self._run, self._text)
        recipe = self._run.manifest.options.get("nulls")
        self._nulls = Nulls.of(self._model, recipe) if recipe else None
        candidates = self._whole_look(self._candidates())
        candidates = self._first_look(candidates)
        return self._second_look(candidates)

    def _claim(self) -> None:
        """Start over when what lies here was begun on another run, or otherwise."""
        tables = self._run.manifest.tables
        sources = {
            name: tables[name].sha256 for name in ("contexts", "triggers", "null_triggers") if name in tables
        }
        identity = {
            "settings": asdict(self._settings),
            "version": version("mnemoscope"),
            "tables": sources,
            "read": "parts of long documents",  # work that was begun before reads other contexts
        }
        text, file = json.dumps(identity, indent=1, sort_keys=True), self._work / "identity.json"
        if file.exists() and file.read_text() == text:
            return
        for path in self._work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        files.write(file, text, "testing patterns: writing")

    def _tell(self, stage: str, done: int, total: int, unit: str = "units") -> None:
        self._report(Progress(stage, done, total, unit))

    def _kept(self, name: str, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
        """A frame that is made once and lies in the work folder from then on."""
        file = self._work / f"{name}.parquet"
        if not file.exists():
            made = make()
            with files.replacing(file, "testing patterns: writing") as partial:
                made.write_parquet(partial)
        return pl.read_parquet(file, glob=False)

    # -- candidates ----------------------------------------------------------------------------------------

    def _candidates(self) -> pl.DataFrame:
        """Columns of `FOUND`, `unit` an index into units, and those of `Confirmed` with their rates."""
        return self._kept("candidates", self._confirmed)

    def _confirmed(self) -> pl.DataFrame:
        units, options = self._units, Options(seed=self._settings.seed)
        found = search(self._text, units.units, options, self._tell)
        self._kept("calibration", lambda: found.calibration)
        self._kept("language", lambda: Language.of(found).frame)
        # What drawn sets equal too often goes no further, but for the best: it shows how often.
        frame = found.candidates.filter(FURTHER | (pl.col("rank") == 0))
        self._tell("confirming", 0, len(frame), "candidates")
        asked = confirm(self._text, units.units, frame, options)
        semantic = np.flatnonzero((frame["kind"] == "semantic").to_numpy())
        against = beyond(self._text, units.units, frame[semantic], options)
        self._tell("confirming", len(frame), len(frame), "candidates")
        p, rate, tried = np.ones(len(frame)), np.zeros(len(frame)), np.zeros(len(frame), bool)
        p[semantic], tried[semantic] = against["p_n2"], against["n_n2"] > 0
        rate[semantic] = (against["expected_n2"] / against["n_n2"].clip(1)).to_numpy()
        frame = asked.rename(CONFIRMED)
        return self._with_rates(frame.with_columns(token_p=pl.Series(p), token_rate=pl.Series(rate)), tried)

    def _with_rates(self, frame: pl.DataFrame, asked: np.ndarray) -> pl.DataFrame:
        """Adds `q` and `token_q`: for each family of tests, over the candidates of neurons that went further."""
        real = self._units.kind[frame["unit"].to_numpy()] == 0
        further = frame.select(FURTHER).to_series().to_numpy()
        q, token_q = np.ones((2, len(frame)))
        for tests in frame["tests"].unique():
            mine = (frame["tests"] == tests).to_numpy()
            for rates, name, which in (
                (q, "test_p", mine & further),
                (token_q, "token_p", mine & further & asked),
            ):
                rates[which] = discovery_rate(frame[name].to_numpy()[which], real[which])
        return frame.with_columns(q=pl.Series(q), token_q=pl.Series(token_q))

    # -- the passes ----------------------------------------------------------------------------------------

    def _whole_look(self, candidates: pl.DataFrame) -> pl.DataFrame:
        """Candidates of all families, by unit."""
        return self._kept("proposed", lambda: self._proposed(candidates))

    def _proposed(self, candidates: pl.DataFrame) -> pl.DataFrame:
        language = Language.read(self._kept("language", pl.DataFrame))
        read = self._half("whole", test=False, most=WHOLE_BUDGET)
        ground = Ground(read.text, masks(read.text, language.specs))
        looks = {
            kind: WholeLook(ground, len(language.specs), thresholds(self._run, kind))
            for kind in self._units.kinds
        }
        self._pass("whole look", read, Tally(ground, self._nulls, looks))
        found = [proposals(self._units, kind, look, ground, language) for kind, look in looks.items()]
        blank = {name: dtype for name, dtype in candidates.schema.items() if name not in FOUND}
        columns = [
            pl.lit(1.0 if name in _RATES else 0).cast(dtype).alias(name) for name, dtype in blank.items()
        ]
        return pl.concat([candidates, *(one.with_columns(columns) for one in found)]).sort(
            "unit", "tests", "rank"
        )

    def _first_look(self, candidates: pl.DataFrame) -> pl.DataFrame:
        """Adds `score`, where active begins (-1 for one that was not counted), `discovery_score` and `chosen`."""
        return self._kept("chosen", lambda: self._chosen(candidates))

    def _chosen(self, candidates: pl.DataFrame) -> pl.DataFrame:
        places = pl.col("tests").replace_strict(TESTED, return_dtype=pl.Int64)
        rows = np.flatnonzero(candidates.select(FURTHER & (pl.col("rank") < places)).to_series().to_numpy())
        specs, column = numbered(candidates["spec"][rows])
        read = self._half("first", test=False)
        ground = Ground(read.text, together(read.text, specs))
        layers, claims = self._run.manifest.model.layers, self._claims(candidates, rows, column)
        parts = {
            kind: FirstLook(layers, self._size(kind), ground.groups, mine)
            for kind, (_, mine) in claims.items()
        }
        self._pass("first look", read, Tally(ground, self._nulls, parts))
        score, f1 = np.full(len(candidates), -1), np.zeros(len(candidates))
        for kind, (where, mine) in claims.items():
            score[where], f1[where] = best(parts[kind], len(mine))
        frame = candidates.with_columns(score=pl.Series(score), discovery_score=pl.Series(f1))
        near = pl.col("discovery_score") >= pl.col("discovery_score").max().over("unit", "tests") - MARGIN
        order = pl.struct((~near).alias("far"), "complexity", -pl.col("discovery_score"), "rank")
        allowed = frame.with_columns(chosen=pl.col("score") >= 0)
        first = order.rank("ordinal").over("unit", "tests", "chosen") == 1
        return allowed.with_columns(chosen=pl.col("chosen") & first)

    def _half(self, name: str, *, test: bool, most: int | None = None) -> Half:
        settings = self._settings
        budget = min(settings.budget, most or settings.budget)
        read = read_half(self._text, test, budget, self._work / name, self._run, settings.seed)
        if read.note:
            self._report(Progress(f"{name} look", 0, 0, "tokens", read.note))
        return read

    def _size(self, kind: str) -> int:
        return (
            self._run.manifest.model.neurons if kind == NEURON or self._nulls is None else self._nulls.count
        )

    def _claims(
        self, candidates: pl.DataFrame, rows: np.ndarray, column: np.ndarray
    ) -> dict[str, tuple[np.ndarray, Claims]]:
        """By kind of unit: rows of `candidates`, and them as claims. Units lie in the order of kind, then layer."""
        units = self._units
        unit = candidates["unit"].to_numpy()[rows]
        found = {}
        for number, kind in enumerate(units.kinds):
            mine = np.flatnonzero(units.kind[unit] == number)
            own = unit[mine]
            found[kind] = (
                rows[mine],
                Claims(units.layer[own], units.neuron[own], units.polarity[own], column[mine]),
            )
        return found

    def _pass(self, stage: str, read: Half, tally: Tally) -> None:
        """Feed a tally the whole half, from where it was interrupted."""
        report = lambda step: self._report(step._replace(stage=stage))  # noqa: E731
        kind = loop.StateFactory(lambda: tally, tally.restore)
        loop.run_shards(self._model, read.plan, kind, read.plan.folder, report=report)

    def _second_look(self, candidates: pl.DataFrame) -> Run:
        rows = np.flatnonzero(candidates["chosen"].to_numpy())
        specs, column = numbered(candidates["spec"][rows])
        read = self._half("second", test=True)
        tokens = np.unique(read.text.tokens[read.text.counted])
        columns = hstack([together(read.text, specs), last_tokens(read.text, tokens)], format="csc")
        ground = Ground(read.text, columns)
        claims = self._claims(candidates, rows, column)
        model, layers = self._run.manifest.model, range(self._run.manifest.model.layers)
        tests, looks = candidates["tests"].to_numpy().astype(str), {}
        whole = {kind: tests[where] == WHOLE for kind, (where, _) in claims.items()}
        by_triggers = [
            (mine.layer[~whole[kind]], mine.column[~whole[kind]]) for kind, (_, mine) in claims.items()
        ]
        measured = tuple(
            np.unique(np.concatenate([some[of == layer] for of, some in by_triggers])) for layer in layers
        )
        for kind, (where, mine) in claims.items():
            chosen = self._compared(candidates[where], mine, tokens, len(specs))
            asked = np.flatnonzero(whole[kind])
            looks[kind] = SecondLook(model.layers, self._size(kind), ground, chosen, measured, asked)
        self._pass("second look", read, Tally(ground, self._nulls, looks))
        candidates = self._by_document(
            candidates, {kind: (claims[kind][0], look) for kind, look in looks.items()}
        )
        rates = candidates["q"].to_numpy()
        tested = {
            kind: Tested(look.chosen, look, tests[claims[kind][0]], rates[claims[kind][0]])
            for kind, look in looks.items()
        }
        edges = self._run.manifest.options["histogram_edges"]
        outcomes = Outcomes(ground, tested, edges, Rule(), self._settings.seed)
        return self._write(candidates, {kind: where for kind, (where, _) in claims.items()}, outcomes, read)

    def _by_document(
        self, candidates: pl.DataFrame, looks: dict[str, tuple[np.ndarray, SecondLook]]
    ) -> pl.DataFrame:
        """Fills in, for claims of the family `whole`, what the test half says, and `q` over those of neurons."""
        names = ("test_triggers", "test_hits", "test_base_rate", "test_p", "q")
        columns = {name: candidates[name].to_numpy().copy() for name in names}
        for where, look in looks.values():
            rows, active, both = where[look.expecting], look.active[look.expecting], look.both[look.expecting]
            columns["test_triggers"][rows], columns["test_hits"][rows] = active.sum(1), both.sum(1)
            columns["test_base_rate"][rows] = look.expected.sum(1) / np.maximum(active.sum(1), 1)
            columns["test_p"][rows] = by_document(both, look.expected)
        mine = np.flatnonzero((candidates["tests"] == WHOLE).to_numpy() & candidates["chosen"].to_numpy())
        real = self._units.kind[candidates["unit"].to_numpy()[mine]] == 0
        columns["q"][mine] = discovery_rate(columns["test_p"][mine], real)
        return candidates.with_columns(pl.Series(name, values) for name, values in columns.items())

    def _compared(self, candidates: pl.DataFrame, claims: Claims, tokens: np.ndarray, first: int) -> Chosen:
        """Baselines of chosen claims: the last tokens of the unit's triggers in the discovery half, which are columns
        from `first` on, and the pattern of another unit of its layer, polarity and family of tests."""
        starts, ending = self._tables
        unit = candidates["unit"].to_numpy()
        sizes = np.diff(starts)[unit]
        flat = ending[spans(starts[unit], sizes)]
        place = np.minimum(np.searchsorted(tokens, flat), len(tokens) - 1)
        known = tokens[place] == flat  # the others end no prefix of the text that is read
        sizes = np.bincount(np.repeat(np.arange(len(unit)), sizes)[known], minlength=len(unit))
        other = np.full(len(claims), -1)
        random = np.random.default_rng([self._settings.seed, 3])
        group = np.unique(
            np.stack([claims.layer, claims.polarity, np.unique(candidates["tests"], return_inverse=True)[1]], 1),
            axis=0, return_inverse=True,
        )[1].ravel()  # fmt: skip
        order = np.lexsort((random.permutation(len(group)), group))
        for some in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
            if len(some) > 1:
                other[some] = claims.column[np.roll(some, 1)]
        first_columns = np.concatenate([[0], np.cumsum(sizes)])
        return Chosen(claims, candidates["score"].to_numpy(), first_columns, place[known] + first, other)

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """For each unit the last tokens of its triggers in the discovery half, each once."""
        units, text = self._units.units, self._text
        owner = np.repeat(np.arange(len(units)), np.diff(units.indptr))
        mine = ~half(text.document[units.rows], 0)
        pairs = np.unique(np.stack([owner[mine], text.tokens[units.rows[mine]]], 1), axis=0)
        return np.searchsorted(pairs[:, 0], np.arange(len(units) + 1)), pairs[:, 1]

    # -- what is written -----------------------------------------------------------------------------------

    def _write(
        self, candidates: pl.DataFrame, where: dict[str, np.ndarray], outcomes: Outcomes, read: Half
    ) -> Run:
        layers = self._run.manifest.model.layers
        norms = self._run.table("neurons").select("layer", "value_norm").collect()
        calibration: list[dict[str, Any]] = _of_search(self._kept("calibration", pl.DataFrame))

        def tests() -> Iterator[pa.Table]:
            for layer in range(layers):
                self._tell("two-way test", layer, layers, "layers")
                found, rows = outcomes.layer(layer)
                own = norms.filter(pl.col("layer") == layer)["value_norm"].to_numpy()
                calibration.extend([*rows, outcomes.writes(layer, own)])
                parts = []
                for kind, columns in found.items():
                    mine = where[kind][outcomes.claims(kind, layer)]
                    parts.append(table("pattern_tests", self._described(candidates[mine]) | columns))
                yield in_order(pa.concat_tables(parts))
            self._tell("two-way test", layers, layers, "layers")

        def lists() -> Iterator[pa.Table]:
            unit = self._units.layer[candidates["unit"].to_numpy()]
            for layer in range(layers):
                some = candidates[np.flatnonzero(unit == layer)]
                columns = {name: some[name] for name in SCHEMAS["patterns"].names if name in some.columns}
                yield in_order(table("patterns", columns | {"triggers": some["n"]} | self._described(some)))

        counted = {"tokens": int(read.text.counted.sum()), "nulls": list(where)[1:]}
        tables = {
            "patterns": lists(), "pattern_tests": tests(),
            "calibration": (_calibrated(rows) for rows in [calibration]),
        }  # fmt: skip
        return add_tables(self._run.path, tables, {"patterns": _recipe(self._settings) | counted})

    def _described(self, some: pl.DataFrame) -> dict[str, Any]:
        """Whose candidates these are, and what they claim."""
        units, unit = self._units, some["unit"].to_numpy()
        claim = ("tests", "spec", "name", "family", "kind", "complexity")
        return {
            "layer": units.layer[unit], "neuron": units.neuron[unit], "polarity": units.polarity[unit],
            "unit": np.array(units.kinds, object)[units.kind[unit]],
        } | {name: some[name] for name in claim}  # fmt: skip


def _of_search(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows of `calibration` that tell how small a p-value drawn sets reach, for each group of alike units."""
    rows = []
    for row in frame.iter_rows(named=True):
        name = f"{row['tests']}:{row['group']}"
        common = {"layer": -1, "unit": "sets", "count": row["draws"]}
        smallest = {"levels": [0.01, 0.05], "values": [row["p_01"], row["p_05"]]}
        rows.append(common | {"measure": f"smallest p of {name}"} | smallest)
        rows.append(
            common
            | {"measure": f"effective tests of {name}", "levels": [], "values": [row["effective_tests"]]}
        )
    return rows


def _calibrated(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["layer"]), schema=SCHEMAS["calibration"])


def discovery_rate(p: np.ndarray, among: np.ndarray) -> np.ndarray:
    """f64[test]: the false discovery rate at which each test would be accepted (Benjamini and Hochberg 1995).

    among  bool[test]: the tests that are counted. Others (of nulls) get the rate of the next larger counted one,
           which is to say: they would be accepted by the same bound on p
    """
    if not among.any():
        return np.ones(len(p))
    counted = np.sort(p[among])
    rates = np.maximum.accumulate(false_discovery_control(counted))
    place = np.searchsorted(counted, p)
    return np.where(place < len(counted), rates[np.minimum(place, len(counted) - 1)], 1.0)
