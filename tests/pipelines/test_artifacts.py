"""One suite for both stores: a folder, and a bucket of a moto server on 127.0.0.1."""

import errno
import hashlib
import os
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipelines import s3
from pipelines.artifacts import BrokenArtifactError, Dir, LocalStore, Manifest, Store, StoreError, open_store
from pipelines.s3 import S3Store

ADDRESS = "checkpoint/base-0123456789abcdef"


@pytest.fixture
def store(either_store: Store) -> Store:
    return either_store


def manifest(out: Dir, **more: Any) -> Manifest:
    return Manifest(
        **{
            "name": "base",
            "kind": "pretrain",
            "makes": "checkpoint",
            "key": "0123456789abcdef",
            "data": out.part,
            "recipe": {"settings": {"tokens": 3}},
            "inputs": {"data": "token_shards/corpus-1"},
            "files": out.written(),
            "pipeline": "speedrun",
            "profile": "laptop",
            "metrics": {"train_loss": 2.5},
        }
        | more
    )


def made(store: Store, **files: bytes) -> Manifest:
    out, _ = store.begin(ADDRESS)
    for name, data in (files or {"a": b"one", "b": b"two"}).items():
        out.put(name, data)
    done = manifest(out)
    store.commit(done)
    return done


def test_what_is_put_can_be_read_listed_and_deleted(store: Store) -> None:
    work = store.dir(ADDRESS, "work")
    assert work.list() == []
    file = work.put("step-1/model", b"weights")
    assert (file.path, file.bytes, file.sha256) == ("step-1/model", 7, hashlib.sha256(b"weights").hexdigest())
    work.put("step-1/model", b"others!!")
    work.put("step-2/model", b"")
    work.put(".lease", b"hidden")
    with work.open("step-1/model") as opened:
        assert opened.seekable()
        assert opened.seek(-2, os.SEEK_END) == 6
        assert opened.read() == b"!!"
        opened.seek(1)
        assert opened.read(3) == b"the"
    with work.open("step-2/model") as opened:
        assert opened.read() == b""
    assert work.list() == ["step-1/model", "step-2/model"]
    assert work.list("step-1/") == work.list("step-1/mo") == ["step-1/model"]
    work.delete("step-1/model")
    work.delete("step-1/model")
    assert work.list() == ["step-2/model"]
    with pytest.raises(FileNotFoundError, match="step-1/model"):
        work.open("step-1/model")


def test_a_file_is_put_from_a_path_and_large_ones_come_in_pieces(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(s3, "READ_AHEAD_BYTES", 512)
    monkeypatch.setattr(s3, "TRANSFER", s3.TransferConfig(multipart_threshold=6 << 20, multipart_chunksize=5 << 20))
    data = os.urandom((11 << 20) + 17)
    path = tmp_path / "big"
    path.write_bytes(data)
    out, _ = store.begin(ADDRESS)
    assert out.put("big", path).sha256 == out.put("again", data).sha256 == hashlib.sha256(data).hexdigest()
    with out.open("big") as opened:
        opened.seek(10 << 20)
        assert opened.read(100_000) == data[10 << 20 : (10 << 20) + 100_000]
        opened.seek(-5, os.SEEK_END)
        assert opened.read(100) == data[-5:]
        assert opened.read(1) == b""
        opened.seek(0)
        start = time.monotonic()
        assert opened.read() == data
        assert time.monotonic() - start < 5  # in requests of megabytes, not of kilobytes


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "", ".", "a/../../b"])
def test_no_name_leads_out_of_the_folder(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="no file name"):
        store.dir(ADDRESS, "work").put(name, b"x")
    with pytest.raises(ValueError, match="no file name"):
        store.dir(ADDRESS, "work").open(name)


def test_a_dir_works_in_another_process(store: Store) -> None:
    work = pickle.loads(pickle.dumps(store.dir(ADDRESS, "work")))
    work.put("x", b"y")
    assert store.dir(ADDRESS, "work").list() == ["x"]
    assert work.uri("x").endswith(f"{ADDRESS}/work/x")
    assert work == store.dir(ADDRESS, "work")


