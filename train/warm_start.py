"""Two pretrained encoders become one encoder-decoder (Rothe et al. 2020, arXiv:1907.12461), in every mix of that paper.

Knows which weights are warm and which are new, special tokens, and what can be joined. Does not know training.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderModel,
    FNetModel,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from app.engine.models.encoder_decoder import DECODERS, ENCODERS
from app.engine.models.limits import max_tokens
from train.added_tokens import add_tokens, same_vocabulary
from train.config import DataConfig, GenerationSettings, ModelConfig, RunConfig
from train.fnet import UnpaddedFNet, unpadded
from train.tokenizer_pair import (
    AnyTokenizer,
    TokenizerError,
    TokenizerPair,
    first_id,
    last_id,
    load_summary_tokenizer,
    summary_tokenizer,
)
from train.tokenizer_pair import load_tokenizer as load_any_tokenizer
from train.weight_sharing import embedding_ties, in_layer, share, spread, weight_ties

# What configurations call the two dropouts.
HIDDEN_DROPOUTS = ("hidden_dropout_prob", "dropout", "resid_pdrop", "embd_pdrop", "embedding_dropout", "mlp_dropout")
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


class WarmStartError(ValueError):
    """The checkpoints cannot be joined; the message says why."""


@dataclass(frozen=True)
class WarmStart:
    """A model ready to be fine-tuned, in fp32.

    Attributes:
        tokenizer: of sources and summaries; a pair where they have one each.
        new_weights: names of the parameters that no checkpoint held (cross-attention, LM head).
        added_tokens: `model.added_tokens`.
    """

    model: PreTrainedModel
    tokenizer: AnyTokenizer
    new_weights: frozenset[str]
    added_tokens: tuple[str, ...] = ()


def warm_start(config: ModelConfig, generation: GenerationSettings) -> WarmStart:
    """Join two checkpoints: the second one becomes a decoder with new cross-attention.

    Weights are fp32 masters whatever the checkpoints' dtype: bf16 masters lose small updates.

    Raises:
        WarmStartError: a kind that the engine does not run, tokenizers without start, end or padding token, or sides
            that cannot share what they are told to.
    """
    if config.seq2seq is not None:
        return _baseline(config, config.seq2seq, generation)
    encoder_config = AutoConfig.from_pretrained(config.encoder)
    _check_kind(config.encoder, encoder_config, "encoder", ENCODERS)
    tokenizer = _tokenizers(config)
    decoder, new_weights = _decoder(config, len(summary_tokenizer(tokenizer)))
    encoder = _encoder(config, encoder_config)
    if not isinstance(tokenizer, TokenizerPair) and encoder_config.vocab_size != decoder.config.vocab_size:
        raise WarmStartError(
            f"the encoder has {encoder_config.vocab_size} tokens and the decoder "
            f"{decoder.config.vocab_size}: one tokenizer cannot serve both"
        )
    try:
        add_tokens(encoder, decoder, tokenizer, config.added_tokens)
    except ValueError as error:
        raise WarmStartError(f"model.added_tokens: {error}") from error
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(encoder_model=encoder, decoder_model=decoder)
    set_special_tokens(model, tokenizer, generation)
    if config.share_weights or config.share_embeddings:
        _check_alike(config, model, tokenizer)
        share(model, weight_ties(model) if config.share_weights else embedding_ties(model))
    # Trainer would otherwise believe that forward(**kwargs) normalises the loss by the tokens of an accumulated
    # batch, and multiply the gradient by the number of accumulation steps (and of processes). Our own loss does
    # normalise, so this is for whoever trains the model with another one.
    model.accepts_loss_kwargs = False
    projection = {name for name, _ in model.named_parameters() if name.startswith("enc_to_dec_proj.")}
    names = frozenset(f"decoder.{name}" for name in new_weights) | projection
    return WarmStart(model, tokenizer, names, config.added_tokens)


def starting_point(config: RunConfig) -> WarmStart:
    """The warm start of a run, with the weights of `model.init_from` over it.

    Raises:
        WarmStartError: as `warm_start` and `load_weights`.
    """
    start = warm_start(config.model, config.generation)
    if config.model.init_from is not None:
        load_weights(start, Path(config.model.init_from))
    return start


def load_weights(start: WarmStart, folder: Path) -> None:
    """Take the weights of a folder that was trained from the same two checkpoints.

    Of a deeper decoder, as many layers as the model's has, evenly spread (as `model.decoder_layers`). Tokens that the
    run adds behind those of the folder begin as the mean of their pieces there.

    Raises:
        WarmStartError: it holds no model, or one with other weights or words.
    """
    if not (folder / "config.json").exists():
        raise WarmStartError(f"{folder} holds no model to start from")
    model = start.model
    loaded, tokenizer = load_model(folder)
    if isinstance(loaded, EncoderDecoderModel):
        add_tokens(loaded.encoder, loaded.decoder, tokenizer, start.added_tokens)
    if not same_vocabulary(tokenizer, start.tokenizer):
        raise WarmStartError(f"the vocabulary of {folder} is another one; are model.added_tokens the same?")
    state = loaded.state_dict()
    for name, source in (model._tied_weights_keys or {}).items():
        if name in state and source in state and not torch.equal(state[name], state[source]):
            raise WarmStartError(f"{folder} was trained without sharing {source}, which this run shares with {name}")
    if 0 < (count := _depth(model)) < _depth(loaded):
        loaded.decoder, _ = _with_layers(loaded.decoder, count, ())
        state = loaded.state_dict()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WarmStartError(f"the weights of {folder} are of another model: {error}") from error


def load_tokenizer(name: str) -> AnyTokenizer:
    """See `train.tokenizer_pair.load_tokenizer`.

    Raises:
        WarmStartError: no fast tokenizer, or no end or padding token.
    """
    try:
        return load_any_tokenizer(name)
    except TokenizerError as error:
        raise WarmStartError(str(error)) from error


def source_limit(model: PreTrainedModel) -> int:
    """Tokens that a source may have, special tokens included."""
    return max_tokens(getattr(model.config, "encoder", model.config).to_dict())


def fit_limits(model: PreTrainedModel, data: DataConfig) -> None:
    """Refuse data cut at more tokens than the model has positions for, and summaries that may grow longer.

    ModernBERT's positions are computed, and would do for 8,192 tokens, with caches for as many in the service: it gets
    the limit that it is trained with.

    Raises:
        WarmStartError: names the setting, its value and the limit.
    """
    targets = max_tokens(getattr(model.config, "decoder", model.config).to_dict())
    for setting, value, limit in (
        ("data.max_source_tokens", data.max_source_tokens, source_limit(model)),
        ("data.max_target_tokens", data.max_target_tokens, targets),
        ("generation.max_length", model.generation_config.max_length, targets),
    ):
        if value > limit:
            raise WarmStartError(f"{setting} is {value}; the model has positions for {limit} tokens")
    encoder = getattr(model.config, "encoder", None)
    if encoder is not None and encoder.model_type == "modernbert":
        encoder.max_position_embeddings = data.max_source_tokens


def set_special_tokens(model: EncoderDecoderModel, tokenizer: AnyTokenizer, generation: GenerationSettings) -> None:
    """bos = [CLS], eos = [SEP], as the original recipe; decode settings go to `generation_config` only.

    All are the decoder's: `decoder_start_token_id` and `pad_token_id` stand in the model's config too, for the labels
    are shifted with them.
    """
    padding = summary_tokenizer(tokenizer).pad_token_id
    model.config.decoder_start_token_id = first_id(tokenizer)
    model.config.pad_token_id = padding
    model.config.eos_token_id = last_id(tokenizer)
    model.config.vocab_size = model.config.decoder.vocab_size
    if model.config.decoder.pad_token_id is None:  # GPT-2's; from RoBERTa's its positions are counted
        model.config.decoder.pad_token_id = padding
    model.generation_config = _generation_config(
        generation,
        decoder_start_token_id=first_id(tokenizer),
        bos_token_id=first_id(tokenizer),
        eos_token_id=last_id(tokenizer),
        pad_token_id=padding,
    )


def plain_copy(model: EncoderDecoderModel) -> EncoderDecoderModel:
    """The same weights in a model without sharing: a file that stock `transformers` loads with no missing key."""
    plain = EncoderDecoderModel(config=model.config)
    plain.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    plain.generation_config = model.generation_config
    return plain.eval()


def is_joined(folder: str | Path) -> bool:
    """Whether a folder holds two checkpoints joined here; a baseline (BART, PEGASUS) came whole."""
    found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    return found in ("encoder-decoder", "encoder_decoder")  # the underscore is that of old checkpoints


def load_model(folder: str | Path) -> tuple[PreTrainedModel, AnyTokenizer]:
    """A fine-tuned model and its tokenizer from a folder, in fp32.

    A run with shared weights saves them once, under the encoder's names: stock `transformers` would then fill the
    decoder's with noise. They are recognised here and shared again.

    Raises:
        WarmStartError: the file lacks weights that the model needs.
    """
    joined = is_joined(folder)
    kind = EncoderDecoderModel if joined else AutoModelForSeq2SeqLM
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is dealt with below
    try:
        model, loading = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = set(loading["missing_keys"])
    if joined and missing:
        for ties in (embedding_ties(model), weight_ties(model)):
            if missing <= ties.keys():
                share(model, ties)
                missing = set()
                break
    if missing:
        raise WarmStartError(f"{folder} lacks {len(missing)} weights: {sorted(missing)[:3]}")
    if joined and isinstance(model.encoder, FNetModel):
        model.encoder = unpadded(model.encoder)
    return model.eval(), load_tokenizer(str(folder))


def _tokenizers(config: ModelConfig) -> AnyTokenizer:
    """One tokenizer where both sides have the same, else a pair.

    Raises:
        WarmStartError: one of them cannot be trained with.
    """
    try:
        target = load_summary_tokenizer(config.decoder)
        source = target if config.encoder == config.decoder else load_any_tokenizer(config.encoder)
    except TokenizerError as error:
        raise WarmStartError(str(error)) from error
    same = source is target or source.backend_tokenizer.to_str() == target.backend_tokenizer.to_str()
    return source if same else TokenizerPair(source, target)


def _encoder(config: ModelConfig, encoder_config: Any) -> PreTrainedModel:
    encoder_config.is_decoder = encoder_config.add_cross_attention = False
    _set_dropout(encoder_config, config)
    kind = AutoModel
    if encoder_config.model_type == "fnet":
        encoder_config.use_tpu_fourier_optimizations = False  # a matrix of one length
        kind = UnpaddedFNet
    return kind.from_pretrained(config.encoder, config=encoder_config, dtype=torch.float32, use_safetensors=True)


def _decoder(config: ModelConfig, tokens: int) -> tuple[PreTrainedModel, set[str]]:
    """The decoder, and the names of its parameters that the checkpoint did not hold."""
    decoder_config = AutoConfig.from_pretrained(config.decoder, is_decoder=True, add_cross_attention=True)
    _check_kind(config.decoder, decoder_config, "decoder", DECODERS)
    _set_dropout(decoder_config, config)
    decoder, loading = AutoModelForCausalLM.from_pretrained(
        config.decoder, config=decoder_config, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    new_weights = set(loading["missing_keys"])
    if tokens > decoder.config.vocab_size:  # a padding token that it had not
        decoder.resize_token_embeddings(tokens, mean_resizing=False)
    if config.decoder_layers is not None:
        decoder, new_weights = _with_layers(decoder, config.decoder_layers, new_weights)
    return decoder, new_weights


def _depth(model: PreTrainedModel) -> int:
    """Layers of a joined model's decoder; 0 for a baseline."""
    return int(getattr(getattr(model.config, "decoder", None), "num_hidden_layers", 0))


