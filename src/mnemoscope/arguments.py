"""What the arguments of jobs may be: checked by the jobs, and by the command line before anything is loaded.

Nothing here needs a model, a run or torch, so that a slip of the finger is answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

from mnemoscope.errors import MnemoscopeError, ModelError, PatternError, QueryError, RunError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # short name, and torch's
LENSES = ("raw", "own", "frozen")
PROJECTIONS = ("adaptive", "flat")  # of a vector on tokens, where a model has an adaptive softmax
NULLS = ("random", "rotated", "shuffled", "chimera", "covariance")
DECOYS = ("chimera", "covariance")  # kinds of null units of which there is one for each neuron
DEFAULT_NULLS = ("random", "rotated")
MOST = 2**31 - 1  # that an argument can be which counts something
MOST_TRIGGERS = 10_000  # kept for a neuron and sign
ABLATED_TO = ("zero", "mean")

_ONE = r"(cpu|(cuda|mps|xpu)(:\d+)?)"
_DEVICE = re.compile(rf"(auto|all|{_ONE}(,{_ONE})*)\Z")


def check_loading(dtype: str = "auto", device: str = "auto") -> None:
    """ModelError for a dtype or a kind of device that there is not, or for several kinds; whether a device is there,
    torch knows."""
    if dtype not in ("auto", *DTYPES, *DTYPES.values()):
        raise ModelError(
            f"loading a model: {{dtype}} is not a precision; give auto, {', '.join(DTYPES)}", dtype=dtype
        )
    if not _DEVICE.match(device):
        raise ModelError(
            "loading a model: {device} is not a device; give auto, cpu, cuda (or cuda:1 ...), mps or xpu, several with "
            "commas between, or all",
            device=device,
        )
    if len({each.partition(":")[0] for each in device.split(",")}) > 1:
        raise ModelError(
            "loading a model: {device} are devices of several kinds, whose sums differ in their last bits; give "
            "devices of one kind",
            device=device,
        )


def check_neurons(units: str | None, doing: str) -> None:
    """QueryError where units that are not neurons are given to what asks about neurons; ``doing`` begins its line."""
    if units is not None:
        raise QueryError(
            f"{doing}: its units are {units}, and this asks about neurons of feed-forward layers; give a run of the "
            "model's own neurons, or leave out {units}",
            units=...,
        )


def check_build(top: int, nulls: Sequence[str], workers: int) -> None:
    """RunError for triggers, null units or processes that a build cannot have."""
    if not 1 <= top <= MOST_TRIGGERS:
        raise RunError(f"building a run: {{top}} triggers cannot be kept; give 1 to {MOST_TRIGGERS}", top=top)
    if workers < 1:
        raise RunError("building a run: {workers} processes do no work; give 1 or more", workers=workers)
    check_nulls(nulls)


ENGINES = ("processes", "ray")


def check_engine(engine: str, address: str | None) -> None:
    """RunError for an engine that there is none of or that is not installed, and for the address of a cluster where
    none is asked."""
    if engine not in ENGINES:
        raise RunError("building a run: {engine} is none; give " + " or ".join(ENGINES), engine=engine)
    if address is not None and engine != "ray":
        raise RunError(
            "building a run: {address} is of a cluster, and processes of this machine were to build; give {engine} too",
            address=address,
            engine="ray",
        )
    if engine == "ray" and find_spec("ray") is None:
        raise RunError(
            "building a run on a cluster: ray is not installed; pip install 'mnemoscope[ray]', or build with "
            "processes of this machine ({workers}), or in parts ({shard})",
            workers=...,
            shard=...,
        )


def parse_part(text: str) -> tuple[int, int]:
    """3/16: the fourth of sixteen parts; RunError for what is none."""
    number, slash, parts = text.partition("/")
    if slash and number.isdecimal() and parts.isdecimal() and len(text) < 32:
        return check_part(int(number), int(parts), text)
    raise _no_part(text)


def check_part(number: int, parts: int, given: str = "") -> tuple[int, int]:
    """RunError for a part that there is not."""
    if not 0 <= number < parts:
        raise _no_part(given or f"{number}/{parts}")
    return number, parts


def _no_part(given: str) -> RunError:
    return RunError(
        f"mining a part of a build: {given!r} in {{shard}} is none; give its number from 0 and how many there are, "
        "such as 3/16, of 0/16 to 15/16",
        shard=given,
    )


def check_nulls(kinds: Sequence[str]) -> None:
    """RunError for a kind of null units that is not known."""
    if unknown := [kind for kind in kinds if kind not in NULLS]:
        raise RunError(
            f"making null units: {unknown[0]!r} in {{nulls}} is not a kind of them; give some of {', '.join(NULLS)} "
            "with commas between, or none",
            nulls=",".join(kinds),
        )


def check_explanation(
    lens: str,
    top: int,
    ablate: int = 0,
    ablate_to: str | float = "zero",
    has_run: bool = True,
    projection: str = "adaptive",
) -> None:
    """QueryError for a lens, a projection, a length or an ablation that no explanation has."""
    doing = "explaining a prediction"
    if projection not in PROJECTIONS:
        raise QueryError(
            f"{doing}: {{projection}} is not a projection; give {either(PROJECTIONS)}", projection=projection
        )
    if lens not in LENSES:
        raise QueryError(f"{doing}: {{lens}} is not a lens; give {either(LENSES)}", lens=lens)
    check_least(doing, 1, top=top)
    check_least(doing, 0, ablate=ablate)
    if isinstance(ablate_to, str) and ablate_to not in ABLATED_TO:
        raise QueryError(
            f"{doing}: {{ablate_to}} is not a value to ablate to; give {', '.join(ABLATED_TO)} or a number",
            ablate_to=ablate_to,
        )
    if ablate and ablate_to == "mean" and not has_run:
        raise QueryError(
            f"{doing}: ablating to the mean needs the mean over a run; give one with {{run}}", run=...
        )


def check_question(
    prompt: str, target: str | None, foils: Sequence[str] = (), target_id: int | None = None
) -> None:
    """QueryError for texts of a prediction that are empty, and for two targets."""
    doing = "explaining a prediction"
    if prompt == "":
        raise QueryError(f"{doing}: the prompt is empty; give the text that comes before it")
    if target is not None and target_id is not None:
        raise QueryError(
            f"{doing}: both {{target}} and {{target_id}} were given; give one of them",
            target=target,
            target_id=target_id,
        )
    for role, text in (("target", target), *(("foil", foil) for foil in foils)):
        if text == "":
            raise QueryError(f"{doing}: the {role} is empty; give a word, with its leading space")


def check_budget(budget: int, seed: int = 0) -> None:
    """PatternError for a number of tokens that tests nothing."""
    check_least("testing patterns", 1, PatternError, budget=budget)
    check_seed(seed)


def check_removal(documents: int, per_layer: int, triggers: int, seed: int = 0) -> None:
    """QueryError for samples that are too small."""
    doing = "removing tokens from triggers"
    check_least(doing, 2, documents=documents, per_layer=per_layer, triggers=triggers)
    check_seed(seed)


def check_study(positions: int | None, sentences: int | None, seed: int = 0) -> None:
    """QueryError for samples that hold nothing; None is the usual size."""
    if positions is not None:
        check_least("studying", 1, positions=positions)
    if sentences is not None:
        check_least("studying", 1, sentences=sentences)
    check_seed(seed)


def check_verification(sample: int, seed: int = 0) -> None:
    """QueryError for a sample that checks nothing."""
    check_least("verifying a run", 1, sample=sample)
    check_seed(seed)


def check_seed(seed: int | None) -> None:
    """QueryError for what no generator begins with; None is for one that is drawn."""
    if seed is not None and not 0 <= seed < 2**32:
        raise QueryError(f"drawing at random: {{seed}} is no seed; give 0 to {2**32 - 1}", seed=seed)


def check_least(doing: str, least: int, error: type[MnemoscopeError] = QueryError, **given: int) -> None:
    """Raise `error` for the first argument, by its name, that is smaller than `least`, or too large for any place."""
    for name, value in given.items():
        if value < least:
            raise error(f"{doing}: {{{name}}} is too small; give {least} or more", **{name: value})
        if value > MOST:
            raise error(f"{doing}: {{{name}}} is too large; give {MOST:,} or less", **{name: value})


def check_sign(sign: str | None) -> int | None:
    """The polarity that a sign stands for: 1, -1, or None for either; QueryError for what is not a sign."""
    if sign not in (None, "+", "-"):
        raise QueryError("testing a pattern: {sign} is not a sign; give + or -", sign=sign)
    return None if sign is None else 1 if sign == "+" else -1


def either(names: Sequence[str]) -> str:
    """Two names or more, as a sentence lists them."""
    return f"{', '.join(names[:-1])} or {names[-1]}"
