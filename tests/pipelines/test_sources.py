"""Sources: what a listing names, what reading gives, and what is said when a file is not as it should be."""

import builtins
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from nanochat.files import Folder
from pipelines import stdlib
from pipelines.documents import SourceError, SourceFile, SourceFileChangedError
from pipelines.sources import holdout_score, listing, materialise, read, sizes

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it is so."}]
TEXTS = [f"document {n}: naïve café\n" * (n + 1) for n in range(300)]


def write_parquet(path: Path, column: str, rows: list[object], **options: object) -> Path:
    pq.write_table(pa.table({column: rows, "other": list(range(len(rows)))}), path, **options)
    return path


def write_lines(path: Path, rows: list[object]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def one(path: Path) -> SourceFile:
    (file,) = listing(str(path), Path("/"))
    return file


def texts(path: Path, *part: int) -> list[str]:
    return [document.text for document in read(one(path), "text", *part)]


@pytest.fixture
def made(tmp_path) -> dict[str, Path]:
    """The same documents in each form."""
    rows = [{"text": text} for text in TEXTS]
    return {
        "parquet": write_parquet(tmp_path / "a.parquet", "text", TEXTS, row_group_size=70),
        "jsonl": write_lines(tmp_path / "b.jsonl", rows),
        "jsonl.gz": write_lines(tmp_path / "c.jsonl.gz", rows),
    }


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("part", [(), (0, 0), (0, 1), (69, 71), (70, 140), (299, 300), (13, None), (280, 1000)])
def test_any_part_of_a_file_can_be_read(made, kind: str, part: tuple[int, ...]) -> None:
    assert texts(made[kind], *part) == TEXTS[slice(*part) if part else slice(None)]


def test_names_are_the_source_s_own_or_file_and_row(tmp_path, made) -> None:
    assert [d.name for d in read(one(made["parquet"]), "text", 70, 72)] == ["a.parquet:71", "a.parquet:72"]
    named = write_lines(tmp_path / "n.jsonl", [{"text": "a", "name": "first"}, {"text": "b", "name": None}])
    assert [d.name for d in read(one(named), "text")] == ["first", "n.jsonl:2"]


def test_chats_in_parquet_and_jsonl(tmp_path) -> None:
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    for path in (
        write_parquet(tmp_path / "a.parquet", "messages", [CHAT, system]),
        write_lines(tmp_path / "b.jsonl", [{"messages": CHAT}, {"messages": system}]),
    ):
        found = list(read(one(path), "chat"))
        assert [d.messages for d in found] == [CHAT, system]
        assert [d.question for d in found] == ["Why?", "Why?"]
        assert list(sizes(one(path), "chat")) == [(21, holdout_score("Why?")), (30, holdout_score("Why?"))]


def test_sizes_count_bytes_and_score_the_text(made) -> None:
    told = list(sizes(one(made["jsonl.gz"]), "text"))
    assert [bytes_ for bytes_, _ in told] == [len(text.encode()) for text in TEXTS]
    for (_, score), text in zip(told, TEXTS, strict=True):
        assert score == pytest.approx(int(sha256(text.encode()).hexdigest()[:16], 16) / 2**64, abs=1e-15)
        assert 0 <= score < 1
    assert 0.02 < sum(holdout_score(str(n)) < 0.05 for n in range(2000)) / 2000 < 0.08


def test_a_text_file_is_one_document_until_it_is_long(tmp_path) -> None:
    paragraph = "A line of text, and\nanother one.\n\n"
    short = tmp_path / "short.txt"
    short.write_text(paragraph * 100)
    assert texts(short) == [paragraph * 100]
    long = tmp_path / "long.txt.gz"
    long.write_bytes(gzip.compress((paragraph * 40_000).encode()))
    pieces = texts(long)
    assert "".join(pieces) == paragraph * 40_000
    assert all(64_000 <= len(piece) < 64_000 + len(paragraph) for piece in pieces[:-1])
    assert all(piece.endswith("\n\n") for piece in pieces)
    exactly = tmp_path / "exactly.txt"
    exactly.write_text("x" * 999_999 + "\n")
    assert len(texts(exactly)) == 1
    solid = tmp_path / "solid.txt"
    solid.write_text("x" * 1_500_000)
    assert "".join(texts(solid)) == "x" * 1_500_000
    assert max(map(len, texts(solid))) <= 256_000
    odd = tmp_path / "odd.txt"
    odd.write_bytes(b"one\r\ntwo\rthree\n")
    assert texts(odd) == ["one\r\ntwo\rthree\n"]


def test_listing_is_sorted_and_relative_to_the_pipeline_file(tmp_path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "deep/er/d.jsonl", "a.txt", "[x].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def names(pattern: str) -> list[str]:
        return [str(Path(f.uri).relative_to(tmp_path)) for f in listing(pattern, tmp_path)]

    assert names("*.jsonl") == ["[x].jsonl", "a.jsonl", "b.jsonl"]
    assert names("?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("[!a].jsonl") == ["b.jsonl"]
    assert names("**/*.jsonl") == ["[x].jsonl", "a.jsonl", "b.jsonl", "deep/c.jsonl", "deep/er/d.jsonl"]
    assert names("*/*.jsonl") == ["deep/c.jsonl"]
    assert names("deep/*.jsonl") == ["deep/c.jsonl"]
    assert names("deep/../a.txt") == ["a.txt"]
    file = one(tmp_path / "a.txt")
    assert file == SourceFile(str(tmp_path / "a.txt"), 0, str(os.stat(tmp_path / "a.txt").st_mtime_ns))


def test_listing_says_what_is_missing_or_unknown(tmp_path) -> None:
    with pytest.raises(SourceError, match=r"nothing matches none/\*\.parquet"):
        listing("none/*.parquet", tmp_path)
    with pytest.raises(SourceError, match="nothing matches"):
        listing(".", tmp_path)
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(SourceError, match=r"data\.csv is of no known kind.*\.jsonl"):
        listing("data.*", tmp_path)


def test_a_file_that_changed_or_went_is_named(made) -> None:
    file = one(made["jsonl"])
    made["jsonl"].write_text('{"text": "new"}\n')
    with pytest.raises(SourceFileChangedError, match=r"b\.jsonl changed since the source was listed"):
        next(read(file, "text"))
    made["jsonl"].unlink()
    with pytest.raises(SourceFileChangedError, match=r"b\.jsonl was there .* gone"):
        next(read(file, "text"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_a_truncated_file_is_named(made, kind: str) -> None:
    data = made[kind].read_bytes()
    made[kind].write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=rf"\.{kind} is truncated or damaged"):
        texts(made[kind])


BAD_CHATS = [
    ([], "no user message"),
    (CHAT[:1], "the assistant says nothing"),
    (CHAT[1:], "role is 'assistant' where 'user' is due"),
    ([{"role": "user"}], "`role` and `content`"),
    ([{"role": "tool", "content": "x"}], "role is 'tool'"),
    ([{"role": "user", "content": 3}], "must be text, not int"),
    ("hello", "must be a list"),
]


@pytest.mark.parametrize(("messages", "said"), BAD_CHATS)
def test_a_row_that_is_no_chat_is_named(tmp_path, messages: object, said: str) -> None:
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": messages}])
    with pytest.raises(SourceError, match=rf"chats\.jsonl: row 2 is no chat: .*{said}"):
        list(read(one(path), "chat"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"text": "a"}\n{"tex": "b"}\n', "row 2 has no field `text`; it has: tex"),
        (b'{"text": "a"}\n{"text": 3}\n', "row 2 holds int where text is needed"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "row 2 holds half a character"),
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        (b'{"text": "a"}\n[1]\n', "line 2 is list"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, data: bytes, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"x.jsonl.*{said}") as caught:
        list(read(one(path), "text"))
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named(tmp_path) -> None:
    path = write_parquet(tmp_path / "x.parquet", "content", ["a"])
    with pytest.raises(SourceError, match=r"x\.parquet has no column `text`; it has: content, other"):
        texts(path)
    path = write_parquet(tmp_path / "y.parquet", "text", ["a", None])
    with pytest.raises(SourceError, match=r"y\.parquet: row 2 holds NoneType"):
        texts(path)
    (tmp_path / "z.txt").write_text("hello")
    with pytest.raises(SourceError, match="holds no chats"):
        list(read(one(tmp_path / "z.txt"), "chat"))


def test_reading_holds_little(tmp_path) -> None:
    path = tmp_path / "big.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for n in range(3000):
            file.write(json.dumps({"text": f"{n} " * 10_000}) + "\n")  # 150 MB of text
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom pipelines.sources import listing, sizes\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "(file,) = listing(sys.argv[1], Path('/'))\nnext(sizes(file, 'text'))\nbefore = peak()\n"
        "print(sum(b for b, _ in sizes(file, 'text')), peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    bytes_, grown = map(int, done.stdout.split())
    assert bytes_ > 130e6
    assert grown < 20  # MiB


class AddressedFolder(Folder):
    def uri(self, name: str) -> str:
        return str(self.path(name))


@pytest.mark.parametrize(("source", "form"), [("python-stdlib", "text"), ("python-stdlib-questions", "chat")])
def test_the_stdlib_is_written_once(tmp_path, monkeypatch, source: str, form: str) -> None:
    monkeypatch.setattr(stdlib, "documents", lambda: iter([("a.py", "text of a"), ("b.py", "text of b")]))
    monkeypatch.setattr(stdlib, "questions", lambda: iter([("topic:x", CHAT)]))
    (listed,) = listing(source, tmp_path)
    assert listed == SourceFile(source, 0, stdlib.identity())
    store = AddressedFolder(tmp_path)
    (file,) = materialise(source, store)
    assert file == one(Path(file.uri))
    assert list(read(file, form)) == list(read(listed, form))
    assert len(list(read(file, form, 0, 1))) == 1
    monkeypatch.setattr(stdlib, "documents", None)
    monkeypatch.setattr(stdlib, "questions", None)
    assert materialise(source, store) == [file]
    monkeypatch.setattr(stdlib, "identity", lambda: "another python")
    with pytest.raises(SourceFileChangedError, match="another python"):
        next(read(listed, form))
    with pytest.raises(TypeError):  # another Python writes a file of its own: it asks stdlib again
        materialise(source, store)


def test_the_stdlib_sources_know_their_format(tmp_path) -> None:
    (file,) = listing("python-stdlib", tmp_path)
    with pytest.raises(SourceError, match="python-stdlib-questions"):
        next(read(file, "chat"))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_s3(made, s3: str, monkeypatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="texts")
    for kind, path in made.items():
        client.upload_file(str(path), "texts", f"some/{kind}/{path.name}")
    files = listing("s3://texts/some/*/*", Path("/"))
    assert [f.uri for f in files] == [
        "s3://texts/some/jsonl.gz/c.jsonl.gz",
        "s3://texts/some/jsonl/b.jsonl",
        "s3://texts/some/parquet/a.parquet",
    ]
    assert [f.bytes for f in files] == [made[k].stat().st_size for k in ("jsonl.gz", "jsonl", "parquet")]
    assert listing("s3://texts/some/parquet/a.parquet", Path("/")) == files[2:]
    for file in files:
        assert [d.text for d in read(file, "text")] == TEXTS
        assert [d.text for d in read(file, "text", 65, 75)] == TEXTS[65:75]
    client.put_object(Bucket="texts", Key="some/jsonl/b.jsonl", Body=b'{"text": "new"}\n')
    with pytest.raises(SourceFileChangedError, match=r"s3://texts/some/jsonl/b\.jsonl changed"):
        next(read(files[1], "text"))
    client.delete_object(Bucket="texts", Key="some/jsonl/b.jsonl")
    with pytest.raises(SourceFileChangedError, match=r"gone"):
        next(read(files[1], "text"))
    with pytest.raises(SourceError, match=r"nothing matches s3://texts/none/\*"):
        listing("s3://texts/none/*", Path("/"))
    with pytest.raises(SourceError, match="s3://no-such-bucket"):
        listing("s3://no-such-bucket/x/*.jsonl", Path("/"))


def test_hugging_face_is_an_extra(monkeypatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: object, **more: object) -> object:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SourceError, match=r"pip install 'nanochat-ray\[hf\]'"):
        listing("hf://datasets/someone/texts/*.parquet", Path("/"))


def test_hugging_face(made, monkeypatch) -> None:
    """Against a stand-in with HfFileSystem's face, since there is no network: what is tested is what we do with it."""
    folder = made["parquet"].parent

    class Stored:
        def info(self, path: str) -> dict[str, object]:
            data = (folder / Path(path).name).read_bytes()
            return {"name": path, "size": len(data), "type": "file", "blob_id": sha256(data).hexdigest()}

        def exists(self, path: str) -> bool:
            return (folder / Path(path).name).exists()

        def glob(self, pattern: str, detail: bool) -> dict[str, dict[str, object]]:
            assert pattern == "datasets/someone/texts/*"
            assert detail
            paths = [f"datasets/someone/texts/{p.name}" for p in folder.iterdir()]
            return {p: self.info(p) for p in paths}

        def open(self, path: str, mode: str) -> object:
            return (folder / Path(path).name).open(mode)

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Stored)
    files = listing("hf://datasets/someone/texts/*", Path("/"))
    assert [f.uri for f in files] == [
        f"hf://datasets/someone/texts/{n}" for n in ("a.parquet", "b.jsonl", "c.jsonl.gz")
    ]
    for file in files:
        assert [d.text for d in read(file, "text")] == TEXTS
    made["jsonl"].write_text("{}")
    with pytest.raises(SourceFileChangedError, match=r"hf://datasets/someone/texts/b\.jsonl changed"):
        next(read(files[1], "text"))
