"""What the encoder and the decoder of BERT's family have in common: configuration, names of weights, a layer.

The family: BERT, RoBERTa (and XLM-R, CamemBERT), ELECTRA, and DistilBERT as an encoder. They differ in names, in where
positions begin and in the size of embeddings, not in what a layer computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from app.engine.linear import ACTIVATIONS, Linear, MakeLinear, Scale, stacked
from app.engine.models.layers import Embeddings, LayerNorm
from app.engine.models.limits import ROBERTA_FAMILY, max_tokens
from app.engine.models.weights import Weights

BERT_FAMILY = ("bert", *ROBERTA_FAMILY, "electra", "distilbert")
# DistilBERT's words for what the others call so; its norms have no setting.
_DISTILBERT_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_act": "activation",
}


@dataclass(frozen=True)
class LayerNames:
    """What a layer's weights are called, below the layer's own name."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    intermediate: str = "intermediate.dense"
    output: str = "output.dense"
    output_norm: str = "output.LayerNorm"


DISTILBERT_NAMES = LayerNames(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    intermediate="ffn.lin1",
    output="ffn.lin2",
    output_norm="output_layer_norm",
)


@dataclass(frozen=True)
class BertConfig:
    """The part of a config.json that changes what is computed.

    Attributes:
        padding_id: where positions begin behind it (RoBERTa); None where they begin at 0.
        max_tokens: that its positions hold.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    padding_id: int | None
    max_tokens: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BertConfig:
        """Read it from the `encoder` or `decoder` section of a config.json.

        Raises:
            ValueError: another architecture, activation or kind of position embedding.
            KeyError: a size is missing.
        """
        family = config.get("model_type")
        if family not in BERT_FAMILY:
            raise ValueError(f"model_type is {family!r}; known: {', '.join(BERT_FAMILY)}")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"position_embedding_type is {config['position_embedding_type']!r}, not 'absolute'")
        keys = _DISTILBERT_KEYS if family == "distilbert" else {}
        activation = config.get(keys.get("hidden_act", "hidden_act"), "gelu")
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {activation!r}; known: {', '.join(ACTIVATIONS)}")
        return cls(
            model_type=family,
            vocab_size=config["vocab_size"],
            hidden_size=config[keys.get("hidden_size", "hidden_size")],
            num_hidden_layers=config[keys.get("num_hidden_layers", "num_hidden_layers")],
            num_attention_heads=config[keys.get("num_attention_heads", "num_attention_heads")],
            hidden_act=activation,
            layer_norm_eps=config.get("layer_norm_eps", 1e-12),
            padding_id=config["pad_token_id"] if family in ROBERTA_FAMILY else None,
            max_tokens=max_tokens(config),
        )

    @property
    def head_size(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_scale(self) -> Scale:
        """Attention scores are divided by the root of D: with the queries' products once, not in every attention."""
        return Scale(self.hidden_size, self.head_size**-0.5)


@dataclass(frozen=True)
class EncoderLayer:
    """Self-attention and feed-forward, each with its residual norm."""

    qkv: Linear
    attention_output: Linear
    attention_norm: LayerNorm
    intermediate: Linear  # with the activation
    output: Linear
    output_norm: LayerNorm


def layer_parts(weights: Weights, name: str, config: BertConfig, linear: MakeLinear) -> dict[str, Any]:
    """The fields of an `EncoderLayer` from the weights below `name`."""
    names = DISTILBERT_NAMES if config.model_type == "distilbert" else LayerNames()
    qkv = [weights.pair(f"{name}.{x}") for x in (names.query, names.key, names.value)]
    activation = ACTIVATIONS[config.hidden_act]
    return {
        "qkv": linear(*stacked(qkv), scale=config.query_scale),
        "attention_output": linear(*weights.pair(f"{name}.{names.attention_output}")),
        "attention_norm": weights.norm(f"{name}.{names.attention_norm}", config.layer_norm_eps),
        "intermediate": linear(*weights.pair(f"{name}.{names.intermediate}"), activation),
        "output": linear(*weights.pair(f"{name}.{names.output}")),
        "output_norm": weights.norm(f"{name}.{names.output_norm}", config.layer_norm_eps),
    }


def read_embeddings(
    weights: Weights, name: str, config: BertConfig, linear: MakeLinear, word: Tensor | None = None
) -> Embeddings:
    """From the weights below `name`, a stack's own name.

    Args:
        word: the word embeddings, where they are held already.
    """
    own = f"{name}.embeddings"
    position = weights.get(f"{own}.position_embeddings.weight")
    if f"{own}.token_type_embeddings.weight" in weights:
        position = position + weights.get(f"{own}.token_type_embeddings.weight")[0]
    projected = f"{name}.embeddings_project.weight" in weights
    return Embeddings(
        word=weights.get(f"{own}.word_embeddings.weight") if word is None else word,
        position=position if config.padding_id is None else position[config.padding_id :],
        norm=weights.norm(f"{own}.LayerNorm", config.layer_norm_eps),
        padding_id=config.padding_id,
        projection=linear(*weights.pair(f"{name}.embeddings_project")) if projected else None,
    )
