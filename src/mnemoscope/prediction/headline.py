"""A headline is one sentence on top of an explanation, made from its own numbers.

What a part did is told with its sign, in nats. Oriented by what is to be told (a target that is ahead, or one that is
behind), the sentence names the best run of neighbouring layers and the best head if each holds a good part of all that
layers added, or else says that the prediction is spread over many; and the neuron that did most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import polars as pl

from mnemoscope.text.vocabulary import Vocabulary

RUN = 3  # neighbouring layers that one name stands for, at most; in a small model a third of the layers
LAYERS_LEAST = 1 / 3  # of all that layers added, for a run of them to be named
HEAD_LEAST = 0.1  # of the same, for a head to be named alone
HEAD_NATS = 0.5  # beside layers, for a head to be named; without it p would be 40 % less
SHOWN = 0.005  # nats: what is smaller would be printed as nothing

_KINDS = {
    "attention": ("attention in layer", "attention in layers"),
    "ffn": ("the feed-forward layer", "the feed-forward layers"),
}


class Account(NamedTuple):
    """The numbers that a sentence is made from; each frame has a column `nats`.

    opening  who wins or loses, up to where the parts are named
    sign     +1 if the parts that raise log p (or the lead) are to be named, -1 if those that lower it
    layers   layer, part (attention | ffn)
    heads    layer, head, source_token
    neurons  layer, neuron
    """

    opening: str
    sign: int
    layers: pl.DataFrame
    heads: pl.DataFrame
    neurons: pl.DataFrame


class Named(NamedTuple):
    """A part with its name and what it did, in nats."""

    name: str
    nats: float

    def __str__(self) -> str:
        return f"{self.name} ({self.nats:+.2f})"


def sentence(account: Account) -> str:
    """The headline."""
    increase = float((account.layers["nats"] * account.sign).clip(lower_bound=0).sum())
    if increase < SHOWN:
        return f"{account.opening}: no layer moves it."
    named = sorted(_named(account, increase), key=lambda part: -abs(part.nats))
    if named:
        parts = f"mostly through {' and '.join(map(str, named))}"
    else:
        parts = f"spread over many: the largest single part is {_largest(account)}"
    verb = "helps" if account.sign > 0 else "hurts"
    neuron = _best(account.neurons, account.sign)
    ending = f"; {neuron.name} {verb} most among neurons ({neuron.nats:+.2f})" if neuron else ""
    return f"{account.opening}, {parts}{ending}."


def token(piece: str) -> str:
    """A token in quotation marks, its space in front of it kept."""
    return f"“{Vocabulary.visible(piece, edges=not piece.strip()) or '∅'}”"


def probability(value: float) -> str:
    """Two digits; never 0 or 1 when it is neither."""
    if 0.995 <= value < 1:
        return "> 0.99"
    return f"{value:.2g}".replace("e-0", "e-")


def _named(account: Account, increase: float) -> Iterator[Named]:
    """The parts that did enough of all that layers added."""
    layers, head, least = _layers(account), _best(account.heads, account.sign), HEAD_LEAST * increase
    if layers and layers.nats * account.sign >= LAYERS_LEAST * increase:
        yield layers
        least = min(least, HEAD_NATS)
    if head and head.nats * account.sign >= least:
        yield head


def _layers(account: Account) -> Named | None:
    """The run of neighbouring layers of one kind that did most, each of them in the direction told."""
    rows = account.layers.sort("part", "layer")
    longest = max(1, min(RUN, rows["layer"].n_unique() // 3))
    runs = []
    for (kind,), steps in rows.group_by("part", maintain_order=True):
        layers, nats = steps["layer"].to_list(), steps["nats"].to_list()
        for first in range(len(layers)):
            for size in range(1, min(longest, len(layers) - first) + 1):
                if nats[first + size - 1] * account.sign < SHOWN:
                    break
                runs.append(_run(str(kind), layers[first : first + size], nats[first : first + size]))
    return max(runs, key=lambda named: named.nats * account.sign, default=None)


def _run(kind: str, layers: list[int], nats: list[float]) -> Named:
    singular, plural = _KINDS[kind]
    name = f"{singular} {layers[0]}" if len(layers) == 1 else f"{plural} {layers[0]} to {layers[-1]}"
    return Named(name, sum(nats))


def _largest(account: Account) -> Named:
    """The layer or head that did most of all."""
    steps = [_run(row["part"], [row["layer"]], [row["nats"]]) for row in account.layers.iter_rows(named=True)]
    head = _best(account.heads, account.sign)
    return max([*steps, *([head] if head else [])], key=lambda named: named.nats * account.sign)


def _best(rows: pl.DataFrame, sign: int) -> Named | None:
    """The head or neuron that did most in the direction told; None if none did anything to speak of."""
    rows = rows.filter(pl.col("nats") * sign >= SHOWN).sort("nats", descending=sign > 0)
    if rows.height == 0:
        return None
    row = rows.row(0, named=True)
    if "neuron" in row:
        return Named(row.get("address") or f"L{row['layer']}N{row['neuron']}", row["nats"])
    return Named(f"{row['name']} reading {token(row['source_token'])}", row["nats"])
