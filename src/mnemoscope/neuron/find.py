"""Find neurons by what their value writes, by the text of their triggers, by their pattern or by their statistics.

Every count stands beside what would be expected if there were nothing to find (`Hits.null` says how).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from mnemoscope.arguments import DECOYS
from mnemoscope.display import Shown
from mnemoscope.errors import QueryError
from mnemoscope.neuron.card import lists, taken_signs
from mnemoscope.neuron.claims import ADDRESS, ORDER, rows_with_verdict, within
from mnemoscope.neuron.striking import RULE, peaked
from mnemoscope.neuron.twoway import NONE
from mnemoscope.records import NEURON, NEXT, NULLS
from mnemoscope.run.places import BY_PLACE, WholeText

if TYPE_CHECKING:
    from mnemoscope.run.places import ByPlace
    from mnemoscope.run.reading import Run

ALL = 2**31 - 1  # as a count: every hit
_CLAIMED = ("pattern", "verdict", "f1", "precision", "recall", "tokens")


@dataclass(frozen=True, repr=False)
class Hits(Shown):
    """The answer to a search: the question, the null to read its numbers against, and a row per neuron found."""

    question: str
    null: str
    rows: pl.DataFrame
    total: int  # neurons (or neurons x signs) that fit, of which `rows` are the first

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON-ready values."""
        return {
            "question": self.question,
            "null": self.null,
            "total": self.total,
            "rows": self.rows.to_dicts(),
        }


def promotes(run: Run, text: str, *, layer: int | None = None, count: int = 20) -> Hits:
    """Neurons that promote the token `text` (spaces included) at a sign that their coefficient takes, best rank first.

    Rows: neuron, sign (at which it promotes the token), usual (whether that is its usual sign, `neuron.card`), rank
    (0-based, among what it promotes at that sign), token, logit (of the value, times the sign), probability and the
    value's max_probability (read at a positive coefficient; null where the sign is negative). `QueryError` if the
    vocabulary has no such token.
    """
    return _by_value(run, text, "promote", layer, count)


def suppresses(run: Run, text: str, *, layer: int | None = None, count: int = 20) -> Hits:
    """Neurons that suppress the token `text` at a sign that their coefficient takes.

    Rows as `promotes`; rank 0 is the most suppressed.
    """
    return _by_value(run, text, "suppress", layer, count)


def trigger(run: Run, text: str, *, layer: int | None = None, count: int = 20) -> Hits:
    """Neurons whose triggers have `text` (exactly) ending at or overlapping the active token, most first.

    Rows: neuron, sign of the coefficient, hits, expected (hits among as many random positions), triggers
    (stored), strongest (the hit with the largest |coefficient|). `QueryError` if the corpus lacks the text.
    """
    places, share, aside = _occurrences(run, text)
    stored = _stored(run, layer)
    hits = _counted(_triggers_at(run, places, layer))
    rows = _first(run, hits, "hits", count).with_columns(
        _sign("polarity"), triggers=pl.col("side").map_batches(lambda side: stored[side.to_numpy()])
    )
    rows = rows.with_columns(expected=pl.col("triggers") * share)
    return Hits(
        question=f"neurons that {text!r} triggers: it ends at or overlaps the active token of some trigger "
        f"in {hits.height:,} lists (one list for each neuron and sign)",
        null=f"expected: as many random positions would hit it so often; it covers {places.height:,} of the "
        f"{run.manifest.corpus.counted:,} counted positions ({share:.2g})"
        + (f". {_UNCOUNTED}, {aside:,} of its tokens among them" if aside else "")
        + (f". {_kept(run)}" if hits.is_empty() else ""),
        rows=_named(run, rows, "sign", "hits", "expected", "triggers", "strongest"),
        total=hits.height,
    )


