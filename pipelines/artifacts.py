"""What stages hand to each other: a directory of files, and a manifest that is written last.

    <store>/<makes>/<stage>-<key>/
        work/             to resume from; shared by every try, never read by other stages
        data-<try>/       what one try wrote            sums-<try>/   sizes and hashes, said by who wrote it
        manifest.json     names the data-<try> that counts; its presence means "built"

There is no rename, so the same steps are safe on a disk and on S3. Two tries may run at once: the first to create the
manifest wins, and the other's data is garbage. What a store can do is seven verbs on names; the rest stands on them.
"""

import errno
import hashlib
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from nanochat.files import CHUNK_BYTES, TEMPORARY, File, Folder

MANIFEST = "manifest.json"
State = Literal["built", "partial", "missing"]


class StoreError(RuntimeError):
    """The store cannot be used: not writable, full, not there, not allowed. One sentence for a person."""


class BrokenArtifactError(RuntimeError):
    """A file of a built artifact is gone, or is not what the manifest says."""

    def __init__(self, stage: str, problem: str) -> None:
        super().__init__(stage, problem)
        self.stage = stage
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem}; rebuild it: nanochat run FILE --profile P --rebuild {self.stage}"


@dataclass(frozen=True)
class Found:
    """A file that lies in a store."""

    name: str  # below the root of the store
    bytes: int
    modified: float  # seconds since 1970, by the store's clock


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All there is to know about an artifact without opening its files."""

    name: str  # of the stage
    kind: str  # of the stage, as in the file
    makes: str
    key: str
    data: str  # the data-<try> that counts
    recipe: dict[str, Any]  # what the key is a hash of
    inputs: dict[str, str]  # field -> address of the artifact that was read
    files: tuple[File, ...]
    pipeline: str
    profile: str
    sources: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # field -> listing of outside data
    metrics: dict[str, float] = field(default_factory=dict)  # names of pipelines/metrics.py
    made: dict[str, Any] = field(default_factory=dict)  # commit, dirty, host, workers, started, seconds, ...
    code: str = ""  # digest of the sources that made it

    @property
    def address(self) -> str:
        """Where the artifact lies under the store."""
        return f"{self.makes}/{self.name}-{self.key}"

    def to_json(self) -> bytes:
        """The bytes of manifest.json."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_json(text: bytes) -> "Manifest":
        """Raises ValueError when it is not a whole manifest."""
        data = json.loads(text)
        if not isinstance(data, dict) or {f.name for f in fields(Manifest)} != set(data):
            raise ValueError("its keys are not those of a manifest")
        return Manifest(**{**data, "files": tuple(File(**f) for f in data["files"])})


@dataclass(frozen=True)
class Dir:
    """A folder of an artifact, as `nanochat.files.Files`. Can be pickled, and works on any host that sees the store.

    Names that begin with a dot are the store's own and are not listed.
    """

    store: "Store"
    address: str
    part: str  # work or data-<try>

    def open(self, name: str) -> BinaryIO:
        """Seekable, for reading. FileNotFoundError names the file."""
        return self.store.open(self._at(name))

    def put(self, name: str, data: bytes | Path) -> File:
        """Writes all of it or nothing; what had that name is replaced."""
        file = replace(self.store.put(self._at(name), data), path=name)
        self._record(file)
        return file

    def create(self, name: str, data: bytes) -> bool:
        """As `put`, but only where there is no such file yet; says whether it was written."""
        if not self.store.create(self._at(name), data):
            return False
        self._record(File(name, len(data), hashlib.sha256(data).hexdigest()))
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Names that start with `prefix`, sorted."""
        folder = prefix.rpartition("/")[0]
        root = f"{self.address}/{self.part}/"
        names = [f.name.removeprefix(root) for f in self.store.found(f"{root}{folder}".rstrip("/"))]
        return [n for n in names if n.startswith(prefix) and not n.startswith(".")]

    def delete(self, name: str) -> None:
        """No error if it is gone already."""
        self.store.delete(self._at(name))
        if self._sums is not None:
            self.store.delete(f"{self._sums}/{name}")

    def uri(self, name: str = "") -> str:
        """A local path or an s3:// address, of a file or of the whole folder."""
        return self.store.uri(self._at(name) if name else f"{self.address}/{self.part}")

    def written(self) -> tuple[File, ...]:
        """Every file of a try, with the hash that its writer took. ValueError on one put there by other means."""
        root = f"{self.address}/{self.part}/"
        files = []
        for found in self.store.found(root.rstrip("/")):
            name = found.name.removeprefix(root)
            try:
                with self.store.open(f"{self._sums}/{name}") as said:
                    file = File(**json.load(said))
            except FileNotFoundError:
                raise ValueError(
                    f"{self.store.uri(found.name)} was not written by Dir.put, so its hash is not known"
                ) from None
            if file.bytes != found.bytes:
                raise ValueError(f"{self.store.uri(found.name)} has {found.bytes} bytes, but {file.bytes} were written")
            files.append(file)
        return tuple(files)

    @property
    def _sums(self) -> str | None:
        if not self.part.startswith("data-"):
            return None
        return f"{self.address}/sums-{self.part.removeprefix('data-')}"

    def _record(self, file: File) -> None:
        if self._sums is not None:
            self.store.put(f"{self._sums}/{file.path}", json.dumps(asdict(file)).encode())

    def _at(self, name: str) -> str:
        if not name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"{name!r} is no file name: use a relative path with no '.', '..' or empty part")
        return f"{self.address}/{self.part}/{name}"


