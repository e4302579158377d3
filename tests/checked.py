"""Signatures that are checked at every call: types, shapes, and that sizes of one name agree in one call.

What jaxtyping's own decorator does, in one pass instead of three: it binds the arguments, checks them, and checks
them again with the result, for functions that name no shape as well. That took two fifths of the time of the tests.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped


def checked(thing: Any = None, **_: object) -> Any:
    """The function, or the dataclass, with its signature checked; stands in for `jaxtyping.jaxtyped`."""
    if thing is None:
        return checked
    if isinstance(thing, type):
        if is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__)  # type: ignore[misc]
        return thing
    hints = _hints(thing)
    if not hints:
        return thing
    shaped = any(_names_a_shape(hint) for hint in hints.values())
    if shaped and inspect.isgeneratorfunction(thing):  # its body runs after the call, with sizes of its own
        return jaxtyped(thing, typechecker=beartype)
    once = _typed(thing, hints)
    return _with_sizes_of_its_own(once) if shaped else once


def _typed(function: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """The function, checked by beartype against these hints, its annotations left as they are written."""
    written = function.__annotations__
    function.__annotations__ = hints
    try:
        typed = beartype(function)
    finally:
        function.__annotations__ = written
    typed.__annotations__ = written
    return typed


def _with_sizes_of_its_own(typed: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(typed)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return typed(*args, **kwargs)

    return call


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """What the annotations stand for; Any where a name is known to type checkers only."""
    return {name: _meaning(hint, function.__globals__) for name, hint in function.__annotations__.items()}


def _meaning(hint: Any, names: dict[str, Any]) -> Any:
    def bearer() -> None: ...

    bearer.__annotations__ = {"value": hint}
    try:
        return get_type_hints(bearer, names, include_extras=True)["value"]
    except Exception:
        return Any


def _names_a_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_names_a_shape(part) for part in get_args(hint))
