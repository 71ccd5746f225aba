"""Batches against a slow reference, and what must hold whatever the ranks, the micro-batches and the past."""

import itertools
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import data as data_module
from nanochat.data import Batch, Index, TokenLoader, build_index, heldout_batches
from nanochat.files import Folder
from nanochat.shards import Doc, write_shard
from nanochat.tokenizer import SPECIAL, Vocabulary

BOS = 256
VOCAB = Vocabulary("(?s:.)", {bytes([b]): b for b in range(256)}, {name: 256 + n for n, name in enumerate(SPECIAL)})
CONTEXT = 16


def texts(seed: int, count: int) -> list[Doc]:
    """Documents whose tokens are all different from each other's, as far as pairs go: (document, place)."""
    draw = np.random.default_rng(seed)
    docs = []
    for _ in range(count):
        n = int(draw.integers(1, 50))
        docs.append(Doc([BOS, *draw.integers(0, 256, n - 1).tolist()], n - 1))
    return docs


def chats(seed: int, count: int) -> list[Doc]:
    draw = np.random.default_rng(seed)
    docs = texts(seed, count)
    return [Doc(d.tokens, d.bytes, draw.integers(0, 2, len(d.tokens)).tolist()) for d in docs]


@pytest.fixture
def files(tmp_path) -> Folder:
    folder = Folder(tmp_path)
    VOCAB.save(folder)
    for number in range(3):
        write_shard(folder, f"train-{number:05d}.parquet", texts(number, 300), VOCAB.size, window_tokens=200)
        write_shard(folder, f"chats-{number:05d}.parquet", chats(number, 300), VOCAB.size, window_tokens=200)
    return folder


def index_of(files: Folder, kind: str = "train") -> Index:
    return build_index(files, files.list(f"{kind}-"), CONTEXT, chat=kind == "chats")


def loader(files: Folder, kind: str = "train", rows: int = 8, **more) -> TokenLoader:
    return TokenLoader(files, index_of(files, kind), batch_tokens=rows * CONTEXT, seed=more.pop("seed", 5), **more)


def stack(batches: list[Batch]) -> list[tuple]:
    """Rows of batches as tuples of (tokens, targets, segments)."""
    return [
        (
            tuple(b.tokens[r].tolist()),
            tuple(b.targets[r].tolist()),
            None if b.segments is None else tuple(b.segments[r].tolist()),
        )
        for b in batches
        for r in range(len(b.tokens))
    ]


def epoch_rows(files: Folder, kind: str, seed: int = 5) -> list[tuple]:
    """All rows of the first epoch, one row a step."""
    one = loader(files, kind, rows=1, seed=seed)
    return [row for n in range(index_of(files, kind).rows) for row in stack(one.step(n)[0])]


def test_every_token_of_text_is_a_target_once_an_epoch(files) -> None:
    wanted: Counter = Counter()
    for seed in range(3):
        for doc in texts(seed, 300):
            wanted.update(zip(doc.tokens, [*doc.tokens[1:], BOS], strict=True))
    seen: Counter = Counter()
    for tokens, targets, segments in epoch_rows(files, "train"):
        assert segments is None
        seen.update((token, target) for token, target in zip(tokens, targets, strict=True) if target != -1)
        padding = [token for token, target in zip(tokens, targets, strict=True) if target == -1]
        assert padding == [BOS] * len(padding)
        assert -1 not in targets[: CONTEXT - len(padding)]
    assert seen == wanted


def test_texts_are_told_apart_on_request(files) -> None:
    """A document's tokens follow one another in their segment; neither tokens nor targets change."""
    masked = loader(files, rows=1, mask_documents=True)
    some = 0
    for number, (tokens, targets, segments) in enumerate(epoch_rows(files, "train")):
        assert segments is None
        ((row_tokens, row_targets, row_segments),) = stack(masked.step(number)[0])
        assert (row_tokens, row_targets) == (tokens, targets)
        assert [segment == 0 for segment in row_segments] == [target == -1 for target in targets]
        for at in range(CONTEXT - 1):
            inside = row_segments[at] == row_segments[at + 1]
            some += not inside
            if inside and targets[at] != -1:
                assert targets[at] == tokens[at + 1] != BOS
            elif row_segments[at + 1] not in (row_segments[at], 0):
                assert tokens[at + 1] == BOS or targets[at] != tokens[at + 1]
    assert some > 100


def slow_chat_rows(docs: list[Doc]) -> Counter:
    """Each chat that fits, as (tokens, targets), one position at a time."""
    rows = []
    for doc in docs:
        if len(doc.tokens) > CONTEXT:
            continue
        targets = [doc.tokens[i + 1] if doc.mask[i + 1] else -1 for i in range(len(doc.tokens) - 1)]
        rows.append((tuple(doc.tokens), (*targets, -1)))
    return Counter(rows)


