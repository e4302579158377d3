"""The self-check: the parts of an anatomy add up to the model's own logits, layer by layer, and as it will be run.

Parts are seen under one attention implementation (`Anatomy.attention`), one sequence at a time. Mining runs
right-padded batches without a mask under the model's own implementation, and a user runs it with a mask and a cache.
A registered attention function, a hook that looks at the batch, or a mask that is applied under one implementation
only would make that another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.packed import ordinary, packings, unpacked
from mnemoscope.model.parts import Anatomy, Attention, SourceText
from mnemoscope.model.reading import candidates, refused
from mnemoscope.model.running import hooked, observed, plainly
from mnemoscope.model.stream import Stream, trace
from mnemoscope.model.watch import TOLERANCE, AttentionTrace, EndOfPass, failed, flat, watch

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
_LOST = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_BATCH, _MASK = "in a right-padded batch", "with an attention mask and a cache"


@plainly()
def examine(hf: PreTrainedModel) -> tuple[Anatomy, float]:
    """The anatomy whose parts add up, and its `self_check`; `ModelNotSupported` if there is none.

    A family in the table has one candidate; for another decoder all fitting layouts are tried in turn. Where a
    model under "sdpa" differs from itself under "eager" (ALiBi in Falcon), it is taken apart under "sdpa".
    """
    failure: ModelNotSupported | None = None
    try:
        _settle(hf)
        for anatomy in _ways(hf):
            if anatomy.attention != "eager" and not isinstance(failure, RunsOtherwise):
                continue
            try:
                return anatomy, self_check(hf, anatomy)
            except ModelNotSupported as error:
                failure = failure or error
            except _LOST as error:
                failure = failure or _not_followed(anatomy, error)
    except _LOST as error:
        raise failure or refused(
            str(hf.config.get_text_config().model_type), f"a part of it cannot be measured ({_told(error)})"
        ) from error
    assert failure is not None, "candidates() gives at least one anatomy or raises"
    raise failure


@torch.no_grad()
def _settle(hf: PreTrainedModel) -> None:
    """Run a model with packed weights once: some libraries rearrange them then, or unpack them for good."""
    if packings(hf):
        with observed(hf, upcast=False, attention=None):
            tokens = torch.ones(1, 2, dtype=torch.long, device=hf.device)
            pair = getattr(hf.config, "is_encoder_decoder", False) and hf.get_decoder() is not hf.base_model
            hf(input_ids=tokens, **({"decoder_input_ids": tokens} if pair else {}))


def _ways(hf: PreTrainedModel) -> Iterator[Anatomy]:
    """Each layout, seen under eager attention, and then under the model's own if that can be taken apart."""
    for anatomy in candidates(hf):
        yield anatomy
        if implementation(hf) == "sdpa":
            yield replace(anatomy, attention="sdpa")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


def _not_followed(anatomy: Anatomy, error: Exception) -> ModelNotSupported:
    """A pass that did not end: of a layout guessed for an unlisted family, or of a model that cannot be watched."""
    reason = _told(error)
    doing = f"checking that the parts of a {anatomy.family!r} model add up"
    if not anatomy.known:
        return ModelNotSupported(
            f"{doing}: it has no row in the table, and the generic rule could not follow it ({reason})"
        )
    return ModelNotSupported(
        f"{doing}: a forward pass over a few tokens failed ({reason}); if its forward method was compiled or "
        "replaced, give the model as it was before"
    )


