"""From texts to the tokens that an explanation is about: the prompt, the target and the foils.

What is explained is the prediction behind the prompt's own last token: special tokens that a tokenizer puts after a
text are left out. A target is what tokenising prompt and target together puts there. A word without its leading space
is also tried with one, and what the model finds more probable is taken; what was taken is always said. Where the end of
the prompt and the target would become other tokens together, the prompt stays as it is and the target is spelled on its
own. When target and foils begin alike, the shared tokens are appended to the prompt and the first in which they differ
is scored. A token can also be given by its id, which leaves nothing to choose.

An encoder reads the whole prompt and predicts its one mask token (`masked`). Of an encoder-decoder the encoder reads
the prompt, and what is explained is the prediction behind what its decoder has read: a first token, and a text of its
own.
"""

from __future__ import annotations

import json
import operator
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mnemoscope.arguments import check_question
from mnemoscope.errors import QueryError
from mnemoscope.model.model import Model
from mnemoscope.prediction.explanation import ChosenToken
from mnemoscope.prediction.masked import masked_prompt
from mnemoscope.text.spelling import vocabulary_of
from mnemoscope.text.tokenizer import (
    Continuation,
    beginning,
    continuation,
    encode,
    frame,
    prompt_tokens,
    unknown_id,
    written_tokens,
)
from mnemoscope.text.vocabulary import Vocabulary

Logits = Callable[[tuple[int, ...]], Tensor]  # of what follows some tokens: f32[vocabulary]

_SHOWN = 40  # characters of a text that a message quotes
_DOING = "explaining a prediction"
# Letters, digits, opening brackets and quotes, and currency signs may follow a space; other signs close something.
_BEGINS = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl", "No", "Ps", "Pi", "Sc"))
_UNSPACED = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "BOPOMOFO",
    "IDEOGRAPHIC",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
)


@dataclass(frozen=True)
class ResolvedQuestion:
    """A question as tokens: the prompt up to the explained position and what target and foils share.

    Of an encoder the whole prompt, of which the masked position is explained.
    """

    tokens: tuple[int, ...]  # the last one is explained; of an encoder the masked one
    position: int  # in the prompt as given
    unread: str  # what follows it there
    target: ChosenToken | None  # None: whatever the model predicts
    foils: tuple[ChosenToken, ...]
    notes: tuple[str, ...]


def ask(
    model: Model,
    prompt: str,
    target: str | None,
    foils: Sequence[str],
    position: int,
    logits: Logits,
    *,
    target_id: int | None = None,
    foil_ids: Sequence[int] = (),
    decoder_prompt: str = "",
) -> ResolvedQuestion:
    """Resolve everything, or raise QueryError.

    logits               asked for what the model finds more probable where a text can be written in two ways
    target_id, foil_ids  tokens by their ids instead of, or behind, those given as texts
    decoder_prompt       what the decoder of an encoder-decoder has written so far
    """
    texts, ids = _listed(foils, "foils", str), _listed(foil_ids, "foil_ids", int)
    check_question(prompt, target, texts, target_id)
    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    _check_text(prompt, "prompt")
    begun = _begun(model, prompt, position, words, decoder_prompt)
    resolve = _Resolver(model, begun, words, logits)
    wanted = None if target is None else resolve(target, "target")
    if target_id is not None:
        wanted = _given_by_id(model, target_id, "target_id")
    others = [resolve(foil, "foil") for foil in texts]
    others += [_given_by_id(model, token, "foil_ids") for token in ids]
    shared = 0 if wanted is None else _shared(wanted, others)
    notes = [*begun.notes, *_trailing_space(begun, words, wanted)]
    if shared and begun.masked:
        raise QueryError(
            f"{_DOING}: target and foils begin with the same token, and a mask stands for one token; give words that "
            "begin otherwise"
        )
    if shared and wanted is not None:
        text = "".join(words.pieces(wanted.tokens[:shared]))
        notes.append(f"target and foils begin alike; {_quoted(text)} was appended to the prompt")
    if len(begun.tokens) + shared > model.anatomy.context_length:
        raise _too_long(model, len(begun.tokens) + shared)
    common = () if wanted is None else wanted.tokens[:shared]
    return ResolvedQuestion(
        begun.tokens + common,
        begun.position,
        begun.unread,
        None if wanted is None else wanted.choice(words, shared),
        tuple(foil.choice(words, shared) for foil in others),
        tuple(notes),
    )


