"""The loss equals the libraries' own, and its sums add up to the gradient of the whole batch."""

import itertools

import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from matchai.model.losses import SegmentationLoss, balanced_class_weights, soften

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
    # as a model on a CPU gives them
    return logits.to(dtype).contiguous(memory_format=torch.channels_last), target


def value_and_gradient(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value: Tensor = loss(leaf, target)
    torch.autograd.backward(value)
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def close(found: Tensor, expected: Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return bool(torch.isfinite(found).all()) and float((found - expected).abs().max()) <= 1e-5 * scale


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_cross_entropy_is_torchs(kind: str, dtype: torch.dtype) -> None:
    logits, target = example(kind, dtype)
    ours = SegmentationLoss(WEIGHTS, ce_weight=1, dice_weight=0, focal_weight=0)
    expected = value_and_gradient(nn.CrossEntropyLoss(weight=WEIGHTS.to(dtype)), logits, target)
    for found, other in zip(value_and_gradient(ours, logits, target), expected, strict=True):
        assert close(found, other)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dice_is_smps(kind: str, dtype: torch.dtype) -> None:
    logits, target = example(kind, dtype)
    ours = SegmentationLoss(WEIGHTS, ce_weight=0, dice_weight=1, focal_weight=0)
    expected = value_and_gradient(smp.losses.DiceLoss("multiclass"), logits, target)
    for found, other in zip(value_and_gradient(ours, logits, target), expected, strict=True):
        assert close(found, other)


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, target = example("random", torch.float32)
    half = logits.bfloat16()
    loss = SegmentationLoss(WEIGHTS)
    assert loss(half, target).dtype == torch.float32
    assert torch.equal(loss(half, target), loss(half.float(), target))


@pytest.mark.parametrize("shape", [(2, 8, 7), (2, 8, 9), (1, 8, 8), (3, 8, 8), (2, 4, 16)])
def test_a_target_of_another_shape_than_the_logits_is_refused(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(2, CLASSES, 8, 8).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="the target is"):
        SegmentationLoss(WEIGHTS)(logits, torch.zeros(shape, dtype=torch.long))


def test_fewer_class_weights_than_classes_are_refused() -> None:
    logits = torch.zeros(2, CLASSES, 8, 8).contiguous(memory_format=torch.channels_last)
    with pytest.raises(IndexError):
        SegmentationLoss(WEIGHTS[:3])(logits, torch.full((2, 8, 8), 3))


def test_class_weights_may_lie_apart_in_memory() -> None:
    logits, target = example("random", torch.float32)
    logits = logits.contiguous(memory_format=torch.channels_last)
    apart = torch.stack((WEIGHTS, torch.full_like(WEIGHTS, 9)), 1)[:, 0]
    assert not apart.is_contiguous()
    torch.testing.assert_close(SegmentationLoss(apart)(logits, target), SegmentationLoss(WEIGHTS)(logits, target))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("sizes", [(3,), (1, 2), (0, 3)])
def test_sums_over_float32_parts_make_value_and_gradient_of_the_whole_batch_in_float64(sizes: tuple[int, ...]) -> None:
    logits, target = example("random", torch.float64)
    loss = SegmentationLoss(WEIGHTS)
    value, gradient = value_and_gradient(loss, logits, target)
    leaf = logits.float().requires_grad_()
    pairs = zip(torch.split(leaf, list(sizes)), torch.split(target, list(sizes)), strict=True)
    parts = [loss.sums(*pair) for pair in pairs]
    found, slopes = loss.value_and_slopes(torch.stack([part.detach() for part in parts]).sum(0))
    for part in parts:
        torch.autograd.backward((slopes * part).sum())
    assert leaf.grad is not None
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_weights_may_be_one_number_for_all_classes(dtype: torch.dtype) -> None:
    logits, target = example("random", dtype)
    loss = SegmentationLoss(torch.ones(1).expand(CLASSES), ce_weight=1, dice_weight=0, focal_weight=0)
    for memory in (torch.channels_last, torch.contiguous_format):
        found = loss(logits.contiguous(memory_format=memory), target)
        assert close(found, nn.functional.cross_entropy(logits, target))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("wrong", [-1, CLASSES])
def test_a_target_that_is_no_class_is_refused(wrong: int) -> None:
    logits, target = example("random", torch.float32)
    target[1, 2, 3] = wrong
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|is -1 or|or 4, but"):
        SegmentationLoss(WEIGHTS).sums(logits, target)


@pytest.mark.usefixtures("way")
def test_a_target_of_another_size_is_refused() -> None:
    logits, target = example("random", torch.float32)
    for other in (target[:, :7], target.repeat(1, 2, 1)):
        with pytest.raises((ValueError, RuntimeError)):
            SegmentationLoss(WEIGHTS).sums(logits, other)


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


def square_means(target: Tensor, width: int) -> Tensor:
    """The shares of the classes in the square around every pixel, one pixel after another."""
    shares = torch.zeros(len(target), CLASSES, *target.shape[1:], dtype=torch.float64)
    for image, row, column in itertools.product(*map(range, target.shape)):
        rows = slice(max(0, row - width), row + width + 1)
        columns = slice(max(0, column - width), column + width + 1)
        counts = torch.bincount(target[image, rows, columns].flatten(), minlength=CLASSES).double()
        shares[image, :, row, column] = counts / counts.sum()
    return shares


def soft_reference(logits: Tensor, shares: Tensor, terms: tuple[float, float, float]) -> Tensor:
    """The loss by its definition, from shares of the classes."""
    log_probs, weights = logits.log_softmax(1), WEIGHTS.double().view(1, -1, 1, 1)
    cross_entropy = -(weights * shares * log_probs).sum() / (weights * shares).sum()
    probs, dims = log_probs.exp(), (0, 2, 3)
    dice = 1 - 2 * (probs * shares).sum(dims) / (probs.sum(dims) + shares.sum(dims))
    right, wrong = logits.sigmoid(), (-logits).sigmoid()
    focal = -shares * wrong**2.5 * right.log() - (1 - shares) * right**2.5 * wrong.log()
    is_shown = shares.sum(dims) > 0
    return terms[0] * cross_entropy + terms[1] * (dice * is_shown).mean() + terms[2] * focal.mean()


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    width=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=30)
def test_soft_shares_are_the_means_of_the_square_around_a_pixel(
    shape: tuple[int, int, int], width: int, seed: int
) -> None:
    target = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(seed))
    found = soften(target, CLASSES, width)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), square_means(target, width), rtol=0, atol=1e-6)
    torch.testing.assert_close(soften(target, CLASSES, width, torch.float64), square_means(target, width))


