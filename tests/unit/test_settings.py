"""Settings: their environment, and values that depend on the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings, resolve_device, resolve_dtype, resolve_max_encode_tokens, resolve_num_threads
from tests.service import read_settings


def test_environment_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECIS_PORT", "9")
    monkeypatch.setenv("PRECIS_CORS_ORIGINS", "https://a.example, https://b.example")
    monkeypatch.setenv("PRECIS_MAX_OUTPUT_TOKENS", "")
    settings = read_settings()
    assert settings.port == 9
    assert settings.cors_origins == ["https://a.example", "https://b.example"]
    assert settings.max_output_tokens is None
    assert settings.max_queue_tokens >= (64 + settings.max_num_seqs) * 512
    assert settings.max_num_beams >= 8
    assert settings.max_batch_size >= 32


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "x"), ("DEVICE", "tpu"), ("MAX_NUM_BEAMS", "0"), ("DTYPE", "int4")]
)
def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"PRECIS_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        read_settings()


def test_every_setting_is_described_and_secrets_are_hidden() -> None:
    assert all(field.description for field in Settings.model_fields.values())
    dumped = read_settings(hub_token="hf_secret").model_dump_json()
    assert "hf_secret" not in dumped


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_threads_follow_the_quota(tmp_path: Path, files: dict[str, str], threads: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert resolve_num_threads(None, tmp_path) == (threads or resolve_num_threads(None, tmp_path / "none"))
    assert resolve_num_threads(5, tmp_path) == 5


def test_what_is_named_is_kept() -> None:
    assert resolve_device("cuda:1") == "cuda:1"
    assert resolve_dtype("float16", "cpu") == "float16"
    assert resolve_max_encode_tokens(100, "cpu") == 100
    assert resolve_max_encode_tokens(None, "cpu") < resolve_max_encode_tokens(None, "cuda")
    assert resolve_dtype("auto", "cpu") in ("float32", "bfloat16")
