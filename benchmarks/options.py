"""What the shipped checkpoint says with each decode option: `python -m benchmarks.options`.

One conversation, one row an option; the rest of the settings are the checkpoint's own. It shows meanings, it measures
nothing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.engine import Engine, EngineConfig, GenerationParams
from app.model_registry import find_model
from app.routes.openapi import CONVERSATION
from app.tokenization import Tokenizer

EXAMPLES: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 1},
    {"num_return_sequences": 3},
    {"max_new_tokens": 10},
    {"min_new_tokens": 40},
    {"length_penalty": 3.0},
    {"length_penalty": -2.0},
    {"early_stopping": "never"},
    {"no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 2},
    {"repetition_penalty": 2.0},
    {"bad_words_ids": ((1001,),)},
    {"suppress_tokens": (1001, 1015)},
    {"begin_suppress_tokens": (1001,)},
    {"forced_bos_token_id": 2057},
    {"forced_eos_token_id": 102, "max_new_tokens": 10},
    {"do_sample": True, "num_beams": 1, "seed": 7},
    {"do_sample": True, "num_beams": 1, "seed": 8, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"do_sample": True, "num_beams": 1, "seed": 7, "num_return_sequences": 2},
    {"do_sample": True, "num_beams": 4, "seed": 7},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 2.0, "num_return_sequences": 3},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm2minilm-dialogsum")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"))
    arguments = parser.parse_args()
    folder = find_model(arguments.model, arguments.model_store, None).folder
    engine = Engine.from_folder(folder, EngineConfig())
    tokenizer = Tokenizer.from_folder(folder, engine.info.max_source_tokens)
    (source,) = tokenizer.encode([CONVERSATION], "error", lambda index: f"/inputs/{index}")
    own = GenerationParams.from_generation_config(engine.generation_config)
    rows = []
    print(CONVERSATION + "\n")
    for example in EXAMPLES:
        (output,) = engine.generate([source.ids], replace(own, **example))
        texts = [tokenizer.decode(h.token_ids, None) for h in output.hypotheses]
        print(json.dumps(example))
        for text, hypothesis in zip(texts, output.hypotheses, strict=True):
            print(f"  {hypothesis.score:7.3f}  {text}")
        rows.append({"options": example, "summaries": texts})
    print(json.dumps({"model": f"{folder.parent.name}@{folder.name}", "rows": rows}))


if __name__ == "__main__":
    main()
