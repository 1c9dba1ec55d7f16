"""Averages of checkpoints: the mean, and that validation decides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train.average
from train.__main__ import main
from train.average import average, average_run, format_comparison, last_checkpoints, mean_weights
from train.data import Pair
from train.export import export
from train.records import EvaluationError, weights_hash
from train.warm_start import load_model


@pytest.fixture
def run_copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def test_each_weight_is_the_mean_and_shared_ones_stay_shared(run: Path, tmp_path: Path) -> None:
    folders = [run / "checkpoint-4", run / "checkpoint-8"]
    written = load_file(average(folders, tmp_path / "average") / "model.safetensors")
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert written.keys() == first.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=0, atol=1e-7)
    assert any(float((first[name] - second[name]).abs().max()) > 1e-5 for name in first)
    model, _ = load_model(tmp_path / "average")
    assert model.decoder.get_input_embeddings().weight is model.encoder.get_input_embeddings().weight


def test_the_mean_of_equal_checkpoints_is_that_checkpoint(run: Path) -> None:
    """In fp64 sums there is nothing to round."""
    expected = load_file(run / "checkpoint-8" / "model.safetensors")
    for name, tensor in mean_weights([run / "checkpoint-8"] * 3).items():
        assert torch.equal(tensor, expected[name])


def test_half_precision_checkpoints_are_averaged_in_full(tmp_path: Path) -> None:
    values = (1.0, 1.0009765625)  # neighbours in fp16
    for i, value in enumerate(values):
        (tmp_path / str(i)).mkdir()
        save_file({"w": torch.tensor([value], dtype=torch.float16)}, tmp_path / str(i) / "model.safetensors")
    assert mean_weights([tmp_path / "0", tmp_path / "1"])["w"].item() == sum(values) / 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"other": torch.zeros(2)}, "do not have the same weights: other, w"),
        ({"w": torch.zeros(3)}, "w has several shapes"),
        ({}, "has no .*safetensors"),
    ],
)
def test_what_does_not_fit_is_refused(second: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, weights in zip(folders, ({"w": torch.zeros(2)}, second), strict=True):
        folder.mkdir()
        if weights:
            save_file(weights, folder / "model.safetensors")
    with pytest.raises(EvaluationError, match=message):
        average(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_average_overwrites_nothing(run_copy: Path) -> None:
    with pytest.raises(EvaluationError, match="exists"):
        average([run_copy / "checkpoint-4", run_copy / "checkpoint-8"], run_copy / "best")


def test_the_newest_checkpoints_are_taken_by_their_step(run_copy: Path) -> None:
    (run_copy / "checkpoint-8").rename(run_copy / "checkpoint-12")
    assert [path.name for path in last_checkpoints(run_copy, 2)] == ["checkpoint-4", "checkpoint-12"]
    with pytest.raises(EvaluationError, match=r"2 checkpoints, and 3 were asked for .* eval\.save_total_limit"):
        last_checkpoints(run_copy, 3)


def scores(better: str) -> object:
    def score(folder: Path, pairs: Sequence[Pair]) -> dict[str, list[float]]:
        value = 30.0 if folder.name == better else 20.0
        return {name: [value] * (len(pairs) - 1) + [25.0] for name in ("rouge1", "rouge2", "rougeL")}

    return score


def test_a_better_average_becomes_the_best_and_is_exported(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = load_file(run_copy / "best" / "model.safetensors")
    monkeypatch.setattr(train.average, "_score", scores(better="average"))
    result = average_run(run_copy, 2)
    assert result["kept"] == "average"
    assert result["difference"]["rouge2"]["mean"] == 7.5
    assert "is better, and is now best" in format_comparison(result)
    kept = load_file(run_copy / "best" / "model.safetensors")
    assert any(not torch.equal(kept[name], single[name]) for name in single)
    aside = load_file(run_copy / "best-single" / "model.safetensors")
    assert all(torch.equal(aside[name], single[name]) for name in single)
    record = json.loads((run_copy / "best" / "run.json").read_text(encoding="utf-8"))
    assert record["average"]["checkpoints"] == ["checkpoint-4", "checkpoint-8"]
    assert "best_metric" not in record
    assert "best_checkpoint" not in record
    export(run_copy, run_copy / "store", "1.0.0", parity_rows=2)
    with pytest.raises(EvaluationError, match="is an average already"):
        average_run(run_copy, 2)


@pytest.mark.parametrize("better", ["best", "neither"])
def test_an_average_that_is_not_better_changes_nothing(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, better: str
) -> None:
    before = (run_copy / "best" / "model.safetensors").read_bytes()
    monkeypatch.setattr(train.average, "_score", scores(better))
    result = average_run(run_copy, 2)
    assert result["kept"] == "best"
    assert "is not better than best" in format_comparison(result)
    assert (run_copy / "best" / "model.safetensors").read_bytes() == before
    assert (run_copy / "average" / "model.safetensors").exists()


def test_average_scores_both_on_validation(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the engine and no stand-in: the best checkpoint scores the same as itself, twice."""
    shutil.rmtree(run_copy / "checkpoint-4")
    shutil.rmtree(run_copy / "checkpoint-8")
    for step in (4, 8):
        shutil.copytree(run_copy / "best", run_copy / f"checkpoint-{step}")
    assert main(["average", "--run", str(run_copy), "--last", "2", "--rows", "3"]) == 0
    out = capsys.readouterr().out
    assert "is not better than best" in out
    assert "3 rows of validation" in out
    best, mean = (line.split()[1:] for line in out.splitlines()[1:3])
    assert best == mean


