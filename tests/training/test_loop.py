"""One step of the loop: the whole batch's gradient from its parts, and what is not finite is skipped."""

import copy
from pathlib import Path

import pytest
import torch

from matchai.data.dataset import Data
from matchai.training.loop import MAX_SKIPPED, DivergedError, count_step, train_epoch, train_step, validate
from matchai.training.meters import EpochMeter
from tests.steps import NormedNet, TinyNet, first_batch, model_of, read_small, step, training_of


@pytest.fixture(scope="module")
def data(phantom: Path, cache: Path) -> Data:
    return read_small(phantom, cache)


@pytest.mark.parametrize("accumulate", [2, 3, 4, 6])
def test_micro_batches_give_the_loss_and_gradient_of_the_whole_batch(accumulate: int, data: Data) -> None:
    whole = step(model_of("tiny"), data)
    in_parts = step(model_of("tiny"), data, accumulate=accumulate)
    assert in_parts["loss"] == pytest.approx(whole["loss"], rel=1e-12)
    for name, value in whole["moments"].items():
        torch.testing.assert_close(in_parts["moments"][name], value, rtol=1e-9, atol=1e-14)


def test_neither_steps_nor_learning_rates_depend_on_the_micro_batches(data: Data) -> None:
    paths = []
    for accumulate in (1, 4):
        training, meter = training_of(TinyNet(), data, accumulate=accumulate), EpochMeter()
        rates: list[float] = []

        def note(is_stopping: bool, meter: EpochMeter = meter, rates: list[float] = rates) -> None:
            rates.append(meter.lr)

        train_epoch(training, 1, meter, note)
        paths.append(rates)
    assert paths[0] == paths[1]
    assert len(paths[0]) == 4


def test_a_non_finite_step_changes_neither_weights_nor_statistics(data: Data) -> None:
    torch.manual_seed(0)
    training = training_of(NormedNet(), data)
    before = copy.deepcopy(training.raw_model.state_dict())
    images, target, positions = first_batch(training)
    images[2, 0, 3, 3] = float("nan")
    assert not train_step(training, 1, 6, images, target, positions).read()[1]
    for name, value in training.raw_model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_validation_is_judged_by_the_labels_as_they_are(data: Data) -> None:
    model = model_of("tiny").float()
    plain, soft = (
        validate(training_of(copy.deepcopy(model), data, soft_boundary=width), len(data.val), 4, lambda _: None)[0]
        for width in (0, 5)
    )
    assert plain == soft
    assert step(model, data, soft_boundary=5)["loss"] != step(model, data)["loss"]


def test_an_epoch_ends_with_the_losses_of_all_its_steps(data: Data) -> None:
    training, meter = training_of(TinyNet(), data), EpochMeter()
    seen: list[int] = []
    train_epoch(training, 1, meter, lambda is_stopping: seen.append(meter.num_draws))
    assert seen[0] == 0  # the loss of a step is read when the next is under way
    assert meter.num_draws == meter.consumed == training.sampler.num_samples


def test_a_step_is_counted_once(data: Data) -> None:
    training, meter = training_of(TinyNet(), data), EpochMeter()
    images, target, positions = first_batch(training)
    outcome = train_step(training, 1, 6, images, target, positions)
    for _ in range(2):
        count_step(training, meter, outcome)
    assert meter.num_draws == 6
    assert meter.loss_sum == pytest.approx(6 * outcome.read()[0])


def test_a_fused_optimiser_told_of_a_non_finite_step_changes_nothing(data: Data) -> None:
    training = training_of(TinyNet(), data)
    images, target, positions = first_batch(training)
    train_step(training, 1, 6, images, target, positions)
    before = copy.deepcopy(training.raw_model.state_dict())
    moments = copy.deepcopy(training.optimizer.state_dict()["state"])
    for parameter in training.parameters:
        parameter.grad = torch.full_like(parameter, torch.nan)
    training.optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]  # as a step on a GPU does
    training.optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in training.raw_model.state_dict().items())
    for number, state in training.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[number][name]) for name, value in state.items())


def test_skipped_steps_are_counted_and_end_the_run_after_ten_in_a_row(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_of(TinyNet(), data, batch_size=1)
    monkeypatch.setattr(training.loss, "sums", lambda logits, target: logits.sum() * torch.full((16,), torch.nan))
    meter = EpochMeter()
    with pytest.raises(DivergedError, match="max-lr"):
        train_epoch(training, 1, meter, lambda is_stopping: None)
    assert meter.skipped == MAX_SKIPPED


def test_the_gradient_norm_is_clipped_where_asked(data: Data) -> None:
    free = step(model_of("tiny"), data)["moments"]
    clipped = step(model_of("tiny"), data, clip_grad_norm=1e-3)["moments"]
    # AdamW's first moment after one step is 1 - β1 of the gradient, and the one-cycle schedule starts with β1 = 0.95
    norm = torch.stack([value.norm() for value in clipped.values()]).norm()
    assert norm.item() == pytest.approx(0.05 * 1e-3, rel=1e-3)
    assert torch.stack([value.norm() for value in free.values()]).norm() > norm


def test_validation_does_not_depend_on_the_batch_size(data: Data) -> None:
    torch.manual_seed(0)
    model = TinyNet()
    losses, counts = [], []
    for batch_size in (1, 4, 6):
        training = training_of(copy.deepcopy(model), data, batch_size=batch_size)
        loss, confusions = validate(training, len(data.val), 4, lambda is_stopping: None)
        losses.append(loss)
        counts.append(confusions)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert (counts[0].sum((1, 2)) == 64 * 64).all()
    # the network's kernels may differ with the batch: at most 1 pixel in 10^5
    assert max(abs(other - counts[0]).sum() for other in counts[1:]) <= 2 * counts[0].sum() * 1e-5


def test_the_moving_average_follows_the_weights_and_is_what_is_validated(data: Data) -> None:
    training = training_of(TinyNet(), data, ema_decay=0.5)
    images, target, positions = first_batch(training)
    for _ in range(3):
        train_step(training, 1, 6, images, target, positions)
    assert training.ema is not None
    assert training.validated_model is training.ema.module
    own = dict(training.raw_model.named_parameters())
    assert any(not torch.equal(value, own[name]) for name, value in training.ema.module.named_parameters())
