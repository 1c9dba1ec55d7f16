"""Decode settings chosen on validation: `python -m train search-decoding --model FOLDER [--freeze]`.

Knows the settings that are tried, what each costs and says, and the rule of choice. Does not know training, and never
reads test.

The rule: the highest mean of ROUGE-1, ROUGE-2 and ROUGE-L, to two decimals; among equals, the fewest decoder rows a
summary (beams times steps), which, unlike seconds, are the same on every machine.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.engine import Engine, GenerationParams
from train.bootstrap import format_interval, paired_difference
from train.config import DataConfig
from train.data import Pair, data_hash, read_split
from train.metrics import ROUGE_TYPES, References, rouge_rows
from train.records import MANIFEST, EvaluationError, read_json, weights_hash
from train.serving_copy import model_folder, serving_copy
from train.summarise import build_engine, decode, own_params

# In the order in which coordinate descent goes through them.
OPTIONS = ("num_beams", "length_penalty", "min_length", "max_length", "no_repeat_ngram_size")
ROUNDS = 3
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """What one choice of settings says and costs.

    Attributes:
        settings: the OPTIONS, by their names in `generation_config.json`.
        rouge: each of ROUGE_TYPES.
        quality: their mean.
        seconds: of the engine, a summary; several run at a time, as when it serves.
        steps: tokens decoded, a summary.
        decoder_rows: beams times steps, a summary.
        words: of a summary.
        row_means: `quality` of each row.
    """

    settings: Settings
    rouge: Mapping[str, float]
    quality: float
    seconds: float
    steps: float
    decoder_rows: float
    words: float
    row_means: tuple[float, ...]

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: see the rule above."""
        return round(self.quality, 2), -self.decoder_rows


class Search:
    """Tries settings on the same rows, each once, and says how far it is."""

    def __init__(
        self, folder: Path, engine: Engine, own: GenerationParams, pairs: Sequence[Pair], references: References
    ) -> None:
        self.folder, self.engine, self.own, self.pairs, self.references = folder, engine, own, pairs, references
        self.trials: dict[tuple[Any, ...], Trial] = {}

    def run(self, settings: Settings) -> Trial:
        """The trial of these settings; a length penalty changes nothing without beams, and is not told apart there."""
        settings = dict(settings)
        if settings["num_beams"] == 1:
            settings["length_penalty"] = self.own.length_penalty
        key = tuple(settings[name] for name in OPTIONS)
        if key not in self.trials:
            self.trials[key] = self._decode(settings)
            best = max(self.trials.values(), key=lambda trial: trial.rank)
            words = " ".join(f"{name}={value}" for name, value in settings.items())
            print(
                f"{len(self.trials)} settings tried; {words}: {self.trials[key].quality:.2f}; best {best.quality:.2f}",
                file=sys.stderr,
                flush=True,
            )
        return self.trials[key]

    def _decode(self, settings: Settings) -> Trial:
        params = params_of(self.own, settings)
        tally = self.engine.tally
        before = (tally.encode_seconds.total + tally.step_seconds.total, tally.step_texts.total, tally.rows)
        documents = [pair.document for pair in self.pairs]
        summaries, _ = decode(self.folder, self.engine, documents, params)
        after = (tally.encode_seconds.total + tally.step_seconds.total, tally.step_texts.total, tally.rows)
        seconds, steps, rows = ((b - a) / len(self.pairs) for a, b in zip(before, after, strict=True))
        scores = rouge_rows(summaries, [pair.references for pair in self.pairs], self.references)
        row_means = np.mean([scores[name] for name in ROUGE_TYPES], axis=0)
        return Trial(
            settings,
            {name: round(float(np.mean(scores[name])), 3) for name in ROUGE_TYPES},
            float(row_means.mean()),
            seconds,
            steps,
            rows,
            float(np.mean([len(text.split()) for text in summaries])),
            tuple(row_means.tolist()),
        )


