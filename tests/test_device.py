"""The laws of the accumulators where coefficients are reduced on an accelerator: in plain torch, and by the kernel.

There is none here. Plain torch does on a CPU what it would do elsewhere, and the kernel runs in Triton's interpreter,
where Triton is (``make kernels``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from effort import tries
from families import FAMILIES, MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from pretended import pretending
from test_accumulate import (
    EVERY,
    EXACT,
    KINDS,
    Context,
    batch_of,
    corpora,
    corpus,
    equal,
    feed,
    fresh,
    mined,
    tables_of,
    tensors,
)
from tiny import texts, tokenizer

import mnemoscope as mn
from benches import device as bench
from mnemoscope.errors import ActivationError, RunMismatch
from mnemoscope.mine import build as building
from mnemoscope.mine import device
from mnemoscope.mine.build import build
from mnemoscope.mine.places import CountedPlaces, bin_of
from mnemoscope.mine.reading import Contenders
from mnemoscope.mine.scan import _segments, scan
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture
from mnemoscope.model.check import examine
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.records import ContextBatch, Progress

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
no_triton = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is not here: make kernels")
PATHS = ["plain", pytest.param("kernel", marks=[pytest.mark.slow, no_triton])]
paths = pytest.mark.parametrize("path", PATHS)
few = tries(12)


class Elsewhere:
    """While it is entered, tensors are taken for an accelerator's, and reduced by one of the two paths."""

    def __init__(self, path: str) -> None:
        self._patch, self._path = pytest.MonkeyPatch(), path

    def __enter__(self) -> None:
        self._patch.setattr(device, "elsewhere", lambda x: True)
        self._patch.setattr(device, "has_triton", lambda kind: self._path == "kernel")

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def close(found: dict[str, pa.Table], expected: dict[str, pa.Table], contexts: Sequence[Context]) -> None:
    """All but the sums to the bit; sums to 1e-5 of the sums of absolute powers about 0."""
    equal(expected, found, EXACT)
    for name in ("tokens", "min", "max", "positive_fraction"):
        assert np.array_equal(expected["neurons"][name], found["neurons"][name], equal_nan=True), name
    one, other = (
        {name: np.nan_to_num(tables["neurons"][name].to_numpy()) for name in ("mean", "std", "min", "max")}
        for tables in (expected, found)
    )
    scale = np.maximum(np.abs(one["min"]), np.abs(one["max"]))
    for name in ("mean", "std"):
        assert (np.abs(one[name] - other[name]) <= 1e-5 * scale).all(), name
    names = ("sum", "sum_squares", "sum_cubes", "sum_fourths")
    for row, again in zip(expected["shards"].to_pylist(), found["shards"].to_pylist(), strict=True):
        values = [np.abs(c.coefficients[row["layer"]][c.counted]).astype(np.float64) for c in contexts]
        for power, name in enumerate(names, 1):
            slack = 1e-5 * sum(float((x**power).sum()) for x in values)
            assert abs(row[name] - again[name]) <= 16 * slack + 1e-30, (
                name
            )  # about a pivot, up to 16 times as much


@paths
@few
@given(contexts=corpora, dtype=st.sampled_from([torch.float32, torch.bfloat16]), size=st.integers(1, 7))
def test_tables_are_those_of_the_compiled_loops(
    path: str, contexts: list[Context], dtype: torch.dtype, size: int
) -> None:
    """Ties, dead neurons, signed zeros, sizes that powers in fp32 cannot hold, contexts without anything counted."""
    expected, state = tables_of(mined(contexts, size)), fresh(contexts)
    with Elsewhere(path):
        feed(state, contexts, size, dtype)
    state.finish_shard(0)
    close(tables_of(state), expected, contexts)


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["heavy tails", "many ties"])
def test_every_segment_is_what_it_is_defined_to_be(path: str, dtype: torch.dtype, kind: str) -> None:
    """Extremes with their first row, powers, counts, bins and what is kept, of more neurons and rows than a program
    takes."""
    contexts = corpus(7, 12, layers=1, neurons=70, longest=40, kind=kind)
    contexts[3].counted[:] = False
    batch, x = batch_of(contexts), tensors(contexts, 0, dtype)[0]
    places = CountedPlaces.of(batch, EVERY)
    pivot = np.random.default_rng(0).standard_normal((1, 70)).astype(np.float32)
    with Elsewhere(path):
        reduced = device.reduce(x.flatten(0, 1).contiguous(), _segments(places), pivot)
    values, n_tokens = x.float().numpy(), batch.tokens.shape[1]
    for c, counted in enumerate(batch.counted):
        mine, rows = values[c, counted], np.flatnonzero(counted) + c * n_tokens
        for sign, extreme, at in (
            (1, reduced.largest, reduced.largest_at),
            (-1, reduced.smallest, reduced.smallest_at),
        ):
            if not len(mine):
                assert (sign * extreme[c] == -np.inf).all() and (at[c] == -1).all()
                continue
            assert np.array_equal(extreme[c], sign * (sign * mine).max(0))
            assert np.array_equal(at[c], rows[(sign * mine).argmax(0)])
    for part, (first, last) in enumerate(places.parts):
        d = values[first:last][batch.counted[first:last]].astype(np.float64) - pivot
        for power in range(1, 5):
            slack = 1e-6 * (np.abs(d) ** power).sum(0)
            assert (np.abs(reduced.sums[part, power - 1] - (d**power).sum(0)) <= slack).all()
        assert np.array_equal(reduced.positive[part], (d + pivot > 0).sum(0))
    chosen = x.flatten(0, 1)[torch.from_numpy(places.chosen)]
    assert len(chosen) and torch.equal(reduced.kept, chosen)
    assert np.array_equal(reduced.bins, bin_of(chosen.float().numpy()))


