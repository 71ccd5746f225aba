"""Token shards: what is written is read, and a shard that is damaged is named."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from nanochat.files import Folder
from nanochat.shards import Doc, read_documents, read_lengths, read_window, write_shard


def made(lengths: list[int], *, chat: bool = False, top: int = 500) -> list[Doc]:
    draw = np.random.default_rng(3)
    return [
        Doc(
            tokens=[9, *draw.integers(0, top, n - 1).tolist()],
            bytes=3 * n,
            mask=draw.integers(0, 2, n).tolist() if chat else None,
            name=f"doc {number}",
        )
        for number, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_written_is_read(tmp_path, chat: bool) -> None:
    files = Folder(tmp_path)
    docs = made([3, 1, 700, 20, 50, 400, 2], chat=chat)
    file = write_shard(files, "train-00000.parquet", docs, 500, window_tokens=100)
    assert file.path == "train-00000.parquet"
    found = list(read_documents(files, [file.path]))
    assert [(d.tokens.tolist(), d.bytes, d.name) for d in found] == [(d.tokens, d.bytes, d.name) for d in docs]
    assert [None if d.mask is None else d.mask.astype(int).tolist() for d in found] == [d.mask for d in docs]


def test_windows_are_full_and_the_last_takes_the_remainder_in(tmp_path) -> None:
    files = Folder(tmp_path)
    write_shard(files, "a", made([60, 60, 99, 1, 100, 99]), 500, window_tokens=100)
    assert [lengths.tolist() for lengths in read_lengths(files, "a")] == [[60, 60], [99, 1], [100, 99]]
    write_shard(files, "b", made([30, 40]), 500, window_tokens=100)
    assert [lengths.tolist() for lengths in read_lengths(files, "b")] == [[30, 40]]
    window = read_window(files, "a", 1)
    assert window.lengths.tolist() == [99, 1]
    assert window.tokens.tolist() == [t for doc in made([60, 60, 99, 1])[2:] for t in doc.tokens]
    with pytest.raises(ValueError, match="a has 3 windows, but window 3"):
        read_window(files, "a", 3)


def test_the_smallest_integers_that_fit(tmp_path) -> None:
    files = Folder(tmp_path)
    for vocab_size, name in ((1 << 16, "uint16"), ((1 << 16) + 1, "uint32")):
        write_shard(files, name, [Doc([0, vocab_size - 1], 1)], vocab_size)
        schema = pq.read_schema(tmp_path / name)
        assert str(schema.field("tokens").type.value_type) == name
        assert schema.names == ["tokens", "length", "bytes", "name"]
        (doc,) = read_documents(files, [name])
        assert doc.tokens.tolist() == [0, vocab_size - 1]


def test_the_same_documents_make_the_same_bytes(tmp_path) -> None:
    files = Folder(tmp_path)
    one, two = (write_shard(files, name, iter(made([50] * 40)), 500, 300) for name in "ab")
    assert one.sha256 == two.sha256


@pytest.mark.parametrize(
    ("docs", "said"),
    [
        ([], "a: a shard needs at least one document"),
        ([Doc([1, 500], 1)], "token 500 is not in a vocabulary of 500"),
        ([Doc([1, -1], 1)], "not in a vocabulary of 500"),
        ([Doc([1, 2], 1, mask=[0], name="me")], "'me' has 2 tokens, but a mask of 1"),
        ([Doc([1, 2], 1), Doc([1], 1, mask=[0])], "a chat among texts"),
        ([Doc([1, 2], 1), Doc([], 0)], "is empty"),
    ],
)
def test_wrong_documents_are_refused(tmp_path, docs: list[Doc], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_shard(Folder(tmp_path), "a", docs, 500)
    assert not (tmp_path / "a").exists()


def test_every_damage_is_named(tmp_path) -> None:
    files = Folder(tmp_path)
    write_shard(files, "train-00000.parquet", made([300] * 20), 500, window_tokens=1000)
    path = tmp_path / "train-00000.parquet"
    data = path.read_bytes()
    for damaged in (
        data[:-100],
        data[: len(data) // 2],
        b"",
        b"no parquet at all",
        data[:20] + b"\x55" * 8 + data[28:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-00000\.parquet is damaged"):
            list(read_documents(files, [path.name]))
    with pytest.raises(FileNotFoundError, match=r"train-00001\.parquet"):
        read_lengths(files, "train-00001.parquet")


def test_lengths_that_lie_are_found(tmp_path) -> None:
    files = Folder(tmp_path)
    write_shard(files, "a", made([3, 4]), 500)
    table = pq.read_table(tmp_path / "a")
    wrong = table.set_column(1, "length", table["length"].combine_chunks().take([1, 0]))
    pq.write_table(wrong, tmp_path / "a")
    with pytest.raises(ValueError, match="a is damaged: its lengths"):
        read_window(files, "a", 0)


def test_no_flipped_bit_is_read_as_if_it_were_right(tmp_path) -> None:
    files = Folder(tmp_path)
    docs = made([300] * 20)
    write_shard(files, "a", docs, 500, window_tokens=1000)
    data = (tmp_path / "a").read_bytes()
    found = 0
    for at in range(4, len(data), 97):
        (tmp_path / "a").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            read = [doc.tokens.tolist() for doc in read_documents(files, ["a"])]
        except ValueError as error:
            assert "a is damaged" in str(error)  # noqa: PT017  not every bit matters, so not every one must raise
            found += 1
        else:
            assert read == [doc.tokens for doc in docs]
    assert found > 50
