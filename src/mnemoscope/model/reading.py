"""Reading a model: its row of the table, or the generic rule, or a refusal with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.adaptive import Bands
from mnemoscope.model.encoders import ENCODERS, HEADS, REFUSED_STACKS, stacks_of
from mnemoscope.model.experts import Experts, dispatched, measured
from mnemoscope.model.packed import packed, plain
from mnemoscope.model.parts import (
    ALL_ARRIVES,
    Anatomy,
    Arrives,
    Attention,
    Factor,
    Gated,
    Layer,
    Norm,
    OwnNorms,
    Projection,
    Transform,
    is_one,
    shape_of,
)
from mnemoscope.model.spread import held, remember
from mnemoscope.model.table import (
    ANY_FFN,
    ANY_FINAL,
    ANY_NORMS,
    ANY_OUT,
    FAMILIES,
    PLAIN,
    REFUSED,
    SHARED,
    Factors,
    Family,
    FeedForward,
    Gate,
    Norms,
    Number,
)

_WRAPPERS = {  # of single parts, by the name of the class: where the part is
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def refused(family: str, reason: str) -> ModelNotSupported:
    """The error to raise for a model that cannot be read, with the reason."""
    return ModelNotSupported(
        f"reading the anatomy of a {family!r} model: {reason}; decoders with one dense FFN per block are "
        "accepted, and `mnemoscope models` lists the families known"
    )


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, itself and not what wraps it, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
        if module is None:
            return None
    return bare(module)


def bare(module: nn.Module) -> nn.Module:
    """A part that was compiled or checkpointed by itself, without what wraps it."""
    while (name := _WRAPPERS.get(type(module).__name__)) is not None and isinstance(module, nn.Module):
        module = getattr(module, name)
    return module


def part_of(module: nn.Module, path: str, family: str) -> nn.Module:
    """The module at a dotted path; `ModelNotSupported` if it is missing."""
    part = find(module, path)
    if part is None:
        raise refused(family, f"{type(module).__name__} has no part {path!r}")
    return part


def measured_norm(owner: nn.Module, path: str | None, width: int, config: Any, family: str) -> Norm | None:
    """The norm at a path as it behaves, None for no path; `ModelNotSupported` if it is neither RMS nor layer."""
    if path is None:
        return None
    module = part_of(owner, path, family)
    norm = _measure(module, width, config)
    if norm is None:
        raise refused(family, f"{path} ({type(module).__name__}) is no RMS or layer norm over the width")
    return norm


@torch.no_grad()
def _measure(module: nn.Module, width: int, config: Any) -> Norm | None:
    """The candidate that reproduces the module's own output in fp32, on vectors of usual and of tiny size."""
    parameters = {
        name: value.float()
        for name, _ in module.named_parameters()
        if (value := held(module, name)) is not None
    }
    alone = module
    if "_old_forward" in vars(module):  # without what moves its weights
        alone = copy.copy(module)
        vars(alone).pop("forward")
    device = next((value.device for value in parameters.values()), torch.device("cpu"))
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(device)
    x = torch.cat([x + 0.5, x * 1e-3])  # where epsilon shows
    output = torch.func.functional_call(alone, parameters, (x,))
    if output.shape != x.shape:
        return None
    weight, bias = parameters.get("weight"), parameters.get("bias")
    weights = [None] if weight is None else [weight, 1 + weight]
    for kind, effective, eps in product(("rms", "layer"), weights, _epsilons(module, config)):
        norm = Norm(kind, effective, bias, eps, module)
        if torch.allclose(norm(x), output, rtol=1e-4, atol=1e-5 * float(output.abs().max())):
            return norm
    return None


def _epsilons(module: nn.Module, config: Any) -> list[float]:
    attributes = [getattr(module, name, None) for name in ("eps", "variance_epsilon", "epsilon")]
    fields = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
    stated = [
        value
        for value in (*attributes, *(getattr(config, name, None) for name in fields))
        if value is not None
    ]
    return list(dict.fromkeys([*map(float, stated), 1e-5, 1e-6, float(torch.finfo(torch.float32).eps)]))


