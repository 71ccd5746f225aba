"""The load generator against services whose every byte and delay is scripted."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.bench.asked import Asked, Load, poisson, prompt_tokens, prompt_words
from pipelines.bench.connection import Connection, Stream
from pipelines.bench.load import Client, Target
from pipelines.bench.outcome import Outcome
from pipelines.service.web import make_app
from tests.pipelines.streams import DONE, HEAD, Fake, Parts, chunk, event, faking, piece, stream, usage, whole
from tests.serving import CARD, ByteVocabulary, Scripted, running

ONE = (Asked(5, 4),)


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def client(url: str, **more: Any) -> Client:
    return Client(Target(url=url, model="fake", vocabulary=50, **more))


def ask(answer: Callable[[int, dict[str, Any]], Parts], load: Load | None = None, **more: Any) -> Outcome:
    with faking(Fake(answer)) as url:
        return client(url, **more).run(load or Load(asked=ONE, clients=1, requests=1))


def kinds(outcome: Outcome) -> list[str | None]:
    return [reply.wrong for reply in outcome.replies]


BODY = b"".join([piece(""), piece("a\\n\\ndata: b"), piece("\u00e9"), piece("", "stop"), usage(3, 9), DONE])


@given(cuts=st.lists(st.integers(1, len(BODY) - 1)), reads=st.lists(st.integers(1, 4 * len(BODY))))
def test_chunks_and_reads_may_be_cut_anywhere(cuts: list[int], reads: list[int]) -> None:
    borders = [0, *sorted(set(cuts)), len(BODY)]
    wire = HEAD + b"".join(chunk(BODY[a:b]) for a, b in pairwise(borders)) + b"0\r\n\r\n"
    places = [0, *sorted({read for read in reads if read < len(wire)}), len(wire)]
    took = Stream()

    async def read() -> None:
        connection = Connection()
        connection.connection_made(Mock(asyncio.Transport))
        ended = connection.ask(b"", took)
        for a, b in pairwise(places):
            assert not ended.done()
            connection.data_received(wire[a:b])
        assert ended.done()

    asyncio.run(read())
    assert (took.status, took.done) == (200, True)
    assert took.end()[-1]["usage"]["completion_tokens"] == 9
    assert len(took.times) == 2, "neither the empty first piece nor finish and usage hold text"


def test_a_read_has_one_time() -> None:
    took = Stream()
    took.status = 200
    took.feed(1.0, piece("a") + piece("b"))
    took.feed(3.0, piece("c") + DONE)
    took.end()
    assert list(took.times) == [1.0, 1.0, 3.0]


def test_a_reply_that_is_one_token_without_text_has_a_time() -> None:
    took = Stream()
    took.status = 200
    took.feed(4.0, piece("", "stop") + usage(3, 1) + DONE)
    took.end()
    assert list(took.times) == [4.0]


@pytest.mark.parametrize("lines", [b"\n", b"\r\n"])
def test_a_chat_begins_with_its_first_text(lines: bytes) -> None:
    took = Stream()
    took.status = 200
    for now, delta in enumerate([{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]):
        took.feed(now, event({"choices": [{"delta": delta}]}).replace(b"\n", lines))
    took.feed(9, b": ping" + lines * 2)
    took.end()
    assert list(took.times) == [1, 2]


def test_known_delays_give_known_times() -> None:
    outcome = ask(lambda number, body: stream(body, 0.08, 0.03), Load(asked=(Asked(5, 6),), clients=1, requests=5))
    long = [reply for reply in outcome.good if reply.new == 6]
    assert len(outcome.good) == 5
    for reply in long:
        assert (reply.tokens, len(reply.times), reply.prompt) == (6, 6, 5)
        assert 0.08 <= reply.ttft_s < 0.23  # a sleep is never short; a busy machine makes it longer
        assert 0.23 <= reply.end_s - reply.due_s < 0.6
        assert 0.02 <= reply.per_token_s < 0.08  # the first token may have been read late
    assert 6 / 0.6 < outcome.tokens_per_s <= 6 / 0.23


def test_a_closed_loop_keeps_its_clients_busy_and_no_more() -> None:
    fake = Fake(lambda number, body: stream(body, 0.02, 0.005))
    with faking(fake) as url:
        outcome = client(url).run(Load(asked=(Asked(5, 8),), clients=4, requests=24))
    assert (len(outcome.good), fake.most, fake.connections) == (24, 4, 4)
    assert [body["max_tokens"] for body in fake.asked[:4]] == [2, 4, 6, 8], "clients begin out of step"
    assert {body["max_tokens"] for body in fake.asked[4:]} == {8}
    assert len({tuple(body["prompt"]) for body in fake.asked}) == 24


def test_a_closed_loop_ends_by_the_clock_and_lets_replies_end() -> None:
    outcome = ask(lambda number, body: stream(body, 0.0, 0.1), Load(asked=(Asked(5, 4),), clients=1, seconds=0.5))
    assert outcome.window_s == 0.5
    assert max(reply.due_s for reply in outcome.replies) < 0.5 < outcome.replies[-1].end_s
    assert all(reply.tokens == reply.new for reply in outcome.good)


def test_an_open_loop_waits_for_nobody() -> None:
    times = tuple(Asked(5, 2, at_s=0.02 * number) for number in range(20))
    fake = Fake(lambda number, body: stream(body, 0.8))
    with faking(fake) as url:
        outcome = client(url).run(Load(asked=times))
    assert (len(outcome.good), fake.most) == (20, 20)
    assert 0.3 < fake.at[-1] - fake.at[0] < 0.8, "the last was asked before the first was answered"
    assert [reply.due_s for reply in outcome.replies] == [one.at_s for one in times]
    assert all(0 <= reply.sent_s - reply.due_s < 0.4 for reply in outcome.replies)
    assert all(0.8 <= reply.ttft_s < 1.5 for reply in outcome.replies)


def test_errors_by_kind() -> None:
    head = [(0.0, HEAD), (0.0, chunk(piece("a")))]
    answers: list[Parts] = [
        [(0, whole(b'{"error": {"message": "no"}}', "500 Internal Server Error"))],
        [*head, (0, chunk(event({"error": {"code": "replica_lost", "message": "gone"}})) + b"0\r\n\r\n")],
        [*head, (0, b"0\r\n\r\n")],
        [(0, HEAD), (0, chunk(b"data: {\n\n" + DONE) + b"0\r\n\r\n")],
        [(0, HEAD), (0, chunk(usage(5, 0) + DONE) + b"0\r\n\r\n")],
        [(0, b"SSH-2.0\r\n\r\n")],
        [*head, (9, b"")],
    ]
    times = tuple(Asked(5, 4, at_s=0.1 * number) for number in range(len(answers)))
    outcome = ask(lambda number, body: answers[number], Load(asked=times), timeout_s=1)
    wanted = ["500", "error event replica_lost", "broken stream", "no JSON", "no text", "broken connection", "timeout"]
    assert kinds(outcome) == wanted
    assert outcome.replies[0].said == "no"
    assert outcome.tokens_per_s == 0


def test_a_stream_that_breaks_off_and_a_service_that_is_gone() -> None:
    broken = Fake(lambda number, body: [(0, HEAD), (0, chunk(piece("a")))], hang_up=True)
    with faking(broken) as url:
        assert kinds(client(url).run(Load(asked=ONE, clients=1, requests=1))) == ["broken stream"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert kinds(client(f"http://127.0.0.1:{port}").run(Load(asked=ONE))) == ["connection refused"]


def test_a_client_that_is_refused_waits_as_it_is_told() -> None:
    full = whole(b"{}", "429 Too Many Requests", "Retry-After: 0.3\r\n")
    fake = Fake(lambda number, body: [(0, full)] if number == 0 else stream(body))
    with faking(fake) as url:
        outcome = client(url).run(Load(asked=ONE, clients=1, requests=2))
    assert kinds(outcome) == ["429", None]
    assert 0.3 <= fake.at[1] - fake.at[0] < 0.9


def test_a_connection_that_the_service_closed_is_made_anew() -> None:
    fake = Fake(hang_up=True)
    with faking(fake) as url:
        outcome = client(url).run(Load(asked=ONE, clients=1, requests=3))
    assert (kinds(outcome), fake.connections) == ([None] * 3, 3)


def test_our_own_service_is_understood() -> None:
    """FastAPI and uvicorn frame it; the reply ends before the length that was asked for."""
    with running(make_app(Scripted("abcdefgh", piece=2), ByteVocabulary(), CARD)) as url:
        target = Target(url=url, model=CARD.id, vocabulary=200)
        [reply] = Client(target).run(Load(asked=(Asked(20, 30),))).replies
    assert (reply.wrong, reply.prompt, reply.tokens, len(reply.times)) == (None, 20, 9, 4)


def test_ctrl_c_keeps_what_has_ended() -> None:
    with faking(Fake(lambda number, body: stream(body, 0.0 if number == 0 else 60))) as url:
        one = client(url)
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGINT))  # the one that Client sets
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        began = time.monotonic()
        outcome = one.run(Load(asked=ONE, clients=1, seconds=30))
    assert (kinds(outcome), outcome.interrupted) == ([None], True)
    assert time.monotonic() - began < 5
    assert outcome.window_s < 5


def test_prompts_have_their_length_and_their_common_beginning() -> None:
    load = Load(asked=(Asked(40, 1),), shared=10, seed=3)
    first, second = prompt_tokens(load, 0, 100), prompt_tokens(load, 1, 100)
    assert len(first) == len(second) == 40
    assert first[:10] == second[:10]
    assert first[10:] != second[10:]
    assert first == prompt_tokens(load, 0, 100)
    assert set(first) | set(second) <= set(range(100))
    blocks = [Asked(30, 1, blocks=(7, 8, 9), block=8), Asked(30, 1, blocks=(7, 8, 5), block=8)]
    a, b = (prompt_tokens(Load(asked=tuple(blocks)), number, 100) for number in (0, 1))
    assert len(a) == len(b) == 30
    assert a[:16] == b[:16]
    assert a[16:24] != b[16:24]
    words = prompt_words(load, 0, 12).split()
    assert len(words) == 12
    assert all(word.isalpha() for word in words)


def test_poisson_arrivals() -> None:
    """Waits are exponential: mean 1 / rate, and the standard deviation is the mean."""
    count, rate = 20_000, 5.0
    asked = poisson(ONE * count, rate, 1)
    waits = np.diff([0.0, *(one.at_s for one in asked)])
    assert waits.mean() == pytest.approx(1 / rate, abs=4 / rate / count**0.5)  # four standard errors
    assert waits.std() == pytest.approx(1 / rate, rel=0.05)
    assert (waits > 0.2).mean() == pytest.approx(np.exp(-1), abs=0.014)
    assert asked == poisson(ONE * count, rate, 1) != poisson(ONE * count, rate, 2)
