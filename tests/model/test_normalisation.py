"""Batch norm with its pixels side by side, and buffers side by side; over several processes see test_distributed."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from matchai.model.normalisation import Gather, SyncBatchNorm, join_buffers


def affine(channels: int, **settings: float | bool | None) -> nn.BatchNorm2d:
    """A batch norm whose weights are no ones and whose biases no zeros, where it has any."""
    generator = torch.Generator().manual_seed(4)
    norm = nn.BatchNorm2d(channels, **settings)  # type: ignore[arg-type]
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    return norm


def channels_last(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


def in_threads(num_parts: int) -> list[Gather]:
    """The exchange of parts that are computed at one time, each on a thread."""
    barrier, vectors = threading.Barrier(num_parts, timeout=30), [torch.empty(0)] * num_parts

    def gather(part: int, vector: Tensor) -> Tensor:
        vectors[part] = vector
        barrier.wait()
        gathered = torch.stack(vectors)
        barrier.wait()  # before any of them puts its next
        return gathered

    return [lambda vector, part=part: gather(part, vector) for part in range(num_parts)]  # type: ignore[misc]


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
def test_an_activation_may_work_in_place_on_widened_pixels() -> None:
    model = nn.Sequential(SyncBatchNorm(nn.BatchNorm2d(40)), nn.ReLU(inplace=True))
    x = torch.randn(2, 40, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.relu(nn.BatchNorm2d(40)(x)))


@pytest.mark.usefixtures("way")
def test_a_model_of_joined_buffers_trains() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    join_buffers(model)
    model(torch.randn(4, 3, 2, 2)).square().sum().backward()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"momentum": 0.3}, {"affine": False}], ids=repr)
def test_running_statistics_move_as_torchs(settings: dict[str, float | bool | None]) -> None:
    exact, norm = affine(24, **settings).double(), SyncBatchNorm(affine(24, **settings))
    for seed in range(3):
        x = channels_last(2, 24, 4, 4, seed=seed) + seed
        torch.testing.assert_close(norm(x).double(), exact(x.double()), rtol=1e-4, atol=2e-5)
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name].double(), value.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("way")
def test_without_running_statistics_evaluation_normalises_by_the_batch() -> None:
    x, norm = channels_last(2, 24, 4, 4), affine(24, track_running_stats=False)
    torch.testing.assert_close(SyncBatchNorm(norm).eval()(x), norm.eval()(x), rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("has_gradients", [True, False])
def test_evaluation_is_by_the_running_statistics_and_leaves_them(has_gradients: bool) -> None:
    norm = affine(24)
    norm(channels_last(2, 24, 4, 4) * 3 + 1)
    before = copy.deepcopy(norm.state_dict())
    x = channels_last(2, 24, 4, 4, seed=1).requires_grad_(has_gradients)
    with torch.set_grad_enabled(has_gradients):
        y = SyncBatchNorm(norm).eval()(x)
    assert y.requires_grad == has_gradients
    torch.testing.assert_close(y, norm.eval()(x), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU, nn.SiLU, nn.GELU])
def test_the_activation_inside_a_norm_of_timm_has_its_gradients(act: type[nn.Module]) -> None:
    plain = BatchNormAct2d(24, act_layer=act, inplace=False)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    norm, exact = SyncBatchNorm(copy.deepcopy(plain)), plain.double()
    inputs = [channels_last(3, 24, 4, 4).to(kind).requires_grad_() for kind in (torch.float64, torch.float32)]
    found = []
    for one, x in zip((exact, norm), inputs, strict=True):
        y = one(x)
        (y * channels_last(*y.shape, seed=1)).sum().backward()
        found.append([y, x.grad, one.weight.grad, one.bias.grad])
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(other.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("way")
def test_a_whole_batch_of_less_than_two_values_a_channel_is_an_error_and_moves_no_statistics() -> None:
    norm = SyncBatchNorm(nn.BatchNorm2d(16))
    with pytest.raises(ValueError, match="two values a channel in training, but the whole batch has 1"):
        norm(channels_last(1, 16, 1, 1))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert not norm.running_mean.any()
    assert bool((norm.running_var == 1).all())


@pytest.mark.usefixtures("way")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU, nn.SiLU])
def test_parts_that_are_computed_in_different_ways_make_the_whole_batch(act: type[nn.Module]) -> None:
    """One has channels-last slices, which have kernels; one contiguous ones, which have none; and one is empty."""
    plain, x, slope = affine(24), channels_last(5, 24, 4, 4) + 2, channels_last(5, 24, 4, 4, seed=1)
    parts = [x[:3], x[3:5].contiguous(), x[5:]]
    slopes = [slope[:3], slope[3:5], slope[5:]]
    exact, leaf = copy.deepcopy(plain).double(), x.double().requires_grad_()
    y = act()(exact(leaf))
    (y * slope).sum().backward()

    def work(part: int, gather: Gather) -> list[Tensor]:
        norm, own = SyncBatchNorm(copy.deepcopy(plain), gather, act=act()), parts[part].requires_grad_()
        made = norm(own)
        (made * slopes[part]).sum().backward()
        found = [made, own.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
        return [one for one in found if one is not None]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3), in_threads(3)))
    for index, expected in enumerate((y, leaf.grad)):
        assert expected is not None
        torch.testing.assert_close(torch.cat([one[index] for one in found]).double(), expected, rtol=1e-4, atol=2e-5)
    for index, expected in enumerate((exact.weight.grad, exact.bias.grad), 2):
        assert expected is not None
        total = torch.stack([one[index] for one in found]).sum(0)
        torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=2e-5)
    for one in found:
        torch.testing.assert_close(one[4].double(), exact.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one[5].double(), exact.running_var, rtol=1e-5, atol=1e-6)


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
