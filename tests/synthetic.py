"""A small finished run that looks like a real one, made without torch: for every test of the read side.

Coefficients are a known function of the tokens, and every table is computed from them by plain numpy, so
that triggers, moments, histograms and samples agree with each other and with the text. In each layer

    neuron 0   is dead (always exactly 0)
    neuron 1   is one-sided, as after a ReLU
    neuron 2   is peaked: nearly silent, and large on one word
    others     answer to a few words each, in both directions
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mnemoscope.records import SCHEMA_VERSION, CorpusEntry, ModelEntry
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.run.writing import RunWriter

# Magnitudes where bins begin: 24 octaves from 2^-12, four linear steps in each.
_STEPS = np.array([2.0**octave * (1 + step / 4) for octave in range(-12, 12) for step in range(4)])
HISTOGRAM_EDGES = [*(-_STEPS[::-1]).tolist(), *_STEPS.tolist()]

_END = "<|endoftext|>"
_WORDS = """
 the| of| is| in| and| a| to| was| on| for| with| by| city| capital| river| country| France| Paris| London
| Brussels| Germany| Berlin| Canada| Ottawa| music| album| song| band| guitar| recorded| film| actor| played
| season| team| match| water| bread| salt| butter| recipe| oven| minutes| import| return| def| self|():|</b>
|<b>|<script>|&amp;| café| naïve| Zürich| 東京|都|。| שלום| עולם| مرحبا|\n|\n\n|,|.| "|"| 1984| 42| —|ing|ed|s
"""
_SENTENCES = """
 Paris is the capital of France, on the river Seine.| London is a city with a café by the river.
