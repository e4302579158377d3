"""Planted truth by another hand: what units answer to is found in the decoded text, not with the product's language.

`benches.patterns` plants specs of the pattern language with the language's own masks, which makes recovery easier than
it is. Here the text of each document is put together from its tokens and searched with regular expressions, and topics
are lists of words made by hand; a unit's firings are lognormal in height, over normal noise. Null units are
independent, in bursts, of the document, of the position, of the token frequency, of a narrow band of it (.12 nats, not
among the 40 commonest tokens), or autocorrelated; and, with `--copies`, a hash of the last six tokens, on a text with
3 % of 1,500 documents copied 15 times with 3 % of the tokens changed.

recovery   by kind: units, share recovered (confirmed, and a mask with a Jaccard index of .7 with what was planted; .3
           for topics) with Wilson's interval, and how far precision and recall in the test half are from those of the
           firings
nulls      by kind: share with a family-wise p below .05 with Wilson's interval, false discoveries and their proportion

python -m benches.planted_truth [--units 40] [--nulls 300] [--tokens N] [--seed 0] [--copies]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.signal import lfilter

from benches.patterns import LIKE, WITHIN, Outcome, Say, World, nulls_of, outcomes, searched
from benches.planting import TOPIC, Planted, sample_text
from mnemoscope.intervals import wilson
from mnemoscope.patterns.duplicates import near_duplicates
from mnemoscope.run.text import Text

LEVELS = (0.5, 0.8, 1.0)  # of precision and of recall
SPREAD = (
    12  # documents with a pattern, at least, for each hundred documents of a small text; 120 of a large one
)
MOST = 0.3
NARROW = 0.12  # nats
KINDS = ("independent", "bursts", "document", "position", "frequency", "narrow frequency", "autocorrelated")
SIXES = "last six tokens"
FORMS = {
    "two-digit number": r"(?<!\d)\d\d$",
    "three-digit number": r"(?<!\d)\d\d\d$",
    "year": r"(?<!\d)(?:1\d|20)\d\d$",
    "one digit": r"(?<![\d.,])\d$",
    "decimal number": r"\d\.\d+$",
    "number with a comma": r"\d,\d\d\d$",
    "capitalised word": r"(?<![A-Za-z])[A-Z][a-z]+$",
    "all capitals": r"(?<![A-Za-z])[A-Z]{2,}$",
    "ordinal": r"\d(?:st|nd|rd|th)$",
    "hyphenated word": r"[A-Za-z]-[A-Za-z]+$",
}
ENDINGS = ("tion", "ing", "ment", "ed", "ity", "ous", "al", "ist", "ian", "er", "ence", "ern", "ly", "ship")
LEXICA = tuple(
    words.split()
    for words in (
        "album band song guitar singer studio music recorded songs released chart tour vocals rock single",
        "football league club team season match cup players championship stadium coach played goals tournament",
        "war army battle troops forces soldiers military regiment infantry commander navy fought attack officers",
        "species genus family plant leaves flowers native habitat found plants tree birds grows endemic",
        "film directed starring actor director movie films drama cast screenplay cinema role produced",
        "church bishop catholic diocese saint parish religious priest christian cathedral holy monastery",
        "party election parliament minister elected government political president vote politician democratic",
        "river lake mountain valley creek north flows elevation tributary basin mouth km range",
        "station railway line train trains opened platform passenger route service railroad metro",
        "university professor research college science degree studied institute academic education phd",
        "novel book published author poet writer fiction stories poems literary poetry books writing",
        "ship navy built launched vessel crew sailed class ships commissioned fleet sea port",
        "village population census municipality district located town county households villages residents",
        "company founded business products headquartered corporation acquired manufacturer based industry",
        "aircraft flight pilot air engine flying airport squadron airline wing fighter",
        "painting artist art museum gallery painter works exhibition sculpture artists paintings",
    )
)


class Decoded:
    """A text as characters: what each prefix ends with, looked at by regular expressions of this file."""

    def __init__(self, text: Text, pieces: Callable[[list[int]], list[str]]) -> None:
        self.text = text
        known = np.unique(text.tokens)
        spelled = dict(zip(known.tolist(), pieces(known.tolist()), strict=True))
        self.documents: list[tuple[np.ndarray, str]] = []
        self.end = np.zeros(len(text), np.int64)
        for rows in _runs(text.document):
            written = [spelled[token] for token in text.tokens[rows].tolist()]
            self.end[rows] = np.cumsum([len(piece) for piece in written])
            self.documents.append((rows, "".join(written)))

    def where(self, expression: str) -> np.ndarray:
        """Rows whose prefix, within its document, has a match that ends where it ends; `$` is left out for speed."""
        test = re.compile(expression.removesuffix("$"))
        out = []
        for rows, written in self.documents:
            ends = np.array(sorted({match.end() for match in test.finditer(written)}), np.int64)
            out.append(rows[np.isin(self.end[rows], ends)])
        return np.concatenate(out)

    def now(self, expression: str) -> np.ndarray:
        """The same where a match may be cut off by the end of the prefix: asked of every prefix, with its `$`."""
        test = re.compile(expression)
        found = [
            [row for row, end in zip(rows.tolist(), self.end[rows].tolist(), strict=True)
             if test.search(written, max(0, end - 24), end)]
            for rows, written in self.documents
        ]  # fmt: skip
        return np.array(sorted(row for rows in found for row in rows), np.int64)

    def words(self) -> dict[str, np.ndarray]:
        """For each word of small letters the rows at whose end it ends."""
        found: dict[str, list[int]] = {}
        for rows, written in self.documents:
            at = dict(zip(self.end[rows].tolist(), rows.tolist(), strict=True))
            for match in re.finditer(r"[A-Za-z]+", written):
                if match.end() in at:
                    found.setdefault(match.group().lower(), []).append(at[match.end()])
        return {word: np.array(rows, np.int64) for word, rows in found.items()}


def _runs(codes: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def planted(decoded: Decoded, count: int, random: np.random.Generator) -> Iterator[Planted]:
    """`count` units of each kind whose pattern stands in enough documents and in not too many prefixes."""
    text, words = decoded.text, decoded.words()
    documents = len(np.unique(text.document))
    least = min(120, SPREAD * documents // 100)

    def usable(rows: np.ndarray, rate: float = 1e-3) -> bool:
        spread = len(np.unique(text.document[rows]))
        return spread >= least and rate * len(text) <= len(rows) <= MOST * len(text)

    common = sorted(
        w for w, rows in words.items() if len(w) > 2 and usable(rows) and len(rows) <= 0.03 * len(text)
    )
    rarer = sorted(
        w for w, rows in words.items() if len(w) > 3 and usable(rows, 2e-4) and len(rows) <= 2e-3 * len(text)
    )
    several = sorted(w for w, rows in words.items() if usable(rows, 3e-4) and len(rows) <= 0.03 * len(text))
    pairs = _pairs(decoded, words, least)

    def made(kind: str, name: str, rows: np.ndarray) -> Planted:
        rows = np.unique(rows)
        return Planted(kind, name, (rows,), rows)

    for word in random.permutation(common)[:count].tolist():
        yield made("word", word, words[word])
    for name in random.permutation(sorted(pairs))[:count].tolist():
        yield made("bigram", name, pairs[name])
    ended = _ended(words)
    for ending in random.choice(sorted(ended), count).tolist():
        if usable(ended[ending]):
            yield made("affix", f"-{ending}", ended[ending])
    for word in random.permutation(rarer)[:count].tolist():
        yield made("window", f"{word} within 16", _after(text, words[word], 16))
    for _ in range(count):
        four = random.choice(several, 4, replace=False).tolist()
        yield made("any of four", " ".join(four), np.concatenate([words[word] for word in four]))
    forms = {name: decoded.now(expression) for name, expression in FORMS.items()}
    names = [name for name, rows in forms.items() if usable(rows, 2e-4)]
    for name in random.choice(names, count).tolist():
        yield made("form", name, forms[name])
    yield from _conjunctions(text, words, rarer, count, usable, made, random)
    for number in random.permutation(np.arange(count) % len(LEXICA))[:count].tolist():
        lexicon = random.choice(LEXICA[number], 4 * len(LEXICA[number]) // 5, replace=False).tolist()
        met = [words[word] for word in lexicon if word in words]
        for enough in (3, 2):
            if usable(rows := _several(text, met, enough)):
                yield made(TOPIC, f"{enough} of {' '.join(lexicon[:5])} ...", rows)
                break


def _pairs(decoded: Decoded, words: dict[str, np.ndarray], least: int) -> dict[str, np.ndarray]:
    """Two words with a space between, often enough: rows where the second ends."""
    found: dict[str, list[int]] = {}
    for rows, written in decoded.documents:
        at = dict(zip(decoded.end[rows].tolist(), rows.tolist(), strict=True))
        for match in re.finditer(r"(?=\b([A-Za-z]+ [A-Za-z]+)\b)", written):
            row = at.get(match.end(1))
            if row is not None:
                found.setdefault(match.group(1).lower(), []).append(row)
    size = 5e-4 * len(decoded.text)
    often = {name: np.array(rows, np.int64) for name, rows in found.items() if len(rows) >= size}
    return {
        name: rows for name, rows in often.items() if len(np.unique(decoded.text.document[rows])) >= least
    }


def _ended(words: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For each ending the rows where a longer word with it ends; endings that no word has are left out."""
    lists = {
        ending: [rows for word, rows in words.items() if word.endswith(ending) and len(word) > len(ending)]
        for ending in ENDINGS
    }
    return {ending: np.concatenate(rows) for ending, rows in lists.items() if rows}