def describe(hf: PreTrainedModel) -> Anatomy:
    """Find the parts of a decoder: its family's row, or the first layout of known pieces that fits.

    `ModelNotSupported` with the family and the reason for anything else. This only *reads*; call
    `check.self_check` to know that the parts add up.
    """
    return next(candidates(hf))


def candidates(hf: PreTrainedModel) -> Iterator[Anatomy]:
    """Every anatomy worth a self-check, at least one: a single one for a family in the table."""
    config = hf.config.get_text_config()
    remember(hf)
    family = str(config.model_type)
    if reason := _unsupported_kind(hf):
        raise refused(family, reason)
    if is_encoder_decoder(hf):
        yield _both_stacks(hf)
        return
    row = _row_of(family, config)
    body = bare(hf.base_model if family in ENCODERS else hf.get_decoder())
    # Some keep it one step further in (the text half of Llama 4 and BLIP-2), or under another name (Mllama).
    while family not in ENCODERS and isinstance(inner := getattr(body, "model", None), PreTrainedModel):
        body = bare(inner)
    if row is not None and family in ENCODERS and find(body, row.blocks) is None:
        # The text half of a model that also reads images, or a decoder by itself.
        body = part_of(body, "text_model" if hasattr(body, "text_model") else "decoder", family)
    if row is not None:
        _check_fields(config, row, family)
        yield _read(hf, body, row, family, known=True)
        return
    rows = list(_generic_rows(body, config))
    if not rows:
        raise refused(
            family, f"it has no row in the table, and its {_made_of(body)} is not made of parts known here"
        )
    for row in rows:
        anatomy = _read(hf, body, row, family, known=False)
        yield anatomy
        if hf.config is not config and anatomy.logit_multiplier != 1:
            yield replace(anatomy, logit_multiplier=1.0)  # Aya and Command A Vision leave it out


def _check_fields(config: Any, row: Family, family: str) -> None:
    for name, accepted, reason in row.refused:
        if getattr(config, name, accepted) != accepted:
            raise refused(family, f"{reason} ({name} = {getattr(config, name)})")


def is_encoder_decoder(hf: PreTrainedModel) -> bool:
    """Whether a model has an encoder and a decoder that reads what it has read; not one of these by itself."""
    return (
        bool(getattr(hf.config, "is_encoder_decoder", False))
        and hf.get_encoder() is not hf
        and not type(hf).__name__.endswith("EncoderModel")
    )


def _both_stacks(hf: PreTrainedModel) -> Anatomy:
    """The anatomy of an encoder-decoder: an encoder without a head, and a decoder with cross attention."""
    family, rows = str(hf.config.model_type), stacks_of(hf.config)
    assert rows is not None, "without rows it was refused"
    inner = getattr(hf, "decoder", None)  # of a model put together from two, which has the head
    headed = isinstance(inner, PreTrainedModel) and inner.get_output_embeddings() is not None
    owners = (hf.get_encoder(), inner if headed else hf)
    stacks = []
    for row, owner, module in zip(rows, owners, (hf.get_encoder(), hf.get_decoder()), strict=True):
        module = bare(module.base_model if headed else module)
        _check_fields(module.config, row, family)
        if row.plain is not None and not getattr(module.config, "is_gated_act", False):
            row = row._replace(ffn=row.plain)
        stacks.append(_read(owner, module, row, family, known=True, of_pair=True))
    encoder, decoder = stacks
    layers, sizes = (*encoder.layers, *decoder.layers), (*encoder.sizes, *decoder.sizes)
    return replace(
        decoder, layers=layers, n_layers=len(layers), sizes=sizes, body=hf, stacks=(encoder, decoder)
    )


def _made_of(body: nn.Module) -> str:
    """The class of the blocks of an unknown decoder, and what they consist of."""
    firsts = (bare(child[0]) for child in body.modules() if isinstance(child, nn.ModuleList) and len(child))
    block = next((first for first in firsts if "Vision" not in type(first).__name__), body)
    return f"{type(block).__name__} ({', '.join(name for name, _ in block.named_children())})"


