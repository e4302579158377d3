"""Which token of a trigger matters, as findings of the study (A9); measured by `mnemoscope removal`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from mnemoscope.analyses.removal import REMOVED, Effect, Estimate, Removal, removal
from mnemoscope.analyses.study.finding import Figure, Finding

if TYPE_CHECKING:
    from mnemoscope.store import Run


def findings(run: Run) -> list[Finding]:
    """From the table `removal`."""
    found = removal(run)
    return [_relative(found), _retained(found)]


def _rows(found: Removal, kind: str, measure: str) -> pl.DataFrame:
    rows = []
    for one in found.effects:
        if one.kind == kind and one.layer is not None:
            estimate: Estimate = getattr(one, measure)
            rows.append((one.layer, f"without the {one.removed}", one.prefixes, *_numbers(estimate)))
    names = {"layer": pl.Int64, "token": pl.String, "prefixes": pl.Int64}
    schema = {**names, **dict.fromkeys((measure, "low", "high"), pl.Float64)}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _numbers(one: Estimate) -> tuple[float | None, float | None, float | None]:
    return one.value, one.low, one.high


def _told(one: Estimate) -> str:
    if one.value is None or one.low is None or one.high is None:
        return "not defined"
    return f"{one.value:+.1%} [{one.low:+.1%}, {one.high:+.1%}]"


def _relative(found: Removal) -> Finding:
    """Figure 3: the change of the coefficient, weighted by its size."""
    mean = {removed: found.of(None, "trigger", removed).ratio for removed in REMOVED}
    more = sum(1 for one in found.last_against_random if one.high is not None and one.high < 0)
    known = sum(1 for one in found.last_against_random if one.value is not None)
    return Finding(
        id="figure-3-token-removal",
        items=("A9",),
        title="Triggers without one of their tokens (Geva Figure 3)",
        says="Over all layers the coefficient changes by "
        + ", ".join(f"{_told(one)} without the {removed}" for removed, one in mean.items())
        + f" token; the last matters more than a random one in {more} of {known} layers.",
        frame=_rows(found, "trigger", "ratio"),
        figure=Figure(
            "line", "layer", "ratio", "layer", "change of the coefficient (%)", color="token", low="low", high="high",
            share=True,
        ),
        paper="first about -10 to -15 %, random -15 to -20 %, last -65 % in layer 1 rising to -20 % in layer 16",
        resampled="documents",
        notes=("sum of changes over sum of |m|: single small coefficients cannot blow it up",),
    )  # fmt: skip


def _retained(found: Removal) -> Finding:
    """Beside prefixes that were not chosen: how much of what is out of the ordinary is left."""
    frame = _rows(found, "trigger", "retained").rename({"retained": "share"})
    null = _rows(found, "random", "retained").select(
        "layer", "token", null="retained", null_low="low", null_high="high"
    )
    frame = frame.join(null, on=["layer", "token"], how="left")
    last: Effect = found.of(None, "trigger", "last")
    usual = found.of(None, "random", "last").retained
    return Finding(
        id="token-removal-null",
        items=("A9",),
        title="What is left of a trigger, beside ordinary prefixes",
        says=f"Without the last token {_told(last.retained)} of what was out of the ordinary is left in triggers and "
        f"{_told(usual)} in ordinary prefixes of the same neurons.",
        frame=frame,
        figure=Figure(
            "line", "layer", "share", "layer", "left of the deviation from the neuron's mean (%)", low="low",
            high="high", null="null", null_low="null_low", null_high="null_high", facet="token", share=True,
        ),
        null="the same removal from prefixes that are no triggers, same neurons and positions",
        resampled="documents",
        notes=("triggers are extremes, and fall back whatever is done to them; this slope does not",),
    )  # fmt: skip
