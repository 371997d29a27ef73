"""One process at a time in a folder."""

from pathlib import Path

import pytest

from matchai.system import files
from matchai.system.files import HostLocks, alone


def test_whoever_waits_for_a_folder_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    other = HostLocks(tmp_path, "folder.lock")
    assert other.take("work")
    told: list[None] = []

    def tell() -> None:
        told.append(None)
        other.drop("work")

    with alone(tmp_path, tell):
        assert len(told) == 1


def test_a_free_folder_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    told: list[None] = []
    with alone(tmp_path, lambda: told.append(None)):
        assert not told
