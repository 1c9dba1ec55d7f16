"""From documents to summaries, with what a report must know of each: the seam between a model and its evaluation.

Knows two ways: the serving engine, and `generate` of transformers for models that the engine has no network for (the
BART and PEGASUS baselines). Does not know references or scores. Anything that is called like `Summariser` can be
evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from app.engine import Engine, EngineConfig, GenerationParams, SequenceOutput
from app.errors import EngineFailed
from train.records import EvaluationError, read_json
from train.tokenizer_pair import AnyTokenizer
from train.warm_start import load_model, load_tokenizer, source_limit

BATCH_SIZE = 16
GPU_SLOTS, GPU_ENCODE_TOKENS = 128, 32_768


@dataclass(frozen=True)
class Summary:
    """One output.

    Attributes:
        text: without special tokens.
        tokens: generated, the end token included.
        source_tokens: of the whole document, special tokens included.
        source_cut: the model read only the document's beginning.
        at_limit: cut at the greatest length, not ended by the model.
    """

    text: str
    tokens: int
    source_tokens: int
    source_cut: bool
    at_limit: bool


class Summariser(Protocol):
    """Summaries of documents, in their order; reports the number of finished ones as it grows."""

    def __call__(self, documents: Sequence[str], on_finished: Callable[[int], None] | None = None) -> list[Summary]:
        """One summary a document."""


def own_params(model: Path, over: Mapping[str, Any] | None = None) -> GenerationParams:
    """The decode options of the model's `generation_config.json`, with those of `over` in their place.

    Raises:
        EvaluationError: one is out of range, or the engine does not have it.
    """
    known = {field.name for field in fields(GenerationParams)} - {"num_return_sequences"} | {"max_length", "min_length"}
    if strange := sorted(set(over or {}) - known):
        raise EvaluationError(
            f"no option of generation that may be set here: {', '.join(strange)}; {sorted(known)} are"
        )
    over = over or {}
    settings = read_json(model / "generation_config.json")
    for bound in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if any(name in over for name in bound):  # in whichever form the file has it
            for name in bound:
                settings.pop(name, None)
    settings |= over
    try:
        return replace(GenerationParams.from_generation_config(settings), seed=settings.get("seed"))
    except ValueError as error:
        said = f" with {', '.join(over)}" if over else ""
        raise EvaluationError(f"{model / 'generation_config.json'}{said}: {error}") from error


def build_engine(model: Path, params: GenerationParams, device: str = "cpu", dtype: str = "float32") -> Engine:
    """An engine wide and long enough for `params`; on a GPU with more slots, for it is there to be filled.

    Raises:
        CheckpointError: the folder cannot be served.
    """
    on_gpu = device != "cpu"
    config = EngineConfig(
        max_num_seqs=GPU_SLOTS if on_gpu else EngineConfig.max_num_seqs,
        max_num_beams=max(8, params.num_beams, params.num_return_sequences),
        max_encode_tokens=GPU_ENCODE_TOKENS if on_gpu else EngineConfig.max_encode_tokens,
        max_output_tokens=params.max_new_tokens,
        device=device,
        dtype=dtype,
    )
    return Engine.from_folder(model, config)


def run_engine(
    engine: Engine,
    sources: Sequence[Sequence[int]],
    params: GenerationParams,
    on_finished: Callable[[int], None] | None = None,
) -> list[SequenceOutput]:
    """`engine.generate`.

    Raises:
        EvaluationError: a source or an option is beyond the engine's limits, or a step failed.
    """
    try:
        return engine.generate(sources, params, on_finished=on_finished)
    except (ValueError, EngineFailed) as error:
        raise EvaluationError(f"the engine: {error}") from error


def decode(
    model: Path,
    engine: Engine,
    documents: Sequence[str],
    params: GenerationParams,
    on_finished: Callable[[int], None] | None = None,
) -> tuple[list[str], int]:
    """Summaries in input order, and how many documents were cut to the model's source limit."""
    summaries = engine_summariser(model, engine, params)(documents, on_finished)
    return [summary.text for summary in summaries], sum(summary.source_cut for summary in summaries)


