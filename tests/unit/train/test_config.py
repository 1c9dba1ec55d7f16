"""One TOML file, overrides, and refusals that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.config import ConfigError, RunConfig, config_from_dict, load_config

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
        (["optim.loader_workers=-1"], "must not be negative; it is -1"),
    ],
)
def test_what_a_device_or_a_loader_cannot_do_is_refused(file: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, words)