def test_across_a_straight_border_the_share_falls_in_equal_steps_and_farther_pixels_stay_as_they_are() -> None:
    target = torch.zeros(1, 8, 20, dtype=torch.int64)
    target[:, :, 10:] = 2
    shares = soften(target, CLASSES, 2, torch.float64)[0, 0, 4]
    assert shares.tolist() == pytest.approx([1] * 8 + [0.8, 0.6, 0.4, 0.2] + [0] * 8, abs=1e-12)
    is_far = torch.ones(20, dtype=torch.bool)
    is_far[8:12] = False
    assert set(soften(target, CLASSES, 2)[..., is_far].flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("terms", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.25, 0.5, 0.25)])
@pytest.mark.parametrize("kind", ["random", "class absent", "one class only", "all right and sure"])
def test_the_soft_loss_is_that_of_its_definition(kind: str, terms: tuple[float, float, float]) -> None:
    logits, target = example(kind, torch.float64)
    names = ("ce_weight", "dice_weight", "focal_weight")
    loss = SegmentationLoss(WEIGHTS, **dict(zip(names, terms, strict=True)), soft_boundary=2)
    leaf = logits.clone().requires_grad_()
    expected = soft_reference(leaf, square_means(target, 2), terms)
    torch.autograd.backward(expected)
    assert leaf.grad is not None
    value, gradient = value_and_gradient(loss, logits, target)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-7, atol=1e-12)
    in_float32, _ = value_and_gradient(loss, logits.float(), target)
    assert float(in_float32) == pytest.approx(float(value), rel=1e-5)


def test_the_soft_cross_entropy_is_torchs_with_probabilities() -> None:
    logits, target = example("random", torch.float64)
    loss = SegmentationLoss(torch.ones(CLASSES), ce_weight=1, dice_weight=0, focal_weight=0, soft_boundary=3)
    expected = nn.functional.cross_entropy(logits, soften(target, CLASSES, 3, torch.float64))
    assert float(loss(logits, target)) == pytest.approx(float(expected), rel=1e-12)


def test_the_gradient_of_the_soft_loss_is_its_derivative() -> None:
    logits, target = example("random", torch.float64)
    loss = SegmentationLoss(WEIGHTS.double(), soft_boundary=1)
    part = logits[:1, :, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: loss(values, target[:1, :4, :4]), (part,))


@given(cuts=st.lists(st.integers(0, 3), max_size=3), width=st.integers(0, 4), kind=st.sampled_from(KINDS))
@settings(deadline=None, max_examples=30)
def test_the_sums_add_up_over_the_slices_of_a_batch(cuts: list[int], width: int, kind: str) -> None:
    logits, target = example(kind, torch.float64)
    loss = SegmentationLoss(WEIGHTS.double(), soft_boundary=width)
    bounds = [0, *sorted(cuts), 3]
    parts = [loss.sums(logits[a:b], target[a:b]) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(torch.stack(parts).sum(0), loss.sums(logits, target), rtol=1e-12, atol=1e-12)
