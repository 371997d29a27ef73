"""The loss as sums and a function of them, so that any part of a batch can be computed anywhere.

The three terms equal `torch.nn.CrossEntropyLoss(weight=...)`, and `DiceLoss(mode="multiclass")` and
`FocalLoss(mode="multiclass")` of segmentation-models-pytorch. Those give a batch's value only; the loss of a batch
that lies on several processes or micro-batches is no mean of its parts' losses, but it is a function of their sums.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from matchai.native import library

DICE_EPS = 1e-7  # smp's guard of the Dice denominator, which holds (|P| + |T|) / 2


class SegmentationLoss(nn.Module):
    """ce_weight · cross-entropy + dice_weight · Dice + focal_weight · focal.

    Called with a batch it returns the batch's loss, like any loss. For a batch in parts::

        parts = [loss.sums(logits, target) for logits, target in batch]
        total = sum(part.detach() for part in parts)         # and over the processes
        value, slopes = loss.value_and_slopes(total)
        for part in parts:
            (slopes * part).sum().backward()                 # adds up to the gradient of the whole batch's loss

    which is the chain rule: with S = Σ S_k, the gradient of f(S) is f'(S) · Σ ∇S_k.

    Args:
        class_weights: (C,) weights of the cross-entropy.
        ce_weight: Share of the class-weighted cross-entropy, Σ w_t · -log p_t / Σ w_t over pixels.
        dice_weight: Share of the Dice loss, the mean over classes of 1 - 2 |P ∩ T| / (|P| + |T|), where a class
            that no pixel of the batch carries counts 0.
        focal_weight: Share of the focal loss (Lin et al. 2017), one class against the rest by sigmoid, the mean over
            classes and pixels of (1 - p)^γ · -log p.
        focal_gamma: Its exponent γ.
        soft_boundary: Pixels over which the target is softened, see `soften`; with shares q of the classes in place of
            their pixels the terms are Σ w q · -log p / Σ w q, the overlap Σ p q with sizes Σ p and Σ q, and
            q (1 - s)^γ · -log s + (1 - q) s^γ · -log (1 - s).

    >>> loss = SegmentationLoss(class_weights=torch.ones(4))
    >>> logits, target = torch.zeros(2, 4, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    >>> loss(logits, target)
    tensor(0.4522)
    >>> loss.value(loss.sums(logits[:1], target[:1]) + loss.sums(logits[1:], target[1:]))
    tensor(0.4522)
    """

    class_weights: Tensor

    def __init__(
        self,
        class_weights: Tensor,
        *,
        ce_weight: float = 0.25,
        dice_weight: float = 0.5,
        focal_weight: float = 0.25,
        focal_gamma: float = 2.5,
        soft_boundary: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights)
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        self.focal_weight = focal_weight
        self.focal_gamma = focal_gamma
        self.soft_boundary = soft_boundary

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a whole batch: logits (B, C, H, W) of any float type, target (B, H, W) integer; a scalar."""
        return self.value(self.sums(logits, target))

    def sums(self, logits: Tensor, target: Tensor) -> Tensor:
        """What the loss needs to know of some pixels, additive over pixels.

        Args:
            logits: (B, C, H, W); half precision is computed in float32.
            target: (B, H, W) integer class indices.

        Returns:
            (4 + 3 C,): cross-entropy's numerator and denominator, the focal sum, the number of pixels times C, then
            for every class the overlap Σ p·t, the sum of probabilities Σ p and the pixels Σ t.

        Raises:
            ValueError: If logits and target are not of one shape.
        """
        if target.shape != (len(logits), *logits.shape[2:]):
            raise ValueError(f"the target is {tuple(target.shape)}, but the logits are {tuple(logits.shape)}.")
        kernels = library.load()[0] if not self.soft_boundary and self._fit(logits, target) else None
        if kernels is not None:
            target, class_weights = target.long().contiguous(), self.class_weights.float().contiguous()
            sums: Tensor = _Sums.apply(logits, target, class_weights, self.focal_gamma, kernels)
            return sums
        logits = logits.float() if logits.dtype != torch.float64 else logits
        num_classes = logits.shape[1]
        target, class_weights = target.long().unsqueeze(1), self.class_weights.to(logits.dtype)
        log_probs = F.log_softmax(logits, dim=1)
        probs = log_probs.exp()
        if self.soft_boundary:
            shares = soften(target.squeeze(1), num_classes, self.soft_boundary, logits.dtype)
            weighted = shares * class_weights.view(1, -1, 1, 1)
            cross_entropy, ce_weights = (log_probs * weighted).sum(), weighted.sum()
            focal = shares * self._focal(-logits) + (1 - shares) * self._focal(logits)
        else:
            shares = _one_hot(target, num_classes)
            pixel_weights = class_weights[target]
            cross_entropy, ce_weights = (log_probs.gather(1, target) * pixel_weights).sum(), pixel_weights.sum()
            focal = self._focal(logits * torch.where(shares, -1.0, 1.0).to(logits.dtype))
        num_values = torch.full((), float(logits.numel()), dtype=logits.dtype, device=logits.device)
        scalars = torch.stack((-cross_entropy, ce_weights, focal.sum(), num_values))
        if self.soft_boundary:
            overlap, predicted = (probs * shares).sum((0, 2, 3)), probs.sum((0, 2, 3))
        else:
            overlap, predicted = _Sizes.apply(probs, shares)
        return torch.cat((scalars, overlap, predicted, shares.sum((0, 2, 3)).to(logits.dtype)))

    def _fit(self, logits: Tensor, target: Tensor) -> bool:
        """Whether these are what the kernels take on trust."""
        return (
            library.is_map(logits)
            and self.class_weights.shape == logits.shape[1:2]
            and target.device == self.class_weights.device == logits.device
        )

    def _focal(self, z: Tensor) -> Tensor:
        """The focal loss of one-vs-rest answers that are wrong with the probability σ(z), of the shape of z."""
        wrong = F.softplus(z)
        # the power by exp and log keeps the gradient finite where it underflows
        return torch.exp(self.focal_gamma * (z - wrong)) * wrong

    def value(self, sums: Tensor) -> Tensor:
        """The loss, a scalar, from the sums of all pixels, (4 + 3 C,)."""
        return self.value_and_slopes(sums)[0]

    def value_and_slopes(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all pixels, and its derivative by each of their sums, 0 for those that hang on no logit."""
        ce_sum, ce_weights, focal_sum, num_values = sums[:4]
        overlap, predicted, present = sums[4:].view(3, -1)
        size = ((predicted + present) / 2).clamp_min(DICE_EPS)
        dice = overlap / size
        counted = (present > 0).to(sums.dtype) / len(present)  # each class's share in the mean
        cross_entropy, dice_loss, focal = ce_sum / ce_weights, (counted * (1 - dice)).sum(), focal_sum / num_values
        value: Tensor = self.ce_weight * cross_entropy + self.dice_weight * dice_loss + self.focal_weight * focal
        # by hand, as autograd takes five times as long for these few numbers: 0.24 ms a step
        with torch.no_grad():
            zero = torch.zeros_like(ce_sum)
            scalars = torch.stack((self.ce_weight / ce_weights, zero, self.focal_weight / num_values, zero))
            by_overlap = -self.dice_weight * counted / size
            slopes = torch.cat((scalars, by_overlap, by_overlap * dice * -0.5, torch.zeros_like(present)))
        return value, slopes


class _Sizes(torch.autograd.Function):
    """The overlap Σ p·t and the size Σ p of every class, whose gradient by p is one of two numbers a class."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(shares)
        return (probs * shares).sum((0, 2, 3)), probs.sum((0, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        by_overlap, by_size = (grad.view(1, -1, 1, 1) for grad in grads)
        return torch.where(ctx.saved_tensors[0], by_overlap + by_size, by_size), None


class _Sums(torch.autograd.Function):
    """The sums of some pixels by compiled kernels, one for the sums and one for their gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, class_weights: Tensor, gamma: float, kernels: library.Kernels
    ) -> Tensor:
        ctx.save_for_backward(logits, target, class_weights)
        ctx.gamma, ctx.kernels = gamma, kernels
        return kernels.loss_sums(logits, target, class_weights, gamma).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slopes = grads[0].float().contiguous()
        return ctx.kernels.loss_gradient(*ctx.saved_tensors, ctx.gamma, slopes), None, None, None, None


def _one_hot(target: Tensor, num_classes: int) -> Tensor:
    """(B, C, H, W) bool of a target (B, 1, H, W)."""
    return target == torch.arange(num_classes, device=target.device).view(1, -1, 1, 1)


def soften(target: Tensor, num_classes: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Shares of the classes in place of a class index, for labels whose borders are not known to the pixel.

    The shares of a pixel are those of the labels in the square of 2 · width + 1 pixels around it, as far as it lies in
    the slice. So they fall from 1 to 0 in equal steps across a straight border, and are 0 or 1 for pixels that lie
    farther than `width` from any other class.

    Args:
        target: (B, H, W) integer class indices.
        num_classes: C.
        width: Pixels on each side.
        dtype: Of the shares.

    Returns:
        (B, C, H, W), adding up to 1 over the classes.

    >>> soften(torch.tensor([[[0, 0, 0, 1]]]), num_classes=2, width=1)[0, :, 0]
    tensor([[1.0000, 1.0000, 0.6667, 0.5000],
            [0.0000, 0.0000, 0.3333, 0.5000]])
    """
    shares = _one_hot(target.unsqueeze(1), num_classes).to(dtype)
    size = 2 * width + 1
    # means of a row's and then a column's pixels inside the slice: together those of the square
    for window in ((1, size), (size, 1)):
        padding = (window[0] // 2, window[1] // 2)
        shares = F.avg_pool2d(shares, window, 1, padding, count_include_pad=False)
    return shares


def balanced_class_weights(pixels: Tensor) -> Tensor:
    """Inverse class frequencies, scaled to mean 1 over the classes.

    Args:
        pixels: (C,) number of pixels of each class in the training slices, all above 0.

    Returns:
        (C,) float32.

    >>> balanced_class_weights(torch.tensor([100, 300]))
    tensor([1.5000, 0.5000])
    """
    inverse = 1.0 / pixels.double()
    return (inverse / inverse.mean()).float()