@plainly()
@torch.no_grad()
def self_check(hf: PreTrainedModel, anatomy: Anatomy, *, seed: int = 0) -> float:
    """Rebuild the logits of a short random input from all parts; the largest error as a share of their range.

    In fp32: embeddings, every head x source, every neuron and every bias are summed, taken through the final
    norm and the unembedding, and compared with the model's own logits. On the way the parts of each layer are
    compared with what it did, and its norms, keys and activation with what the model computed, so that
    `ModelNotSupported` names the first layer that fails, where in it, and by how much (limit `TOLERANCE`).
    Parts are seen under eager attention; that they are also those of the model as it will be run (its own
    attention implementation, batches, masks, a longer input) is checked last (`check_as_run`).
    """
    generator, source = torch.Generator().manual_seed(seed), None
    worst = 0.0
    if anatomy.stacks:
        worst = self_check(hf.get_encoder(), anatomy.stacks[0], seed=seed)
        source = drawn(anatomy.stacks[0], LENGTH + 3, generator)[None]
    sample = drawn(anatomy, tokens_to_check(hf, anatomy), generator)
    stream = trace(hf, anatomy, sample[None], source, upcast=True)
    anatomy = stream.anatomy
    _check_embedding(stream)
    logits = stream.logits.float()
    if not bool(logits.isfinite().all()):
        raise ModelNotSupported(
            f"checking a {anatomy.family!r} model: its own logits for a short random input are not finite; "
            "its weights are damaged, or overflow in fp32"
        )
    _check_across(stream)
    rebuilt = stream.embedding.float()
    for index in range(anatomy.n_layers):
        _check_attention(stream, index)
        _check_ffn(stream, index)
        rebuilt = stream.attended(index, rebuilt)
        rebuilt = stream.onward(rebuilt + stream.ffn_update(index), 2 * index + 1)
    rebuilt = stream.onward(rebuilt, 2 * anatomy.n_layers)
    norm = anatomy.final_norm
    if norm is not None:
        rebuilt = norm.frozen(rebuilt, stream.final)
        rebuilt = rebuilt if norm.bias is None else rebuilt + norm.bias
    error = float((anatomy.logits(rebuilt) - logits).abs().max() / (logits.max() - logits.min()))
    if not error <= TOLERANCE:
        raise ModelNotSupported(
            f"checking a {anatomy.family!r} model: every layer adds up, but the logits rebuilt from them "
            f"differ by {error:.2g} of their range (limit {TOLERANCE:g}): final norm, head or multiplier"
        )
    check_as_run(stream, generator)
    return max(error, worst)


def _check_embedding(stream: Stream) -> None:
    """What layer 0 receives beyond the token vectors must depend on positions only."""
    anatomy, tokens = stream.anatomy, stream.tokens
    other = tokens.flip(0)
    with observed(stream.hf, upcast=True):
        if anatomy.of_encoder:
            _check_alone(stream)
            return
        rests = [_first_input(stream, ids) - anatomy.token_vectors(ids) for ids in (tokens, other)]
    error = _difference(rests[0], rests[1], stream.embedding)
    if not error <= TOLERANCE:
        raise failed(anatomy, 0, "embedding", _off("the token vectors", error))


def _check_alone(stream: Stream) -> None:
    """What layer 0 of an encoder receives is of its own token and position, whatever norms and maps it went through."""
    anatomy, tokens = stream.anatomy, stream.tokens
    other = torch.where(torch.arange(len(tokens), device=tokens.device) % 2 == 0, tokens, tokens.flip(0))
    kept = tokens == other
    seen = _first_input(stream, other)
    error = _difference(seen[kept], stream.embedding[kept], stream.embedding[kept])
    if not error <= TOLERANCE:
        raise failed(anatomy, 0, "embedding", _off("what a token enters with beside other tokens", error))


def _first_input(stream: Stream, tokens: Tensor) -> Tensor:
    anatomy, residuals = stream.anatomy, list[Tensor]()

    def stop(_: str, residual: Tensor) -> NoReturn:
        residuals.append(flat(residual))
        raise EndOfPass

    with hooked(watch(anatomy.layers[0], ("lin",), stop)), suppress(EndOfPass):
        stream.hf(**anatomy.calling(tokens[None], source=_source(stream)))
    assert residuals, f"a forward pass of {anatomy.family} ended without entering its first block"
    return residuals[0]


def _source(stream: Stream) -> SourceText | None:
    return None if stream.source is None else SourceText(stream.source[None])


