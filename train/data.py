"""From files or the hub to pairs that can be trained on: reading, the preflight, tokenising.

Knows columns, splits, duplicates and leaks. Does not know the model, nor how anything is scored.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from train.added_tokens import rejoin
from train.config import DataConfig
from train.metrics import format_unscorable, is_unscorable
from train.tokenizer_pair import AnyTokenizer, TokenizerError, label_ids, summary_tokenizer

SPLITS = ("train", "validation", "test")
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz", ".xz"}


class DataError(ValueError):
    """The data cannot be trained on; the message says which file, split, row or column and why."""


@dataclass(frozen=True)
class Pair:
    """One document with every reference summary it has; `references[0]` is the training target."""

    id: str
    document: str
    references: tuple[str, ...]


@dataclass
class SplitReport:
    """What the preflight found in one split; lengths are in tokens, special tokens included."""

    pairs: int
    source_tokens_mean: float
    source_tokens_p95: int
    source_tokens_max: int
    target_tokens_mean: float
    target_tokens_max: int
    truncated_sources: int
    truncated_targets: int
    duplicates: int
    unscorable_references: int = 0
    leaks: dict[str, int] = field(default_factory=dict)
    dropped: int = 0


def read_split(config: DataConfig, split: str) -> list[Pair]:
    """All pairs of one split, in file order.

    Raises:
        DataError: no such split, a missing column, an empty text, or columns that would feed the decoder its answer.
    """
    pairs = list(iterate_split(config, split))
    if not pairs:
        raise DataError(f"{config.path} ({split}) has no rows")
    return pairs


def iterate_split(config: DataConfig, split: str, streaming: bool = False) -> Iterator[Pair]:
    """The pairs of one split, in file order, one at a time.

    Args:
        streaming: hold one row at a time, not the split.

    Raises:
        DataError: as `read_split`, at the row that is wrong.
    """
    dataset = _load(config.path, split, streaming)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    forbidden = {"decoder_input_ids", "labels"} & set(columns)
    if forbidden:
        raise DataError(
            f"{config.path} ({split}) brings {', '.join(sorted(forbidden))}: decoder inputs equal to the labels let "
            "the decoder see its answer. Give texts; the labels are made here."
        )
    source = _source_column(columns, config, split)
    targets = (config.target_column, "highlights")
    has_references = config.references_column in columns
    # Beside references a column of single texts is for the rows that have no list.
    target = next((name for name in targets if name in columns), None)
    if not has_references:
        target = _column(columns, targets, config.path, split)
    for number, row in enumerate(_rows(dataset, f"{config.path} ({split})")):
        document, references = row.get(source), row.get(config.references_column) if has_references else None
        if references is None and target is not None:
            references = [row.get(target)]
        if not isinstance(references, list):
            raise DataError(
                f"{config.path} ({split}), row {number}: {config.references_column} must be a list of texts; for one "
                "text a row name the column as target_column"
            )
        if not _is_text(document) or not references or not all(map(_is_text, references)):
            raise DataError(f"{config.path} ({split}), row {number}: document and summary must be non-empty texts")
        yield Pair(str(row.get("id", number)), str(document), tuple(references))


def read_documents(config: DataConfig, split: str) -> list[Pair]:
    """The documents of one split, in file order, labelled or not: without references.

    Raises:
        DataError: no such split, no row, no column of documents, or an empty one.
    """
    dataset = _load(config.path, split, streaming=False)
    source = _source_column(dataset.column_names, config, split)
    pairs = []
    for number, row in enumerate(_rows(dataset, f"{config.path} ({split})")):
        if not _is_text(row[source]):
            raise DataError(f"{config.path} ({split}), row {number}: {source} must be a non-empty text")
        pairs.append(Pair(str(row.get("id", number)), row[source], ()))
    if not pairs:
        raise DataError(f"{config.path} ({split}) has no rows")
    return pairs


def read_splits(config: DataConfig, splits: Iterable[str] = SPLITS) -> dict[str, list[Pair]]:
    """Several splits by name."""
    return {split: read_split(config, split) for split in splits}


def preflight(
    splits: dict[str, list[Pair]], tokenizer: AnyTokenizer, config: DataConfig
) -> tuple[dict[str, list[Pair]], dict[str, SplitReport]]:
    """Look before training: count, measure, and drop from train what stands in validation or test.

    Two documents are the same when they agree on letters and digits, lower-cased.

    Returns:
        The splits to use, and a report for each split as it was read.
    """
    keys = {name: [document_key(pair.document) for pair in pairs] for name, pairs in splits.items()}
    reports = {}
    kept = dict(splits)
    train_keys = set(keys.get("train", ()))
    for name, pairs in splits.items():
        sources = _token_counts(tokenizer, [pair.document for pair in pairs])
        summaries = rejoin([pair.references[0] for pair in pairs], tokenizer)
        targets = _token_counts(summary_tokenizer(tokenizer), summaries)
        leaks = {
            other: sum(key in train_keys for key in keys[other])
            for other in splits
            if name == "train" and other != "train"
        }
        reports[name] = SplitReport(
            pairs=len(pairs),
            source_tokens_mean=round(mean(sources), 1),
            source_tokens_p95=sorted(sources)[int(0.95 * (len(sources) - 1))],
            source_tokens_max=max(sources),
            target_tokens_mean=round(mean(targets), 1),
            target_tokens_max=max(targets),
            truncated_sources=sum(count > config.max_source_tokens for count in sources),
            truncated_targets=sum(count > config.max_target_tokens for count in targets),
            duplicates=len(pairs) - len(set(keys[name])),
            unscorable_references=unscorable_references(pairs),
            leaks=leaks,
        )
    if "train" in splits:
        held_out = {key for name in splits if name != "train" for key in keys[name]}
        kept["train"] = _without(splits["train"], keys["train"], held_out, config.drop_duplicates)
        reports["train"].dropped = len(splits["train"]) - len(kept["train"])
    return kept, reports


def unscorable_references(pairs: Iterable[Pair]) -> int:
    """How many references, of all that the pairs have, ROUGE cannot tell apart: see `is_unscorable`."""
    return sum(is_unscorable(reference) for pair in pairs for reference in pair.references)


def format_preflight(reports: dict[str, SplitReport], config: DataConfig) -> str:
    """The preflight as a table and one sentence a finding."""
    lines = [
        f"{'split':<11}{'pairs':>7}{'src mean':>9}{'p95':>6}{'max':>6}{'tgt mean':>9}{'max':>6}"
        f"{'src cut':>8}{'tgt cut':>8}{'repeats':>8}"
    ]
    for name, r in reports.items():
        lines.append(
            f"{name:<11}{r.pairs:>7}{r.source_tokens_mean:>9}{r.source_tokens_p95:>6}{r.source_tokens_max:>6}"
            f"{r.target_tokens_mean:>9}{r.target_tokens_max:>6}{r.truncated_sources:>8}{r.truncated_targets:>8}"
            f"{r.duplicates:>8}"
        )
    for name, r in reports.items():
        if r.unscorable_references:
            lines.append(format_unscorable(r.unscorable_references, name))
    train = reports.get("train")
    if config.streaming:
        lines.append("train is streamed: not measured; rows that stand in another split are dropped as they come.")
    if train:
        for split, count in train.leaks.items():
            lines.append(f"{count} rows of {split} also stand in train.")
        why = "leaks and repeats" if config.drop_duplicates else "leaks"
        lines.append(f"Dropped {train.dropped} rows of train ({why}); {train.pairs - train.dropped} remain.")
    return "\n".join(lines)


def tokenise(pairs: Sequence[Pair], tokenizer: AnyTokenizer, config: DataConfig) -> Dataset:
    """Columns `input_ids` and `labels`, one row a pair.

    Labels carry no [CLS] (the model would learn to say it) and always end with [SEP], also when cut: `label_ids`.
    Added tokens are one in a summary also where its writer spelled them apart: `rejoin`.
    """
    sources = tokenizer(
        [pair.document for pair in pairs],
        truncation=True,
        max_length=config.max_source_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    summaries = rejoin([pair.references[0] for pair in pairs], tokenizer)
    try:
        labels = label_ids(tokenizer, summaries, config.max_target_tokens)
    except TokenizerError as error:
        raise DataError(str(error)) from error
    return Dataset.from_dict({"input_ids": sources, "labels": labels})


def document_key(text: str) -> str:
    """Letters and digits, lower-cased: equal for two documents that differ in spacing and punctuation only."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return hashlib.sha256("".join(c for c in folded if c.isalnum()).encode()).hexdigest()