def _with_layers(decoder: PreTrainedModel, count: int, names: Iterable[str]) -> tuple[PreTrainedModel, set[str]]:
    """A decoder of `count` of the given one's layers, and what `names` of its parameters are called there.

    Raises:
        WarmStartError: it has not so many layers.
    """
    total = decoder.config.num_hidden_layers
    if not 1 <= count <= total:
        raise WarmStartError(f"model.decoder_layers is {count}; the decoder has 1 to {total} layers to keep")
    kept = spread(total, count)
    smaller_config = copy.deepcopy(decoder.config)
    smaller_config.num_hidden_layers = count
    smaller = type(decoder)(smaller_config)
    old_names = {name: in_layer(name, kept) for name in smaller.state_dict()}
    weights = decoder.state_dict()
    smaller.load_state_dict({name: weights[old] for name, old in old_names.items()})
    wanted = set(names)
    return smaller, {name for name, old in old_names.items() if old in wanted}


def _baseline(config: ModelConfig, name: str, generation: GenerationSettings) -> WarmStart:
    """A whole encoder-decoder (BART, PEGASUS): nothing is new, and its special tokens are its own.

    Raises:
        WarmStartError: settings of a mix stand beside it, or it is of another kind.
    """
    baseline_config = AutoConfig.from_pretrained(name)
    _check_kind(name, baseline_config, "model.seq2seq", ("bart", "pegasus"))
    if config.share_weights or config.share_embeddings or config.decoder_layers is not None or config.added_tokens:
        raise WarmStartError(
            "model.seq2seq is a whole model: share_weights, share_embeddings, decoder_layers, added_tokens are of mixes"
        )
    _set_dropout(baseline_config, config)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        name, config=baseline_config, dtype=torch.float32, use_safetensors=True
    )
    own = model.generation_config
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "forced_eos_token_id")
    tokens = {key: getattr(own, key, None) for key in (*names, "forced_bos_token_id")}
    for key in names[:4]:
        tokens[key] = getattr(baseline_config, key, None) if tokens[key] is None else tokens[key]
    model.generation_config = _generation_config(generation, **tokens)
    model.accepts_loss_kwargs = False
    tokenizer = load_tokenizer(name)
    return WarmStart(model, TokenizerPair(tokenizer, tokenizer, tokens["decoder_start_token_id"]), frozenset())


