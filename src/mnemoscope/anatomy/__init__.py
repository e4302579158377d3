"""Where each model family keeps its parts, as a table.

A row of `FAMILIES` says which modules of a block are the attention output, the FFN projections and the norms,
and which fields of the config multiply what. Everything that can be measured is measured instead of listed: a
norm's kind, weight convention and epsilon are found by comparing candidates with the module's own output. A
decoder that has no row is tried against every combination of the known pieces that uses all of its norms.
Whether an `Anatomy` is right is decided by `decompose.self_check`, never here.
"""

from mnemoscope.anatomy.parts import Anatomy, Layer, Norm, Projection
from mnemoscope.anatomy.reading import candidates, describe
from mnemoscope.anatomy.table import FAMILIES

__all__ = ["FAMILIES", "Anatomy", "Layer", "Norm", "Projection", "candidates", "describe"]
