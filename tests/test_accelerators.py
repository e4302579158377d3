"""Every command on an accelerator that is pretended: none mixes devices, and none asks for one number after another."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES, MIXTURES, slow_but_for, tiny
from pretended import Pretence, pretending
from test_study_cases import LINES
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.errors import ModelNotSupported
from mnemoscope.mine import values
from mnemoscope.mine.build import build
from mnemoscope.model.model import Model
from mnemoscope.prediction.explain import explain
from mnemoscope.studies import catalogue
from mnemoscope.studies import run as study
from mnemoscope.studies.measures import questions, reductions
from mnemoscope.studies.measures.positions import Sizes

PROMPT = " The capital city of France is the"
KINDS = ("cuda", "mps")
_EVERY = {**FAMILIES, **MIXTURES}


def on_device(pretence: Pretence, family: str = "llama", **sizes: int) -> Model:
    """A model on the device, proven there."""
    hf = wide(**sizes) if sizes else _EVERY[family]()
    return mn.load_model(hf.to(pretence.device), tokenizer=tokenizer())


def wide(neurons: int = 40, layers: int = 2) -> Any:
    """A Llama with so many neurons in each of its layers."""
    return tiny(
        "llama", vocab_size=80, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=neurons, max_position_embeddings=64,
    )  # fmt: skip


# -- The device itself -------------------------------------------------------------------------------------------


def test_what_a_device_does_not_allow_is_not_allowed() -> None:
    """Two devices in one call, numpy, generators of another device, products of integers; and fp64 on MPS."""
    memory = torch.arange(6.0).view(2, 3)
    with pretending() as pretence:
        x = memory.to(pretence.device)
        assert (
            x.device == pretence.device
            and (x @ x.T).device == pretence.device
            and memory.device.type == "cpu"
        )
        for wrong in (
            lambda: x + memory, lambda: torch.cat([x, memory]), lambda: memory[x[0].long()], lambda: memory.mul_(x),
            lambda: torch.where(x > 0, memory, x), lambda: torch.mm(memory, memory.T, out=x[:, :2]),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="to numpy"):
            np.asarray(x)
        with pytest.raises(TypeError, match="to numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, generator=torch.Generator(), device=pretence.device)
        with pytest.raises(RuntimeError, match="not implemented"):
            x.long() @ x.T.long()
        with pretence.device:
            assert torch.zeros(2).device == pretence.device == torch.tensor([1]).device
        assert (x + torch.tensor(1.0, device="cpu"))[1, 2] == 6.0  # one number may come from the processor
        assert x[torch.tensor([1])].device == pretence.device
        assert torch.nn.Linear(3, 2).to(pretence.device)(x).device == pretence.device
    with pretending("mps") as pretence, pytest.raises(TypeError, match="float64"):
        memory.to(pretence.device).double()


def test_what_passes_is_counted() -> None:
    """In, out, and results that are waited for; nothing that stays."""
    with pretending() as pretence:
        x = torch.arange(6.0).to(pretence.device)
        y = (x * 2).sum()

        def kinds() -> Counter[str]:
            return Counter(kind for kind, _ in pretence.crossings.elements())

        assert kinds() == {"in": 1}
        float(y), x.tolist(), x.cpu(), x.nonzero(), x[x > 2], bool(y)
        assert kinds() == {"in": 1, "out": 4, "waits": 2}


# -- A build -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", slow_but_for(["llama", "gpt2", "qwen3_moe", "gemma2"], {"llama"}))
def test_a_build_is_that_of_the_processor(family: str, kind: str, tmp_path: Path) -> None:
    """Everything but sums to the bit; no number of fp64 is made there."""
    text, nulls = texts(30), ("random", "rotated")
    whole = mn.load_model(_EVERY[family](), tokenizer=tokenizer())
    expected = build(whole, text, tmp_path / "cpu", top=3, nulls=nulls)
    with pretending(kind) as pretence:
        found = build(on_device(pretence, family), text, tmp_path / "device", top=3, nulls=nulls)
        made = [line for line in pretence.doubles if line.startswith("mine/")]
    assert not made and found.manifest.options["device"] == kind
    for name in ("triggers", "histograms", "samples", "null_triggers"):
        assert expected.table(name).collect().equals(found.table(name).collect()), name
    close(expected.table("neurons").collect(), found.table("neurons").collect(), 1e-4)
    close(expected.table("values").collect(), found.table("values").collect(), 1e-4)


def close(one: Any, other: Any, to: float) -> None:
    """The same, numbers to a share of the largest of their column."""
    if isinstance(one, pl.DataFrame):
        assert one.columns == other.columns and one.height == other.height
        for name, column in one.to_dict().items():
            if column.dtype.is_float():
                a, b = (each[name].to_numpy() for each in (one, other))
                np.testing.assert_allclose(
                    a, b, rtol=to, atol=to * np.nanmax(np.abs(a), initial=0), err_msg=name
                )
            elif column.dtype == pl.List(pl.Float32):
                close(one.select(pl.col(name).explode()), other.select(pl.col(name).explode()), to)
            else:
                assert column.equals(other[name]), name
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for name in one:
            close(one[name], other[name], to)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            close(a, b, to)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=to, abs=to, nan_ok=True)
    else:
        assert one == other


# -- Questions to a model ----------------------------------------------------------------------------------------

Asked = Callable[[mn.Run, Model], Any]
QUESTIONS: dict[str, Asked] = {
    "explain": lambda run, model: explain(
        model, PROMPT, " Paris", [" London"], top=4, run=run, ablate=3, ablate_to="mean"
    ).to_dict(),
    "explain own": lambda run, model: explain(model, PROMPT, " Paris", lens="own", top=4).to_dict(),
    "trace": lambda run, model: run.trace(PROMPT, model=model).to_dict(),
    "steer": lambda run, model: run.steer(PROMPT, "L1N3", factor=-2, length=3, model=model).to_dict(),
    "test": lambda run, model: run.test("L1N3", "word:Paris", budget=400, model=model).to_dict(),
    "removal": lambda run, model: run.removal(documents=8, model=model).to_dict(),
    "verify": lambda run, model: run.verify(sample=5, model=model).passed,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[mn.Run, Model]]]:
    """A run of each family on the processor, made once."""
    made: dict[str, tuple[mn.Run, Model]] = {}

    def of(family: str) -> tuple[mn.Run, Model]:
        if family not in made:
            model = mn.load_model(_EVERY[family](), tokenizer=tokenizer())
            path = tmp_path_factory.mktemp("runs") / "run"
            made[family] = (mn.build(model, texts(60), path, top=5), model)
        return made[family]

    yield of


ASKED = [
    pytest.param(
        family, question, marks=() if (family, question) == ("llama", "explain") else pytest.mark.slow
    )
    for family in ("llama", "gpt2", "qwen3_moe")
    for question in QUESTIONS
    if family != "qwen3_moe" or question not in ("test", "removal")
]


@pytest.mark.parametrize(("family", "question"), ASKED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_question_has_the_same_answer(
    kind: str, family: str, question: str, runs: Callable[[str], tuple[mn.Run, Model]]
) -> None:
    """As on the processor, to rounding; what needs fp64 is refused where there is none, in one line."""
    run, model = runs(family)
    with pretending(kind) as pretence:
        if kind == "mps" and "explain" in question:
            with pytest.raises(
                ModelNotSupported, match=r"in fp64, which mps does not have; give device='cpu'$"
            ):
                QUESTIONS[question](run, on_device(pretence, family))
            return
    expected = QUESTIONS[question](run, model)
    with pretending(kind) as pretence:
        found = QUESTIONS[question](run, on_device(pretence, family))
    close(expected, found, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [each.name for each in catalogue.CATALOGUE if each.measured])
def test_what_a_study_measures_is_the_same(
    name: str, runs: Callable[[str], tuple[mn.Run, Model]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table that a measurement adds."""
    monkeypatch.setattr(questions, "built_in", lambda: [])  # its words are not in this vocabulary
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(map(json.dumps, LINES)))
    run, model = runs("llama")
    chosen = catalogue.choose(name)
    sizes = Sizes(positions=32, sentences=4, cases=1, tokens=600, longest=32, questions=(asked,))
    tables = []
    for place in ("cpu", "device"):
        shutil.copytree(run.path, tmp_path / place)
        own = mn.open_run(tmp_path / place)
        with pretending() as pretence:
            used = on_device(pretence) if place == "device" else model
            measured = study.measure(own, used, chosen=chosen, sizes=sizes)
        names = [name for measurement in chosen for name in measurement.tables]
        tables.append({name: measured.table(name).collect() for name in names})
    assert tables[0].keys() == tables[1].keys() and tables[0]
    for table in tables[0]:
        assert tables[0][table].height > 0, table
        close(*(each[table] for each in tables), 1e-2)


