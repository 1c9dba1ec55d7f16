"""What README and docs say stands in the code: settings with their defaults, targets of make, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def documented_settings() -> dict[str, str]:
    """Variable name -> the default cell of README's table."""
    return dict(re.findall(r"^\| `(PRECIS_\w+)` \| (.*?) \|", README, flags=re.MULTILINE))


def test_readme_lists_exactly_the_settings_there_are() -> None:
    assert set(documented_settings()) == {f"PRECIS_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_readme_has_the_default(name: str) -> None:
    default = Settings.model_fields[name].default
    cell = documented_settings()[f"PRECIS_{name.upper()}"]
    if default is None:  # computed, or nothing: said in words
        assert "`" not in cell
        return
    if isinstance(default, list):
        default = ",".join(default)
    expected = f"{default:g}" if isinstance(default, float) else str(default)
    assert cell == f"`{expected}`"


def test_every_make_target_that_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"^make (\w+)|`make (\w+)", README, flags=re.MULTILINE)
    assert named
    assert {a or b for a, b in named} <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if not re.match(r"\w+:", t)]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert "<!--" not in (ROOT / "README.md").read_text(encoding="utf-8")
