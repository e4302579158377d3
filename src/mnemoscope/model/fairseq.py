"""Fairseq's transformer language model (Baevski and Auli 2019), the model of both papers, as modules of our own.

Names inside are those of fairseq's checkpoints. Texts hold no padding, so that positions simply count; in a batch
padding is on the right, where a causal model does not look.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from mnemoscope.model.adaptive import Bands

PADDING = 1  # the id of <pad>, after which positions are counted
FAMILY = "fairseq_lm"


class FairseqConfig(PreTrainedConfig):
    """What a checkpoint's arguments say, under the names of transformers."""

    model_type = FAMILY

    def __init__(self, **settings: Any) -> None:
        self.vocab_size: int = settings.pop("vocab_size", 4)
        self.hidden_size: int = settings.pop("hidden_size", 32)
        self.intermediate_size: int = settings.pop("intermediate_size", 48)
        self.num_hidden_layers: int = settings.pop("num_hidden_layers", 1)
        self.num_attention_heads: int = settings.pop("num_attention_heads", 1)
        self.max_position_embeddings: int = settings.pop("max_position_embeddings", 64)
        self.activation_function: str = settings.pop("activation_function", "relu")
        self.embed_scale: float = settings.pop("embed_scale", 1.0)
        self.positions: str = settings.pop("positions", "sinusoidal")  # or learned, or none
        self.normalize_before: bool = settings.pop("normalize_before", True)
        self.final_norm: bool = settings.pop("final_norm", False)
        self.layernorm_embedding: bool = settings.pop("layernorm_embedding", False)
        # Ends of the bands of the embedding and of the softmax; empty where it is a plain matrix.
        self.input_bands: list[int] = settings.pop("input_bands", [])
        self.input_factor: float = settings.pop("input_factor", 4.0)
        self.output_bands: list[int] = settings.pop("output_bands", [])
        self.output_widths: list[int] = settings.pop("output_widths", [])  # of each band's tokens
        self.tied_words: bool = settings.pop("tied_words", False)  # the output's rows are the embedding's
        self.tied_projections: bool = settings.pop("tied_projections", False)
        super().__init__(**settings)


class Matrix(nn.Module):
    """A linear map without a bias, whose weight another may share the other way round."""

    def __init__(self, rows: int, columns: int, transposed: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((columns, rows) if transposed else (rows, columns)))
        self.transposed = transposed

    def forward(self, x: Float[Tensor, "*batch column"]) -> Float[Tensor, "*batch row"]:
        return nn.functional.linear(x, self.matrix())

    def matrix(self) -> Float[Tensor, "row column"]:
        return self.weight.T if self.transposed else self.weight


