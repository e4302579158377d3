"""Accounting is compared with causation (A79): does leave-one-out say what happens when a part is really taken out?

For every prompt the 200 neurons and the 200 heads x sources with the largest |leave-one-out| on the model's own
prediction are set to zero one at a time in a forward pass. Printed are the correlations between what was accounted
and what happened, over all prompts together and the median of one prompt, and how often the signs agree.

    python -m benches.ablation [--prompts 20] [--top 200]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import polars as pl
from scipy.stats import pearsonr, spearmanr

from benches.explain import PROMPTS
from mnemoscope import explain, load_model


def correlations(frame: pl.DataFrame) -> dict[str, float]:
    """Pearson's and Spearman's of leave-one-out and effect, and the share of equal signs."""
    accounted, happened = frame["leave_one_out"].to_numpy(), frame["effect"].to_numpy()
    return {
        "pearson": float(pearsonr(accounted, happened).statistic),
        "spearman": float(spearmanr(accounted, happened).statistic),
        "same_sign": float((accounted * happened > 0).mean()),
    }


def summary(frames: list[pl.DataFrame]) -> dict[str, Any]:
    """Correlations over all prompts together, and of the median prompt."""
    each = [correlations(frame) for frame in frames]
    together = correlations(pl.concat(frames))
    return {
        "parts": sum(frame.height for frame in frames),
        **{name: round(value, 3) for name, value in together.items()},
        "median_prompt": {
            name: round(statistics.median(prompt[name] for prompt in each), 3) for name in together
        },
    }


def main() -> None:
    """Parse, ablate, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--top", type=int, default=200)
    arguments = parser.parse_args()
    model = load_model("sample:smollm2-135m", dtype="fp32")
    frames: dict[str, list[pl.DataFrame]] = {"neuron": [], "head": []}
    for prompt in PROMPTS[: arguments.prompts]:
        ablations = explain(model, prompt, top=arguments.top, ablate=arguments.top).ablations
        for kind, kept in frames.items():
            kept.append(ablations.filter(pl.col("kind") == kind))
    result = {f"{kind}s": summary(kept) for kind, kept in frames.items()}
    print(json.dumps({"bench": "ablation", "prompts": arguments.prompts, "top": arguments.top, **result}))


if __name__ == "__main__":
    main()
