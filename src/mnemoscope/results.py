"""Answers that are made of several analyses: what a command prints, as one value that shows itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mnemoscope.display import Shown

if TYPE_CHECKING:
    import polars as pl

    from mnemoscope.neuron.card import NeuronCard
    from mnemoscope.neuron.claims import Claim
    from mnemoscope.neuron.striking import Pick
    from mnemoscope.patterns.labels import LabelCheck
    from mnemoscope.patterns.summary import Summary
    from mnemoscope.records import NeuronId
    from mnemoscope.run.reading import Run
    from mnemoscope.studies.findings.finding import Finding, Item, Section


@dataclass(frozen=True, repr=False)
class Highlights(Shown):
    """A few neurons of a run to look at first: why each was chosen, and its card."""

    run: Run
    picks: tuple[Pick, ...]
    cards: tuple[NeuronCard, ...]

    def to_dict(self) -> dict[str, Any]:
        """The neurons, each with its reason, as JSON-ready values."""
        pairs = zip(self.picks, self.cards, strict=True)
        return {"neurons": [pick.to_dict() | card.to_dict() for pick, card in pairs]}


@dataclass(frozen=True, repr=False)
class BuildPrice(Shown):
    """What a build would take, from a few seconds of it; see `mine.price`.

    random     whether the weights are not here and what was tried had random ones; `weights` are their bytes
    tokens     of the text, with contexts and shards; open_end, whether there is more of it than was counted
    seconds    by stage, one after another, on so many devices; empty where nothing of the model fits to be tried
    divided    stages that devices share, and how many of these have something to do
    memory     bytes by what holds them, on one machine; `peak` is the most at once
    on_device  bytes on an accelerator; empty on a CPU
    rows, disk of each table rows and bytes; `work` is the most that is there while it is built
    lacking    what does not fit, and what to do, in sentences
    measured   seconds that measuring took
    """

    model: str
    corpus: str
    device: str
    devices: int
    dtype: str
    random: bool
    neurons: int
    weights: int
    tokens: int
    open_end: bool
    contexts: int
    shards: int
    seconds: Mapping[str, float]
    divided: Mapping[str, int]
    memory: Mapping[str, int]
    on_device: Mapping[str, int]
    peak: int
    rows: Mapping[str, int]
    disk: Mapping[str, int]
    work: int
    lacking: tuple[str, ...]
    measured: float

    @property
    def longest(self) -> str | None:
        """The stage that takes longest."""
        return max(self.seconds, key=lambda stage: self.seconds[stage], default=None)

    @property
    def undivided(self) -> float:
        """Seconds that no number of devices shortens."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage not in self.divided)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, and what the properties say of them."""
        return asdict(self) | {"longest": self.longest, "undivided": self.undivided}


@dataclass(frozen=True, repr=False)
class PatternReport(Shown):
    """What the patterns of a run amount to.

    summary  how many neurons have a pattern beyond each null, and which are clearest
    labels   the outside check by topics of the documents, None where the text has none
    clearest, silent  cards of `summary.clearest` and `summary.silent`
    """

    summary: Summary
    labels: LabelCheck | None
    clearest: tuple[NeuronCard, ...]
    silent: tuple[NeuronCard, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary and the check as JSON-ready values."""
        return self.summary.to_dict() | {"labels": self.labels.to_dict() if self.labels else None}


@dataclass(frozen=True, repr=False)
class ClaimTest(Shown):
    """Your own claim about a neuron, tested both ways; see `Claim` for the figures."""

    neuron: NeuronId
    claim: Claim

    def to_dict(self) -> dict[str, Any]:
        """The address as `id`, and the fields of the claim."""
        return {"id": str(self.neuron), **asdict(self.claim)}


@dataclass(frozen=True, repr=False)
class Annotated(Shown):
    """What one annotator said of the prefixes of one neuron; `rows` is a polars frame, strongest trigger first."""

    neuron: NeuronId
    annotator: str
    rows: pl.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """The rows as JSON-ready values."""
        return {"neuron": str(self.neuron), "annotator": self.annotator, "rows": self.rows.to_dicts()}


@dataclass(frozen=True, repr=False)
class StudyReport(Shown):
    """The findings of one run, or of several that are compared, by measurement.

    runs      one, or several in their order
    sections  what was asked for; `whole` makes those of the page, where these are more
    title     of the page
    skipped   why a measurement was left out, by its name
    items     what the page's list of analyses holds
    """

    runs: tuple[Run, ...]
    sections: tuple[Section, ...]
    title: str = ""
    whole: Callable[[], tuple[Section, ...]] | None = field(default=None, compare=False)
    skipped: Mapping[str, str] = field(default_factory=dict)
    items: Sequence[Item] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, in the order of the sections."""
        return tuple(finding for section in self.sections for finding in section.findings)

    def to_dict(self) -> dict[str, Any]:
        """All findings as JSON-ready values."""
        return {"findings": [finding.to_dict() for finding in self.findings]}


@dataclass(frozen=True, repr=False)
class ModelFacts(Shown):
    """What is known of a model that was taken apart: `facts` by name, the self-check among them."""

    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def to_dict(self) -> dict[str, Any]:
        """The facts."""
        return dict(self.facts)


@dataclass(frozen=True)
class Check:
    """One comparison: how much was compared, how much differed beyond the tolerance, and the largest difference."""

    name: str
    compared: int
    differing: int
    largest: float  # relative
    note: str = ""


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """What `verify` found; `identical` when every number came out the same bit for bit."""

    run: str
    shard: int
    seed: int
    tolerance: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Nothing differs beyond the tolerance."""
        return not any(check.differing for check in self.checks)

    @property
    def identical(self) -> bool:
        """Nothing differs at all."""
        return self.passed and not any(check.largest for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"passed": self.passed, "identical": self.identical}
