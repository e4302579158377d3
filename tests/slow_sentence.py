"""One prefix of a tiny model in fp64, by the definitions: what tests of contributions compare with."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch
from families import FAMILIES, VARIANTS

from mnemoscope.model.model import Model
from mnemoscope.model.parts import Norm
from mnemoscope.model.reading import describe
from mnemoscope.model.stream import Stream, trace

BUILDERS = FAMILIES | VARIANTS
PREFIX = np.array([7, 3, 11, 3, 60, 25], np.int32)


@cache
def wrapped(name: str) -> Model:
    """A tiny model without a tokenizer."""
    hf = BUILDERS[name]()
    return Model(hf, None, describe(hf), "tiny")


def normed(norm: Norm, vector: np.ndarray, of: np.ndarray, *, bias: bool = False) -> np.ndarray:
    """A norm with the statistic of some vector; for a part without its bias."""
    if norm.kind == "layer":
        vector = vector - vector.mean(-1, keepdims=True)
        of = of - of.mean(-1, keepdims=True)
    out = vector / np.sqrt((of**2).mean(-1, keepdims=True) + norm.eps)
    if norm.weight is not None:
        out = out * norm.weight.double().numpy()
    return out if norm.bias is None or not bias else out + norm.bias.double().numpy()


class Slow:
    """One prefix in fp64: what is at each point, what each neuron writes, and log p by its definition."""

    def __init__(self, name: str, lens: str) -> None:
        self.hf = copy.deepcopy(wrapped(name).hf).double()
        self.parts, self.lens = describe(self.hf), lens
        tokens, self.at = torch.from_numpy(PREFIX.astype(np.int64))[None], len(PREFIX) - 1
        self.stream: Stream = trace(self.hf, self.parts, tokens)
        # In fp32 the tail of a GELU is 0 a little earlier.
        seen = trace(wrapped(name).hf, wrapped(name).anatomy, tokens)
        self.off = [one.coefficients[self.at].numpy() == 0 for one in seen.layers]
        layers = self.stream.layers
        rows = [layers[0].lin[self.at]]
        for one in layers:
            rows += [one.lres[self.at], one.lout[self.at]]
        self.points = torch.stack(rows).numpy()
        self.unembedding = self.parts.unembedding().double().detach().numpy()

    def coefficients(self, layer: int) -> np.ndarray:
        return np.where(self.off[layer], 0.0, self.stream.layers[layer].coefficients[self.at].numpy())

    def written(self, layer: int) -> np.ndarray:
        """f64[neuron, width]: what each adds to the stream."""
        part = self.parts.layers[layer]
        rows = self.coefficients(layer)[:, None] * part.values().detach().numpy()
        if part.post_ffn_norm is not None:
            rows = normed(part.post_ffn_norm, rows, self.stream.layers[layer].ffn_output[self.at].numpy())
        return rows * part.ffn_multiplier

    def logits(self, x: np.ndarray, lens: str | None = None) -> np.ndarray:
        lens, norm = lens or self.lens, self.parts.final_norm
        if lens != "raw" and norm is not None:
            x = normed(norm, x, x if lens == "own" else self.points[-1], bias=True)
        scores = x @ self.unembedding.T
        if self.parts.unembedding_bias is not None:
            scores = scores + self.parts.unembedding_bias.double().detach().numpy()
        scores = scores * self.parts.logit_multiplier
        cap = self.parts.softcap
        return scores if cap is None else cap * np.tanh(scores / cap)

    def log_p(self, x: np.ndarray, token: int, lens: str | None = None) -> np.ndarray:
        scores = self.logits(x, lens)
        most = scores.max(-1, keepdims=True)
        return (scores - most)[..., token] - np.log(np.exp(scores - most).sum(-1))

    def gain(self, layer: int, vectors: np.ndarray, token: int) -> np.ndarray:
        """What vectors added after the attention of a layer do to log p."""
        x = self.points[2 * layer + 1]
        return self.log_p(x + vectors, token) - self.log_p(x, token)

    def above_mean(self, layer: int, vector: np.ndarray, token: int) -> float:
        """What a vector added after the attention of a layer does to a logit above the mean token's, before a cap."""
        norm, x = self.parts.final_norm, self.points[2 * layer + 1]
        if self.lens != "raw" and norm is not None:
            if self.lens == "own":
                vector = normed(norm, x + vector, x + vector) - normed(norm, x, x)
            else:
                vector = normed(norm, vector, self.points[-1])
        scores = vector @ self.unembedding.T * self.parts.logit_multiplier
        return float(scores[token] - scores.mean())

    def ranks(self, vectors: np.ndarray, token: int) -> np.ndarray:
        """Where each vector, alone and without biases, puts the token."""
        norm = self.parts.final_norm
        if self.lens != "raw" and norm is not None:
            vectors = normed(norm, vectors, np.ones(vectors.shape[1]) * np.arange(vectors.shape[1]))
        scores = vectors @ self.unembedding.T
        return (scores > scores[:, [token]] + 1e-12).sum(-1)

    def share(self, layer: int, query: np.ndarray) -> np.ndarray:
        """f64[neuron]: a vector's share of every coefficient of a layer, with the coefficient's sign (B.5)."""
        part, traced = self.parts.layers[layer], self.stream.layers[layer]
        x = (traced.lin if self.parts.parallel else traced.lres)[self.at].numpy()
        read = query if part.ffn_norm is None else normed(part.ffn_norm, query, x)
        g = traced.gate[self.at].numpy()
        act = part.act(torch.from_numpy(g)).detach().numpy()
        rate = np.divide(act, g, out=np.zeros_like(g), where=g != 0)
        of_gate = read @ part.keys().detach().numpy().T
        if traced.up is None:
            share = rate * of_gate
        else:
            ups = part.ups()
            assert ups is not None
            of_up = read @ ups.detach().numpy().T
            share = (act * of_up + rate * of_gate * traced.up[self.at].numpy()) / 2
        return share * np.sign(self.coefficients(layer))
