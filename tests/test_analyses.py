"""The analyses against plain recomputation from the tables of a small synthetic run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import synthetic
from synthetic import make_run

from mnemoscope.errors import QueryError
from mnemoscope.neuron import find, overview, striking
from mnemoscope.neuron.card import PARTS, layer_median, state, usual_signs
from mnemoscope.neuron.card import card as card_of
from mnemoscope.records import Cells, NeuronId
from mnemoscope.run.reading import Run
from mnemoscope.studies.findings import distributions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A gated run of 3 layers of 12 neurons."""
    return make_run(tmp_path_factory.mktemp("runs") / "gated", layers=3, neurons=12)


@pytest.fixture(scope="module")
def texts(run: Run) -> dict[int, list[bytes]]:
    """The bytes of every token of every context."""
    raw = run.table("vocabulary").collect()["bytes"].to_list()
    rows = run.table("contexts").collect().iter_rows(named=True)
    return {row["context"]: [raw[token] for token in row["tokens"]] for row in rows}


# -- cards --------------------------------------------------------------------------------------------------


def test_card_holds_the_numbers_of_the_tables(run: Run) -> None:
    """A card's statistics, histogram and thresholds are those stored."""
    card = card_of(run, (1, 5))
    row = run.rows("neurons", 1, 5).row(0, named=True)
    assert (card.statistics.kurtosis, card.statistics.max) == (row["kurtosis"], row["max"])
    assert card.histogram.total == row["tokens"]
    assert len(card.histogram.edges) == len(card.histogram.counts) + 1
    triggers = run.rows("triggers", 1, 5)
    for side in (card.positive, card.negative):
        stored = triggers.filter(pl.col("polarity") == side.polarity)["coefficient"]
        assert side.stored == len(stored)
        assert side.threshold == min(stored, key=abs)
        assert [example.coefficient for example in side.examples] == stored.to_list()


def test_examples_show_the_text_around_the_position(run: Run, texts: dict[int, list[bytes]]) -> None:
    """Before, active and after are the context's tokens around the position; the next token follows."""
    for example in card_of(run, (2, 4), window=(1000, 1000)).positive.examples:
        here = texts[example.context][example.position].decode(errors="ignore")
        whole = b"".join(texts[example.context]).decode().replace("\n", "↵")
        assert len(example.before) == example.position
        assert "⟨" in example.active or example.active == here.replace("\n", "↵")
        if "⟨" not in example.active:
            assert "".join([*example.before, example.active, *example.after]) == whole
        assert (example.next_token is None) == (example.position + 1 == len(texts[example.context]))


def test_window_says_what_it_left_out(run: Run) -> None:
    """A cut example counts the tokens that it does not show."""
    whole = card_of(run, (0, 3), window=(1000, 1000)).negative.examples
    cut = card_of(run, (0, 3), window=(2, 1)).negative.examples
    for long, short in zip(whole, cut, strict=True):
        assert long.left_out == (0, 0)
        assert len(long.before) == len(short.before) + short.left_out[0]
        assert len(long.after) == len(short.after) + short.left_out[1]


def test_fewer_examples_leave_the_count_alone(run: Run) -> None:
    """Decoding three examples does not change how many are said to be stored, nor the quadrants."""
    few, all_ = card_of(run, (1, 4), examples=3), card_of(run, (1, 4))
    assert len(few.positive.examples) == 3
    assert (few.positive.stored, few.positive.quadrants) == (all_.positive.stored, all_.positive.quadrants)


def test_quadrants_count_every_trigger_of_a_gated_neuron(run: Run, tmp_path: object) -> None:
    """The four gate and up quadrants add up to the stored triggers; without a gate there are none."""
    for side in card_of(run, (1, 4)).sides:
        assert side.quadrants is not None
        assert sum(side.quadrants) == side.stored
    plain = make_run(f"{tmp_path}/plain", gated=False)
    assert all(side.quadrants is None for side in card_of(plain, (1, 4)).sides)


def test_between_takes_at_most_one_example_of_a_tenth(run: Run) -> None:
    """In-between examples run from large to small and no two are from the same tenth of the range."""
    card = card_of(run, (0, 6))
    low, high = card.statistics.min, card.statistics.max
    assert low is not None
    assert high is not None
    values = [example.coefficient for example in card.between]
    tenths = [min(int((value - low) / (high - low) * PARTS), PARTS - 1) for value in values]
    assert len(values) > 3
    assert tenths == sorted(set(tenths), reverse=True)


