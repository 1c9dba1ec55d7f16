"""The first stage: texts to rows, noise by seed and epoch, and a second stage that starts from its weights."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from train.__main__ import main
from train.config import ConfigError, DenoisingConfig, GenerationSettings, ModelConfig, RunConfig, config_from_dict
from train.data import DataError, document_key
from train.denoising import DenoisingTrainer, NoisedTexts, read_texts, stage_config, text_rows
from train.finetune import finetune
from train.warm_start import WarmStartError, load_tokenizer, load_weights, starting_point, warm_start

from .conftest import CLS, SEP, VOCABULARY, make_base, make_config

MASK = VOCABULARY.index("[MASK]")


def stage(texts: Path, **values: Any) -> dict[str, Any]:
    """A first stage of seconds."""
    return {
        "path": str(texts),
        "name": "Talk",
        "max_tokens": 16,
        "epochs": 2.0,
        "batch_size": 4,
        "warmup_steps": 0,
        "learning_rate": 2e-3,
        "new_weights_learning_rate": 2e-3,
        "held_out": 4,
        **values,
    }


@pytest.fixture(scope="module")
def noised(base: Path, texts: Path) -> NoisedTexts:
    config = DenoisingConfig(path=str(texts), max_tokens=16, held_out=4)
    tokenizer = load_tokenizer(str(base))
    kept, _, _ = read_texts(config)
    return NoisedTexts(text_rows(kept, tokenizer, config), tokenizer, config)


def test_rows_are_whole_sentences_that_fit_and_no_token_is_lost(base: Path, texts: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    written = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    for text in written:
        rows = text_rows([text], tokenizer, DenoisingConfig(max_tokens=16))["sentences"]
        assert all(sum(map(len, row)) <= 14 for row in rows)
        sentences = [sentence for row in rows for sentence in row]
        assert sentences == tokenizer(text.splitlines(), add_special_tokens=False)["input_ids"]


def test_a_sentence_longer_than_a_row_is_cut_between_words(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    rows = text_rows(["w1 " * 10 + "\nw2"], tokenizer, DenoisingConfig(max_tokens=6))
    assert max(rows["length"][:]) <= 4
    tokens = [token for row in rows["sentences"] for sentence in row for token in sentence]
    assert tokens == tokenizer("w1 " * 10 + "w2", add_special_tokens=False)["input_ids"]


def test_a_word_longer_than_a_row_loses_its_end(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    rows = text_rows(["w1 " + "!" * 9 + " w2"], tokenizer, DenoisingConfig(max_tokens=6))
    kept = [token for row in rows["sentences"] for sentence in row for token in sentence]
    unknown = VOCABULARY.index("[UNK]")
    assert kept == [VOCABULARY.index("w1"), *[unknown] * 4, VOCABULARY.index("w2")]


def test_the_label_is_the_text_whatever_the_noise(noised: NoisedTexts) -> None:
    for epoch in (0, 1):
        noised.set_epoch(epoch)
        for i in range(len(noised)):
            row, sentences = noised[i], noised.rows[i]["sentences"]
            assert row["labels"] == [token for sentence in sentences for token in sentence] + [SEP]
            source = row["input_ids"]
            assert (source[0], source[-1]) == (CLS, SEP)
            kept = [token for token in source[1:-1] if token != MASK]
            assert MASK in source
            assert len(kept) == len(row["labels"]) - 1 - -(-3 * (len(row["labels"]) - 1) // 10)


def test_noise_is_new_in_every_epoch_and_the_same_for_the_same_one(noised: NoisedTexts) -> None:
    def epoch(number: int) -> list[list[int]]:
        noised.set_epoch(number)
        return [noised[i]["input_ids"] for i in reversed(range(len(noised)))]

    first, second = epoch(0), epoch(1)
    assert epoch(0) == first  # whatever was drawn meanwhile, in any order
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 0.8 * len(noised)  # short rows have few ways


def test_sentences_change_places_only_if_asked_to(base: Path, texts: Path) -> None:
    def order_kept(permute: bool) -> bool:
        config = DenoisingConfig(path=str(texts), held_out=4, mask_share=0.0, permute_sentences=permute)
        tokenizer = load_tokenizer(str(base))
        rows = NoisedTexts(text_rows(read_texts(config)[0], tokenizer, config), tokenizer, config)
        return all(rows[i]["input_ids"][1:] == rows[i]["labels"] for i in range(len(rows)))

    assert order_kept(permute=False)
    assert not order_kept(permute=True)


def test_a_row_that_only_fills_up_has_no_labels(noised: NoisedTexts) -> None:
    row, filler = noised[3], noised[~3]
    assert filler["input_ids"] == row["input_ids"]
    assert filler["labels"] == [-100] * len(row["labels"])


def test_texts_kept_aside_are_not_learnt_from_and_the_draw_is_by_seed(texts: Path) -> None:
    config = DenoisingConfig(path=str(texts), held_out=4)
    kept, aside, dropped = read_texts(config)
    assert (len(kept), len(aside), dropped) == (20, 4, 0)
    assert not set(kept) & set(aside)
    assert read_texts(config) == (kept, aside, 0)
    assert read_texts(DenoisingConfig(path=str(texts), held_out=4, seed=14))[1] != aside


def test_documents_of_validation_and_test_are_dropped(texts: Path) -> None:
    config = DenoisingConfig(path=str(texts), held_out=4)
    kept, _, _ = read_texts(config)
    found, _, dropped = read_texts(config, {document_key(kept[0].upper().replace(" ", "  "))})
    assert dropped == 1
    assert kept[0] not in found


def test_a_folder_is_all_its_files_compressed_or_not(texts: Path, tmp_path: Path) -> None:
    lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:10]), encoding="utf-8")
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress("".join(lines[10:]).encode()))
    (tmp_path / "SOURCES.md").write_text("not rows", encoding="utf-8")
    together = read_texts(DenoisingConfig(path=str(tmp_path), held_out=4))
    assert together == read_texts(DenoisingConfig(path=str(texts), held_out=4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "none"}, r"denoising\.path: none is no file"),
        ({"text_column": "body"}, "has no column body; it has text, kind"),
        ({"held_out": 24}, r"24 texts to learn from; denoising\.held_out keeps 24 aside"),
        ({"max_texts": 4}, r"4 texts to learn from"),
    ],
)
def test_what_cannot_be_read_is_refused(texts: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_texts(DenoisingConfig(**{"path": str(texts), "held_out": 4, **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_share": 1.5}, r"mask_share must be from 0 to 1 .* they are 1\.5 and 3"),
        ({"mean_span": 0.5}, "mean_span at least 1"),
        ({"max_tokens": 2}, "max_tokens must be at least 3"),
        ({"batch_tokens": 255}, r"batch_tokens is 255; the longest row may have 256"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"name": "a", "denoising": values})


def test_the_stage_takes_its_own_optimisation_and_the_rest_of_the_run(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path, denoising=stage(tmp_path, batch_tokens=64, max_steps=7))
    own = stage_config(config)
    assert (own.optim.batch_tokens, own.optim.max_steps, own.optim.label_smoothing) == (64, 7, 0.0)
    assert own.optim.precision == config.optim.precision
    assert own.output_dir == str(tmp_path / "denoising")
    assert own.data.max_target_tokens == 16


@pytest.fixture(scope="module")
def two_stages(base: Path, data: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-stages")
    finetune(two_stage_config(base, data, texts, folder))
    return folder


def two_stage_config(base: Path, data: Path, texts: Path, folder: Path) -> RunConfig:
    model = {"hidden_dropout": 0.1}
    return make_config(base, data, folder, model=model, denoising=stage(texts, every_steps=4))


def test_the_second_stage_starts_from_the_first_ones_best(base: Path, data: Path, texts: Path, tmp_path: Path) -> None:
    """At rate 0 it stays there."""
    still = {"learning_rate": 0.0, "new_weights_learning_rate": 0.0, "epochs": 1.0}
    best = finetune(make_config(base, data, tmp_path, optim=still, denoising=stage(texts)))
    found = load_file(best / "model.safetensors")
    expected = load_file(tmp_path / "denoising" / "best" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_first_stage_learns_to_restore_texts(two_stages: Path) -> None:
    log = json.loads((two_stages / "denoising" / "best" / "run.json").read_text(encoding="utf-8"))["log"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.02
    assert not any("eval_rouge2" in entry for entry in log)


def test_the_run_records_its_first_stage(two_stages: Path, data: Path) -> None:
    record = json.loads((two_stages / "best" / "run.json").read_text(encoding="utf-8"))
    assert record["denoising"]["texts"] == 20
    assert record["denoising"]["rows"] >= 20
    assert [source["use"] for source in record["sources"]] == ["denoising", "fine-tuning"]


class Lost(Exception):
    """The machine is gone."""


class LoseMachine(TrainerCallback):
    """At the beginning of a step that no checkpoint holds."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise Lost


