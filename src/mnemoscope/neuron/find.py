"""Find neurons by what their value writes, by the text of their triggers, by their pattern or by their statistics.

Every count stands beside what would be expected if there were nothing to find (`Hits.null` says how).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.arguments import DECOYS
from mnemoscope.display import Shown
from mnemoscope.errors import QueryError
from mnemoscope.neuron.card import taken_signs
from mnemoscope.neuron.claims import ADDRESS, ORDER, rows_with_verdict, within
from mnemoscope.neuron.striking import RULE, peaked
from mnemoscope.neuron.twoway import NONE
from mnemoscope.records import NEURON, NEXT, NULLS

if TYPE_CHECKING:
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
    unit = [*ADDRESS, "polarity"]
    stored = _stored(run, layer)
    hits = (
        within(run, "triggers", layer)
        .select(*unit, "rank", "context", "position", "coefficient")
        .join(places.lazy(), on=["context", "position"], how="semi")
        .group_by(unit)
        .agg(pl.len().alias("hits"), pl.col("coefficient").sort_by("rank").first().alias("strongest"))
        .join(stored.lazy(), on=unit)
        .with_columns(
            (pl.col("triggers") * share).alias("expected"),
            _sign("polarity"),
        )
        .sort("hits", pl.col("strongest").abs(), "layer", "neuron", descending=[True, True, False, False])
        .collect()
    )
    return Hits(
        question=f"neurons that {text!r} triggers: it ends at or overlaps the active token of some trigger "
        f"in {hits.height:,} lists (one list for each neuron and sign)",
        null=f"expected: as many random positions would hit it so often; it covers {places.height:,} of the "
        f"{run.manifest.corpus.counted:,} counted positions ({share:.2g})"
        + (f". {_UNCOUNTED}, {aside:,} of its tokens among them" if aside else "")
        + (f". {_kept(run)}" if hits.is_empty() else ""),
        rows=_named(run, hits.head(count), "sign", "hits", "expected", "triggers", "strongest"),
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
    unit = [*ADDRESS, "polarity"]
    places = run.rows("triggers", *address).select("context", "position", given="polarity")
    stored = _stored(run, layer)
    rows = (
        within(run, "triggers", layer)
        .select(*unit, "context", "position", "coefficient")
        .join(places.lazy(), on=["context", "position"])
        .collect()
    )
    others = rows.filter((pl.col("layer") != address.layer) | (pl.col("neuron") != address.neuron))
    every = stored.filter((pl.col("layer") != address.layer) | (pl.col("neuron") != address.neuron)).height
    given = pl.col("given")
    expected = {sign: others.filter(given == sign).height / max(every, 1) for sign in (1, -1)}
    hits = (
        others.group_by(*unit, "given")
        .agg(pl.len().alias("common"), pl.col("coefficient").sort_by(pl.col("coefficient").abs()).last())
        .join(stored, on=unit)
        .with_columns(
            _sign("polarity"),
            pl.when(given > 0).then(pl.lit("+")).otherwise(pl.lit("-")).alias("as"),
            given.replace_strict(expected, return_dtype=pl.Float64).alias("expected"),
            strongest="coefficient",
        )
        .sort(
            "common",
            pl.col("strongest").abs(),
            *ADDRESS,
            "polarity",
            descending=[True, True, False, False, False],
        )
    )
    return Hits(
        question=f"neurons that share triggers with {address}: {hits.height:,} lists (one list for each neuron and "
        "sign) have a position in common with one of its two",
        null=f"expected: what a list drawn from all {every:,} others shares. "
        f"{_first_by_chance(run, address.layer, layer)}. {_kept(run)}",
        rows=_named(run, hits.head(count), "sign", "as", "common", "expected", "triggers", "strongest"),
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
    places = within(run, "null_triggers", layer).filter(pl.col("kind").is_in(kinds))
    lists = within(run, "triggers", searched).select(*ADDRESS, "polarity", "context", "position")
    common = (
        places.select(*unit, "context", "position")
        .join(lists, on=["context", "position"], suffix="_of_list")
        .group_by(*unit, "layer", "neuron_of_list", "polarity_of_list")
        .agg(most=pl.len().cast(pl.Int64))
        .group_by(unit)
        .agg(pl.col("most").max())
    )
    every = places.select(unit).unique().join(common, on=unit, how="left")
    return every.with_columns(pl.col("most").fill_null(0)).sort(unit).collect()


def _stored(run: Run, layer: int | None) -> pl.DataFrame:
    """How many triggers each list has."""
    unit = [*ADDRESS, "polarity"]
    return run.once(
        ("stored", layer),
        lambda: within(run, "triggers", layer).group_by(unit).agg(pl.len().alias("triggers")).collect(),
    )


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
    signs = run.once(("signs", layer), lambda: taken_signs(run, layer).collect())
    lists = signs.with_columns(polarity=(pl.col("sign") * sense).cast(pl.Int8))
    address = [*ADDRESS, "polarity"]
    stored = [
        run.by_token(token, polarity).with_columns(polarity=pl.lit(polarity, pl.Int8))
        for token in tokens
        for polarity in (1, -1)
    ]
    best = within(run, "neurons", layer).select(*ADDRESS, max_probability="value_max_probability")
    positive = pl.when(pl.col("sign") > 0)
    rows = (
        pl.concat(stored)
        .join(lists, on=address)
        .join(best.collect(), on=ADDRESS)
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
    depth, median = run.once(
        ("base rate", verb, layer), lambda: _value_base_rate(run, lists.select(address), layer)
    )
    alike = len(tokens) * lists.height * depth / model.vocabulary
    uniform = f"{1 / model.vocabulary:.2g}".replace("e-0", "e-")
    neurons = rows.select(ADDRESS).n_unique()
    return Hits(
        question=f"{neurons:,} of {lists.select(ADDRESS).n_unique():,} neurons have {text!r} among the {depth} tokens "
        f"that they {verb} most at the sign beside it (usual: the sign of most of their triggers)"
        + ("" if rows.height else "; no others are kept, so a neuron with it further down is not found"),
        null=f"the median token of the vocabulary is in {median:g} such lists; {alike:.1f} if all {model.vocabulary:,} "
        f"tokens were alike. A uniform value gives each token the probability {uniform}. At the "
        f"other sign a neuron {'suppresses' if verb == 'promote' else 'promotes'} what is listed here",
        rows=_named(run, shown.with_columns(labels), "sign", "usual", "rank", *_LISTED),
        total=rows.height,
    )


def _value_base_rate(run: Run, lists: pl.DataFrame, layer: int | None) -> tuple[int, float]:
    """Tokens kept for each value, and in how many of these lists (layer, neuron, polarity) the median token is."""
    table = within(run, "values", layer).join(lists.lazy(), on=[*ADDRESS, "polarity"], how="semi")
    counts = table.group_by("token").len().collect()["len"].to_numpy()
    depth = table.select(pl.col("rank").max()).collect().item()
    absent = run.manifest.model.vocabulary - len(counts)
    return (0 if depth is None else depth + 1), float(np.median(np.pad(counts, (absent, 0))))


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
    contexts, positions, aside, holding = [], [], 0, 0
    for context, hit, uncounted in _hits(run, text.encode("utf-8", "replace")):
        positions.append(hit)
        contexts.append(np.full(len(hit), context))
        aside += uncounted
        holding += 1
    if not aside and not sum(map(len, positions)):
        raise QueryError(_nowhere(run, text))
    if not sum(map(len, positions)):
        raise QueryError(
            f"searching triggers for {text!r}: it is in {holding:,} contexts, but only at position 0 or in special "
            "tokens, which do not count, so no trigger is kept there; give a text that also stands further on"
        )
    places = pl.DataFrame(
        {
            "context": np.concatenate(contexts).astype(np.int64),
            "position": np.concatenate(positions).astype(np.int32),
        }
    )
    return places, places.height / max(run.manifest.corpus.counted, 1), aside


def _nowhere(run: Run, text: str) -> str:
    """The message for a text that no context has."""
    corpus = run.manifest.corpus
    drawn = f", of which {corpus.limit:,} tokens were drawn" if corpus.limit else ""
    changed = f"; {corpus.spelling}" if corpus.spelling else ""
    return (
        f"searching triggers for {text!r}: the text occurs nowhere in the {corpus.contexts:,} contexts of {corpus.id}"
        f"{drawn} (upper case and spaces count{changed}); try a shorter one"
    )


@dataclass(frozen=True)
class _Written:
    """The text of all contexts as bytes, one after another, so that one search goes over all of it.

    ends      i64[token]: where each token ends in it
    first     i64[context]: the first token of each context
    counted   bool[token]: whether it is neither special nor the first of its context
    contexts  i64[context]: their ids
    """

    text: bytes
    ends: np.ndarray
    first: np.ndarray
    counted: np.ndarray
    contexts: np.ndarray

    @classmethod
    def of(cls, run: Run) -> _Written:
        """Read it; once for each open run, see `Run.once`."""
        words = run.table("vocabulary").select("bytes", "special").collect()
        raw, special = words["bytes"].to_list(), words["special"].to_numpy()
        rows = run.table("contexts").select("context", "tokens").collect()
        tokens = rows["tokens"].explode(empty_as_null=False).to_numpy()
        sizes = rows["tokens"].list.len().to_numpy().astype(np.int64)
        first = np.cumsum(sizes) - sizes
        counted = ~special[tokens]
        counted[first[sizes > 0]] = False
        lengths = np.array([len(piece) for piece in raw], np.int64)
        text = b"".join([raw[token] for token in tokens.tolist()])
        return cls(text, np.cumsum(lengths[tokens]), first, counted, rows["context"].to_numpy())

    def overlaps(self, wanted: bytes) -> Iterator[np.ndarray]:
        """The tokens of each occurrence, which lies within one context."""
        start = self.text.find(wanted)
        while start >= 0:
            touched = np.searchsorted(self.ends, [start, start + len(wanted) - 1], side="right")
            if len(set(np.searchsorted(self.first, touched, side="right").tolist())) == 1:
                yield np.arange(touched[0], touched[1] + 1)
            start = self.text.find(wanted, start + 1)


def _hits(run: Run, wanted: bytes) -> Iterator[tuple[int, np.ndarray, int]]:
    """(context, counted tokens that an occurrence overlaps, how many others it overlaps) of contexts with the text."""
    written = run.once("written", lambda: _Written.of(run))
    tokens = np.unique(np.concatenate([np.zeros(0, np.int64), *written.overlaps(wanted)]))
    places = np.searchsorted(written.first, tokens, side="right") - 1
    for place in np.unique(places):
        of_context = tokens[places == place]
        counted = of_context[written.counted[of_context]]
        position = (counted - written.first[place]).astype(np.int32)
        yield int(written.contexts[place]), position, len(of_context) - len(counted)