def test_dead_neuron_has_a_card(run: Run) -> None:
    """A dead neuron is called dead and has no examples; what is undefined is null."""
    card = card_of(run, (0, 0))
    assert card.state == "dead"
    assert card.positive.examples == card.negative.examples == card.between == ()
    assert card.statistics.kurtosis is None


@pytest.mark.parametrize(
    ("low", "high", "name"),
    [
        (0, 0, "dead"),
        (0.5, 0.5, "constant"),
        (-1, -0.1, "never positive"),
        (-1, 0, "never positive"),
        (0.1, 2, "never negative"),
        (0, 2, None),
        (-1, 1, None),
    ],
)
def test_state_names_what_is_remarkable(low: float, high: float, name: str | None) -> None:
    """Dead, constant and one-sided neurons are named; a ReLU neuron and a two-sided one are not."""
    assert state(low, high) == name


def test_layer_median_is_the_median(run: Run) -> None:
    """The reference beside each number is the plain median over the layer, nulls left out."""
    rows = run.table("neurons").filter(pl.col("layer") == 2).collect()
    usual = layer_median(run, 2)
    assert usual.max == pytest.approx(np.median(rows["max"].to_numpy()))
    assert usual.kurtosis == pytest.approx(np.median(rows["kurtosis"].drop_nulls().to_numpy()))


def test_value_is_read_with_the_sign(run: Run) -> None:
    """What a neuron writes at a negative coefficient is what its value suppresses, most suppressed first."""
    card = card_of(run, (1, 7))
    assert card.writes(1) == card.promoted
    assert card.writes(-1) == card.suppressed
    assert [t.logit for t in card.suppressed] == sorted(t.logit for t in card.suppressed)
    assert abs(card.sides[0].threshold or 0) >= abs(card.sides[1].threshold or 0)


def test_card_is_frozen_json_with_neighbours(run: Run) -> None:
    """A card cannot be changed, turns into strict JSON, and knows the neurons beside it."""
    card = card_of(run, (2, 11))
    with pytest.raises(FrozenInstanceError):
        card.layer = 1  # type: ignore[misc]
    assert json.loads(json.dumps(card.to_dict(), allow_nan=False, default=str))["id"] == "L2N11"
    assert (card.previous, card.next) == (NeuronId(2, 10), None)
    assert str(card.id) in card.command


# -- search -------------------------------------------------------------------------------------------------


