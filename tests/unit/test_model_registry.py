"""The store: which model is meant, and that its files are the ones exported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from app.errors import ModelCorrupt, ModelNotFound
from app.model_registry import find_model, list_models

FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
}


def add(store: Path, name: str, version: str, manifest: bool = True) -> Path:
    folder = store / name / version
    folder.mkdir(parents=True)
    for file, data in FILES.items():
        (folder / file).write_bytes(data)
    if manifest:
        files = {f: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for f, data in FILES.items()}
        (folder / "manifest.json").write_text(json.dumps({"name": name, "version": version, "files": files}))
    return folder


def test_newest_version_of_the_first_model(tmp_path: Path) -> None:
    for name, version in (("b", "9"), ("a", "1.9"), ("a", "1.10"), ("a", ".partial")):
        add(tmp_path, name, version)
    assert list_models(tmp_path) == [("a", "1.9"), ("a", "1.10"), ("b", "9")]
    entry = find_model(None, tmp_path)
    assert (entry.name, entry.version, entry.verified) == ("a", "1.10", True)
    assert find_model("a@1.9", tmp_path).version == "1.9"
    assert find_model("b", tmp_path).name == "b"
    assert find_model(str(tmp_path / "a" / "1.9"), tmp_path).version == "1.9"
    assert find_model("a@1.9", tmp_path).revision == entry.revision  # same files


@pytest.mark.parametrize("model", [None, "c", "a@2", "./nowhere/at/all"])
def test_not_found(tmp_path: Path, model: str | None) -> None:
    if model is not None:
        add(tmp_path, "a", "1")
    with pytest.raises(ModelNotFound, match="a@1" if model else "no model"):
        find_model(model, tmp_path)


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    folder = add(tmp_path, "a", "1")
    (folder / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ModelCorrupt, match=r"model\.safetensors has sha256"):
        find_model("a", tmp_path)


def test_a_short_file_a_missing_file_and_an_unlisted_file_are_refused(tmp_path: Path) -> None:
    folder = add(tmp_path, "a", "1")
    (folder / "model.safetensors").write_bytes(b"w")
    with pytest.raises(ModelCorrupt, match="has 1 bytes"):
        find_model("a", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelCorrupt, match="missing"):
        find_model("a", tmp_path)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(ModelCorrupt, match="does not list"):
        find_model("a", tmp_path)


def test_a_second_tokenizer_is_vouched_for_and_counts(tmp_path: Path) -> None:
    """It lies in a folder of its own, as `AutoTokenizer` wants it."""
    revision = find_model(str(add(tmp_path, "a", "1")), tmp_path).revision
    folder = add(tmp_path, "a", "2")
    file = folder / "decoder_tokenizer" / "tokenizer.json"
    file.parent.mkdir()
    file.write_bytes(b"{}")
    with pytest.raises(ModelCorrupt, match=r"decoder_tokenizer/tokenizer\.json would be served but"):
        find_model("a@2", tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["decoder_tokenizer/tokenizer.json"] = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert find_model("a@2", tmp_path).revision != revision
    file.write_bytes(b"[]")
    with pytest.raises(ModelCorrupt, match=r"decoder_tokenizer/tokenizer\.json has sha256"):
        find_model("a@2", tmp_path)


@pytest.mark.parametrize(
    "manifest", ["", "[]", '{"files": {"x": 1}}', '{"files": {"../x": {"sha256": "0", "bytes": 1}}}']
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    (add(tmp_path, "a", "1") / "manifest.json").write_text(manifest)
    with pytest.raises(ModelCorrupt, match=r"manifest\.json"):
        find_model("a", tmp_path)


def test_without_a_manifest_it_is_served_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = find_model(str(add(tmp_path, "a", "1", manifest=False)), tmp_path)
    assert not entry.verified
    assert "unverified" in caplog.text
