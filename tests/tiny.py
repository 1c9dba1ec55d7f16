"""Tiny random encoder-decoders for parity tests: real architecture, real files, a few thousand weights.

`generate` of transformers is the oracle, called one text at a time. Does not know the engine's inside.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import (
    AutoConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from app.engine import GenerationParams

VOCAB, PAD, START, EOS = 60, 0, 1, 2
LONGEST_OUTPUT = 40
# `generate` fills places that no hypothesis took, and beams that do not exist yet, with -1e9: no sum of real
# log-probabilities comes near.
NOT_REAL = -1.0e8
Drawn = TypeVar("Drawn")


# What the engine has networks of its own for.
DECODERS = ("bert", "roberta", "electra", "gpt2")
ENCODERS = ("bert", "roberta", "electra", "distilbert")


@dataclass(frozen=True)
class TinyShape:
    """Kinds and sizes of a tiny model; another `encoder_hidden` than `hidden` makes it project the encoder's output.

    `positions` is of both, RoBERTa's without those before a text's first token. `float16_weights`: rounded as if they
    had been saved in fp16, for which a CPU may have other products.
    """

    vocab: int = VOCAB
    hidden: int = 16
    layers: int = 2
    heads: int = 2
    encoder_hidden: int = 16
    encoder_layers: int = 2
    encoder_heads: int = 2
    positions: int = 64
    activation: str = "gelu"
    eos_bias: float = 0.5
    decoder: str = "bert"
    encoder: str = "bert"
    float16_weights: bool = False


def tiny_config(kind: str, shape: TinyShape, hidden: int, layers: int, heads: int, **more: object) -> Any:
    """A configuration of one stack, in the words of its kind."""
    common = {"vocab_size": shape.vocab, "pad_token_id": PAD, "initializer_range": 0.4, **more}
    if kind == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": shape.positions}
        return AutoConfig.for_model(kind, **sizes, n_inner=2 * hidden, activation_function=shape.activation, **common)
    if kind == "distilbert":
        sizes = {"dim": hidden, "n_layers": layers, "n_heads": heads, "hidden_dim": 2 * hidden}
        activation = "relu" if shape.activation == "relu" else "gelu"  # it has no other
        positions = {"max_position_embeddings": shape.positions}
        return AutoConfig.for_model(kind, **sizes, **positions, activation=activation, **common)
    return AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=shape.positions + (PAD + 1 if kind == "roberta" else 0),
        hidden_act=shape.activation,
        **({"embedding_size": 12} if kind == "electra" else {}),
        **common,
    )


def tiny_model(
    seed: int, sharpness: float = 6.0, dtype: torch.dtype = torch.float32, shape: TinyShape | None = None
) -> EncoderDecoderModel:
    """A random encoder-decoder whose outputs are not all alike: its LM head is scaled by `sharpness`."""
    shape = shape or TinyShape()
    torch.manual_seed(seed)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        tiny_config(shape.encoder, shape, shape.encoder_hidden, shape.encoder_layers, shape.encoder_heads),
        tiny_config(
            shape.decoder, shape, shape.hidden, shape.layers, shape.heads, is_decoder=True, add_cross_attention=True
        ),
    )
    config.decoder_start_token_id = START
    config.pad_token_id = PAD
    model = EncoderDecoderModel(config).eval()
    with torch.no_grad():
        # Random logits are flat or huge; a trained model's end token is neither rare nor everywhere.
        norm, bias = head_of(model.decoder)
        norm.weight.mul_(sharpness / 16)
        if bias is None:  # GPT-2: as far as its last norm can say it
            end = model.decoder.get_input_embeddings().weight[EOS]
            norm.bias.copy_(shape.eos_bias * end / end.square().sum())
        else:
            bias[EOS] += shape.eos_bias
        if shape.float16_weights:
            for weight in model.parameters():
                weight.copy_(weight.half())
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        bos_token_id=START,
        eos_token_id=EOS,
        pad_token_id=PAD,
        max_length=LONGEST_OUTPUT + 1,
    )
    return model.to(dtype)


def head_of(decoder: Any) -> tuple[Any, Any]:
    """The last norm before the scores, and their bias; None where there is none."""
    kind = decoder.config.model_type
    if kind == "gpt2":
        return decoder.transformer.ln_f, None
    if kind == "electra":
        return decoder.generator_predictions.LayerNorm, decoder.generator_lm_head.bias
    if kind == "roberta":
        return decoder.lm_head.layer_norm, decoder.lm_head.bias
    return decoder.cls.predictions.transform.LayerNorm, decoder.cls.predictions.bias


def save(model: EncoderDecoderModel, folder: Path) -> Path:
    """Write the model as the engine reads it."""
    model.save_pretrained(folder)
    return folder


def random_shape(rng: random.Random, decoder: str = "bert", encoder: str = "bert") -> TinyShape:
    """Any tiny model; the vocabulary is never smaller than what the widest beam search takes from one beam."""
    hidden, encoder_hidden = rng.choice([8, 16, 24, 32]), rng.choice([8, 16, 32])
    return TinyShape(
        vocab=rng.choice([37, 60, 101, 256]),
        hidden=hidden,
        layers=rng.choice([1, 2, 3]),
        heads=rng.choice([1, 2, 4]),
        encoder_hidden=rng.choice([hidden, encoder_hidden]),
        encoder_layers=rng.choice([1, 2]),
        encoder_heads=rng.choice([1, 2, 4]),
        positions=rng.choice([48, 64, 100]),
        activation=rng.choice(["gelu", "gelu_new", "relu"]),
        eos_bias=rng.choice([-1.0, 0.5, 0.5, 2.0]),
        decoder=decoder,
        encoder=encoder,
    )


def random_sources(count: int, seed: int, longest: int = 60, vocab: int = VOCAB) -> list[list[int]]:
    """Sources of mixed length, special tokens included."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest - 1, (count,), generator=generator).tolist()
    return [[START, *torch.randint(3, vocab, (n,), generator=generator).tolist(), EOS] for n in lengths]


