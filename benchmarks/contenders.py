"""The engine and transformers' `generate` at the same work, each timed in the same parts.

Makes the random checkpoint that both load. Knows how to run each side fairly; does not know rounds, tables or what is
asked of them, nor other engines (benchmarks/peer.py). Needs torch, transformers and `app.engine` alone.

The parts of a run, for N forced tokens of every sequence:
- `encode`: the encoder. The engine also computes there the cross-attention keys and values, once a sequence.
- `decode`: everything after it. `generate` computes its cross-attention keys and values there, once a beam.
- `steps`: the last N - 1 steps, in which neither side encodes anything: the strict comparison of decode loops.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as ListLike
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from app.engine import Engine, EngineConfig, GenerationParams, Sequence

VOCAB, PAD, UNKNOWN, START, EOS = 30522, 0, 100, 101, 102  # of bert-base-uncased
BEAMS = 4
FIRST_WORD = 2000  # below stand special and unused tokens, and letters
Sources = ListLike[ListLike[int]]

# A benchmark prints its own progress.
logging.disable_progress_bar()


@dataclass(frozen=True)
class Size:
    """Dimensions of a random checkpoint, the same for both sides, and of the work given to it."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    source_tokens: int
    new_tokens: int


SIZES = {
    "base": Size(layers=12, hidden=768, heads=12, intermediate=3072, source_tokens=512, new_tokens=48),
    # The shipped checkpoint's.
    "small": Size(layers=6, hidden=384, heads=12, intermediate=1536, source_tokens=192, new_tokens=48),
    # To try a script, not to measure anything.
    "tiny": Size(layers=2, hidden=64, heads=4, intermediate=128, source_tokens=48, new_tokens=8),
}


@dataclass(frozen=True)
class Timing:
    """One run, in seconds; the module's docstring says what each part holds."""

    encode: float
    decode: float
    steps: float
    tokens: list[list[int]]

    @property
    def total(self) -> float:
        """End to end."""
        return self.encode + self.decode


class Contender(Protocol):
    """Anything that decodes the same forced lengths."""

    def run(self, sources: Sources) -> Timing:
        """All sources as one batch, timed."""


def write_checkpoint(folder: Path, size: Size, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """A random BERT encoder-decoder, in the layout that both sides load; its own length limit is the forced one.

    Args:
        dtype: of the file. Whoever computes in another has the numbers that this one holds.

    Weights are wider than BERT's 0.02: there attention is flat, every source gets the same tokens, and comparing them
    would show nothing. At this width attention scores have a standard deviation of 2 in every size. What the decoder's
    layers add to the residual stream is made small: at full size the last token said is lost among 36 sublayers, the
    scores of a step hardly depend on it, and the beams are permutations of the same tokens, ties but for rounding.
    """
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "initializer_range": (2 / size.hidden) ** 0.5,
    }
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**shape), BertConfig(**shape, is_decoder=True, add_cross_attention=True)
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = START, PAD, EOS
    model = EncoderDecoderModel(config).eval()
    with torch.no_grad():
        for name, weight in model.decoder.named_parameters():
            if name.endswith("output.dense.weight"):
                weight.mul_(0.25)
    model.generation_config = GenerationConfig(**_special_tokens(), max_length=size.new_tokens + 1)
    model.to(dtype).save_pretrained(folder)


