"""Reading, the preflight, and labels that teach what they should."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest
from datasets import Dataset

from train.config import DataConfig
from train.data import DataError, Pair, data_hash, document_key, format_preflight, preflight, read_split, tokenise
from train.warm_start import load_tokenizer

from .conftest import CLS, SEP

ROWS = [{"id": "a", "document": "w1 w2", "summary": "w1"}, {"id": "b", "document": "w3, w4", "summary": 'w"3'}]
PAIRS = [Pair("a", "w1 w2", ("w1",)), Pair("b", "w3, w4", ('w"3',))]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write(folder: Path, name: str) -> None:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_bytes(LINES)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES))
    elif name.endswith(".xz"):
        path.write_bytes(lzma.compress(LINES))
    elif name.endswith(".csv"):
        Dataset.from_list(ROWS).to_csv(path, index=False)
    else:
        Dataset.from_list(ROWS).to_parquet(path)


@pytest.mark.parametrize("name", ["test.jsonl", "test.jsonl.gz", "test.jsonl.xz", "test.csv", "test.parquet"])
def test_every_format_reads_alike(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    assert read_split(DataConfig(path=str(tmp_path)), "test") == PAIRS


def write_rows(folder: Path, *rows: dict[str, object]) -> DataConfig:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(path=str(folder))


def test_all_references_are_kept(tmp_path: Path) -> None:
    config = write_rows(tmp_path, {"document": "w1", "summary": "w9", "references": ["w2", "w3"]})
    assert read_split(config, "train") == [Pair("0", "w1", ("w2", "w3"))]


def test_a_row_without_a_list_of_references_has_its_one_summary(tmp_path: Path) -> None:
    rows = [{"document": "w1", "summary": "w2", "references": ["w3", "w4"]}, {"document": "w5", "summary": "w6"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = read_split(DataConfig(path=str(tmp_path)), "test")
    assert [pair.references for pair in pairs] == [("w3", "w4"), ("w6",)]


@pytest.mark.parametrize("column", ["decoder_input_ids", "labels"])
def test_data_that_bring_decoder_inputs_are_refused(tmp_path: Path, column: str) -> None:
    config = write_rows(tmp_path, {"document": "w1", "summary": "w2", column: [1, 2]})
    with pytest.raises(DataError, match=column):
        read_split(config, "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"document": " ", "summary": "w1"}, "row 0: document and summary must be non-empty"),
        ({"document": "w1", "summary": ""}, "row 0"),
        ({"document": "w1", "references": []}, "row 0"),
        ({"document": "w1", "references": "w2"}, "row 0: references must be a list"),
        ({"body": "w1", "summary": "w2"}, "no column document or .*; it has body, summary"),
        ({"document": "w1", "title": "w2"}, "no column summary or highlights"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_refused(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_split(write_rows(tmp_path, row), "train")


def test_a_missing_split_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file test\.jsonl"):
        read_split(DataConfig(path=str(tmp_path)), "test")


@pytest.mark.parametrize(
    "beside", ["test.backup.jsonl", "test.0.jsonl", "test.old.csv", "test.jsonl.bak", "test.a.jsonl.gz"]
)
def test_a_file_that_only_begins_like_a_split_is_not_read(tmp_path: Path, beside: str) -> None:
    (tmp_path / beside).write_text('{"document": "w8", "summary": "w9"}\n', encoding="utf-8")
    config = DataConfig(path=str(tmp_path))
    with pytest.raises(DataError, match=r"no file test\.jsonl"):
        read_split(config, "test")
    write(tmp_path, "test.jsonl")
    assert read_split(config, "test") == PAIRS


@pytest.mark.parametrize("beside", ["test.csv", "test.jsonl.gz", "test.parquet"])
def test_two_files_of_a_split_are_refused_by_name(tmp_path: Path, beside: str) -> None:
    for name in ("test.jsonl", beside):
        write(tmp_path, name)
    with pytest.raises(DataError, match="more than one file of test, ") as error:
        read_split(DataConfig(path=str(tmp_path)), "test")
    assert ", ".join(sorted(("test.jsonl", beside))) in str(error.value)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"document": "w1", "summ', encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.jsonl cannot be read: "):
        read_split(DataConfig(path=str(tmp_path)), "test")


def test_leaks_and_repeats_are_dropped_from_train_and_reported(base: Path) -> None:
    splits = {
        "train": [Pair(str(i), text, ("w1",)) for i, text in enumerate(["w1 w2", "W3, w4!", "w5", "w5 ", "w6"])],
        "validation": [Pair("v", "w3 W4", ("w1",))],
        "test": [Pair("t", "w6.", ("w1",)), Pair("u", "w7", ("w1",))],
    }
    tokenizer = load_tokenizer(str(base))
    kept, reports = preflight(splits, tokenizer, DataConfig())
    assert [pair.document for pair in kept["train"]] == ["w1 w2", "w5"]
    assert kept["validation"] == splits["validation"]
    assert kept["test"] == splits["test"]
    assert reports["train"].leaks == {"validation": 1, "test": 1}
    assert (reports["train"].pairs, reports["train"].duplicates, reports["train"].dropped) == (5, 1, 3)
    text = format_preflight(reports, DataConfig())
    assert "1 rows of validation also stand in train." in text
    assert "Dropped 3 rows of train (leaks and repeats); 2 remain." in text

    kept, reports = preflight(splits, tokenizer, DataConfig(drop_duplicates=False))
    assert [pair.document for pair in kept["train"]] == ["w1 w2", "w5", "w5 "]


def test_preflight_counts_what_will_be_cut(base: Path) -> None:
    splits = {"train": [Pair("a", "w1 " * 9, ("w2 " * 5,)), Pair("b", "w1", ("w2",))]}
    report = preflight(splits, load_tokenizer(str(base)), DataConfig(max_source_tokens=10, max_target_tokens=7))[1]
    assert (report["train"].truncated_sources, report["train"].truncated_targets) == (1, 0)
    assert (report["train"].source_tokens_max, report["train"].target_tokens_max) == (11, 7)


def test_references_that_rouge_has_no_tokens_for_are_counted_and_said(base: Path) -> None:
    known = Pair("a", "w1", ("w1", "42", "...", "\u041f\u0440\u0438\u0432\u0435\u0442 w2"))
    unknown = Pair("b", "w2", ("\u041f\u0440\u0438\u0432\u0435\u0442", "w1", "\u4f60\u597d\u3002"))
    splits = {"train": [known], "validation": [known, unknown]}
    reports = preflight(splits, load_tokenizer(str(base)), DataConfig())[1]
    assert {name: report.unscorable_references for name, report in reports.items()} == {"train": 0, "validation": 2}
    warned = [line for line in format_preflight(reports, DataConfig()).splitlines() if line.startswith("warning")]
    assert [line[: line.index(" have")] for line in warned] == ["warning: 2 references of validation"]


def test_labels_carry_no_start_token_and_keep_the_end_token_when_cut(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    config = DataConfig(max_source_tokens=6, max_target_tokens=5)
    short, long = Pair("a", "w1", ("w2 w3",)), Pair("b", "w1 " * 20, ("w2 w3 w4 w5 w6 w7",))
    rows = tokenise([short, long], tokenizer, config)
    assert set(rows.column_names) == {"input_ids", "labels"}
    assert rows[0]["labels"] == [*tokenizer.convert_tokens_to_ids(["w2", "w3"]), SEP]
    assert rows[1]["labels"] == [*tokenizer.convert_tokens_to_ids(["w2", "w3", "w4"]), SEP]
    assert all(CLS not in labels for labels in rows["labels"])
    assert [len(ids) for ids in rows["input_ids"]] == [3, 6]
    assert rows[1]["input_ids"][-1] == SEP


def test_the_key_ignores_case_spacing_and_punctuation_only() -> None:
    assert document_key("Ann:  Hi, you!") == document_key("ann hi\nyou")
    assert document_key("ann hi you") != document_key("ann hi yo")


def test_the_hash_sees_every_text_and_where_it_ends() -> None:
    pair = Pair("a", "b", ("c",))
    others = [Pair("a", "b", ("c", "")), Pair("ab", "", ("c",)), Pair("a", "b", ("d",))]
    assert data_hash([pair]) == data_hash([Pair("a", "b", ("c",))])
    assert len({data_hash([p]) for p in (pair, *others)}) == 4
    assert data_hash([pair, others[0]]) != data_hash([others[0], pair])
