"""Kernels in C are used where they give torch's answers; and the engine with all of them against the engine without.

Each by itself: test_cpu_products.py, test_cpu_attention.py, test_cpu_choice.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib import machinery
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine import Engine, EngineConfig, GenerationParams, Sequence, checkpoint, cpu_kernels, kernels
from app.engine.cpu_kernels import choice, compiled
from app.engine.linear import PanelLinear
from app.engine.models.bert_decoder import BertDecoder
from app.engine.models.gpt2_decoder import Gpt2Decoder
from tests.cpu_builds import BUILDS, needs_kernels
from tests.recorder import Recorder
from tests.tiny import TinyShape, random_sources, save, tiny_model

CPU = torch.device("cpu")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="without gcc there is nothing to find")
def test_where_there_is_a_compiler_they_are_compiled() -> None:
    """pip does not say when an optional extension is left out: a mistake in the C would pass as a slow engine."""
    folder = Path(cpu_kernels.__file__).parent
    for name in BUILDS.values():
        assert [path for suffix in machinery.EXTENSION_SUFFIXES for path in folder.glob(f"{name}*{suffix}")]


@needs_kernels
@pytest.mark.usefixtures("processor")
def test_they_are_found_to_work() -> None:
    assert kernels.step_kernels_for(CPU, torch.float32) is cpu_kernels
    assert compiled.library().lanes == {"AVX2": 8, "AVX512": 16}[torch.backends.cpu.get_cpu_capability()]


@needs_kernels
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(
    "name", ["multiply", "multiply_int8", "cross_attention", "self_attention", "source_attention", "log_softmax"]
)
def test_where_one_gives_another_answer_there_are_none(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = getattr(cpu_kernels, name)
    monkeypatch.setattr(cpu_kernels, name, lambda *given, **named: right(*given, **named) * 1.1)
    assert kernels.step_kernels_for(CPU, torch.float32) is None
    assert "gives another answer than torch" in caplog.text


@needs_kernels
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(
    ("name", "said"),
    [("top_candidates", "others than torch's"), ("ban_ngrams", "n-grams are banned"), ("keep", "beams are kept")],
)
def test_where_one_chooses_otherwise_there_are_none(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*given: Any) -> Any:
        if name == "ban_ngrams":
            return None
        found = getattr(choice, name)(*given)
        return replace(found, tokens=found.tokens.flip(1)) if name == "top_candidates" else (found[0], found[1].flip(1))

    monkeypatch.setattr(cpu_kernels, name, wrong)
    assert kernels.cpu_kernels() is None
    assert said in caplog.text


@needs_kernels
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(
    ("module", "name", "instead", "said"),
    [
        (compiled, "find_spec", lambda name: None, "is not compiled"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT", "needs an x86 processor with AVX2"),
    ],
)
def test_where_they_cannot_be_loaded_the_log_says_why(
    module: object,
    name: str,
    instead: object,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, name, instead)
    assert kernels.cpu_kernels() is None
    assert kernels.cpu_kernels() is None
    (record,) = caplog.records
    assert "a decode step is made of torch's operations alone" in record.getMessage()
    assert said in record.getMessage()


@needs_kernels
@pytest.mark.usefixtures("processor")
def test_what_was_compiled_from_another_version_is_not_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_VERSION", 0)
    assert kernels.cpu_kernels() is None
    assert "was compiled from another version" in caplog.text


@needs_kernels
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_an_engine_of_kernels_says_what_one_of_torch_says(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(
        tiny_model(seed=3, shape=TinyShape(vocab=130, hidden=32, encoder_hidden=32, decoder=decoder)), tmp_path
    )
    params = GenerationParams(num_beams=4, num_return_sequences=4, max_new_tokens=20, no_repeat_ngram_size=3)
    sources = random_sources(9, seed=2, longest=40)

    def said(with_kernels: bool) -> list[list[tuple[int, ...]]]:
        engine = Engine.from_folder(folder, EngineConfig(max_num_seqs=4, device="cpu"))
        outputs = engine.generate(sources, params)
        (batch,) = engine.runner.batches.values()
        assert (batch.cache._kernels is cpu_kernels) is with_kernels
        decoder = batch.model.decoder
        assert isinstance(decoder, (BertDecoder, Gpt2Decoder))
        assert isinstance(decoder.cross_key_values[0], PanelLinear) is with_kernels
        return [[hypothesis.token_ids for hypothesis in output.hypotheses] for output in outputs]

    mine = said(True)
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    assert mine == said(False)


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "has_bfloat16"), [("float32", True), ("bfloat16", True), ("int8", True), ("int8", False)]
)
def test_a_texts_logits_are_the_same_in_any_company_to_the_last_bit(
    dtype: str, has_bfloat16: bool, processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 8 bits with VNNI, where the library multiplies the sources, each of them is encoded alone."""
    monkeypatch.setattr(kernels, "_bfloat16_is_faster", lambda: False)
    monkeypatch.setattr(checkpoint, "has_bfloat16", lambda: has_bfloat16)
    alone = dtype == "int8" and processor == "AVX512"
    folder = save(tiny_model(seed=5, shape=TinyShape(vocab=130, hidden=48, heads=3, encoder_hidden=48)), tmp_path)
    params = GenerationParams(num_beams=4, max_new_tokens=25, no_repeat_ngram_size=3)
    sources = random_sources(7, seed=4, longest=40)
    engine = Engine.from_folder(
        folder, EngineConfig(max_num_seqs=5, max_encode_tokens=1 if alone else 4096, dtype=dtype)
    )

    def logits(company: list[list[int]]) -> dict[tuple[int, ...], Tensor]:
        first, *others = [Sequence(tuple(ids), params) for ids in company]
        with Recorder() as recorder:
            for index, sequence in enumerate((first, *others)):
                engine.add(sequence)
                if index % 3 == 0:
                    engine.step()
            while engine.scheduler.has_work:
                engine.step()
            (found,) = recorder.logits(first)
        return dict(found)

    own, together = logits(sources[:1]), logits(sources)
    assert len(own) > 20
    assert own.keys() == together.keys()
    assert all(torch.equal(row, together[prefix]) for prefix, row in own.items())