def generation_config(model: EncoderDecoderModel, params: GenerationParams) -> GenerationConfig:
    """The request as transformers spells it; the model's own settings give the special tokens and nothing else."""
    own = model.generation_config
    sampling = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
    return GenerationConfig(
        decoder_start_token_id=own.decoder_start_token_id,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        num_beams=params.num_beams,
        num_return_sequences=params.num_return_sequences,
        max_length=params.max_new_tokens + 1,
        min_length=params.min_new_tokens + 1 if params.min_new_tokens else 0,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        encoder_no_repeat_ngram_size=params.encoder_no_repeat_ngram_size,
        repetition_penalty=params.repetition_penalty,
        bad_words_ids=[list(word) for word in params.bad_words_ids] or None,
        suppress_tokens=list(params.suppress_tokens) or None,
        begin_suppress_tokens=list(params.begin_suppress_tokens) or None,
        forced_bos_token_id=params.forced_bos_token_id,
        forced_eos_token_id=params.forced_eos_token_id,
        do_sample=params.do_sample,
        **(sampling if params.do_sample else {}),
        return_dict_in_generate=True,
        output_scores=True,
    )


class Outcome(NamedTuple):
    """What a search gave, best hypothesis first: only real ones, see `is_real`. None at all is an outcome too."""

    tokens: list[list[int]]  # start token off, end token included
    scores: list[float]
    token_logprobs: list[list[float]]


def is_real(score: float, length: int, length_penalty: float) -> bool:
    """Whether a score is made of log-probabilities: not of -1e9 (`NOT_REAL`), of banned tokens, or of nothing at all.

    Where options leave fewer continuations than beams (a forced first token leaves one), `generate` fills up with
    beams at -1e9, whose order among themselves is topk's accident; and where they leave none (every token suppressed)
    it returns places that no hypothesis took, or for greedy decoding token 0 with a score that is not a
    number. No caller can use those, so an outcome is what is left without them: an engine may report a failure or
    such scores, but must have the same real hypotheses.
    """
    return math.isfinite(score) and score > NOT_REAL and score * length**length_penalty > NOT_REAL


def only_real(rows: Sequence[tuple[list[int], float, list[float]]], length_penalty: float) -> Outcome:
    """Keep the real rows of (tokens, score, token log-probabilities)."""
    kept = [row for row in rows if row[0] and is_real(row[1], len(row[0]), length_penalty)]
    return Outcome([row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept])