def test_the_kernel_is_started_where_the_coefficients_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts it on the device that is set, and a second process has another one."""
    contexts = corpus(1, 3, layers=1)
    x = tensors(contexts, 0, torch.float32)[0].flatten(0, 1)
    where: list[torch.Tensor | None] = [None]

    @contextmanager
    def set_to(values: torch.Tensor) -> Iterator[None]:
        where.append(values)
        yield
        where.append(None)

    def reduce(values: torch.Tensor, on: dict[str, torch.Tensor], *_: object) -> object:
        assert where[-1] is values
        return device.reduce_plainly(values, segments, torch.zeros(1, values.shape[1]))

    segments = _segments(CountedPlaces.of(batch_of(contexts), EVERY))
    monkeypatch.setitem(sys.modules, "mnemoscope.mine.device_kernel", SimpleNamespace(reduce=reduce))
    monkeypatch.setattr("mnemoscope.mine.device_kernel", SimpleNamespace(reduce=reduce), raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", set_to)
    monkeypatch.setattr(device, "has_triton", lambda _: True)
    monkeypatch.setattr(device, "_failure", lambda _: None)
    device.reduce(x, segments, np.zeros((1, x.shape[1]), np.float32))
    assert len(where) == 3 and where[-1] is None


def _changed(name: str, by: Callable[[Any], Any]) -> Callable[..., Any]:
    """Plain torch, with one of its results changed, as a kernel."""

    def reduce(values: torch.Tensor, segments: device.Segments, pivots: torch.Tensor) -> Any:
        extremes, *rest = device.reduce_plainly(values, segments, pivots)
        results = dict(zip((*REDUCED[:4], *REDUCED[4:]), (*extremes, *rest), strict=True))
        results[name] = by(results[name])
        return tuple(results[each] for each in REDUCED[:4]), *(results[each] for each in REDUCED[4:])

    return reduce


REDUCED = ("largest", "largest_at", "smallest", "smallest_at", "sums", "positive", "bins", "kept")


@pytest.mark.parametrize("name", [*REDUCED, ""])
def test_a_kernel_that_is_wrong_on_a_device_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it gets wrong, on a device that nobody has tried; it is said once, and plain torch does the work."""
    wrong = (
        _changed(name, lambda x: x.roll(1, -1))
        if name
        else lambda *_: (_ for _ in ()).throw(
            RuntimeError("Failed to find C compiler.\nPlease specify via CC")
        )
    )
    monkeypatch.setattr(device, "has_triton", lambda _: True)
    monkeypatch.setattr(device, "_reduce_by_kernel", wrong)
    device._failure.cache_clear()
    contexts = corpus(1, 3, layers=1)
    x, segments = (
        tensors(contexts, 0, torch.float32)[0].flatten(0, 1),
        _segments(CountedPlaces.of(batch_of(contexts), EVERY)),
    )
    pivot = np.zeros((1, x.shape[1]), np.float32)
    found = device.reduce(x, segments, pivot)
    expected = device._fetched(*device.reduce_plainly(x, segments, torch.from_numpy(pivot)))
    assert all(np.array_equal(getattr(found, each), getattr(expected, each)) for each in REDUCED)
    said = device._failure(x.device)
    assert said == (
        "it gives other numbers there"
        if name
        else "it fails there (RuntimeError: Failed to find C compiler. Please specify via CC)"
    )
    monkeypatch.setattr(device, "_reduce_by_kernel", device.reduce_plainly)
    device._failure.cache_clear()
    assert device._failure(x.device) is None
    device._failure.cache_clear()