def test_ids_that_mean_other_words_are_not_averaged(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run / "best", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(EvaluationError, match="do not have the same vocabulary"):
        average([run / "best", other], tmp_path / "average")
    assert not (tmp_path / "average").exists()


def test_checkpoints_by_name_are_averaged_into_a_new_folder(run: Path, tmp_path: Path) -> None:
    words = ["average", "--checkpoints", str(run / "checkpoint-4"), str(run / "checkpoint-8")]
    assert main(words) == 2
    assert main([*words, "--output", str(tmp_path / "mean")]) == 0
    load_model(tmp_path / "mean")


def test_an_average_keeps_the_tokenizer_of_summaries(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        (folder / "decoder_tokenizer").mkdir(parents=True)
        (folder / "decoder_tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
        save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    assert (average(folders, tmp_path / "c") / "decoder_tokenizer" / "tokenizer.json").is_file()


def test_the_average_of_runs_has_the_first_ones_record_and_the_data_of_all(run: Path, tmp_path: Path) -> None:
    """And its card says what it is made of."""
    other = shutil.copytree(run, tmp_path / "other")
    path = other / "best" / "run.json"
    theirs = json.loads(path.read_text(encoding="utf-8"))
    theirs["sources"] = [{"name": "Other", "licence": "CC BY-NC 4.0", "non_commercial": True, "use": "fine-tuning"}]
    path.write_text(json.dumps(theirs), encoding="utf-8")
    folder = average([run / "best", other / "best"], tmp_path / "average")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    first = json.loads((run / "best" / "run.json").read_text(encoding="utf-8"))
    assert record["average"]["checkpoints"] == [run.name, "other"]
    assert record["average"]["weights_sha256"] == [weights_hash(run / "best")] * 2
    assert record["sources"] == [*first["sources"], *theirs["sources"]]
    assert record["config"] == first["config"]
    assert "best_metric" in first
    assert "best_metric" not in record

    entry = export(folder, tmp_path / "store", "1.0.0", parity_rows=2)
    card = (entry / "README.md").read_text(encoding="utf-8")
    assert f"the mean of several checkpoints: {run.name}, other." in card
    assert "Other (CC BY-NC 4.0)" in card


def test_checkpoints_of_a_run_have_its_record(run: Path, tmp_path: Path) -> None:
    folder = average([run / "checkpoint-4", run / "checkpoint-8"], tmp_path / "average")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["average"]["checkpoints"] == ["checkpoint-4", "checkpoint-8"]
