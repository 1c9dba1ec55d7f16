"""One TOML file describes one training run; `key=value` words on the command line override it.

Knows the fields, their defaults and their types. Does not know how a model is built or a data set read.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

# Of `transformers.SchedulerType`, those that need no further arguments (tested).
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "greedy",
]
# Counts, weights and rates, and the least that each may be; of a list of sections, in each.
LEAST: dict[str, int] = {
    "model.decoder_layers": 1,
    "data.max_source_tokens": 3,  # two of them special
    "data.max_target_tokens": 2,  # one is the end token
    "data.max_train_rows": 1,
    "data.shuffle_window": 1,
    "data.pad_to_multiple_of": 1,
    "data.weight": 0,
    "data.extra.weight": 0,
    "denoising.max_texts": 1,
    "denoising.max_tokens": 3,  # two of them special
    "denoising.epochs": 0,
    "denoising.max_steps": 1,
    "denoising.batch_size": 1,
    "denoising.batch_tokens": 1,
    "denoising.gradient_accumulation": 1,
    "denoising.learning_rate": 0,
    "denoising.new_weights_learning_rate": 0,
    "denoising.warmup_steps": 0,
    "denoising.held_out": 1,  # for the loss to be seen
    "denoising.every_steps": 1,
    "denoising.seed": 0,
    "optim.epochs": 0,
    "optim.max_steps": 1,
    "optim.batch_size": 1,
    "optim.batch_tokens": 1,
    "optim.gradient_accumulation": 1,
    "optim.learning_rate": 0,  # frozen
    "optim.new_weights_learning_rate": 0,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "optim.max_grad_norm": 0,  # off
    "optim.r_drop_alpha": 0,
    "optim.seed": 0,
    "optim.loader_workers": 0,
    "eval.rows": 1,
    "eval.every_steps": 1,
    "eval.batch_size": 1,
    "eval.num_beams": 1,
    "eval.save_total_limit": 1,
    "generation.min_length": 0,
    "generation.max_length": 2,  # one is the start token
}
# Parts of a whole that must leave something of it.
SHARES = frozenset({"model.hidden_dropout", "model.attention_dropout", "optim.label_smoothing"})


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
    # Words that are one token each beside the vocabulary's, on both sides: names of speakers (`train/added_tokens.py`).
    added_tokens: tuple[str, ...] = ()
    # A whole encoder-decoder, BART or PEGASUS, to be fine-tuned and evaluated as a baseline; then nothing is joined.
    seq2seq: str | None = None
    # A folder whose weights are taken over the warm start: of an earlier run of the same two checkpoints.
    init_from: str | None = None
    hidden_dropout: float = 0.1
    # Attention dropout keeps SDPA off its fast path on the CPU: about half the step time. Training warns of it.
    attention_dropout: float = 0.0


@dataclass(frozen=True)
class ExtraData:
    """A further labelled set that is mixed into train: a folder or hub id with a train split, or one file of rows."""

    path: str
    name: str
    licence: str = "unknown"
    non_commercial: bool = False
    # How often an epoch holds each of its rows: 2 is twice, 0.5 a half of them, drawn by optim.seed.
    weight: float = 1.0
    source_column: str = "document"
    target_column: str = "summary"
    references_column: str = "references"


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
    # Lengths of a batch are rounded up to it, where a device prepares itself for every new shape, as GPUs do; 1 is off.
    pad_to_multiple_of: int = 1
    # As an extra's; 0 trains on the extras alone, and still validates on this set: a warm-up for a later run.
    weight: float = 1.0
    extra: tuple[ExtraData, ...] = ()


@dataclass(frozen=True)
class DenoisingConfig:
    """A first stage on unlabelled text that warms the new weights; off while `path` is None.

    Noise after BART (Lewis et al. 2020, arXiv:1910.13461): a span of text becomes one [MASK], sentences change places.
    """

    # A file, or a folder of files, with a row for each text (.jsonl, also .gz and .xz; .json; .csv; .parquet).
    path: str | None = None
    name: str = "unlabelled text"
    licence: str = "unknown"
    non_commercial: bool = False
    text_column: str = "text"
    max_texts: int | None = None
    # Longer texts become several rows of whole sentences.
    max_tokens: int = 128
    mask_share: float = 0.3
    mean_span: float = 3.0
    permute_sentences: bool = True
    epochs: float = 1.0
    # In place of epochs.
    max_steps: int | None = None
    batch_size: int = 32
    # In place of batch_size, as optim.batch_tokens.
    batch_tokens: int | None = None
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    new_weights_learning_rate: float = 8e-4
    warmup_steps: int = 200
    # Texts kept aside for the stage's own validation loss, by which its best checkpoint is chosen.
    held_out: int = 200
    every_steps: int | None = None
    seed: int = 13


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
    schedule: Schedule = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.1
    # R-Drop (Liang et al. 2021, arXiv:2106.14448): weight of the KL divergence between two passes with their own
    # dropout; 0 is one pass.
    r_drop_alpha: float = 0.0
    seed: int = 13
    # auto: bf16 where the device computes in it, fp16 on other CUDA devices, else fp32. Weights stay fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # One kernel for all parameters of a group.
    fused_adamw: bool = True
    # Activations are computed again in the backward pass: less memory, about a third more time.
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    compile_backend: str = "inductor"
    # Processes that make batches ahead of the step, where noise or collating keeps a fast device waiting; 0 is none.
    loader_workers: int = 0
    # With more than one process: ddp holds all weights in each; fsdp shards weights, gradients and optimiser state.
    # auto is fsdp where `accelerate launch` was told to use it, else ddp.
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"


@dataclass(frozen=True)
class RankingConfig:
    """A last stage that ranks a model's own summaries by ROUGE (`train/ranking.py`); off while `paths` is empty.

    After BRIO (Liu et al. 2022, arXiv:2203.16804).
    """

    # Files of `train pseudo-label --keep-candidates`; what they say of one document stands together.
    paths: tuple[str, ...] = ()
    # Of the ranking loss, beside the cross-entropy of the references.
    weight: float = 10.0
    # How much score (log-probability over length ** generation.length_penalty) a point of ROUGE, of 1, should make.
    margin: float = 1.0
    # Of a document and a file; those that come first in its row.
    max_candidates: int = 16


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
class SearchConfig:
    """Ranges for `train search`, as [lowest, highest]; None is not searched, and keeps the value of the run."""

    # On a logarithmic scale.
    learning_rate: tuple[float, float] | None = None
    new_weights_learning_rate: tuple[float, float] | None = None
    # On a linear one.
    weight_decay: tuple[float, float] | None = None
    label_smoothing: tuple[float, float] | None = None
    warmup_steps: tuple[int, int] | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything one run needs. `output_dir` holds its checkpoints, its logs and the best model."""

    name: str
    output_dir: str = "runs/default"
    # Where the Trainer reports its log, besides its own file: each needs its package.
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ranking: RankingConfig = field(default_factory=RankingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    search: SearchConfig = field(default_factory=SearchConfig)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, as it goes into the manifest."""
        return dataclasses.asdict(self)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read `path` and apply overrides such as `optim.epochs=1`.

    Raises:
        ConfigError: no TOML, an unknown key, a wrong type or value, or an override without `=`.
    """
    table = read_toml(path)
    for key, value in parse_words(overrides).items():
        _set(table, key.split("."), value)
    return config_from_dict(table)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: it is not TOML, which is UTF-8.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def parse_words(words: typing.Sequence[str]) -> dict[str, Any]:
    """`key=value` words of a command line; of a key that comes twice, the last.

    Raises:
        ConfigError: a word without `=`.
    """
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"override {word!r} is not of the form key=value")
        values[key] = _parse_value(value)
    return values


