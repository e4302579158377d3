"""The model as it will be run gives the logits that were taken apart: own attention, batches, masks, a longer input.

Parts are seen under one attention implementation (`Anatomy.attention`), one sequence at a time. Mining runs
right-padded batches without a mask under the model's own implementation, and a user runs it with a mask and a cache.
A registered attention function, a hook that looks at the batch, or a mask that is applied under one implementation
only would make that another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.parts import Anatomy
from mnemoscope.model.stream import Stream
from mnemoscope.model.watch import TOLERANCE, observed

LENGTH = 24  # tokens that are taken apart, where no window asks for more
WIDEST = 128  # the longest attention window that they still cross
SHORTER = 8  # tokens of the other input in the batch
SLACK = 4.0  # how much worse than eager attention another may be in half precision, where it has no fp32
_ADVICE = (
    'if the eager model is the one you mean, load it with attn_implementation="eager", or call '
    'set_attn_implementation("eager") on it'
)
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
_SHIPPED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
_BATCH, _MASK = "in a right-padded batch", "with an attention mask and a cache"


def drawn(anatomy: Anatomy, count: int, generator: torch.Generator) -> Int[Tensor, " token"]:
    """Random token ids whose embeddings are finite: rows that no text has may hold anything."""
    device = anatomy.unembedding().device
    ids = torch.randint(anatomy.vocabulary, (count,), generator=generator).to(device)
    for _ in range(8):
        bad = ~anatomy.token_vectors(ids).isfinite().all(-1)
        if not bool(bad.any()):
            break
        ids[bad] = torch.randint(anatomy.vocabulary, (int(bad.sum()),), generator=generator).to(device)
    return ids


@torch.no_grad()
def check_as_run(stream: Stream, generator: torch.Generator) -> None:
    """`ModelNotSupported` if the model as it will be run differs from what was traced by more than rounding.

    The traced tokens and a shorter input go through the model once as mining runs it and once as a user does,
    in fp32. An implementation that has no fp32 (flash attention) is compared in the model's own dtype, where it may
    be `SLACK` times as far off as eager attention.
    """
    shorter = drawn(stream.anatomy, min(SHORTER, len(stream.tokens)), generator)
    with observed(stream.hf, upcast=True, attention=stream.anatomy.attention):
        alone = stream.hf(input_ids=shorter[None], use_cache=False).logits[0].float()
    _compare(stream.hf, stream.anatomy, [stream.tokens, shorter], [stream.logits.float(), alone])
    _check_dtypes(stream.hf, stream.anatomy, shorter)


@torch.no_grad()
def check_traced(stream: Stream) -> None:
    """`ModelNotSupported` if an attention function of the user's own gives other logits for the tokens of a trace.

    A function may begin to differ beyond the few tokens of the check on load (a window of its own). The
    implementations that transformers ships are known not to.
    """
    if implementation(stream.hf) not in _SHIPPED:
        _compare(stream.hf, stream.anatomy, [stream.tokens], [stream.logits.float()])


def _compare(hf: PreTrainedModel, anatomy: Anatomy, inputs: list[Tensor], truth: list[Tensor]) -> None:
    """Compare each input's logits as the model will be run with those that were taken apart."""
    try:
        with observed(hf, upcast=True, attention=None):
            logits_by_way = dict(_as_run(hf, inputs))
        allowed = TOLERANCE
    except (ImportError, RuntimeError, TypeError, ValueError) as first:
        with _or_refused(hf, anatomy, first), observed(hf, upcast=False, attention=None):
            logits_by_way = dict(_as_run(hf, inputs))
        with observed(hf, upcast=False, attention=anatomy.attention):
            allowed = SLACK * max(_error(logits, truth) for _, logits in _as_run(hf, inputs))
    for how, logits in logits_by_way.items():
        error = _error(logits, truth)
        if not error <= allowed:
            raise _differs(hf, anatomy, how, error, allowed)


def _check_dtypes(hf: PreTrainedModel, anatomy: Anatomy, tokens: Tensor) -> None:
    """A model with weights in several dtypes must also run as it is: in fp32 they are all alike."""
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in hf.parameters()})
    if len(dtypes) == 1:
        return
    try:
        with observed(hf, upcast=False, attention=None):
            hf(input_ids=tokens[None], use_cache=False)
    except RuntimeError as error:
        raise ModelNotSupported(
            f"running a {anatomy.family!r} model whose weights are in {' and '.join(dtypes)}: "
            f"{str(error).strip().splitlines()[0]}; convert it to one of them (hf.to(torch.{dtypes[0]}))"
        ) from error


def _as_run(hf: PreTrainedModel, inputs: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Logits of each input, by how they were got."""
    lengths = [len(ids) for ids in inputs]
    rows = [torch.cat([ids, ids[-1:].expand(max(lengths) - len(ids))]) for ids in inputs]
    tokens = torch.stack(rows)
    mask = torch.arange(max(lengths), device=tokens.device)[None] < tokens.new_tensor(lengths)[:, None]
    for how, options in ((_BATCH, {"use_cache": False}), (_MASK, {"attention_mask": mask.long()})):
        logits = hf(input_ids=tokens, **options).logits
        yield how, [row[:length].float() for row, length in zip(logits, lengths, strict=True)]


def tokens_to_check(hf: PreTrainedModel, anatomy: Anatomy) -> int:
    """How many to take apart: beyond the attention window if that is small, and never beyond the context."""
    config = hf.config.get_text_config()
    windows = [getattr(config, name, None) for name in _WINDOWS]
    small = [window for window in windows if isinstance(window, int) and window <= WIDEST]
    return min(max([LENGTH, *(window + 4 for window in small)]), anatomy.context_length)


def _error(logits: list[Tensor], truth: list[Tensor]) -> float:
    """The largest difference as a share of the range of the logits."""
    pairs = list(zip(logits, truth, strict=True))
    return max(float((a - b).abs().max() / (b.max() - b.min())) for a, b in pairs)


def implementation(hf: PreTrainedModel) -> str:
    """The name of a model's own attention implementation."""
    return str(getattr(hf.config.get_text_config(), "_attn_implementation", None))


@contextmanager
def _or_refused(hf: PreTrainedModel, anatomy: Anatomy, first: Exception) -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError):
        reason = (str(first).strip().splitlines() or ["no reason given"])[0].rstrip(".")
        raise ModelNotSupported(
            f"running a {anatomy.family!r} model with its attention implementation {implementation(hf)!r}: "
            f"{type(first).__name__}: {reason}; {_ADVICE}"
        ) from first


class RunsOtherwise(ModelNotSupported):
    """The parts add up, but not to the logits of the model as it will be run."""


def _differs(hf: PreTrainedModel, anatomy: Anatomy, how: str, error: float, allowed: float) -> RunsOtherwise:
    size = f"by {error:.1e} of their range (limit {allowed:.1g})"
    running = implementation(hf)
    if running == anatomy.attention:
        return RunsOtherwise(
            f"checking a {anatomy.family!r} model as it is run: {how} its logits differ {size} from those of each "
            "input alone, so what is read in batches would be another model; remove what depends on the batch, "
            "the mask or the padding (a hook, a patched forward method)"
        )
    return RunsOtherwise(
        f"checking a {anatomy.family!r} model as it is run: {how} its logits under the attention implementation "
        f"{running!r} differ {size} from those under {anatomy.attention!r}, in which its parts are seen; {_ADVICE}"
    )