def engine_summariser(model: Path, engine: Engine, params: GenerationParams) -> Summariser:
    """The serving engine, with the tokenizer of `model`."""
    every = _hypotheses_of(model, engine, params)

    def summarise(documents: Sequence[str], on_finished: Callable[[int], None] | None = None) -> list[Summary]:
        return [best for best, *_ in every(documents, on_finished)]

    return summarise


def decode_candidates(
    model: Path,
    engine: Engine,
    documents: Sequence[str],
    params: GenerationParams,
    on_finished: Callable[[int], None] | None = None,
) -> tuple[list[list[str]], int]:
    """`num_return_sequences` summaries a document, best first, and how many documents were cut."""
    found = _hypotheses_of(model, engine, params)(documents, on_finished)
    return [[summary.text for summary in summaries] for summaries in found], sum(of[0].source_cut for of in found)


def _hypotheses_of(
    model: Path, engine: Engine, params: GenerationParams
) -> Callable[[Sequence[str], Callable[[int], None] | None], list[list[Summary]]]:
    tokenizer = load_tokenizer(str(model))

    def summarise(documents: Sequence[str], on_finished: Callable[[int], None] | None) -> list[list[Summary]]:
        ids, lengths = _sources(tokenizer, documents, engine.info.max_source_tokens)
        # Longest first: running slots then hold sources of like length.
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        outputs = run_engine(engine, [ids[i] for i in order], params, on_finished)
        found: dict[int, list[Summary]] = {}
        for i, output in zip(order, outputs, strict=True):
            found[i] = [
                Summary(
                    text=tokenizer.decode(hypothesis.token_ids, skip_special_tokens=True).strip(),
                    tokens=len(hypothesis.token_ids),
                    source_tokens=lengths[i],
                    source_cut=lengths[i] > len(ids[i]),
                    at_limit=hypothesis.finish_reason == "length",
                )
                for hypothesis in output.hypotheses
            ]
        return [found[i] for i in range(len(ids))]

    return summarise


def generate_summariser(
    model: Path, device: str = "cpu", dtype: str = "float32", batch_size: int = BATCH_SIZE
) -> Summariser:
    """`generate` of transformers with the model's own settings, in padded batches of like length.

    It serves no requests: this is for baselines that the engine does not have. An output counts as cut when it has no
    end token, and where `forced_eos_token_id` writes one at the limit, also when it is as long as it can be.

    Raises:
        EvaluationError: the dtype is int8, which is the engine's alone.
        OSError, ValueError: transformers cannot read the folder, or it lacks weights that the model needs.
    """
    if dtype == "int8":
        raise EvaluationError(f"int8 is the engine's alone; {model} is decoded by `generate`: use float32 or bfloat16")
    network, tokenizer = load_model(model)
    network.to(device=torch.device(device), dtype=getattr(torch, dtype))
    settings = network.generation_config
    longest = settings.max_new_tokens or settings.max_length - 1
    ends = {settings.eos_token_id} if isinstance(settings.eos_token_id, int) else set(settings.eos_token_id)
    limit = source_limit(network)

    @torch.inference_mode()
    def summarise(documents: Sequence[str], on_finished: Callable[[int], None] | None = None) -> list[Summary]:
        ids, lengths = _sources(tokenizer, documents, limit)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        found: dict[int, Summary] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(device)
            outputs = network.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for i, row in zip(rows, outputs[:, 1:].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), None)
                tokens = row if end is None else row[: end + 1]
                forced = settings.forced_eos_token_id is not None and len(tokens) >= longest
                text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                found[i] = Summary(text, len(tokens), lengths[i], lengths[i] > len(ids[i]), end is None or forced)
            if on_finished is not None:
                on_finished(len(found))
        return [found[i] for i in range(len(ids))]

    return summarise


def _sources(tokenizer: AnyTokenizer, documents: Sequence[str], limit: int) -> tuple[list[list[int]], list[int]]:
    """Token ids cut to `limit`, and the lengths before that."""
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in documents]
    lengths = [len(tokens) for tokens in ids]
    if max(lengths, default=0) > limit:
        ids = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in documents]
    return ids, lengths
