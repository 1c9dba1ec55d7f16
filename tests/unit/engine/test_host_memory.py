"""What is freed stays with the process; in processes of their own, since a setting of glibc's is there to stay."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc's")

# Pages that are faulted in while blocks as large as logits come, each before the last has gone.
FAULTS = """
import resource, threading, torch
from app.engine.host_memory import keep_freed_memory
{setup}

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for mebibytes in [5, 5, 30, 30, 10] * 20:
        new = torch.ones(mebibytes * 2**18)
        held = new
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure():
    faults()
    print(faults())

thread = threading.Thread(target=measure)  # as the engine's
thread.start()
thread.join()
"""


def faults(setup: str, **environment: str) -> int:
    run = [sys.executable, "-c", FAULTS.format(setup=setup)]
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(run, capture_output=True, text=True, check=True, env=settings | environment)
    return int(found.stdout)


PAGES = 20 * 80 * 2**20 // os.sysconf("SC_PAGE_SIZE")


ENGINE = """
import pathlib, tempfile
from app.engine import Engine, EngineConfig
from tests.tiny import save, tiny_model
Engine.from_folder(save(tiny_model(1), pathlib.Path(tempfile.mkdtemp())), EngineConfig())
"""


def test_in_an_engines_process_blocks_as_large_as_logits_take_next_to_no_page_faults() -> None:
    assert faults(ENGINE) < PAGES / 100


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_environment_says_stays(environment: dict[str, str]) -> None:
    assert faults("assert not keep_freed_memory()", **environment) > PAGES / 2
