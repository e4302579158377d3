"""How tokens read: pieces of a sequence, labels, look-up."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope.errors import QueryError
from mnemoscope.text.vocabulary import Vocabulary


def small(*pieces: bytes) -> Vocabulary:
    return Vocabulary(pieces, [False] * len(pieces))


@given(st.binary(), st.lists(st.integers(1, 3)))
def test_pieces_of_any_bytes_are_the_decoded_bytes(data: bytes, widths: list[int]) -> None:
    """However bytes are cut into tokens, the joined pieces are the same."""
    single = small(*(bytes([byte]) for byte in data)).pieces(range(len(data)))
    cuts, position = [], 0
    for width in [*widths, len(data)]:
        cuts.append(data[position : position + width])
        position += width
    assert "".join(small(*cuts).pieces(range(len(cuts)))) == "".join(single)


@given(
    st.lists(st.sampled_from([b" a", b"\xe2", b"\x80", b"\x9cb", b"", b"\n", b"\x00", b"  c"]), max_size=12),
    st.integers(0, 11),
)
def test_running_text_is_its_pieces_made_visible(pieces: list[bytes], special: int) -> None:
    """Whatever stands beside what, and however often it was read before."""
    vocabulary = Vocabulary(pieces, [place == special for place in range(len(pieces))])
    for tokens in ([*range(len(pieces))], [*reversed(range(len(pieces)))], [*range(len(pieces))] * 2):
        wanted = [vocabulary.visible(piece, edges=False) for piece in vocabulary.pieces(tokens)]
        assert vocabulary.running(tokens) == wanted


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    """The earlier parts of a character show nothing, and its last part shows it with what follows."""
    vocabulary = small(b"a \xe2", b"\x80", b"\x9cb", b"c")
    assert vocabulary.pieces([0, 1, 2, 3]) == ["a ", "", "“b", "c"]


def test_bytes_that_nothing_completes_are_shown() -> None:
    """Half a character at the end, or before other text, shows its bytes where they stand."""
    vocabulary = small(b"\xe2\x80", b"x", b"\x9c")
    assert vocabulary.pieces([0]) == ["⟨e2⟩⟨80⟩"]
    assert vocabulary.pieces([0, 1, 2]) == ["⟨e2⟩⟨80⟩", "x", "⟨9c⟩"]


def test_pieces_of_nothing() -> None:
    """An empty sequence has no pieces."""
    assert small(b"a").pieces([]) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Paris", "·Paris"),
        ("a b", "a b"),
        ("\u00a0", "⟨U+00A0⟩"),
        ("a  b ", "a··b·"),
        ("\n\n\tx\r", "↵↵⇥x␍"),
        ("\x00\x1b\x7f\x85", "⟨U+0000⟩⟨U+001B⟩⟨U+007F⟩⟨U+0085⟩"),
        ("\u202eabc\ufeff\u2028", "⟨U+202E⟩abc⟨U+FEFF⟩⟨U+2028⟩"),
        ("שלום 東京 می‌خواهم", "שלום 東京 می‌خواهم"),
        ("👩‍💻", "👩‍💻"),
        ("<b>&", "<b>&"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    """White space and controls are made visible; letters of every script stay."""
    assert Vocabulary.visible(text) == shown


def test_visible_running_text_keeps_its_spaces() -> None:
    """Inside a sentence spaces stay spaces, and line ends are still shown."""
    assert Vocabulary.visible(" the  end\n", edges=False) == " the  end↵"


def test_label_is_short_and_on_one_line() -> None:
    """A label never grows beyond its width, nor breaks the line."""
    vocabulary = small(b"\n" * 80, b"word")
    assert vocabulary.label(0, width=5) == "↵↵↵↵…"
    assert vocabulary.label(1) == "word"


def test_find_is_exact_and_gives_every_id() -> None:
    """Only tokens with exactly these bytes are found, all of them."""
    vocabulary = small(b" Paris", b"Paris", b" Paris", b" paris")
    assert vocabulary.find(" Paris") == [0, 2]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("PARIS", '" Paris", "paris"'),
        ("Parsi", '" Paris", "paris"'),
        ("Bordeaux", '"Bord"'),
    ],
)
def test_find_names_the_nearest(text: str, names: str) -> None:
    """When there is none the error names tokens of other case or spacing, look-alikes, and beginnings."""
    with pytest.raises(QueryError, match="leading space and upper case count") as caught:
        small(b" Paris", b"paris", b"Bord", b"x", b"\xe2").find(text)
    assert str(caught.value).endswith(f"the nearest are {names}")
    assert f'looking for the token "{text}"' in str(caught.value)


@pytest.mark.parametrize("text", ["", "  ", "\ud800", "q"])
def test_find_without_anything_near(text: str) -> None:
    """A text that is like no token is refused all the same, in one line."""
    with pytest.raises(QueryError, match="give a shorter text"):
        small(b"x", b"").find(text)


@pytest.mark.parametrize("token", [-1, 2])
def test_tokens_out_of_range_are_refused(token: int) -> None:
    """A token id that the vocabulary lacks says which there are."""
    with pytest.raises(QueryError, match="the vocabulary has tokens 0 to 1"):
        small(b"a", b"b").label(token)


def test_vocabulary_needs_no_torch() -> None:
    """Reading tokens imports neither torch nor transformers."""
    code = "import sys, mnemoscope.text.vocabulary; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