def _generation_config(generation: GenerationSettings, **tokens: int | None) -> GenerationConfig:
    return GenerationConfig(
        **tokens,
        num_beams=generation.num_beams,
        length_penalty=generation.length_penalty,
        min_length=generation.min_length,
        max_length=generation.max_length,
        no_repeat_ngram_size=generation.no_repeat_ngram_size,
        early_stopping=generation.early_stopping,
    )


def _check_kind(name: str, config: Any, side: str, known: Iterable[str]) -> None:
    if config.model_type not in known:
        raise WarmStartError(f"{name} is a {config.model_type}; as {side} there may be: {', '.join(known)}")


def _check_alike(config: ModelConfig, model: EncoderDecoderModel, tokenizer: AnyTokenizer) -> None:
    """Whether the sides have anything to share."""
    setting = "model.share_weights" if config.share_weights else "model.share_embeddings"
    if isinstance(tokenizer, TokenizerPair):
        raise WarmStartError(f"{setting}: encoder and decoder have tokenizers of their own")
    encoder, decoder = model.config.encoder, model.config.decoder
    names = ("model_type", "hidden_size", "embedding_size", "intermediate_size")
    sizes = [tuple(getattr(side, name, None) for name in names) for side in (encoder, decoder)]
    shapes = [side.get_input_embeddings().weight.shape for side in (model.encoder, model.decoder)]
    if shapes[0] != shapes[1] or (config.share_weights and sizes[0] != sizes[1]):
        raise WarmStartError(f"{setting}: encoder and decoder are of different kinds or sizes")
    if config.share_weights and decoder.num_hidden_layers > encoder.num_hidden_layers:
        raise WarmStartError(
            f"{setting}: the decoder has {decoder.num_hidden_layers} layers, the encoder {encoder.num_hidden_layers}"
        )


def _set_dropout(target: Any, config: ModelConfig) -> None:
    for names, value in ((HIDDEN_DROPOUTS, config.hidden_dropout), (ATTENTION_DROPOUTS, config.attention_dropout)):
        for name in names:
            if hasattr(target, name):
                setattr(target, name, value)