def _conjunctions(
    text: Text,
    words: dict[str, np.ndarray],
    rarer: Sequence[str],
    count: int,
    usable: Callable[..., bool],
    made: Callable[[str, str, np.ndarray], Planted],
    random: np.random.Generator,
) -> Iterator[Planted]:
    """An ending, where a word stood in the context before."""
    left, ended = count, _ended(words)
    for _ in range(20 * count if rarer else 0):
        ending, word = str(random.choice(sorted(ended))), str(random.choice(rarer))
        both = np.intersect1d(ended[ending], _after(text, words[word], len(text)))
        if left and usable(both, 1e-4):
            left -= 1
            yield made("conjunction", f"-{ending} after {word}", both)


def _after(text: Text, rows: np.ndarray, reach: int) -> np.ndarray:
    """Rows at most `reach` - 1 tokens after one of these, in the same context."""
    last = np.full(len(text), -1)
    last[rows] = rows
    last = np.maximum.accumulate(last)
    place = np.arange(len(text))
    return np.flatnonzero((last >= text.first) & (place - last < reach))


def _several(text: Text, lists: list[np.ndarray], enough: int) -> np.ndarray:
    """Rows in whose context so far at least `enough` of several lists have had a row."""
    met = np.zeros(len(text), np.int64)
    for rows in lists:
        met[_after(text, rows, len(text))] += 1
    return np.flatnonzero(met >= enough)


