"""Faster ways to the same numbers, for layers that torch computes slowly on CPUs.

Each function changes a model in place: a layer keeps its parameters, its buffers and their names, and is computed
another way. Sums are taken in another order, so results agree to rounding; the formulas are the same. What each gains
is in docs/performance.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchai.model import smp, timm
from matchai.normalisation import SyncBatchNorm

_blocks: Any = timm.models._efficientnet_blocks
_decoder: Any = smp.decoders.unetplusplus.decoder

LANES = 16  # numbers of float32 in a register of AVX-512
NARROW = 64  # channels; maps of more are small, where the bookkeeping costs what the kernel gains


def quicken(model: nn.Module) -> None:
    """Applies every function of this module to a model that is to be trained on a CPU."""
    for change in (join_silu, split_depthwise, pool_by_rows, keep_gradients_dense, widen_batch_norm):
        change(model)


def join_silu(model: nn.Module) -> None:
    """Computes timm's Swish, x · σ(x) in two operations, in the one that torch has for it."""
    for module in model.modules():
        if type(module) is timm.layers.Swish:
            module.__class__ = nn.SiLU  # type: ignore[assignment]
            module.inplace = False  # in place it would copy its input for the gradient


def split_depthwise(model: nn.Module) -> None:
    """Computes the gradients of depthwise convolutions by kernels that oneDNN has made for them; see `_Depthwise`."""
    for module in model.modules():
        if (
            type(module) is nn.Conv2d
            and module.groups == module.in_channels == module.out_channels > 1
            and module.bias is None
            and module.dilation == (1, 1)
            and not isinstance(module.padding, str)
            and module.padding_mode == "zeros"
        ):
            module.__class__ = DepthwiseConv2d


def pool_by_rows(model: nn.Module) -> None:
    """Computes the means of timm's squeeze-and-excitation over rows of channels, as they lie in memory."""
    for module in model.modules():
        if type(module) is _blocks.SqueezeExcite:
            module.__class__ = SqueezeExcite


def keep_gradients_dense(model: nn.Module) -> None:
    """Hands the upsampling of the UNet++ its gradient in one piece, not as a slice of the concatenation's."""
    for module in model.modules():
        if type(module) is _decoder.DecoderBlock and not module.is_empty:
            module.__class__ = DecoderBlock


def widen_batch_norm(model: nn.Module) -> None:
    """Computes batch norms of few channels that fill no whole registers as if pixels side by side were channels."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if not isinstance(child, nn.BatchNorm2d) or isinstance(child, SyncBatchNorm):
                continue
            if child.num_features < NARROW and child.num_features % LANES:
                setattr(module, name, SyncBatchNorm(child))


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution (one filter a channel, no bias) whose gradients are fast in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves x (B, C, H, W)."""
        weight: Tensor = self.weight
        if torch.is_autocast_enabled("cpu"):
            x, weight = (one.to(torch.get_autocast_dtype("cpu")) for one in (x, weight))
        if x.device.type != "cpu" or x.dtype == torch.float64 or not torch.is_grad_enabled():
            return F.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups)
        convolved: Tensor = _Depthwise.apply(x, weight, self.stride, self.padding)
        return convolved


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
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            exact = torch.float32 if max(ctx.stride) > 1 else x.dtype
            grad_x = _gradients(grad.to(exact), x, weight.to(exact), ctx, ctx.padding, [True, False])[0].to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x, weight, ctx)
        return grad_x, grad_weight, None, None


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


class _RowMean(torch.autograd.Function):
    """The mean over the pixels, (B, C, H, W) to (B, C, 1, 1); its gradient is handed on without being written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        # over H and W of a channels-last tensor torch takes five times as long as over rows of channels
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        height, width = ctx.shape[2:]
        spread: Tensor = (grads[0] / (height * width)).expand(ctx.shape)
        return spread


class SqueezeExcite(_blocks.SqueezeExcite):  # type: ignore[misc]
    """timm's squeeze-and-excitation (Hu et al. 2018) with another mean."""

    def forward(self, x: Tensor) -> Tensor:
        """Scales the channels of x (B, C, H, W) by gates in 0..1 that depend on their means."""
        mean: Tensor = _RowMean.apply(x)
        gated: Tensor = x * self.gate(self.conv_expand(self.act1(self.conv_reduce(mean))))
        return gated


class _Dense(torch.autograd.Function):
    """Leaves a tensor as it is, and makes its gradient dense in channels-last memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous(memory_format=torch.channels_last)


class DecoderBlock(_decoder.DecoderBlock):  # type: ignore[misc]
    """smp's block of the UNet++ decoder; torch's gradient of its upsampling takes ten times as long from a slice."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Upsamples x (B, C, H, W) to twice the size, concatenates skip (B, C', 2 H, 2 W), and convolves."""
        x = _Dense.apply(F.interpolate(x, scale_factor=2.0, mode=self.interpolation_mode))
        if skip is not None:
            x = self.attention1(torch.cat([x, skip], dim=1))
        decoded: Tensor = self.attention2(self.conv2(self.conv1(x)))
        return decoded
