"""Hashes of files: remembered while a file is as it was, and never beyond."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from matchai.data import digests
from matchai.data.digests import condense, fingerprint


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as settled at once, hashed into the memory."""
    monkeypatch.setattr(digests, "SETTLED", -60.0)
    path = tmp_path / "images.npy"
    path.write_bytes(b"one")
    fingerprint([path], tmp_path / "memory.json")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def forbid_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(hashlib, "file_digest", refuse)


def test_a_file_that_is_as_it_was_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_hashing(monkeypatch)
    assert fingerprint([file], file.with_name("memory.json")) == {"images.npy": sha256(b"one")}


def test_another_content_of_the_same_size_and_modification_time_is_noticed(file: Path) -> None:
    status = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint([file], file.with_name("memory.json")) == {"images.npy": sha256(b"two")}


def test_a_file_that_took_the_place_of_another_is_noticed(file: Path) -> None:
    other = file.with_name("other.npy")
    other.write_bytes(b"two")
    other.replace(file)
    assert fingerprint([file], file.with_name("memory.json")) == {"images.npy": sha256(b"two")}


def test_the_hash_of_a_young_file_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    path.write_bytes(b"one")
    fingerprint([path], tmp_path / "memory.json")
    assert not (tmp_path / "memory.json").exists()


def test_a_damaged_memory_is_not_believed(file: Path) -> None:
    memory = file.with_name("memory.json")
    memory.write_text(memory.read_text().replace(sha256(b"one"), sha256(b"two")))
    assert fingerprint([file], memory) == {"images.npy": sha256(b"one")}
    assert json.loads(memory.read_text())["files"][str(file.resolve())][0] == sha256(b"one")


def test_a_memory_that_cannot_be_written_is_done_without(file: Path) -> None:
    assert fingerprint([file], file / "memory.json") == {"images.npy": sha256(b"one")}


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.nii").write_bytes(name.encode())
    found = fingerprint([tmp_path / "images/a.nii", tmp_path / "masks/a.nii"], folder=tmp_path)
    assert found == {"images/a.nii": sha256(b"images"), "masks/a.nii": sha256(b"masks")}


def test_thousands_of_files_are_told_as_one_hash_a_folder_that_any_of_them_changes() -> None:
    digests = {f"{folder}/{n}.png": sha256(str(n).encode()) for folder in ("images", "masks") for n in range(1000)}
    found = condense(digests)
    assert list(found) == ["images/", "masks/"]
    changed = condense(digests | {"masks/7.png": sha256(b"other")})
    assert changed["images/"] == found["images/"]
    assert changed["masks/"] != found["masks/"]
    assert condense(dict(reversed(digests.items()))) == found


def test_a_few_files_are_told_one_by_one() -> None:
    digests = {"images/a.nii": "1", "masks/a.nii": "2"}
    assert condense(digests) == digests
