"""One neuron of a run as a card: everything a reader is shown of it, as frozen plain values.

The terminal, the notebook and the page all draw this card and nothing else, so that the three agree.

With as many triggers of either sign, the usual one is the sign whose weakest stored trigger is the stronger; of two
that are alike, +.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import polars as pl

from mnemoscope.display import Shown
from mnemoscope.neuron.claims import ADDRESS, Claim, claims, has_patterns, within
from mnemoscope.records import ExpertNeuronId, NeuronId
from mnemoscope.run.places import BY_PLACE

if TYPE_CHECKING:
    from mnemoscope.run.places import ByPlace
    from mnemoscope.run.reading import Run

PARTS = 10  # "in between" shows at most one example from each tenth of the range


@dataclass(frozen=True)
class Statistics:
    """The numeric columns of the table `neurons`; the same fields hold the medians over a layer.

    Coefficients are in the model's own unit, entropy in nats, kurtosis is in excess of the normal's;
    None where a value is undefined (skewness and kurtosis of a constant, `up_norm` without a gate).
    """

    tokens: float | None
    mean: float | None
    std: float | None
    skewness: float | None
    kurtosis: float | None
    min: float | None
    max: float | None
    positive_fraction: float | None
    value_norm: float | None
    key_norm: float | None
    up_norm: float | None
    value_max_probability: float | None
    value_entropy: float | None


@dataclass(frozen=True)
class ValueToken:
    """A token as the neuron's value scores it, read through the run's lens at coefficient +1 (A10)."""

    id: int
    text: str
    logit: float
    probability: float


@dataclass(frozen=True)
class KeyToken:
    """A token and the coefficient that its bare input embedding gives, as if it stood in layer 0."""

    id: int
    text: str
    coefficient: float


@dataclass(frozen=True)
class Example:
    """One prefix: the coefficient at its last token (`active`), with the text on both sides.

    Of an encoder a position in a whole context, on which all of the text bears (`whole`).

    position  0-based in the context; `offset` is the context's first token within its document
    before, after  one string a token, line breaks and control characters made visible, cut to a window;
                   `left_out` counts the tokens cut on each side
    next_token  the token that follows, None at the end of the context
    gate, up  signs of the two branches of a gated neuron, else None
    router_weight  of a trigger in an expert: what the router multiplies the coefficient with
    around  coefficients of `before`, `active` and `after`, where a model read them again (`Run.shaded`)
    """

    coefficient: float
    context: int
    position: int
    document: int
    offset: int
    title: str
    before: tuple[str, ...]
    active: str
    after: tuple[str, ...]
    next_token: str | None
    left_out: tuple[int, int]
    gate: int | None = None
    up: int | None = None
    whole: bool = False  # of an encoder, which had read what follows as well
    router_weight: float | None = None
    around: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Side:
    """The triggers of one polarity, strongest first.

    stored      how many the run keeps; `examples` may show fewer
    threshold   the weakest stored coefficient: the neuron exceeds it in no other context, if the list is full
    quadrants   how many of the stored have gate and up (+,+), (+,-), (-,+), (-,-); None without a gate
    """

    polarity: int
    stored: int
    threshold: float | None
    quadrants: tuple[int, int, int, int] | None
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Histogram:
    """Counts between signed, logarithmically spaced edges, cut to the bins that are not empty."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]  # one more than counts

    @property
    def total(self) -> int:
        """How many coefficients were counted."""
        return sum(self.counts)


@dataclass(frozen=True)
class UnitNote:
    """What a unit is that is no neuron, and how well those of its layer rebuild what they stand for.

    source     as it was given to the build; `kind` one of `UNIT_KINDS`
    name       of the unit, if it has one
    reads      one of `UNIT_POINTS`, and so `writes`
    explained  share of the variance; None of directions, which are not meant to rebuild anything
    active     how many units of the layer are not 0 on a token, on average
    """

    source: str
    kind: str
    name: str | None
    reads: str
    writes: str
    explained: float | None
    active: float | None


