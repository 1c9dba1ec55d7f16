"""An encoder and a decoder, joined: sources to cross-attention's keys and values, then step by step to logits.

Knows which network reads which `model_type`. Equal to transformers' EncoderDecoderModel in evaluation mode.
Shapes: `decoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from app.engine.linear import Linear, rows_dtype
from app.engine.models.bert import BERT_FAMILY, BertConfig
from app.engine.models.bert_decoder import DECODER_NAMES, BertDecoder
from app.engine.models.bert_encoder import BertEncoder
from app.engine.models.decoder import Decoder
from app.engine.models.foreign_encoder import FOREIGN_ENCODERS, ForeignEncoder
from app.engine.models.gpt2_decoder import Gpt2Config, Gpt2Decoder
from app.engine.models.weights import Weights
from app.engine.step_cache import StepCache

ENCODERS = (*BERT_FAMILY, *FOREIGN_ENCODERS)
DECODERS = (*DECODER_NAMES, "gpt2")
Made = TypeVar("Made")


class Encoder(Protocol):
    """Any network that reads sources one behind the other, without padding."""

    @property
    def max_tokens(self) -> int: ...  # noqa: D102
    def __call__(self, ids: Tensor, lengths: ListLike[int]) -> Tensor:
        """Ids [P] of all sources, and the length of each -> [P or more, E]; what lies behind P means nothing."""
        ...


@dataclass(frozen=True)
class EncoderDecoder:
    """The two networks. `encode` makes cross-attention keys and values; `decode` makes one step's logits."""

    device: torch.device
    dtype: torch.dtype  # of activations and, where they are not packed otherwise, of weights
    attention_dtype: torch.dtype  # of cached keys and values, and of what attends by torch's operations
    encoder: Encoder
    projection: Linear | None  # where the two have different widths
    decoder: Decoder

    @classmethod
    def from_weights(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        int8: bool = False,
    ) -> EncoderDecoder:
        """Build from a config.json and a state dict of EncoderDecoderModel.

        Args:
            dtype: of weights and caches; of activations, too, but where `rows_dtype` says otherwise: embeddings and a
                module of transformers are in fp32 then.
            int8: multiply in 8 bits (CPU only). All else is as in fp32 then, but caches are in `dtype`.

        Raises:
            ValueError: a section of the config cannot be served.
            KeyError: a weight is missing.
        """
        attention_dtype = dtype
        read = Weights(weights, device, rows_dtype(device, dtype, int8), packed=dtype, int8=int8)
        make_encoder = _section(config, "encoder", _encoder)
        make_decoder = _section(config, "decoder", _decoder)
        projected = "enc_to_dec_proj.weight" in read
        return cls(
            device=device,
            dtype=read.dtype,
            attention_dtype=attention_dtype,
            encoder=make_encoder(read, attention_dtype),
            projection=read.many_rows(*read.pair("enc_to_dec_proj")) if projected else None,
            decoder=make_decoder(read, attention_dtype),
        )

    def encode(self, ids: Tensor, lengths: ListLike[int]) -> Iterator[Tensor]:
        """Source ids to cross-attention keys and values.

        Args:
            ids: [P], the tokens of all sources, one behind the other, without padding.
            lengths: of each source; their sum is P.

        Returns:
            For each decoder layer, in turn, [P, 2, H, D]: keys and values, in `attention_dtype`. A layer's are computed
            when they are asked for: those of all layers at once are many times the encoder's output.
        """
        x = self.encoder(ids, lengths)
        cross = self.decoder.cross(x if self.projection is None else self.projection(x))
        return (layer[: len(ids)] for layer in cross)

    def decode(self, ids: Tensor, positions: Tensor, cache: StepCache) -> Tensor:
        """One step of every running row: see `Decoder.decode`."""
        return self.decoder.decode(ids, positions, cache)


def _section(config: Mapping[str, Any], side: str, read: Callable[[Mapping[str, Any]], Made]) -> Made:
    """What `read` makes of one side of the config; its errors say which side it was."""
    try:
        return read(config[side])
    except KeyError as error:
        raise ValueError(f"{side} in config.json cannot be served: it lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{side} in config.json cannot be served: {error}") from error


def _encoder(config: Mapping[str, Any]) -> Callable[[Weights, torch.dtype], Encoder]:
    kind = config.get("model_type")
    if kind not in ENCODERS:
        raise ValueError(f"model_type is {kind!r}; known: {', '.join(ENCODERS)}")
    if kind in FOREIGN_ENCODERS:
        return lambda weights, _: ForeignEncoder.from_weights(config, weights)
    bert = BertConfig.from_dict(config)
    return lambda weights, attention_dtype: BertEncoder.from_weights(bert, weights, attention_dtype)


def _decoder(config: Mapping[str, Any]) -> Callable[[Weights, torch.dtype], Decoder]:
    kind = config.get("model_type")
    if kind not in DECODERS:
        raise ValueError(f"model_type is {kind!r}; known: {', '.join(DECODERS)}")
    if kind == "gpt2":
        gpt2 = Gpt2Config.from_dict(config)
        return lambda weights, attention_dtype: Gpt2Decoder.from_weights(gpt2, weights, attention_dtype)
    bert = BertConfig.from_dict(config)
    return lambda weights, attention_dtype: BertDecoder.from_weights(bert, weights, attention_dtype)
