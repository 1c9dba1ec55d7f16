"""Each fault in docs/reliability.md and docs/scaling.md names the test that shows its outcome, and that test exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
FAULTS = SCALING.partition("| what happens |")[2].partition("\n## ")[0]
ROWS = [
    row
    for row in [*PAGE.splitlines(), *FAULTS.splitlines()]
    if row.startswith("| ") and not row.startswith(("| fault |", "| outcome |"))
]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)(?:\[([^\]]+)\])?`")


def test_faults_are_listed() -> None:
    assert ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_named_test_exists(row: str) -> None:
    named = TEST.findall(row)
    assert named, "no test stands in this row"
    for path, function, case in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        functions = {node.name for node in ast.walk(ast.parse(source)) if hasattr(node, "name")}
        assert function in functions
        assert not case or f'"{case}"' in source
