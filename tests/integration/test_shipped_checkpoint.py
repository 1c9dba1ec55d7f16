"""The shipped checkpoint: loads in transformers with nothing missing, and decodes as `generate` does, in fp32."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import EncoderDecoderModel

from app.engine import Engine, EngineConfig, GenerationParams, Sequence
from tests.shipped import CONVERSATIONS, DIALOGSUM, dialogsum_documents, shipped_folder
from tests.tiny import oracle, random_params

VALIDATION_ROWS = 12


@pytest.fixture(scope="module")
def folder() -> Path:
    found = shipped_folder()
    assert found is not None, "model_store/ holds no checkpoint, and the repository ships one"
    return found


@pytest.fixture(scope="module")
def reference(folder: Path) -> EncoderDecoderModel:
    model, loading = EncoderDecoderModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    return model.eval()


def encoded(folder: Path, texts: Iterable[str]) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tuple(encoding.ids) for encoding in tokenizer.encode_batch(list(texts)) if len(encoding.ids) <= 512]


def assert_equal_to_generate(reference: EncoderDecoderModel, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        assert sequence.output is not None, sequence.error
        ours = [list(hypothesis.token_ids) for hypothesis in sequence.output.hypotheses]
        assert ours == oracle(reference, sequence.source_ids, sequence.params)[0], sequence.params


def run(folder: Path, sequences: list[Sequence]) -> None:
    engine = Engine.from_folder(folder, EngineConfig(max_num_seqs=8))
    for sequence in sequences:
        engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()


def assert_own_settings_equal_generate(folder: Path, reference: EncoderDecoderModel, texts: Iterable[str]) -> None:
    params = GenerationParams.from_generation_config(reference.generation_config.to_dict())
    sequences = [Sequence(ids, params) for ids in encoded(folder, texts)]
    run(folder, sequences)
    assert_equal_to_generate(reference, sequences)


@pytest.mark.slow
def test_own_settings_equal_generate(folder: Path, reference: EncoderDecoderModel) -> None:
    assert_own_settings_equal_generate(folder, reference, CONVERSATIONS)


@pytest.mark.slow
def test_own_settings_equal_generate_on_validation_dialogues(folder: Path, reference: EncoderDecoderModel) -> None:
    texts = dialogsum_documents("validation", VALIDATION_ROWS)
    if not texts:
        pytest.skip(f"DialogSum is not at {DIALOGSUM}")
    assert_own_settings_equal_generate(folder, reference, texts)


@pytest.mark.slow
def test_mixed_options_equal_generate(folder: Path, reference: EncoderDecoderModel) -> None:
    rng = random.Random(0)
    texts = [*CONVERSATIONS, *CONVERSATIONS, *dialogsum_documents("validation", VALIDATION_ROWS)]
    sequences = [
        Sequence(ids, replace(random_params(rng), max_new_tokens=24, min_new_tokens=rng.choice([0, 8])))
        for ids in encoded(folder, texts)
    ]
    run(folder, sequences)
    assert_equal_to_generate(reference, sequences)