@dataclass(frozen=True, repr=False)
class NeuronCard(Shown):
    """All that a reader is shown of one neuron; see the fields of its parts for units."""

    layer: int
    neuron: int
    model: str
    layers: int
    neurons: int  # per layer
    vocabulary: int
    gated: bool
    activation: str
    lens: str
    corpus: str
    state: str | None  # "dead", "constant", "never positive", "never negative", or None
    statistics: Statistics
    layer_median: Statistics
    histogram: Histogram
    promoted: tuple[ValueToken, ...]  # by the value itself: written when the coefficient is positive
    suppressed: tuple[ValueToken, ...]
    key_positive: tuple[KeyToken, ...]
    key_negative: tuple[KeyToken, ...]
    positive: Side
    negative: Side
    between: tuple[Example, ...]
    command: str
    claims: tuple[Claim, ...] | None = None  # tested patterns; None when none were looked for
    spelling: str = ""  # in what the text of the run differs from the text that was read; empty if in nothing
    readout: str = (
        "head"  # through what the value is read: that, or the "input embedding" where there is none
    )
    stack: str | None = None  # of an encoder-decoder: encoder or decoder
    experts: tuple[int, int] | None = (
        None  # of its layer: how many, and neurons of one; None in a dense layer
    )
    routed: float | None = None  # share of the counted tokens that its expert ran on
    router_weight: float | None = None  # mean over these of what the router multiplies it with
    unit: UnitNote | None = None  # what it is, if it is no neuron
    python: str = ""  # what `command` shows, as an expression

    @property
    def id(self) -> NeuronId:
        """The address of the neuron."""
        return self._id(self.neuron)

    def _id(self, neuron: int) -> NeuronId:
        if self.experts is None:
            return NeuronId(self.layer, neuron)
        return ExpertNeuronId.of(self.layer, neuron, self.experts)

    @property
    def previous(self) -> NeuronId | None:
        """The neuron before it in the layer, None for the first."""
        return self._id(self.neuron - 1) if self.neuron > 0 else None

    @property
    def next(self) -> NeuronId | None:
        """The neuron after it in the layer, None for the last."""
        return self._id(self.neuron + 1) if self.neuron + 1 < self.neurons else None

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both polarities, the leading one first: with more triggers, or of as many, with stronger ones.

        Judged by the weakest stored trigger, since a lone outlier says little of what a neuron does.
        """
        weight = [(side.stored, abs(side.threshold or 0.0)) for side in (self.positive, self.negative)]
        return (self.positive, self.negative) if weight[0] >= weight[1] else (self.negative, self.positive)

    def writes(self, polarity: int) -> tuple[ValueToken, ...]:
        """The tokens that a coefficient of this sign raises."""
        return self.promoted if polarity > 0 else self.suppressed

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON-ready values."""
        return {"id": str(self.id), **asdict(self)}


def card(
    run: Run, address: tuple[int, int], *, examples: int = 50, window: tuple[int, int] = (64, 32)
) -> NeuronCard:
    """Read one neuron of a run.

    address   a `NeuronId`, or (layer, neuron)
    examples  how many triggers of each polarity to decode; `Side.stored` still counts them all
    window    tokens of text to keep before and after the active token

    `QueryError` if the layer or the neuron does not exist in the run.
    """
    model, options = run.manifest.model, run.manifest.options
    place = run.address(*address)
    layer, neuron = place
    experts = model.experts[layer] if model.experts and model.experts[layer][0] else None
    row = {name: values[0] for name, values in run.columns("neurons", layer, neuron).items()}
    statistics = Statistics(**{name: row[name] for name in _STATISTICS})
    triggers = _with_weights(run, place, run.columns("triggers", layer, neuron))
    positive, negative = _by_polarity(triggers)
    between = _one_a_part(run.columns("samples", layer, neuron), statistics)
    lists = [_slice(positive, 0, examples), _slice(negative, 0, examples), between]
    reader = _ExampleReader(run, window, lists, model.in_encoder(layer))
    promoted, suppressed = _by_polarity(run.columns("values", layer, neuron))
    return NeuronCard(
        layer=layer,
        neuron=neuron,
        model=model.id,
        layers=model.layers,
        neurons=model.sizes[layer],
        vocabulary=model.vocabulary,
        gated=model.gated,
        activation=_activation(run, layer),
        lens=str(options.get("values_lens", "own")),
        corpus=run.manifest.corpus.id,
        spelling=run.manifest.corpus.spelling,
        readout="input embedding" if layer < model.encoder_layers else model.readout,
        stack=model.stack(layer),
        state=state(statistics.min, statistics.max),
        statistics=statistics,
        layer_median=layer_median(run, layer),
        histogram=_histogram(run, layer, neuron),
        promoted=_value_tokens(run, promoted),
        suppressed=_value_tokens(run, suppressed),
        key_positive=_key_tokens(run, row["key_tokens"], row["key_coefficients"]),
        key_negative=_key_tokens(run, row["key_tokens_negative"], row["key_coefficients_negative"]),
        positive=_side(positive, 1, reader.examples(lists[0])),
        negative=_side(negative, -1, reader.examples(lists[1])),
        between=reader.examples(between),
        command=shlex.join(["mnemoscope", "show", str(run.path), str(place)]),
        python=f'mnemoscope.open_run({str(run.path)!r})["{place}"]',
        experts=experts,
        routed=None if experts is None else row["tokens"] / run.manifest.corpus.counted,
        router_weight=_router_weight(run, place),
        unit=_unit_note(run, place),
        claims=claims(run, layer, neuron) if has_patterns(run) else None,
    )


