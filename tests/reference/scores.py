"""What a model says of the next token, processors and warpers applied: transformers' modules, in full, without a cache.

The logits may be another's: those that an engine had in its own run. Does not know who chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import EncoderDecoderModel

from app.engine import GenerationParams
from tests.tiny import generation_config

# Tokens so far, start token first -> the score of each token of the vocabulary.
NextScores = Callable[[tuple[int, ...]], list[float]]
# Tokens so far, start token first -> [V or more], before log-softmax and processors; what is behind V is no token.
NextLogits = Callable[[tuple[int, ...]], Tensor]


def next_logits(model: EncoderDecoderModel, source: Sequence[int]) -> NextLogits:
    """Raw logits in the model's own precision (`generate` rounds them to fp32)."""
    ids = torch.tensor([list(source)])
    with torch.inference_mode():
        encoded = model.encoder(input_ids=ids, attention_mask=torch.ones_like(ids))

    @torch.inference_mode()
    def logits(tokens: tuple[int, ...]) -> Tensor:
        out = model(
            encoder_outputs=encoded, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([tokens])
        )
        row: Tensor = out.logits[0, -1]
        return row

    return logits


def _log_softmax(row: Tensor) -> Tensor:
    return row.log_softmax(-1)


def processed(
    logits: NextLogits,
    model: EncoderDecoderModel,
    source: Sequence[int],
    params: GenerationParams,
    log_softmax: Callable[[Tensor], Tensor] = _log_softmax,
) -> NextScores:
    """Processed log-probabilities for beams, processed logits without: what `generate` hands to its search.

    In the precision of `logits`. `model` gives its special tokens and the size of its vocabulary, and computes nothing.
    `log_softmax`: of [1, V or more], in place of torch's.
    """
    config = generation_config(model, params)
    model._prepare_special_tokens(config, True, device=torch.device("cpu"))
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=1,
        encoder_input_ids=torch.tensor([list(source)]),
        device="cpu",
        model_kwargs={},
    )
    vocab = model.config.decoder.vocab_size
    known: dict[tuple[int, ...], list[float]] = {}

    @torch.inference_mode()
    def scores(tokens: tuple[int, ...]) -> list[float]:
        if tokens not in known:
            row = logits(tokens)[None]
            row = (log_softmax(row) if params.num_beams > 1 else row)[:, :vocab]
            known[tokens] = processors(torch.tensor([tokens]), row)[0].tolist()
        return known[tokens]

    return scores


def next_scores(model: EncoderDecoderModel, source: Sequence[int], params: GenerationParams) -> NextScores:
    """The same of the model's own logits, in its own precision."""
    return processed(next_logits(model, source), model, source, params)
