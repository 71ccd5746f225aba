"""Parts of the decoding benchmark: processes, random weights, bytes of the bound, rows of text."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.bench.bound import Reader, kv_bytes, step_bytes
from nanochat.bench.setup import Load, RandomWeights, Setup
from nanochat.bench.texts import text_rows
from nanochat.bench.theirs import Transformers
from nanochat.bench.worker import Worker, in_turn
from nanochat.config import ModelConfig
from nanochat.data import heldout_batches
from nanochat.engine.sampler import SampleParams
from nanochat.files import Folder
from nanochat.flops import matrix_parameters
from nanochat.machine import process_peak_bytes
from nanochat.model import GPT
from nanochat.shards import Doc, write_shard
from nanochat.tokenizer import SPECIAL, SPLIT, Vocabulary
from tests.nanochat.sizes import small
from tests.reference.generate import generate

DEPTH_12 = ModelConfig(depth=12, context=512)


def setup(precision: str = "fp32", **change: Any) -> Setup:
    sizes: dict[str, Any] = {
        "config": DEPTH_12,
        "vocab_size": 32_768,
        "device": "cpu",
        "threads": 1,
        "kv_tokens": 640,
        "step_tokens": 512,
    }
    return Setup(precision=precision, **sizes | change)


@pytest.mark.parametrize(
    ("precision", "weight_mb", "batch", "kv_mb"),
    [("fp32", 440.4, 8, 188.7), ("bf16", 220.2, 1, 11.8), ("bf16", 220.2, 32, 377.5), ("int8", 110.1, 64, 755.0)],
)
def test_bytes_of_a_step(precision: str, weight_mb: float, batch: int, kv_mb: float) -> None:
    """Against the table of depth 12 at 320 tokens in the notes on inference, made by another program."""
    weight_bytes = matrix_parameters(DEPTH_12, 32_768) * {"fp32": 4, "bf16": 2, "int8": 1}[precision]
    assert weight_bytes / 1e6 == pytest.approx(weight_mb, abs=0.05)
    assert batch * 320 * kv_bytes(DEPTH_12, precision) / 1e6 == pytest.approx(kv_mb, abs=0.05)
    read = step_bytes(setup(precision, batch=batch), weight_bytes, batch * 320, shared=0)
    assert read / 1e6 == pytest.approx(weight_mb + kv_mb, abs=0.1)


def test_a_shared_prefix_is_read_once() -> None:
    alone = step_bytes(setup(batch=4), 0, 4 * 100, shared=0)
    shared = step_bytes(setup(batch=4), 0, 4 * 100, shared=40)  # two whole blocks of 16
    assert alone - shared == 3 * 32 * kv_bytes(DEPTH_12, "fp32")


def test_reading_is_measured() -> None:
    for native in (False, True):
        rates = Reader(setup(native=native)).rates(1 << 22)
        assert all(1e8 < rate < 1e13 for rate in rates.values())


def test_random_weights_are_a_models_and_stay_the_same() -> None:
    config = small(2)
    weights, again = (RandomWeights(config, 61) for _ in range(2))
    model = GPT(config, 61)
    model.load_state_dict(dict(weights))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert len({float(weight[0, 0]) for weight in weights.values()}) == len(weights)
    wide = RandomWeights(DEPTH_12, 512)["lm_head.weight"]
    assert wide.std().item() == pytest.approx(768**-0.5, rel=0.01)  # of 393,216: exact to 0.1%


def test_prompts_share_their_start_and_nothing_else() -> None:
    first, second = (Load(2, 30, 1, shared=10, seed=seed).prompts(50_000) for seed in (1, 2))
    assert torch.equal(first[0, :10], second[1, :10])
    rest = torch.cat((first, second))[:, 10:].flatten()
    assert len(set(rest.tolist())) == len(rest)


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_peer_has_the_same_weights_and_prompts(cache: Any) -> None:
    config = small(2)
    model = GPT(config, 61)
    model.load_state_dict(dict(RandomWeights(config, 61)))
    load = Load(3, 20, 2, seed=5)
    greedy = SampleParams(max_tokens=1, temperature=0)
    wanted = [generate(model, prompt, greedy)[0] for prompt in load.prompts(61).tolist()]
    run = Transformers(setup(config=config, vocab_size=61)).decode(load, cache)
    assert run.first == wanted
    assert (run.drawn, run.held) == (6, 3 * (20 + 1 + 0.5))


class Echo:
    """What the processes of these tests hold."""

    def __init__(self, word: str) -> None:
        if word == "wrong":
            raise ValueError("wrong is no word")
        self.word = word

    def say(self, number: int) -> tuple[str, int]:
        print("a library talks")
        return self.word, number

    def fail(self) -> None:
        raise RuntimeError("no such luck")

    def peak(self) -> int:
        return process_peak_bytes()

    def end(self) -> None:
        sys.exit(3)


def test_a_worker_answers_fails_and_ends() -> None:
    with Worker(Echo, "ours") as worker:
        assert worker.ask("say", 7) == ("ours", 7)
        with pytest.raises(RuntimeError, match="no such luck"):
            worker.ask("fail")
        assert worker.ask("say", 8) == ("ours", 8)
        assert (worker.cpu_seconds() or 0) > 0.01
        with pytest.raises(RuntimeError, match="the process of Echo ended with code 3"):
            worker.ask("end")
    with pytest.raises(ValueError, match="wrong is no word"):
        Worker(Echo, "wrong")


def test_a_workers_memory_is_its_own() -> None:
    held = np.ones(1 << 27)  # 1 GiB here
    with Worker(Echo, "ours") as worker:
        assert worker.ask("peak") < held.nbytes < process_peak_bytes()


class Busy:
    """A worker's face; `busy` seconds of processor time pass in it with every question to anybody."""

    asked: list[str]

    def __init__(self, name: str, busy: float, asked: list[str]) -> None:
        self.name, self.busy, self.asked = name, busy, asked

    def cpu_seconds(self) -> float:
        return self.busy * len(self.asked)


