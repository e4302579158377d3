"""Laws of every kind of tokenizer: what stands around a text, what is explained, and refusals in one line."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from effort import tries
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from tiny import tokenizer as plain_tokenizer
from tokenizer_kinds import Letters, Made, made
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from mnemoscope import load_model
from mnemoscope.errors import ModelError, QueryError
from mnemoscope.prediction.questions import ResolvedQuestion, ask
from mnemoscope.text.corpus import load_corpus, write_plan
from mnemoscope.text.spelling import vocabulary_of
from mnemoscope.text.tokenizer import (
    accepted,
    beginning,
    encode,
    frame,
    prompt_tokens,
    special_ids,
    unknown_id,
)

NUMBERS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def asked(kind: Made, prompt: str, target: str | None, *, spaced: bool = False) -> ResolvedQuestion:
    """What would be explained, with a model that prefers the text as it is written, or what begins with a space."""
    anatomy = SimpleNamespace(
        vocabulary=len(kind.tokenizer), context_length=512, bidirectional=False, stacks=()
    )
    model: Any = SimpleNamespace(tokenizer=kind.tokenizer, anatomy=anatomy, id="any")
    pieces = kind.tokenizer.convert_ids_to_tokens(range(len(kind.tokenizer)))
    likely = torch.tensor([float(spaced and piece.startswith("Ġ")) for piece in pieces])
    return ask(model, prompt, target, [], -1, lambda _: likely)


@tries(60)
@given(kind=made(), numbers=st.lists(NUMBERS, min_size=1, max_size=4))
def test_contexts_are_framed_as_the_tokenizer_frames_texts(kind: Made, numbers: list[list[int]]) -> None:
    """Special tokens stand exactly where the tokenizer puts them, in whole documents and in their windows."""
    assert frame(kind.tokenizer) == (kind.before, kind.after)
    texts = [kind.text(some * 3) for some in numbers]
    with tempfile.TemporaryDirectory() as name:
        plan = write_plan(load_corpus(texts), kind.tokenizer, Path(name), context_length=12)
        contexts = pq.read_table(plan.contexts_file)["tokens"].to_pylist()
    inner = []
    for tokens in contexts:
        assert tuple(tokens[: len(kind.before)]) == kind.before
        assert tuple(tokens[len(tokens) - len(kind.after) :]) == kind.after
        inner.append(tokens[len(kind.before) : len(tokens) - len(kind.after)])
    own = {tuple(kind.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    assert {token for tokens in inner for token in tokens} == {token for tokens in own for token in tokens}
    assert {*kind.before, *kind.after} <= set(plan.special)


@tries(60)
@given(kind=made(), numbers=NUMBERS, target=NUMBERS)
def test_the_prediction_behind_the_prompts_last_own_token_is_explained(
    kind: Made, numbers: list[int], target: list[int]
) -> None:
    """The prompt is framed in front only, and the target is what prompt and target together put behind it."""
    prompt, continued = kind.text(numbers), kind.space + kind.text(target)
    own = kind.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    both = kind.tokenizer(prompt + continued, add_special_tokens=False)["input_ids"]
    if unknown_id(kind.tokenizer) in both:  # lowered letters
        assert not kind.faithful
        return
    found = asked(kind, prompt, continued)
    assert found.target is not None
    assert found.tokens == (*kind.before, *own)
    assert found.position == len(kind.before) + len(own) - 1
    if both[: len(own)] == own:
        assert found.target.token == both[len(own)]
        assert list(found.target.tokens) == both[len(own) :]
    else:
        assert "together with the end of the prompt" in found.target.note
        if kind.faithful:
            pieces = vocabulary_of(kind.tokenizer).text(found.target.tokens)
            assert pieces.strip() == continued.strip()


@tries(30)
@given(kind=made(), numbers=NUMBERS, data=st.data())
def test_every_position_of_a_prompt_has_its_own_text(kind: Made, numbers: list[int], data: Any) -> None:
    """The text up to a token, where there is one, has exactly the tokens up to it."""
    prompt = kind.text(numbers)
    tokens, own = prompt_tokens(kind.tokenizer, prompt)
    at = data.draw(st.integers(own, len(tokens) - 1))
    text = beginning(kind.tokenizer, prompt, tokens[own : at + 1])
    if text is not None:
        assert prompt.startswith(text)
        assert encode(kind.tokenizer, [text]) == [list(tokens[own : at + 1])]


def _byte_pairs(*pieces: str, **options: Any) -> Made:
    """A byte-level tokenizer with these pieces (Ġ is a space), merged from left to right."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for piece in pieces:
        for at in range(1, len(piece)):
            merges.append((piece[:at], piece[at]))
            names.append(piece[: at + 1])
    ids = {name: token for token, name in enumerate(["<s>", "</s>", *dict.fromkeys(names)])}
    inner = Tokenizer(models.BPE(ids, list(dict.fromkeys(merges))))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=options.get("regex", True)
    )
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    return Made(tokenizer, (), (), (), " ", True)


