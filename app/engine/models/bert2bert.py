"""BERT as encoder, and BERT with cross-attention as decoder (Rothe et al. 2020, arXiv:1907.12461).

Pure functions of weights, inputs and caches that the caller owns. Does not know beams, options or requests; its rows
are whatever the runner puts there. Equal to transformers' EncoderDecoderModel in evaluation mode.

Shapes: S sequences, K rows (beams) of a sequence, N source positions, T target positions, L layers, H heads, D head
size, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.kv_cache import KVCache

Part = TypeVar("Part")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class BertConfig:
    """The part of a BERT's config.json that changes what is computed."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BertConfig:
        """Read it from the `encoder` or `decoder` section of a config.json.

        Raises:
            ValueError: another architecture, activation or kind of position embedding.
        """
        if config.get("model_type") != "bert":
            raise ValueError(f"model_type is {config.get('model_type')!r}; only 'bert' is built")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"position_embedding_type is {config['position_embedding_type']!r}, not 'absolute'")
        if config.get("hidden_act", "gelu") not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {config['hidden_act']!r}; known: {', '.join(ACTIVATIONS)}")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            max_position_embeddings=config["max_position_embeddings"],
            hidden_act=config.get("hidden_act", "gelu"),
            layer_norm_eps=config.get("layer_norm_eps", 1e-12),
        )

    @property
    def head_size(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] and a bias [out]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)

    @staticmethod
    def stacked(*parts: Linear) -> Linear:
        """Several projections of the same input as one matrix product."""
        return Linear(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))


@dataclass(frozen=True)
class LayerNorm:
    """Scale and shift over the last dimension [E]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Layer:
    """One transformer block; the cross-attention fields stand in decoder layers only."""

    qkv: Linear
    attention_output: Linear
    attention_norm: LayerNorm
    intermediate: Linear
    output: Linear
    output_norm: LayerNorm
    cross_query: Linear | None = None
    cross_key_value: Linear | None = None
    cross_output: Linear | None = None
    cross_norm: LayerNorm | None = None


@dataclass(frozen=True)
class Embeddings:
    """Word and position vectors; the one token type that is used is already added to the positions."""

    word: Tensor  # [V, E]
    position: Tensor  # [N, E]
    norm: LayerNorm

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids and positions of one shape [...] -> [..., E]."""
        return self.norm(F.embedding(ids, self.word) + F.embedding(positions, self.position))


@dataclass(frozen=True)
class LMHead:
    """Hidden state to logits: dense, activation, norm, then the (tied) word embeddings."""

    transform: Linear
    norm: LayerNorm
    decoder: Linear
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        return self.decoder(self.norm(self.activation(self.transform(x))))


