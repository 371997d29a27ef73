"""Several processes: launched right or refused, one lost, all stopped, and the same run whatever happens."""

import pytest

from matchai.errors import InputError
from matchai.processes import check_launch


@pytest.mark.parametrize(("world", "num_processes"), [(None, 1), ("", 1), ("1", 1), ("4", 4)])
def test_a_launch_that_joined_is_accepted(
    monkeypatch: pytest.MonkeyPatch, world: str | None, num_processes: int
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    check_launch(num_processes)


def test_processes_that_each_believe_to_be_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2"):
        check_launch(1)
