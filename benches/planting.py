"""What is planted on the sample text: patterns of each kind, and topics by labels that no search is shown."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.sparse import coo_array, csr_array
from scipy.stats import rankdata

from mnemoscope import load_corpus, load_model
from mnemoscope.patterns.language import masks
from mnemoscope.run.text import Text
from mnemoscope.text.corpus import write_plan
from mnemoscope.text.sampling import half
from mnemoscope.text.spelling import vocabulary_of
from mnemoscope.text.tokenizer import special_ids

ENDINGS = (
    "tion",
    "ing",
    "ment",
    "ed",
    "ity",
    "ous",
    "al",
    "ism",
    "ist",
    "ern",
    "ence",
    "able",
    "est",
    "ical",
)
FORMS = ("year", "number", "casing:title", "punctuation", "open-bracket", "sentence-start")
FEW = ("tion", "ing", "ment", "ed")
TOPIC = "topic"
LABEL = "label that is no topic"
TOLD = 0.8  # area under the curve from which a discrimination counts as excellent (Hosmer and Lemeshow 2000)
MOST = 0.3  # share of the prefixes that any pattern has
MEANINGS = {"two meanings": 2, "three meanings": 3}


@dataclass(frozen=True)
class Planted:
    """What one unit answers to.

    name   the spec, or the label of the documents
    parts  i64[row] of each meaning; `rows` i64[row] of any of them, ascending
    """

    kind: str
    name: str
    parts: tuple[np.ndarray, ...]
    rows: np.ndarray


def sample_text(tokens: int | None) -> tuple[Text, list[str]]:
    """The sample text, and the description of each document."""
    tokenizer = load_model("sample:smollm2-135m").tokenizer
    with tempfile.TemporaryDirectory() as folder:
        plan = write_plan(
            load_corpus("sample:wikipedia", limit=tokens), tokenizer, Path(folder), context_length=2048
        )
        contexts = pl.read_parquet(plan.contexts_file)
        documents = pl.read_parquet(Path(folder) / "documents.parquet")
    vocabulary = vocabulary_of(tokenizer)
    rows = zip(contexts["context"], contexts["document"], contexts["tokens"].to_list(), strict=True)
    text = Text.build(rows, vocabulary, special_ids(tokenizer))
    return text, [json.loads(line).get("description") or "" for line in documents["metadata"]]


def planted(
    text: Text, descriptions: list[str], count: int, random: np.random.Generator
) -> Iterator[Planted]:
    """`count` of each kind, each in 60 documents of either half or more, but for the rare words."""
    for kind, make in _makers(text, random).items():
        specs = [make() for _ in range(3 * count)]
        matrix = masks(text, specs)
        candidates = [
            (spec, matrix.indices[matrix.indptr[m] : matrix.indptr[m + 1]]) for m, spec in enumerate(specs)
        ]
        least = 20 if kind == "rare word" else 120
        usable = [
            (spec, rows)
            for spec, rows in candidates
            if len(rows) <= MOST * len(text) and len(np.unique(text.document[rows])) >= least
        ]
        size = MEANINGS.get(kind, 1)
        for first in range(0, min(count * size, len(usable) - size + 1), size):
            name = " or ".join(spec for spec, _ in usable[first : first + size])
            parts = tuple(np.sort(rows).astype(np.int64) for _, rows in usable[first : first + size])
            yield Planted(kind, name, parts, np.unique(np.concatenate(parts)))
    for kind, name, rows in _topics(text, descriptions, count, random):
        yield Planted(kind, name, (rows,), rows)


def _makers(text: Text, random: np.random.Generator) -> dict[str, Callable[[], str]]:
    """A spec of each kind. Rates are 1e-3 and more, those of rare words 1e-4 to 1e-3, of coarse patterns .1 to .3."""
    common, rarer, rare = _words(text, 1e-3, 3e-2), _words(text, 2e-4, 2e-3), _words(text, 1e-4, 1e-3, 20)
    coarse = [f"word:{word}@64" for word in _words(text, 3e-3, 2e-2)]

    def pick(names: list[str] | tuple[str, ...]) -> str:
        return str(random.choice(names))

    return {
        "word": lambda: f"word:{pick(common)}",
        "rare word": lambda: f"word:{pick(rare)}",
        "bigram": lambda: f'folded:["{pick(("of", "in", "and", "by", "to"))}","{pick(("the", "a"))}"]',
        "affix": lambda: f"suffix:{pick(ENDINGS)}",
        "window": lambda: f"word:{pick(rarer)}@16",
        "coarse": lambda: pick(coarse),
        "any of four": lambda: f"words:{','.join(random.choice(common, 4, replace=False))}",
        "form": lambda: pick(FORMS),
        "conjunction": lambda: f'all:["suffix:{pick(FEW)}","word:{pick(rarer)}@all"]',
        **{kind: lambda: f"word:{pick(common)}" for kind in MEANINGS},
    }


def _words(text: Text, low: float, high: float, least: int = 120) -> list[str]:
    """Words whose share of the prefixes is between two rates and that stand in so many documents."""
    ends = text.words.ends & text.words.lettered[text.words.word] & text.counted
    codes = text.words.word[ends]
    counts = np.bincount(codes, minlength=len(text.words.folded))
    pairs = np.unique(np.stack([codes, text.document[ends]], 1), axis=0)
    spread = np.bincount(pairs[:, 0], minlength=len(counts))
    kept = (counts >= low * len(text)) & (counts <= high * len(text)) & (spread >= least)
    return [text.words.folded[i] for i in np.flatnonzero(kept) if text.words.folded[i].isalpha()]


def _topics(
    text: Text, descriptions: list[str], count: int, random: np.random.Generator
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Kind, label, and the rows of the documents whose description has that word, from the twelfth on.

    A word such as *that* or *between* stands in descriptions of anything: a topic is what `_told` accepts.
    """
    labels: dict[str, set[int]] = {}
    for document, line in enumerate(descriptions):
        for word in set(line.lower().split()):
            labels.setdefault(word, set()).add(document)
    usable = [word for word, documents in labels.items() if len(word) > 3 and 120 <= len(documents) <= 1000]
    topics = set(_told(text, labels, sorted(usable)))
    for word in random.choice(sorted(usable), min(count, len(usable)), replace=False):
        rows = np.flatnonzero(np.isin(text.document, list(labels[word])) & (text.position >= 12))
        yield TOPIC if str(word) in topics else LABEL, str(word), rows


def _told(text: Text, labels: dict[str, set[int]], names: list[str]) -> list[str]:
    """The labels that are topics: the words of a document tell whether it has the label, by naive Bayes fitted on one
    half of the documents with an area under the curve of `TOLD` or more in the other half. No search is asked."""
    ids, document = np.unique(text.document, return_inverse=True)
    ends = text.words.ends & text.words.lettered[text.words.word]
    pairs = (np.ones(int(ends.sum())), (document[ends], text.words.word[ends]))
    has = csr_array(coo_array(pairs, shape=(len(ids), len(text.words.folded))))
    has.data[:] = 1
    test = half(ids)
    topics = []
    for name in names:
        labelled = np.isin(ids, list(labels[name]))
        counts = [
            np.asarray(has[~test & (labelled == which)].sum(0)).ravel() + 0.5 for which in (True, False)
        ]
        inside, outside = (count / count.sum() for count in counts)
        score = np.asarray(has[test] @ np.log(inside / outside)).ravel()
        ranks, positive = rankdata(score), labelled[test]
        above = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
        if above >= TOLD * positive.sum() * (~positive).sum():
            topics.append(name)
    return topics
