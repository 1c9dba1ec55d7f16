"""Pseudo-labels: what the teacher says, as a train split that a run reads."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import pytest

from train.__main__ import main
from train.config import DataConfig
from train.data import DataError, read_split
from train.evaluate import evaluate
from train.finetune import finetune
from train.pseudo_label import pseudo_label
from train.records import EvaluationError, weights_hash

from .conftest import make_config


@pytest.fixture(scope="module")
def labelled(exported: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    words = ["pseudo-label", "--model", str(exported), "--data", str(data), "--output", str(folder / "train.jsonl.xz")]
    assert main(words) == 0
    return folder


def test_a_row_is_a_document_of_train_with_the_teachers_summary(labelled: Path, exported: Path, data: Path) -> None:
    settings = DataConfig(path=str(data))
    with lzma.open(labelled / "train.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = read_split(settings, "train")
    assert [(row["id"], row["document"]) for row in rows] == [(pair.id, pair.document) for pair in pairs]
    said = evaluate(exported, settings, "train")["rows"]
    assert [row["summary"] for row in rows] == [row["prediction"] for row in said]


def test_the_teacher_is_named_with_the_licences_of_its_data(labelled: Path, exported: Path) -> None:
    record = json.loads((labelled / "teacher.json").read_text(encoding="utf-8"))
    (teacher,) = record["teachers"]
    assert (teacher["name"], teacher["version"], record["rows"]) == ("tiny", "1.0.0", 16)
    assert teacher["weights_sha256"] == weights_hash(exported)
    assert teacher["generation"]["num_beams"] == 2
    assert (record["device"], record["dtype"]) == ("cpu", "float32")
    assert [(source["name"], source["licence"]) for source in record["sources"]] == [("TinySum", "CC BY-NC-SA 4.0")]


def test_a_run_is_a_teacher_as_its_exported_entry_is(labelled: Path, run: Path, data: Path, tmp_path: Path) -> None:
    """fp32 against the fp16 of the entry: of 16 random summaries few may differ."""
    record = pseudo_label([run], DataConfig(path=str(data)), tmp_path / "train.jsonl", limit=8)
    assert (record["teachers"][0]["name"], record["teachers"][0]["version"], record["rows"]) == ("tiny", None, 8)
    found = read_split(DataConfig(path=str(tmp_path)), "train")
    expected = read_split(DataConfig(path=str(labelled)), "train")
    assert sum(a.references == b.references for a, b in zip(found, expected, strict=False)) >= 6


def test_a_student_learns_from_them_beside_the_references(
    labelled: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    extra = [{"path": str(labelled), "name": "pseudo-labels"}]
    best = finetune(
        make_config(
            base,
            data,
            tmp_path,
            optim={"epochs": 1.0},
            data={"extra": extra, "licence": "Apache-2.0", "non_commercial": False},
        )
    )
    record = json.loads((best / "run.json").read_text(encoding="utf-8"))
    assert record["data"]["train"]["rows"] == 32
    teacher = next(source for source in record["sources"] if "teacher" in source["use"])
    assert teacher["non_commercial"] is True


def test_the_command_takes_several_teachers(exported: Path, run: Path, data: Path, tmp_path: Path) -> None:
    words = ["pseudo-label", "--model", str(exported), str(run), "--candidates", "2", "--closest-to-reference"]
    assert main([*words, "--data", str(data), "--limit", "2", "--output", str(tmp_path / "train.jsonl")]) == 0
    record = json.loads((tmp_path / "teacher.json").read_text(encoding="utf-8"))
    assert [teacher["version"] for teacher in record["teachers"]] == ["1.0.0", None]
    assert record["choice"] == "closest to the reference"
    plain = pseudo_label([exported], DataConfig(path=str(data)), tmp_path / "plain" / "train.jsonl", limit=2)
    assert plain["data"]["documents_sha256"] == record["data"]["documents_sha256"]


def test_the_command_takes_8_bits(exported: Path, data: Path, tmp_path: Path) -> None:
    words = ["pseudo-label", "--model", str(exported), "--data", str(data), "--dtype", "int8", "--limit", "2"]
    assert main([*words, "--output", str(tmp_path / "train.jsonl")]) == 0
    assert json.loads((tmp_path / "teacher.json").read_text(encoding="utf-8"))["dtype"] == "int8"


def test_they_are_written_once(labelled: Path, exported: Path, data: Path) -> None:
    for name in ("train.jsonl.xz", "more.jsonl"):
        with pytest.raises(EvaluationError, match="exists; pseudo-labels are written once"):
            pseudo_label([exported], DataConfig(path=str(data)), labelled / name)


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl.gz", "train"])
def test_another_kind_of_file_is_refused(exported: Path, data: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(EvaluationError, match=r"must end in \.jsonl or \.jsonl\.xz"):
        pseudo_label([exported], DataConfig(path=str(data)), tmp_path / name)


def test_where_the_teacher_says_nothing_there_is_no_row(
    exported: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.pseudo_label.decode_candidates", lambda *_: ([["w1"], [""], ["w2"], [""]], 1))
    record = pseudo_label([exported], DataConfig(path=str(data)), tmp_path / "train.jsonl", limit=4)
    assert (record["rows"], record["empty_summaries"]) == (2, 2)
    assert record["teachers"][0]["truncated_sources"] == 1
    assert len(read_split(DataConfig(path=str(tmp_path)), "train")) == 2


def test_of_several_teachers_and_candidates_the_consensus_is_written(
    exported: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([([["a b", "c d"], [""]], 1), ([["c d", "e f"], ["w1"]], 2)])
    monkeypatch.setattr("train.pseudo_label.decode_candidates", lambda *_: next(found))
    teachers = [exported, exported]
    record = pseudo_label(teachers, DataConfig(path=str(data)), tmp_path / "train.jsonl", limit=2, candidates=2)
    pairs = read_split(DataConfig(path=str(tmp_path)), "train")
    assert [pair.references for pair in pairs] == [("c d",), ("w1",)]
    assert [teacher["name"] for teacher in record["teachers"]] == ["tiny", "tiny"]
    assert [teacher["truncated_sources"] for teacher in record["teachers"]] == [1, 2]
    assert record["teachers"][0]["generation"]["num_return_sequences"] == 2
    assert [source["name"] for source in record["sources"]] == ["TinySum"]


def test_the_candidate_nearest_to_the_first_reference_is_written_if_asked_for(
    exported: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_split(DataConfig(path=str(data)), "train")[0].references[0]
    near = f"{expected} and more"
    monkeypatch.setattr("train.pseudo_label.decode_candidates", lambda *_: ([["so so", "so so so", near]], 0))
    record = pseudo_label(
        [exported], DataConfig(path=str(data)), tmp_path / "train.jsonl", limit=1, closest_to_reference=True
    )
    assert record["choice"] == "closest to the reference"
    assert read_split(DataConfig(path=str(tmp_path)), "train")[0].references == (near,)


def test_a_teacher_gives_no_more_candidates_than_it_has_beams(exported: Path, data: Path, tmp_path: Path) -> None:
    for candidates in (0, 3):
        with pytest.raises(EvaluationError, match=f"from 1 to the 2 beams of .*; it is {candidates}"):
            pseudo_label([exported], DataConfig(path=str(data)), tmp_path / "a.jsonl", candidates=candidates)


def test_documents_need_no_summaries(exported: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "w1 w2 w3"}\n{"text": "w4"}\n', encoding="utf-8")
    record = pseudo_label([exported], DataConfig(path=str(texts)), tmp_path / "train.jsonl", candidates=2)
    assert record["data"]["rows"] == 2
    texts.write_text('{"text": " "}\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 0: text must be a non-empty text"):
        pseudo_label([exported], DataConfig(path=str(texts)), tmp_path / "b" / "train.jsonl")


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pseudo-label", "--model", str(tmp_path), "--output", str(tmp_path / "a.jsonl")]) == 2
    assert "holds neither a model nor a folder best" in capsys.readouterr().err


def test_a_model_that_says_nothing_of_its_data_needs_them(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / "manifest.json").unlink()
    assert main(["pseudo-label", "--model", str(folder), "--output", str(tmp_path / "a.jsonl")]) == 2
    assert "give --data" in capsys.readouterr().err
