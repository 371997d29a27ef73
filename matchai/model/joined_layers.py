"""Layers computed another way on every device, to the same numbers by fewer and larger operations.

Each function changes a model in place: a layer keeps its parameters, its buffers and their names. Sums are taken in
another order, so results agree to rounding; the formulas are the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from matchai.model.dropout import KeyedDropPath
from matchai.model.unetplusplus import smp, timm
from matchai.native import library

_blocks: Any = timm.models._efficientnet_blocks
_decoder: Any = smp.decoders.unetplusplus.decoder


def join_layers(model: nn.Module) -> None:
    """Applies every function of this module to a model."""
    for change in (join_silu, pool_by_rows, join_skips):
        change(model)


def join_silu(model: nn.Module) -> None:
    """Computes timm's Swish, x · σ(x) in two operations, in the one that torch has for it."""
    for module in model.modules():
        if type(module) is timm.layers.Swish:
            module.__class__ = nn.SiLU  # type: ignore[assignment]
            module.inplace = False  # in place it would copy its input for the gradient


def pool_by_rows(model: nn.Module) -> None:
    """Computes the means of timm's squeeze-and-excitation over rows of channels, as they lie in memory."""
    for module in model.modules():
        if type(module) is _blocks.SqueezeExcite:
            module.__class__ = SqueezeExcite


def join_skips(model: nn.Module) -> None:
    """Gives the blocks of a UNet++ decoder what they upsample and concatenate in one piece; see `DecoderBlock`."""
    for module in model.modules():
        if type(module) is _decoder.DecoderBlock and not module.is_empty:
            module.__class__ = DecoderBlock
        elif type(module) is _decoder.UnetPlusPlusDecoder:
            blocks = [one for one in module.modules() if isinstance(one, _decoder.DecoderBlock)]
            if not any(block.is_empty for block in blocks):
                module.__class__ = Decoder


