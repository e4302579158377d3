"""Examples for pages that ask something: links that fill in the form with what is of this run; none is answered before.

They are of one neuron, where one is asked about already, or else of those to begin with (`neuron.striking`): the text
that a trigger ends, the words that triggers end with, the tokens that the value writes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np

from mnemoscope.errors import QueryError
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.views.words import SIGN

if TYPE_CHECKING:
    from mnemoscope.api.run import Run
    from mnemoscope.atlas.library import Shelf
    from mnemoscope.neuron.card import NeuronCard
    from mnemoscope.records import ModelEntry

MOST = 3  # on a page
LONGEST = 240  # letters of a text
SENTENCE = 40  # letters that one has at least, to be given without what stands before it
AFTER = 120  # letters of a text behind the trigger
NAMED = 44  # letters of a text that name it
SAMPLE = 2_000  # contexts in which tokens are counted
PLACES = 4.0  # of a pattern that a test is expected to read in either half of the text, to be worth a try
TESTED = 16_384  # tokens that a test reads of each half (`Run.test`)
WORDS = 8  # of a pattern of several
LEAST = 0.2  # of the triggers, that show a pattern
_ENDS = re.compile(r"[.!?…][\"')\]”’]*\s+|[。！？]|\n+")
_SPACES = str.maketrans("\n\t\r", "   ")


@dataclass(frozen=True)
class ExampleQuestion:
    """A question that a page can be opened with.

    said   what its link reads; `why` stands beside it
    given  the parameters of the page
    """

    said: str
    why: str
    given: Mapping[str, str]

    @property
    def query(self) -> str:
        """The parameters as they stand in an address."""
        return urlencode(self.given)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def refused(page: str, model: ModelEntry) -> str | None:
    """Why a model of this kind cannot be asked what a page asks, as far as that is known without it."""
    return next((why for why, of_kind in _REFUSED.get(page, ()) if of_kind(model)), None)


_HEADLESS = ("it has no head that predicts a token", lambda model: model.readout != "head")
_REFUSED: dict[str, tuple[tuple[str, Callable[[ModelEntry], bool]], ...]] = {
    "explain": (_HEADLESS,),
    "steer": (
        _HEADLESS,
        (
            "it reads the whole of a text at once and does not go on with one",
            lambda model: model.bidirectional or bool(model.encoder_layers),
        ),
    ),
    "test": (
        (
            "it is an encoder-decoder, and a claim is about one text and the token that follows",
            lambda model: bool(model.encoder_layers),
        ),
    ),
}


def known(page: str, shelf: Shelf, neurons: str = "") -> tuple[ExampleQuestion, ...] | None:
    """The examples of a page that are had at once; None where the neurons to begin with are not chosen yet.

    neurons  addresses that the page has already: the first is what the examples are of
    """
    run = shelf.run
    try:
        return examples(page, run, [run.neuron(neurons.replace(",", " ").split()[0])])
    except (IndexError, QueryError):  # there is none, or none of that address
        return None if run.kept("highlights") is None else examples(page, run, shelf.highlights.cards)


def examples(page: str, run: Run, cards: Sequence[NeuronCard]) -> tuple[ExampleQuestion, ...]:
    """A few examples for a page: those of one neuron, or one each of several neurons, of different kinds.

    `QueryError` for a page that has none.
    """
    if page not in _PAGES:
        raise QueryError(f"opening the examples of {page!r}: those of {', '.join(_PAGES)} are here")
    every = [each for card in cards if (each := tuple(_PAGES[page](run, card)))]
    if len(every) == 1:
        return every[0][:MOST]
    turns = (
        [0] * len(every) if page == "test" else range(len(every))
    )  # what a neuron's triggers show best is tested
    return tuple(each[turn % len(each)] for turn, each in zip(turns, every, strict=True))[:MOST]


# -- the text of a trigger ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trigger:
    """The text of a context around its active token, without special tokens; ids of that token and of the next."""

    context: int
    before: str
    active: str
    after: str
    token: int
    next_token: int | None

    @property
    def prompt(self) -> str:
        """The text up to the active token, from the beginning of a sentence or of a word."""
        return _end(self.before) + self.active if self.before.strip() else self.active.lstrip()

    @property
    def rest(self) -> str:
        """What follows of the sentence."""
        shown = self.after[:AFTER]
        ended = _ENDS.search(shown)
        if ended:
            return shown[: ended.end()].rstrip()
        return shown if len(shown) == len(self.after) else shown.rpartition(" ")[0] or shown

    @property
    def name(self) -> str:
        """The end of the text, short."""
        text = " ".join(self.prompt.split())
        return text if len(text) <= NAMED else f"…{text[-NAMED:].partition(' ')[2] or text[-NAMED:]}"


def _end(text: str) -> str:
    """The end of a text, from the beginning of a sentence or else of a word."""
    end = text[-LONGEST:]
    starts = [match.end() for match in _ENDS.finditer(end) if len(end) - match.end() >= SENTENCE]
    if starts:
        return end[starts[-1] :].lstrip()
    return (end if len(end) == len(text) else end.partition(" ")[2] or end).lstrip()


def _triggers(run: Run, card: NeuronCard) -> list[_Trigger]:
    """The triggers of a neuron's usual sign, strongest first, whose text a form holds as it is."""
    shown, words = card.sides[0].examples, run.vocabulary
    contexts = run.contexts([example.context for example in shown])
    triggers = []
    for example in shown:
        ids = contexts[example.context].tokens.tolist()
        pieces = [
            "" if words.special[token] else piece for token, piece in zip(ids, words.pieces(ids), strict=True)
        ]
        at = example.position
        trigger = _Trigger(
            example.context, "".join(pieces[:at]), pieces[at], "".join(pieces[at + 1 :]), ids[at],
            ids[at + 1] if at + 1 < len(ids) else None,
        )  # fmt: skip
        if _typed(trigger.before[-LONGEST:] + trigger.active + trigger.after[:AFTER]) and trigger.active:
            triggers.append(trigger)
    return triggers


