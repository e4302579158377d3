"""Loading a model from a name or from memory, and proving its parts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import cached_file

from mnemoscope import files
from mnemoscope.arguments import DTYPES, check_loading
from mnemoscope.errors import ModelError, ModelNotSupported
from mnemoscope.location import is_url
from mnemoscope.model import adapters, devices
from mnemoscope.model.accepted import ACCEPTED, is_path, unwrapped
from mnemoscope.model.check import examine
from mnemoscope.model.checkpoint import check_tensors, check_types, only_cached
from mnemoscope.model.encoders import ENCODERS
from mnemoscope.model.fairseq_checkpoint import DICTIONARY, is_fairseq
from mnemoscope.model.fairseq_checkpoint import load as load_fairseq
from mnemoscope.model.model import NAMES, Model, embedding_rows, native_bf16
from mnemoscope.model.packed import ordinary
from mnemoscope.model.spread import home, is_spread
from mnemoscope.model.unit_files import load_units
from mnemoscope.model.unit_set import UnitSet
from mnemoscope.records import AdapterEntry
from mnemoscope.text import samples
from mnemoscope.text.dictionary import dictionary_tokenizer
from mnemoscope.text.tokenizer import accepted, check_rows

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

_ROOM = 1.1  # bytes of a device for each that the weights take: a batch needs some
_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)


def load_model(
    source: str | Path | PreTrainedModel | Model,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_unused: bool = False,
    adapter: str | Path | None = None,
    units: str | UnitSet | None = None,
    progress: Callable[[str], None] | None = None,
) -> Model:
    """Load a model and prove that its parts add up to its logits.

    source    Hugging Face id, local folder (of transformers, or of fairseq: model.pt and dict.txt), .gguf file,
              ``sample:smollm2-135m``, or a loaded PreTrainedModel, also inside of torch.compile, DataParallel or a
              PeftModel whose adapters are merged; it is left as it was
    tokenizer needed beside a PreTrainedModel that does not say where it came from; one of transformers or
              `tokenizers`, or the folder or id of one
    dtype     ``auto`` (bf16 where the processor multiplies it natively, else fp32), ``fp32``, ``bf16``, ``fp16``
    device    ``auto`` (a CUDA device when there is one), or a torch device; or several that are alike
              (``cuda:0,cuda:1``; ``all`` of this machine): it lies on the first, and a build runs on each; what is too
              large for one is spread over them by accelerate
    allow_unused  accept a checkpoint with tensors that nothing reads; `Model.unused` says which
    adapter   of PEFT, merged into the model that is loaded: a folder, or a Hugging Face id (OWNER/NAME@REVISION)
    units     read these instead of its neurons: ``sae:PATH_OR_REPO``, ``transcoder:PATH_OR_REPO`` or
              ``directions:FILE.safetensors`` (docs/units.md)

    A loaded model stays in its dtype and on its device: another dtype, device or revision is refused.
    Raises ModelError when it cannot be found or read or its tokenizer is another model's, ModelNotSupported when its
    parts do not add up.
    """
    check_loading(dtype, device)
    places: tuple[torch.device, ...] = ()
    say = progress or (lambda _: None)
    if isinstance(source, Model):
        units, places = source.units if units is None else units, source.devices
        source, tokenizer = source.hf, tokenizer or source.tokenizer
    held = (
        load_units(units) if isinstance(units, str) else units
    )  # before the weights: a wrong name costs nothing
    unused: tuple[str, ...] = ()
    path: str | None = None
    merged: AdapterEntry | None = None
    if is_path(source):
        name = os.fspath(source)
        places = devices.named(device)
        target = places[0]
        where = Where.of(name, revision, trust_remote_code, say)
        say("loading weights")
        hf, unused = _weights(where, dtype_of(dtype, target), places, allow_unused)
        hf, path = (hf if hf.device == target or is_spread(hf) else hf.to(target)).eval(), where.path
        if adapter is not None:
            say("merging the adapter")
            hf, merged = adapters.merge(hf, os.fspath(adapter), name)
            name = f"{name} + {merged.id}"
    else:
        hf = unwrapped(source)
        places = devices.named(device) if device != "auto" else places
        name = str(hf.config._name_or_path or type(hf).__name__)
        _check_applies(hf, dtype, device, revision, allow_unused, adapter)
        where = Where(name, name, _commit(hf), trust_remote_code)
    if tokenizer is None or is_path(tokenizer):
        tokenizer = tokenizer_of(where if tokenizer is None else Where.named(tokenizer, trust_remote_code))
    tokenizer = accepted(tokenizer)
    check_rows(tokenizer, embedding_rows(hf), name)
    say("checking that the parts add up to the logits")
    anatomy, error = examine(hf)
    several = () if len(places) < 2 or is_spread(hf) else places
    return Model(
        hf,
        tokenizer,
        anatomy,
        name,
        _commit(hf) or revision,
        error,
        unused,
        path,
        merged,
        units=held,
        devices=several,
    )


def load_built(run: Run, source: str | Path | PreTrainedModel | Model | None = None, **loading: Any) -> Model:
    """Load the model that a run was built from: from where it was, or from `source` if it has moved since.

    loading  as in `load_model`; dtype, revision, adapter and units are the run's unless given
    Whether the weights are the run's is checked by whatever uses them (`Model.check_built`).
    """
    entry = run.manifest.model
    given = source.units if isinstance(source, Model) else loading.get("units")
    if entry.units is not None and given is None:
        loading["units"] = _built_units(run)
    if isinstance(source, Model):
        built = replace(source, **{"units": loading["units"]}) if loading.get("units") else source
        return built.as_in(run)
    if source is None or is_path(source):
        loading = {"dtype": run.manifest.options["dtype"], "revision": entry.revision} | loading
        loading.setdefault("allow_unused", bool(entry.unused))
        if loading.get("adapter") is None:
            loading["adapter"] = _adapter_of(run)
    if source is not None:
        return load_model(source, **loading).as_in(run)
    moved = "if it has moved, say where it is with {model}"
    if entry.path is not None and not Path(entry.path).exists():
        raise ModelError(
            f"loading the model of {run.path}: it was built from {entry.id}, and {entry.path} is not there; {moved}",
            model=...,
        )
    try:
        return load_model(entry.path or entry.base, **loading).as_in(run)
    except ModelNotSupported:
        raise
    except ModelError as error:
        raise ModelError(f"{error.message}; {moved}", **error.arguments | {"model": ...}) from error


def _adapter_of(run: Run) -> str | None:
    """Where the adapter of a run is: its folder, or its id at the commit that was merged."""
    adapter = run.manifest.model.adapter
    if adapter is None:
        return None
    if adapter.path is None:
        return f"{adapter.id.partition('@')[0]}@{adapter.revision}"
    if not Path(adapter.path).exists():
        raise ModelError(
            f"loading the model of {run.path}: {adapter.path}, which was merged into it, is not there; if it has "
            "moved, say where it is with {adapter}",
            adapter=...,
        )
    return adapter.path


def _built_units(run: Run) -> UnitSet:
    """The units that a run holds, from where they were."""
    entry = run.manifest.model.units
    assert entry is not None, "the run holds neurons"
    kind, _, where = entry.id.partition(":")
    place = where[where.index("@") :] if "@" in where else ""
    try:
        units = load_units(entry.id if entry.path is None else f"{kind}:{entry.path}{place}")
    except ModelError as error:
        raise ModelError(
            f"{error.message}; if they have moved, say where they are with {{units}}",
            **error.arguments | {"units": ...},
        ) from error
    return replace(units, id=entry.id)


def _commit(hf: PreTrainedModel) -> str | None:
    return getattr(hf.config, "_commit_hash", None)


def _check_applies(
    hf: PreTrainedModel,
    dtype: str,
    device: str,
    revision: str | None,
    allow_unused: bool,
    adapter: str | Path | None,
) -> None:
    """What is asked of a loaded model must be so already."""
    weight, held_on = next(filter(ordinary, hf.parameters())), home(hf)
    doing = f"loading a {type(hf).__name__} that is in memory"
    if dtype != "auto" and dtype_of(dtype, held_on) != weight.dtype:
        held = NAMES[str(weight.dtype).removeprefix("torch.")]
        raise ModelError(
            f"{doing}: dtype={dtype!r} was given and it is in {held}; convert it (hf.to(torch.{DTYPES[NAMES[dtype]]}))"
        )
    if device != "auto" and not _same(first := devices.named(device)[0], held_on):
        raise ModelError(
            f"{doing}: device={device!r} was given and it is on {held_on}; move it (hf.to({str(first)!r}))"
        )
    if revision is not None and revision != _commit(hf):
        raise ModelError(
            f"{doing}: revision={revision!r} was given, and its weights are loaded already; give the id instead, or "
            "no revision"
        )
    if allow_unused:
        raise ModelError(
            f"{doing}: allow_unused=True was given, and its checkpoint was read already; leave it out"
        )
    if adapter is not None:
        raise ModelError(
            f"{doing}: adapter={os.fspath(adapter)!r} was given, and it is left as it is; give the name of the model, "
            "or what merge_and_unload() of peft makes of a copy"
        )


def _same(device: torch.device, other: torch.device) -> bool:
    return device.type == other.type and (device.index or 0) == (other.index or 0)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else native_bf16()
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, DTYPES[NAMES[name]])


class Where(NamedTuple):
    """The folder or Hugging Face id that a model or a tokenizer is loaded from."""

    name: str  # as it was given
    source: str  # folder or Hugging Face id
    revision: str | None = None
    trust_remote_code: bool = False
    cached: bool = False  # from the cache only: the network does not answer
    path: str | None = None  # of a local folder or file, absolute

    @classmethod
    def of(cls, name: str, revision: str | None, trust: bool, say: Callable[[str], None]) -> Where:
        """The folder or Hugging Face id of a name; ModelError when there is none."""
        if name.startswith("sample:"):
            return cls(
                name, str(samples.model_folder(name.removeprefix("sample:"), progress=say)), revision, trust
            )
        path = files.expanded(name)
        kind = files.kind(path, "loading the model", ModelError)
        if path.suffix == ".gguf":
            if kind != "file":
                raise ModelError(f"loading a model: there is no file {name}; give the path of a .gguf file")
            folder = str(samples.gguf_folder(path, progress=say))
            return cls(name, folder, revision, trust, path=str(path.resolve()))
        if kind == "folder":
            _check_folder(path, name)
            return cls(name, str(path), revision, trust, path=str(path.resolve()))
        if not name or name.startswith((".", "/", "~")) or kind or is_url(name):
            raise ModelError(
                f"loading a model: {name or 'an empty name'} is not a model folder or a .gguf file; give {ACCEPTED}"
            )
        return cls(name, name, revision, trust, cached=only_cached(name, revision))

    @classmethod
    def named(cls, name: str | os.PathLike[str], trust: bool) -> Where:
        """The place of a tokenizer that was given by its folder or id."""
        text = os.fspath(name)
        folder = files.expanded(text)
        is_local = files.kind(folder, "loading the tokenizer", ModelError) == "folder"
        return cls(
            text,
            str(folder) if is_local else text,
            trust_remote_code=trust,
            cached=not is_local and only_cached(text, None, "tokenizer", "tokenizer_config.json"),
        )

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `from_pretrained`."""
        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.cached,
        }


