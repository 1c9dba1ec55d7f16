"""One TOML file, overrides, and refusals that name the key."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import SchedulerType, get_scheduler

from train.__main__ import main
from train.config import LEAST, SHARES, ConfigError, RunConfig, Schedule, config_from_dict, load_config

CONFIGS = Path(__file__).parents[3] / "train" / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('name = "a"\n[optim]\nepochs = 2\n', encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path).name


def test_defaults_fill_what_the_file_leaves_out(file: Path) -> None:
    config = load_config(file)
    assert config == RunConfig(name="a", optim=config.optim)
    assert config.optim.epochs == 2.0
    assert isinstance(config.optim.epochs, float)


def test_overrides_win_and_may_open_a_section(file: Path) -> None:
    words = ["optim.epochs=1", "optim.learning_rate=1e-4", "model.share_embeddings=true", "data.path=../x/y=z"]
    config = load_config(file, words)
    assert (config.optim.epochs, config.optim.learning_rate) == (1.0, 1e-4)
    assert config.model.share_embeddings is True
    assert config.data.path == "../x/y=z"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.epochs", "not of the form key=value"),
        ("optim.epoch=1", "optim.epoch is not a setting; known here: .*epochs"),
        ("optim.batch_size=1.5", "optim.batch_size must be of type int"),
        ("optim.epochs=true", "optim.epochs must be of type float"),
        ("optim.precision=int8", "must be one of auto, fp32, bf16, fp16"),
        ("optim=3", "optim is a section"),
        ("name.first=a", "name is a value, not a section"),
    ],
)
def test_a_wrong_override_is_refused_by_name(file: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, [word])


def test_a_name_is_needed() -> None:
    with pytest.raises(ConfigError, match="name is missing"):
        config_from_dict({})


def test_what_is_not_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("name =", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(path)


def test_a_configuration_survives_the_manifest(file: Path) -> None:
    config = load_config(file)
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.batch_tokens=600"], r"batch_tokens is 600; the longest row may have 640 tokens"),
        (["optim.batch_tokens=640", "optim.grouping=none"], "must not be"),
        (["optim.parallel=fsdp", "optim.torch_compile=true"], "torch_compile is not supported"),
        (["optim.parallel=tp"], "must be one of auto, ddp, fsdp"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(file: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, words)
    load_config(file, ["optim.batch_tokens=640"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.pad_to_multiple_of=48"], r"data\.max_source_tokens is 512, which is no multiple of .*, 48"),
        (
            ["data.pad_to_multiple_of=16", "denoising.path=x", "denoising.max_tokens=100"],
            r"denoising\.max_tokens is 100",
        ),
        (["optim.loader_workers=-1"], r"optim\.loader_workers must be at least 0; it is -1"),
    ],
)
def test_what_a_device_or_a_loader_cannot_do_is_refused(file: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, words)


# The least value of a setting may need others than the defaults beside it.
GOES_WITH: dict[str, dict[str, Any]] = {
    "optim.batch_tokens": {"optim": {"batch_tokens": 5}, "data": {"max_source_tokens": 3, "max_target_tokens": 2}},
    "denoising.batch_tokens": {"denoising": {"batch_tokens": 6, "max_tokens": 3}},
    "generation.max_length": {"generation": {"min_length": 2}},
}


def with_value(setting: str, value: float) -> dict[str, Any]:
    """A table with one setting; of `data.extra` the first one's."""
    section, *more, key = setting.split(".")
    if more:
        return {"name": "a", section: {more[0]: [{"path": "p", "name": "n", key: value}]}}
    return {"name": "a", section: {key: value}}


@pytest.mark.parametrize("setting", LEAST)
def test_a_value_below_the_least_is_refused_by_name(setting: str) -> None:
    least, name = LEAST[setting], setting.replace("extra.", "extra[0].")
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)} must be at least {least}; it is {least - 1}(\.0)?$"):
        config_from_dict(with_value(setting, least - 1))
    table = with_value(setting, least)
    for section, values in GOES_WITH.get(setting, {}).items():
        table[section] = {**table.get(section, {}), **values}
    config_from_dict(table)


@pytest.mark.parametrize("setting", sorted(SHARES))
@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5])
def test_a_share_is_below_one(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{setting} must be at least 0 and below 1; it is {value}"):
        config_from_dict(with_value(setting, value))
    config_from_dict(with_value(setting, 0.0))
    config_from_dict(with_value(setting, 0.99))


@pytest.mark.parametrize("word", ["optim.learning_rate=nan", "optim.epochs=inf", "generation.length_penalty=-inf"])
def test_a_number_is_finite(file: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"{word.split('=')[0]} must be a finite number; it is "):
        load_config(file, [word])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generation.num_beams=0"], r"^generation\.num_beams must be at least 1; it is 0"),
        (["generation.no_repeat_ngram_size=-1"], r"^generation\.no_repeat_ngram_size must be at least 0; it is -1"),
        (["generation.length_penalty=1e9"], r"^generation\.length_penalty must be from -\S+ to \S+; it is 1000000000"),
        (["generation.max_length=1", "generation.min_length=0"], r"generation\.max_length must be at least 2; it is 1"),
        (["generation.min_length=-1"], r"generation\.min_length must be at least 0; it is -1"),
        (
            ["generation.min_length=17", "generation.max_length=16"],
            r"generation\.min_length must be at most generation\.max_length, 16; it is 17",
        ),
    ],
)
def test_decode_settings_that_the_engine_refuses_are_refused_at_load(
    file: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, words)
    load_config(file, ["generation.min_length=16", "generation.max_length=16"])


@pytest.mark.parametrize("kind", list(SchedulerType))
def test_schedules_are_those_of_transformers_that_need_nothing_more(file: Path, kind: SchedulerType) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    try:
        get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=4)
    except (TypeError, ValueError):
        with pytest.raises(ConfigError, match=f"optim.schedule must be one of .*; it is '{kind.value}'"):
            load_config(file, [f"optim.schedule={kind.value}"])
    else:
        assert load_config(file, [f"optim.schedule={kind.value}"]).optim.schedule == kind.value


def test_no_schedule_is_unknown_to_transformers(file: Path) -> None:
    assert set(get_args(Schedule)) <= {kind.value for kind in SchedulerType}
    with pytest.raises(ConfigError, match=r"optim.schedule must be one of linear, .*; it is 'cosin'"):
        load_config(file, ["optim.schedule=cosin"])


def test_what_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes('name = "\u00fc"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.toml is not UTF-8: "):
        load_config(path)


def test_the_words_of_a_command_are_read_without_torch() -> None:
    code = "import sys, train.config, train.__main__ as m; m.parser(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--model", "m", "--limit"],
        ["pseudo-label", "--model", "m", "--output", "o.jsonl", "--limit"],
        ["search-decoding", "--model", "m", "--rows"],
        ["average", "--run", "r", "--rows"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_count_of_rows_below_one_is_refused(words: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*words[:-1], f"{words[-1]}={value}"])
    assert left.value.code == 2
    assert f"argument {words[-1]}: must be at least 1; it is {value}" in capsys.readouterr().err