def _check_attention(stream: Stream, index: int) -> None:
    anatomy, block, traced = stream.anatomy, stream.anatomy.layers[index], stream.layers[index]
    _check_heads(stream, index, "attention", block, traced)
    ahead = traced.alpha.float().triu(1)
    if not anatomy.bidirectional:
        _require(
            stream, index, "attention", "weights looking ahead", ahead, torch.zeros_like(ahead), whole=True
        )
    if block.cross is not None and traced.cross is not None:
        _check_heads(stream, index, "cross attention", block.cross, traced.cross)
    if not anatomy.parallel:
        after = stream.attended(index, traced.lin.float())
        _require(stream, index, "attention", "its update of the residual", after, traced.lres)


def _check_heads(stream: Stream, index: int, where: str, block: Attention, traced: AttentionTrace) -> None:
    read = traced.lin.float() if block.input_norm is None else block.input_norm(traced.lin.float())
    mixed = traced.weighted(slice(None), traced.alpha.float() @ traced.value.float())
    mixed = mixed.transpose(0, 1).reshape(traced.mixed.shape)
    _require(stream, index, where, "the input norm", read, traced.attention_input)
    _require(stream, index, where, "weights x values", mixed, traced.mixed)
    written = (mixed.float() @ flat(block.heads()).float()) + _or_zero(traced.fixed(block, slice(None)))
    _require(stream, index, where, "heads x sources and bias", written, traced.attention_output)


def _check_across(stream: Stream) -> None:
    """Cross attention must read what the encoder makes of the source by itself."""
    if stream.source is None:
        return
    with observed(stream.hf, upcast=True, attention=stream.anatomy.attention):
        states = stream.hf.get_encoder()(stream.source[None]).last_hidden_state
    for index, traced in enumerate(stream.layers):
        args, kwargs = ((), {}) if traced.cross is None else traced.cross.call
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        read = next((value for value in given if value.shape == states.shape), torch.zeros_like(states))
        _require(stream, index, "cross attention", "the last stream of the encoder", read[0], states[0])


def _check_ffn(stream: Stream, index: int) -> None:
    anatomy, block, traced = stream.anatomy, stream.anatomy.layers[index], stream.layers[index]
    source = traced.lin if anatomy.parallel else traced.lres
    read = source.float() if block.ffn_norm is None else block.ffn_norm(source.float())
    _require(stream, index, "FFN", "the input norm", read, traced.ffn_input)
    _check_keys(stream, index, read)
    bias = stream.down_bias(index, slice(None))
    written = stream.neurons_written(index) + _or_zero(bias)
    _require(stream, index, "FFN", "neurons and bias", written, traced.ffn_output)
    where = "attention and FFN, which are parallel," if anatomy.parallel else "FFN"
    before = traced.lin.float() + stream.attention_update(index) if anatomy.parallel else traced.lres.float()
    after = stream.onward(before + stream.ffn_update(index), 2 * index + 1)
    _require(stream, index, where, "its update of the residual", after, traced.lout)


def _check_keys(stream: Stream, index: int, read: Tensor) -> None:
    """Pre-activations are products with the keys, and coefficients what the activation makes of them."""
    block, traced = stream.anatomy.layers[index], stream.layers[index]
    for group, rows in enumerate(block.rows()):
        # Of what was not routed there is nothing to compare.
        ran = slice(None) if traced.weights is None else traced.weights[:, group] != 0
        x, gate, coefficients = (
            read[ran],
            traced.gate[ran, rows.neurons],
            traced.coefficients[ran, rows.neurons],
        )
        if not len(x):
            continue
        if traced.scores is not None:
            x = x * traced.scores[ran, group, None]
        keyed = x @ rows.keys.float().T + _or_zero(rows.key_bias)
        _require(stream, index, "FFN", "the keys", keyed, gate)
        up = None
        if traced.up is not None and rows.ups is not None:
            up = traced.up[ran, rows.neurons]
            keyed = x @ rows.ups.float().T + _or_zero(rows.up_bias)
            _require(stream, index, "FFN", "the up keys", keyed, up)
        active = block.activated(group, gate.float(), None if up is None else up.float())
        _require(stream, index, "FFN", "activation (x up)", active, coefficients)


