"""An `Explanation` made by hand, without torch: frames that agree with each other, for every test of the views."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from mnemoscope.prediction.explanation import ChosenToken, Contrast, Explanation

PIECES = ("The", " capital", " of", " France", " is")
_TOP = 6
_VOCABULARY = 1000


def make(
    pieces: Sequence[str] = PIECES,
    *,
    target: str = " Paris",
    foils: Sequence[str] = (" London", " Bordeaux"),
    promotes: Sequence[str] = (" capitals", " cities"),
    layers: int = 4,
    heads: int = 3,
    neurons: int = 40,
    queries: bool = True,
    ablations: int = 4,
    gated: bool = True,
    parallel: bool = False,
    biases: bool = True,
    lens: str = "frozen",
    run: str | None = None,
    prompt: str | None = None,
) -> Explanation:
    """An explanation of the token after `pieces`; numbers are drawn once and then made to add up."""
    random = np.random.default_rng(5)
    steps = random.normal(0.8, 0.9, 2 * layers)
    log_p = np.cumsum([-9.0, *steps])
    log_p -= max(log_p.max() + 0.2, 0.0)
    choices = tuple(_choice(foil, 20 + index) for index, foil in enumerate(foils))
    logits = {f"logit_{one.piece}": random.normal(0, 1, 2 * layers + 1) for one in choices}
    stream = pl.DataFrame(
        {
            "point": ["Lin0", *(f"{name}{layer}" for layer in range(layers) for name in ("Lres", "Lout"))],
            "layer": [0, *(layer for layer in range(layers) for _ in range(2))],
            "log_probability": log_p,
            "probability": np.exp(log_p),
            "rank": [max(0, int(900 * (1 - i / (2 * layers)))) for i in range(2 * layers + 1)],
            "logit": log_p + 12,
            **{name: log_p + 10 + values for name, values in logits.items()},
        }
    )
    whole = _layers(np.diff(log_p), random)
    tables = _tables(random, pieces, promotes, layers, heads, neurons)
    start = -math.log(_VOCABULARY)
    embedding = float(log_p[0]) - start
    others = [("embedding", None, embedding, 0.02, 0.03)]
    if biases:
        others += [("attention bias", 1, 0.01, 0.011, 0.02), ("ffn bias", 2, -0.02, -0.021, -0.03)]
    return Explanation(
        model="synthetic",
        family="llama",
        dtype="fp32",
        lens=lens,
        prompt="".join(pieces) if prompt is None else prompt,
        unread="" if prompt is None else prompt.removeprefix("".join(pieces)),
        position=len(pieces) - 1,
        target=_choice(target, 7),
        foils=choices,
        top=_TOP,
        layer_count=layers,
        parallel=parallel,
        start=start,
        stream=stream,
        layers=whole,
        others=_frame(others, ["part", "layer", "increase", "leave_one_out", "logit"]),
        **tables,
        queries=_queries(tables["neurons"].head(3 if queries else 0), pieces, gated),
        attention_queries=_attention_queries(random, pieces, layers).head(100 if queries else 0),
        predictions=pl.DataFrame(
            {
                "token": [7, 8, 9],
                "piece": [target, " the", "\n"],
                "logit": [9.0, 7.0, 5.0],
                "log_probability": [-0.3, -2.3, -4.3],
                "probability": [0.74, 0.1, 0.0135],
            }
        ),
        tokens=pl.DataFrame(
            {
                "position": range(len(pieces)),
                "token": range(len(pieces)),
                "piece": list(pieces),
                "leave_one_out": random.normal(0.2, 0.4, len(pieces)),
                "logit": random.normal(0, 1, len(pieces)),
            }
        ),
        ablations=_ablations(tables, pieces, random, ablations),
        contrasts=tuple(_contrast(one, random, pieces, layers, tables) for one in choices),
        run=run,
        evaluations={"heads": 12, "heads_of": 60, "neurons": 31, "neurons_of": layers * neurons},
        notes=("attention and feed-forward layers run in parallel",) if parallel else (),
    )


def _choice(text: str, token: int) -> ChosenToken:
    """One token, or for a longer word its first letters with the note that says so."""
    if len(text) <= 8:
        return ChosenToken(text, token, text, (token,))
    return ChosenToken(
        text, token, text[:3], (token, token + 1), f'several tokens: "{text[:3]}" stands for it'
    )


def _frame(rows: Sequence[tuple[object, ...]], names: Sequence[str]) -> pl.DataFrame:
    return pl.DataFrame(rows, list(names), orient="row")


def _layers(steps: np.ndarray, random: np.random.Generator) -> pl.DataFrame:
    count = len(steps) // 2
    return pl.DataFrame(
        {
            "layer": [layer for layer in range(count) for _ in range(2)],
            "part": ["attention", "ffn"] * count,
            "increase": steps,
            "leave_one_out": steps * random.uniform(0.2, 0.9, len(steps)),
            "logit": steps * 1.5,
        }
    )


def _tables(
    random: np.random.Generator,
    pieces: Sequence[str],
    promotes: Sequence[str],
    layers: int,
    heads: int,
    neurons: int,
) -> dict[str, pl.DataFrame]:
    """heads, whole_heads, sources, grid, attention and neurons; sorted by leave-one-out, as `explain` gives them."""
    count = 4 * _TOP
    measures = ["increase", "leave_one_out", "logit"]

    def measured(rows: int) -> dict[str, np.ndarray]:
        values = random.normal(0, 0.5, (3, rows))
        return dict(zip(measures, values, strict=True))

    places = random.choice(
        layers * heads * len(pieces), min(count, layers * heads * len(pieces)), replace=False
    )
    source = places % len(pieces)
    grid = [(layer, head) for layer in range(layers) for head in range(heads)]
    cells = [(layer, head, at) for layer, head in grid for at in range(len(pieces))]
    cell_values = measured(len(cells))
    tokens = random.choice(layers * neurons, count, replace=False)
    found = {
        "heads": pl.DataFrame(
            {
                "layer": places // len(pieces) // heads,
                "head": places // len(pieces) % heads,
                "source": source,
                "source_token": [pieces[at] for at in source],
                "weight": random.uniform(0, 1, len(places)),
                **measured(len(places)),
                "chain": random.normal(0, 0.5, len(places)),
            }
        ),
        "whole_heads": pl.DataFrame(
            {"layer": [a for a, _ in grid], "head": [b for _, b in grid], **measured(len(grid))}
        ),
        "sources": pl.DataFrame(
            {"layer": 0, "source": range(len(pieces)), "source_token": list(pieces), **measured(len(pieces))}
        ),
        "neurons": pl.DataFrame(
            {
                "layer": tokens // neurons,
                "neuron": tokens % neurons,
                "coefficient": random.normal(0, 5, count),
                **measured(count),
                "chain": random.normal(0, 0.5, count),
                "promotes": [list(promotes)] * count,
                "suppresses": [["noqa", "pylint"]] * count,
            }
        ),
    }
    found = {name: frame.sort("leave_one_out", descending=True) for name, frame in found.items()}
    found["grid"] = pl.DataFrame(
        {
            "layer": [a for a, _, _ in cells],
            "head": [b for _, b, _ in cells],
            "source": [at for _, _, at in cells],
            "source_token": [pieces[at] for _, _, at in cells],
            "increase": cell_values["increase"],
            "leave_one_out": cell_values["leave_one_out"],
        }
    )
    found["attention"] = pl.DataFrame(
        [
            (layer, head, query, source, 1 / (query + 1))
            for layer, head in grid[:3]
            for query in range(len(pieces))
            for source in range(query + 1)
        ],
        ["layer", "head", "query", "source", "weight"],
        orient="row",
    )
    return found


def _queries(neurons: pl.DataFrame, pieces: Sequence[str], gated: bool) -> pl.DataFrame:
    """Some neurons, each switched on by five vectors, a bias and a remainder."""
    rows = []
    for row in neurons.iter_rows(named=True):
        coefficient, increase = row["coefficient"], row["increase"]
        last = len(pieces) - 1
        named = (
            ("embedding", None, None, None, None, 0.31),
            ("head", 1, 2, last, pieces[last], 0.22),
            ("head", 0, 1, 0, pieces[0], -0.08),
            ("neuron", 0, 17, None, None, 0.14),
            ("ffn bias", 0, None, None, None, 0.05),
            ("key bias", None, None, None, None, 0.01),
            ("remainder", None, None, None, None, 0.35),
        )
        for kind, layer, unit, source, token, part in named:
            share = part * coefficient
            rows.append(
                (
                    row["layer"], row["neuron"], kind, layer, unit, source, token, share, 1.2 * share,
                    0.8 * share if gated else None, 0.5 * share, 0.5 * share * increase, part * increase,
                )
            )  # fmt: skip
    names = (
        "layer", "neuron", "kind", "query_layer", "query_unit", "source", "source_token", "share", "gate", "up",
        "inner", "score", "increase",
    )  # fmt: skip
    return _frame(rows, names)


def _attention_queries(random: np.random.Generator, pieces: Sequence[str], layers: int) -> pl.DataFrame:
    points = ["Lin0", *(f"{name}{layer}" for layer in range(layers - 1) for name in ("ATTN", "FFN"))]
    return pl.DataFrame(
        {
            "layer": [layers - 1] * len(points),
            "source": [len(pieces) - 1] * len(points),
            "source_token": [pieces[-1]] * len(points),
            "point": points,
            "recomputed": random.normal(0, 1, len(points)),
            "fixed": random.normal(0, 1, len(points)),
        }
    )


_ABLATIONS = {
    "kind": pl.String,
    "layer": pl.Int32,
    "unit": pl.Int32,
    "source": pl.Int32,
    "source_token": pl.String,
    "how": pl.String,
    "increase": pl.Float64,
    "leave_one_out": pl.Float64,
    "effect": pl.Float64,
}


def _ablations(
    tables: dict[str, pl.DataFrame], pieces: Sequence[str], random: np.random.Generator, count: int
) -> pl.DataFrame:
    rows: list[list[object]] = []
    for kind, unit in (("neurons", "neuron"), ("heads", "head")):
        for row in tables[kind].head(count).iter_rows(named=True):
            source = row.get("source")
            token = None if source is None else pieces[source]
            measured = [
                row["increase"],
                row["leave_one_out"],
                row["leave_one_out"] + random.normal(0, 0.1),
            ]
            rows.append([unit, row["layer"], row[unit], source, token, "zero", *measured])
    return pl.DataFrame(rows, _ABLATIONS, orient="row")


def _contrast(
    foil: ChosenToken,
    random: np.random.Generator,
    pieces: Sequence[str],
    layers: int,
    tables: dict[str, pl.DataFrame],
) -> Contrast:
    """The same parts, other numbers; both measures are one, as under the frozen lens."""
    steps = random.normal(0.3, 0.4, 2 * layers)

    def same(frame: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
        values = pl.Series("increase", random.normal(0, 0.3, frame.height))
        both = frame.select(*names).with_columns(values, values.alias("leave_one_out"))
        return both.sort("leave_one_out", descending=True)

    sources = pl.DataFrame({"source": range(len(pieces)), "source_token": list(pieces)})
    neurons = same(tables["neurons"], ("layer", "neuron", "coefficient", "promotes", "suppresses"))
    return Contrast(
        foil,
        0.0125,
        -0.25,
        -0.25 + float(steps.sum()),
        _layers(steps, random).drop("logit"),
        _frame([("embedding", None, -0.25, -0.25)], ["part", "layer", "increase", "leave_one_out"]),
        same(tables["heads"], ("layer", "head", "source", "source_token", "weight")),
        same(sources, ("source", "source_token")),
        neurons,
    )
