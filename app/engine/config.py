"""What an engine and a request may be told: two frozen dataclasses, standard library only.

Knows ranges and the meaning of each option. Does not know any checkpoint's own limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Settings of transformers that change what is said and that the engine does not have yet, with the values that ask for
# nothing. A checkpoint that asks for one is refused: ignoring it would give other summaries without a word.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "num_beam_groups": (None, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None, {}),
}
EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class EngineConfig:
    """Sizes that are fixed when the engine starts, so that its memory is bounded.

    Attributes:
        max_num_seqs: slots, that is sequences decoded at the same time.
        max_num_beams: widest beam search that a request may ask for.
        max_encode_tokens: source tokens, padding included, encoded between two decode steps; one sequence always is.
        max_output_tokens: longest output in tokens, end token included; None is the checkpoint's own maximum.
        device: "cpu", "cuda", "cuda:N" or "mps".
        dtype: "float32", "bfloat16" or "float16".
    """

    max_num_seqs: int = 16
    max_num_beams: int = 8
    max_encode_tokens: int = 4096
    max_output_tokens: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

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
        num_beams: beams kept a step; 1 is greedy decoding.
        num_return_sequences: hypotheses returned, best first; at most `num_beams`.
        max_new_tokens: an output of this many tokens is cut there.
        min_new_tokens: the end token is forbidden before this many tokens.
        length_penalty: a finished hypothesis scores `sum_log_probs / length ** length_penalty` (Wu et al. 2016,
            arXiv:1609.08144, simplified); greater favours longer outputs, below zero shorter ones.
        early_stopping: True stops when `num_beams` hypotheses are finished; False when the best running one cannot
            win at its present length; "never" when it cannot win at any length.
        no_repeat_ngram_size: no n-gram of this size occurs twice (Paulus et al. 2017, arXiv:1705.04304); 0 is off.
        repetition_penalty: tokens already said are made less likely by this factor (Keskar et al. 2019,
            arXiv:1909.05858); 1 is off. It acts on log-probabilities in beam search and on logits in greedy decoding.
    """

    num_beams: int = 1
    num_return_sequences: int = 1
    max_new_tokens: int = 127
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("num_beams", 1), ("num_return_sequences", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; it is {getattr(self, name)}")
        for name in ("min_new_tokens", "no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; it is {getattr(self, name)}")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, more than num_beams, which is {self.num_beams}"
            )
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be greater than 0; it is {self.repetition_penalty}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be true, false or 'never'; it is {self.early_stopping!r}")

    @classmethod
    def from_generation_config(cls, settings: Mapping[str, Any]) -> GenerationParams:
        """The options that a checkpoint's `generation_config.json` sets; `max_new_tokens` wins over `max_length`.

        Raises:
            ValueError: an option is out of range, or is one that the engine does not have.
        """
        for name, neutral in NOT_BUILT.items():
            if settings.get(name) not in neutral:
                raise ValueError(f"{name} is {settings[name]!r}; the engine does not have this option yet")

        def given(name: str, default: Any) -> Any:
            value = settings.get(name)
            return default if value is None else value

        return cls(
            num_beams=given("num_beams", 1),
            num_return_sequences=given("num_return_sequences", 1),
            max_new_tokens=given("max_new_tokens", given("max_length", 20) - 1),
            min_new_tokens=max(0, given("min_length", 0) - 1, given("min_new_tokens", 0)),
            length_penalty=float(given("length_penalty", 1.0)),
            early_stopping=given("early_stopping", False),
            no_repeat_ngram_size=given("no_repeat_ngram_size", 0),
            repetition_penalty=float(given("repetition_penalty", 1.0)),
        )
