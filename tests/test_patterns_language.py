"""The pattern language: every mask against a slow definition, every spec read back, every bad one refused."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from planted_patterns import small_text, vocabulary

from mnemoscope.errors import PatternError, QueryError
from mnemoscope.patterns import foreign
from mnemoscope.patterns.columns import from_flags
from mnemoscope.patterns.language import Limits, masks, mine, usual
from mnemoscope.patterns.pattern import BUILTINS, parse, predicate
from mnemoscope.patterns.space import representatives
from mnemoscope.run.text import Text
from mnemoscope.text.vocabulary import Vocabulary

TEXT, _ = small_text(60)
LIMITS = Limits()
MINED = {tests: mine(TEXT, tests, LIMITS) for tests in ("main", "next", "position")}


def bytes_text(*contents: str) -> Text:
    """A text with one token a byte; each content is a document."""
    ids = Vocabulary([b"<s>", *(bytes([i]) for i in range(256))], [True] + [False] * 256)
    return Text.build([(i, i, [0, *(b + 1 for b in c.encode())]) for i, c in enumerate(contents)], ids)


def holds(spec: str, text: Text) -> np.ndarray:
    """bool[prefix]."""
    return masks(text, [spec]).toarray()[:, 0]


def shown(spec: str, text: Text) -> list[str]:
    """The counted prefixes that have a pattern, as text."""
    return [text.prefix(int(row)) for row in np.flatnonzero(holds(spec, text) & text.counted)]


def slow(spec: str, text: Text, row: int) -> bool:
    """What a mask should be, read off one prefix of the small text, word by word."""
    head, _, rest = spec.partition(":")
    tokens = [text.vocabulary.pieces([t])[0] for t in text.tokens[text.first[row] : row + 1]]
    ends = text.words.ends[text.first[row] : row + 1].copy()
    ends[-1] = True
    so_far = [text.words.folded[w] for w in text.words.word[text.first[row] : row + 1]]
    done = [word if end else None for word, end in zip(so_far, ends, strict=True)]
    if head == "tokens":
        parts = eval(rest, {"null": None})
        if len(parts) > len(tokens):
            return False
        return all(part in (None, token) for part, token in zip(parts[::-1], tokens[::-1], strict=False))
    words, at, window = rest.partition("@")
    near = [so_far[-1]] if not at else done if window == "all" else done[-int(window) :]
    if head == "word":
        return words in near
    if head == "words":
        return bool(set(words.split(",")) & set(near))
    if head == "topic":
        count, _, words = rest.partition(":")
        return len(set(words.split(",")) & set(done)) >= int(count)
    if head == "suffix":
        return so_far[-1].endswith(rest) and len(so_far[-1]) > len(rest)
    assert head == "followed", head
    earlier = [i for i in range(len(tokens) - 1) if tokens[i] == tokens[-1]]
    return bool(earlier) and tokens[earlier[-1] + 1] == eval(rest)


@given(st.data())
@tries(40)
def test_masks_are_what_the_slow_definition_says(data: st.DataObject) -> None:
    """Patterns that were mined hold at a row if and only if the prefix, read word by word, says so."""
    specs = [
        s
        for s in MINED["main"][0]
        if s.split(":")[0] in ("tokens", "word", "words", "topic", "suffix", "followed")
    ]
    spec = data.draw(st.sampled_from(specs))
    found = holds(spec, TEXT)
    some = data.draw(st.lists(st.integers(0, len(TEXT) - 1), max_size=6))
    for row in [*some, *np.flatnonzero(found)[:6].tolist()]:
        assert found[row] == slow(spec, TEXT, row), (spec, TEXT.prefix(row))


@pytest.mark.parametrize("tests", ["main", "next", "position"])
def test_what_is_mined_is_what_its_spec_says(tests: str) -> None:
    """The column of every mined pattern is the mask of its spec at the prefixes that count, and the spec reads back."""
    specs, found, costs = MINED[tests]
    assert len(set(specs)) == len(specs) == found.shape[1] == len(costs)
    some = np.random.default_rng(0).permutation(len(specs))[:1500]
    again = masks(TEXT, [specs[i] for i in some])
    difference = (found[:, some] != again).toarray()
    assert not difference[TEXT.counted].any()
    for i in some:
        pattern = parse(specs[i])
        assert pattern.spec == specs[i] and parse(pattern.spec) == pattern and pattern.name
        assert pattern.tests == tests and pattern.kind in ("shallow", "syntactic", "semantic")


@given(st.integers(0, len(TEXT) - 1))
@tries(12)
def test_a_pattern_knows_nothing_of_what_comes_after(row: int) -> None:
    """Cutting a context behind a prefix changes no mask there, but for the family of the next token."""
    first = int(TEXT.first[row])
    alone = Text.build([(0, 0, TEXT.tokens[first : row + 1])], TEXT.vocabulary)
    specs = [*MINED["main"][0][::13], *BUILTINS]
    whole = masks(TEXT.part(TEXT.document[[row]])[0], specs).toarray()
    assert (masks(alone, specs).toarray() == whole[: row + 1 - first]).all()


def test_built_in_forms() -> None:
    """Dates, years, times, money and what else has a name are found where they end, and not elsewhere."""
    text = bytes_text(
        'On 12 May 1984 (see p. 3) he said "no".',
        "From 1914-1918, at 10:30 pm, 25% of $3 million, the 1980s, the 21st, 5 km, red, green, and blue",
        "# A heading\n- one item\n\nNew line. Second sentence",
    )
    assert [s[-8:] for s in shown("year", text)] == ["May 1984", "rom 1914", "914-1918", "the 1980"]
    assert [s[-6:] for s in shown("date", text)] == ["12 May", " May 1", "May 19"]
    assert [s[-7:] for s in shown("year-range", text)] == ["1914-19", "14-1918"]
    assert [s[-5:] for s in shown("time", text)] == ["10:30", "30 pm"]
    assert [s[-3:] for s in shown("percent", text)] == ["25%"]
    assert [s[-5:] for s in shown("money", text)] == ["of $3", "llion"]
    assert [s[-5:] for s in shown("decade", text)] == ["1980s"]
    assert [s[-6:] for s in shown("ordinal", text)] == ["e 21st", "Second"]
    assert shown("measure", text)[-1].endswith("5 km")
    assert [shown("open-bracket", text)[i][-4:] for i in (0, -1)] == ["84 (", "p. 3"]
    assert [shown("open-quote", text)[i][-4:] for i in (0, -1)] == ['id "', ' "no']
    assert shown("heading", text)[-2] == "# A heading"
    assert shown("list-item", text)[0].endswith("- o") and shown("list-item", text)[-1].endswith("- one")
    assert any(s.endswith("and blu") for s in shown("list", text))
    assert shown("sentence-start", text)[-1].endswith(". Second")
    assert shown("sentence-start", text)[0] == "O"
    assert any(s.endswith("New") for s in shown("new-line", text))


def test_numbers_by_their_digits() -> None:
    """Numbers of so many digits, with a decimal point, and in groups of three, at the end of the prefix so far; all of
    them are mined."""
    text = bytes_text("In 1984, 25 of 1,234,567 had 3.14 and 12.5", "At 07:45 x25 25x 7")
    assert shown("digits:4", text) == ["In 1984"]
    assert [s[-3:] for s in shown("digits:2", text)] == [
        " 19",
        " 25",
        ",23",
        ",56",
        ".14",
        " 12",
        " 07",
        ":45",
        " 25",
    ]
    assert [s[-3:] for s in shown("digits:3", text)] == ["198", "234", "567"]
    assert [s[-5:] for s in shown("grouped-number", text)] == ["1,234", "4,567"]
    assert [s[-4:] for s in shown("decimal", text)] == [" 3.1", "3.14", "12.5"]
    assert parse("digits:2").name == "a number of 2 digits" and parse("digits: 02").spec == "digits:2"
    for wrong in ("digits:0", "digits:two", "digits:-1"):
        with pytest.raises(PatternError, match="no number of digits"):
            parse(wrong)
    assert {"digits:2", "digits:4"} <= set(MINED["main"][0])


def test_words_and_tokens_are_aligned_once() -> None:
    """A word of several tokens is one word, punctuation is its own, and a prefix sees the word so far."""
    text = bytes_text("The rivers, river")
    assert shown("word:river", text) == ["The river", "The rivers, river"]
    assert shown("word:river@4", text) == ["The river", "The rivers, river"]  # "rivers" is another word
    assert shown("suffix:vers", text) == ["The rivers"]
    assert shown("casing:title", text)[0] == "T" and shown("shape:Xxx", text) == ["The"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nonsense", "no such pattern"),
        ("noun:x", "no such pattern"),
        ("word:", "nothing stands after"),
        ("word:two words", "not one word"),
        ("word:river@1", "no window"),
        ("tokens:x", "not a JSON list"),
        ("tokens:[null]", "the last is no null"),
        ("topic:5:a,b", "at least as many words"),
        ("position:9-3", "no range"),
        ('all:["word:a"]', "two specs or more"),
        ('all:["word:a","nonsense"]', "no such pattern"),
        ("regex:(", "does not compile"),
        ("file:/nowhere/labels.jsonl", "give a file"),
        ("predicate:x", "no such pattern"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec: str, says: str) -> None:
    """What cannot be read or tested is a `PatternError` that quotes it and says what to write."""
    with pytest.raises(PatternError, match=re.escape(says)) as error:
        masks(TEXT, [spec])
    assert "\n" not in str(error.value) and len(str(error.value)) < 1200


def test_a_token_that_is_none_is_a_question_that_cannot_be_answered() -> None:
    """`tokens:` with a text that is no token says so."""
    with pytest.raises(QueryError, match="no such token"):
        masks(TEXT, ['tokens:[" barXYZ"]'])


def test_a_regex_sees_the_end_of_a_prefix_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`$` is the end of the prefix, 256 characters are seen, and nested repetition ends in an error."""
    text = bytes_text("year 1984.", "x" * 300 + "end", "a" * 60 + "b")
    assert shown(r"regex:\b19\d\d$", text) == ["year 1984"]
    assert not any(holds("regex:^x{300}", text)) and holds("regex:x{250}", text).any()
    monkeypatch.setattr(foreign, "ONE", 0.05)
    with pytest.raises(PatternError, match="without nested repetition"):
        masks(text, [r"regex:^(a|aa|a?)+[cd]$"])
    monkeypatch.setattr(foreign, "ALL", -1.0)
    with pytest.raises(PatternError, match="of 377 prefixes"):
        masks(text, ["regex:x"])


