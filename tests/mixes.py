"""Tiny random bases of every kind that can be mixed, with tokenizers of their families: real files, no network.

Knows what each kind's configuration and tokenizer look like. Does not know training, export or the service.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertTokenizerFast,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from train.config import RunConfig, config_from_dict

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te", "vo") for b in ("ban", "der", "fin", "gul", "hom", "san")]
WORD_PIECES = ("bert", "electra", "distilbert")
POSITIONS = 64
MAX_LENGTH = 12


@dataclass(frozen=True)
class Mix:
    """Two kinds of checkpoint and how they are joined.

    Attributes:
        decoder: the encoder's kind again is the encoder's very checkpoint.
        width: of the encoder; other than 16, the decoder's, its output is projected.
        settings: more of `[model]`.
    """

    name: str
    encoder: str
    decoder: str
    width: int = 16
    layers: int = 2
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def shares(self) -> bool:
        """Whether encoder and decoder are one set of weights."""
        return bool(self.settings.get("share_weights"))

    @property
    def two_tokenizers(self) -> bool:
        """Whether summaries are written in another vocabulary than sources: BERT's relatives have its own."""
        one = {self.encoder, self.decoder} <= set(WORD_PIECES)
        return self.encoder != self.decoder and not one


SHARE = {"share_weights": True}
MIXES = [
    Mix("BERT2BERT", "bert", "bert"),
    Mix("BERTShare", "bert", "bert", settings=SHARE),
    Mix("RoBERTa2RoBERTa", "roberta", "roberta"),
    Mix("RoBERTaShare", "roberta", "roberta", settings=SHARE),
    Mix("ELECTRA2ELECTRA", "electra", "electra"),
    Mix("BERT2GPT2", "bert", "gpt2", width=24),
    Mix("RoBERTa2GPT2", "roberta", "gpt2"),
    Mix("DistilBERT2BERT", "distilbert", "bert", width=24),
    Mix("ELECTRA2BERT", "electra", "bert"),
    Mix("ALBERT2BERT", "albert", "bert", width=24),
    Mix("MPNet2BERT", "mpnet", "bert"),
    Mix("ModernBERT2BERT", "modernbert", "bert", width=24),
    Mix("DeBERTa-v2-2BERT", "deberta-v2", "bert"),
    Mix("FNet2BERT", "fnet", "bert", width=24),
    Mix("BERT2BERT, decoder 4 to 2 layers", "bert", "bert", layers=4, settings={"decoder_layers": 2}),
    Mix("BERT2BERT, words added", "bert", "bert", settings={"added_tokens": [f"{word}." for word in WORDS]}),
    Mix("BERTShare, decoder 4 to 2 layers", "bert", "bert", layers=4, settings={**SHARE, "decoder_layers": 2}),
]
BASELINES = ["bart", "pegasus"]


def make_base(folder: Path, kind: str, hidden: int = 16, layers: int = 2) -> Path:
    """Save a random model of this kind and a tokenizer as its family has one."""
    torch.manual_seed(len(kind))
    tokenizer = make_tokenizer(kind)
    tokenizer.save_pretrained(folder)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": first(tokenizer), "eos_token_id": last(tokenizer)}
    config = make_config(kind, len(tokenizer), hidden, layers, ids)
    kinds = {"gpt2": AutoModelForCausalLM, "bart": AutoModelForSeq2SeqLM, "pegasus": AutoModelForSeq2SeqLM}
    kinds.get(kind, AutoModel).from_config(config).save_pretrained(folder)
    return folder


