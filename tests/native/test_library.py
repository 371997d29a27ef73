"""The compiled kernels: each against float64, and that it repeats its bits. How they are built is in test_compiler."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from matchai.native import library
from matchai.native.library import Kernels

DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Identity: lambda z: z,
    nn.ReLU: torch.relu,
    nn.SiLU: lambda z: z * torch.sigmoid(z),
}


def filled(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 0) -> Tensor:
    """Normal numbers in channels-last memory."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5, half_units: int = 1) -> None:
    """Within float32's rounding of the largest number, and so many half units in the last place of each in bf16."""
    assert found.shape == expected.shape
    own = half_units * 2**-8 if found.dtype == torch.bfloat16 else 0
    slack = tolerance * expected.abs().max().clamp_min(1) + own * expected.abs()
    assert bool(((found.double() - expected).abs() <= slack).all())


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@st.composite
def map_shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Shapes of which some pixels side by side fill whole registers of 16."""
    channels = draw(st.integers(1, 70))
    pixels = next(number for number in (1, 2, 4, 8, 16) if number * channels % 16 == 0)
    return draw(st.integers(1, 3)), channels, draw(st.integers(1, 7)), pixels * draw(st.integers(1, 5))


def repeated(values: Tensor) -> Tensor:
    """(C,) as it stands beside (B, C, H, W)."""
    return values.double().view(1, -1, 1, 1)


class Norm:
    """Batch norm and an activation over a batch in parts, by the kernels and by torch in float64."""

    def __init__(self, x: Tensor, act: type[nn.Module] = nn.Identity, is_affine: bool = True, parts: int = 1) -> None:
        self.x, self.act, self.slope = x, act, filled(*x.shape, dtype=x.dtype, seed=1)
        self.parts = min(parts, len(x))
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if is_affine:
            self.weight, self.bias = torch.randn(2, x.shape[1], generator=torch.Generator().manual_seed(2))

    def by_kernels(self, kernels: Kernels) -> list[Tensor]:
        """Output, running mean and variance, gradients of x, of weight and of bias."""
        xs, slopes = (torch.tensor_split(one, self.parts) for one in (self.x, self.slope))
        channels, activation = self.x.shape[1], library.ACTIVATIONS[self.act]
        affine = self.weight, self.bias
        statistics = torch.stack([kernels.norm_statistics(x) for x in xs])
        runs = [(torch.zeros(channels), torch.ones(channels)) for _ in xs]
        made = [
            kernels.norm_forward(x, activation, statistics, affine, 1e-5, 0.1, run)
            for x, run in zip(xs, runs, strict=True)
        ]
        parts = [(x, slope, activation, one[1], affine) for x, slope, one in zip(xs, slopes, made, strict=True)]
        sums = torch.stack([kernels.norm_gradient_sums(*part) for part in parts]).sum(0)
        grads = [kernels.norm_gradient(*part, sums, made[0][2]) for part in parts]
        return [torch.cat([one[0] for one in made]), *runs[-1], torch.cat(grads), *sums]

    def exactly(self) -> list[Tensor]:
        norm = nn.BatchNorm2d(self.x.shape[1]).double()
        with torch.no_grad():
            for parameter, value in ((norm.weight, self.weight), (norm.bias, self.bias)):
                if value is not None:
                    parameter.copy_(value)
        leaf = self.x.double().requires_grad_()
        y = ACTIVATIONS[self.act](norm(leaf))
        torch.autograd.backward((y * self.slope.double()).sum())
        found = [y.detach(), norm.running_mean, norm.running_var, leaf.grad, norm.weight.grad, norm.bias.grad]
        return [one for one in found if one is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(shape=map_shapes(), act=st.sampled_from(list(ACTIVATIONS)), is_affine=st.booleans(), parts=st.integers(1, 3))
def test_batch_norm_of_parts_with_its_activation_is_that_of_the_whole_by_torch(
    kernels: Kernels,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    act: type[nn.Module],
    is_affine: bool,
    parts: int,
) -> None:
    norm = Norm(filled(*shape, dtype=dtype, mean=1), act, is_affine, parts)
    assume(norm.x.numel() >= 8 * shape[1])  # of two values alike the normalised ones are rounding errors
    for found, expected in zip(norm.by_kernels(kernels), norm.exactly(), strict=True):
        assert_near(found, expected, 3e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_batch_norm_of_a_large_map_is_that_of_torch(kernels: Kernels, act: type[nn.Module]) -> None:
    norm = Norm(filled(4, 24, 64, 64), act)
    for found, expected in zip(norm.by_kernels(kernels), norm.exactly(), strict=True):
        assert_near(found, expected, 3e-5)


@pytest.mark.parametrize("mean", [1e3, -1e6])
def test_a_mean_much_larger_than_the_spread_costs_the_variance_nothing(kernels: Kernels, mean: float) -> None:
    x = filled(2, 24, 32, 32, mean=mean)
    count, means, deviations = torch.split(kernels.norm_statistics(x), [1, 24, 24])
    exact = x.double()
    assert count == 2 * 32 * 32
    torch.testing.assert_close(means, exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(deviations / count, exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_parts_of_other_sizes_and_means_merge_to_the_whole(kernels: Kernels) -> None:
    xs = [filled(size, 8, 4, 4, seed=size, mean=mean) for size, mean in ((1, -50.0), (3, 0.0), (2, 200.0))]
    parts = torch.stack([torch.zeros(17, dtype=torch.float64), *(kernels.norm_statistics(x) for x in xs)])  # one empty
    running = torch.zeros(8), torch.ones(8)
    y, saved, count = kernels.norm_forward(xs[1], 0, parts, (None, None), 1e-5, 1.0, running)
    whole = torch.cat(xs).double()
    assert count == 6 * 16
    mean, var = whole.mean((0, 2, 3)), whole.var((0, 2, 3), correction=0)
    assert_near(y, (xs[1].double() - repeated(mean)) / repeated(var + 1e-5).sqrt())
    torch.testing.assert_close(saved.double(), torch.stack((mean, (var + 1e-5).rsqrt())), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running[1].double(), whole.var((0, 2, 3)), rtol=1e-6, atol=0)


def test_fewer_than_two_values_a_channel_are_told_by_their_number_and_change_nothing(kernels: Kernels) -> None:
    x, running = filled(1, 16, 1, 1), (torch.full((16,), 3.0), torch.full((16,), 4.0))
    statistics = kernels.norm_statistics(x)[None]
    assert kernels.norm_forward(x, 0, statistics, (None, None), 1e-5, 0.1, running)[2] == 1
    assert bool((running[0] == 3).all())
    assert bool((running[1] == 4).all())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(shape=map_shapes(), act=st.sampled_from(list(ACTIVATIONS)), is_affine=st.booleans())
def test_batch_norm_by_running_statistics_is_that_of_torch(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int, int, int], act: type[nn.Module], is_affine: bool
) -> None:
    x, mean, spread = (
        filled(*shape, dtype=dtype),
        filled(1, shape[1], 1, 1).flatten(),
        filled(1, shape[1], 1, 1, seed=1),
    )
    var = spread.flatten().square() + 0.1
    weight, bias = (mean + 0.5, var - 1) if is_affine else (None, None)
    found = kernels.norm_running(x, library.ACTIVATIONS[act], (weight, bias), 1e-3, (mean, var))
    normal = (x.double() - repeated(mean)) / (repeated(var) + 1e-3).sqrt()
    if weight is not None and bias is not None:
        normal = normal * repeated(weight) + repeated(bias)
    assert_near(found, ACTIVATIONS[act](normal), 3e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 5], ids=["first pixel", "another"])
def test_what_is_not_finite_spoils_its_channel_and_no_other(
    kernels: Kernels, dtype: torch.dtype, act: type[nn.Module], value: float, place: int
) -> None:
    x = filled(2, 16, 4, 4, dtype=dtype)
    x[0, 3, place // 4, place % 4] = value
    y, mean, var, grad, *_ = Norm(x, act).by_kernels(kernels)
    is_spoilt = torch.arange(16) == 3
    assert not torch.isfinite(mean[3])
    assert bool(torch.isnan(var[3]))
    for one in (y, grad):
        assert bool(torch.isnan(one[:, 3]).all())
        assert bool(torch.isfinite(one[:, ~is_spoilt]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_spoils_its_channel_and_no_other(
    kernels: Kernels, act: type[nn.Module], value: float, dtype: torch.dtype
) -> None:
    norm = Norm(filled(2, 16, 4, 4, dtype=dtype), act, is_affine=False)
    place = norm.x[1, 3].argmax()  # where ReLU lets it pass
    norm.slope[1, 3, place // 4, place % 4] = value
    *_, grad, by_weight, by_bias = norm.by_kernels(kernels)
    is_spoilt = torch.arange(16) == 3
    assert not torch.isfinite(grad[:, 3]).any()
    assert not torch.isfinite(by_weight[3] + by_bias[3])
    assert bool(torch.isfinite(grad[:, ~is_spoilt]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_running_statistics_let_what_is_not_finite_through(kernels: Kernels, value: float, dtype: torch.dtype) -> None:
    x = filled(1, 16, 4, 4, dtype=dtype)
    x[0, 3, 1, 1] = value
    for activation in library.ACTIVATIONS.values():
        y = kernels.norm_running(x, activation, (None, None), 1e-5, (torch.zeros(16), torch.ones(16)))
        assert not torch.isfinite(y[0, 3, 1, 1])
        assert int(torch.isfinite(y).sum()) == y.numel() - 1


def bf16_numbers(least: float, most: float) -> Tensor:
    """All numbers of bf16 whose size lies between these, as a map (1, 16, H, 16)."""
    every = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).double()
    chosen = every[(every.abs() >= least) & (every.abs() < most)]
    whole = F.pad(chosen, (0, -len(chosen) % 256)).view(1, 16, -1, 16)
    return whole.bfloat16().contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("least", "most", "slack"), [(0, 80, 1e-37), (80, 1e30, 1e-7)])
def test_silu_of_every_bf16_number_rounds_as_its_exact_value(
    kernels: Kernels, least: float, most: float, slack: float
) -> None:
    x = bf16_numbers(least, most)
    y = kernels.norm_running(x, library.ACTIVATIONS[nn.SiLU], (None, None), 0.0, (torch.zeros(16), torch.ones(16)))
    exact = F.silu(x.double())
    # half a unit in the last place, and the 2^-16 that the sigmoid may be off by
    assert bool(((y.double() - exact).abs() <= (2**-8 + 2**-16) * exact.abs() + slack).all())


def test_silu_s_slope_at_every_bf16_number_rounds_as_its_exact_value(kernels: Kernels) -> None:
    x = bf16_numbers(0, 1e30)
    saved, sums = torch.stack((torch.zeros(16), torch.ones(16))), torch.zeros(2, 16, dtype=torch.float64)
    found = kernels.norm_gradient(x, torch.ones_like(x), library.ACTIVATIONS[nn.SiLU], saved, (None, None), sums, 1.0)
    gate = torch.sigmoid(x.double())
    exact = gate + x.double() * gate * (1 - gate)
    assert bool(((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-16).all())


@pytest.mark.parametrize("magnitude", [20.0, 80.0, 200.0, 1e30])
def test_silu_of_large_numbers_is_exact(kernels: Kernels, magnitude: float) -> None:
    x = magnitude * filled(1, 16, 4, 4).sign()
    y = kernels.norm_running(x, library.ACTIVATIONS[nn.SiLU], (None, None), 0.0, (torch.zeros(16), torch.ones(16)))
    torch.testing.assert_close(y.double(), F.silu(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(shape=map_shapes())
def test_excitation_is_its_formula(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    x, grad = filled(*shape, dtype=dtype), filled(*shape, dtype=dtype, seed=1)
    gates, grad_means = (torch.randn(2, *shape[:2], generator=torch.Generator().manual_seed(2))).unbind()
    exact, exact_grad, opened = x.double(), grad.double(), gates.double()[..., None, None]
    assert_near(kernels.means(x), exact.mean((2, 3)))
    assert_near(kernels.scale(x, gates), exact * opened)
    assert_near(kernels.gate_gradient(x, grad), (exact * exact_grad).sum((2, 3)))
    spread = grad_means.double()[..., None, None] / (shape[2] * shape[3])
    assert_near(kernels.scale_gradient(grad, gates, grad_means), exact_grad * opened + spread)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_excitation_lets_what_is_not_finite_through(kernels: Kernels, value: float) -> None:
    x = filled(2, 16, 4, 4)
    x[1, 3, 2, 2] = value
    ones = torch.ones(2, 16)
    for found in (kernels.means(x), kernels.gate_gradient(x, filled(2, 16, 4, 4, seed=1))):
        assert torch.isfinite(found).logical_not().nonzero().tolist() == [[1, 3]]
    for found in (kernels.scale(x, ones), kernels.scale_gradient(x, ones, ones)):
        assert torch.isfinite(found).logical_not().nonzero().tolist() == [[1, 3, 2, 2]]


def depthwise_exactly(
    x: Tensor, grad: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, tap by tap: each sees a shifted and thinned-out map."""
    (high, wide), (height, width) = padding, grad.shape[2:]
    exact, slope = F.pad(x.double(), (wide, wide, high, high)), grad.double()
    grad_x, grad_weight = torch.zeros_like(exact), torch.zeros(weight.shape, dtype=torch.float64)
    for i, j in itertools.product(*map(range, weight.shape[2:])):
        rows = slice(i, i + (height - 1) * stride[0] + 1, stride[0])
        columns = slice(j, j + (width - 1) * stride[1] + 1, stride[1])
        grad_weight[:, 0, i, j] = (exact[..., rows, columns] * slope).sum((0, 2, 3))
        grad_x[..., rows, columns] += slope * weight[:, 0, i, j].double().view(1, -1, 1, 1)
    return grad_x[..., high : high + x.shape[2], wide : wide + x.shape[3]], grad_weight


