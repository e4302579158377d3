"""A tiny model folder with a tokenizer, and a text to read: what a test of a whole job needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families import FAMILIES, MIXTURES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = (  # noqa: SIM905 - a list of fifty strings reads worse
    "the of and in to a is was for on as by with from at it an are that this be or which city capital river king "
    "queen war year century film song team player season game north south east west France Paris London Berlin"
).split()


def tokenizer(size: int = 80) -> PreTrainedTokenizerFast:
    """A byte-level word tokenizer whose ids stay below `size`."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>"])}
    for word in WORDS:
        vocabulary.setdefault("Ġ" + word, len(vocabulary))
    assert len(vocabulary) <= size
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model_folder(path: Path, family: str = "llama") -> Path:
    """A saved tiny model with its tokenizer."""
    {**FAMILIES, **MIXTURES}[family]().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def texts(count: int = 60, seed: int = 0, longest: int = 40) -> list[str]:
    """Documents of random known words."""
    import numpy as np

    generator: Any = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(3, longest))) for _ in range(count)]
