"""The loss equals the libraries' own, and its sums add up to the gradient of the whole batch."""

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from matchai.losses import SegmentationLoss, balanced_class_weights

CLASSES = 4
WEIGHTS = torch.tensor([1.7, 1.2, 0.8, 0.3])
KINDS = ("random", "class absent", "one class only", "all right and sure", "all wrong and sure", "huge")


def example(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, CLASSES, 8, 8, generator=generator, dtype=torch.float64) * 2
    target = torch.randint(0, CLASSES, (3, 8, 8), generator=generator)
    if kind == "class absent":
        target[target == 1] = 3
    if kind == "one class only":
        target[:] = 2
    if kind.endswith("sure"):
        sign = 1 if "right" in kind else -1
        logits = sign * 7.0 * (2 * nn.functional.one_hot(target, CLASSES).movedim(-1, 1).double() - 1)
    if kind == "huge":
        logits = logits * 1000
    return logits.to(dtype), target


def value_and_gradient(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value: Tensor = loss(leaf, target)
    torch.autograd.backward(value)
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def close(found: Tensor, expected: Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return bool(torch.isfinite(found).all()) and float((found - expected).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_cross_entropy_is_torchs(kind: str, dtype: torch.dtype) -> None:
    logits, target = example(kind, dtype)
    ours = SegmentationLoss(WEIGHTS, ce_weight=1, dice_weight=0, focal_weight=0)
    expected = value_and_gradient(nn.CrossEntropyLoss(weight=WEIGHTS.to(dtype)), logits, target)
    for found, other in zip(value_and_gradient(ours, logits, target), expected, strict=True):
        assert close(found, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dice_is_smps(kind: str, dtype: torch.dtype) -> None:
    logits, target = example(kind, dtype)
    ours = SegmentationLoss(WEIGHTS, ce_weight=0, dice_weight=1, focal_weight=0)
    expected = value_and_gradient(smp.losses.DiceLoss("multiclass"), logits, target)
    for found, other in zip(value_and_gradient(ours, logits, target), expected, strict=True):
        assert close(found, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.5])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_focal_is_smps(kind: str, gamma: float, dtype: torch.dtype) -> None:
    logits, target = example(kind, dtype)
    ours = SegmentationLoss(WEIGHTS, ce_weight=0, dice_weight=0, focal_weight=1, focal_gamma=gamma)
    expected = value_and_gradient(smp.losses.FocalLoss("multiclass", gamma=gamma), logits, target)
    for found, other in zip(value_and_gradient(ours, logits, target), expected, strict=True):
        assert close(found, other)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.5])
def test_focal_of_huge_logits_has_smps_value_and_a_finite_gradient(gamma: float) -> None:
    logits, target = example("huge", torch.float64)
    ours = SegmentationLoss(WEIGHTS, ce_weight=0, dice_weight=0, focal_weight=1, focal_gamma=gamma)
    value, gradient = value_and_gradient(ours, logits, target)
    assert close(value, smp.losses.FocalLoss("multiclass", gamma=gamma)(logits, target))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_loss_is_the_weighted_sum_of_its_terms(kind: str) -> None:
    logits, target = example(kind, torch.float64)
    shares = (0.3, 0.9, 0.6)
    ours = SegmentationLoss(WEIGHTS, ce_weight=shares[0], dice_weight=shares[1], focal_weight=shares[2])
    libraries = (
        nn.CrossEntropyLoss(weight=WEIGHTS.double()),
        smp.losses.DiceLoss("multiclass"),
        smp.losses.FocalLoss("multiclass", gamma=2.5),
    )
    parts = [value_and_gradient(loss, logits, target) for loss in libraries]
    value, gradient = value_and_gradient(ours, logits, target)
    assert close(value, torch.stack([s * v for s, (v, _) in zip(shares, parts, strict=True)]).sum())
    assert close(gradient, torch.stack([s * g for s, (_, g) in zip(shares, parts, strict=True)]).sum(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1), (0, 3)])
def test_sums_over_parts_give_value_and_gradient_of_the_whole_batch(kind: str, sizes: tuple[int, ...]) -> None:
    logits, target = example(kind, torch.float64)
    loss = SegmentationLoss(WEIGHTS)
    value, gradient = value_and_gradient(loss, logits, target)
    leaf = logits.clone().requires_grad_()
    parts = [
        loss.sums(*pair) for pair in zip(torch.split(leaf, list(sizes)), torch.split(target, list(sizes)), strict=True)
    ]
    total = torch.stack([part.detach() for part in parts]).sum(0)
    value_in_parts, slopes = loss.value_and_slopes(total)
    for part in parts:
        torch.autograd.backward((slopes * part).sum())
    assert leaf.grad is not None
    assert float((value_in_parts - value).abs()) <= 1e-12 * max(1.0, float(value.abs()))
    assert float((leaf.grad - gradient).abs().max()) <= 1e-12


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, target = example("random", torch.float32)
    half = logits.bfloat16()
    loss = SegmentationLoss(WEIGHTS)
    assert loss(half, target).dtype == torch.float32
    assert torch.equal(loss(half, target), loss(half.float(), target))


def test_value_and_slopes_carry_no_graph_even_without_gradients() -> None:
    logits, target = example("random", torch.float64)
    loss = SegmentationLoss(WEIGHTS)
    with torch.no_grad():
        value, slopes = loss.value_and_slopes(loss.sums(logits, target))
    assert not value.requires_grad
    assert not slopes.requires_grad


def test_balanced_class_weights_have_mean_1() -> None:
    weights = balanced_class_weights(torch.tensor([46, 23, 200, 731]))
    assert weights.dtype == torch.float32
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)


def test_balanced_class_weights_are_inverse_to_frequency() -> None:
    pixels = torch.tensor([46, 23, 200, 731])
    products = balanced_class_weights(pixels) * pixels
    assert torch.allclose(products, products[0].expand(4), rtol=1e-6)
