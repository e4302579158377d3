"""What is given as a model works and equals its own logits, or is refused in one line; it is left as it was."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DISTINCT, FAMILIES, VARIANTS, tiny
from safetensors.torch import load_file, save_file
from tiny import model_folder, texts, tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mnemoscope.errors import ModelChanged, ModelError, ModelNotSupported, RunMismatch
from mnemoscope.mine.build import build
from mnemoscope.model.load import load_built, load_model
from mnemoscope.model.model import Model
from mnemoscope.prediction.explain import explain
from mnemoscope.run.reading import Run, open_run

PROMPT, TARGET = "the capital of France is", " Paris"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return model_folder(tmp_path_factory.mktemp("model"))


def _state(hf: nn.Module) -> Any:
    """All that a caller would miss if it changed."""
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hf.modules()]
    weights = {name: (one.dtype, str(one.device), one._version) for name, one in hf.named_parameters()}
    return modules, weights


def _own(hf: nn.Module, token: int) -> float:
    """The log-probability that a model itself gives, in evaluation mode."""
    training = [module for module in hf.modules() if module.training]
    hf.eval()
    with torch.no_grad():
        logits = hf(torch.tensor([tokenizer()(PROMPT)["input_ids"]])).logits[0, -1]
    for module in training:
        module.training = True
    return float(logits.double().log_softmax(-1)[token])


def _adapted(targets: list[str], *, trained: bool = True, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(FAMILIES["llama"](), config)
    with torch.no_grad():
        for name, one in adapted.named_parameters():
            if trained and "lora_B" in name:
                one.normal_(0, 0.1)
    return adapted.eval()


def _training(hf: PreTrainedModel) -> PreTrainedModel:
    hf.train()
    hf.get_decoder().get_submodule(next(name for name, _ in hf.get_decoder().named_children())).eval()
    return hf


def _merged(adapted: Any) -> Any:
    adapted.merge_adapter()
    return adapted


def _disabled(adapted: Any) -> Any:
    adapted.base_model.disable_adapter_layers()
    return adapted


def _compiled_inside(hf: PreTrainedModel) -> PreTrainedModel:
    hf.compile(backend="eager")
    return hf


def _compiled_parts(hf: PreTrainedModel) -> PreTrainedModel:
    """Every module compiled by itself."""
    for parent in list(hf.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, nn.ModuleList):
                parent._modules[name] = torch.compile(child, backend="eager")  # type: ignore[assignment]
    return hf


def _checkpointed(hf: PreTrainedModel) -> PreTrainedModel:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = hf.get_decoder().layers
    for index, block in enumerate(layers):
        layers[index] = checkpoint_wrapper(block)
    return hf


def _with_hooks(hf: PreTrainedModel) -> PreTrainedModel:
    """As `dispatch_model` of accelerate leaves it where all fits on one device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in hf.modules():
        add_hook_to_module(
            module, AlignDevicesHook(io_same_device=True, execution_device=torch.device("cpu"))
        )
    return hf


def _other_head(hf: PreTrainedModel, head: nn.Module) -> PreTrainedModel:
    hf.lm_head = head
    return hf


FF, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj", "o_proj"]
PARTS = ("llama", "gpt2", "gemma2", "gpt_neox", "opt")
TAKEN: dict[str, Callable[[], Any]] = {
    **{
        f"{family} in training mode": lambda family=family: _training(FAMILIES[family]())
        for family in FAMILIES
    },
    "compiled": lambda: torch.compile(FAMILIES["llama"](), backend="eager"),
    "compiled in place": lambda: _compiled_inside(FAMILIES["llama"]()),
    "data parallel": lambda: nn.DataParallel(FAMILIES["gpt2"]()),
    "compiled data parallel": lambda: torch.compile(nn.DataParallel(FAMILIES["gpt2"]()), backend="eager"),
    **{
        f"{family} compiled in parts": lambda family=family: _compiled_parts(FAMILIES[family]())
        for family in PARTS
    },
    "checkpointed layers": lambda: _checkpointed(FAMILIES["llama"]()),
    "hooks of accelerate": lambda: _with_hooks(FAMILIES["llama"]()),
    "tied head replaced": lambda: _other_head(VARIANTS["llama_tied"](), nn.Linear(32, 80)),
    "merged adapter on the FFN": lambda: _merged(_adapted(FF)),
    "merged adapter on attention": lambda: _merged(_adapted(ATTENTION)),
    "disabled adapter": lambda: _disabled(_adapted(FF)),
    "merged and unloaded": lambda: _adapted(FF).merge_and_unload(),
}