def sort(run: Run, by: str, *, descending: bool = True, layer: int | None = None, count: int = 20) -> Hits:
    """Neurons in the order of one statistic (a numeric column of `neurons`), of one layer or of all.

    Rows: neuron, the statistic, its median over the neuron's layer; min, max and kurtosis for orientation.
    Undefined values come last. By kurtosis, largest first, only neurons that count as peaked are listed
    (`neuron.striking`). `QueryError` for an unknown statistic or layer.
    """
    table = run.table("neurons")
    known = [name for name, kind in table.collect_schema().items() if kind.is_numeric()][2:]
    if by not in known:
        raise QueryError(f"sorting neurons by {by!r}: unknown statistic; choose one of {', '.join(known)}")
    table = within(run, "neurons", layer).with_columns(
        pl.col(by).median().over("layer").alias("layer_median")
    )
    every = table.select(pl.len()).collect().item()
    if by == "kurtosis" and descending:
        table = table.join(peaked(run, layer).lazy(), on=ADDRESS, how="semi")
    ordered = table.sort(by, *ADDRESS, descending=[descending, False, False], nulls_last=True)
    total = ordered.select(pl.len()).collect().item()
    left_out = _left_out(every - total)
    shown = [by, "layer_median", *(name for name in ("min", "max", "kurtosis") if name != by)]
    layers = "all layers" if layer is None else f"layer {layer}"
    return Hits(
        question=f"neurons of {layers} by {by}, {'largest' if descending else 'smallest'} first",
        null=f"layer_median: the same statistic's median over all neurons of that layer{left_out}",
        rows=_named(run, ordered.head(count).collect(), *shown),
        total=total,
    )


def reorder(
    run: Run, hits: Hits, by: str, *, descending: bool = True, layer: int | None = None, count: int = 20
) -> Hits:
    """All hits of another search in the order of one statistic, as `sort` has it.

    Rows: those of `hits`, with the statistic and its median over the neuron's layer. `QueryError` as of `sort`.
    """
    order = sort(run, by, descending=descending, layer=layer, count=ALL).rows
    rows = order.select("neuron", by, "layer_median").join(
        hits.rows, on="neuron", suffix="_active", maintain_order="left_right"
    )
    return Hits(
        question=f"{hits.question}; by {by}, {'largest' if descending else 'smallest'} first",
        null=f"{hits.null}. layer_median: the median of {by} over all neurons of that layer"
        + _left_out(hits.total - rows.height),
        rows=rows.head(count),
        total=rows.height,
    )


def _left_out(number: int) -> str:
    """Why so many are not in an order."""
    return f". {RULE[0].upper()}{RULE[1:]}; the other {number:,} are left out" if number else ""


def pattern(run: Run, text: str, *, layer: int | None = None, count: int = 20) -> Hits:
    """Neurons with a tested pattern whose name or spec contains `text` (case does not matter), believed ones first.

    Rows: neuron, sign, pattern, verdict, f1, precision, recall, tokens (active). `QueryError` if no neuron has such a
    pattern, or none were looked for.
    """
    wanted = text.strip().casefold()
    rows = within(run, "pattern_tests", layer).with_columns(
        pl.concat_str("name", pl.lit(" "), "spec")
        .str.to_lowercase()
        .str.contains(wanted, literal=True)
        .alias("hit"),
        (pl.col("verdict") == NONE).alias("none"),
        (pl.col("tests") == NEXT).alias("follows"),
    )
    claim = ["layer", "neuron", "unit", "polarity", "follows", "name"]
    columns = [*claim, "none", "verdict", "f1", "precision", "recall", "active"]
    hits = rows.filter("hit").select(columns).collect() if wanted else pl.DataFrame()
    if len(hits):  # what triggers and the whole distribution both say is one pattern
        hits = hits.sort("none", "f1", descending=[False, True], nulls_last=True)
        hits = hits.unique(claim, keep="first", maintain_order=True)
    of_neurons = hits.filter(pl.col("unit") == "neuron") if len(hits) else hits
    if not len(of_neurons):
        raise QueryError(
            f"finding neurons by the pattern {text!r}: none has a pattern of that name; give a part of a name, such as "
            "year, or of a spec (`mnemoscope show` prints both)"
        )
    nulls = len(hits) - len(of_neurons)
    believed = int((~of_neurons["none"]).sum())
    tests = rows.group_by("unit").len().collect().sort(pl.col("unit") != "neuron")["len"].to_list()
    ordered = of_neurons.sort(
        "none", "f1", "layer", "neuron", descending=[False, True, False, False], nulls_last=True
    )
    shown = ordered.head(count).with_columns(_sign("polarity"), pattern="name", tokens="active")
    return Hits(
        question=f"neurons and signs whose tested pattern contains {text!r}: {len(of_neurons):,}, "
        f"{believed:,} of them with a verdict above the null",
        null=f"{len(of_neurons):,} of {tests[0]:,} tested patterns of neurons contain it, {nulls:,} of "
        f"{sum(tests[1:]):,} of pseudo-neurons",
        rows=_named(run, shown, "sign", *_CLAIMED),
        total=len(of_neurons),
    )


