"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[
    str, typer.Argument(help="Hugging Face id, folder, .gguf file, or sample:smollm2-135m.")
]

RunFolder = Annotated[Path, typer.Argument(help="Folder of a finished run.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print the data as JSON on stdout.")]

Dtype = Annotated[
    str, typer.Option(help="auto (bf16 where the processor has it, else fp32), fp32, bf16, fp16.")
]

Device = Annotated[str, typer.Option(help="auto (CUDA when there is one), cpu, cuda, cuda:1 ...")]

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face model.")]

Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model carries.")]

Moved = Annotated[str | None, typer.Option("--model", help="Where the model is now, if not where it was.")]