# Each of these compiles for seconds; quick are a model compiled in place and a parallel one.
DEAR = {
    "compiled", "compiled data parallel", *(f"{family} compiled in parts" for family in PARTS),
    *(f"{family} in training mode" for family in FAMILIES.keys() - DISTINCT),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in DEAR else []) for kind in TAKEN]
)
def test_what_is_taken_equals_the_models_own_logits(kind: str) -> None:
    """explain gives the log-probability of the object that was passed, and that object is as it was."""
    given = TAKEN[kind]()
    before = _state(given)
    model = load_model(given, tokenizer=tokenizer())
    found = explain(model, PROMPT, TARGET, top=2)
    assert _state(given) == before
    assert found.log_probability == pytest.approx(_own(given, found.target.token), abs=1e-4)


def _loaded_with_adapter(tmp_path: Path) -> PreTrainedModel:
    _adapted(FF).save_pretrained(tmp_path / "adapter")
    hf = FAMILIES["llama"]()
    hf.load_adapter(str(tmp_path / "adapter"))
    return hf


def _on_meta(_: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(FAMILIES["llama"]().config)


def _prompted(_: Path) -> Any:
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(
        FAMILIES["llama"](), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )


def _mixed_precision(_: Path) -> PreTrainedModel:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    try:
        prepared: PreTrainedModel = Accelerator(mixed_precision="bf16", cpu=True).prepare(FAMILIES["llama"]())
        return prepared
    finally:
        AcceleratorState._reset_state()


def _mixed(_: Path) -> PreTrainedModel:
    hf = FAMILIES["llama"]()
    hf.model.layers[1].mlp.to(torch.bfloat16)
    return hf


class Opaque:
    """An object whose text is long."""

    def __repr__(self) -> str:
        return "x" * 10_000


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda _: None, "None is not one; give a Hugging Face id"),
    "number": (lambda _: 3, "type int is not one"),
    "opaque": (lambda _: Opaque(), r"Opaque is not one"),
    "linear": (lambda _: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear is not one"),
    "no head": (lambda _: FAMILIES["llama"]().model, "no language-model head"),
    "adapter": (lambda _: _adapted(FF), r"'default' .* is not merged.*merge_and_unload\(\)"),
    "adapter on q and v": (lambda _: _adapted(["q_proj", "v_proj"]), "is not merged"),
    "its base model": (lambda _: _adapted(FF).get_base_model(), "is not merged"),
    "saved modules": (lambda _: _adapted(["q_proj"], modules_to_save=["lm_head"]), "is not merged"),
    "merged beside saved modules": (
        lambda _: _merged(_adapted(["q_proj"], modules_to_save=["lm_head"])),
        "lm_head is a trained copy",
    ),
    "load_adapter": (_loaded_with_adapter, "is not merged"),
    "prepared for mixed precision": (_mixed_precision, r"mixed precision.*keep_fp32_wrapper=False"),
    "prompt tuning": (_prompted, "vectors before the prompt that are no tokens.*get_base_model"),
    "head of two matrices": (
        lambda _: _other_head(FAMILIES["llama"](), nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 80))),
        r"no plain matrix \(Sequential\)",
    ),
    "on meta": (_on_meta, "on the meta device"),
    "float64": (lambda _: FAMILIES["llama"]().double(), r"float64; .*copy\.deepcopy"),
    "layers of two dtypes": (_mixed, r"weights are in bfloat16 and float32: .*hf\.to"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_taken_is_one_short_line_with_the_cure(kind: str, tmp_path: Path) -> None:
    """The type and what to do, never a traceback or the object's whole text."""
    make, words = REFUSED[kind]
    with pytest.raises(ModelError, match=words) as caught:
        load_model(make(tmp_path), tokenizer=tokenizer())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 420


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_with_an_adapter_is_never_read_as_its_base(
    folder: Path, tmp_path: Path, with_config: bool
) -> None:
    """The line names the base and how to merge the two."""
    _adapted(ATTENTION).save_pretrained(tmp_path)
    if with_config:
        shutil.copy(folder / "config.json", tmp_path)
        shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(ModelError, match=r"holds an adapter .*as adapter="):
        load_model(tmp_path, tokenizer=tokenizer())


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"dtype": "bf16"}, "bf16.*it is in fp32"),
        ({"device": "meta"}, "meta"),
        ({"revision": "main"}, "revision='main'"),
        ({"allow_unused": True}, "allow_unused=True"),
    ],
)
def test_what_cannot_apply_to_a_loaded_model_is_refused(keywords: dict[str, Any], words: str) -> None:
    """A keyword is either already true of the model, or the line says so."""
    hf = FAMILIES["llama"]()
    with pytest.raises(ModelError, match=words):
        load_model(hf, tokenizer=tokenizer(), **keywords)
    assert load_model(hf, tokenizer=tokenizer(), dtype="float32", device="cpu").dtype == "fp32"


