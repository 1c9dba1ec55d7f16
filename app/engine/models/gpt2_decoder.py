"""GPT-2 with cross-attention as decoder (Radford et al. 2019; Rothe et al. 2020, arXiv:1907.12461).

Unlike BERT it normalises before each part of a layer and once at the end, scores with its word embeddings alone, and
stores products as [in, out]. Equal to transformers' module in evaluation mode. Shapes: `decoder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.linear import ACTIVATIONS, Linear, Scale
from app.engine.models.decoder import Decoder
from app.engine.models.layers import LayerNorm, filled_up
from app.engine.models.limits import max_tokens
from app.engine.models.weights import Weights
from app.engine.step_cache import StepCache


@dataclass(frozen=True)
class Gpt2Config:
    """The part of a GPT-2's config.json that changes what is computed, in the words of the other networks."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    max_tokens: int
    scale_attention: bool
    scale_attention_by_layer: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Gpt2Config:
        """Read it from the `decoder` section of a config.json.

        Raises:
            ValueError: another architecture or activation.
            KeyError: a size is missing.
        """
        if config.get("model_type") != "gpt2":
            raise ValueError(f"model_type is {config.get('model_type')!r}, not 'gpt2'")
        activation = config.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation_function is {activation!r}; known: {', '.join(ACTIVATIONS)}")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["n_embd"],
            num_hidden_layers=config["n_layer"],
            num_attention_heads=config["n_head"],
            hidden_act=activation,
            layer_norm_eps=config.get("layer_norm_epsilon", 1e-5),
            max_tokens=max_tokens(config),
            scale_attention=config.get("scale_attn_weights", True),
            scale_attention_by_layer=config.get("scale_attn_by_inverse_layer_idx", False),
        )

    @property
    def head_size(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    def query_scale(self, layer: int) -> Scale:
        """By what a layer's attention scores are multiplied: with its queries."""
        scale = self.head_size**-0.5 if self.scale_attention else 1.0
        return Scale(self.hidden_size, scale / (layer + 1) if self.scale_attention_by_layer else scale)


@dataclass(frozen=True)
class Gpt2Layer:
    """Norm before each of self-attention, cross-attention and feed-forward; all three add to what they were given."""

    attention_norm: LayerNorm
    qkv: Linear
    attention_output: Linear
    cross_norm: LayerNorm
    cross_query: Linear
    cross_key_value: Linear
    cross_output: Linear
    feed_forward_norm: LayerNorm
    intermediate: Linear  # with the activation
    output: Linear


@dataclass(frozen=True)
class Gpt2Decoder(Decoder):
    """A stack of layers between embeddings and scores."""

    config: Gpt2Config
    word: Tensor  # [V, E]
    position: Tensor  # [T, E]
    layers: tuple[Gpt2Layer, ...]
    norm: LayerNorm
    scores: Linear

    @classmethod
    def from_weights(cls, config: Gpt2Config, weights: Weights, attention_dtype: torch.dtype) -> Gpt2Decoder:
        """Read what stands under `decoder.`; raises KeyError if a weight is missing."""
        few_rows, eps = weights.few_rows, config.layer_norm_eps

        def product(name: str) -> tuple[Tensor, Tensor]:
            return weights.get(f"{name}.weight").t().contiguous(), weights.get(f"{name}.bias")

        def layer(index: int) -> Gpt2Layer:
            name = f"decoder.transformer.h.{index}"
            scale = config.query_scale(index)
            return Gpt2Layer(
                attention_norm=weights.norm(f"{name}.ln_1", eps),
                qkv=few_rows(*product(f"{name}.attn.c_attn"), scale=scale),
                attention_output=few_rows(*product(f"{name}.attn.c_proj")),
                cross_norm=weights.norm(f"{name}.ln_cross_attn", eps),
                cross_query=few_rows(*product(f"{name}.crossattention.q_attn"), scale=scale),
                cross_key_value=weights.many_rows(*product(f"{name}.crossattention.c_attn")),
                cross_output=few_rows(*product(f"{name}.crossattention.c_proj")),
                feed_forward_norm=weights.norm(f"{name}.ln_2", eps),
                intermediate=few_rows(*product(f"{name}.mlp.c_fc"), ACTIVATIONS[config.hidden_act]),
                output=few_rows(*product(f"{name}.mlp.c_proj")),
            )

        tied = "decoder.lm_head.weight" not in weights
        scores_from = "decoder.transformer.wte.weight" if tied else "decoder.lm_head.weight"
        scores = weights.get(scores_from)
        output_weight, output_bias = filled_up(scores, scores.new_zeros(len(scores)))
        return cls(
            dtype=weights.dtype,
            attention_dtype=attention_dtype,
            config=config,
            # Tied: a view of the same matrix, where it is kept as it is.
            word=output_weight[: config.vocab_size] if tied else weights.get("decoder.transformer.wte.weight"),
            position=weights.get("decoder.transformer.wpe.weight"),
            layers=tuple(map(layer, range(config.num_hidden_layers))),
            norm=weights.norm("decoder.transformer.ln_f", eps),
            scores=few_rows(output_weight, output_bias),
        )

    @property
    def sizes(self) -> Gpt2Config:
        """See `Decoder`."""
        return self.config

    @property
    def cross_key_values(self) -> list[Linear]:
        """See `Decoder`."""
        return [layer.cross_key_value for layer in self.layers]

    def decode(self, ids: Tensor, positions: Tensor, cache: StepCache) -> Tensor:
        """See `Decoder`."""
        size, beams = ids.shape
        x = F.embedding(ids, self.word) + F.embedding(positions, self.position)[:, None]
        x = x.flatten(0, 1)  # [S*K, E]
        for index, layer in enumerate(self.layers):
            attended = cache.self_attention(index, layer.qkv(layer.attention_norm(x)))
            x = layer.attention_output(attended, x)
            attended = cache.cross_attention(index, layer.cross_query(layer.cross_norm(x)))
            x = layer.cross_output(attended, x)
            x = layer.output(layer.intermediate(layer.feed_forward_norm(x)), x)
        logits: Tensor = self.scores(self.norm(x)).view(size, beams, -1)
        return logits