def depthwise_case(
    shape: tuple[int, int, int, int],
    size: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, a gradient of the output, and a weight."""
    place = [(n + 2 * p - size) // s + 1 for n, p, s in zip(shape[2:], padding, stride, strict=True)]
    grad = filled(*shape[:2], *place, dtype=dtype, seed=1)
    return filled(*shape, dtype=dtype), grad, filled(shape[1], 1, size, size, dtype=dtype, seed=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 5])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gradients_of_a_depthwise_convolution_are_those_tap_by_tap(
    kernels: Kernels, dtype: torch.dtype, size: int, data: st.DataObject
) -> None:
    pairs = [st.tuples(one, one) for one in (st.integers(1, 3), st.integers(0, size - 1), st.integers(size, 17))]
    stride, padding, place = (data.draw(pair) for pair in pairs)
    shape = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70)), *place
    case = depthwise_case(shape, size, stride, padding, dtype)
    expected = depthwise_exactly(*case, stride, padding)
    for found, exact in zip(kernels.depthwise_gradients(*case, stride, padding, (True, True)), expected, strict=True):
        assert found is not None
        assert_near(found, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "shape", "stride", "padding"),
    [
        (3, (1, 40, 171, 163), (1, 1), (1, 1)),
        (5, (1, 24, 301, 160), (2, 2), (2, 2)),
        (5, (1, 70, 129, 131), (1, 2), (0, 4)),
        (3, (2, 9, 600, 251), (3, 1), (2, 0)),
    ],
)
def test_gradients_of_a_large_depthwise_convolution_join_at_the_borders_of_its_bands(
    kernels: Kernels,
    dtype: torch.dtype,
    size: int,
    shape: tuple[int, int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    assert shape[1] * shape[2] * shape[3] >= 2 * 2**19  # a band's numbers
    case = depthwise_case(shape, size, stride, padding, dtype)
    expected = depthwise_exactly(*case, stride, padding)
    for found, exact in zip(kernels.depthwise_gradients(*case, stride, padding, (True, True)), expected, strict=True):
        assert found is not None
        assert_near(found, exact)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_a_gradient_that_nobody_wants_is_not_made(kernels: Kernels, wanted: tuple[bool, bool]) -> None:
    case = depthwise_case((2, 20, 9, 9), 5, (1, 1), (2, 2), torch.float32)
    both = kernels.depthwise_gradients(*case, (1, 1), (2, 2), (True, True))
    for one, found, is_wanted in zip(
        both, kernels.depthwise_gradients(*case, (1, 1), (2, 2), wanted), wanted, strict=True
    ):
        assert (found is not None) == is_wanted
        assert found is None or (one is not None and torch.equal(found, one))


def test_a_nan_reaches_the_pixels_that_a_filter_takes_it_to_and_its_channel_s_weights(kernels: Kernels) -> None:
    x, grad, weight = depthwise_case((1, 20, 9, 9), 5, (1, 1), (2, 2), torch.float32)
    grad[0, 18, 4, 4] = torch.nan
    grad_x, grad_weight = kernels.depthwise_gradients(x, grad, weight, (1, 1), (2, 2), (True, True))
    assert grad_x is not None
    assert grad_weight is not None
    is_reached = torch.zeros(grad_x.shape, dtype=torch.bool)
    is_reached[0, 18, 2:7, 2:7] = True
    assert torch.equal(torch.isnan(grad_x), is_reached)
    assert torch.isnan(grad_weight).flatten(1).any(1).nonzero().flatten().tolist() == [18]
    assert bool(torch.isnan(grad_weight[18]).all())


def convolution_exactly(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a convolution of 3 x 3 and the gradient of its weight (O, C, 3, 3), tap by tap."""
    padded, slope = F.pad(x.double(), (1, 1, 1, 1)), grad.double()
    y, grad_weight = torch.zeros_like(slope), torch.zeros(weight.shape, dtype=torch.float64)
    for i, j in itertools.product(range(3), range(3)):
        seen = padded[..., i : i + x.shape[2], j : j + x.shape[3]]
        y += torch.einsum("bchw,oc->bohw", seen, weight[..., i, j].double())
        grad_weight[..., i, j] = torch.einsum("bchw,bohw->oc", seen, slope)
    return y, grad_weight


def convolution_case(
    shape: tuple[int, int, int, int], filters: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, a gradient of the output, and a weight in float32 whose outputs are of size one."""
    grad = filled(shape[0], filters, *shape[2:], seed=1, dtype=dtype)
    return filled(*shape, dtype=dtype), grad, filled(filters, shape[1], 3, 3, seed=2) / (9 * shape[1]) ** 0.5


def assert_convolves(kernels: Kernels, shape: tuple[int, int, int, int], filters: int) -> None:
    for dtype in DTYPES:
        x, grad, weight = convolution_case(shape, filters, dtype)
        y, grad_weight = convolution_exactly(x, grad, weight)
        found, found_weight = kernels.convolve(x, weight), kernels.convolution_weight_gradient(x, grad)
        assert (found.dtype, found_weight.dtype) == (dtype, torch.float32)
        assert_near(found, y)
        assert_near(found_weight, grad_weight)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 14), st.integers(1, 14)),
    filters=st.integers(1, 70),
)
def test_a_convolution_by_winograd_and_its_weights_gradient_are_those_tap_by_tap(
    kernels: Kernels, shape: tuple[int, int, int, int], filters: int
) -> None:
    assert_convolves(kernels, shape, filters)


@pytest.mark.parametrize(
    ("shape", "filters"),
    [((6, 40, 97, 61), 16), ((1, 16, 150, 150), 33), ((1, 300, 24, 25), 130), ((2, 17, 30, 30), 300)],
    ids=["many blocks", "blocks that end within a row of tiles", "weights that fill the cache", "more filters"],
)
def test_a_large_convolution_by_winograd_joins_at_the_borders_of_its_blocks(
    kernels: Kernels, shape: tuple[int, int, int, int], filters: int
) -> None:
    assert_convolves(kernels, shape, filters)


def test_a_convolution_by_winograd_rounds_hardly_more_than_the_plain_sum(kernels: Kernels) -> None:
    x, grad, weight = convolution_case((2, 64, 48, 48), 64)
    exact = convolution_exactly(x, grad, weight)[0]
    found, plain = kernels.convolve(x, weight), F.conv2d(x, weight, padding=1)
    errors = [float((one.double() - exact).norm() / exact.norm()) for one in (found, plain)]
    assert errors[0] < 5 * errors[1]  # torch's sums of many registers are better than those one after another
    assert errors[0] < 2**-20


def test_a_slice_s_convolution_knows_neither_the_other_slices_nor_the_number_of_threads(kernels: Kernels) -> None:
    x, _, weight = convolution_case((5, 24, 33, 26), 20)
    whole = kernels.convolve(x, weight)
    for number in (1, 3):
        with threads(number):
            for place in range(5):
                alone = x[place : place + 1].contiguous(memory_format=torch.channels_last)
                assert torch.equal(kernels.convolve(alone, weight)[0], whole[place])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_tiles_that_see_it_and_no_other(
    kernels: Kernels, value: float, dtype: torch.dtype
) -> None:
    x, grad, weight = convolution_case((2, 20, 17, 17), 18, dtype)
    exact = convolution_exactly(x, grad, weight)
    x[1, 3, 7, 9] = value  # lies in one tile, of which it reaches all, and in the border of the one below
    y = kernels.convolve(x, weight)
    is_reached = torch.zeros(y.shape, dtype=torch.bool)
    is_reached[1, :, 4:9, 8:12] = True
    assert torch.equal(~torch.isfinite(y), is_reached)
    assert_near(y[~is_reached], exact[0][~is_reached])
    grad_weight = kernels.convolution_weight_gradient(x, grad)
    assert torch.isfinite(grad_weight).logical_not().flatten(2).any(2).any(0).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("number", [1, 2, 7])
def test_threads_share_a_convolution_of_fewer_tiles_than_they_are(kernels: Kernels, number: int) -> None:
    with threads(number):
        assert_convolves(kernels, (1, 16, 4, 8), 16)


def test_of_wide_layers_fewer_threads_keep_sums(kernels: Kernels) -> None:
    with threads(3):  # 36 x 912 x 912 numbers a thread are 30 of 32 million
        assert_convolves(kernels, (1, 900, 5, 9), 912)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    channels=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    slices=st.integers(1, 3),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_joined_maps_are_torchs_upsampled_and_concatenated(
    kernels: Kernels, dtype: torch.dtype, channels: list[int], slices: int, size: tuple[int, int]
) -> None:
    height, width = size
    x = filled(slices, channels[0], height, width, dtype=dtype)
    skips = [
        filled(slices, own, 2 * height, 2 * width, dtype=dtype, seed=seed) for seed, own in enumerate(channels[1:], 1)
    ]
    joined = kernels.join(x, skips)
    assert torch.equal(joined, torch.cat([F.interpolate(x, scale_factor=2.0), *skips], 1))
    assert library.is_map(joined)
    grad = filled(*joined.shape, dtype=dtype, seed=9)
    ours, *others = kernels.split_gradient(grad, channels)
    first, *expected = torch.split(grad.double(), channels, 1)
    assert_near(ours, first.unfold(2, 2, 2).unfold(3, 2, 2).sum((4, 5)))
    assert all(torch.equal(one.double(), other) for one, other in zip(others, expected, strict=True))


def loss_exactly(logits: Tensor, target: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """The sums of the loss by their definition, from float64 logits."""
    num_classes, log_probs = logits.shape[1], logits.log_softmax(1)
    shares = F.one_hot(target, num_classes).movedim(-1, 1).double()
    pixel_weights = weights.double()[target]
    cross_entropy = -(shares * log_probs).sum(1) * pixel_weights
    log_right = F.logsigmoid(torch.where(shares > 0, logits, -logits))
    log_wrong = F.logsigmoid(torch.where(shares > 0, -logits, logits))
    focal = -(gamma * log_wrong).exp() * log_right
    probs, dims = log_probs.exp(), (0, 2, 3)
    scalars = [cross_entropy.sum(), pixel_weights.sum(), focal.sum(), torch.tensor(float(logits.numel())).double()]
    return torch.cat((torch.stack(scalars), (probs * shares).sum(dims), probs.sum(dims), shares.sum(dims)))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(2, 20),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    spread=st.sampled_from([0.0, 1.0, 10.0, 80.0]),
    gamma=st.sampled_from([0.0, 0.5, 2.5]),
)
def test_loss_sums_and_their_gradient_are_those_of_the_definition(
    kernels: Kernels, dtype: torch.dtype, classes: int, shape: tuple[int, int, int], spread: float, gamma: float
) -> None:
    slices, height, width = shape
    logits = (spread * filled(slices, classes, height, width)).clamp(-80, 80).to(dtype)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, classes, shape, generator=generator)
    weights = 0.5 + torch.rand(classes, generator=generator)
    slopes = torch.randn(4 + 3 * classes, generator=generator)
    leaf = logits.double().requires_grad_()
    expected = loss_exactly(leaf, target, weights, gamma)
    found = kernels.loss_sums(logits, target, weights, gamma)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.autograd.backward(expected, slopes.double())
    assert leaf.grad is not None
    assert_near(kernels.loss_gradient(logits, target, weights, gamma, slopes), leaf.grad, 2e-5)


@pytest.mark.parametrize("wrong", [-1, 4, 255, 2**32, -(2**63)])
@pytest.mark.parametrize("place", [0, 70, 97])
def test_a_target_that_is_no_class_is_an_error(kernels: Kernels, wrong: int, place: int) -> None:
    target = torch.zeros(2, 7, 7, dtype=torch.int64)
    target.view(-1)[place] = wrong
    with pytest.raises(IndexError, match=f"{wrong}.*4 classes"):
        kernels.loss_sums(filled(2, 4, 7, 7), target, torch.ones(4), 2.5)


@pytest.mark.parametrize(("target", "weights"), [((2, 7, 6), 4), ((1, 7, 7), 4), ((2, 49), 4), ((2, 7, 7), 3)])
def test_a_target_or_weights_of_another_size_are_an_error(
    kernels: Kernels, target: tuple[int, ...], weights: int
) -> None:
    with pytest.raises(ValueError, match="class weights"):
        kernels.loss_sums(filled(2, 4, 7, 7), torch.zeros(target, dtype=torch.int64), torch.ones(weights), 2.5)


def test_a_nan_among_the_logits_reaches_the_sums_and_the_gradient_of_its_pixel_alone(kernels: Kernels) -> None:
    logits, target = filled(1, 4, 5, 5), torch.zeros(1, 5, 5, dtype=torch.int64)
    logits[0, 2, 3, 3] = torch.nan
    sums = kernels.loss_sums(logits, target, torch.ones(4), 2.5)
    assert torch.isnan(sums[[0, 2, 4, 8, 9, 10, 11]]).all()  # cross-entropy, focal, the overlap of class 0, all sizes
    assert bool(torch.isfinite(sums[[1, 3, 12, 13, 14, 15]]).all())
    grad = kernels.loss_gradient(logits, target, torch.ones(4), 2.5, torch.ones(16))
    is_reached = torch.zeros(1, 4, 5, 5, dtype=torch.bool)
    is_reached[..., 3, 3] = True
    assert torch.equal(torch.isnan(grad), is_reached)


def run_norm(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    return Norm(filled(3, 24, 40, 40, dtype=dtype), nn.SiLU).by_kernels(kernels)


def run_norm_running(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    running = torch.ones(24), torch.ones(24)
    return [kernels.norm_running(filled(3, 24, 40, 40, dtype=dtype), 2, (None, None), 1e-5, running)]


def run_excite(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    x, gates = filled(3, 24, 40, 40, dtype=dtype), filled(3, 24, 1, 1).view(3, 24)
    summed = [kernels.means(x), kernels.gate_gradient(x, x)]
    return [*summed, kernels.scale(x, gates), kernels.scale_gradient(x, gates, gates)]


def run_depthwise(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    found: list[Tensor] = []
    for shape, size in (((3, 40, 30, 31), 5), ((1, 40, 171, 163), 3)):
        case = depthwise_case(shape, size, (1, 1), (1, 1), dtype)
        found += [one for one in kernels.depthwise_gradients(*case, (1, 1), (1, 1), (True, True)) if one is not None]
    return found


def run_convolution(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    x, grad, weight = convolution_case((3, 24, 50, 51), 40, dtype)
    return [kernels.convolve(x, weight), kernels.convolution_weight_gradient(x, grad)]


def run_join(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    joined = kernels.join(filled(3, 20, 20, 20, dtype=dtype), [filled(3, 7, 40, 40, dtype=dtype)])
    return [joined, *kernels.split_gradient(joined, [20, 7])]


def run_loss(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    logits = filled(3, 5, 50, 51, dtype=dtype)
    target = torch.randint(0, 5, (3, 50, 51), generator=torch.Generator().manual_seed(1))
    settings = target, torch.ones(5), 2.5
    return [kernels.loss_sums(logits, *settings), kernels.loss_gradient(logits, *settings, torch.ones(19))]


RUNS = [run_norm, run_norm_running, run_excite, run_depthwise, run_convolution, run_join, run_loss]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("work", RUNS)
def test_a_kernel_repeats_its_bits(
    kernels: Kernels, work: Callable[[Kernels, torch.dtype], list[Tensor]], number: int, dtype: torch.dtype
) -> None:
    with threads(number):
        first, *others = [work(kernels, dtype) for _ in range(3)]
    for other in others:
        assert all(torch.equal(one, again) for one, again in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", RUNS)
def test_several_threads_agree_with_one_to_rounding(
    kernels: Kernels, work: Callable[[Kernels, torch.dtype], list[Tensor]], dtype: torch.dtype
) -> None:
    found = []
    for number in (1, 2, 5):
        with threads(number):
            found.append(work(kernels, dtype))
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert_near(another, one.double(), half_units=2)
