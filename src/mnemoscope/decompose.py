"""The residual stream of one forward pass as an exact sum of parts (A30-A33; G4-G6, G8).

`trace` runs a model once on one sequence and keeps what the parts are made of: attention weights, value
vectors, coefficients, residuals. `Stream` multiplies them out on demand. `self_check` shows that the parts
of an `Anatomy` add up to the model's own logits, layer by layer.

Attention weights are seen, not recomputed: under the "eager" implementation the last matrix product before
the output projection is ``weights @ values`` in every family, whatever masks, positions, caps or norms came
before. That this is what the output projection reads is part of the check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mnemoscope.anatomy import Anatomy, Layer, Norm, candidates
from mnemoscope.errors import ModelNotSupported

_HALF = (torch.bfloat16, torch.float16)
TOLERANCE = 1e-4  # of the logit range for logits, of the largest entry of the vector for everything else


# -- what one pass leaves behind -----------------------------------------------------------------------------


@dataclass(eq=False)
class LayerTrace:
    """What one block saw and did, for one sequence, in the dtype of the pass.

    ``lres`` is the residual after attention; in parallel blocks, which have no such point, ``lin`` plus the
    attention update (G5). ``value`` is given per query head: heads that share a key-value head have equal
    rows (G6), and a bias of the value projection is inside it, which is exact because weights add up to 1
    (G8). ``*_output`` are the outputs of the two output projections, before post-norm and multiplier.
    """

    lin: Float[Tensor, "token width"]
    lres: Float[Tensor, "token width"]
    lout: Float[Tensor, "token width"]
    alpha: Float[Tensor, "head token source"]
    value: Float[Tensor, "head source dimension"]
    mixed: Float[Tensor, "token heads_x_dimension"]  # input of the attention output projection
    attention_input: Float[Tensor, "token width"]
    attention_output: Float[Tensor, "token width"]
    ffn_input: Float[Tensor, "token width"]
    gate: Float[Tensor, "token neuron"]  # pre-activation
    up: Float[Tensor, "token neuron"] | None
    coefficients: Float[Tensor, "token neuron"]
    ffn_output: Float[Tensor, "token width"]
    call: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)  # how the attention module was called


@dataclass(eq=False)
class Stream:
    """One forward pass taken apart.

    Parts are fp32 and carry frozen post-norms and multipliers: at every position (0-based) the embedding
    plus ``attention_parts``, ``attention_bias``, ``neuron_parts`` and ``ffn_bias`` of all layers add up to
    ``final``.
    """

    hf: PreTrainedModel = field(repr=False)
    anatomy: Anatomy = field(repr=False)
    tokens: Int[Tensor, " token"]
    layers: tuple[LayerTrace, ...] = field(repr=False)
    logits: Float[Tensor, "token vocabulary"] = field(repr=False)  # the model's own
    upcast: bool

    @property
    def embedding(self) -> Float[Tensor, "token width"]:
        """Lin0: what enters the first block, positions included where they are added."""
        return self.layers[0].lin

    @property
    def final(self) -> Float[Tensor, "token width"]:
        """The last Lout, which the final norm reads."""
        return self.layers[-1].lout

    def points(self, position: int) -> Float[Tensor, "point width"]:
        """The 2L+1 residuals Lin0, Lres0, Lout0, Lres1, ... at a position (A30), fp32."""
        rows = [self.embedding[position]]
        for traced in self.layers:
            rows += [traced.lres[position], traced.lout[position]]
        return torch.stack(rows).float()

    def attention_parts(self, layer: int, position: int) -> Float[Tensor, "head source width"]:
        """What each head writes from each source up to ``position`` (A32)."""
        traced, part = self.layers[layer], self.anatomy.layers[layer]
        alpha = traced.alpha[:, position, : position + 1].float()
        written = (alpha[..., None] * traced.value[:, : position + 1].float()) @ part.heads().float()
        return self._folded(written, part.post_attention_norm, traced.attention_output[position])

    def attention_bias(self, layer: int, position: int) -> Float[Tensor, " width"]:
        """What the attention of a layer writes whatever it attends to."""
        traced, part = self.layers[layer], self.anatomy.layers[layer]
        return self._bias(part.out_bias(), part.post_attention_norm, traced.attention_output[position])

    def neuron_parts(
        self, layer: int, position: int, neurons: Int[Tensor, " neuron"] | None = None
    ) -> Float[Tensor, "neuron width"]:
        """What each neuron writes, coefficient times value (A33); all neurons of the layer by default."""
        traced, part = self.layers[layer], self.anatomy.layers[layer]
        coefficients, values = traced.coefficients[position], part.values()
        if neurons is not None:
            coefficients, values = coefficients[neurons], values[neurons]
        written = coefficients.float()[:, None] * values.float()
        return self._folded(written, part.post_ffn_norm, traced.ffn_output[position])

    def ffn_bias(self, layer: int, position: int) -> Float[Tensor, " width"]:
        """What the FFN of a layer writes whatever it detects."""
        traced, part = self.layers[layer], self.anatomy.layers[layer]
        return self._bias(part.down_bias(), part.post_ffn_norm, traced.ffn_output[position])

    def attention_update(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all heads x sources and the bias, at every position, from weights and values."""
        traced, part = self.layers[layer], self.anatomy.layers[layer]
        mixed = traced.alpha.float() @ traced.value.float()
        written = (mixed @ part.heads().float()).sum(0)
        bias = self._bias(part.out_bias(), part.post_attention_norm, traced.attention_output)
        return self._folded(written, part.post_attention_norm, traced.attention_output) + bias

    def ffn_update(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all neurons and the bias, at every position, from coefficients and values."""
        traced, part = self.layers[layer], self.anatomy.layers[layer]
        written = traced.coefficients.float() @ part.values().float()
        bias = self._bias(part.down_bias(), part.post_ffn_norm, traced.ffn_output)
        return self._folded(written, part.post_ffn_norm, traced.ffn_output) + bias

    def attend(
        self, layer: int, lin: Float[Tensor, "token width"]
    ) -> tuple[Float[Tensor, "head token source"], Float[Tensor, "head source dimension"]]:
        """Attention weights and value vectors if the residual entering ``layer`` were ``lin`` (A53, A54)."""
        part, (args, kwargs) = self.anatomy.layers[layer], self.layers[layer].call
        witness = _Witness(part, _Products())
        x = lin.to(self.embedding.dtype)[None]
        handle = part.attention_out.register_forward_pre_hook(witness.mix)
        with torch.no_grad(), _hooked([handle]), _observed(self.hf, upcast=self.upcast), witness.recorder:
            if part.input_norm is not None and part.input_norm.module is not None:
                x = part.input_norm.module(x)
            if args:
                part.attention(x, *args[1:], **kwargs)
            else:
                part.attention(**{**kwargs, "hidden_states": x})
        return _heads(witness.product, part.n_heads)

    def _folded(self, written: Tensor, norm: Norm | None, output: Tensor) -> Tensor:
        """``written`` through the post-norm frozen at its output, and the residual multiplier (G4)."""
        if norm is not None:
            scale = norm.scale(output)
            written = norm.linear(written, scale)
        return written * self.anatomy.residual_multiplier

    def _bias(self, bias: Tensor | None, norm: Norm | None, output: Tensor) -> Tensor:
        written = (
            torch.zeros_like(output, dtype=torch.float32) if bias is None else bias.float().expand_as(output)
        )
        written = self._folded(written, norm, output)
        if norm is not None and norm.bias is not None:
            written = written + norm.bias * self.anatomy.residual_multiplier
        return written


# -- one pass ------------------------------------------------------------------------------------------------


@torch.no_grad()
def trace(
    hf: PreTrainedModel, anatomy: Anatomy, tokens: Int[Tensor, "1 token"], *, upcast: bool = False
) -> Stream:
    """Run the whole model once on one sequence, without a cache, and keep what every part did.

    Keeps O(layers x token x (neurons + head x token)) numbers. ``upcast`` runs a bf16 or fp16 model in
    fp32, by widening one module's weights at a time while it runs: the most extra memory is its largest
    single weight. The model's mode, attention implementation and weights are put back, also after an error.
    """
    recorder = _Products()
    witnesses = [_Witness(part, recorder) for part in anatomy.layers]
    handles = [handle for witness in witnesses for handle in witness.handles()]
    with _hooked(handles), _observed(hf, upcast=upcast), recorder:
        logits = hf(input_ids=tokens, use_cache=False).logits[0]
    layers = tuple(witness.trace(index, anatomy) for index, witness in enumerate(witnesses))
    return Stream(hf, anatomy, tokens[0], layers, logits, upcast)


class _Products(TorchFunctionMode):
    """Remembers the operands of the last matrix product, until ``settle`` hands them out."""

    _FUNCTIONS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__})

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._FUNCTIONS and len(args) == 2:
            self.last = (args[0], args[1])
        return func(*args, **(kwargs or {}))

    def settle(self) -> tuple[Tensor, Tensor] | None:
        settled, self.last = self.last, None
        return settled


def _heads(operands: tuple[Tensor, Tensor] | None, n_heads: int) -> tuple[Tensor, Tensor]:
    """Both operands of ``weights @ values`` as [head, ...]; a value shared by all heads is repeated."""
    if operands is None:
        raise ModelNotSupported(
            "taking attention apart: no product of attention weights and values was seen before the output "
            "projection; load the model with attn_implementation='eager'"
        )
    alpha, value = (operand.reshape(-1, *operand.shape[-2:]) for operand in operands)
    return alpha, value.expand(n_heads, -1, -1)


class _Witness:
    """What one block was seen to do; its methods are the hooks."""

    def __init__(self, part: Layer, recorder: _Products) -> None:
        self.part, self.recorder = part, recorder
        self.seen: dict[str, Tensor] = {}
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.product: tuple[Tensor, Tensor] | None = None

    def handles(self) -> list[Any]:
        part, norm = self.part, self.part.ffn_norm
        handles = [
            part.module.register_forward_pre_hook(self.enter, with_kwargs=True),
            part.module.register_forward_hook(self.leave),
            part.attention.register_forward_pre_hook(self.attend, with_kwargs=True),
            part.attention_out.register_forward_pre_hook(self.mix),
            part.attention_out.register_forward_hook(partial(self.keep, "attention_output")),
            part.gate.module.register_forward_hook(self.detect),
            part.down.register_forward_pre_hook(partial(self.read, "coefficients")),
            part.down.register_forward_hook(partial(self.keep, "ffn_output")),
        ]
        if part.up is not None and part.up.module is not part.gate.module:
            handles.append(part.up.module.register_forward_hook(self.detect_up))
        if norm is not None and norm.module is not None:
            handles.append(norm.module.register_forward_pre_hook(partial(self.read, "ffn_norm_input")))
        return handles

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen["lin"] = _hidden(args, kwargs)

    def leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self.seen["lout"] = _flat(output[0] if isinstance(output, tuple) else output)

    def attend(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = (args, kwargs)
        self.seen["attention_input"] = _hidden(args, kwargs)

    def mix(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.product = self.recorder.settle()
        self.seen["mixed"] = _flat(args[0])

    def detect(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.seen["ffn_input"] = _flat(args[0])
        self.seen["gate"] = _flat(self.part.gate.of(output))
        if self.part.up is not None and self.part.up.module is self.part.gate.module:
            self.seen["up"] = _flat(self.part.up.of(output))

    def detect_up(self, _: nn.Module, __: Any, output: Tensor) -> None:
        assert self.part.up is not None
        self.seen["up"] = _flat(self.part.up.of(output))

    def read(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen[name] = _flat(args[0])

    def keep(self, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        # A copy, because Falcon adds to its FFN's output in place.
        self.seen[name] = _flat(output).clone()

    def trace(self, index: int, anatomy: Anatomy) -> LayerTrace:
        seen = dict(self.seen)
        for name, what in _NEEDED.items():
            if name not in seen:
                raise _failed(anatomy, index, "layer", f"its {what} was never called")
        read = seen.pop("ffn_norm_input", seen["ffn_input"])
        alpha, value = _heads(self.product, self.part.n_heads)
        seen["lres"] = self._after_attention(anatomy.residual_multiplier) if anatomy.parallel else read
        return LayerTrace(alpha=alpha, value=value, up=seen.pop("up", None), call=self.call, **seen)

    def _after_attention(self, multiplier: float) -> Tensor:
        output, norm = self.seen["attention_output"].float(), self.part.post_attention_norm
        update = (output if norm is None else norm(output)) * multiplier
        return (self.seen["lin"] + update).to(self.seen["lin"].dtype)


_NEEDED = {
    "lin": "block",
    "mixed": "attention output projection",
    "gate": "first FFN projection",
    "coefficients": "down projection",
}


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _flat(args[0] if args else kwargs["hidden_states"])


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


# -- keeping the model as it was -----------------------------------------------------------------------------


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _observed(hf: PreTrainedModel, *, upcast: bool) -> Iterator[None]:
    """Evaluation mode and eager attention, and fp32 arithmetic if asked, for the time of the block."""
    configs = {id(c): c for m in hf.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    training = [module for module in hf.modules() if module.training]
    with _widened(hf) if upcast else nullcontext():
        try:
            hf.eval()
            for config, _ in before:
                config._attn_implementation_internal = "eager"
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation
            for module in training:
                module.training = True


@contextmanager
def _widened(hf: PreTrainedModel) -> Iterator[None]:
    """While a module runs, its half-precision weights are fp32; outside of its call they are as stored."""
    handles: list[Any] = []
    for module in hf.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.dtype in _HALF for tensor in own):
            widener = _Widener()
            handles.append(module.register_forward_pre_hook(widener.widen, prepend=True))
            handles.append(module.register_forward_hook(widener.restore, always_call=True))
    with _hooked(handles):
        yield


class _Widener:
    """Swaps the half-precision weights of one module for fp32 copies, and back."""

    def __init__(self) -> None:
        self.stored: list[tuple[Tensor, Tensor]] = []

    def widen(self, module: nn.Module, *_: Any) -> None:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dtype in _HALF:
                self.stored.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    def restore(self, *_: Any) -> None:
        while self.stored:
            tensor, data = self.stored.pop()
            tensor.data = data


# -- the self-check ------------------------------------------------------------------------------------------


def examine(hf: PreTrainedModel) -> tuple[Anatomy, float]:
    """The anatomy whose parts add up, and its `self_check`; `ModelNotSupported` with the first failure if
    none.

    A family in the table has one candidate; for another decoder all fitting layouts are tried in turn.
    """
    failure: ModelNotSupported | None = None
    for anatomy in candidates(hf):
        try:
            return anatomy, self_check(hf, anatomy)
        except ModelNotSupported as error:
            failure = failure or error
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # A layout guessed for an unlisted family may not even run; that of a listed one must.
            if anatomy.known:
                raise
            failure = failure or ModelNotSupported(
                f"checking that the parts of a {anatomy.family!r} model add up: it has no row in the table, "
                f"and the generic rule could not follow it ({type(error).__name__}: {error})"
            )
    assert failure is not None, "candidates() gives at least one anatomy or raises"
    raise failure


@torch.no_grad()
def self_check(hf: PreTrainedModel, anatomy: Anatomy, *, tokens: int = 8, seed: int = 0) -> float:
    """Rebuild the logits of a short random input from all parts; the largest error as a share of their range.

    In fp32: embeddings, every head x source, every neuron and every bias are summed, taken through the final
    norm and the unembedding, and compared with the model's own logits. On the way the parts of each layer are
    compared with what it did, and its norms, keys and activation with what the model computed, so that
    `ModelNotSupported` names the first layer that fails, where in it, and by how much (limit `TOLERANCE`).
    """
    generator = torch.Generator().manual_seed(seed)
    device = anatomy.unembedding().device
    sample = torch.randint(anatomy.vocabulary, (1, tokens), generator=generator).to(device)
    stream = trace(hf, anatomy, sample, upcast=True)
    _check_embedding(stream)
    rebuilt = stream.embedding.float()
    for index in range(anatomy.n_layers):
        _check_attention(stream, index)
        _check_ffn(stream, index)
        rebuilt = rebuilt + stream.attention_update(index) + stream.ffn_update(index)
    norm, logits = anatomy.final_norm, stream.logits.float()
    if norm is not None:
        rebuilt = norm.frozen(rebuilt, stream.final)
        rebuilt = rebuilt if norm.bias is None else rebuilt + norm.bias
    error = float((anatomy.logits(rebuilt) - logits).abs().max() / (logits.max() - logits.min()))
    if not error <= TOLERANCE:
        raise ModelNotSupported(
            f"checking a {anatomy.family!r} model: every layer adds up, but the logits rebuilt from them "
            f"differ by {error:.1e} of their range (limit {TOLERANCE:g}): final norm, head or multiplier"
        )
    return error


def _check_embedding(stream: Stream) -> None:
    """What layer 0 receives beyond the token vectors must depend on positions only."""
    anatomy, tokens = stream.anatomy, stream.tokens
    other = tokens.flip(0)
    with _observed(stream.hf, upcast=True):
        rests = [
            _first_input(stream.hf, anatomy, ids) - anatomy.token_vectors(ids) for ids in (tokens, other)
        ]
    error = _difference(rests[0], rests[1], stream.embedding)
    if not error <= TOLERANCE:
        raise _failed(anatomy, 0, "embedding", _off("the token vectors", error))


def _first_input(hf: PreTrainedModel, anatomy: Anatomy, tokens: Tensor) -> Tensor:
    handle = anatomy.layers[0].module.register_forward_pre_hook(_stop, with_kwargs=True)
    with _hooked([handle]):
        try:
            hf(input_ids=tokens[None], use_cache=False)
        except _Seen as seen:
            return seen.residual
    raise AssertionError(f"a forward pass of {anatomy.family} ended without entering its first block")


def _stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Seen(_hidden(args, kwargs))


class _Seen(Exception):  # noqa: N818
    """Ends a forward pass once its first residual is known."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = residual


def _check_attention(stream: Stream, index: int) -> None:
    anatomy, part, traced = stream.anatomy, stream.anatomy.layers[index], stream.layers[index]
    read = traced.lin.float() if part.input_norm is None else part.input_norm(traced.lin.float())
    mixed = (traced.alpha.float() @ traced.value.float()).transpose(0, 1).reshape(traced.mixed.shape)
    ahead = traced.alpha.float().triu(1)
    _require(stream, index, "attention", "the input norm", read, traced.attention_input)
    _require(stream, index, "attention", "weights looking ahead", ahead, torch.zeros_like(ahead), whole=True)
    _require(stream, index, "attention", "weights x values", mixed, traced.mixed)
    written = (mixed.float() @ _flat(part.heads()).float()) + _or_zero(part.out_bias())
    _require(stream, index, "attention", "heads x sources and bias", written, traced.attention_output)
    if not anatomy.parallel:
        after = traced.lin.float() + stream.attention_update(index)
        _require(stream, index, "attention", "its update of the residual", after, traced.lres)


def _check_ffn(stream: Stream, index: int) -> None:
    anatomy, part, traced = stream.anatomy, stream.anatomy.layers[index], stream.layers[index]
    source = traced.lin if anatomy.parallel else traced.lres
    read = source.float() if part.ffn_norm is None else part.ffn_norm(source.float())
    gate = read @ part.keys().float().T + _or_zero(part.key_bias())
    _require(stream, index, "FFN", "the input norm", read, traced.ffn_input)
    _require(stream, index, "FFN", "the keys", gate, traced.gate)
    coefficients = anatomy.act(traced.gate.float())
    if traced.up is not None:
        ups = part.ups()
        assert ups is not None
        _require(
            stream, index, "FFN", "the up keys", read @ ups.float().T + _or_zero(part.up_bias()), traced.up
        )
        coefficients = coefficients * traced.up.float()
    _require(stream, index, "FFN", "activation (x up)", coefficients, traced.coefficients)
    written = traced.coefficients.float() @ part.values().float() + _or_zero(part.down_bias())
    _require(stream, index, "FFN", "neurons and bias", written, traced.ffn_output)
    where = "attention and FFN, which are parallel," if anatomy.parallel else "FFN"
    before = traced.lin.float() + stream.attention_update(index) if anatomy.parallel else traced.lres.float()
    _require(
        stream, index, where, "its update of the residual", before + stream.ffn_update(index), traced.lout
    )


def _or_zero(bias: Tensor | None) -> Tensor | float:
    return 0.0 if bias is None else bias.float()


def _require(
    stream: Stream, index: int, where: str, what: str, built: Tensor, seen: Tensor, *, whole: bool = False
) -> None:
    error = float(built.abs().max()) if whole else _difference(built, seen, seen)
    if not error <= TOLERANCE:
        raise _failed(stream.anatomy, index, where, _off(what, error))


def _difference(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """The largest difference of two [token, ...] tensors, relative to each token's largest entry in
    ``scale``.

    Per token, because a first position with massive activations would hide errors everywhere else.
    """
    size = scale.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((a.float() - b.float()).abs().amax(-1) / size).max())


def _off(what: str, error: float) -> str:
    return f"{what} differs from what the model computed by {error:.1e} relative (limit {TOLERANCE:g})"


def _failed(anatomy: Anatomy, index: int, where: str, what: str) -> ModelNotSupported:
    known = "" if anatomy.known else "; the family has no row in the table and was read by the generic rule"
    return ModelNotSupported(
        f"checking that the parts of a {anatomy.family!r} model add up: layer {index}, {where}: {what}{known}"
    )
