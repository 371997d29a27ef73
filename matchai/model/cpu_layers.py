"""Faster ways to the same numbers, for layers that torch computes slowly on CPUs.

Each function changes a model in place: a layer keeps its parameters, its buffers and their names, and is computed
another way. Sums are taken in another order, so results agree to rounding; the formulas are the same. What each gains
is in docs/explanation/performance.md.
"""

import itertools
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from matchai.model.joined_layers import join_layers, join_residuals, multiply
from matchai.model.normalisation import SyncBatchNorm
from matchai.native import compiler, library

# pixels of a slice: in fewer, the weights' way to other points costs more than it saves. Not of the batch, whose size
# would then change a slice's bits
SMALLEST_OF_WINOGRAD = 24 * 24
# pixels of a slice up to which a convolution of 1 x 1 is faster as a product of matrices; fewer in float32, which torch
# leaves to MKL: that takes twice as long as oneDNN on AMD's CPUs
LARGEST_PRODUCT = {torch.bfloat16: 16 * 16, torch.float32: 6 * 6}


def use_fast_layers(model: nn.Module, device: torch.device) -> None:
    """Changes the layers of a model that is to run on a device: those of this module are for CPUs alone."""
    join_layers(model)
    if device.type != "cpu":
        join_residuals(model)
    else:
        for change in (split_depthwise, use_winograd, multiply_pixels, join_norms):
            change(model)


def split_depthwise(model: nn.Module) -> None:
    """Computes the gradients of depthwise convolutions by kernels that oneDNN has made for them; see `_Depthwise`."""
    for module in model.modules():
        if _is_plain(module) and module.groups == module.in_channels == module.out_channels > 1:
            module.__class__ = DepthwiseConv2d


def use_winograd(model: nn.Module) -> None:
    """Computes convolutions of 3 x 3 with a quarter of the products; see `WinogradConv2d`."""
    for module in model.modules():
        if (
            _is_plain(module)
            and _form(module) == ((3, 3), (1, 1), (1, 1), 1)
            and min(module.in_channels, module.out_channels) >= library.LANES
        ):
            module.__class__ = WinogradConv2d


def multiply_pixels(model: nn.Module) -> None:
    """Computes convolutions of 1 x 1 on small maps as products of matrices; see `PixelConv2d`."""
    for module in model.modules():
        if _is_plain(module) and _form(module) == ((1, 1), (1, 1), (0, 0), 1):
            module.__class__ = PixelConv2d


def _is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether this is a convolution without bias and dilation whose border is so many zeros."""
    return (
        type(module) is nn.Conv2d
        and module.bias is None
        and module.dilation == (1, 1)
        and not isinstance(module.padding, str)
        and module.padding_mode == "zeros"
    )


def _form(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.groups


def join_norms(model: nn.Module) -> None:
    """Computes batch norms by compiled kernels, together with the activation after them, where there are any."""
    if library.load()[0] is None:
        return
    for module in list(model.modules()):
        children = list(module._modules.items())  # named_children() leaves out what comes a second time
        for (name, child), (after, act) in itertools.pairwise([*children, ("", nn.Identity())]):
            if not isinstance(child, nn.BatchNorm2d) or isinstance(child, SyncBatchNorm):
                continue
            if isinstance(module, nn.Sequential) and type(act) is nn.ReLU and not hasattr(child, "act"):
                setattr(module, name, SyncBatchNorm(child, act=nn.ReLU()))
                setattr(module, after, nn.Identity())
            else:
                setattr(module, name, SyncBatchNorm(child))


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution (one filter a channel, no bias) whose gradients are fast in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves x (B, C, H, W)."""
        x, weight = x.to(_dtype(x)), self.weight.to(_dtype(self.weight))
        if x.device.type != "cpu" or x.dtype == torch.float64 or not torch.is_grad_enabled():
            return F.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups)
        convolved: Tensor = _Depthwise.apply(x, weight, self.stride, self.padding)
        return convolved