# -- checkpoints ---------------------------------------------------------------------------------------------

Change = Callable[[dict[str, torch.Tensor]], None]


def _changed(folder: Path, path: Path, change: Change) -> Path:
    shutil.copytree(folder, path, dirs_exist_ok=True)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def _biases(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.ones(24)


def _eight_bits(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = scale.reshape(1)


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 100).round().to(torch.int8)


def _other_size(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_biases, r"nothing reads 3 tensors of its checkpoint \(model\.layers\.0\.self_attn\.q_proj\.bias, "),
        (_eight_bits, r"nothing reads 21 tensors .*_scale"),
        (_integers, "1 weights are stored as integers"),
        (_other_size, r"1 tensors have another size .*model\.norm\.weight: \[7\] instead of \[32\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_an_error(
    folder: Path, tmp_path: Path, change: Change, words: str
) -> None:
    """The line says how many and names the first."""
    path = _changed(folder, tmp_path / "model", change)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(path, dtype="fp32")
    assert "\n" not in str(caught.value)


def test_unused_tensors_can_be_allowed_and_are_then_on_record(folder: Path, tmp_path: Path) -> None:
    """The manifest of a run says what was left out, and the run finds its model again without being told."""
    path = _changed(folder, tmp_path / "model", _biases)
    model = load_model(path, dtype="fp32", allow_unused=True)
    assert model.unused == ("model.layers.*.self_attn.q_proj.bias (3; not read)",)
    run = build(model, texts(10), tmp_path / "run", top=2, nulls=())
    assert run.manifest.model.unused == list(model.unused)
    assert load_built(open_run(tmp_path / "run")).unused == model.unused


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.0.attn.bias",
        "model.position_ids",
        "mtp.layers.0.weight",
    ],
)
def test_buffers_of_old_checkpoints_are_no_error(folder: Path, tmp_path: Path, name: str) -> None:
    """What transformers itself ignores is not weights of the model."""
    path = _changed(folder, tmp_path / "model", lambda tensors: tensors.update({name: torch.ones(4)}))
    assert load_model(path, dtype="fp32").unused == ()


def test_towers_for_other_senses_are_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    """A vision tower is nothing that text goes through."""
    extra = {f"model.vision_tower.layers.{i}.fc.weight": torch.ones(2, 2) for i in range(4)}
    path = _changed(folder, tmp_path / "model", lambda tensors: tensors.update(extra))
    (said,) = load_model(path, dtype="fp32").unused
    assert said == "model.vision_tower.layers.*.fc.weight (4; not read: only text goes through the model)"


# -- what is true at load may not be true later ----------------------------------------------------------------


def _dropping() -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return tiny("gpt2", vocab_size=80, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, **sizes)


