"""Topics of documents and classes of words, found in the text and written down as lists of words.

A topic is a cluster of documents: TF-IDF, truncated SVD (latent semantic analysis, Deerwester et al. 1990), k-means
on the unit sphere; its words are those with the largest log-odds against the other documents under a Dirichlet
prior (Monroe, Colaresi and Quinn 2008). A class is a cluster of words that keep the same company: positive pointwise
mutual information with the words beside them, truncated SVD, k-means. Both become specs that hold their words, so
that they have a mask on any other text.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.linalg import svds

from mnemoscope.run.text import Text


def k_means(points: np.ndarray, count: int, seed: int = 0, rounds: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """f64[cluster, dimension] and i64[point]: centres, and the nearest of them; at most `count` clusters."""
    random = np.random.default_rng(seed)
    points = np.asarray(points, np.float64)
    count = min(count, len(points))
    centres = points[[int(random.integers(len(points)))]] if count else points[:0]
    far = _distance(points, centres)[:, 0] if count else np.zeros(0)
    while len(centres) < count and far.sum() > 0:
        new = points[[int(random.choice(len(points), p=far / far.sum()))]]
        centres = np.concatenate([centres, new])
        far = np.minimum(far, _distance(points, new)[:, 0])
    nearest = np.full(len(points), -1)
    for _ in range(rounds):
        closest = _distance(points, centres).argmin(1) if count else nearest
        if (closest == nearest).all():
            break
        nearest = closest
        sizes = np.bincount(nearest, minlength=len(centres))
        order = np.argsort(nearest, kind="stable")
        starts = np.concatenate([[0], np.cumsum(sizes)])
        totals = np.concatenate([np.zeros((1, points.shape[1])), np.cumsum(points[order], 0)])
        sums = totals[starts[1:]] - totals[starts[:-1]]
        centres = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
    return centres, nearest


def _distance(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, never below 0."""
    squares = (points**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * points @ centres.T
    return np.maximum(squares, 0.0)


DIMENSIONS = 64
WORDS = 24  # in a topic
ENOUGH = (2, 3, 4)  # how many of them a prefix may have to have
SIZES = (12, 60)  # documents per topic, at two grains
BESIDE = 3  # words to either side that are company
COMMON = 0.2  # a word of more documents than that has no topic


def topics(text: Text, seed: int = 0) -> list[str]:
    """Specs of topics, coarse and fine; none if the text is too small."""
    counts, words = _counted(text)
    documents = counts.shape[0]
    if documents < 4 * SIZES[0] or counts.shape[1] < 4 * WORDS:
        return []
    weights = _weighted(counts)
    vectors = _reduced(weights, seed)
    specs: list[str] = []
    for size in SIZES:
        groups = min(256, documents // size)
        if groups >= 2:
            _, nearest = k_means(vectors, groups, seed)
            specs += _topic_specs(counts, nearest, words)
    return list(dict.fromkeys(specs))


def _counted(text: Text) -> tuple[csr_array, list[str]]:
    """i64[document, word] how often each word ends there, and the words."""
    words = text.words
    ends = words.ends & words.lettered[words.word]
    _, document = np.unique(text.document, return_inverse=True)
    height, width = int(document.max(initial=-1)) + 1, len(words.folded)
    pairs = (np.ones(int(ends.sum()), np.int64), (document[ends], words.word[ends]))
    counts = coo_array(pairs, shape=(height, width)).tocsr()
    spread = np.bincount(counts.indices, minlength=width)
    long = np.fromiter((len(word) > 2 and not word.isdigit() for word in words.folded), bool, width)
    kept = np.flatnonzero((spread >= 3) & (spread <= COMMON * height) & long)
    return csr_array(counts[:, kept]), [words.folded[word] for word in kept]


def _weighted(counts: csr_array) -> csr_array:
    """TF-IDF with logarithmic frequencies, rows of length 1."""
    spread = np.bincount(counts.indices, minlength=counts.shape[1])
    weights = csr_array(counts, dtype=np.float64, copy=True)
    weights.data = (1 + np.log(weights.data)) * np.log(counts.shape[0] / spread)[counts.indices]
    return _unit_rows(weights)


def _unit_rows(matrix: csr_array) -> csr_array:
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
    return csr_array(diags_array(1 / np.maximum(length, 1e-12)) @ matrix)


def _reduced(matrix: csr_array, seed: int) -> np.ndarray:
    """f64[row, dimension]: left singular vectors times singular values, rows of length 1."""
    size = min(DIMENSIONS, min(matrix.shape) - 1)
    start = np.random.default_rng(seed).normal(
        size=min(matrix.shape)
    )  # given, so that it is the same each time
    left, values, _ = svds(matrix, k=size, v0=start)
    places = left * values
    return np.asarray(places / np.maximum(np.linalg.norm(places, axis=1, keepdims=True), 1e-12))


def _topic_specs(counts: csr_array, nearest: np.ndarray, words: list[str]) -> list[str]:
    """For each cluster, its words and how many of them tell its documents from the others best (by F1)."""
    groups = int(nearest.max()) + 1
    inside = coo_array(
        (np.ones(len(nearest)), (nearest, np.arange(len(nearest)))), shape=(groups, len(nearest))
    )
    has = csr_array(counts, dtype=np.float64, copy=True)
    has.data[:] = 1
    scores = log_odds((inside.tocsr() @ has).toarray())
    specs = []
    for group in range(groups):
        best = [word for word in np.argsort(-scores[group], kind="stable")[:WORDS] if scores[group, word] > 2]
        members = nearest == group
        if len(best) < ENOUGH[-1] or members.sum() < 4:
            continue
        count = np.asarray(has[:, best].sum(1)).ravel()
        ratings = [2 * (members & (count >= n)).sum() / (members.sum() + (count >= n).sum()) for n in ENOUGH]
        specs.append(f"topic:{ENOUGH[int(np.argmax(ratings))]}:{','.join(words[word] for word in best)}")
    return specs


def log_odds(counts: np.ndarray, prior: float = 0.05) -> np.ndarray:
    """f64[group, word]: z-scores of the log-odds of each word in a group against the other groups.

    counts f64[group, word]; the prior is that share of the total counts (Monroe et al. 2008, Eq. 16, 20, 22).
    """
    total = counts.sum(0)
    a = prior * total + 1e-9
    inside, outside = counts + a, total - counts + a
    n_inside, n_outside = inside.sum(1, keepdims=True), outside.sum(1, keepdims=True)
    difference = np.log(inside / (n_inside - inside)) - np.log(outside / (n_outside - outside))
    return np.asarray(difference / np.sqrt(1 / inside + 1 / outside))


def classes(text: Text, seed: int = 0, least: int = 10, size: int = 12) -> list[str]:
    """Specs of classes of words: the last word is one of them, and one of them within 16 tokens."""
    words = text.words
    ends = np.flatnonzero(words.ends & words.lettered[words.word])
    numbers = np.bincount(words.word[ends], minlength=len(words.folded))
    kept = np.flatnonzero(numbers >= least)
    if len(kept) < 4 * size:
        return []
    company = _company(text, ends, kept)
    if min(company.shape) < 4:
        return []
    _, nearest = k_means(_reduced(company, seed), min(400, len(kept) // size), seed, rounds=10)
    specs = []
    for group in range(int(nearest.max()) + 1):
        members = kept[nearest == group]
        if 2 <= len(members) <= 8 * size:
            members = members[np.argsort(-numbers[members], kind="stable")]
            joined = ",".join(words.folded[word] for word in members)
            specs += [f"words:{joined}", f"words:{joined}@16"]
    return specs


def _company(text: Text, ends: np.ndarray, kept: np.ndarray) -> csr_array:
    """f64[word, company]: positive pointwise mutual information with the words before and after, by side."""
    column_of = np.full(len(text.words.folded), -1)
    column_of[kept] = np.arange(len(kept))
    code, context = column_of[text.words.word[ends]], text.context[ends]
    rows, columns = [], []
    for step in range(1, BESIDE + 1):
        same = (context[step:] == context[:-step]) & (code[step:] >= 0) & (code[:-step] >= 0)
        left, right = code[:-step][same], code[step:][same]
        rows += [left, right]
        columns += [right, left + len(kept)]
    pairs = (np.concatenate(rows), np.concatenate(columns))
    counts = coo_array((np.ones(len(pairs[0])), pairs), shape=(len(kept), 2 * len(kept))).tocsr()
    counts.sum_duplicates()
    by_row = np.asarray(counts.sum(1)).ravel()
    by_column = np.asarray(counts.sum(0)).ravel() ** 0.75  # smoothed, or rare company looks telling
    expected = by_row[np.repeat(np.arange(len(kept)), np.diff(counts.indptr))] * by_column[counts.indices]
    counts.data = np.maximum(np.log(counts.data * by_column.sum() / expected), 0)
    counts.eliminate_zeros()
    return _unit_rows(counts)
