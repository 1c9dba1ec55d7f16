"""How many tokens a stack's positions hold. Plain Python over a config.json: training asks the same question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Their positions count from the padding id + 1 on (fairseq's way): of 514 positions, 512 are for tokens.
ROBERTA_FAMILY = ("roberta", "xlm-roberta", "camembert")
MPNET_PADDING = 1  # in its code, whatever its config says


def max_tokens(config: Mapping[str, Any]) -> int:
    """Of the `encoder` or `decoder` section of a config.json, or of a whole BART's.

    Raises:
        KeyError: the section does not say.
    """
    positions = int(config["n_positions" if config.get("model_type") == "gpt2" else "max_position_embeddings"])
    return positions - position_offset(config)


def position_offset(config: Mapping[str, Any]) -> int:
    """How many positions come before a text's first token."""
    if config.get("model_type") in ROBERTA_FAMILY:
        return int(config["pad_token_id"]) + 1
    return MPNET_PADDING + 1 if config.get("model_type") == "mpnet" else 0
