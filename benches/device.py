"""What each command costs on an accelerator beside a plain forward pass, in one script of at most six minutes.

Models of the shapes of Llama 3.2 1B and Llama 3.1 8B are made on the device, with random weights, and nothing is
downloaded. One JSON object a line: for each phase of a shape as soon as it is done, so that none is lost with those
after it, and for each shape with all of them. What fails in one is said in its place, a phase is stopped when the time
of its shape is over, and the others are measured all the same:

    build          ``model(input_ids)`` with the language-model head over batches of 4,096 tokens, and the capture and
                   every accumulator over the same batches, in turn (aim: at most 1.10 of forward)
    values         values and keys of one layer through the vocabulary (aim: at most 1.5 of the bare products)
    explain        one prediction after 64 tokens with a foil, the second time it is asked
    contributions  one example of 64 tokens of the study's contributions, as its second
    study          residuals at the end of 64 prefixes, and of one layer its weights and the ranks in its values
    patterns       counting `PATTERNS` columns for every neuron beside the pass over a batch, and the pass alone

Each has its seconds, where tokens are read their ratio to a plain forward pass of as many (`forwards`), and the most
memory of the device, of the process on a CPU.

    python -m benches.device [--device auto] [--shapes 1b,8b] [--seconds 330]
    python -m benches.device --tiny    # a few layers on a CPU: tries the script, its figures mean nothing
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import signal
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benches.values import products
from mnemoscope.mine import values
from mnemoscope.mine.device import shortfall
from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture
from mnemoscope.model.devices import hardware, made_on
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.model.reading import describe
from mnemoscope.prediction.explain import explain
from mnemoscope.records import NEURON, ContextBatch
from mnemoscope.run.text import Text
from mnemoscope.studies.measures import lenses, weights
from mnemoscope.studies.measures.contributions import ContributionSurvey
from mnemoscope.studies.measures.positions import Work
from mnemoscope.studies.measures.value_ranks import ValueRanks
from mnemoscope.text.spelling import vocabulary_of
from mnemoscope.trials.counts import CandidateCounts, CountingState
from mnemoscope.trials.groups import UnitPlaces
from mnemoscope.trials.masked_text import MaskedText, last_tokens

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"width": 64, "neurons": 96, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 700},
    "1b": {"width": 2048, "neurons": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "vocabulary": 128_256},
    "8b": {"width": 4096, "neurons": 14_336, "layers": 32, "heads": 32, "kv_heads": 8, "vocabulary": 128_256},
}
LENGTH = 256  # tokens of a context
WARM_UP = 2  # batches: compilation, first touch of memory, lists that are empty
BUILD = 0.4  # of the time that a shape has; the rest takes what it takes, and what is left then
PROMPT = 64  # tokens
PATTERNS = 64  # columns


def words(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words of letters."""
    names = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    vocabulary = {"<s>": 0, "<unk>": 1} | {
        "Ġ" + name: i + 2 for i, name in zip(range(count - 2), names, strict=False)
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def random_model(shape: dict[str, int], device: torch.device) -> Model:
    """Weights drawn at random where they stay; not checked, for it is as all Llamas are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=shape["neurons"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=shape["layers"] < 32,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with device:
            hf = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return Model(hf, words(shape["vocabulary"]), describe(hf), "random")


def batch_of(number: int, contexts: int, vocabulary: int) -> ContextBatch:
    """Random tokens of whole contexts."""
    tokens = np.random.default_rng(number).integers(2, vocabulary, (contexts, LENGTH)).astype(np.int32)
    counted = np.ones(tokens.shape, bool)
    counted[:, 0] = False
    ids = np.arange(number * contexts, (number + 1) * contexts)
    return ContextBatch(ids, tokens, np.full(contexts, LENGTH, np.int32), counted)


class Clock:
    """Seconds of work on a device, and the memory that it took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, work: Callable[[], object]) -> float:
        """Seconds until the device has done it."""
        self._wait()
        begin = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def of(self, phase: Callable[[], dict[str, object]], seconds: float) -> dict[str, object]:
        """What a phase says, with its seconds and GiB at the most; and if it fails, or takes longer, how."""
        cuda, begin = self._device.type == "cuda", time.perf_counter()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            with stopped_after(seconds):
                said = phase()
        except Exception as error:  # the others are measured all the same
            said = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        if cuda:
            torch.cuda.empty_cache()
        most = torch.cuda.max_memory_allocated(self._device) if cuda else 1024 * _resident()
        return said | {
            "all_seconds": round(time.perf_counter() - begin, 2),
            "peak_gib": round(most / 2**30, 2),
        }


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so long, as soon as Python comes to it."""

    def stop(*_: object) -> None:
        raise TimeoutError("there was no time left")

    if seconds <= 0:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def building(model: Model, clock: Clock, seconds: float, contexts: int) -> dict[str, object]:
    """Forward passes and mining in turn, batch by batch, for as long as there is time."""
    state = RunStatistics.of(model, Nulls(model, ()), 50)
    spent: dict[str, list[float]] = {"forward": [], "build": []}
    until = time.perf_counter() + seconds

    def forward(batch: ContextBatch) -> None:
        with torch.inference_mode():
            model.hf(input_ids=torch.from_numpy(batch.tokens).long().to(model.device), use_cache=False)

    number = 0
    with Capture(model) as capture:
        # The capture's own hooks see the plain pass too, and do nothing with it.
        ways: dict[str, Callable[[ContextBatch], None]] = {
            "forward": forward,
            "build": lambda batch: capture.sweep(batch, state.update, state.update_rows),
        }
        while number < WARM_UP + 2 or time.perf_counter() < until:
            batch = batch_of(number, contexts, model.anatomy.vocabulary)
            for name in list(ways)[:: 1 if number % 2 else -1]:
                spent[name].append(clock(lambda way=ways[name], b=batch: way(b)))
            number += 1
    state.finish_shard(0)
    kept = {name: each[WARM_UP:] for name, each in spent.items()}
    return {
        "tokens": contexts * LENGTH * len(kept["build"]),
        "tokens_per_second": {
            name: round(contexts * LENGTH * len(each) / sum(each)) for name, each in kept.items()
        },
        "build_to_forward": round(sum(kept["build"]) / sum(kept["forward"]), 3),
        "build_to_forward_at_the_end": round(kept["build"][-1] / kept["forward"][-1], 3),
    }


def reading(model: Model, clock: Clock) -> dict[str, object]:
    """Values and keys of the first layer, and the products alone."""
    for _ in range(2):
        bare = clock(lambda: products(model, values._TOKENS))
        read = clock(lambda: list(values.layers(model, [0])))
    return {"seconds": round(read, 3), "products": round(bare, 3), "to_products": round(read / bare, 3)}


def plain(model: Model, clock: Clock, tokens: int, rows: int = 1) -> float:
    """Seconds of a plain forward pass."""
    ids = (
        torch.from_numpy(batch_of(0, rows, model.anatomy.vocabulary).tokens[:, :tokens])
        .long()
        .to(model.device)
    )
    with torch.inference_mode():
        return [clock(lambda: model.hf(input_ids=ids, use_cache=False)) for _ in range(2)][-1]


def timed(model: Model, clock: Clock, work: Callable[[], object], tokens: int = PROMPT) -> dict[str, object]:
    """Seconds of work that is done twice, the first time with all that is made once."""
    first, again = clock(work), clock(work)
    return {
        "first": round(first, 2),
        "seconds": round(again, 3),
        "forwards": round(again / plain(model, clock, tokens), 1),
    }


def explaining(model: Model, clock: Clock) -> dict[str, object]:
    """A prediction after `PROMPT` tokens."""
    names = [name.replace("Ġ", "") for name in model.tokenizer.convert_ids_to_tokens(range(2, PROMPT + 4))]
    prompt, target, foil = " ".join(names[:PROMPT]), f" {names[PROMPT]}", f" {names[PROMPT + 1]}"
    return timed(model, clock, lambda: explain(model, prompt, target, [foil]))


def contributing(model: Model, clock: Clock) -> dict[str, object]:
    """One example of the study's contributions; ranks of values are read for four layers before."""
    vocabulary = model.anatomy.vocabulary
    words = vocabulary_of(model.tokenizer, vocabulary)
    prefix = batch_of(0, 1, vocabulary).tokens[0, :PROMPT]
    with (
        tempfile.TemporaryDirectory() as folder, model.running(), made_on(model.device), torch.inference_mode(),
    ):  # fmt: skip
        made: list[ContributionSurvey] = []
        before = clock(
            lambda: made.append(ContributionSurvey.of(model, words, "frozen", 4, Work(Path(folder))))
        )

        def example() -> object:
            generator = np.random.default_rng(0)
            return made[0].example(
                prefix, {}, ("model", "null"), lambda token: (token + 1) % vocabulary, generator
            )

        return {"ranks_of_four_layers": round(before, 2)} | timed(model, clock, example)


