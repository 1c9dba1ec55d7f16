"""A folder in the Hugging Face layout becomes a model on the device. safetensors only: no pickle, no remote code.

Knows file names and config keys. Does not know where the folder came from (that is the registry's business).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from app.engine.allocator import map_large_tensors, share_one_heap
from app.engine.config import GenerationParams
from app.engine.kernels import has_bfloat16
from app.engine.models.encoder_decoder import EncoderDecoder

# Where the decoder's tokenizer lies in a folder whose encoder and decoder have one each.
DECODER_TOKENIZER = "decoder_tokenizer"


class CheckpointError(ValueError):
    """The folder cannot be served; the message says which file or key and why."""


@dataclass(frozen=True)
class ModelInfo:
    """What callers must know of a checkpoint: its vocabulary, its limits in tokens and its special tokens.

    Attributes:
        vocab_size: the decoder's.
        one_vocabulary: whether a source's ids mean to the decoder what they mean to the encoder.
    """

    vocab_size: int
    one_vocabulary: bool
    max_source_tokens: int
    max_target_tokens: int
    start_token_id: int
    eos_token_id: int
    pad_token_id: int
    num_parameters: int


@dataclass(frozen=True)
class Checkpoint:
    """A model on its device, with its facts and its own decode settings (`generation_config.json`)."""

    model: EncoderDecoder
    info: ModelInfo
    generation_config: dict[str, Any]


def load_checkpoint(folder: Path, device: str, dtype: str) -> Checkpoint:
    """Read config, decode settings and every `*.safetensors` of `folder`.

    Args:
        device: as EngineConfig has it.
        dtype: as EngineConfig has it.

    Raises:
        CheckpointError: a file is missing or damaged, int8 is asked for on another device than a CPU, or the
            architecture is not an encoder-decoder of networks that the engine runs.
    """
    if dtype == "int8" and device != "cpu":
        raise CheckpointError(f"int8 runs on a CPU; the device is {device}")
    if device == "cpu":
        map_large_tensors()
        share_one_heap()
    config = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    if config.get("model_type") not in ("encoder-decoder", "encoder_decoder"):
        raise CheckpointError(f"{folder}: model_type is {config.get('model_type')!r}, not 'encoder-decoder'")
    try:
        GenerationParams.from_generation_config(generation)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'generation_config.json'}: {error}") from error
    weights = _read_weights(folder)
    try:
        model = EncoderDecoder.from_weights(config, weights, torch.device(device), *_number_formats(dtype))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{folder}: the weights lack {error}") from error

    def token(name: str, *fallbacks: str) -> int:
        for key in (name, *fallbacks):
            for settings in (generation, config):  # where it is null, it is not there
                value = settings.get(key)
                if isinstance(value, list) and len(value) == 1:
                    value = value[0]
                if isinstance(value, int):
                    return value
                if value is not None:
                    raise CheckpointError(f"{folder}: {key} is {value!r}; the engine takes one token")
        raise CheckpointError(f"{folder}: {name} stands neither in generation_config.json nor in config.json")

    info = ModelInfo(
        vocab_size=model.decoder.sizes.vocab_size,
        one_vocabulary=not (folder / DECODER_TOKENIZER).exists()
        and config["encoder"]["vocab_size"] == config["decoder"]["vocab_size"],
        max_source_tokens=model.encoder.max_tokens,
        max_target_tokens=model.decoder.sizes.max_tokens - 1,
        start_token_id=token("decoder_start_token_id", "bos_token_id"),
        eos_token_id=token("eos_token_id"),
        pad_token_id=token("pad_token_id", "eos_token_id"),
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
    )
    return Checkpoint(model, info, generation)


def _number_formats(dtype: str) -> tuple[torch.dtype, bool]:
    """What caches (and, without int8, weights) are in; and whether products are in 8 bits."""
    if dtype != "int8":
        return getattr(torch, dtype), False
    return torch.bfloat16 if has_bfloat16() else torch.float32, True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors file (pickled weights are not read)")
    for file in files:
        try:
            weights.update(load_file(file))
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    return weights