_Rows: TypeAlias = "dict[str, list[Any]]"  # a list for each column


def _slice(rows: _Rows, start: int, stop: int) -> _Rows:
    return {name: values[start:stop] for name, values in rows.items()}


def _by_polarity(rows: _Rows) -> tuple[_Rows, _Rows]:
    """The rows of +1 and those of -1, by rank: as tables have them, so that a page need not put them in order."""
    first, every = rows["polarity"].count(1), len(rows["polarity"])
    return _slice(rows, 0, first), _slice(rows, first, every)


def _activation(run: Run, layer: int) -> str:
    """The activation function of a layer's units, or of the model's neurons."""
    model = run.manifest.model
    return model.activation if model.units is None else str(_units_row(run, layer)["activation"])


def _units_row(run: Run, layer: int) -> dict[str, Any]:
    return run.table("units").filter(pl.col("layer") == layer).collect().row(0, named=True)


def _unit_note(run: Run, address: NeuronId) -> UnitNote | None:
    entry = run.manifest.model.units
    if entry is None:
        return None
    row = _units_row(run, address.layer)
    names, meant = entry.names.get(str(address.layer)), entry.kind != "directions"
    return UnitNote(
        source=entry.id,
        kind=entry.kind,
        name=names[address.neuron] if names else None,
        reads=row["reads"],
        writes=row["writes"],
        explained=row["explained_variance"] if meant else None,
        active=row["active"],
    )


def _router_weight(run: Run, address: NeuronId) -> float | None:
    """The mean weight of a neuron's expert; None in a dense layer, or where no token was routed to it."""
    if not isinstance(address, ExpertNeuronId):
        return None
    rows = run.table("experts").filter(
        (pl.col("layer") == address.layer) & (pl.col("expert") == address.expert)
    )
    return rows.collect()["router_weight"][0]


def _with_weights(run: Run, address: NeuronId, triggers: _Rows) -> _Rows:
    """Triggers with the router's weight of each, where there was a choice to make."""
    if not isinstance(address, ExpertNeuronId) or "trigger_weights" not in run.manifest.tables:
        return triggers  # a dense layer, or a run from before they were kept
    rows = run.columns("trigger_weights", *address)
    places = zip(rows["polarity"], rows["rank"], strict=True)
    weights = dict(zip(places, rows["router_weight"], strict=True))
    if all(weight == 1 for weight in weights.values()):
        return triggers
    own = zip(triggers["polarity"], triggers["rank"], strict=True)
    return triggers | {"router_weight": [weights.get(place) for place in own]}


def state(low: float | None, high: float | None) -> str | None:
    """What to call a neuron whose coefficients all lie in [low, high], if that is remarkable.

    dead: every counted coefficient is 0. constant: all are equal. Else it may never leave one side of zero;
    neurons that are exactly 0 or above (ReLU) are the rule where they occur, and are not named.
    """
    if low is None or high is None:
        return "not measured"
    if low == high:
        return "dead" if low == 0 else "constant"
    if high <= 0:
        return "never positive"
    return "never negative" if low > 0 else None


def layer_median(run: Run, layer: int) -> Statistics:
    """The median of every statistic over the neurons of a layer: what is usual there."""

    def read() -> Statistics:
        medians = within(run, "neurons", layer).select(pl.col(*_STATISTICS).cast(pl.Float64).median())
        return Statistics(**medians.collect().row(0, named=True))

    return run.once(("median", layer), read)


_STATISTICS = tuple(field.name for field in fields(Statistics))


def _histogram(run: Run, layer: int, neuron: int) -> Histogram:
    counts = run.columns("histograms", layer, neuron)["counts"][0]
    inner = run.manifest.options["histogram_edges"]
    edges = [float("-inf"), *inner, float("inf")]  # the first and the last bin are open
    assert len(edges) == len(counts) + 1, (len(edges), len(counts))
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return Histogram((), ())
    first, last = filled[0], filled[-1] + 1
    return Histogram(tuple(counts[first:last]), tuple(edges[first : last + 1]))


def _value_tokens(run: Run, rows: _Rows) -> tuple[ValueToken, ...]:
    label = run.vocabulary.label
    columns = (rows[name] for name in ("token", "logit", "probability"))
    return tuple(ValueToken(token, label(token), *scores) for token, *scores in zip(*columns, strict=True))


def _key_tokens(
    run: Run, tokens: Sequence[int] | None, coefficients: Sequence[float] | None
) -> tuple[KeyToken, ...]:
    pairs = zip(tokens or (), coefficients or (), strict=True)
    return tuple(KeyToken(token, run.vocabulary.label(token), value) for token, value in pairs)


