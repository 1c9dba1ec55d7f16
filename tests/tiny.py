"""Tiny random encoder-decoders for parity tests: real architecture, real files, a few thousand weights.

`generate` of transformers is the oracle. Does not know the engine's inside.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, GenerationConfig

from app.engine import GenerationParams

VOCAB, PAD, START, EOS = 60, 0, 1, 2


def tiny_model(seed: int, sharpness: float = 6.0, dtype: torch.dtype = torch.float32) -> EncoderDecoderModel:
    """A random BERT encoder-decoder whose outputs are not all alike: its LM head is scaled by `sharpness`."""
    torch.manual_seed(seed)
    size = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**size), BertConfig(**size, is_decoder=True, add_cross_attention=True)
    )
    config.decoder_start_token_id = START
    config.pad_token_id = PAD
    model = EncoderDecoderModel(config).eval()
    with torch.no_grad():
        # Random logits are flat or huge; a trained model's end token is neither rare nor everywhere.
        model.decoder.cls.predictions.transform.LayerNorm.weight.mul_(sharpness / 16)
        model.decoder.cls.predictions.bias[EOS] += 0.5
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START, bos_token_id=START, eos_token_id=EOS, pad_token_id=PAD, max_length=41
    )
    return model.to(dtype)


def save(model: EncoderDecoderModel, folder: Path) -> Path:
    """Write the model as the engine reads it."""
    model.save_pretrained(folder)
    return folder


def random_sources(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    """Sources of mixed length, special tokens included."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest - 1, (count,), generator=generator).tolist()
    return [[START, *torch.randint(3, VOCAB, (n,), generator=generator).tolist(), EOS] for n in lengths]


@torch.inference_mode()
def oracle(
    model: EncoderDecoderModel, source: Sequence[int], params: GenerationParams
) -> tuple[list[list[int]], list[float] | None]:
    """Token ids (start token off, cut after the first end token) and `sequences_scores` (None for greedy)."""
    config = GenerationConfig(
        decoder_start_token_id=model.generation_config.decoder_start_token_id,
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
        num_beams=params.num_beams,
        num_return_sequences=params.num_return_sequences,
        max_length=params.max_new_tokens + 1,
        min_length=params.min_new_tokens + 1 if params.min_new_tokens else 0,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        repetition_penalty=params.repetition_penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = torch.tensor([list(source)])
    # Options that a request leaves out would be filled in from the model's own settings: there must be none.
    model.generation_config, kept = config, model.generation_config
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unfeasible length constraints")
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        model.generation_config = kept
    eos = config.eos_token_id
    rows = []
    for row in out.sequences.tolist():
        row = row[1:]
        rows.append(row[: row.index(eos) + 1] if eos in row else row)
    return rows, out.sequences_scores.tolist() if params.num_beams > 1 else None


def random_params(rng: random.Random) -> GenerationParams:
    """Any combination of the options that the engine knows."""
    num_beams = rng.choice([1, 2, 3, 4, 4, 5, 8])
    return GenerationParams(
        num_beams=num_beams,
        num_return_sequences=rng.randint(1, num_beams),
        max_new_tokens=rng.choice([1, 2, 5, 20, 40]),
        min_new_tokens=rng.choice([0, 0, 1, 6, 12]),
        length_penalty=rng.choice([1.0, 0.0, 2.0, -2.0, 0.6]),
        early_stopping=rng.choice([True, False, "never"]),
        no_repeat_ngram_size=rng.choice([0, 0, 1, 2, 3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
    )
