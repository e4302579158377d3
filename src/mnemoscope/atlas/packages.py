"""Packages that only some pages need: imported whole, by one thread, before any of them is used.

To start they would cost more than the first page has. But some look for others in `sys.modules` (narwhals, through
which altair reads a table, for pandas and duckdb), where a package is from the moment that its import begins: a thread
that draws while another one imports finds half a package. So whatever is done in a thread has all of them imported
first, but for what needs none: the first page, a layer's table, a neuron's card, a search.
"""

from threading import Lock

_importing = Lock()


def imported() -> None:
    """Import them, or wait until another thread has."""
    with _importing:
        import altair  # noqa: F401
        import duckdb  # noqa: F401
        import pyarrow.dataset  # noqa: F401 - and pandas with it, where that is installed
        import scipy.stats  # noqa: F401
        import vl_convert  # noqa: F401
