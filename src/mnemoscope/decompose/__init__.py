"""The residual stream of one forward pass as an exact sum of parts (A30-A33; G4-G6, G8).

`trace` runs a model once on one sequence and keeps what the parts are made of: attention weights, value
vectors, coefficients, residuals. `Stream` multiplies them out on demand. `self_check` shows that the parts
of an `Anatomy` add up to the model's own logits, layer by layer.

Attention weights are seen, not recomputed: under the "eager" implementation the last matrix product before
the output projection is ``weights @ values`` in every family, whatever masks, positions, caps or norms came
before. That this is what the output projection reads is part of the check.
"""

from mnemoscope.decompose.as_run import check_traced
from mnemoscope.decompose.check import examine, self_check
from mnemoscope.decompose.observe import TOLERANCE, LayerTrace
from mnemoscope.decompose.stream import Stream, trace

__all__ = ["TOLERANCE", "LayerTrace", "Stream", "check_traced", "examine", "self_check", "trace"]
