"""Find the patterns of every neuron of a run, test them both ways on held-out text, and add what was found to the run.

    routing     of a mixture the model on all text        -> what is routed to each expert
    search      triggers of the discovery half            -> candidates of each unit         (no model)
    hold out    triggers of the test half                 -> their p-values there            (no model)
    whole look  the model on text of the discovery half   -> candidates that triggers cannot certify
    first look  the model on text of the discovery half   -> the best candidate and its threshold, by F1
    second look the model on text of the test half        -> everything about that claim, and its verdict

Units are neurons of either polarity, and pseudo-neurons of the nulls that the run was built with: the same code does
the same to both. Work in progress lies in `.patterns` inside the run, and goes with it.

In a mixture the text of the units of an expert is what was routed to it, in every stage. A run does not hold what that
is, and so the model reads each text twice: to know it, and to count.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.sparse import csc_array, hstack

from mnemoscope import files
from mnemoscope.arguments import DECOYS, check_budget
from mnemoscope.mine import loop
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.neuron.twoway import LEAST_DOCUMENTS, NULL_LEVEL, RESAMPLES, Rule
from mnemoscope.patterns.duplicates import Duplicates, near_duplicates
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.search import search
from mnemoscope.patterns.space import BACKGROUND, FEWER, NARROW, TYPES
from mnemoscope.patterns.triggers import Options, OwnTexts, addressed, halves
from mnemoscope.patterns.whole import Language
from mnemoscope.records import MAIN, POSITION, WHOLE, Cells, Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.text import Text
from mnemoscope.run.writing import add_tables
from mnemoscope.trials.claims import Baselines, KindClaims, claims_by_kind
from mnemoscope.trials.counts import CandidateCounts, CountingState, Counts, TestCounts, ThresholdCounts
from mnemoscope.trials.discovery import first_candidates, proposals, thresholds, with_choice, with_proposals
from mnemoscope.trials.groups import UnitPlaces
from mnemoscope.trials.heldout import FURTHER, LEVEL, hold_out, masks_of_many, numbered_names
from mnemoscope.trials.masked_text import BUDGET, HalfText, MaskedText, last_tokens, read_half
from mnemoscope.trials.outcomes import Tested, TestTables, run_tables, with_document_tests
from mnemoscope.trials.routed import RoutedTokens, own_texts

WORK = ".patterns"
_DOING = "testing patterns: writing"
WHOLE_BUDGET = 32_768  # tokens, at most, on which candidates of the family `whole` are looked for
ENCODER = (
    "an encoder reads what follows a token and predicts none: patterns of the next token are not looked for, and a "
    "pattern is of the text up to the active token"
)
MIXTURE = (
    "a mixture of experts: the text of a neuron is what was routed to its expert, and chance is taken there. A verdict "
    "stands against the null units of all experts of the layer, of which each has but a few, and against those of its "
    "own expert where these do better"
)
TABLES = {"patterns", "pattern_tests", "calibration"}

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
    model.check_one_text("looking for patterns of")
    model.check_built(run, "testing patterns of")
    settings, work = settings or Settings(), WorkFolder(run.folder / WORK)
    check_budget(settings.budget, settings.seed)
    if known(run, settings):
        return run
    halves(run.table("contexts").select("document").collect().to_series().to_numpy())
    files.check_folder(run.folder, "adding patterns to the run")
    work.path.mkdir(exist_ok=True)
    with model.running(), loop.locked(work.path / "lock", run.folder):
        work.start(_identity(run, settings))
        finished = _Job(run, model, settings, work, report or (lambda _: None)).run()
    shutil.rmtree(work.path)
    return finished


def estimate(run: Run, settings: Settings) -> float:
    """Seconds that the job may take on two cores, an order of magnitude: as measured with the sample model, by neurons
    and text; the model's own passes by what they read, those that only follow the router at a third."""
    model, corpus = run.manifest.model, run.manifest.corpus
    kinds = (run.manifest.options.get("nulls") or {}).get("kinds", ())
    neurons = len(model.cells) * (1 + sum(kind in DECOYS for kind in kinds)) / 46_080
    search = 60 + 240 * min(1.0, corpus.tokens / 1_000_000)
    read = 2 * settings.budget + min(settings.budget, WHOLE_BUDGET)
    routing = (read + min(corpus.tokens, 2 * BACKGROUND)) / 3 if model.experts else 0
    return neurons * (search + 120 * (read + routing) / (2 * BUDGET + WHOLE_BUDGET))