def test_a_pattern_that_everything_or_nothing_has_cannot_be_tested() -> None:
    """Both are refused, with which of them it was; a proper one gives its mask."""
    with pytest.raises(PatternError, match="holds at all"):
        usual(TEXT, parse("regex:."))
    with pytest.raises(PatternError, match="holds at none"):
        usual(TEXT, parse("word:absent"))
    assert usual(TEXT, parse("year")).any()


def test_a_pattern_that_only_holds_where_nothing_counts_is_said_to() -> None:
    """The first token of a context does not count, so what only begins contexts is not absent."""
    ids = Vocabulary([bytes([i]) for i in range(256)], [False] * 256)
    only = (
        r"none of the 4 prefixes \(only at 2 that end at position 0 or a special token, which do not count\)"
    )
    with pytest.raises(PatternError, match=only):
        usual(Text.build([(0, 0, [97, 98, 99]), (1, 1, [97, 98, 100])], ids), parse("regex:^a$"))


def test_labels_and_predicates(tmp_path: Path) -> None:
    """A file labels rows by context and position; a predicate is asked of the text; bad lines are named."""
    file = tmp_path / "labels.jsonl"
    file.write_text(
        '{"context": 3, "position": 2, "label": 1}\n\n{"context": 4, "position": 1, "label": false}\n'
    )
    assert (
        np.flatnonzero(holds(f"file:{file}", TEXT)).tolist()
        == TEXT.rows(np.array([3]), np.array([2])).tolist()
    )
    file.write_text('{"context": 3, "position": 20000, "label": 1}\n')
    with pytest.raises(PatternError, match="line 1: context 3 has positions 0 to"):
        holds(f"file:{file}", TEXT)
    file.write_text("not json\n")
    with pytest.raises(PatternError, match="line 1"):
        holds(f"file:{file}", TEXT)
    asked = masks(TEXT, [predicate(lambda prefix: prefix.endswith("."), "a full stop")]).toarray()[:, 0]
    assert (asked == holds('tokens:["."]', TEXT)).all()