def test_chats_are_whole_alone_and_count_where_their_mask_says(files) -> None:
    wanted = sum((slow_chat_rows(chats(seed, 300)) for seed in range(3)), Counter())
    seen: Counter = Counter()
    for tokens, targets, segments in epoch_rows(files, "chats"):
        for number, run in itertools.groupby(range(CONTEXT), key=segments.__getitem__):
            at = list(run)
            piece = tuple(tokens[i] for i in at), tuple(targets[i] for i in at)
            if number == 0:
                assert piece == ((BOS,) * len(at), (-1,) * len(at))
                assert at[-1] == CONTEXT - 1
            else:
                seen[piece] += 1
        used = [s for s in segments if s]
        assert used == sorted(used)
    assert seen == wanted


def slow_order(index: Index, seed: int, epoch: int) -> list[tuple[int, int]]:
    """(window, row) of an epoch, by its definition."""

    def mixed(size: int, purpose: int, group: int) -> list[int]:
        words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=[0, 0, purpose, group])
        drawn = words.random_raw(size).tolist()
        return sorted(range(size), key=drawn.__getitem__)

    windows = mixed(len(index.windows), 0, 0)
    order = []
    for group, start in enumerate(range(0, len(windows), 16)):
        rows = [(w, r) for w in windows[start : start + 16] for r in range(index.windows[w].rows)]
        order += [rows[i] for i in mixed(len(rows), 1, group)]
    return order


@pytest.mark.parametrize("kind", ["train", "chats"])
def test_steps_follow_the_slow_order_over_epochs(files, kind: str) -> None:
    index = index_of(files, kind)
    assert len(index.windows) > 40  # several groups
    rows = [row for epoch in range(3) for row in slow_order(index, 5, epoch)]
    windows: dict[tuple[int, int], tuple] = {}
    one = loader(files, kind, rows=1)
    for n, where in enumerate(slow_order(index, 5, 0)):
        (windows[where],) = stack(one.step(n)[0])
    many = loader(files, kind, rows=50)
    for n in range(2 * index.rows // 50):
        batches, count = many.step(n)
        wanted = [windows[where] for where in rows[n * 50 : (n + 1) * 50]]
        assert stack(batches) == wanted
        assert count == sum(target != -1 for _, targets, _ in wanted for target in targets)


@pytest.mark.parametrize("kind", ["train", "chats"])
@pytest.mark.parametrize("world", [2, 3, 4, 11])
def test_ranks_together_see_the_global_batch(files, kind: str, world: int) -> None:
    whole = loader(files, kind)
    ranks = [loader(files, kind, rank=rank, world=world, micro_batch=3) for rank in range(world)]
    for n in (0, 1, 30):
        batches, count = whole.step(n)
        parts = [rank.step(n) for rank in ranks]
        assert [row for part, _ in parts for row in stack(part)] == stack(batches)
        assert {told for _, told in parts} == {count}
        sizes = [sum(len(b.tokens) for b in part) for part, _ in parts]
        assert max(sizes) - min(sizes) <= 1
        assert [len(part) == 0 for part, _ in parts] == [size == 0 for size in sizes]
        assert all(len(b.tokens) <= 3 for part, _ in parts for b in part)


def test_two_ranks_see_the_micro_batches_of_one(files) -> None:
    one = loader(files, micro_batch=2).step(3)[0]
    two = [batch for rank in range(2) for batch in loader(files, micro_batch=2, rank=rank, world=2).step(3)[0]]
    assert len(one) == len(two) == 4
    assert all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) for a, b in zip(one, two, strict=True)
    )


def test_any_step_directly_or_by_walking(files) -> None:
    walker = loader(files)
    walked = [stack(walker.step(n)[0]) for n in range(60)]
    fresh = loader(files)
    for n in (59, 3, 4, 58, 0, 0):
        assert stack(fresh.step(n)[0]) == walked[n]
    far = 10**9
    assert stack(loader(files).step(far)[0]) == stack(fresh.step(far)[0])


def test_seeds_and_epochs_mix_differently(files) -> None:
    index = index_of(files)
    one = loader(files, rows=1)
    first = [stack(one.step(n)[0])[0] for n in range(index.rows)]
    second = [stack(one.step(index.rows + n)[0])[0] for n in range(index.rows)]
    other = epoch_rows(files, "train", seed=6)
    assert Counter(first) == Counter(second) == Counter(other)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < index.rows / 10
    assert sum(a == b for a, b in zip(first, other, strict=True)) < index.rows / 10


def test_a_batch_larger_than_the_data_goes_round(files) -> None:
    index = index_of(files)
    batches, _ = loader(files, rows=2 * index.rows + 3).step(0)
    assert sum(len(b.tokens) for b in batches) == 2 * index.rows + 3


