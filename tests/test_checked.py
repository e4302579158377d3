"""The check of signatures while tests run: it lets right calls pass and finds every kind of wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from checked import checked
from jaxtyping import Float

Rows = Float[np.ndarray, "row column"]


@checked
def product(a: Float[np.ndarray, "row inner"], b: Float[np.ndarray, "inner column"]) -> Rows:
    """Of two matrices."""
    return a @ b


@checked
def turned(a: Rows) -> Rows:
    """Rows and columns changed, against what the signature says."""
    return a.T


@checked
def named(number: int) -> str:
    """The number, but for 13 as it is."""
    return number if number == 13 else str(number)  # type: ignore[return-value]


@checked
def several(parts: list[Rows], outer: Rows) -> Rows:
    """The first part; a call inside a call has sizes of its own."""
    product(np.ones((7, 3)), np.ones((3, 9)))
    return parts[0] if parts else outer


@checked
@dataclass
class Pair:
    """Two of one length."""

    a: Float[np.ndarray, " n"]
    b: Float[np.ndarray, " n"]


@checked
def stepping(a: Rows) -> Iterator[int]:
    """The sizes, one by one."""
    yield from a.shape


def test_right_calls_pass() -> None:
    """Results are those of the function, by position and by name, and its name and annotations stay."""
    assert product(np.ones((2, 3)), b=np.ones((3, 4))).shape == (2, 4)
    assert several([np.ones((2, 3))], np.ones((2, 3))).shape == (2, 3)
    assert turned(np.ones((2, 2))).shape == (2, 2)
    assert named(number=2) == "2"
    assert list(stepping(np.ones((2, 3)))) == [2, 3]
    assert len(Pair(np.ones(2), b=np.ones(2)).a) == 2
    assert product.__name__ == "product" and product.__annotations__["return"] == "Rows"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: product(np.ones((2, 3)), np.ones((4, 5))),
        lambda: product(np.ones((2, 3)), np.ones(3)),
        lambda: product(np.ones((2, 3), int), np.ones((3, 4))),
        lambda: product(2, np.ones((3, 4))),
        lambda: turned(np.ones((2, 3))),
        lambda: several([], np.ones(3)),
        lambda: several([np.ones((2, 3))], np.ones((3, 3))),
        lambda: named("two"),
        lambda: named(13),
        lambda: stepping(np.ones(3)),
        lambda: Pair(np.ones(2), np.ones(3)),
        lambda: Pair(np.ones(2), "b"),
    ],
)
def test_wrong_calls_are_found(wrong) -> None:  # type: ignore[no-untyped-def]
    """Sizes that differ, a dimension too few, another dtype, no array at all; of arguments, results and fields."""
    with pytest.raises(Exception, match=r"(?i)violates type hint|type-check error"):
        wrong()


def test_modules_that_name_shapes_are_checked() -> None:
    """The package is: a vector in place of a stack of matrices is no argument, whatever would be made of it."""
    import torch

    from mnemoscope.prediction.search import contested

    assert contested(torch.rand(5, 2, 2), 2).shape == (5,)
    with pytest.raises(Exception, match="violates type hint"):
        contested(torch.ones(3), 2)
