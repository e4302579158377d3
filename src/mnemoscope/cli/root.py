"""The application that commands join, and its help: commands in the order of the work."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mnemoscope import __version__
from mnemoscope.cli import door

ORDER = {
    "Look": ("demo", "build", "show", "find", "trace", "explain"),
    "Test": ("patterns", "test", "removal", "verify", "annotate"),
    "Reproduce": ("study", "compare"),
    "Manage": ("models", "cache"),
}


class Commands(TyperGroup):
    """The commands under the headings of `ORDER`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments of all commands, checked once."""
        door.check(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        with door.stopped():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        """Every command, in the order of the work."""
        return [name for names in ORDER.values() for name in names if name in self.commands]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section of the help for each heading."""
        for heading, names in ORDER.items():
            known = [(name, self.commands[name]) for name in names if name in self.commands]
            width = formatter.width - 6 - max(map(len, self.commands))
            with formatter.section(heading):
                formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in known])


app = typer.Typer(
    cls=Commands,
    name="mnemoscope",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mnemoscope {__version__}")
        raise typer.Exit


@app.callback(epilog="Example: mnemoscope demo")
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """The feed-forward memories of a transformer language model: mined, read and shown."""
