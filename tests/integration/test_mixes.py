"""Every mix of two kinds of checkpoint: warm-started, trained, exported with its proof, and served by the real service.

Tiny models, real commands and files. `PRECIS_MIXES_TABLE=docs/results/mixes.md python -m pytest
tests/integration/test_mixes.py` writes what a run found as a table.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, EncoderDecoderModel, TrainerCallback, TrainerControl, set_seed

from app.engine.models.foreign_encoder import FOREIGN_ENCODERS
from app.errors import ModelCorrupt
from app.main import create_app
from benchmarks.report import describe, format_table, machine
from tests.e2e.conftest import start_server
from tests.mixes import BASELINES, MIXES, Mix, make_base, run_config, write_data
from tests.service import read_settings
from train.__main__ import main
from train.config import RunConfig
from train.data import read_split, read_splits, tokenise
from train.evaluate import evaluate
from train.export import ExportError, export, generated_tokens
from train.finetune import finetune
from train.optimization import smoothed_cross_entropy
from train.records import BEST
from train.tokenizer_pair import TokenizerPair
from train.trainer import build_trainer
from train.warm_start import WarmStart, load_model, warm_start

TABLE = os.environ.get("PRECIS_MIXES_TABLE")
THIS = "tests/integration/test_mixes.py"
HEADERS = (
    "pair",
    "encoder runs in",
    "parameters trained",
    "in the file",
    "loss before and after",
    "exported",
    "parity",
    "served",
)
FEW = [mix for mix in MIXES if mix.name in ("BERT2GPT2", "FNet2BERT")]


@dataclass(frozen=True)
class Trained:
    """A mix that was trained."""

    config: RunConfig
    before: WarmStart

    @property
    def best(self) -> Path:
        """The folder of its best model."""
        return Path(self.config.output_dir) / BEST


Bases = Callable[[str, int, int], Path]
Train = Callable[[Mix], Trained]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def base(kind: str, width: int, layers: int) -> Path:
        return make_base(folder / f"{kind}-{width}-{layers}", kind, width, layers)

    return base


def model_settings(mix: Mix, bases: Bases) -> dict[str, Any]:
    encoder = bases(mix.encoder, mix.width, mix.layers)
    decoder = bases(mix.decoder, 16, mix.layers)
    return {"encoder": str(encoder), "decoder": str(decoder), **mix.settings}


@pytest.fixture(scope="module")
def trained(bases: Bases, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a mix once, for all that is asked of it."""

    @cache
    def train(name: str) -> Trained:
        mix = next(mix for mix in MIXES if mix.name == name)
        config = run_config(data, tmp_path_factory.mktemp("run"), model_settings(mix, bases))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(en|de)coder: attention runs as")  # some have no other in transformers
            finetune(config)
        set_seed(config.optim.seed)
        return Trained(config, warm_start(config.model, config.generation))

    return lambda mix: train(mix.name)


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, list[str]]]:
    """What is found of each mix; written down at the end, if that was asked for and all were tried."""
    found: dict[str, list[str]] = {}
    yield found
    if TABLE and len(found) == len(MIXES) + len(BASELINES):
        facts = {**machine(), "command": f"PRECIS_MIXES_TABLE={TABLE} python -m pytest {THIS}"}
        lines = [
            "# Mixes",
            "\n".join(f"{line}  " for line in describe(facts)).rstrip(),
            "Random bases of 2 or 4 layers, 16 or 24 wide, 8 steps: it is shown that each pair trains, not how well. "
            "Parity: validation rows on which engine and `generate` said the same tokens in fp32. Served: `POST "
            "/summarize` gave those tokens.",
            format_table(HEADERS, found.values()),
        ]
        Path(TABLE).parent.mkdir(parents=True, exist_ok=True)
        Path(TABLE).write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def loss_of(model: Any, tokenizer: Any, config: RunConfig) -> float:
    """Over the whole training split, in one batch of all lengths."""
    rows = tokenise(read_split(config.data, "train"), tokenizer, config.data)
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)([dict(row) for row in rows])
    labels = batch.pop("labels")
    with torch.inference_mode():
        return float(smoothed_cross_entropy(0.0)(model.eval()(**batch), labels))


