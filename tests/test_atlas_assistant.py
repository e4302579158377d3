"""A run for assistants: every tool answers what the run answers, refuses as it does, and writes nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from loops import awaited
from synthetic import make_run
from tiny import model_folder, texts

import mnemoscope as mn
from mnemoscope.atlas import serving
from mnemoscope.display import jsonable
from mnemoscope.errors import RunError

mcp = pytest.importorskip("mcp", reason="assistants are answered by the package mcp")
from mnemoscope.atlas.assistant import MOST_ROWS, create  # noqa: E402

Said = TypeVar("Said")
READING = {"run_info", "find_neurons", "neuron_card", "compare_neurons", "patterns", "contexts", "sql"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A finished run without a model."""
    return mn.open_run(make_run(tmp_path_factory.mktemp("runs") / "a", neurons=70).path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[mn.Run, Path]:
    """A run whose tiny model can be asked, and the folder of the model."""
    folder = model_folder(tmp_path_factory.mktemp("model"))
    model = mn.load_model(folder, dtype="fp32")
    return mn.build(model, texts(40), tmp_path_factory.mktemp("runs") / "built", top=10), folder


def asked(server: Any, question: Callable[[Any], Awaitable[Said]]) -> Said:
    """What a client gets of a server."""

    async def ask() -> Said:
        async with mcp.Client(server) as client:
            return await question(client)

    return awaited(ask())


def called(run: mn.Run, tool: str, **arguments: Any) -> Any:
    """The answer of a tool, as data."""
    answer = asked(create(run), lambda client: client.call_tool(tool, arguments))
    assert not answer.is_error, answer.content
    assert len(json.dumps(answer.structured_content, allow_nan=False)) < 200_000
    return answer.structured_content


def refused(run: mn.Run, tool: str, **arguments: Any) -> str:
    """Why a tool does not answer."""
    answer = asked(create(run), lambda client: client.call_tool(tool, arguments))
    assert answer.is_error
    return " ".join(part.text for part in answer.content)


def test_tools_are_listed_with_their_arguments_and_none_writes(run: mn.Run) -> None:
    """Each with what it does; `explain` is there only if a model is."""
    tools = asked(create(run), lambda client: client.list_tools()).tools
    assert {tool.name for tool in tools} == READING
    for tool in tools:
        assert tool.description and tool.annotations.read_only_hint
        paths = {"path", "file", "folder", "output"}
        assert not paths & set(tool.input_schema.get("properties", {}))
    assert "explain" in {
        tool.name for tool in asked(create(run, "a model"), lambda client: client.list_tools()).tools
    }


def test_the_run_is_told(run: mn.Run) -> None:
    """Its model, text, and what can be asked in SQL; the manifest is a resource."""
    told = called(run, "run_info")
    assert told["model"] == run.manifest.model.id and told["tokens"] == run.manifest.corpus.tokens
    assert set(told["tables"]) == set(run.manifest.tables) and "kurtosis" in told["tables"]["neurons"]
    read = asked(create(run), lambda client: client.read_resource("run://manifest"))
    assert json.loads(read.contents[0].text) == json.loads(run.manifest.model_dump_json())


def test_a_card_is_the_runs(run: mn.Run) -> None:
    """Statistics, values and triggers, whose active token is marked; the resource of the neuron is the same."""
    card = run.neuron("L1N3", examples=4, window=(24, 8))
    told = called(run, "neuron_card", neuron="L1N3", triggers=4)
    assert told["id"] == "L1N3" and told["statistics"] == jsonable(card.to_dict()["statistics"])
    assert [token["text"] for token in told["promoted"]] == [token.text for token in card.promoted[:12]]
    for side in (card.positive, card.negative):
        name = "positive" if side.polarity > 0 else "negative"
        examples = told[name]["examples"]
        assert [example["coefficient"] for example in examples] == [
            each.coefficient for each in side.examples
        ]
        assert all(
            f"[[{each.active}]]" in example["text"]
            for each, example in zip(side.examples, examples, strict=True)
        )
    read = asked(create(run), lambda client: client.read_resource("neuron://L1N3"))
    assert json.loads(read.contents[0].text)["id"] == "L1N3"


def test_pages_of_a_list_are_the_list(run: mn.Run) -> None:
    """By the cursor, none left out and none twice, with the same null on each."""
    whole = run.find(sort="kurtosis", count=1000)
    rows: list[Any] = []
    cursor = None
    while True:
        page = called(run, "find_neurons", sort="kurtosis", limit=32, cursor=cursor)
        assert page["null"] == whole.null and page["total"] == whole.total
        rows += page["rows"]
        cursor = page["cursor"]
        assert page["truncated"] == (cursor is not None)
        if cursor is None:
            break
    assert rows == jsonable(whole.rows.to_dicts()) and len(rows) > 3 * 32


def test_neurons_side_by_side(run: mn.Run) -> None:
    """Each pair's triggers in common are those that `find` counts, with what is expected."""
    told = called(run, "compare_neurons", neurons=["L0N1", "L1N3", "L1N4"])
    assert [card["id"] for card in told["neurons"]] == ["L0N1", "L1N3", "L1N4"]
    for pair in told["triggers_in_common"]:
        rows = run.find(like=pair["with"], count=10_000).rows.to_dicts()
        assert {name: value for name, value in pair.items() if name != "with"} in jsonable(rows)


def test_texts_and_sql(run: mn.Run) -> None:
    """Contexts by number; one SELECT, cut off."""
    texts_of = called(run, "contexts", ids=[0, 2])
    assert set(texts_of) == {"0", "2"} and texts_of["2"]["document"] == run.contexts([2])[2].document
    answer = called(run, "sql", query="select layer, neuron from neurons order by all", limit=3)
    assert answer["rows"] == [{"layer": 0, "neuron": number} for number in range(3)] and answer["truncated"]
    assert "null" in answer["null"]


@pytest.mark.parametrize(
    ("tool", "arguments", "why"),
    [
        ("neuron_card", {"neuron": "L9N9"}, "layers"),
        ("neuron_card", {"neuron": "paris"}, "L13N366"),
        ("neuron_card", {}, "neuron"),
        ("neuron_card", {"neuron": "L1N3", "triggers": -1}, "greater than or equal to 0"),
        ("find_neurons", {}, "exactly one"),
        ("find_neurons", {"promotes": "a", "suppresses": "b"}, "exactly one"),
        ("find_neurons", {"sort": "kurtosis", "limit": MOST_ROWS + 1}, "less than or equal to"),
        ("find_neurons", {"sort": "kurtosis", "cursor": "x"}, "no cursor"),
        ("compare_neurons", {"neurons": ["L0N1"]}, "at least 2"),
        ("contexts", {"ids": [10**9]}, "context"),
        ("patterns", {}, "patterns"),
        ("sql", {"query": "drop table neurons"}, "SELECT"),
        ("sql", {"query": "select * from read_csv('/etc/passwd')"}, "running SQL"),
        ("no_such_tool", {}, "no_such_tool"),
    ],
)  # fmt: skip
def test_refusals_say_why(run: mn.Run, tool: str, arguments: dict[str, Any], why: str) -> None:
    """In the words that people get, for the assistant to mend."""
    try:
        assert why in refused(run, tool, **arguments)
    except mcp.MCPError as error:
        assert why in str(error)


def test_nothing_of_the_run_is_touched(run: mn.Run) -> None:
    """Whatever is asked."""

    def state() -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in run.path.rglob("*")}

    before = state()
    called(run, "neuron_card", neuron="L1N3")
    refused(run, "sql", query="create table x as select 1")
    assert state() == before


