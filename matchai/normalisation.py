"""Batch norm over a whole batch whose parts are computed in several places, on any device.

torch's own synchronised batch norm refuses CPU tensors. This one takes any way of exchanging a vector between the
parts, so the parts may be processes, or single slices on their own threads.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Gather = Callable[[Tensor], Tensor]
"""Takes this part's vector (n,), returns those of all parts (P, n), in the same order on each of them."""


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm in place of a given one, whose parameters and buffers it shares; x (B, C, ...), B may be 0.

    Count, mean and sum of squared deviations of every part are exchanged and merged in double precision by the update
    of Chan, Golub and LeVeque (1983), which has none of the cancellation of a difference of mean squares.

    Args:
        norm: What it replaces.
        gather: Exchanges a vector between the parts.
        is_updating: Whether this part updates the running statistics; one of those that share the buffers does.

    Raises:
        ValueError: In training, if the whole batch has less than two values a channel.
    """

    def __init__(self, norm: _BatchNorm, gather: Gather, is_updating: bool = True) -> None:
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
        channels = x.shape[1]
        own = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=x.device)
        if x.numel():
            # with float statistics beside it, a half-precision x gets float ones back; 20 times as fast as var_mean
            mean, var = torch.batch_norm_update_stats(x.detach(), *_like_running(x, exact), 0.0)
            own[0] = x.numel() / channels
            own[1 : 1 + channels] = mean
            own[1 + channels :] = var.double() * own[0]
        parts = self.gather(own)
        counts, means, deviations = parts[:, :1], parts[:, 1 : 1 + channels], parts[:, 1 + channels :]
        count = counts.sum()
        if count < 2:
            raise ValueError(f"batch norm needs two values a channel in training, but the whole batch has {count:g}.")
        mean = (counts * means).sum(0) / count
        deviation = deviations.sum(0) + (counts * (means - mean) ** 2).sum(0)
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
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With x̂ = (x - mean) / σ: ∂x = weight / σ · (∂y - Σ∂y / N - x̂ · Σ(∂y · x̂) / N), sums over all parts."""
        grad = grads[0]
        x, weight, mean, var = ctx.saved_tensors
        sigma = torch.sqrt(var.double() + ctx.eps)
        own = torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)
        if x.numel():
            _, own[0], own[1] = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        along, total = ctx.gather(own.double().flatten()).sum(0).view(2, -1) / ctx.count
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = 1 / sigma if weight is None else weight.double() / sigma
        along, total, scale = (value.to(mean.dtype).view(shape) for value in (along / sigma, total, scale))
        grad_x = (x - mean.view(shape)).mul_(-along).add_(grad).sub_(total).mul_(scale).to(x.dtype)
        return grad_x, *((None, None) if weight is None else own.to(weight.dtype)), None, None, None, None, None


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


def _like_running(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