def ask(folder: Path, texts: list[str]) -> list[dict[str, Any]]:
    """What the service, with its own loader, answers."""

    async def answers() -> list[dict[str, Any]]:
        settings = read_settings(
            model=str(folder), device="cpu", dtype="float32", max_num_seqs=2, num_threads=torch.get_num_threads()
        )
        app = create_app(settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
        ):
            reply = await client.post("/summarize", json={"inputs": texts, "parameters": {"return": ["tokens"]}})
        assert reply.status_code == 200, reply.text
        found: list[dict[str, Any]] = reply.json()
        return found

    return asyncio.run(answers())


def assert_says_what_generate_says(folder: Path, answers: list[dict[str, Any]], texts: list[str]) -> None:
    model, loading = EncoderDecoderModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not [problem for problem in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading[problem]]
    _, tokenizer = load_model(folder)
    for text, answer in zip(texts, answers, strict=True):
        expected = generated_tokens(model.eval(), tokenizer(text)["input_ids"])
        assert answer["token_ids"] == expected
        assert answer["summary_text"].strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_a_mix_trains_exports_and_is_served(
    mix: Mix, trained: Train, data: Path, tmp_path: Path, rows: dict[str, list[str]]
) -> None:
    run = trained(mix)
    model, tokenizer = load_model(run.best)
    assert isinstance(tokenizer, TokenizerPair) is mix.two_tokenizers
    before = loss_of(run.before.model, run.before.tokenizer, run.config)
    after = loss_of(model, tokenizer, run.config)
    assert after < before - 0.1
    folder = export(run.best, tmp_path, "1.0.0")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    summaries = "decoder_tokenizer/tokenizer.json" if mix.two_tokenizers else "tokenizer.json"
    assert manifest["tokenizers"] == {"source": "tokenizer.json", "summary": summaries}
    assert set(manifest["tokenizers"].values()) <= set(manifest["files"])
    assert (manifest["trained_parameters"] < manifest["parameters"]) is mix.shares
    texts = [pair.document for pair in read_split(run.config.data, "validation")]
    answers = ask(folder, texts)
    assert_says_what_generate_says(folder, answers, texts)
    parity = manifest["parity"]
    rows[mix.name] = [
        mix.name,
        "transformers" if mix.encoder in FOREIGN_ENCODERS else "the engine",
        f"{manifest['trained_parameters']:,}",
        f"{manifest['parameters']:,}",
        f"{before:.2f}, {after:.2f}",
        "yes",
        f"{parity['rows']} of {parity['rows']}"
        + (f", {parity['settled_in_float64']} in fp64" if parity["settled_in_float64"] else ""),
        f"{len(answers)} of {len(texts)}",
    ]


@pytest.mark.e2e
@pytest.mark.parametrize("mix", FEW, ids=lambda mix: mix.name)
def test_a_server_process_serves_it(mix: Mix, trained: Train, tmp_path: Path) -> None:
    run = trained(mix)
    folder = export(run.best, tmp_path, "1.0.0", parity_rows=1)
    texts = [pair.document for pair in read_split(run.config.data, "test")]
    with start_server(tmp_path / "log", model=folder, device="cpu", dtype="float32") as server:
        body = {"inputs": texts, "parameters": {"return": ["tokens"]}}
        reply = server.client.post("/summarize", json=body)
        assert_says_what_generate_says(folder, reply.json(), texts)
        body = {"inputs": texts[0], "parameters": {"encoder_no_repeat_ngram_size": 2}}
        blocked = server.client.post("/summarize", json=body)
        assert blocked.status_code == 422
        assert "vocabularies of their own" in blocked.text
        assert server.stop() == 0


