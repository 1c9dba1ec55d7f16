"""FNet as an encoder in batches: padding is kept away from its Fourier transform.

FNet mixes all positions of what it is given and takes no attention mask: padded, a text is another text to it. So it
would be trained on what no server shows it (ours encodes sources without padding), and the same text would get another
summary in another batch. Here the rows of a batch go through it by their length, each without its padding, as in
`app/engine/models/foreign_encoder.py`: the price is a pass for each length that a batch holds, so batches of like
length cost less.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import FNetConfig, FNetModel
from transformers.modeling_outputs import BaseModelOutput


class UnpaddedFNet(FNetModel):
    """FNet that obeys an attention mask of ones followed by zeros; its weights and files are FNet's."""

    def __init__(self, config: FNetConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        for layer in self.encoder.layer:
            layer.fourier.self.fourier_transform = fourier

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> BaseModelOutput:
        """Ids and mask [B, N] -> hidden states [B, N, E], zero where there is padding."""
        if attention_mask is None or bool(attention_mask.all()):
            return super().forward(input_ids=input_ids, **kwargs)
        lengths = attention_mask.sum(1)
        states = None
        for length in torch.unique(lengths).tolist():
            rows = (lengths == length).nonzero()[:, 0]
            alike = super().forward(input_ids=input_ids[rows, :length], **kwargs).last_hidden_state
            if states is None:
                states = alike.new_zeros(*input_ids.shape, alike.shape[-1])
            padded = torch.nn.functional.pad(alike, (0, 0, 0, input_ids.shape[1] - length))
            states = states.index_copy(0, rows, padded)
        return BaseModelOutput(last_hidden_state=states)


def fourier(states: Tensor) -> Tensor:
    """Over positions and hidden size [B, N, E]; in fp32, for torch has no other that fits every length."""
    wide = states if states.dtype == torch.float64 else states.float()
    return torch.fft.fftn(wide, dim=(1, 2))


def unpadded(encoder: FNetModel) -> UnpaddedFNet:
    """The same weights in a module that obeys a mask."""
    exact = UnpaddedFNet(encoder.config, add_pooling_layer=encoder.pooler is not None)
    exact.load_state_dict(encoder.state_dict())
    return exact.train(encoder.training)
