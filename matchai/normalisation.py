"""Batch norm over a whole batch whose parts are computed in several places, on any device.

torch's own synchronised batch norm refuses CPU tensors. This one takes any way of exchanging a vector between the
parts, so the parts may be processes, or single slices on their own threads.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LANES = 32  # numbers of half precision in a register of AVX-512

Gather = Callable[[Tensor], Tensor]
"""Takes this part's vector (n,), returns those of all parts (P, n), in the same order on each of them."""


def alone(vector: Tensor) -> Tensor:
    """The exchange of a part that is the whole batch: (n,) to (1, n)."""
    return vector.unsqueeze(0)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm in place of a given one, whose parameters and buffers it shares; x (B, C, ...), B may be 0.

    Count, mean and sum of squared deviations of every part are exchanged and merged in double precision by the update
    of Chan, Golub and LeVeque (1983), which has none of the cancellation of a difference of mean squares. The pixels of
    one part are taken several side by side, as if they were more channels, where the channels fill no whole registers:
    torch's kernel takes the rest of them one by one, at 40 channels in half precision for three quarters of its time.

    Args:
        norm: What it replaces.
        gather: Exchanges a vector between the parts.
        is_updating: Whether this part updates the running statistics; one of those that share the buffers does.

    Raises:
        ValueError: In training, if the whole batch has less than two values a channel.
    """

    def __init__(self, norm: _BatchNorm, gather: Gather = alone, is_updating: bool = True) -> None:
        nn.Module.__init__(self)
        # state and settings of the one that goes; timm's have an activation inside, under these two names
        self._parameters, self._buffers = norm._parameters, norm._buffers
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            setattr(self, name, getattr(norm, name))
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        self.gather, self.is_updating = gather, is_updating
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises by the whole batch's statistics in training, by the running ones in evaluation."""
        if not self.training and self.running_mean is not None:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        else:
            y = self._normalised(x)
        activated: Tensor = self.act(self.drop(y))
        return activated

    def _normalised(self, x: Tensor) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        channels, fold = x.shape[1], _fold(x)
        own = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=x.device)
        if x.numel():
            # with float statistics beside it, a half-precision x gets float ones back; 20 times as fast as var_mean
            wide = _widened(x.detach(), fold)
            means, variances = torch.batch_norm_update_stats(wide, *_like_running(wide, exact), 0.0)
            own[0] = x.numel() / channels
            own[1:] = _merged(
                (own[0] / fold).expand(fold, 1), *(value.double().view(fold, -1) for value in (means, variances))
            )
        parts = self.gather(own)
        counts, means, deviations = parts[:, :1], parts[:, 1 : 1 + channels], parts[:, 1 + channels :]
        count = counts.sum()
        if count < 2:
            raise ValueError(f"batch norm needs two values a channel in training, but the whole batch has {count:g}.")
        mean, deviation = _merged(counts, means, deviations / counts.clamp_min(1)).view(2, -1)
        if self.training and self.is_updating and self.running_mean is not None:
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean += rate * (mean.to(exact) - self.running_mean)
            self.running_var += rate * ((deviation / (count - 1)).to(exact) - self.running_var)
        var = deviation / count
        normalised: Tensor = _Normalise.apply(
            x, self.weight, self.bias, mean.to(exact), var.to(exact), self.eps, float(count), self.gather
        )
        return normalised


