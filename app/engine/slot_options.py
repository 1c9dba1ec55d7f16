"""What each running sequence asked for, as tensors: one row a slot, so that requests of any options share a step.

Knows how GenerationParams become numbers on the device, and which options any running sequence uses (known on the
host: what nobody asked for costs nothing). Does not know scores or what the options do to them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.buckets import round_up
from app.engine.config import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_SUPPRESSED_TOKENS, GenerationParams
from app.engine.slot_tensors import SlotTensors

# SlotOptions.early_stopping; 0 is False.
WHEN_FULL, LOOK_AHEAD = 1, 2
NO_TOKEN = -1
WHOLE_VOCABULARY = 2**31
FILTER_WIDTHS = (0, 64, 1024, WHOLE_VOCABULARY)


@dataclass(frozen=True)
class Vocabulary:
    """What decoding knows of a checkpoint's tokens."""

    size: int
    start_token_id: int
    eos_token_id: int


@dataclass
class SlotOptions(SlotTensors):
    """Options and source of C slots. P, W and M are the limits of config.py; lists are filled up with NO_TOKEN."""

    source_ids: Tensor  # [C, N] int64
    source_lengths: Tensor  # [C] int64; 1 where a slot is free, so that attention there stays finite
    max_new_tokens: Tensor  # [C] int64
    min_new_tokens: Tensor  # [C] int64
    length_divisors: Tensor  # [C, T] fp32: a hypothesis of n generated tokens has its score divided by entry n
    early_stopping: Tensor  # [C] int64: 0, WHEN_FULL or LOOK_AHEAD
    no_repeat_ngram_size: Tensor  # [C] int64
    encoder_no_repeat_ngram_size: Tensor  # [C] int64
    repetition_penalty: Tensor  # [C] fp32
    suppress_tokens: Tensor  # [C, P] int64
    begin_suppress_tokens: Tensor  # [C, P] int64
    begin_length: Tensor  # [C] int64: tokens said, start token included, when begin_suppress_tokens acts
    bad_word_prefixes: Tensor  # [C, W, M - 1] int64, filled up at the front
    bad_word_ends: Tensor  # [C, W] int64
    forced_bos_token_id: Tensor  # [C] int64
    forced_eos_token_id: Tensor  # [C] int64
    temperature: Tensor  # [C] fp32
    top_k: Tensor  # [C] int64
    top_p: Tensor  # [C] fp32
    seed: Tensor  # [C, 2] int64: low and high 32 bits
    diversity_penalty: Tensor  # [C] fp32

    @classmethod
    def empty(cls, capacity: int, max_source: int, max_length: int, device: torch.device) -> SlotOptions:
        """C free slots."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(capacity, *shape, dtype=dtype, device=device)

        real, prefix = torch.float32, MAX_BAD_WORD_TOKENS - 1
        return cls(
            source_ids=zeros(max_source),
            source_lengths=zeros() + 1,
            max_new_tokens=zeros(),
            min_new_tokens=zeros(),
            length_divisors=zeros(max_length, dtype=real) + 1,
            early_stopping=zeros(),
            no_repeat_ngram_size=zeros(),
            encoder_no_repeat_ngram_size=zeros(),
            repetition_penalty=zeros(dtype=real) + 1,
            suppress_tokens=zeros(MAX_SUPPRESSED_TOKENS) + NO_TOKEN,
            begin_suppress_tokens=zeros(MAX_SUPPRESSED_TOKENS) + NO_TOKEN,
            begin_length=zeros(),
            bad_word_prefixes=zeros(MAX_BAD_WORDS, prefix) + NO_TOKEN,
            bad_word_ends=zeros(MAX_BAD_WORDS) + NO_TOKEN,
            forced_bos_token_id=zeros() + NO_TOKEN,
            forced_eos_token_id=zeros() + NO_TOKEN,
            temperature=zeros(dtype=real) + 1,
            top_k=zeros(),
            top_p=zeros(dtype=real) + 1,
            seed=zeros(2),
            diversity_penalty=zeros(dtype=real),
        )

    def start(self, requests: ListLike[tuple[ListLike[int], GenerationParams]], first: int, eos_token_id: int) -> None:
        """Write the sources and options of sequences into the slots from `first` on.

        On another device than the host's, where each value would be a copy of its own, they are written on the host,
        and go over a field at a time.
        """
        on_host = self.source_ids.device.type == "cpu"
        shape = len(requests), self.source_ids.shape[1], self.length_divisors.shape[1]
        written = self if on_host else SlotOptions.empty(*shape, torch.device("cpu"))
        for slot, (source_ids, params) in enumerate(requests, first if on_host else 0):
            written._write(slot, source_ids, params, eos_token_id)
        if not on_host:
            self.take(written, first)

    def _write(self, slot: int, source_ids: ListLike[int], params: GenerationParams, eos_token_id: int) -> None:
        """Write a sequence's options. Every field is written, so that nothing of the last occupant is left."""
        self.source_ids[slot] = 0
        self.source_ids[slot, : len(source_ids)] = torch.tensor(source_ids)
        self.source_lengths[slot] = len(source_ids)
        self.max_new_tokens[slot] = params.max_new_tokens
        self.min_new_tokens[slot] = params.min_new_tokens
        # On the host, in double precision as transformers does it: not every device has fp64.
        lengths = range(1, self.length_divisors.shape[1])
        self.length_divisors[slot] = torch.tensor([1.0, *(n**params.length_penalty for n in lengths)])
        # With no reward for length, "never" asks what False asks.
        never = params.early_stopping == "never" and params.length_penalty > 0
        self.early_stopping[slot] = LOOK_AHEAD if never else int(params.early_stopping is True)
        self.no_repeat_ngram_size[slot] = params.no_repeat_ngram_size
        self.encoder_no_repeat_ngram_size[slot] = params.encoder_no_repeat_ngram_size
        self.repetition_penalty[slot] = params.repetition_penalty
        _fill(self.suppress_tokens[slot], params.suppress_tokens)
        _fill(self.begin_suppress_tokens[slot], params.begin_suppress_tokens)
        self.begin_length[slot] = 1 if params.forced_bos_token_id is None else 2
        words = [word for word in params.bad_words_ids if word != (eos_token_id,)]  # as transformers does
        _fill(self.bad_word_ends[slot], [word[-1] for word in words])
        self.bad_word_prefixes[slot] = NO_TOKEN
        for row, word in enumerate(words):
            if len(word) > 1:
                self.bad_word_prefixes[slot, row, 1 - len(word) :] = torch.tensor(word[:-1])
        self.forced_bos_token_id[slot] = NO_TOKEN if params.forced_bos_token_id is None else params.forced_bos_token_id
        self.forced_eos_token_id[slot] = NO_TOKEN if params.forced_eos_token_id is None else params.forced_eos_token_id
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        seed = random.getrandbits(64) if params.seed is None else params.seed
        self.seed[slot] = torch.tensor([seed & 0xFFFFFFFF, seed >> 32])
        self.diversity_penalty[slot] = params.diversity_penalty

    def free(self, slot: int) -> None:
        """Leave a slot such that steps that still compute it stay finite."""
        self.source_lengths[slot] = 1


