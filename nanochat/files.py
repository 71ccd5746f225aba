"""Where bytes lie: a flat set of named files, on a disk or in an object store.

The code here knows only this face. `Folder` is the one kind of it that needs nothing but a local disk.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class File:
    """What was written: its name below the root, its size and its hash."""

    path: str
    bytes: int
    sha256: str


class Files(Protocol):
    """Named files. Names are relative, with "/" between their parts."""

    def open(self, name: str) -> BinaryIO:
        """Seekable, for reading. FileNotFoundError names the file."""

    def put(self, name: str, data: bytes | Path) -> File:
        """Write all of it or nothing; what had that name is replaced. A Path is copied."""

    def list(self, prefix: str = "") -> list[str]:
        """Names that start with `prefix`, sorted."""

    def delete(self, name: str) -> None:
        """No error if it is gone already."""


class Folder:
    """Files below one local directory, which is made by the first `put`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str) -> BinaryIO:
        return self.path(name).open("rb")

    def put(self, name: str, data: bytes | Path) -> File:
        """Written under another name in the same folder, synced, then renamed: a reader sees the old or the new."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                size, digest = _copy(data, out)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out the other users of a shared disk
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)
        return File(name, size, digest)

    def list(self, prefix: str = "") -> list[str]:
        # Only the directory part of the prefix is walked: a run's folder may lie beside many others.
        start = self.root / prefix.rpartition("/")[0]
        names = (p.relative_to(self.root).as_posix() for p in start.rglob("*") if p.is_file() and not _temporary(p))
        return sorted(name for name in names if name.startswith(prefix))

    def delete(self, name: str) -> None:
        """Folders that it leaves empty go too, and with them what a killed `put` left there."""
        path = self.path(name)
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.root or not folder.is_dir():
                break
            rest = list(folder.iterdir())
            if not all(_temporary(p) for p in rest):
                break
            for leftover in rest:
                leftover.unlink(missing_ok=True)
            folder.rmdir()

    def path(self, name: str) -> Path:
        """The local path of a name. ValueError if it would lie outside of the root."""
        parts = name.split("/")
        if not name or name.startswith("/") or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{name!r} is no file name: use a relative path with no '.', '..' or empty part")
        return self.root.joinpath(*parts)


TEMPORARY = ".put-"


def _temporary(path: Path) -> bool:
    return path.name.startswith(TEMPORARY)


def _copy(data: bytes | Path, out: BinaryIO) -> tuple[int, str]:
    """Write data to out; its size and sha256."""
    if isinstance(data, bytes):
        out.write(data)
        return len(data), hashlib.sha256(data).hexdigest()
    digest, size = hashlib.sha256(), 0
    with data.open("rb") as source:
        while block := source.read(CHUNK_BYTES):
            out.write(block)
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _sync_directory(path: Path) -> None:
    """Without it a power cut may lose the rename, though the bytes are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