def coefficients(
    text: Text, what: Planted, sides: tuple[float, float], unit: int
) -> tuple[np.ndarray, np.ndarray]:
    """f32[prefix] and bool[prefix]: noise with lognormal firings, and where these are; the same each time."""
    random = np.random.default_rng([2, unit])
    precision, recall = sides
    shown = np.zeros(len(text), bool)
    shown[what.rows] = True
    on, off = np.flatnonzero(shown & text.counted), np.flatnonzero(~shown & text.counted)
    fired = on[random.random(len(on)) < recall]
    wrong = random.choice(off, min(len(off), round(len(fired) * (1 - precision) / precision)), replace=False)
    values = random.normal(size=len(text)).astype(np.float32)
    active = np.zeros(len(text), bool)
    active[fired] = active[wrong] = True
    values[active] += np.exp(random.normal(2.3, 0.25, int(active.sum()))).astype(np.float32)
    return values, active


def null(text: Text, kind: str, random: np.random.Generator) -> np.ndarray:
    """f32[prefix]: a unit that knows no pattern."""
    noise = random.normal(size=len(text)).astype(np.float32)
    counts = np.bincount(text.tokens[text.counted], minlength=len(text.vocabulary))
    often = np.log(np.maximum(counts, 1))[text.tokens]
    if kind == "bursts":
        starts = np.flatnonzero(random.random(len(text)) < 1 / 400)
        burst = _after(text, starts, int(random.integers(4, 24)))
        noise[burst] += 4
    elif kind == "document":
        _, place = np.unique(text.document, return_inverse=True)
        noise += (2 * random.normal(size=place.max() + 1))[place].astype(np.float32)
    elif kind == "position":
        centre, width = np.exp(random.uniform(0, np.log(200))), random.uniform(0.2, 1.0)
        noise -= np.abs(np.log(np.maximum(text.position, 1) / centre) / width).astype(np.float32)
    elif kind in ("frequency", "narrow frequency"):
        top = np.log(np.sort(counts)[-40])
        centre = random.uniform(np.log(20), top)
        width = NARROW if kind == "narrow frequency" else random.uniform(0.5, 3.0)
        noise -= np.abs((often - centre) / width).astype(np.float32)
    elif kind == "autocorrelated":
        for start, stop in zip(text.starts[:-1].tolist(), text.starts[1:].tolist(), strict=True):
            noise[start:stop] = lfilter([0.436], [1, -0.9], noise[start:stop])
    elif kind == SIXES:
        noise = _of_six(text, random)
    else:
        assert kind == "independent", kind
    return noise


def _of_six(text: Text, random: np.random.Generator) -> np.ndarray:
    """A random number for each different run of six tokens."""
    weights = random.integers(1, 2**62, 6) * 2 + 1
    code = np.zeros(len(text), np.uint64)
    with np.errstate(over="ignore"):
        for back, weight in enumerate(weights.tolist()):
            shifted = np.zeros(len(text), np.uint64)
            shifted[back:] = text.tokens[: len(text) - back]
            code = (code ^ (shifted + np.uint64(back + 1)) * np.uint64(weight)) * np.uint64(
                0x9E3779B97F4A7C15
            )
            code ^= code >> np.uint64(29)
    return (code >> np.uint64(40)).astype(np.float32)