def like(run: Run, text: str, *, layer: int | None = None, count: int = 20) -> Hits:
    """Neurons with the same triggers as the neuron whose address `text` is, most in common first.

    Rows: neuron, sign (of its coefficient), as (the sign of the given neuron's triggers that it shares), common
    (positions that are triggers of both), expected (of a list drawn from all neurons, whatever its layer), triggers
    (how many its list holds), strongest (of the common ones). `QueryError` if the run has no such neuron.
    """
    address = run.parse(text)
    places = run.rows("triggers", *address).select("context", "position", given="polarity")
    stored = _stored(run, layer)
    own = 2 * int(run.manifest.model.cells.cell(*address)) + np.arange(2)
    others = _triggers_at(run, places, layer).filter(~pl.col("side").is_in(own))
    every = int(np.count_nonzero(stored)) - int(np.count_nonzero(stored[own]))
    given = pl.col("given")
    expected = {sign: others.filter(given == sign).height / max(every, 1) for sign in (1, -1)}
    hits = others.group_by("side", "given").agg(common=pl.len(), strength=pl.col("strength").max())
    rows = _first(run, hits, "common", count).with_columns(
        _sign("polarity"),
        pl.when(given > 0).then(pl.lit("+")).otherwise(pl.lit("-")).alias("as"),
        given.replace_strict(expected, return_dtype=pl.Float64).alias("expected"),
        triggers=pl.col("side").map_batches(lambda side: stored[side.to_numpy()]),
    )
    return Hits(
        question=f"neurons that share triggers with {address}: {hits.height:,} lists (one list for each neuron and "
        "sign) have a position in common with one of its two",
        null=f"expected: what a list drawn from all {every:,} others shares. "
        f"{_first_by_chance(run, address.layer, layer)}. {_kept(run)}",
        rows=_named(run, rows, "sign", "as", "common", "expected", "triggers", "strongest"),
        total=hits.height,
    )


def _first_by_chance(run: Run, layer: int, searched: int | None) -> str:
    """What the same search finds first for directions of a layer that are no neurons."""
    if "null_triggers" not in run.manifest.tables:
        return "The run was built without null units to search for alike"
    most = run.once(("alike by chance", layer, searched), lambda: _most_alike(run, layer, searched))
    kinds = most.group_by("kind", maintain_order=True).agg(
        middle=pl.col("most").median(), high=pl.col("most").quantile(0.95)
    )
    said = [
        f"{NULLS[kind]} {middle:.0f} in the median and {high:.0f} in one of twenty"
        for kind, middle, high in kinds.iter_rows()
    ]
    if not said:
        return "The run has no random directions or rotated axes of this layer to search for alike"
    return f"What comes first shares, searched alike for lists of the same layer of {'; of '.join(said)}"


def _most_alike(run: Run, layer: int, searched: int | None) -> pl.DataFrame:
    """kind, most: for each list of a direction of a layer, the most positions that a list of neurons has in common."""
    unit = ["kind", "neuron", "polarity"]
    kinds = [
        kind for kind in NULLS if kind not in DECOYS
    ]  # a decoy's own neuron has its gate, and is always alike
    places = within(run, "null_triggers", layer).filter(pl.col("kind").is_in(kinds)).collect()
    common = (
        _triggers_at(run, places.select(*unit, "context", "position"), searched)
        .group_by(*unit, "side")
        .agg(most=pl.len().cast(pl.Int64))
        .group_by(unit)
        .agg(pl.col("most").max())
    )
    every = places.select(unit).unique().join(common, on=unit, how="left")
    return every.with_columns(pl.col("most").fill_null(0)).sort(unit)