def _check_folder(path: Path, name: str) -> None:
    adapter = path / adapters.CONFIG
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        raise ModelError(
            f"loading a model: {name} holds an adapter ({adapters.CONFIG}) for {base or 'another model'}; give that "
            "model, and this folder as {adapter}",
            adapter=...,
        )
    if not (path / "config.json").is_file() and not is_fairseq(path):
        raise ModelError(
            f"loading a model: the folder {name} has no config.json; give a folder written by save_pretrained, or one "
            "of fairseq's with model.pt and dict.txt"
        )


def _weights(
    where: Where, dtype: torch.dtype, places: Sequence[torch.device], allow_unused: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and what of its checkpoint was left unused."""
    if is_fairseq(Path(where.source)):
        return load_fairseq(where.name, Path(where.source), dtype, allow_unused=allow_unused)
    config, auto = configured(where)
    try:
        with samples.quiet_transformers():
            packed = getattr(config, "quantization_config", None) is not None
            # What is packed is packed where it will lie.
            placed = (
                {"device_map": {"": places[0]}} if packed else _spread(where, auto, config, dtype, places)
            )
            # Weights that are pickles are never read. What does not fit is named below.
            hf, info = auto.from_pretrained(
                where.source,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **placed,
                **where.options,
            )
    except (*_FAILURES, AttributeError, TypeError) as error:  # the last two from inside transformers
        raise ModelError(_unreadable(where, error), trust_remote_code=True) from error
    _without_pooler(hf, info)
    unused = check_tensors(where.name, info, allow_unused=allow_unused)
    if not packed and (folder := _folder(where)):
        check_types(where.name, folder, set(hf.state_dict()))
    return unwrapped(hf), unused


def _spread(
    where: Where, auto: Any, config: Any, dtype: torch.dtype, places: Sequence[torch.device]
) -> dict[str, Any]:
    """Keywords of `from_pretrained` with which accelerate spreads over devices what one of them does not hold.

    ModelError where all of them do not.
    """
    room = [int(free / _ROOM) for place in places if (free := devices.free(place)) is not None]
    if not room:
        return {}
    try:
        with torch.device("meta"):
            blank = auto.from_config(config, dtype=dtype, trust_remote_code=where.trust_remote_code)
    except (*_FAILURES, AttributeError, TypeError):  # what cannot be made without numbers is tried as it is
        return {}
    size = sum(weight.numel() * weight.element_size() for weight in blank.parameters())
    if size <= min(room):
        return {}
    if size > sum(room):
        held = " and ".join(f"{place} has {devices.free(place) or 0:,}" for place in places)
        raise ModelError(
            f"loading the model {where.name}: its weights take {size:,} bytes, which with what a batch takes do not "
            f"fit: {held} free; give more of them in {{device}} (or all), a smaller dtype, or cpu",
            device=...,
        )
    return {
        "device_map": "auto",
        "max_memory": {place.index or 0: size for place, size in zip(places, room, strict=True)},
    }


def configured(where: Where) -> tuple[Any, Any]:
    """The configuration of a model, and the class that makes a model of it; ModelError where it cannot be read."""
    try:
        with samples.quiet_transformers():
            config = AutoConfig.from_pretrained(where.source, **where.options)
            auto = _auto(config)
    except (*_FAILURES, AttributeError, TypeError) as error:  # the last two from inside transformers
        raise ModelError(_unreadable(where, error), trust_remote_code=True) from error
    if auto is None:
        raise ModelNotSupported(
            f"loading the model {where.name}: {config.model_type} is no decoder that predicts the next token "
            "and no encoder that is known (`mnemoscope models` lists them); give one of these"
        )
    return config, auto


def _auto(config: Any) -> Any:
    """The class that loads a model, also one that reads images or sound beside text; None if there is none."""
    named = set(config.architectures or ())
    if getattr(config, "is_encoder_decoder", False) and not any("CausalLM" in name for name in named):
        alone = any(name.endswith("EncoderModel") for name in named)
        known = (AutoModelForTextEncoding,) if alone else (AutoModelForSeq2SeqLM,)
        return next((auto for auto in known if type(config) in auto._model_mapping), None)
    if config.get_text_config().model_type in ENCODERS and not hasattr(config, "auto_map"):
        return _encoder(config)
    if type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map"):
        return AutoModelForCausalLM
    composites = (AutoModelForImageTextToText, AutoModelForSeq2SeqLM)
    return next((auto for auto in composites if type(config) in auto._model_mapping), None)


def _encoder(config: Any) -> Any:
    """The class of an encoder: with the head of a masked language model if its checkpoint says that it has one."""
    named = set(config.architectures or ())
    causal = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if getattr(config, "is_decoder", False) or type(config) not in AutoModelForMaskedLM._model_mapping:
        return AutoModelForCausalLM
    if causal is not None and causal.__name__ in named:
        return AutoModelForCausalLM
    # BertForPreTraining has that head and another.
    masked = AutoModelForMaskedLM._model_mapping[type(config)].__name__
    return AutoModelForMaskedLM if named & {masked, masked.replace("MaskedLM", "PreTraining")} else AutoModel


def _without_pooler(hf: PreTrainedModel, info: dict[str, Any]) -> None:
    """Leave out the pooler of a body whose checkpoint has none: nothing that is read goes through it."""
    absent = {key for key in info["missing_keys"] if key.startswith("pooler.")}
    if absent and hasattr(hf, "pooler"):
        hf.pooler = None
        info["missing_keys"] = set(info["missing_keys"]) - absent


def _folder(where: Where) -> Path | None:
    """The folder of the files that a model was just loaded from."""
    if Path(where.source).is_dir():
        return Path(where.source)
    options = {
        "revision": where.revision,
        "local_files_only": True,
        "_raise_exceptions_for_missing_entries": False,
    }
    file = cached_file(where.source, "config.json", **options)
    return None if file is None else Path(file).parent


def _unreadable(where: Where, error: Exception) -> str:
    wrong = isinstance(error, StrictDataclassError)  # which tells of its cause in a second line
    text = str(error.__cause__ if wrong else error)
    reason = (text.strip().splitlines() or [type(error).__name__])[0]
    if wrong:
        advice = "its config.json says what no model of its kind has; correct it"
    elif "trust_remote_code" in text:
        advice = "it carries code of its own; if you trust it, give {trust_remote_code}"
    elif isinstance(error, ImportError) or "pip install" in text:
        advice = "install what is missing, or give it as it was before it was quantised"
    elif Path(where.source).is_dir():
        advice = "the folder must hold config.json, weights as .safetensors, and a tokenizer"
    else:
        advice = (
            "check that it holds config.json, weights as .safetensors and a tokenizer, or give a local folder, a .gguf "
            "file or sample:smollm2-135m"
        )
    return f"loading the model {where.name}: {reason.rstrip('.')}; {advice}"


def tokenizer_of(where: Where) -> Any:
    if is_fairseq(Path(where.source)):
        return dictionary_tokenizer(Path(where.source) / DICTIONARY)
    cure = "it must lie beside the weights (tokenizer.json); in Python it can also be given as tokenizer="
    try:
        with samples.quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(where.source, **where.options)
    except _FAILURES as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:( ")
        raise ModelError(f"loading the tokenizer of {where.name}: {reason}; {cure}") from error
    # Where its files are missing, transformers makes one that knows nothing but its special tokens.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise ModelError(f"loading the tokenizer of {where.name}: there is none that knows any token; {cure}")
    return tokenizer
