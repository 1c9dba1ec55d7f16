"""Ranking: the loss as written down, each row as if it were alone, steps however they are cut; and it ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from train.__main__ import main
from train.config import ConfigError, DataConfig, RankingConfig
from train.data import DataError, Pair, document_key, read_split, tokenise
from train.finetune import finetune
from train.metrics import rouge
from train.optimization import smoothed_cross_entropy
from train.provenance import sources, sources_of
from train.pseudo_label import pseudo_label
from train.ranking import (
    CANDIDATES,
    IGNORED,
    WORTH,
    candidate_outputs,
    collate_candidates,
    hypothesis_scores,
    loss_of_candidates,
    ranking_loss,
    read_candidates,
    with_candidates,
)
from train.records import EvaluationError
from train.search import search
from train.warm_start import load_model, load_tokenizer

from .conftest import SEP, make_config


def write(file: Path, rows: list[dict[str, Any]]) -> RankingConfig:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RankingConfig(paths=(str(file),))


def row_of(pair: Pair, *candidates: str) -> dict[str, Any]:
    return {"id": pair.id, "document": pair.document, "candidates": list(candidates)}


def shifted(model: Any, labels: torch.Tensor) -> torch.Tensor:
    ids: torch.Tensor = model.prepare_decoder_input_ids_from_labels(labels)
    return ids


@pytest.fixture(scope="module")
def best(run: Path) -> Path:
    return run / "best"


@pytest.fixture(scope="module")
def candidates(best: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run says of its train split, by more beams than its own two."""
    file = tmp_path_factory.mktemp("candidates") / "train.jsonl"
    words = ["pseudo-label", "--model", str(best), "--data", str(data), "--output", str(file), "--keep-candidates"]
    assert (
        main([*words, "--candidates", "4", "--generation", "num_beams=4", "num_beam_groups=2", "diversity_penalty=0.5"])
        == 0
    )
    return file


@pytest.fixture(scope="module")
def batch(best: Path, candidates: Path, data: Path) -> Any:
    """A model, and a batch of three rows with four, no and three candidates."""
    model, tokenizer = load_model(best)
    config = make_config(best, data, best)
    pairs = read_split(config.data, "train")[:3]
    texts = [["w1 w2", "w3", pairs[0].references[0], "w4 w5 w6"], [], ["w7", pairs[2].references[0], "w8 w9"]]
    said = write(candidates.parent / "three.jsonl", [row_of(p, *t) for p, t in zip(pairs, texts, strict=True) if t])
    rows = with_candidates(tokenise(pairs, tokenizer, config.data), pairs, tokenizer, said, 16)

    def collate(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        from transformers import DataCollatorForSeq2Seq

        return dict(DataCollatorForSeq2Seq(tokenizer, model=model)(features))

    collated = collate_candidates(collate)(list(rows))
    collated.pop("decoder_input_ids", None)
    return model.eval(), tokenizer, collated, texts, pairs


def test_the_loss_is_the_mean_of_what_each_pair_lacks() -> None:
    scores, worth = torch.tensor([[-1.0, -0.5, -0.7]]), torch.tensor([[0.5, 0.1, 0.3]])
    there = torch.ones(1, 3, dtype=torch.bool)
    # 0 over 1: 0.4 + 0.5; 0 over 2: 0.2 + 0.3; 2 over 1: 0.2 + 0.2
    torch.testing.assert_close(ranking_loss(scores, worth, there, 1.0), torch.tensor([(0.9 + 0.5 + 0.4) / 3]))
    assert ranking_loss(worth * 2, worth, there, 1.5).item() == 0


def test_candidates_of_equal_worth_and_those_that_are_not_there_are_not_ranked() -> None:
    scores, worth = torch.tensor([[0.0, -5.0, 9.0], [0.0, -1.0, 9.0]]), torch.tensor([[0.3, 0.3, 0.0], [0.2, 0.4, 0.0]])
    there = torch.tensor([[True, True, False], [True, True, False]])
    torch.testing.assert_close(ranking_loss(scores, worth, there, 1.0), torch.tensor([0.0, 1.2]))
    assert ranking_loss(scores[:1], worth[:1], there[:1, :].logical_and(there[:1] & False), 1.0).item() == 0


def test_scores_are_those_of_generates_beams(batch: Any) -> None:
    model, tokenizer, _, _, pairs = batch
    ids = tokenizer(pairs[0].document, return_tensors="pt")
    options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.7, "max_length": 12, "min_length": 0}
    report = {"output_scores": True, "return_dict_in_generate": True}
    said = model.generate(ids["input_ids"], **options, no_repeat_ngram_size=0, **report)
    ends = [(row == SEP).nonzero() for row in said.sequences[:, 1:]]
    rows = [
        row[1 : int(end[0]) + 2 if len(end) else None].tolist() for row, end in zip(said.sequences, ends, strict=True)
    ]
    longest = max(map(len, rows))
    labels = torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for row in rows])
    sources = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
    with torch.no_grad():
        _, logits, there = candidate_outputs(model, sources, labels[:1], labels[None])
    assert there.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(hypothesis_scores(logits, labels, 0.7), said.sequences_scores, atol=1e-5, rtol=1e-5)