def make_config(kind: str, vocab: int, hidden: int, layers: int, ids: dict[str, int | None]) -> Any:
    """A configuration in the words of its kind."""
    common: dict[str, Any] = {"vocab_size": vocab, "initializer_range": 0.2}
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_embd": hidden, "n_layer": layers, "n_head": 2, "n_positions": POSITIONS}
        return AutoConfig.for_model(
            kind, **common, **sizes, bos_token_id=ids["bos_token_id"], eos_token_id=ids["eos_token_id"]
        )
    if kind == "distilbert":
        sizes = {"dim": hidden, "n_layers": layers, "n_heads": 2, "hidden_dim": 2 * hidden}
        return AutoConfig.for_model(
            kind, **common, **sizes, max_position_embeddings=POSITIONS, pad_token_id=ids["pad_token_id"]
        )
    if kind in BASELINES:
        sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
                 for name, size in (("layers", layers), ("attention_heads", 2), ("ffn_dim", 2 * hidden))}  # fmt: skip
        start = ids["eos_token_id"] if kind == "bart" else ids["pad_token_id"]
        return AutoConfig.for_model(
            kind, vocab_size=vocab, init_std=0.2, d_model=hidden, **sizes, **ids, max_position_embeddings=POSITIONS,
            decoder_start_token_id=start, forced_eos_token_id=ids["eos_token_id"], scale_embedding=kind == "pegasus",
        )  # fmt: skip
    special: dict[str, dict[str, Any]] = {
        "electra": {"embedding_size": 12},
        "albert": {"embedding_size": 12},
        "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": ids["bos_token_id"],
                       "sep_token_id": ids["eos_token_id"]},
        "deberta-v2": {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
                       "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    }  # fmt: skip
    behind_padding = kind in ("roberta", "mpnet")
    return AutoConfig.for_model(
        kind,
        **common,
        **special.get(kind, {}),
        **ids,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=POSITIONS + (2 if behind_padding else 0),
    )


def make_tokenizer(kind: str) -> Any:
    """A tokenizer of a kind's family, taught the few words that there are."""
    if kind in WORD_PIECES:
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = [*specials, *"abcdefghiklmnorstuv.", *(f"##{c}" for c in "abcdefghiklmnorstuv"), *WORDS]
        return BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)})
    if kind == "roberta":
        vocab, merges = byte_pairs(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        return RobertaTokenizer(vocab=vocab, merges=merges)
    if kind == "gpt2":
        vocab, merges = byte_pairs([], ["<|endoftext|>"])
        return GPT2Tokenizer(vocab=vocab, merges=merges)
    if kind in ("bart", "modernbert"):
        specials = ["<s>", "<pad>", "</s>", "<unk>"] if kind == "bart" else ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
        vocab, merges = byte_pairs(specials)
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return wrapped(backend, specials[0], specials[2], specials[1], specials[3], kind)
    if kind == "mpnet":
        pieces = [
            "<s>",
            "<pad>",
            "</s>",
            "[UNK]",
            *"abcdefghiklmnorstuv.",
            *(f"##{c}" for c in "abcdefghiklmnorstuv"),
            *WORDS,
        ]
        backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return wrapped(backend, "<s>", "</s>", "<pad>", "[UNK]", kind)
    specials = ["<pad>", "</s>", "<unk>"] if kind == "pegasus" else ["<pad>", "<unk>", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=specials, unk_token="<unk>", initial_alphabet=list("abcdefghiklmnorstuv."),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(sentences(), trainer)
    if kind == "pegasus":
        return wrapped(backend, None, "</s>", "<pad>", "<unk>", kind)
    return wrapped(backend, "[CLS]", "[SEP]", "<pad>", "<unk>", kind)


def wrapped(backend: Tokenizer, start: str | None, end: str, padding: str, unknown: str, kind: str) -> Any:
    """The backend with its special tokens; PEGASUS has no start token, BART calls its own bos and cls."""
    tokens = [token for token in (start, end, padding, unknown) if token is not None]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    template = f"{start} $A {end}" if start else f"$A {end}"
    special = [(token, backend.token_to_id(token)) for token in (start, end) if token is not None]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"eos_token": end, "pad_token": padding, "unk_token": unknown}
    if start:
        names |= {"cls_token": start, "sep_token": end, "bos_token": start}
    if kind == "modernbert":
        del names["bos_token"], names["eos_token"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def byte_pairs(first_tokens: list[str], last_tokens: list[str] = []) -> tuple[dict[str, int], list[tuple[str, str]]]:  # noqa: B006
    """A vocabulary of bytes and merges learnt from the words, special tokens in front or behind."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        sentences(), trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    found = json.loads(backend.to_str())["model"]
    learnt = sorted(found["vocab"], key=found["vocab"].__getitem__)
    vocab = {token: i for i, token in enumerate([*first_tokens, *learnt, *last_tokens])}
    return vocab, [tuple(pair) for pair in found["merges"]]


def first(tokenizer: Any) -> int | None:
    """What its texts begin with."""
    return tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id


def last(tokenizer: Any) -> int:
    """What its texts end with."""
    return int(tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id)


def sentences(seed: int = 0, count: int = 60) -> Iterator[str]:
    """Random words; the same ones each time."""
    rng = random.Random(seed)
    for _ in range(count):
        yield " ".join(rng.choices(WORDS, k=rng.randint(4, 16))) + "."


def write_data(folder: Path, rows: int = 32) -> Path:
    """Documents of random words; a summary is the first words of its document, so that there is something to learn."""
    for seed, (split, count) in enumerate((("train", rows), ("validation", 4), ("test", 4))):
        documents = list(sentences(seed + 1, count))
        lines = [
            {"id": f"{split} {i}", "document": text, "summary": " ".join(text.split()[:3])}
            for i, text in enumerate(documents)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def run_config(data: Path, output_dir: Path, model: dict[str, Any], **optim: Any) -> RunConfig:
    """A run of a few steps."""
    return config_from_dict(
        {
            "name": "mix",
            "output_dir": str(output_dir),
            "model": {"hidden_dropout": 0.0, **model},
            "data": {"path": str(data), "max_source_tokens": POSITIONS, "max_target_tokens": MAX_LENGTH},
            "optim": {
                "epochs": 1.0,
                "batch_size": 4,
                "learning_rate": 3e-3,
                "new_weights_learning_rate": 1e-2,
                "warmup_steps": 0,
                "precision": "fp32",
                "label_smoothing": 0.0,
                **optim,
            },
            "eval": {"rows": 2, "batch_size": 4},
            "generation": {
                "num_beams": 2,
                "max_length": MAX_LENGTH,
                "min_length": 3,
                "no_repeat_ngram_size": 3,
            },
        }
    )
