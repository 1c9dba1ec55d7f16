"""What a decode step cannot do without: the bytes that it must read, and its multiplications.

The floor of a step: decoder weights with the LM head, cross keys and values of every sequence, self-attention keys and
values at their mean length, each read once. int8: weights 1 byte, keys and values in attention's dtype. Its
multiplications: those of its matrix products and of its attention. Knows neither who takes the step nor how fast a
machine is: benchmarks/hardware.py measures that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from app.engine.kernels import has_bfloat16
from benchmarks.contenders import BEAMS, Size

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
KV_BYTES = {**WEIGHT_BYTES, "int8": 2 if has_bfloat16() else 4}


@dataclass(frozen=True)
class Floor:
    """What a step cannot go below on one machine.

    Attributes:
        read_bytes: what it must read.
        read_ms: milliseconds of reading it, at the machine's bandwidth.
        arithmetic_ms: milliseconds of its multiplications, at the machine's rate.
    """

    read_bytes: int
    read_ms: float
    arithmetic_ms: float


def step_bytes(weights: int, dtype: str, saved: str, count: int, size: Size) -> int:
    """Bytes that a step of `count` sequences must read, at the mean length of the steps that are timed.

    Weights `saved` in fewer bits than they are computed in can be read in these.
    """
    position = size.layers * 2 * size.hidden * KV_BYTES[dtype]
    mean_length = (size.new_tokens + 2) / 2  # steps 2 to N attend to 2 to N positions
    cached = count * (size.source_tokens + BEAMS * mean_length) * position
    return round(weights * min(WEIGHT_BYTES[dtype], WEIGHT_BYTES[saved]) + cached)


def step_multiplications(weights: int, count: int, size: Size) -> int:
    """Of a step: each weight with each row, and each row with the keys and values that it must see."""
    positions = size.source_tokens + (size.new_tokens + 2) // 2
    return count * BEAMS * (weights + 2 * size.layers * size.hidden * positions)


def decoder_weights(folder: Path) -> int:
    """Weights that a decode step reads: the decoder with its LM head, without the cross keys' and values' projections.

    Embeddings are looked up by row, so they count only where they are the LM head's matrix, too.
    """
    sizes = _sizes(folder, "decoder.")
    count = sum(math.prod(shape) for name, shape in sizes.items() if not (_is_embedding(name) or _of_the_source(name)))
    tied = not any(name.endswith(HEADS) for name in sizes)
    return count + sum(math.prod(shape) for name, shape in sizes.items() if tied and name.endswith(WORDS))


def source_weights(folder: Path) -> int:
    """Weights that each token of a source is multiplied by: the encoder's, and those of cross keys and values."""
    encoder = {
        name: shape
        for name, shape in _sizes(folder, "encoder.").items()
        if not _is_embedding(name) and ".pooler." not in name
    }
    crossing = {name: shape for name, shape in _sizes(folder, "decoder.").items() if _of_the_source(name)}
    parts = (encoder, crossing, _sizes(folder, "enc_to_dec_proj."))
    return sum(math.prod(shape) for part in parts for shape in part.values())


def saved_dtype(folder: Path) -> str:
    """What torch calls the dtype of a checkpoint's first weight."""
    with safe_open(next(iter(sorted(folder.glob("*.safetensors")))), "pt") as tensors:
        weight = tensors.get_tensor(next(iter(tensors.keys())))
    return str(weight.dtype).removeprefix("torch.")


# By the ends of their names in BERT, RoBERTa, ELECTRA and GPT-2: LM heads that are not tied, and word embeddings.
HEADS = (
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "generator_lm_head.weight",
    "decoder.lm_head.weight",
)
WORDS = ("embeddings.word_embeddings.weight", "wte.weight")


def _is_embedding(name: str) -> bool:
    return any(part in name for part in (".embeddings.", ".wte.", ".wpe."))


def _of_the_source(name: str) -> bool:
    parts = (".crossattention.self.key.", ".crossattention.self.value.", ".crossattention.c_attn.")
    return any(part in name for part in parts)


def _sizes(folder: Path, start: str) -> dict[str, list[int]]:
    """The shapes of a checkpoint's tensors whose names start so."""
    sizes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(start)]  # noqa: SIM118 (no mapping)
            sizes |= {name: tensors.get_slice(name).get_shape() for name in names}
    return sizes
