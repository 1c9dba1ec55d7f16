"""The benchmark of training: every recipe takes steps over the same rows, and padding is what it says."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from benchmarks import training
from benchmarks.training import OURS, RECIPES, main


def test_every_recipe_trains_on_the_same_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seconds of this process's own: rounds are too short to be compared while others have the cores.
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=time.process_time))
    results = main(["--precision", "fp32", "--batch-tokens", "2048", "--batches", "4", "--rounds", "2"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: printed[key] for key in results} == results
    assert printed["machine"]["commit"]
    assert results["rows"] >= 20
    recipes = results["recipes"]
    assert list(recipes) == list(RECIPES)
    padding = [recipes[name]["padded_tokens_per_token"] for name in RECIPES]
    assert padding[0] == padding[1] > padding[2] > padding[3]
    # 640 tokens a row, whatever it holds; and little more than it holds.
    assert padding[0] > 2
    assert padding[3] < 1.3
    assert recipes["original"]["times_original"] == 1
    assert all(len(recipe["examples_per_second_of_rounds"]) == 2 for recipe in recipes.values())
    # A tiny model gains less than a real one; that it gains can be seen.
    assert recipes[OURS]["times_original"] > 1