def studying(model: Model, clock: Clock) -> dict[str, object]:
    """What other measurements of the study ask of a model: residuals of prefixes, weights and ranks of a layer."""
    batch = batch_of(0, 64, model.anatomy.vocabulary)
    short = ContextBatch(
        batch.contexts, batch.tokens[:, :PROMPT], np.full(64, PROMPT, np.int32), batch.counted[:, :PROMPT]
    )
    lens, layer = Lens.of(model.anatomy, "frozen", "flat"), model.anatomy.layers[0]
    with (
        tempfile.TemporaryDirectory() as folder, model.running(), made_on(model.device), torch.inference_mode(),
    ):  # fmt: skip
        silent = weights.silent_directions(lens)
        generator = np.random.default_rng(0)
        of_weights = clock(lambda: weights._layer(model.anatomy, lens, layer, silent, 0, generator))
        of_ranks = clock(lambda: ValueRanks.of(lens, layer, Work(Path(folder)), "ranks"))
        points = [clock(lambda: lenses.points(model, short)) for _ in range(2)][-1]
    return {
        "weights_of_a_layer": round(of_weights, 2), "ranks_of_a_layer": round(of_ranks, 2), "seconds": round(points, 3),
        "forwards": round(points / plain(model, clock, PROMPT, 64), 2),
    }  # fmt: skip