class Store(ABC):
    """Artifacts by address. LocalStore and S3Store say how bytes are kept; every error of theirs is a StoreError."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Seekable, for reading. FileNotFoundError names the file."""

    @abstractmethod
    def put(self, name: str, data: bytes | Path) -> File:
        """Writes all of it or nothing; what had that name is replaced."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """As `put`, but only where there is no such file yet; of several writers at once exactly one is told True."""

    @abstractmethod
    def found(self, folder: str) -> list[Found]:
        """Every file below a folder, by name; none if there is no such folder."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """The last names of the folders inside a folder, sorted."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """No error if it is gone already."""

    @abstractmethod
    def uri(self, name: str) -> str:
        """Where other programs find it: a local path or an s3:// address."""

    def dir(self, address: str, part: str) -> Dir:
        """A folder of an artifact: `work`, or the data-<try> that a manifest names."""
        return Dir(self, address, part)

    def data(self, address: str) -> Dir:
        """The files of a built artifact."""
        return Dir(self, address, self.read(address).data)

    def begin(self, address: str) -> tuple[Dir, Dir]:
        """A fresh folder for one try's output, and the folder to resume from."""
        return Dir(self, address, f"data-{uuid.uuid4().hex[:8]}"), Dir(self, address, "work")

    def state(self, address: str) -> State:
        """Built, partial (there is work to resume from) or missing."""
        try:
            self.open(f"{address}/{MANIFEST}").close()
        except FileNotFoundError:
            return "partial" if self.dir(address, "work").list() else "missing"
        return "built"

    def read(self, address: str) -> Manifest:
        """Raises FileNotFoundError if it is not built, BrokenArtifactError if its manifest is damaged."""
        name = f"{address}/{MANIFEST}"
        with self.open(name) as file:
            text = file.read()
        try:
            return Manifest.from_json(text)
        except (ValueError, TypeError) as error:
            raise BrokenArtifactError(
                stage_of(address), f"{self.uri(name)} is damaged or of another version ({error})"
            ) from error

    def commit(self, manifest: Manifest) -> None:
        """Makes the artifact readable. Raises FileExistsError if another run was first."""
        address = manifest.address
        if self.create(f"{address}/{MANIFEST}", manifest.to_json()):
            return
        # A write whose answer was lost is tried again and then finds itself.
        if self.read(address).data != manifest.data:
            raise FileExistsError(f"{self.uri(address)}: another run built it first")

    def check(self, manifest: Manifest) -> None:
        """Sizes only, so it is cheap. Raises BrokenArtifactError naming the first wrong file."""
        root = f"{manifest.address}/{manifest.data}"
        there = {f.name: f.bytes for f in self.found(root)}
        for file in manifest.files:
            size = there.get(f"{root}/{file.path}")
            if size != file.bytes:
                now = "is gone" if size is None else f"has {size} bytes instead of {file.bytes}"
                raise BrokenArtifactError(manifest.name, f"{self.uri(f'{root}/{file.path}')} {now}")

    def verify(self, manifest: Manifest) -> None:
        """Reads every file. Raises BrokenArtifactError naming the first that is not what was written."""
        self.check(manifest)
        data = Dir(self, manifest.address, manifest.data)
        for file in manifest.files:
            digest = hashlib.sha256()
            with data.open(file.path) as opened:
                while block := opened.read(CHUNK_BYTES):
                    digest.update(block)
            if digest.hexdigest() != file.sha256:
                raise BrokenArtifactError(
                    manifest.name, f"{data.uri(file.path)} is not what was written (its sha256 differs)"
                )

    def addresses(self, makes: str) -> list[str]:
        """Every artifact of one kind, built or not."""
        return [f"{makes}/{name}" for name in self.folders(makes)]

    def remove(self, address: str, part: str = "") -> int:
        """Deletes an artifact, or one part of it; the manifest goes first. Returns the bytes that were freed."""
        files = self.found(f"{address}/{part}".rstrip("/"))
        for file in sorted(files, key=lambda f: f.name != f"{address}/{MANIFEST}"):
            self.delete(file.name)
        return sum(f.bytes for f in files)


