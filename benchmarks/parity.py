"""Does the engine say what `generate` says? `python -m benchmarks.parity [--cases N] [--kinds] [--jobs N]`.

Many random tiny models in fp32 (layers, heads, sizes, vocabulary, activation, sharpness, how likely the end is; the
weights of every second one as if they had been saved in fp16), and for each a handful of texts with random options,
decoded in flight by one engine with few slots or many. The oracle runs on the CPU, one text at a time: `generate`, or
for groups of beams, which it has not, the reference in tests/reference.
Tokens, scores and token log-probabilities are compared; tests/parity.py says what counts as a float tie.

Prints cases by kind of search, the ties and the mismatches with their margins and options, and a last line of JSON.
Exit status 1 if a mismatch is not explained. Knows nothing of speed, bf16 or int8.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from transformers.utils import logging

from app.engine import Engine, EngineConfig, GenerationParams, Sequence
from benchmarks.report import Report, cores, significant
from tests.parity import Recipe, Verdict, classify, expected_outcome, kind_of, outcome_of
from tests.recorder import Recorder
from tests.tiny import (
    DECODERS,
    ENCODERS,
    random_diverse_params,
    random_params,
    random_shape,
    random_sources,
    save,
    without_padding,
)

CASES_PER_MODEL = 20
DIVERSE_SHARE = 0.15
KINDS = ("greedy", "beam", "diverse")
MEASURED = ("margin", "difference", "noise", "others_noise")


@dataclass(frozen=True)
class Task:
    """One model and its cases."""

    seed: int
    cases: int
    device: str
    kinds: bool  # any kind of encoder and decoder that the engine has a network for, not BERT's alone


@dataclass(frozen=True)
class Record:
    """What became of one case."""

    recipe: Recipe
    source: tuple[int, ...]
    params: GenerationParams
    verdict: Verdict
    hypotheses: int  # that the oracle has
    error: str | None

    @property
    def options(self) -> dict[str, object]:
        """What the request asks for beyond the defaults."""
        plain = GenerationParams()
        values = ((f.name, getattr(self.params, f.name)) for f in fields(self.params))
        return {name: value for name, value in values if value != getattr(plain, name)}


def run(task: Task) -> list[Record]:
    """Decode a model's cases in one engine, and judge each."""
    rng = random.Random(task.seed)
    # As drawn before there were other kinds, if those are not asked for: a seed names the same model.
    kinds = ("bert", "bert")
    if task.kinds:
        kinds = (DECODERS[task.seed % len(DECODERS)], ENCODERS[task.seed // len(DECODERS) % len(ENCODERS)])
    shape = replace(random_shape(rng, *kinds), float16_weights=task.seed % 2 == 1)
    recipe = Recipe(task.seed, rng.choice([1.0, 3.0, 6.0, 12.0, 30.0]), shape)
    model = recipe.model()
    config = EngineConfig(
        max_num_seqs=rng.choice([1, 3, 8, 16]),
        max_encode_tokens=rng.choice([1, 64, 4096]),
        device=task.device,
        dtype="float32",
    )
    sources = random_sources(task.cases, task.seed, min(60, shape.positions - 2), shape.vocab)
    sequences = [
        Sequence(
            tuple(ids),
            (random_diverse_params if rng.random() < DIVERSE_SHARE else random_params)(rng, shape.vocab),
        )
        for ids in sources
    ]
    if shape.decoder == "roberta":
        for sequence in sequences:
            sequence.params = without_padding(sequence.params)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.from_folder(save(model, Path(folder)), config)
    with Recorder() as recorder:
        for sequence in sequences:
            engine.add(sequence)
        while engine.scheduler.has_work:
            engine.step()
    records = []
    for sequence in sequences:
        source, params = sequence.source_ids, sequence.params
        theirs = expected_outcome(model, source, params)
        verdict = classify(recipe, source, params, outcome_of(sequence), theirs, recorder.logits(sequence))
        records.append(
            Record(recipe, sequence.source_ids, sequence.params, verdict, len(theirs.tokens), sequence.error)
        )
    return records


def prepare() -> None:
    """A worker: one thread, and no word of flags that a search does not use."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first model; the next ones count up")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes")
    parser.add_argument("--device", default="cpu", help="the engine's; the oracle is on the CPU")
    parser.add_argument("--output", type=Path, help="also write the report here")
    parser.add_argument("--kinds", action="store_true", help="RoBERTa, ELECTRA, GPT-2 and DistilBERT too")
    args = parser.parse_args()
    report = Report("The engine against `generate`, fp32", args.device)
    tasks = [
        Task(args.seed + index, min(CASES_PER_MODEL, args.cases - first), args.device, args.kinds)
        for index, first in enumerate(range(0, args.cases, CASES_PER_MODEL))
    ]
    records: list[Record] = []
    started = time.monotonic()
    # Fresh processes: a fork would inherit torch's threads, and cannot use CUDA.
    with multiprocessing.get_context("spawn").Pool(args.jobs, prepare) as pool:
        for done, found in enumerate(pool.imap_unordered(run, tasks), 1):
            records += found
            for record in found:  # at once: a run that is cut short has said so
                if not record.verdict.accepted:
                    print(f"MISMATCH {record}", file=sys.stderr, flush=True)
            if done % max(1, len(tasks) // 20) == 0:
                seconds = time.monotonic() - started
                print(f"{len(records)} cases, {seconds:.0f} s", file=sys.stderr, flush=True)
    return show(report, records, len(tasks), time.monotonic() - started, args.output)


def show(report: Report, records: list[Record], models: int, seconds: float, output: Path | None) -> int:
    """Print everything; returns the exit status."""
    counts = Counter((kind_of(r.params), r.verdict.kind) for r in records)
    empty = Counter(kind_of(r.params) for r in records if r.hypotheses == 0)
    verdicts = ("equal", "fp64", "noise", "mismatch")
    rows = [
        [kind, sum(counts[kind, v] for v in verdicts), *(counts[kind, v] for v in verdicts), empty[kind]]
        for kind in KINDS
    ]
    rows.append(["all", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))])
    headers = ["search", "cases", "equal", "tie: fp64 agrees", "tie: within noise", "mismatches", "no hypothesis"]
    report.say(f"{models} models, {len(records)} texts, {seconds:.0f} s.")
    mixed = Counter((r.recipe.shape.encoder, r.recipe.shape.decoder, r.verdict.accepted) for r in records)
    report.table(
        ["encoder, decoder", "accepted", "mismatches"],
        [[f"{e}, {d}", mixed[e, d, True], mixed[e, d, False]] for e, d in sorted({pair[:2] for pair in mixed})],
    )
    report.table(headers, rows)
    used = Counter(name for r in records for name in r.options)
    report.table(["option", "cases"], sorted(used.items()))
    others = [r for r in records if r.verdict.kind != "equal"]
    if others:
        report.table(
            ["model", "search", "verdict", "margin", "fp32 - fp64 of the two", "engine's noise", "others' noise"],
            [
                [r.recipe.seed, kind_of(r.params), r.verdict.kind, *(f"{value:.2e}" for value in r.verdict.measured)]
                for r in sorted(others, key=lambda r: (r.verdict.accepted, r.recipe.seed))
            ],
        )
    unexplained = [r for r in records if not r.verdict.accepted]
    for record in unexplained:
        report.say(
            f"MISMATCH {record.verdict} {record.error or ''}\n{record.recipe}\n{record.options}\n{record.source}"
        )
    results = {
        "cases": len(records),
        "models": models,
        "seconds": round(seconds),
        "by_search": {row[0]: dict(zip(headers[1:], row[1:], strict=True)) for row in rows},
        "options": dict(sorted(used.items())),
        "ties": [
            {
                "model": r.recipe.seed,
                "verdict": r.verdict.kind,
                **dict(zip(MEASURED, map(significant, r.verdict.measured), strict=True)),
                "options": {name: str(value) for name, value in r.options.items()},
            }
            for r in others
            if r.verdict.accepted
        ],
        "mismatches": len(unexplained),
    }
    report.finish(results, output)
    return 1 if unexplained else 0


if __name__ == "__main__":
    raise SystemExit(main())