# --- the prompt -------------------------------------------------------------------


@dataclass(frozen=True)
class _Begun:
    """The prompt up to the explained position; `text` is None where that is inside a character."""

    tokens: tuple[int, ...]
    text: str | None
    position: int
    unread: str  # what follows in the prompt
    notes: tuple[str, ...]
    masked: bool = False  # an encoder's: the whole prompt


def read_by_encoder(model: Model, prompt: str) -> tuple[int, ...]:
    """The tokens of a prompt that the encoder of an encoder-decoder reads, framed; none in other models."""
    if not model.anatomy.stacks:
        return ()
    _check_text(prompt, "prompt")
    (ids,) = encode(model.tokenizer, [prompt], special=True)
    if len(ids) > model.anatomy.context_length:
        raise _too_long(model, len(ids))
    return tuple(ids)


def _read_by_decoder(model: Model, text: str) -> tuple[tuple[int, ...], int]:
    """The tokens of what the decoder of an encoder-decoder has written so far, and how many are before the text."""
    start = model.decoder_start
    (bare,), (ids,) = (
        encode(model.tokenizer, [text], target=True),
        written_tokens(model.tokenizer, start, [text]),
    )
    return tuple(ids), len(ids) - len(bare)


def _begun(model: Model, prompt: str, position: int, words: Vocabulary, decoder_prompt: str = "") -> _Begun:
    if decoder_prompt and not model.anatomy.stacks:
        raise QueryError(
            f"{_DOING}: {model.id} is no encoder-decoder, so it reads one text; leave {{decoder_prompt}} out",
            decoder_prompt=decoder_prompt,
        )
    if model.anatomy.bidirectional:
        tokens, place = masked_prompt(model, prompt, position)
        if len(tokens) > model.anatomy.context_length:
            raise _too_long(model, len(tokens))
        return _Begun(tokens, None, place, "", (), masked=True)
    if model.anatomy.stacks:
        _check_text(decoder_prompt, "decoder prompt")
        prompt = decoder_prompt
        ids, n_before = _read_by_decoder(model, prompt)
    else:
        ids, n_before = prompt_tokens(model.tokenizer, prompt)
    if len(ids) == n_before and not model.anatomy.stacks:
        raise QueryError(f"{_DOING}: the prompt {_quoted(prompt)} has no tokens; give other text")
    if len(ids) > model.anatomy.context_length:
        raise _too_long(model, len(ids))
    explained = _whole(position)
    if explained is None or not -len(ids) <= explained < len(ids):
        raise QueryError(
            f"explaining position {position}: the prompt has {len(ids)} tokens; take 0 to {len(ids) - 1}, or "
            f"-{len(ids)} to -1 from the end"
        )
    explained %= len(ids)
    tokens = ids[: explained + 1]
    texts = (
        beginning(model.tokenizer, prompt, ids[n_before : end + 1]) for end in range(explained, len(ids) - 1)
    )
    text = prompt if len(tokens) == len(ids) else next(texts)
    # Inside a character, what is not read begins behind it.
    read = text if text is not None else next((later for later in texts if later is not None), prompt)
    return _Begun(
        tokens, text, explained, prompt[len(read) :], tuple(_prompt_notes(model, tokens, n_before, words))
    )


def _prompt_notes(model: Model, tokens: tuple[int, ...], n_before: int, words: Vocabulary) -> list[str]:
    around, unknown = frame(model.tokenizer), unknown_id(model.tokenizer)
    notes = []
    if model.anatomy.stacks:
        opening = " and ".join(_quoted(piece) for piece in words.pieces(tokens[:n_before]))
        notes.append(f"the decoder begins with {opening}")
    elif around.after:
        closing = "".join(words.pieces(around.after))
        notes.append(f"the tokenizer closes a text with {closing}; a prompt goes on, so it was left out")
    if n_before and not model.anatomy.stacks and tokens[n_before : 2 * n_before] == around.before:
        opening = "".join(words.pieces(around.before))
        notes.append(
            f"the prompt begins with {opening}, which the tokenizer adds as well: it stands there twice"
        )
    if unknown is not None and unknown in tokens[n_before:] and unknown not in around.before:
        name = "".join(words.pieces([unknown]))
        notes.append(f"the vocabulary lacks something in the prompt, which the model reads as {name}")
    return notes