class AdaptiveInput(nn.Module):
    """Embeddings in bands: rare tokens have short ones, and each band is projected to the width of the stream."""

    def __init__(self, ends: list[int], width: int, factor: float) -> None:
        super().__init__()
        self.bands, self.num_embeddings = Bands(tuple(ends)), ends[-1]
        starts = [0, *ends[:-1]]
        self.embeddings: Any = nn.ModuleList()
        for band, (start, end) in enumerate(zip(starts, ends, strict=True)):
            short = int(width // factor**band)
            self.embeddings.append(nn.Sequential(nn.Embedding(end - start, short), Matrix(width, short)))

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        vectors, start = None, 0
        for end, embed in zip(self.bands.ends, self.embeddings, strict=True):
            inside = (tokens >= start) & (tokens < end)
            projected = embed(tokens[inside] - start)
            if vectors is None:
                vectors = projected.new_zeros(*tokens.shape, projected.shape[-1])
            vectors[inside] = projected
            start = end
        assert vectors is not None, "a vocabulary has at least one band"
        return vectors

    @property
    def weight(self) -> Float[Tensor, "vocabulary width"]:
        """The embedding of every token, multiplied out; fp32."""
        return torch.cat([rows.weight.float() @ up.matrix().float().T for rows, up in self.embeddings])


class _First(nn.Module):
    """Tokens of the first band, whose rows the embedding may share, and classes."""

    def __init__(self, words: int, classes: int, width: int) -> None:
        super().__init__()
        self.word_proj, self.class_proj = Matrix(words, width), Matrix(classes, width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch row"]:
        return torch.cat([self.word_proj(x), self.class_proj(x)], -1)

    def matrix(self) -> Tensor:
        return torch.cat([self.word_proj.matrix(), self.class_proj.matrix()])


class AdaptiveHead(nn.Module):
    """Scores of all rows of `Bands`: of tokens, behind the first band through a narrow projection, and of classes."""

    def __init__(self, config: FairseqConfig) -> None:
        super().__init__()
        self.bands, width = Bands(tuple(config.output_bands)), config.hidden_size
        ends, shared = self.bands.ends, config.tied_words
        classes = len(ends) - 1
        self.head: Any = _First(ends[0], classes, width) if shared else Matrix(ends[0] + classes, width)
        self.tail: Any = nn.ModuleList(
            nn.Sequential(
                Matrix(short, width, transposed=config.tied_projections),
                nn.Identity(),
                Matrix(end - start, short),
            )
            for start, end, short in zip(ends[:-1], ends[1:], config.output_widths[1:], strict=True)
        )

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch row"]:
        first = self.head(x)
        size = self.bands.ends[0]
        return torch.cat([first[..., :size], *(band(x) for band in self.tail), first[..., size:]], -1)

    @property
    def weight(self) -> Float[Tensor, "row width"]:
        """The rows of all tokens and classes, multiplied out; fp32."""
        first, size = self.head.matrix().float(), self.bands.ends[0]
        tails = [words.matrix().float() @ down.matrix().float() for down, _, words in self.tail]
        return torch.cat([first[:size], *tails, first[size:]])


class SelfAttention(nn.Module):
    """Causal attention; weights times values is its last product before the output projection."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self, hidden_states: Float[Tensor, "batch token width"]
    ) -> Float[Tensor, "batch token width"]:
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (query * query.shape[-1] ** -0.5) @ key.mT
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(ahead, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed = torch.matmul(weights, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and FFN, each normalised before it or, with the residual, after it."""

    def __init__(self, config: FairseqConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.normalize_before = config.normalize_before
        self.self_attn = SelfAttention(width, config.num_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.activation_fn = ACT2FN[config.activation_function]
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        first, second = self.self_attn_layer_norm, self.final_layer_norm
        if self.normalize_before:
            x = x + self.self_attn(first(x))
            return x + self._feed_forward(second(x))
        x = first(x + self.self_attn(x))
        return second(x + self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class Decoder(nn.Module):
    """From token ids to what the head reads."""

    def __init__(self, config: FairseqConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.embed_scale = config, config.embed_scale
        self.embed_tokens: nn.Module = (
            AdaptiveInput(config.input_bands, width, config.input_factor)
            if config.input_bands
            else nn.Embedding(config.vocab_size, width)
        )
        rows = config.max_position_embeddings + PADDING + 1
        self.embed_positions = nn.Embedding(rows, width) if config.positions == "learned" else None
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(width) if config.final_norm else None

    def forward(self, input_ids: Int[Tensor, "batch token"], **_: Any) -> BaseModelOutput:
        x = self.embed_scale * self.embed_tokens(input_ids)
        places = PADDING + 1 + torch.arange(input_ids.shape[-1], device=input_ids.device)
        if self.embed_positions is not None:
            x = x + self.embed_positions(places)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoids(places, x.shape[-1]).to(x.dtype)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x if self.layer_norm is None else self.layer_norm(x))


class FairseqLM(PreTrainedModel):
    """The whole model; with an adaptive softmax its logits are log-probabilities."""

    config_class = FairseqConfig
    config: FairseqConfig

    def __init__(self, config: FairseqConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config)
        width, adaptive = config.hidden_size, bool(config.output_bands)
        self.adaptive_softmax = AdaptiveHead(config) if adaptive else None
        self.output_projection = None if adaptive else nn.Linear(width, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Int[Tensor, "batch token"], *, logits_to_keep: int = 0, **_: Any
    ) -> CausalLMOutput:
        x = self.decoder(input_ids=input_ids).last_hidden_state[:, -logits_to_keep:]
        if self.adaptive_softmax is None:
            assert self.output_projection is not None, "a model has either head"
            return CausalLMOutput(logits=self.output_projection(x))
        scores = self.adaptive_softmax(x).float()
        return CausalLMOutput(logits=self.adaptive_softmax.bands.log_probabilities(scores))

    def tie(self) -> None:
        """Share the weights that were trained as one."""
        head: Any = self.adaptive_softmax
        table: Any = self.decoder.embed_tokens
        if head is None:
            if self.config.tied_words:
                assert self.output_projection is not None, "a model has either head"
                self.output_projection.weight = table.weight
            return
        if self.config.tied_words:
            words = [head.head.word_proj, *(band[2] for band in head.tail)]
            for rows, (embedding, _) in zip(words, table.embeddings, strict=True):
                rows.weight = embedding.weight
        if self.config.tied_projections:
            for band, (_, up) in zip(head.tail, list(table.embeddings)[1:], strict=True):
                band[0].weight = up.weight

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        head = self.adaptive_softmax or self.output_projection
        assert head is not None, "a model has either head"
        return head


def sinusoids(places: Int[Tensor, " token"], width: int) -> Float[Tensor, "token width"]:
    """Positions as sines, then cosines (fairseq's order); fp32."""
    half = width // 2
    step = math.log(10000) / (half - 1)
    angles = places[:, None].float() * torch.exp(-step * torch.arange(half, device=places.device).float())
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))