def test_the_index_reads_lengths_alone(files, tmp_path) -> None:
    whole = index_of(files, "chats")
    for name in files.list("chats-"):
        told = pq.read_table(tmp_path / name, columns=["length"])
        groups = [
            pq.ParquetFile(tmp_path / name).metadata.row_group(g).num_rows
            for g in range(pq.read_metadata(tmp_path / name).num_row_groups)
        ]
        with pq.ParquetWriter(tmp_path / name, told.schema) as writer:
            start = 0
            for rows in groups:
                writer.write_table(told.slice(start, rows), row_group_size=rows)
                start += rows
    assert index_of(files, "chats") == whole
    assert Index.from_json(whole.to_json()) == whole


def test_waste_is_what_teaches_nothing(files) -> None:
    for kind in ("train", "chats"):
        index = index_of(files, kind)
        rows = epoch_rows(files, kind)
        docs = [d for seed in range(3) for d in (texts if kind == "train" else chats)(seed, 300)]
        dropped = sum(len(d.tokens) for d in docs if len(d.tokens) > CONTEXT) if kind == "chats" else 0
        kept = sum(len(d.tokens) for d in docs) - dropped
        assert index.tokens == kept + dropped
        assert index.dropped == dropped
        assert index.waste == pytest.approx(1 - kept / (len(rows) * CONTEXT + dropped))


def test_heldout_batches_cover_everything_once(files, monkeypatch) -> None:
    for kind in ("train", "chats"):
        names = files.list(f"{kind}-")
        whole = list(heldout_batches(files, names, CONTEXT, rows_per_batch=4))
        assert Counter(r for b, _ in whole for r in stack([b])) == Counter(epoch_rows(files, kind))
        parts = [list(heldout_batches(files, names, CONTEXT, 4, rank, 3)) for rank in range(3)]
        together = [pair for turn in itertools.zip_longest(*parts) for pair in turn if pair]
        assert [stack([b]) for b, _ in together] == [stack([b]) for b, _ in whole]
        for batch, sizes in whole:
            assert sizes.dtype == torch.int32
            assert torch.equal(sizes, ((batch.targets >= 0) & (batch.targets < 256)).int())
    text_bytes = sum(int(s.sum()) for _, s in heldout_batches(files, files.list("train-"), CONTEXT, 4))
    assert text_bytes == sum(d.bytes for seed in range(3) for d in texts(seed, 300))


def test_types_and_shapes(files) -> None:
    (batch, *_), count = loader(files, "chats", micro_batch=3).step(0)
    for tensor, dtype in ((batch.tokens, torch.int64), (batch.targets, torch.int64), (batch.segments, torch.int32)):
        assert tensor.shape == (3, CONTEXT)
        assert tensor.dtype == dtype
    assert isinstance(count, int)


def test_wrong_settings_are_refused(files) -> None:
    index = index_of(files)
    for wrong, said in (
        ({"batch_tokens": 100}, "batch_tokens is 100, not a multiple of context 16; use 96"),
        ({"batch_tokens": 8}, "use 16"),
        ({"batch_tokens": 32, "rank": 2, "world": 2}, "rank is 2; it must be from 0 to 1"),
        ({"batch_tokens": 32, "micro_batch": 0}, "micro_batch is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            TokenLoader(files, index, seed=1, **wrong)


def test_nothing_to_train_on_is_said(files) -> None:
    with pytest.raises(ValueError, match="nothing to train on: there are no shards"):
        build_index(files, [], CONTEXT, chat=False)
    write_shard(files, "long", [Doc([BOS] * 40, 1, [0] * 40)], VOCAB.size)
    with pytest.raises(ValueError, match="all 40 tokens are in chats longer than 16"):
        build_index(files, ["long"], CONTEXT, chat=True)
    with pytest.raises(ValueError, match="texts, not chats"):
        TokenLoader(files, build_index(files, files.list("train-"), CONTEXT, chat=True), batch_tokens=16, seed=1).step(
            0
        )


def test_shards_that_changed_or_broke_are_named(files, tmp_path) -> None:
    index = build_index(files, ["train-00000.parquet"], CONTEXT, chat=False)
    write_shard(files, "train-00000.parquet", texts(9, 300), VOCAB.size, window_tokens=200)
    with pytest.raises(ValueError, match=r"train-00000\.parquet changed since the index was made"):
        TokenLoader(files, index, batch_tokens=64 * CONTEXT, seed=1).step(0)
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train-00000\.parquet is damaged"):
        TokenLoader(files, index, batch_tokens=CONTEXT, seed=1).step(0)


def test_few_windows_are_kept(files, monkeypatch) -> None:
    """However long the run: no window is read twice in a group, and no more are held than two groups have."""
    reads: Counter = Counter()
    real = data_module.read_window

    def counted(folder: Folder, name: str, group: int) -> object:
        reads[name, group] += 1
        return real(folder, name, group)

    monkeypatch.setattr(data_module, "read_window", counted)
    one = loader(files, rows=4)
    index = index_of(files)
    for n in range(index.rows // 4):
        one.step(n)
    assert max(reads.values()) <= 3  # this epoch, ahead for it, and ahead for the next
