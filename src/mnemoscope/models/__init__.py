"""Load a causal language model from anywhere local, find its parts, and check that they add up to its logits.

`Model` holds what was loaded and looks again at its weights, hooks and mode wherever these are used.
"""

from mnemoscope.models.loading import load_built, load_model
from mnemoscope.models.model import Model, native_bf16, tiles
from mnemoscope.models.state import Fingerprint

__all__ = ["Fingerprint", "Model", "load_built", "load_model", "native_bf16", "tiles"]