def search_decoding(
    model: Path,
    data: DataConfig,
    space: Mapping[str, Sequence[Any]],
    rows: int | None = None,
    grid: bool = False,
    references: References = "first",
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Try settings of `space` on validation rows, from the model's own ones on, and choose by the rule above.

    Args:
        model: an exported folder, or a run's.
        space: values for some of OPTIONS; an option that is left out stays as it is.
        rows: of validation, from the first; None is all.
        grid: every combination; else coordinate descent: one option after the other, until a round changes nothing.

    Returns:
        `trials` (each with `pareto`: no other is as good and as fast), `own`, `chosen`, and the `difference` of chosen
        minus own with its 95 % interval over rows.

    Raises:
        EvaluationError: an unknown option, a value out of range, or the engine cannot decode.
        DataError: the data cannot be read.
    """
    if unknown := set(space) - set(OPTIONS):
        raise EvaluationError(f"{sorted(unknown)[0]} is not an option to search; these are: {', '.join(OPTIONS)}")
    pairs = read_split(data, "validation")[:rows]
    if len(pairs) < 2:
        raise EvaluationError("a choice needs at least two rows of validation")
    folder = model_folder(model)
    params = own_params(folder)
    own = settings_of(params)
    candidates = {name: list(space.get(name, [own[name]])) for name in OPTIONS}
    for name, values in candidates.items():
        for value in values:
            params_of(params, {**own, name: value})
    widest = replace(
        params,
        num_beams=max(own["num_beams"], *candidates["num_beams"]),
        max_new_tokens=max(own["max_length"], *candidates["max_length"]) - 1,
    )
    with serving_copy(folder) as servable:
        engine = build_engine(servable, widest, device, dtype)
        if engine.max_output_tokens < widest.max_new_tokens:
            raise EvaluationError(
                f"max_length {widest.max_new_tokens + 1} is beyond the model, which has positions for at most "
                f"{engine.max_output_tokens + 1}"
            )
        search = Search(servable, engine, params, pairs, references)
        started = time.monotonic()
        decode(servable, engine, [pairs[0].document], params)  # the first one is slower
        first = search.run(own)
        for settings in _grid(candidates) if grid else ():
            search.run(settings)
        if not grid:
            descend(search, first, candidates)
        seconds = time.monotonic() - started
    trials = list(search.trials.values())
    chosen = max(trials, key=lambda trial: trial.rank)
    on_front = pareto(trials)
    return {
        "model": {"folder": folder.name, "weights_sha256": weights_hash(folder)},
        "data": {"name": Path(data.path).name, "split": "validation", "rows": len(pairs), "sha256": data_hash(pairs)},
        "settings": {"references": references, "device": device, "dtype": dtype, "grid": grid, "space": candidates},
        "trials": [{**_plain(trial), "pareto": trial in on_front} for trial in trials],
        "own": _plain(first),
        "chosen": _plain(chosen),
        "difference": asdict(paired_difference(chosen.row_means, first.row_means)),
        "seconds": round(seconds, 1),
    }


def descend(search: Search, best: Trial, candidates: Mapping[str, Sequence[Any]]) -> Trial:
    """Coordinate descent: the best value of one option with the others as they are, then of the next."""
    for _ in range(ROUNDS):
        before = best
        for name in OPTIONS:
            around = [{**best.settings, name: value} for value in candidates[name]]
            best = max([best, *(search.run(s) for s in around if _possible(s))], key=lambda trial: trial.rank)
        if best is before:
            break
    return best


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats: none is as good in seconds and in quality, and better in one of them."""

    def beats(a: Trial, b: Trial) -> bool:
        return a.quality >= b.quality and a.seconds <= b.seconds and (a.quality, a.seconds) != (b.quality, b.seconds)

    return [trial for trial in trials if not any(beats(other, trial) for other in trials)]


def params_of(own: GenerationParams, settings: Settings) -> GenerationParams:
    """The engine's options for `settings`; lengths of `generate` count the start token, the engine's do not.

    Raises:
        EvaluationError: a value is out of range.
    """
    try:
        return replace(
            own,
            num_beams=settings["num_beams"],
            length_penalty=float(settings["length_penalty"]),
            min_new_tokens=max(0, settings["min_length"] - 1),
            max_new_tokens=settings["max_length"] - 1,
            no_repeat_ngram_size=settings["no_repeat_ngram_size"],
        )
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def settings_of(params: GenerationParams) -> dict[str, Any]:
    """The OPTIONS of `params`, by their names in `generation_config.json`."""
    return {
        "num_beams": params.num_beams,
        "length_penalty": params.length_penalty,
        "min_length": params.min_new_tokens + 1 if params.min_new_tokens else 0,
        "max_length": params.max_new_tokens + 1,
        "no_repeat_ngram_size": params.no_repeat_ngram_size,
    }


def check_not_exported(model: Path) -> Path:
    """The folder whose settings `freeze` may change.

    Raises:
        EvaluationError: it is an exported entry, which is not changed once it is written.
    """
    folder = model_folder(model)
    if (folder / MANIFEST).exists():
        raise EvaluationError(f"{folder} is an exported entry: freeze settings in the run's folder, and export again")
    return folder


def freeze(model: Path, result: Mapping[str, Any]) -> Path:
    """Write the chosen settings into a run's `generation_config.json`, and into its `run.json`, which the card reads.

    Raises:
        EvaluationError: as `check_not_exported`.
    """
    folder = check_not_exported(model)
    chosen = dict(result["chosen"]["settings"])
    path = folder / "generation_config.json"
    # New tokens would win over lengths.
    kept = {key: value for key, value in read_json(path).items() if key not in ("max_new_tokens", "min_new_tokens")}
    path.write_text(json.dumps({**kept, **chosen}, indent=2) + "\n", encoding="utf-8")
    if (folder / "run.json").exists():
        record = read_json(folder / "run.json")
        record["config"]["generation"] |= chosen
        record["decoding_search"] = {key: result[key] for key in ("data", "settings", "own", "chosen", "difference")}
        (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def format_pareto(result: Mapping[str, Any]) -> str:
    """Every trial from the fastest on: `*` is on the Pareto front, `>` is chosen, `=` the model's own."""
    lines = [
        f"   {'beams':>5}{'penalty':>9}{'min':>5}{'max':>5}{'n-gram':>7}{'R-1':>8}{'R-2':>8}{'R-L':>8}{'mean':>8}"
        f"{'s/summary':>11}{'steps':>7}{'rows':>8}{'words':>7}"
    ]
    for trial in sorted(result["trials"], key=lambda trial: trial["seconds"]):
        settings, rouge = trial["settings"], trial["rouge"]
        marks = (
            ("*" if trial["pareto"] else " ")
            + (">" if settings == result["chosen"]["settings"] else " ")
            + ("=" if settings == result["own"]["settings"] else " ")
        )
        lines.append(
            f"{marks}{settings['num_beams']:>5}{settings['length_penalty']:>9g}{settings['min_length']:>5}"
            f"{settings['max_length']:>5}{settings['no_repeat_ngram_size']:>7}"
            + "".join(f"{rouge[name]:>8.2f}" for name in ROUGE_TYPES)
            + f"{trial['quality']:>8.2f}{trial['seconds']:>11.4f}{trial['steps']:>7.1f}{trial['decoder_rows']:>8.1f}"
            f"{trial['words']:>7.1f}"
        )
    lines.append(
        f"{result['data']['rows']} rows of validation; * no other is as good and as fast, > chosen (best mean of "
        "ROUGE-1/2/L, then fewest decoder rows), = the model's own"
    )
    difference = result["difference"]
    lines.append(f"chosen minus own: {format_interval(difference)}, p = {difference['p_value']:.4f}")
    return "\n".join(lines)


def _grid(candidates: Mapping[str, Sequence[Any]]) -> Iterator[Settings]:
    for values in itertools.product(*(candidates[name] for name in OPTIONS)):
        settings = dict(zip(OPTIONS, values, strict=True))
        if _possible(settings):
            yield settings


def _possible(settings: Settings) -> bool:
    return bool(settings["min_length"] <= settings["max_length"])


def _plain(trial: Trial) -> dict[str, Any]:
    rounded = {key: round(getattr(trial, key), 4) for key in ("quality", "seconds", "steps", "decoder_rows", "words")}
    return {"settings": dict(trial.settings), "rouge": dict(trial.rouge), **rounded}
