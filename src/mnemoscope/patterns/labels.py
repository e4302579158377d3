"""An outside check: do topics found in triggers know the labels that the documents carry, which no search was shown?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.patterns.duplicates import near_duplicates
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.triggers import halves
from mnemoscope.records import NEURON
from mnemoscope.run.text import Text
from mnemoscope.text.sampling import mixed

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

DOCUMENTS = 2_000
PATTERNS = 300
SHUFFLES = 200
LEVEL = 0.95  # of its own shuffles, for a pattern to be beyond them


@dataclass(frozen=True)
class LabelCheck:
    """Mutual information (nats) between a pattern being met in a document and the document's label.

    patterns   topic patterns that were confirmed for some neuron, each once
    documents  of the test half, with a label
    labels     different labels
    median     of the patterns' information; `shuffled` the same with labels shuffled among documents
    beyond     how many patterns exceed the 95th percentile of their own shuffles (a twentieth would by chance)
    null_patterns, null_median, null_beyond   the same of topic patterns that were confirmed for some pseudo-neuron: a
               topic is made of the documents' words, and so is a label, whoever the topic was found for
    """

    key: str
    patterns: int
    documents: int
    labels: int
    median: float
    shuffled: float
    beyond: int
    null_patterns: int = 0
    null_median: float | None = None
    null_beyond: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def check(run: Run, key: str = "topic", *, seed: int = 0) -> LabelCheck | None:
    """Compare confirmed topic patterns with the metadata entry `key`; None if there are no such patterns or labels."""
    of_neurons, of_nulls = (_specs(run, nulls=nulls) for nulls in (False, True))
    specs = list(dict.fromkeys(of_neurons + of_nulls))
    labels = _labels(run, key)
    ids = np.array(sorted(labels), np.int64)
    if not of_neurons or len(set(labels.values())) < 2:
        return None
    text = Text.of(run)
    test = halves(near_duplicates(text).group)[1]  # of copies, the first alone
    ids = np.intersect1d(ids, test)
    ids = np.sort(ids[np.argsort(mixed(ids, seed + 5))][:DOCUMENTS])
    if len(ids) < 2:
        return None
    text, _ = text.part(ids)
    names, code = np.unique([labels[int(document)] for document in ids], return_inverse=True)
    met = _met(text, specs, ids)
    measured = information(met, code)
    random = np.random.default_rng(seed)
    chance = np.stack([information(met, random.permutation(code)) for _ in range(SHUFFLES)])
    own, others = (np.isin(specs, population) for population in (of_neurons, of_nulls))
    return LabelCheck(
        key,
        len(of_neurons),
        len(ids),
        len(names),
        float(np.median(measured[own])),
        float(np.median(chance[:, own])),
        beyond(measured[own], chance[:, own]),
        len(of_nulls),
        float(np.median(measured[others])) if of_nulls else None,
        beyond(measured[others], chance[:, others]) if of_nulls else 0,
    )


def beyond(measured: np.ndarray, chance: np.ndarray) -> int:
    """How many of f64[pattern] exceed the 95th percentile of their own shuffles f64[shuffle, pattern]."""
    return int((measured > np.quantile(chance, LEVEL, axis=0)).sum())


def _specs(run: Run, *, nulls: bool) -> list[str]:
    """Topic patterns that were confirmed, those of most neurons (or of most pseudo-neurons) first."""
    rate = run.manifest.options["patterns"]["q"]
    rows = (
        run.table("pattern_tests")
        .filter(((pl.col("unit") != NEURON) == nulls) & (pl.col("family") == "topic") & (pl.col("q") <= rate))
        .group_by("spec")
        .len()
        .sort("len", "spec", descending=[True, False])
        .head(PATTERNS)
    )
    return rows.collect()["spec"].to_list()


def _labels(run: Run, key: str) -> dict[int, str]:
    """The label of each document that has one."""
    rows = run.table("documents").select(
        "document", pl.col("metadata").str.json_path_match(f"$.{key}").alias("label")
    )
    return dict(rows.drop_nulls().collect().iter_rows())


def _met(text: Text, specs: list[str], ids: np.ndarray) -> np.ndarray:
    """bool[document, pattern]: whether it holds at some counted prefix."""
    holding = masks(text, specs).tocsr()[np.flatnonzero(text.counted)].tocoo()
    met = np.zeros((len(ids), len(specs)), bool)
    met[np.searchsorted(ids, text.document[text.counted][holding.row]), holding.col] = True
    return met


def information(met: np.ndarray, code: np.ndarray) -> np.ndarray:
    """f64[pattern]: mutual information in nats of columns of bool[document, pattern] with i64[document]."""
    one_hot = np.eye(int(code.max()) + 1)[code]
    joint = np.stack([one_hot.T @ met, one_hot.T @ ~met]) / len(code)  # f64[2, label, pattern]
    expected = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(joint > 0, joint * np.log(joint / expected), 0.0)
    return np.maximum(terms.sum((0, 1)), 0.0)