def config_from_dict(table: dict[str, Any]) -> RunConfig:
    """Build a `RunConfig` from plain data, refusing what it does not know."""
    config = _build(RunConfig, table, "")
    assert isinstance(config, RunConfig)
    _check_together(config)
    _check_generation(config.generation)
    return config


def _check_generation(generation: GenerationSettings) -> None:
    """Decode settings as the engine will read them from the checkpoint."""
    from app.engine.config import GenerationParams  # with torch

    if generation.min_length > generation.max_length:
        raise ConfigError(
            f"generation.min_length must be at most generation.max_length, {generation.max_length}; "
            f"it is {generation.min_length}"
        )
    try:
        GenerationParams.from_generation_config(dataclasses.asdict(generation))
    except ValueError as error:
        raise ConfigError(f"generation.{error}") from error


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
    stage = config.denoising
    if stage.batch_tokens is not None and stage.batch_tokens < 2 * stage.max_tokens:
        raise ConfigError(
            f"denoising.batch_tokens is {stage.batch_tokens}; the longest row may have {2 * stage.max_tokens} tokens "
            "(twice denoising.max_tokens)"
        )
    if not 0 <= stage.mask_share <= 1 or stage.mean_span < 1:
        raise ConfigError(
            "denoising.mask_share must be from 0 to 1 and denoising.mean_span at least 1; "
            f"they are {stage.mask_share} and {stage.mean_span}"
        )
    lengths = {
        "data.max_source_tokens": data.max_source_tokens,
        "data.max_target_tokens": data.max_target_tokens,
        "denoising.max_tokens": stage.max_tokens if stage.path is not None else 0,
    }
    for name, length in lengths.items():
        if length % data.pad_to_multiple_of:
            raise ConfigError(
                f"{name} is {length}, which is no multiple of data.pad_to_multiple_of, {data.pad_to_multiple_of}: "
                "the longest rows would pass it"
            )
    if data.streaming and (data.extra or data.weight != 1):
        raise ConfigError("data.extra and data.weight are for sets in memory; data.streaming reads one set as it is")
    if data.streaming and optim.max_steps is None:
        raise ConfigError("data.streaming has no end: set optim.max_steps")
    if data.streaming and config.eval.every_steps is None:
        raise ConfigError("data.streaming has no epochs to evaluate after: set eval.every_steps")
    ranking = config.ranking
    if ranking.paths:
        apart = {
            "data.streaming": data.streaming,
            "data.padding = max_length": data.padding == "max_length",
            "optim.r_drop_alpha": optim.r_drop_alpha,
            "optim.parallel = fsdp": optim.parallel == "fsdp",
            "denoising.path": stage.path,
        }
        if wrong := [name for name, given in apart.items() if given]:
            raise ConfigError(f"ranking.paths does not go with {', '.join(wrong)}")
        if ranking.weight < 0 or ranking.margin < 0 or ranking.max_candidates < 2:
            raise ConfigError(
                "ranking.weight and ranking.margin must not be negative, and ranking.max_candidates at least 2; they "
                f"are {ranking.weight}, {ranking.margin} and {ranking.max_candidates}"
            )
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
            _check_range(f"{where}{key}", values[key])
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}{missing[0]} is missing")
    return cls(**values)


