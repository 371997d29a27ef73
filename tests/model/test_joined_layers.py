"""Joined layers on another device than a CPU: the plain layers' numbers, in fewer operations."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matchai.model import JoinedForward, join_buffers
from matchai.model.cpu_layers import use_fast_layers
from matchai.model.dropout import keyed_layers, set_dropout
from matchai.model.unetplusplus import build_model
from tests.pretended_gpu import CUDA, copy_of, pretended_gpu


def gradients(model: nn.Module, x: Tensor, device: Any, joined: JoinedForward | None = None) -> list[Tensor]:
    """The output, and the gradients of all parameters, of a fixed function of it."""
    set_dropout(keyed_layers(model), 7, 1, [3, 4], device, x.dtype)
    if joined is None:
        y = model(x)
    else:
        with joined.running():
            y = model(x)
    weights = (
        torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype).to(device)
    )
    (y * weights).sum().backward()
    return [copy_of(one) for one in (y.detach(), *(p.grad for p in model.parameters() if p.grad is not None))]


@pytest.mark.parametrize("encoder", ["timm-efficientnet-b0", "tu-test_resnet"])
def test_a_model_on_a_gpu_computes_what_the_plain_one_does(encoder: str) -> None:
    plain = build_model(encoder, 4, seed=0).double().train()
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = gradients(copy.deepcopy(plain), x, "cpu")
    with pretended_gpu():
        model = copy.deepcopy(plain).to(CUDA)
        use_fast_layers(model, CUDA)
        joined = JoinedForward(model, join_buffers(model), None)
        found = gradients(model, x.to(CUDA), CUDA, joined)
    assert len(found) == len(expected)
    largest = max(float(other.abs().max()) for other in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12 * largest)
    counts = [int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(counts) == {1}


def test_cast_weights_are_those_of_autocast_and_their_gradients_come_back_in_full_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    plain, x = copy.deepcopy(model), torch.randn(3, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x)
    expected.float().sum().backward()
    joined = JoinedForward(model, join_buffers(model), torch.bfloat16)
    with joined.running(), torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    found.float().sum().backward()
    assert torch.equal(found, expected)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype == torch.float32
        assert torch.equal(one.grad, other.grad)
    assert isinstance(model[0].weight, nn.Parameter)


def test_an_error_in_a_forward_pass_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    joined = JoinedForward(model, join_buffers(model), torch.bfloat16)
    with pytest.raises(RuntimeError), joined.running():
        model(torch.zeros(2, 3, 8, 8))
    assert {name for name, _ in model.named_buffers()} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert isinstance(model[0].weight, nn.Parameter)
