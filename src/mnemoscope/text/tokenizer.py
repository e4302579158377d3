"""Texts to token ids: what a tokenizer puts around a text, which of its ids are special, what continues a prompt.

Everything is asked of the tokenizer at hand, with texts made of its own vocabulary: no letter, space or script is
taken to exist. Hugging Face tokenizers, fast or slow, and those of the `tokenizers` library are understood.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from mnemoscope.errors import ModelError

_INTERFACE = ("__call__", "__len__", "decode", "get_vocab", "convert_ids_to_tokens", "all_special_ids")
_PROBES = 6  # texts that must agree on the frame
_TRIED = 256  # pieces of the vocabulary that are tried as such texts, at most
_AHEAD = 32  # characters that may belong to no token of their own before the next token is complete


class Frame(NamedTuple):
    """Special tokens that a tokenizer puts before and after every text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class Continuation(NamedTuple):
    """Tokens of a text behind a prompt.

    melted  None, or the tokens that stand from the first difference on when the end of the prompt becomes other tokens
            in front of the text; `tokens` are then those of the text in the middle of other text
    """

    tokens: tuple[int, ...]
    melted: tuple[int, ...] | None = None


def accepted(given: Any) -> Any:
    """An object as a Hugging Face tokenizer; `ModelError` in one line if it is none.

    A `tokenizers.Tokenizer`, or one of that library's ready-made classes, is wrapped, and a multimodal processor gives
    the tokenizer that it holds.
    """
    from tokenizers import Tokenizer
    from tokenizers.implementations import BaseTokenizer
    from transformers import PreTrainedTokenizerFast

    raw = given._tokenizer if isinstance(given, BaseTokenizer) else given
    if isinstance(raw, Tokenizer):
        return PreTrainedTokenizerFast(tokenizer_object=raw)
    held = getattr(given, "tokenizer", None)
    for tokenizer in (given, held):
        whole = all(hasattr(tokenizer, name) for name in _INTERFACE)
        if tokenizer is not None and not isinstance(tokenizer, type) and whole:
            return tokenizer
    raise ModelError(
        f"loading a tokenizer: a {type(given).__name__} is no tokenizer with a vocabulary; give one from transformers "
        "(AutoTokenizer.from_pretrained) or a tokenizers.Tokenizer, with which any vocabulary can be described"
    )


def check_rows(tokenizer: Any, rows: int, name: str) -> None:
    """`ModelError` if a token has no row among the `rows` of the embedding of the model `name`."""
    beyond = sorted((token, piece) for token, piece in _names(tokenizer).items() if token >= rows)
    if beyond:
        (token, piece), more = beyond[0], len(beyond) - 1
        others = f" and {more:,} more" if more else ""
        raise ModelError(
            f"loading the model {name}: its embedding has {rows:,} rows, and its tokenizer has the token {piece!r} "
            f"with the id {token:,}{others}; give the tokenizer that the model was trained with, or, if tokens were "
            f"added to it, call resize_token_embeddings({1 + beyond[-1][0]}) and save the model"
        )


def serialised(tokenizer: Any) -> str:
    """The tokenizer as text, or its vocabulary if it has no such text; truncation and padding do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    # Left behind by any call that asked for them.
    if backend.truncation is not None or backend.padding is not None:
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return str(backend.to_str())


def _names(tokenizer: Any) -> dict[int, str]:
    """The entry of each token of the vocabulary, added ones included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {int(token): str(name) for name, token in tokenizer.get_vocab().items()}
    return names | {int(token): str(entry) for token, entry in added.items()}


def encode(
    tokenizer: Any, texts: Sequence[str], *, special: bool = False, target: bool = False
) -> list[list[int]]:
    """Token ids of each text, whole and unpadded; with `special` as the tokenizer frames them.

    target  as what a decoder is to write, which some tokenizers of encoder-decoders read as another language

    `ModelError` if the tokenizer cannot read one, because its vocabulary lacks a character and has no unknown token.
    """
    if not texts:
        return []
    options = {"truncation": False, "padding": False, "verbose": False}
    try:
        read = {"text_target" if target else "text": list(texts)}
        encoded = tokenizer(**read, add_special_tokens=special, **options)["input_ids"]
    except Exception as error:
        if type(error) is not Exception:  # what the tokenizers library raises is nothing more special
            raise
        reason = " ".join(str(error).split())
        raise ModelError(
            f"tokenizing with {type(tokenizer).__name__}: {reason}; give texts that its vocabulary can spell, or a "
            "tokenizer with an unknown token"
        ) from error
    return [[int(token) for token in tokens] for tokens in encoded]


def frame(tokenizer: Any, *, target: bool = False) -> Frame:
    """The special tokens around a text, from texts made of the vocabulary's own pieces, which must all agree.

    target  around what a decoder is to write

    `ModelError` if it does more than put tokens around a text, or can read none of its own pieces.
    """
    probes = list(_probes(tokenizer))
    bare = encode(tokenizer, probes, target=target)
    full = encode(tokenizer, probes, target=target, special=True)
    fits = [_splits(inner, outer) for inner, outer in zip(bare, full, strict=True)]
    common = set.intersection(*fits) if fits else set()
    if len(common) != 1:
        raise changes_text(tokenizer)
    return common.pop()


def changes_text(tokenizer: Any) -> ModelError:
    """The error for a tokenizer that does more than put special tokens around a text."""
    return ModelError(
        f"tokenizing with {type(tokenizer).__name__}: it changes the text when it adds its special tokens; "
        "give a tokenizer that only puts them around it"
    )


