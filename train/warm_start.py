"""Two pretrained encoders become one encoder-decoder (Rothe et al. 2020, arXiv:1907.12461).

Knows which weights are warm and which are new, special tokens and weight sharing. Does not know data or training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EncoderDecoderModel,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from train.config import GenerationSettings, ModelConfig, RunConfig


class WarmStartError(ValueError):
    """The two checkpoints cannot be joined; the message says why."""


@dataclass(frozen=True)
class WarmStart:
    """A model ready to be fine-tuned, in fp32.

    Attributes:
        new_weights: names of the parameters that no checkpoint held (cross-attention, LM head).
    """

    model: EncoderDecoderModel
    tokenizer: PreTrainedTokenizerBase
    new_weights: frozenset[str]


def warm_start(config: ModelConfig, generation: GenerationSettings) -> WarmStart:
    """Join two BERT-family checkpoints: the second one becomes a decoder with new cross-attention.

    Weights are fp32 masters whatever the checkpoints' dtype: bf16 masters lose small updates.

    Raises:
        WarmStartError: different vocabularies, or a tokenizer without [CLS]/[SEP]/[PAD] or their equals.
    """
    tokenizer = load_tokenizer(config.encoder)
    decoder_config = AutoConfig.from_pretrained(
        config.decoder,
        is_decoder=True,
        add_cross_attention=True,
        hidden_dropout_prob=config.hidden_dropout,
        attention_probs_dropout_prob=config.attention_dropout,
    )
    decoder, loading = AutoModelForCausalLM.from_pretrained(
        config.decoder, config=decoder_config, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(
        config.encoder,
        decoder_model=decoder,
        encoder_hidden_dropout_prob=config.hidden_dropout,
        encoder_attention_probs_dropout_prob=config.attention_dropout,
        encoder_dtype=torch.float32,
        encoder_use_safetensors=True,
    )
    if model.config.encoder.vocab_size != model.config.decoder.vocab_size:
        raise WarmStartError(
            f"the encoder has {model.config.encoder.vocab_size} tokens and the decoder "
            f"{model.config.decoder.vocab_size}: one tokenizer cannot serve both"
        )
    set_special_tokens(model, tokenizer, generation)
    if config.share_embeddings:
        share_embeddings(model)
    # Trainer would otherwise believe that forward(**kwargs) normalises the loss by the tokens of an accumulated
    # batch, and multiply the gradient by the number of accumulation steps (and of processes). Our own loss does
    # normalise, so this is for whoever trains the model with another one.
    model.accepts_loss_kwargs = False
    return WarmStart(model, tokenizer, frozenset(f"decoder.{name}" for name in loading["missing_keys"]))


def starting_point(config: RunConfig) -> WarmStart:
    """The warm start of a run, with the weights of `model.init_from` over it.

    Raises:
        WarmStartError: as `warm_start` and `load_weights`.
    """
    start = warm_start(config.model, config.generation)
    if config.model.init_from is not None:
        load_weights(start.model, Path(config.model.init_from))
    return start


def load_weights(model: EncoderDecoderModel, folder: Path) -> None:
    """Take the weights of a folder that was trained from the same two checkpoints.

    Raises:
        WarmStartError: it holds no model, or one with other weights.
    """
    if not (folder / "config.json").exists():
        raise WarmStartError(f"{folder} holds no model to start from")
    loaded, _ = load_model(folder)
    try:
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise WarmStartError(f"the weights of {folder} are of another model: {error}") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer that neither cuts nor pads by itself (all-MiniLM-L6-v2 ships both, at 128 tokens).

    Raises:
        WarmStartError: no fast tokenizer, or no start, end or padding token.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise WarmStartError(f"{name} has no fast tokenizer; the service needs tokenizer.json")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for role, token in (
        ("start", start_id(tokenizer)),
        ("end", end_id(tokenizer)),
        ("padding", tokenizer.pad_token_id),
    ):
        if token is None:
            raise WarmStartError(f"the tokenizer of {name} has no {role} token")
    return tokenizer


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """[CLS], or its equal: what the decoder starts from."""
    return tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """[SEP], or its equal: what ends a summary."""
    return tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id


def set_special_tokens(
    model: EncoderDecoderModel, tokenizer: PreTrainedTokenizerBase, generation: GenerationSettings
) -> None:
    """bos = [CLS], eos = [SEP], as the original recipe; decode settings go to `generation_config` only.

    `decoder_start_token_id` and `pad_token_id` stand in the model's config too: the labels are shifted with them.
    """
    model.config.decoder_start_token_id = start_id(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = end_id(tokenizer)
    model.config.vocab_size = model.config.decoder.vocab_size
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start_id(tokenizer),
        bos_token_id=start_id(tokenizer),
        eos_token_id=end_id(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        num_beams=generation.num_beams,
        length_penalty=generation.length_penalty,
        min_length=generation.min_length,
        max_length=generation.max_length,
        no_repeat_ngram_size=generation.no_repeat_ngram_size,
        early_stopping=generation.early_stopping,
    )


def share_embeddings(model: EncoderDecoderModel) -> None:
    """One word-embedding matrix for both sides.

    `tie_encoder_decoder=True` is accepted by transformers and ties nothing, so the parameter itself is shared here and
    declared as tied, which lets checkpoints be saved and resumed. Export clones it again into a plain model.
    """
    source, target = model.encoder.get_input_embeddings(), model.decoder.get_input_embeddings()
    target.weight = source.weight
    output = model.decoder.get_output_embeddings()
    if model.config.decoder.tie_word_embeddings:
        output.weight = source.weight
    source_name = _parameter_name(model, source)
    tied = {_parameter_name(model, target): source_name}
    if model.config.decoder.tie_word_embeddings:
        tied[_parameter_name(model, output)] = source_name
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tied}
    model.all_tied_weights_keys.update(tied)


def plain_copy(model: EncoderDecoderModel) -> EncoderDecoderModel:
    """The same weights in a model without sharing: a file that stock `transformers` loads with no missing key."""
    plain = EncoderDecoderModel(config=model.config)
    plain.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    plain.generation_config = model.generation_config
    return plain.eval()


def load_model(folder: str | Path) -> tuple[EncoderDecoderModel, PreTrainedTokenizerBase]:
    """A fine-tuned model and its tokenizer from a folder, in fp32.

    A run with shared embeddings saves them once, under the encoder's name: stock `transformers` would then fill the
    decoder's with noise. They are recognised here and shared again.

    Raises:
        WarmStartError: the file lacks weights that the model needs.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is dealt with below
    try:
        model, loading = EncoderDecoderModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = set(loading["missing_keys"])
    embeddings = _parameter_name(model, model.decoder.get_input_embeddings())
    tied = {embeddings}
    if model.config.decoder.tie_word_embeddings:
        tied.add(_parameter_name(model, model.decoder.get_output_embeddings()))
    if embeddings in missing and missing <= tied:
        share_embeddings(model)
        missing = set()
    if missing:
        raise WarmStartError(f"{folder} lacks {len(missing)} weights: {sorted(missing)[:3]}")
    return model.eval(), load_tokenizer(str(folder))


def _parameter_name(model: EncoderDecoderModel, module: torch.nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module) + ".weight"
