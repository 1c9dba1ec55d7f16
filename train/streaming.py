"""Batches from a training set that does not fit into memory: rows are read, filtered and grouped as they are needed.

Knows the order of the stream, and which documents must not be trained on. Does not know the model.

Every process reads, filters and tokenises the whole stream and keeps its own batches. So a run is the same on any
number of processes, and goes on on another number; and what a second process costs is one core that tokenises.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from itertools import count, islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from train.batching import BatchPlan
from train.config import DataConfig
from train.data import DataError, Pair, document_key, hash_pair, iterate_split, tokenise
from train.tokenizer_pair import AnyTokenizer

Feature = dict[str, list[int]]


class StreamedBatches(IterableDataset[list[Feature]]):
    """The training batches of one process, without end: after the last row the stream begins again.

    `data.shuffle_window` rows are held at a time; their batches are grouped as those of an epoch are, and drawn in
    random order. So rows mix within a window only: a file that is sorted by topic should be shuffled on disk first.

    Attributes:
        rows: rows given out in the first pass.
        dropped: rows left out in the first pass, because their document stands in another split.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: AnyTokenizer,
        held_out: dict[str, list[Pair]],
        plan: BatchPlan,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.plan = config, tokenizer, plan
        self.processes, self.rank = processes, rank
        self.rows = self.dropped = 0
        self._held_out = {name: [document_key(pair.document) for pair in pairs] for name, pairs in held_out.items()}
        self._all_held_out = frozenset(key for keys in self._held_out.values() for key in keys)
        self._leaked: set[str] = set()
        self._digest = sha256()

    def __iter__(self) -> Iterator[list[Feature]]:
        """Batches as lists of rows with `input_ids` and `labels`, for the collator.

        Raises:
            DataError: a row cannot be trained on, or none is left.
        """
        self.rows = self.dropped = 0
        self._digest = sha256()
        for at, batch in enumerate(self._batches()):
            if at % self.processes == self.rank:
                yield batch

    def used(self) -> dict[str, Any]:
        """Rows and hash of what the first pass has read so far, as `run.json` names a split."""
        return {"rows": self.rows, "sha256": self._digest.hexdigest(), "streamed": True}

    def found(self) -> dict[str, Any]:
        """What a preflight would have said: rows of other splits that stand in train, and rows dropped for that."""
        leaks = {name: sum(key in self._leaked for key in keys) for name, keys in self._held_out.items()}
        return {"streamed": True, "leaks": leaks, "dropped": self.dropped}

    def _pairs(self, first: bool) -> Iterator[Pair]:
        for pair in iterate_split(self.config, "train", streaming=True):
            key = document_key(pair.document)
            if key in self._all_held_out:
                self._leaked.add(key)
                self.dropped += first
                continue
            if first:
                self.rows += 1
                hash_pair(self._digest, pair)
            yield pair

    def _batches(self) -> Iterator[list[Feature]]:
        windows = count()  # over all passes: no two are drawn alike
        for number in count():
            rows = islice(self._pairs(first=number == 0), self.config.max_train_rows)
            while window := list(islice(rows, self.config.shuffle_window)):
                tokens = tokenise(window, self.tokenizer, self.config)
                features = list(zip(tokens["input_ids"], tokens["labels"], strict=True))
                lengths = np.asarray([(len(source), len(target)) for source, target in features], np.int64)
                for batch in self.plan.batches(lengths[:, 0], lengths[:, 1], next(windows)):
                    yield [{"input_ids": features[i][0], "labels": features[i][1]} for i in batch]
            if not self.rows:
                raise DataError(f"{self.config.path} (train) has no rows, or none that is not in another split")
