"""Replies whose replica dies, against slow generation that nothing interrupts."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from pipelines.service.failover import MOST_LOSSES, REFUSED_S, Continued
from pipelines.service.protocol import ApiError, ReplicaLostError
from pipelines.service.web import make_app
from pipelines.service.worker import Worker
from tests.reference.generate import generate
from tests.serving import CARD, ByteVocabulary, running, tiny_model, tiny_runner

PROMPT = [1, 2, 3]


class Dying:
    """A Backend whose replicas die, the first after so many tokens of a request, the next after so many more."""

    def __init__(self, worker: Worker, deaths: list[int]) -> None:
        self.worker, self.deaths = worker, list(deaths)
        self.asked: list[tuple[list[int], SampleParams]] = []

    async def generate(
        self, tokens: list[int], params: SampleParams, *, admitted: bool = False
    ) -> AsyncGenerator[Output, None]:
        self.asked.append((tokens, params))
        left = self.deaths.pop(0) if self.deaths else None
        if left == 0:
            raise ReplicaLostError("killed")
        async for output in self.worker.generate(tokens, params):
            for number, token in enumerate(output.tokens, 1):  # one at a time, however they came
                last = number == len(output.tokens)
                yield replace(output, tokens=[token], finish=output.finish if last else None)
                if left is not None and (left := left - 1) == 0:
                    raise ReplicaLostError("killed")

    async def stats(self) -> list[Stats]:
        return await self.worker.stats()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(Engine(tiny_runner()))
    yield worker
    worker.close()


async def said(backend: Continued, params: SampleParams) -> list[Output]:
    return [output async for output in backend.generate(PROMPT, params)]


@pytest.mark.parametrize("death", [0, 1, 5, 11])
@pytest.mark.parametrize(
    "setting", [{"temperature": 0}, {"seed": 7}, {"seed": 8, "top_p": 0.9, "repetition_penalty": 1.3}]
)
def test_another_replica_goes_on_token_for_token(worker: Worker, death: int, setting: dict[str, Any]) -> None:
    params = SampleParams(max_tokens=12, **setting)
    outputs = asyncio.run(said(Continued(Dying(worker, [death])), params))
    assert [token for output in outputs for token in output.tokens] == generate(tiny_model(), PROMPT, params)
    assert [output.finish for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish == "length"


def test_without_a_seed_both_replicas_draw_from_one(worker: Worker) -> None:
    backend = Dying(worker, [4])
    outputs = asyncio.run(said(Continued(backend), SampleParams(max_tokens=12)))
    (_, first), (prompt, second) = backend.asked
    tokens = [token for output in outputs for token in output.tokens]
    assert first.seed == second.seed is not None
    assert prompt == PROMPT + tokens[:4]
    assert tokens == generate(tiny_model(), PROMPT, first)


def test_a_reply_that_was_whole_is_not_asked_again(worker: Worker) -> None:
    backend = Dying(worker, [12])
    assert sum(len(output.tokens) for output in asyncio.run(said(Continued(backend), SampleParams(12, seed=1)))) == 12
    assert len(backend.asked) == 1


def test_a_request_that_kills_replicas_is_given_up(worker: Worker) -> None:
    backend = Dying(worker, [2] * 9)
    with pytest.raises(ReplicaLostError, match="killed"):
        asyncio.run(said(Continued(backend), SampleParams(12, seed=1)))
    assert len(backend.asked) == MOST_LOSSES


def test_a_prompt_that_has_killed_replicas_is_refused_for_a_while(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Dying(worker, [2] * MOST_LOSSES)
    continued, params = Continued(backend), SampleParams(12, seed=1)
    with pytest.raises(ReplicaLostError):
        asyncio.run(said(continued, params))
    with pytest.raises(ApiError, match="2 replicas were lost while they answered this prompt") as refused:
        asyncio.run(said(continued, params))
    assert (refused.value.status, len(backend.asked)) == (503, MOST_LOSSES)
    later = time.monotonic() + REFUSED_S
    monkeypatch.setattr("pipelines.service.failover.time.monotonic", lambda: later)
    tokens = [token for output in asyncio.run(said(continued, params)) for token in output.tokens]
    assert tokens == generate(tiny_model(), PROMPT, params)


@pytest.mark.parametrize(("death", "tries"), [(0, 2), (3, 1)])
def test_several_replies_are_begun_again_only_if_nothing_was_said(worker: Worker, death: int, tries: int) -> None:
    backend = Dying(worker, [death])
    params = SampleParams(6, seed=3, n=2)
    if tries == 1:
        with pytest.raises(ReplicaLostError):
            asyncio.run(said(Continued(backend), params))
    else:
        outputs = asyncio.run(said(Continued(backend), params))
        for index in (0, 1):
            tokens = [token for output in outputs if output.index == index for token in output.tokens]
            assert tokens == generate(tiny_model(), PROMPT, params, index=index)
    assert len(backend.asked) == tries


def test_a_full_service_says_429_and_when_to_ask_again(worker: Worker) -> None:
    class Full(Dying):
        async def generate(
            self, tokens: list[int], params: SampleParams, *, admitted: bool = False
        ) -> AsyncGenerator[Output, None]:
            self.asked.append((tokens, params))
            raise ApiError(429, "too many requests wait already; ask again in a moment", code="overloaded")
            yield  # never: it makes this a generator

    backend = Full(worker, [])
    with running(make_app(Continued(backend), ByteVocabulary(), CARD)) as url:
        body = {"model": CARD.id, "messages": [{"role": "user", "content": "Hi"}]}
        for stream in (False, True):
            answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": stream})
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
            assert answer.json()["error"]["type"] == "rate_limit_error"
    assert len(backend.asked) == 2, "a refused request was asked again"
