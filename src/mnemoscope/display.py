"""How a result shows itself: the same in the terminal, in a notebook, and in the page that it saves.

    class NeuronCard(Shown): ...   # knows no view: the views stand above it
    Shown.viewer = view_of         # handed in once by `mnemoscope.api`, which knows both

``print`` and ``repr`` give the text of the terminal, a notebook displays HTML, ``save`` writes a page.
"""

from __future__ import annotations

import json
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

_PRE = (
    '<pre style="font-family:ui-monospace,Menlo,Consolas,monospace;white-space:pre;overflow-x:auto;'
    'color:inherit;background:none;line-height:1.35">{code}</pre>'
)
_PAGE = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mnemoscope</title>'
    "<style>:root{{color-scheme:light dark}}body{{margin:2rem}}</style></head><body>{body}</body></html>\n"
)


@dataclass(frozen=True)
class View:
    """How the results of one class are drawn.

    terminal  result -> something that rich prints
    fragment  result -> HTML for another page; the text of the terminal if there is none
    page      result -> a whole HTML page; the fragment in a plain page if there is none
    write     writes a page that has files beside it, instead of `page`
    plots     result -> Altair charts by name
    """

    terminal: Callable[[Any], Any]
    fragment: Callable[[Any], str] | None = None
    page: Callable[[Any], str] | None = None
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
        return View(object.__repr__) if Shown.viewer is None else Shown.viewer(self)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        raise NotImplementedError

    def save(self, path: str | Path, *, report: Report | None = None) -> Path:
        """Write the result to a file, whole or not at all: a page (.html), data (.json) or text (.txt).

        Returns the path. report is told how far a long page has come. `QueryError` for another ending, `RunError` if
        the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in ENDINGS:
            raise QueryError(f"saving {path}: give a file name that ends in {', '.join(ENDINGS)}")
        if path.suffix == ".html":
            self.save_page(path, report=report)
        elif path.suffix == ".json":
            text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, default=str)
            files.write(path, text + "\n", "saving")
        else:
            files.write(path, str(self), "saving")
        return path

    def save_page(self, path: str | Path, *, report: Report | None = None) -> None:
        """Write the page, whatever the file is called (/dev/stdout, say); otherwise as `save`."""
        if self.view.write:
            self.view.write(self, Path(path), report)
        else:
            files.write(path, self._page(), "writing the page")

    def _page(self) -> str:
        if self.view.page:
            return self.view.page(self)
        return _PAGE.format(body=self._repr_html_())

    def _repr_html_(self) -> str:
        from rich.console import Console

        if self.view.fragment:
            return self.view.fragment(self)
        console = Console(
            file=StringIO(), width=100, record=True, force_terminal=True, color_system="truecolor"
        )
        console.print(self.__rich__())
        return _PRE.format(code=console.export_html(inline_styles=True, code_format="{code}"))

    def __rich__(self) -> Any:
        return self.view.terminal(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=WIDTH, color_system=None, legacy_windows=False, _environ={})
        with console.capture() as text:
            console.print(self.__rich__(), markup=False)
        return "\n".join(line.rstrip() for line in text.get().splitlines()) + "\n"

    def __repr__(self) -> str:
        return str(self).rstrip("\n")
