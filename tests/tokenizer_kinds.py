"""Tokenizers of every kind over vocabularies of any alphabet: what laws about tokenizers are tried on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

ALPHABETS = ("ACGT", "01", "abcXY", "東京是", "♪♫♩", "éßñ", "сло")
KINDS = ("bytes", "metaspace", "unigram", "prepend", "fallback", "words", "wordpiece", "suffix", "letters")
SPECIAL = ("<s>", "</s>", "<x>")


@dataclass(frozen=True)
class Made:
    """A tokenizer, what it puts around a text, whether it keeps any text of its words, and such texts' words."""

    tokenizer: PreTrainedTokenizerFast
    before: tuple[int, ...]
    after: tuple[int, ...]
    words: tuple[str, ...]
    space: str  # between words
    faithful: bool

    def text(self, numbers: list[int]) -> str:
        """The words of these numbers as a text."""
        return self.space.join(self.words[number % len(self.words)] for number in numbers)


@st.composite
def made(draw: Any, kinds: tuple[str, ...] = KINDS) -> Made:
    """Any tokenizer: kind, alphabet, words, special tokens before or after or both, with roles or raw."""
    kind, alphabet = draw(st.sampled_from(kinds)), draw(st.sampled_from(ALPHABETS))
    words = draw(st.lists(st.text(alphabet, min_size=1, max_size=3), min_size=2, max_size=6, unique=True))
    unknown = draw(st.booleans())
    inner = _inner(kind, alphabet, words, unknown, draw(st.booleans()))
    changed = draw(st.sampled_from([None, None, None, normalizers.Lowercase(), normalizers.NFKD()]))
    if kind == "letters" and not unknown:
        changed = None  # a changed letter would be dropped, and a text left without tokens
    if changed is not None:
        old = inner.normalizer
        inner.normalizer = changed if old is None else normalizers.Sequence([changed, old])
    around = draw(st.sampled_from([([], []), ([0], []), ([], [1]), ([0], [1]), ([2, 0], [1]), ([0], [1, 2])]))
    before, after = around
    template = " ".join([*(SPECIAL[token] for token in before), "$A", *(SPECIAL[token] for token in after)])
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, token) for token, name in enumerate(SPECIAL)]
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>"} if draw(st.booleans()) else {}
    return Made(
        PreTrainedTokenizerFast(tokenizer_object=inner, **roles),
        tuple(before),
        tuple(after),
        tuple(words),
        "" if kind == "letters" else " ",
        changed is None,
    )


def letters(alphabet: str, decoder: bool) -> PreTrainedTokenizerFast:
    """One token for each letter and for each of `SPECIAL`, which have no role."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_inner("letters", alphabet, list(alphabet), unknown=False, spaced=decoder)
    )


def _inner(kind: str, alphabet: str, words: list[str], unknown: bool, spaced: bool) -> Tokenizer:
    if kind == "bytes":
        inner = Tokenizer(models.BPE(_numbered(sorted(pre_tokenizers.ByteLevel.alphabet())), []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
        inner.decoder = decoders.ByteLevel()
        return inner
    if kind in ("words", "wordpiece"):
        names = _numbered(["<unk>", *words, *("##" + letter for letter in alphabet), *alphabet])
        model = models.WordLevel if kind == "words" else models.WordPiece
        inner = Tokenizer(model(names, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if kind == "wordpiece" or spaced:
            inner.decoder = decoders.WordPiece() if kind == "wordpiece" else None
        return inner
    if kind == "suffix":
        letters = [letter + end for letter in alphabet for end in ("", "</w>")]
        names, merges = _merged(["<unk>", *letters], [[*word[:-1], word[-1] + "</w>"] for word in words])
        inner = Tokenizer(models.BPE(names, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.decoder = decoders.BPEDecoder(suffix="</w>")
        return inner
    if kind == "letters":
        names, merges = _merged([*(["<unk>"] if unknown else []), *alphabet], [list(word) for word in words])
        inner = Tokenizer(models.BPE(names, merges, unk_token="<unk>" if unknown else None))
        inner.decoder = decoders.Fuse() if spaced else None
        return inner
    if kind == "unigram":
        pieces = [("<unk>", -9.0), *((name, -1.0) for name in ("▁", *("▁" + word for word in words)))]
        scored = [(name, -9.0) for name in SPECIAL] + pieces + [(letter, -3.0) for letter in alphabet]
        inner = Tokenizer(models.Unigram(list(dict(scored).items()), unk_id=3))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if spaced else "never")
        inner.decoder = decoders.Metaspace(prepend_scheme="always" if spaced else "never")
        return inner
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "fallback" else []
    names, merges = _merged(["<unk>", *fallback, "▁", *alphabet], [["▁", *word] for word in words])
    inner = Tokenizer(
        models.BPE(names, merges, unk_token="<unk>", byte_fallback=bool(fallback), fuse_unk=True)
    )
    if kind == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "always" if spaced else "first"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


def _numbered(names: list[str]) -> dict[str, int]:
    return {name: token for token, name in enumerate(dict.fromkeys([*SPECIAL, *names]))}


def _merged(names: list[str], words: list[list[str]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with every word, and the merges that make it from left to right."""
    vocabulary, merges = _numbered(names), []
    for first, *rest in words:
        whole = first
        for letter in rest:
            merges.append((whole, letter))
            whole += letter
            vocabulary.setdefault(whole, len(vocabulary))
    return vocabulary, list(dict.fromkeys(merges))


class Letters(PreTrainedTokenizer):
    """A slow tokenizer of single letters, as courses write them."""

    def __init__(self, letters: str, pieces: list[str] | None = None) -> None:
        names = ["<s>", "</s>", "<unk>", *(pieces or letters)]
        self._ids = {name: token for token, name in enumerate(dict.fromkeys(names))}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 2)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._ids)[index]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0, *token_ids_0, 1]


class Words(Letters):
    """A slow tokenizer whose pieces end words with ``</w>``, as BioGPT's do."""

    def __init__(self, words: list[str]) -> None:
        super().__init__("", pieces=[piece + end for piece in words for end in ("", "</w>")])

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [piece for word in text.split() for piece in self._halves(word)]

    def _halves(self, word: str) -> list[str]:
        if word + "</w>" in self._ids:
            return [word + "</w>"]
        cuts = [
            at for at in range(1, len(word)) if word[:at] in self._ids and word[at:] + "</w>" in self._ids
        ]
        return [word[: cuts[0]], word[cuts[0] :] + "</w>"] if cuts else ["<unk>"]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join("".join(token.replace("</w>", " ") for token in tokens).split())