def _triggers_at(run: Run, places: pl.DataFrame, layer: int | None) -> pl.DataFrame:
    """The triggers at places, of one layer or of all: `side` (`Cells.side`) and strength (|coefficient|) of each,
    beside what else the columns of `places` say of (context, position)."""
    index: ByPlace | None = run.kept(BY_PLACE)
    cells, place = run.manifest.model.cells, ["context", "position"]
    if index is None:
        every = within(run, "triggers", layer).select(
            *place, cells.side().cast(pl.UInt32), strength=pl.col("coefficient").abs()
        )
        return places.lazy().join(every, on=place).drop(place).collect()
    counts, rows = index.at(WholeText.of(run).numbers(*(places[name].to_numpy() for name in place)))
    columns = {"side": index.sides[rows], "strength": index.strengths[rows]}
    others = places.drop(place)
    if others.width:
        repeated = others[np.repeat(np.arange(others.height), counts)]
        columns = {column.name: column for column in repeated.get_columns()} | columns
    triggers = pl.DataFrame(columns)
    if layer is None:
        return triggers
    sides = cells.of(run.address(layer, 0).layer)
    return triggers.filter((pl.col("side") >= 2 * sides.start) & (pl.col("side") < 2 * sides.stop))


def _counted(triggers: pl.DataFrame) -> pl.DataFrame:
    """side, hits, strength (the largest): one row per list. A common word has millions of triggers; this counts them
    many times faster than a group by."""
    sides, strengths = triggers["side"].to_numpy(), triggers["strength"].to_numpy()
    counts = np.bincount(sides)
    largest = np.zeros(len(counts), np.float32)
    np.maximum.at(largest, sides, strengths)
    present = np.flatnonzero(counts)
    columns = {
        "side": present.astype(np.uint32),
        "hits": counts[present].astype(np.uint32),
        "strength": largest[present],
    }
    return pl.DataFrame(columns)


