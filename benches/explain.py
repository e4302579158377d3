"""This bench times the certified search against brute force (target: at least 30 x), and a whole explanation (1.5 s).

For every prompt and lens the 100 largest and 100 most negative contributions among all neurons are searched for, and
all neurons are evaluated. The neurons must be the same, the values equal to 1e-5 nats, and every bound of every stage
must hold. Both happen in one process, in turn. Brute force takes a quarter of a minute a time: choose fewer prompts
for a quick look.

    python -m benches.explain [--prompts 30] [--lenses raw,own,frozen] [--no-brute]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mnemoscope import explain, load_model
from mnemoscope.model.lens import LENSES, Lens
from mnemoscope.model.model import Model
from mnemoscope.model.stream import trace
from mnemoscope.prediction.explain import geometry_of
from mnemoscope.prediction.search import STAGES, ExtremeParts, Parts, TopK, certified, exhaustive, search
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.text.spelling import vocabulary_of

TOP = 100
TOLERANCE = 1e-5  # nats
EVERY = 16  # neurons of which one is asked for its bounds from many tokens
TEN_TOKENS = "Of all the great cities, the capital of France is"
PROMPTS = (
    "The capital of France is",
    "The capital of Germany is",
    "The capital of Japan is",
    "The largest planet in the solar system is",
    "Water is made of hydrogen and",
    "The author of Romeo and Juliet is William",
    "The opposite of hot is",
    "Two plus two equals",
    "The first president of the United States was George",
    "She opened the door and",
    "The cat sat on the",
    "In 1945 the war in Europe",
    "The chemical symbol for gold is",
    "Once upon a time there was a",
    "The Eiffel Tower is in",
    "He plays the guitar in a rock",
    "The river Nile flows through",
    "def add(a, b):\n    return a +",
    "The currency of the United Kingdom is the",
    "Albert Einstein developed the theory of",
    "The film was directed by",
    "The sun rises in the",
    "A group of lions is called a",
    "Thank you very",
    "The human heart has four",
    "The song was released as a",
    "Mount Everest is the highest",
    "The train arrived at the",
    "Les enfants jouent dans le",
    "The species is found in South",
)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def prediction_of(model: Model, prompt: str, lens: str) -> TracedPrediction:
    """The model's own prediction after a prompt."""
    tokens = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    stream = trace(model.hf, model.anatomy, tokens)
    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    reading = Lens.of(model.anatomy, lens)
    target = int(stream.logits[-1].argmax())
    return TracedPrediction(stream, reading, target, (), words, geometry_of(model, reading))


def thinned(group: Parts) -> Parts:
    """A group with one in so many of the vectors."""
    kept = torch.arange(0, group.size, EVERY)
    return Parts(len(kept), group.base, lambda index: group.vectors(kept if index is None else kept[index]))


def outside(values: torch.Tensor, bounds: torch.Tensor) -> int:
    """The number of values that are not in their interval."""
    return int(((bounds[:, 0] > values + 1e-6) | (bounds[:, 1] < values - 1e-6)).sum())


def differences(prediction: TracedPrediction, extremes: ExtremeParts, every: torch.Tensor) -> dict[str, Any]:
    """Whether the search found what brute force found, and whether the bounds hold."""
    flat = every.flatten()
    order = flat.argsort()
    wanted = torch.cat([order[:TOP], order[-TOP:]])
    neurons = extremes.group * every.shape[1] + extremes.index
    chosen = flat[neurons].sort().values
    apart = float((extremes.values[:, 0] - flat[neurons]).abs().max())
    # Ties within the tolerance may swap places; their values may not differ.
    sets = float((torch.cat([chosen[:TOP], chosen[-TOP:]]) - flat[wanted]).abs().max())
    groups = prediction.groups("neurons")
    broken = 0
    for count in (0, *STAGES[:-1]):
        bounds = certified(prediction.bases, groups, count)[:, 0]
        broken += outside(flat, bounds)
    # More tokens, or all in bf16, take as long as half of brute force: a part of the neurons must do.
    sample, few = every[:, ::EVERY].flatten(), [thinned(group) for group in groups]
    for count, screen in ((STAGES[-1], False), (STAGES[-2], True)):
        broken += outside(sample, certified(prediction.bases, few, count, screen=screen)[:, 0])
    return {
        "same_neurons": len({*neurons.tolist()} & {*wanted.tolist()}),
        "largest_difference": max(apart, sets),
        "bounds_broken": broken,
    }


