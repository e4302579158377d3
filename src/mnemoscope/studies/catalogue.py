"""The measurements of the study: what each answers, adds to a run and costs; and their findings in two runs.

An *analysis* is `findings(run) -> list[Finding]`, pure. What it needs besides the tables of every run is measured by a
job of the same name in `studies.run`, or added by another command. Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mnemoscope.errors import QueryError
from mnemoscope.records import Progress
from mnemoscope.results import StudyReport
from mnemoscope.run.schemas import CASES, CONTRIBUTIONS, OPTIONAL
from mnemoscope.studies.findings import (
    cases,
    changed,
    composition,
    contributions,
    crosslayer,
    distributions,
    glance,
    groups,
    headline,
    keys,
    questions,
    refinement,
    removal,
    stability,
    tuned_lens,
    value_ranks,
    values,
    weights,
)
from mnemoscope.studies.findings.finding import Finding, Section
from mnemoscope.studies.findings.timeline import timeline

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run
    from mnemoscope.studies.measures.positions import Sizes


@dataclass(frozen=True)
class Measurement:
    """One family of questions.

    tables    tables of the run that the analysis reads besides those that every run has
    measured  whether a job of the study measures them; else another command or the build does
    uses      which of the sizes its job depends on
    passes    forwarded tokens that an example costs, relative to its length; 0 when nothing is forwarded
    minutes   what it costs besides, on two cores with the sample model and the whole sample text
    seconds   what an example costs besides, likewise
    decoders  why an encoder is not asked this; empty where it is
    dense     why a mixture of experts is not; likewise
    """

    name: str
    title: str
    items: tuple[str, ...]
    analysis: Callable[[Run], list[Finding]]
    tables: tuple[str, ...] = ()
    measured: bool = False
    uses: tuple[str, ...] = ()
    passes: float = 0.0
    minutes: float = 0.0
    seconds: float = 0.0
    decoders: str = ""
    dense: str = ""

    def lacks(self, run: Run, sizes: Sizes) -> bool:
        """Whether a job of the study has something to measure."""
        return self.measured and self.state(run, sizes) in ("to measure", "other sizes")

    def _of_none(self, run: Run | None) -> str:
        """Why the model of a run, or its units, are not asked this."""
        if run is None:
            return ""
        model = run.manifest.model
        if model.units is not None:
            return f"it asks about neurons of feed-forward layers, and these are units of {model.units.id}"
        return (self.decoders if model.bidirectional else "") or (self.dense if model.experts else "")

    def state(self, run: Run | None, sizes: Sizes) -> str:
        """`ready`, `to measure`, `other sizes` when the tables are there from other sizes, or `does not apply`."""
        if self._of_none(run):
            return "does not apply"
        if run is None or not set(self.tables) <= run.manifest.tables.keys():
            return "to measure"
        known = run.manifest.options.get(self.key)  # None for tables that another command added
        return "ready" if not self.measured or known in (None, self.sizes(sizes)) else "other sizes"

    @property
    def key(self) -> str:
        """Where the manifest's options say with which sizes it was measured."""
        return f"study_{self.name}"

    def sizes(self, sizes: Sizes) -> dict[str, Any]:
        """Those that its job depends on."""
        return {name: value for name, value in sizes.to_dict().items() if name in self.uses}

    def section(self, run: Run) -> Section:
        """Its findings; without its tables, what is missing; of what is not asked, why."""
        if why := self._of_none(run):
            return Section(self.name, self.title, (), why)
        if missing := [name for name in self.tables if name not in run.manifest.tables]:
            return Section(
                self.name, self.title, (), f"the run has no table {missing[0]}; {OPTIONAL[missing[0]]}"
            )
        try:
            findings = self.analysis(run)
        except QueryError as error:  # too little text for one question is no reason to answer none
            return Section(self.name, self.title, (), str(error))
        return Section(self.name, self.title, tuple(findings))


