"""A run and what can be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from mnemoscope.arguments import (
    check_budget,
    check_least,
    check_removal,
    check_sign,
    check_study,
    check_verification,
)
from mnemoscope.display import Report
from mnemoscope.errors import QueryError
from mnemoscope.files import expanded
from mnemoscope.records import NeuronId, Progress
from mnemoscope.results import ClaimTest, Highlights, PatternReport, StudyReport, Verification
from mnemoscope.run.reading import Run as StoredRun
from mnemoscope.run.reading import open_run as open_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mnemoscope.annotation.sheet import Written
    from mnemoscope.atlas.serving import Atlas
    from mnemoscope.model.model import Model
    from mnemoscope.neuron.card import NeuronCard
    from mnemoscope.neuron.find import Hits
    from mnemoscope.patterns.pattern import Pattern
    from mnemoscope.prediction.explanation import Explanation
    from mnemoscope.prediction.steered import Steered
    from mnemoscope.studies.findings.removal import Removal
    from mnemoscope.studies.measures.positions import Sizes
    from mnemoscope.tracing.relatives import Relatives
    from mnemoscope.tracing.traced import Trace

    Address: TypeAlias = str | tuple[int, int]
    ModelSource: TypeAlias = Model | PreTrainedModel | str | Path

QUESTIONS = ("promotes", "suppresses", "trigger", "pattern", "like", "tested")
_SIGNS = {1: "+", -1: "-"}


class Run(StoredRun):
    """A finished run, and what can be asked of it.

    `table`, `rows` and `sql` read the tables; the other methods answer questions. Those that need the model load the
    one that the run was built from (`model`), unless another place of the same weights is given as ``model=``. What
    they find is kept in the run where the command of the same name keeps it.
    """

    _model: Model | None = None
    _atlas: Atlas | None = None

    @classmethod
    def of(cls, run: StoredRun) -> Run:
        """The same run with these methods."""
        return run if isinstance(run, cls) else cls(run.path, run.manifest, run.place)

    @property
    def model(self) -> Model:
        """The model that the run was built from, loaded on first use in the run's dtype and kept."""
        if self._model is None:
            self._model = self.load_model()
        return self._model

    def load_model(self, source: ModelSource | None = None, **loading: Any) -> Model:
        """Load the run's model, or `source` as the run needs it; keywords as in `load_model`.

        Whether the weights are the run's is checked by whatever uses them (`RunMismatch`).
        """
        from mnemoscope.model.load import load_built

        return load_built(self, source, **loading)

    def _loaded(self, source: ModelSource | None) -> Model:
        return self.model if source is None else self.load_model(source)

    # -- reading: no model ------------------------------------------------------------------------------------

    def __getitem__(self, address: str | tuple[int, int]) -> NeuronCard:
        return self.neuron(address)

    def neuron(
        self,
        address: int | str | tuple[int, int],
        neuron: int | None = None,
        *,
        examples: int = 50,
        window: tuple[int, int] = (64, 32),
    ) -> NeuronCard:
        """The card of one neuron: ``"L24N1005"``, ``(24, 1005)``, or layer and neuron apart; ``run["L24N1005"]``.

        examples  triggers of each polarity that are decoded
        window    tokens of text to keep before and after the active token

        `QueryError` if it is no address, or out of range.
        """
        from mnemoscope.neuron.card import card

        return card(self, self._address(address, neuron), examples=examples, window=window)

    def _address(self, address: int | str | tuple[int, int], neuron: int | None = None) -> NeuronId:
        if isinstance(address, str) and neuron is None:
            return self.parse(address)
        pair = address if neuron is None else (address, neuron)
        match pair:
            case (Integral() as layer, Integral() as index):
                return self.address(int(layer), int(index))
        raise QueryError(f'looking up a neuron: {pair!r} was given; give "L13N366", (13, 366), or 13, 366')

    def find(
        self,
        *,
        promotes: str | None = None,
        suppresses: str | None = None,
        trigger: str | None = None,
        pattern: str | None = None,
        like: str | None = None,
        tested: bool = False,
        sort: str | None = None,
        ascending: bool = False,
        layer: int | None = None,
        count: int = 20,
    ) -> Hits:
        """Neurons by one question, with what chance would find beside them; ``.rows`` is a polars frame.

        promotes, suppresses  a token (spaces count) among those that the value raises or lowers most
        trigger               text that triggers end at or overlap
        pattern               part of the name of a tested pattern, in a run that has some (`patterns`)
        like                  a neuron's address: those that share triggers with it
        tested                neurons whose tested pattern has a verdict, clearest first
        sort                  a statistic: a numeric column of the table `neurons`; smallest first if `ascending`.
                              It orders all neurons, or the hits of another question
        layer                 only this one, 0-based
        count                 rows, at most

        `QueryError` for none or several questions, or one that the run cannot answer.
        """
        from mnemoscope.neuron import find

        sought = (promotes, suppresses, trigger, pattern, like, tested or None)
        asked = {name: ask for name, ask in zip(QUESTIONS, sought, strict=True) if ask is not None}
        check_least("finding neurons", 0, count=count)
        if len(asked) > 1 or not (asked or sort is not None):
            raise QueryError(
                f"finding neurons: {len(asked)} questions were asked; ask exactly one of "
                f"{', '.join(f'{{{name}}}' for name in QUESTIONS)}, or {{sort}} alone or beside it",
                **dict.fromkeys((*QUESTIONS, "sort"), ...),
            )
        if ascending and sort is None:
            raise QueryError(
                "finding neurons: {ascending} is for {sort}; leave it out", ascending=True, sort=...
            )
        order: dict[str, Any] = {"descending": not ascending, "layer": layer, "count": count}
        if not asked:
            return find.sort(self, str(sort), **order)
        ((name, ask),) = asked.items()
        most = count if sort is None else find.ALL
        hits: Hits = getattr(find, name)(self, *(() if ask is True else (ask,)), layer=layer, count=most)
        return hits if sort is None else find.reorder(self, hits, sort, **order)

    def highlights(self, count: int = 6) -> Highlights:
        """A few neurons to look at first, each chosen for a stated reason (`mnemoscope.neuron.striking`)."""
        from mnemoscope.neuron import striking

        picks = striking.Striking(self).handful(count)
        return Highlights(self, picks, tuple(self.neuron(pick.id) for pick in picks))

    def gallery(self, path: str | Path, *, neurons_per_layer: int = 6, report: Report | None = None) -> Path:
        """Write the gallery, one page that opens without a network; returns its path. `RunError` if it cannot."""
        from mnemoscope.views import gallery

        return gallery.write(self, path, neurons_per_layer=neurons_per_layer, progress=report)

    def atlas(self, neuron: Address | None = None) -> Atlas:
        """The run in the browser, served by a thread of this process: a notebook shows the page as a frame.

        neuron  whose page is shown; the first page if None

        `RunError` if the packages that a server needs are missing (``mnemoscope[web]``).
        """
        address = None if neuron is None else self._address(neuron)
        if self._atlas is None or self._atlas.server.should_exit:
            from mnemoscope.atlas.serving import in_thread

            self._atlas = in_thread(self)
        return self._atlas if address is None else self._atlas.at("neurons", str(address))

    def compare(
        self,
        *others: StoredRun | str | Path,
        only: str | None = None,
        weights: bool = False,
        report: Report | None = None,
    ) -> StudyReport:
        """This run beside others; see `compare`."""
        from mnemoscope.studies.catalogue import compare

        opened = [other if isinstance(other, StoredRun) else open_stored(other) for other in others]
        return compare(self, *opened, only=only, weights=weights, report=report)

    def annotate(
        self, path: str | Path, *, neurons: int = 40, prefixes: int = 25, seed: int | None = None
    ) -> Written:
        """Write a blinded sheet for people to fill in, and beside it its sealed key; see `score`.

        neurons   besides them, three in eleven items are hidden nulls
        prefixes  to annotate for each item; as many again to apply the patterns to
        seed      which neurons and prefixes; drawn if None

        `SheetError` if there is such a sheet already.
        """
        from mnemoscope.annotation.sheet import write

        return write(self, expanded(path), neurons=neurons, prefixes=prefixes, seed=seed)

    # -- with the model -----------------------------------------------------------------------------------------

    def explain(
        self, prompt: str, target: str | None = None, foils: str | Sequence[str] = (), **options: Any
    ) -> Explanation:
        """Explain a prediction of the run's model, with the triggers of this run beside it; see `explain`."""
        from mnemoscope.prediction.explain import explain

        return explain(self.model, prompt, target, foils, **{"run": self} | options)

    def trace(
        self,
        text: str = "",
        neuron: Address | Sequence[Address] | None = None,
        *,
        context: int | None = None,
        decoder_prompt: str = "",
        top: int = 5,
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> Trace:
        """How neurons see a text of your own: given ones along it, or the most unusual ones of each of its tokens.

        context  instead of a text: the number of one of the run's
        neuron  one address or several, as in `neuron`; None for the most unusual by the run's own distributions
        top     how many of these
        decoder_prompt  of an encoder-decoder: what its decoder has written so far; without it the encoder alone is told

        `QueryError` for a text without two tokens or longer than the model reads, and for an address that is none.
        """
        wanted = [self._address(address) for address in addresses(neuron)]
        options: dict[str, Any] = {"decoder_prompt": decoder_prompt, "top": top, "report": report}
        if context is not None:
            if text or decoder_prompt:
                raise QueryError(
                    "tracing a text: {context} is one of the run's own; leave out the other text",
                    context=context,
                )
            options["tokens"] = self.contexts([context])[context].tokens.tolist()
            text = "".join(self.vocabulary.pieces(options["tokens"]))
        from mnemoscope.tracing.trace import trace

        return trace(self._loaded(model), text, run=self, neurons=wanted, **options)

    def shaded(
        self,
        neuron: Address,
        *,
        examples: int = 12,
        window: tuple[int, int] = (48, 16),
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> NeuronCard:
        """The card of a neuron with the coefficient of every token of its examples, which the model reads again;
        `examples` and `window` as in `neuron`.

        `QueryError` for a mixture, an encoder-decoder, and units that are not neurons.
        """
        from mnemoscope.exchange import shaded

        shaded.check(self)
        card = self.neuron(self._address(neuron), examples=examples, window=window)
        return shaded.shaded(self, card, self._loaded(model), report)

    def related(
        self,
        neuron: Address,
        *,
        count: int = 10,
        seed: int = 0,
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> Relatives:
        """Neurons that are near to one by their weights: by value, by key, and those before and after it.

        count  of each list
        seed   of the other neurons and the random directions from which the same is looked for

        `QueryError` for units that are not neurons. See `find(like=...)` for those with the same triggers.
        """
        address = self._address(neuron)
        check_least("looking for relatives", 1, count=count)
        self.check_neurons("looking for relatives in")
        from mnemoscope.tracing.related import related

        return related(self._loaded(model), self, address, count=count, seed=seed, report=report)

    def export(
        self,
        path: str | Path,
        to: str,
        *,
        neurons: Address | Sequence[Address] | None = None,
        layers: int | Sequence[int] = (),
        prompt: str | None = None,
        target: str | None = None,
        foils: str | Sequence[str] = (),
        limit: int | None = None,
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> Path:
        """Write neurons in a format of another tool, with a README, into a new folder; docs/exchange.md. Its path.

        to       ``neuronpedia``, ``openai``, ``delphi``, ``circuitsvis``, or ``graph``, which is of one prediction
        neurons  addresses as in `neuron`; with `layers` all neurons of these too; the highlights if neither is given
        prompt   of a graph: the text before the prediction; `target` and `foils` as in `explain`
        limit    tokens of the run's text that delphi's cache holds; 100,000 if None

        The model is read for what a run does not keep: the coefficients of the tokens around triggers.
        `QueryError` for what the format or the run cannot give, `RunError` for a folder that holds something.
        """
        from mnemoscope.exchange import export

        made = export.order(
            self,
            to,
            path,
            neurons=[self._address(address) for address in addresses(neurons)],
            layers=[layers] if isinstance(layers, int) else layers,
            prompt=prompt,
            target=target,
            foils=[foils] if isinstance(foils, str) else foils,
            limit=limit,
        )
        return export.export(made, self._loaded(model), path, report)

    def steer(
        self,
        prompt: str,
        neuron: Address,
        *,
        factor: float = 0.0,
        value: float = 0.0,
        length: int = 24,
        seed: int = 0,
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> Steered:
        """What the model writes behind a prompt with a neuron changed, beside what it writes as it is.

        factor, value  at every position the coefficient becomes ``factor`` times what it was, plus ``value``: as they
                       are, the neuron is removed
        length         tokens that are written, at most
        seed           of another neuron of the layer, which is changed alike, to compare with

        `QueryError` for a question without an answer, `ModelNotSupported` for a model that does not go on with a text.
        """
        address = self._address(neuron)
        from mnemoscope.prediction.steer import steer

        change = {"factor": float(factor), "value": float(value)}
        options: dict[str, Any] = change | {"length": length, "seed": seed}
        loaded = self._loaded(model)
        loaded.check_built(self, "steering by")
        return steer(loaded, prompt, address, **options, report=report)

    def patterns(
        self,
        *,
        budget: int | None = None,
        seed: int = 0,
        count: int = 10,
        cards: int = 0,
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> PatternReport:
        """What every neuron detects, tested both ways on held-out text and against nulls; kept in the run.

        budget  tokens of each half of the documents that the model reads
        seed    of what is drawn at random
        count   of the clearest neurons that are named
        cards   of these, and of some without a pattern, that are shown with examples

        The model is not loaded for what the run has already. `PatternError` if the text is too small.
        """
        from mnemoscope.trials import job

        settings = job.Settings(job.BUDGET if budget is None else budget, seed)
        if not job.known(self, settings):
            job.patterns(self, self._loaded(model), settings, report=report)
            self.reopen()
        return self.pattern_report(count=count, cards=cards)

    def pattern_report(self, *, count: int = 10, cards: int = 0) -> PatternReport:
        """What the patterns that the run has amount to; `QueryError` if it has none (see `patterns`)."""
        from mnemoscope.patterns import labels
        from mnemoscope.patterns.summary import summary

        check_least("showing neurons", 0, count=count, cards=cards)
        known = summary(self, count=count)
        clearest, silent = (
            tuple(self.neuron(address, examples=examples, window=(16, 4)) for address in chosen[:cards])
            for chosen, examples in ((known.clearest, 4), (known.silent, 3))
        )
        return PatternReport(known, labels.check(self), clearest, silent)

    def test(
        self,
        neuron: str | tuple[int, int],
        pattern: str | Pattern,
        *,
        sign: str | int | None = None,
        budget: int = 16_384,
        seed: int = 0,
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> ClaimTest:
        """Your own claim about a neuron, tested both ways on text that was not used to find it.

        pattern  ``year``, ``regex:...``, ``words:may,june``, ``file:PATH`` ..., or a `Pattern`
        sign     ``"+"`` (or 1), ``"-"`` (or -1); else whichever fits the pattern better
        budget   tokens of each half of the documents that the model reads
        seed     which documents

        `PatternError` if the pattern cannot be read or tested on this text.
        """
        from mnemoscope.patterns import language
        from mnemoscope.patterns.pattern import parse

        address, wanted = self._address(neuron), language.check(parse(pattern))  # before the model is loaded
        polarity = check_sign(sign if isinstance(sign, str | None) else _SIGNS.get(sign, str(sign)))
        check_budget(budget, seed)
        from mnemoscope.trials.hypothesis import test

        options: dict[str, Any] = {"polarity": polarity, "budget": budget, "seed": seed, "report": report}
        return ClaimTest(address, test(self, self._loaded(model), address, wanted, **options))

    def removal(
        self,
        *,
        documents: int = 200,
        per_layer: int = 1000,
        triggers: int = 10,
        seed: int = 0,
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> Removal:
        """What triggers lose with their first, their last or a random token; kept in the run.

        documents  how many are sampled
        per_layer  triggers tested in each layer, at most
        triggers   only the strongest of each neuron and polarity
        seed       which documents, triggers and tokens
        """
        from mnemoscope.studies.findings.removal import removal

        self.check_neurons("removing tokens from triggers of")
        check_removal(documents, per_layer, triggers, seed)
        from mnemoscope.studies.measures.removal import add

        sizes = {"documents": documents, "per_layer": per_layer, "triggers": triggers, "seed": seed}
        add(self, self._loaded(model), **sizes, report=report)
        self.reopen()
        return removal(self)

    def verify(
        self,
        *,
        sample: int = 500,
        seed: int = 0,
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> Verification:
        """Recompute stored coefficients, moments and values from the model; ``.passed`` says whether they agree.

        sample  neurons whose values are read again
        seed    which neurons, and which shard of the text
        """
        check_verification(sample, seed)
        from mnemoscope.mine.verify import verify

        return verify(self, self._loaded(model), sample=sample, seed=seed, report=report)

    def measurements(self, sizes: Sizes | None = None, *, only: str | None = None) -> list[dict[str, Any]]:
        """What the study measures, and how much of it this run has; see `measurements`."""
        from mnemoscope.studies import catalogue

        return catalogue.listed(self, sizes or study_sizes(), only)

    def measured(self, only: str) -> StudyReport:
        """The findings of what the run has of one measurement (`measurements`), or of the headline: nothing is
        measured, no model is loaded. `QueryError` if there is no such measurement."""
        from mnemoscope.studies import catalogue

        if only == catalogue.HEADLINE:
            sections = catalogue.headed(tuple(each.section(self) for each in catalogue.CATALOGUE))[:1]
            return StudyReport((self,), sections if sections[0].name == only else ())
        return StudyReport(
            (self,), tuple(each.section(self) for each in catalogue.choose(only) if each.name == only)
        )

    def study(
        self,
        *,
        only: str | None = None,
        fast: bool = False,
        positions: int | None = None,
        sentences: int | None = None,
        seed: int = 0,
        shuffled: bool = False,
        questions: Sequence[str | Path] = (),
        model: ModelSource | None = None,
        report: Report | None = None,
    ) -> StudyReport:
        """Measure what the run lacks of the study, and keep it; ``.save("report.html")`` writes the page.

        only       measurements by name (`measurements`), with commas between; all if None. The page shows all that the
                   run has
        fast       small samples, for a first look
        positions  prefixes of refinement and composition; `sentences` of the contributions
        shuffled   refinement and composition also of a copy of the model whose weights are shuffled
        questions  jsonl files of subject, prompt, answer, label

        The model is not loaded for what the run has already. What there is too little text for is in ``.skipped``.
        """
        from mnemoscope.studies import catalogue
        from mnemoscope.studies.findings.finding import items

        self.check_neurons("studying")
        chosen = catalogue.choose(only)
        sizes = study_sizes(fast, positions, sentences, seed, shuffled, questions)
        skipped: dict[str, str] = {}
        if any(each.lacks(self, sizes) for each in chosen):
            from mnemoscope.studies.run import measure

            def skip(measurement: catalogue.Measurement, error: QueryError) -> None:
                name = measurement.name
                skipped[name] = str(error)
                if report:
                    report(Progress(name, 0, 0, "", note=f"{name} was left out: {error}"))

            measure(self, self._loaded(model), chosen=chosen, sizes=sizes, report=report, skip=skip)
            self.reopen()
        section = cache(
            lambda measurement: measurement.section(self)
        )  # of what was asked for, the page has the same
        return StudyReport(
            runs=(self,),
            sections=catalogue.headed(tuple(map(section, chosen)), only is None),
            whole=lambda: catalogue.headed(tuple(map(section, catalogue.CATALOGUE))),
            skipped=skipped,
            items=items(),
        )


def study_sizes(
    fast: bool = False,
    positions: int | None = None,
    sentences: int | None = None,
    seed: int = 0,
    shuffled: bool = False,
    questions: Sequence[str | Path] = (),
) -> Sizes:
    """How much a study reads; arguments as in `Run.study`."""
    from mnemoscope.studies.measures.positions import Sizes

    check_study(positions, sentences, seed)
    sizes = Sizes(seed=seed, questions=tuple(map(expanded, questions)), shuffled=shuffled)
    sizes = sizes.fast() if fast else sizes
    return replace(sizes, positions=positions or sizes.positions, sentences=sentences or sizes.sentences)


def addresses(neurons: Address | Sequence[Address] | None) -> list[Address]:
    """One address, several or none, as a list."""
    match neurons:
        case None:
            return []
        case str() | (Integral(), Integral()):
            return [cast("Address", neurons)]
    return list(cast("Sequence[Address]", neurons))