def test_lemmas_are_an_extra() -> None:
    """With simplemma, forms of a word are one pattern; without it, the message says what to install."""
    text = bytes_text("he goes, they went")
    if find_spec("simplemma") is None:
        with pytest.raises(PatternError, match="pip install"):
            masks(text, ["lemma:go"])
    else:
        assert shown("lemma:go", text) == ["he go", "he goes", "he goes, they went"]


def test_rows_of_contexts_and_positions() -> None:
    """`rows` finds prefixes, also in text of some documents only, and refuses what is not there."""
    part, rows = TEXT.part(np.array([3, 7]))
    assert (part.tokens == TEXT.tokens[rows]).all() and set(part.document) == {3, 7}
    assert (
        rows[part.rows(np.array([7, 3]), np.array([1, 0]))] == TEXT.rows(np.array([7, 3]), np.array([1, 0]))
    ).all()
    for context, position in ((5, 0), (3, -1), (3, 10**6)):
        with pytest.raises(QueryError, match="not among"):
            part.rows(np.array([context]), np.array([position]))


@given(st.integers(0, 10**6))
@tries(25)
def test_patterns_that_are_the_same_have_one_representative(seed: int) -> None:
    """Equal columns, and columns with a Jaccard index above the bound, share their cheapest; others stand alone."""
    random = np.random.default_rng(seed)
    base = random.random((6, 2000)) < random.uniform(0.02, 0.3, (6, 1))
    near = base[0].copy()
    near[np.flatnonzero(near)[:1]] = False
    found = from_flags([*base, base[2], near, base[0] & base[1]], 2000)
    costs = [2, 1, 2, 1, 1, 1, 1, 3, 1]
    standing = representatives(found, costs)
    assert standing[2] == standing[6] == 6 and standing[7] == standing[0] == 0
    assert (standing[[1, 3, 4, 5, 8]] == [1, 3, 4, 5, 8]).all()
    assert representatives(found, costs, jaccard=1)[7] == 7


