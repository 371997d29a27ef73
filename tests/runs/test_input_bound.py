"""The advice to a run that waits for its data."""

import pytest

from matchai.runs import input_bound
from matchai.runs.input_bound import InputBoundMonitor, loading_advice


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_bound, "num_cores", lambda: 8)


def test_up_to_a_twentieth_of_waiting_needs_no_advice() -> None:
    assert loading_advice(0.05, 0, 1) is None


@pytest.mark.parametrize(
    ("share", "num_workers", "processes", "expected"),
    [
        (0.06, 0, 1, 1),
        (0.75, 0, 1, 3),  # loading takes three times as long as the rest of the step
        (0.5, 2, 1, 4),
        (0.06, 2, 1, 3),
        (0.9, 2, 1, 7),
        (1.0, 0, 1, 7),
        (0.9, 0, 4, 1),
    ],
)
def test_the_advice_names_the_workers_that_keep_up_within_the_free_cores(
    share: float, num_workers: int, processes: int, expected: int
) -> None:
    assert f"--num-workers {expected} " in str(loading_advice(share, num_workers, processes))


@pytest.mark.parametrize(("num_workers", "processes"), [(7, 1), (1, 4), (0, 8)])
def test_without_a_free_core_no_more_workers_are_advised(num_workers: int, processes: int) -> None:
    advice = str(loading_advice(0.2, num_workers, processes))
    assert "no core is free" in advice
    assert "--num-workers" not in advice


def test_a_run_is_advised_once() -> None:
    run = InputBoundMonitor(0, 1)
    run.after_step(1.0, 0.5)
    assert run.after_epoch(2.0, 1.0)
    assert run.after_epoch(2.0, 1.0) is None


def test_the_first_step_of_all_may_wait() -> None:
    run = InputBoundMonitor(0, 1)
    run.after_step(1.0, 0.9)
    run.after_step(2.0, 0.9)
    assert run.after_epoch(10.0, 0.9) is None


def test_the_first_steps_of_later_epochs_count() -> None:
    run = InputBoundMonitor(0, 1)
    run.after_step(1.0, 0.0)
    run.after_epoch(10.0, 0.0)
    run.after_step(1.0, 0.9)
    assert run.after_epoch(10.0, 0.9)
