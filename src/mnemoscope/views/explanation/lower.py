"""From an `Explanation` to its `Sheet`: chosen, rounded to words, labelled. Nothing is worked out anew here."""

from __future__ import annotations

import math
import shlex
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import polars as pl

from mnemoscope.errors import RunError
from mnemoscope.neuron.card import NeuronCard, card
from mnemoscope.prediction.explanation import ChosenToken, Contrast, Explanation, beside, foil_names
from mnemoscope.records import NeuronId
from mnemoscope.run.reading import open_run
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.views.explanation.sheet import (
    ABLATED,
    INCREASE,
    LEFT_OUT,
    ROUTER,
    STREAM_OF_UNITS,
    Ablated,
    Against,
    AttentionPattern,
    Candidate,
    Cargo,
    Carried,
    Cause,
    Grid,
    Ledger,
    Memory,
    Part,
    Point,
    PromptToken,
    Sheet,
    Step,
    Sum,
    Switched,
    Word,
)
from mnemoscope.views.words import is_right_to_left

TRIGGERS = 2
WINDOW = (24, 4)  # tokens of text before and after


def remembered(run: str | None, coefficients: Mapping[NeuronId, float]) -> tuple[dict[NeuronId, Memory], str]:
    """Each neuron's triggers of the sign that its coefficient has here; and what went wrong, or "".

    A run may have moved since the explanation was made; then there is nothing, and a note.
    """
    if run is None:
        return {}, ""
    try:
        opened = open_run(run)
        memories = {
            neuron: _memory(card(opened, neuron, examples=TRIGGERS, window=WINDOW), coefficient)
            for neuron, coefficient in coefficients.items()
        }
    except RunError as error:
        return {}, f"triggers are left out: {error}"
    return memories, ""


def _memory(known: NeuronCard, coefficient: float) -> Memory:
    statistics, usual = known.statistics, known.layer_median.kurtosis
    if coefficient >= 0:
        return Memory(statistics.kurtosis, usual, statistics.max, known.positive.examples)
    return Memory(statistics.kurtosis, usual, statistics.min, known.negative.examples)


WIDEST = 40  # columns of the grid; further tokens share one
TOP = 20  # what `explain` takes when it is not said
REMEMBERED = 12  # neurons shown with triggers from the run
EMPTY = "∅"
LONGEST = 32  # rows of a head's attention
FAINTEST = 0.03  # weight that is drawn
_LABEL = 24
_MEASURES = {INCREASE: "increase", LEFT_OUT: "leave_one_out", "logit": "logit", "chain": "chain"}
_COLUMNS = (INCREASE, LEFT_OUT, ABLATED, "chain", "logit")
_PARTS = {"attention": "attention", "ffn": "FFN", "stream": "stream"}
_BESIDE = {
    "attention bias": "attention biases", "mixer": "mixers", "ffn bias": "FFN biases", "ffn": "FFNs without units",
    "per-layer input": "inputs of layers", "unit bias": "biases of units", "unit error": "errors of units",
}  # fmt: skip


def sheet(explanation: Explanation, *, rows: int | None = None) -> Sheet:
    """Lower an explanation.

    rows  how many parts each table shows (the largest and the most negative); all that there are if None. What is
          left out is in the closing rows either way.
    """
    effects = _effects(explanation.ablations)
    known, missing = remembered(explanation.run, _remembered(explanation.neurons, rows))
    heads, neurons = (
        [_part(row, effects, known, explanation.head) for row in frame.iter_rows(named=True)]
        for frame in (explanation.heads, explanation.neurons)
    )
    sums, part = (explanation.layers, explanation.others), explanation.unit_part
    return Sheet(
        title=_label("".join(explanation.tokens["piece"][: explanation.encoded or None]), 60),
        headline=explanation.headline,
        about=f"{explanation.model} · {explanation.layer_count} layers · lens {explanation.lens} · {explanation.dtype}",
        tokens=_tokens(explanation.tokens, explanation.encoded + explanation.position),
        encoded=explanation.encoded,
        unread=Vocabulary.visible(explanation.unread, edges=False),
        right_to_left=is_right_to_left(explanation.prompt),
        target=_candidate(
            explanation.target,
            float(explanation.stream["probability"][-1]),
            rank=int(explanation.stream["rank"][-1]),
        ),
        foils=tuple(_candidate(contrast.foil, contrast.probability) for contrast in explanation.contrasts),
        predictions=tuple(
            Candidate(Word(_label(row["piece"])), row["probability"])
            for row in explanation.predictions.iter_rows(named=True)
        ),
        log_probability=explanation.log_probability,
        account=tuple(_account(explanation.account)),
        stream=tuple(_stream(explanation)),
        steps=_steps(explanation.layers),
        total=explanation.total,
        remainder=explanation.remainder,
        grid=_grid(explanation),
        attention=tuple(_attention(explanation)),
        heads=_ledger(heads, "attention", sums, rows, ("weight", *_COLUMNS), part),
        neurons=_ledger(neurons, part, sums, rows, ("coefficient", ROUTER, *_COLUMNS), part),
        against=tuple(_against(contrast, rows, part, explanation.head) for contrast in explanation.contrasts),
        switched=tuple(_switched(explanation)),
        cargo=_cargo(explanation.attention_queries),
        ablated=tuple(_ablated(explanation)),
        correlation=_correlation(explanation.ablations),
        parallel=explanation.parallel,
        masked=explanation.masked,
        notes=(*_notes(explanation), *([missing] if missing else [])),
        method=tuple(_method(explanation)),
        command=_command(explanation),
    )