@pytest.mark.parametrize(
    ("kind", "triton", "failure", "told"),
    [
        ("cpu", False, None, None),
        ("cuda", True, None, None),
        ("cuda", False, None, "Triton is not installed; pip install 'mnemoscope[device]'"),
        ("cuda", True, "it fails there (x)", "of the kernel it fails there (x)"),
        ("mps", False, None, "there is no kernel for mps"),
    ],
)
def test_what_is_not_reduced_by_the_kernel_is_said(
    kind: str, triton: bool, failure: str | None, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, with what to install where that would help."""
    monkeypatch.setattr(device, "has_triton", lambda _: triton)
    monkeypatch.setattr(device, "_failure", lambda _: failure)
    said = device.shortfall(torch.device(kind))
    assert said == (
        told and f"coefficients on {kind} are reduced in plain torch, which reads them several times: {told}"
    )


def test_a_build_says_that_plain_torch_reduces(tmp_path: Path) -> None:
    """Once, before it mines; and what was begun so is not gone on with by the kernel, whose sums are others."""
    with pretending() as pretence:
        model = mn.load_model(FAMILIES["llama"]().to(pretence.device), tokenizer=tokenizer())
        notes: list[str] = []

        def report(step: Progress) -> None:
            if step.note:
                notes.append(step.note)
            if step.stage == "reading values":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(model, texts(8), tmp_path / "run", top=2, nulls=(), report=report)
        assert ["Triton is not installed" in note for note in notes] == [True]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "shortfall", lambda _: None)
            with pytest.raises(
                RunMismatch, match=r"device = cuda \(pretended\) in plain torch, and device = cuda"
            ):
                build(model, texts(8), tmp_path / "run", top=2, nulls=())
        run = build(model, texts(8), tmp_path / "run", top=2, nulls=())
        assert run.manifest.options["device"] == "cuda"


@pytest.mark.slow
@no_triton
@pytest.mark.parametrize("many", ["rows", "segments", "selected"])
def test_the_kernel_finds_places_beyond_two_to_the_31st(many: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As units of large dictionaries and many contexts come to. Memory that nobody touches is none."""
    from triton.runtime import interpreter

    from mnemoscope.mine import device_kernel

    monkeypatch.setattr(
        interpreter.GridExecutor, "_restore_args_dev", lambda *_: None
    )  # would touch all of it
    neurons, sizes = 64, {"rows": 2, "segments": 1, "selected": 1, many: (1 << 25) + 3}
    values = torch.empty(sizes["rows"], neurons, dtype=torch.bfloat16)
    values[-2], values[-1] = -2.0, 3.0
    begins, ends = torch.from_numpy(np.zeros((2, sizes["segments"]), np.int32))
    ends[-1] = 2
    last = [sizes["rows"] - 2, sizes["rows"] - 1]
    lists = {
        "rows": last,
        "parts": [[sizes["segments"] - 1, sizes["segments"], 0]],
        "numbers": [-1, sizes["selected"] - 1],
    }
    where = {name: torch.tensor(each, dtype=torch.int32) for name, each in lists.items()}
    extremes, sums, positive, bins, kept = device_kernel.reduce(
        values, where | {"begins": begins, "ends": ends}, sizes["selected"], torch.zeros(1, neurons)
    )
    found = [each[-1] for each in (*extremes, bins, kept)] + [sums[0, 0, 0], positive[0]]
    expected = [3, last[1], -2, last[0], int(bin_of(np.float32([3]))[0]), 3, 1, 1]
    assert [each.unique().tolist() for each in found] == [[each] for each in expected]


@paths
def test_a_device_tells_of_what_may_enter_a_list_and_of_nothing_else(path: str) -> None:
    """Beyond 0 and not below the floor, of either sign; ties with the floor are told."""
    contexts = corpus(1, 30, layers=1, neurons=4, kind="many ties")
    x, gate, up = tensors(contexts, 0, torch.float32)
    floor = np.array([[0.0, 0.5, 1.0, 2.0], [0.0, 0.5, 1.0, 2.0]], np.float32)
    with Elsewhere(path):
        reading = scan(0, x, batch_of(contexts), gate, up, floor=floor)
    for hits, sign, least in ((reading.largest, 1, floor[0]), (reading.smallest, -1, floor[1])):
        assert isinstance(hits, Contenders)
        told = set(zip(hits.context.tolist(), hits.neuron.tolist(), strict=True))
        expected = set()
        for c, context in enumerate(contexts):
            for neuron in range(4):
                strongest = (sign * context.coefficients[0, context.counted, neuron]).max(initial=0.0)
                if strongest > 0 and strongest >= least[neuron]:
                    expected.add((c, neuron))
        assert told == expected
        assert 0 < len(told) < 120


@paths
def test_shards_merge_to_the_same_bits_whoever_did_them(path: str) -> None:
    """One worker or three, in any order: every bit of every table."""
    contexts = corpus(5, 24, neurons=6, longest=20)
    shards = [contexts[start : start + 5] for start in range(0, 24, 5)]
    states = [fresh(contexts) for _ in range(4)]
    with Elsewhere(path):
        for shard, chunk in enumerate(shards):
            for state in (states[0], states[1 + (7 * shard) % 3]):
                feed(state, chunk, 3)
                state.finish_shard(shard)
    states[3].merge(states[1])
    states[3].merge(states[2])
    equal(tables_of(states[0]), tables_of(states[3]))


@paths
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_activation_that_is_not_finite_is_named(path: str, value: float) -> None:
    """As on a CPU."""
    contexts = corpus(3, 6)
    contexts[4].counted[2:] = True
    contexts[4].coefficients[0, 2, 3] = value
    with (
        Elsewhere(path),
        pytest.raises(ActivationError, match=r"L0N3 is -?(nan|inf) at position 2 of context 4;"),
    ):
        scan(0, tensors(contexts, 0, torch.bfloat16)[0], batch_of(contexts))


@paths
def test_powers_that_fp32_cannot_hold_are_read_otherwise(path: str) -> None:
    """Finite coefficients of 1e10 have fourth powers beyond fp32: the compiled loops take the layer."""
    contexts = corpus(2, 6, layers=1)
    for c in contexts:
        c.coefficients *= np.float32(1e10)
    expected = tables_of(mined(contexts))
    with Elsewhere(path):
        found = tables_of(mined(contexts))
    equal(expected, found)


def test_pairs_hold_what_fp32_loses() -> None:
    """A million numbers of both signs, whose sum is small beside them."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((100_001, 3)).astype(np.float32)) + 1000
    high, low = device._summed(x)
    exact = x.double().sum(0)
    assert ((high.double() + low.double() - exact).abs() <= 1e-12 * exact).all()
    assert ((x.cumsum(0)[-1].double() - exact).abs() > 1e-9 * exact).any()


@paths
def test_sums_of_many_rows_lose_nothing(path: str) -> None:
    """Of numbers that are large beside their spread: what is rounded off is added up apart, also across reads."""
    count = 4_000
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32)) + 1000
    every, one = np.arange(count), np.array([0])
    segments = device.Segments(every, one, one + count, np.array([(0, 1, 0)]), np.full(count, -1))
    with Elsewhere(path):
        found = device.reduce(x, segments, np.zeros((1, 3), np.float32)).sums[0, 0]
    exact = x.double().sum(0).numpy()
    assert (np.abs(found - exact) <= 3e-8 * exact).all()
    alone = np.cumsum(x.numpy(), axis=0, dtype=np.float32)[-1]
    assert (np.abs(alone - exact) > 1e-7 * exact).any(), "which fp32 alone loses"


@paths
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_are_reduced_by_the_rows_routed_to_them(path: str, family: str) -> None:
    """Ragged, some without a token, a shared one beside them: tables as of the compiled loops, router weights too."""
    hf = MIXTURES[family]().eval()
    model = Model(hf, None, examine(hf)[0], family)
    r = np.random.default_rng(0)
    batches = []
    for number in range(3):
        tokens = r.integers(0, 50, (3, 7)).astype(np.int32)
        counted = r.random(tokens.shape) < 0.7
        counted[:, 0] = False
        batches.append(ContextBatch(np.arange(3) + 3 * number, tokens, np.full(3, 7, np.int32), counted))
    states = [RunStatistics.of(model, Nulls(model, ()), 3) for _ in range(2)]
    with Capture(model) as capture:
        for batch in batches:
            capture.sweep(batch, states[0].update, states[0].update_rows)
            with Elsewhere(path):
                capture.sweep(batch, states[1].update, states[1].update_rows)
    for state in states:
        state.finish_shard(0)
    for layer in range(model.anatomy.n_layers):
        expected, found = (state.tables(layer) for state in states)
        equal(expected, found, sorted(expected.keys() - {"neurons"}))
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(
                found["neurons"][name], expected["neurons"][name], rtol=1e-5, atol=1e-7
            )


_COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mnemoscope.mine import device_kernel, kernel

constants = {"STEPS": 16, "NEURONS": 64, "SIDE": kernel.SIDE, "FIRST_SIZE": kernel.FIRST_SIZE}
floats = dict.fromkeys(("pivots", "largest", "smallest", "sums"), "*fp32")
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for dtype in ("bf16", "fp32"):
        known = floats | {"values": "*" + dtype, "kept": "*" + dtype, "bins": "*u8", "neurons": "i32"}
        names = device_kernel._reduce.arg_names
        signature = {name: "constexpr" if name in constants else known.get(name, "*i32") for name in names}
        source = ASTSource(device_kernel._reduce, signature, constexprs=constants)
        made = compile(source, target=target, options={"enable_fp_fusion": False}).asm
        code = made.get("ptx") or made["amdgcn"]
        print(target.arch, dtype, ".f64" in code or "_f64" in code)
"""


@pytest.mark.slow
@no_triton
def test_the_kernel_compiles_for_devices_that_are_not_here_and_without_fp64() -> None:
    """Two generations of NVIDIA's and one of AMD's; whether it is right there, only they can say."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], capture_output=True, text=True, check=True, env=environment
    )
    said = done.stdout.split("\n")[:-1]
    assert said == [f"{arch} {dtype} False" for arch in ("80", "90", "gfx942") for dtype in ("bf16", "fp32")]


def test_without_an_accelerator_the_bench_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and with 2."""
    monkeypatch.setattr(sys, "argv", ["benches.device"])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


PHASES = ("build", "values", "explain", "contributions", "study", "patterns")


@pytest.mark.slow
@pytest.mark.parametrize("pretended", [False, True], ids=["cpu", "pretended"])
def test_the_bench_measures_a_tiny_model(pretended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, or on what is taken for a device, where its figures mean nothing: all that it promises is there."""
    monkeypatch.setattr(bench, "BUILD", 0.0)
    with pretending("xpu") if pretended else nullcontext() as pretence:
        device = torch.device("cpu") if pretence is None else pretence.device
        measured = bench.measure("tiny", device, 60, contexts=2)
    assert not [measured[phase] for phase in PHASES if "failed" in measured[phase]]
    assert all(measured[phase]["peak_gib"] > 0 for phase in PHASES)
    assert measured["build"]["build_to_forward"] > 0 and measured["values"]["to_products"] > 0
    assert all(measured[phase]["forwards"] > 0 for phase in PHASES[2:])


def test_a_phase_that_fails_is_said_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, and the others are measured; each is told when it is done."""

    def out_of_memory(*_: object) -> dict[str, object]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate all of it.")

    for name in ("building", "reading", "explaining", "contributing", "studying", "counting"):
        monkeypatch.setattr(bench, name, lambda *_: {"seconds": 1})
    monkeypatch.setattr(bench, "explaining", out_of_memory)
    told: list[dict[str, object]] = []
    measured = bench.measure("tiny", torch.device("cpu"), 60, contexts=2, tell=told.append)
    assert measured["explain"]["failed"] == "OutOfMemoryError: CUDA out of memory."
    assert all(measured[phase]["seconds"] == 1 for phase in PHASES if phase != "explain")
    assert [each.pop("phase") for each in told] == list(PHASES)
    assert all(measured[phase].items() <= each.items() for phase, each in zip(PHASES, told, strict=True))


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs alarms")
def test_a_phase_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told before is not lost with it; the phases after it say that they were not begun."""

    def endless(*_: object) -> dict[str, object]:
        while True:
            time.sleep(0.01)

    for name in ("building", "reading", "explaining", "contributing", "studying", "counting"):
        monkeypatch.setattr(bench, name, lambda *_: time.sleep(0.01) or {"seconds": 1})
    monkeypatch.setattr(bench, "reading", endless)
    monkeypatch.setattr(bench, "random_model", lambda *_: SimpleNamespace(dtype="fp32"))
    told: list[dict[str, object]] = []
    bench.measure("tiny", torch.device("cpu"), 0.3, contexts=2, tell=told.append)
    assert told[0]["seconds"] == 1
    assert [each["failed"] for each in told[1:]] == ["TimeoutError: there was no time left"] * 5
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_kinds_of_coefficients_include_what_fp32_cannot_hold() -> None:
    """The laws above are tried on it."""
    assert np.abs(KINDS["extreme sizes"](np.random.default_rng(0), (1000,))).max() > 4e9
