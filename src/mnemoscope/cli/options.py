"""Arguments and options that several commands take, under one name each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mnemoscope.arguments import check_engine, check_loading

ModelName = Annotated[
    str, typer.Argument(help="Hugging Face id, folder, .gguf file, or sample:smollm2-135m.")
]

RunFolder = Annotated[str, typer.Argument(help="Folder of a finished run, or a URL: s3://bucket/run.")]

ADDRESS = "Address of a neuron: L13N366, 13.366, 13/366 or 13_366; L13E5N366 in expert 5."
Neuron = Annotated[str, typer.Argument(help=ADDRESS)]

CorpusName = typer.Option(
    "--corpus",
    help="File, folder, glob in quotes, URL of these, Hugging Face data set, sample:wikipedia, or - for stdin.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the data as JSON on stdout.")]

Page = Annotated[Path | None, typer.Option("--html", help="Also write a page that stands by itself.")]

Limit = Annotated[int | None, typer.Option(help="Read at most this many tokens of the text.")]

Count = Annotated[int, typer.Option("-n", "--count", help="Show at most this many neurons.")]

Only = Annotated[
    str | None, typer.Option(help="Names of measurements, with commas between; all of them by default.")
]

Workers = Annotated[int, typer.Option(help="Processes to use; the result is the same for any number.")]

_Device = Annotated[
    str,
    typer.Option(
        help="Where the model runs: auto (CUDA if there is one), cpu, cuda, cuda:1 ...; of several (cuda:0,cuda:1), or "
        "all, each has a process of a build, and what is too large for one is spread over them."
    ),
]

_Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]


_Adapter = typer.Option(
    help="Adapter of PEFT (LoRA ...) to merge into the model: a folder, or a Hugging Face id (OWNER/NAME@REVISION)."
)


class Bundle:
    """Options that go together."""

    def check(self) -> None:
        """Refuse what can be refused without a model, a text or a run."""


@dataclass(frozen=True)
class Miners(Bundle):
    """Who mines: keywords of `build`."""

    workers: Workers = 1
    engine: Annotated[
        str,
        typer.Option(help="processes of this machine, or of a ray cluster whose machines share the folder."),
    ] = "processes"
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the ray cluster (auto: that of this machine); one is started here if none is given."
        ),
    ] = None

    def check(self) -> None:
        """RunError for an engine that there is not, or an address without a cluster."""
        check_engine(self.engine, self.address)


class _Loaded(Bundle):
    """What a command that loads a model asks for; a precision only if it may choose one."""

    dtype: str = "auto"
    device: str

    def check(self) -> None:
        """ModelError for a precision that there is not, or a device that is not here."""
        check_loading(self.dtype, self.device)
        if self.device not in ("auto", "cpu"):  # which are always there; others only torch knows
            from mnemoscope.model.devices import named

            named(self.device)


@dataclass(frozen=True)
class Loading(_Loaded):
    """How a model is loaded: keywords of `load_model`."""

    dtype: Annotated[
        str,
        typer.Option(
            help="Precision of the weights: auto (bf16 if the processor has it, else fp32), fp32, bf16, fp16."
        ),
    ] = "auto"
    device: _Device = "auto"
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face model.")] = (
        None
    )
    trust_remote_code: _Trust = False
    allow_unused: Annotated[
        bool,
        typer.Option("--allow-unused", help="Accept a checkpoint with tensors that the model does not read."),
    ] = False
    adapter: Annotated[str | None, _Adapter] = None
    units: Annotated[
        str | None,
        typer.Option(
            help="Read these units instead of its neurons: sae:PATH_OR_REPO, transcoder:PATH_OR_REPO, or "
            "directions:FILE.safetensors."
        ),
    ] = None

    def again(self, model: str | None) -> Reloading:
        """The same for the model of a run, and where that is now."""
        return Reloading(model, self.device, self.trust_remote_code, self.adapter, self.units)


@dataclass(frozen=True)
class Reloading(_Loaded):
    """How the model of a run is found and loaded again; the rest is what the run was built with."""

    model: Annotated[
        str | None, typer.Option(help="Where the model is now, if it has moved since the run was built.")
    ] = None
    device: _Device = "auto"
    trust_remote_code: _Trust = False
    adapter: Annotated[
        str | None,
        typer.Option(help="Where the adapter of the run is now, if it has moved since the run was built."),
    ] = None
    units: Annotated[
        str | None,
        typer.Option(help="Where the units of the run are now, if they have moved since it was built."),
    ] = None


@dataclass(frozen=True)
class CorpusReading(Bundle):
    """How a corpus is read: keywords of `load_corpus`."""

    segment: Annotated[
        str, typer.Option(help="What becomes one context: document, sentence, window or window:N.")
    ] = "document"
    limit: Limit = None
    text: Annotated[str, typer.Option(help="Name of the column that holds the text.")] = "text"
    target: Annotated[
        str | None,
        typer.Option(
            "--target-text",
            help="For an encoder-decoder: name of the column that holds what its decoder is to write. Without one its "
            "encoder alone is read.",
        ),
    ] = None


def bundled(command: Callable[..., None]) -> Callable[..., None]:
    """Spread the parameters of a command that are bundles into the options they hold, which are checked first."""
    hints = get_type_hints(command, include_extras=True)
    bundles: dict[str, Any] = {
        name: kind for name, kind in hints.items() if isinstance(kind, type) and issubclass(kind, Bundle)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in bundles:
            parameters += _options(bundles[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def spread(**given: Any) -> None:
        taken: dict[str, Any] = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in bundles.items()
        }
        for bundle in taken.values():
            bundle.check()
        command(**given, **taken)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread


def _options(bundle: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(bundle, include_extras=True)
    assert all(field.default is not MISSING for field in fields(bundle)), bundle
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(bundle)
    ]
