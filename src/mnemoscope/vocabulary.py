"""What tokens look like: the exact bytes of each, and how a sequence of them reads.

Byte-level vocabularies spell bytes with stand-in letters, SentencePiece writes a space as ``▁``, WordPiece
marks the middle of a word with ``##``. All are brought to one form, the bytes that the token adds to the
text, once, when a run is built; after that nothing here needs a tokenizer.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mnemoscope.errors import QueryError

# Directional overrides and invisible marks can make a page say something else than its text; joiners (U+200C
# and U+200D) stay, because Persian, Indic scripts and emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)
_MARKS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})
_EDGES = re.compile(r"^ +| +$| {2,}")
_WIDE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")  # spaces that are not the space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of a tokenizer's special tokens (begin, end, padding, unknown, control), ascending.

    Both those with a role and those merely marked special in its file.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {int(token) for token, entry in added.items() if getattr(entry, "special", False)}
    return sorted(marked | {int(token) for token in tokenizer.all_special_ids if token is not None})


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
    spell = _SPELLINGS[_kind(tokenizer, names.values())]
    special = set(special_ids(tokenizer))
    rows = []
    for token in range(max(size or 0, 1 + max(names.keys() | added.keys(), default=-1))):
        if token in added:  # spelled as it is, in every kind of vocabulary
            raw = added[token].encode()
        elif token in names:
            raw = spell(names[token])
        else:
            rows.append((_unused(token), b"", True))
            continue
        rows.append(("".join(_decode([raw])), raw, token in special))
    return rows


class Vocabulary:
    """How tokens read. Built from columns of the vocabulary table; needs no tokenizer."""

    def __init__(self, pieces: Iterable[bytes], special: Iterable[bool]) -> None:
        self._bytes = list(pieces)
        self.special = list(special)
        assert len(self._bytes) == len(self.special), (len(self._bytes), len(self.special))
        self._texts = [_whole(raw) for raw in self._bytes]  # None: not UTF-8 on its own
        self._ids: dict[bytes, list[int]] | None = None

    @classmethod
    def of(cls, tokenizer: Any, size: int | None = None) -> Vocabulary:
        """The vocabulary of a Hugging Face tokenizer; `size` as in `token_bytes`."""
        rows = token_bytes(tokenizer, size)
        return cls([raw for _, raw, _ in rows], [special for _, _, special in rows])

    def __len__(self) -> int:
        return len(self._bytes)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Text of each token where it stands; joined they are the text of the sequence.

        A character that is spread over several tokens belongs to the token that completes it, and the earlier
        ones show nothing of it (often ``""``). Bytes that no neighbour completes are shown in place, as
        ``⟨e2⟩⟨80⟩``.
        """
        out: list[str] = []
        run: list[bytes] = []
        for token in tokens:
            text = self._texts[self._check(token)]
            if text is None:
                run.append(self._bytes[token])
                continue
            # A token that is whole UTF-8 never completes its neighbour, so a run of broken ones ends here.
            if run:
                out += _decode(run)
                run = []
            out.append(text or (_unused(token) if self.special[token] else ""))
        return out + _decode(run)

    def label(self, token: int, width: int = 24) -> str:
        """A short name for a token on its own: spaces and controls visible, at most `width` characters."""
        text = self.visible("".join(self.pieces([token])))
        return text if len(text) <= width else text[: width - 1] + "…"

    @staticmethod
    def visible(text: str, *, edges: bool = True) -> str:
        """Text with its whitespace and control characters made visible, on one line.

        Newline ↵, tab ⇥, carriage return ␍, other control and invisible characters ``⟨U+200B⟩``. With
        `edges`, leading, trailing and repeated spaces are ``·``, and other kinds of space ``⟨U+00A0⟩``; without,
        spaces stay, for a piece of running text. Letters of every script stay as they are.
        """
        if edges:
            text = _EDGES.sub(lambda found: "·" * len(found[0]), text)
            text = _WIDE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
        return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.translate(_MARKS))

    def find(self, text: str) -> list[int]:
        """Ids of the tokens that are exactly `text`, spaces included; else `QueryError` with the nearest."""
        found = self.ids(text)
        if found:
            return found
        near = ", ".join(json.dumps(name, ensure_ascii=False) for name in self._nearest(text)[:6])
        raise QueryError(
            f"looking for the token {json.dumps(text, ensure_ascii=False)}: the vocabulary has no such token "
            "(a leading space and upper case count); "
            + (f"the nearest are {near}" if near else "give a shorter text")
        )

    def ids(self, text: str) -> list[int]:
        """Ids of the tokens that are exactly `text`, ascending; empty if there is none."""
        return list(self._by_bytes.get(text.encode("utf-8", "replace"), []))

    def _nearest(self, text: str) -> list[str]:
        """Names of tokens like `text`: other case or spacing first, then its beginnings, then look-alikes."""
        wanted = text.strip().casefold()
        if not wanted:
            return []
        same: list[str] = []
        begins: list[str] = []
        alike: dict[str, list[str]] = {}
        for name in self._texts:
            plain = name.strip().casefold() if name else ""
            if not name or not plain:
                continue
            if plain == wanted:
                same.append(name)
            elif len(plain) > 1 and wanted.startswith(plain):
                begins.append(name)
            elif plain[0] == wanted[0] and abs(len(plain) - len(wanted)) <= 2:
                alike.setdefault(plain, []).append(name)
        close = [] if same else difflib.get_close_matches(wanted, alike, n=3, cutoff=0.7)
        begins.sort(key=lambda name: (-len(name.strip()), name))
        return list(dict.fromkeys([*same, *(name for plain in close for name in alike[plain]), *begins[:3]]))

    @property
    def _by_bytes(self) -> dict[bytes, list[int]]:
        if self._ids is None:
            self._ids = {}
            for token, raw in enumerate(self._bytes):
                if raw:
                    self._ids.setdefault(raw, []).append(token)
        return self._ids

    def _check(self, token: int) -> int:
        if not 0 <= token < len(self._bytes):
            raise QueryError(f"reading token {token}: the vocabulary has tokens 0 to {len(self._bytes) - 1}")
        return token