def _or_zero(bias: Tensor | None) -> Tensor | float:
    return 0.0 if bias is None else bias.float()


def _require(
    stream: Stream, index: int, where: str, what: str, built: Tensor, seen: Tensor, *, whole: bool = False
) -> None:
    error = float(built.abs().max()) if whole else _difference(built, seen, seen)
    if not error <= TOLERANCE:
        raise failed(stream.anatomy, index, where, _off(what, error))


def _difference(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """The largest difference of two [token, ...] tensors, relative to the token's largest entry in ``scale``.

    Per token, because a first position with massive activations would hide errors everywhere else.
    """
    size = scale.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((a.float() - b.float()).abs().amax(-1) / size).max())


def _off(what: str, error: float) -> str:
    return f"{what} differs from what the model computed by {error:.2g} relative (limit {TOLERANCE:g})"


# -- The model as it will be run gives the same logits: own attention, batches, masks, a longer input --------


def drawn(anatomy: Anatomy, count: int, generator: torch.Generator) -> Int[Tensor, " token"]:
    """Random token ids whose embeddings are finite: rows that no text has may hold anything."""
    device = anatomy.unembedding().device
    ids = torch.randint(anatomy.vocabulary, (count,), generator=generator).to(device)
    # An encoder counts positions without its padding, and may read a masked token by a rule of its own.
    apart = [getattr(anatomy.body, "config", None)] if anatomy.of_encoder else []
    special = [getattr(config, name, None) for config in apart for name in ("pad_token_id", "mask_token_id")]
    never = torch.tensor(
        [token for token in special if isinstance(token, int)], dtype=torch.long, device=device
    )
    for _ in range(8):
        bad = torch.isin(ids, never) | ~anatomy.token_vectors(ids).isfinite().all(-1)
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
    hf, anatomy = stream.hf, stream.anatomy
    tokens = drawn(anatomy, min(SHORTER, len(stream.tokens)), generator)
    shorter = _Input(tokens, None if stream.source is None else stream.source[: SHORTER + 1])
    with observed(hf, upcast=True, attention=anatomy.attention):
        alone = anatomy.outputs(hf(**shorter.calling(anatomy)))[0].float()
    inputs, truth = [_Input.of(stream), shorter], [stream.logits.float(), alone]
    _compare(hf, anatomy, inputs, truth)
    _check_packed(hf, anatomy, inputs, truth)
    _check_dtypes(hf, anatomy, shorter)


@torch.no_grad()
def check_traced(stream: Stream) -> None:
    """`ModelNotSupported` if an attention function of the user's own gives other logits for the tokens of a trace.

    A function may begin to differ beyond the few tokens of the check on load (a window of its own). The
    implementations that transformers ships are known not to.
    """
    if implementation(stream.hf) not in _SHIPPED:
        _compare(stream.hf, stream.anatomy, [_Input.of(stream)], [stream.logits.float()])


class _Input(NamedTuple):
    """What a model reads: of an encoder-decoder the decoder's tokens, and the encoder's."""

    tokens: Int[Tensor, " token"]
    source: Int[Tensor, " source"] | None

    @classmethod
    def of(cls, stream: Stream) -> _Input:
        return cls(stream.tokens, stream.source)

    def calling(self, anatomy: Anatomy) -> dict[str, Any]:
        source = None if self.source is None else SourceText(self.source[None])
        return anatomy.calling(self.tokens[None], source=source)