def _label(piece: str, width: int = _LABEL) -> str:
    """A token's name: whitespace and controls visible, cut."""
    text = Vocabulary.visible(piece) or EMPTY
    return text if len(text) <= width else text[: width - 1] + "…"


def _word(piece: str | None, position: int | None) -> Word | None:
    return None if piece is None else Word(_label(piece), position)


def _candidate(choice: ChosenToken, probability: float, rank: int | None = None) -> Candidate:
    asked = _label(choice.given) if choice.given is not None and len(choice.tokens) > 1 else None
    return Candidate(Word(_label(choice.piece)), probability, rank, asked)


def _tokens(frame: pl.DataFrame, position: int) -> tuple[PromptToken, ...]:
    top = max((abs(value) for value in frame["leave_one_out"]), default=0.0)
    return tuple(
        PromptToken(
            Vocabulary.visible(row["piece"], edges=False),
            row["position"],
            row["leave_one_out"],
            abs(row["leave_one_out"]) / top if top else 0.0,
            row["position"] == position,
        )
        for row in frame.iter_rows(named=True)
    )


def _account(frame: pl.DataFrame) -> Iterable[Sum]:
    names = {"ffn": "FFN", "total": "log p", "stream": STREAM_OF_UNITS}
    stop = 0.0
    for part, nats in frame.iter_rows():
        start = 0.0 if part == "total" else stop
        stop = start + nats
        yield Sum(names.get(part, part), nats, start, stop)


def _stream(explanation: Explanation) -> Iterable[Point]:
    kinds = {"Lin": "embedding", "Lre": "attention", "Lou": "FFN"}
    logits = [f"logit_{name}" for name in foil_names(explanation.foils)]
    for row in explanation.stream.iter_rows(named=True):
        # Target and foil share a point's normaliser, so log-probabilities differ as logits do.
        foils = tuple(row["log_probability"] + row[name] - row["logit"] for name in logits)
        kind = kinds[row["point"][:3]]
        yield Point(row["point"], row["layer"], kind, row["log_probability"], row["rank"], foils)


def _steps(layers: pl.DataFrame) -> tuple[Step, ...]:
    return tuple(
        Step(row["layer"], _PARTS[row["part"]], row["increase"])
        for row in layers.filter(pl.col("part") != "stream").iter_rows(named=True)
    )


def _grid(explanation: Explanation) -> Grid:
    """Heads in order of depth; where the tokens are many, the least of them together in one column."""
    rows, tokens = explanation.grid.rows(named=True), explanation.tokens.height
    heads = list(dict.fromkeys((row["layer"], row["head"]) for row in rows))
    words = {row["source"]: Word(_label(row["source_token"]), row["source"]) for row in rows}
    value = {(row["layer"], row["head"], row["source"]): row["leave_one_out"] for row in rows}
    weight = {source: sum(abs(value.get((*head, source), 0.0)) for head in heads) for source in words}
    shown = sorted(sorted(words, key=lambda source: -weight[source])[: WIDEST - (len(words) > WIDEST)])
    rest = [source for source in words if source not in set(shown)]
    cells = []
    for head in heads:
        line = [value.get((*head, source), 0.0) for source in shown]
        cells.append(
            (*line, sum(value.get((*head, source), 0.0) for source in rest)) if rest else tuple(line)
        )
    labels = [words[source] for source in shown]
    if rest:
        labels.append(Word(f"{len(rest)} others"))
    names = tuple(explanation.head(*head) for head in heads)
    return Grid(names, tuple(labels), tuple(cells), tokens, len(rest))


