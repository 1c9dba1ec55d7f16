"""The better of two summaries should be the more probable one: candidates of a model, ranked by ROUGE.

A further stage after fine-tuning (BRIO: Liu et al. 2022, arXiv:2203.16804; SLiC: Zhao et al. 2022, arXiv:2210.00045).
Cross-entropy teaches what a reference says. Beam search, though, keeps what has the greatest score, and of a model's
own summaries that is often not the best. Here their scores, as beam search computes them, are put in order.

Knows candidates, their worth, and the loss of a batch. Does not know who wrote the candidates (`train pseudo-label
--keep-candidates` does), nor the Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from train.added_tokens import rejoin
from train.config import RankingConfig
from train.data import DataError, Pair, document_key, load_file
from train.metrics import rouge_rows
from train.streaming import Feature
from train.tokenizer_pair import AnyTokenizer, label_ids

CANDIDATES, WORTH = "candidates", "worth"
IGNORED = -100


def read_candidates(config: RankingConfig) -> dict[str, list[str]]:
    """Summaries by the key of their document (`document_key`), in the order of files and rows, each once.

    Raises:
        DataError: a file cannot be read, or a row has no list of texts in the column `candidates`.
    """
    said: dict[str, dict[str, None]] = {}
    for path in config.paths:
        for document, texts in _rows(path):
            said.setdefault(document_key(document), {}).update(dict.fromkeys(texts[: config.max_candidates]))
    return {key: list(texts) for key, texts in said.items()}


def _rows(path: str) -> Iterator[tuple[str, list[str]]]:
    rows = load_file(Path(path), "train")
    missing = {"document", CANDIDATES} - set(rows.column_names)
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(rows.column_names)}. "
            "`train pseudo-label --keep-candidates` writes such files"
        )
    for number, row in enumerate(rows):
        document, texts = row["document"], row[CANDIDATES]
        if not isinstance(document, str) or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise DataError(f"{path}, row {number}: document must be a text, and candidates a list of texts")
        yield document, texts


def with_candidates(
    tokens: Dataset, pairs: Sequence[Pair], tokenizer: AnyTokenizer, config: RankingConfig, max_length: int
) -> Dataset:
    """`tokens` with two more columns.

    `candidates`: the ids of each summary, as labels are; `worth`: the mean of its ROUGE-1, 2 and L against the first
    reference, from 0 to 1. A document of which the file says nothing has none, and is trained on as ever.

    Args:
        tokens: a row a pair, in their order.
        max_length: of a candidate in tokens, as `label_ids` counts; longer ones are left out, for a cut one is another.

    Raises:
        DataError: as `read_candidates`; or no document has two candidates, without which there is nothing to rank.
    """
    said = read_candidates(config)
    candidates: list[list[list[int]]] = []
    worths: list[list[float]] = []
    for pair in pairs:
        texts = said.get(document_key(pair.document), [])
        ids = label_ids(tokenizer, rejoin(texts, tokenizer), max_length + 1) if texts else []
        fitting = [(text, label) for text, label in zip(texts, ids, strict=True) if len(label) < max_length]
        scores = rouge_rows([text for text, _ in fitting], [pair.references[:1]] * len(fitting))
        candidates.append([label for _, label in fitting])
        worths.append([sum(three) / 300 for three in zip(*scores.values(), strict=True)])
    if not any(len(set(worth)) > 1 for worth in worths):
        raise DataError(f"{', '.join(config.paths)}: no two summaries of different worth of any document of train")
    return tokens.add_column(CANDIDATES, candidates).add_column(WORTH, worths)


def ranked(rows: Dataset, config: RankingConfig) -> dict[str, Any]:
    """What `with_candidates` found: `documents` with candidates, `candidates` in all, and the files' hashes by name."""
    counts = [len(worth) for worth in rows[WORTH]]
    files = {path: sha256(Path(path).read_bytes()).hexdigest() for path in config.paths}
    return {"documents": sum(count > 0 for count in counts), "candidates": sum(counts), "sha256": files}


