"""Take one prediction apart: which heads, memories and biases made it, exactly, and what switched them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import polars as pl
import torch
from torch import Tensor, nn

from mnemoscope.arguments import check_explanation
from mnemoscope.errors import ModelNotSupported, QueryError
from mnemoscope.model.devices import made_on
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.state import Fingerprint
from mnemoscope.model.stream import Stream
from mnemoscope.model.unit_parts import last_layer
from mnemoscope.prediction.ablate import NO_ABLATIONS, ablate_top
from mnemoscope.prediction.bases import Geometry
from mnemoscope.prediction.explanation import ChosenToken, Contrast, Explanation, foil_names, numbered
from mnemoscope.prediction.masked import mask_id
from mnemoscope.prediction.questions import ResolvedQuestion, ask, read_by_encoder
from mnemoscope.prediction.search import ExtremeParts, TopK, search
from mnemoscope.prediction.switched import attention_queries, chained, queries
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.records import UNIT_POINTS, Cells, Progress
from mnemoscope.text.spelling import vocabulary_of
from mnemoscope.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

KINDS = ("heads", "whole_heads", "sources", "neurons")
PREDICTIONS = 10
GRID = (8, 64)  # heads and tokens of the grid
ATTENDED = (16, 64)  # heads, and tokens from which they look
LEAST_WEIGHT = 0.01  # of attention, that is kept
PROMOTED = 6  # tokens named for a neuron
_MEASURES = ("increase", "leave_one_out")
_INTEGERS = ("layer", "head", "query", "source", "neuron", "position", "token")


def _check(model: Model, ablate: int, run: Run | None) -> None:
    """ModelNotSupported for a model that predicts no token, or of which this is not told, and what
    `Model.check_tokenizer` raises.
    """
    if run is not None:
        model.check_built(run, "explaining with the run")
    model.check_tokenizer()
    model.check_doubles("explaining a prediction of")
    if model.alone:
        raise ModelNotSupported(
            f"explaining a prediction of {model.id}: the run was built without targets, so its encoder alone is looked "
            "at, which predicts nothing; leave {run} out, or give a run with targets",
            run=...,
        )
    if model.anatomy.headless:
        raise ModelNotSupported(
            f"explaining a prediction of {model.id}: it has no language-model head and predicts no token; give it with "
            "the head that it was trained with"
        )
    if ablate and model.anatomy.bidirectional:
        raise ModelNotSupported(
            f"explaining a prediction of {model.id}: parts are ablated at the last position, behind which nothing is "
            "read, and an encoder's masked token stands before others; leave {ablate} out",
            ablate=...,
        )


def explain(
    model: Model,
    prompt: str,
    target: str | None = None,
    foils: str | Sequence[str] = (),
    *,
    position: int = -1,
    target_id: int | None = None,
    foil_ids: Sequence[int] = (),
    decoder_prompt: str = "",
    lens: str = "frozen",
    projection: str = "adaptive",
    top: int = 20,
    run: Run | None = None,
    ablate: int = 0,
    ablate_to: str | float = "zero",
    report: Callable[[Progress], None] | None = None,
) -> Explanation:
    """Explain the prediction after one position of a prompt; see `Explanation` for what comes back.

    target     the token to account for, by its text; the model's own first choice if None
    foils      what it is compared with
    position   the position whose prediction is explained, 0-based, negative from the end; tokens that the tokenizer
               puts before the prompt count, those it puts after are left out
    target_id  the token to account for by its id, and foil_ids foils, where a text is not read as it was meant
    decoder_prompt  what the decoder of an encoder-decoder has written so far; positions are then those of its tokens
    lens       raw | own | frozen (the statistics of the final residual, under which logits add up)
    projection adaptive | flat: how an adaptive softmax is read, as the model's own or as one over all tokens
    top        rows of each frame, for each sign and measure
    run        a run of the same model; needed for ``ablate_to="mean"``
    ablate     how many neurons and how many heads x sources to ablate in forward passes (A79)
    ablate_to  what a coefficient is set to: ``zero``, ``mean`` (over the run) or a number

    Raises QueryError for a question without an answer, RunMismatch for a run of another model.
    """
    check_explanation(lens, top, ablate, ablate_to, has_run=run is not None, projection=projection)
    _check(model, ablate, run)
    say = _Steps(report or (lambda _: None), 3 + (ablate > 0))
    with model.running(), torch.inference_mode(), made_on(model.device):
        traces = _Traces(model, read_by_encoder(model, prompt))
        question = ask(
            model, prompt, target, foils, position, traces.logits, target_id=target_id, foil_ids=foil_ids,
            decoder_prompt=decoder_prompt,
        )  # fmt: skip
        say.total += len(question.foils)
        words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
        chosen = question.target or _own_choice(traces.logits(question.tokens), words.pieces, question.foils)
        reading = Lens.of(model.anatomy, lens, projection)
        prediction = traces.prediction(question, chosen, reading, words)
        say("layers")
        whole = _whole(prediction, foil_names(question.foils))
        say("heads and neurons")
        rankings = [TopK(prediction.groups(kind), _top_of(kind, top)) for kind in KINDS]
        extremes = dict(zip(KINDS, search(prediction.bases, rankings, final=prediction.final), strict=True))
        frames = {
            kind: _rows(prediction, kind, parts.group, parts.index, parts.values, logits=True)
            for kind, parts in extremes.items()
        }
        frames["neurons"], frames["heads"] = chained(prediction, frames["neurons"], frames["heads"])
        contrasts = [_contrast(prediction, n, foil, top, say) for n, foil in enumerate(question.foils)]
        say("upstream contributions")
        upstream, carried = queries(prediction, frames["neurons"]), attention_queries(prediction)
        extra: dict[str, Any] = frames | _details(prediction, frames) | whole
        if ablate:
            say("ablations")
            ablations = ablate_top(
                model, prediction.stream, chosen.token, extra, words, ablate, ablate_to, run, say.parts
            )
        explanation = Explanation(
            model=model.id,
            family=model.anatomy.family,
            dtype=model.dtype,
            lens=lens,
            prompt=prompt,
            position=question.position,
            unread=question.unread,
            target=chosen,
            foils=question.foils,
            top=top,
            layer_count=prediction.layers,
            parallel=model.anatomy.parallel,
            masked=model.anatomy.bidirectional,
            unit_part=_unit_part(model),
            start=prediction.bases.start,
            **extra,
            queries=upstream,
            attention_queries=carried,
            predictions=_predictions(prediction),
            ablations=ablations if ablate else NO_ABLATIONS,
            contrasts=tuple(contrasts),
            run=None if run is None else str(run.path),
            evaluations=_evaluations(extremes),
            notes=question.notes + _notes(model, reading),
        )
    return _counted_through(explanation, model, prediction.stream, decoder_prompt)


def _counted_through(
    explanation: Explanation, model: Model, stream: Stream, decoder_prompt: str
) -> Explanation:
    """Of an encoder-decoder with the layers of the encoder counted first, and what its two stacks have read."""
    if not model.anatomy.stacks:
        return explanation
    first = model.anatomy.stacks[0].n_layers
    values = {field.name: getattr(explanation, field.name) for field in fields(explanation)}
    frames: dict[str, Any] = {
        name: numbered(value, first) for name, value in values.items() if isinstance(value, pl.DataFrame)
    }
    return replace(
        explanation,
        **frames,
        contrasts=tuple(contrast.numbered(first) for contrast in explanation.contrasts),
        layer_count=model.anatomy.n_layers,
        decoder_prompt=decoder_prompt,
        encoded=stream.encoded,
        own_heads=stream.anatomy.layers[0].n_heads,
    )


def _evaluations(extremes: dict[str, ExtremeParts]) -> dict[str, int]:
    """By kind of part how many vectors were taken through the whole vocabulary, and of how many."""
    full = {kind: parts.full for kind, parts in extremes.items()}
    return full | {f"{kind}_of": parts.of for kind, parts in extremes.items()}


_GEOMETRIES: WeakKeyDictionary[Model, tuple[Fingerprint, Geometry]] = WeakKeyDictionary()


def geometry_of(model: Model, lens: Lens) -> Geometry:
    """The geometry of the unembedding, made once for a model and again when it was changed."""
    if model not in _GEOMETRIES or _GEOMETRIES[model][0] != model.seen:
        _GEOMETRIES[model] = (model.seen, Geometry(lens.unembedding))
    return _GEOMETRIES[model][1]


def _top_of(kind: str, top: int) -> int:
    """Whole heads and sources are sums of what `heads` lists, and few: fewer rows say it."""
    return top if kind in ("heads", "neurons") else max(1, top // 4)


class _Steps:
    """A count of the steps done, which tells the callback."""

    def __init__(self, report: Callable[[Progress], None], total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def __call__(self, stage: str) -> None:
        self.report(Progress(stage, self.done, self.total, "steps"))
        self.done += 1

    def parts(self, done: int, total: int) -> None:
        """How far the last one has come."""
        self.report(Progress("taking parts out", done, total, "parts"))


class _Traces:
    """Forward passes of one call, each sequence once."""

    def __init__(self, model: Model, source: tuple[int, ...]) -> None:
        self.model = model
        self.source = torch.tensor([source], device=model.device) if source else None
        self.seen: dict[tuple[int, ...], Stream] = {}

    def of(self, tokens: tuple[int, ...]) -> Stream:
        if tokens not in self.seen:
            read = torch.tensor([tokens], device=self.model.device)
            self.seen[tokens] = self.model.traced(read, self.source)
        return self.seen[tokens]

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        """Of what follows some tokens; of an encoder, of what is masked in them."""
        return self.of(tokens).logits[self.place(tokens)]

    def prediction(
        self, question: ResolvedQuestion, target: ChosenToken, lens: Lens, words: Vocabulary
    ) -> TracedPrediction:
        """What is asked about, under a lens."""
        foils, place = tuple(foil.token for foil in question.foils), self.place(question.tokens)
        shared = geometry_of(self.model, lens)
        return TracedPrediction(self.of(question.tokens), lens, target.token, foils, words, shared, place)

    def place(self, tokens: tuple[int, ...]) -> int:
        """The position whose prediction this is."""
        return tokens.index(mask_id(self.model)) if self.model.anatomy.bidirectional else len(tokens) - 1


def _own_choice(
    logits: Tensor, pieces: Callable[..., list[str]], foils: Sequence[ChosenToken]
) -> ChosenToken:
    token = int(logits.argmax())
    piece = "".join(pieces([token]))
    if any(foil.token == token for foil in foils):
        raise QueryError(
            f"explaining a prediction: the foil {piece!r} begins with the model's own prediction, which is the "
            "target when none is given; give another foil, or a target"
        )
    return ChosenToken(None, token, piece, (token,), "the model's own first choice")


def _unit_part(model: Model) -> str:
    """Which update of the stream neurons, or other units, are parts of."""
    if model.units is None or model.units.writes == "ffn_output":
        return "ffn"
    return "attention" if model.units.writes == "attention_output" else "stream"


def _notes(model: Model, lens: Lens) -> tuple[str, ...]:
    notes = []
    if model.units is not None:
        point = model.units.writes
        stand = (
            UNIT_POINTS[point].format(last_layer(model.anatomy)) + ", and so for all that was written before"
        )
        places = {"ffn_output": "what FFNs write", "attention_output": "what attention writes"}
        notes.append(
            f"neurons are here units of {model.units.id}, which stand for {places.get(point, stand)}; what they "
            "leave of it is the error of units, and an FFN without units is one part"
        )
    if model.anatomy.stacks:
        notes.append(
            "an encoder-decoder: these are the parts of its decoder; heads with an X are of cross attention and look "
            "at what the encoder made of its tokens, which is not taken apart further; tokens and layers of the "
            "encoder are counted first"
        )
    if model.anatomy.parallel:
        notes.append(
            "attention and feed-forward layers run in parallel: Lres is Lin plus the attention output"
        )
    if model.anatomy.experts:
        notes.append(
            "a mixture of experts: a neuron writes its coefficient times the router's weight; which experts run, and "
            "by which weight, is held fixed, and biases of experts are among the FFN biases"
        )
    if model.anatomy.softcap is not None:
        notes.append(
            "the logits are soft-capped: logits of parts are before the cap and add up, probabilities are after"
        )
    if lens.bands is not None:
        notes.append(
            "the softmax is adaptive: log-probabilities are its own, and so are logits of points; logits of parts are "
            "read by its flat projection, under which they add up"
        )
    elif model.anatomy.bands is not None:
        notes.append(
            "read by the flat projection of an adaptive softmax: logits add up, and probabilities are those of one "
            "softmax over all tokens, which are not the model's own"
        )
    if not model.anatomy.predicting.adds_up_as_read:
        notes.append(
            "the residual stream is normalised on the way: parts and points are what becomes of them at the last norm, "
            "and what switched neurons on is not told"
        )
    if lens.name == "raw" and model.anatomy.final_norm is not None:
        notes.append("under the raw lens the end of the stream is not what the model predicts")
    return tuple(notes)


def _frame(columns: dict[str, Sequence[object]]) -> pl.DataFrame:
    """Whole numbers as Int32, texts as text, lists of texts as they are, everything else as Float64."""
    kinds: dict[str, pl.DataType | type[pl.DataType]] = dict.fromkeys(_INTEGERS, pl.Int32)
    kinds |= {"point": pl.String, "part": pl.String, "piece": pl.String, "source_token": pl.String}
    kinds |= {"address": pl.String}
    kinds |= {"rank": pl.Int64, "promotes": pl.List(pl.String), "suppresses": pl.List(pl.String)}
    return pl.DataFrame(
        [pl.Series(name, list(values), kinds.get(name, pl.Float64)) for name, values in columns.items()]
    )


def _predictions(prediction: TracedPrediction) -> pl.DataFrame:
    logits = prediction.logits.double()
    scores = logits.log_softmax(-1)
    best = logits.topk(min(PREDICTIONS, len(logits))).indices
    return _frame(
        {
            "token": best.tolist(),
            "piece": [prediction.words.pieces([token])[0] for token in best.tolist()],
            "logit": logits[best].tolist(),
            "log_probability": scores[best].tolist(),
            "probability": scores[best].exp().tolist(),
        }
    )


def _whole(prediction: TracedPrediction, foils: Sequence[str]) -> dict[str, pl.DataFrame]:
    """The stream, what each layer added, and what neither heads nor neurons wrote."""
    bases, layers, end = prediction.bases, prediction.layers, prediction.final + 1
    raw = prediction.lens.cap(bases.raw_logits[:end])
    log_p = bases.log_probabilities[:end, prediction.target].double()
    stream = _frame(
        {
            "point": ["Lin0", *(f"{name}{layer}" for layer in range(layers) for name in ("Lres", "Lout"))],
            "layer": [0, *(layer for layer in range(layers) for _ in range(2))],
            "log_probability": log_p.tolist(),
            "probability": log_p.exp().tolist(),
            "rank": (raw > raw[:, prediction.target, None]).sum(-1).tolist(),
            "logit": raw[:, prediction.target].tolist(),
            **{
                f"logit_{name}": raw[:, foil].tolist()
                for name, foil in zip(foils, prediction.foils, strict=True)
            },
        }
    )
    table = _frame(
        {
            **_updates(prediction),
            "increase": _gained(prediction, prediction.bases.log_probabilities[:, prediction.target]),
            "leave_one_out": prediction.left(prediction.updates).tolist(),
            "logit": prediction.logit(prediction.updates).tolist(),
        }
    )
    return {"stream": stream, "layers": table, "others": _others(prediction)}


def _biases(prediction: TracedPrediction) -> tuple[list[tuple[str, int | None]], Tensor, Tensor]:
    """The embedding, mixers and biases that are not zero: their names, vectors, and the rows they are added to."""
    names: list[tuple[str, int | None]] = [("embedding", None)]
    vectors, base = [prediction.stream.embedding_part(prediction.position)], [prediction.nothing]
    for layer in range(prediction.layers):
        for name, point, vector in prediction.stream.beside(layer, prediction.position):
            if bool(vector.any()):
                names.append((name, layer))
                vectors.append(vector)
                base.append(prediction.nothing if point is None else point)
    return names, torch.stack(vectors), torch.tensor(base)


def _others(prediction: TracedPrediction) -> pl.DataFrame:
    names, vectors, base = _biases(prediction)
    values, logits = prediction.measured(vectors, base), prediction.logit(vectors)
    rows: list[tuple[str, int | None, float, float | None, float]] = []
    nothing = prediction.bases.raw_logits[prediction.nothing]
    if bool((nothing != nothing[0]).any()):
        alone = float(prediction.bases.log_probabilities[prediction.nothing, prediction.target])
        rows.append(
            ("head bias", None, alone - prediction.bases.start, None, float(nothing[prediction.target]))
        )
    for (name, layer), (increase, left_out), logit in zip(
        names, values.tolist(), logits.tolist(), strict=True
    ):
        rows.append((name, layer, increase, left_out, logit))
    return _frame(dict(zip(("part", "layer", *_MEASURES, "logit"), zip(*rows, strict=True), strict=True)))


def _rows(
    prediction: TracedPrediction, kind: str, group: Tensor, index: Tensor, values: Tensor, *, logits: bool
) -> pl.DataFrame:
    """The frame of some parts of one kind, which stand in order of group and index, sorted by leave-one-out."""
    groups = prediction.groups(kind)
    if kind == "heads" and prediction.stream.encoded:  # where heads do not look, nothing is a part
        size, encoded = prediction.sources, prediction.stream.encoded
        across = index // size >= prediction.stream.anatomy.layers[0].n_heads
        looks = across == (index % size < encoded)
        group, index, values = group[looks], index[looks], values[looks]
    vectors = torch.cat([groups[row].vectors(index[group == row]) for row in group.unique().tolist()])
    columns = _address(prediction, kind, group, index) | _nats(values)
    if logits:
        columns["logit"] = prediction.logit(vectors).tolist()
    if kind == "neurons":
        columns["promotes"], columns["suppresses"] = prediction.promoted(vectors, PROMOTED)
    return _frame(columns).sort("leave_one_out", descending=True, maintain_order=True)


def _nats(values: Tensor) -> dict[str, Sequence[object]]:
    """The columns of increase and leave-one-out."""
    return {name: values[:, column].tolist() for column, name in enumerate(_MEASURES)}


def _updates(prediction: TracedPrediction) -> dict[str, Sequence[object]]:
    """The columns that say what each update of the stream is."""
    layers, parts, *_ = zip(*prediction.steps, strict=True)
    return {"layer": layers, "part": parts}


def _gained(prediction: TracedPrediction, at: Tensor) -> list[float]:
    """What each update adds to a number [base] that is known at each base."""
    known = at.tolist()
    return [known[after] - known[before] for *_, before, after in prediction.steps]


def _address(
    prediction: TracedPrediction, kind: str, group: Tensor, index: Tensor
) -> dict[str, Sequence[object]]:
    """The columns that say where parts are."""
    layer, unit, count = group.tolist(), index.tolist(), prediction.sources
    traced, position = prediction.stream.layers, prediction.position
    if kind == "neurons":
        coefficients = _numbers(traced[a].coefficients[position, b] for a, b in zip(layer, unit, strict=True))
        columns: dict[str, Sequence[object]] = {"layer": layer, "neuron": unit, "coefficient": coefficients}
        if not prediction.stream.anatomy.experts:
            return columns
        cells = Cells(prediction.stream.anatomy.sizes, prediction.stream.anatomy.experts)
        names = [str(cells.id(a, b)) for a, b in zip(layer, unit, strict=True)]
        return columns | {"address": names, "router_weight": _router_weights(prediction, layer, unit)}
    if kind == "whole_heads":
        return {"layer": layer, "head": unit}
    source = [number % count for number in unit]
    pieces = _pieces(prediction)
    named = {"source": source, "source_token": [pieces[number] for number in source]}
    if kind == "sources":
        return {"layer": layer, **named}
    head = [number // count for number in unit]
    looked = {a: prediction.stream.attention_weights(a, position) for a in set(layer)}
    weights = _numbers(looked[a][h, s] for a, h, s in zip(layer, head, source, strict=True))
    return {"layer": layer, "head": head, **named, "weight": weights}


def _router_weights(
    prediction: TracedPrediction, layers: Sequence[int], neurons: Sequence[int]
) -> list[float | None]:
    """What the router multiplied the expert of each neuron with; None in a dense layer."""
    blocks, traced = prediction.stream.anatomy.layers, prediction.stream.layers
    spread = {
        layer: blocks[layer].spread(weights[prediction.position])
        for layer in set(layers)
        if (weights := traced[layer].weights) is not None
    }
    pairs = list(zip(layers, neurons, strict=True))
    known = iter(_numbers(spread[layer][neuron] for layer, neuron in pairs if layer in spread))
    return [next(known) if layer in spread else None for layer, _ in pairs]


def _numbers(scalars: Iterable[Tensor]) -> list[float]:
    """The numbers of tensors of one dtype, fetched together."""
    every = list(scalars)
    return torch.stack(every).tolist() if every else []


def _pieces(prediction: TracedPrediction) -> list[str]:
    return prediction.words.pieces(prediction.stream.read_tokens.tolist())


def _details(prediction: TracedPrediction, frames: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """The grid of heads x tokens, where heads look, and what all attention together brought from each token."""
    ranked = (
        pl.concat(
            [frames[kind].select("layer", "head", "leave_one_out") for kind in ("heads", "whole_heads")]
        )
        .group_by("layer", "head", maintain_order=True)
        .agg(pl.col("leave_one_out").abs().max())
        .sort("leave_one_out", descending=True, maintain_order=True)
        .select("layer", "head")
    )
    total = torch.stack([prediction.attention(layer).sum(0) for layer in range(prediction.layers)]).sum(0)
    left = prediction.left(total)
    sources = left.abs().topk(min(GRID[1], len(left))).indices.sort().values
    pairs = sorted(ranked.head(GRID[0]).iter_rows())
    vectors = torch.cat([prediction.attention(layer)[head][sources] for layer, head in pairs])
    base = torch.tensor([2 * layer for layer, _ in pairs]).repeat_interleave(len(sources))
    values = prediction.measured(vectors, base)
    pieces, source = _pieces(prediction), sources.tolist() * len(pairs)
    grid = _frame(
        {
            "layer": [layer for layer, _ in pairs for _ in sources],
            "head": [head for _, head in pairs for _ in sources],
            "source": source,
            "source_token": [pieces[position] for position in source],
            **_nats(values),
        }
    )
    tokens = _frame(
        {
            "position": range(len(pieces)),
            "token": prediction.stream.read_tokens.tolist(),
            "piece": pieces,
            "leave_one_out": left.tolist(),
            "logit": prediction.logit(total).tolist(),
        }
    )
    attention = _attention(prediction, sorted(ranked.head(ATTENDED[0]).iter_rows()))
    return {"grid": grid, "attention": attention, "tokens": tokens}


def _attention(prediction: TracedPrediction, heads: Sequence[tuple[int, int]]) -> pl.DataFrame:
    """Where heads look from the last tokens, and from the one that is explained."""
    stream, end = prediction.stream, prediction.sources - prediction.stream.encoded
    first = max(0, min(prediction.position, end - ATTENDED[1]))
    last = min(end, first + ATTENDED[1])
    places = [(layer, head, query) for layer, head in heads for query in range(first, last)]
    looked = [stream.attention_weights(layer, query)[head].float() for layer, head, query in places]
    weights = nn.utils.rnn.pad_sequence(looked, batch_first=True) if looked else torch.zeros(0, 0)
    row, source = (weights >= LEAST_WEIGHT).nonzero(as_tuple=True)
    seen, weight = [places[number] for number in row.tolist()], weights[row, source].tolist()
    layers, where, queries_of = ([place[axis] for place in seen] for axis in range(3))
    return _frame(
        {
            "layer": layers,
            "head": where,
            "query": [stream.encoded + query for query in queries_of],
            "source": source.tolist(),
            "weight": weight,
        }
    )


def _contrast(
    prediction: TracedPrediction, number: int, foil: ChosenToken, top: int, say: Callable[[str], None]
) -> Contrast:
    """The contrast of the target with one foil; only two logits are needed, so every part is measured."""
    say("contrast")
    odds = prediction.point_odds[:, number]
    first = prediction.steps[0][2]

    def measured(vectors: Tensor, base: Tensor) -> Tensor:
        return prediction.odds(vectors, base, [foil.token])[..., 0]

    steps = measured(prediction.updates, torch.tensor([before for *_, before, _ in prediction.steps]))
    steps[:, 0] = torch.tensor(_gained(prediction, odds))
    names, vectors, base = _biases(prediction)
    frames = {}
    sources = torch.zeros(prediction.sources, 2, dtype=torch.float64)
    for kind in ("heads", "neurons"):
        groups = prediction.groups(kind)
        flat = torch.cat([measured(g.vectors(None), torch.full((g.size,), g.base)) for g in groups])
        if kind == "heads":
            sources = flat.unflatten(0, (prediction.layers, -1, prediction.sources)).sum((0, 1))
        rows = torch.cat(
            [flat[:, column].argsort(descending=side) for column in (0, 1) for side in (True, False)]
        )
        chosen = torch.cat([order[:top] for order in rows.split(len(flat))]).unique()
        places = Cells(tuple(group.size for group in groups)).place(chosen.cpu().numpy())
        group, index = map(torch.as_tensor, places)
        frames[kind] = _rows(prediction, kind, group, index, flat[chosen], logits=False)
    parts, layers = zip(*names, strict=True)
    return Contrast(
        foil,
        probability=float(prediction.bases.log_probabilities[prediction.final, foil.token].exp()),
        start=float(odds[first]),
        total=float(odds[prediction.final]),
        layers=_frame(_updates(prediction) | _nats(steps)),
        others=_frame({"part": parts, "layer": layers, **_nats(measured(vectors, base))}),
        sources=_frame(
            {"source": range(len(sources)), "source_token": _pieces(prediction), **_nats(sources)}
        ),
        **frames,
    )
