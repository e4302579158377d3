"""Neurons inside mixtures of experts: their weights, and what each expert did with the tokens routed to it.

transformers dispatches every fused experts module through one registry, by a name in its config. An implementation of
our own stands there under a name of ours. It computes each expert as the module's own code does, and hands out what
goes into the down projection before it is multiplied.

Experts of Llama 4 stand in no registry: the router multiplies what they read, and all of them run on all tokens. What
they did with those routed to them is computed again beside them. Nor do those of DBRX, Switch and JetMoE: there the
implementation stands in the place of their own code, and what that is called with is read as the registry's would be.

Not routed is absent, not 0: an expert has rows for the tokens that it was given and for no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "mnemoscope"  # of the implementation, in the registry of this process
_NEAR = 0.1  # how far off, relative, a sum may be in half precision


@dataclass(frozen=True, eq=False)
class Routed:
    """What the experts of a layer did with the tokens routed to them in one call, in the dtype of the pass.

    Rows are in the order of experts, and within each in that of tokens.

    starts        the first row of each expert, and at the end how many rows there are
    tokens        rows of the module's input
    weight        fp32, as the router passed it to the experts: scaled and normalised
    read          what the first projections read, some of it by several experts
    taken         which row of `read` each row is
    gate, up      pre-activations; up is None where experts are not gated
    coefficients  what the down projection reads
    """

    starts: tuple[int, ...]
    tokens: Int[Tensor, " row"]
    weight: Float[Tensor, " row"]
    read: Float[Tensor, "taken width"]
    taken: Int[Tensor, " row"]
    gate: Float[Tensor, "row neuron"]
    up: Float[Tensor, "row neuron"] | None
    coefficients: Float[Tensor, "row neuron"]

    @property
    def expert(self) -> Int[Tensor, " row"]:
        """The expert of each row."""
        sizes = torch.tensor(self.starts, device=self.tokens.device).diff()
        numbers = torch.arange(len(sizes), device=sizes.device)
        return numbers.repeat_interleave(sizes, output_size=self.starts[-1])

    def at(self, rows: Int[Tensor, " chosen"]) -> Routed:
        """Of some rows of the module's input, which are numbered by their place among these."""
        number = torch.full((1 + int(torch.cat([rows, self.tokens]).max()),), -1, device=rows.device)
        number[rows] = torch.arange(len(rows), device=rows.device)
        kept = (number[self.tokens] >= 0).nonzero()[:, 0]
        starts = _starts(self.expert[kept].bincount(minlength=len(self.starts) - 1))
        by_row = {name: getattr(self, name)[kept] for name in ("weight", "taken", "gate", "coefficients")}
        up = None if self.up is None else self.up[kept]
        return replace(self, starts=starts, tokens=number[self.tokens[kept]], up=up, **by_row)

    def moved(self, module: nn.Module, move: Callable[[nn.Module, Tensor], Tensor]) -> Routed:
        """The same with what `move` makes of each tensor of the module."""
        if move(module, self.coefficients) is self.coefficients:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: move(module, tensor) for name, tensor in tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Rows:
    """Weights of neurons that run on the same tokens, a row for each, as stored (views where they are rows)."""

    neurons: slice  # of the layer
    keys: Float[Tensor, "neuron width"]
    key_bias: Float[Tensor, " neuron"] | None
    ups: Float[Tensor, "neuron width"] | None
    up_bias: Float[Tensor, " neuron"] | None
    values: Float[Tensor, "neuron width"]


Listener = Callable[[Routed], Tensor | None]
"""Takes what experts did; what it returns, if anything, is read by the down projections instead."""