@dataclass(frozen=True)
class LocalStore(Store):
    """Artifacts in a folder of this machine or of a shared disk."""

    root: Path

    def open(self, name: str) -> BinaryIO:
        with self._clear():
            return Folder(self.root).open(name)

    def put(self, name: str, data: bytes | Path) -> File:
        with self._clear():
            return Folder(self.root).put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """A hard link, unlike a rename, fails where the target is; and what it shows is written and synced."""
        part = f"{name.rpartition('/')[0]}/{TEMPORARY}{uuid.uuid4().hex[:8]}"
        with self._clear():
            folder = Folder(self.root)
            folder.put(part, data)
            try:
                os.link(folder.path(part), folder.path(name))
            except FileExistsError:
                return False
            finally:
                folder.path(part).unlink()
            return True

    def found(self, folder: str) -> list[Found]:
        with self._clear():
            return sorted(self._walk(Path(self.root, folder)), key=lambda f: f.name)

    def folders(self, folder: str) -> list[str]:
        with self._clear():
            path = Path(self.root, folder)
            return sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []

    def delete(self, name: str) -> None:
        with self._clear():
            Folder(self.root).delete(name)

    def uri(self, name: str) -> str:
        return str(self.root / name)

    def _walk(self, folder: Path) -> Iterator[Found]:
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:  # never made, or deleted meanwhile
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(Path(entry.path))
            elif not entry.name.startswith(TEMPORARY):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                yield Found(Path(entry.path).relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime)

    @contextmanager
    def _clear(self) -> Iterator[None]:
        """Turns what the operating system says into one clear sentence."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            said = REASONS.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
            raise StoreError(f"the store {self.root} cannot be used: {said} ({error.filename or self.root})") from error


REASONS = {
    errno.EACCES: "this user may not read or write there; change its owner or choose another with --set store=PATH",
    errno.EPERM: "this user may not read or write there; change its owner or choose another with --set store=PATH",
    errno.EROFS: "it lies on a read-only disk; choose another with --set store=PATH",
    errno.ENOSPC: "its disk is full; free some space (`nanochat gc` lists what is not needed) and run the same again",
    errno.EDQUOT: "the quota of this user is used up; free some space and run the same again",
    errno.ENOTDIR: "it or a folder above it is a file; choose another with --set store=PATH",
    errno.EEXIST: "it is a file, not a folder; choose another with --set store=PATH",
}


def stage_of(address: str) -> str:
    """The stage's name in `<makes>/<stage>-<key>`."""
    return address.partition("/")[2].rpartition("-")[0]


def open_store(place: str, base: Path, *, quick: bool = False) -> Store:
    """The store that a profile names: an s3:// address, or a folder; a relative one begins at `base`.

    quick: ask a remote store once and briefly, to say soon that it cannot be asked.
    """
    if place.startswith("s3://"):
        from pipelines.s3 import S3Store  # boto3 is slow to import, and a laptop needs none of it

        bucket, _, prefix = place.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix.strip("/"), quick=quick)
    return LocalStore(base / Path(place).expanduser())
