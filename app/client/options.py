"""Every option of a summary, and where the request has it.

Knows names and types. Does not know ranges, defaults or what goes together: the server does, and docs/decoding.md says
what each option means. A name that is not here is sent as a decode option, so that a newer server can take it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

Priority = Literal["interactive", "batch"]


class Options(TypedDict, total=False):
    """What is not given comes from the served checkpoint."""

    # Of the request.
    truncation: Literal["do_not_truncate", "longest_first", "only_first", "only_second"]
    overflow: Literal["error", "truncate_tail", "truncate_head", "chunk"]
    clean_up_tokenization_spaces: bool
    with_tokens: bool
    with_alternatives: bool
    # Of decoding.
    num_beams: int
    num_return_sequences: int
    max_length: int
    max_new_tokens: int
    min_length: int
    min_new_tokens: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    no_repeat_ngram_size: int
    encoder_no_repeat_ngram_size: int
    repetition_penalty: float
    bad_words_ids: list[list[int]]
    suppress_tokens: list[int]
    begin_suppress_tokens: list[int]
    forced_bos_token_id: int
    forced_eos_token_id: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int
    num_beam_groups: int
    diversity_penalty: float


_OF_THE_REQUEST = ("truncation", "overflow", "clean_up_tokenization_spaces")
_RETURN = {"with_tokens": "tokens", "with_alternatives": "alternatives"}


def parameters(options: Mapping[str, Any]) -> dict[str, Any]:
    """The request's `parameters`."""
    found = {name: options[name] for name in _OF_THE_REQUEST if name in options}
    wanted = [word for name, word in _RETURN.items() if options.get(name)]
    decoding = {name: value for name, value in options.items() if name not in found and name not in _RETURN}
    return found | ({"return": wanted} if wanted else {}) | ({"generate_parameters": decoding} if decoding else {})
