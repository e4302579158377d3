"""Text and units of which it is known what they answer to, for the search of patterns and whatever follows it.

A unit is an array of coefficients, one for each prefix, standard normal but for where it *fires* (6 higher). A planted
unit fires at a share `recall` of the prefixes of its pattern, and elsewhere so often that a share `precision` of
its firings have the pattern. A null unit depends on nothing (independent), on its document, on the
position or on how frequent the last token is (`narrow`: within .12 nats), in ways drawn at random, and on nothing else.
"""

from __future__ import annotations

import re

import numpy as np

from mnemoscope.run.text import Text
from mnemoscope.text.vocabulary import Vocabulary

HEIGHT = 6.0
NULLS = ("independent", "document", "position", "frequency")


def fire(
    text: Text,
    mask: np.ndarray,
    precision: float,
    recall: float,
    random: np.random.Generator,
    *,
    noise: float = 1.0,
) -> np.ndarray:
    """f32[prefix]: coefficients of a unit that detects `mask`, as well as `precision` and `recall` say. It fires at the
    same prefixes however much `noise` there is."""
    values = (noise * random.normal(size=len(text))).astype(np.float32)
    on = np.flatnonzero(mask & text.counted)
    off = np.flatnonzero(~mask & text.counted)
    fired = on[random.random(len(on)) < recall]
    wrong = random.choice(off, min(len(off), round(len(fired) * (1 - precision) / precision)), replace=False)
    values[fired] += HEIGHT
    values[wrong] += HEIGHT
    return values


def null(text: Text, kind: str, random: np.random.Generator) -> np.ndarray:
    """f32[prefix]: coefficients of a unit that knows no pattern."""
    noise = random.normal(size=len(text)).astype(np.float32)
    if kind == "document":
        _, place = np.unique(text.document, return_inverse=True)
        return noise * np.float32(0.5) + (2 * random.normal(size=place.max() + 1))[place].astype(np.float32)
    if kind == "position":
        center, width = np.exp(random.uniform(0, np.log(200))), random.uniform(0.2, 1.0)
        return noise - np.abs(np.log(np.maximum(text.position, 1) / center) / width).astype(np.float32)
    if kind == "frequency":
        counts = np.bincount(text.tokens, minlength=len(text.vocabulary))
        # Smooth, and not peaked among the commonest: one who singles out their frequency singles out one token.
        center, width = random.uniform(0, np.log(np.sort(counts)[-30])), random.uniform(1.0, 3.0)
        return noise - np.abs((np.log(counts[text.tokens]) - center) / width).astype(np.float32)
    if kind == "narrow":
        counts = np.bincount(text.tokens, minlength=len(text.vocabulary))
        often = np.log(np.maximum(counts, 1))
        center = random.uniform(np.log(50), np.sort(often)[-40])
        return noise - np.abs((often[text.tokens] - center) / 0.12).astype(np.float32)
    assert kind == "independent", kind
    return noise


def triggers(text: Text, values: np.ndarray, top: int = 50) -> np.ndarray:
    """i64[rank]: rows of the `top` contexts with the largest coefficient, each at its largest."""
    counted = np.where(text.counted, values, -np.inf)
    largest = np.maximum.reduceat(counted, text.starts[:-1])
    best = np.argsort(-largest, kind="stable")[: min(top, int((largest > -np.inf).sum()))]
    spans = zip(text.starts[best], text.starts[best + 1], strict=True)
    return np.array([start + int(counted[start:stop].argmax()) for start, stop in spans], np.int64)


def all_rows(text: Text, values: np.ndarray, top: int = 50) -> np.ndarray:
    """i64[rank]: the rows with the largest coefficients, however many of a document: the trap."""
    rows = np.flatnonzero(text.counted)
    return rows[np.argsort(-values[rows], kind="stable")[:top]]


TOPICS, TOPIC_WORDS = 6, 30
_STEMS = re.findall("...", "barcendolfengorhaljinkellummornavpolquirassettamulavenworyel")
_ENDINGS = ("a", "tion", "ing", "ed", "er", "ic", "ous", "um")


def words() -> list[str]:
    """The words of the small text: those of topics first, then the general ones, most frequent first."""
    found = [stem + more + ending for ending in _ENDINGS for more in ("", "in", "ot") for stem in _STEMS]
    random = np.random.default_rng(5)
    return [found[i] for i in random.permutation(len(found))]


def vocabulary() -> Vocabulary:
    """One token a word, an end of text, digits, punctuation; two endings that go on a word."""
    pieces = [
        b"<end>",
        b".",
        b",",
        b' "',
        b'"',
        b" (",
        b")",
        b" ",
        *(str(digit).encode() for digit in range(10)),
    ]
    pieces += [b"s", b"ly", b"\n"]
    pieces += [f" {word}".encode() for word in words()]
    return Vocabulary(pieces, [True] + [False] * (len(pieces) - 1))


def small_text(documents: int = 400, seed: int = 0) -> tuple[Text, np.ndarray]:
    """A text of short documents, and i64[document]: the topic of each.

    Words are drawn from Zipf's law; in four of ten places from the words of the document's topic. Some places are
    years. About 90 tokens to a document.
    """
    random = np.random.default_rng(seed)
    ids = vocabulary()
    first = ids.find(f" {words()[0]}")[0]
    general = np.arange(first + TOPICS * TOPIC_WORDS, len(ids))
    weights = 1 / np.arange(2, 2 + len(general))
    topic = random.integers(0, TOPICS, documents)
    contexts = []
    for document in range(documents):
        tokens = [0]
        own = first + TOPIC_WORDS * topic[document] + np.arange(TOPIC_WORDS)
        for _ in range(int(random.integers(4, 12))):
            tokens += _sentence(random, own, general, weights / weights.sum())
        contexts.append((document, document, tokens))
    return Text.build(contexts, ids), topic


def _sentence(
    random: np.random.Generator, own: np.ndarray, general: np.ndarray, weights: np.ndarray
) -> list[int]:
    size = int(random.integers(5, 14))
    plain = random.choice(general, size, p=weights)
    about = random.choice(own, size)
    tokens = np.where(random.random(size) < 0.4, about, plain).tolist()
    if random.random() < 0.2:
        year = [8 + int(digit) for digit in str(random.integers(1500, 2030))]
        tokens += [7, *year]
    if random.random() < 0.2:
        tokens.insert(int(random.integers(1, len(tokens))), 2)
    if random.random() < 0.15:
        tokens.append(18)
    return [*tokens, 1]
