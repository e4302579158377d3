"""How the tokens of a vocabulary are spelled, and whether the pieces of a text still are the text.

A token is spelled by the tokenizer's own decoder: what it adds to the text between two other tokens. Bytes, which no
decoder gives one at a time, are read from the names (``Ġ`` letters, ``<0xE6>``). Where there is no decoder, the
convention is taken in which texts made of tokens are read back as these tokens.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from mnemoscope.text.tokenizer import encode, special_ids, unknown_id
from mnemoscope.text.vocabulary import Vocabulary, shown, unused

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ROUNDS = 48  # texts of three tokens that tell conventions apart
_ANCHORS = 6  # pairs of tokens that are tried as neighbours
_COMPARED = 128  # tokens by which they are judged, about

_Speller = Callable[[str], str | bytes]


def token_bytes(tokenizer: Any, size: int | None = None) -> list[tuple[str, bytes, bool]]:
    """Rows of the vocabulary table: (text, bytes, special) of token 0, 1, 2 ...

    `tokenizer`: a Hugging Face tokenizer, fast or slow. `size`: rows of the unembedding, when there are
    more of them than tokens; a row without a token is ``("<unused 50300>", b"", True)``. A text that is not
    whole UTF-8 shows its bytes.
    """
    names = {int(token): name for name, token in tokenizer.get_vocab().items()}
    added = {
        int(token): str(entry) for token, entry in getattr(tokenizer, "added_tokens_decoder", {}).items()
    }
    special = set(special_ids(tokenizer))
    spell = _speller(
        tokenizer, [name for token, name in sorted(names.items()) if token not in {*added, *special}]
    )
    rows = []
    for token in range(max(size or 0, 1 + max(names.keys() | added.keys(), default=-1))):
        if token in added:  # spelled as it is, in every kind of vocabulary
            raw = added[token].encode("utf-8", "replace")
        elif token in names:
            raw = _encoded(names[token] if token in special else spell(names[token]))
        else:
            rows.append((unused(token), b"", True))
            continue
        rows.append((shown(raw), raw, token in special))
    return rows


def vocabulary_of(tokenizer: Any, size: int | None = None) -> Vocabulary:
    """How the tokens of a Hugging Face tokenizer read; `size` as in `token_bytes`. Read once."""
    return _vocabulary(tokenizer, size, len(tokenizer))


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any, size: int | None, _: int) -> Vocabulary:
    rows = token_bytes(tokenizer, size)
    return Vocabulary([raw for _, raw, _ in rows], [special for _, _, special in rows])


def _encoded(spelled: str | bytes) -> bytes:
    return spelled if isinstance(spelled, bytes) else spelled.encode("utf-8", "replace")


# --- conventions of names ---------------------------------------------------------


def _byte_letters() -> dict[str, int]:
    """The byte of each stand-in letter in byte-level vocabularies (GPT-2, Radford et al. 2019).

    Printable Latin-1 stands for itself, the other bytes for the letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


_LETTERS = _byte_letters()


def _byte_level(name: str) -> str | bytes:
    if any(letter not in _LETTERS for letter in name):  # a few vocabularies hold such entries: plain text
        return name
    return bytes(_LETTERS[letter] for letter in name)


def _sentencepiece(name: str) -> str | bytes:
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(byte[1], 16)])
    return name.replace("▁", " ")


def _wordpiece(name: str) -> str:
    return name[2:] if name.startswith("##") and len(name) > 2 else f" {name}"


def _word_ends(name: str) -> str:
    return name.replace("</w>", " ")


# Those that change names stand before the one that does not, because a name with its marks may be read back, too.
_CONVENTIONS: tuple[_Speller, ...] = (_byte_level, _sentencepiece, _word_ends, str, _wordpiece)