def test_only_a_committed_manifest_makes_an_artifact(store: Store) -> None:
    assert store.state(ADDRESS) == "missing"
    out, work = store.begin(ADDRESS)
    out.put("half", b"x")
    assert store.state(ADDRESS) == "missing"
    work.put("step-1", b"x")
    assert store.state(ADDRESS) == "partial"
    with pytest.raises(FileNotFoundError):
        store.read(ADDRESS)
    done = manifest(out)
    store.commit(done)
    assert store.state(ADDRESS) == "built"
    assert store.read(ADDRESS) == done
    assert store.data(ADDRESS).list() == ["half"]
    assert store.addresses("checkpoint") == [ADDRESS]
    assert store.addresses("bundle") == []


def test_of_many_writers_at_once_exactly_one_wins(store: Store) -> None:
    outs = [store.begin(ADDRESS)[0] for _ in range(8)]
    for out in outs:
        out.put("data", out.part.encode())
    manifests, results = [manifest(out) for out in outs], []
    start = threading.Barrier(len(outs))

    def commit(mine: Manifest) -> None:
        start.wait()
        try:
            store.commit(mine)
            results.append(mine.data)
        except FileExistsError:
            results.append("")

    threads = [threading.Thread(target=commit, args=(m,)) for m in manifests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = filter(None, results)
    assert store.read(ADDRESS).data == winner
    with store.data(ADDRESS).open("data") as opened:
        assert opened.read() == winner.encode()


def test_a_commit_whose_answer_was_lost_finds_itself(store: Store) -> None:
    done = made(store)
    store.commit(done)
    out, _ = store.begin(ADDRESS)
    out.put("a", b"other")
    with pytest.raises(FileExistsError, match="another run built it first"):
        store.commit(manifest(out))


def test_create_writes_only_where_there_is_nothing(store: Store) -> None:
    out, _ = store.begin(ADDRESS)
    assert out.create("x", b"first")
    assert not out.create("x", b"second")
    with out.open("x") as opened:
        assert opened.read() == b"first"
    assert [f.bytes for f in out.written()] == [5]
    assert out.list() == ["x"]


@pytest.mark.parametrize("damage", ["gone", "shorter", "flipped"])
def test_a_damaged_file_is_named_with_what_mends_it(store: Store, damage: str) -> None:
    done = made(store, a=b"one", b=b"two")
    store.check(done)
    store.verify(done)
    name = f"{ADDRESS}/{done.data}/b"
    if damage == "gone":
        store.delete(name)
    else:
        store.put(name, {"shorter": b"tw", "flipped": b"twp"}[damage])
    with pytest.raises(BrokenArtifactError, match=r"/b .*; rebuild it: nanochat run FILE --profile P --rebuild base"):
        store.verify(done)
    if damage == "flipped":
        store.check(done)  # sizes only
    else:
        with pytest.raises(BrokenArtifactError):
            store.check(done)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"name": 1', b"\xff"])
def test_a_damaged_manifest_is_not_read(store: Store, text: bytes) -> None:
    store.put(f"{ADDRESS}/manifest.json", text)
    with pytest.raises(BrokenArtifactError, match="--rebuild base"):
        store.read(ADDRESS)


def test_a_file_that_nobody_hashed_is_not_committed(store: Store) -> None:
    out, _ = store.begin(ADDRESS)
    out.put("a", b"one")
    store.put(f"{ADDRESS}/{out.part}/stray", b"x")
    with pytest.raises(ValueError, match=r"stray was not written by Dir\.put"):
        out.written()
    out.delete("stray")
    store.put(f"{ADDRESS}/{out.part}/a", b"longer")
    with pytest.raises(ValueError, match="has 6 bytes, but 3 were written"):
        out.written()


def test_remove_takes_an_artifact_or_a_part_of_it(store: Store) -> None:
    done = made(store)
    store.dir(ADDRESS, "work").put("step-1", b"12345")
    assert store.remove(ADDRESS, "work") == 5
    assert store.state(ADDRESS) == "built"
    store.remove(ADDRESS)
    assert store.state(ADDRESS) == "missing"
    assert store.found("checkpoint") == []
    assert done.address == ADDRESS


def test_a_manifest_says_the_same_after_json(store: Store) -> None:
    done = replace(made(store), sources={"source": [{"uri": "a", "bytes": 1, "stamp": "x"}]}, made={"commit": None})
    assert Manifest.from_json(done.to_json()) == done
    with pytest.raises(ValueError, match="Out of range float"):
        replace(done, metrics={"train_loss": float("nan")}).to_json()


def test_a_store_is_opened_by_its_name(tmp_path: Path) -> None:
    assert open_store("s3://b/p/q/", tmp_path) == S3Store("b", "p/q")
    assert open_store("x/y", tmp_path) == LocalStore(tmp_path / "x/y")
    assert open_store("/x", tmp_path) == LocalStore(Path("/x"))
    assert open_store("~/x", tmp_path) == LocalStore(Path.home() / "x")


def test_nothing_half_written_is_left_on_a_disk(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create("a/x", b"1")
    store.create("a/x", b"2")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "may not read or write"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_disk_says_becomes_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no", "some/file")

    monkeypatch.setattr(os, "fsync", refuse)
    store = LocalStore(tmp_path)
    for act in (lambda: store.put("a/x", b"1"), lambda: store.create("a/x", b"1")):
        with pytest.raises(StoreError, match=rf"the store {tmp_path} cannot be used: .*{said}.*\(some/file\)"):
            act()
    monkeypatch.undo()
    assert store.found("a") == []


def test_a_store_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(StoreError, match="is a file"):
            LocalStore(root).put("a/x", b"1")
    with pytest.raises(StoreError, match="is a file"):
        LocalStore(tmp_path / "file").state(ADDRESS)


def test_no_bucket_and_no_connection_are_one_sentence_each(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"the store s3://nowhere/p cannot be used: there is no such bucket; make it"):
        S3Store("nowhere", "p").put("x", b"1")
    with pytest.raises(StoreError, match="no such bucket"):
        S3Store("nowhere", "p").folders("checkpoint")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3._client.cache_clear()
    with pytest.raises(StoreError, match="Could not connect to the endpoint"):
        S3Store(bucket, quick=True).state(ADDRESS)


def test_no_credentials_is_one_sentence(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    s3._client.cache_clear()
    with pytest.raises(StoreError, match="no credentials were found; set AWS_PROFILE"):
        S3Store(bucket).state(ADDRESS)


class Answers:
    """A client whose put_object gives these error codes, one a call, and then succeeds."""

    def __init__(self, *codes: str) -> None:
        self.codes = list(codes)

    def put_object(self, **_: object) -> None:
        if self.codes:
            raise ClientError({"Error": {"Code": self.codes.pop(0), "Message": ""}}, "PutObject")


@pytest.mark.parametrize(
    ("codes", "won"), [([], True), (["PreconditionFailed"], False), (["ConditionalRequestConflict"] * 2, True),
                       (["ConditionalRequestConflict", "PreconditionFailed"], False)],
)  # fmt: skip
def test_412_is_lost_and_409_is_tried_again(monkeypatch: pytest.MonkeyPatch, codes: list[str], won: bool) -> None:
    client = Answers(*codes)
    monkeypatch.setattr(s3, "_client", lambda _: client)
    assert S3Store("b").create("x", b"1") is won


def test_an_object_that_changes_while_it_is_read_is_an_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "WHOLE_BYTES", 10)
    monkeypatch.setattr(s3, "READ_AHEAD_BYTES", 16)
    store = S3Store(bucket)
    store.put("x", b"a" * 100)
    with store.open("x") as opened:
        assert opened.read(4) == b"aaaa"
        store.put("x", b"b" * 100)
        with pytest.raises(StoreError, match="changed while it was read"):
            opened.read()


def test_a_failed_upload_leaves_neither_object_nor_parts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "TRANSFER", s3.TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20))
    store = S3Store(bucket)
    client = s3._client(s3.PATIENT)

    def fail(**_: object) -> None:
        raise ClientError({"Error": {"Code": "SlowDown", "Message": "later"}}, "UploadPart")

    with monkeypatch.context() as patch:
        patch.setattr(client, "upload_part", fail)
        with pytest.raises(StoreError, match="SlowDown, later"):
            store.put("big", b"x" * (11 << 20))
    assert store.found("") == []
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