def _compare(hf: PreTrainedModel, anatomy: Anatomy, inputs: list[_Input], truth: list[Tensor]) -> None:
    """Compare each input's logits as the model will be run with those that were taken apart."""
    try:
        with observed(hf, upcast=True, attention=None):
            logits_by_way = dict(_as_run(hf, anatomy, inputs))
        allowed = TOLERANCE
    except (ImportError, RuntimeError, TypeError, ValueError) as first:
        with _or_refused(hf, anatomy, first), observed(hf, upcast=False, attention=None):
            logits_by_way = dict(_as_run(hf, anatomy, inputs))
        with observed(hf, upcast=False, attention=anatomy.attention):
            allowed = SLACK * max(_error(logits, truth) for _, logits in _as_run(hf, anatomy, inputs))
    for how, logits in logits_by_way.items():
        error = _error(logits, truth)
        if not error <= allowed:
            raise _differs(hf, anatomy, how, error, allowed)


def _check_packed(hf: PreTrainedModel, anatomy: Anatomy, inputs: list[_Input], truth: list[Tensor]) -> None:
    """A model with packed weights, run as it is, must be that of its weights multiplied out: to `TOLERANCE`, or to
    `SLACK` times what is lost where these are multiplied in half precision, as some modules do.
    """
    names = packings(hf)
    if not names:
        return

    def furthest() -> float:
        return max(_error(logits, truth) for _, logits in _as_run(hf, anatomy, inputs))

    with observed(hf, upcast=False, attention=None):
        error = furthest()
        with unpacked(hf, torch.bfloat16):
            allowed = max(TOLERANCE, SLACK * furthest())
    if not error <= allowed:
        raise ModelNotSupported(
            f"checking a {anatomy.family!r} model with packed weights ({', '.join(names)}): run as it is, its logits "
            f"differ by {error:.1e} of their range from those of its weights multiplied out (limit {allowed:.1g}), so "
            "more than the weights is rounded; pack the weights only, or load it without quantisation"
        )


def _check_dtypes(hf: PreTrainedModel, anatomy: Anatomy, given: _Input) -> None:
    """A model with weights in several dtypes must also run as it is: in fp32 they are all alike."""
    weights = filter(ordinary, hf.parameters())
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    if len(dtypes) == 1:
        return
    try:
        with observed(hf, upcast=False, attention=None):
            hf(**given.calling(anatomy))
    except RuntimeError as error:
        raise ModelNotSupported(
            f"running a {anatomy.family!r} model whose weights are in {' and '.join(dtypes)}: "
            f"{str(error).strip().splitlines()[0]}; convert it to one of them (hf.to(torch.{dtypes[0]}))"
        ) from error


def _as_run(
    hf: PreTrainedModel, anatomy: Anatomy, inputs: list[_Input]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Logits of each input, by how they were got."""
    tokens, mask = _padded([each.tokens for each in inputs])
    texts = [each.source for each in inputs if each.source is not None]
    source = SourceText(*_padded(texts)) if texts else None
    ways = [(_BATCH, anatomy.calling(tokens, mask, source))]
    if not anatomy.bidirectional:
        own = "attention_mask" if source is None else "decoder_attention_mask"
        call = {name: value for name, value in ways[0][1].items() if name != "use_cache"}
        # transformers runs no model of mixers alone with a cache.
        kept = {} if any(layer.attention for layer in anatomy.layers) else {"use_cache": False}
        ways.append((_MASK, {**call, own: mask} | kept))
    for how, call in ways:
        logits = anatomy.outputs(hf(**call))
        yield how, [row[: len(each.tokens)].float() for row, each in zip(logits, inputs, strict=True)]


def _padded(texts: list[Tensor]) -> tuple[Int[Tensor, "context token"], Int[Tensor, "context token"]]:
    """Texts side by side, filled up with their last tokens, and a mask of the padding."""
    longest = max(map(len, texts))
    rows = torch.stack([torch.cat([ids, ids[-1:].expand(longest - len(ids))]) for ids in texts])
    lengths = rows.new_tensor([len(ids) for ids in texts])
    return rows, (torch.arange(longest, device=rows.device)[None] < lengths[:, None]).long()


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