TARGETS: dict[str, tuple[str, str, str, str]] = {
    "a word": (
        "the cat is",
        "Paris",
        " Paris",
        "read with a leading space, which the model finds more probable",
    ),
    "a word with its space": ("the cat is", " Paris", " Paris", ""),
    "a digit": (
        "2 + 2 =",
        "4",
        "4",
        'finds a space more probable here; to explain "4" behind it, end the prompt',
    ),
    "a digit behind a space": ("2 + 2 = ", "4", "4", ""),
    "punctuation": ("the cat", ".", ".", ""),
    "Chinese": ("the cat", "東", "⟨e6⟩", "several tokens"),
    "an emoji": ("the cat", "😀", "⟨f0⟩", "several tokens"),
    "a special token": ("the cat", "</s>", "</s>", ""),
    "a word behind a space": (
        "the cat is ",
        "Paris",
        "Paris",
        'it would be read as " Paris"; the prompt was left',
    ),
    "the end of a word": ("the Par", "is", " is", "read with a leading space"),
    "behind a line end": ("the cat\n", "Paris", "Paris", ""),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_target_is_what_is_read_behind_the_prompt(case: str) -> None:
    """A space is only added where it begins a word, never stands for the target alone, and the choice is said."""
    prompt, target, piece, note = TARGETS[case]
    kind = _byte_pairs("ĠParis", "Paris", "Ġis", "is", "the", "Ġcat")
    found = asked(kind, prompt, target, spaced=True)
    assert found.target is not None
    assert (found.target.piece, note in found.target.note) == (piece, True)
    assert bool(found.target.note) == bool(note)


def test_the_end_of_a_prompt_that_becomes_another_token_is_left_as_it_stands() -> None:
    """Two halves of a word: the prompt is not changed, the target is a token of its own, and this is said."""
    kind = _byte_pairs("ĠParis", "Paris", "is", "the")
    found = asked(kind, "the Par", "is")
    assert found.target is not None
    assert found.target.piece == "is"
    assert 'together with the end of the prompt it would be read as " Paris"' in found.target.note
    assert found.tokens == tuple(kind.tokenizer("the Par")["input_ids"])


@pytest.mark.parametrize(
    ("prompt", "target", "said"),
    [
        ("the cat ", "Paris", "leave the space out, and begin target and foils with it"),
        ("the cat ", None, "leave the space out, and begin target and foils with it"),
        ("2 + 2 = ", "4", "which is a token of its own before the target"),
        ("the cat", " Paris", None),
        ("the cat\n", "Paris", None),
        ("<s>the cat", None, None),
    ],
)
def test_a_prompt_that_ends_with_a_space_is_warned_of(
    prompt: str, target: str | None, said: str | None
) -> None:
    """Where words carry their spaces; a line end is none."""
    notes = asked(_byte_pairs("ĠParis", "Ġcat", "the"), prompt, target).notes
    assert (said is None and not notes) or any(said in note for note in notes)


def test_a_beginning_that_is_written_out_is_said_to_stand_twice() -> None:
    """The tokenizer adds its <s> to a prompt that has one; that is the user's to mend."""
    kind = _byte_pairs("the")
    kind.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    found = asked(kind, "<s>the", None)
    assert found.tokens[:2] == (0, 0)
    assert (
        "the prompt begins with <s>, which the tokenizer adds as well: it stands there twice" in found.notes
    )


def test_what_the_vocabulary_lacks_is_said() -> None:
    """An unknown word in the prompt is a note; as a target it is refused."""
    inner = raw()
    kind = Made(accepted(inner), (1,), (), (), " ", True)
    assert any(
        "lacks something in the prompt, which the model reads as <unk>" in note
        for note in asked(kind, "A D", None).notes
    )
    with pytest.raises(QueryError, match="not in the vocabulary of any; give a text that it can spell"):
        asked(kind, "A", "D")
    assert asked(kind, "A C", "C").target.tokens == (3,)  # type: ignore[union-attr]


@tries(30)
@given(kind=made(), numbers=NUMBERS)
def test_a_spelling_with_unknown_tokens_never_wins(kind: Made, numbers: list[int]) -> None:
    """What is chosen has an unknown token only if it was asked for by its name."""
    unknown = unknown_id(kind.tokenizer)
    try:
        found = asked(kind, kind.text(numbers), kind.words[0])
    except QueryError as error:
        assert "not in the vocabulary" in str(error) or "no tokens" in str(error)
        return
    assert found.target is not None
    assert unknown not in found.target.tokens


def test_a_slow_tokenizer_is_framed_by_its_own_method() -> None:
    """What it builds around a text counts, whichever letters it knows."""
    slow = Letters("ACGT")
    assert frame(slow) == ((0,), (1,))
    assert special_ids(slow) == [0, 1, 2]
    assert prompt_tokens(slow, "ACG") == ((0, 3, 4, 5), 1)


class Shouting(Letters):
    """Changes the text when special tokens are added."""

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0, *token_ids_0[::-1], *token_ids_0[:1]]


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path: Path) -> None:
    """Neither a corpus nor a prompt is read with it, in one line."""
    for attempt in (
        lambda: frame(Shouting("ACGT")),
        lambda: prompt_tokens(Shouting("ACGT"), "ACGT"),
        lambda: write_plan(load_corpus(["ACGT"]), Shouting("ACGT"), tmp_path, context_length=16),
    ):
        with pytest.raises(ModelError, match="it changes the text when it adds its special tokens") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_text_that_a_tokenizer_cannot_read_is_refused(tmp_path: Path) -> None:
    """Without an unknown token some tokenizers fail at a strange word: one line, and their frame is still found."""
    inner = Tokenizer(models.WordLevel({"<s>": 0, "A": 1, "B B": 2, "C": 3}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert frame(accepted(inner)) == ((0,), ())
    with pytest.raises(
        ModelError, match=r"Missing \[UNK\].*; give texts that its vocabulary can spell"
    ) as caught:
        write_plan(load_corpus(["A C A", "A D"]), accepted(inner), tmp_path, context_length=16)
    assert "\n" not in str(caught.value)


# --- what is no tokenizer, or another model's -------------------------------------


def raw() -> Tokenizer:
    """A tokenizer as its own library makes it, with a token that only its post-processor uses."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "A": 2, "C": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


def test_raw_tokenizers_are_wrapped() -> None:
    """One of the `tokenizers` library is as good; its frame and its unknown token do not count."""
    wrapped = accepted(raw())
    assert special_ids(wrapped) == [0, 1]
    assert prompt_tokens(wrapped, "A C") == ((1, 2, 3), 1)
    assert isinstance(accepted(ByteLevelBPETokenizer()), PreTrainedTokenizerFast)
    same = plain_tokenizer()
    assert accepted(same) is same
    assert accepted(SimpleNamespace(tokenizer=same)) is same  # a processor


def test_a_tokenizer_can_be_named(tmp_path: Path) -> None:
    """Its folder beside a loaded model; one that is not there is one line."""
    plain_tokenizer().save_pretrained(tmp_path)
    hf = FAMILIES["llama"]()
    assert load_model(hf, tokenizer=tmp_path).tokenizer.get_vocab() == plain_tokenizer().get_vocab()
    with pytest.raises(ModelError, match="loading the tokenizer "):
        load_model(hf, tokenizer=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("given", [lambda text: [1, 2], 0, b"bytes", PreTrainedTokenizerFast, object()])
def test_what_is_no_tokenizer_is_refused_by_its_type(given: Any) -> None:
    """In one line, with what is accepted."""
    with pytest.raises(
        ModelError, match="is no tokenizer with a vocabulary; give one from transformers"
    ) as caught:
        load_model(FAMILIES["llama"](), tokenizer=given)
    assert type(given).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_rows_are_refused_at_load() -> None:
    """The first token without a row is named, with the rows and what to do; fewer tokens than rows are fine."""
    hf = FAMILIES["llama"]()
    rows = hf.get_input_embeddings().num_embeddings
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(rows - len(tokenizer))])
    assert load_model(hf, tokenizer=tokenizer).tokenizer is tokenizer
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("<call>")])
    with pytest.raises(ModelError) as caught:
        load_model(hf, tokenizer=tokenizer)
    message = str(caught.value)
    assert f"has {rows} rows" in message
    assert f"'<tool>' with the id {rows} and 1 more" in message
    assert f"resize_token_embeddings({rows + 2})" in message
    hf.resize_token_embeddings(rows + 2)
    assert load_model(hf, tokenizer=tokenizer).anatomy.vocabulary == rows + 2


def test_options_left_in_a_tokenizer_change_nothing(tmp_path: Path) -> None:
    """Truncation, padding, their sides and a maximal length neither cut contexts nor make it another tokenizer."""
    texts = [" ".join(["the river of France is a city"] * 5)]
    hf = FAMILIES["llama"]()
    plain = load_model(hf, tokenizer=plain_tokenizer())
    bent = plain_tokenizer()
    bent.padding_side = bent.truncation_side = "left"
    bent.model_max_length = 8
    bent.backend_tokenizer.enable_truncation(8)
    bent.backend_tokenizer.enable_padding(length=64)
    other = load_model(hf, tokenizer=bent)
    assert other.tokenizer_sha256 == plain.tokenizer_sha256
    one, two = (
        write_plan(load_corpus(texts), model.tokenizer, tmp_path / str(number), context_length=64)
        for number, model in enumerate((plain, other))
    )
    assert one.sha256 == two.sha256
    assert prompt_tokens(bent, texts[0]) == prompt_tokens(plain.tokenizer, texts[0])