def test_a_study_says_that_it_needs_fp64(runs: Callable[[str], tuple[mn.Run, Model]]) -> None:
    """Before anything is measured."""
    run, _ = runs("llama")
    with pretending("mps") as pretence, pytest.raises(ModelNotSupported, match=r"studying .* fp64"):
        study.measure(run, on_device(pretence), chosen=catalogue.choose("glance"))


# -- What passes does not grow with what there is ------------------------------------------------------------------


def passed(pretence: Pretence, work: Callable[[], object]) -> Counter[tuple[str, str]]:
    """What passed while something was done."""
    before = pretence.crossings.copy()
    work()
    return pretence.crossings - before


def least(few: Counter[tuple[str, str]], many: Counter[tuple[str, str]], share: float = 1.0) -> None:
    """No more with many than with few, and if there is more the lines that say so."""
    assert many.total() <= share * few.total(), (few.total(), many.total(), (many - few).most_common(8))


@pytest.mark.parametrize("job", ["mining", "values"])
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_nothing_is_computed_in_fp64(job: str, family: str, tmp_path: Path) -> None:
    """Which most accelerators are slow at; only a kernel's code says more (`test_device.py`)."""
    with pretending() as pretence:
        model = on_device(pretence, family)
        pretence.doubles.clear()
        if job == "mining":
            build(model, texts(10), tmp_path / "run", top=3)
        else:
            list(values.layers(model, range(2)))
        assert not pretence.doubles


