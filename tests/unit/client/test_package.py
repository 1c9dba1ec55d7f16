"""The client stands by itself: a machine that only asks needs neither torch nor FastAPI."""

from __future__ import annotations

import subprocess
import sys

from app import client
from tests.unit.test_imports import ROOT, imports_below, top, within

LIBRARIES = frozenset({"httpx", "httpx_sse", "pydantic", "tqdm"})
SERVERS = [
    *("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "transformers"),
    *("fastapi", "starlette", "uvicorn", "pydantic_settings", "prometheus_client", "tqdm"),
]


def test_it_imports_its_libraries_and_itself() -> None:
    wrong = [
        (path, module)
        for path, module in imports_below("app/client")
        if top(module) not in sys.stdlib_module_names | LIBRARIES and not within(module, "app.client")
    ]
    assert wrong == []


def test_it_runs_where_none_of_the_servers_libraries_is_installed() -> None:
    # None in sys.modules is what "not installed" looks like to an import.
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({SERVERS!r}))\n"
        "from app.client import AsyncSummarizer, NoReply, RetryPolicy, Summarizer\n"
        "with Summarizer('http://127.0.0.1:9', retry=RetryPolicy(max_retries=0)) as summarizer:\n"
        "    try:\n        summarizer.summarize('a')\n    except NoReply:\n        print('asked')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("asked\n", "")


def test_what_is_exported_is_there() -> None:
    assert sorted(client.__all__) == client.__all__
    assert all(hasattr(client, name) for name in client.__all__)
