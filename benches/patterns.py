"""Planted truth on a real text: recovery by kind, false discoveries on every null, calibration, and speed.

recovery     share of planted units whose first candidate has, on all of the text, a mask with a Jaccard index of
             at least .7 to what was planted (.3 for topics, which are planted by a label that the search never
             sees: a word of the documents' descriptions), and is significant on held-out triggers
nulls        units that know nothing (independent), documents, positions or token frequencies: share with a
             family-wise p below .05, Kolmogorov-Smirnov p of uniformity, and the false discovery
             proportion after confirmation and Benjamini-Hochberg
seconds      the whole search of `--speed` units with as many triggers as neurons have

python -m benches.patterns [--units 40] [--nulls 300] [--speed 96000] [--tokens N]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import false_discovery_control, kstest

from mnemoscope import load_corpus, load_model
from mnemoscope.corpus import write_plan
from mnemoscope.patterns import Options, Text, Units, confirm, masks
from mnemoscope.patterns.search import search
from mnemoscope.vocabulary import Vocabulary, special_ids

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from planted_patterns import NULLS, fire, null, triggers

LEVELS = (0.5, 0.8, 1.0)
LIKE = {"topic": 0.3}
TARGETS = {"topic": 0.8, "conjunction": 0.7}


def sample_text(tokens: int | None) -> tuple[Text, list[str]]:
    """The sample text, and the description of each document."""
    tokenizer = load_model("sample:smollm2-135m").tokenizer
    with tempfile.TemporaryDirectory() as folder:
        plan = write_plan(
            load_corpus("sample:wikipedia", limit=tokens), tokenizer, Path(folder), context_length=2048
        )
        contexts = pl.read_parquet(plan.contexts_file)
        documents = pl.read_parquet(Path(folder) / "documents.parquet")
    vocabulary = Vocabulary.of(tokenizer)
    rows = zip(contexts["context"], contexts["document"], contexts["tokens"].to_list(), strict=True)
    text = Text.build(rows, vocabulary, special_ids(tokenizer))
    return text, [json.loads(line).get("description") or "" for line in documents["metadata"]]


def words_of(text: Text, low: float, high: float) -> list[str]:
    """Words whose share of the prefixes is between two rates and that stand in 120 documents or more."""
    ends = text.words.ends & text.words.lettered[text.words.word] & text.counted
    codes = text.words.word[ends]
    counts = np.bincount(codes, minlength=len(text.words.folded))
    pairs = np.unique(np.stack([codes, text.document[ends]], 1), axis=0)
    spread = np.bincount(pairs[:, 0], minlength=len(counts))
    kept = (counts >= low * len(text)) & (counts <= high * len(text)) & (spread >= 120)
    return [text.words.folded[i] for i in np.flatnonzero(kept) if text.words.folded[i].isalpha()]


def specs(text: Text, kind: str, count: int, random: np.random.Generator) -> list[str]:
    """Patterns of a kind with base rates of 1e-3 and more."""
    common = words_of(text, 1e-3, 3e-2)
    rarer = words_of(text, 2e-4, 2e-3)
    endings = (
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

    def pick(names: Sequence[str]) -> str:
        return str(random.choice(names))

    makers = {
        "word": lambda: f"word:{pick(common)}",
        "bigram": lambda: f'folded:["{pick(["of", "in", "and", "by", "to"])}","{pick(["the", "a"])}"]',
        "affix": lambda: f"suffix:{pick(endings)}",
        "window": lambda: f"word:{pick(rarer)}@16",
        "any of four": lambda: f"words:{','.join(random.choice(common, 4, replace=False))}",
        "form": lambda: pick(
            ["year", "number", "casing:title", "punctuation", "open-bracket", "sentence-start"]
        ),
        "conjunction": lambda: f'all:["suffix:{pick(endings[:4])}","word:{pick(rarer)}@all"]',
    }
    return [makers[kind]() for _ in range(count)]


def plant(
    text: Text, descriptions: list[str], count: int, random: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """(kind, mask bool[prefix]) of everything planted, each with 60 documents or more."""
    for kind in ("word", "bigram", "affix", "window", "any of four", "form", "conjunction"):
        found = masks(text, specs(text, kind, 3 * count, random))
        good = [m for m in range(3 * count) if _spread(text, found, m) >= 120][:count]
        for column in good:
            yield kind, found[:, [column]].toarray()[:, 0]
    labels: dict[str, set[int]] = {}
    for document, line in enumerate(descriptions):
        for word in set(line.lower().split()):
            labels.setdefault(word, set()).add(document)
    usable = [word for word, some in labels.items() if len(word) > 3 and 120 <= len(some) <= 1000]
    for word in random.choice(sorted(usable), min(count, len(usable)), replace=False):
        yield "topic", np.isin(text.document, list(labels[word])) & (text.position >= 12)


def _spread(text: Text, found: Any, column: int) -> int:
    rows = found.indices[found.indptr[column] : found.indptr[column + 1]]
    return len(np.unique(text.document[rows]))


def quality(text: Text, descriptions: list[str], count: int, nulls: int) -> dict[str, Any]:
    """Recovery by kind, and what becomes of the nulls."""
    random = np.random.default_rng(0)
    rows, labels, truths = [], [], []
    for kind, mask in plant(text, descriptions, count, random):
        purity, coverage = random.choice(LEVELS, 2)
        rows.append(triggers(text, fire(text, mask, purity, coverage, random)))
        labels.append(kind)
        truths.append(np.flatnonzero(mask))
    planted = len(rows)
    for kind in NULLS:
        rows += [triggers(text, null(text, kind, random)) for _ in range(nulls)]
        labels += [kind] * nulls
    units = Units.of(rows)
    found = search(text, units, Options(tests=("main",)))
    first = confirm(text, units, found.candidates.filter(pl.col("rank") == 0))
    unit = first["unit"].to_numpy()
    passed = np.zeros(len(rows), bool)
    passed[unit] = false_discovery_control(first["p_test"].to_numpy()) < 0.05
    p = np.ones(len(rows))
    p[unit] = first["p_family"].to_numpy()
    like = np.zeros(len(rows))
    claims = {row["unit"]: row["spec"] for row in first.iter_rows(named=True)}
    for number in range(planted):
        if number in claims:
            mask = masks(text, [claims[number]]).indices
            both = len(np.intersect1d(mask, truths[number], assume_unique=True))
            like[number] = both / (len(mask) + len(truths[number]) - both)
    kinds = np.array(labels)
    recovery = {}
    for kind in dict.fromkeys(labels[:planted]):
        here = kinds == kind
        recovery[kind] = {
            "units": int(here.sum()),
            "recovered": round(float((passed & (like >= LIKE.get(kind, 0.7)))[here].mean()), 3),
            "target": TARGETS.get(kind, 0.95),
            "median_jaccard": round(float(np.median(like[here])), 3),
            "significant": round(float((p < 0.05)[here].mean()), 3),
        }
    results = {}
    for kind in NULLS:
        here = kinds == kind
        false = int((passed & here).sum())
        results[kind] = {
            "units": int(here.sum()),
            "family_wise_05": round(float((p[here] < 0.05).mean()), 4),
            "ks_p": round(float(kstest(p[here], "uniform").pvalue), 4),
            "false_discovery_proportion": round(false / max(int(passed[:planted].sum()) + false, 1), 4),
        }
    tests = found.calibration["effective_tests"]
    return {
        "recovery": recovery,
        "nulls": results,
        "patterns": int(found.calibration["patterns"][0]),
        "effective_tests": [round(float(tests.min())), round(float(tests.max()))],  # type: ignore[arg-type]
    }


def speed(text: Text, count: int) -> dict[str, float]:
    """Seconds to search so many units, some of whose triggers share a token."""
    random = np.random.default_rng(1)
    rows = np.flatnonzero(text.counted)
    order = rows[np.argsort(text.tokens[rows], kind="stable")]
    some = []
    for _ in range(count):
        start, own = int(random.integers(len(order) - 400)), int(random.integers(51))
        some.append(
            np.concatenate([random.choice(order[start : start + 400], own), random.choice(rows, 50 - own)])
        )
    begin, cpu = time.perf_counter(), time.process_time()
    search(text, Units.of(some), Options(tests=("main",)))
    return {"wall": round(time.perf_counter() - begin, 1), "cpu": round(time.process_time() - cpu, 1)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--units", type=int, default=40)
    parser.add_argument("--nulls", type=int, default=300)
    parser.add_argument("--speed", type=int, default=96_000)
    parser.add_argument("--tokens", type=int, default=None)
    arguments = parser.parse_args()
    text, descriptions = sample_text(arguments.tokens)
    result: dict[str, Any] = {"bench": "patterns", "tokens": len(text)}
    result |= quality(text, descriptions, arguments.units, arguments.nulls)
    if arguments.speed:
        result |= {"units": arguments.speed, "seconds": speed(text, arguments.speed), "target_seconds": 180}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
