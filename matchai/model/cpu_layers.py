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

from matchai.model.normalisation import SyncBatchNorm
from matchai.model.unetplusplus import smp, timm
from matchai.native import compiler, library

_blocks: Any = timm.models._efficientnet_blocks
_decoder: Any = smp.decoders.unetplusplus.decoder

# pixels of a slice: in fewer, the weights' way to other points costs more than it saves. Not of the batch, whose size
# would then change a slice's bits
SMALLEST_OF_WINOGRAD = 24 * 24
# pixels of a slice up to which a convolution of 1 x 1 is faster as a product of matrices; fewer in float32, which torch
# leaves to MKL: that takes twice as long as oneDNN on AMD's CPUs
LARGEST_PRODUCT = {torch.bfloat16: 16 * 16, torch.float32: 6 * 6}


def use_cpu_layers(model: nn.Module) -> None:
    """Applies every function of this module to a model that is to be trained on a CPU."""
    for change in (join_silu, split_depthwise, use_winograd, multiply_pixels, pool_by_rows, join_skips, join_norms):
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
        return _of_pixels(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _of_pixels(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of 1 x 1 on pixels (..., C), to (..., O)."""
    # by way of channels-last order, so that the gradient has the weight's strides, as DDP's buckets ask
    return F.linear(x, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


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
        if kernels is None:
            y = x * self.gates(_RowMean.apply(x))[:, :, None, None].to(x.dtype)
        elif torch.is_grad_enabled():
            y = _SqueezeExcite.apply(x, kernels, self, *self.parameters())
        else:
            y = kernels.scale(x, self.gates(kernels.means(x)))
        return y

    def gates(self, means: Tensor) -> Tensor:
        """The gates (B, C) of means over the pixels (B, C), in the weights' type: they are few, and casts cost more."""
        with torch.autocast(means.device.type, enabled=False):
            reduced = self.act1(_of_pixels(self.conv_reduce, means.to(self.conv_reduce.weight.dtype)))
            gates: Tensor = self.gate(_of_pixels(self.conv_expand, reduced))
        return gates


class _SqueezeExcite(torch.autograd.Function):
    """x times the gates of its means by compiled kernels, which take both ways to x in one pass of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: library.Kernels, module: SqueezeExcite, *parameters: Tensor) -> Tensor:
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