def _attention(explanation: Explanation) -> Iterable[AttentionPattern]:
    """Of each head the last rows up to the explained one, and the columns with most weight in them."""
    pieces, explained = explanation.tokens["piece"], explanation.encoded + explanation.position
    words = [Word(_label(piece), position) for position, piece in enumerate(pieces)]
    kept = explanation.attention.filter(pl.col("weight") >= FAINTEST)
    for (layer, head), rows in kept.group_by("layer", "head", maintain_order=True):
        every = rows["query"].unique().sort().to_list()
        last = bisect_right(every, explained) if len(every) > LONGEST else len(every)
        queries = every[max(0, last - LONGEST) : max(last, LONGEST)]
        seen = rows.filter(pl.col("query").is_in(queries))
        weights = (
            seen.group_by("source").agg(pl.col("weight").sum()).sort("weight", "source", descending=True)
        )
        sources = sorted(weights["source"].head(WIDEST).to_list())
        cells = seen.filter(pl.col("source").is_in(sources)).select("query", "source", "weight").iter_rows()
        yield AttentionPattern(
            explanation.head(int(str(layer)), int(str(head))),
            tuple(words[query] for query in queries),
            tuple(words[source] for source in sources),
            queries.index(explained) if explained in queries else len(queries) - 1,
            tuple((queries.index(query), sources.index(source), weight) for query, source, weight in cells),
        )


_T = TypeVar("_T")
_Key = tuple[str, int, int, int | None]


def _effects(frame: pl.DataFrame) -> dict[_Key, float]:
    """Of each ablated part the effect; the first way, where it was ablated in several."""
    effects: dict[_Key, float] = {}
    for row in frame.iter_rows(named=True):
        effects.setdefault((row["kind"], row["layer"], row["unit"], row["source"]), row["effect"])
    return effects


def _part(
    row: Mapping[str, Any],
    effects: Mapping[_Key, float],
    known: Mapping[NeuronId, Memory],
    head: Callable[[int, int], str],
) -> Part:
    """A row of `heads`, `neurons` or `sources`."""
    values = {name: row[key] for name, key in _MEASURES.items() if key in row}
    values |= {name: row[name] for name in ("weight", "coefficient") if name in row}
    if row.get("router_weight") is not None:
        values[ROUTER] = row["router_weight"]
    if "neuron" in row:
        address = NeuronId(row["layer"], row["neuron"])
        name = row.get("address") or str(address)
        values[ABLATED] = effects.get(("neuron", *address, None))
        promotes, suppresses = (tuple(map(_label, row[name])) for name in ("promotes", "suppresses"))
        return Part(name, values, None, promotes, suppresses, known.get(address))
    word = _word(row["source_token"], row["source"])
    if "head" not in row:
        return Part("", values, word)
    values[ABLATED] = effects.get(("head", row["layer"], row["head"], row["source"]))
    return Part(head(row["layer"], row["head"]), values, word)


def _ledger(
    parts: Sequence[Part],
    part: str,
    sums: tuple[pl.DataFrame, pl.DataFrame],
    rows: int | None,
    columns: Sequence[str],
    unit_part: str = "ffn",
) -> Ledger:
    """A table with its closing rows: biases and mixers, what is not shown, and the sum over all layers.

    sums       the frames `layers` and `others`
    unit_part  as of an `Explanation`
    """
    layers, others = sums
    shown, skipped = _ends(parts, rows)
    added = layers.filter(pl.col("part") == part)
    names = [name for name in (INCREASE, LEFT_OUT, "logit") if _MEASURES[name] in added.columns]
    total = {name: float(added[_MEASURES[name]].sum()) for name in names}
    label, closing = _PARTS[part], []
    for kind in beside(part, unit_part):
        title = _BESIDE[kind]
        rows_of_kind = others.filter(pl.col("part") == kind)
        if rows_of_kind.height:
            sums_of_kind = {name: float(rows_of_kind[_MEASURES[name]].sum()) for name in names}
            closing.append(Part(title, sums_of_kind, kind="bias"))
    rest = {
        name: total[name] - math.fsum(row.values[name] or 0.0 for row in (*closing, *shown)) for name in names
    }
    closing += [
        Part("not shown", rest, kind="rest"),
        Part("all that units stand for" if part == "stream" else f"{label}, all layers", total, kind="total"),
    ]
    used = [name for name in columns if any(row.values.get(name) is not None for row in shown)]
    return Ledger(tuple(used), tuple(shown), tuple(closing), skipped)