def _taken(run: Run) -> dict[tuple[str, int], bool]:
    """Each neuron and sign of which its card has triggers: whether it is the one that its readings come from."""
    every = run.table("neurons").select("layer", "neuron").collect().iter_rows()
    cards = [card_of(run, id, examples=0) for id in every]
    return {
        (str(card.id), side.polarity): side is card.sides[0]
        for card in cards
        for side in card.sides
        if side.threshold is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize(("ask", "sense"), [(find.promotes, 1), (find.suppresses, -1)])
def test_value_search_equals_the_cards(run: Run, ask: object, sense: int) -> None:
    """Found are the neurons whose card names the token under that verb, best rank first, read with the same sign."""
    taken = _taken(run)
    assert set(taken.values()) == {True, False}
    writes = {
        (id, sign): {word.id for word in card_of(run, NeuronId.parse(id), examples=0).writes(sign * sense)}
        for id, sign in taken
    }
    words = run.table("values").filter(pl.col("token").is_between(257, 320)).collect()
    pieces = run.table("vocabulary").collect()["bytes"]
    often = words["token"].value_counts().sort("count", "token", descending=True)["token"]
    for token in [token for token in often if pieces[token]][:4]:
        text = pieces[token].decode()
        found = ask(run, text, count=100)  # type: ignore[operator]
        expected = {
            (id, "+-"[sign < 0], usual) for (id, sign), usual in taken.items() if token in writes[id, sign]
        }
        assert set(found.rows.select("neuron", "sign", "usual").iter_rows()) == expected
        assert found.total == len(expected) == found.rows.height
        assert found.rows["rank"].is_sorted()
        for row in found.rows.iter_rows(named=True):
            assert row["logit"] * sense > 0  # the number has the sign of the verb beside it
            assert (row["probability"] is None) == (row["max_probability"] is None) == (row["sign"] == "-")


@pytest.mark.parametrize(("ask", "does", "reverse"), [
    (find.promotes, "promote", "suppresses"), (find.suppresses, "suppress", "promotes"),
])  # fmt: skip
def test_value_search_says_what_the_other_sign_does(run: Run, ask: object, does: str, reverse: str) -> None:
    """At the other sign of its coefficient a neuron does the opposite to the tokens that are listed."""
    found = ask(run, " Paris")  # type: ignore[operator]
    assert f"that they {does} most at the sign beside it" in found.question
    assert f"At the other sign a neuron {reverse} what is listed here" in found.null
    assert "writes" not in found.null


def test_value_search_states_its_base_rate(run: Run) -> None:
    """Beside the count stands what an even draw of tokens would give."""
    size = run.manifest.model.vocabulary
    assert (
        f"{len(_taken(run)) * 10 / size:.1f} if all {size:,} tokens were alike"
        in find.promotes(run, " Paris").null
    )


def test_value_search_of_one_layer(run: Run) -> None:
    """With a layer, only its neurons are found."""
    token = run.rows("values", 1, 3)["token"][0]
    text = run.table("vocabulary").collect()["bytes"][token].decode()
    found = find.promotes(run, text, layer=1)
    assert found.total + find.suppresses(run, text, layer=1).total >= 1
    assert all(name.startswith("L1N") for name in found.rows["neuron"])


def test_unknown_token_is_refused(run: Run) -> None:
    """A text that is no token is refused with near ones."""
    with pytest.raises(QueryError, match="Paris"):
        find.promotes(run, " paris")


@pytest.mark.parametrize("text", [" capital of", " Paris", "apital", "東京都は", ".\n\n", "e"])
def test_trigger_search_equals_reading_every_context(
    run: Run, texts: dict[int, list[bytes]], text: str
) -> None:
    """Hits are the triggers at an occurrence in the context's bytes; the base rate gives the expected."""
    wanted, places = text.encode(), set()
    for context, pieces in texts.items():
        whole = b"".join(pieces)
        for position in range(1, len(pieces)):
            start = len(b"".join(pieces[:position]))
            near = whole[max(0, start - len(wanted) + 1) : start + len(pieces[position]) + len(wanted) - 1]
            if wanted in near:
                places.add((context, position))
    triggers = run.table("triggers").collect()
    expected: dict[tuple[str, str], int] = {}
    for row in triggers.iter_rows(named=True):
        if (row["context"], row["position"]) in places:
            key = (f"L{row['layer']}N{row['neuron']}", "+" if row["polarity"] > 0 else "-")
            expected[key] = expected.get(key, 0) + 1
    found = find.trigger(run, text, count=1000)
    got = {(r["neuron"], r["sign"]): r["hits"] for r in found.rows.iter_rows(named=True)}
    assert got == expected
    assert found.rows["hits"].is_sorted(descending=True)
    share = len(places) / run.manifest.corpus.counted
    assert np.allclose(found.rows["expected"], found.rows["triggers"] * share)


@pytest.mark.parametrize(("text", "why"), [("", "empty"), ("no such text", "nowhere")])
def test_trigger_search_refuses_what_cannot_be_found(run: Run, text: str, why: str) -> None:
    """An empty text and one that the corpus lacks are refused."""
    with pytest.raises(QueryError, match=why):
        find.trigger(run, text)


def test_sort_orders_and_puts_undefined_last(run: Run) -> None:
    """Neurons come in the order asked for, the undefined last, beside their layer's median."""
    found = find.sort(run, "skewness", count=1000)
    defined = found.rows["skewness"].drop_nulls()
    assert defined.is_sorted(descending=True)
    assert found.rows["skewness"].tail(3).null_count() == 3
    up = find.sort(run, "max", descending=False, layer=1, count=2)
    assert up.rows["neuron"][0] == "L1N0"
    assert up.total == 12
    assert up.rows["layer_median"][0] == pytest.approx(layer_median(run, 1).max)


@pytest.mark.parametrize("by", ["max", "skewness", "kurtosis", "tokens"])
@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("layer", [None, 1])
def test_hits_in_the_order_of_a_statistic(run: Run, by: str, descending: bool, layer: int | None) -> None:
    """The neurons of a search, each with all that the search says of it, in the order that `sort` gives them."""
    order = find.sort(run, by, descending=descending, layer=layer, count=1000).rows
    for hits in (
        find.promotes(run, " Paris", layer=layer, count=1000),
        find.trigger(run, " Paris", layer=layer, count=1000),
    ):
        found = find.reorder(run, hits, by, descending=descending, layer=layer, count=1000)
        kept = hits.rows.filter(pl.col("neuron").is_in(order["neuron"].to_list()))
        place = {name: at for at, name in enumerate(order["neuron"])}
        assert [place[name] for name in found.rows["neuron"]] == sorted(
            place[name] for name in kept["neuron"]
        )
        assert found.rows.select(hits.rows.columns).sort(hits.rows.columns).equals(kept.sort(kept.columns))
        assert dict(found.rows.select("neuron", by).iter_rows()) == {
            name: value
            for name, value in order.select("neuron", by).iter_rows()
            if name in set(kept["neuron"])
        }
        assert found.total == kept.height == found.rows.height
        gone = hits.total - kept.height
        assert (f"the other {gone:,} are left out" in found.null) == (gone > 0)
        few = find.reorder(run, hits, by, descending=descending, layer=layer, count=2)
        assert few.rows.equals(found.rows.head(2)) and few.total == found.total


def test_sort_refuses_unknown_statistics_and_layers(run: Run) -> None:
    """An unknown statistic is answered with the known ones, an unknown layer with the range."""
    with pytest.raises(QueryError, match="kurtosis"):
        find.sort(run, "beauty")
    with pytest.raises(QueryError, match="L9N0"):
        find.sort(run, "max", layer=9)


def test_found_is_json(run: Run) -> None:
    """An answer turns into strict JSON."""
    assert json.loads(json.dumps(find.sort(run, "kurtosis").to_dict(), allow_nan=False))["rows"]


# -- overview and striking neurons --------------------------------------------------------------------------


def test_overview_counts_every_neuron_once(run: Run) -> None:
    """Cells hold all neurons that have a kurtosis; the dead are counted beside them."""
    whole = overview.overview(run)
    for layer in whole.layers:
        assert layer.dead == 1
        assert sum(cell.neurons for cell in layer.cells) == layer.neurons - layer.dead
        assert all(whole.reach[0] <= cell.x < cell.x2 <= whole.reach[1] for cell in layer.cells)
    assert whole.dead == 3
    assert json.dumps(whole.to_dict(), allow_nan=False)


def test_statistical_criteria_equal_their_definitions(run: Run) -> None:
    """Peaked, two-sided and quiet neurons are those that plain recomputation puts first."""
    found, table = striking.Striking(run), run.table("neurons").collect()
    triggers = run.table("triggers").filter(pl.col("rank") == striking.LEAST - 1).collect()
    tenth = {
        (row["layer"], row["neuron"], row["polarity"]): abs(row["coefficient"])
        for row in triggers.iter_rows(named=True)
    }
    shaped, sides, quiet = {}, {}, {}
    for row in table.iter_rows(named=True):
        id = NeuronId(row["layer"], row["neuron"])
        far = [tenth.get((*id, polarity), 0.0) for polarity in (1, -1)]
        quiet[id] = max(-row["min"], row["max"]) * row["value_norm"]
        if row["std"] > 0:
            sides[id] = min(far) / row["std"]
            out = [far[0] - row["mean"], far[1] + row["mean"]]
            if max(out) > striking.FAR * row["std"]:
                shaped[id] = row["kurtosis"]
    first = {name: found.best(name, 1)[0] for name in ("peaked", "sides", "quiet")}
    assert first["peaked"].id == max(shaped, key=lambda id: shaped[id])
    assert first["sides"].id == max(sides, key=lambda id: sides[id])
    assert first["sides"].value == pytest.approx(sides[first["sides"].id])
    assert {pick.value for pick in found.best("quiet", 3)} == {0.0}
    assert found.best("quiet", 4)[3].value == pytest.approx(sorted(quiet.values())[3])


LONE, SHIFTED = 5, 6  # neurons of each layer


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose largest kurtosis has a lone outlier; a neuron with a mean far from zero comes second."""
    drawn = synthetic._coefficients

    def with_outliers(random: np.random.Generator, corpus: object, *sizes: object) -> list[np.ndarray]:
        found = drawn(random, corpus, *sizes)  # type: ignore[arg-type]
        size = sizes[-1]
        for place, values in enumerate(found):
            values[LONE::size] = random.normal(0, 0.01, values[LONE::size].shape)
            values[SHIFTED::size] = random.normal(20, 0.1, values[SHIFTED::size].shape)
            if place == 3:
                values[LONE::size, 7] = 500.0
                values[SHIFTED::size, 7] = 60.0
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_coefficients", with_outliers)
        return make_run(tmp_path_factory.mktemp("runs") / "outliers", layers=2, neurons=12)


def test_a_lone_outlier_is_not_called_peaked(outliers: Run) -> None:
    """Neither one token far out nor a mean far from zero makes a neuron peaked, whatever its kurtosis."""
    table = outliers.table("neurons").sort("kurtosis", descending=True, nulls_last=True).collect()
    assert set(table["neuron"].head(4)) == {LONE, SHIFTED}  # by the bare statistic they are the first
    named = {NeuronId(*pair) for pair in striking.peaked(outliers).select("layer", "neuron").iter_rows()}
    assert named and not {one.neuron for one in named} & {LONE, SHIFTED}
    for id in named:
        rows, card = outliers.rows("triggers", *id), card_of(outliers, id)
        away = (rows["coefficient"] - (card.statistics.mean or 0)) * rows["polarity"]
        far = rows.filter(away > striking.FAR * (card.statistics.std or 0))
        assert far.group_by("polarity").len()["len"].max() >= striking.LEAST


@pytest.mark.parametrize("layer", [None, 1])
def test_the_most_peaked_neuron_is_the_same_everywhere(outliers: Run, layer: int | None) -> None:
    """`find --sort kurtosis`, the highlights and the report name one neuron, and say by which rule."""
    found = find.sort(outliers, "kurtosis", layer=layer)
    first = found.rows["neuron"][0]
    assert found.total + int(found.null.split("the other ")[1].split()[0]) == (24 if layer is None else 12)
    assert striking.RULE[1:] in found.null
    scores = striking.Striking(outliers)
    if layer is None:
        report = next(one for one in distributions.findings(outliers) if one.id == "example-histograms")
        assert str(scores.best("peaked", 1)[0].id) == first
        assert f"{first}: most peaked" in report.frame["neuron"].to_list()
        assert f"The most peaked neuron, {first}," in report.says and striking.RULE in report.notes
    else:
        picks = [pick for pick in scores.layer(layer) if pick.criterion == "peaked"]
        assert str(picks[0].id) == first


def test_ascending_kurtosis_leaves_nobody_out(outliers: Run) -> None:
    """The flattest neurons have no token far out, and are listed all the same."""
    found = find.sort(outliers, "kurtosis", descending=False, count=100)
    assert found.total == found.rows.height == 24
    assert "left out" not in found.null


def test_shares_of_triggers_equal_counting(
    run: Run, texts: dict[int, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`token` and `next` shares are plain counts over the stored triggers, with the stated expectations."""
    monkeypatch.setattr(striking, "DIFFERENT", 1)
    found = striking.Striking(run)
    pick = found.best("token", 1)[0]
    rows = run.rows("triggers", *pick.id).filter(pl.col("polarity") == pick.polarity)
    active = [texts[c][p] for c, p in rows.select("context", "position").iter_rows()]
    commonest = max(set(active), key=active.count)
    assert pick.value == active.count(commonest) / len(active)
    everything = [piece for pieces in texts.values() for piece in pieces]
    assert pick.usual == pytest.approx(everything.count(commonest) / len(everything))

    pick = found.best("next", 1)[0]
    rows = run.rows("triggers", *pick.id).filter(pl.col("polarity") == pick.polarity)
    written = run.rows("values", *pick.id).filter(pl.col("polarity") == pick.polarity)["token"].to_list()
    following = [token for token in rows["next_token"] if token in written]
    assert pick.value == len(following) / rows.height
    assert len(set(following)) >= striking.DIFFERENT
    layer = (
        run.table("triggers").filter(pl.col("layer") == pick.id.layer).collect()["next_token"].drop_nulls()
    )
    assert pick.usual == pytest.approx(sum(token in written for token in layer) / len(layer))


def test_handful_is_distinct_spread_and_repeatable(run: Run) -> None:
    """A handful holds different neurons, from every layer that it can, and is the same each time."""
    picks = striking.Striking(run).handful(6)
    assert len({pick.id for pick in picks}) == 6
    assert {pick.id.layer for pick in picks} == {0, 1, 2}
    assert picks == striking.Striking(run).handful(6)
    assert {"token", "peaked", "sides", "quiet", "chance"} <= {pick.criterion for pick in picks}


def test_layer_picks_stay_in_the_layer(run: Run) -> None:
    """The neurons of a layer are its own; more than there are neurons gives no more than there are."""
    found = striking.Striking(run)
    assert {pick.id.layer for pick in found.layer(1, 6)} == {1}
    assert len({pick.id for pick in found.layer(1, 100)}) <= 12


def test_short_lists_are_no_reason(tmp_path: object) -> None:
    """With fewer than ten stored triggers no neuron is chosen for its triggers."""
    found = striking.Striking(make_run(f"{tmp_path}/short", top=5))
    assert found.best("token", 3) == found.best("next", 3) == ()


class _Read:
    """Three contexts behind a special token or none, as far as a search for a text reads them."""

    def __init__(self, limit: int | None = None, spelling: str = "") -> None:
        corpus = {"id": "3 texts", "contexts": 3, "counted": 4, "limit": limit, "spelling": spelling}
        model = SimpleNamespace(cells=Cells((1,)), encoder_layers=0)
        self.manifest = SimpleNamespace(corpus=SimpleNamespace(**corpus), model=model, options={"top": 5})

    def once(self, name: object, read: Callable[[], Any]) -> Any:
        """Read it."""
        return read()

    def kept(self, name: object) -> None:
        """Nothing is."""

    def table(self, name: str) -> pl.LazyFrame:
        """The vocabulary, the contexts, or no triggers."""
        pieces = [b"Paris", b" is", b"<s>", b" big"]
        address = {"layer": pl.Int16, "neuron": pl.Int32, "polarity": pl.Int8, "rank": pl.Int16}
        place = {"context": pl.Int64, "position": pl.Int32, "coefficient": pl.Float32}
        return {
            "vocabulary": pl.LazyFrame({"bytes": pieces, "special": [False, False, True, False]}),
            "contexts": pl.LazyFrame(
                {"context": [0, 1, 2], "document": 0, "start": 0, "tokens": [[0, 1], [0, 3, 2], [0, 1]]}
            ),
            "triggers": pl.LazyFrame(schema=address | place),
        }[name]


@pytest.mark.parametrize(("text", "contexts"), [("Paris", 3), ("<s>", 1), ("Par", 3)])
def test_text_that_does_not_count_is_not_said_to_be_absent(text: str, contexts: int) -> None:
    """Where it only begins contexts or is part of a special token, no trigger can be there, and that is the answer."""
    with pytest.raises(
        QueryError, match=f"it is in {contexts} contexts, but only at position 0 or in special"
    ):
        find.trigger(_Read(), text)  # type: ignore[arg-type]


def test_text_that_partly_counts_says_how_much_does_not() -> None:
    """One occurrence overlaps both a token that counts and the first, which does not."""
    found = find.trigger(_Read(), "Paris is")  # type: ignore[arg-type]
    assert "Position 0 of a context and special tokens do not count, 2 of its tokens among them" in found.null
    assert "Only the 5 strongest triggers of a neuron and sign are kept" in found.null


def test_absent_text_is_absent_from_what_was_read() -> None:
    """A corpus that was cut, or whose case was lost, may have had it: both are said."""
    changed = "the tokenizer changes texts: upper case is lost (3 of 3 texts)"
    with pytest.raises(QueryError) as caught:
        find.trigger(_Read(4, changed), "BIG")  # type: ignore[arg-type]
    assert "nowhere in the 3 contexts of 3 texts, of which 4 tokens were drawn" in str(caught.value)
    assert changed in str(caught.value)


def test_token_in_no_list_is_said_to_be_further_down(run: Run) -> None:
    """Only the first tokens of a value are kept, so an empty answer is not that no neuron promotes it."""
    held = set(run.table("values").collect()["token"])
    rows = run.table("vocabulary").collect().iter_rows(named=True)
    text = next(
        row["text"] for row in rows if row["token"] not in held and row["text"] and "⟨" not in row["text"]
    )
    found = find.promotes(run, text)
    assert found.rows.is_empty()
    assert "no others are kept, so a neuron with it further down is not found" in found.question


def test_the_usual_sign_is_that_of_the_card(run: Run, outliers: Run) -> None:
    """Search and card read a value at the same sign, in every layer and alone."""
    for some in (run, outliers):
        found = usual_signs(some).collect()
        for layer, number, usual in found.iter_rows():
            assert card_of(some, (layer, number), examples=0).sides[0].polarity == usual, (layer, number)
        alone = usual_signs(some, 1).collect().sort("neuron")
        assert alone.equals(found.filter(pl.col("layer") == 1).sort("neuron"))