def data_hash(pairs: Iterable[Pair]) -> str:
    """SHA-256 over ids, documents and references: the manifest names the data by it."""
    digest = hashlib.sha256()
    for pair in pairs:
        hash_pair(digest, pair)
    return digest.hexdigest()


def hash_pair(digest: hashlib._Hash, pair: Pair) -> None:
    """Add one pair to a hash of many."""
    for text in (pair.id, pair.document, *pair.references):
        digest.update(text.encode())
        digest.update(b"\0")
    digest.update(b"\n")


def suffix_of(file: Path) -> str:
    """What a file holds, whatever it is compressed with: `.jsonl` of `train.jsonl.xz`, or an empty text."""
    return next((suffix for suffix in reversed(file.suffixes) if suffix not in COMPRESSIONS), "")


def load_file(file: Path, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Every row of one file, under the name of a split.

    Raises:
        DataError: it is of no known format, or damaged.
    """
    if suffix_of(file) not in FORMATS:
        raise DataError(f"{file} is not a file of rows: {', '.join(FORMATS)}, also with .gz or .xz")
    try:
        kind, files = FORMATS[suffix_of(file)], {split: str(file)}
        return load_dataset(kind, data_files=files, split=split, streaming=streaming)
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error.__cause__ or error}") from error


def _load(path: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    folder = Path(path)
    if split == "train" and folder.is_file():  # such a set has no other split
        return load_file(folder, split, streaming)
    if not folder.is_dir():
        try:
            return load_dataset(path, split=split, streaming=streaming)
        except (DatasetsError, ValueError, OSError) as error:
            raise DataError(f"{path} ({split}) is no folder here, and the hub did not give it: {error}") from error
    # Not all that begins so: train.backup.jsonl is no split.
    names = {f"{split}{suffix}{compression}" for suffix in FORMATS for compression in ("", *COMPRESSIONS)}
    files = sorted(file for file in folder.iterdir() if file.name in names and file.is_file())
    if not files:
        raise DataError(f"{folder} has no file {split}.jsonl, .jsonl.gz, .jsonl.xz, .json, .csv or .parquet")
    if len(files) > 1:
        found = ", ".join(file.name for file in files)
        raise DataError(f"{folder} has more than one file of {split}, {found}: a split is one file")
    return load_file(files[0], split, streaming)


def _rows(dataset: Iterable[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset
    except (DatasetsError, ValueError, OSError) as error:  # of a stream, which is read only now
        raise DataError(f"{where} cannot be read: {error.__cause__ or error}") from error


def _source_column(columns: Sequence[str], config: DataConfig, split: str) -> str:
    return _column(columns, (config.source_column, "document", "dialogue", "article", "text"), config.path, split)


def _column(columns: Sequence[str], names: Iterable[str], path: str, split: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise DataError(f"{path} ({split}) has no column {' or '.join(names)}; it has {', '.join(columns)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _token_counts(tokenizer: AnyTokenizer, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]


def _without(pairs: list[Pair], keys: list[str], held_out: set[str], drop_duplicates: bool) -> list[Pair]:
    seen = set(held_out)
    kept = []
    for pair, key in zip(pairs, keys, strict=True):
        if key in seen:
            continue
        kept.append(pair)
        if drop_duplicates:
            seen.add(key)
    return kept
