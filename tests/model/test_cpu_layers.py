"""The faster layers: the same numbers to rounding, under the same names."""

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch.decoders.unetplusplus.decoder import DecoderBlock
from timm.layers import Swish
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from matchai.model import cpu_layers, joined_layers
from matchai.model.dropout import keyed_layers, set_dropout
from matchai.model.unetplusplus import build_model
from matchai.native import compiler, library

ENCODER = "timm-efficientnet-b0"  # has every layer that is replaced; the recipe's is three times as large


def gradients(model: nn.Module, x: Tensor, seed: int = 0) -> list[Tensor]:
    """Output and gradients, of the input and of all parameters, of a fixed scalar function of the output."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    (y * weights).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_as_exact(plain: nn.Module, changed: nn.Module, x: Tensor) -> None:
    """Both are the plain layer in float64 to float32's rounding: 2e-5, or the plain one's own where sums cancel."""
    exact = gradients(copy.deepcopy(plain).double(), x.double())
    for found, beside, expected in zip(gradients(changed, x), gradients(plain, x), exact, strict=True):
        scale = expected.abs().max().clamp_min(1e-3)
        error, rounding = ((one.double() - expected).abs().max() / scale for one in (found, beside))
        assert error < max(2e-5, 2 * float(rounding))


@pytest.fixture
def kernels_used(kernels: library.Kernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    names: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            names.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(library, "load", lambda: (Watched(), "watched by a test"))
    return names


def channels_last(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("way")
# the way stays the same for all examples
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.integers(2, 40),
    kernel=st.one_of(st.tuples(st.integers(1, 8), st.integers(1, 8)), st.sampled_from([(3, 3), (5, 5)])),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    size=st.tuples(st.integers(8, 20), st.integers(8, 20)),
)
def test_a_split_depthwise_convolution_has_the_gradients_of_the_whole(
    channels: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
    changed = copy.deepcopy(plain)
    cpu_layers.split_depthwise(changed)
    assert type(changed) is cpu_layers.DepthwiseConv2d
    assert_as_exact(plain, changed, channels_last(2, channels, *size))


@pytest.mark.usefixtures("way")
def test_under_autocast_a_split_convolution_computes_in_bf16_and_keeps_float_gradients() -> None:
    conv = nn.Conv2d(32, 32, 5, 2, 2, groups=32, bias=False)
    cpu_layers.split_depthwise(conv)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(channels_last(2, 32, 16, 16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_in_bf16_the_gradients_of_a_depthwise_convolution_are_exact_but_for_the_last_rounding(
    size: int, stride: int
) -> None:
    conv = nn.Conv2d(24, 24, size, stride, size // 2, groups=24, bias=False).bfloat16()
    cpu_layers.split_depthwise(conv)
    exact = copy.deepcopy(conv).double()
    x = channels_last(2, 24, 13, 11).bfloat16()
    for found, expected in zip(gradients(conv, x)[1:], gradients(exact, x.double())[1:], strict=True):
        # the weights of the sum, which `gradients` draws in float64, are rounded too: two roundings of 2^-9 a term
        assert float((found.double() - expected).norm() / expected.norm()) < 2**-7


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_depthwise_convolution_in_a_type_without_a_kernel_has_its_gradients(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(24, 24, 5, 1, 2, groups=24, bias=False)
    cpu_layers.split_depthwise(conv)
    x = channels_last(2, 24, 13, 11)
    found, expected = gradients(copy.deepcopy(conv).to(dtype), x.to(dtype)), gradients(conv.double(), x.double())
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 2e-3


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [3, 5])
def test_a_depthwise_convolution_of_no_slices_has_gradients_of_zero(size: int) -> None:
    conv = nn.Conv2d(24, 24, size, 1, 1, groups=24, bias=False)
    cpu_layers.split_depthwise(conv)
    y, grad, by_weight = gradients(conv, channels_last(0, 24, 9, 9))
    assert y.shape[0] == grad.shape[0] == 0
    assert not by_weight.any()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=8, dilation=2, bias=False),
        nn.Conv2d(8, 8, 3, groups=8, padding="same", bias=False),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect", bias=False),
    ],
    ids=["dense", "two filters a channel", "with a bias", "dilated", "named padding", "reflecting"],
)
def test_other_convolutions_stay_as_they_are(conv: nn.Conv2d) -> None:
    cpu_layers.split_depthwise(conv)
    assert type(conv) is nn.Conv2d


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(2, 16, 24, 24), (1, 40, 31, 45), (3, 17, 90, 7), (2, 24, 23, 25)])
@pytest.mark.parametrize("filters", [16, 43])
def test_a_convolution_by_winograd_has_the_gradients_of_the_plain_one(
    shape: tuple[int, int, int, int], filters: int
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(shape[1], filters, 3, padding=1, bias=False)
    changed = copy.deepcopy(plain)
    cpu_layers.use_winograd(changed)
    assert type(changed) is cpu_layers.WinogradConv2d
    assert_as_exact(plain, changed, channels_last(*shape))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_convolution_by_winograd_may_be_frozen_or_first(is_frozen: bool) -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    expected = gradients(conv, channels_last(2, 16, 24, 24))
    conv.weight.grad = None
    cpu_layers.use_winograd(conv)
    x = channels_last(2, 16, 24, 24).requires_grad_(is_frozen)
    conv.requires_grad_(not is_frozen)
    y = conv(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype)
    (y * weights).sum().backward()
    (found, missing), wanted = (x.grad, conv.weight.grad), expected[1:]
    if not is_frozen:
        (found, missing), wanted = (missing, found), wanted[::-1]
    assert missing is None
    torch.testing.assert_close(found, wanted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("shape", "dtype", "context"),
    [
        ((2, 16, 23, 24), torch.float32, contextlib.nullcontext()),
        ((16, 24, 24), torch.float32, contextlib.nullcontext()),
        ((0, 16, 24, 24), torch.float32, contextlib.nullcontext()),
        ((2, 16, 24, 24), torch.float64, contextlib.nullcontext()),
        ((2, 16, 24, 24), torch.bfloat16, contextlib.nullcontext()),
        ((2, 16, 24, 24), torch.float32, torch.autocast("cpu", torch.float16)),
    ],
    ids=["small", "without a batch", "of no slices", "float64", "bfloat16", "float16"],
)
def test_a_convolution_that_has_no_kernel_is_torch_s(
    shape: tuple[int, ...], dtype: torch.dtype, context: contextlib.AbstractContextManager[object]
) -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    with context:
        expected = conv(x)
        cpu_layers.use_winograd(conv)
        found = conv(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.fixture(params=[True, False], ids=["with tiles", "without tiles"])
def has_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs a test as on a CPU that multiplies tiles of bf16, and as on one that does not."""
    found: bool = request.param
    monkeypatch.setattr(compiler, "has_tiles", lambda: found)
    return found


