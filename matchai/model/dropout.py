"""Dropout and drop path whose masks are a pure function of (seed, epoch, position, layer), slice by slice."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from matchai.system import seed_sequence

_STREAM = 0xD209  # keeps these random numbers apart from the sampler's and the augmentation's


class KeyedDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) whose mask is given from outside, slice by slice.

    Attributes:
        factors: (B,) what each slice of the batch to come is multiplied by: 0, or 1 / the chance of keeping the path.
            Set by `set_dropout`.

    Raises:
        RuntimeError: When called in training on another number of slices than `set_dropout` was told of.

    >>> layer = KeyedDropPath(drop_prob=0.5)
    >>> set_dropout([layer], seed=7, epoch=1, positions=[40, 43])
    >>> layer(torch.ones(2, 3)).tolist()
    [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.keep_prob = 1.0 - drop_prob
        self.factors = torch.zeros(0)  # no buffer: they are neither saved nor averaged

    def forward(self, x: Tensor) -> Tensor:
        """Keeps or zeroes each slice's path, and scales what is kept by 1 / its chance; x (B, ...)."""
        if not self.training:
            return x
        return x * self._spread(x)

    def add(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """What `forward` gives, plus the way around the path, in one operation."""
        return torch.addcmul(shortcut, x, self._spread(x)) if self.training else x + shortcut

    def _spread(self, x: Tensor) -> Tensor:
        if len(self.factors) != len(x):
            raise RuntimeError(f"drop path has numbers for {len(self.factors)} slices of {len(x)}; call set_dropout.")
        return self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class KeyedDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) that draws each slice's mask from a generator of the slice's own.

    Attributes:
        seeds: A seed for every slice of the batch to come, set by `set_dropout`.

    Raises:
        RuntimeError: When called in training on slices that `set_dropout` was not told of.

    >>> layer, x = KeyedDropout(drop_prob=0.5, of_channels=False), torch.ones(2, 100)
    >>> set_dropout([layer], seed=7, epoch=1, positions=[40, 41])
    >>> first = layer(x)
    >>> set_dropout([layer], seed=7, epoch=1, positions=[41])
    >>> first.unique().tolist(), torch.equal(layer(x[1:]), first[1:])
    ([0.0, 2.0], True)
    """

    def __init__(self, drop_prob: float, *, of_channels: bool) -> None:
        """Makes one that drops whole channels, or single values."""
        super().__init__()
        self.keep_prob = 1.0 - drop_prob
        self.of_channels = of_channels
        self.seeds: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """Keeps or zeroes, and scales what is kept by 1 / its chance; x (B, ...), or (B · K, ...) such as windows."""
        if not self.training or not len(x):
            return x
        each, rest = divmod(len(x), len(self.seeds)) if self.seeds else (0, 1)
        if rest:
            raise RuntimeError(f"dropout has seeds for {len(self.seeds)} slices of {len(x)}; call set_dropout.")
        shape = (each, x.shape[1], *[1] * (x.ndim - 2)) if self.of_channels else (each, *x.shape[1:])
        generators = [torch.Generator(x.device).manual_seed(seed) for seed in self.seeds]
        uniforms = [torch.rand(shape, generator=generator, device=x.device) for generator in generators]
        return x * ((torch.cat(uniforms) < self.keep_prob).to(x.dtype) / self.keep_prob)


def key_dropout(model: nn.Module) -> None:
    """Replaces every dropout and drop path in a model by a keyed one; those of chance 0 stay.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    >>> key_dropout(model)
    >>> model[1], keyed_layers(model) == [model[1]]
    (KeyedDropout(), True)
    """
    from timm.layers import DropPath  # noqa: PLC0415 dies where torchvision does not fit, which matchai.model.unetplusplus tells

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath) and child.drop_prob:
                setattr(module, name, KeyedDropPath(child.drop_prob))
            elif isinstance(child, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d) and child.p:
                setattr(module, name, KeyedDropout(child.p, of_channels=not isinstance(child, nn.Dropout)))


KeyedLayer = KeyedDropPath | KeyedDropout


def keyed_layers(model: nn.Module) -> list[KeyedLayer]:
    """The keyed layers of a model that `key_dropout` has changed, possibly wrapped."""
    return [module for module in model.modules() if isinstance(module, KeyedLayer)]


def set_dropout(
    layers: Sequence[KeyedLayer],
    seed: int,
    epoch: int,
    positions: list[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Tells keyed layers which slices come next.

    Args:
        layers: All of a model's `keyed_layers`.
        seed: Seed of the run.
        epoch: The epoch.
        positions: (B,) places of the batch's draws in the epoch; B may be 0.
        device: Where the model runs.
        dtype: In which it computes most maps; others cost an operation a layer.
    """
    if not layers:
        return
    paths = [layer for layer in layers if isinstance(layer, KeyedDropPath)]
    drops = [layer for layer in layers if isinstance(layer, KeyedDropout)]
    keyed = [np.random.default_rng(seed_sequence(_STREAM, seed, epoch, position)) for position in positions]
    numbers = np.array([generator.random(len(paths)) for generator in keyed], dtype=np.float32)
    keep = np.array([path.keep_prob for path in paths], dtype=np.float32)
    # made on the host for all layers at once, and copied once
    is_kept = keep[:, None] > numbers.reshape(len(positions), len(paths)).T
    factors = torch.from_numpy(is_kept / keep[:, None]).to(dtype)
    if torch.device(device).type == "cuda":
        factors = factors.pin_memory()  # else the copy would wait
    for path, row in zip(paths, factors.to(device, non_blocking=True), strict=True):
        path.factors = row
    seeds = [generator.integers(2**63, size=len(drops)).tolist() for generator in keyed]
    for number, drop in enumerate(drops):
        drop.seeds = [one[number] for one in seeds]
