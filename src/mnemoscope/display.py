"""How a result shows itself: the same in the terminal, in a notebook, and in the page that it saves.

    class NeuronCard(Shown): ...   # knows no view: the views stand above it
    Shown.viewer = view_of         # handed in once by `mnemoscope.api`, which knows both

``print`` and ``repr`` give the text of the terminal, a notebook displays HTML, ``save`` writes a page.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from mnemoscope import files
from mnemoscope.errors import QueryError
from mnemoscope.records import Progress

WIDTH = 80  # columns of text
ENDINGS = (".html", ".json", ".txt")

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class View:
    """How the results of one class are drawn.

    terminal  result -> something that rich prints
    fragment  result -> HTML for another page
    page      result -> a whole HTML page
    write     writes a page that has files beside it, instead of `page`
    plots     result -> Altair charts by name
    """

    terminal: Callable[[Any], Any]
    fragment: Callable[[Any], str]
    page: Callable[[Any], str]
    write: Callable[[Any, Path, Report | None], Any] | None = None
    plots: Callable[[Any], Mapping[str, Any]] | None = None


class Shown:
    """A result that shows itself; a subclass has `to_dict`.

    viewer  result -> its view; without one a result shows its class only
    """

    viewer: ClassVar[Callable[[Shown], View] | None] = None

    @property
    def view(self) -> View:
        """How this result is drawn."""
        if Shown.viewer is None:
            return View(object.__repr__, _escaped, _escaped)
        return Shown.viewer(self)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        raise NotImplementedError

    def save(self, path: str | Path, *, report: Report | None = None) -> Path:
        """Write the result to a file, whole or not at all: a page (.html), data (.json) or text (.txt).

        Returns the path. report is told how far a long page has come. `QueryError` for another ending, `RunError` if
        the file cannot be written.
        """
        path = files.expanded(path)
        if path.suffix not in ENDINGS:
            raise QueryError(f"saving {path}: give a file name that ends in {', '.join(ENDINGS)}")
        if path.suffix == ".html":
            self.save_page(path, report=report)
        elif path.suffix == ".json":
            text = json.dumps(jsonable(self.to_dict()), ensure_ascii=False, indent=1, default=str)
            files.write(path, text + "\n", "saving")
        else:
            files.write(path, str(self), "saving")
        return path

    def save_page(self, path: str | Path, *, report: Report | None = None) -> None:
        """Write the page, whatever the file is called (/dev/stdout, say); otherwise as `save`."""
        if self.view.write:
            self.view.write(self, files.expanded(path), report)
        else:
            files.write(path, self.view.page(self), "writing the page")

    def _repr_html_(self) -> str:
        return self.view.fragment(self)

    def __rich__(self) -> Any:
        return self.view.terminal(self)

    def __str__(self) -> str:
        return as_text(self.__rich__(), markup=False)

    def __repr__(self) -> str:
        return str(self).rstrip("\n")


def as_text(printed: Any, width: int = WIDTH, *, markup: bool = True) -> str:
    """What rich prints, as text without colour; nothing is shown, in a notebook neither."""
    from rich.console import Console

    console = Console(
        file=StringIO(),
        width=width,
        color_system=None,
        legacy_windows=False,
        force_jupyter=False,
        _environ={},
    )
    with console.capture() as text:
        console.print(printed, markup=markup)
    return "\n".join(line.rstrip() for line in text.get().splitlines()) + "\n"


def jsonable(value: Any) -> Any:
    """A value with what JSON lacks put otherwise: null for NaN and infinity, text for other keys."""
    if isinstance(value, dict):
        return {str(name): jsonable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(result: object) -> str:
    return html.escape(object.__repr__(result))
