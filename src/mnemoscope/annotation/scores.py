"""What the answers are worth: how often a pattern is found, and how often where there is none (A7, A73).

Three questions, each with its own noise, are asked of every annotator:

    found     is a pattern found in a neuron's prefixes; noise: in the hidden null items
    held      does it hold up: are the held-out triggers told from the distractors (Fisher's exact test, one-sided, at
              .05); noise: in the hidden null items
    applied   how often is a pattern seen in held-out triggers of a neuron; noise: in the distractors beside them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from mnemoscope.annotation.agreement import RESAMPLES, Agreement, agreement
from mnemoscope.annotation.answers import LABELS, Filled, SheetAnswer, kinds
from mnemoscope.annotation.key import NULLS, Key, SheetItem
from mnemoscope.display import Shown
from mnemoscope.intervals import Estimate, draws, ratio

LEVEL = 0.05


@dataclass(frozen=True)
class Detection:
    """Hits against false alarms.

    signals, noises   how many of each were judged: items, or prefixes
    hit_rate          share of signals
    false_alarm_rate  share of noises
    d_prime           difference in standard deviations, with the log-linear correction (Hautus 1995)
    corrected         Rogan and Gladen 1978: the share of signals that are real, if no real one is ever missed
    """

    signals: int
    noises: int
    hit_rate: Estimate
    false_alarm_rate: Estimate
    d_prime: Estimate
    corrected: Estimate


@dataclass(frozen=True)
class Annotator:
    """The scores of one annotator; intervals resample items, neurons and nulls apart.

    open               items without an answer; they are left out
    false_alarms       by kind of null: items, items with a pattern, items whose pattern held up
    patterns           patterns found in an item of a neuron (A7)
    patterns_in_nulls  the same in a null item
    covered            share of a neuron's prefixes with at least one pattern; `covered_in_nulls` likewise
    semantic           share of these that have a semantic one
    """

    name: str
    open: int
    found: Detection
    held: Detection
    applied: Detection
    false_alarms: dict[str, tuple[int, int, int]]
    patterns: Estimate
    patterns_in_nulls: Estimate
    covered: Estimate
    covered_in_nulls: Estimate
    semantic: Estimate


@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """All annotators, and if there are several, their agreement.

    agreement  on `found` (has the item a pattern), `labels` (none, shallow, semantic or both, of a prefix) and
               `applied` (does a pattern apply to a prefix)
    """

    model: str
    corpus: str
    neurons: int
    nulls: int
    prefixes: int
    annotators: tuple[Annotator, ...]
    agreement: dict[str, Agreement]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def score(key: Key, filled: Sequence[Filled], *, samples: int = RESAMPLES, seed: int = 0) -> Scores:
    """Score what `answers.read` has read."""
    nulls = sum(item.null for item in key.items.values())
    several = len(filled) > 1
    return Scores(
        model=key.model,
        corpus=key.corpus,
        neurons=len(key.items) - nulls,
        nulls=nulls,
        prefixes=len(next(iter(key.items.values())).annotate),
        annotators=tuple(_annotator(key, sheet, samples, seed) for sheet in filled),
        agreement=_agreement(key, filled, samples, seed) if several else {},
    )


def d_prime(hits: np.ndarray, signals: np.ndarray, alarms: np.ndarray, noises: np.ndarray) -> np.ndarray:
    """z(hit rate) - z(false-alarm rate) with the log-linear correction (Hautus 1995).

    Two answers are added, shared out between signals and noises as they are, and half of each hits: equal rates give 0
    however many there are of either.
    """
    share = signals / (signals + noises)
    hit_rate, alarm_rate = (
        (hits + share) / (signals + 2 * share),
        (alarms + 1 - share) / (noises + 2 - 2 * share),
    )
    return np.asarray(stats.norm.ppf(hit_rate) - stats.norm.ppf(alarm_rate))


def rogan_gladen(apparent: np.ndarray, sensitivity: float, specificity: np.ndarray) -> np.ndarray:
    """Prevalence behind an apparent one, cut to [0, 1]; NaN where the test tells nothing (Rogan and Gladen 1978)."""
    informative = sensitivity + specificity - 1
    share = np.divide(
        apparent + specificity - 1, informative, out=np.full_like(informative, np.nan), where=informative > 0
    )
    return np.asarray(np.clip(share, 0, 1))


def holds(answer: SheetAnswer, item: SheetItem) -> bool | None:
    """Whether the patterns told held-out prefixes from distractors; None if they were not applied."""
    if answer.patterns == ():
        return False
    if answer.patterns is None or answer.applies is None:
        return None
    (a, b), (c, d) = _table(answer, item)
    return bool(stats.hypergeom.sf(a - 1, a + b + c + d, a + b, a + c) <= LEVEL)


def _table(answer: SheetAnswer, item: SheetItem) -> tuple[tuple[int, int], tuple[int, int]]:
    """Held-out prefixes, then distractors: to how many the patterns apply, and to how many not."""
    chosen = answer.applies or frozenset()
    sources = [index for index, prefix in enumerate(item.apply) if prefix.source]
    hits = len(chosen.intersection(sources))
    others = len(item.apply) - len(sources)
    return (hits, len(sources) - hits), (len(chosen) - hits, others - len(chosen) + hits)


def _annotator(key: Key, filled: Filled, samples: int, seed: int) -> Annotator:
    pairs = [(filled.answers[name], key.items[name]) for name in filled.answered]
    null = np.array([item.null for _, item in pairs])
    weights = _weights(null, samples, np.random.default_rng(seed))
    found_patterns = [bool(answer.patterns) for answer, _ in pairs]
    held = [holds(answer, item) for answer, item in pairs]
    real, other = weights * ~null, weights * null
    counts = np.array([len(answer.patterns or ()) for answer, _ in pairs])
    labels = [np.array(kinds(answer)) for answer, _ in pairs]
    covered, sizes = np.array([(kind > 0).sum() for kind in labels]), np.array([len(kind) for kind in labels])
    semantic = np.array([(kind >= LABELS.index("semantic")).sum() for kind in labels])
    ones = np.ones(len(pairs))
    return Annotator(
        name=filled.annotator,
        open=len(filled.answers) - len(pairs),
        found=_items(found_patterns, weights, null),
        held=_items(held, weights, null),
        applied=_applied(pairs, weights * ~null),
        false_alarms={
            kind: (
                len(rows),
                sum(found_patterns[index] for index in rows),
                sum(bool(held[index]) for index in rows),
            )
            for kind in NULLS
            if (rows := [index for index, (_, item) in enumerate(pairs) if item.kind == kind])
        },
        patterns=Estimate.of(ratio(real @ counts, real @ ones)),
        patterns_in_nulls=Estimate.of(ratio(other @ counts, other @ ones)),
        covered=Estimate.of(ratio(real @ covered, real @ sizes), int((~null).sum())),
        covered_in_nulls=Estimate.of(ratio(other @ covered, other @ sizes), int(null.sum())),
        semantic=Estimate.of(ratio(real @ semantic, real @ covered), int((~null & (covered > 0)).sum())),
    )


def _weights(null: np.ndarray, samples: int, random: np.random.Generator) -> np.ndarray:
    """f64[1 + sample, item]: once each, and then how often an item is drawn; neurons and nulls apart."""
    weights = np.ones((samples + 1, len(null)))
    for group in (~null, null):
        size = int(group.sum())
        if size:
            weights[1:, group] = draws(random, size, samples)
    return weights


def _items(flags: Sequence[bool | None], weights: np.ndarray, null: np.ndarray) -> Detection:
    known = np.array([flag is not None for flag in flags])
    yes = np.array([bool(flag) for flag in flags])
    counts = (weights @ (group & known & about) for group in (~null, null) for about in (yes, known))
    judged = (int((group & known).sum()) for group in (~null, null))
    return _detection(*(count.astype(float) for count in counts), items=tuple(judged))


def _applied(pairs: Sequence[tuple[SheetAnswer, SheetItem]], weights: np.ndarray) -> Detection:
    tables = [
        _table(answer, item) if answer.applies is not None else ((0, 0), (0, 0)) for answer, item in pairs
    ]
    cells = np.array(tables, float).reshape(-1, 4)
    hits, misses, alarms, rejections = (weights @ cells[:, cell] for cell in range(4))
    judged = (int((weights[0] * (cells[:, cell : cell + 2].sum(1) > 0)).sum()) for cell in (0, 2))
    return _detection(hits, hits + misses, alarms, alarms + rejections, items=tuple(judged))


def _detection(
    hits: np.ndarray, signals: np.ndarray, alarms: np.ndarray, noises: np.ndarray, *, items: tuple[int, ...]
) -> Detection:
    """Compare rates of f64[1 + sample] each; `items` are those that the signals, and the noises, belong to."""
    judged = (signals > 0) & (noises > 0)
    hit_rate, alarm_rate = ratio(hits, signals), ratio(alarms, noises)
    corrected = rogan_gladen(hit_rate, 1.0, 1 - alarm_rate)
    distance = np.full(judged.shape, np.nan)
    distance[judged] = d_prime(*(counts[judged] for counts in (hits, signals, alarms, noises)))
    rates = Estimate.of(hit_rate, items[0]), Estimate.of(alarm_rate, items[1])
    sizes = int(signals[0]), int(noises[0])
    both = _both_ends(rates, sizes, Estimate.of(distance), Estimate.of(corrected))
    return Detection(*sizes, *rates, *both)


def _both_ends(
    rates: tuple[Estimate, Estimate], sizes: tuple[int, int], distance: Estimate, corrected: Estimate
) -> tuple[Estimate, Estimate]:
    """d' and the corrected share, no surer than the two rates where all or none of either are hits."""
    hits, alarms = rates
    if not {hits.value, alarms.value} & {0.0, 1.0} or None in (hits.value, alarms.value):
        return distance, corrected
    ends = np.array([[hits.low, alarms.high], [hits.high, alarms.low]], float).T  # least, most
    d_primes = d_prime(ends[0] * sizes[0], np.full(2, sizes[0]), ends[1] * sizes[1], np.full(2, sizes[1]))
    return _widened(distance, d_primes), _widened(corrected, rogan_gladen(ends[0], 1.0, 1 - ends[1]))


