"""What an engine and a request may be told: two frozen dataclasses; no torch.

Knows ranges and the meaning of each option. Does not know any checkpoint's own limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.engine.generation_config import CheckpointOptions

# Room for lists of tokens is fixed when the engine starts: so many a request.
MAX_SUPPRESSED_TOKENS = 256
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 8
# `length ** length_penalty` of 512 tokens is then still a number in fp32.
MAX_LENGTH_PENALTY = 10
FORCED = ("forced_bos_token_id", "forced_eos_token_id")
EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class EngineConfig:
    """Sizes that are fixed when the engine starts, so that its memory is bounded.

    Attributes:
        max_num_seqs: slots, that is sequences decoded at the same time.
        max_num_beams: widest beam search that a request may ask for.
        max_encode_tokens: source tokens encoded between two decode steps; one sequence always is.
        max_output_tokens: longest output in tokens, end token included; None is the checkpoint's own maximum.
        device: "cpu", "cuda", "cuda:N" or "mps".
        cuda_graphs: record decode steps on CUDA. On other devices it changes nothing.
        dtype: "float32", "bfloat16", "float16", or "int8": 8-bit matrix products (CPU only); keys and values in
            bfloat16 where the processor has it, all else in fp32. On some CPUs "bfloat16" is the dtype of weights,
            keys and values alone, and all else is in fp32, too (`kernels.multiplies_bfloat16_in_fp32`).
    """

    max_num_seqs: int = 16
    max_num_beams: int = 8
    max_encode_tokens: int = 4096
    max_output_tokens: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_beams", "max_encode_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; it is {getattr(self, name)}")
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise ValueError(f"max_output_tokens must be at least 1; it is {self.max_output_tokens}")


@dataclass(frozen=True)
class GenerationParams:
    """How one sequence is decoded; each option means what it means in transformers' `generate`.

    Lengths count generated tokens: the end token is one of them, the decoder's start token is not
    (`max_length` and `min_length` of transformers count the start token: one more).

    Attributes:
        num_beams: beams kept a step; 1 is greedy decoding, or sampling.
        num_return_sequences: hypotheses returned, best first; at most `num_beams`. Sampling without beams draws as many
            samples, in the order of drawing.
        max_new_tokens: an output of this many tokens is cut there.
        min_new_tokens: the end token is forbidden before this many tokens.
        length_penalty: a finished hypothesis scores `sum_log_probs / length ** length_penalty` (Wu et al. 2016,
            arXiv:1609.08144, simplified); greater favours longer outputs, below zero shorter ones.
        early_stopping: True stops when `num_beams` hypotheses are finished; False when the best running one cannot
            win at its present length; "never" when it cannot win at any length.
        no_repeat_ngram_size: no n-gram of this size occurs twice (Paulus et al. 2017, arXiv:1705.04304); 0 is off.
        encoder_no_repeat_ngram_size: no n-gram of this size is copied from the source; 0 is off.
        repetition_penalty: tokens already said are made less likely by this factor (Keskar et al. 2019,
            arXiv:1909.05858); 1 is off. It acts on log-probabilities in beam search and on logits otherwise.
        bad_words_ids: token sequences that are never completed.
        suppress_tokens: tokens that are never said.
        begin_suppress_tokens: tokens that are not said first (second, behind a forced first one).
        forced_bos_token_id: the first token, whatever the scores.
        forced_eos_token_id: the token at the length limit, whatever the scores.
        do_sample: draw tokens instead of taking the best; with beams, draw the candidates without replacement.
        temperature: scores are divided by it before drawing; below 1 is sharper.
        top_k: draw from the k best tokens; 0 is off.
        top_p: draw from the smallest set of tokens that holds this much probability (Holtzman et al. 2019,
            arXiv:1904.09751); 1 is off.
        seed: the same seed draws the same tokens, whatever else is in the batch; None takes a new one.
        num_beam_groups: diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424): so many groups of
            `num_beams / num_beam_groups` beams; 1 is plain beam search.
        diversity_penalty: taken from a token's score for each beam of an earlier group that says it in this step.
    """

    num_beams: int = 1
    num_return_sequences: int = 1
    max_new_tokens: int = 127
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        at_least = {
            "num_beams": 1,
            "num_return_sequences": 1,
            "max_new_tokens": 1,
            "num_beam_groups": 1,
            "min_new_tokens": 0,
            "no_repeat_ngram_size": 0,
            "encoder_no_repeat_ngram_size": 0,
            "top_k": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; it is {getattr(self, name)}")
        for name in ("repetition_penalty", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be greater than 0 and finite; it is {getattr(self, name)}")
        if not -MAX_LENGTH_PENALTY <= self.length_penalty <= MAX_LENGTH_PENALTY:
            raise ValueError(
                f"length_penalty must be from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}; "
                f"it is {self.length_penalty}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1; it is {self.top_p}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping must be true, false or 'never'; it is {self.early_stopping!r}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2 ** 64; it is {self.seed}")
        self._check_widths()
        self._check_token_lists()

    @property
    def rows(self) -> int:
        """Rows of the decode batch that the sequence takes: its beams, or its independent samples."""
        return self.num_return_sequences if self.do_sample and self.num_beams == 1 else self.num_beams

    def _check_widths(self) -> None:
        if self.num_return_sequences > self.rows:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, more than num_beams, which is {self.num_beams}"
            )
        if self.num_beams % self.num_beam_groups:
            raise ValueError(f"num_beam_groups is {self.num_beam_groups}; it must divide num_beams, {self.num_beams}")
        if self.num_beam_groups == 1 and self.diversity_penalty != 0.0:
            raise ValueError(f"diversity_penalty is {self.diversity_penalty}, but num_beam_groups is 1")
        if self.num_beam_groups > 1:
            if self.do_sample:
                raise ValueError("num_beam_groups above 1 and do_sample do not go together")
            if not 0 <= self.diversity_penalty < math.inf:
                raise ValueError(f"diversity_penalty must be at least 0 and finite; it is {self.diversity_penalty}")

    def _check_token_lists(self) -> None:
        limits = (
            ("suppress_tokens", len(self.suppress_tokens), MAX_SUPPRESSED_TOKENS, "tokens"),
            ("begin_suppress_tokens", len(self.begin_suppress_tokens), MAX_SUPPRESSED_TOKENS, "tokens"),
            ("bad_words_ids", len(self.bad_words_ids), MAX_BAD_WORDS, "words"),
            ("bad_words_ids", max(map(len, self.bad_words_ids), default=0), MAX_BAD_WORD_TOKENS, "tokens in a word"),
        )
        for name, count, limit, unit in limits:
            if count > limit:
                raise ValueError(f"{name} has {count} {unit}; the limit is {limit}")
        if not all(self.bad_words_ids):
            raise ValueError("bad_words_ids has a word without tokens")
        if any(token < 0 for token in self.token_ids()):
            raise ValueError("token ids must not be negative")
        for name in FORCED:
            if getattr(self, name) in self.suppress_tokens:
                raise ValueError(f"{name} is {getattr(self, name)}, which suppress_tokens forbids")

    def token_ids(self) -> Iterator[int]:
        """Every token id that the options name, for a check against a vocabulary."""
        yield from self.suppress_tokens
        yield from self.begin_suppress_tokens
        yield from (token for word in self.bad_words_ids for token in word)
        yield from (t for t in (self.forced_bos_token_id, self.forced_eos_token_id) if t is not None)

    @classmethod
    def from_generation_config(cls, settings: Mapping[str, Any]) -> GenerationParams:
        """The options that a checkpoint's `generation_config.json` sets; new tokens win over lengths.

        Raises:
            ValueError: an option is of another type or out of range, or is one that the engine does not have.
        """
        own = CheckpointOptions(settings)
        # Where neither is set, generate's 20 do not count the start token.
        max_new_tokens = own.integer("max_new_tokens", own.integer("max_length", 21) - 1)
        return cls(
            num_beams=own.integer("num_beams", 1),
            num_return_sequences=own.integer("num_return_sequences", 1),
            max_new_tokens=max_new_tokens,
            min_new_tokens=own.integer("min_new_tokens", max(0, own.integer("min_length", 0) - 1)),
            length_penalty=own.number("length_penalty", 1.0),
            early_stopping=own.any("early_stopping", False),
            no_repeat_ngram_size=own.integer("no_repeat_ngram_size", 0),
            encoder_no_repeat_ngram_size=own.integer("encoder_no_repeat_ngram_size", 0),
            repetition_penalty=own.number("repetition_penalty", 1.0),
            bad_words_ids=own.words("bad_words_ids"),
            suppress_tokens=own.tokens("suppress_tokens"),
            begin_suppress_tokens=own.tokens("begin_suppress_tokens"),
            forced_bos_token_id=own.token("forced_bos_token_id"),
            forced_eos_token_id=own.token("forced_eos_token_id"),
            do_sample=own.flag("do_sample", False),
            temperature=own.number("temperature", 1.0),
            top_k=own.integer("top_k", 50),
            top_p=own.number("top_p", 1.0),
            num_beam_groups=own.integer("num_beam_groups", 1),
            diversity_penalty=own.number("diversity_penalty", 0.0),
        )
