"""A streamed training set: the right rows, none twice in a pass, not much held at once, the same for any processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from train import streaming
from train.batching import BatchPlan
from train.config import ConfigError, DataConfig
from train.data import DataError, Pair, data_hash
from train.finetune import finetune
from train.streaming import Feature, StreamedBatches
from train.warm_start import load_tokenizer

from .conftest import make_config, make_pairs, write_split

BY_TOKENS = BatchPlan(rows=0, tokens=100, per_step=2, grouped=True, seed=13)
PAIRS = make_pairs(30, seed=9)


@pytest.fixture
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(base))


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_split(tmp_path, "train", PAIRS)
    return DataConfig(path=str(tmp_path), max_source_tokens=64, max_target_tokens=16, streaming=True, shuffle_window=12)


def documents(batches: Iterator[list[Feature]] | list[list[Feature]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for batch in batches for row in batch]


def one_pass(stream: StreamedBatches, rows: int) -> list[list[Feature]]:
    found: list[list[Feature]] = []
    for batch in stream:
        found.append(batch)
        if sum(map(len, found)) >= rows:
            break
    return found


def test_held_out_documents_are_not_trained_on_and_are_counted(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    leak = Pair("v", PAIRS[4].document.upper() + " !", ("w1",))
    held_out = {"validation": [leak, Pair("v2", "w1", ("w2",))], "test": [leak, leak]}
    stream = StreamedBatches(config, tokenizer, held_out, BY_TOKENS)
    kept = PAIRS[:4] + PAIRS[5:]
    found = documents(one_pass(stream, len(kept)), tokenizer)
    assert sorted(found) == sorted(pair.document for pair in kept)
    assert stream.found() == {"streamed": True, "leaks": {"validation": 1, "test": 2}, "dropped": 1}
    assert stream.used() == {"rows": 29, "sha256": data_hash(kept), "streamed": True}


def test_rows_are_shuffled_within_a_window_only(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    found = documents(one_pass(StreamedBatches(config, tokenizer, {}, BY_TOKENS), 12), tokenizer)
    assert found != [pair.document for pair in PAIRS[:12]]
    assert sorted(found) == sorted(pair.document for pair in PAIRS[:12])


def test_after_the_last_row_the_stream_begins_again_in_another_order(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = documents(one_pass(StreamedBatches(config, tokenizer, {}, BY_TOKENS), 60), tokenizer)
    assert sorted(found[:30]) == sorted(found[30:]) == sorted(pair.document for pair in PAIRS)
    assert found[:30] != found[30:]


def test_two_processes_share_the_stream_of_one(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    one = list(islice(StreamedBatches(config, tokenizer, {}, BY_TOKENS), 20))
    two = [list(islice(StreamedBatches(config, tokenizer, {}, BY_TOKENS, 2, rank), 10)) for rank in range(2)]
    assert [two[at % 2][at // 2] for at in range(20)] == one


def test_no_more_than_a_window_is_read_ahead(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def endless(config: DataConfig, split: str, streaming: bool) -> Iterator[Pair]:
        nonlocal read
        assert streaming
        for read in count(1):
            yield PAIRS[read % 30]

    monkeypatch.setattr(streaming, "iterate_split", endless)
    next(iter(StreamedBatches(config, tokenizer, {}, BY_TOKENS)))
    assert read == config.shuffle_window


def test_a_stream_with_nothing_to_train_on_is_refused(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="none that is not in another split"):
        next(iter(StreamedBatches(config, tokenizer, {"test": PAIRS}, BY_TOKENS)))


def test_a_broken_line_is_refused_when_it_is_reached(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    with (Path(config.path) / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "z", "document": " ", "references": ["w1"]}) + "\n")
    stream = iter(StreamedBatches(config, tokenizer, {}, BY_TOKENS))
    with pytest.raises(DataError, match="row 30: document and summary must be non-empty"):
        list(islice(stream, 40))


def test_a_streamed_run_leaves_the_record_of_a_run(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(
        base,
        data,
        tmp_path,
        data={"streaming": True, "shuffle_window": 8},
        optim={"max_steps": 6, "batch_tokens": 100},
        eval={"every_steps": 3},
    )
    best = finetune(config)
    record = json.loads((best / "run.json").read_text(encoding="utf-8"))
    assert record["data"]["train"]["rows"] == 16
    assert record["preflight"]["train"]["dropped"] == 0
    assert (tmp_path / "checkpoint-6").is_dir()


def test_a_streamed_run_goes_on_where_it_was(base: Path, data: Path, tmp_path: Path) -> None:
    """Beyond the first pass over the rows, with accumulation."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"streaming": True, "shuffle_window": 8},
        "optim": {"max_steps": 8, "batch_size": 2, "gradient_accumulation": 2},
        "eval": {"every_steps": 5, "save_total_limit": 9},
    }
    finetune(make_config(base, data, tmp_path / "straight", **sections))
    shutil.copytree(tmp_path / "straight" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    finetune(make_config(base, data, tmp_path / "resumed", **sections), resume=True)
    expected, found = (
        load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("straight", "resumed")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {}, "eval": {"every_steps": 3}}, "set optim.max_steps"),
        ({"optim": {"max_steps": 3}}, "set eval.every_steps"),
    ],
)
def test_a_stream_needs_an_end_and_evaluations(
    base: Path, data: Path, tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(base, data, tmp_path, data={"streaming": True}, **sections)
