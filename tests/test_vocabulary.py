"""How tokens read: bytes of every kind of vocabulary, pieces of a sequence, labels, look-up."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mnemoscope.errors import QueryError
from mnemoscope.vocabulary import Vocabulary, special_ids, token_bytes

TEXTS = ["The capital of France is Paris.", "naïve “quotes” and 東京, שלום", "one two three\n\n\tfour"] * 3


@lru_cache
def byte_level() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|pad|>"],
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


@lru_cache
def sentencepiece() -> PreTrainedTokenizerFast:
    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Paris", "▁a", "b", "é"]
    inner = Tokenizer(
        models.BPE({name: n for n, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


@lru_cache
def words(decoder: bool) -> PreTrainedTokenizerFast:
    names = ["[UNK]", "play", "##ing", "##", "dog"]
    inner = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    if decoder:
        inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def small(*pieces: bytes) -> Vocabulary:
    return Vocabulary(pieces, [False] * len(pieces))


@given(st.text())
def test_pieces_of_any_text_join_to_the_text(text: str) -> None:
    """Whatever the text, the pieces of its byte-level tokens are the text again."""
    tokens = byte_level()(text)["input_ids"]
    pieces = Vocabulary.of(byte_level()).pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text


@given(st.binary(), st.lists(st.integers(1, 3)))
def test_pieces_of_any_bytes_are_the_decoded_bytes(data: bytes, widths: list[int]) -> None:
    """However bytes are cut into tokens, the joined pieces are the same."""
    single = small(*(bytes([byte]) for byte in data)).pieces(range(len(data)))
    cuts, position = [], 0
    for width in [*widths, len(data)]:
        cuts.append(data[position : position + width])
        position += width
    assert "".join(small(*cuts).pieces(range(len(cuts)))) == "".join(single)


@pytest.mark.sample
@given(text=st.text())
def test_sample_tokenizer_round_trip(sample_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """The pieces of any text that the sample tokenizer itself keeps are the text again."""
    tokens = sample_tokenizer(text)["input_ids"]
    assume(sample_tokenizer.decode(tokens) == text)  # its vocabulary lacks a few bytes
    assert "".join(sample_vocabulary(sample_tokenizer).pieces(tokens)) == text


@pytest.mark.sample
def test_sample_vocabulary_finds_paris(sample_tokenizer: PreTrainedTokenizerFast) -> None:
    """A user's ' Paris' is one token of the sample model, and reads so."""
    found = sample_vocabulary(sample_tokenizer).find(" Paris")
    assert found == sample_tokenizer(" Paris")["input_ids"]
    assert sample_vocabulary(sample_tokenizer).label(found[0]) == "·Paris"


@pytest.fixture(scope="module")
def sample_tokenizer(sample_model_folder) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(sample_model_folder)


@lru_cache
def sample_vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return Vocabulary.of(tokenizer)


def test_byte_level_tokens_are_their_bytes() -> None:
    """Each stand-in letter is one byte, so all 256 are there; special tokens are spelled as they are."""
    rows = token_bytes(byte_level())
    assert {raw for _, raw, _ in rows if len(raw) == 1} == {bytes([byte]) for byte in range(256)}
    assert rows[0] == ("<|end|>", b"<|end|>", True)
    assert rows[1] == ("<|pad|>", b"<|pad|>", True)
    assert not any(special for _, _, special in rows[2:])


def test_text_of_a_broken_token_shows_its_bytes() -> None:
    """A token that is no whole character has a text, which names its bytes."""
    texts = {raw: text for text, raw, _ in token_bytes(byte_level())}
    assert texts[b"\xe2"] == "⟨e2⟩"
    assert texts[b" "] == " "


def test_sentencepiece_tokens_are_their_bytes() -> None:
    """▁ is a space, <0xNN> is a byte, and the rest is text."""
    rows = token_bytes(sentencepiece())
    assert rows[0] == ("<unk>", b"<unk>", True)
    assert rows[2 + 0xE2] == ("⟨e2⟩", b"\xe2", False)
    assert [raw for _, raw, _ in rows[258:]] == [b" ", b" Paris", b" a", b"b", "é".encode()]


@pytest.mark.parametrize("decoder", [True, False])
def test_wordpiece_tokens_are_their_bytes(decoder: bool) -> None:
    """The middle of a word loses its marks, and its beginning gains a space, with a decoder or without."""
    assert [raw for _, raw, _ in token_bytes(words(decoder))] == [b"[UNK]", b" play", b"ing", b" ##", b" dog"]


def test_kind_is_guessed_without_a_backend() -> None:
    """A slow tokenizer, which tells nothing of its decoder, is recognised by its tokens."""
    slow = SimpleNamespace(get_vocab=lambda: {"▁the": 0, "s": 1}, all_special_ids=[])
    assert [raw for _, raw, _ in token_bytes(slow)] == [b" the", b"s"]
    slow = SimpleNamespace(get_vocab=lambda: {"Ġthe": 0, "s": 1}, all_special_ids=[])
    assert [raw for _, raw, _ in token_bytes(slow)] == [b" the", b"s"]


def test_padded_rows_are_unused() -> None:
    """Rows of the unembedding without a token are special, empty, and named by their number."""
    rows = token_bytes(words(True), size=7)
    assert rows[5:] == [("<unused 5>", b"", True), ("<unused 6>", b"", True)]
    vocabulary = Vocabulary.of(words(True), size=7)
    assert len(vocabulary) == 7
    assert vocabulary.label(6) == "<unused 6>"
    assert vocabulary.pieces([4, 6]) == [" dog", "<unused 6>"]


def test_special_tokens_are_those_with_a_role_and_those_marked() -> None:
    """A token that a file marks special counts as such although it has no role; an added word does not."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.add_tokens([AddedToken("<ctl>", special=True), AddedToken("word", special=False)])
    tokenizer.pad_token = "<ctl>"
    assert special_ids(tokenizer) == [1]
    assert token_bytes(tokenizer)[2] == ("word", b"word", False)


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
    code = "import sys, mnemoscope.vocabulary; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
