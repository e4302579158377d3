"""What tokens look like: how a sequence of them reads, and which is meant by a text.

`spelling` brings every kind of vocabulary to one form, the bytes that each token adds to the text, once, when a run is
built; nothing here needs a tokenizer.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import cast

from mnemoscope.errors import QueryError

# Directional overrides and invisible marks can make a page say something else than its text; joiners (U+200C
# and U+200D) stay, because Persian, Indic scripts and emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)
_MARKS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})
_EDGES = re.compile(r"^ +| +$| {2,}")
_WIDE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")  # spaces that are not the space


class Vocabulary:
    """How tokens read. Built from columns of the vocabulary table."""

    def __init__(self, pieces: Iterable[bytes], special: Iterable[bool]) -> None:
        self._bytes = list(pieces)
        self.special = list(special)
        assert len(self._bytes) == len(self.special), (len(self._bytes), len(self.special))
        self._texts = [_whole(raw) for raw in self._bytes]  # None: not UTF-8 on its own
        self._ids: dict[bytes, list[int]] | None = None
        self._alone, self._labels = _Alone(self), dict[int, str]()

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
            out.append(text or (unused(token) if self.special[token] else ""))
        return out + _decode(run) if run else out

    def running(self, tokens: Sequence[int]) -> list[str]:
        """`pieces` in running text, each on one line: `visible`, with their spaces as they are."""
        shown = [self._alone[token] for token in tokens]
        if None in shown:
            return [self.visible(piece, edges=False) for piece in self.pieces(tokens)]
        return cast("list[str]", shown)

    def text(self, tokens: Sequence[int]) -> str:
        """The text that a sequence of tokens spells."""
        return "".join(self.pieces(tokens))

    @cached_property
    def carries_spaces(self) -> bool:
        """Whether there are words with the space before them: ``" the"``."""
        return any(text[0] == " " and text[1:2].isalpha() for text in self._texts if text)

    def label(self, token: int, width: int = 24) -> str:
        """A short name for a token on its own: spaces and controls visible, at most `width` characters."""
        text = self._labels.get(token)
        if text is None:
            text = self._labels[token] = self.visible(self.text([token]))
        return text if len(text) <= width else text[: width - 1] + "…"

    @staticmethod
    def visible(text: str, *, edges: bool = True) -> str:
        """Text with its whitespace and control characters made visible, on one line.

        Newline ↵, tab ⇥, carriage return ␍, other control and invisible characters ``⟨U+200B⟩``. With
        `edges`, leading, trailing and repeated spaces are ``·``, and other kinds of space ``⟨U+00A0⟩``; without,
        spaces stay, for a piece of running text. Letters of every script stay as they are.
        """
        return _visible(text, edges)

    def find(self, text: str) -> list[int]:
        """Ids of the tokens that are exactly `text`, spaces included; else `QueryError` with the nearest."""
        if ids := self.ids(text):
            return ids
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


class _Alone(dict[int, str | None]):
    """Tokens as `running` shows them whatever is beside them, made when they are read first; None if that counts."""

    def __init__(self, words: Vocabulary) -> None:
        self._words = words

    def __missing__(self, token: int) -> str | None:
        words = self._words
        whole = words._texts[words._check(token)] is not None
        self[token] = words.visible(words.pieces([token])[0], edges=False) if whole else None
        return self[token]


@lru_cache(1 << 16)  # a page shows thousands of tokens, most of them again and again
def _visible(text: str, edges: bool) -> str:
    if edges:
        text = _EDGES.sub(lambda found: "·" * len(found[0]), text)
        text = _WIDE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
    return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.translate(_MARKS))


def unused(token: int) -> str:
    """What stands for a row of the vocabulary without a token."""
    return f"<unused {token}>"


def shown(raw: bytes) -> str:
    """The text of a token on its own; bytes of no whole character as ``⟨e2⟩⟨80⟩``."""
    return "".join(_decode([raw]))


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