def _splits(bare: Sequence[int], full: Sequence[int]) -> set[Frame]:
    size = len(bare)
    return {
        Frame(tuple(full[:start]), tuple(full[start + size :]))
        for start in range(len(full) - size + 1)
        if list(full[start : start + size]) == list(bare)
    }


def _probes(tokenizer: Any) -> Iterator[str]:
    """Some texts that the tokenizer reads without special or unknown tokens, if it can, else any that it reads."""
    avoided = {*_listed_special(tokenizer), unknown_id(tokenizer)}
    clean: list[str] = []
    rest: list[str] = []
    texts = pieces(tokenizer)
    while len(clean) < _PROBES and (candidates := list(islice(texts, _PROBES))):
        for text in candidates:
            if tokens := _read(tokenizer, text):
                (rest if avoided & set(tokens) else clean).append(text)
    chosen = (clean or rest)[:_PROBES]
    yield from chosen
    if len(chosen) > 1 and _read(tokenizer, "".join(chosen)):
        yield "".join(chosen)


def _read(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text; none if the tokenizer cannot read it."""
    try:
        return encode(tokenizer, [text])[0]
    except ModelError:
        return []


def pieces(tokenizer: Any) -> Iterator[str]:
    """Texts of up to 256 tokens from all over the vocabulary, none of them special."""
    special = _listed_special(tokenizer)
    ids = range(0, len(tokenizer), max(1, len(tokenizer) // _TRIED))
    for token, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        text = "" if name is None or token in special else str(tokenizer.decode([token]))
        if text.strip() and "\ufffd" not in text:
            yield text


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of a tokenizer's special tokens (begin, end, padding, unknown, control), ascending.

    Those with a role, those merely marked special in its file, and those that it puts around a text.
    """
    around = frame(tokenizer)
    unknown = unknown_id(tokenizer)
    special = {*_listed_special(tokenizer), *around.before, *around.after}
    return sorted(special if unknown is None else special | {unknown})


def _listed_special(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {int(token) for token, entry in added.items() if getattr(entry, "special", False)}
    return marked | {int(token) for token in tokenizer.all_special_ids if token is not None}


def unknown_id(tokenizer: Any) -> int | None:
    """Id of the token that stands for what the vocabulary lacks; None if there is none."""
    token = getattr(tokenizer, "unk_token_id", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if token is not None or backend is None:
        return token
    name = getattr(backend.model, "unk_token", None)
    if name is not None:
        return backend.token_to_id(name)
    if type(backend.model).__name__ == "Unigram":
        return json.loads(backend.to_str())["model"].get("unk_id")
    return None


def prompt_tokens(tokenizer: Any, text: str) -> tuple[tuple[int, ...], int]:
    """Tokens of a prompt and how many of them the tokenizer put before it; what it puts after texts is left out.

    A prompt goes on, so a closing token does not belong to it. `ModelError` if the tokenizer changes the text when it
    adds special tokens.
    """
    (before, after), (bare,) = frame(tokenizer), encode(tokenizer, [text])
    (full,) = encode(tokenizer, [text], special=True)
    if full == [*before, *bare, *after]:
        return (*before, *bare), len(before)
    if full == [*bare, *after] and tuple(bare[: len(before)]) == before:  # written out, not doubled
        return tuple(bare), 0
    raise changes_text(tokenizer)


def written_tokens(tokenizer: Any, start: int, texts: Sequence[str]) -> list[list[int]]:
    """What a decoder reads while it writes each text: the token that it begins with, then the text without what the
    tokenizer puts after it.
    """
    before, _ = frame(tokenizer, target=True)
    return [[start, *before, *tokens] for tokens in encode(tokenizer, texts, target=True)]


def beginning(tokenizer: Any, text: str, tokens: Sequence[int]) -> str | None:
    """How much of a text has exactly these tokens of its own; None if the last of them ends inside a character."""
    ends = range(len(text) + 1)
    first = bisect_left(ends, len(tokens), key=lambda end: len(encode(tokenizer, [text[:end]])[0]))
    starts = [text[:end] for end in range(first, min(first + _AHEAD, len(text)) + 1)]
    read = encode(tokenizer, starts)
    return next((start for start, ids in zip(starts, read, strict=True) if ids == list(tokens)), None)


def continuation(tokenizer: Any, before: str | None, text: str) -> Continuation:
    """What tokenising `before` and `text` together puts after the tokens of `before`.

    before  the text of the prompt; None if it has none of its own (it ends inside a character)
    """
    if before is None:
        return Continuation(_inside(tokenizer, text))
    start, both = encode(tokenizer, [before, before + text])
    if both[: len(start)] == start:
        return Continuation(tuple(both[len(start) :]))
    same = next(
        (index for index, pair in enumerate(zip(start, both, strict=False)) if pair[0] != pair[1]), len(both)
    )
    return Continuation(_inside(tokenizer, text), tuple(both[same:]))


def _inside(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokens of a text behind other text with which it does not melt; on its own where there is no such text."""
    for anchor in ["\n", *islice(pieces(tokenizer), _PROBES)]:
        start, whole = _read(tokenizer, anchor), _read(tokenizer, anchor + text)
        if start and whole[: len(start)] == start:
            return tuple(whole[len(start) :])
    return tuple(encode(tokenizer, [text])[0])