def _convention(tokenizer: Any, names: Sequence[str]) -> _Speller:
    """The convention in which most texts of three tokens are spelled by the tokens that the tokenizer reads in them."""
    sample = sorted(names, key=str.isascii)[:_ROUNDS] + list(names[:: max(1, len(names) // (2 * _ROUNDS))])
    triples = list(zip(*[iter(sample[: 3 * _ROUNDS])] * 3, strict=False))
    if len(triples) < _ROUNDS:  # of few names, one that cannot be read would spoil all texts
        triples += [(name,) * 3 for name in sample]
    vocabulary = {int(token): name for name, token in tokenizer.get_vocab().items()}

    def kept(spell: _Speller) -> int:
        raw = [b"".join(_encoded(spell(name)) for name in triple) for triple in triples]
        texts = [text.decode("utf-8", "ignore") for text in raw]
        read = encode(tokenizer, texts)
        back = [b"".join(_encoded(spell(vocabulary.get(token, ""))) for token in tokens) for tokens in read]
        return sum(bool(text) and text == other for text, other in zip(raw, back, strict=True))

    best = max(_CONVENTIONS, key=kept)
    return best if kept(best) else _marked(names)


def _marked(names: Sequence[str]) -> _Speller:
    """The convention whose mark is commonest; words, if there are no marks."""
    marks = {"Ġ": _byte_level, "▁": _sentencepiece, "</w>": _word_ends, "##": _wordpiece}
    count = {mark: sum(mark in name for name in names) for mark in marks}
    best = max(marks, key=lambda mark: count[mark])
    return marks[best] if count[best] else _wordpiece


# --- the tokenizer's own decoder --------------------------------------------------


def _speller(tokenizer: Any, names: Sequence[str]) -> _Speller:
    """The spelling of plain tokens: byte letters, the decoder's, or the convention that reads back."""
    described, decode = _decoder(tokenizer)
    if '"ByteLevel"' in described or hasattr(tokenizer, "byte_decoder"):
        return _byte_level
    if decode is None or not names:
        return _convention(tokenizer, names)
    return _between(decode, names)


def _decoder(tokenizer: Any) -> tuple[str, Callable[[list[str]], str] | None]:
    """(description, names to text) of a tokenizer's decoder; no function if it merely puts a space between tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())["decoder"]
        return json.dumps(described), None if described is None else backend.decoder.decode
    convert = getattr(tokenizer, "convert_tokens_to_string", None)
    return "", None if convert is None or convert(["a", "b", "c"]) == "a b c" else convert


def _between(decode: Callable[[list[str]], str], names: Sequence[str]) -> _Speller:
    """What a decoder adds for a token that stands between two others."""
    sample = names[:: max(1, len(names) // _COMPARED)]
    words = [name for name in sample if decode([name]).strip().isalnum()] or list(sample)
    pairs = list(itertools.pairwise(words[: _ANCHORS + 1])) or [(words[0], words[0])]
    cuts = [(left, right, at) for left, right in pairs for at in range(1, len(decode([left, right])))]

    def added(name: str, left: str, right: str, at: int) -> str | None:
        around, whole = decode([left, right]), decode([left, name, right])
        head, tail = around[:at], around[at:]
        fits = len(whole) >= len(around) and whole.startswith(head) and whole.endswith(tail)
        return whole[at : len(whole) - len(tail)] if fits else None

    best = max(cuts, key=lambda cut: sum(added(name, *cut) is not None for name in sample), default=None)

    def spell(name: str) -> str | bytes:
        if byte := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return (added(name, *best) if best else None) or _sentencepiece(name)

    return spell


# --- whether the text is kept -----------------------------------------------------


class Fidelity:
    """Counts texts whose tokens do not spell them, and says in one sentence in what they differ.

    A space before or after the whole text is no difference: many tokenizers put one there.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._raw = [raw for _, raw, _ in token_bytes(tokenizer)]
        self._unknown = unknown_id(tokenizer)
        self._texts = 0
        self._different: dict[str, int] = {}

    def add(self, text: str, tokens: Sequence[int]) -> None:
        """Compare a text with its own tokens, special ones around it left out."""
        self._texts += 1
        raw = b"".join(self._raw[token] for token in tokens)
        if raw.strip(b" ") != text.encode("utf-8", "replace").strip(b" "):
            kind = "unknown" if self._unknown in tokens else _difference(raw.decode("utf-8", "replace"), text)
            self._different[kind] = self._different.get(kind, 0) + 1

    @property
    def sentence(self) -> str:
        """What differs, in how many texts; empty if nothing does."""
        if not self._different:
            return ""
        kinds = [
            f"{_KINDS[kind]} ({count:,} of {self._texts:,} texts)"
            for kind, count in sorted(self._different.items())
        ]
        return f"the tokenizer changes texts: {'; '.join(kinds)}"


_KINDS = {
    "case": "upper case is lost",
    "dropped": "characters that its vocabulary lacks are left out",
    "other": "tokens do not spell the text that was read, so what is shown may differ from it",
    "spaces": "spaces or line ends are not kept",
    "unicode": "characters are normalised",
    "unknown": "what its vocabulary lacks becomes one unknown token",
}


def _difference(spelled: str, text: str) -> str:
    """The first kind of change that accounts for the difference."""
    steps = {
        "spaces": _without_spaces,
        "unicode": _normalised,
        "case": lambda one: _normalised(one).casefold(),
    }
    kind = next((kind for kind, step in steps.items() if step(spelled) == step(text)), "other")
    left = iter(text)
    dropped = kind == "other" and all(letter in left for letter in _without_spaces(spelled))
    return "dropped" if dropped else kind


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _normalised(text: str) -> str:
    """Compatibility forms decomposed, without accents, controls and spaces."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in letters if unicodedata.category(letter)[0] not in "MCZ")
