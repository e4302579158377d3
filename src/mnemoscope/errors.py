"""What can go wrong that a user can mend, as one tree.

    MnemoscopeError                 root; the command line prints its message and exits with 2
    ├── ModelError                  a model cannot be found or read
    │   └── ModelNotSupported       its parts do not add up to its logits, or its kind is not a causal decoder
    ├── CorpusError                 text cannot be found, read or used
    ├── DownloadError               a sample cannot be fetched, or is not what it should be
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


class MnemoscopeError(Exception):
    """Root of the tree: something the user can mend."""


class ModelError(MnemoscopeError):
    """A model cannot be found or read."""


class ModelNotSupported(ModelError):  # noqa: N818 - the name users see in the docs
    """A model whose parts cannot be shown to add up to its logits."""


class CorpusError(MnemoscopeError):
    """Text cannot be found, read or used."""


class DownloadError(MnemoscopeError):
    """A sample cannot be fetched, or what came is not what was pinned."""


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
