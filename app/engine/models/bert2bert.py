"""BERT as encoder, and BERT with cross-attention as decoder (Rothe et al. 2020, arXiv:1907.12461).

Pure functions of weights, inputs and caches that the caller owns. Does not know beams, options or requests; its rows
are whatever the runner puts there. Equal to transformers' EncoderDecoderModel in evaluation mode.

Shapes: S sequences, K rows (beams) of a sequence, P tokens of all sources, N source positions, T target positions, W
keys, L layers, H heads, D head size, E hidden size, V columns of logits: the vocabulary, filled up with columns of
-inf, at least one, to a multiple of BLOCK.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.attention import attend
from app.engine.kv_cache import StepCache
from app.engine.linear import ACTIVATIONS, Linear, MakeLinear, choose_linear, stacked
from app.engine.top_candidates import BLOCK


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
class LayerNorm:
    """Scale and shift over the last dimension [E]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class EncoderLayer:
    """Self-attention and feed-forward, each with its residual norm."""

    qkv: Linear
    attention_output: Linear
    attention_norm: LayerNorm
    intermediate: Linear  # with the activation
    output: Linear
    output_norm: LayerNorm


@dataclass(frozen=True)
class DecoderLayer(EncoderLayer):
    """The same, with cross-attention between the two."""

    cross_query: Linear
    cross_key_value: Linear
    cross_output: Linear
    cross_norm: LayerNorm


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

    transform: Linear  # with the activation
    norm: LayerNorm
    decoder: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        return self.decoder(self.norm(self.transform(x)))


