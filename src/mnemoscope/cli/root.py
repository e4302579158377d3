"""The application that commands join."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="mnemoscope",
    help="The feed-forward memories of a transformer language model: mined, read and shown.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
