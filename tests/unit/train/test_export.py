"""What stands in the model store, and what must never get there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, EncoderDecoderModel

import train.export
from app.engine import Engine, EngineConfig
from app.errors import EngineFailed
from train.__main__ import main
from train.card import format_card
from train.config import DataConfig
from train.data import read_split
from train.export import ExportError, card, export, generated_tokens
from train.warm_start import load_model


def manifest_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def assert_hashes_hold(folder: Path) -> None:
    files = manifest_of(folder)["files"]
    assert isinstance(files, dict)
    assert set(files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": sha256(content).hexdigest(), "bytes": len(content)}


def test_an_entry_has_every_file_and_a_true_manifest(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert expected | {"manifest.json", "model.safetensors"} <= names
    assert_hashes_hold(exported)
    manifest = manifest_of(exported)
    assert (manifest["name"], manifest["version"]) == ("tiny", "1.0.0")
    data = manifest["data"]
    assert isinstance(data, dict)
    assert (data["name"], data["licence"], data["non_commercial"]) == ("TinySum", "CC BY-NC-SA 4.0", True)
    assert data["splits"]["train"]["rows"] == 16
    assert len(data["splits"]["test"]["sha256"]) == 64


def test_weights_are_fp16_and_complete_for_stock_transformers(exported: Path, run: Path) -> None:
    assert {tensor.dtype for tensor in load_file(exported / "model.safetensors").values()} == {torch.float16}
    loaded, loading = EncoderDecoderModel.from_pretrained(exported, output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"]
    trained, _ = load_model(run / "best")
    weights = loaded.state_dict()
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_tokenizer_neither_cuts_nor_pads(exported: Path) -> None:
    stored = json.loads((exported / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored["truncation"] is None
    assert stored["padding"] is None
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert [len(tokenizer.encode(text).ids) for text in ("w1 " * 598, "w1")] == [600, 3]
    assert AutoTokenizer.from_pretrained(exported)("w1")["input_ids"] == tokenizer.encode("w1").ids


def test_the_card_says_non_commercial_and_holds_no_document(exported: Path, data: Path) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    assert "NON-COMMERCIAL USE ONLY" in text
    assert "CC BY-NC-SA 4.0" in text
    assert "Not evaluated yet." in text
    assert "fine-tuned on TinySum for 2 epochs." in text
    for pair in read_split(DataConfig(path=str(data)), "validation")[:3]:
        assert f"| {pair.id} | " in text
        assert pair.document not in text


def test_no_folder_of_the_training_machine_is_named(exported: Path, data: Path, base: Path, run: Path) -> None:
    for file in ("README.md", "manifest.json", "config.json", "generation_config.json", "tokenizer_config.json"):
        text = (exported / file).read_text(encoding="utf-8")
        assert not [folder for folder in (data, base, run) if str(folder) in text], file


def test_the_card_names_a_base_by_its_public_name_only(exported: Path, run: Path, tmp_path: Path, base: Path) -> None:
    tail = f"{base.parent.name}/{base.name}"
    text = (exported / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# tiny 1.0.0\n")
    assert f"Warm-started from `{tail}` (encoder)" in text

    named = shutil.copytree(run / "best", tmp_path / "named")
    record = json.loads((named / "run.json").read_text(encoding="utf-8"))
    record["config"]["model"] |= {"encoder_name": "someone/tiny-bert", "decoder": "owner/hub-id"}
    (named / "run.json").write_text(json.dumps(record), encoding="utf-8")
    folder = export(named, tmp_path / "store", "1.0.0", parity_rows=1)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nbase_model:\n- someone/tiny-bert\n- owner/hub-id\n---\n\n# tiny 1.0.0\n")
    assert "Warm-started from `someone/tiny-bert` (encoder) and `owner/hub-id` (decoder" in text
    assert str(base) not in (folder / "manifest.json").read_text(encoding="utf-8")


def test_a_ranked_run_names_no_folder_of_its_candidates(run: Path, tmp_path: Path) -> None:
    ranked = shutil.copytree(run / "best", tmp_path / "ranked")
    record = json.loads((ranked / "run.json").read_text(encoding="utf-8"))
    record["config"]["ranking"]["paths"] = ["/home/somebody/candidates/train.jsonl"]
    (ranked / "run.json").write_text(json.dumps(record), encoding="utf-8")
    manifest = export(ranked, tmp_path / "store", "1.0.0", parity_rows=1) / "manifest.json"
    assert "somebody" not in manifest.read_text(encoding="utf-8")


def test_a_first_stage_is_not_exported(run: Path, tmp_path: Path) -> None:
    stage = shutil.copytree(run / "best", tmp_path / "denoising")
    record = json.loads((stage / "run.json").read_text(encoding="utf-8"))
    del record["preflight"]
    (stage / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ExportError, match="is a first stage's"):
        export(stage, tmp_path / "store", "1.0.0", parity_rows=1)
    assert not (tmp_path / "store").exists()


def test_everybody_may_read_the_weights(exported: Path) -> None:
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in exported.iterdir())


def test_a_free_data_set_is_not_called_non_commercial(exported: Path) -> None:
    manifest = manifest_of(exported)
    assert isinstance(manifest["data"], dict)
    manifest["data"] |= {"non_commercial": False, "licence": "Apache-2.0"}
    text = format_card(manifest)
    assert "NON-COMMERCIAL" not in text
    assert "whose licence is Apache-2.0" in text


def test_shards_are_read_by_the_engine(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.export, "SHARD_SIZE", "40KB")
    folder = export(run, tmp_path, "1.0.0", parity_rows=2)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert Engine.from_folder(folder, EngineConfig()).info.vocab_size == 65
    assert_hashes_hold(folder)


def differing_in(*dtypes: torch.dtype) -> Callable[[EncoderDecoderModel, list[int]], list[int]]:
    """A `generate` that ends otherwise than the engine when it computes in one of these dtypes."""

    def generate(model: EncoderDecoderModel, source: list[int]) -> list[int]:
        tokens = generated_tokens(model, source)
        return [*tokens[:-1], tokens[-1] + 1] if model.dtype in dtypes else tokens

    return generate


def test_a_difference_in_fp32_passes_if_fp64_sides_with_the_engine(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.export, "generated_tokens", differing_in(torch.float32))
    folder = export(run, tmp_path, "1.0.0", parity_rows=2)
    parity = manifest_of(folder)["parity"]
    assert parity == {"rows": 2, "split": "validation", "dtype": "float32", "settled_in_float64": 2}
    assert "in fp32, except on 2 too close for fp32" in (folder / "README.md").read_text(encoding="utf-8")


def test_where_nothing_differs_nothing_is_settled_in_fp64(exported: Path) -> None:
    assert manifest_of(exported)["parity"] == {
        "rows": 4,
        "split": "validation",
        "dtype": "float32",
        "settled_in_float64": 0,
    }
    assert "fp64" not in (exported / "README.md").read_text(encoding="utf-8")


def test_a_difference_in_fp64_too_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.export, "generated_tokens", differing_in(torch.float32, torch.float64))
    with pytest.raises(ExportError, match=r"differ from token .* fp64 does not side"):
        export(run, tmp_path, "1.0.0")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "tiny" / "1.0.0").exists()


def test_a_weight_that_fp16_cannot_hold_is_refused(run: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(run / "best", tmp_path / "broken")
    model, _ = load_model(broken)
    with torch.no_grad():
        model.decoder.cls.predictions.bias[7] = 1e5
    model.save_pretrained(broken)
    with pytest.raises(ExportError, match="fp16 cannot hold it"):
        export(broken, tmp_path / "store", "1.0.0")


def test_a_version_is_written_once(exported: Path, run: Path) -> None:
    with pytest.raises(ExportError, match="written once"):
        export(run, exported.parents[1], "1.0.0")
    assert_hashes_hold(exported)


@pytest.mark.parametrize(
    ("version", "name", "message"),
    [("1.0", None, "not a version"), ("../1.0.0", None, "not a version"), ("1.0.0", "../up", "not a name")],
)
def test_names_that_cannot_be_are_refused(run: Path, tmp_path: Path, version: str, name: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(run, tmp_path, version, name=name)


def test_a_model_folder_without_its_run_needs_data(run: Path, data: Path, tmp_path: Path) -> None:
    folder = run / "checkpoint-8"
    with pytest.raises(ExportError, match="give --data"):
        export(folder, tmp_path, "1.0.0", name="other")
    manifest = manifest_of(export(folder, tmp_path, "1.0.0", str(data), name="other", parity_rows=2))
    assert manifest["name"] == "other"


def test_export_evaluate_card(exported: Path, data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    files = []
    for split in ("test", "validation"):
        files.append(tmp_path / f"{split}.json")
        words = ["evaluate", "--model", str(folder), "--data", str(data), "--split", split]
        assert main([*words, "--output", str(files[-1])]) == 0
    assert main(["card", "--model", str(folder), "--evaluation", str(files[0]), "--evaluation", str(files[1])]) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Test: 6 rows, against the first reference, decoded in float32; " in text
    assert "Validation: 4 rows" in text
    assert "| lead-3 |" in text
    result = json.loads(files[1].read_text(encoding="utf-8"))
    result["data"]["leaks_dropped"] = 3
    files[1].write_text(json.dumps(result), encoding="utf-8")
    assert main(["card", "--model", str(folder), "--evaluation", str(files[1])]) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Validation: 4 rows (3 whose document also stands in train left out), against" in text
    assert "| difference (paired) |" in text
    manifest = manifest_of(folder)
    assert isinstance(manifest["metrics"], dict)
    assert set(manifest["metrics"]) == {"test", "validation"}
    assert "rows" not in manifest["metrics"]["test"]
    assert_hashes_hold(folder)

    words = [
        "card",
        "--model",
        str(folder),
        "--elsewhere",
        "other talk",
        str(files[1]),
        "--limit",
        "It knows no names.",
    ]
    assert main(words) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Test: 6 rows" in text
    assert "## On other data\n\nIt was not trained on these.\n\nOther talk: 4 rows" in text
    assert "- It knows no names.\n" in text
    assert "on others it was not measured" not in text
    assert_hashes_hold(folder)

    result = json.loads(files[0].read_text(encoding="utf-8"))
    result["model"]["weights_sha256"] = "0" * 64
    files[0].write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(ExportError, match="other weights"):
        card(folder, files)
    assert_hashes_hold(folder)


@pytest.mark.parametrize(
    "words",
    [
        "export --run {tmp}/none --version 1.0.0",
        "export --run {run} --store {tmp} --version 1.0.0 --data {tmp}/none",
        "evaluate --model {tmp}/none",
        "evaluate --model {tmp}",
        "evaluate --model {exported}",
        "evaluate --model {exported} --run {tmp}",
        "evaluate --model {exported} --data {tmp}",
        "evaluate --model {exported} --data {tmp}/broken",
        "evaluate --model {exported} --data {data} --split none",
        "evaluate --model {exported} --data {data} --limit 1",
        "card --model {exported} --evaluation {tmp}/none.json",
        "card --model {exported} --evaluation {tmp}/broken/test.jsonl",
        "finetune --config {tmp}/none.toml",
        "finetune --config {tmp}",
    ],
)
def test_what_the_user_got_wrong_is_one_line(
    words: str,
    exported: Path,
    run: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "test.jsonl").write_text('{"document": "w1", "summ', encoding="utf-8")
    arguments = words.format(tmp=tmp_path, exported=exported, run=run, data=data).split()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Generating")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


@pytest.mark.parametrize("failure", [EngineFailed("a step failed"), ValueError("source tokens: 600 is over the limit")])
def test_what_the_engine_refuses_or_fails_is_one_line(
    failure: Exception,
    exported: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def generate(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(Engine, "generate", generate)
    assert main(["evaluate", "--model", str(exported), "--data", str(data)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: the engine: {failure}"