def _dtype(x: Tensor) -> torch.dtype:
    """The type in which a convolution takes a tensor, where autocast is on or not."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution whose backward pass stays with the kernels that oneDNN has made for such.

    oneDNN 3.13 has one for the gradient of the weights where the filter is at most three wide, and one for that of the
    input at stride 1 or in float32. In all other cases it falls back to its grouped convolutions, which were seen to
    take 5 to 40 times as long. So wider filters are computed three columns at a time, and strides in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        kernels = library.load()[0]
        if kernels is not None and _has_kernel(x, weight) and not torch.is_grad_enabled():  # no second derivative
            made = kernels.depthwise_gradients(x, grad, weight, ctx.stride, ctx.padding, ctx.needs_input_grad)
            return *made, None, None
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            exact = torch.float32 if max(ctx.stride) > 1 else x.dtype
            grad_x = _gradients(grad.to(exact), x, weight.to(exact), ctx, ctx.padding, [True, False])[0].to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x, weight, ctx)
        return grad_x, grad_weight, None, None


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a compiled kernel that is faster: for float32 at three pixels oneDNN's is as fast."""
    size = tuple(weight.shape[2:])
    is_slow = size == (5, 5) or (size == (3, 3) and x.dtype == torch.bfloat16)
    return is_slow and library.is_map(x)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    width = weight.shape[3]
    if width <= 3:
        return _gradients(grad, x, weight, ctx, ctx.padding, [False, True])[1]
    (high, wide), stride = ctx.padding, ctx.stride[1]
    padded = F.pad(x, (wide, wide, high, high))
    parts = []
    for start in range(0, width, 3):
        columns = weight[..., start : start + 3].contiguous()
        reach = (grad.shape[3] - 1) * stride + columns.shape[3]
        seen = padded[..., start : start + reach].contiguous(memory_format=torch.channels_last)
        parts.append(_gradients(grad, seen, columns, ctx, (0, 0), [False, True])[1])
    return torch.cat(parts, 3)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, ctx: Any, padding: tuple[int, int], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a depthwise convolution by its input and its weights, those that are wanted."""
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, ctx.stride, padding, (1, 1), False, (0, 0), len(weight), [*wanted, False]
    )
    return gradients


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3 x 3 at stride 1 without bias, by a compiled kernel for maps that are large enough.

    The kernel computes in float32 whatever the maps' type. On Zen 5 it takes two thirds of oneDNN's time in bfloat16,
    too; where the CPU multiplies tiles (`compiler.has_tiles`), bfloat16 is left to oneDNN.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolves x (B, C, H, W)."""
        kernels = library.load()[0]
        if kernels is None or not self._suits(x):
            return super().forward(x)
        convolved: Tensor = _Winograd.apply(x.to(_dtype(x)), self.weight, kernels)
        return convolved

    def _suits(self, x: Tensor) -> bool:
        """Whether a map is one that the kernel computes, and faster than torch."""
        if not library.is_map(x) or x.shape[2] * x.shape[3] < SMALLEST_OF_WINOGRAD:
            return False
        is_mixed = torch.is_autocast_enabled("cpu") and _dtype(x) == torch.bfloat16 and not compiler.has_tiles()
        return self.weight.dtype == torch.float32 and (is_mixed or _dtype(x) == torch.float32)


class _Winograd(torch.autograd.Function):
    """A convolution by Winograd's minimal filtering, and its gradients by the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernels: library.Kernels) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernels = kernels
        return kernels.convolve(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:  # each pixel's way back: the filters turned round, from what was their output
            grad_x = ctx.kernels.convolve(grad, weight.flip(2, 3).transpose(0, 1))
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.kernels.convolution_weight_gradient(x, grad)
        return grad_x, grad_weight, None


class PixelConv2d(nn.Conv2d):
    """A convolution of 1 x 1 without bias, on small maps as the product of pixels and weights that it is.

    Its weights are then most of what it reads, and oneDNN's convolutions turn them into another order every time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolves x (B, C, H, W)."""
        if x.ndim != 4 or library.is_traced() or x.shape[2] * x.shape[3] > LARGEST_PRODUCT.get(_dtype(x), 0):
            return super().forward(x)
        return multiply(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
