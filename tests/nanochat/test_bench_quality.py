"""`nanochat bench quality`: what nanochat's loader keeps and throws away, and a whole comparison in seconds."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.bench import quality
from nanochat.bench.cropping import BUFFER, CroppingLoader
from nanochat.files import Folder
from nanochat.shards import Doc, write_shard
from tests.nanochat.test_bench import Here
from tests.nanochat.test_data import BOS, VOCAB

CONTEXT = 15


def shards(folder: Path, lengths: list[int], name: str = "train-00000.parquet") -> Folder:
    """Documents of those lengths; the tokens of number n are BOS, then n repeated."""
    files = Folder(folder)
    write_shard(files, name, [Doc([BOS, *[n % 256] * (size - 1)], size - 1) for n, size in enumerate(lengths)], 265)
    return files


def rows(files: Folder, steps: int, **more: int) -> list[np.ndarray]:
    loader = CroppingLoader(files, files.list("train-"), CONTEXT, rows=more.get("rows", 2), micro_batch=1)
    made = [batch for _ in range(steps) for batch in loader.step()]
    return [np.append(batch.tokens[0].numpy(), batch.targets[0, -1].item()) for batch in made]


def test_a_row_takes_the_longest_that_fits_and_cuts_the_shortest(tmp_path: Path) -> None:
    files = shards(tmp_path, [5, 9, 30, 12] * BUFFER)  # more than the buffer, so all lengths are always at hand
    for row in rows(files, 20):
        begins = np.flatnonzero(row == BOS)
        # 16 places: 12 fits, then nothing fits into 4, so a document of 5 is cut
        assert np.diff([*begins, 16]).tolist() == [12, 4]


def test_all_places_are_filled_and_what_is_cut_is_counted(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 60, 500).tolist()
    files = shards(tmp_path, lengths)
    loader = CroppingLoader(files, files.list("train-"), CONTEXT, rows=4, micro_batch=2)
    batches = [batch for _ in range(10) for batch in loader.step()]
    assert [tuple(batch.tokens.shape) for batch in batches] == [(2, CONTEXT)] * 20
    assert all((batch.tokens[:, 1:] == batch.targets[:, :-1]).all() for batch in batches)
    assert loader.seen == 40 * (CONTEXT + 1)
    whole = Counter(lengths)
    assert loader.seen + loader.dropped <= sum(size * count for size, count in whole.items())
    assert loader.dropped > 0


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quality, "Worker", Here)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it takes half a minute
    files = shards(tmp_path, [20] * 300)
    shards(tmp_path, [17] * 20, "heldout-00000.parquet")
    VOCAB.save(files)
    monkeypatch.setattr(quality, "WARM_UP", 1)
    monkeypatch.setattr(quality, "TIMED", 2)
    given = ["--depth", "1", "--context", "128", "--batch-tokens", "256", "--micro-batch", "2", "--precision", "fp32"]
    picture = tmp_path / "curves.png"
    code = quality.main(
        [str(tmp_path), *given, "--minutes", "0.001", "--points", "3", "--plot", str(picture), "--json"]
    )
    assert code == 0
    row: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert row["ratio"] == pytest.approx(row["baseline_value"] / row["value"])
    assert row["below"] == pytest.approx(1 - 1 / row["ratio"])
    for side in (quality.OURS, quality.THEIRS):
        points = row["curves"][side]
        assert len(points) == 3
        assert points[-1]["tokens"] == row["steps"][side] * 256
        assert points[-1]["seconds"] == pytest.approx(row["seconds"][side])
        assert points[-1]["bits_per_byte"] < points[0]["bits_per_byte"] < 9
    assert 0 < row["dropped_share"] < 1
    assert picture.stat().st_size > 1000


def test_what_is_no_folder_of_shards_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        quality.main([str(tmp_path)])
    assert "heldout-*.parquet" in capsys.readouterr().err
