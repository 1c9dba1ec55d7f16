"""One TOML file describes one training run; `key=value` words on the command line override it.

Knows the fields, their defaults and their types. Does not know how a model is built or a data set read.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


class ConfigError(ValueError):
    """A configuration file or an override is wrong; the message names the key, the value and what was expected."""


@dataclass(frozen=True)
class ModelConfig:
    """The two checkpoints to warm-start from (names, hub ids or folders) and how they are joined; or a baseline."""

    encoder: str = "google-bert/bert-base-uncased"
    decoder: str = "google-bert/bert-base-uncased"
    # What the model card calls them where they are folders; a hub id stands for itself.
    encoder_name: str | None = None
    decoder_name: str | None = None
    # One word-embedding matrix for encoder, decoder and LM head. Needs both to have the same vocabulary.
    share_embeddings: bool = False
    # BERTShare (Rothe et al. 2020): one set of all weights that both sides have. Needs one architecture on both.
    share_weights: bool = False
    # Of the decoder's checkpoint only so many layers, evenly spread, the first and the last among them (distilbart).
    decoder_layers: int | None = None
    # A whole encoder-decoder, BART or PEGASUS, to be fine-tuned and evaluated as a baseline; then nothing is joined.
    seq2seq: str | None = None
    hidden_dropout: float = 0.1
    # Attention dropout keeps SDPA off its fast path on the CPU: about half the step time. Training warns of it.
    attention_dropout: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs are: a hub id, or a folder with one file a split (JSONL, also .gz and .xz; CSV; Parquet)."""

    path: str = "knkarthick/dialogsum"
    name: str = "dialogsum"
    licence: str = "unknown"
    non_commercial: bool = False
    source_column: str = "document"
    target_column: str = "summary"
    references_column: str = "references"
    max_source_tokens: int = 512
    max_target_tokens: int = 128
    # Rows of train that stand in validation or test are always dropped; repeats inside train only if asked for.
    drop_duplicates: bool = True
    max_train_rows: int | None = None
    # A training set too large for memory: read while training, for optim.max_steps steps. Rows of the other splits are
    # dropped as they come; repeats inside train are not looked for.
    streaming: bool = False
    # Rows of a stream that are held, and shuffled, together.
    shuffle_window: int = 10_000
    # max_length: every batch is as long as the limits above. For devices that want one shape, and for comparison.
    padding: Literal["longest", "max_length"] = "longest"


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move. New weights (cross-attention, LM head) start from nothing and take a higher rate."""

    epochs: float = 3.0
    # In place of epochs.
    max_steps: int | None = None
    # Of one process; times gradient_accumulation, times processes, is what a step sees.
    batch_size: int = 32
    # In place of batch_size: padded tokens of sources and targets in a batch. Batches of short texts get more rows.
    batch_tokens: int | None = None
    # Batches hold sources and targets of like length; none is a random order.
    grouping: Literal["length", "none"] = "length"
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    new_weights_learning_rate: float = 8e-4
    warmup_steps: int = 200
    schedule: str = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.1
    seed: int = 13
    # auto: bf16 where the device computes in it, fp16 on other CUDA devices, else fp32. Weights stay fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # One kernel for all parameters of a group.
    fused_adamw: bool = True
    # Activations are computed again in the backward pass: less memory, about a third more time.
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    compile_backend: str = "inductor"
    # With more than one process: ddp holds all weights in each; fsdp shards weights, gradients and optimiser state.
    # auto is fsdp where `accelerate launch` was told to use it, else ddp.
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation by generation while training; the checkpoint kept is the one with the best ROUGE-2."""

    rows: int = 200
    # Evaluate and save a checkpoint every this many steps; None is once an epoch. A run that may be cut off wants it.
    every_steps: int | None = None
    batch_size: int = 32
    num_beams: int = 1
    save_total_limit: int = 2


@dataclass(frozen=True)
class GenerationSettings:
    """What goes into `generation_config.json`: decode settings belong to the data set, so the checkpoint has them."""

    num_beams: int = 4
    length_penalty: float = 1.0
    min_length: int = 8
    max_length: int = 128
    no_repeat_ngram_size: int = 3
    early_stopping: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Everything one run needs. `output_dir` holds its checkpoints, its logs and the best model."""

    name: str
    output_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, as it goes into the manifest."""
        return dataclasses.asdict(self)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read `path` and apply overrides such as `optim.epochs=1`.

    Raises:
        ConfigError: unknown key, wrong type, or an override without `=`.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"override {word!r} is not of the form key=value")
        _set(table, key.split("."), _parse_value(value))
    return config_from_dict(table)


def config_from_dict(table: dict[str, Any]) -> RunConfig:
    """Build a `RunConfig` from plain data, refusing what it does not know."""
    config = _build(RunConfig, table, "")
    assert isinstance(config, RunConfig)
    _check_together(config)
    return config


def _check_together(config: RunConfig) -> None:
    """Settings that are each fine, and not together."""
    data, optim = config.data, config.optim
    longest = data.max_source_tokens + data.max_target_tokens
    if optim.batch_tokens is not None and optim.batch_tokens < longest:
        raise ConfigError(
            f"optim.batch_tokens is {optim.batch_tokens}; the longest row may have {longest} tokens "
            "(data.max_source_tokens + data.max_target_tokens)"
        )
    if optim.batch_tokens is not None and optim.grouping == "none":
        raise ConfigError('optim.batch_tokens makes batches of like length; optim.grouping must not be "none"')
    if data.streaming and optim.max_steps is None:
        raise ConfigError("data.streaming has no end: set optim.max_steps")
    if data.streaming and config.eval.every_steps is None:
        raise ConfigError("data.streaming has no epochs to evaluate after: set eval.every_steps")
    if optim.parallel == "fsdp" and optim.torch_compile:
        raise ConfigError("optim.torch_compile is not supported with optim.parallel = fsdp")


def _set(table: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key} is a value, not a section")
    table[keys[-1]] = value


def _parse_value(text: str) -> Any:
    """`3`, `1e-4`, `true` and `[1]` as TOML reads them; anything else is a string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: type[Any], table: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}{key} is not a setting; known here: {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for key, value in table.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}{key} is a section, not the value {value!r}")
            values[key] = _build(typing.cast("type[Any]", hint), value, f"{where}{key}.")
        else:
            values[key] = _checked(hint, value, f"{where}{key}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}{missing[0]} is missing")
    return cls(**values)


def _checked(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{where} must be one of {', '.join(get_args(hint))}; it is {value!r}")
        return value
    allowed = get_args(hint) or (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in allowed:
        names = " or ".join(t.__name__ for t in allowed if t is not type(None))
        raise ConfigError(f"{where} must be of type {names}; it is {value!r}")
    return value