def test_a_prediction_is_taken_apart(built: tuple[mn.Run, Path]) -> None:
    """With the model that was given: parts that add up, as `Run.explain` has them."""
    run, folder = built
    answer = asked(
        create(run, str(folder)), lambda client: client.call_tool("explain", {"prompt": texts(1)[0][:40]})
    )
    assert not answer.is_error, answer.content
    assert answer.structured_content["prompt"]
    wrong = asked(create(run, str(folder)), lambda client: client.call_tool("explain", {"prompt": ""}))
    assert wrong.is_error


def test_without_the_package_it_says_what_to_install(run: mn.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, and before anything is answered."""
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    monkeypatch.delitem(sys.modules, "mnemoscope.atlas.assistant")
    with pytest.raises(RunError, match=r"not installed; install it with: pip install 'mnemoscope\[mcp\]'"):
        serving.assist(run)


@pytest.mark.slow
def test_over_standard_input(run: mn.Run) -> None:
    """The command itself, as an assistant starts it; nothing but answers is written to its output."""
    server = mcp.StdioServerParameters(
        command=sys.executable, args=["-m", "mnemoscope", "mcp", str(run.path)], env=dict(os.environ)
    )
    answer = asked(server, lambda client: client.call_tool("neuron_card", {"neuron": "L1N3"}))
    assert answer.structured_content["id"] == "L1N3"
