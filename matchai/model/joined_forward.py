"""What a forward pass on a GPU does for all layers at once, where a kernel for each costs more than its work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from matchai.model.joined_layers import SqueezeExcite

COUNTER = "num_batches_tracked"
_CAST = {nn.Conv2d.forward, nn.ConvTranspose2d.forward, nn.Linear.forward}


class JoinedForward:
    """Casts the weights of all convolutions and linear layers by one operation, and counts a batch by one.

    Autocast would cast each weight by itself, and each batch norm count by itself: 500 kernels a step of an
    EfficientNet-B3. The numbers are the same.

    Args:
        model: The model, not wrapped.
        joined_buffers: Its buffers, joined by `matchai.model.join_buffers`.
        dtype: The type of autocast; None where there is none.
        num_groups: Groups of layers whose gradients are handed on together: more than one where they are exchanged with
            other processes while the backward pass goes on.
    """

    def __init__(
        self, model: nn.Module, joined_buffers: Sequence[Tensor], dtype: torch.dtype | None, num_groups: int = 1
    ) -> None:
        self.dtype = dtype
        layers = [module for module in model.modules() if type(module).forward in _CAST] if dtype is not None else []
        # the few numbers of these are computed in full precision
        kept = {
            id(layer) for module in model.modules() if isinstance(module, SqueezeExcite) for layer in module.modules()
        }
        layers = [layer for layer in layers if id(layer) not in kept]
        places = [
            (layer, name)
            for layer in layers
            for name, parameter in layer.named_parameters(recurse=False)
            if parameter.dtype == torch.float32
        ]
        size = max(1, -(-len(places) // num_groups))
        self._groups = [places[start : start + size] for start in range(0, len(places), size)]
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._norms = [norm for norm in norms if norm._buffers.get(COUNTER) is not None]
        is_joinable = bool(self._norms) and all(norm.momentum is not None for norm in self._norms)
        self._counters = _whole_of(self._norms[0]._buffers[COUNTER], joined_buffers) if is_joinable else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs, the layers see the cast weights, and the norms leave the counting to this."""
        counters = self._counters if all(norm.training for norm in self._norms) else None
        kept = []
        if counters is not None:
            counters += 1
            kept = [norm._buffers[COUNTER] for norm in self._norms]
            for norm in self._norms:
                norm._buffers[COUNTER] = None
        try:
            for group in self._groups:
                weights = [layer._parameters[name] for layer, name in group]
                for (layer, name), cast in zip(group, _Cast.apply(self.dtype, *weights), strict=True):
                    layer.__dict__[name] = cast  # found before the parameter of this name
            yield
        finally:
            for layer, name in (place for group in self._groups for place in group):
                layer.__dict__.pop(name, None)
            for norm, counter in zip(self._norms, kept, strict=False):
                norm._buffers[COUNTER] = counter


def _whole_of(part: Tensor | None, joined: Sequence[Tensor]) -> Tensor | None:
    """The joined buffer that a buffer is a part of."""
    assert part is not None
    place = part.untyped_storage().data_ptr()
    return next((one for one in joined if one.untyped_storage().data_ptr() == place), None)


class _Cast(torch.autograd.Function):
    """Tensors in another type, and their gradients in their own, each by one operation."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(cast, list(tensors))
        return tuple(cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [(place, grad) for place, grad in enumerate(grads) if grad is not None]
        back: list[Tensor | None] = [None] * len(grads)
        cast = [torch.empty_like(grad, dtype=ctx.dtypes[place]) for place, grad in there]
        if cast:
            torch._foreach_copy_(cast, [grad for _, grad in there])
        for (place, _), one in zip(there, cast, strict=True):
            back[place] = one
        return None, *back