| The band recorded a song in Berlin, and the album played on.| An actor — naïve, they said — from Zürich.
| Butter the bread, salt the water; 42 minutes in the oven.| The film of 1984 was a match for the country.
|\n\ndef match(self):\n    return self.team  # <b>season</b> & "film"| Ottawa is the capital city of Canada.
| 東京都はとても大きい。| He wrote שלום עולם on the wall.| مرحبا she said 👋🏽 and left for Brussels.
| import music\n<script>alert("a < b")</script> &amp; the recipe.| In Germany the team was playing.
"""
# What would do something where text is taken for markup, or says another thing than it shows.
HOSTILE = (
    "\x00<img src=x onerror=alert(1)>\x00",
    "'\"><script>alert(2)</script>",
    "</textarea></script></style><svg onload=alert(3)>",
    "\u202egnp.exe\u202c \u2066<b>\u2069",
    "javascript:alert(4) {{7*7}} ${alert(5)} <!--",
    "]]><a href='javascript:alert(6)'>x</a>",
)


class _Corpus(NamedTuple):
    tokens: list[np.ndarray]  # i32[token] for each context
    document: list[int]
    start: list[int]


def pieces() -> list[bytes]:
    """The vocabulary: one special token, the 256 bytes, and some words; three rows stay unused."""
    words = [word.encode() for word in _split(_WORDS)]
    return [_END.encode(), *(bytes([value]) for value in range(256)), *words, b"", b"", b""]


def encode(text: str, vocabulary: list[bytes]) -> list[int]:
    """Token ids by the longest match at each place."""
    ids = {piece: token for token, piece in enumerate(vocabulary) if piece}
    longest, data, place, out = max(map(len, ids)), text.encode(), 0, []
    while place < len(data):
        size = next(size for size in range(longest, 0, -1) if data[place : place + size] in ids)
        out.append(ids[data[place : place + size]])
        place += size
    return out


def make_run(
    path: str | Path,
    *,
    layers: int = 3,
    neurons: int = 8,
    gated: bool = True,
    documents: int = 24,
    top: int = 20,
    overwrite: bool = False,
    seed: int = 0,
    hostile: bool = False,
) -> Run:
    """Write a run of `layers` x `neurons` over `documents` short documents, `top` triggers each way; hostile: with
    `HOSTILE` in its text, titles and the source of its corpus."""
    random = np.random.default_rng(seed)
    vocabulary = pieces()
    corpus = _corpus(random, vocabulary, documents, HOSTILE if hostile else ())
    coefficients = _coefficients(random, corpus, vocabulary, layers, neurons)
    values = _counted_coefficients(coefficients, corpus)
    writer = RunWriter(path, overwrite=overwrite)
    logits = random.normal(0, 1, (layers * neurons, len(vocabulary)))
    logits[np.arange(len(logits)), random.integers(257, len(vocabulary) - 3, len(logits))] += 9
    tables = {
        "neurons": _neurons(random, values, logits, neurons, gated),
        "histograms": _histograms(values, neurons),
        "triggers": _triggers(random, coefficients, corpus, neurons, gated, top),
        "samples": _samples(coefficients, corpus, neurons),
        "values": _values(logits, neurons),
        "documents": _documents(documents, HOSTILE if hostile else ()),
        "vocabulary": _vocabulary(vocabulary),
        "shards": _shards(coefficients, corpus, neurons),
    }
    for name, rows in tables.items():
        with writer.table(name) as table:
            table.append(pa.Table.from_pylist(list(rows), schema=SCHEMAS[name]))
    with writer.table("contexts", rows_per_group=None) as table:
        for shard in _shard_ranges(corpus):
            table.append(pa.Table.from_pylist(_contexts(corpus, shard), schema=SCHEMAS["contexts"]))
    writer.sort_values_by_token()
    return writer.commit(_about(corpus, vocabulary, layers, neurons, gated, documents, top))


def _split(text: str) -> list[str]:
    return text.strip("\n").replace("\n|", "|").split("|")


def _corpus(
    random: np.random.Generator, vocabulary: list[bytes], documents: int, more: tuple[str, ...]
) -> _Corpus:
    corpus, sentences = _Corpus([], [], []), [*_split(_SENTENCES), *more]
    for document in range(documents):
        chosen = random.choice(len(sentences), int(random.integers(3, 9)))
        ids = [0, *encode("".join(sentences[i] for i in chosen), vocabulary)]
        for start in range(0, len(ids), 96):
            corpus.tokens.append(np.array(ids[start : start + 96], np.int32))
            corpus.document.append(document)
            corpus.start.append(start)
    return corpus


def _counted(tokens: np.ndarray) -> np.ndarray:
    """bool[token]: all but position 0 and the special token."""
    return (np.arange(len(tokens)) > 0) & (tokens != 0)


def _coefficients(
    random: np.random.Generator, corpus: _Corpus, vocabulary: list[bytes], layers: int, neurons: int
) -> list[np.ndarray]:
    """f32[cell, token] for each context, cells being (layer, neuron) in order; 0 where nothing counts."""
    cells = layers * neurons
    answer = random.normal(0, 0.2, (cells, len(vocabulary)))
    for cell in range(cells):
        liked = random.choice(np.arange(257, len(vocabulary) - 3), 6, replace=False)
        answer[cell, liked] += random.uniform(2, 8, 6) * np.array([1, 1, 1, -1, -1, -1])
    peaked = np.arange(cells) % neurons == 2
    answer[peaked] *= 0.01
    answer[peaked, vocabulary.index(b" Paris")] = 30.0
    out = []
    for tokens in corpus.tokens:
        noise = random.normal(0, np.where(peaked, 0.01, 0.3)[:, None], (cells, len(tokens)))
        values = (answer[:, tokens] + noise).astype(np.float32)
        values[1::neurons] = np.maximum(values[1::neurons], 0)
        values[0::neurons] = 0
        out.append(np.where(_counted(tokens), values, np.float32(0)))
    return out


def _counted_coefficients(coefficients: list[np.ndarray], corpus: _Corpus) -> np.ndarray:
    """f32[cell, counted token] over all contexts."""
    parts = [block[:, _counted(tokens)] for block, tokens in zip(coefficients, corpus.tokens, strict=True)]
    return np.concatenate(parts, axis=1)


def _address(cell: int, neurons: int) -> dict[str, int]:
    return {"layer": cell // neurons, "neuron": cell % neurons}


def _neurons(
    random: np.random.Generator, values: np.ndarray, logits: np.ndarray, neurons: int, gated: bool
) -> Iterator[dict]:
    for cell, m in enumerate(values.astype(np.float64)):
        mean, std = m.mean(), m.std()
        standard = (m - mean) / std if std else None
        p = np.exp(logits[cell]) / np.exp(logits[cell]).sum()
        key = random.normal(0, 1, logits.shape[1])
        order = np.argsort(-key)
        yield {
            **_address(cell, neurons),
            "tokens": len(m),
            "mean": mean,
            "std": std,
            "skewness": None if standard is None else (standard**3).mean(),
            "kurtosis": None if standard is None else (standard**4).mean() - 3,
            "min": m.min(),
            "max": m.max(),
            "positive_fraction": (m > 0).mean(),
            "value_norm": random.uniform(0.5, 2),
            "key_norm": random.uniform(0.5, 2),
            "up_norm": random.uniform(0.5, 2) if gated else None,
            "value_max_probability": p.max(),
            "value_entropy": -(p * np.log(p)).sum(),
            "key_tokens": order[:10].tolist(),
            "key_coefficients": key[order[:10]].tolist(),
            "key_tokens_negative": order[:-11:-1].tolist(),
            "key_coefficients_negative": key[order[:-11:-1]].tolist(),
        }


def _histograms(values: np.ndarray, neurons: int) -> Iterator[dict]:
    for cell, m in enumerate(values):
        side = np.sign(m).astype(int) * np.searchsorted(_STEPS, np.abs(m), "right")
        counts = np.bincount(side + len(_STEPS), minlength=2 * len(_STEPS) + 1)
        yield {**_address(cell, neurons), "counts": counts.tolist()}


def _triggers(
    random: np.random.Generator,
    coefficients: list[np.ndarray],
    corpus: _Corpus,
    neurons: int,
    gated: bool,
    top: int,
) -> Iterator[dict]:
    for cell in range(len(coefficients[0])):
        for polarity in (1, -1):
            best = []
            for context, block in enumerate(coefficients):
                position = int(np.argmax(polarity * block[cell]))
                if polarity * block[cell, position] > 0:
                    best.append((-polarity * float(block[cell, position]), context, position))
            for rank, (negated, context, position) in enumerate(sorted(best)[:top]):
                gate = int(random.choice([-1, 1]))
                yield {
                    **_address(cell, neurons),
                    "polarity": polarity,
                    "rank": rank,
                    "coefficient": -polarity * negated,
                    **_place(corpus, context, position),
                    "gate_sign": gate if gated else None,
                    "up_sign": polarity * gate if gated else None,
                }


def _place(corpus: _Corpus, context: int, position: int) -> dict[str, int | None]:
    tokens = corpus.tokens[context]
    following = int(tokens[position + 1]) if position + 1 < len(tokens) else None
    return {"context": context, "position": position, "next_token": following}


def _samples(coefficients: list[np.ndarray], corpus: _Corpus, neurons: int) -> Iterator[dict]:
    """The first example in each tenth of the range."""
    places = [(c, p) for c, tokens in enumerate(corpus.tokens) for p in np.flatnonzero(_counted(tokens))]
    for cell, m in enumerate(_counted_coefficients(coefficients, corpus)):
        tenth = np.minimum(9, (m - m.min()) / max(float(np.ptp(m)), 1e-12) * 10).astype(int)
        for part in np.unique(tenth) if np.ptp(m) else []:
            first = int(np.flatnonzero(tenth == part)[0])
            place = _place(corpus, places[first][0], int(places[first][1]))
            yield {**_address(cell, neurons), "bin": int(part), "coefficient": float(m[first]), **place}


def _values(logits: np.ndarray, neurons: int) -> Iterator[dict]:
    for cell, row in enumerate(logits):
        p = np.exp(row) / np.exp(row).sum()
        for polarity in (1, -1):
            for rank, token in enumerate(np.argsort(-polarity * row, kind="stable")[:10]):
                address = {**_address(cell, neurons), "polarity": polarity, "rank": rank}
                yield {**address, "token": int(token), "logit": row[token], "probability": p[token]}


def _shard_ranges(corpus: _Corpus) -> list[range]:
    count = len(corpus.tokens)
    return [range(start, min(start + 16, count)) for start in range(0, count, 16)]


def _contexts(corpus: _Corpus, shard: range) -> list[dict]:
    rows = zip(shard, corpus.document[shard.start :], corpus.start[shard.start :], strict=False)
    return [
        {"context": c, "document": document, "start": start, "tokens": corpus.tokens[c].tolist()}
        for c, document, start in rows
    ]


def _documents(count: int, more: tuple[str, ...]) -> Iterator[dict]:
    for document in range(count):
        title = None if document % 5 == 4 else f"Article {document} <i>& more</i>"
        if more and title:
            title += more[document % len(more)].replace("\x00", "")
        yield {
            "document": document,
            "title": title,
            "metadata": json.dumps({"topic": f"topic {document % 3}"}),
        }


def _vocabulary(vocabulary: list[bytes]) -> Iterator[dict]:
    for token, raw in enumerate(vocabulary):
        text = raw.decode(errors="replace") if raw else f"<unused {token}>"
        yield {"token": token, "text": text, "bytes": raw, "special": token == 0 or not raw}


def _shards(coefficients: list[np.ndarray], corpus: _Corpus, neurons: int) -> Iterator[dict]:
    for index, shard in enumerate(_shard_ranges(corpus)):
        part = slice(shard.start, shard.stop)
        within = _Corpus(corpus.tokens[part], corpus.document[part], corpus.start[part])
        values = _counted_coefficients(coefficients[part], within).astype(np.float64)
        for layer in range(len(values) // neurons):
            m = values[layer * neurons : (layer + 1) * neurons]
            powers = ("sum", "sum_squares", "sum_cubes", "sum_fourths")
            yield {
                "shard": index,
                "layer": layer,
                "contexts": len(shard),
                "tokens": m.shape[1],
                **{name: (m**power).sum() for power, name in enumerate(powers, start=1)},
            }


def _about(
    corpus: _Corpus, vocabulary: list[bytes], layers: int, neurons: int, gated: bool, documents: int, top: int
) -> dict[str, Any]:
    tokens = np.concatenate(corpus.tokens)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": "2024-05-01T12:00:00+00:00",
        "mnemoscope": "0.0.0",
        "model": ModelEntry(
            id="synthetic",
            family="llama" if gated else "gpt2",
            weights_sha256="0" * 64,
            tokenizer_sha256="1" * 64,
            layers=layers,
            neurons=neurons,
            width=16,
            vocabulary=len(vocabulary),
            gated=gated,
            activation="silu" if gated else "relu",
            context_length=96,
            self_check=1e-7,
        ),
        "corpus": CorpusEntry(
            id="synthetic:articles",
            sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
            source={"seed": "0"},
            segment="document",
            limit=None,
            documents=documents,
            contexts=len(corpus.tokens),
            duplicates=0,
            tokens=len(tokens),
            counted=int(sum(_counted(context).sum() for context in corpus.tokens)),
        ),
        "options": {"top": top, "dtype": "fp32", "lens": "own", "histogram_edges": HISTOGRAM_EDGES},
        "excluded": ["position 0", "special tokens"],
        "environment": {"python": "3.11", "torch": "none"},
    }
