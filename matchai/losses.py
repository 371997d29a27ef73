"""The loss to use alone: cross-entropy, Dice and focal from sums over the whole global batch."""

from matchai.model import SegmentationLoss, balanced_class_weights, soften

__all__ = ["SegmentationLoss", "balanced_class_weights", "soften"]
