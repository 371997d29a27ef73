"""Dropout and drop path: their masks are those of the slice, wherever and with whomever it is computed."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matchai.model.dropout import KeyedDropout, KeyedDropPath, key_dropout, keyed_layers, set_dropout
from matchai.model.unetplusplus import build_model

RECIPE = "timm-efficientnet-b3"


@cache
def built(encoder: str) -> nn.Module:
    return build_model(encoder, 4)


def drop_masks(model: nn.Module, epoch: int, positions: list[int], seed: int = 0) -> Tensor:
    """(layers, B) what each drop-path layer multiplies each slice by."""
    set_dropout(keyed_layers(model), seed, epoch, positions)
    layers = [module for module in model.modules() if isinstance(module, KeyedDropPath)]
    return torch.stack([layer.train()(torch.ones(len(positions), 2, 3, 3))[:, 0, 0, 0] for layer in layers])


def test_a_slice_drops_the_same_paths_alone_as_in_any_batch() -> None:
    model = built(RECIPE)
    together = drop_masks(model, 3, [7, 1, 4])
    assert torch.equal(together[:, [1]], drop_masks(model, 3, [1]))
    assert torch.equal(together[:, [2, 0]], drop_masks(model, 3, [4, 7]))


@pytest.mark.parametrize("other", [{"epoch": 1}, {"positions": list(range(50, 100))}, {"seed": 1}], ids=str)
def test_another_seed_epoch_or_position_drops_other_paths(other: dict[str, Any]) -> None:
    model = built(RECIPE)
    usual: dict[str, Any] = {"epoch": 0, "positions": list(range(50)), "seed": 0}
    assert not torch.equal(drop_masks(model, **usual), drop_masks(model, **{**usual, **other}))


def test_paths_are_dropped_by_their_chance_and_the_rest_scaled_up() -> None:
    layer = KeyedDropPath(0.25).train()
    model = nn.Sequential(nn.Linear(1, 1), layer)
    set_dropout(keyed_layers(model), 0, 0, list(range(4000)))
    kept = layer(torch.ones(4000, 1))
    assert set(kept.flatten().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert float((kept > 0).float().mean()) == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_nothing_is_dropped_in_evaluation() -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(KeyedDropPath(0.9).eval()(x), x)


def test_no_drop_path_of_timm_is_left_in_the_recipes_model() -> None:
    chances = [1 - m.keep_prob for m in built(RECIPE).modules() if isinstance(m, KeyedDropPath)]
    assert max(chances) == pytest.approx(0.19, abs=0.01)
    assert not any(type(module).__name__ == "DropPath" for module in built(RECIPE).modules())


def dropped() -> nn.Sequential:
    """A model with both kinds of dropout, for channels and for values."""
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Dropout2d(0.5), nn.Dropout(0.3), nn.Dropout(0.0)).train()
    key_dropout(model)
    return model


def masks(model: nn.Sequential, positions: list[int], epoch: int = 1) -> Tensor:
    """(B, 8, 4, 4), 1 where the model lets a value through."""
    set_dropout(keyed_layers(model), 0, epoch, positions)
    values = torch.ones(len(positions), 8, 4, 4)
    for layer in model[1:]:
        values = layer(values)
    return (values > 0).float()


def test_a_slice_loses_the_same_values_alone_as_in_any_batch() -> None:
    model = dropped()
    together = masks(model, [7, 1, 4])
    assert torch.equal(together[[1]], masks(model, [1]))
    assert torch.equal(together[[2, 0]], masks(model, [4, 7]))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, masks(model, [7, 1, 4], epoch=2))


def test_dropout_reads_and_changes_no_global_random_state() -> None:
    model = dropped()
    before = torch.get_rng_state()
    first = masks(model, [3])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(masks(model, [3]), first)


def test_channels_are_dropped_whole_by_dropout_of_channels() -> None:
    layer = KeyedDropout(0.5, of_channels=True).train()
    set_dropout(keyed_layers(nn.Sequential(nn.Linear(1, 1), layer)), 0, 0, list(range(50)))
    kept = layer(torch.ones(50, 8, 4, 4)).flatten(2)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(kept.amin(2), kept.amax(2))


def test_values_are_dropped_by_their_chance() -> None:
    layer = KeyedDropout(0.25, of_channels=False).train()
    set_dropout(keyed_layers(nn.Sequential(nn.Linear(1, 1), layer)), 0, 0, list(range(10)))
    kept = layer(torch.ones(10, 400))
    assert float((kept > 0).float().mean()) == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_windows_of_a_slice_are_masked_with_it() -> None:
    layer = KeyedDropout(0.5, of_channels=False).train()
    model = nn.Sequential(nn.Linear(1, 1), layer)
    set_dropout(keyed_layers(model), 0, 0, [5, 6])
    both = layer(torch.ones(6, 40))  # three windows of each slice
    set_dropout(keyed_layers(model), 0, 0, [6])
    assert torch.equal(both[3:], layer(torch.ones(3, 40)))


def test_a_batch_that_was_not_announced_is_refused() -> None:
    layer = KeyedDropout(0.5, of_channels=False).train()
    with pytest.raises(RuntimeError, match="set_dropout"):
        layer(torch.ones(2, 3))


def test_a_batch_of_no_slices_passes() -> None:
    model = dropped()
    assert masks(model, []).shape == (0, 8, 4, 4)