def _trailing_space(begun: _Begun, words: Vocabulary, wanted: _Spelled | None) -> list[str]:
    """A warning when the prompt ends in a space that words would have carried."""
    if not (begun.text or "").endswith(" ") or words.text(begun.tokens[-1:]).strip():
        return []
    if wanted is not None and not wanted.melted:
        return ["the prompt ends with a space, which is a token of its own before the target"]
    if not words.carries_spaces:
        return []
    return [
        "the prompt ends with a space, and words carry the space before them, so the model reads an unusual text: "
        "leave the space out, and begin target and foils with it"
    ]


def _too_long(model: Model, count: int) -> QueryError:
    return QueryError(
        f"{_DOING}: the prompt has {count} tokens and {model.id} reads at most "
        f"{model.anatomy.context_length}; shorten it"
    )


# --- target and foils -------------------------------------------------------------


@dataclass(frozen=True)
class _Spelled:
    """A target or foil as tokens; `read` is the text that they spell, `melted` if the prompt's end would change."""

    given: str | None
    read: str | None
    tokens: tuple[int, ...]
    note: str = ""
    melted: bool = False

    def choice(self, words: Vocabulary, shared: int) -> ChosenToken:
        piece = words.text(self.tokens[shared : shared + 1])
        notes = [self.note] if self.note else []
        if len(self.tokens) > 1:
            pieces = " + ".join(_quoted(token) for token in words.pieces(self.tokens))
            notes.append(f"several tokens ({pieces}): {_quoted(piece)} stands for it")
        if piece.isspace() and words.text(self.tokens[shared + 1 :]).strip():
            notes.append("to explain what follows the space, end the prompt with it")
        by_id = self.given is None
        return ChosenToken(
            self.given, self.tokens[shared], piece, self.tokens, "; ".join(notes), self.read, by_id
        )


def _given_by_id(model: Model, value: Any, role: str) -> _Spelled:
    token = _whole(value)
    if token is None or not 0 <= token < model.anatomy.vocabulary:
        raise QueryError(
            f"{_DOING}: {{{role}}} is not a token; give a whole number from 0 to {model.anatomy.vocabulary - 1}",
            **{role: value},
        )
    return _Spelled(None, None, (token,), f"token {token}, given by its id")


@dataclass(frozen=True)
class _Resolver:
    model: Model
    begun: _Begun
    words: Vocabulary
    logits: Logits

    def __call__(self, text: str, role: str) -> _Spelled:
        _check_text(text, role)
        plain = self._way(text, text)
        spaced = self._way(text, " " + text) if self._may_take_space(text) else None
        ways = [way for way in (plain, spaced) if way is not None and way.tokens]
        if not ways:
            raise QueryError(
                f"{_DOING}: the {role} {_quoted(text)} has no tokens in this vocabulary; give a word"
            )
        spellable = [way for way in ways if self._is_known(way)]
        if not spellable:
            raise QueryError(
                f"{_DOING}: the {role} {_quoted(text)} is not in the vocabulary of {self.model.id}; "
                "give a text that it can spell"
            )
        chosen = self._likelier(spellable)
        if (worst := max(chosen.tokens)) >= self.model.anatomy.vocabulary:
            raise QueryError(
                f"{_DOING}: the {role} {_quoted(text)} has the token {worst}, and {self.model.id} can predict tokens "
                f"0 to {self.model.anatomy.vocabulary - 1}; give another text"
            )
        return chosen

    def _way(self, given: str, text: str) -> _Spelled:
        tokenizer = self.model.tokenizer
        if self.begun.masked or self.begun.text == "":  # nothing is read together with what stands beside it
            continued = Continuation(tuple(encode(tokenizer, [text])[0]))
        else:
            continued = continuation(tokenizer, self.begun.text, text)
        return _Spelled(
            given, text, continued.tokens, self._remark(text, continued), continued.melted is not None
        )

    def _remark(self, text: str, continued: Continuation) -> str:
        """What to say when the tokens are not simply those of the text."""
        notes = []
        if continued.melted is not None:
            together = _quoted(self.words.text(continued.melted))
            notes.append(
                f"together with the end of the prompt it would be read as {together}; the prompt was left as it "
                f"stands, and {_quoted(text)} is spelled on its own behind it"
            )
        if (spelled := self.words.text(continued.tokens)).strip() != text.strip():
            notes.append(f"the tokenizer reads it as {_quoted(spelled)}")
        return "; ".join(notes)

    def _may_take_space(self, text: str) -> bool:
        """Whether this is written with a space before it, where the prompt does not end in one."""
        before = self.begun.text or ""
        if before[-1:].isspace() or unicodedata.category(text[0]) not in _BEGINS:
            return False
        return not unicodedata.name(text[0], "").startswith(_UNSPACED)

    def _is_known(self, way: _Spelled) -> bool:
        unknown = unknown_id(self.model.tokenizer)
        if unknown is None or unknown not in way.tokens:
            return True
        return (way.given or "").strip() == self.words.text([unknown]).strip()  # it was asked for by its name

    def _likelier(self, ways: list[_Spelled]) -> _Spelled:
        """The way to write a text that the model finds more probable, with a word on the choice."""
        first = ways[0]
        if len(ways) == 1 or first.tokens == ways[1].tokens:
            if first.read == first.given:
                return first
            return _noted(first, "read with a leading space, because the vocabulary cannot spell it without")
        scores = self.logits(self.begun.tokens)
        spaced = float(scores[ways[1].tokens[0]]) > float(scores[first.tokens[0]])
        # A space alone says nothing about the word behind it.
        if not self.words.text(ways[1].tokens[:1]).strip():
            behind = f"to explain {_quoted(first.given or '')} behind it, end the prompt with a space"
            return _noted(first, f"the model finds a space more probable here; {behind}") if spaced else first
        if spaced:
            return _noted(ways[1], "read with a leading space, which the model finds more probable")
        return _noted(
            first, "read as it stands, which the model finds more probable than with a leading space"
        )