@torch.no_grad()
def _step(hf: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for one in hf.parameters():
        one.add_(0.05 * torch.randn(one.shape, generator=generator))


def _behind(hf: PreTrainedModel) -> None:
    """Written as adapters are merged: autograd does not see it."""
    hf.get_decoder().layers[-1].mlp.down_proj.weight.data += 0.01


def test_a_model_in_training_mode_is_read_without_dropout(tmp_path: Path) -> None:
    """The tables are those of evaluation mode, and the model goes on training."""
    hf = _dropping()
    model = load_model(hf, tokenizer=tokenizer())
    still = build(model, texts(20), tmp_path / "eval", top=2)
    hf.train()
    moving = build(model, texts(20), tmp_path / "train", top=2)
    assert all(module.training for module in hf.modules())
    assert {k: v.sha256 for k, v in still.manifest.tables.items()} == {
        k: v.sha256 for k, v in moving.manifest.tables.items()
    }


def test_the_last_that_runs_a_model_puts_its_mode_back() -> None:
    """Blocks lie inside one another: dropout stays off until the outermost ends."""
    hf = _dropping().train()
    model = load_model(hf, tokenizer=tokenizer())
    with model.running():
        with model.running():
            assert not any(module.training for module in hf.modules())
        assert not any(module.training for module in hf.modules())
    assert all(module.training for module in hf.modules())


def test_a_copy_of_a_model_has_a_state_of_its_own() -> None:
    """Its modules are others than those of the original, also where one is copied while the other is run."""
    model = load_model(_dropping().train(), tokenizer=tokenizer())
    with model.running():
        copied = copy.deepcopy(model)
    for one in (copied, pickle.loads(pickle.dumps(model))):
        with one.running(), one.running():
            assert not any(module.training for module in one.hf.modules())
        assert one.weights_sha256 == model.weights_sha256


@pytest.mark.parametrize("change", [_step, _behind])
def test_changed_weights_are_another_model(change: Callable[[Any], None], tmp_path: Path) -> None:
    """After a training step the hash is new, an old run is not handed back, and a new one is that of a fresh load."""
    hf = FAMILIES["llama"]()
    model = load_model(hf, tokenizer=tokenizer())
    before = model.weights_sha256
    build(model, texts(10), tmp_path / "run", top=2)
    change(hf)
    fresh = load_model(hf, tokenizer=tokenizer())
    assert model.weights_sha256 == fresh.weights_sha256 != before
    with pytest.raises(RunMismatch, match="weights_sha256"):
        build(model, texts(10), tmp_path / "run", top=2)
    runs = [build(one, texts(10), tmp_path / name, top=2) for name, one in (("a", model), ("b", fresh))]
    assert len({run.manifest.tables["values"].sha256 for run in runs}) == 1
    assert explain(model, PROMPT, TARGET, top=2).log_probability == pytest.approx(
        explain(fresh, PROMPT, TARGET, top=2).log_probability, abs=1e-6
    )


def test_norms_are_read_again_after_a_change() -> None:
    """A norm is kept as a copy; the copy follows the weights."""
    hf = FAMILIES["llama"]()
    model = load_model(hf, tokenizer=tokenizer())
    with torch.no_grad():
        hf.model.norm.weight.mul_(3.0)
    found = explain(model, PROMPT, TARGET, top=2)
    assert model.anatomy.final_norm is not None and model.anatomy.final_norm.weight is not None
    assert torch.equal(model.anatomy.final_norm.weight, hf.model.norm.weight)
    assert found.log_probability == pytest.approx(_own(hf, found.target.token), abs=1e-4)


def test_a_hook_that_came_later_is_found() -> None:
    """A steering hook after loading is refused where the model is used, and forgotten when it is gone."""
    hf = FAMILIES["llama"]()
    model = load_model(hf, tokenizer=tokenizer())
    before = explain(model, PROMPT, TARGET, top=2).log_probability
    handle = hf.model.layers[1].register_forward_hook(lambda _, __, output: output + 1.0)
    with pytest.raises(ModelNotSupported, match="layer 1"):
        explain(model, PROMPT, TARGET, top=2)
    handle.remove()
    assert explain(model, PROMPT, TARGET, top=2).log_probability == before


def _scaled(forward: Callable[..., Any], by: float) -> Callable[..., Any]:
    return lambda *args, **options: forward(*args, **options) * by


def _hook_of_accelerate(hf: PreTrainedModel, _: pytest.MonkeyPatch) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Louder(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 1.5

    add_hook_to_module(hf.get_decoder().layers[1].mlp, Louder())


def _epsilons(hf: PreTrainedModel, _: pytest.MonkeyPatch) -> None:
    for module in hf.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


def _multipliers(hf: PreTrainedModel, _: pytest.MonkeyPatch) -> None:
    for block in hf.get_decoder().layers:
        block.residual_multiplier = 1.0


def _method(hf: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    mlp = hf.get_decoder().layers[1].mlp
    patch.setattr(mlp, "forward", _scaled(mlp.forward, 2.0), raising=False)


def _class_method(hf: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    kind = type(hf.get_decoder().layers[1].mlp)
    patch.setattr(kind, "forward", _scaled(kind.forward, 2.0))


LATER: dict[str, tuple[str, Callable[[Any, pytest.MonkeyPatch], Any]]] = {
    "forward of a module": ("llama", _method),
    "forward of a class": ("llama", _class_method),
    "hook of accelerate": ("llama", _hook_of_accelerate),
    "epsilon": ("llama", _epsilons),
    "layers removed": ("llama", lambda hf, _: setattr(hf.model, "layers", hf.model.layers[:2])),
    "another activation": (
        "gpt2",
        lambda hf, _: [setattr(b.mlp, "act", nn.SiLU()) for b in hf.transformer.h],
    ),
    "another head": ("llama", lambda hf, _: _other_head(hf, nn.Linear(32, 80))),
    "multiplier of a block": ("granite", _multipliers),
    "multiplier of the logits": ("cohere", lambda hf, _: setattr(hf, "logit_scale", 1.0)),
    "cap of the logits": ("gemma2", lambda hf, _: setattr(hf.config, "final_logit_softcapping", 1.0)),
}


def _answer(model: Callable[[], Model]) -> Any:
    """A whole explanation, or the line in which it is refused."""
    try:
        found = explain(model(), PROMPT, TARGET, top=2).to_dict()
    except ModelNotSupported as error:
        return str(error)
    return found


@pytest.mark.parametrize("change", LATER)
def test_a_model_that_was_changed_is_explained_as_if_it_were_loaded_now(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code, settings and parts are looked at where they are used: the answer is that of a fresh load."""
    family, act = LATER[change]
    hf = FAMILIES[family]()
    model = load_model(hf, tokenizer=tokenizer())
    before = _answer(lambda: model)
    act(hf, monkeypatch)
    after = _answer(lambda: model)
    assert after == _answer(lambda: load_model(hf, tokenizer=tokenizer())) != before


def test_an_activation_is_named_as_it_is() -> None:
    """Where a module was replaced the config says another name than that of what is computed."""
    hf = FAMILIES["llama"]()
    assert load_model(hf, tokenizer=tokenizer()).anatomy.activation == "silu"
    for block in hf.model.layers:
        block.mlp.act_fn = nn.GELU()
    assert load_model(hf, tokenizer=tokenizer()).anatomy.activation == "gelu"


@pytest.mark.slow
def test_a_change_that_only_the_whole_hash_shows_stops_one_build_and_no_more(tmp_path: Path) -> None:
    """One entry of a matrix, written where autograd counts nothing: refused, and read anew at the next build."""
    with torch.inference_mode():
        hf = FAMILIES["llama"]()
    model = load_model(hf, tokenizer=tokenizer())
    before = model.weights_sha256
    with torch.inference_mode():
        hf.model.layers[1].mlp.down_proj.weight[0, 1] += 1.0
    with pytest.raises(ModelChanged, match="changed meanwhile"):
        build(model, texts(10), tmp_path / "run", top=2)
    run = build(model, texts(10), tmp_path / "run", top=2)
    fresh = load_model(hf, tokenizer=tokenizer()).weights_sha256
    assert run.manifest.model.weights_sha256 == fresh != before


def test_a_tokenizer_that_was_changed_is_another(tmp_path: Path) -> None:
    """A beginning that it puts before texts from now on: the old run is not handed back."""
    given = tokenizer()
    model = load_model(FAMILIES["llama"](), tokenizer=given)
    before = build(model, texts(10), tmp_path / "run", top=2)
    given.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    with pytest.raises(RunMismatch, match="tokenizer_sha256"):
        build(model, texts(10), tmp_path / "run", top=2)
    after = build(model, texts(10), tmp_path / "other", top=2).manifest.model.tokenizer_sha256
    fresh = load_model(FAMILIES["llama"](), tokenizer=given).tokenizer_sha256
    assert after == fresh != before.manifest.model.tokenizer_sha256


@contextmanager
def _defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_dtype() == dtype
        assert device is None or torch.get_default_device().type == device
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "bf16 by default": lambda: _defaults(torch.bfloat16, None),
    "float64 by default": lambda: _defaults(torch.float64, None),
    "another device by default": lambda: _defaults(torch.float32, "meta"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Run]:
    """An explanation and a run that nothing surrounds."""
    model = load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    run = build(model, texts(10), tmp_path_factory.mktemp("plain") / "run", top=2)
    return explain(model, PROMPT, TARGET, top=2).to_dict(), run


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before loading", "after loading"])
@pytest.mark.parametrize("kind", SURROUNDINGS)
def test_what_surrounds_a_call_changes_no_number(
    kind: str, when: str, undisturbed: tuple[dict[str, Any], Run], tmp_path: Path
) -> None:
    """Autocast and defaults of torch hold in one thread of one process; a run must not depend on its workers."""
    expected, plain = undisturbed
    hf = FAMILIES["llama"]()
    still = load_model(hf, tokenizer=tokenizer())
    with SURROUNDINGS[kind]():
        model = still if when == "after loading" else load_model(hf, tokenizer=tokenizer())
        found = explain(model, PROMPT, TARGET, top=2).to_dict()
        run = build(model, texts(10), tmp_path / "run", top=2)
    assert found == expected
    assert {k: v.sha256 for k, v in run.manifest.tables.items()} == {
        k: v.sha256 for k, v in plain.manifest.tables.items()
    }
    assert run.manifest.model.self_check == plain.manifest.model.self_check


def test_what_load_model_refuses_is_refused_later_too() -> None:
    """A model that became float64 after loading is one line, as it would have been then."""
    hf = FAMILIES["llama"]()
    model = load_model(hf, tokenizer=tokenizer())
    hf.double()
    with pytest.raises(ModelNotSupported, match="is in float64"):
        explain(model, PROMPT, TARGET, top=2)


@pytest.mark.slow
@pytest.mark.parametrize("change", [_step, _behind, lambda hf: hf.set_attn_implementation("eager")])
def test_a_change_in_the_middle_of_a_build_leaves_nothing(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    """One line, no run, and nothing that a later build could go on from."""
    hf = FAMILIES["llama"]()
    model = load_model(hf, tokenizer=tokenizer())
    seen: list[str] = []

    def report(step: Any) -> None:
        if step.stage == "reading values" and not seen:
            change(hf)
        seen.append(step.stage) if step.stage == "reading values" else None

    with pytest.raises(ModelChanged, match="changed meanwhile") as caught:
        build(model, texts(10), tmp_path / "run", top=2, report=report)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "manifest.json").exists()
    fresh = build(load_model(hf, tokenizer=tokenizer()), texts(10), tmp_path / "other", top=2)
    again = build(model, texts(10), tmp_path / "run", top=2)
    assert again.manifest.tables["neurons"].sha256 == fresh.manifest.tables["neurons"].sha256


# -- padding, short contexts ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 79])
def test_an_embedding_that_no_text_uses_may_hold_anything(row: int, tmp_path: Path) -> None:
    """Batches are filled up with tokens of their own, so NaN in any other row changes no table of the text."""
    tables = []
    for name, value in (("whole", None), ("damaged", float("nan"))):
        hf = FAMILIES["llama"]()
        if value is not None:
            with torch.no_grad():
                hf.model.embed_tokens.weight[row] = value
        run = build(load_model(hf, tokenizer=tokenizer()), texts(40), tmp_path / name, top=3)
        tables.append(
            {table: run.manifest.tables[table].sha256 for table in ("triggers", "histograms", "shards")}
        )
    assert tables[0] == tables[1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("positions", [3, 5])
def test_a_model_of_a_few_positions_works(family: str, positions: int, tmp_path: Path) -> None:
    """Toy models are read whole: a run, and an explanation of the model's own probability."""
    small = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions},
        "llama": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 40,
        },
        "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40},
    }[family]
    if family != "gpt2":
        small |= {"max_position_embeddings": positions} | (
            {"word_embed_proj_dim": 32} if family == "opt" else {}
        )
    hf = tiny(family, vocab_size=80, **small)
    model = load_model(hf, tokenizer=tokenizer())
    assert build(model, ["the king of", "the queen is"], tmp_path / "run", top=2).manifest.corpus.contexts
    found = explain(model, "the king of", TARGET, top=2)
    ids = torch.tensor([tokenizer()("the king of")["input_ids"]])
    with torch.no_grad():
        own = hf(ids).logits[0, -1].log_softmax(-1)[found.target.token]
    assert found.log_probability == pytest.approx(float(own), abs=1e-4)


# -- models that moved ---------------------------------------------------------------------------------------


def test_a_run_finds_its_model_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name is meant from where the run was built, also where another model has that name."""
    model_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    build(load_model("model", dtype="fp32"), texts(10), "run", top=2, nulls=())
    (tmp_path / "trap").mkdir()
    model_folder(tmp_path / "trap" / "model", "gpt2")
    monkeypatch.chdir(tmp_path / "trap")
    run = open_run(tmp_path / "run")
    assert load_built(run).anatomy.family == "llama"
    with pytest.raises(RunMismatch, match="model=") as caught:
        load_built(run, "model").check_built(run, "verifying")
    assert "--model" in caught.value.on_command_line()


def test_a_model_that_is_gone_is_said_at_once(tmp_path: Path) -> None:
    """No network: the line says what was looked at, and what to say where it is now."""
    build(
        load_model(model_folder(tmp_path / "model"), dtype="fp32"),
        texts(10),
        tmp_path / "run",
        top=2,
        nulls=(),
    )
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    run, start = open_run(tmp_path / "run"), time.monotonic()
    with pytest.raises(ModelError, match=r"model is not there; .*model=") as caught:
        load_built(run)
    assert "with --model" in caught.value.on_command_line()
    assert time.monotonic() - start < 1
    model = load_built(run, tmp_path / "elsewhere")
    model.check_built(run, "verifying")


def test_a_hub_model_that_cannot_be_had_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One attempt: the cause as it was seen."""
    import httpx2
    import huggingface_hub as hub

    asked = []

    def no_network(url: str, **_: Any) -> None:
        asked.append(url)
        raise httpx2.ConnectError("Name or service not known")

    monkeypatch.setattr(hub, "get_hf_file_metadata", no_network)
    with pytest.raises(ModelError, match=r"nor reachable \(Name or service not known\)"):
        load_model("nobody/nothing-here")
    assert len(asked) == 1


def test_code_that_a_model_brings_is_named_as_it_is_allowed(tmp_path: Path) -> None:
    """By the keyword in Python, by the option on the command line."""
    config = {"model_type": "of-its-own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("class Config: ...")
    with pytest.raises(ModelError, match="if you trust it, give trust_remote_code=True") as caught:
        load_model(tmp_path)
    assert caught.value.on_command_line().endswith("if you trust it, give --trust-remote-code")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_folder_without_a_tokenizer_is_blamed_on_the_tokenizer(family: str, tmp_path: Path) -> None:
    """Where transformers makes an empty one, too."""
    FAMILIES[family]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"loading the tokenizer of .*tokenizer\.json"):
        load_model(tmp_path)


def test_a_model_of_ours_is_a_model(folder: Path) -> None:
    """`load_model` takes its own result, and manifests of older runs open without the new fields."""
    model = load_model(folder, dtype="fp32")
    assert isinstance(load_model(model), Model)
    entry = model.entry().model_dump()
    for name in ("path", "unused"):
        entry.pop(name)
    assert type(model.entry()).model_validate(json.loads(json.dumps(entry))).unused == []