def _own(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, without its history."""
    parameter: Tensor = getattr(module, name)
    return parameter.detach()


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer: a module that transformers dispatches, and what lies between it and the stream.

    A neuron of the layer is ``expert * width + i``. The sum over experts is multiplied by `factor` outside the
    router; a shared expert, which every token goes through, by `shared_factor` and by the sigmoid of `shared_gate`.
    Where experts read and write a projection of the stream, `inlet` and `outlet` are those linear modules. Parameters
    are read by `held`.
    """

    module: nn.Module
    factor: float = 1.0
    shared_factor: float = 1.0
    shared_gate: nn.Module | None = None
    inlet: nn.Linear | None = None
    outlet: nn.Linear | None = None
    held: Callable[[nn.Module, str], Tensor | None] = _own

    @property
    def writer(self) -> nn.Module:
        """The module that returns the sum over experts."""
        return self.module if self.outlet is None else self.outlet

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the coefficients."""
        return self._matrix(self.module, "down_proj").dtype

    @property
    def count(self) -> int:
        """How many experts are routed to."""
        return len(self._matrix(self.module, "down_proj"))

    @property
    def width(self) -> int:
        """Neurons of one expert."""
        return self._matrix(self.module, "down_proj").shape[1 if self.transposed else 2]

    @property
    def transposed(self) -> bool:
        """Whether weights are stored [expert, input, output]."""
        return bool(_facts(self.module).is_transposed)

    @property
    def gated(self) -> bool:
        """Whether an expert has two first projections."""
        return bool(_facts(self.module).has_gate)

    @property
    def multiplies_inputs(self) -> bool:
        """Whether the router multiplies what the experts read; what they write is then added as it is."""
        return foreign(self.module) and _facts(self.module).multiplies_inputs

    def rows(self, expert: int, of_stream: bool = True) -> Rows:
        """The weights of one expert; keys of the residual stream, or of what the expert itself reads."""
        first, down = (self._matrix(self.module, name)[expert] for name in (self._first, "down_proj"))
        if self.transposed:
            first = first.T
        if self.inlet is not None and of_stream:
            first = first.float() @ self._matrix(self.inlet, "weight").float()
        values = down if self.transposed else down.T
        if self.outlet is not None:
            values = values.float() @ self._matrix(self.outlet, "weight").float().T
        bias = (
            self._matrix(self.module, f"{self._first}_bias")[expert] if _facts(self.module).has_bias else None
        )
        gate, up = (half(self.module, index, self.width) for index in (0, 1))
        return Rows(
            slice(expert * self.width, (expert + 1) * self.width),
            first[gate],
            None if bias is None else bias[gate],
            first[up] if self.gated else None,
            bias[up] if bias is not None and self.gated else None,
            values,
        )

    def total(self, sums: dict[str, Tensor]) -> Float[Tensor, "token width"]:
        """What routed and shared experts add up to; the shared one may be added elsewhere. fp32."""
        whole = self.factor * sums["routed"]
        if "shared" not in sums:
            return whole
        weight = shared_weight(self, sums.get("gate"))
        return whole + (weight if isinstance(weight, float) else weight[:, None]) * sums["shared"]

    @property
    def outer_bias(self) -> Float[Tensor, " width"] | None:
        """What is added to the sum over experts, whatever they are given."""
        name = _facts(self.module).outer_bias if foreign(self.module) else None
        return None if name is None else self.held(self.module, name)

    def down_biases(self) -> Float[Tensor, "expert width"] | None:
        """What each expert writes whatever it detects, before the router's weight."""
        return self._matrix(self.module, "down_proj_bias") if _facts(self.module).has_bias else None

    def activated(self, gate: Tensor, up: Tensor | None) -> Float[Tensor, "*rows neuron"]:
        """Coefficients of pre-activations, by the module's own gate (which may clamp)."""
        if up is None:
            return _act(self.module)(gate)
        fused = (
            torch.cat([gate, up], -1)
            if _facts(self.module).is_concatenated
            else torch.stack([gate, up], -1).flatten(-2)
        )
        return _apply_gate(self.module, fused)

    def _matrix(self, module: nn.Module, name: str) -> Any:
        return _weights(module, name, self.held)

    @property
    def _first(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"


def half(module: nn.Module, index: int, width: int) -> slice:
    """Where the gates (0) or the ups (1) are among the outputs of a module's first projection."""
    if not _facts(module).has_gate:
        return slice(None)
    return (
        slice(index * width, (index + 1) * width) if _facts(module).is_concatenated else slice(index, None, 2)
    )


def dispatched(module: nn.Module) -> bool:
    """Whether a module holds experts that transformers dispatches by name, or that are read as if it did."""
    if not (hasattr(module, "has_gate") or foreign(module)):
        return False
    if foreign(module) and _facts(module).parts:
        return all(isinstance(getattr(*place, None), nn.Parameter) for place in _places(module, "down_proj"))
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


class _Facts(NamedTuple):
    """What transformers says of the experts that it dispatches, for those that it does not.

    multiplies_inputs  the router multiplies what they read
    parts              paths of parameters that are elsewhere one of the module itself: [expert, output, input], or the
                       experts' rows one after another [expert and neuron, width], or of each expert (``{}``) its own
    act                path of the activation
    called             what it is called with as rows, experts of each and weights
    outer_bias         of a parameter that is added to the sum over experts
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = True
    is_concatenated: bool = True
    has_post_expert_norm: bool = False
    multiplies_inputs: bool = False
    parts: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    act: str = "act_fn"
    called: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    outer_bias: str | None = None


def _chosen_one(
    module: Any,
    rows: Float[Tensor, "token width"],
    selected: Int[Tensor, "token 1 expert"],
    weights: Float[Tensor, "token 1"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Switch: the one expert of a token is marked, and none where that was full."""
    chosen = selected[:, 0]
    every = torch.arange(chosen.shape[1], device=chosen.device)
    index = torch.where(chosen > 0, every, chosen.shape[1])
    return rows, index, weights.expand_as(index)


def _sorted_rows(module: Any, x: Float[Tensor, "context token width"]) -> tuple[Tensor, Tensor, Tensor]:
    """JetMoE: its router says which token each row is, in the order of experts, and how many rows each expert has."""
    rows = x.reshape(-1, x.shape[-1])
    _, tokens, gates, sizes, _ = module.router(rows)
    experts = torch.arange(len(sizes), device=x.device).repeat_interleave(
        torch.tensor(sizes, device=x.device)
    )
    index = torch.full((len(rows), len(sizes)), len(sizes), device=x.device)
    weights = gates.new_zeros(index.shape)
    index[tokens, experts], weights[tokens, experts] = experts, gates
    return rows, index, weights


_FOREIGN = {
    "Llama4TextExperts": _Facts(multiplies_inputs=True),
    "DbrxExperts": _Facts(
        parts={"gate_up_proj": ("mlp.w1", "mlp.v1"), "down_proj": ("mlp.w2",)}, act="mlp.activation_fn"
    ),
    "SwitchTransformersExperts": _Facts(
        has_gate=False,
        is_transposed=False,
        parts={"up_proj": ("expert_{}.wi.weight",), "down_proj": ("expert_{}.wo.weight",)},
        act="expert_0.act",
        called=_chosen_one,
    ),
    "JetMoeMoE": _Facts(
        is_transposed=False,
        parts={"gate_up_proj": ("input_linear.weight",), "down_proj": ("output_linear.weight",)},
        act="activation",
        called=_sorted_rows,
        outer_bias="bias",
    ),
}


def foreign(module: nn.Module) -> bool:
    """Whether experts stand in no registry."""
    return type(module).__name__ in _FOREIGN


def computed_here(module: nn.Module) -> bool:
    """Whether experts, while taken apart, are computed by `experts_forward` and not by code of their own."""
    return dispatched(module) and not (foreign(module) and _facts(module).multiplies_inputs)


def _called(module: nn.Module) -> bool:
    """Whether `experts_forward` has to be put in the place of code that no registry chooses, and is not there yet."""
    there = isinstance(module.forward, partial) and module.forward.func is _in_its_place
    return foreign(module) and computed_here(module) and not there


def _facts(module: nn.Module) -> Any:
    return _FOREIGN.get(type(module).__name__, module)


@dataclass(frozen=True)
class _Beside:
    """Matrices [expert, output, input] whose outputs follow one another; of an expert [input, output]."""

    stacks: tuple[Tensor, ...]

    def __getitem__(self, expert: int) -> Tensor:
        return torch.cat([matrices[expert] for matrices in self.stacks]).T


@dataclass(frozen=True)
class _Apart:
    """The matrices of experts that stand in modules of their own."""

    matrices: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, expert: int) -> Tensor:
        return self.matrices[expert]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.matrices[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.matrices[0].dtype


def _places(module: Any, name: str) -> list[tuple[nn.Module, str]]:
    """The modules that hold a parameter of experts in its parts, and the names there."""
    paths = (
        path.format(expert)
        for path in _facts(module).parts[name]
        for expert in range(module.num_experts if "{}" in path else 1)
    )
    split = (path.rpartition(".") for path in paths)
    return [(module.get_submodule(owner), last) for owner, _, last in split]


def _weights(module: Any, name: str, read: Callable[[nn.Module, str], Tensor | None] = getattr) -> Any:
    """The weights of all experts: a parameter, or what can be asked for those of one as it can."""
    split = foreign(module) and name in _facts(module).parts
    held = [read(*place) for place in (_places(module, name) if split else [(module, name)])]
    assert all(each is not None for each in held), f"{name} of {type(module).__name__}"
    if not split or held[0].ndim == 3:  # type: ignore[union-attr]
        return held[0]
    if "{}" in _facts(module).parts[name][0]:
        return _Apart(tuple(each for each in held if each is not None))
    stacks = tuple(each.unflatten(0, (module.num_experts, -1)) for each in held if each is not None)
    return stacks[0] if len(stacks) == 1 else _Beside(stacks)


def _apply_gate(module: Any, fused: Tensor) -> Tensor:
    if not foreign(module):
        return module._apply_gate(fused)
    gate, up = fused.chunk(2, -1)
    return up * _act(module)(gate)


def _act(module: Any) -> Callable[[Tensor], Tensor]:
    act: Callable[[Tensor], Tensor] = attrgetter(_facts(module).act if foreign(module) else "act_fn")(module)
    return act


def shared_weight(experts: Experts, gate: Float[Tensor, "token 1"] | None) -> Float[Tensor, " token"] | float:
    """What the shared expert is multiplied with: its factor, and for each token the sigmoid of its gate; fp32."""
    return experts.shared_factor if gate is None else gate.float().sigmoid().flatten() * experts.shared_factor


# -- The implementation ------------------------------------------------------------------------------------------

_listeners: dict[int, list[Listener]] = {}


class _Handle:
    """A listener that can be removed, as a hook can."""

    def __init__(self, module: nn.Module, listener: Listener) -> None:
        self._key, self._listener = id(module), listener
        _listeners.setdefault(self._key, []).append(listener)

    def remove(self) -> None:
        """Stop listening; more than once is no error."""
        kept = [other for other in _listeners.get(self._key, []) if other is not self._listener]
        if kept:
            _listeners[self._key] = kept
        else:
            _listeners.pop(self._key, None)


def listen(module: nn.Module, listener: Listener) -> Any:
    """Hand out what the experts of a module do, while `taken_apart`; returns a handle with ``remove``."""
    return _Handle(module, listener)


def experts_forward(
    module: Any,
    hidden_states: Float[Tensor, "token width"],
    top_k_index: Int[Tensor, "token k"],
    top_k_weights: Float[Tensor, "token k"],
) -> Float[Tensor, "token width"]:
    """First projections expert by expert, the gate of all, then down projections and the router's weights.

    Every step is the eager one, on the same rows in ascending order; half-precision weights are widened expert by
    expert where the pass is fp32.
    """
    chosen, experts = top_k_index.flatten(), len(_weights(module, "down_proj"))
    # An index beyond the last expert stands for none, and so does a weight of 0 (Zaya).
    chosen = chosen.masked_fill(top_k_weights.flatten() == 0, experts)
    starts = _starts(chosen.bincount(minlength=experts)[:experts])
    order = chosen.argsort(stable=True)[: starts[-1]]
    tokens, weight = order // top_k_index.shape[1], top_k_weights.flatten()[order]
    coefficients = _detected(module, starts, tokens, weight, hidden_states, tokens)
    out, down = torch.zeros_like(hidden_states), _weights(module, "down_proj")
    normed = _facts(module).has_post_expert_norm
    with nullcontext() if normed else _unseen(module):
        for expert, rows in _each(starts):
            y = _product(module, "down_proj", down, expert, coefficients[rows])
            if normed:
                y = module.post_expert_norm(y)
            out.index_add_(0, tokens[rows], (y * weight[rows, None]).to(out.dtype))
    return out


def _in_its_place(
    _: Any, module: Any, hidden_states: Float[Tensor, "*token width"], *rest: Tensor
) -> Float[Tensor, "*token width"]:
    """The forward of experts that are in no registry: called as those that are, or by a way of their own."""
    called, bias = _facts(module).called, _facts(module).outer_bias
    plain = (hidden_states.reshape(-1, hidden_states.shape[-1]), *rest)
    out = experts_forward(module, *(plain if called is None else called(module, hidden_states, *rest)))
    return (out if bias is None else out + getattr(module, bias)).view(hidden_states.shape)


def _multiplied(
    module: Any, args: tuple[Any, ...], output: Float[Tensor, "expert_x_token width"]
) -> Float[Tensor, "expert_x_token width"] | None:
    """A forward hook on experts that read each token times the router's score for them: what they did, handed out.

    A token that was not routed to an expert is 0 there. What is returned is in the place of the module's own output.
    """
    if id(module) not in _listeners:
        return None
    read, experts = args[0], len(module.down_proj)
    expert, tokens = read.view(experts, -1, read.shape[-1]).any(-1).nonzero(as_tuple=True)
    starts = _starts(expert.bincount(minlength=experts))
    taken = expert * (len(read) // experts) + tokens
    weight = torch.ones(len(tokens), device=read.device)
    coefficients = _detected(module, starts, tokens, weight, read, taken)
    out = torch.zeros_like(read)
    for expert, rows in _each(starts):
        y = _product(module, "down_proj", module.down_proj, expert, coefficients[rows])
        out[taken[rows]] = y.to(out.dtype)
    return out.view(output.shape)


def _detected(
    module: Any, starts: tuple[int, ...], tokens: Tensor, weight: Tensor, read: Tensor, taken: Tensor
) -> Float[Tensor, "row neuron"]:
    """The coefficients of all experts, once everybody who listens has seen them; arguments as in `Routed`."""
    gated, name = _facts(module).has_gate, "gate_up_proj" if _facts(module).has_gate else "up_proj"
    width = _weights(module, "down_proj").shape[1 if _facts(module).is_transposed else 2]
    first, matrices = read.new_empty(len(taken), 2 * width if gated else width), _weights(module, name)
    with _unseen(module):
        for expert, rows in _each(starts):
            first[rows] = _product(module, name, matrices, expert, read[taken[rows]])
    coefficients = _apply_gate(module, first) if gated else _act(module)(first)
    gate, up = first[:, half(module, 0, width)], first[:, half(module, 1, width)] if gated else None
    piece = Routed(starts, tokens, weight.float(), read, taken, gate, up, coefficients)
    for listener in _listeners.get(id(module), ()) if len(taken) else ():
        changed = listener(
            piece
        )  # under whatever watches functions: it may compute, with bits of any threads
        coefficients = coefficients if changed is None else changed
    return coefficients


def _unseen(module: nn.Module) -> AbstractContextManager[Any]:
    """While products of plain weights are taken nobody who watches functions is asked: there are many experts."""
    plain = all(type(weight) is nn.Parameter for weight in module.parameters(recurse=False))
    return torch._C.DisableTorchFunction() if plain else nullcontext()


def _starts(counts: Int[Tensor, " expert"]) -> tuple[int, ...]:
    return (0, *counts.cumsum(0).tolist())


def _each(starts: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and these."""
    for expert, (start, stop) in enumerate(pairwise(starts)):
        if stop > start:
            yield expert, slice(start, stop)


def summed(output: Float[Tensor, "row width"], tokens: int) -> Float[Tensor, "token width"]:
    """What experts wrote at each token, also where each has rows of its own."""
    return output if len(output) == tokens else output.view(-1, tokens, output.shape[-1]).sum(0)


def _product(module: Any, name: str, matrices: Any, expert: int, x: Tensor) -> Tensor:
    weight = matrices[expert].to(x.dtype)
    bias = getattr(module, f"{name}_bias")[expert].to(x.dtype) if _facts(module).has_bias else None
    return nn.functional.linear(x, weight.T if _facts(module).is_transposed else weight, bias)


@torch.no_grad()
def measured(
    owner: nn.Module,
    experts: Experts,
    shared: nn.Module | None,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Experts | None:
    """The experts with the factors under which they add up to what the module around them makes of random vectors.

    norm  of the sum, if that module has one

    Factors are 1, among the numbers that this module holds, or the mean of routed and shared experts; None if none
    comes near. Which is meant shows in any dtype; that it is exact is for the self-check to say.
    """
    weight = experts._matrix(experts.module, "down_proj")
    width = (
        weight.shape[2 if experts.transposed else 1] if experts.inlet is None else experts.inlet.in_features
    )
    x = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0)).to(weight[0])
    sums: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda _, args, output: sums.update(
            {
                name: summed(output.detach().float().reshape(-1, output.shape[-1]), 8).clone()
            }  # Llama 4 adds in place
        )

    watched = {"routed": experts.writer, "shared": shared, "gate": experts.shared_gate}
    handles = [
        module.register_forward_hook(see(name)) for name, module in watched.items() if module is not None
    ]
    training = [module for module in owner.modules() if module.training]
    try:
        with taken_apart(owner.eval()):
            output = owner(x)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    whole = (output[0] if isinstance(output, tuple) else output).float().reshape(8, -1)
    held = [float(value) for value in vars(owner).values() if isinstance(value, float | int) and value > 0]
    tried = [
        replace(experts, factor=factor, shared_factor=shared_factor)
        for factor, shared_factor in [(1.0, 1.0), *((value, 1.0) for value in held), (0.5, 0.5)]
    ]
    totals = [candidate.total(sums) for candidate in tried]
    written = totals if norm is None else [norm(total) for total in totals]
    errors = [float((total - whole).norm() / whole.norm()) for total in written]
    return tried[errors.index(min(errors))] if min(errors) < _NEAR else None


@contextmanager
def taken_apart(hf: nn.Module) -> Iterator[None]:
    """Experts are computed by `experts_forward` for the time of the block; the model's own implementation after it."""
    every: list[Any] = [module for module in hf.modules() if dispatched(module)]
    modules = [module for module in every if not foreign(module)]
    handles = [module.register_forward_hook(_multiplied) for module in every if not computed_here(module)]
    called = [(module, vars(module).get("forward")) for module in every if _called(module)]
    for module, _ in called:
        module.forward = partial(_in_its_place, module.forward, module)
    configs = {id(module.config): module.config for module in modules}
    before = [(config, config._experts_implementation_internal) for config in configs.values()]
    replaced = {id(config): name for config, name in before if name != NAME}
    try:
        _replaced.update(replaced)
        for config, _ in before:
            config._experts_implementation_internal = NAME
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, forward in called:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
        for config, name in before:
            if config._experts_implementation_internal == NAME:  # else another was chosen meanwhile
                config._experts_implementation_internal = name
        for key in replaced:
            _replaced.pop(key, None)


_replaced: dict[int, str | None] = {}  # by config, what it said before ours was put there


def implementation(module: nn.Module) -> str | None:
    """How a module's experts are computed when nobody watches; None where there are none that are dispatched."""
    if not dispatched(module) or foreign(module):
        return None
    config: Any = module.config
    name = config._experts_implementation_internal
    return _replaced.get(id(config)) if name == NAME else name


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
