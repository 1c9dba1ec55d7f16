"""BERT's family with cross-attention as decoder (Rothe et al. 2020, arXiv:1907.12461): BERT, RoBERTa, ELECTRA.

Equal to transformers' modules in evaluation mode. Shapes: `decoder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from app.engine.linear import ACTIVATIONS, Linear, stacked
from app.engine.models.bert import BertConfig, EncoderLayer, layer_parts, read_embeddings
from app.engine.models.decoder import Decoder
from app.engine.models.layers import Embeddings, LayerNorm, LMHead, filled_up
from app.engine.models.weights import Weights
from app.engine.step_cache import StepCache


class Names(NamedTuple):
    """What a family calls its stack and the parts of its LM head, below `decoder.`."""

    stack: str
    transform: str
    norm: str
    scores: str
    bias: str


_ROBERTA = Names("roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder.weight", "lm_head.bias")
_BERT_HEAD = "cls.predictions"
DECODER_NAMES = {
    "bert": Names(
        "bert",
        f"{_BERT_HEAD}.transform.dense",
        f"{_BERT_HEAD}.transform.LayerNorm",
        f"{_BERT_HEAD}.decoder.weight",
        f"{_BERT_HEAD}.bias",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Names(
        "electra",
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head.weight",
        "generator_lm_head.bias",
    ),
}


@dataclass(frozen=True)
class DecoderLayer(EncoderLayer):
    """The same, with cross-attention between the two."""

    cross_query: Linear
    cross_key_value: Linear
    cross_output: Linear
    cross_norm: LayerNorm


@dataclass(frozen=True)
class BertDecoder(Decoder):
    """A stack of layers between embeddings and an LM head."""

    config: BertConfig
    embeddings: Embeddings
    layers: tuple[DecoderLayer, ...]
    lm_head: LMHead

    @classmethod
    def from_weights(cls, config: BertConfig, weights: Weights, attention_dtype: torch.dtype) -> BertDecoder:
        """Read what stands under `decoder.`; raises KeyError if a weight is missing."""
        names = DECODER_NAMES[config.model_type]
        stack = f"decoder.{names.stack}"
        few_rows, eps = weights.few_rows, config.layer_norm_eps

        def layer(name: str) -> DecoderLayer:
            cross = f"{name}.crossattention"
            return DecoderLayer(
                **layer_parts(weights, name, config, few_rows),
                cross_query=few_rows(*weights.pair(f"{cross}.self.query"), scale=config.query_scale),
                # Multiplies the encoder's output: as many rows as the source has tokens.
                cross_key_value=weights.many_rows(
                    *stacked([weights.pair(f"{cross}.self.{x}") for x in ("key", "value")])
                ),
                cross_output=few_rows(*weights.pair(f"{cross}.output.dense")),
                cross_norm=weights.norm(f"{cross}.output.LayerNorm", eps),
            )

        tied = f"decoder.{names.scores}" not in weights
        scores_from = f"{stack}.embeddings.word_embeddings.weight" if tied else f"decoder.{names.scores}"
        output_weight, output_bias = filled_up(weights.get(scores_from), weights.get(f"decoder.{names.bias}"))
        # RoBERTa's and ELECTRA's heads have an activation of their own.
        activation = ACTIVATIONS[config.hidden_act if config.model_type == "bert" else "gelu"]
        return cls(
            dtype=weights.dtype,
            attention_dtype=attention_dtype,
            config=config,
            # Tied: a view of the same matrix, where it is kept as it is.
            embeddings=read_embeddings(
                weights, stack, config, few_rows, output_weight[: config.vocab_size] if tied else None
            ),
            layers=tuple(layer(f"{stack}.encoder.layer.{i}") for i in range(config.num_hidden_layers)),
            lm_head=LMHead(
                transform=few_rows(*weights.pair(f"decoder.{names.transform}"), activation),
                norm=weights.norm(f"decoder.{names.norm}", eps),
                decoder=few_rows(output_weight, output_bias),
            ),
        )

    @property
    def sizes(self) -> BertConfig:
        """See `Decoder`."""
        return self.config

    @property
    def cross_key_values(self) -> list[Linear]:
        """See `Decoder`."""
        return [layer.cross_key_value for layer in self.layers]

    def decode(self, ids: Tensor, positions: Tensor, cache: StepCache) -> Tensor:
        """See `Decoder`."""
        size, beams = ids.shape
        x = self.embeddings(ids, positions[:, None].expand_as(ids)).flatten(0, 1)  # [S*K, E]
        for index, layer in enumerate(self.layers):
            attended = cache.self_attention(index, layer.qkv(x))
            x = layer.attention_norm.of_sum(layer.attention_output, attended, x)
            attended = cache.cross_attention(index, layer.cross_query(x))
            x = layer.cross_norm.of_sum(layer.cross_output, attended, x)
            x = layer.output_norm.of_sum(layer.output, layer.intermediate(x), x)
        logits: Tensor = self.lm_head(x).view(size, beams, -1)
        return logits