def test_a_pass_says_of_each_row_what_it_says_of_it_alone(batch: Any) -> None:
    model, _, collated, _, _ = batch
    sources = {name: collated[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        outputs, logits, there = candidate_outputs(model, sources, collated["labels"], collated[CANDIDATES])
        plain = model(**sources, decoder_input_ids=shifted(model, collated["labels"])).logits
        assert there.tolist() == [0, 1, 2, 3, 8, 9, 10]
        kept = collated["labels"] != IGNORED
        torch.testing.assert_close(outputs.logits[kept], plain[kept], atol=1e-5, rtol=1e-5)
        for number, place in enumerate(there.tolist()):
            row, label = place // 4, collated[CANDIDATES].flatten(0, 1)[place : place + 1]
            alone = model(
                **{name: x[row : row + 1] for name, x in sources.items()}, decoder_input_ids=shifted(model, label)
            ).logits
            here = label != IGNORED
            torch.testing.assert_close(logits[number : number + 1][here], alone[here], atol=1e-5, rtol=1e-5)


def test_a_candidates_worth_is_its_mean_rouge(batch: Any) -> None:
    _, _, collated, texts, pairs = batch
    for row in (0, 2):
        for place, text in enumerate(texts[row]):
            scores = rouge([text], [pairs[row].references[:1]])
            expected = (scores["rouge1"] + scores["rouge2"] + scores["rougeL"]) / 300
            assert collated[WORTH][row, place].item() == pytest.approx(expected, abs=1e-6)
    assert collated[WORTH][1].tolist() == [0, 0, 0, 0]
    assert (collated[CANDIDATES][1] == IGNORED).all()


def test_halves_of_a_batch_add_up_to_it(batch: Any) -> None:
    model, _, collated, _, _ = batch
    config, tokens = RankingConfig(weight=3.0), int((collated["labels"] != IGNORED).sum())

    def loss(rows: slice) -> torch.Tensor:
        inputs = {name: x[rows] for name, x in collated.items()}
        return loss_of_candidates(model, inputs, smoothed_cross_entropy(0.1), config, 1.0, tokens)

    with torch.no_grad():
        torch.testing.assert_close(loss(slice(0, 2)) + loss(slice(2, 3)), loss(slice(0, 3)))


def test_without_weight_it_is_the_plain_loss(batch: Any) -> None:
    model, _, collated, _, _ = batch
    plain = smoothed_cross_entropy(0.1)
    with torch.no_grad():
        found = loss_of_candidates(model, dict(collated), plain, RankingConfig(weight=0.0), 1.0)
        inputs = {name: collated[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**inputs, decoder_input_ids=shifted(model, collated["labels"]))
        torch.testing.assert_close(found, plain(outputs, collated["labels"]))


def test_a_run_learns_the_order_and_says_whose_summaries_it_read(
    best: Path, base: Path, data: Path, candidates: Path, tmp_path: Path
) -> None:
    """What is wrong with the order is less afterwards, and less than after as many steps without the ranking."""
    wrong = {"before": wrong_order(best, data, candidates)}
    for weight in (0.0, 100.0):
        folder = tmp_path / str(weight)
        ranking = {"paths": [str(candidates)], "weight": weight}
        optim = {"epochs": 15.0, "batch_size": 8, "learning_rate": 2e-3, "new_weights_learning_rate": 2e-3}
        finetune(make_config(base, data, folder, model={"init_from": str(best)}, ranking=ranking, optim=optim))
        last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        wrong[str(weight)] = wrong_order(last, data, candidates)
    assert wrong["100.0"] < 0.5 * wrong["before"]
    assert wrong["100.0"] < 0.7 * wrong["0.0"]
    assert any("ranked" in source["use"] for source in sources_of(tmp_path / "100.0" / "best"))
    record = json.loads((tmp_path / "100.0" / "best" / "run.json").read_text(encoding="utf-8"))["ranking"]
    assert record["documents"] == 16
    assert 2 * 16 <= record["candidates"] <= 4 * 16
    assert list(record["sha256"]) == [str(candidates)]


def wrong_order(folder: Path, data: Path, candidates: Path) -> float:
    """The ranking loss of a model, over all documents of train."""
    config = make_config(folder, data, folder, ranking={"paths": [str(candidates)]})
    model, tokenizer = load_model(folder)
    pairs = read_split(config.data, "train")
    total = 0.0
    for row in with_candidates(tokenise(pairs, tokenizer, config.data), pairs, tokenizer, config.ranking, 16):
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids in row[CANDIDATES]], batch_first=True, padding_value=IGNORED
        )
        ids, worth = torch.tensor([row["input_ids"]]), torch.tensor([row[WORTH]])
        sources = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            _, logits, _ = candidate_outputs(model.eval(), sources, labels[:1], labels[None])
        total += ranking_loss(hypothesis_scores(logits, labels, 1.0)[None], worth, worth >= 0, 1.0).item()
    return total


def test_a_run_in_bfloat16_ranks_too(best: Path, base: Path, data: Path, candidates: Path, tmp_path: Path) -> None:
    """Sources are encoded outside of the model's own pass: under the same autocast, or dtypes would not meet."""
    losses = []
    for precision in ("fp32", "bf16"):
        ranking = {"paths": [str(candidates)], "weight": 20.0}
        optim = {"epochs": 1.0, "precision": precision, "learning_rate": 0.0, "new_weights_learning_rate": 0.0}
        folder = tmp_path / precision
        best_of = finetune(
            make_config(base, data, folder, model={"init_from": str(best)}, ranking=ranking, optim=optim)
        )
        losses.append(json.loads((best_of / "run.json").read_text(encoding="utf-8"))["train"]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_lengths_are_of_the_multiple_that_is_asked_for(batch: Any) -> None:
    """A GPU prepares itself for every new shape."""
    rows: list[Any] = [{CANDIDATES: [[1, 2, 3], [4]], WORTH: [0.1, 0.2]}, {CANDIDATES: [], WORTH: []}]
    found = collate_candidates(lambda features: {}, multiple=8)(rows)[CANDIDATES]
    assert found.shape == (2, 2, 8)
    assert found[0, 0].tolist() == [1, 2, 3, *[IGNORED] * 5]
    assert collate_candidates(lambda features: {})(rows)[CANDIDATES].shape == (2, 2, 3)


def test_candidates_of_nobody_are_a_source_of_unknown_licence(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, tmp_path, ranking={"paths": [str(tmp_path / "c.jsonl")]})
    assert {"name": "c.jsonl", "licence": "unknown"}.items() <= sources(config)[-1].items()


def test_accumulated_batches_equal_one(best: Path, base: Path, data: Path, candidates: Path, tmp_path: Path) -> None:
    logs = []
    for size, accumulation in ((4, 1), (2, 2)):
        optim = {"epochs": 1.0, "batch_size": size, "gradient_accumulation": accumulation, "grouping": "none"}
        trained = finetune(
            make_config(
                base,
                data,
                tmp_path / str(size),
                model={"init_from": str(best)},
                ranking={"paths": [str(candidates)], "weight": 20.0},
                optim=optim,
            )
        )
        logs.append(json.loads((trained / "run.json").read_text(encoding="utf-8"))["train"]["train_loss"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_candidates_are_found_by_the_letters_of_their_document_and_cut_at_the_most(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"document": "A b!", "candidates": ["x", "y", "z"]}])
    two = write(tmp_path / "two.jsonl", [{"document": "a b", "candidates": ["v", "x"]}])
    found = read_candidates(RankingConfig(paths=one.paths + two.paths, max_candidates=2))
    assert found == {document_key("a  B"): ["x", "y", "v"]}


def test_a_candidate_that_is_too_long_is_left_out_not_cut(best: Path, data: Path, tmp_path: Path) -> None:
    config, tokenizer = make_config(best, data, tmp_path), load_tokenizer(str(best))
    (pair,) = read_split(config.data, "train")[:1]
    texts = [" ".join(["w1"] * 15), " ".join(["w1"] * 14), pair.references[0]]
    said = write(tmp_path / "c.jsonl", [row_of(pair, *texts)])
    rows = with_candidates(tokenise([pair], tokenizer, config.data), [pair], tokenizer, said, 16)
    assert len(rows[0][CANDIDATES][0]) == 15
    assert len(rows[0][CANDIDATES]) == len(rows[0][WORTH]) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"document": "a", "summary": "b"}], "has no column candidates; it has document, summary"),
        ([{"document": "a", "candidates": "b"}], "row 0: document must be a text, and candidates a list of texts"),
        ([{"document": "a", "candidates": ["b", "c"]}], "no two summaries of different worth of any document of train"),
    ],
)
def test_a_file_that_ranks_nothing_is_refused(
    rows: list[dict[str, Any]], message: str, best: Path, data: Path, tmp_path: Path
) -> None:
    config, tokenizer = make_config(best, data, tmp_path), load_tokenizer(str(best))
    pairs = read_split(config.data, "train")
    said = write(tmp_path / "c.jsonl", rows)
    with pytest.raises(DataError, match=message):
        with_candidates(tokenise(pairs, tokenizer, config.data), pairs, tokenizer, said, 16)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optim": {"r_drop_alpha": 0.5}}, "does not go with optim.r_drop_alpha"),
        ({"optim": {"parallel": "fsdp"}}, "does not go with optim.parallel = fsdp"),
        ({"denoising": {"path": "texts"}}, "does not go with denoising.path"),
        ({"data": {"padding": "max_length"}}, "does not go with data.padding = max_length"),
        (
            {"data": {"streaming": True}, "optim": {"max_steps": 1}, "eval": {"every_steps": 1}},
            "does not go with data.streaming",
        ),
        ({"ranking": {"paths": ["x"], "max_candidates": 1}}, "max_candidates at least 2"),
        ({"ranking": {"paths": ["x"], "weight": -1.0}}, "must not be negative"),
        ({"ranking": {"paths": ["x"], "margin": -1.0}}, "must not be negative"),
    ],
)
def test_settings_that_do_not_fit_are_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, tmp_path, tmp_path, **{"ranking": {"paths": ["x"]}, **more})


def test_more_processes_are_refused_by_a_run_and_by_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = make_config(tmp_path, tmp_path, tmp_path, ranking={"paths": ["x"]}, search={"learning_rate": [1e-5, 1e-4]})
    with pytest.raises(ConfigError, match="one process; there are 2"):
        finetune(config)
    with pytest.raises(ConfigError, match="one process; there are 2"):
        search(config, 1)


def test_options_of_generation_that_do_not_exist_are_refused(best: Path, data: Path, tmp_path: Path) -> None:
    for wrong in ("num_beam", "num_return_sequences"):
        with pytest.raises(EvaluationError, match=f"may be set here: {wrong};"):
            pseudo_label([best], DataConfig(path=str(data)), tmp_path / "train.jsonl", generation={wrong: 4})


def test_one_summary_of_a_document_is_nothing_to_keep(best: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="needs several summaries"):
        pseudo_label([best], DataConfig(path=str(data)), tmp_path / "train.jsonl", keep_candidates=True)
