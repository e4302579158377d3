"""What the terminal prints, as elements: nothing is lost, nothing is markup, and a table is a table."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from mnemoscope.display import as_text
from mnemoscope.views.printed import elements
from mnemoscope.views.terminal import BLUE, Fitted, block, table

WORDS = st.text(
    st.characters(codec="ascii", exclude_categories=["C"]) | st.sampled_from("é·↵<>&\"'"), min_size=1, max_size=8
).filter(lambda word: word == word.strip())  # fmt: skip
STYLES = st.sampled_from(["", "bold", "dim", "italic", "underline", "bold reverse", BLUE])
TEXTS = st.builds(Text, WORDS, STYLES)
TABLES = st.integers(1, 4).flatmap(
    lambda columns: st.builds(
        table,
        st.lists(WORDS.map(lambda word: word.replace("[", "(")), min_size=columns, max_size=columns),
        st.lists(st.lists(TEXTS, min_size=columns, max_size=columns), max_size=4),
    )
)
PRINTED = st.recursive(
    TEXTS | TABLES,
    lambda parts: (
        st.lists(parts, min_size=1, max_size=3).map(lambda each: Group(*each))
        | parts.map(lambda part: Padding(part, (0, 0, 0, 3)))
        | parts.map(lambda part: Fitted(lambda room: iter([part])))
    ),
    max_leaves=6,
)


class Read(HTMLParser):
    """Texts and elements of a fragment."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: list[str] = []
        self.open: list[str] = []
        self.feed(fragment)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element begins."""
        self.elements.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """And ends, in order."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """A text."""
        self.texts.append(data)


@given(PRINTED)
def test_it_says_what_the_terminal_says(printed: object) -> None:
    """The same letters in the same order, whatever stands in what; only those of the page's own elements are tags."""
    read = Read(elements(printed))
    assert "".join("".join(read.texts).split()) == "".join(as_text(printed, 10_000).split())
    assert set(read.elements) <= {
        "p",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "b",
        "i",
        "u",
        "span",
        "button",  # a name that says what it means
    }
    assert not read.open


def test_tables_are_tables() -> None:
    """With a heading for each column that has a name; what is drawn of blocks is left as it is."""
    rows = [("L0N1", "0.5"), ("L0N2", "1.5")]
    read = Read(elements(Group(table(("neuron", ""), rows), table(("a", "b"), [("x", block(3) + block(8))]))))
    assert [read.elements.count(name) for name in ("table", "th", "tr", "td", "pre")] == [1, 1, 3, 5, 1]
    assert [text for text in read.texts if text.strip()][:5] == ["neuron", *chain(*rows)]