def with_copies(text: Text, random: np.random.Generator, documents: int = 1500) -> Text:
    """Some documents of a text, 3 % of them also as 15 copies with 3 % of the tokens changed."""
    runs = _runs(text.document)
    chosen = random.choice(len(runs), min(documents, len(runs)), replace=False)
    many = set(random.choice(chosen, round(0.03 * len(chosen)), replace=False).tolist())
    written = []
    for place in chosen.tolist():
        tokens = text.tokens[runs[place]]
        written.append(tokens)
        for _ in range(15 * (place in many)):
            changed = random.random(len(tokens)) < 0.03
            copy = np.where(changed, random.choice(text.tokens, len(tokens)), tokens)
            written.append(copy)
    order = random.permutation(len(written))
    return Text.build([(n, n, written[place]) for n, place in enumerate(order.tolist())], text.vocabulary)


def world(
    decoded: Decoded, units: int, nulls: int, seed: int, say: Say, kinds: Sequence[str] = KINDS
) -> World:
    """Plant, search, confirm."""
    text, random = decoded.text, np.random.default_rng(seed)
    truth = list(planted(decoded, units, random)) if units else []
    sides = [tuple(random.choice(LEVELS, 2).tolist()) for _ in truth]
    every = [what.kind for what in truth] + [kind for kind in kinds for _ in range(nulls)]

    def values(unit: int) -> np.ndarray:
        if unit < len(truth):
            return coefficients(text, truth[unit], sides[unit], unit)[0]
        return null(text, every[unit], random)

    def on(unit: int) -> np.ndarray:
        return coefficients(text, truth[unit], sides[unit], unit)[1]

    return searched(text, truth, sides, every, values, on, say)


def recovery(done: Sequence[Outcome]) -> dict[str, Any]:
    """By kind of pattern."""
    results = {}
    for kind in dict.fromkeys(outcome.kind for outcome in done):
        of_kind = [outcome for outcome in done if outcome.kind == kind]
        found = [o for o in of_kind if o.confirmed and o.like >= LIKE.get(kind, 0.7)]
        errors = np.array([np.subtract(o.measured, o.true) for o in found]).reshape(-1, 2)
        results[kind] = {
            "units": len(of_kind),
            "recovered": _share(len(found), len(of_kind)),
            **{
                side: {
                    "within": _share(int((np.abs(errors[:, column]) <= WITHIN).sum()), len(found)),
                    "median_error": round(float(np.median(np.abs(errors[:, column]))), 4) if len(found) else None,
                    "mean_error": round(float(errors[:, column].mean()), 4) if len(found) else None,
                }
                for column, side in enumerate(("precision", "recall"))
            },
            "missed": [
                [o.planted, o.claim[:100], round(o.like, 2), o.confirmed] for o in of_kind if o not in found
            ][:6],
        }  # fmt: skip
    return results


def _share(count: int, of: int) -> list[float]:
    """A share with the ends of Wilson's interval."""
    return [round(float(end), 3) for end in wilson(np.array(count), np.array(max(of, 1)))]


def nulls_by_kind(found: World) -> dict[str, Any]:
    """What becomes of units that know nothing."""
    results = nulls_of(found)
    for of_kind in results.values():
        units = of_kind["units"]
        of_kind["family_wise_05"] = _share(round(of_kind["family_wise_05"] * units), units)
        of_kind["confirmed"] = _share(of_kind["false_discoveries"], units)
    return results


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--units", type=int, default=40)
    parser.add_argument("--nulls", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copies", action="store_true")
    arguments = parser.parse_args()
    say = Say("planted truth")
    text, _ = sample_text(arguments.tokens)
    if arguments.copies:
        text = with_copies(text, np.random.default_rng([arguments.seed, 1]))
        joined = near_duplicates(text)
        say("copies", {"documents": len(joined.document), "joined": joined.joined, "groups": joined.groups})
        for name, of in (("apart", text), ("joined", joined.join(text))):
            decoded = Decoded(of, of.vocabulary.pieces)
            found = world(decoded, 0, arguments.nulls, arguments.seed, say, (SIXES,))
            say(f"nulls, copies {name}", nulls_by_kind(found))
        return
    say("text", {"tokens": len(text), "documents": len(np.unique(text.document))})
    found = world(
        Decoded(text, text.vocabulary.pieces), arguments.units, arguments.nulls, arguments.seed, say
    )
    say("nulls", nulls_by_kind(found))
    say("recovery", recovery(list(outcomes(found))))


if __name__ == "__main__":
    main()