def _side(rows: _Rows, polarity: int, examples: tuple[Example, ...]) -> Side:
    coefficients = rows["coefficient"]
    return Side(
        polarity=polarity,
        stored=len(coefficients),
        threshold=coefficients[-1] if coefficients else None,
        quadrants=_quadrants(rows),
        examples=examples,
    )


def _quadrants(rows: _Rows) -> tuple[int, int, int, int] | None:
    signs = [(g > 0, u > 0) for g, u in zip(rows["gate_sign"], rows["up_sign"], strict=True) if g is not None]
    if not signs:
        return None
    a, b, c, d = (signs.count(both) for both in ((True, True), (True, False), (False, True), (False, False)))
    return (a, b, c, d)


def _one_a_part(samples: _Rows, statistics: Statistics) -> _Rows:
    """The stored sample nearest the middle of each tenth of [min, max]; largest first."""
    low, high = statistics.min, statistics.max
    if not samples["coefficient"] or low is None or high is None or low == high:
        return _slice(samples, 0, 0)
    depth = (np.array(samples["coefficient"]) - low) / (high - low) * PARTS
    tenth = np.floor(depth).clip(0, PARTS - 1)
    far = np.abs(depth - tenth - 0.5)
    order = np.lexsort((samples["position"], samples["context"], far, -tenth))
    places = order[np.flatnonzero(np.diff(tenth[order], prepend=PARTS))].tolist()
    return {name: [values[place] for place in places] for name, values in samples.items()}


class _ExampleReader:
    """Turns rows of (context, position) into examples; asks the run once for the text of all lists."""

    def __init__(self, run: Run, window: tuple[int, int], lists: Sequence[_Rows], whole: bool) -> None:
        self._words, self._window = run.vocabulary, window
        self._whole = whole
        self._contexts = run.contexts(sorted({id for rows in lists for id in rows["context"]}))
        self._titles = run.titles([context.document for context in self._contexts.values()])

    def examples(self, rows: _Rows) -> tuple[Example, ...]:
        each = (dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True))
        return tuple(map(self._example, each))

    def _example(self, row: dict[str, Any]) -> Example:
        words, context, position = self._words, self._contexts[row["context"]], row["position"]
        tokens, title = context.tokens, self._titles[context.document] or ""
        first = max(0, position - self._window[0])
        last = min(len(tokens), position + 1 + self._window[1])
        pieces = words.running(tokens[first:last].tolist())
        active = position - first
        return Example(
            coefficient=row["coefficient"],
            context=row["context"],
            position=position,
            document=context.document,
            offset=context.start,
            title=words.visible(title, edges=False),
            before=tuple(pieces[:active]),
            active=pieces[active] or words.label(tokens[position]),  # part of a character: its bytes
            after=tuple(pieces[active + 1 :]),
            next_token=None if row["next_token"] is None else words.label(row["next_token"]),
            left_out=(first, len(tokens) - last),
            gate=row.get("gate_sign"),
            up=row.get("up_sign"),
            whole=self._whole,
            router_weight=row.get("router_weight"),
        )


# -- The signs that a neuron's coefficient takes, and the usual one: the sign at most of its triggers ----------


def lists(run: Run, layer: int | None = None) -> pl.LazyFrame:
    """layer, neuron, polarity, stored, weakest: how long each list of triggers is, and its smallest |coefficient|."""
    index: ByPlace | None = run.kept(BY_PLACE)
    if index is not None:
        every = run.once("lists", lambda: index.lists(run)).lazy()
        return every if layer is None else every.filter(pl.col("layer") == run.address(layer, 0).layer)
    triggers = within(run, "triggers", layer)
    return triggers.group_by(*ADDRESS, "polarity").agg(
        stored=pl.len(), weakest=pl.col("coefficient").abs().min()
    )


def usual_signs(run: Run, layer: int | None = None) -> pl.LazyFrame:
    """layer, neuron, usual (+1 or -1) of every neuron of one layer or of all; +1 without triggers."""
    usual = (
        lists(run, layer)
        .sort("stored", "weakest", "polarity", descending=True)
        .unique(ADDRESS, keep="first", maintain_order=True)
        .select(*ADDRESS, usual="polarity")
    )
    neurons = within(run, "neurons", layer).select(ADDRESS)
    return neurons.join(usual, on=ADDRESS, how="left").with_columns(pl.col("usual").fill_null(1))


def taken_signs(run: Run, layer: int | None = None) -> pl.LazyFrame:
    """layer, neuron, sign (+1 or -1), usual (bool): every sign of which a neuron has a trigger."""
    signs = lists(run, layer).select(*ADDRESS, sign="polarity")
    return signs.join(usual_signs(run, layer), on=ADDRESS).select(
        *ADDRESS, "sign", usual=pl.col("usual") == pl.col("sign")
    )