def _noted(way: _Spelled, note: str) -> _Spelled:
    return replace(way, note="; ".join(remark for remark in (note, way.note) if remark))


def _shared(target: _Spelled, foils: Sequence[_Spelled]) -> int:
    """How many tokens target and foils begin with in common, which must be the same for all foils."""
    counts = []
    for foil in foils:
        pairs = zip(target.tokens, foil.tokens, strict=False)
        same = next((index for index, (left, right) in enumerate(pairs) if left != right), None)
        if same is None:
            raise QueryError(
                f"{_DOING}: the target {_named(target)} and the foil {_named(foil)} begin "
                "with the same tokens throughout; give a foil that differs"
            )
        counts.append(same)
    if len(set(counts)) > 1:
        near, far = (foils[counts.index(pick(counts))] for pick in (max, min))
        raise QueryError(
            f"{_DOING}: the foil {_named(near)} begins like the target and {_named(far)} does not; "
            "ask about them one at a time"
        )
    return counts[0] if counts else 0


def _named(text: _Spelled) -> str:
    return f"token {text.tokens[0]}" if text.given is None else _quoted(text.given)


def _listed(values: Any, role: str, kind: type) -> list[Any]:
    """One value or several as a list."""
    if values is None:
        return []
    if isinstance(values, kind):
        return [values]
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise QueryError(f"{_DOING}: {role} is of type {type(values).__name__}; give a list")
    return list(values)


def _whole(value: Any) -> int | None:
    """A whole number, NumPy's and torch's too; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _check_text(text: Any, role: str) -> None:
    """QueryError for what is no text, or cannot be written as UTF-8."""
    if not isinstance(text, str):
        by_id = {"target": "; a token's id goes to target_id", "foil": "; ids of tokens go to foil_ids"}
        advice = by_id.get(role, "") if isinstance(text, int) else ""
        raise QueryError(f"{_DOING}: the {role} is of type {type(text).__name__}; give a text{advice}")
    if (
        lone := next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    ) is not None:
        byte = ord(lone) - 0xDC00
        what = f"the byte 0x{byte:02x}" if 0x80 <= byte <= 0xFF else f"the lone surrogate U+{ord(lone):04X}"
        raise QueryError(
            f"{_DOING}: the {role} holds {what} at character {text.index(lone)}, which is no text in UTF-8; "
            "give it in UTF-8"
        )


def _quoted(text: str) -> str:
    short = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return json.dumps(short, ensure_ascii=False)