def _ends(parts: Sequence[_T], rows: int | None) -> tuple[list[_T], int | None]:
    """The first and the last of a sorted list, more of the first; and where the gap is."""
    if rows is None or len(parts) <= rows:
        return list(parts), None
    last = rows * 2 // 5
    return [*parts[: rows - last], *(parts[-last:] if last else ())], rows - last


def _remembered(frame: pl.DataFrame, rows: int | None) -> dict[NeuronId, float]:
    """The neurons that are shown with triggers, and their coefficients: of the rows the largest |leave-one-out|."""
    shown, _ = _ends(frame.rows(named=True), rows)
    best = sorted(shown, key=lambda row: -abs(row["leave_one_out"]))[:REMEMBERED]
    return {NeuronId(row["layer"], row["neuron"]): row["coefficient"] for row in best}


def _against(contrast: Contrast, rows: int | None, part: str, head: Callable[[int, int], str]) -> Against:
    few = None if rows is None else max(rows // 2, 3)
    heads, neurons, sources = (
        [_part(row, {}, {}, head) for row in frame.iter_rows(named=True)]
        for frame in (contrast.heads, contrast.neurons, contrast.sources)
    )
    sources.sort(key=lambda source: -(source.values[LEFT_OUT] or 0.0))
    # Where both measures are one number (frozen and raw lens), it is shown once.
    same = all(
        math.isclose(part.values[INCREASE] or 0.0, part.values[LEFT_OUT] or 0.0, rel_tol=1e-4, abs_tol=1e-6)
        for part in (*heads, *neurons)
    )
    measures = (INCREASE,) if same else (INCREASE, LEFT_OUT)
    sums = contrast.layers, contrast.others
    return Against(
        foil=_candidate(contrast.foil, contrast.probability),
        start=contrast.start,
        total=contrast.total,
        steps=_steps(contrast.layers),
        heads=_ledger(heads, "attention", sums, few, ("weight", *measures), part),
        sources=_ledger(sources, "attention", sums, few if rows else 12, measures, part),
        neurons=_ledger(neurons, part, sums, few, ("coefficient", ROUTER, *measures), part),
    )


def _switched(explanation: Explanation) -> Iterable[Switched]:
    for (layer, neuron), rows in explanation.queries.group_by("layer", "neuron", maintain_order=True):
        causes = tuple(_cause(row, explanation.head) for row in rows.iter_rows(named=True))
        nats = [cause.nats for cause in causes if cause.nats is not None]
        share = math.fsum(cause.share for cause in causes)
        name = rows["address"][0] if "address" in rows.columns else f"L{layer}N{neuron}"
        yield Switched(name, share, math.fsum(nats) if nats else None, causes)


def _cause(row: Mapping[str, Any], head: Callable[[int, int], str]) -> Cause:
    kind, layer, unit = row["kind"], row["query_layer"], row["query_unit"]
    name = {
        "head": head(layer, unit) if kind == "head" else "",
        "neuron": row.get("query_address") or f"L{layer}N{unit}",
        "attention bias": f"attention bias {layer}",
        "mixer": f"mixer {layer}",
        "ffn bias": f"FFN bias {layer}",
        "ffn": f"FFN {layer}",
        "unit bias": f"bias of units {layer}",
        "unit error": f"error of units {layer}",
        "per-layer input": f"input of layer {layer}",
        "remainder": "not shown",
    }.get(kind, kind)
    return Cause(
        name, _word(row["source_token"], row["source"]), row["share"], row["increase"], row["gate"],
        row["up"], row["inner"], kind,
    )  # fmt: skip


def _cargo(frame: pl.DataFrame) -> Cargo | None:
    if frame.height == 0:
        return None
    first = frame.row(0, named=True)
    points = (Carried(row["point"], row["recomputed"], row["fixed"]) for row in frame.iter_rows(named=True))
    return Cargo(first["layer"], Word(_label(first["source_token"]), first["source"]), tuple(points))


def _ablated(explanation: Explanation) -> Iterable[Ablated]:
    for row in explanation.ablations.iter_rows(named=True):
        place = row["layer"], row["unit"]
        name = str(NeuronId(*place)) if row["kind"] == "neuron" else explanation.head(*place)
        yield Ablated(
            name, _word(row["source_token"], row["source"]), row["kind"], row["how"], row["increase"],
            row["leave_one_out"], row["effect"],
        )  # fmt: skip


def _correlation(frame: pl.DataFrame) -> float | None:
    """Pearson's, of leave-one-out and the effect of true ablation."""
    pairs = frame.select("leave_one_out", "effect").drop_nulls()
    if pairs.height < 3:
        return None
    correlation = pairs.select(pl.corr("leave_one_out", "effect")).item()
    return correlation if correlation is not None and math.isfinite(correlation) else None


def _notes(explanation: Explanation) -> Iterable[str]:
    """What has to be said about the question before the answer."""
    for role, choice in (("target", explanation.target), *(("foil", foil) for foil in explanation.foils)):
        if choice.note:
            yield Vocabulary.visible(
                f"{role} {_label(choice.given or choice.piece)}: {choice.note}", edges=False
            )
    yield from (Vocabulary.visible(note, edges=False) for note in explanation.notes)
    if explanation.unread:
        yield (
            f"the prediction after token {explanation.position} is explained; what follows it in the prompt is not "
            "read"
        )
    if any(not piece for piece in explanation.tokens["piece"]):
        yield f"{EMPTY} is a token that is part of a character; the token that completes it shows the whole"


def _method(explanation: Explanation) -> Iterable[str]:
    """How it was computed, a sentence each."""
    yield (
        "Everything is in nats of log p(target) unless a column says otherwise; layers, heads, neurons, positions "
        "and ranks count from 0."
    )
    yield (
        f"{INCREASE}: log p after the part is added to what its layer reads, less log p before. {LEFT_OUT}: log p at "
        "the end, less log p at the end without the part. logit: what the part alone writes for the target. chain: "
        "a part's own leave-one-out and its share of that of the listed neurons above, to which it contributes. "
        "not shown: parts without a row, and what parts do only together (log-probabilities of parts do not add up)."
    )
    yield {
        "frozen": "The lens takes the final norm's statistic from the final residual: logits of parts add up.",
        "own": "The lens gives each vector its own statistic of the final norm (the logit lens): logits do not add up.",
        "raw": "The lens leaves the final norm out.",
    }[explanation.lens]
    counts = [
        f"{explanation.evaluations[name]:,} of {explanation.evaluations[f'{name}_of']:,} {title}"
        for name, title in (("heads", "heads x sources"), ("neurons", "neurons"))
        if name in explanation.evaluations and f"{name}_of" in explanation.evaluations
    ]
    if counts:
        yield (
            f"The {explanation.top} largest and {explanation.top} most negative of each measure were found exactly: "
            f"{' and '.join(counts)} were read through the whole vocabulary, the others excluded by bounds."
        )


def _command(explanation: Explanation) -> str:
    words = ["mnemoscope", "explain", explanation.model, explanation.prompt]
    if explanation.decoder_prompt:
        words += ["--decoder-prompt", explanation.decoder_prompt]
    if explanation.target.given is not None:
        words += ["--target", explanation.target.given]
    if explanation.target.by_id:
        words += ["--target-id", str(explanation.target.token)]
    for foil in explanation.foils:
        words += ["--foil-id", str(foil.token)] if foil.given is None else ["--foil", foil.given]
    if explanation.unread:
        words += ["--position", str(explanation.position)]
    if explanation.lens != "frozen":
        words += ["--lens", explanation.lens]
    if explanation.top != TOP:
        words += ["--top", str(explanation.top)]
    if explanation.run:
        words += ["--run", explanation.run]
    if explanation.ablations.height:
        words += ["--ablate", str(explanation.ablations.filter(pl.col("kind") == "neuron").height)]
    return Vocabulary.visible(shlex.join(words), edges=False)