def _unused(token: int) -> str:
    return f"<unused {token}>"


def _whole(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _decode(run: Sequence[bytes]) -> list[str]:
    """Text of each of several neighbouring byte strings, by the rule of `Vocabulary.pieces`."""
    out = [""] * len(run)
    owner = [index for index, raw in enumerate(run) for _ in raw]
    position = 0
    for text, width in _characters(b"".join(run)):
        out[owner[position + width - 1]] += text
        position += width
    return out


def _characters(data: bytes) -> Iterator[tuple[str, int]]:
    """Each character of `data` with its width in bytes; a byte of no character is ``⟨xx⟩``, width 1."""
    position = 0
    while position < len(data):
        try:
            good, bad = data[position:].decode(), b""
        except UnicodeDecodeError as error:
            good = data[position : position + error.start].decode()
            bad = data[position + error.start : position + error.end]
        for character in good:
            width = len(character.encode())
            yield character, width
            position += width
        for byte in bad:
            yield f"⟨{byte:02x}⟩", 1
            position += 1


def _byte_letters() -> dict[str, int]:
    """The byte of each stand-in letter in byte-level vocabularies (GPT-2, Radford et al. 2019).

    Printable Latin-1 stands for itself, the other bytes for the letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


_LETTERS = _byte_letters()


def _byte_level(name: str) -> bytes:
    if any(
        letter not in _LETTERS for letter in name
    ):  # a few vocabularies hold such entries; they are plain text
        return name.encode("utf-8", "replace")
    return bytes(_LETTERS[letter] for letter in name)


def _sentencepiece(name: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(byte[1], 16)])
    return name.replace("▁", " ").encode("utf-8", "replace")


def _wordpiece(name: str) -> bytes:
    return (name[2:] if name.startswith("##") and len(name) > 2 else f" {name}").encode("utf-8", "replace")


_SPELLINGS = {"byte-level": _byte_level, "sentencepiece": _sentencepiece, "words": _wordpiece}


def _kind(tokenizer: Any, names: Iterable[str]) -> str:
    """How a vocabulary spells: asked of the tokenizer's decoder, guessed from the tokens when it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = (
        json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False) if backend is not None else ""
    )
    if '"ByteLevel"' in decoder:
        return "byte-level"
    if '"Metaspace"' in decoder or "▁" in decoder or '"ByteFallback"' in decoder:
        return "sentencepiece"
    if '"WordPiece"' in decoder:
        return "words"
    sample = list(names)
    score = {
        "byte-level": sum("Ġ" in name for name in sample),
        "sentencepiece": sum("▁" in name for name in sample),
    }
    best = max(score, key=lambda kind: score[kind])
    return best if score[best] > 0 else "words"
