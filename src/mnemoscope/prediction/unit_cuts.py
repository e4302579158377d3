"""Units that are not neurons are ablated where they write: the model computes none of them.

In the pass itself a unit's coefficient is read at the point that it reads, and the change of the coefficient times the
unit's value is added at each point that it writes. What units leave of what they stand for, their error, is held
(Marks et al. 2024), and so is every other unit: those above react only through the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mnemoscope.model.parts import Anatomy, Layer, Norm
from mnemoscope.model.unit_parts import writes
from mnemoscope.model.units import POINTS, Write, passing
from mnemoscope.model.watch import watch

if TYPE_CHECKING:
    from mnemoscope.prediction.ablate import Cut


def cuts_of_units(anatomy: Anatomy, layer: int, rows: Sequence[tuple[int, Cut]], sequences: int) -> list[Any]:
    """Hooks that change units of a layer in some of so many sequences, at the last position or at all.

    rows  which sequence each cut is of, 0-based
    """
    cut = _CutUnits(anatomy.layers[layer], rows, sequences)
    handles = watch(cut.block, (POINTS[cut.units.reads].watched,), cut.read)
    for write in cut.units.write:
        for module, before in _places(anatomy.layers[write.layer], writes(anatomy)):
            handles.append(cut.hook(module, write, before))
    return handles


class _CutUnits:
    """Units of one layer in one pass, and by how much what they write is to change."""

    def __init__(self, block: Layer, rows: Sequence[tuple[int, Cut]], sequences: int) -> None:
        assert block.units is not None, "a layer without units has none to ablate"
        self.block, self.units, self.rows, self.sequences = block, block.units, rows, sequences
        self.changes: list[Float[Tensor, " token"]] = []

    def read(self, point: str, seen: Float[Tensor, "... width"]) -> None:
        """What passes the point that units read: from it follow their coefficients, and the changes."""
        which = torch.tensor([row for row, _ in self.rows], device=seen.device)
        sequences = seen.reshape(self.sequences, -1, seen.shape[-1])
        x = passing(self.block, self.units.reads, sequences[which])
        reading = self.units.read(x)
        coefficients = self.units.act(self.units.pre(reading))
        self.changes = []
        for place, (_, cut) in enumerate(self.rows):
            held = coefficients[place, :, cut.unit]
            change = cut.of(held) - held
            if not cut.everywhere:
                change[:-1] = 0
            self.changes.append(change if reading.scale is None else change * reading.scale[place, :, 0])

    def hook(self, module: nn.Module, write: Write, before: bool) -> Any:
        """A hook that adds the changes to what a module reads, or to what it returns."""

        def reading(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (self._changed(args[0], write), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": self._changed(kwargs["hidden_states"], write)}

        def writing(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple | list):
                return (self._changed(output[0], write), *output[1:])
            return self._changed(output, write)

        if before:
            return module.register_forward_pre_hook(reading, with_kwargs=True)
        return module.register_forward_hook(writing)

    def _changed(self, x: Float[Tensor, "... width"], write: Write) -> Float[Tensor, "... width"]:
        changed = x.clone(memory_format=torch.contiguous_format)
        rows = changed.view(
            self.sequences, -1, x.shape[-1]
        )  # OPT flattens sequences and tokens into one axis
        for (row, cut), change in zip(self.rows, self.changes, strict=True):
            rows[row] += (change[:, None] * write.values[cut.unit]).to(rows)
        return changed


def _places(block: Layer, point: str) -> list[tuple[nn.Module, bool]]:
    """The modules where something is added that is to pass a point: to what each reads (True), or to what it returns.

    The stream between attention and FFN is read by the norm of the FFN, and what the FFN writes is added to it.
    """
    first, last = block.ends or (block.module, block.module)
    behind: dict[str, tuple[Norm | None, nn.Module | None]] = {
        "residual_mid": (block.ffn_norm, None),
        "attention_output": (block.post_attention_norm, block.attention_out),
        "ffn_output": (block.post_ffn_norm, block.down),
    }
    if point not in behind:
        return [(first, True)] if point == "residual_in" else [(last, False)]
    norm, module = behind[point]
    module = module if norm is None else norm.module
    assert module is not None, "a point that a layer lacks was refused"
    return [(module, True), (last, False)] if point == "residual_mid" else [(module, False)]