def _check_range(name: str, value: Any) -> None:
    """A number that is one, and not below or above what the setting may be."""
    if not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number; it is {value}")
    setting = re.sub(r"\[\d+\]", "", name)
    least = LEAST.get(setting)
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}; it is {value}")
    if setting in SHARES and not 0 <= value < 1:
        raise ConfigError(f"{name} must be at least 0 and below 1; it is {value}")


def _checked(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{where} must be one of {', '.join(get_args(hint))}; it is {value!r}")
        return value
    several = next((t for t in (hint, *get_args(hint)) if get_origin(t) is tuple), None)
    if several is not None and value is not None:
        return _checked_list(get_args(several), value, where)
    allowed = get_args(hint) or (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in allowed:
        names = " or ".join(t.__name__ for t in allowed if t is not type(None))
        raise ConfigError(f"{where} must be of type {names}; it is {value!r}")
    return value


def _checked_list(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A TOML array: of any length where the type is `tuple[X, ...]`, else of as many values as the type has."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} is a list, not the value {value!r}")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    if len(hints) != len(value):
        raise ConfigError(f"{where} must have {len(hints)} values; it has {len(value)}")
    checked = []
    for number, (hint, item) in enumerate(zip(hints, value, strict=True)):
        place = f"{where}[{number}]"
        if not dataclasses.is_dataclass(hint):
            checked.append(_checked(hint, item, place))
        elif isinstance(item, dict):
            checked.append(_build(typing.cast("type[Any]", hint), item, f"{place}."))
        else:
            raise ConfigError(f"{place} is a section, not the value {item!r}")
    return tuple(checked)