@pytest.mark.usefixtures("kernels")
def test_under_autocast_a_convolution_by_winograd_rounds_as_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "has_tiles", lambda: False)
    torch.manual_seed(0)
    plain = nn.Conv2d(24, 40, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    changed = copy.deepcopy(plain)
    cpu_layers.use_winograd(changed)
    x = channels_last(2, 24, 25, 31)
    exact = gradients(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        found, beside = gradients(changed, x), gradients(plain, x)
    for one, other, expected in zip(found, beside, exact, strict=True):
        assert one.dtype == other.dtype
        errors = [float((each.double() - expected).norm() / expected.norm()) for each in (one, other)]
        assert errors[0] < 1.5 * errors[1]


def test_under_autocast_a_convolution_by_winograd_is_torch_s_where_the_cpu_multiplies_tiles(
    kernels_used: list[str], has_tiles: bool
) -> None:
    conv, x = nn.Conv2d(16, 16, 3, padding=1, bias=False), channels_last(2, 16, 24, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = conv(x)
        cpu_layers.use_winograd(conv)
        found = conv(x)
    assert kernels_used == ([] if has_tiles else ["convolve"])
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected) or not has_tiles


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, bias=False),
        nn.Conv2d(16, 16, 3, 2, 1, bias=False),
        nn.Conv2d(16, 16, 5, padding=1, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(16, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.Conv2d(16, 16, 3, padding="same", bias=False),
    ],
    ids=["with a bias", "no border", "stride 2", "5 x 5", "in groups", "few filters", "few channels", "named padding"],
)
def test_other_convolutions_are_not_winograd_s(conv: nn.Conv2d) -> None:
    cpu_layers.use_winograd(conv)
    assert type(conv) is nn.Conv2d


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    filters=st.integers(1, 40),
)
def test_a_convolution_of_pixels_has_the_gradients_of_the_plain_one(
    shape: tuple[int, int, int, int], filters: int
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(shape[1], filters, 1, bias=False)
    changed = copy.deepcopy(plain)
    cpu_layers.multiply_pixels(changed)
    assert type(changed) is cpu_layers.PixelConv2d
    assert_as_exact(plain, changed, channels_last(*shape))


@pytest.mark.parametrize("shape", [(2, 16, 6, 6), (2, 16, 8, 8), (2, 16, 17, 16), (16, 8, 8), (0, 16, 8, 8)])
@pytest.mark.parametrize("is_mixed", [True, False])
def test_a_convolution_of_pixels_gives_shape_type_and_layout_of_the_plain_one(
    shape: tuple[int, ...], is_mixed: bool
) -> None:
    conv = nn.Conv2d(16, 24, 1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        expected = conv(x)
        cpu_layers.multiply_pixels(conv)
        found = conv(x)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.stride() == expected.stride() or not found.numel()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("is_mixed", "largest"), [(True, 16), (False, 6)])
def test_convolutions_of_pixels_are_products_of_matrices_up_to_a_size_that_hangs_on_the_type(
    is_mixed: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_pixels, sizes = joined_layers.multiply, []

    def watched(conv: nn.Conv2d, x: Tensor) -> Tensor:
        sizes.append(x.shape[1])
        return of_pixels(conv, x)

    monkeypatch.setattr(cpu_layers, "multiply", watched)
    conv = nn.Conv2d(16, 24, 1, bias=False)
    cpu_layers.multiply_pixels(conv)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        for size in range(1, 20):
            conv(channels_last(1, 16, size, size))
    assert sizes == list(range(1, largest + 1))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 1, 2, bias=False),
        nn.Conv2d(16, 16, 1, padding=1, bias=False),
        nn.Conv2d(16, 16, 1, groups=2, bias=False),
        nn.Conv2d(16, 16, (1, 3), bias=False),
    ],
    ids=["with a bias", "stride 2", "with a border", "in groups", "1 x 3"],
)
def test_other_convolutions_are_not_of_pixels(conv: nn.Conv2d) -> None:
    cpu_layers.multiply_pixels(conv)
    assert type(conv) is nn.Conv2d


