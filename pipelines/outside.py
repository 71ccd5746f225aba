"""Files that are not ours: listed, looked at and opened by address, on a disk, in S3 or at Hugging Face.

S3 is reached by pyarrow, which takes credentials, region and AWS_ENDPOINT_URL from the environment as AWS's own tools
do. Hugging Face is an extra: `pip install 'nanochat-ray[hf]'`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipelines.documents import SourceError, SourceFile, SourceFileChangedError

S3, HF = "s3://", "hf://"
WILD = re.compile(r"[*?\[]")


def find(pattern: str, base: Path) -> list[SourceFile]:
    """Files that match a path or glob, sorted. `*` stays inside a folder, `**` goes through any number of them.

    base: the folder that a relative path begins in.
    """
    with _named(pattern):
        if pattern.startswith(HF):
            found = [
                _hugging_face(info) for info in _hugging_face_files().glob(pattern[len(HF) :], detail=True).values()
            ]
        else:
            address = pattern if pattern.startswith(S3) else os.path.abspath(base / Path(pattern).expanduser())
            found = [_seen(address, info) for info in _matching(address)]
    return sorted((file for file in found if file), key=lambda file: file.uri)


def look(uri: str) -> SourceFile | None:
    """The file at an address as it is now, or None if there is none."""
    with _named(uri):
        if uri.startswith(HF):
            files = _hugging_face_files()
            path = uri[len(HF) :]
            return _hugging_face(files.info(path)) if files.exists(path) else None
        filesystem, path = _filesystem(uri)
        return _seen(uri, filesystem.get_file_info(path))


def open_file(file: SourceFile) -> BinaryIO:
    """Open a listed file for reading. SourceFileChangedError if it is gone or has changed since."""
    now = look(file.uri)
    if now is None:
        raise SourceFileChangedError(f"{file.uri} was there when the source was listed, but is gone now")
    if now != file:
        raise SourceFileChangedError(
            f"{file.uri} changed since the source was listed: {file.bytes} bytes ({file.stamp}) then, "
            f"{now.bytes} bytes ({now.stamp}) now"
        )
    with _named(file.uri):
        if file.uri.startswith(HF):
            return cast(BinaryIO, _hugging_face_files().open(file.uri[len(HF) :], "rb"))
        filesystem, path = _filesystem(file.uri)
        return cast(BinaryIO, filesystem.open_input_file(path))


@contextmanager
def _named(address: str) -> Iterator[None]:
    """What a file system says about an address becomes one sentence that names it."""
    import httpx
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException, httpx.HTTPError) as error:
        raise SourceError(
            f"{address} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def _filesystem(address: str) -> tuple[Any, str]:
    """pyarrow's file system for an address, and the path in it."""
    from pyarrow import fs

    if address.startswith(S3):
        path = address[len(S3) :]
        # By its address, not by S3FileSystem(): only so does pyarrow heed AWS_ENDPOINT_URL and ask for the region.
        filesystem, _ = fs.FileSystem.from_uri(S3 + path.partition("/")[0])
        return filesystem, path
    return fs.LocalFileSystem(), address


def _seen(address: str, info: Any) -> SourceFile | None:
    """What pyarrow's FileInfo tells about a file; None for a folder or nothing."""
    if not info.is_file:
        return None
    uri = S3 + info.path if address.startswith(S3) else info.path
    return SourceFile(uri, info.size, str(info.mtime_ns))


def _matching(address: str) -> list[Any]:
    from pyarrow import fs

    filesystem, path = _filesystem(address)
    wild = WILD.search(path)
    if wild is None:
        return [filesystem.get_file_info(path)]
    folder, tail = path[: wild.start()].rpartition("/")[0], path[wild.start() :]
    selector = fs.FileSelector(folder or "/", recursive="/" in tail or "**" in tail, allow_not_found=True)
    wanted = _glob(path)
    return [info for info in filesystem.get_file_info(selector) if wanted.fullmatch(info.path)]


def _glob(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob: `**/`, `**`, `*`, `?` and `[...]`; the rest stands for itself."""
    signs = {"**/": r"(?:[^/]+/)*", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])", pattern)
    return re.compile("".join(signs.get(part) or _literal(part) for part in parts), re.DOTALL)


def _literal(part: str) -> str:
    if part.startswith("[") and part.endswith("]"):
        return "[^" + part[2:] if part.startswith("[!") else part
    return re.escape(part)


def _hugging_face_files() -> Any:
    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise SourceError("hf:// sources need Hugging Face's client: pip install 'nanochat-ray[hf]'") from error
    return HfFileSystem()


def _hugging_face(info: dict[str, Any]) -> SourceFile | None:
    if info["type"] != "file":
        return None
    return SourceFile(HF + info["name"], info["size"], str(info["blob_id"]))
