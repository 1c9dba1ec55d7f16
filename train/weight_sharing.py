"""Encoder and decoder with parameters in common (BERTShare, Rothe et al. 2020), and which layers a smaller stack keeps.

Knows names of parameters. Does not know checkpoints or training.
"""

from __future__ import annotations

import re

import torch
from transformers import EncoderDecoderModel


def embedding_ties(model: EncoderDecoderModel) -> dict[str, str]:
    """One word-embedding matrix for both sides: each name of the decoder's, and the encoder's that it becomes."""
    source = _parameter_name(model, model.encoder.get_input_embeddings())
    ties = {_parameter_name(model, model.decoder.get_input_embeddings()): source}
    if model.config.decoder.tie_word_embeddings:
        ties[_parameter_name(model, model.decoder.get_output_embeddings())] = source
    return ties


def weight_ties(model: EncoderDecoderModel) -> dict[str, str]:
    """BERTShare: everything that both sides have. Cross-attention and LM head remain the decoder's own.

    Where the decoder has fewer layers, each is one with the encoder's layer of its place, see `spread`.
    """
    stack = f"decoder.{model.decoder.base_model_prefix}."
    kept = spread(model.config.encoder.num_hidden_layers, model.config.decoder.num_hidden_layers)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    ties = {}
    for name in shapes:
        if name.startswith(stack):
            own = in_layer(name.removeprefix(stack), kept)
            if shapes.get(f"encoder.{own}") == shapes[name]:
                ties[name] = f"encoder.{own}"
    return {**ties, **embedding_ties(model)}


def share(model: EncoderDecoderModel, ties: dict[str, str]) -> None:
    """Make parameters one, and say so to transformers, which lets checkpoints be saved and resumed.

    `tie_encoder_decoder=True` is accepted by transformers and ties nothing. Export clones into a plain model again.

    Args:
        ties: the name of a parameter, and of the one that takes its place.
    """
    for name, source in ties.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(source))
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **ties}
    model.all_tied_weights_keys.update(ties)


def spread(layers: int, kept: int) -> list[int]:
    """Which of so many layers a smaller stack keeps: evenly spread, the first and the last among them.

    As distilbart does it (Shleifer and Rush 2020, arXiv:2010.13002): 12 to 6 is every second one, 0 2 4 7 9 11.
    """
    return [round(i * (layers - 1) / max(kept - 1, 1)) for i in range(kept)]


def in_layer(name: str, layers: list[int]) -> str:
    """A parameter's name with `layers[i]` in the place of its layer's number i; GPT-2's layers stand below `h`."""
    return re.sub(r"(?<=\.layer\.)\d+|(?<=\.h\.)\d+", lambda found: str(layers[int(found[0])]), name)


def _parameter_name(model: EncoderDecoderModel, module: torch.nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module) + ".weight"