@dataclass(frozen=True)
class Bert2Bert:
    """The two stacks. `encode` makes cross-attention keys and values; `decode` makes one step's logits."""

    encoder: BertConfig
    decoder: BertConfig
    device: torch.device
    dtype: torch.dtype
    encoder_embeddings: Embeddings
    encoder_layers: tuple[Layer, ...]
    projection: Linear | None
    decoder_embeddings: Embeddings
    decoder_layers: tuple[Layer, ...]
    lm_head: LMHead

    @classmethod
    def from_weights(
        cls,
        encoder: BertConfig,
        decoder: BertConfig,
        weights: Mapping[str, Tensor],
        device: str,
        dtype: torch.dtype,
    ) -> Bert2Bert:
        """Build from a state dict of EncoderDecoderModel.

        Raises:
            KeyError: a weight is missing.
        """

        def get(name: str) -> Tensor:
            return weights[name].to(device=device, dtype=dtype)

        def linear(name: str) -> Linear:
            return Linear(get(f"{name}.weight"), get(f"{name}.bias"))

        def norm(name: str, config: BertConfig) -> LayerNorm:
            return LayerNorm(get(f"{name}.weight"), get(f"{name}.bias"), config.layer_norm_eps)

        def embeddings(name: str, config: BertConfig) -> Embeddings:
            token_type = get(f"{name}.token_type_embeddings.weight")[0]
            return Embeddings(
                word=get(f"{name}.word_embeddings.weight"),
                position=get(f"{name}.position_embeddings.weight") + token_type,
                norm=norm(f"{name}.LayerNorm", config),
            )

        def layer(name: str, config: BertConfig, cross: bool) -> Layer:
            return Layer(
                qkv=Linear.stacked(*(linear(f"{name}.attention.self.{part}") for part in ("query", "key", "value"))),
                attention_output=linear(f"{name}.attention.output.dense"),
                attention_norm=norm(f"{name}.attention.output.LayerNorm", config),
                intermediate=linear(f"{name}.intermediate.dense"),
                output=linear(f"{name}.output.dense"),
                output_norm=norm(f"{name}.output.LayerNorm", config),
                cross_query=linear(f"{name}.crossattention.self.query") if cross else None,
                cross_key_value=Linear.stacked(
                    linear(f"{name}.crossattention.self.key"), linear(f"{name}.crossattention.self.value")
                )
                if cross
                else None,
                cross_output=linear(f"{name}.crossattention.output.dense") if cross else None,
                cross_norm=norm(f"{name}.crossattention.output.LayerNorm", config) if cross else None,
            )

        def layers(name: str, config: BertConfig, cross: bool) -> tuple[Layer, ...]:
            return tuple(layer(f"{name}.{i}", config, cross) for i in range(config.num_hidden_layers))

        head, decoder_embeddings = "decoder.cls.predictions", embeddings("decoder.bert.embeddings", decoder)
        untied = f"{head}.decoder.weight"
        return cls(
            encoder=encoder,
            decoder=decoder,
            device=torch.device(device),
            dtype=dtype,
            encoder_embeddings=embeddings("encoder.embeddings", encoder),
            encoder_layers=layers("encoder.encoder.layer", encoder, cross=False),
            projection=linear("enc_to_dec_proj") if "enc_to_dec_proj.weight" in weights else None,
            decoder_embeddings=decoder_embeddings,
            decoder_layers=layers("decoder.bert.encoder.layer", decoder, cross=True),
            lm_head=LMHead(
                transform=linear(f"{head}.transform.dense"),
                norm=norm(f"{head}.transform.LayerNorm", decoder),
                decoder=Linear(get(untied) if untied in weights else decoder_embeddings.word, get(f"{head}.bias")),
                activation=ACTIVATIONS[decoder.hidden_act],
            ),
        )

    def encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Source ids to cross-attention keys and values of every decoder layer.

        Args:
            ids: [S, N], padded at the end with anything.
            lengths: [S], real tokens of each row.

        Returns:
            [L, 2, S, H, N, D]; positions from `lengths` on are meaningless.
        """
        size, positions = ids.shape[0], torch.arange(ids.shape[1], device=self.device)
        mask = (positions < lengths[:, None])[:, None, None, :]  # [S, 1, 1, N]
        x = self.encoder_embeddings(ids, positions.expand_as(ids))
        act, heads = ACTIVATIONS[self.encoder.hidden_act], self.encoder.num_attention_heads
        for layer in self.encoder_layers:
            q, k, v = _heads(layer.qkv(x), 3, heads)  # each [S, H, N, D]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = layer.attention_norm(x + layer.attention_output(attended.transpose(1, 2).flatten(2)))
            x = layer.output_norm(x + layer.output(act(layer.intermediate(x))))
        if self.projection is not None:
            x = self.projection(x)
        cross = [
            _heads(_needed(layer.cross_key_value)(x), 2, self.decoder.num_attention_heads)
            for layer in self.decoder_layers
        ]
        return torch.stack([torch.stack(pair) for pair in cross]).view(
            len(cross), 2, size, self.decoder.num_attention_heads, -1, self.decoder.head_size
        )

    def decode(
        self, ids: Tensor, positions: Tensor, cache: KVCache, source_lengths: Tensor, target: int, source: int
    ) -> Tensor:
        """One step for every running row: write its key and value, attend, and score the vocabulary.

        Args:
            ids: [S, K], the newest token of each row.
            positions: [S], where that token stands; a sequence's beams are in step, sequences need not be.
            cache: self and cross caches of the first S slots.
            source_lengths: [S].
            target: the longest target of the S sequences, this step's token included; attention reads no further.
            source: the longest source of the S sequences.

        Returns:
            logits [S, K, V], in the model's dtype.
        """
        size, beams = ids.shape
        steps = torch.arange(target, device=self.device)
        self_mask = (steps <= positions[:, None]).repeat_interleave(beams, 0)[:, None, None, :]  # [S*K, 1, 1, T]
        cross_mask = (torch.arange(source, device=self.device) < source_lengths[:, None])[:, None, None, :]
        x = self.decoder_embeddings(ids, positions[:, None].expand_as(ids)).flatten(0, 1)  # [S*K, E]
        act, heads, head_size = ACTIVATIONS[self.decoder.hidden_act], self.decoder.num_attention_heads, -1
        for index, layer in enumerate(self.decoder_layers):
            q, k, v = layer.qkv(x).view(size * beams, 3, heads, head_size).unbind(1)  # each [S*K, H, D]
            keys, values = cache.append(
                index, k.view(size, beams, heads, -1), v.view(size, beams, heads, -1), positions, target
            )  # each [S*K, H, T, D]
            attended = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=self_mask)
            x = layer.attention_norm(x + layer.attention_output(attended.flatten(1)))

            # The beams of a sequence are K queries over the same keys: the cross cache is read once, not K times.
            q = _needed(layer.cross_query)(x).view(size, beams, heads, head_size).transpose(1, 2)  # [S, H, K, D]
            keys, values = cache.cross(index, size, source)  # each [S, H, N, D]
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=cross_mask)
            attended = attended.transpose(1, 2).reshape(size * beams, -1)
            x = _needed(layer.cross_norm)(x + _needed(layer.cross_output)(attended))
            x = layer.output_norm(x + layer.output(act(layer.intermediate(x))))
        logits: Tensor = self.lm_head(x).view(size, beams, -1)
        return logits


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[S, N, parts*H*D] -> `parts` tensors of [S, H, N, D]."""
    return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _needed(part: Part | None) -> Part:
    assert part is not None, "a decoder layer has cross-attention"
    return part