class KeptScores(LogitsProcessor):
    """Changes nothing; keeps what `generate` hands to its search, by the tokens before it, start token first."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], list[float]] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for tokens, row in zip(input_ids.tolist(), scores.tolist(), strict=True):
            self.rows.setdefault(tuple(tokens), row)
        return scores


@torch.inference_mode()
def oracle(
    model: EncoderDecoderModel, source: Sequence[int], params: GenerationParams, kept_scores: KeptScores | None = None
) -> Outcome:
    """What `generate` gives for one text: `sequences_scores` for beams, the mean token log-probability for greedy.

    A token's log-probability is what beam search added for it (after processors, not renormalised), and the
    log-softmax of the processed logits in greedy decoding.
    """
    config = generation_config(model, params)
    ids = torch.tensor([list(source)])
    # Options that a request leaves out would be filled in from the model's own settings: there must be none.
    model.generation_config, kept = config, model.generation_config
    last = LogitsProcessorList([kept_scores] if kept_scores is not None else [])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unfeasible length constraints")
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=last)
    finally:
        model.generation_config = kept
    rows = []
    sequences = out.sequences[:, 1:].tolist()
    if params.num_beams > 1:
        for row, score, beams in zip(sequences, out.sequences_scores.tolist(), out.beam_indices.tolist(), strict=True):
            # Short outputs are filled up, with the end token where the pad id is 0: beam indices say where they end.
            tokens = [token for token, beam in zip(row, beams, strict=True) if beam >= 0]
            logprobs = [out.scores[t][beams[t], token].item() for t, token in enumerate(tokens)]
            rows.append((tokens, score, logprobs))
        return only_real(rows, params.length_penalty)
    for index, row in enumerate(sequences):
        tokens = row[: row.index(config.eos_token_id) + 1] if config.eos_token_id in row else row
        logprobs = [out.scores[t][index].log_softmax(-1)[token].item() for t, token in enumerate(tokens)]
        rows.append((tokens, sum(logprobs) / len(logprobs), logprobs))
    return only_real(rows, 0.0)


def random_params(rng: random.Random, vocab: int = VOCAB) -> GenerationParams:
    """Any combination of the options whose result does not depend on chance, groups left out.

    Options may contradict each other, as a caller's may; `is_real` says what is compared then.
    """

    def sometimes(draw: Callable[[], Drawn], otherwise: Drawn) -> Drawn:
        return draw() if rng.random() < 0.2 else otherwise

    def any_tokens() -> tuple[int, ...]:
        return tuple(rng.sample(range(vocab), rng.choice([1, 3, 8])))

    def word() -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(rng.choice([1, 2, 2, 2, 3, 4])))

    def words() -> tuple[tuple[int, ...], ...]:
        # transformers leaves a bad word out that is the end token alone, and refuses a list of nothing else.
        ends = ((EOS,),) if rng.random() < 0.2 else ()
        return (rng.randrange(3, vocab), *word()), *ends, *(word() for _ in range(rng.choice([0, 4, 16, 48])))

    num_beams = rng.choice([1, 1, 2, 3, 4, 4, 5, 8])
    first = sometimes(lambda: rng.randrange(vocab), None)
    last = sometimes(lambda: rng.choice([EOS, EOS, rng.randrange(vocab)]), None)
    # transformers refuses one contradiction when it reads the options: a token that is both forced and suppressed.
    suppressed: tuple[int, ...] = sometimes(any_tokens, ())
    suppressed = tuple(token for token in suppressed if token not in (first, last))
    return GenerationParams(
        num_beams=num_beams,
        num_return_sequences=rng.randint(1, num_beams),
        max_new_tokens=rng.choice([1, 2, 5, 20, LONGEST_OUTPUT]),
        min_new_tokens=rng.choice([0, 0, 1, 6, 12]),
        length_penalty=rng.choice([1.0, 0.0, 2.0, -2.0, 0.6]),
        early_stopping=rng.choice([True, False, "never"]),
        no_repeat_ngram_size=sometimes(lambda: rng.choice([1, 2, 2, 3, 4]), 0),
        encoder_no_repeat_ngram_size=sometimes(lambda: rng.choice([1, 2, 2, 3]), 0),
        repetition_penalty=sometimes(lambda: rng.choice([1.3, 0.8, 3.0]), 1.0),
        bad_words_ids=sometimes(words, ()),
        suppress_tokens=suppressed,
        begin_suppress_tokens=sometimes(any_tokens, ()),
        forced_bos_token_id=first,
        forced_eos_token_id=last,
    )


def without_padding(params: GenerationParams) -> GenerationParams:
    """Nothing that makes a RoBERTa say its padding token: with a cache it counts its place otherwise than without."""
    first, last = (5 if token == PAD else token for token in (params.forced_bos_token_id, params.forced_eos_token_id))
    suppressed = tuple({*params.suppress_tokens, PAD} - {first, last})
    return replace(params, forced_bos_token_id=first, forced_eos_token_id=last, suppress_tokens=suppressed)


def random_diverse_params(rng: random.Random, vocab: int = VOCAB) -> GenerationParams:
    """The same, with two groups of beams or more."""
    groups, width = rng.choice([(2, 1), (3, 1), (2, 2), (2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (8, 1)])
    return replace(
        random_params(rng, vocab),
        num_beams=groups * width,
        num_return_sequences=rng.randint(1, groups * width),
        num_beam_groups=groups,
        diversity_penalty=rng.choice([0.0, 0.3, 1.0, 1.0, 5.0]),
    )
