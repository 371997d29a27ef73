"""Folders are listed without a silent gap, names are fit for files, and one process at a time works in a folder."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matchai.system import files
from matchai.system.errors import InputError
from matchai.system.files import (
    HostLocks,
    alone,
    file_name,
    format_size,
    is_there,
    list_folder,
    walk_files,
    write_whole,
)
from tests.conftest import unprivileged


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


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_files_and_folders_are_listed_by_name_without_what_no_user_made(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).touch()
    for name in ("d", "c", "__MACOSX", "@eaDir", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "e").symlink_to(tmp_path / "d")
    (tmp_path / "f").symlink_to(tmp_path / "a")
    listed, folders = list_folder(tmp_path)
    assert names(listed) == ["a", "b", "f"]
    assert names(folders) == ["c", "d", "e"]


def test_everything_that_cannot_be_opened_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError) as refused:
        list_folder(tmp_path)
    told = refused.value.problems
    assert len(told) == 3
    assert "gone is a link to nowhere, which is not there" in told[0]
    assert "loop cannot be opened" in told[1]
    assert "pipe is no file but a pipe" in told[2]


def test_many_that_cannot_be_opened_are_counted(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}").symlink_to("nowhere")
    with pytest.raises(InputError) as refused:
        list_folder(tmp_path)
    assert len(refused.value.problems) == 21
    assert "30 more" in refused.value.problems[-1]


def test_what_permissions_forbid_is_told() -> None:
    with unprivileged() as folder:
        (folder / "file").touch(mode=0)
        (folder / "closed").mkdir()
        (folder / "closed" / "x").touch()
        (folder / "closed").chmod(0)
        with pytest.raises(InputError, match="file cannot be read"):
            list_folder(folder)
        with pytest.raises(InputError, match=r"closed cannot be read \(Permission denied\)"):
            list_folder(folder / "closed")
        with pytest.raises(InputError, match=r"/closed cannot be opened \(Permission denied\)"):
            is_there(folder / "closed" / "x")


def test_folders_are_walked_once_however_many_links_lead_to_them(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for path in (tmp_path / "top", tmp_path / "a" / "middle", tmp_path / "a" / "b" / "deep"):
        path.touch()
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a" / "b")
    assert names(list(walk_files(tmp_path))) == ["top", "middle", "deep"]


def test_an_unreachable_file_deep_in_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").symlink_to("nowhere")
    with pytest.raises(InputError, match="c is a link to nowhere"):
        list(walk_files(tmp_path))


def test_nothing_is_there_only_where_nothing_is(tmp_path: Path) -> None:
    assert not is_there(tmp_path / "a")
    (tmp_path / "a").touch()
    assert is_there(tmp_path / "a")
    assert not is_there(tmp_path / "a" / "below a file")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="link is a link to nowhere"):
        is_there(tmp_path / "link")


@given(st.text(), st.text())
def test_any_two_texts_become_two_names_of_files(first: str, second: str) -> None:
    one = file_name(first)
    two = file_name(second, [one])
    assert one.casefold() != two.casefold()
    for name in (one, two):
        assert Path(name).name == name
        assert not name.startswith(".")
        assert 0 < len(f"{name}.nii.gz".encode()) <= 255


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (1.2e12, "1,200.0 GB")],
)
def test_sizes_never_look_like_nothing(num_bytes: float, text: str) -> None:
    assert format_size(num_bytes) == text


def test_bytes_of_names_that_are_no_utf_8_are_written_as_replacement_characters(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", os.fsdecode(b"M\xfcller"))
    assert (tmp_path / "a").read_text(encoding="utf-8") == "M\ufffdller"