def against_brute_force(model: Model, prompts: list[str], lenses: list[str]) -> list[dict[str, Any]]:
    """One row per prompt and lens."""
    rows = []
    for prompt in prompts:
        for lens in lenses:
            prediction = prediction_of(model, prompt, lens)
            groups = prediction.groups("neurons")
            bases = prediction.bases
            _ = bases.probabilities  # both ways need them
            searching, (extremes,) = timed(lambda b=bases, all_of=groups: search(b, [TopK(all_of, TOP)]))
            brute, values = timed(lambda b=bases, all_of=groups: [exhaustive(b, group) for group in all_of])
            rows.append(
                {
                    "prompt": prompt,
                    "lens": lens,
                    "search_seconds": searching,
                    "brute_seconds": brute,
                    "evaluations": extremes.full,
                    "partial_evaluations": extremes.partly,
                    "neurons": extremes.of,
                    **differences(prediction, extremes, torch.stack(values)[..., 0]),
                }
            )
    return rows


def main() -> None:
    """Parse, measure, check, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--lenses", default=",".join(LENSES))
    parser.add_argument("--no-brute", action="store_true")
    parser.add_argument("--rows", action="store_true", help="print every prompt and lens")
    arguments = parser.parse_args()
    model = load_model("sample:smollm2-135m", dtype="fp32")
    with torch.inference_mode():
        geometry = geometry_of(model, Lens.of(model.anatomy, "frozen"))
        preparing, _ = timed(lambda: (geometry.off_centre, geometry.longest, geometry.scatter))
        explain(model, TEN_TOKENS, " Paris", " London")  # first touch of memory, the vocabulary
        whole = [timed(lambda: explain(model, TEN_TOKENS, " Paris", " London"))[0] for _ in range(5)]
        plain = [
            timed(lambda: model.hf(torch.tensor([model.tokenizer(TEN_TOKENS)["input_ids"]])))[0]
            for _ in range(5)
        ]
    result: dict[str, Any] = {
        "bench": "explain",
        "threads": torch.get_num_threads(),
        "tokens": len(model.tokenizer(TEN_TOKENS)["input_ids"]),
        "explain_seconds": statistics.median(whole),
        "explain_seconds_best": min(whole),
        "forward_seconds": statistics.median(plain),
        "once_per_model_seconds": preparing,
    }
    failed = False
    if not arguments.no_brute:
        with torch.inference_mode():
            rows = against_brute_force(model, list(PROMPTS[: arguments.prompts]), arguments.lenses.split(","))
        for lens in arguments.lenses.split(","):
            column = {name: [row[name] for row in rows if row["lens"] == lens] for name in rows[0]}
            result[lens] = {
                "prompts": len(column["prompt"]),
                "speed_up": sum(column["brute_seconds"]) / sum(column["search_seconds"]),
                "evaluations_median": statistics.median(column["evaluations"]),
                "evaluations_most": max(column["evaluations"]),
                "largest_difference": max(column["largest_difference"]),
                "bounds_broken": sum(column["bounds_broken"]),
                "same_neurons_fewest": min(column["same_neurons"]),
            }
        failed = any(row["bounds_broken"] or row["largest_difference"] > TOLERANCE for row in rows)
        result |= {"rows": rows} if arguments.rows else {}
    print(json.dumps(result))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