def random_sources(count: int, size: Size, seed: int = 0) -> list[list[int]]:
    """Sources of full length, special tokens included."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(FIRST_WORD, VOCAB, (count, size.source_tokens - 2), generator=generator)
    return [[START, *row, EOS] for row in words.tolist()]


def forced(new_tokens: int) -> GenerationParams:
    """The decode settings of the comparison: exactly so many tokens."""
    return GenerationParams(
        num_beams=BEAMS, no_repeat_ngram_size=3, min_new_tokens=new_tokens, max_new_tokens=new_tokens
    )


def forced_config(new_tokens: int) -> GenerationConfig:
    """The same for `generate`."""
    return GenerationConfig(
        **_special_tokens(),
        num_beams=BEAMS,
        no_repeat_ngram_size=3,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        length_penalty=1.0,
        early_stopping=False,
        do_sample=False,
    )


class Ours:
    """The engine, driven by `step()`; all sources are encoded in its first step.

    The first step encodes and decodes one token; `encode` is that step less the mean of the others. It is not taken
    from `SequenceOutput.encode_seconds`, which on a GPU is when the work was launched, not when it was done.
    """

    def __init__(self, folder: Path, dtype: str, device: str, new_tokens: int, config: EngineConfig) -> None:
        self.device = device
        self.new_tokens = new_tokens
        self.engine = Engine.from_folder(folder, config)
        self.params = forced(new_tokens)

    def run(self, sources: Sources, around_steps: AbstractContextManager[Any] | None = None) -> Timing:
        """Admit all, step until all are done; `around_steps` is entered for the last N - 1 steps."""
        sequences = [Sequence(tuple(ids), self.params) for ids in sources]
        for sequence in sequences:
            self.engine.add(sequence)
        started = _now(self.device)
        finished = len(self.engine.step())
        first = _now(self.device)
        count = 1
        with around_steps or nullcontext():
            while finished < len(sequences):
                finished += len(self.engine.step())
                count += 1
            ended = _now(self.device)
        if errors := {s.error for s in sequences if s.output is None}:
            raise RuntimeError(f"the engine failed: {'; '.join(map(str, errors))}")
        if count != self.new_tokens:
            raise RuntimeError(f"the engine took {count} steps for {self.new_tokens} tokens: not one batch")
        tokens = [list(s.output.hypotheses[0].token_ids) for s in sequences if s.output is not None]
        return from_steps(ended - started, ended - first, self.new_tokens, tokens)


class Generate:
    """transformers' `generate` in one static batch, with the attention that it chooses itself."""

    def __init__(self, folder: Path, dtype: str, device: str, settings: GenerationConfig | None = None) -> None:
        self.device = device
        model = EncoderDecoderModel.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model: Any = model.to(device).eval()
        if settings is not None:  # otherwise the folder's own
            self.model.generation_config = settings
        self.attention = str(self.model.decoder.config._attn_implementation)

    @torch.inference_mode()
    def run(self, sources: Sources) -> Timing:
        """Times the encoder by itself, then `generate` with its outputs, which then only decodes.

        A logits processor that changes nothing is called once a step and looks at the clock in the first and the last.
        """
        ids, mask = self._batch(sources)
        new_tokens = self.model.generation_config.max_new_tokens
        clock = _StepClock(self.device, new_tokens)
        started = _now(self.device)
        hidden = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        encoded = _now(self.device)
        # generate repeats the fields of this object in place: it serves once.
        outputs = BaseModelOutput(last_hidden_state=hidden)
        rows = self.model.generate(encoder_outputs=outputs, attention_mask=mask, logits_processor=[clock])
        ended = _now(self.device)
        if clock.calls != new_tokens:
            raise RuntimeError(f"generate took {clock.calls} steps for {new_tokens} tokens")
        tokens = [row[1 : new_tokens + 1] for row in rows.tolist()]
        return Timing(encoded - started, ended - encoded, clock.times[1] - clock.times[0], tokens)

    @torch.inference_mode()
    def generate(self, sources: Sources) -> list[list[int]]:
        """One padded batch, as a user calls it; outputs are cut after their first end token."""
        ids, mask = self._batch(sources)
        rows = self.model.generate(input_ids=ids, attention_mask=mask)[:, 1:].tolist()
        eos = self.model.generation_config.eos_token_id
        ends = set(eos) if isinstance(eos, list) else {eos}
        cut = [next((at + 1 for at, token in enumerate(row) if token in ends), len(row)) for row in rows]
        return [row[:at] for row, at in zip(rows, cut, strict=True)]

    def end_to_end(self, sources: Sources) -> float:
        """Seconds of `generate`."""
        started = _now(self.device)
        self.generate(sources)
        return _now(self.device) - started

    def _batch(self, sources: Sources) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, sources))
        ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in sources])
        lengths = torch.tensor([len(row) for row in sources])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return ids.to(self.device), mask.to(self.device)


class _StepClock:
    """A logits processor that only looks at the clock, in the first and in the last step."""

    def __init__(self, device: str, last: int) -> None:
        self.device, self.last = device, last
        self.calls = 0
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls in (1, self.last):
            self.times.append(_now(self.device))
        return scores


def from_steps(total: float, steps: float, new_tokens: int, tokens: list[list[int]]) -> Timing:
    """A run whose last N - 1 steps were timed: `decode` is N such steps, and `encode` the rest."""
    decode = steps * new_tokens / (new_tokens - 1)
    return Timing(total - decode, decode, steps, tokens)


def _special_tokens() -> dict[str, int]:
    return {"bos_token_id": START, "decoder_start_token_id": START, "eos_token_id": EOS, "pad_token_id": PAD}


def _now(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
