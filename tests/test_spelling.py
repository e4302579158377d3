"""How tokens are spelled: bytes of every kind of vocabulary, and whether the pieces of a text are the text."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from effort import tries
from families import FAMILIES
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizer_kinds import Letters, Made, Words, letters, made
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mnemoscope import build, load_model
from mnemoscope.records import CorpusEntry
from mnemoscope.text.spelling import Fidelity, token_bytes, vocabulary_of
from mnemoscope.text.tokenizer import special_ids
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.views.words import corpus_line

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


@given(st.text())
def test_pieces_of_any_text_join_to_the_text(text: str) -> None:
    """Whatever the text, the pieces of its byte-level tokens are the text again."""
    tokens = byte_level()(text)["input_ids"]
    pieces = vocabulary_of(byte_level()).pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text


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
    return vocabulary_of(tokenizer)


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
    lone = b"##" if decoder else b" ##"  # a mark without a word
    assert [raw for _, raw, _ in token_bytes(words(decoder))] == [b"[UNK]", b" play", b"ing", lone, b" dog"]


@tries(80)
@given(kind=made(), numbers=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_pieces_join_to_the_text_or_it_is_said_that_they_do_not(kind: Made, numbers: list[int]) -> None:
    """Where nothing changes the text, the pieces are the text but for a space at its ends; else there is a sentence."""
    text = kind.text(numbers)
    tokens = kind.tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = vocabulary_of(kind.tokenizer).text(tokens)
    fidelity = Fidelity(kind.tokenizer)
    fidelity.add(text, tokens)
    assert (joined.strip(" ") == text.strip(" ")) == (fidelity.sentence == "")
    if kind.faithful:
        assert fidelity.sentence == ""


@pytest.mark.parametrize("alphabet", ["01", "ab", "ACGT", "東京是"])
@pytest.mark.parametrize("decoder", [True, False])
def test_a_vocabulary_of_a_few_letters_is_spelled_by_letters(alphabet: str, decoder: bool) -> None:
    """Names that no text has, such as <s>, stand among so few that every three names have one of them."""
    kind = Made(letters(alphabet, decoder), (), (), tuple(alphabet), "", True)
    fidelity, text = Fidelity(kind.tokenizer), kind.text([0, 0, 1])
    fidelity.add(text, kind.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert fidelity.sentence == ""


def test_slow_tokenizers_are_spelled_by_their_own_method() -> None:
    """Ends of words, single letters without any mark: as the tokenizer joins them, or as texts are read back."""
    words = Words(["the", "protein", "re", "ceptor", "binds", "a"])
    vocabulary = vocabulary_of(words)
    tokens = words("the receptor binds", add_special_tokens=False)["input_ids"]
    assert vocabulary.pieces(tokens) == ["the ", "re", "ceptor ", "binds "]
    assert vocabulary.find("protein ") != vocabulary.find("protein")
    letters = Letters("ACG T")
    assert vocabulary_of(letters).text(letters("AC GT", add_special_tokens=False)["input_ids"]) == "AC GT"


@pytest.mark.parametrize("mark", ["▁", "Ġ", "</w>", "##"])
def test_vocabularies_without_a_decoder_are_spelled_as_texts_are_read(mark: str) -> None:
    """A tokenizer that tells nothing of its decoder is spelled so that its own tokens are read back."""
    words = ["the", "cat", "s", "at", "dog", "é"]
    names = {
        "##": [*words, *("##" + word for word in words)],
        "</w>": [*words, *(word + mark for word in words)],
    }.get(mark, [*words, *(mark + word for word in words)])
    if mark == "Ġ":
        names = [name.replace("é", "Ã©") for name in names]
    ids = {name: token for token, name in enumerate(["<unk>", *names])}
    inner = Tokenizer(
        models.WordPiece(ids, unk_token="<unk>") if mark == "##" else models.WordLevel(ids, "<unk>")
    )
    inner.pre_tokenizer = {
        "▁": pre_tokenizers.Metaspace(prepend_scheme="never"),
        "Ġ": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }.get(mark, pre_tokenizers.WhitespaceSplit())
    if mark == "</w>":
        letters = sorted({letter for word in words for letter in word})
        ids = {
            name: token for token, name in enumerate(["<unk>", *letters, *(one + mark for one in letters)])
        }
        inner = Tokenizer(models.BPE(ids, [], unk_token="<unk>", end_of_word_suffix=mark))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    text = "the cat é dogs" if mark in ("##", "</w>") else "the cat é dog"
    assert vocabulary_of(tokenizer).text(tokenizer(text)["input_ids"]).strip() == text


CHANGES: dict[str, tuple[Any, Any, str, str]] = {
    "case": (normalizers.Lowercase(), None, "The Cat", "upper case is lost (1 of 1 texts)"),
    "unicode": (normalizers.NFKC(), None, "ﬁne", "characters are normalised (1 of 1 texts)"),
    "spaces": (None, pre_tokenizers.WhitespaceSplit(), "a  b\nc", "spaces or line ends are not kept"),
    "unknown": (None, None, "the ☃", "what its vocabulary lacks becomes one unknown token"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_tokenizer_changes_is_named(change: str) -> None:
    """Lost case, normal forms, spaces and unknown characters, each by its name and with its count."""
    normalizer, splitter, text, said = CHANGES[change]
    letters = "abcdefghijklmnopqrstuvwxyzTC "
    inner = Tokenizer(
        models.BPE({name: token for token, name in enumerate(["<unk>", *letters])}, [], unk_token="<unk>")
    )
    inner.decoder = decoders.Fuse()
    if normalizer is not None:
        inner.normalizer = normalizer
    if splitter is not None:
        inner.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    fidelity = Fidelity(tokenizer)
    fidelity.add(text, tokenizer(text)["input_ids"])
    assert fidelity.sentence.startswith("the tokenizer changes texts: ")
    assert said in fidelity.sentence


def test_cleaning_up_spaces_changes_no_piece() -> None:
    """A tokenizer that tidies the spaces of what it decodes still spells its tokens as they were read."""
    tokenizer = words(True)
    tokenizer.clean_up_tokenization_spaces = True
    assert vocabulary_of(tokenizer).text(tokenizer("playing")["input_ids"]).strip() == "playing"
    untidy = sentencepiece()
    untidy.clean_up_tokenization_spaces = True
    assert vocabulary_of(untidy).text(untidy("▁a ▁b")["input_ids"]) == vocabulary_of(sentencepiece()).text(
        sentencepiece()("▁a ▁b")["input_ids"]
    )


def test_padded_rows_are_unused() -> None:
    """Rows of the unembedding without a token are special, empty, and named by their number."""
    rows = token_bytes(words(True), size=7)
    assert rows[5:] == [("<unused 5>", b"", True), ("<unused 6>", b"", True)]
    vocabulary = vocabulary_of(words(True), size=7)
    assert len(vocabulary) == 7
    assert vocabulary.label(6) == "<unused 6>"
    assert vocabulary.pieces([4, 6]) == [" dog", "<unused 6>"]


def test_special_tokens_are_those_with_a_role_and_those_marked() -> None:
    """A token that a file marks special has no need of a role, nor has the unknown token; an added word is none."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.add_tokens([AddedToken("<ctl>", special=True), AddedToken("word", special=False)])
    tokenizer.pad_token = "<ctl>"
    assert special_ids(tokenizer) == [0, 1]
    assert token_bytes(tokenizer)[2] == ("word", b"word", False)


