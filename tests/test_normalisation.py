"""Batch norm with its pixels side by side, and buffers side by side; over several processes see test_distributed."""

import copy

import pytest
import torch
from torch import nn

from matchai.normalisation import SyncBatchNorm, join_buffers


@pytest.mark.parametrize(
    ("channels", "size"), [(40, 8), (24, 6), (3, 4), (40, 5)], ids=["40", "24", "3", "pixels that fill no row"]
)
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format], ids=["channels last", "contiguous"])
def test_batch_norm_of_widened_pixels_is_that_of_torch(channels: int, size: int, memory: torch.memory_format) -> None:
    torch.manual_seed(0)
    exact = nn.BatchNorm2d(channels).double()
    nn.init.normal_(exact.weight)
    nn.init.normal_(exact.bias)
    plain = copy.deepcopy(exact).float()
    norm = SyncBatchNorm(plain)
    x = (3 * torch.randn(3, channels, size, size) + 1).contiguous(memory_format=memory)
    slope = torch.randn(x.shape)
    inputs = [x.double().requires_grad_(), x.clone(memory_format=torch.preserve_format).requires_grad_()]
    outputs = [exact(inputs[0]), norm(inputs[1])]
    for output in outputs:
        (output * slope).sum().backward()
    found = [outputs[1], inputs[1].grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    expected = [outputs[0], inputs[0].grad, exact.weight.grad, exact.bias.grad, exact.running_mean, exact.running_var]
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 60, 7)], ids=["first", "another"])
def test_one_pixel_far_from_all_others_costs_the_variance_no_digits(place: tuple[int, int, int]) -> None:
    slice_number, row, column = place
    x = torch.zeros(2, 16, 128, 128).contiguous(memory_format=torch.channels_last)
    x[slice_number, :, row, column] = torch.arange(1, 17) / 3
    exact = x.double()
    mean, variance = (one.view(1, -1, 1, 1) for one in (exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)))
    found = SyncBatchNorm(nn.BatchNorm2d(16, eps=1e-12))(x)
    expected = (exact - mean) / (variance + 1e-12).sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("is_trained", [True, False])
def test_parameters_of_batch_norm_may_lie_apart_in_memory(is_trained: bool) -> None:
    plain = nn.BatchNorm2d(16).train(is_trained)
    plain.weight = nn.Parameter(torch.stack((torch.arange(16.0), torch.full((16,), 9.0)), 1)[:, 0])
    assert not plain.weight.is_contiguous()
    norm = SyncBatchNorm(copy.deepcopy(plain))
    norm.weight = plain.weight  # a copy lies together
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), plain(x))


def test_batch_norm_of_bf16_parameters_trains_as_that_of_torch() -> None:
    x = (3 * torch.randn(3, 40, 8, 8, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    plain = nn.BatchNorm2d(40).bfloat16()
    norm = SyncBatchNorm(copy.deepcopy(plain))
    found = []
    for one in (norm, plain):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = one(leaf)
        y.backward(x.flip(0))
        found.append((y, leaf.grad, one.weight.grad, one.running_mean, one.running_var))
    for mine, other in zip(*found, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


def test_an_activation_may_work_in_place_on_widened_pixels() -> None:
    model = nn.Sequential(SyncBatchNorm(nn.BatchNorm2d(40)), nn.ReLU(inplace=True))
    x = torch.randn(2, 40, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.relu(nn.BatchNorm2d(40)(x)))


def test_a_model_of_joined_buffers_trains() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    join_buffers(model)
    model(torch.randn(4, 3, 2, 2)).square().sum().backward()


def test_joined_buffers_hold_the_values_of_the_model_and_are_its_own() -> None:
    first = nn.BatchNorm2d(3)
    model = nn.Sequential(first, nn.BatchNorm2d(70))
    model.load_state_dict({name: torch.full_like(value, 7) for name, value in model.state_dict().items()})
    before = copy.deepcopy(model.state_dict())
    joined = join_buffers(model)
    assert len(joined) == 2  # floats, and the counts of batches
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = [one.clone() for one in joined]
    first(torch.randn(4, 3, 2, 2))
    assert not torch.equal(model.state_dict()["0.running_mean"], before["0.running_mean"])
    for one, value in zip(joined, kept, strict=True):
        one.copy_(value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
