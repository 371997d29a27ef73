"""An exponential moving average of a model's weights, in one operation a step that waits for no device."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matchai.model import join_buffers


class AveragedWeights:
    """Averages weights and floating-point buffers as ema = decay · ema + (1 - decay) · model; other buffers are copied.

    torch's `AveragedModel` gives the same weights, by two waits for a GPU and hundreds of small operations a step.

    Args:
        model: The model, not wrapped; its first update is a copy.
        decay: Share that the average keeps at an update, 0 to 1.

    Attributes:
        module: The averaged model.
        buffers: Its buffers, joined.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> ema = AveragedWeights(model, decay=0.75)
    >>> for value in (1.0, 2.0):
    ...     model.weight.data.fill_(value)
    ...     ema.update(model, [])
    tensor([[1.]])
    tensor([[2.]])
    >>> ema.module.weight.item()
    1.25
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self.decay, self.num_updates = decay, 0
        self.buffers = join_buffers(self.module)
        self._parameters = [*self.module.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, joined_buffers: Sequence[Tensor]) -> None:
        """Takes a step's weights in.

        Args:
            model: The model, not wrapped.
            joined_buffers: Its buffers, joined by `matchai.model.join_buffers`.
        """
        own = [*self._parameters, *(one for one in self.buffers if one.is_floating_point())]
        new = [*model.parameters(), *(one for one in joined_buffers if one.is_floating_point())]
        if self.num_updates:
            torch._foreach_lerp_(own, new, 1 - self.decay)
        else:
            torch._foreach_copy_(own, new)
        for kept, value in zip(self.buffers, joined_buffers, strict=True):
            if not kept.is_floating_point():
                kept.copy_(value)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Under the names of torch's `AveragedModel`, by which earlier versions stored it."""
        weights = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        return {"n_averaged": torch.tensor(self.num_updates), **weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts a stored state back."""
        self.num_updates = int(state["n_averaged"])
        prefix = "module."
        weights = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
        self.module.load_state_dict(weights)