HEADLINE = "headline"  # the section that is made of all others
_FOLLOWS = "it is about the token that follows a prefix, and an encoder predicts a token that is masked"
_CONTRIBUTES = f"{_FOLLOWS}; `mnemoscope explain` takes such a prediction apart"
_ROUTED_ANEW = (
    "it compares a coefficient with and without a token, and without it a router may choose other experts, of which a "
    "neuron that does not run has no coefficient"
)
CATALOGUE = (
    Measurement(
        "glance",
        "Model and text",
        ("A2", "A3", "A26"),
        glance.findings,
        ("parameters",),
        measured=True,
    ),
    Measurement(
        "keys",
        "Keys: patterns in triggers",
        ("A4", "A7", "A8", "A73", "A74", "A77", "A78"),
        keys.findings,
        ("patterns", "pattern_tests"),
        measured=True,
        uses=("tokens", "seed"),
        minutes=8,
    ),
    Measurement(
        "removal",
        "Keys: triggers without one token",
        ("A9",),
        removal.findings,
        ("removal",),
        measured=True,
        decoders="it takes tokens out of prefixes, and a trigger of an encoder is a position in a whole context",
        dense=_ROUTED_ANEW,
        uses=("seed", "positions"),
        minutes=1,
    ),
    Measurement(
        "groups",
        "Groups of neurons taken out",
        ("A79",),
        groups.findings,
        ("group_ablations",),
        measured=True,
        decoders=_FOLLOWS,
        uses=("sentences", "longest", "seed"),
        minutes=1,
        seconds=0.6,
    ),
    Measurement(
        "values",
        "Values",
        ("A10", "A11", "A14", "A15", "A75"),
        values.findings,
    ),
    Measurement(
        "value_ranks",
        "Values: ranks and probabilities",
        ("A12", "A13"),
        value_ranks.findings,
        ("value_ranks",),
        measured=True,
        decoders=_FOLLOWS,
        uses=("seed",),
        minutes=1,
    ),
    Measurement(
        "weights",
        "Weights alone: what neurons read and write",
        ("A80",),
        weights.findings,
        ("neuron_weights",),
        measured=True,
        uses=("seed",),
        minutes=2,
    ),
    Measurement(
        "lens",
        "The tuned lens: what a residual will have become",
        ("A21", "A22"),
        tuned_lens.findings,
        ("tuned_lens", "lens_readings"),
        measured=True,
        decoders=_FOLLOWS,
        uses=("positions", "longest", "seed"),
        minutes=1,
        seconds=0.06,
    ),
    Measurement(
        "composition",
        "Within a layer: memories and what they add up to",
        ("A16", "A18", "A19", "A27", "A29"),
        composition.findings,
        ("refinement", "refinement_examples"),
        decoders=_FOLLOWS,
    ),
    Measurement(
        "refinement",
        "From layer to layer: how a prediction is refined",
        ("A20", "A21", "A22", "A23", "A24", "A25"),
        refinement.findings,
        ("refinement", "refinement_examples"),
        measured=True,
        decoders=_FOLLOWS,
        uses=("positions", "longest", "seed", "shuffled"),
        passes=1,
        minutes=1,
        seconds=0.1,
    ),
    Measurement(
        "contributions",
        "Contributions to predictions",
        ("A36", "A37", "A38", "A39", "A40", "A41", "A44", "A45", "A46", "A47", "A48", "A65"),
        contributions.findings,
        CONTRIBUTIONS,
        measured=True,
        decoders=_CONTRIBUTES,
        uses=("seed", "sentences", "longest"),
        minutes=1,
        seconds=2,
    ),
    Measurement(
        "crosslayer",
        "What switches neurons on",
        ("A43", "A49", "A58", "A59", "A60", "A61", "A62", "A63", "A64"),
        crosslayer.findings,
        CONTRIBUTIONS,
        decoders=_CONTRIBUTES,
    ),
    Measurement(
        "questions",
        "The rank of the answer",
        ("A66", "A76"),
        questions.findings,
        ("question_ranks",),
        measured=True,
        decoders=_FOLLOWS,
        uses=("seed", "questions"),
        minutes=1,
    ),
    Measurement(
        "cases",
        "Cases: what tells the answer from its neighbours",
        ("A50", "A51", "A52", "A53", "A54", "A55", "A56", "A57", "A79"),
        cases.findings,
        CASES,
        measured=True,
        decoders=_CONTRIBUTES,
        uses=("seed", "questions", "cases"),
        minutes=0.5,
        seconds=4,
    ),
    Measurement(
        "distributions",
        "Whole distributions",
        ("A69", "A70", "A71", "A72"),
        distributions.findings,
    ),
)


