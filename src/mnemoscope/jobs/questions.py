"""From texts to the tokens that an explanation is about: the prompt, the target and the foils.

A text continues the prompt, so it is tokenised behind it. A text without a leading space is tried as it is and with
one; what the model finds more probable is taken, and said. When target and foils begin alike, the shared tokens are
appended to the prompt and the first in which they differ is scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mnemoscope.errors import QueryError
from mnemoscope.explanation import Choice
from mnemoscope.models import Model
from mnemoscope.vocabulary import Vocabulary

_SHOWN = 40  # characters of a text that a message quotes


@dataclass(frozen=True)
class Question:
    """tokens: the prompt up to the explained position and what target and foils share; the last one is explained."""

    tokens: tuple[int, ...]
    position: int  # in the prompt as given
    target: Choice | None  # None: whatever the model predicts
    foils: tuple[Choice, ...]
    notes: tuple[str, ...]


@lru_cache(maxsize=2)
def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, read once."""
    return Vocabulary.of(tokenizer, size)


def ask(
    model: Model,
    prompt: str,
    target: str | None,
    foils: Sequence[str],
    position: int,
    likelier: Callable[[tuple[int, ...], list[tuple[int, ...]]], int],
) -> Question:
    """Resolve everything, or raise QueryError.

    likelier  given the tokens so far and continuations, the index of the one that the model finds most probable
    """
    tokens, position = _prompt(model, prompt, position)
    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    resolve = _Resolver(model, tokens, likelier)
    wanted = None if target is None else resolve(target, "target")
    others = [resolve(foil, "foil") for foil in foils]
    shared = 0 if wanted is None else _shared(wanted, others)
    notes: list[str] = []
    if shared and wanted is not None:
        text = "".join(words.pieces(wanted.tokens[:shared]))
        notes.append(f"target and foils begin alike; {_quoted(text)} was appended to the prompt")
    if len(tokens) + shared > model.anatomy.context_length:
        raise _too_long(model, len(tokens) + shared)
    common = () if wanted is None else wanted.tokens[:shared]
    return Question(
        tokens + common,
        position,
        None if wanted is None else wanted.choice(words, shared),
        tuple(foil.choice(words, shared) for foil in others),
        tuple(notes),
    )


@dataclass(frozen=True)
class _Text:
    given: str
    tokens: tuple[int, ...]
    spaced: bool

    def choice(self, words: Vocabulary, shared: int) -> Choice:
        piece = "".join(words.pieces([self.tokens[shared]]))
        notes = []
        if self.spaced:
            notes.append("read with a leading space, which the model finds more probable")
        if len(self.tokens) > 1:
            pieces = " + ".join(_quoted(one) for one in words.pieces(self.tokens))
            notes.append(f"several tokens ({pieces}): {_quoted(piece)} stands for it")
        return Choice(self.given, self.tokens[shared], piece, self.tokens, "; ".join(notes))


def _prompt(model: Model, prompt: str, position: int) -> tuple[tuple[int, ...], int]:
    if not prompt:
        raise QueryError("explaining a prediction: the prompt is empty; give the text that comes before it")
    ids = tuple(int(token) for token in model.tokenizer(prompt)["input_ids"])
    if not ids:
        raise QueryError(
            f"explaining a prediction: the prompt {_quoted(prompt)} has no tokens; give other text"
        )
    if len(ids) > model.anatomy.context_length:
        raise _too_long(model, len(ids))
    if not -len(ids) <= position < len(ids):
        raise QueryError(
            f"explaining position {position}: the prompt has {len(ids)} tokens; take 0 to {len(ids) - 1}, or "
            f"-{len(ids)} to -1 from the end"
        )
    position %= len(ids)
    return ids[: position + 1], position


def _too_long(model: Model, count: int) -> QueryError:
    return QueryError(
        f"explaining a prediction: the prompt has {count} tokens and {model.id} reads at most "
        f"{model.anatomy.context_length}; shorten it"
    )


@dataclass(frozen=True)
class _Resolver:
    model: Model
    tokens: tuple[int, ...]
    likelier: Callable[[tuple[int, ...], list[tuple[int, ...]]], int]

    def __call__(self, text: str, role: str) -> _Text:
        if not text:
            raise QueryError(
                f"explaining a prediction: the {role} is empty; give a word, with its leading space"
            )
        plain = self._continuation(text)
        spaced = () if text[:1].isspace() else self._continuation(" " + text)
        ways = [way for way in (plain, spaced) if way]
        if not ways:
            raise QueryError(
                f"explaining a prediction: the {role} {_quoted(text)} has no tokens in this vocabulary; give a word"
            )
        chosen = ways[0] if len(set(ways)) == 1 else ways[self.likelier(self.tokens, ways)]
        if (unknown := self.model.tokenizer.unk_token_id) is not None and unknown in chosen:
            raise QueryError(
                f"explaining a prediction: the {role} {_quoted(text)} is not in the vocabulary of {self.model.id}; "
                "give a text that it can spell"
            )
        return _Text(text, chosen, chosen == spaced != plain)

    def _continuation(self, text: str) -> tuple[int, ...]:
        """Tokens of the text behind the prompt; on its own where the two melt together."""
        tokenizer = self.model.tokenizer
        alone = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        before = tokenizer.decode(list(self.tokens), clean_up_tokenization_spaces=False)
        start = tuple(tokenizer(before, add_special_tokens=False)["input_ids"])
        if start != self.tokens:
            return alone
        both = tuple(tokenizer(before + text, add_special_tokens=False)["input_ids"])
        return both[len(start) :] if both[: len(start)] == start else alone


def _shared(target: _Text, foils: Sequence[_Text]) -> int:
    """How many tokens target and foils begin with in common, which must be the same for all foils."""
    counts = []
    for foil in foils:
        pairs = zip(target.tokens, foil.tokens, strict=False)
        same = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
        if same is None:
            raise QueryError(
                f"explaining a prediction: the target {_quoted(target.given)} and the foil {_quoted(foil.given)} begin "
                "with the same tokens throughout; give a foil that differs"
            )
        counts.append(same)
    if len(set(counts)) > 1:
        near, far = (foils[counts.index(pick(counts))].given for pick in (max, min))
        raise QueryError(
            f"explaining a prediction: the foil {_quoted(near)} begins like the target and {_quoted(far)} does not; "
            "ask about them one at a time"
        )
    return counts[0] if counts else 0


def _quoted(text: str) -> str:
    short = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return json.dumps(short, ensure_ascii=False)
