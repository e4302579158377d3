"""What reading values and keys through a large vocabulary costs beside the products it is made of (target: <= 1.5 x).

The model is random: one gated layer. Three ways take turns, and what counts is processor time of all threads: what
other programs take is no part of it.

    products  values through the unembedding, gates and ups through the embeddings, in the same pieces, and nothing read
    whole     the same products with all tokens at once for as many neurons as are multiplied together
    read      `mine.values.layers`: tables with the 50 tokens of either end, probabilities, entropies, keys

    python -m benches.values [--vocabulary 262144] [--width 640] [--neurons 2048] [--dtype auto] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mnemoscope.mine import values
from mnemoscope.model.check import examine
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model, native_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_model(vocabulary: int, width: int, neurons: int, dtype: torch.dtype) -> Model:
    """One layer, with weights drawn at random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    hf = LlamaForCausalLM(config).eval().to(dtype)
    return Model(hf, None, examine(hf)[0], "random")


def products(model: Model, tokens: int) -> None:
    """All products of one layer, of so many tokens at a time; only the last of each is kept."""
    block, lens = model.anatomy.layers[0], Lens.of(model.anatomy, values.LENS, values.PROJECTION)
    inputs = values.bare_tokens(model, model.anatomy)
    pairs = [
        (lens.directions(values.value_vectors(block)), lens.table),
        *((rows.detach(), inputs) for rows in (block.keys(), block.ups()) if rows is not None),
    ]
    with torch.inference_mode():
        for rows, table in pairs:
            for first in range(0, len(table), tokens):
                piece = table[first : first + tokens].T
                for start in range(0, len(rows), values._TILE):
                    torch.mm(rows[start : start + values._TILE], piece)


def timed(work: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, size in (("vocabulary", 262_144), ("width", 640), ("neurons", 2048), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    given = parser.parse_args()
    given.dtype = given.dtype if given.dtype != "auto" else "bf16" if native_bf16() else "fp32"
    dtype = DTYPES[given.dtype]
    model = random_model(given.vocabulary, given.width, given.neurons, dtype)
    ways: dict[str, Callable[[], object]] = {
        "products": lambda: products(model, values._TOKENS),
        "whole": lambda: products(model, given.vocabulary),
        "read": lambda: list(values.layers(model, [0])),
    }
    list(values.layers(random_model(300, given.width, 64, dtype), [0]))  # compiled
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            seconds[name].append(timed(ways[name]))
    least = {name: min(each) for name, each in seconds.items()}
    print(
        json.dumps(
            {
                "bench": "values",
                **vars(given),
                "threads": torch.get_num_threads(),
                "seconds": {name: [round(each, 2) for each in spent] for name, spent in seconds.items()},
                "ratio_to_products": round(least["read"] / min(least["products"], least["whole"]), 3),
                "target": 1.5,
                "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
