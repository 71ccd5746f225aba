"""`nanochat bench serve`: what it prints, what it refuses, and that each option does something."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.checkpoint import open_weights
from nanochat.config import ModelConfig
from nanochat.engine.engine import Engine
from nanochat.engine.runner import make_runner
from nanochat.engine.sampler import SampleParams
from nanochat.tokenizer import Vocabulary
from pipelines.bench import serve
from pipelines.bench.asked import Asked, Load, prompt_tokens
from pipelines.bench.bare import Bare, BareSetup
from pipelines.bench.options import options, settle
from pipelines.bench.outcome import Outcome
from pipelines.bench.target import own_bundle
from pipelines.service.web import make_app
from pipelines.service.worker import Worker
from tests.commands import ROOT
from tests.nanochat.test_bench import Here, check_shape
from tests.pipelines.streams import Fake, faking, stream, whole
from tests.serving import CARD, ByteVocabulary, running, tiny_runner

SHORT = ("--threads", "1", "--prompt", "12", "--new", "6", "--runs", "2")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(serve, "Worker", Here)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def bench(*given: str) -> int:
    return serve.main([*SHORT, *given], lambda: None)


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """A real engine with a model that draws at random, behind uvicorn."""
    worker = Worker(Engine(tiny_runner(), max_batch=4))
    with running(make_app(worker, ByteVocabulary(), CARD)) as url:
        yield url
    worker.close()


def rows(capsys: pytest.CaptureFixture[str], *given: str) -> list[dict[str, Any]]:
    assert bench(*given, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_line_a_load(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    closed, opened = rows(capsys, engine, "--clients", "3", "--load", "0.5", "--requests", "12", "--commit", "abc")
    check_shape(closed, "serve")
    check_shape(opened, "serve", "s")
    for row in (closed, opened):
        assert (row["commit"], row["model"], row["runs"], row["url"]) == ("abc", CARD.id, 2, engine)
        assert (row["requests"], row["errors"]) == (24, {})
        assert row["ttft_s"]["p50"] <= row["ttft_s"]["p90"] <= row["ttft_s"]["p99"] <= row["latency_s"]["max"]
        assert row["client_cpu_share"] > 0
        assert row["slo"] == {"ttft_s": 1.0, "per_token_s": 0.1}
    assert (closed["case"], closed["clients"], closed["loop"]) == ("3 clients, 12 + 6 tokens", 3, "closed")
    assert opened["min"] <= opened["ttft_s"]["p50"] <= opened["max"], "the median of all lies between those of the runs"
    capacity = closed["reply_tokens_per_s"] + closed["prompt_tokens_per_s"]
    assert opened["offered_requests_per_s"] == pytest.approx(0.5 * capacity / 18)
    assert 0 <= opened["sent_late_s"]["p50"] < 0.5


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with faking(Fake(lambda number, body: stream(body, 0.02, 0.01))) as url:
        assert bench(url, "--clients", "2", "--requests", "6", "--slo-ttft", "1", "--slo-tpot", "1") == 0
    out = capsys.readouterr().out
    assert "2 clients, 12 + 6 tokens: 12 requests, 0 with an error" in out
    assert re.search(r"time between tokens +[12]\d\.\d", out)
    assert "goodput 0 requests/s: first token within 1 ms, 1 ms a token" in out
    assert re.search(r"the client used [\d.]+% of a core, \d+ microseconds a token", out)


def test_errors_are_told_with_the_services_words(capsys: pytest.CaptureFixture[str]) -> None:
    full = [(0.0, whole(b'{"error": {"message": "too many"}}', "429 Too Many Requests", "Retry-After: 0\r\n"))]
    with faking(Fake(lambda number, body: full if number % 2 else stream(body))) as url:
        [row] = rows(capsys, url, "--clients", "1", "--requests", "6")
        assert row["errors"] == {"429": 6}
        assert bench(url, "--clients", "1", "--requests", "6") == 0
    assert "429: 6 times; too many" in capsys.readouterr().out
    with faking(Fake(lambda number, body: full)) as url:
        assert bench(url, "--clients", "1", "--requests", "3") == 1
    said = capsys.readouterr().err
    assert "not one reply came; 6 times an error, first 429: " in said
    assert "too many" in said


def test_short_replies_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with faking(Fake(lambda number, body: stream({**body, "max_tokens": min(2, body["max_tokens"])}))) as url:
        [row] = rows(capsys, url, "--rate", "50", "--requests", "5")
    assert (row["short_replies"], row["requests"], row["loop"]) == (10, 10, "open")


def test_a_trace_is_fitted_and_slowed_down(tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    path = tmp_path / "chat.jsonl"
    lines = [{"timestamp": 20 * n, "input_length": 500 + n, "output_length": 100} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    closed, opened = rows(capsys, engine, "--trace", str(path), "--load", "0.5", "--requests", "20", "--clients", "2")
    assert closed["case"] == "2 clients, lengths of chat"
    assert (opened["requests"], opened["runs"], opened["errors"]) == (40, 1, {})
    assert opened["token_scale"] == pytest.approx((CARD.context - 2) / 639)
    mean = (500 + 19.5 + 100) * opened["token_scale"]
    capacity = closed["reply_tokens_per_s"] + closed["prompt_tokens_per_s"]
    assert opened["offered_requests_per_s"] == pytest.approx(0.5 * capacity / mean, rel=0.02)
    assert opened["time_scale"] == pytest.approx(50 / opened["offered_requests_per_s"])
    [alone] = rows(capsys, engine, "--trace", str(path), "--minutes", "0.0065", "--scale-time", "2")
    assert (alone["requests"], alone["time_scale"]) == (20, 2)
    assert alone["seconds"] >= 2 * 0.38


def test_a_chat_is_asked_in_words_of_the_length_asked_for(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte is a token in this vocabulary, and a word has six letters and a space."""
    with pytest.raises(SystemExit):
        bench(engine, "--chat", "--prompt", "124")
    assert "context" in capsys.readouterr().err
    [row] = rows(capsys, engine, "--chat", "--rate", "40", "--requests", "8", "--prompt", "75")
    assert row["errors"] == {}
    assert row["prompt_tokens_per_s"] / row["requests_per_s"] == pytest.approx(75, abs=3.5)  # half a word


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "load.svg"
    with faking(Fake()) as url:
        assert bench(url, "--clients", "2", "--requests", "6", "--plot", str(path)) == 0
    assert ET.parse(path).getroot().tag.endswith("svg")
    assert len(path.read_bytes()) > 5000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("http://x", "--depth", "2"), "leave out --depth"),
        (("--chat", "--key", "a"), "--key, --chat: for a service that is there; add its URL"),
        (("http://x", "--rate", "2", "--clients", "3"), "--rate is an open loop by itself"),
        (("http://x", "--minutes", "2"), "--minutes is about a trace"),
        (("http://x", "--trace", "a", "--load", "1", "--scale-time", "2"), "leave out --scale-time"),
        (("http://x", "--seconds", "2", "--requests", "3"), "give one of them"),
        (("http://x", "--plot", "a.jpeg"), "ends with .svg, .png or .pdf"),
        (("http://x", "--shared", "12"), "--shared is 12, but a prompt has 12 tokens"),
        (("--context", "10"), "--context is 10, but a prompt and its reply have 18 tokens; use 128"),
        (("--vocabulary", "99"), "--vocabulary is 99; use 266 to"),
        (("--rate", "0"), "'0' is not a number above 0"),
        (("http://x", "--trace", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_options_that_cannot_be(given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench(*given)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with faking(Fake(models=())) as url:
        assert bench(url) == 1
        assert "lists no model" in capsys.readouterr().err
    assert bench(url) == 1
    assert f"nobody answers at {url}" in capsys.readouterr().err
    assert bench("ftp://a") == 1
    assert "it begins with http://" in capsys.readouterr().err
    with faking(Fake()) as url:
        assert bench(url, "--model", "other") == 1
        assert "--model is 'other', but" in capsys.readouterr().err


def own(**more: Any) -> Namespace:
    args = options().parse_args(
        [*SHORT, "--depth", "1", "--vocabulary", "300", "--clients", "3", "--precision", "fp32"]
    )
    settle(args)
    for name, value in more.items():
        setattr(args, name, value)
    return args


def test_random_weights_never_say_stop_and_speak_text() -> None:
    """Of 300 tokens nine are special and 128 are parts of characters; 600 greedy ones hold none of them."""
    with own_bundle(own()) as made, open_weights(made.bundle.files) as (config, vocab_size, weights):
        vocabulary = Vocabulary.load(made.bundle.files)
        runner = make_runner(config, vocab_size, weights, kv_tokens=1024, precision="fp32", threads=1)
    assert vocabulary.size == vocab_size == made.vocabulary + len(vocabulary.special)
    engine = Engine(runner)
    for seed in range(20):
        engine.add(prompt_tokens(Load(asked=(Asked(9, 1),)), seed, made.vocabulary), SampleParams(30, temperature=0))
    drawn = [token for _ in range(100) for output in engine.step() for token in output.tokens]
    assert len(drawn) == 600
    assert max(drawn) < made.vocabulary
    assert vocabulary.decode_bytes(drawn).isascii()


def most_at_once(outcome: Outcome) -> int:
    marks = [(r.sent_s, 1) for r in outcome.replies] + [(r.end_s, -1) for r in outcome.replies]
    return max(itertools.accumulate(step for _, step in sorted(marks)))


def test_the_bare_engine_gives_every_reply_its_length() -> None:
    args = own()
    assert args.config == ModelConfig(depth=1, context=128)
    with own_bundle(args) as made:
        files, dtype = made.bundle.files, made.bundle.dtype
        bare = Bare(BareSetup(files=files, dtype=dtype, capacity=made.capacity, vocabulary=made.vocabulary))
        closed = bare.run(Load(asked=(Asked(12, 6),), clients=3, requests=15))
        timed = bare.run(Load(asked=(Asked(12, 60),), clients=3, seconds=0.5))
        opened = bare.run(Load(asked=tuple(Asked(12, 6, at_s=0.03 * number) for number in range(10))))
    assert [reply.tokens for reply in closed.good] == [len(reply.times) for reply in closed.good]
    assert sorted(reply.tokens for reply in closed.good) == [2, 4, *[6] * 13]
    assert (most_at_once(closed), most_at_once(timed)) == (3, 3)
    assert closed.window_s <= closed.wall_s
    assert timed.window_s == 0.5 < timed.wall_s
    assert all(reply.due_s < 0.5 for reply in timed.replies)
    assert [reply.due_s for reply in opened.replies] == pytest.approx([0.03 * number for number in range(10)])
    assert all(0 <= reply.sent_s - reply.due_s < 0.4 for reply in opened.replies)
    assert opened.wall_s >= 0.27


def test_ctrl_c_prints_what_there_is() -> None:
    fake = Fake(lambda number, body: stream(body, 0.0, 0.01))
    with faking(fake) as url:
        command = [sys.executable, "-m", "pipelines.cli", "bench", "serve", url, "--clients", "2", "--seconds", "300"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        end = time.monotonic() + 60
        while len(fake.asked) < 8:  # two of them to warm up, two whole replies
            assert time.monotonic() < end, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "2 clients, 256 + 128 tokens" in out
    assert err.strip().endswith("interrupted; above is what there was")
    assert "Traceback" not in err


@pytest.mark.ray
@pytest.mark.slow
def test_our_own_service_beside_the_bare_engine(tmp_path: Path) -> None:
    """The whole, in processes of their own."""
    given = ["--depth", "1", "--seconds", "2", "--runs", "1", "--clients", "4", "--load", "0.5", *SHORT[:6]]
    command = [sys.executable, "-m", "pipelines.cli", "bench", "serve", *given, "--json", "--plot", f"{tmp_path}/a.svg"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    closed, opened = map(json.loads, done.stdout.splitlines())
    check_shape(closed, "serve")
    assert closed["baseline"] == opened["baseline"] == "bare engine"
    for row in (closed, opened, closed["engine"], opened["engine"]):
        assert (row["errors"], row["short_replies"]) == ({}, 0)
    assert closed["baseline_value"] == pytest.approx(closed["engine"]["reply_tokens_per_s"])
    assert opened["added_ttft_s"]["p50"] == opened["ttft_s"]["p50"] - opened["engine"]["ttft_s"]["p50"]
    assert opened["ratio"] is None
    assert (tmp_path / "a.svg").exists()
