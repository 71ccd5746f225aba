"""A folder of files: whole or not at all, and nothing outside of it."""

import hashlib
from pathlib import Path

import pytest

from nanochat.files import File, Folder


def test_what_is_put_can_be_read(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "new")
    data = bytes(range(256)) * 10_000
    (tmp_path / "source").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert folder.put("a/b.bin", data) == File("a/b.bin", len(data), expected)
    assert folder.put("c.bin", tmp_path / "source") == File("c.bin", len(data), expected)
    for name in ("a/b.bin", "c.bin"):
        with folder.open(name) as file:
            file.seek(256)
            assert file.read() == data[256:]


def test_put_replaces_and_delete_forgives(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.put("x", b"old and long")
    folder.put("x", b"new")
    with folder.open("x") as file:
        assert file.read() == b"new"
    folder.delete("x")
    folder.delete("x")
    with pytest.raises(FileNotFoundError, match="x"):
        folder.open("x")


def test_list_is_sorted_and_by_prefix(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.list() == []
    for name in ("step-2/b", "step-10/a", "state", "step-2/a", "z"):
        folder.put(name, b"")
    assert folder.list() == ["state", "step-10/a", "step-2/a", "step-2/b", "z"]
    assert folder.list("step-2") == ["step-2/a", "step-2/b"]
    assert folder.list("step-2/b") == ["step-2/b"]
    assert folder.list("none/") == []


def test_a_put_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.put("x", b"old")
    with pytest.raises(FileNotFoundError):
        folder.put("x", tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_put_left_is_not_listed_and_goes_with_its_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.put("step/x", b"1")
    (tmp_path / "step" / ".put-abc").write_bytes(b"half")
    assert folder.list() == ["step/x"]
    folder.delete("step/x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "."])
def test_names_outside_are_refused(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path / "root")
    for use in (lambda: folder.put(name, b""), lambda: folder.open(name), lambda: folder.delete(name)):
        with pytest.raises(ValueError, match="no file name"):
            use()
