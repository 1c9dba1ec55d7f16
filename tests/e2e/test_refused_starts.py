"""Starts that are refused: each exits 2, for starting again does not help, and says why, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import START_SECONDS, launch

pytestmark = pytest.mark.e2e

Starts = dict[str, Future[tuple[int, str]]]


@pytest.fixture(scope="module")
def changed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose only checkpoint has another tokenizer than its manifest says."""
    store = tmp_path_factory.mktemp("store")
    folder = store / "changed" / "1"
    folder.mkdir(parents=True)
    _link(checkpoint, folder)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_bytes(tokenizer.replace(b"a", b"b", 1))
    return store


@pytest.fixture(scope="module")
def truncated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file that is half of what it was, in a folder without a manifest."""
    folder = tmp_path_factory.mktemp("truncated")
    _link(checkpoint, folder)
    (folder / "manifest.json").unlink()
    weights = sorted(folder.glob("*.safetensors"))[0]
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[: len(content) // 2])
    return weights


def _link(checkpoint: Path, folder: Path) -> None:
    for file in checkpoint.resolve().iterdir():
        (folder / file.name).symlink_to(file.resolve())


@pytest.fixture(scope="module")
def starts(
    checkpoint: Path, changed: Path, truncated: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Starts]:
    """Exit status and words of each; two at a time, because a start takes seconds on one core."""
    folder = tmp_path_factory.mktemp("refused")

    def end(name: str, command: str, **settings: object) -> tuple[int, str]:
        process = launch(folder / name, command, **settings)
        try:
            return process.wait(START_SECONDS), (folder / name).read_text()
        finally:
            process.kill()
            process.wait()

    with ThreadPoolExecutor(2) as pool:
        yield {
            "disk": pool.submit(end, "disk", "tests.e2e.faulty_server disk", model=checkpoint),
            "truncated": pool.submit(end, "truncated", "app", model=truncated.parent),
            "changed": pool.submit(end, "changed", "app", model_store=changed),
            "address": pool.submit(end, "address", "app", host="0.0.0.0"),
            "setting": pool.submit(end, "setting", "app", max_num_beams=0),
        }


def refusal(start: Future[tuple[int, str]]) -> str:
    """Its words."""
    status, words = start.result()
    assert status == 2, words
    assert "Traceback" not in words
    return words


def test_a_disk_that_fails_while_the_model_is_read_refuses_the_start(starts: Starts) -> None:
    assert "error: the model cannot be read: [Errno 5] Input/output error" in refusal(starts["disk"])


def test_a_truncated_weights_file_without_a_manifest_refuses_the_start(starts: Starts, truncated: Path) -> None:
    assert f"error: {truncated} is damaged" in refusal(starts["truncated"])


def test_a_changed_file_is_not_served(starts: Starts, changed: Path) -> None:
    assert f"error: {changed / 'changed' / '1' / 'tokenizer.json'} has sha256" in refusal(starts["changed"])


def test_an_address_that_others_reach_needs_keys(starts: Starts) -> None:
    assert "error: PRECIS_HOST is 0.0.0.0, which others can reach" in refusal(starts["address"])


def test_a_wrong_setting_is_told_by_its_name(starts: Starts) -> None:
    assert "error: PRECIS_MAX_NUM_BEAMS: Input should be greater than" in refusal(starts["setting"])
