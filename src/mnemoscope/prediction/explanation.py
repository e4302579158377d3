"""An `Explanation` holds one prediction taken apart: plain values and Polars frames; nothing here imports torch.

All contributions are in nats; positions, ranks, layers, heads and neurons are 0-based. Columns that a part does not
have are null. The frames (A30-A45, A50-A57, A63, A79; docs/methods.md has the formulas):

    stream       point (Lin0, Lres0, Lout0, ...), layer, log_probability, probability, rank and logit of the target,
                 and one column ``logit_<name of the foil>`` per foil (`foil_names`: its `ChosenToken.piece`)
    layers       layer, part (attention | ffn), increase, leave_one_out, logit; the increases add up to the
                 last minus the first log_probability of the stream. Where units stand for the residual stream, their
                 layer's ``stream`` comes first, which is added to nothing and is all that was written up to there
    others       part (head bias | embedding | attention bias | mixer | ffn bias | per-layer input), layer, increase,
                 leave_one_out, logit: what no head and no neuron wrote; only those that exist. With units that are not
                 neurons also ``ffn`` (an FFN that has none, as a whole), ``unit bias`` (and skip) and ``unit error``
    heads        layer, head, source, source_token, weight (of attention), increase, leave_one_out, logit, chain
    whole_heads  layer, head, increase, leave_one_out, logit: each head summed over its sources
    sources      layer, source, source_token, increase, leave_one_out, logit: each source summed over the heads
                 (the attention sub-values of Yu et al. 2023, Eq. 5)
    grid         layer, head, source, source_token, increase, leave_one_out: the heads that matter most x the tokens
    attention    layer, head, query, source, weight: where these heads, and some more, look from each of the last 64
                 tokens (query, source: positions in `tokens`); weights below .01 are left out
    neurons      layer, neuron, coefficient, increase, leave_one_out, logit, chain, promotes, suppresses
                 (chain: A63, see `switching`; the last two are tokens, read with the sign of the coefficient); of a
                 mixture of experts also address, with the expert, and router_weight, which the coefficient is
                 multiplied with (null in dense layers); `queries` then has address and query_address
    queries      what switched on the neurons that matter most, largest |share| first and a row ``remainder`` last:
                 layer, neuron | kind (embedding, head, neuron, attention bias, mixer, ffn bias, per-layer input, ffn,
                 unit bias, unit error, key bias, remainder), query_layer, query_unit (head or neuron), source,
                 source_token | share (of the coefficient; the rows of a neuron add up to it), gate and up (what each
                 branch alone gives; null if plain), inner (with the norm-folded key; Eq. 24), score (inner x increase;
                 Eq. 25), increase (the neuron's, shared)
    attention_queries  where the best attention sub-value got what it carries (A53, A54): layer, source, source_token,
                 point (Lin0, ATTN0, FFN0, ...), recomputed, fixed: how much the sub-value's score for the target (its
                 logit minus the first foil's, or minus the expected logit) falls when this vector is taken out of
                 its source, attention weights computed again or kept
    predictions  token, piece, logit, log_probability, probability: the model's own, most probable first
    tokens       position, token, piece, leave_one_out, logit: the prompt up to the explained position, with what all
                 attention together brought from each token
    ablations    kind (neuron | head), layer, unit, source, source_token, how (zero | mean | value), increase,
                 leave_one_out, effect: log p(target) minus log p(target) with it ablated in a forward pass

In an encoder-decoder these are the parts of the decoder. Layers, and tokens where sources are named, are counted
through, the encoder's first, and the heads of a layer's cross attention follow its own.

`heads` and `neurons` hold the `top` largest and the `top` most negative by `increase` and by `leave_one_out`, found
exactly, `whole_heads` and `sources` a quarter as many; all are sorted by `leave_one_out`, largest first.

    increase       log p(w | x + v) - log p(w | x), x being what the part is added to (Yu et al. 2023, Eq. 19; A38, A39)
    leave_one_out  log p(w | final) - log p(w | final - v), both under the lens; nothing downstream reacts
    logit          what the lens reads for the target in v alone
    effect         the same as leave_one_out, with everything downstream reacting (A79)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import polars as pl

from mnemoscope.display import Shown
from mnemoscope.prediction.headline import Account, probability, sentence, token

MEASURES = ("increase", "leave_one_out", "logit")


@dataclass(frozen=True)
class ChosenToken:
    """A target or foil: what was asked for, and the token that stands for it.

    given   the text that was asked for; None for the model's own choice
    token   the token that is scored: the first in which target and foils differ
    piece   how that token reads, leading space included
    tokens  all tokens of the text, as resolved
    note    one sentence when the token is not simply the text (several tokens, a leading space added), else ""
    read    the text whose tokens these are: `given`, or `given` with a leading space; None if there was no text
    by_id   whether the token was given by its id
    """

    given: str | None
    token: int
    piece: str
    tokens: tuple[int, ...]
    note: str = ""
    read: str | None = None
    by_id: bool = False


def foil_names(foils: Sequence[ChosenToken]) -> list[str]:
    """A name for each foil: its piece, with the token's id where another token reads the same."""
    alike = {foil.piece: {other.token for other in foils if other.piece == foil.piece} for foil in foils}
    return [
        foil.piece if len(alike[foil.piece]) == 1 else f"{foil.piece} (token {foil.token})" for foil in foils
    ]