def _told(run: Run, card: NeuronCard) -> _Trigger | None:
    """The strongest trigger whose text is more than a word or two, else the strongest; None if there is none."""
    triggers = _triggers(run, card)
    return next(
        (trigger for trigger in triggers if len(trigger.prompt) >= SENTENCE),
        triggers[0] if triggers else None,
    )


def _typed(text: str) -> bool:
    """Whether somebody could have typed a text: nothing in it is invisible, or half a character."""
    plain = text.translate(_SPACES)
    return "⟨" not in plain and Vocabulary.visible(plain, edges=False) == plain


def _read(run: Run, card: NeuronCard, trigger: _Trigger, name: str, *, whole: bool) -> dict[str, str]:
    """The text of a trigger as parameters of a page, under the name that the page has for it.

    whole  with what follows the trigger, for a page that reads on
    """
    text = trigger.prompt + (trigger.rest if whole else "")
    if card.stack != "decoder":
        return {name: text}
    source = (
        trigger.context - 1
    )  # contexts alternate: before what the decoder read stands what the encoder did
    ids = [
        token for token in run.contexts([source])[source].tokens.tolist() if not run.vocabulary.special[token]
    ]
    return {name: run.vocabulary.text(ids).strip()[:LONGEST], "decoder_prompt": text}


# -- what each page is asked ----------------------------------------------------------------------------------------


def _explain(run: Run, card: NeuronCard) -> Iterator[ExampleQuestion]:
    model = run.manifest.model
    if trigger := _told(run, card):
        if model.bidirectional:
            mask = _mask(run)
            if mask:
                space = " " if trigger.active[:1] == " " else ""
                text = f"{_end(trigger.before)}{space}{mask}{trigger.rest}"
                yield ExampleQuestion(
                    trigger.name,
                    f"what would stand in place of its last token, which triggers {card.id}",
                    {"prompt": text},
                )
            return
        read = _read(run, card, trigger, "prompt", whole=card.stack == "encoder")
        yield ExampleQuestion(trigger.name, f"what the model predicts where {card.id} is triggered", read)
        follows = "" if trigger.next_token is None else run.vocabulary.text([trigger.next_token])
        if follows.strip() and _typed(follows) and card.stack != "encoder":
            yield ExampleQuestion(
                trigger.name,
                f"how it comes to “{follows.strip()}”, which follows in the text of the run",
                read | {"target": follows},
            )


def _mask(run: Run) -> str | None:
    """How the mask of an encoder is spelled; None if no special token is called so."""
    words = run.vocabulary
    special = (words.text([token]) for token, is_special in enumerate(words.special) if is_special)
    return next((text for text in special if "mask" in text.casefold()), None)


def _text(run: Run, card: NeuronCard) -> Iterator[ExampleQuestion]:
    if trigger := _told(run, card):
        read = _read(run, card, trigger, "text", whole=True)
        yield ExampleQuestion(trigger.name, "the most unusual neurons at each of its tokens", read)
        yield ExampleQuestion(trigger.name, f"{card.id} along all of it", read | {"neurons": str(card.id)})


def _steer(run: Run, card: NeuronCard) -> Iterator[ExampleQuestion]:
    if trigger := _told(run, card):
        strongest = f"{card.sides[0].examples[0].coefficient:.3g}"
        changes: tuple[tuple[str, dict[str, str]], ...] = (
            ("removed", {}),
            ("times -2", {"factor": "-2"}),
            (f"set to {strongest}, the strongest of its own", {"value": strongest}),
        )
        for change, given in changes:
            asked = {"prompt": trigger.prompt, "neuron": str(card.id)}
            yield ExampleQuestion(f"{card.id} {change}", f"behind “{trigger.name}”", asked | given)