def multiply(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of 1 x 1 on pixels (..., C), to (..., O)."""
    # by way of channels-last order, so that the gradient has the weight's strides, as DDP's buckets ask
    return F.linear(x, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def join_residuals(model: nn.Module) -> None:
    """Adds what timm's blocks drop and what goes around them in one operation, rounded once."""
    for module in model.modules():
        for kind in (InvertedResidual, DepthwiseSeparableConv):
            if type(module) is kind.__bases__[1] and isinstance(module.drop_path, KeyedDropPath):
                module.__class__ = kind


class _JoinedResidual:
    """A block of timm's with a drop path."""

    has_skip: bool
    drop_path: KeyedDropPath

    def forward(self, x: Tensor) -> Tensor:
        """The block of x (B, C, H, W), with its way around where it has one."""
        if not self.has_skip:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        self.has_skip = False
        try:
            path = super().forward(x)  # type: ignore[misc]
        finally:
            self.has_skip = True
        return self.drop_path.add(path, x)


class InvertedResidual(_JoinedResidual, _blocks.InvertedResidual):  # type: ignore[misc]
    """timm's inverted residual block (Sandler et al. 2018)."""


class DepthwiseSeparableConv(_JoinedResidual, _blocks.DepthwiseSeparableConv):  # type: ignore[misc]
    """timm's depthwise separable convolution with a way around."""


class _RowMean(torch.autograd.Function):
    """The mean over the pixels, (B, C, H, W) to (B, C); its gradient is handed on without being written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        # over H and W of a channels-last tensor torch takes five times as long as over rows of channels
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        height, width = ctx.shape[2:]
        spread: Tensor = (grads[0] / (height * width))[:, :, None, None].expand(ctx.shape)
        return spread


class SqueezeExcite(_blocks.SqueezeExcite):  # type: ignore[misc]
    """timm's squeeze-and-excitation (Hu et al. 2018) with another mean, and matrices in place of convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """Scales the channels of x (B, C, H, W) by gates in 0..1 that depend on their means."""
        is_float = self.conv_reduce.weight.dtype == torch.float32
        kernels = library.load()[0] if is_float and library.fits(x) else None
        y: Tensor
        if kernels is None and not x.is_cpu and torch.is_grad_enabled():
            y = _SqueezeExcite.apply(x, _TorchKernels, self, *self.parameters())
        elif kernels is None:
            y = x * self.gates(_RowMean.apply(x))[:, :, None, None].to(x.dtype)
        elif torch.is_grad_enabled():
            y = _SqueezeExcite.apply(x, kernels, self, *self.parameters())
        else:
            y = kernels.scale(x, self.gates(kernels.means(x)))
        return y

    def gates(self, means: Tensor) -> Tensor:
        """The gates (B, C) of means over the pixels (B, C), in the weights' type: they are few, and casts cost more."""
        with torch.autocast(means.device.type, enabled=False):
            reduced = self.act1(multiply(self.conv_reduce, means.to(self.conv_reduce.weight.dtype)))
            gates: Tensor = self.gate(multiply(self.conv_expand, reduced))
        return gates


class _TorchKernels:
    """What `_SqueezeExcite` needs, by torch's operations."""

    @staticmethod
    def means(x: Tensor) -> Tensor:
        return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def scale(x: Tensor, gates: Tensor) -> Tensor:
        return x * _as_map(gates, x)

    @staticmethod
    def gate_gradient(x: Tensor, grad: Tensor) -> Tensor:
        return (x * grad).sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def scale_gradient(grad: Tensor, gates: Tensor, grad_means: Tensor) -> Tensor:
        spread = grad_means / (grad.shape[2] * grad.shape[3])
        return torch.addcmul(_as_map(spread, grad), grad, _as_map(gates, grad))


def _as_map(values: Tensor, like: Tensor) -> Tensor:
    """Values (B, C) for every pixel of a map."""
    return values[:, :, None, None].to(like.dtype)


class _SqueezeExcite(torch.autograd.Function):
    """x times the gates of its means, taking both ways to x in one pass of its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernels: library.Kernels | type[_TorchKernels],
        module: SqueezeExcite,
        *parameters: Tensor,
    ) -> Tensor:
        with torch.enable_grad():  # a graph of its own for the few numbers between means and gates
            means = kernels.means(x).requires_grad_()
            gates = module.gates(means)
        ctx.save_for_backward(x)
        ctx.kernels, ctx.means, ctx.gates, ctx.parameters = kernels, means, gates, parameters
        return kernels.scale(x, gates.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        wanted = [one for one in ctx.parameters if one.requires_grad]
        grad_gates = ctx.kernels.gate_gradient(x, grad)
        # kept, as the caller may keep the graph around it: it goes with the context
        grad_means, *found = torch.autograd.grad(ctx.gates, [ctx.means, *wanted], grad_gates, retain_graph=True)
        grad_x = ctx.kernels.scale_gradient(grad, ctx.gates.detach(), grad_means)
        grad_parameters = [found.pop(0) if one.requires_grad else None for one in ctx.parameters]
        return grad_x, None, None, *grad_parameters


class _Dense(torch.autograd.Function):
    """Leaves a tensor as it is, and makes its gradient dense in channels-last memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous(memory_format=torch.channels_last)


class _Join(torch.autograd.Function):
    """Upsampling and concatenation by a compiled kernel: each map is read once and its gradient written once."""

    @staticmethod
    def forward(ctx: Any, kernels: library.Kernels, x: Tensor, *skips: Tensor) -> Tensor:
        ctx.kernels, ctx.channels = kernels, [one.shape[1] for one in (x, *skips)]
        return kernels.join(x, skips)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        return None, *ctx.kernels.split_gradient(grad, ctx.channels)


class _JoinDoubled(torch.autograd.Function):
    """Nearest upsampling to twice the size and concatenation, without the upsampled map in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *skips: Tensor) -> Tensor:
        ctx.channels = [one.shape[1] for one in (x, *skips)]
        (slices, _, height, width), own = x.shape, x.shape[1]
        shape = (slices, sum(ctx.channels), 2 * height, 2 * width)
        joined = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        joined[:, :own].view(slices, own, height, 2, width, 2).copy_(x[:, :, :, None, :, None])
        for part, skip in zip(torch.split(joined[:, own:], ctx.channels[1:], 1), skips, strict=True):
            part.copy_(skip)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own, *rest = torch.split(grads[0], ctx.channels, 1)
        slices, channels, height, width = own.shape
        pixels = own.view(slices, channels, height // 2, 2, width // 2, 2).sum((3, 5))
        return pixels.contiguous(memory_format=torch.channels_last), *rest


def _are_twice(x: Tensor, skips: tuple[Tensor, ...]) -> bool:
    """Whether the skips are as many slices as x and twice its size."""
    size = (x.shape[0], 2 * x.shape[2], 2 * x.shape[3])
    return all((one.shape[0], *one.shape[2:]) == size for one in skips)


class DecoderBlock(_decoder.DecoderBlock):  # type: ignore[misc]
    """smp's block of the UNet++ decoder, which takes several skips and concatenates them with what it upsamples."""

    def forward(self, x: Tensor, *skips: Tensor) -> Tensor:
        """Upsamples x (B, C, H, W) to twice the size, concatenates skips (B, C', 2 H, 2 W), and convolves."""
        joined = self._join(x, skips)
        decoded: Tensor = self.attention2(self.conv2(self.conv1(self.attention1(joined) if skips else joined)))
        return decoded

    def _join(self, x: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
        kernels = library.load()[0]
        is_alike = all(library.is_map(one) and one.dtype == x.dtype for one in (x, *skips))
        joined: Tensor
        if kernels is not None and is_alike and _are_twice(x, skips) and self.interpolation_mode == "nearest":
            joined = _Join.apply(kernels, x, *skips)
            return joined
        if (
            not x.is_cpu
            and skips
            and self.interpolation_mode == "nearest"
            and _are_twice(x, skips)
            and all(one.dtype == x.dtype for one in skips)
        ):
            joined = _JoinDoubled.apply(x, *skips)
            return joined
        # torch's gradient of the upsampling takes ten times as long from a slice of the concatenation's
        joined = _Dense.apply(F.interpolate(x, scale_factor=2.0, mode=self.interpolation_mode))
        return torch.cat([joined, *skips], dim=1) if skips else joined


class Decoder(_decoder.UnetPlusPlusDecoder):  # type: ignore[misc]
    """smp's decoder of the UNet++ (Zhou et al. 2018), which concatenates a block's skips once, not twice."""

    def forward(self, features: list[Tensor]) -> Tensor:
        """The encoder's maps, largest first, to the decoded one, twice as large as the second of them.

        A block (i, j) refines (i, j - 1), beside all that was made at its own size before: (i + 1, j) to (j, j), and
        the encoder's map.
        """
        encoded = features[:0:-1]
        made: dict[tuple[int, int], Tensor] = {}
        for j in range(self.depth):
            for i in range(j, -1, -1):
                below = encoded[j] if i == j else made[i, j - 1]
                skips = [made[other, j] for other in range(i + 1, j + 1)]
                made[i, j] = self.blocks[f"x_{i}_{j}"](below, *skips, encoded[j + 1])
        decoded: Tensor = self.blocks[f"x_0_{self.depth}"](made[0, self.depth - 1])
        return decoded
