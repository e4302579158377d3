"""A prompt for an encoder: the whole text with one mask token, whose place is what it predicts."""

from __future__ import annotations

from mnemoscope.errors import QueryError
from mnemoscope.model.model import Model
from mnemoscope.text.tokenizer import encode

_DOING = "explaining a prediction"


def mask_id(model: Model) -> int:
    """The token that masks; QueryError if the tokenizer has none."""
    token = getattr(model.tokenizer, "mask_token_id", None)
    if token is None:
        raise QueryError(
            f"{_DOING}: {model.id} is an encoder, which predicts a masked token, and its tokenizer has no mask token; "
            "give a tokenizer that has one"
        )
    return int(token)


def masked_prompt(model: Model, prompt: str, position: int) -> tuple[tuple[int, ...], int]:
    """The tokens of a prompt, framed as the tokenizer frames a text, and where its one mask token stands.

    QueryError for another number of masks, or a position that is not the mask's.
    """
    mask = mask_id(model)
    (tokens,) = encode(model.tokenizer, [prompt], special=True)
    places = [place for place, token in enumerate(tokens) if token == mask]
    name = model.tokenizer.mask_token
    if len(places) != 1:
        raise QueryError(
            f"{_DOING}: {model.id} is an encoder, which predicts a masked token, and the prompt has "
            f"{len(places) or 'none'}{' of them' if places else ''}; write {name} once, where the target belongs"
        )
    if position != -1 and position % len(tokens) != places[0]:
        raise QueryError(
            f"explaining position {position}: {model.id} is an encoder, which predicts the masked token, at "
            f"{places[0]}; leave the position out"
        )
    return tuple(tokens), places[0]