@pytest.mark.parametrize("job", ["mining", "values", *slow_but_for(["explain", "explain own"], ())])
def test_what_passes_does_not_grow_with_neurons(job: str, tmp_path: Path) -> None:
    """Four times as many neurons: as many transfers, each larger."""
    jobs: dict[str, Callable[[Model, Path], object]] = {
        "mining": lambda model, path: build(model, texts(10), path, top=3),
        "values": lambda model, path: list(values.layers(model, range(2))),
        "explain": lambda model, path: explain(model, PROMPT, " Paris", [" London"], top=4),
        "explain own": lambda model, path: explain(model, PROMPT, " Paris", top=4, lens="own"),
    }
    with pretending() as pretence:
        counts = []
        for neurons in (64, 256):
            model = on_device(pretence, neurons=neurons)
            counts.append(passed(pretence, partial(jobs[job], model, tmp_path / str(neurons))))
    # A search asks about more where more is close: rounds, not neurons.
    least(*counts, share=1.5 if job.startswith("explain") else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("larger", ["tokens", "rows"])
def test_what_passes_does_not_grow_with_an_explanation(larger: str) -> None:
    """A prompt four times as long, or frames of four times as many rows: they are fetched together."""
    prompts, rows = ((1, 4), (4, 4)) if larger == "tokens" else ((2, 2), (4, 16))
    with pretending() as pretence:
        model = on_device(pretence, neurons=64)
        counts = [
            passed(pretence, partial(explain, model, PROMPT * count, " Paris", [" London"], top=top))
            for count, top in zip(prompts, rows, strict=True)
        ]
    least(*counts, share=1.2)


@pytest.mark.parametrize("name", ["first_largest", "ranks", "log_sums", "moments", "central_powers"])
def test_reductions_are_those_of_the_loops(name: str) -> None:
    """Of rows of logits, ties among them."""
    scores = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)).round(
        decimals=1
    )
    tokens, mean = torch.arange(10).view(5, 2), scores.mean(1)
    given = {"ranks": (tokens,), "central_powers": (mean,)}.get(name, ())
    expected = getattr(reductions, name)(scores.clone(), *given)
    with pretending() as pretence:
        there = [each.to(pretence.device) for each in (scores.clone(), *given)]
        found = getattr(reductions, name)(*there)
        found = [each.cpu() for each in (found if isinstance(found, tuple) else (found,))]
    for a, b in zip(expected if isinstance(expected, tuple) else (expected,), found, strict=True):
        assert a.dtype == b.dtype and torch.allclose(a.double(), b.double(), rtol=1e-6)
