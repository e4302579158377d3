"""The self-check is of the model as it will be run: its own attention, batches, masks, lengths."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, VARIANTS, tiny
from tiny import tokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.check import examine
from mnemoscope.model.load import load_model
from mnemoscope.model.stream import trace
from mnemoscope.model.watch import TOLERANCE
from mnemoscope.prediction.explain import explain

REGISTERED = ("llama", "gpt2", "qwen2", "gemma", "gpt_neox", "opt", "olmo2")


def _state(hf: PreTrainedModel) -> Any:
    """All that a check could leave behind in a model."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in hf.modules()]
    configs = {id(m.config): m.config._attn_implementation for m in hf.modules() if hasattr(m, "config")}
    weights = {name: (p.data_ptr(), p.dtype, p._version) for name, p in hf.named_parameters()}
    return hooks, configs, hf.config.use_cache, weights


@pytest.fixture
def implementations() -> Iterator[dict[str, Any]]:
    """The registry of attention functions, put back at the end."""
    registry = AttentionInterface._global_mapping
    before = dict(registry)
    yield registry
    registry.clear()
    registry.update(before)


def _sharper(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    return sdpa_attention_forward(module, query * 3.0, key, value, mask, **options)


@pytest.mark.parametrize("family", REGISTERED)
def test_a_registered_attention_function_is_refused_by_name(
    family: str, implementations: dict[str, Any]
) -> None:
    """The line names the implementation, how far off it is and what to do; the model is left as it was."""
    implementations["sharper"] = _sharper
    hf = FAMILIES[family]()
    hf.set_attn_implementation("sharper")
    before = _state(hf)
    with pytest.raises(
        ModelNotSupported, match=r"'sharper' differ by [\d.]+e[-+]\d+ of their range"
    ) as caught:
        load_model(hf, tokenizer=tokenizer())
    assert 'set_attn_implementation("eager")' in str(caught.value) and "\n" not in str(caught.value)
    assert _state(hf) == before


def test_a_registered_function_that_computes_the_same_is_taken(implementations: dict[str, Any]) -> None:
    """What differs by rounding only is the same model."""
    implementations["same"] = sdpa_attention_forward
    hf = FAMILIES["llama"]()
    hf.set_attn_implementation("same")
    assert examine(hf)[1] < TOLERANCE
    assert hf.config._attn_implementation == "same"


def test_a_function_that_cannot_run_here_is_one_line(implementations: dict[str, Any]) -> None:
    """An implementation without a kernel for this device says so, with the cure."""

    def _no_kernel(*_: Any, **__: Any) -> Any:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nSee the manual")

    implementations["same"] = _no_kernel
    hf = FAMILIES["llama"]()
    hf.set_attn_implementation("same")
    with pytest.raises(ModelNotSupported, match=r"only supports Ampere GPUs or newer; .*eager") as caught:
        examine(hf)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sharpen", [1.0, 3.0])
def test_a_function_for_half_precision_only_is_compared_in_it(
    implementations: dict[str, Any], sharpen: float
) -> None:
    """Flash attention has no fp32: in bf16 it may round as eager attention does, and no more."""

    def _half(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if query.dtype == torch.float32:
            raise RuntimeError("only fp16 and bf16 are supported")
        return sdpa_attention_forward(module, query * sharpen, key, value, mask, **options)

    implementations["same"] = _half
    hf = FAMILIES["llama"]().bfloat16()
    hf.set_attn_implementation("same")
    if sharpen == 1.0:
        assert examine(hf)[1] < TOLERANCE
    else:
        with pytest.raises(ModelNotSupported, match="'same' differ"):
            examine(hf)


@pytest.mark.parametrize("when", ["batch", "batch without a mask", "length", "mask"])
def test_a_hook_that_acts_only_in_other_inputs_is_found(when: str) -> None:
    """Steering that one short sequence without a mask does not see still makes it another model."""
    hf = FAMILIES["llama"]()

    def steer(_: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> Tensor | None:
        acts = {
            "batch": output.shape[0] > 1,
            "batch without a mask": output.shape[0] > 1 and kwargs.get("past_key_values") is None,
            "length": output.shape[1] > 8,
            "mask": kwargs.get("past_key_values") is not None,
        }
        return output + 1.0 if acts[when] else None

    hf.model.layers[1].register_forward_hook(steer, with_kwargs=True)
    with pytest.raises(ModelNotSupported, match="differ"):
        examine(hf)


@pytest.mark.parametrize("window", [4, 12, 40])
def test_what_begins_beyond_the_window_is_looked_at(window: int, implementations: dict[str, Any]) -> None:
    """A function that forgets a sliding window differs only where a text is longer than the window."""
    # Without a mask function of its own, a registered implementation gets no mask at all.
    implementations["forgetful"] = sdpa_attention_forward
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    hf = tiny("mistral", vocab_size=80, num_key_value_heads=2, sliding_window=window, **sizes)
    hf.set_attn_implementation("forgetful")
    with pytest.raises(ModelNotSupported, match="'forgetful' differ"):
        examine(hf)


@pytest.mark.parametrize("window", [28, 40])
def test_a_function_that_differs_beyond_the_check_on_load_is_found_where_it_does(
    window: int, implementations: dict[str, Any]
) -> None:
    """A registered function with a window of its own is explained up to it, and refused beyond it."""

    def windowed(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        count = query.shape[2]
        near = torch.ones(count, count, dtype=torch.bool).tril().triu(1 - window)
        options.pop("is_causal", None)
        return sdpa_attention_forward(module, query, key, value, near[None, None], is_causal=False, **options)

    implementations["windowed"] = windowed
    hf = FAMILIES["llama"]()
    hf.set_attn_implementation("windowed")
    model = load_model(hf, tokenizer=tokenizer())
    within, beyond = (torch.arange(count)[None] % 70 + 3 for count in (window, window + 1))
    assert model.traced(within).logits.shape[0] == window
    with pytest.raises(ModelNotSupported, match="'windowed' differ"):
        model.traced(beyond)


@pytest.mark.slow
def test_a_family_whose_eager_attention_is_another_is_taken_apart_under_its_own() -> None:
    """ALiBi in Falcon is added twice under "eager": the parts are those of "sdpa", as the model is run."""
    hf = VARIANTS["falcon_rw_alibi"]()
    anatomy, error = examine(hf)
    ids = torch.tensor([[5, 9, 3, 17, 30, 2, 44, 8, 61, 12, 7]])
    with torch.no_grad():
        own = hf(input_ids=ids).logits[0]
    assert (anatomy.attention, hf.config._attn_implementation) == ("sdpa", "sdpa")
    assert error < TOLERANCE
    torch.testing.assert_close(trace(hf, anatomy, ids).logits, own, rtol=1e-4, atol=1e-5)
    eager = copy.deepcopy(hf)
    eager.config._attn_implementation_internal = "eager"
    assert examine(eager)[0].attention == "eager"
    with torch.no_grad():
        assert float((eager(input_ids=ids).logits[0] - own).abs().max()) > 0.01


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers calls flex attention in an old way
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # it is, to be watched
@pytest.mark.parametrize(
    "implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_explanation_is_of_the_models_own_logits(implementation: str, dtype: torch.dtype) -> None:
    """Whatever implementation a model has, explain gives its own log-probability (fp32), and leaves it as it was."""
    hf, ids = FAMILIES["llama"]().to(dtype), tokenizer()("the capital of France is")["input_ids"]
    hf.set_attn_implementation(implementation)
    before = _state(hf)
    model = load_model(hf, tokenizer=tokenizer())
    found = explain(model, "the capital of France is", " Paris", top=2)
    assert _state(hf) == before
    with torch.no_grad():
        own = hf.float()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[found.target.token]
    assert found.log_probability == pytest.approx(float(own), abs=1e-4)


@pytest.mark.parametrize("kind", ["weight norm", "pruned"])
def test_computed_weights_are_the_models_own(kind: str) -> None:
    """Parametrized and pruned weights are read as they act, and the model goes on as before."""
    hf, ids = FAMILIES["llama"](), torch.tensor([[5, 6, 7]])
    down = hf.model.layers[0].mlp.down_proj
    if kind == "pruned":
        prune.l1_unstructured(down, "weight", 0.5)
    else:
        parametrizations.weight_norm(down)
    with torch.no_grad():
        own = hf(ids).logits
        anatomy, error = examine(hf)
        assert error < TOLERANCE
        assert torch.equal(anatomy.layers[0].values(), down.weight.T)
        assert torch.equal(hf(ids).logits, own)


def test_more_tokens_than_a_model_has_positions_are_not_asked_for() -> None:
    """A toy model of three positions is checked on three."""
    for family, name, length in (("gpt2", "n_positions", 3), ("llama", "max_position_embeddings", 4)):
        sizes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}.get(
            family,
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40},
        )
        assert examine(tiny(family, vocab_size=14, **sizes, **{name: length}))[1] < TOLERANCE


def test_rows_that_no_text_has_may_hold_anything() -> None:
    """NaN in most embeddings of an untied model is nothing that the check may stumble over."""
    hf = FAMILIES["llama"]()
    with torch.no_grad():
        hf.model.embed_tokens.weight[::2] = float("nan")
    assert examine(hf)[1] < TOLERANCE