@dataclass(frozen=True)
class ActiveOptions:
    """Which options any running sequence uses in this step, and the widths to compute: known without asking the device.

    Hashable: it is part of what tells one CUDA graph from another, so numbers of a request enter it rounded or bounded.
    """

    target: int  # positions of targets to read, the newest included
    source: int  # positions of sources to read
    ragged: bool  # whether some slot's source is shorter than that
    repetition_penalty: bool = False
    largest_ngram: int = 0
    largest_encoder_ngram: int = 0
    bad_words: bool = False
    min_new_tokens: bool = False
    forced_bos: bool = False
    forced_eos: bool = False
    suppress_tokens: bool = False
    begin_suppress_tokens: bool = False
    do_sample: bool = False
    filter_width: int = 0  # how many of the best tokens top_k and top_p look at; 0: nobody filters

    @classmethod
    def of(
        cls, params: ListLike[GenerationParams], lengths: ListLike[int], target: int, source: int, ragged: bool
    ) -> ActiveOptions:
        """Look at the running sequences; `lengths` are tokens said, start token included."""
        pairs = list(zip(params, lengths, strict=True))
        widths = [p.top_k or (WHOLE_VOCABULARY if p.top_p < 1.0 else 0) for p in params if p.do_sample]
        return cls(
            target=target,
            source=source,
            ragged=ragged,
            repetition_penalty=any(p.repetition_penalty != 1.0 for p in params),
            # Longer n-grams than what is said cannot repeat.
            largest_ngram=min(target + 1, max(p.no_repeat_ngram_size for p in params)),
            largest_encoder_ngram=min(target + 1, max(p.encoder_no_repeat_ngram_size for p in params)),
            bad_words=any(p.bad_words_ids for p in params),
            min_new_tokens=any(n - 1 < p.min_new_tokens for p, n in pairs),
            forced_bos=any(p.forced_bos_token_id is not None and n == 1 for p, n in pairs),
            forced_eos=any(p.forced_eos_token_id is not None and n == p.max_new_tokens for p, n in pairs),
            suppress_tokens=any(p.suppress_tokens for p in params),
            begin_suppress_tokens=any(p.begin_suppress_tokens and n <= 2 for p, n in pairs),
            do_sample=bool(widths),
            filter_width=round_up(max(widths, default=0), FILTER_WIDTHS),
        )


def _fill(row: Tensor, tokens: ListLike[int]) -> None:
    row[:] = NO_TOKEN
    if tokens:
        row[: len(tokens)] = torch.tensor(tokens)
