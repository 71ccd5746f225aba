"""`nanochat bench scale`: a row a step, what is counted in it, and what it refuses."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nanochat.engine.engine import Engine
from pipelines.bench import scale
from pipelines.bench.target import Own
from pipelines.service.web import make_app
from pipelines.service.worker import Worker
from tests.nanochat.test_bench import Here, check_shape
from tests.serving import CARD, ByteVocabulary, running, tiny_runner

TINY = ("--depth", "1", "--prompt", "8", "--new", "4", "--max-batch", "4", "--threads", "1")


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """A real engine behind uvicorn in place of the services; yields the replicas each was asked to have."""
    asked: list[tuple[int, int]] = []
    worker = Worker(Engine(tiny_runner(), max_batch=4))

    @contextmanager
    def served(own: Own, address: str | None) -> Iterator[str]:
        asked.append(own.capacity.replicas)
        assert own.capacity.cpus == 1, "--threads are shared by the replicas"
        with running(make_app(worker, ByteVocabulary(), CARD)) as url:
            yield url

    @contextmanager
    def watching() -> Iterator[scale._Watch]:
        watch = scale._Watch()
        monkeypatch.setattr(watch, "wait_for", lambda count: watch.seen.extend([(1e9, 1), (1e9 + 1, 2), (1e9 + 2, 2)]))
        yield watch

    for name, value in (("served", served), ("_watching", watching), ("Worker", Here), ("FULL_S", 0.5), ("IDLE", 5)):
        monkeypatch.setattr(scale, name, value)
    monkeypatch.setattr(scale, "SETTLE_S", 0.2)
    monkeypatch.setattr(scale, "_target", lambda own, url: scale.Target(url=url, model=CARD.id, vocabulary=200))
    before = signal.getsignal(signal.SIGINT)
    yield asked
    signal.signal(signal.SIGINT, before)
    worker.close()


def rows(capsys: pytest.CaptureFixture[str], *given: str) -> list[dict[str, Any]]:
    assert scale.main([*TINY, *given, "--json"], lambda: None) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_row_a_step(started: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]) -> None:
    low, high = rows(capsys, "--shares", "0.1", "0.3", "--seconds", "1")
    assert started == [(2, 2), (1, 1), (1, 2)], "what all serve, what one serves, then one that may become two"
    for row, share in ((low, 0.1), (high, 0.3)):
        check_shape(row, "scale", "s")
        assert row["share"] == share
        assert row["offered_requests_per_s"] == pytest.approx(share * row["served_requests_per_s"]["all"])
        assert row["requests"] == max(1, round(row["offered_requests_per_s"] * 1))
        assert row["errors"] == {}
        assert row["ratio"] == pytest.approx(row["idle_ttft_s"]["p99"] / row["settled_ttft_s"]["p99"])
    assert low["replicas"] == []
    assert [count for _, count in high["replicas"]] == [1, 2], "only where it changes"


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main([*TINY, "--threads", "2", "--shares", "0.2", "--seconds", "1"], lambda: None) == 0
    said = capsys.readouterr().out
    assert "step 1, load 0.2 of 2 replicas" in said
    assert "replicas: 1 from" in said
    assert "p99 of the time to the first token, without the first half minute" in said


@pytest.mark.parametrize("given", [("--replicas", "1"), ("--seconds", "0.1"), ("--context", "4")])
def test_what_cannot_be_is_refused(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scale.main([*TINY, *given], lambda: None)
    assert given[0] in capsys.readouterr().err
