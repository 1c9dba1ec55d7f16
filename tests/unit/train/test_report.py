"""A report says what it must, its numbers are those of its rows, and it copies no data where it may not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from train.__main__ import main
from train.config import DataConfig
from train.data import Pair, read_split
from train.evaluate import Evaluated, read_rows, summarise_rows
from train.export import card
from train.metrics import ALL_ROUGE_TYPES, rouge
from train.records import EvaluationError
from train.report import build_report
from train.summarise import Summary
from train.systems import System

from .conftest import write_split

PLOTS = {"scores.png", "differences.png", "slices.png", "lengths.png", "novelty.png"}


class Words:
    """A metric of somebody's own."""

    def score(self, predictions: Any, documents: Any, references: Any) -> list[float]:
        return [float(len(text.split())) for text in predictions]


@pytest.fixture(scope="module")
def folder(exported: Path, run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything that can be asked for, by the command."""
    folder = tmp_path_factory.mktemp("report")
    earlier = folder / "earlier.json"
    words = ["evaluate", "--model", str(exported), "--run", str(run)]
    assert main([*words, "--output", str(earlier)]) == 0
    report = ["--report", str(folder / "r"), "--samples", "ids", "--references", "mean", "--drop-leaks"]
    others = ["--against", str(exported), "--against-rows", str(earlier), "--metric", f"{__name__}:Words"]
    assert main([*words, *report, *others]) == 0
    return folder / "r"


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def evaluated(model: Path, pairs: list[Pair], texts: list[str], folder: Path, **of_each: Any) -> Evaluated:
    """What would be known had `model` said these texts; a text of the source's tokens is as long as the source."""
    write_split(folder, "test", pairs)
    known = {
        pair.document: Summary(
            text=text,
            tokens=len(text.split()) + 1,
            source_tokens=len(pair.document.split()),
            source_cut=of_each.get("source_cut", False),
            at_limit=of_each.get("at_limit", False),
        )
        for pair, text in zip(pairs, texts, strict=True)
    }
    rows = read_rows(DataConfig(path=str(folder)))
    return summarise_rows(model, rows, summarise=lambda documents, on_finished=None: [known[d] for d in documents])


def test_the_folder_holds_markdown_json_and_plots(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.json"} | PLOTS
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name in PLOTS:
        assert f"({name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_scores_are_those_of_the_rows_and_both_uses_of_references_are_named(
    whole: dict[str, Any], folder: Path, data: Path
) -> None:
    references = [pair.references for pair in read_split(DataConfig(path=str(data)), "test")]
    texts = [row["prediction"] for row in whole["rows"]]
    for use in ("mean", "first"):
        expected = rouge(texts, references, use, ALL_ROUGE_TYPES)
        found = {kind: interval["mean"] for kind, interval in whole["report"]["scores"][use]["model"].items()}
        assert found == pytest.approx(expected, abs=0.006)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "mean over all references" in text
    assert "the first reference" in text


def test_each_system_is_compared_and_a_model_is_no_better_than_itself(whole: dict[str, Any]) -> None:
    report = whole["report"]
    names = {"lead3", "random3", "oracle", "tiny 1.0.0", "tiny 1.0.0 (2)"}
    assert set(report["differences"]["mean"]) == names
    for itself in ("tiny 1.0.0", "tiny 1.0.0 (2)"):
        assert all(
            found["mean"] == 0 and found["p_value"] == 1 for found in report["differences"]["mean"][itself].values()
        )
    oracle, lead = report["scores"]["mean"]["oracle"], report["scores"]["mean"]["lead3"]
    assert oracle["rouge1"]["mean"] + oracle["rouge2"]["mean"] >= lead["rouge1"]["mean"] + lead["rouge2"]["mean"]
    assert report["against"]["tiny 1.0.0 (2)"]["same_data"] is True


def test_a_report_with_ids_holds_no_text_of_the_data(folder: Path, data: Path) -> None:
    written = "".join((folder / name).read_text(encoding="utf-8") for name in ("report.md", "report.json"))
    for pair in read_split(DataConfig(path=str(data)), "test"):
        assert pair.document not in written
        assert not any(f"{text}\n" in written or f'"{text}"' in written for text in pair.references)
        assert pair.id in written


def test_a_full_report_shows_the_texts_of_its_samples(exported: Path, data: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--model", str(exported), "--data", str(data), "--limit", "3", "--report", str(tmp_path)]
    assert main(words) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for pair in read_split(DataConfig(path=str(data)), "test")[:3]:
        assert all(part in text for part in (pair.id, pair.document, *pair.references))
    assert "The first 3 rows" in text


def test_one_seed_is_said_to_be_one(whole: dict[str, Any], folder: Path) -> None:
    assert whole["report"]["seeds"] == {"seeds": [13]}
    assert "One training run, seed 13." in (folder / "report.md").read_text(encoding="utf-8")


def test_origin_and_cost_stand_in_the_report(whole: dict[str, Any], folder: Path, run: Path) -> None:
    record = json.loads((run / "best" / "run.json").read_text(encoding="utf-8"))
    report = whole["report"]
    assert report["training"] == record["train"]
    assert "evaluate --model" in report["command"]
    assert len(whole["model"]["weights_sha256"]) == len(whole["data"]["sha256"]) == 64
    assert whole["data"]["leaks_dropped"] == 0
    latency = report["latency"]
    assert latency["alone"]["rows"] == 6
    assert 0 < latency["alone"]["median"] <= latency["alone"]["worst"]
    assert latency["peak_rss_bytes"] > 2**26
    text = (folder / "report.md").read_text(encoding="utf-8")
    for part in (whole["model"]["weights_sha256"], "num_beams 2", "torch ", "- training: "):
        assert part in text


def test_a_metric_of_ones_own_is_in_the_report(whole: dict[str, Any], folder: Path) -> None:
    (metric,) = whole["report"]["metrics"]
    mean_words = sum(len(row["prediction"].split()) for row in whole["rows"]) / len(whole["rows"])
    assert metric["scores"]["model"]["mean"] == pytest.approx(mean_words, abs=0.006)
    assert metric["differences"]["tiny 1.0.0"]["p_value"] == 1.0
    assert f"## {__name__}:Words" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_report_is_an_evaluation_for_the_model_card(exported: Path, folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    text = card(model, [folder / "report.json"]).read_text(encoding="utf-8")
    assert "Test: 6 rows, against all references, averaged" in text
    assert "| lead-3 |" in text


def test_texts_limits_and_flags_are_counted(exported: Path, tmp_path: Path) -> None:
    pairs = [
        Pair("a", "Tom saw Kate. He paid 20 pounds.", ("Tom met Kate.",)),
        Pair("b", "Then Kate saw Tom and Ann at 5.", ("A meeting with Tom.",)),
    ]
    found = evaluated(exported, pairs, ["tom paid 30 pounds.", "kate saw tom."], tmp_path, at_limit=True)
    report = build_report(found)
    own = report["text"]["model"]
    assert (own["words"]["mean"], own["words"]["rows"]) == (3.5, 2)
    assert own["novelty_1"]["mean"] == 12.5  # of row a "30", of row b nothing
    assert own["coverage"]["mean"] == 87.5
    assert own["density"]["mean"] == 1.88  # of row a (1 + 1 + 1) / 4, of row b 9 / 3
    assert own["novelty_4"] is None  # one row has four words: no interval
    assert report["limits"]["model"]["outputs_at_limit"]["mean"] == 100.0
    assert report["limits"]["model"]["sources_cut"]["mean"] == 0.0
    faithfulness = report["faithfulness"]
    assert faithfulness["read_in_lower_case"] is True
    assert faithfulness["systems"]["model"]["numbers"]["unheld_percent"] == 100.0
    assert faithfulness["systems"]["model"]["names"] == {
        "stated": 3,
        "unheld": 0,
        "unheld_percent": 0.0,
        "texts_flagged_percent": {"mean": 0.0, "low": 0.0, "high": 0.0, "p_value": None},
    }
    assert report["unheld"] == {"0": {"numbers": ["30"]}}
    assert list(report["scores"]) == ["first"]  # one reference each


def test_slices_are_quarters_by_source_length_and_hold_each_row_once(exported: Path, tmp_path: Path) -> None:
    pairs = [Pair(str(i), "w1 " * (i + 1) + "w2. w3.", ("w1 w2",)) for i in (7, 2, 5, 0, 3, 6, 1, 4)]
    # Short sources are summarised well, long ones not.
    texts = ["w1 w2" if int(pair.id) < 4 else "w9" for pair in pairs]
    slices = build_report(evaluated(exported, pairs, texts, tmp_path))["slices"]
    assert [part["rows"] for part in slices] == [2, 2, 2, 2]
    assert [part["source_tokens"] for part in slices] == [[3, 4], [5, 6], [7, 8], [9, 10]]
    assert [part["scores"]["rouge1"]["mean"] for part in slices] == [100, 100, 0, 0]


def test_the_worst_are_the_lowest_and_random_ones_are_the_same_again(exported: Path, tmp_path: Path) -> None:
    pairs = [Pair(str(i), f"w{i} w2 w3.", ("w1 w2 w3 w4",)) for i in range(30)]
    texts = ["w1 w2 w3 w4" if i % 2 else "w1 w9" for i in range(30)]
    found = evaluated(exported, pairs, texts, tmp_path)
    samples = build_report(found)["samples"]
    assert samples["worst"] == list(range(0, 20, 2))
    assert len(set(samples["random"])) == 20
    assert samples["random"] == build_report(found, [System("other", texts)])["samples"]["random"]


def test_several_seeds_give_mean_and_spread_and_must_differ_in_nothing_else(
    exported: Path, data: Path, tmp_path: Path
) -> None:
    rows = read_rows(DataConfig(path=str(data)))

    def trained(seed: int, text: str, **optim: Any) -> Evaluated:
        model = shutil.copytree(exported, tmp_path / str(len(list(tmp_path.iterdir()))))
        manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
        manifest["settings"]["optim"] |= {"seed": seed, **optim}
        (model / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        said = [Summary(text or pair.references[0], 3, 5, False, False) for pair in rows.pairs]
        by_text = dict(zip([pair.document for pair in rows.pairs], said, strict=True))
        return summarise_rows(
            model, rows, summarise=lambda documents, on_finished=None: [by_text[d] for d in documents]
        )

    first, second = trained(1, ""), trained(2, "nothing")
    found = build_report(first, seeds=[second])["seeds"]
    assert found["seeds"] == [1, 2]
    low, high = sorted(found["scores"]["rouge1"])
    assert low == 0.0
    assert found["mean"]["rouge1"] == pytest.approx(high / 2, abs=0.01)
    assert found["standard_deviation"]["rouge1"] == pytest.approx(high / 2**0.5, abs=0.01)
    with pytest.raises(EvaluationError, match="other seeds are needed"):
        build_report(first, seeds=[trained(1, "")])
    with pytest.raises(EvaluationError, match="other settings: optim"):
        build_report(first, seeds=[trained(3, "", learning_rate=1.0)])


def test_a_metric_that_skips_rows_is_refused(exported: Path, tmp_path: Path) -> None:
    class Short:
        def score(self, predictions: Any, documents: Any, references: Any) -> list[float]:
            return [1.0]

    pairs = [Pair(str(i), f"w{i} w2. w3.", ("w1 w2",)) for i in range(4)]
    with pytest.raises(EvaluationError, match="gave 1 scores for 4 rows of model"):
        build_report(evaluated(exported, pairs, ["w1"] * 4, tmp_path), metrics=[("short", {}, Short())])