def counting(model: Model, clock: Clock, contexts: int) -> dict[str, object]:
    """Columns counted for all neurons over one batch, and the same pass without."""
    batch = batch_of(0, contexts, model.anatomy.vocabulary)
    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    text = Text.build([(row, row, tokens) for row, tokens in enumerate(batch.tokens)], words, special=[])
    columns = last_tokens(text, np.unique(text.tokens[text.counted]))[:, :PATTERNS]
    masked, places = MaskedText(text, columns), UnitPlaces.of(model, None)
    cells = places.cells[NEURON]
    threshold = np.full((2, len(cells)), BINS * 3 // 4, np.int64)
    counts = {NEURON: CandidateCounts(cells, masked, columns.shape[1], threshold)}
    state = CountingState(masked, None, counts, places.at)
    with Capture(model) as capture:
        passes = [
            (
                clock(lambda: capture.sweep(batch, lambda *_: None, lambda *_: None)),
                clock(lambda: capture.sweep(batch, state.update, state.update_rows)),
            )
            for _ in range(2)
        ]
    alone, counted = passes[-1]
    forward = plain(model, clock, LENGTH, contexts)
    return {
        "seconds": round(counted, 3), "pass_alone": round(alone, 3), "forwards": round(counted / forward, 2),
    }  # fmt: skip


def measure(
    name: str,
    device: torch.device,
    seconds: float,
    contexts: int = 16,
    tell: Callable[[dict[str, object]], None] = lambda _: None,
) -> dict[str, object]:
    """Every phase of one shape, each told when it is done; what a phase does not come to in time is not begun."""
    begin, clock = time.perf_counter(), Clock(device)
    model = random_model(SHAPES[name], device)
    made = time.perf_counter() - begin
    phases: dict[str, Callable[[], dict[str, object]]] = {
        "build": lambda: building(model, clock, BUILD * (seconds - made), contexts),
        "values": lambda: reading(model, clock),
        "explain": lambda: explaining(model, clock),
        "contributions": lambda: contributing(model, clock),
        "study": lambda: studying(model, clock),
        "patterns": lambda: counting(model, clock, contexts),
    }
    said: dict[str, dict[str, object]] = {}
    for phase, work in phases.items():
        said[phase] = clock.of(work, seconds - (time.perf_counter() - begin))
        tell({"bench": "device", "shape": name, "phase": phase} | said[phase])
    return {
        "bench": "device",
        "shape": name,
        "device": hardware(device),
        "kernel": shortfall(device) or ("none" if device.type == "cpu" else "triton"),
        "dtype": model.dtype,
        "made_seconds": round(made, 2),
        **said,
        "seconds": round(time.perf_counter() - begin, 1),
        "targets": {"build_to_forward": 1.1, "values_to_products": 1.5},
    }


def tell(said: dict[str, object]) -> None:
    """Print a line of JSON, at once."""
    print(json.dumps(said), flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--seconds", type=float, default=330, help="for all shapes together")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.tiny:
        tell(measure("tiny", torch.device("cpu"), 60, 2, tell))
        return
    found = torch.accelerator.current_accelerator() if given.device == "auto" else torch.device(given.device)
    if found is None or not torch.accelerator.is_available():
        print(
            "benches.device: there is no accelerator here that torch can use; --tiny tries the script on a CPU",
            file=sys.stderr,
        )
        sys.exit(2)
    names = given.shapes.split(",")
    layers = {name: SHAPES[name]["layers"] for name in names}
    for name in names:
        seconds = given.seconds * layers[name] / sum(layers.values())
        try:
            said = measure(name, found, seconds, tell=tell)
        except Exception as error:  # a shape that does not fit
            said = {
                "bench": "device",
                "shape": name,
                "failed": f"{type(error).__name__}: {error}".splitlines()[0],
            }
        tell(said)
        if found.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
