"""An evaluation from folder to JSON, and which rows it is made on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from train.__main__ import main
from train.config import DataConfig
from train.data import Pair, data_hash, read_split
from train.evaluate import data_settings, evaluate, read_rows, score, summarise_rows
from train.metrics import rouge
from train.records import EvaluationError, weights_hash
from train.summarise import Summary

from .conftest import make_pairs, write_split


def test_score_follows_the_choice_of_references() -> None:
    pairs = [Pair("a", "w9", ("w1", "w2")), Pair("b", "w9", ("w3", "w4"))]
    means = {
        use: score(["w2", "w3"], pairs, use)["scores"]["model"]["rouge1"]["mean"] for use in ("first", "mean", "best")
    }
    assert means == {"first": 50.0, "mean": 50.0, "best": 100.0}


def test_an_evaluation_from_folder_to_json(
    exported: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "test.json"
    words = ["evaluate", "--model", str(exported), "--data", str(data), "--output", str(output)]
    assert main([*words, "--references", "best", "--limit", "5"]) == 0
    captured = capsys.readouterr()
    assert "ROUGE-2" in captured.out
    assert "lead3" in captured.out
    assert "5/5 rows" in captured.err
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["model"] == {"name": "tiny", "version": "1.0.0", "weights_sha256": weights_hash(exported)}
    pairs = read_split(DataConfig(path=str(data)), "test")[:5]
    expected = {"name": data.name, "split": "test", "rows": 5, "sha256": data_hash(pairs), "leaks_dropped": None}
    assert result["data"] == expected
    assert [row["id"] for row in result["rows"]] == [pair.id for pair in pairs]
    assert result["settings"]["references"] == "best"
    assert result["settings"]["generation"]["num_beams"] == 2
    assert {"torch", "transformers", "rouge-score"} < set(result["libraries"])
    found = rouge([row["prediction"] for row in result["rows"]], [pair.references for pair in pairs], "best")
    assert result["scores"]["model"]["rouge1"]["mean"] == pytest.approx(found["rouge1"], abs=0.01)


def test_the_manifest_says_how_the_data_are_read_and_the_command_line_wins(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = shutil.copytree(exported, tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    (data / "test.csv").write_text("talk,gist,title\nw1 w2,w3,w4\nw5 w6,w7,w8\n", encoding="utf-8")
    manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
    manifest["settings"]["data"] |= {"source_column": "talk", "target_column": "gist"}
    (model / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    words = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out.json")]

    def hash_read(*more: str) -> str:
        assert main([*words, *more]) == 0
        return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["data"]["sha256"]

    def expected(column: str) -> str:
        return data_hash(read_split(DataConfig(path=str(data), source_column="talk", target_column=column), "test"))

    assert hash_read() == expected("gist")
    assert hash_read("--target-column", "title") == expected("title")
    capsys.readouterr()
    assert main([*words, "--source-column", "none"]) == 2
    assert "no column none" in capsys.readouterr().err


def test_the_run_knows_where_the_data_are(exported: Path, run: Path, data: Path, tmp_path: Path) -> None:
    for folder in (run, run / "best"):
        assert data_settings(exported, folder).path == str(data)
    assert data_settings(exported, run, path="elsewhere").path == "elsewhere"
    with pytest.raises(EvaluationError, match="has no run"):
        data_settings(exported, tmp_path)


def test_what_the_manifest_says_is_what_the_run_was_told(exported: Path, run: Path, data: Path) -> None:
    record = json.loads((run / "best" / "run.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(dataclasses.asdict(data_settings(exported, run)))) == record["config"]["data"]
    # Of a folder only its end is told to others.
    assert data_settings(exported).path == f"{data.parent.name}/{data.name}"


def test_a_run_is_evaluated_as_it_would_be_exported(
    run: Path, exported: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file holds shared weights once, and it knows where its data are."""
    output = tmp_path / "run.json"
    assert main(["evaluate", "--model", str(run), "--output", str(output)]) == 0
    assert "ROUGE-2" in capsys.readouterr().out
    found, expected = json.loads(output.read_text(encoding="utf-8")), evaluate(exported, DataConfig(path=str(data)))
    assert found["scores"] == expected["scores"]
    assert found["model"] == {"name": "tiny", "version": None, "weights_sha256": weights_hash(run / "best")}
    assert found["data"]["sha256"] == expected["data"]["sha256"]


def test_a_model_without_a_manifest_needs_the_data(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(EvaluationError, match="give --data"):
        data_settings(tmp_path)
    assert data_settings(tmp_path, path="x") == DataConfig(path="x")


def test_long_sources_are_cut_and_counted(exported: Path, tmp_path: Path) -> None:
    write_split(tmp_path, "test", [Pair("long", "w1 " * 100, ("w1",)), *make_pairs(1)])
    assert evaluate(exported, DataConfig(path=str(tmp_path)))["truncated_sources"] == 1


def test_one_row_has_no_interval(exported: Path, data: Path) -> None:
    with pytest.raises(EvaluationError, match="two rows"):
        evaluate(exported, DataConfig(path=str(data)), limit=1)


def test_rows_that_stand_in_train_are_left_out_if_asked_for(tmp_path: Path) -> None:
    rows = make_pairs(4)
    write_split(tmp_path, "test", rows)
    # The same letters and digits, written otherwise.
    write_split(tmp_path, "train", [Pair("t", f" {rows[1].document.upper()}. ", ("w1",)), *make_pairs(2, seed=1)])
    data = DataConfig(path=str(tmp_path))
    assert [pair.id for pair in read_rows(data).pairs] == [pair.id for pair in rows]
    assert read_rows(data).leaks_dropped is None
    kept = read_rows(data, drop_leaks=True)
    assert [pair.id for pair in kept.pairs] == ["0_0", "0_2", "0_3"]
    assert kept.leaks_dropped == 1
    # The limit counts rows that are kept.
    assert [pair.id for pair in read_rows(data, limit=2, drop_leaks=True).pairs] == ["0_0", "0_2"]


def test_whatever_summarises_can_be_evaluated(exported: Path, data: Path) -> None:
    rows = read_rows(DataConfig(path=str(data)))

    def first_word(documents: Sequence[str], on_finished: Callable[[int], None] | None = None) -> list[Summary]:
        return [Summary(text.split()[0], 2, len(text), False, False) for text in documents]

    found = summarise_rows(exported, rows, summarise=first_word)
    assert found.texts == [pair.document.split()[0] for pair in rows.pairs]
    assert found.facts["settings"]["decoded_by"] == "its caller"
    assert found.facts["settings"]["generation"]["num_beams"] == 2


@pytest.mark.parametrize(("reference", "warned"), [("\u4f60\u597d", True), ("w1", False)])
def test_references_that_rouge_cannot_tell_apart_are_said(
    reference: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path, "test", [Pair("a", "w1", (reference,)), Pair("b", "w2", ("w3",))])
    read_rows(DataConfig(path=str(tmp_path)))
    assert ("warning: 1 references of test have letters" in capsys.readouterr().err) is warned


@pytest.mark.parametrize("option", ["--against", "--against-rows", "--seeds", "--metric"])
def test_what_goes_into_a_report_asks_for_one(
    exported: Path, data: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--model", str(exported), "--data", str(data), option, "x"]) == 2
    assert f"{option} goes into a report" in capsys.readouterr().err
