"""An adaptive softmax (Grave et al. 2017): tokens in bands by frequency, each band but the first behind a class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Bands:
    """Where the bands of a vocabulary end.

    The first softmax is over the tokens of the first band and one class for each other band; each of these has a
    softmax of its own, so that ``log p(w) = log p(class of w) + log p(w | class)`` behind the first band.

    ends  the token after the last of each band, ascending; the last is the size of the vocabulary
    """

    ends: tuple[int, ...]

    @property
    def vocabulary(self) -> int:
        """Tokens of all bands."""
        return self.ends[-1]

    @property
    def rows(self) -> int:
        """Scores that the head gives: of every token in turn, and then of every class."""
        return self.vocabulary + len(self.ends) - 1

    def band(self, token: int) -> int:
        """The band of a token, 0-based."""
        return next(band for band, end in enumerate(self.ends) if token < end)

    def softmax(self, number: int) -> Int[Tensor, " row"]:
        """Rows of a softmax: 0 is over the tokens of the first band and the classes, the others over a band each."""
        if number == 0:
            return torch.cat([torch.arange(self.ends[0]), torch.arange(self.vocabulary, self.rows)])
        return torch.arange(*self.ends[number - 1 : number + 1])

    def softmaxes(self, token: int) -> list[tuple[int, int]]:
        """The softmaxes whose log-probabilities add up to a token's, and which of its rows counts in each."""
        band = self.band(token)
        if band == 0:
            return [(0, token)]
        return [(0, self.ends[0] + band - 1), (band, token - self.ends[band - 1])]

    def log_probabilities(self, scores: Float[Tensor, "*batch row"]) -> Float[Tensor, "*batch vocabulary"]:
        """Log-probabilities of all tokens in nats, from the scores of all `rows`."""
        size = self.ends[0]
        chosen = torch.cat([scores[..., :size], scores[..., self.vocabulary :]], -1).log_softmax(-1)
        bands = [chosen[..., :size]]
        for band, (start, end) in enumerate(zip(self.ends[:-1], self.ends[1:], strict=True)):
            bands.append(scores[..., start:end].log_softmax(-1) + chosen[..., size + band : size + band + 1])
        return torch.cat(bands, -1)
