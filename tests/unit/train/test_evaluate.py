"""The lead baseline, intervals, and an evaluation from folder to JSON."""

from __future__ import annotations

import dataclasses
import json
import lzma
import shutil
from pathlib import Path

import pytest

from train.__main__ import main
from train.config import DataConfig
from train.data import Pair, data_hash, read_split
from train.evaluate import (
    EvaluationError,
    data_settings,
    evaluate,
    lead,
    mean_interval,
    paired_difference,
    score,
    weights_hash,
)
from train.metrics import rouge

from .conftest import make_pairs, write_split
from .test_metrics import DATA, needs_data


@needs_data
def test_lead_on_dialogsum_scores_what_is_known() -> None:
    with lzma.open(DATA / "dialogsum" / "test.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    scores = rouge([lead(row["document"]) for row in rows], [row["references"] for row in rows])
    assert scores == pytest.approx({"rouge1": 27.5, "rouge2": 7.2, "rougeL": 21.1}, abs=0.1)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            "#P1#: Hi. You? Me. Us.\n#P2#: Yes.\n\n#P1#: So.\n#P2#: Bye.",
            "#P1#: Hi. You? Me. Us.\n#P2#: Yes.\n#P1#: So.",
        ),
        ("One. Two! Three? Four.", "One. Two! Three?"),
        ("One is\nhere. Two.\nThree. Four.", "One is here. Two. Three."),
        ("Only one sentence", "Only one sentence"),
        ("Note: this is prose. Two. Three. Four.", "Note: this is prose. Two. Three."),
    ],
)
def test_lead_takes_turns_of_a_dialogue_and_sentences_of_prose(document: str, expected: str) -> None:
    assert lead(document) == expected


def test_an_interval_holds_its_mean_and_is_the_same_again() -> None:
    values = [float(i % 10) for i in range(200)]
    interval = mean_interval(values)
    assert interval == mean_interval(values)
    assert interval.mean == 4.5
    # The normal approximation: 1.96 x 2.872 / sqrt(200) = 0.398.
    assert interval.low == pytest.approx(4.10, abs=0.03)
    assert interval.high == pytest.approx(4.90, abs=0.03)
    assert interval.p_value is None


def test_a_paired_difference_sees_what_unpaired_intervals_hide() -> None:
    baseline = [float(10 * (i % 10)) for i in range(100)]
    values = [value + 1 + (i % 2) for i, value in enumerate(baseline)]
    difference = paired_difference(values, baseline)
    assert difference.mean == 1.5
    assert difference.low > 1
    assert difference.p_value is not None
    assert difference.p_value < 0.001
    assert mean_interval(values).low < mean_interval(baseline).high


def test_no_difference_has_p_one() -> None:
    difference = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (difference.mean, difference.low, difference.high, difference.p_value) == (0.0, 0.0, 0.0, 1.0)


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
    assert result["data"] == {"name": data.name, "split": "test", "rows": 5, "sha256": data_hash(pairs)}
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


def test_a_model_without_a_manifest_needs_the_data(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="give --data"):
        data_settings(tmp_path)
    assert data_settings(tmp_path, path="x") == DataConfig(path="x")


def test_long_sources_are_cut_and_counted(exported: Path, tmp_path: Path) -> None:
    write_split(tmp_path, "test", [Pair("long", "w1 " * 100, ("w1",)), *make_pairs(1)])
    assert evaluate(exported, DataConfig(path=str(tmp_path)))["truncated_sources"] == 1


def test_one_row_has_no_interval(exported: Path, data: Path) -> None:
    with pytest.raises(EvaluationError, match="two rows"):
        evaluate(exported, DataConfig(path=str(data)), limit=1)
