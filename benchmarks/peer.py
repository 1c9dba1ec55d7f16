"""CTranslate2 at the work of benchmarks/contenders.py, in a process of its own.

In ours its threads and ours wait for each other: `benchmarks.engine` saw the engine's step take twice the time with the
library loaded beside it (benchmarks/results/2026-11-25-engine-cpu-peer-in-process.md). The process reads one line of
JSON for each run, the sources, and writes one, the timing. Knows CTranslate2's interface; does not know rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.contenders import EOS, PAD, START, UNKNOWN, VOCAB, Size, Sources, Timing, from_steps


class Peer:
    """The contender: CTranslate2 in its own process. A context manager, which ends it."""

    def __init__(self, folder: Path, compute_type: str, device: str, new_tokens: int, threads: int) -> None:
        words = {
            "--folder": folder,
            "--compute-type": compute_type,
            "--device": device,
            "--new-tokens": new_tokens,
            "--threads": threads,
        }
        command = [sys.executable, "-m", "benchmarks.peer", *(str(word) for pair in words.items() for word in pair)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.compute_type = self._read()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes its input, which ends it
        assert self.process.returncode is not None

    def run(self, sources: Sources) -> Timing:
        """All sources as one batch, timed over there."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([list(row) for row in sources]) + "\n")
        self.process.stdin.flush()
        return Timing(**json.loads(self._read()))

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"CTranslate2's process ended with status {self.process.wait()}")
        return line.rstrip("\n")


class CTranslate2:
    """A random BART of the same dimensions in CTranslate2, the nearest engine: it cannot load a BERT encoder-decoder.

    Its one call encodes and decodes, so it is called twice: for one token, and for all; the difference is `steps`.
    """

    def __init__(self, folder: Path, compute_type: str, device: str, new_tokens: int, threads: int) -> None:
        module = importlib.import_module("ctranslate2")
        self.new_tokens = new_tokens
        self.translator = module.Translator(
            str(folder),
            device=device.partition(":")[0],
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=threads,
        )
        self.compute_type = self.translator.compute_type

    def run(self, sources: Sources) -> Timing:
        """Two calls."""
        first, _ = self._call(sources, 1)
        total, tokens = self._call(sources, self.new_tokens)
        if any(len(row) != self.new_tokens for row in tokens):
            raise RuntimeError(
                f"ctranslate2 gave {sorted({len(row) for row in tokens})} tokens: {self.new_tokens} asked"
            )
        return from_steps(total, total - first, self.new_tokens, tokens)

    def _call(self, sources: Sources, new_tokens: int) -> tuple[float, list[list[int]]]:
        words = [[_word(token) for token in row] for row in sources]
        started = time.perf_counter()
        results = self.translator.translate_batch(
            words,
            beam_size=4,
            no_repeat_ngram_size=3,
            min_decoding_length=new_tokens,
            max_decoding_length=new_tokens,
            max_input_length=0,
        )
        elapsed = time.perf_counter() - started
        return elapsed, [[int(word[1:]) for word in result.hypotheses[0]] for result in results]


def write_bart(folder: Path, size: Size, seed: int = 0) -> None:
    """Make the BART and convert it; the weights are kept in fp32 there and become `compute_type` when loaded."""
    from tokenizers import Tokenizer, models
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=VOCAB,
        d_model=size.hidden,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=size.intermediate,
        decoder_ffn_dim=size.intermediate,
        max_position_embeddings=1024,
        bos_token_id=START,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
        normalize_before=False,  # CTranslate2's converter asks for it; transformers 5 has no such setting
    )
    BartForConditionalGeneration(config).eval().save_pretrained(folder / "bart")
    words = Tokenizer(models.WordLevel({_word(i): i for i in range(VOCAB)}, unk_token=_word(UNKNOWN)))
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=_word(START),
        eos_token=_word(EOS),
        pad_token=_word(PAD),
        unk_token=_word(UNKNOWN),
    ).save_pretrained(folder / "bart")
    converters = importlib.import_module("ctranslate2.converters")
    converters.TransformersConverter(str(folder / "bart")).convert(str(folder / "converted"))


def main() -> None:
    """The process: its compute type, then a timing for each line of sources, until there are no more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--compute-type", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    translator = CTranslate2(args.folder, args.compute_type, args.device, args.new_tokens, args.threads)
    print(translator.compute_type, flush=True)
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(translator.run(json.loads(line)))), flush=True)


def _word(token: int) -> str:
    return f"w{token}"


if __name__ == "__main__":
    main()