def test_what_is_not_kept_stands_in_the_manifest_and_on_the_card(tmp_path: Path) -> None:
    """Words that the vocabulary lacks: said in the manifest, on a card and above the run; nothing for known words."""
    model = load_model(FAMILIES["llama"](), tokenizer=tiny.tokenizer())
    known = tiny.texts(12)
    said = "the tokenizer changes texts: what its vocabulary lacks becomes one unknown token (1 of 13 texts)"
    plain = build(model, known, tmp_path / "plain", top=2, nulls=())
    lacking = build(model, [*known, "the zebra of France"], tmp_path / "lacking", top=2, nulls=())
    for run, sentence in ((plain, ""), (lacking, said)):
        assert run.manifest.corpus.spelling == sentence
        card = run.neuron(1, 3)
        for shown in (str(card), card._repr_html_(), corpus_line(run.manifest)):
            assert (said in " ".join(shown.split())) == bool(sentence)


def test_manifests_from_before_are_read() -> None:
    """A run that says nothing of spelling is opened as ever."""
    old = {"id": "a", "sha256": "", "source": {}, "segment": "document", "limit": None}
    counts = dict.fromkeys(("documents", "contexts", "duplicates", "tokens", "counted"), 1)
    assert CorpusEntry(**old, **counts).spelling == ""