def collate_candidates(
    collate: Callable[[list[Feature]], Any], multiple: int = 1
) -> Callable[[Sequence[Feature]], Any]:
    """A collator that makes `candidates` [B, K, T], padded with -100, and `worth` [B, K] too, if a row has any.

    Args:
        multiple: T is one of this.
    """

    def both(features: Sequence[Feature]) -> Any:
        plain: list[Any] = [dict(feature) for feature in features]
        candidates, worths = ([feature.pop(name, []) for feature in plain] for name in (CANDIDATES, WORTH))
        batch = collate(plain)
        flat = [torch.tensor(ids) for of_row in candidates for ids in of_row]
        if flat:
            together = pad_sequence(flat, batch_first=True, padding_value=IGNORED)
            together = F.pad(together, (0, -together.shape[1] % multiple), value=IGNORED)
            padded = iter(together)
            rows = [[next(padded) for _ in of_row] for of_row in candidates]
            most, none = max(map(len, rows)), torch.full(together.shape[1:], IGNORED)
            batch[CANDIDATES] = torch.stack([torch.stack([*row, *[none] * (most - len(row))]) for row in rows])
            batch[WORTH] = torch.tensor([[*worth, *[0.0] * (most - len(worth))] for worth in worths])
        return batch

    return both


def candidate_outputs(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor, candidates: Tensor
) -> tuple[Seq2SeqLMOutput, Tensor, Tensor]:
    """One pass over references and candidates; each source is encoded once.

    Args:
        inputs: `input_ids` and `attention_mask`, [B, S].
        labels: of the references, [B, T].
        candidates: [B, K, U].

    Returns:
        The outputs of the references, logits [B, T, V]; and of candidates that are there, in their order, the logits
        [N, U, V] and which of [B, K] they are, [N].
    """
    batch, count, _ = candidates.shape
    longest = max(labels.shape[1], candidates.shape[2])
    rows = torch.cat([F.pad(x, (0, longest - x.shape[-1]), value=IGNORED) for x in (labels, candidates.flatten(0, 1))])
    there = (candidates.flatten(0, 1) != IGNORED).any(-1).nonzero()[:, 0]  # [N]
    of_source = torch.cat([torch.arange(batch, device=there.device), there // count])
    rows = torch.cat([rows[:batch], rows[batch + there]])
    encoded = model.get_encoder()(**inputs, return_dict=True)[0]  # [B, S, H]
    outputs = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded[of_source]),
        attention_mask=inputs["attention_mask"][of_source],
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(rows),
    )
    logits = outputs.logits
    return Seq2SeqLMOutput(logits=logits[:batch, : labels.shape[1]]), logits[batch:, : candidates.shape[2]], there


def hypothesis_scores(logits: Tensor, labels: Tensor, length_penalty: float) -> Tensor:
    """What beam search ranks by: the sum of log-probabilities over `length ** length_penalty`, [N].

    Args:
        logits: [N, T, V].
        labels: with -100 behind the end token, [N, T].
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    lengths = (labels != IGNORED).sum(-1)
    return -losses.view(labels.shape).sum(-1) / lengths**length_penalty


def ranking_loss(scores: Tensor, worth: Tensor, there: Tensor, margin: float) -> Tensor:
    """How far candidates are from their order: 0 where each better one leads by `margin` times the difference.

    The mean over pairs of different worth of `relu(margin * (worth_i - worth_j) - (score_i - score_j))`, i the better
    one; rows without such a pair have 0.

    Args:
        scores: [B, K].
        worth: [B, K].
        there: which candidates there are, [B, K].

    Returns:
        [B].
    """
    gap = worth[:, :, None] - worth[:, None, :]  # [B, K, K]
    pairs = (gap > 0) & there[:, :, None] & there[:, None, :]
    wrong = (margin * gap - (scores[:, :, None] - scores[:, None, :])).relu()
    return (wrong * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def loss_of_candidates(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    cross_entropy: Any,
    config: RankingConfig,
    length_penalty: float,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of the references, and `weight` times the ranking loss; both are means over the references' tokens.

    A row's ranking loss counts as often as its reference has tokens. So both are sums over rows, divided by the tokens
    of the accumulated batch: it does not matter how a step is cut into batches.

    Args:
        inputs: what `collate_candidates` made.
        cross_entropy: of outputs and labels, as the Trainer calls it.
    """
    labels, candidates, worth = (inputs[name] for name in ("labels", CANDIDATES, WORTH))
    sources = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    outputs, logits, there = candidate_outputs(model, sources, labels, candidates)
    found = hypothesis_scores(logits, candidates.flatten(0, 1)[there], length_penalty)
    scores = torch.zeros(worth.numel(), device=worth.device, dtype=found.dtype).index_copy(0, there, found)
    ranked = torch.zeros(worth.numel(), device=worth.device, dtype=torch.bool).index_fill(0, there, True)
    rows = ranking_loss(scores.view_as(worth), worth, ranked.view_as(worth), config.margin)
    tokens = (labels != IGNORED).sum(-1)
    total = num_items_in_batch if num_items_in_batch is not None else tokens.sum()
    loss: Tensor = cross_entropy(outputs, labels, num_items_in_batch=num_items_in_batch)
    return loss + config.weight * (rows * tokens).sum() / total