def _widened(estimate: Estimate, ends: np.ndarray) -> Estimate:
    if estimate.value is None or estimate.low is None or estimate.high is None or np.isnan(ends).any():
        return estimate
    return Estimate(estimate.value, min(estimate.low, float(ends[0])), max(estimate.high, float(ends[1])))


def _agreement(key: Key, filled: Sequence[Filled], samples: int, seed: int) -> dict[str, Agreement]:
    names = list(key.items)

    def ratings(label_of: Any, sizes: list[int]) -> np.ndarray:
        """i64[unit, annotator], with -1 for all units of an item that is not answered."""
        columns = [
            np.concatenate(
                [
                    np.full(size, -1) if labels is None else np.asarray(labels, np.int64)
                    for labels, size in zip(
                        (label_of(sheet.answers[name]) for name in names), sizes, strict=True
                    )
                ]
            )
            for sheet in filled
        ]
        return np.stack(columns, axis=1)

    half, whole = (
        [len(getattr(key.items[name], part_name)) for name in names] for part_name in ("annotate", "apply")
    )
    asked = {
        "found": (_found, [1] * len(names), 2),
        "labels": (lambda answer: None if answer.patterns is None else kinds(answer), half, len(LABELS)),
        "applied": (_marks, whole, 2),
    }
    return {
        name: agreement(
            ratings(label_of, sizes),
            categories,
            np.repeat(np.arange(len(names)), sizes),
            samples=samples,
            seed=seed,
        )
        for name, (label_of, sizes, categories) in asked.items()
    }


def _found(answer: SheetAnswer) -> list[bool] | None:
    return None if answer.patterns is None else [bool(answer.patterns)]


def _marks(answer: SheetAnswer) -> list[bool] | None:
    """Where nothing was found, nothing applies."""
    if answer.patterns == ():
        return [False] * len(answer.apply)
    return None if answer.applies is None else [index in answer.applies for index in range(len(answer.apply))]