@pytest.mark.parametrize("busy", [0.0, 0.5])
def test_runs_alternate_and_a_busy_idler_is_told(busy: float, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    workers: list[Any] = [Busy("ours", 0.0, asked), Busy("theirs", busy, asked)]

    def run(worker: Any, number: int) -> int:
        asked.append(worker.name)
        return number

    assert in_turn(workers, run, 3) == [[0, 1, 2], [0, 1, 2]]
    assert asked == ["ours", "theirs"] * 3
    assert ("used 1.5 s of processor time" in capsys.readouterr().err) == bool(busy)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    ranks = {bytes([byte]): byte for byte in range(256)}
    vocab = Vocabulary(SPLIT, ranks, {name: 256 + n for n, name in enumerate(SPECIAL)})
    vocab.save(Folder(tmp_path))
    return vocab


def test_rows_of_a_text_hold_each_byte_once(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = tmp_path / "text.txt"
    path.write_text("é" * 150)
    rows = list(text_rows([path, path], tmp_path, 128))
    assert [len(row.tokens) for row in rows] == [128, 128, 44] * 2
    assert sum(int(row.sizes.sum()) for row in rows) == 600
    assert np.concatenate([row.targets for row in rows[:3]]).tolist() == list(path.read_bytes())
    assert rows[0].tokens[0] == vocabulary.special["<|bos|>"]
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        list(text_rows([path], tmp_path, 128))


def test_rows_of_shards_are_those_of_the_evaluation(tmp_path: Path, vocabulary: Vocabulary) -> None:
    bos, corpus = vocabulary.special["<|bos|>"], Folder(tmp_path)
    with pytest.raises(ValueError, match=r"no heldout-\*.parquet"):
        list(text_rows([tmp_path], tmp_path, 128))
    docs = [Doc([bos, *bytes([n]) * (40 * n)], 40 * n, name=str(n)) for n in range(1, 9)]
    write_shard(corpus, "heldout-00000.parquet", docs, vocabulary.size)
    rows = list(text_rows([tmp_path], tmp_path, 128))
    theirs = [(batch, sizes) for batch, sizes in heldout_batches(corpus, ["heldout-00000.parquet"], 128, 3)]
    assert sum(int(row.sizes.sum()) for row in rows) == sum(int(sizes.sum()) for _, sizes in theirs)
    targets = torch.cat([batch.targets.flatten() for batch, _ in theirs])
    assert np.concatenate([row.targets for row in rows]).tolist() == targets[targets >= 0].tolist()


def test_chats_are_refused(tmp_path: Path, vocabulary: Vocabulary) -> None:
    chat = Doc([vocabulary.special["<|bos|>"], 65, 66], 2, mask=[0, 1, 1])
    write_shard(Folder(tmp_path), "heldout-00000.parquet", [chat], vocabulary.size)
    with pytest.raises(ValueError, match="these shards hold chats"):
        list(text_rows([tmp_path], tmp_path, 128))
