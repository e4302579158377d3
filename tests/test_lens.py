"""Lenses: what is additive, what is not, and what they say of a model's own final residual."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES

from mnemoscope.model.lens import LENSES, Lens
from mnemoscope.model.reading import describe
from mnemoscope.model.stream import trace

NAMES = ["llama", "gpt2", "gemma2", "cohere", "granite", "phi"]
TOKENS = torch.tensor([[3, 9, 27, 14, 40]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lens", ["own", "frozen"])
def test_final_residual_reads_as_the_models_logits(name: str, lens: str) -> None:
    """The own lens, and the frozen lens with the final residual as its own reference, give the model's logits."""
    hf = FAMILIES[name]()
    anatomy = describe(hf)
    stream = trace(hf, anatomy, TOKENS)
    final = stream.final.float()
    reading = Lens.of(anatomy, lens)
    if lens == "own":
        logits = reading.logits(final)
    else:
        logits = reading.cap(reading.logits(final, reading.scale(final)) + reading.offset)
    with torch.no_grad():
        expected = hf(TOKENS).logits[0].float()
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lens", ["raw", "frozen"])
def test_linear_lenses_are_additive(name: str, lens: str) -> None:
    """Under raw and frozen the logits of a sum are the sum of the logits (Yu et al. 2023, Eq. 14-16; A35)."""
    anatomy = describe(FAMILIES[name]())
    generator = torch.Generator().manual_seed(1)
    a, b, reference = torch.randn(3, anatomy.width, generator=generator)
    reading = Lens.of(anatomy, lens)
    scale = reading.scale(reference)
    together = reading.logits(a + b, scale)
    apart = reading.logits(a, scale) + reading.logits(b, scale)
    assert torch.allclose(together, apart, atol=1e-5 * float(together.abs().max()))


def test_own_lens_does_not_see_the_length_of_a_vector() -> None:
    """Under an RMS norm with its own statistics, twice a vector reads like the vector."""
    anatomy = describe(FAMILIES["llama"]())
    vector = 100 * torch.randn(anatomy.width, generator=torch.Generator().manual_seed(2))
    reading = Lens.of(anatomy, "own")
    assert torch.allclose(reading.logits(vector), reading.logits(2 * vector), atol=1e-4)


def test_unknown_lens_and_missing_reference_are_refused() -> None:
    """A lens has one of three names, and the frozen one needs a reference."""
    anatomy = describe(FAMILIES["llama"]())
    with pytest.raises(ValueError, match="raw, own, frozen"):
        Lens.of(anatomy, "tuned")
    with pytest.raises(ValueError, match="scale of a reference"):
        Lens.of(anatomy, "frozen").logits(torch.ones(anatomy.width))
    assert set(LENSES) == {"raw", "own", "frozen"}