def _row_of(family: str, config: Any) -> Family | None:
    """The row of a family; an encoder's positions see all others unless its config makes a decoder of it."""
    row = FAMILIES.get(family) or ENCODERS.get(family)
    if (
        row is not None and row.cross is not None
    ):  # its decoder by itself, which has nothing to look across to
        row = row._replace(cross=None, unused=row.cross.norms)
    if row is None or not row.bidirectional:
        return row
    if row.plain is not None and not getattr(config, "is_gated_act", False):
        row = row._replace(ffn=row.plain)
    return row._replace(bidirectional=not getattr(config, "is_decoder", False))


def _unsupported_kind(hf: PreTrainedModel) -> str | None:
    config = hf.config.get_text_config()
    if reason := REFUSED.get(config.model_type) or REFUSED.get(hf.config.model_type):
        return reason
    names = " ".join({type(module).__name__ for module in hf.modules()})
    known = config.model_type in FAMILIES
    if foreign := None if known else next(filter(_undispatched, hf.modules()), None):
        return f"its experts ({type(foreign).__name__}) are computed by code of their own, which is not supported yet"
    if is_encoder_decoder(hf):
        if stacks_of(hf.config) is None:
            no_row = "it is an encoder-decoder without a row in the table"
            return REFUSED_STACKS.get(hf.config.model_type, no_row)
        if hf.get_output_embeddings() is None:
            return f"{type(hf).__name__} has no language-model head (load it as a sequence-to-sequence model)"
        return None
    if config.model_type not in FAMILIES and any(
        mark in names for mark in ("Mamba", "Rwkv", "SSM", "Recurrent", "LSTM", "DeltaNet")
    ):
        return "it is a state space or recurrent model"
    if config.model_type in ENCODERS:
        headless = hf.get_output_embeddings() is None and hf.base_model is not hf
        return (
            f"{type(hf).__name__} has another head than a language model's; give its body"
            if headless
            else None
        )
    masked = type(hf).__name__ in _class_names(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    if masked or (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    ):
        return "it is an encoder without a row in the table"
    if hf.get_output_embeddings() is None:
        return f"{type(hf).__name__} has no language-model head (load it as a causal language model)"
    return None


def _undispatched(module: nn.Module) -> bool:
    """Whether a module holds experts that transformers does not dispatch by name."""
    if "Experts" not in type(module).__name__ or any(map(dispatched, module.modules())):
        return False
    return any(True for _ in module.parameters()) and not any(_has(module, ffn) for ffn in SHARED)


def _class_names(mapping: dict[str, Any]) -> set[str]:
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return {str(name) for name in mapping.values()} - {str(name) for name in causal}


def _generic_rows(body: nn.Module, config: Any) -> Iterator[Family]:
    blocks = [
        name
        for name, child in body.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    finals = [name for name in ANY_FINAL if hasattr(body, name)]
    for block, final in product(blocks, finals):
        every = [bare(module) for module in getattr(body, block)]
        first, dense = every[0], [module for module in every if experts_in(module) is None]
        # A mixture needs no path to its experts.
        ffns = [ffn for ffn in ANY_FFN if all(_has(module, ffn) for module in dense)][: None if dense else 1]
        for out, ffn, norms in product(ANY_OUT, ffns, ANY_NORMS):
            if _has(first, (out,)) and _uses_all_norms(first, norms):
                yield Family(
                    out,
                    ffn,
                    (norms,),
                    blocks=block,
                    final_norm=final,
                    parallel=_present(config, "use_parallel_residual", "parallel_attn"),
                    embedding_multiplier=_present(config, "embedding_multiplier"),
                    residual_multiplier=_present(config, "residual_multiplier"),
                    logit_multiplier=_present(config, "logit_scale"),
                    logit_divisor=_present(config, "logits_scaling"),
                    softcap=_present(config, "final_logit_softcapping"),
                )


def _present(config: Any, *names: str) -> str | None:
    return next((name for name in names if getattr(config, name, None) is not None), None)


def _has(module: nn.Module, paths: tuple[str | None, ...]) -> bool:
    return all(path is None or find(module, path) is not None for path in paths)


def _uses_all_norms(block: nn.Module, norms: Norms, *others: str | None) -> bool:
    present = set(_norms_in(block)) - set(others)
    stated = [name for name in norms if name is not None]
    inner = tuple(name for name in stated if "." in name)
    return present == set(stated) - set(inner) and _has(block, inner)


def _norms_in(block: nn.Module) -> list[str]:
    """The norms of a block by name; what holds others is none (RobertaPreLayerNormAttention)."""
    children = ((name, bare(child)) for name, child in block.named_children())
    return [
        name
        for name, child in children
        if "norm" in type(child).__name__.lower() and next(child.children(), None) is None
    ]


def _read(
    hf: PreTrainedModel,
    body: nn.Module,
    row: Family,
    family: str,
    *,
    known: bool,
    of_pair: bool = False,  # of an encoder-decoder
) -> Anatomy:
    config = body.config if of_pair else hf.config.get_text_config()
    layers = tuple(_layers(body, row, config, family))
    owner = body if of_pair and isinstance(body, PreTrainedModel) else hf
    embedding = bare(owner.get_input_embeddings())
    headless = hf.get_output_embeddings() is None
    head = embedding if headless else bare(hf.get_output_embeddings())
    for module in (head, embedding):
        if not plain(module) and (module is embedding or not packed(module)):
            raise refused(family, f"its embeddings or its head are no plain matrix ({type(module).__name__})")
    first = next((layer for layer in layers if layer.groups), layers[0])
    width = first.heads().shape[-1]
    transform, final_norm = _end(hf, body, row, width, family, config)
    read = width if transform is None else shape_of(transform.dense[-1])[0]
    mapped = None if row.embedding_map is None else find(body, row.embedding_map)
    entering = shape_of(embedding if mapped is None else mapped)[0 if mapped is not None else 1]
    if shape_of(head)[1] != read or entering != width:
        raise refused(family, "its embeddings are projected to another width")
    held_factor = _parameter(body, row.embedding_factor, family)
    factor = 1.0 if held_factor is None else held_factor.float()
    ends = getattr(config, row.bands) if row.bands else None
    bands = Bands(tuple(ends)) if ends else None
    shared = first.ffn_norm is not None and first.ffn_norm is first.input_norm
    return Anatomy(
        family=family,
        known=known,
        layers=layers,
        n_layers=len(layers),
        sizes=tuple(sum(layer.groups) for layer in layers),
        width=width,
        n_heads=first.n_heads + (first.cross.n_heads if first.cross else 0),
        n_kv_heads=_kv_heads(config, first.n_heads),
        head_dim=max(layer.heads().shape[1] for layer in layers),
        vocabulary=bands.vocabulary if bands else shape_of(head)[0],
        context_length=_context_length(config)
        - (0 if row.first_position is None else int(_number(config, row.first_position))),
        gated=first.gated,
        activation=_name_of(first.act, _activation_of(config, row)),
        parallel=shared or hasattr(first.module, "ln_mlp") or _flag(config, row.parallel),
        embedding_multiplier=_number(config, row.embedding_multiplier) * layers[0].arrives.lin * factor,
        logit_multiplier=_number(config, row.logit_multiplier) / _number(config, row.logit_divisor),
        softcap=getattr(config, row.softcap) if row.softcap else None,
        embedding=embedding,
        embedding_norm=measured_norm(body, row.embedding_norm, shape_of(embedding)[1], config, family),
        embedding_map=mapped,
        final_norm=final_norm,
        head=head,
        body=body,
        bands=bands,
        bidirectional=row.bidirectional,
        transform=transform,
        headless=headless,
        of_encoder=of_pair or family in ENCODERS,
        outer_head=_outer(hf, head) if (of_pair or family in ENCODERS) and not headless else None,
    )


def _outer(hf: PreTrainedModel, head: nn.Module) -> nn.Module | None:
    """The module around a head without a bias, if it has one."""
    around = (module for module in hf.modules() if any(child is head for child in module.children()))
    outer = next(around, None)
    return None if outer is None or getattr(head, "bias", None) is not None else outer


def _end(
    hf: PreTrainedModel, body: nn.Module, row: Family, width: int, family: str, config: Any
) -> tuple[Transform | None, Norm | None]:
    """What comes between the last block and the unembedding: the transform of an encoder's head, and the last norm."""
    # Its place is empty where the config says so (the first OPT models).
    empty = row.final_norm is not None and getattr(body, row.final_norm, body) is None
    norm = None if empty else measured_norm(body, row.final_norm, width, config, family)
    head = next((paths for paths in HEADS if config.model_type in ENCODERS and _has(hf, paths)), None)
    if head is None:
        return None, norm
    *paths, last = head
    dense = tuple(part_of(hf, str(path), family) for path in paths)
    return Transform(norm, dense), measured_norm(hf, last, shape_of(dense[-1])[0], config, family)


def _layers(body: nn.Module, row: Family, config: Any, family: str) -> Iterator[Layer]:
    """The layers in their order; a group of blocks is used for as many layers as there are for each."""
    blocks = part_of(body, row.blocks, family)
    assert isinstance(blocks, nn.ModuleList), f"{row.blocks} of a {family} model is a {type(blocks).__name__}"
    every = [bare(block) for block in blocks]
    if row.lists:
        every = [
            nn.ModuleDict({name: part_of(body, f"{name}.{index}", family) for name in row.lists})
            for index in range(len(blocks))
        ]
    if row.inner is None:
        run = [
            (block, _is_linear(config, index))
            for index, block in enumerate(every)
            if row.images is None or find(block, row.images) is None
        ]
        factors = [PLAIN if row.factors is None else row.factors(block) for block, _ in run]
        arrivals = _arrivals(factors, family)
        for (block, linear), each, arrives in zip(run, factors, arrivals, strict=True):
            yield _layer(block, row, config, family, linear=linear, factors=each, arrives=arrives)
        return
    count = config.num_hidden_layers
    groups = [index * len(blocks) // count for index in range(count)]
    for index, group in enumerate(groups):
        layer = _layer(part_of(blocks[group], row.inner, family), row, config, family)
        yield replace(layer, turn=(groups[:index].count(group), groups.count(group)))


def _flag(config: Any, name: str | None) -> bool:
    return bool(name and getattr(config, name))


def _number(config: Any, fact: Number) -> float:
    if fact is None:
        return 1.0
    return float(fact(config) if callable(fact) else getattr(config, fact))


def _arrivals(factors: list[Factors], family: str) -> list[Arrives]:
    """What of the stream arrives at the end, by layer."""
    arrivals: list[Arrives] = []
    lout: Factor = 1.0
    for each in reversed(factors):
        if not all(torch.as_tensor(kept).all() for kept in (each.keep_attention, each.keep_ffn)):
            raise refused(family, "it multiplies its residual stream, or a channel of it, with 0")
        lres = lout * each.keep_ffn
        arrivals.append(Arrives(lres * each.keep_attention, lres, lout))
        lout = arrivals[-1].lin
    return arrivals[::-1]


def _scaled(norm: Norm | None, arrives: Factor) -> Norm | None:
    """A norm that reads the same of what is measured by what of it arrives at the end."""
    return norm if norm is None or is_one(arrives) else replace(norm, unit=arrives)


def _shifted(shift: Tensor | None, arrives: Factor) -> Tensor | None:
    return None if shift is None else shift * arrives


def _is_linear(config: Any, index: int) -> bool:
    """Whether the config calls the attention of a layer linear: then it has no attention weights."""
    kinds = getattr(config, "layer_types", None)
    return kinds is not None and kinds[index] == "linear_attention"


def _activation_of(config: Any, row: Family) -> str:
    field = _present(
        config, "hidden_activation", "hidden_act", "activation_function", "activation", "dense_act_fn"
    )
    return row.activation or (str(getattr(config, field)) if field else "gelu")


def _layer(
    block: nn.Module,
    row: Family,
    config: Any,
    family: str,
    *,
    linear: bool = False,
    factors: Factors = PLAIN,
    arrives: Arrives = ALL_ARRIVES,
) -> Layer:
    out, mixer = _mixers(block, row, family, linear)
    multiplier = _number(config, row.residual_multiplier)
    experts = experts_in(block)
    beside = None if experts is None else row.beside
    owner, ffn = (block, row.ffn) if experts is None or beside else _shared(block)
    if row.halves and experts is None and find(block, ffn.down) is None:
        owner = None
    down = None if owner is None else part_of(owner, ffn.down, family)
    for module in filter(None, (out, down)):
        if not plain(module) and not packed(module):
            raise refused(family, f"an output projection is no matrix ({type(module).__name__})")
    width = int(config.hidden_size) if out is None else shape_of(out)[0]
    apart = (*row.unused, *(row.cross.norms if row.cross else ()), *(beside or ()))
    fitting = [norms for norms in row.norms if _uses_all_norms(block, norms, row.extra, *apart)]
    norms = None if not fitting else fitting[-1] if out is None and mixer is None else fitting[0]
    if norms is None:
        names = ", ".join(_norms_in(block)) or "none"
        raise refused(family, f"the norms of its blocks are not those expected ({names})")
    if row.norms_before is not None and not getattr(config, row.norms_before):
        norms = Norms(None, None, middle=norms.input, end=norms.ffn)
    gate, up = (None, None)
    if owner is not None and down is not None:
        gate, up = _first_projections(owner, ffn, shape_of(down)[1], family)
    input_norm = _scaled(measured_norm(block, norms.input, width, config, family), arrives.lin)
    ffn_norm = input_norm
    if norms.ffn != norms.input:
        ffn_norm = _scaled(measured_norm(block, norms.ffn, width, config, family), arrives.lres)
    post_ffn_norm = measured_norm(block, norms.post_ffn, width, config, family)
    mixture, own_norms = None, None
    if experts is not None and beside is not None and ffn_norm is not None:
        paths = (beside.read, beside.written, norms.ffn, beside.shared_written)
        own = [measured_norm(block, path, width, config, family) for path in paths]
        read, written, shared_read, shared_written = (norm for norm in own if norm is not None)
        own_norms = OwnNorms(read, written, shared_read, shared_written)
        ffn_norm, mixture = replace(ffn_norm, weight=None), Experts(experts)
    elif experts is not None:
        outer, inner = _around(block, experts)
        post_ffn_norm = measured_norm(outer, inner, width, config, family) if inner else post_ffn_norm
        mixture = _measured_experts(block, experts, owner, post_ffn_norm if inner else None, row, family)
    return Layer(
        module=block,
        attention=None
        if out is None
        else part_of(block, row.attention or row.attention_out.rpartition(".")[0], family),
        attention_out=out,
        down=down,
        gate=gate,
        up=up,
        n_heads=getattr(config, row.heads),
        width=width,
        input_norm=input_norm,
        ffn_norm=ffn_norm,
        post_attention_norm=measured_norm(block, norms.post_attention, width, config, family),
        post_ffn_norm=post_ffn_norm,
        act=_activation(block, _activation_of(config, row), factors.gate),
        experts=mixture,
        own_norms=own_norms,
        mixer=mixer,
        mixed_gate=None if row.gate is None or out is None else _gate(block, row.gate, config, family, out),
        inner_norm=None
        if row.inner_norm is None or down is None
        else _rms(block, row.inner_norm, shape_of(down)[1], config, family),
        sink=row.sink,
        outer_bias=_parameter(block, row.outer_bias, family),
        middle_norm=measured_norm(block, norms.middle, width, config, family),
        end_norm=measured_norm(block, norms.end, width, config, family),
        attention_multiplier=multiplier * factors.attention * arrives.lres,
        ffn_multiplier=multiplier * factors.ffn * arrives.lout,
        mixer_multiplier=factors.mixer,
        shift=_shifted(factors.attention_shift, arrives.lres),
        ffn_shift=_shifted(factors.ffn_shift, arrives.lout),
        extra=None if row.extra is None else find(block, row.extra),
        arrives=arrives,
        cross=_cross(block, row, config, family, width),
        ends=(block[row.lists[0]], block[row.lists[-1]]) if isinstance(block, nn.ModuleDict) else None,
    )


def _cross(block: nn.Module, row: Family, config: Any, family: str, width: int) -> Attention | None:
    """The cross attention of a block of the decoder of an encoder-decoder."""
    if row.cross is None:
        return None
    out = part_of(block, row.cross.out, family)
    attention = part_of(block, row.cross.attention or row.cross.out.rpartition(".")[0], family)
    norm = measured_norm(block, row.cross.input, width, config, family)
    return Attention(
        module=attention if norm is None or norm.module is None else norm.module,
        attention=attention,
        attention_out=out,
        n_heads=getattr(config, row.heads),
        width=width,
        input_norm=norm,
        post_attention_norm=measured_norm(block, row.cross.post, width, config, family),
        middle_norm=measured_norm(block, row.cross.middle, width, config, family),
    )


def _mixers(
    block: nn.Module, row: Family, family: str, linear: bool
) -> tuple[nn.Module | None, nn.Module | None]:
    """The attention output projection and the opaque mixer of a block, which has one of them or both."""
    out = find(block, row.attention_out)
    if linear and out is not None:
        return None, part_of(block, row.attention_out.rpartition(".")[0], family)
    if (
        row.halves
        and out is None
        and (experts_in(block) is not None or find(block, row.ffn.down) is not None)
    ):
        return None, None
    inside = row.attention_out if out is not None else ""
    mixers = (find(block, path) for path in row.mixers if not inside.startswith(f"{path}."))
    mixer = next((module for module in mixers if module is not None), None)
    if out is None and mixer is None:
        out = part_of(block, row.attention_out, family)
    return out, mixer


def _gate(block: nn.Module, gate: Gate, config: Any, family: str, out: nn.Module) -> Gated:
    module, heads = part_of(block, gate.path, family), config.num_attention_heads
    if gate.function is None:
        norm = _rms(block, gate.path, shape_of(out)[1], config, family)
        return Gated(module, nn.Identity(), heads, norm=norm)
    bias = _parameter(block, gate.bias, family)
    return Gated(module, getattr(nn.functional, gate.function), heads, bias)


def _rms(block: nn.Module, path: str, width: int, config: Any, family: str) -> Norm:
    """A norm that multiplies each of so many numbers, and does nothing else."""
    norm = measured_norm(block, path, width, config, family)
    if norm is None or norm.kind != "rms" or norm.bias is not None:
        raise refused(family, f"{path} is no RMS norm without a bias")
    return norm


def _parameter(block: nn.Module, path: str | None, family: str) -> Tensor | None:
    """A parameter of a part of a block; None without a path, and where the part has none."""
    if path is None:
        return None
    owner, _, name = path.rpartition(".")
    return held(part_of(block, owner, family) if owner else block, name)


def experts_in(block: nn.Module) -> nn.Module | None:
    """The experts of a block that transformers dispatches; None if it is dense."""
    return next(filter(dispatched, block.modules()), None)


def _shared(block: nn.Module) -> tuple[nn.Module | None, FeedForward]:
    """The expert of a mixture that every token goes through, and its paths; None where there is none."""
    for name, module in block.named_modules():
        if "shared" not in name.rpartition(".")[2]:
            continue
        for ffn in SHARED:
            if _has(bare(module), ffn):
                return bare(module), ffn
    return None, SHARED[0]


def _around(block: nn.Module, experts: nn.Module) -> tuple[nn.Module, str | None]:
    """The module that adds the experts of a block up, and its norm of the sum, if it has one."""
    outer = next(outer for outer in block.modules() if any(child is experts for child in outer.children()))
    norms = (name for name, _ in outer.named_children() if name.startswith("post_") and name.endswith("norm"))
    return outer, None if outer is block else next(norms, None)


def _linear(owner: nn.Module, path: str | None) -> nn.Linear | None:
    """A linear module at a path; None without one, and where nothing is projected."""
    module = None if path is None else find(owner, path)
    return module if isinstance(module, nn.Linear) else None


def _measured_experts(
    block: nn.Module, module: nn.Module, shared: nn.Module | None, norm: Norm | None, row: Family, family: str
) -> Experts:
    """The experts of a block, with the factors that its own module applies outside the router."""
    outer, _ = _around(block, module)
    if outer is block:  # nothing stands around them that might multiply
        return Experts(module, held=held)
    inlet, outlet = (_linear(outer, path) for path in row.latent or (None, None))
    gates = (inner for name, inner in block.named_modules() if name.endswith("shared_expert_gate"))
    try:
        experts = measured(
            outer,
            Experts(module, shared_gate=next(gates, None), inlet=inlet, outlet=outlet, held=held),
            shared,
            norm,
        )
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise refused(family, f"its experts do not run by themselves ({reason})") from error
    if experts is None:
        raise refused(family, f"its experts do not add up to what {type(outer).__name__} returns")
    return experts


def _first_projections(
    owner: nn.Module, ffn: FeedForward, n_neurons: int, family: str
) -> tuple[Projection, Projection | None]:
    gate = part_of(owner, ffn.gate, family)
    if ffn.up == ffn.gate:
        return Projection(gate, 0, n_neurons), Projection(gate, n_neurons, 2 * n_neurons)
    up = None if ffn.up is None else Projection(part_of(owner, ffn.up, family), 0, n_neurons)
    return Projection(gate, 0, n_neurons), up


def _kv_heads(config: Any, n_heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    name = _present(config, "num_key_value_heads", "num_kv_heads")
    return int(getattr(config, name)) if name else n_heads


def _context_length(config: Any) -> int:
    """Positions the model was made for; 2048 where the config does not say (ALiBi models have no limit)."""
    name = _present(config, "max_position_embeddings", "max_seq_len", "seq_length")
    return int(getattr(config, name)) if name else 2048


def _name_of(act: Callable[[Tensor], Tensor], name: str) -> str:
    """What the config says of the activation, if it is that; else its class."""
    x = torch.linspace(-4, 4, 65)
    if name in ACT2FN and getattr(act, "__name__", None) == "widened":
        return name  # with numbers of its own
    if name in ACT2FN and not torch.allclose(act(x), ACT2FN[name](x), atol=1e-5):
        return str(getattr(act, "__name__", type(act).__name__)).lower()
    return name


def _activation(block: nn.Module, name: str, factor: float) -> Callable[[Tensor], Tensor]:
    """The block's own activation module, after a factor; the registered function of that name where it has none."""
    own = _own_activation(block)
    act = _widening(
        ACT2FN[name] if own is None else own
    )  # a compiled module cannot be asked whether it is true
    return act if factor == 1 else lambda x: act(factor * x)


def _widening(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An activation whose own numbers are in fp32 where what it is given is (xIELU)."""
    if not isinstance(act, nn.Module) or not any(True for _ in act.parameters()):
        return act

    def widened(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return act(x)
        numbers = (*act.named_parameters(), *act.named_buffers())
        return torch.func.functional_call(
            act, {name: value.detach().float() for name, value in numbers}, (x,)
        )

    return widened


def _own_activation(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    for owner in (block, *(getattr(block, name, None) for name in ("mlp", "ffn", "ffns"))):
        for attribute in ("act_fn", "activation_fn", "act", "gelu_impl", "activation"):
            act = getattr(owner, attribute, None)
            if callable(act):
                return act
    return None
