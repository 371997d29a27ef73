"""Batch norm over a whole batch whose parts are computed in several places, on any device.

torch's own synchronised batch norm refuses CPU tensors, waits for a GPU three times a layer, and fails where a part
without a slice meets parts in half precision. This one takes any way of exchanging a vector between the parts, so the
parts may be processes, or single slices on their own threads; it reads nothing back from a device; and it computes the
activation that follows in the same passes, where `matchai.native.library` has kernels for it.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from matchai.native import library

Gather = Callable[[Tensor], Tensor]
"""Takes this part's vector (n,), returns those of all parts (P, n), in the same order on each of them."""


def alone(vector: Tensor) -> Tensor:
    """The exchange of a part that is the whole batch: (n,) to (1, n)."""
    return vector.unsqueeze(0)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm in place of a given one, whose parameters and buffers it shares; x (B, C, ...), B may be 0.

    Count, mean and sum of squared deviations of every part are exchanged and merged in double precision by the update
    of Chan, Golub and LeVeque (1983), which has none of the cancellation of a difference of mean squares.

    Args:
        norm: What it replaces.
        gather: Exchanges a vector between the parts.
        is_updating: Whether this part updates the running statistics; one of those that share the buffers does.
        act: The activation after it; by default the one inside `norm`, as timm's have it.

    Raises:
        ValueError: In training on a CPU, if the whole batch has less than two values a channel; elsewhere what it
            gives is not finite then.

    >>> norm = SyncBatchNorm(nn.BatchNorm2d(1))
    >>> y = norm(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    >>> [round(value) for value in y.flatten().tolist()], norm.running_mean
    ([-1, 1], tensor([0.2000]))
    """

    def __init__(
        self, norm: _BatchNorm, gather: Gather = alone, is_updating: bool = True, act: nn.Module | None = None
    ) -> None:
        nn.Module.__init__(self)
        # state and settings of the one that goes; timm's have an activation inside, under these two names
        self._parameters, self._buffers = norm._parameters, norm._buffers
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            setattr(self, name, getattr(norm, name))
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity()) if act is None else act
        self.gather, self.is_updating = gather, is_updating
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises by the whole batch's statistics in training, by the running ones in evaluation, and activates."""
        is_running = not self.training and self.running_mean is not None
        affine, running = (self.weight, self.bias), (self.running_mean, self.running_var)
        kernels = self._kernels(x)
        if kernels is not None and not (is_running and torch.is_grad_enabled()):
            activation = library.ACTIVATIONS.get(type(self.act)) if type(self.drop) is nn.Identity else None
            if is_running:
                y = kernels.norm_running(x, activation or 0, affine, self.eps, running)
            else:
                y = _NormaliseActivate.apply(x, *affine, self, kernels, activation or 0)
            if activation is not None:
                return y
        elif is_running:
            y = F.batch_norm(x, *running, *affine, False, 0.0, self.eps)
        else:
            y = _Normalise.apply(x, *affine, self)
        activated: Tensor = self.act(self.drop(y))
        return activated

    def _kernels(self, x: Tensor) -> library.Kernels | None:
        """The compiled kernels, if they take this map and what belongs to the norm."""
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        is_plain = all(one is None or (one.dtype == torch.float32 and one.is_contiguous()) for one in own)
        return library.load()[0] if is_plain and library.fits(x) else None

    def _count_batch(self) -> float | Tensor:
        """Counts a batch, if the running statistics are to be moved; returns by how much of the way to its own."""
        if not (self.training and self.is_updating and self.running_mean is not None):
            return 0.0
        if self.num_batches_tracked is not None:  # else it is counted elsewhere
            self.num_batches_tracked += 1
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches_tracked is not None
        share = 1 / self.num_batches_tracked
        return float(share) if share.is_cpu else share


def _check_count(count: float | Tensor) -> None:
    if isinstance(count, Tensor) and not count.is_cpu:
        return  # to read it would wait for the device
    if count < 2:
        raise ValueError(
            f"batch norm needs two values a channel in training, but the whole batch has {float(count):g}."
        )


class _NormaliseActivate(torch.autograd.Function):
    """Batch norm and its activation by the compiled kernels; the backward pass computes from x what it needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: SyncBatchNorm,
        kernels: library.Kernels,
        activation: int,
    ) -> Tensor:
        parts = norm.gather(kernels.norm_statistics(x)).contiguous()
        rate = float(norm._count_batch())
        running = (norm.running_mean, norm.running_var) if rate else (None, None)
        y, saved, count = kernels.norm_forward(x, activation, parts, (weight, bias), norm.eps, rate, running)
        _check_count(count)
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.gather, ctx.kernels, ctx.activation, ctx.count = norm.gather, kernels, activation, count
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        settings = ctx.activation, saved, (weight, bias)
        own = ctx.kernels.norm_gradient_sums(x, grad, *settings)
        sums = ctx.gather(own.flatten()).sum(0)
        grad_x = ctx.kernels.norm_gradient(x, grad, *settings, sums, ctx.count)
        return grad_x, *((None, None) if weight is None else own.to(weight.dtype)), None, None, None


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) · weight + bias, whose backward pass knows that all parts made mean and var."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: SyncBatchNorm) -> Tensor:
        exact, channels = _exact(x), x.shape[1]
        counts, means, deviations = torch.split(norm.gather(_statistics(x)), [1, channels, channels], 1)
        count = counts.sum()
        _check_count(count)
        mean = (counts * means).sum(0) / count
        deviation = (deviations + counts * (means - mean) ** 2).sum(0)
        rate = norm._count_batch()
        if isinstance(rate, Tensor) or rate:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean += rate * (mean.to(exact) - norm.running_mean)
            norm.running_var += rate * ((deviation / (count - 1)).to(exact) - norm.running_var)
        mean, var = mean.to(exact), (deviation / count).to(exact)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.gather = norm.eps, norm.gather
        # with float statistics torch takes float parameters alone, beside a half-precision x too
        exact_weight, exact_bias = (None if one is None else one.to(exact) for one in (weight, bias))
        return F.batch_norm(x, mean, var, exact_weight, exact_bias, False, 0.0, norm.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With x̂ = (x - mean) / σ: ∂x = weight / σ · (∂y - Σ∂y / N - x̂ · Σ(∂y · x̂) / N), sums over all parts."""
        x, weight, mean, var, count = ctx.saved_tensors
        summed = count.dtype
        sigma = torch.sqrt(var.to(summed) + ctx.eps)
        own = torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)
        if x.numel():
            exact = None if weight is None else weight.to(mean.dtype)
            _, *sums = torch.ops.aten.native_batch_norm_backward(
                grads[0], x, exact, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
            own = torch.stack(sums)
        along, total = ctx.gather(own.to(summed).flatten()).sum(0).view(2, -1) / count
        scale = 1 / sigma if weight is None else weight.to(summed) / sigma
        slope = -scale * along / sigma
        grad_x = _affine(grads[0], scale, torch.zeros_like(scale))
        grad_x += _affine(x, slope, -scale * total - slope * mean)
        return grad_x, *((None, None) if weight is None else own.to(weight.dtype)), None


def _statistics(x: Tensor) -> Tensor:
    """(1 + 2 C,): values a channel, their means, and the sums of their squared deviations; 0 of an empty part."""
    exact, channels = _exact(x), x.shape[1]
    own = torch.zeros(1 + 2 * channels, dtype=sum_dtype(x.device), device=x.device)
    if x.numel():
        count = x.numel() / channels
        if x.device.type in ("cpu", "cuda"):
            # with float statistics beside it, a half-precision x gets float ones back; 20 times as fast as var_mean
            like_running = x.new_zeros(channels, dtype=exact), x.new_ones(channels, dtype=exact)
            means, variances = torch.batch_norm_update_stats(x, *like_running, 0.0)
        else:
            pixels = [axis for axis in range(x.ndim) if axis != 1]
            variances, means = torch.var_mean(x.to(exact), pixels, correction=0)
        own[:1].fill_(count)
        torch.cat((means.to(own.dtype), variances.to(own.dtype) * count), out=own[1:])
    return own


def _exact(x: Tensor) -> torch.dtype:
    """The type in which the statistics of x are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type of sums over a batch: float64, but where a device has none (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


def _affine(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Computes slope · x + offset for every channel of x in one pass: a trained norm's."""
    weight, bias = slope.to(_exact(x)), offset.to(_exact(x))
    return F.batch_norm(x, torch.zeros_like(weight), torch.ones_like(weight), weight, bias, False, 0.0, 0.0)


def gather_processes(vector: Tensor) -> Tensor:
    """The vectors (n,) of all processes, (W, n) by process index."""
    parts = vector.new_empty(dist.get_world_size() * len(vector))
    # torch renames it; both names stand for one collective
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(parts, vector.contiguous())
    return parts.view(-1, len(vector))


def synchronise(model: nn.Module, gather: Gather, *, is_updating: bool = True) -> None:
    """Replaces every batch norm in a model by a `SyncBatchNorm`; names and tensors of its state stay the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, SyncBatchNorm(child, gather, is_updating))


def synchronise_processes(model: nn.Module) -> nn.Module:
    """Batch norm over the batches of all processes, on any device.

    Returns:
        The model, in which the batch norms were replaced.
    """
    synchronise(model, gather_processes)
    return model


def local_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model, possibly wrapped, whose statistics are those of this process alone."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and not (isinstance(module, SyncBatchNorm) and module.gather is not alone)
    ]


def join_buffers(model: nn.Module) -> list[Tensor]:
    """Makes all buffers of a model parts of a few tensors, and returns these: kept and put back at once.

    There is one for each type, and one for the counts of batches, which so are counted at once too.

    It replaces the tensors of the buffers, so what holds these otherwise must be made later.
    """
    joined = []
    kinds: dict[tuple[str, bool], dict[int, Tensor]] = {}
    for name, one in model.named_buffers():
        kinds.setdefault((str(one.dtype), name.endswith("num_batches_tracked")), {})[id(one)] = one
    for _, buffers in sorted(kinds.items()):
        # each begins at a multiple of 64 numbers, as kernels read some of them by aligned registers
        starts = list(itertools.accumulate((-(-one.numel() // 64) * 64 for one in buffers.values()), initial=0))
        whole = next(iter(buffers.values())).new_zeros(starts.pop())
        # `data`, as views would share one count of changes, by which autograd would take each for the others' changes
        views = {
            key: whole[start : start + one.numel()].view(one.shape).copy_(one).data
            for (key, one), start in zip(buffers.items(), starts, strict=True)
        }
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = views.get(id(buffer), buffer)
        joined.append(whole)
    return joined
