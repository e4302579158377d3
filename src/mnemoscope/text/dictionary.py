"""Words as fairseq reads them: split at white space, looked up in `dict.txt`, the ends of lines a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mnemoscope.errors import ModelError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the first ids, in fairseq's order
_OVERWRITE = "#fairseq:overwrite"


def dictionary_tokenizer(file: Path) -> Any:
    """The tokenizer of a dictionary: a word and its count on each line, most frequent first, which gives the ids.

    A text begins with ``</s>``, as every line does in training, and each end of a line is one. `ModelError` in one
    line when the file is missing or is none.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Replace
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = _words(file)
    tokenizer = Tokenizer(WordLevel(words, unk_token=SPECIAL[3]))
    tokenizer.normalizer = Replace(Regex(r"\r\n|\r|\n"), f" {SPECIAL[2]} ")
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[(SPECIAL[2], words[SPECIAL[2]])]
    )
    start, padding, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=padding,
        unk_token=unknown,
        additional_special_tokens=[start],
        clean_up_tokenization_spaces=False,
    )


def _words(file: Path) -> dict[str, int]:
    doing = f"loading the tokenizer of {file.parent}"
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{doing}: {file.name} cannot be read ({type(error).__name__}); fairseq writes it beside the data (a word "
            "and its count on each line), and it must lie beside the weights"
        ) from error
    words = {word: index for index, word in enumerate(SPECIAL)}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        content = line.rstrip().removesuffix(_OVERWRITE).rstrip()
        word, _, count = content.rpartition(" ")
        if not word or not count.isdigit():
            raise ModelError(
                f"{doing}: line {number} of {file.name} is no word with its count ({content[:40]!r}); give the "
                "dictionary that fairseq wrote"
            )
        if word in words and not line.rstrip().endswith(_OVERWRITE):
            raise ModelError(
                f"{doing}: line {number} of {file.name} has {word!r} a second time, so its ids would be others; give "
                "the dictionary that fairseq wrote"
            )
        words[word] = 1 + max(words.values())
    return words