def test_a_first_stage_that_is_cut_off_goes_on_where_it_was(
    two_stages: Path, base: Path, data: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch: the noise of the rows to come is that of their epoch."""
    config = two_stage_config(base, data, texts, tmp_path)
    made = DenoisingTrainer.__init__

    def init(self: DenoisingTrainer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.add_callback(LoseMachine())

    with monkeypatch.context() as patched:
        patched.setattr(DenoisingTrainer, "__init__", init)
        with pytest.raises(Lost):
            finetune(config)
    assert (tmp_path / "denoising" / "checkpoint-4").is_dir()
    finetune(config, resume=True)
    for part in ("denoising/best", "best"):
        assert_same_weights(tmp_path / part, two_stages / part)


def test_a_second_stage_that_is_cut_off_does_not_run_the_first_again(
    two_stages: Path, base: Path, data: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(two_stages, tmp_path / "run")
    config = two_stage_config(base, data, texts, copy)
    shutil.rmtree(copy / "best")
    shutil.rmtree(copy / "checkpoint-8")

    def train(*_: Any, **__: Any) -> None:
        raise AssertionError("the first stage has ended")

    monkeypatch.setattr(DenoisingTrainer, "train", train)
    finetune(config, resume=True)
    assert_same_weights(copy / "best", two_stages / "best")
    # Cut off between the stages.
    for name in ("best", "checkpoint-4", "checkpoint-8"):
        shutil.rmtree(copy / name)
    finetune(config, resume=True)
    assert_same_weights(copy / "best", two_stages / "best")


def assert_same_weights(found: Path, expected: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_the_stage_alone_is_a_start_for_any_run(base: Path, data: Path, texts: Path, tmp_path: Path) -> None:
    settings = json.dumps(make_config(base, data, tmp_path / "run", denoising=stage(texts, max_steps=2)).to_dict())
    path = tmp_path / "run.toml"
    path.write_text(toml(json.loads(settings)), encoding="utf-8")
    assert main(["denoise", "--config", str(path)]) == 0
    best = tmp_path / "run" / "denoising" / "best"
    still = {"learning_rate": 0.0, "new_weights_learning_rate": 0.0, "epochs": 1.0}
    run = make_config(base, data, tmp_path / "next", model={"init_from": str(best)}, optim=still)
    assert_same_weights(finetune(run), best)
    record = json.loads((tmp_path / "next" / "best" / "run.json").read_text(encoding="utf-8"))
    assert record["sources"][0]["name"] == "Talk"


def toml(table: dict[str, Any]) -> str:
    """Plain values and one level of sections, as a file; None is left out."""

    def lines(values: dict[str, Any]) -> list[str]:
        plain = {k: v for k, v in values.items() if v is not None and not isinstance(v, dict)}
        return [f"{key} = {json.dumps(value)}" for key, value in plain.items()]

    sections = [["", f"[{key}]", *lines(value)] for key, value in table.items() if isinstance(value, dict)]
    return "\n".join([*lines(table), *(line for section in sections for line in section)])


def test_without_texts_there_is_no_stage(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "a"\n', encoding="utf-8")
    assert main(["denoise", "--config", str(path)]) == 2
    assert "denoising.path is not set" in capsys.readouterr().err


def test_weights_of_another_model_are_refused(run: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(WarmStartError, match="holds no model to start from"):
        load_weights(warm_start(ModelConfig(str(base), str(base)), GenerationSettings()), tmp_path)
    other = make_base(tmp_path / "base", positions=32)
    config = make_config(other, other, tmp_path / "out", model={"init_from": str(run / "best")})
    with pytest.raises(WarmStartError, match="are of another model"):
        starting_point(config)