def numbered(frame: pl.DataFrame, first: int) -> pl.DataFrame:
    """A frame of the layers of a decoder with those of the encoder counted before: layers, and the names of points."""
    layers = [pl.col(name) + first for name in ("layer", "query_layer") if name in frame.columns]
    if "point" in frame.columns:
        number = pl.col("point").str.extract(r"(\d+)$").cast(pl.Int32) + first
        layers.append(pl.concat_str(pl.col("point").str.extract(r"^(\D+)"), number).alias("point"))
    return frame.with_columns(layers)


@dataclass(frozen=True)
class Contrast:
    """A contrast of the target with one foil: log p(target) - log p(foil), in nats, by part (A50-A52, A55).

    A part's `increase` is what that difference gains when it is added to its layer's input, its `leave_one_out`
    what is lost when it is taken from the final residual. No other token enters, so both are exact for
    every part; under the raw and frozen lens without a soft cap they are the same number, and add up.

    total    the difference at the end of the stream; `start` the difference at Lin0
    layers   layer, part, increase, leave_one_out; the increases add up to total - start
    others   as in `Explanation`, without `logit`
    heads    layer, head, source, source_token, weight, increase, leave_one_out: the top of both signs
    sources  source, source_token, increase, leave_one_out: all layers and heads together, every token
    neurons  layer, neuron, coefficient, increase, leave_one_out, promotes, suppresses: the top of both signs
    """

    foil: ChosenToken
    probability: float
    start: float
    total: float
    layers: pl.DataFrame
    others: pl.DataFrame
    heads: pl.DataFrame
    sources: pl.DataFrame
    neurons: pl.DataFrame

    def numbered(self, first: int) -> Contrast:
        """The same with so many layers counted before."""
        layers, others, heads, neurons = (
            numbered(frame, first) for frame in (self.layers, self.others, self.heads, self.neurons)
        )
        return replace(self, layers=layers, others=others, heads=heads, neurons=neurons)

    @property
    def remainder(self) -> float:
        """total - start minus the increases of the shown heads and neurons and of all biases (nats)."""
        return self.total - self.start - _shown(self, "increase")


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """Everything that `explain` found out about one prediction; see the module for the frames.

    position  the explained position; the prediction is of the token after it, or of the one there if it is `masked`
    unread    what follows it in the prompt, and is not read
    lens      raw | own | frozen
    start     log p(target) when nothing is read: minus the log of the vocabulary's size (of those of its softmaxes)
    parallel  attention and feed-forward layers read the same input; Lres is then Lin plus attention (G5)
    run       folder of the run that was given
    decoder_prompt  of an encoder-decoder, what its decoder has written so far; position and unread are in that
    encoded   how many tokens the encoder has read
    own_heads how many heads of a layer are no cross attention's
    evaluations  how many vectors were taken through the whole vocabulary, by frame, and of how many
    """

    model: str
    family: str
    dtype: str
    lens: str
    prompt: str
    position: int
    target: ChosenToken
    foils: tuple[ChosenToken, ...]
    top: int
    layer_count: int
    parallel: bool
    start: float
    stream: pl.DataFrame
    layers: pl.DataFrame
    others: pl.DataFrame
    heads: pl.DataFrame
    whole_heads: pl.DataFrame
    sources: pl.DataFrame
    grid: pl.DataFrame
    attention: pl.DataFrame
    neurons: pl.DataFrame
    queries: pl.DataFrame
    attention_queries: pl.DataFrame
    predictions: pl.DataFrame
    tokens: pl.DataFrame
    ablations: pl.DataFrame
    contrasts: tuple[Contrast, ...] = ()
    run: str | None = None
    evaluations: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unread: str = ""
    masked: bool = False
    unit_part: str = (
        "ffn"  # which part of `layers` the neurons are parts of: attention or stream if they are other units
    )
    decoder_prompt: str = ""
    encoded: int = 0
    own_heads: int = 0

    def head(self, layer: int, head: int) -> str:
        """A head's name: L13H4, or L13X4 for the fifth of a cross attention."""
        across = bool(self.encoded) and head >= self.own_heads
        return f"L{layer}X{head - self.own_heads}" if across else f"L{layer}H{head}"

    @property
    def log_probability(self) -> float:
        """Log p(target) at the end of the stream, under the lens (under own and frozen: the model's own)."""
        return float(self.stream["log_probability"][-1])

    @property
    def total(self) -> float:
        """The nats that all layers together added to log p(target): the last minus the first point of the stream; where
        units stand for the stream, all that was added to nothing.
        """
        if self.unit_part == "stream":
            return float(self.layers["increase"].sum())
        return self.log_probability - float(self.stream["log_probability"][0])

    @property
    def headline(self) -> str:
        """One sentence from the frames: who wins and through which parts; with a foil, against the first one.

        Without a foil layers are told by `increase`, heads and neurons by `leave_one_out`; with one, all by the
        `increase` of the `Contrast`. In nats.
        """
        if self.contrasts:
            return sentence(_against(self, self.contrasts[0]))
        return sentence(_alone(self))

    @property
    def remainder(self) -> float:
        """`total` minus the increases of the shown heads x sources and neurons and of all biases (nats).

        It holds the parts that are not shown and what parts do only together: log-probabilities do not add.
        """
        return self.total - _shown(self, "increase")

    @property
    def account(self) -> pl.DataFrame:
        """part, nats: from no information to log p(target), exactly; the last row, ``total``, is their sum."""
        kinds = ("stream", *PARTS) if self.unit_part == "stream" else PARTS
        increases = {
            kind: float(self.layers.filter(pl.col("part") == kind)["increase"].sum()) for kind in kinds
        }
        fixed = self.others.filter(pl.col("part").is_in(["head bias", "embedding"]))
        rows = {"uniform": self.start, **dict(fixed.select("part", "increase").iter_rows()), **increases}
        rows["total"] = sum(rows.values())
        return pl.DataFrame({"part": list(rows), "nats": list(rows.values())})

    @property
    def remainders(self) -> pl.DataFrame:
        """part (attention | ffn | stream), measure, total, shown, remainder: total is the layers', and
        shown + remainder that; the first rows are of heads, the others of neurons.
        """
        rows = []
        for kind, frame in (("attention", self.heads), (self.unit_part, self.neurons)):
            biases = self.others.filter(pl.col("part").is_in(beside(kind, self.unit_part)))
            for measure in MEASURES:
                total = float(self.layers.filter(pl.col("part") == kind)[measure].sum())
                shown = float(frame[measure].sum()) + float(biases[measure].sum())
                rows.append((kind, measure, total, shown, total - shown))
        return pl.DataFrame(rows, ["part", "measure", "total", "shown", "remainder"], orient="row")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: a frame is a list of rows."""
        computed = {
            name: getattr(self, name) for name in ("headline", "log_probability", "total", "remainder")
        }
        frames = {"account": _plain(self.account), "remainders": _plain(self.remainders)}
        return {**_plain(self), **computed, **frames}

    @property
    def plots(self) -> Mapping[str, Any]:
        """Altair charts by name: stream, layers, heads, ``against <foil>``, carried, ablated; those that there are."""
        return {} if self.view.plots is None else self.view.plots(self)


PARTS = ("attention", "ffn")
_BESIDE = {
    "attention": ("attention bias", "mixer"),
    "ffn": ("ffn bias", "per-layer input", "ffn"),
    "stream": (),
}
_OF_UNITS = ("unit bias", "unit error")


def beside(part: str, unit_part: str) -> tuple[str, ...]:
    """The rows of `others` that are inside a part of `layers`, where units are parts of `unit_part`."""
    return (*_BESIDE[part], *(_OF_UNITS if part == unit_part else ()))


def _alone(explanation: Explanation) -> Account:
    """The account behind a headline without a foil."""
    target = f"{token(explanation.target.piece)} ({probability(float(explanation.stream['probability'][-1]))}"
    choice = explanation.predictions.row(0, named=True)
    wins, total = choice["token"] == explanation.target.token, explanation.total
    if wins:
        opening = (
            f"{target}) wins" if total >= 0 else f"{target}) wins, but layers take {-total:.2f} nats from it"
        )
    else:
        other = f"the model's choice is {token(choice['piece'])}, {probability(choice['probability'])}"
        changed = (
            f"gains {total:.2f} nats in the layers"
            if total >= 0
            else f"loses {-total:.2f} nats in the layers"
        )
        opening = f"{target}, rank {explanation.stream['rank'][-1]:,}; {other}) {changed}"
    return _account(opening, 1 if total >= 0 else -1, explanation, explanation, "leave_one_out")


def _against(explanation: Explanation, contrast: Contrast) -> Account:
    """The account behind a headline against a foil: the parts that put the target ahead, or behind."""
    chance = float(explanation.stream["probability"][-1])
    target = f"{token(explanation.target.piece)} ({probability(chance)})"
    foil = f"{token(contrast.foil.piece)} ({probability(contrast.probability)})"
    stands = "ahead of" if contrast.total >= 0 else "behind"
    opening = f"{target} is {stands} {foil} by {abs(contrast.total):.2f} nats"
    return _account(opening, 1 if contrast.total >= 0 else -1, explanation, contrast, "increase")


def _account(
    opening: str, sign: int, explanation: Explanation, record: Explanation | Contrast, measure: str
) -> Account:
    layers = record.layers.filter(pl.col("part").is_in(PARTS)).with_columns(nats="increase")
    heads, neurons = (rows.with_columns(nats=measure) for rows in (record.heads, record.neurons))
    names = [explanation.head(*row) for row in heads.select("layer", "head").iter_rows()]
    return Account(opening, sign, layers, heads.with_columns(name=pl.Series(names, dtype=pl.String)), neurons)


def _shown(record: Explanation | Contrast, measure: str) -> float:
    biases = record.others.filter(~pl.col("part").is_in(["head bias", "embedding"]))
    return float(sum(frame[measure].sum() for frame in (record.heads, record.neurons, biases)))


def _plain(value: Any) -> Any:
    if isinstance(value, pl.DataFrame):
        return value.to_dicts()
    if is_dataclass(value) and not isinstance(value, type):
        plain = {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
        return {**plain, "remainder": value.remainder} if isinstance(value, Contrast) else plain
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
