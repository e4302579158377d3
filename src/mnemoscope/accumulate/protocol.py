"""What an accumulator is. Its state is a few plain arrays; these save, load and compare it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from mnemoscope.accumulate.reading import Reading


@runtime_checkable
class Accumulator(Protocol):
    """Something that readings are poured into, layer by layer; merging gives the same bits in any order."""

    def update(self, reading: Reading) -> None:
        """Take in one layer of one batch."""

    def merge(self, other: Any) -> None:
        """Take in what another of the same class has taken in; the other is unchanged."""

    def state(self) -> dict[str, np.ndarray]:
        """All there is to know, as arrays by name; shared, not copied."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Become what had this state; KeyError or ValueError when it is not of this accumulator's shape."""

    def result(self, layer: int) -> pa.Table:
        """The rows of one layer."""


@runtime_checkable
class HasFields(Protocol):
    """A class that lists the arrays that are its state."""

    FIELDS: ClassVar[tuple[str, ...]]


def fields_of(accumulator: HasFields) -> dict[str, np.ndarray]:
    """The arrays that an accumulator declares."""
    return {name: getattr(accumulator, name) for name in accumulator.FIELDS}


def set_fields(accumulator: HasFields, state: Mapping[str, np.ndarray]) -> None:
    """Take over the arrays that an accumulator declares; shapes and dtypes must be those it has."""
    for name in accumulator.FIELDS:
        mine, given = getattr(accumulator, name), state[name]
        if (mine.shape, mine.dtype) != (given.shape, given.dtype):
            raise ValueError(f"{name} is {given.dtype}{given.shape}, not {mine.dtype}{mine.shape}")
        setattr(accumulator, name, np.ascontiguousarray(given))


def nullable(values: np.ndarray, null: np.ndarray, kind: Any) -> pa.Array:
    """A column with nulls where `null` is true."""
    return pa.array(values, kind, mask=null)