def _first(run: Run, hits: pl.DataFrame, by: str, count: int) -> pl.DataFrame:
    """The hits with the most of something, then the strongest, with layer, neuron, polarity and `strongest`."""
    if 0 < count < hits.height:  # before they are put in order: a common word has a hundred thousand
        hits = hits.filter(pl.col(by) >= hits[by].top_k(count).min())
    rows = hits.sort(by, "strength", "side", descending=[True, True, False]).head(count)
    sides = rows["side"].to_numpy().astype(np.int64)
    layer, neuron = run.manifest.model.cells.place(sides // 2)
    return rows.with_columns(
        pl.Series("layer", layer), pl.Series("neuron", neuron), pl.Series("polarity", 1 - 2 * (sides % 2))
    ).with_columns(strongest=pl.col("strength") * pl.col("polarity").cast(pl.Float32))


def _stored(run: Run, layer: int | None) -> np.ndarray:
    """u32[side]: how many triggers each list has; 0 in other layers."""

    def read() -> np.ndarray:
        cells = run.manifest.model.cells
        rows = lists(run, layer).select(cells.side(), "stored").collect()
        stored = np.zeros(2 * len(cells), np.uint32)
        stored[rows["side"].to_numpy()] = rows["stored"].to_numpy()
        return stored

    return run.once(("stored", layer), read)


def tested(run: Run, *, layer: int | None = None, count: int = 20) -> Hits:
    """Neurons with a tested pattern that has a verdict, clearest first (`neuron.claims`).

    Rows: neuron, sign, about, pattern, verdict, f1, precision, recall, tokens (active). `QueryError` if none were
    looked for.
    """
    believed = rows_with_verdict(run, layer)
    by_unit = within(run, "pattern_tests", layer).group_by("unit")
    claims = by_unit.agg(tests=pl.len(), verdicts=(pl.col("verdict") != NONE).sum()).collect()
    of = {unit: f"{verdicts:,} of {tests:,}" for unit, tests, verdicts in claims.sort("unit").iter_rows()}
    nulls = ", ".join(f"{NULLS.get(unit, unit)} {share}" for unit, share in of.items() if unit != NEURON)
    shown = believed.head(count).with_columns(_sign("polarity"), pattern="name", tokens="active")
    return Hits(
        question=f"{believed.height:,} tested patterns of {believed.select(ADDRESS).n_unique():,} neurons have a "
        f"verdict; {ORDER}",
        null=f"tested patterns with a verdict: neurons {of.get(NEURON, '0')}{', ' if nulls else ''}{nulls}",
        rows=_named(run, shown, "sign", "about", *_CLAIMED),
        total=believed.height,
    )


def _by_value(run: Run, text: str, verb: str, layer: int | None, count: int) -> Hits:
    """Neurons by the list of their value that holds what they `verb` (promote or suppress) at a sign that they take."""
    tokens, model = run.vocabulary.find(text), run.manifest.model
    sense = 1 if verb == "promote" else -1
    # A list is read at the sign at which the neuron promotes what it holds, and at the other one suppresses it.
    signs = run.once(("signs", layer), lambda: _signs(run, layer))
    stored = pl.concat(run.by_token(token, polarity) for token in tokens for polarity in (1, -1))
    stored = stored.with_columns(sign=pl.col("polarity") * sense)
    cells = model.cells.cell(stored["layer"].to_numpy(), stored["neuron"].to_numpy())
    sides = 2 * cells + (stored["sign"].to_numpy() < 0)
    positive = pl.when(pl.col("sign") > 0)
    rows = (
        stored.with_columns(
            pl.Series("usual", signs.usual[sides]),
            pl.Series("max_probability", signs.max_probability[cells]).fill_nan(None),
        )
        .filter(pl.Series(signs.taken[sides]))
        .sort("rank", pl.col("logit") * pl.col("polarity"), *ADDRESS, descending=[False, True, False, False])
        .with_columns(
            positive.then("probability").alias("probability"),
            positive.then("max_probability").alias("max_probability"),
            pl.col("logit") * pl.col("sign"),
        )
        .with_columns(_sign("sign"))
    )
    shown = rows.head(count)
    labels = pl.Series("token", [run.vocabulary.label(token) for token in shown["token"]], dtype=pl.String)
    depth, median = run.once(("base rate", verb, layer), lambda: _value_base_rate(run, sense, layer))
    alike = len(tokens) * int(signs.taken.sum()) * depth / model.vocabulary
    uniform = f"{1 / model.vocabulary:.2g}".replace("e-0", "e-")
    return Hits(
        question=f"{rows.select(ADDRESS).n_unique():,} of {signs.neurons:,} neurons have {text!r} among the {depth} "
        f"tokens that they {verb} most at the sign beside it (usual: the sign of most of their triggers)"
        + ("" if rows.height else "; no others are kept, so a neuron with it further down is not found"),
        null=f"the median token of the vocabulary is in {median:g} such lists; {alike:.1f} if all {model.vocabulary:,} "
        f"tokens were alike. A uniform value gives each token the probability {uniform}. At the "
        f"other sign a neuron {'suppresses' if verb == 'promote' else 'promotes'} what is listed here",
        rows=_named(run, shown.with_columns(labels), "sign", "usual", "rank", *_LISTED),
        total=rows.height,
    )


class _Signs(NamedTuple):
    """The signs that neurons take (`taken_signs`) as arrays: a search looks up few of them.

    taken, usual     bool[side]: whether a neuron takes a sign, and whether it is its usual one
    max_probability  f32[cell]: of each neuron's value; NaN where there is none
    neurons          how many take one
    """

    taken: np.ndarray
    usual: np.ndarray
    max_probability: np.ndarray
    neurons: int


def _signs(run: Run, layer: int | None) -> _Signs:
    cells = run.manifest.model.cells
    signs = taken_signs(run, layer).with_columns(polarity="sign").select(cells.side(), "usual").collect()
    best = within(run, "neurons", layer).select(*ADDRESS, "value_max_probability").collect()
    sides, places = signs["side"].to_numpy(), cells.cell(best["layer"].to_numpy(), best["neuron"].to_numpy())
    taken, probability = np.zeros((2, 2 * len(cells)), bool), np.full(len(cells), np.nan, np.float32)
    taken[0, sides], taken[1, sides] = True, signs["usual"].to_numpy()
    probability[places] = best["value_max_probability"].to_numpy()
    return _Signs(taken[0], taken[1], probability, int(taken[0].reshape(-1, 2).any(1).sum()))


def _value_base_rate(run: Run, sense: int, layer: int | None) -> tuple[int, float]:
    """Tokens kept for each value, and in how many lists that are read the median token is; a layer at a time."""
    model, stored = run.manifest.model, _stored(run, layer)
    counts, depth = np.zeros(model.vocabulary, np.int64), 0
    for number in model.cells.layers if layer is None else (layer,):
        rows = within(run, "values", number).select(model.cells.side(), "rank", "token").collect()
        sides = rows["side"].to_numpy() ^ (
            sense < 0
        )  # what a neuron suppresses at one sign is listed at the other
        kept = rows.filter(stored[sides] > 0)
        counts += np.bincount(kept["token"].to_numpy(), minlength=model.vocabulary)
        depth = max(depth, int(kept["rank"].to_numpy().max(initial=-1)) + 1)
    return depth, float(np.median(counts))


def _sign(column: str) -> pl.Expr:
    return pl.when(pl.col(column) > 0).then(pl.lit("+")).otherwise(pl.lit("-")).alias("sign")


def _named(run: Run, rows: pl.DataFrame, *columns: str) -> pl.DataFrame:
    """Some columns behind the address of a neuron, and behind the stack that it is in where there are two."""
    model = run.manifest.model
    pairs = rows.select("layer", "neuron").rows()
    derived = {"neuron": [str(model.cells.id(*pair)) for pair in pairs]}
    if model.encoder_layers:
        derived["stack"] = [str(model.stack(layer)) for layer, _ in pairs]
    names = rows.with_columns(pl.Series(name, held, dtype=pl.String) for name, held in derived.items())
    return names.select(*derived, *columns)


_LISTED = ("token", "logit", "probability", "max_probability")
_UNCOUNTED = "Position 0 of a context and special tokens do not count"


def _kept(run: Run) -> str:
    return f"Only the {run.manifest.options.get('top', 'strongest')} strongest triggers of a neuron and sign are kept"


def _occurrences(run: Run, text: str) -> tuple[pl.DataFrame, float, int]:
    """Where the text is: (context, position) of the counted tokens that it overlaps, their share, and how many others.

    Found in the bytes of whole contexts, so a text may begin and end inside tokens.
    """
    if not text:
        raise QueryError("searching triggers: the text is empty; give at least one character")
    written = WholeText.of(run)
    tokens = written.overlapped(text.encode("utf-8", "replace"))
    if not len(tokens):
        raise QueryError(_nowhere(run, text))
    counted = tokens[written.counted[tokens]]
    if not len(counted):
        holding = len(np.unique(written.places(tokens)[0]))
        raise QueryError(
            f"searching triggers for {text!r}: it is in {holding:,} contexts, but only at position 0 or in special "
            "tokens, which do not count, so no trigger is kept there; give a text that also stands further on"
        )
    places = pl.DataFrame(dict(zip(("context", "position"), written.places(counted), strict=True)))
    return places, places.height / max(run.manifest.corpus.counted, 1), len(tokens) - len(counted)


def _nowhere(run: Run, text: str) -> str:
    """The message for a text that no context has."""
    corpus = run.manifest.corpus
    drawn = f", of which {corpus.limit:,} tokens were drawn" if corpus.limit else ""
    changed = f"; {corpus.spelling}" if corpus.spelling else ""
    return (
        f"searching triggers for {text!r}: the text occurs nowhere in the {corpus.contexts:,} contexts of {corpus.id}"
        f"{drawn} (upper case and spaces count{changed}); try a shorter one"
    )
