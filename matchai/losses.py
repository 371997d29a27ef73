"""The loss as sums and a function of them, so that any part of a batch can be computed anywhere.

The three terms equal `torch.nn.CrossEntropyLoss(weight=...)`, and `DiceLoss(mode="multiclass")` and
`FocalLoss(mode="multiclass")` of segmentation-models-pytorch. Those give a batch's value only; the loss of a batch
that lies on several processes or micro-batches is no mean of its parts' losses, but it is a function of their sums.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DICE_EPS = 1e-7  # smp's guard of the Dice denominator, which holds (|P| + |T|) / 2


class SegmentationLoss(nn.Module):
    """ce_weight · cross-entropy + dice_weight · Dice + focal_weight · focal.

    Called with a batch it returns the batch's loss, like any loss. For a batch in parts:

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
    ) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights)
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        self.focal_weight = focal_weight
        self.focal_gamma = focal_gamma

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
        """
        logits = logits.float() if logits.dtype != torch.float64 else logits
        num_classes = logits.shape[1]
        target = target.long().unsqueeze(1)
        is_target = target == torch.arange(num_classes, device=logits.device).view(1, -1, 1, 1)
        log_probs = F.log_softmax(logits, dim=1)
        probs = log_probs.exp()
        pixel_weights = self.class_weights.to(logits.dtype)[target]
        # σ(z) is the probability that the one-vs-rest answer is wrong; the power by exp and log keeps the gradient
        # finite where it underflows
        z = torch.where(is_target, -logits, logits)
        wrong = F.softplus(z)
        focal = torch.exp(self.focal_gamma * (z - wrong)) * wrong
        scalars = torch.stack(
            (
                -(log_probs.gather(1, target) * pixel_weights).sum(),
                pixel_weights.sum(),
                focal.sum(),
                torch.full((), float(logits.numel()), dtype=logits.dtype, device=logits.device),
            )
        )
        overlap = (probs * is_target).sum((0, 2, 3))
        return torch.cat((scalars, overlap, probs.sum((0, 2, 3)), is_target.sum((0, 2, 3)).to(logits.dtype)))

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


def balanced_class_weights(pixels: Tensor) -> Tensor:
    """Inverse class frequencies, scaled to mean 1 over the classes.

    Args:
        pixels: (C,) number of pixels of each class in the training slices, all above 0.

    Returns:
        (C,) float32.
    """
    inverse = 1.0 / pixels.double()
    return (inverse / inverse.mean()).float()
