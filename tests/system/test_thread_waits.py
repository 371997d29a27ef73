"""What is chosen before torch is loaded, and never over the user's choice."""

import os

import pytest

from matchai.system.errors import InputError
from matchai.system.thread_waits import SPIN_COUNT, choose_waiting, refuse_launch


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


def test_waiting_threads_spin_for_a_while_where_nobody_chose() -> None:
    choose_waiting()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_a_users_choice_of_waiting_stands(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    choose_waiting()
    chosen = {key: os.environ.get(key) for key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    assert chosen == {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None} | {name: value}


@pytest.mark.parametrize(("rank", "num_problems"), [("0", 1), ("1", 0)])
def test_one_of_several_processes_says_that_they_are_too_many(
    monkeypatch: pytest.MonkeyPatch, rank: str, num_problems: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(InputError) as raised:
        refuse_launch("python -m matchai.predict")
    assert len(raised.value.problems) == num_problems


def test_the_only_process_of_a_launcher_may_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_launch("python -m matchai.predict")


@pytest.mark.parametrize("name", ["ACCELERATE_LOG_LEVEL", "TORCH_DISTRIBUTED_DEBUG"])
def test_settings_by_which_a_library_would_not_load_are_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "info")
    choose_waiting()
    monkeypatch.setenv(name, "banana")
    with pytest.raises(InputError, match=f"{name} is banana, but must be one of .*: `unset {name}`"):
        choose_waiting()