def _test(run: Run, card: NeuronCard) -> Iterator[ExampleQuestion]:
    triggers, common, model = _triggers(run, card), _Common(run), run.manifest.model
    of_all = f"of its {len(triggers)} strongest {SIGN[card.sides[0].polarity]} triggers"
    every: list[tuple[float, ExampleQuestion]] = []

    def add(worth: float, said: str, count: int, where: str, pattern: str) -> None:
        if count >= LEAST * len(triggers):
            given = {"neuron": str(card.id), "pattern": pattern}
            every.append(
                (worth * count, ExampleQuestion(f"{card.id}: {said}", f"{count} {of_all} {where}", given))
            )

    ends: dict[str, list[_Trigger]] = {}
    for trigger in triggers:
        ends.setdefault(trigger.active.strip().casefold(), []).append(trigger)
    ends.pop("", None)
    ranked = sorted(ends, key=lambda word: -len(ends[word]))
    for word in ranked[:1]:
        if common.enough(ends[word]):
            spec = f"word:{word}" if _whole(run, ends[word]) else f"folded:{_quoted([word])}"
            add(1, f"“{word}”", len(ends[word]), "end so", spec)
    words = [word for word in ranked if _whole(run, ends[word])][:WORDS]
    spoken = [trigger for word in words for trigger in ends[word]]
    if len(words) > 1 and common.enough(spoken):
        spec = f"words:{','.join(words)}"
        add(0.5, f"{', '.join(words[:3])} …", len(spoken), f"end with one of {len(words)} words", spec)
    follows = Counter(trigger.next_token for trigger in triggers if trigger.next_token is not None)
    for token, count in follows.most_common(1) if not model.bidirectional else ():
        text = run.vocabulary.text([token])
        if text.strip() and _typed(text) and run.vocabulary.ids(text)[:1] == [token] and common.has({token}):
            add(1, f"“{text.strip()}” comes next", count, "are followed by it", f"next:{_quoted(text)}")
    yield from (example for _, example in sorted(every, key=lambda pair: -pair[0]))


def _whole(run: Run, triggers: Sequence[_Trigger]) -> bool:
    """Whether the active token of triggers is a word, and no part of one."""
    spaced = run.vocabulary.carries_spaces
    return all(
        trigger.active.strip().isalpha()
        and (trigger.active[0] == " " or not spaced)
        and not trigger.after[:1].isalnum()
        for trigger in triggers
    )


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Common:
    """How often tokens are, counted in some contexts of a run."""

    def __init__(self, run: Run) -> None:
        self._share = run.once("token shares", lambda: _shares(run))
        self._read = min(TESTED, run.manifest.corpus.counted / 2)

    def enough(self, triggers: Sequence[_Trigger]) -> bool:
        """Whether a test reads their active tokens often enough."""
        return self.has({trigger.token for trigger in triggers})

    def has(self, tokens: set[int]) -> bool:
        """Whether it reads some of these often enough."""
        return float(self._share[sorted(tokens)].sum()) * self._read >= PLACES


def _shares(run: Run) -> np.ndarray:
    """f64[token]: the share of each, in the first contexts."""
    lists = run.table("contexts").select("tokens").head(SAMPLE).collect()["tokens"]
    tokens = lists.explode(empty_as_null=False).to_numpy()
    return np.bincount(tokens, minlength=run.manifest.model.vocabulary) / max(len(tokens), 1)


def _search(run: Run, card: NeuronCard) -> Iterator[ExampleQuestion]:
    words = run.vocabulary
    for token in card.writes(card.sides[0].polarity)[:1]:
        text = words.text([token.id])
        if text.strip() and _typed(text) and token.id in words.ids(text):
            yield ExampleQuestion(
                words.label(token.id), f"a token that {card.id} promotes", {"q": text, "by": "promotes"}
            )
    if trigger := _told(run, card):
        yield ExampleQuestion(f"“{trigger.active}”", f"a text that triggers {card.id}",
                      {"q": trigger.active, "by": "trigger"})  # fmt: skip
        yield ExampleQuestion(
            str(card.id), "neurons with the same triggers", {"q": str(card.id), "by": "like"}
        )


def _sql(run: Run, card: NeuronCard) -> Iterator[ExampleQuestion]:
    polarity, at = card.sides[0].polarity, f"layer = {card.layer} and neuron = {card.neuron}"
    if card.sides[0].stored:
        yield ExampleQuestion(
            f"where {card.id} is triggered",
            "its strongest triggers, with the titles of their documents",
            {
                "q": f"select rank, coefficient, title, position\nfrom triggers join contexts using (context) "
                f"join documents using (document)\nwhere {at} and polarity = {polarity} order by rank limit 20"
            },
        )
    yield ExampleQuestion(
        f"what {card.id} writes",
        "the tokens of its value",
        {
            "q": f'select rank, text as token, logit, probability\nfrom "values" join vocabulary using (token)\n'
            f"where {at} and polarity = {polarity} order by rank limit 20"
        },
    )
    yield ExampleQuestion(
        f"neurons of layer {card.layer}",
        "those with the heaviest tails",
        {
            "q": f"select 'L' || layer || 'N' || neuron as neuron, kurtosis, min, max, positive_fraction\nfrom neurons "
            f"where layer = {card.layer} order by kurtosis desc nulls last limit 20"
        },
    )


_PAGES: dict[str, Callable[[Run, NeuronCard], Iterator[ExampleQuestion]]] = {
    "explain": _explain,
    "text": _text,
    "steer": _steer,
    "test": _test,
    "search": _search,
    "sql": _sql,
}