def test_swish_in_one_operation_is_swish() -> None:
    changed: nn.Module = Swish(inplace=True)
    joined_layers.join_silu(changed)
    assert type(changed) is nn.SiLU
    assert_as_exact(Swish(), changed, channels_last(2, 8, 4, 4))


@pytest.mark.usefixtures("way")
def test_squeeze_and_excitation_by_rows_is_that_of_timm() -> None:
    torch.manual_seed(0)
    plain = SqueezeExcite(24, act_layer=nn.SiLU)
    changed = copy.deepcopy(plain)
    joined_layers.pool_by_rows(changed)
    assert type(changed) is joined_layers.SqueezeExcite
    assert_as_exact(plain, changed, channels_last(3, 24, 9, 7))


@pytest.mark.usefixtures("way")
def test_squeeze_and_excitation_without_gradients_is_that_of_timm() -> None:
    torch.manual_seed(0)
    plain = SqueezeExcite(24, act_layer=nn.SiLU)
    changed = copy.deepcopy(plain)
    joined_layers.pool_by_rows(changed)
    x = channels_last(3, 24, 10, 8)
    with torch.no_grad():
        torch.testing.assert_close(changed(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [(10, 8), (3, 3)], ids=["whole rows", "pixels that fill no row"])
def test_squeeze_and_excitation_of_any_size_has_the_gradients_of_timm(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = SqueezeExcite(24, act_layer=nn.SiLU)
    changed = copy.deepcopy(plain)
    joined_layers.pool_by_rows(changed)
    assert_as_exact(plain, changed, channels_last(3, 24, *size))


@pytest.mark.usefixtures("way")
def test_squeeze_and_excitation_of_no_slices_has_gradients_of_zero() -> None:
    changed = SqueezeExcite(24, act_layer=nn.SiLU)
    joined_layers.pool_by_rows(changed)
    y, grad, *others = gradients(changed, channels_last(0, 24, 8, 8))
    assert y.shape == grad.shape == (0, 24, 8, 8)
    assert not any(other.any() for other in others)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("frozen", [("conv_reduce", "conv_expand"), ("conv_reduce",)])
def test_squeeze_and_excitation_may_be_frozen(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    plain = SqueezeExcite(24, act_layer=nn.SiLU)
    for name in frozen:
        getattr(plain, name).requires_grad_(False)
    changed = copy.deepcopy(plain)
    joined_layers.pool_by_rows(changed)
    assert_as_exact(plain, changed, channels_last(3, 24, 10, 8))


@pytest.mark.usefixtures("way")
def test_squeeze_and_excitation_computes_in_bf16_alone() -> None:
    torch.manual_seed(0)
    plain = SqueezeExcite(24, act_layer=nn.SiLU)
    changed = copy.deepcopy(plain).bfloat16()
    joined_layers.pool_by_rows(changed)
    x = channels_last(3, 24, 10, 8)
    y = changed(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(x), rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [11, 14])
def test_a_decoder_block_refuses_skips_of_another_size(size: int) -> None:
    block = DecoderBlock(8, 4, 16)
    joined_layers.join_skips(block)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        block(channels_last(2, 8, 6, 6), channels_last(2, 4, size, size))


@pytest.mark.usefixtures("way")
def test_a_decoder_block_of_several_skips_in_bf16_and_in_no_slices() -> None:
    block = DecoderBlock(8, 9, 16).bfloat16()
    joined_layers.join_skips(block)
    for slices in (2, 0):
        x = channels_last(slices, 8, 6, 6).bfloat16().requires_grad_()
        skips = [channels_last(slices, channels, 12, 12).bfloat16().requires_grad_() for channels in (4, 5)]
        joined = block._join(x, tuple(skips))
        expected = torch.cat([nn.functional.interpolate(x, scale_factor=2.0), *skips], 1)
        assert torch.equal(joined, expected)
        joined.sum().backward()
        assert x.grad is not None
        assert bool((x.grad == 4).all())


@pytest.mark.usefixtures("way")
def test_a_decoder_block_with_a_dense_gradient_is_that_of_smp() -> None:
    torch.manual_seed(0)
    plain = DecoderBlock(8, 4, 16)
    changed = copy.deepcopy(plain)
    joined_layers.join_skips(changed)
    assert type(changed) is joined_layers.DecoderBlock
    skip = channels_last(2, 4, 12, 12, seed=1)
    with_skip: list[Callable[[Tensor], Tensor]] = [lambda x: plain(x, skip), lambda x: changed(x, skip)]
    x = channels_last(2, 8, 6, 6)
    inputs = [x.clone().requires_grad_() for _ in with_skip]
    for one, block in zip(inputs, with_skip, strict=True):
        block(one).square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)
    for other, mine in zip(plain.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-3)


def exact_plain_and_changed() -> tuple[nn.Module, nn.Module, nn.Module]:
    """One model in float64, as it was built, and quickened."""
    plain = build_model(ENCODER, 4, seed=3).to(memory_format=torch.channels_last)
    changed = copy.deepcopy(plain)
    cpu_layers.use_fast_layers(changed, torch.device("cpu"))
    return copy.deepcopy(plain).double(), plain, changed


@pytest.mark.usefixtures("way")
def test_a_quickened_model_is_as_near_to_the_exact_gradient_as_the_plain_one() -> None:
    x, found = channels_last(4, 1, 64, 64), []
    for model in exact_plain_and_changed():
        set_dropout(keyed_layers(model), 0, 0, [0, 1, 2, 3])
        loss = model(x.to(next(model.parameters()).dtype)).square().mean()
        loss.backward()
        grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found.append(torch.cat([loss.detach().view(1), *grads]).double())
    errors = [(one - found[0]).norm() for one in found[1:]]
    assert errors[1] < 3 * errors[0]  # equal but for chance; a wrong formula is off by the gradient's own size
    assert errors[1] < 0.02 * found[0].norm()


@pytest.mark.usefixtures("way", "has_tiles")
def test_under_autocast_a_quickened_model_is_as_near_to_the_exact_gradient_as_the_plain_one() -> None:
    x, found = channels_last(4, 1, 64, 64), []
    exact, plain, changed = exact_plain_and_changed()
    for model in (exact, plain, changed):
        set_dropout(keyed_layers(model), 0, 0, [0, 1, 2, 3])
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            y = model(x.to(next(model.parameters()).dtype))
        y.to(x.dtype if model is not exact else torch.float64).square().mean().backward()
        grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found.append((y.detach().double(), torch.cat(grads).double()))
    (output, gradient), *others = found
    errors = [(float((y - output).norm()), float((grad - gradient).norm())) for y, grad in others]
    # bf16 leaves an eighth of the output and half of its gradient to chance: a half more is no other formula
    assert errors[1][0] < 1.5 * errors[0][0]
    assert errors[1][1] < 1.5 * errors[0][1]


@pytest.mark.usefixtures("way")
def test_a_quickened_model_keeps_the_names_and_the_values_of_its_state() -> None:
    plain = build_model(ENCODER, 4)
    state = copy.deepcopy(plain.state_dict())
    cpu_layers.use_fast_layers(plain, torch.device("cpu"))
    assert list(plain.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


@pytest.mark.usefixtures("way")
def test_a_copy_of_a_quickened_model_has_layers_of_its_own() -> None:
    model = build_model(ENCODER, 4)
    cpu_layers.use_fast_layers(model, torch.device("cpu"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x = channels_last(2, 1, 64, 64)
    assert model.eval()(x).abs().max() > 0
    assert other.eval()(x).abs().max() == 0


@pytest.mark.usefixtures("way", "has_tiles")
@pytest.mark.parametrize("is_mixed", [True, False])
def test_a_quickened_model_s_gradients_lie_as_its_weights_do(is_mixed: bool) -> None:
    """DistributedDataParallel warns where they do not, and copies them."""
    model = build_model(ENCODER, 4).to(memory_format=torch.channels_last)
    cpu_layers.use_fast_layers(model, torch.device("cpu"))
    set_dropout(keyed_layers(model), 0, 0, [0, 1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        y = model(channels_last(2, 1, 64, 64))
    grads = torch.autograd.grad(y.float().sum(), trained)
    assert [grad.stride() for grad in grads] == [parameter.stride() for parameter in trained]


def excite(channels: int) -> nn.Module:
    torch.manual_seed(0)
    module = SqueezeExcite(channels, act_layer=nn.SiLU)
    joined_layers.pool_by_rows(module)
    return module


def test_a_frozen_squeeze_and_excitation_hands_its_gradient_on() -> None:
    plain = SqueezeExcite(32).requires_grad_(False)
    changed = copy.deepcopy(plain)
    joined_layers.pool_by_rows(changed)
    assert_as_exact(plain, changed, channels_last(2, 32, 8, 8))


def test_a_squeeze_and_excitation_that_is_frozen_in_part_trains_the_rest() -> None:
    plain = SqueezeExcite(32)
    plain.conv_reduce.requires_grad_(False)
    changed = copy.deepcopy(plain)
    joined_layers.pool_by_rows(changed)
    assert_as_exact(plain, changed, channels_last(2, 32, 8, 8))


def test_a_kept_graph_gives_the_gradient_of_squeeze_and_excitation_twice() -> None:
    x = channels_last(2, 32, 8, 8).requires_grad_()
    y = excite(32)(x).square().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("is_trained", [True, False])
def test_squeeze_and_excitation_of_bf16_weights_computes_in_bf16(is_trained: bool) -> None:
    module = excite(32)
    x = channels_last(2, 32, 8, 8)
    expected = module(x).detach()
    with torch.set_grad_enabled(is_trained):
        y = module.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.detach().float(), expected, rtol=0.03, atol=0.03)


def test_a_depthwise_convolution_in_half_precision_has_the_gradients_of_the_whole() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False).half()
    changed = copy.deepcopy(plain)
    cpu_layers.split_depthwise(changed)
    x = channels_last(2, 16, 8, 8).half()
    exact = gradients(copy.deepcopy(plain).double(), x.double())
    for found, expected in zip(gradients(changed, x), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", [3, 5])
def test_a_depthwise_convolution_has_second_derivatives(size: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, size, padding=size // 2, groups=16, bias=False)
    changed = copy.deepcopy(plain)
    cpu_layers.split_depthwise(changed)
    found = []
    for conv, x in ((changed, channels_last(2, 16, 8, 8)), (plain.double(), channels_last(2, 16, 8, 8).double())):
        leaf = x.requires_grad_()
        (slope,) = torch.autograd.grad(conv(leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), leaf)[0].double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 11, 12), (2, 4, 12, 13), (1, 4, 12, 12), (2, 4, 6, 6)])
def test_a_decoder_block_refuses_a_skip_of_another_size(shape: tuple[int, ...]) -> None:
    block = DecoderBlock(8, 4, 16)
    joined_layers.join_skips(block)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        block(channels_last(2, 8, 6, 6), channels_last(*shape))


def test_a_layer_that_a_sequence_repeats_stays_between_norm_and_activation() -> None:
    shared = nn.Sigmoid()
    plain = nn.Sequential(shared, nn.BatchNorm2d(16), shared, nn.ReLU())
    changed = copy.deepcopy(plain)
    cpu_layers.join_norms(changed)
    x = channels_last(2, 16, 4, 4)
    torch.testing.assert_close(changed(x), plain(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("trace", ["jit", "export"])
def test_what_was_traced_of_a_quickened_model_is_the_model(trace: str) -> None:
    model = build_model(ENCODER, 4).to(memory_format=torch.channels_last).eval()
    cpu_layers.use_fast_layers(model, torch.device("cpu"))
    x, other = channels_last(1, 1, 64, 64), channels_last(1, 1, 64, 64, seed=1)
    with torch.no_grad():
        if trace == "jit":
            traced: Callable[[Tensor], Tensor] = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
        else:
            traced = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-4)