def _merged(counts: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Mean and sum of squared deviations, one after the other (2 C,), of parts: (P, 1), (P, C) and (P, C), float64."""
    mean = (counts * means).sum(0) / counts.sum()
    return torch.cat((mean, (counts * (variances + (means - mean) ** 2)).sum(0)))


def _fold(x: Tensor) -> int:
    """How many pixels of x (B, C, H, W) side by side make whole registers; 1 where they need not, or cannot."""
    fold = math.lcm(x.shape[1], LANES) // x.shape[1]
    fits = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.numel() // x.shape[1] % fold == 0
    return fold if fits and x.shape[1] % (LANES // 2) else 1


def _widened(x: Tensor, fold: int) -> Tensor:
    """A view of a channels-last x (B, C, H, W) with `fold` pixels a row, (1, C · fold, 1, B · H · W / fold)."""
    return x if fold == 1 else x.permute(0, 2, 3, 1).reshape(1, 1, -1, x.shape[1] * fold).permute(0, 3, 1, 2)


def _narrowed(wide: Tensor, like: Tensor) -> Tensor:
    """The memory of `wide` in the shape of the x that it was widened from; no view, as activations work in place."""
    if wide.shape == like.shape:
        return wide
    return like.new_empty(0).set_(wide.untyped_storage(), 0, like.shape, like.stride())


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) · weight + bias, whose backward pass knows that all parts made mean and var."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        count: float,
        gather: Gather,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count, ctx.gather = eps, count, gather
        fold = _fold(x)
        mean, var = mean.repeat(fold), var.repeat(fold)
        weight, bias = (None if value is None else value.repeat(fold) for value in (weight, bias))
        return _narrowed(F.batch_norm(_widened(x, fold), mean, var, weight, bias, False, 0.0, eps), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With x̂ = (x - mean) / σ: ∂x = weight / σ · (∂y - Σ∂y / N - x̂ · Σ(∂y · x̂) / N), sums over all parts."""
        x, weight, mean, var = ctx.saved_tensors
        fold = _fold(x)
        if fold > 1:
            grads = (grads[0].contiguous(memory_format=torch.channels_last),)
        wide, wide_grad = _widened(x, fold), _widened(grads[0], fold)
        sigma = torch.sqrt(var.double() + ctx.eps)
        own = torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)
        if x.numel():
            repeated = [None if value is None else value.repeat(fold) for value in (weight, mean, var)]
            _, *sums = torch.ops.aten.native_batch_norm_backward(
                wide_grad, wide, *repeated, None, None, False, ctx.eps, [False, True, True]
            )
            own = torch.stack(sums).view(2, fold, -1).sum(1)
        along, total = ctx.gather(own.double().flatten()).sum(0).view(2, -1) / ctx.count
        scale = 1 / sigma if weight is None else weight.double() / sigma
        slope = -scale * along / sigma
        grad_x = _affine(wide_grad, scale, torch.zeros_like(scale))
        grad_x += _affine(wide, slope, -scale * total - slope * mean)
        return _narrowed(grad_x, x), *((None, None) if weight is None else own.to(weight.dtype)), *[None] * 5


def _affine(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Computes slope · x + offset for every channel of x, (1, C · fold, ...), in one pass: a trained norm's."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    fold = x.shape[1] // len(slope)
    weight, bias = (value.to(exact).repeat(fold) for value in (slope, offset))
    return F.batch_norm(x, torch.zeros_like(weight), torch.ones_like(weight), weight, bias, False, 0.0, 0.0)


def gather_processes(vector: Tensor) -> Tensor:
    """The vectors (n,) of all processes, (W, n) by process index."""
    parts = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vector)
    return torch.stack(parts)


def synchronise(model: nn.Module, gather: Gather, *, is_updating: bool = True) -> None:
    """Replaces every batch norm in a model by a `SyncBatchNorm`; names and tensors of its state stay the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, SyncBatchNorm(child, gather, is_updating))


def synchronise_processes(model: nn.Module) -> nn.Module:
    """Batch norm over the batches of all processes: torch's own on CUDA, `SyncBatchNorm` elsewhere.

    Returns:
        The model, in which the batch norms were replaced.
    """
    if next(model.parameters()).device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # noqa: PLC0415 as in key_dropout; knows timm's own layers too

        converted: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted
    synchronise(model, gather_processes)
    return model


def join_buffers(model: nn.Module) -> list[Tensor]:
    """Makes all buffers of a model parts of one tensor for each type, and returns these: kept and put back at once.

    It replaces the tensors of the buffers, so what holds these otherwise must be made later.
    """
    joined = []
    kinds = {buffer.dtype for buffer in model.buffers()}
    for kind in sorted(kinds, key=str):
        buffers = {id(buffer): buffer for buffer in model.buffers() if buffer.dtype == kind}
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


def _like_running(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