@dataclass(frozen=True)
class Bert2Bert:
    """The two stacks. `encode` makes cross-attention keys and values; `decode` makes one step's logits."""

    encoder: BertConfig
    decoder: BertConfig
    device: torch.device
    dtype: torch.dtype  # of activations and, where they are not packed otherwise, of weights
    attention_dtype: torch.dtype  # of queries, keys and values, the cached ones too
    encoder_embeddings: Embeddings
    encoder_layers: tuple[EncoderLayer, ...]
    projection: Linear | None
    decoder_embeddings: Embeddings
    decoder_layers: tuple[DecoderLayer, ...]
    lm_head: LMHead

    @classmethod
    def from_weights(
        cls,
        encoder: BertConfig,
        decoder: BertConfig,
        weights: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        int8: bool = False,
    ) -> Bert2Bert:
        """Build from a state dict of EncoderDecoderModel.

        Args:
            dtype: of activations, attention and weights.
            int8: multiply in 8 bits (CPU only). Embeddings, norms and sums are then in fp32, and attention in `dtype`.

        Raises:
            KeyError: a weight is missing.
        """
        attention_dtype = dtype
        if int8:
            dtype = torch.float32
        many_rows = choose_linear(device, dtype, int8, few_rows=False)
        few_rows = choose_linear(device, dtype, int8, few_rows=True)

        def get(name: str) -> Tensor:
            return weights[name].to(device=device, dtype=dtype)

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return get(f"{name}.weight"), get(f"{name}.bias")

        def norm(name: str, config: BertConfig) -> LayerNorm:
            return LayerNorm(*pair(name), config.layer_norm_eps)

        def embeddings(name: str, config: BertConfig, word: Tensor | None = None) -> Embeddings:
            token_type = get(f"{name}.token_type_embeddings.weight")[0]
            return Embeddings(
                word=get(f"{name}.word_embeddings.weight") if word is None else word,
                position=get(f"{name}.position_embeddings.weight") + token_type,
                norm=norm(f"{name}.LayerNorm", config),
            )

        def query(name: str, scale: float) -> tuple[Tensor, Tensor]:
            weight, bias = pair(name)
            return weight * scale, bias * scale

        def block(name: str, config: BertConfig, linear: MakeLinear, scale: float = 1.0) -> dict[str, Any]:
            own = f"{name}.attention.self"
            parts = [query(f"{own}.query", scale), pair(f"{own}.key"), pair(f"{own}.value")]
            return {
                "qkv": linear(*stacked(parts)),
                "attention_output": linear(*pair(f"{name}.attention.output.dense")),
                "attention_norm": norm(f"{name}.attention.output.LayerNorm", config),
                "intermediate": linear(*pair(f"{name}.intermediate.dense"), ACTIVATIONS[config.hidden_act]),
                "output": linear(*pair(f"{name}.output.dense")),
                "output_norm": norm(f"{name}.output.LayerNorm", config),
            }

        def decoder_layer(name: str) -> DecoderLayer:
            cross = f"{name}.crossattention"
            # Attention scores are divided by the root of D: in the weights once, not in every step.
            scale = decoder.head_size**-0.5
            return DecoderLayer(
                **block(name, decoder, few_rows, scale),
                cross_query=few_rows(*query(f"{cross}.self.query", scale)),
                # Multiplies the encoder's output: as many rows as the source has tokens.
                cross_key_value=many_rows(*stacked([pair(f"{cross}.self.key"), pair(f"{cross}.self.value")])),
                cross_output=few_rows(*pair(f"{cross}.output.dense")),
                cross_norm=norm(f"{cross}.output.LayerNorm", decoder),
            )

        head, own = "decoder.cls.predictions", "decoder.bert.embeddings"
        tied = f"{head}.decoder.weight" not in weights
        scores_from = f"{own}.word_embeddings.weight" if tied else f"{head}.decoder.weight"
        output_weight, output_bias = _filled_up(get(scores_from), get(f"{head}.bias"))
        return cls(
            encoder=encoder,
            decoder=decoder,
            device=device,
            dtype=dtype,
            attention_dtype=attention_dtype,
            encoder_embeddings=embeddings("encoder.embeddings", encoder),
            encoder_layers=tuple(
                EncoderLayer(**block(f"encoder.encoder.layer.{i}", encoder, many_rows))
                for i in range(encoder.num_hidden_layers)
            ),
            projection=many_rows(*pair("enc_to_dec_proj")) if "enc_to_dec_proj.weight" in weights else None,
            # Tied: a view of the same matrix, where it is kept as it is.
            decoder_embeddings=embeddings(own, decoder, output_weight[: decoder.vocab_size] if tied else None),
            decoder_layers=tuple(
                decoder_layer(f"decoder.bert.encoder.layer.{i}") for i in range(decoder.num_hidden_layers)
            ),
            lm_head=LMHead(
                transform=few_rows(*pair(f"{head}.transform.dense"), ACTIVATIONS[decoder.hidden_act]),
                norm=norm(f"{head}.transform.LayerNorm", decoder),
                decoder=few_rows(output_weight, output_bias),
            ),
        )

    def encode(self, ids: Tensor, lengths: ListLike[int]) -> list[Tensor]:
        """Source ids to cross-attention keys and values.

        Sources lie one behind the other, without padding: what acts on single tokens takes them all at once, and
        attention takes source by source, so a batch costs what its tokens cost, and none sees another.

        Args:
            ids: [P], the tokens of all sources.
            lengths: of each source; their sum is P.

        Returns:
            For each decoder layer [P, 2, H, D]: keys and values, in `attention_dtype`.
        """
        x = self.encoder_embeddings(ids, torch.cat([torch.arange(n, device=self.device) for n in lengths]))  # [P, E]
        heads = self.encoder.num_attention_heads
        for layer in self.encoder_layers:
            qkv = layer.qkv(x).to(self.attention_dtype).view(len(ids), 3, heads, -1).permute(1, 2, 0, 3)  # [3, H, P, D]
            attended = [
                F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
                for q, k, v in torch.split(qkv, list(lengths), 2)
            ]
            joined = torch.cat(attended, 1).transpose(0, 1).flatten(1).to(self.dtype)  # [P, E]
            x = layer.attention_norm(layer.attention_output(joined, x))
            x = layer.output_norm(layer.output(layer.intermediate(x), x))
        if self.projection is not None:
            x = self.projection(x)
        shape = (len(ids), 2, self.decoder.num_attention_heads, self.decoder.head_size)
        return [layer.cross_key_value(x).to(self.attention_dtype).view(shape) for layer in self.decoder_layers]

    def decode(self, ids: Tensor, positions: Tensor, cache: StepCache) -> Tensor:
        """One step for every running row: write its key and value, attend, and score the vocabulary.

        Args:
            ids: [S, K], the newest token of each row.
            positions: [S], where that token stands; a sequence's beams are in step, sequences need not be.
            cache: of this step, for these positions.

        Returns:
            logits [S, K, V], in the model's dtype.
        """
        size, beams = ids.shape
        x = self.decoder_embeddings(ids, positions[:, None].expand_as(ids)).flatten(0, 1)  # [S*K, E]
        for index, layer in enumerate(self.decoder_layers):
            queries, keys_values = torch.split_with_sizes(self._by_head(layer.qkv(x), size, 3), (1, 2))
            cache.append(index, keys_values)
            attended = attend(queries[0], cache.keys[index], cache.values[index], cache.mask)
            x = layer.attention_norm(layer.attention_output(self._by_row(attended, size), x))
            queries = self._by_head(layer.cross_query(x), size, 1)
            attended = attend(queries[0], cache.cross_keys[index], cache.cross_values[index], cache.cross_mask)
            x = layer.cross_norm(layer.cross_output(self._by_row(attended, size), x))
            x = layer.output_norm(layer.output(layer.intermediate(x), x))
        logits: Tensor = self.lm_head(x).view(size, beams, -1)
        return logits

    def _by_head(self, x: Tensor, size: int, parts: int) -> Tensor:
        """[S*K, parts*H*D] -> [parts, S*H, K, D]: the rows that attention takes together stand together."""
        config = self.decoder
        split = x.to(self.attention_dtype).view(size, -1, parts, config.num_attention_heads, config.head_size)
        return split.permute(2, 0, 3, 1, 4).reshape(parts, -1, x.shape[0] // size, config.head_size)

    def _by_row(self, x: Tensor, size: int) -> Tensor:
        """[S*H, K, D] -> [S*K, H*D]: back again."""
        by_row = x.view(size, -1, *x.shape[1:]).transpose(1, 2).to(self.dtype)
        return by_row.reshape(size * x.shape[1], -1)


def _filled_up(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [V, E] and biases [V] of an LM head, up to the next multiple of BLOCK: no token, a score of -inf."""
    missing = BLOCK - weight.shape[0] % BLOCK
    return F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing), value=-torch.inf)