def choose(names: str | None) -> tuple[Measurement, ...]:
    """Measurements by their names, separated by commas, and those that measure their tables; all if None.

    `QueryError` if there is none such.
    """
    if names is None:
        return CATALOGUE
    known = {measurement.name: measurement for measurement in CATALOGUE}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if odd := [name for name in wanted if name not in known] or ([""] if not wanted else []):
        raise QueryError(f"choosing measurements: there is no {odd[0]!r}; choose among {', '.join(known)}")
    tables = {table for name in wanted for table in known[name].tables}
    return tuple(m for m in CATALOGUE if m.name in wanted or (m.measured and tables & set(m.tables)))


def listed(run: Run | None, sizes: Sizes, only: str | None = None) -> list[dict[str, Any]]:
    """Each measurement's name, title, items, cost, the tables that it adds, and its state in a run (``ready`` ...)."""
    facts = ("name", "title", "items", "minutes", "passes", "seconds")
    return [
        {name: getattr(measurement, name) for name in facts}
        | {"adds": list(measurement.tables), "state": measurement.state(run, sizes)}
        for measurement in choose(only)
    ]


def headed(sections: tuple[Section, ...], whole: bool = True) -> tuple[Section, ...]:
    """Those of a whole study with the headline before them, where anything of it was measured."""
    head = headline.section(sections) if whole else None
    return sections if head is None or not head.findings else (head, *sections)


def compare(
    *runs: Run,
    only: str | None = None,
    weights: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> StudyReport:
    """The study's findings of several runs, in their order, and how stable each neuron's triggers are from each to the
    next; of more than two, the middle of each figure run by run as well.

    only     measurements by name, with commas between; all if None
    weights  load the models, and say of each neuron what changed in its vectors and its coefficients
    report   is told before each measurement how far it is

    `QueryError` for fewer than two runs.
    """
    if len(runs) < 2:
        raise QueryError(f"comparing runs: {len(runs) or 'none'} was given; give two or more, in their order")
    paths = [run.path for run in runs]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{number}: {path}" for number, path in enumerate(paths, 1)]
    tell, chosen = report or (lambda step: None), choose(only)
    steps = 1 + len(chosen)
    sections: list[Section] = []
    comparison: tuple[Finding, ...] = ()
    lost = ""
    tell(Progress("comparing", 0, steps, "measurements"))
    try:
        comparison = tuple(stability.along(names, runs))
        if weights:
            from mnemoscope.studies.measures.changes import changes

            comparison += tuple(changed.findings(names, runs, changes(runs, report=report)))
    except QueryError as error:
        lost = str(error)
    sections.append(Section("stability", "Are they the same neurons?", comparison, lost))
    for number, measurement in enumerate(chosen, 1):
        tell(Progress("comparing", number, steps, "measurements"))
        every = [measurement.section(run) for run in runs]
        missing = zip(names, (section.missing for section in every), strict=True)
        lost = "; ".join(f"{name}: {text}" for name, text in missing if text)
        found = [section.findings for section in every]
        joined = stability.side_by_side(names, found)
        if len(runs) > 2 and (moved := timeline(measurement.name, measurement.title, names, found)):
            joined.append(moved)
        sections.append(Section(measurement.name, measurement.title, tuple(joined), lost))
    tell(Progress("comparing", steps, steps, "measurements"))
    title = f"{', '.join(names[:-1])} and {names[-1]}"
    return StudyReport(tuple(runs), tuple(sections), title)
