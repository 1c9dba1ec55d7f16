"""FNet among padded rows: what one row becomes must not depend on the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import FNetModel

from tests.mixes import make_base
from train.fnet import UnpaddedFNet, unpadded

IDS = torch.tensor([[2, 9, 8, 7, 6, 3], [2, 9, 3, 0, 0, 0], [2, 5, 4, 7, 6, 3], [2, 8, 7, 3, 0, 0]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> FNetModel:
    return FNetModel.from_pretrained(make_base(tmp_path_factory.mktemp("fnet"), "fnet"))


def test_a_batch_equals_its_rows_alone(stock: FNetModel) -> None:
    encoder = unpadded(stock)
    states = encoder(input_ids=IDS, attention_mask=MASK).last_hidden_state
    for row, mask, found in zip(IDS, MASK, states, strict=True):
        length = int(mask.sum())
        alone = stock(input_ids=row[None, :length]).last_hidden_state[0]
        torch.testing.assert_close(found[:length], alone, rtol=1e-5, atol=1e-6)
        assert not found[length:].any()


def test_the_stock_module_does_not(stock: FNetModel) -> None:
    padded = stock(input_ids=IDS, attention_mask=MASK).last_hidden_state[1, :3]
    assert (padded - stock(input_ids=IDS[1:2, :3]).last_hidden_state[0]).abs().max() > 0.1


def test_gradients_are_those_of_the_rows_alone(stock: FNetModel) -> None:
    together, alone = unpadded(stock), unpadded(stock)
    (together(input_ids=IDS, attention_mask=MASK).last_hidden_state ** 2).sum().backward()
    for row, mask in zip(IDS, MASK, strict=True):
        (alone(input_ids=row[None, : int(mask.sum())]).last_hidden_state ** 2).sum().backward()
    for name, parameter in together.named_parameters():
        expected = alone.get_parameter(name).grad
        if expected is not None:  # the pooler has none
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)


def test_it_computes_under_autocast_to_bfloat16(stock: FNetModel) -> None:
    encoder = unpadded(stock)
    with torch.autocast("cpu", torch.bfloat16):
        states = encoder(input_ids=IDS, attention_mask=MASK).last_hidden_state
    expected = encoder(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(states.float(), expected, rtol=0.1, atol=0.1)


def test_its_file_is_that_of_fnet(stock: FNetModel, tmp_path: Path) -> None:
    unpadded(stock).save_pretrained(tmp_path)
    loaded, loading = FNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert loaded.state_dict().keys() == UnpaddedFNet(stock.config).state_dict().keys()
