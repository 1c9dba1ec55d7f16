"""End to end over HTTP, encoding included, against `generate` in this process: `python -m benchmarks.serving`.

Starts the real server on a free port with a random bert-base2bert-base checkpoint (the shipped model's tokenizer beside
it), sends 1 and 8 texts of exactly 512 tokens at the same time, each as a request of its own, with forced lengths, and
waits for all answers. In turn with it, a warmed `generate` of the same dtype gets the same texts as one batch. Both
sides turn texts into ids and ids into texts. One side works at a time; the other one is idle, in its own process.

The server chooses for itself how many texts it encodes together. Knows nothing of arrival over time: requests that
trickle in are where batching in flight gains most, and no static batch can be compared with them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import texts
from benchmarks.contenders import FIRST_WORD, SIZES, VOCAB, Generate, Size, forced_config, write_checkpoint
from benchmarks.report import Report, Spread, cores, significant
from train.warm_start import load_tokenizer

PAUSE = 0.3  # seconds between two turns
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    """Measure and print."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    report = Report("End to end over HTTP against `generate`", args.device)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, size)
        for file in TOKENIZER_FILES:
            shutil.copy(texts.checkpoint(args.model) / file, folder)
        documents = documents_of(folder, size, max(args.requests))
        for dtype in args.dtypes:
            rows += measure(args, folder, size, documents, dtype)
    report.say(
        f"Milliseconds from the first request to the last answer; {size.source_tokens} source tokens, "
        f"{size.new_tokens} forced tokens, 4 beams; {args.threads} threads; median of {args.rounds} rounds (range)."
    )
    report.table(
        ["dtype (generate's)", "requests", "over HTTP", "generate", "ratio", "differing"],
        [
            [
                row["dtype"] if row["dtype"] == row["generate_dtype"] else f"{row['dtype']} ({row['generate_dtype']})",
                row["requests"],
                Spread(*row["http_ms"]).show(digits=0),
                Spread(*row["generate_ms"]).show(digits=0),
                Spread(*row["ratio"]).show(),
                f"{row['differing']} of {row['requests']}",
            ]
            for row in rows
        ],
    )
    report.finish({"size": args.size, "threads": args.threads, "rounds": args.rounds, "rows": rows}, args.output)


def measure(
    args: argparse.Namespace, folder: Path, size: Size, documents: list[str], dtype: str
) -> list[dict[str, Any]]:
    """One server of one dtype, in turn with generate."""
    reference = "float32" if dtype == "int8" else dtype
    generate = Generate(folder, reference, args.device, forced_config(size.new_tokens))
    tokenizer = load_tokenizer(str(folder))
    rows = []

    def in_process(chosen: list[str]) -> list[list[int]]:
        outputs = generate.generate(tokenizer(chosen)["input_ids"])
        for tokens in outputs:
            tokenizer.decode(tokens, skip_special_tokens=True)
        return outputs

    environment = {
        "PRECIS_MODEL": str(folder),
        "PRECIS_DEVICE": args.device,
        "PRECIS_DTYPE": dtype,
        "PRECIS_NUM_THREADS": str(args.threads),
    }
    with (
        server(environment) as url,
        httpx.Client(base_url=url, timeout=None) as client,
        ThreadPoolExecutor(max(args.requests)) as pool,
    ):

        def over_http(chosen: list[str]) -> list[list[int]]:
            return list(pool.map(lambda text: ask(client, text, size.new_tokens), chosen))

        for count in args.requests:
            chosen = documents[:count]
            sides: dict[str, Callable[[list[str]], list[list[int]]]] = {"http": over_http, "generate": in_process}
            outputs = {name: side(chosen) for name, side in sides.items()}  # warm
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(args.rounds):
                for name in sorted(sides, reverse=number % 2 == 0):
                    time.sleep(PAUSE)
                    started = time.perf_counter()
                    sides[name](chosen)
                    seconds[name].append(time.perf_counter() - started)
            ratios = [theirs / ours for ours, theirs in zip(seconds["http"], seconds["generate"], strict=True)]
            row = {
                "dtype": dtype,
                "generate_dtype": reference,
                "requests": count,
                "http_ms": Spread.of(1e3 * s for s in seconds["http"]).plain(),
                "generate_ms": Spread.of(1e3 * s for s in seconds["generate"]).plain(),
                "ratio": Spread.of(map(significant, ratios)).plain(),
                "differing": sum(a != b for a, b in zip(outputs["http"], outputs["generate"], strict=True)),
            }
            rows.append(row)
            print(f"{dtype}, {count} requests: {row['ratio'][0]:.2f} x", file=sys.stderr, flush=True)
    return rows


@contextmanager
def server(environment: dict[str, str]) -> Iterator[str]:
    """The real server as a process; gives its URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "app"],
        env={**os.environ, "PRECIS_PORT": "0", "PRECIS_LOG_LEVEL": "error", **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            found = next((m for line in process.stdout if (m := re.search(r"(http://\S+)/summarize", line))), None)
            if found is None:
                raise SystemExit(f"the server did not start (exit status {process.wait()})")
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.read()  # to the end: a pipe closed under the server would be an error there


def ask(client: httpx.Client, text: str, new_tokens: int) -> list[int]:
    """One request with forced lengths; the tokens of its summary."""
    options = {
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "length_penalty": 1.0,
        "early_stopping": False,
    }
    body = {"inputs": text, "parameters": {"generate_parameters": options, "return": ["tokens"]}}
    response = client.post("/summarize", json=body)
    if response.status_code != 200:
        raise SystemExit(f"the server answered {response.status_code}: {response.text}")
    (summary,) = response.json()
    tokens: list[int] = summary["token_ids"]
    return tokens


def documents_of(folder: Path, size: Size, count: int) -> list[str]:
    """Different texts of exactly so many tokens, special tokens included: words that are one token each."""
    tokenizer = load_tokenizer(str(folder))
    words = [
        word
        for word in tokenizer.convert_ids_to_tokens(range(FIRST_WORD, VOCAB))
        if word.isascii() and word.isalpha() and len(word) > 3
    ]
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(count):
        chosen = torch.randint(len(words), (size.source_tokens - 2,), generator=generator).tolist()
        documents.append(" ".join(words[i] for i in chosen))
    lengths = {len(ids) for ids in tokenizer(documents)["input_ids"]}
    if lengths != {size.source_tokens}:
        raise SystemExit(f"this tokenizer makes {lengths} tokens of the texts, not {size.source_tokens}")
    return documents


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder whose tokenizer is copied; default: the store's newest")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    return parser.parse_args()


if __name__ == "__main__":
    main()