def test_summaries_are_not_read_in_the_sources_vocabulary(trained: Train, tmp_path: Path) -> None:
    """A checkpoint of old has one tokenizer where it needs two: its summaries would be other words."""
    folder = export(trained(FEW[0]).best, tmp_path, "1.0.0", parity_rows=1)
    shutil.rmtree(folder / "decoder_tokenizer")
    (folder / "manifest.json").unlink()
    with pytest.raises(ModelCorrupt, match=r"decoder_tokenizer/tokenizer\.json is missing"):
        ask(folder, ["kaban loder"])


class StopAfterFirstEpoch(TrainerCallback):
    """What a lost machine does, at a convenient moment."""

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("name", ["BERTShare, decoder 4 to 2 layers", "BERT2GPT2"])
def test_a_resumed_run_equals_a_straight_one(name: str, bases: Bases, data: Path, tmp_path: Path) -> None:
    """Shared weights stay shared, and a second tokenizer is there again."""
    mix = next(mix for mix in MIXES if mix.name == name)
    configs = [
        run_config(
            data, tmp_path / name, {**model_settings(mix, bases), "hidden_dropout": 0.1}, epochs=2.0, batch_size=16
        )
        for name in ("straight", "resumed")
    ]
    finetune(configs[0])
    set_seed(configs[1].optim.seed)
    start = warm_start(configs[1].model, configs[1].generation)
    splits = read_splits(configs[1].data)
    trainer = build_trainer(start, splits["train"], splits["validation"], configs[1])
    trainer.add_callback(StopAfterFirstEpoch())
    trainer.train()
    assert trainer.state.global_step == 2
    finetune(configs[1], resume=True)
    straight, resumed = (load_file(Path(c.output_dir) / "checkpoint-4" / "model.safetensors") for c in configs)
    assert resumed.keys() == straight.keys()
    for key, tensor in straight.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", BASELINES)
def test_a_baseline_is_trained_and_scored_and_not_shipped(
    kind: str,
    bases: Bases,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: dict[str, list[str]],
) -> None:
    config = run_config(data, tmp_path / "run", {"seq2seq": str(bases(kind, 16, 2))})
    finetune(config)
    set_seed(config.optim.seed)
    start = warm_start(config.model, config.generation)
    model, tokenizer = load_model(tmp_path / "run" / BEST)
    losses = [loss_of(one, start.tokenizer, config) for one in (start.model, model)]
    assert losses[1] < losses[0] - 0.1
    parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    labels = tokenise(read_split(config.data, "test"), start.tokenizer, config.data)["labels"]
    begins = [ids[0] == tokenizer.bos_token_id for ids in labels]
    assert all(begins) if kind == "bart" else not any(begins)  # BART begins at </s>, and has to say <s>
    assert all(ids[-1] == tokenizer.eos_token_id for ids in labels)
    best, output = tmp_path / "run" / BEST, tmp_path / "scores.json"
    assert main(["evaluate", "--model", str(best), "--run", str(tmp_path / "run"), "--output", str(output)]) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["settings"]["decoded_by"] == "generate of transformers"
    assert "decoded by generate of transformers" in capsys.readouterr().err
    rows[kind] = [
        f"{kind.upper()} (baseline)",
        "transformers",
        parameters,
        parameters,
        f"{losses[0]:.2f}, {losses[1]:.2f}",
        "refused: scored with `generate`",
        "-",
        "-",
    ]
    with pytest.raises(ExportError, match=r"came whole, as a baseline.*train evaluate --model"):
        export(tmp_path / "run", tmp_path / "store", "1.0.0")
    assert not (tmp_path / "store").exists()


def test_an_evaluation_of_a_mix_says_that_the_engine_decoded(trained: Train, data: Path, tmp_path: Path) -> None:
    run = trained(FEW[0])
    folder = export(run.best, tmp_path, "1.0.0", parity_rows=1)
    result = evaluate(folder, run.config.data, "test")
    assert result["settings"]["decoded_by"] == "the engine"
    assert all(row["prediction"] for row in result["rows"])