def test_no_torch_is_needed() -> None:
    """The vocabulary of the tests is enough to build a text: nothing here asks for a model."""
    assert len(Text.build([], vocabulary())) == 0 and masks(Text.build([], vocabulary()), ["year"]).shape == (
        0,
        1,
    )


def test_compounds_made_together_are_those_made_alone() -> None:
    """Thousands of compounds share their parts; each is the conjunction or union of them, nested ones too."""
    random = np.random.default_rng(0)
    words = Vocabulary([b"<s>", *(b" %c" % letter for letter in b"abcdef")], [True, *[False] * 6])
    text = Text.build([(i, i, random.integers(0, 7, 30)) for i in range(8)], words)
    simple = ["word:a", "word:b@4", "word:c@16", "words:d,e", "position:3-9"]
    pairs = [
        f'{head}:["{one}","{two}"]'
        for head in ("all", "any")
        for one in simple
        for two in simple
        if one < two
    ]
    nested = [f'all:[{json.dumps(pairs[-1])},"word:f@4"]', f'any:[{json.dumps(pairs[0])},"word:f"]']
    parts = dict(zip(simple, masks(text, simple).toarray().T, strict=True))
    found = dict(zip([*pairs, *nested], masks(text, [*pairs, *nested]).toarray().T, strict=True))
    for spec in pairs:
        one, two = (parts[part] for part in json.loads(spec.partition(":")[2]))
        np.testing.assert_array_equal(found[spec], one & two if spec.startswith("all") else one | two)
    last = masks(text, ["word:f@4", "word:f"]).toarray().T
    np.testing.assert_array_equal(found[nested[0]], found[pairs[-1]] & last[0])
    np.testing.assert_array_equal(found[nested[1]], found[pairs[0]] | last[1])
