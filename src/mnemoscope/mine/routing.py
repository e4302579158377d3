"""How often the router chose each expert, and with what weight."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa

from mnemoscope.mine.reading import Fields
from mnemoscope.model.capture import LayerRows
from mnemoscope.records import Cells, ContextBatch
from mnemoscope.run.schemas import arrow_table

_UNIT = 2.0**-24  # of a weight: whole numbers of these are added, so that no order of adding shows


class Routing(Fields):
    """Counted tokens and the sum of the router's weights, by layer and expert, a shared expert being the last.

    tokens   i64[layer group]
    weights  i64[layer group]  in units of 2^-24
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("tokens", "weights")

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        groups = 1 + max((count for count, _ in cells.experts), default=0)
        self.tokens = np.zeros((len(cells.experts), groups), np.int64)
        self.weights = np.zeros_like(self.tokens)

    def update(self, rows: LayerRows, batch: ContextBatch) -> None:
        """Add the experts of one layer of one batch."""
        counted = batch.counted.ravel()
        if rows.rows is not None:
            counted = counted[rows.rows.cpu().numpy()]
        if isinstance(rows.weight, float):
            whole = np.full(len(counted), round(rows.weight / _UNIT))
        else:
            # A power of two: fp32 loses nothing by it.
            whole = np.rint(rows.weight.detach().cpu().numpy() / np.float32(_UNIT)).astype(np.int64)
        groups = slice(rows.group, rows.group + len(rows.starts) - 1)
        for held, added in ((self.tokens, counted), (self.weights, whole * counted)):
            held[rows.layer, groups] += np.diff(
                np.concatenate([[0], np.cumsum(added, dtype=np.int64)])[rows.starts]
            )

    def merge(self, other: Routing) -> None:
        """Add the numbers of another state."""
        self.tokens += other.tokens
        self.weights += other.weights

    def result(self, layer: int, counted: int) -> pa.Table:
        """Rows of `experts`: one for each expert of a layer, of so many counted tokens."""
        count, width = self._cells.experts[layer]
        shared = self._cells.sizes[layer] - count * width
        groups = np.arange(count + bool(shared))
        tokens, weights = self.tokens[layer, groups], self.weights[layer, groups]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean, fraction = weights * _UNIT / tokens, tokens / float(counted)
        return arrow_table(
            "experts",
            {
                "layer": layer,
                "expert": groups,
                "shared": groups == count,
                "neuron": groups * width,
                "neurons": np.where(groups == count, shared, width),
                "tokens": tokens,
                "routed_fraction": fraction,
                "router_weight": mean,
            },
        )