def known(run: Run, settings: Settings) -> bool:
    """Whether the run has the patterns that these settings give."""
    about = run.manifest.options.get("patterns", {})
    return run.manifest.tables.keys() >= TABLES and _recipe(settings).items() <= about.items()


def _recipe(settings: Settings) -> dict[str, Any]:
    """What results depend on besides the run."""
    return asdict(settings) | asdict(Rule()) | {
        "level": LEVEL, "null_level": NULL_LEVEL, "resamples": RESAMPLES, "least_documents": LEAST_DOCUMENTS,
        "exact_ends": True, "strata": [TYPES, FEWER, NARROW], "mnemoscope": version("mnemoscope"),
    }  # fmt: skip


def _identity(run: Run, settings: Settings) -> dict[str, Any]:
    """What work in progress depends on."""
    tables = run.manifest.tables
    sources = ("contexts", "triggers", "null_triggers")
    return {
        "settings": asdict(settings),
        "version": version("mnemoscope"),
        "tables": {name: tables[name].sha256 for name in sources if name in tables},
        "read": "near-duplicates as one document",  # work that was begun before reads other contexts
        "strata": [TYPES, FEWER, NARROW],
    }


class _Job:
    """The stages, from top to bottom. What each makes is kept in the work folder."""

    def __init__(self, run: Run, model: Model, settings: Settings, work: WorkFolder, report: Report) -> None:
        self._run, self._model, self._settings, self._work, self._report = run, model, settings, work, report
        text = Text.of(run)
        self._duplicates = self._near_duplicates(text)
        self._text = self._duplicates.join(text)
        self._units = addressed(run, self._text)
        recipe = run.manifest.options.get("nulls")
        self._nulls = Nulls.of(model, recipe) if recipe else None
        self._places = UnitPlaces.of(model, self._nulls)

    @property
    def _notes(self) -> list[str]:
        """What is otherwise than of most models."""
        model = self._run.manifest.model
        return [note for note, said in ((ENCODER, model.bidirectional), (MIXTURE, model.experts)) if said]

    def run(self) -> Run:
        """Search -> hold out -> read, count, decide: for candidates, for thresholds, for the test."""
        for note in self._notes:
            self._report(Progress("patterns", 0, 0, "units", note))
        candidates = self._work.kept("candidates", self._searched)
        candidates = self._work.kept("proposed", lambda: self._propose(candidates))
        candidates = self._work.kept("chosen", lambda: self._choose(candidates))
        return self._test(candidates)

    def _near_duplicates(self, text: Text) -> Duplicates:
        """Which documents count as one in all that follows."""
        contexts = len(text.contexts)
        self._tell("near-duplicates", 0, contexts, "contexts")
        duplicates = Duplicates.read(self._work.kept("duplicates", lambda: near_duplicates(text).frame))
        self._report(Progress("near-duplicates", contexts, contexts, "contexts", duplicates.note))
        halves(duplicates.group)
        return duplicates

    def _searched(self) -> pl.DataFrame:
        """Candidates, and what held-out triggers say of them."""
        own = self._own_texts()
        return self._hold_out(self._search(own), own)

    def _own_texts(self) -> OwnTexts:
        """Which text each unit has: of an expert what the model routes there."""
        if not self._places.routed.any():
            return OwnTexts.whole(len(self._units))
        budget = max(BACKGROUND, self._settings.budget)
        halves = [self._read(f"routing-{test:d}", test, budget) for test in (False, True)]
        reads = [self._routing("routing", half) for half in halves]
        return own_texts(self._text, self._units, self._places, reads)

    def _search(self, own: OwnTexts) -> pl.DataFrame:
        """Candidates (columns of `FOUND`, `unit` an index into units) from the triggers of the discovery half."""
        result = search(self._text, self._units.units, self._options(), self._tell, own)
        self._work.kept("calibration", lambda: result.calibration)
        self._work.kept("language", lambda: Language.of(result).frame)
        return result.candidates

    def _hold_out(self, candidates: pl.DataFrame, own: OwnTexts) -> pl.DataFrame:
        """Ask the triggers of the test half about them. What drawn sets equal too often goes no further, but for the
        best candidate of each unit, which shows how often that is."""
        further = candidates.filter(FURTHER | (pl.col("rank") == 0))
        self._tell("confirming", 0, len(further), "candidates")
        held_out = hold_out(self._text, self._units, further, self._options(), own)
        self._tell("confirming", len(further), len(further), "candidates")
        return held_out

    def _propose(self, candidates: pl.DataFrame) -> pl.DataFrame:
        """Count every unit against the common patterns and words of the language: candidates of the family `whole`."""
        language = Language.read(self._work.kept("language"))
        half = self._read("whole", False, min(self._settings.budget, WHOLE_BUDGET))
        masked = self._masked("whole look", half, masks(half.text, language.specs))
        counts = {
            kind: CandidateCounts(self._cells(kind), masked, len(language.specs), thresholds(self._run, kind))
            for kind in self._units.kinds
        }
        self._count("whole look", half, masked, counts)
        proposed = [
            proposals(self._places, self._units, kind, counts[kind], masked, language) for kind in counts
        ]
        return with_proposals(candidates, proposed)

    def _choose(self, candidates: pl.DataFrame) -> pl.DataFrame:
        """Count the first candidates of each unit; choose its claim and the threshold from which it is active."""
        rows = first_candidates(candidates)
        specs, column = numbered_names(candidates["spec"][rows])
        half = self._read("first", False, self._settings.budget)
        masked = self._masked("first look", half, masks_of_many(half.text, specs))
        claims = claims_by_kind(self._places, self._units, candidates, rows, column)
        counts = {
            kind: ThresholdCounts(self._cells(kind), masked.groups, of_kind)
            for kind, (_, of_kind) in claims.items()
        }
        self._count("first look", half, masked, counts)
        return with_choice(candidates, claims, counts)

    def _test(self, candidates: pl.DataFrame) -> Run:
        """Count everything about the chosen claims on text that no choice has seen; decide, and write the tables."""
        rows = np.flatnonzero(candidates["chosen"].to_numpy())
        specs, column = numbered_names(candidates["spec"][rows])
        half = self._read("second", True, self._settings.budget)
        tokens = np.unique(half.text.tokens[half.text.counted])
        columns = hstack([masks_of_many(half.text, specs), last_tokens(half.text, tokens)], format="csc")
        masked = self._masked("second look", half, columns)
        claims = claims_by_kind(self._places, self._units, candidates, rows, column)
        families = candidates["tests"].to_numpy().astype(str)
        tests = {kind: families[of_kind.rows] for kind, of_kind in claims.items()}
        counts = self._test_counts(candidates, claims, tests, masked, tokens, len(specs))
        self._count("second look", half, masked, counts)
        candidates = with_document_tests(candidates, self._units, claims, counts)
        rates = candidates["q"].to_numpy()
        tested = {
            kind: Tested(counts[kind].chosen, counts[kind], tests[kind], rates[claims[kind].rows])
            for kind in counts
        }
        edges = self._run.manifest.options["histogram_edges"]
        verdicts = TestTables(masked, tested, edges, Rule(), self._places.layer, self._settings.seed)
        layers, smallest = self._run.manifest.model.layers, self._work.kept("calibration")
        tell = lambda done: self._tell("two-way test", done, layers, "layers")  # noqa: E731
        tables = run_tables(self._run, self._units, candidates, claims, verdicts, smallest, tell)
        counted = {
            "tokens": int(half.text.counted.sum()), "nulls": list(claims)[1:],
            "near_duplicates": {"documents": self._duplicates.joined, "groups": self._duplicates.groups},
            "notes": [note for note in (self._duplicates.note, half.note, *self._notes) if note],
        }  # fmt: skip
        return add_tables(self._run.folder, tables, {"patterns": _recipe(self._settings) | counted})

    def _test_counts(
        self,
        candidates: pl.DataFrame,
        claims: Mapping[str, KindClaims],
        tests: Mapping[str, np.ndarray],
        masked: MaskedText,
        tokens: np.ndarray,
        first: int,
    ) -> dict[str, TestCounts]:
        """By kind of unit. Of claims of the family `whole` it is asked what chance would give in each document; the
        patterns of all others are measured against every unit of their place."""
        whole = {kind: tests[kind] == WHOLE for kind in claims}
        of_triggers = [
            np.stack([of_kind.place, of_kind.column], 1)[~whole[kind]]
            for kind, (_, of_kind) in claims.items()
        ]
        place, column = np.unique(np.concatenate(of_triggers), axis=0).T
        measured = tuple(np.split(column, np.searchsorted(place, np.arange(1, len(self._places.layer)))))
        baselines = Baselines(self._units, self._text, tokens, first, self._settings.seed)
        return {
            kind: TestCounts(
                self._cells(kind), masked, baselines.compared(candidates[rows], of_kind),
                measured, np.flatnonzero(whole[kind]),
            )
            for kind, (rows, of_kind) in claims.items()
        }  # fmt: skip

    # -- what all stages use ---------------------------------------------------------------------------------

    def _options(self) -> Options:
        options = Options(seed=self._settings.seed, threads=torch.get_num_threads())
        return replace(options, tests=(MAIN, POSITION)) if self._run.manifest.model.bidirectional else options

    def _cells(self, kind: str) -> Cells:
        """The units of a kind."""
        return self._places.cells[kind]

    def _read(self, name: str, test: bool, budget: int) -> HalfText:
        """Text of one half, within a budget, and how the model will read it."""
        half = read_half(self._text, test, budget, self._work.path / name, self._run, self._settings.seed)
        if half.note:
            self._report(Progress(f"{name} look", 0, 0, "tokens", half.note))
        return half

    def _routing(self, stage: str, half: HalfText) -> RoutedTokens:
        """What is routed where, by the plan by which is counted: the same batches route alike."""
        report = lambda step: self._report(step._replace(stage=f"{stage}: what is routed where"))  # noqa: E731
        return RoutedTokens.read(half, self._places, self._model, half.plan.folder / "routed", report)

    def _masked(self, stage: str, half: HalfText, columns: csc_array) -> MaskedText:
        """A half with the masks of patterns, and in a mixture what of it each expert is given."""
        routed = self._routing(stage, half) if self._places.routed.any() else None
        return MaskedText(half.text, columns, routed)

    def _count(self, stage: str, half: HalfText, masked: MaskedText, counts: Mapping[str, Counts]) -> None:
        """Run the model over the whole half and count, from where it was interrupted."""
        state = CountingState(masked, self._nulls, counts, self._places.at)
        report = lambda step: self._report(step._replace(stage=stage))  # noqa: E731
        factory = loop.StateFactory(lambda: state, state.restore)
        loop.run_shards(self._model, half.plan, factory, half.plan.folder, report=report)

    def _tell(self, stage: str, done: int, total: int, unit: str = "units") -> None:
        self._report(Progress(stage, done, total, unit))


@dataclass(frozen=True)
class WorkFolder:
    """Work in progress inside a run: what each stage made, so that an interrupted job goes on; gone once the run has
    its tables."""

    path: Path

    def start(self, identity: dict[str, Any]) -> None:
        """Start over when what lies here was begun on another run, or otherwise."""
        text, file = json.dumps(identity, indent=1, sort_keys=True), self.path / "identity.json"
        if file.exists() and file.read_text() == text:
            return
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        files.write(file, text, _DOING)

    def kept(self, name: str, make: Callable[[], pl.DataFrame] = pl.DataFrame) -> pl.DataFrame:
        """A frame that is made once and lies here from then on."""
        file = self.path / f"{name}.parquet"
        if not file.exists():
            frame = make()
            with files.replacing(file, _DOING) as partial:
                frame.write_parquet(partial)
        return pl.read_parquet(file, glob=False)
