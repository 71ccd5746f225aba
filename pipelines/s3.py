"""Artifacts in an S3 bucket: whole objects, conditional writes, ranged reads; nothing is ever renamed.

Credentials, region and endpoint are those that boto3 finds by itself (AWS_ENDPOINT_URL for a server of one's own).
"""

import hashlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from nanochat.files import File
from pipelines.artifacts import Found, Store, StoreError

WHOLE_BYTES = 8 << 20  # objects up to this size are read in one request
READ_AHEAD_BYTES = 4 << 20
PART_BYTES = 16 << 20  # of a multipart upload; S3 allows 10,000 parts: objects up to 160 GB
CONFLICT_TRIES = 5
READ_TRIES = 3

# A quick one asks once, so that `plan` says within two seconds that there is no network.
PATIENT = Config(connect_timeout=10, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 5})
QUICK = Config(connect_timeout=1, read_timeout=1, retries={"mode": "standard", "total_max_attempts": 1})
TRANSFER = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)

GONE = {"404", "NoSuchKey", "NotFound"}
REASONS = {
    "NoSuchBucket": "there is no such bucket; make it, or choose another with --set store=s3://BUCKET/PREFIX",
    "AccessDenied": "these credentials may not read and write there; allow them to, or use others",
    "403": "these credentials may not read and write there; allow them to, or use others",
    "InvalidAccessKeyId": "these credentials are not known there; use others",
    "SignatureDoesNotMatch": "the secret key is not the one of this access key; use the right one",
    "ExpiredToken": "the credentials have expired; get new ones and run the same again",
}


@lru_cache(maxsize=4)
def _client(config: Config) -> Any:
    """One client for all threads of this process: making one takes longer than asking it."""
    return boto3.session.Session().client("s3", config=config)


@dataclass(frozen=True)
class S3Store(Store):
    """Artifacts below s3://<bucket>/<prefix>. Can be pickled; each process connects by itself."""

    bucket: str
    prefix: str = ""
    quick: bool = False  # one short try for each question instead of patience

    def open(self, name: str) -> BinaryIO:
        """A small object is read at once, a large one in ranges; a change in between is an error, never a mixture."""
        with self._clear(name):
            head = self._s3.head_object(Bucket=self.bucket, Key=self._key(name))
            size = head["ContentLength"]
            if size > WHOLE_BYTES:
                return io.BufferedReader(_Ranges(self, name, size, head["ETag"]), READ_AHEAD_BYTES)
            return io.BytesIO(self.read_bytes(name, head["ETag"], f"bytes=0-{size - 1}") if size else b"")

    def put(self, name: str, data: bytes | Path) -> File:
        """In parts when it is large; boto3 aborts the upload when a part fails, so nothing half-written is seen."""
        with self._clear(name):
            if isinstance(data, bytes):
                self._s3.upload_fileobj(io.BytesIO(data), self.bucket, self._key(name), Config=TRANSFER)
                return File(name, len(data), hashlib.sha256(data).hexdigest())
            with data.open("rb") as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()
                size = source.tell()
                source.seek(0)
                self._s3.upload_fileobj(source, self.bucket, self._key(name), Config=TRANSFER)
                return File(name, size, digest)

    def create(self, name: str, data: bytes) -> bool:
        """412: there is one already. 409: another is writing it at this moment, so look again."""
        for attempt in range(CONFLICT_TRIES):
            try:
                with self._clear(name):
                    self._s3.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
                    return True
            except _TakenError:
                return False
            except _ConflictError:
                time.sleep(0.1 * 2**attempt)
        raise StoreError(f"{self.uri(name)}: other writers kept it busy for {CONFLICT_TRIES} tries; run the same again")

    def found(self, folder: str) -> list[Found]:
        with self._clear(folder):
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._inside(folder))
            objects = [o for page in pages for o in page.get("Contents", [])]
        cut = len(self._inside(""))
        return [Found(o["Key"][cut:], o["Size"], o["LastModified"].timestamp()) for o in objects]

    def folders(self, folder: str) -> list[str]:
        prefix = self._inside(folder)
        with self._clear(folder):
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/")
            inside = [p["Prefix"] for page in pages for p in page.get("CommonPrefixes", [])]
        return sorted(p.removeprefix(prefix).rstrip("/") for p in inside)

    def delete(self, name: str) -> None:
        with self._clear(name):
            self._s3.delete_object(Bucket=self.bucket, Key=self._key(name))

    def uri(self, name: str) -> str:
        return f"s3://{self.bucket}/{self._key(name)}"

    def read_bytes(self, name: str, etag: str, span: str) -> bytes:
        """A range of an object as it was when it was opened. An answer that breaks off is asked for anew."""
        with self._clear(name):
            for tries_left in range(READ_TRIES - 1, -1, -1):
                try:
                    answer = self._s3.get_object(Bucket=self.bucket, Key=self._key(name), IfMatch=etag, Range=span)
                    return bytes(answer["Body"].read())
                except (ReadTimeoutError, IncompleteReadError, ResponseStreamingError):
                    if not tries_left:
                        raise
        raise AssertionError("the last try returns or raises")

    @property
    def _s3(self) -> Any:
        return _client(QUICK if self.quick else PATIENT)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _inside(self, folder: str) -> str:
        """What the keys of a folder begin with; nothing for the root of a whole bucket."""
        key = self._key(folder).rstrip("/")
        return f"{key}/" if key else ""

    @contextmanager
    def _clear(self, name: str) -> Iterator[None]:
        """Turns boto3's errors into ours: FileNotFoundError, or one clear sentence."""
        try:
            yield
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in GONE:
                raise FileNotFoundError(f"{self.uri(name)}: no such object") from error
            if code in ("PreconditionFailed", "412"):
                raise _TakenError(f"{self.uri(name)} changed while it was read") from error
            if code in ("ConditionalRequestConflict", "409"):
                raise _ConflictError(f"{self.uri(name)} is being written by another") from error
            said = REASONS.get(code, f"{code}, {error.response['Error'].get('Message', '')}")
            raise self._unusable(said) from error
        except NoCredentialsError as error:
            raise self._unusable(
                "no credentials were found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret"
            ) from error
        except (BotoCoreError, Boto3Error) as error:
            raise self._unusable(" ".join(str(error).split())) from error

    def _unusable(self, said: str) -> StoreError:
        return StoreError(f"the store s3://{self.bucket}/{self.prefix} cannot be used: {said}")


class _TakenError(StoreError):
    """412: a condition of the request does not hold."""


class _ConflictError(StoreError):
    """409: another request is changing the same object."""


class _Ranges(io.RawIOBase):
    """An object read piece by piece, as it is asked for."""

    def __init__(self, store: S3Store, name: str, size: int, etag: str) -> None:
        self.store = store
        self.name = name
        self.size = size
        self.etag = etag
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """The rest; without this, Python would ask for it in pieces of 8 KiB."""
        return b"".join(iter(lambda: self._next(PART_BYTES), b""))

    def _next(self, most: int) -> bytes:
        stop = min(self.at + most, self.size)
        if stop <= self.at:
            return b""
        data = self.store.read_bytes(self.name, self.etag, f"bytes={self.at}-{stop - 1}")
        self.at += len(data)
        return data
