"""What a checkpoint's `generation_config.json` says, each value of the type that it must have.

Knows transformers' names and the options that the engine lacks. Does not know what an option does, nor its range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

# Settings of transformers that change what is said and that the engine does not have, with the values that ask for
# nothing. A checkpoint that asks for one is refused: ignoring it would give other summaries without a word.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None, {}),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "guidance_scale": (None, 1.0),
    "penalty_alpha": (None,),
    "watermarking_config": (None,),
    "renormalize_logits": (None, False),
    "stop_strings": (None, []),
    "force_words_ids": (None,),
    "constraints": (None,),
    "dola_layers": (None,),
    "max_time": (None,),
    "remove_invalid_values": (None, False),
    "token_healing": (None, False),
}


class CheckpointOptions:
    """Options by name; one that is not there, or null, is the default. Values of another type are a ValueError."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if an option is asked for that the engine does not have."""
        for name, neutral in NOT_BUILT.items():
            if settings.get(name) not in neutral:
                raise ValueError(f"{name} is {settings[name]!r}; the engine does not have this option yet")
        self._settings = settings

    def integer(self, name: str, default: int) -> int:
        """A whole number; 4.0 is none."""
        value = self._given(name, default)
        return int(value) if _is_integer(value) else self._refuse(name, "a whole number")

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self._given(name, default)
        try:
            return float(value) if _is_integer(value) or isinstance(value, float) else self._refuse(name, "a number")
        except OverflowError:
            self._refuse(name, "a number of fp64")

    def flag(self, name: str, default: bool) -> bool:
        """True or false; 1 is neither."""
        value = self._given(name, default)
        return value if isinstance(value, bool) else self._refuse(name, "true or false")

    def any(self, name: str, default: Any) -> Any:
        """Whatever stands there: its values are checked elsewhere."""
        return self._given(name, default)

    def token(self, name: str) -> int | None:
        """One token's id, or none; a list of one is that one."""
        value = self._settings.get(name)
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"{name} is {value!r}; the engine takes one token")
            value = value[0]
        return value if value is None or _is_integer(value) else self._refuse(name, "a token id")

    def tokens(self, name: str) -> tuple[int, ...]:
        """Ids of tokens."""
        value = self._given(name, ())
        return _tokens(value) if _are_tokens(value) else self._refuse(name, "a list of token ids")

    def words(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Lists of ids of tokens."""
        value = self._given(name, ())
        if not isinstance(value, list | tuple) or not all(map(_are_tokens, value)):
            self._refuse(name, "a list of lists of token ids")
        return tuple(map(_tokens, value))

    def _given(self, name: str, default: Any) -> Any:
        value = self._settings.get(name)
        return default if value is None else value

    def _refuse(self, name: str, wanted: str) -> NoReturn:
        raise ValueError(f"{name} must be {wanted}; it is {self._settings[name]!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_integer, value))


def _tokens(value: Any) -> tuple[int, ...]:
    return tuple(value)
