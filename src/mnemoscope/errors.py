"""What can go wrong that a user can fix, as one tree.

    MnemoscopeError                 root; the command line prints its message and exits with 2
    ├── ModelError                  a model cannot be found or read
    │   ├── ModelChanged            its weights or hooks were changed while it was being read
    │   └── ModelNotSupported       its parts do not add up to its logits, or its kind is not a causal decoder
    ├── CorpusError                 text cannot be found, read or used
    ├── DownloadError               a sample cannot be fetched, or is not what it should be
    ├── RemoteError                 what lies behind a URL cannot be reached, read or written
    ├── RunError                    a run directory cannot be read or written
    │   ├── RunMissing              there is no run, or it was never finished
    │   ├── RunCorrupt              a table is missing, short, or not what the manifest says
    │   └── RunMismatch             the run was built from something else than what was given
    ├── SheetError                  an annotation sheet or its key is not what was written, or was filled in wrongly
    ├── ActivationError             a model produced NaN or infinite activations
    └── QueryError                  a question that the run cannot answer: address out of range, unknown token
        └── PatternError            a pattern that cannot be read or tested, or a text too small to test it on

Every message says what was being done, what was given, what is accepted, and what to do, in one line.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable


class MnemoscopeError(Exception):
    """Root of the tree: something the user can fix.

    An argument is named in the message as ``{name}`` and given by that name: ``("{top} is too small", top=0)`` reads
    "top=0 is too small" in Python and "--top 0 is too small" on the command line. A value of ``...`` is left out.
    """

    def __init__(self, message: str = "", **arguments: object) -> None:
        self.message, self.arguments = message, arguments
        super().__init__(self._naming(_in_python))

    def on_command_line(self) -> str:
        """The message with options where `str` has arguments."""
        return self._naming(_as_option)

    def _naming(self, spelled: Callable[[str, object], str]) -> str:
        text = self.message
        for name, value in self.arguments.items():
            text = text.replace(f"{{{name}}}", spelled(name, value))
        return text.translate(_IN_ONE_LINE)


def _in_python(name: str, value: object) -> str:
    return f"{name}=" if value is ... else f"{name}={value!r}"


def _as_option(name: str, value: object) -> str:
    option = f"--{_OPTIONS.get(name, name).replace('_', '-')}"
    return option if value is ... or value is True else f"{option} {shlex.quote(str(value))}"


# Names of files may hold what ends a line, or tells a terminal to do something.
_IN_ONE_LINE = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
_OPTIONS = {"foils": "foil", "foil_ids": "foil_id", "path": "out"}  # where the command line has another name


class ModelError(MnemoscopeError):
    """A model cannot be found or read."""


class ModelNotSupported(ModelError):  # noqa: N818 - the name users see in the docs
    """A model whose parts cannot be shown to add up to its logits."""


class ModelChanged(ModelError):  # noqa: N818
    """A model's weights, hooks or attention were changed while it was being read."""


class CorpusError(MnemoscopeError):
    """Text cannot be found, read or used."""


class DownloadError(MnemoscopeError):
    """A sample cannot be fetched, or what came is not what was pinned."""


class RemoteError(MnemoscopeError):
    """What lies behind a URL cannot be reached, read or written."""


class RunError(MnemoscopeError):
    """A run directory cannot be read or written."""


class RunMissing(RunError):  # noqa: N818
    """There is no run here, or it was never finished."""


class RunCorrupt(RunError):  # noqa: N818
    """A table is missing, short, or not what the manifest says."""


class RunMismatch(RunError):  # noqa: N818
    """The run was built from another model, corpus or options than those given."""


class SheetError(MnemoscopeError):
    """An annotation sheet or its key is not what was written, or was filled in wrongly."""


class ActivationError(MnemoscopeError):
    """A model produced NaN or infinite activations."""


class QueryError(MnemoscopeError):
    """A question that this run cannot answer."""


class PatternError(QueryError):
    """A pattern that cannot be read or tested, or a text too small to find or test patterns on."""
