"""Elementwise functions end in the same bits with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mnemoscope.mine.values import ends
from mnemoscope.model.threads import Threads, _pieces

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "mish": functional.mish,
    "exp2": torch.exp2,
    "pow": lambda x: x.abs() ** 2.5,
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The number of threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _shapes() -> dict[str, Tensor]:
    x = torch.randn(407, 1002, generator=torch.Generator().manual_seed(0)) * 3
    return {
        "flat": x.flatten(),
        "whole": x,
        "half of each row": x[:, :501],
        "a few wide rows": x.flatten()[: 7 * 58_000].view(7, 58_000)[:, :45_001],
        "the other way round": x.T,
        "heads": x[:, :1000].view(11, 37, 10, 100).transpose(1, 2),
        "a slice of heads": x[:, :1000].view(11, 37, 10, 100).transpose(1, 2)[..., :67],
        "hardly enough": x.flatten()[:32_769],
        "no neighbours": x[:, ::2],
        "nothing": x[:0],
    }


def _with(threads: int, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.set_num_threads(threads)
    with Threads():
        return function(x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_number_of_threads_ends_in_the_bits_of_one(name: str) -> None:
    """For inputs of every layout; a single thread's are those of torch, and so is the shape."""
    for layout, x in _shapes().items():
        expected = _with(1, FUNCTIONS[name], x)
        assert torch.equal(expected, FUNCTIONS[name](x)), layout
        for threads in (2, 3, 5):
            assert torch.equal(_with(threads, FUNCTIONS[name], x), expected), (layout, threads)


def test_without_it_threads_show() -> None:
    """The fault that this mends is there: torch alone ends in other bits, or nothing above is tested."""
    x, differ = _shapes()["flat"], set()
    for name, function in FUNCTIONS.items():
        torch.set_num_threads(1)
        expected = function(x)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            if not torch.equal(function(x), expected):
                differ.add(name)
    assert "silu" in differ


def test_pieces_are_the_whole_in_order() -> None:
    """Nothing is left out, and what all threads share is one piece where it can be cut evenly."""
    for layout, x in _shapes().items():
        dense = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
        if dense.stride(-1) == 1:
            for threads in (1, 2, 3, 5):
                pieces = [piece.flatten() for piece in _pieces(dense, threads)]
                assert torch.equal(torch.cat([x.new_zeros(0), *pieces]), dense.flatten()), layout
    assert len(list(_pieces(torch.zeros(512, 1536), 2))) == 1


def test_to_rank_tokens_leaves_the_number_of_threads_alone() -> None:
    """What reads values through the vocabulary changes nothing for what torch computes after it."""
    torch.set_num_threads(1)
    table = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 300)).astype(np.float32))
    ends(lambda rows, columns: table[rows, columns], (200, 300), 5, table.device, softmax=True)
    assert torch.get_num_threads() == 1
