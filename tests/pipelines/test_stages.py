"""What stages decide before anything is distributed."""

from importlib import import_module

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.documents import SourceFile
from pipelines.spec import stage_classes
from pipelines.stages import STAGES
from pipelines.stages.tokenize import cut


@given(st.lists(st.lists(st.integers(0, 50), max_size=30), min_size=1, max_size=6), st.integers(1, 120))
def test_shards_are_runs_of_whole_documents_in_the_order_of_the_source(sizes: list[list[int]], full: int) -> None:
    files = [SourceFile(f"/{number}.jsonl", 0, "") for number in range(len(sizes))]
    shards = cut(files, [np.array(s, dtype=np.int64) for s in sizes], full)
    covered = [(span.file.uri, n) for shard in shards for span in shard.spans for n in range(span.start, span.stop)]
    assert covered == [(file.uri, n) for file, s in zip(files, sizes, strict=True) for n in range(len(s))]
    assert [shard.number for shard in shards] == list(range(len(shards)))
    text = [
        sum(sizes[files.index(span.file)][n] for span in shard.spans for n in range(span.start, span.stop))
        for shard in shards
    ]
    assert all(t >= full for t in text[:-1])
    for shard, total in zip(shards, text, strict=True):
        last = shard.spans[-1]
        assert total - sizes[files.index(last.file)][last.stop - 1] < full, "a shard goes on after it is full"


def test_every_kind_that_a_file_may_name_can_be_run() -> None:
    assert set(STAGES) == set(stage_classes().values())
    for target in STAGES.values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))
