"""The engine's thread: many callers at once, callers that leave, and its end."""

import asyncio
import random
import time
from contextlib import aclosing

import pytest

from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from pipelines.service.protocol import ReplicaLostError
from pipelines.service.worker import Worker
from tests.reference.generate import generate
from tests.serving import tiny_model, tiny_runner


async def whole(worker: Worker, prompt: list[int], params: SampleParams) -> list[int]:
    return [token async for output in worker.generate(prompt, params) for token in output.tokens]


async def idle(worker: Worker) -> None:
    async with asyncio.timeout(5):
        while (stats := worker.load()).num_requests_running or stats.num_requests_waiting:
            await asyncio.sleep(0.01)


def test_many_callers_get_what_each_would_get_alone() -> None:
    draw = random.Random(1)
    asked = [
        ([draw.randrange(256) for _ in range(draw.randint(1, 30))], SampleParams(draw.randint(1, 15), seed=n))
        for n in range(10)
    ]
    worker = Worker(Engine(tiny_runner(96), max_batch=3))

    async def ask_all() -> list[list[int]]:
        return await asyncio.gather(*(whole(worker, *one) for one in asked))

    assert asyncio.run(ask_all()) == [generate(tiny_model(), *one) for one in asked]
    worker.close()


class Slow(Engine):
    """An engine that cannot finish a long reply before its caller has left."""

    def step(self) -> list[Output]:
        time.sleep(0.02)
        return super().step()


def test_a_caller_that_leaves_frees_its_place() -> None:
    worker = Worker(Slow(tiny_runner(), max_batch=1))

    async def leave_and_ask() -> tuple[list[int], list[int]]:
        async with aclosing(worker.generate([1], SampleParams(100, seed=1))) as outputs:
            await anext(outputs)
        waiting = asyncio.create_task(whole(worker, [2], SampleParams(100, seed=1)))
        await asyncio.sleep(0)
        waiting.cancel()
        reply = await whole(worker, [3], SampleParams(5, seed=1))
        await idle(worker)
        assert worker.load().generation_tokens < 50, "it went on though its caller had left"  # of 205
        return reply, generate(tiny_model(), [3], SampleParams(5, seed=1))

    reply, expected = asyncio.run(leave_and_ask())
    assert reply == expected
    worker.close()


def test_a_closed_loop_frees_the_place_too() -> None:
    worker = Worker(Engine(tiny_runner(), max_batch=1))
    loop = asyncio.new_event_loop()
    outputs = worker.generate([1], SampleParams(120, seed=1))
    loop.run_until_complete(anext(outputs))
    loop.close()  # nobody closes the generator first
    asyncio.run(idle(worker))
    worker.close()
    del outputs


def test_a_bad_request_is_its_callers_problem_only() -> None:
    worker = Worker(Engine(tiny_runner()))

    async def ask() -> list[int]:
        with pytest.raises(ValueError, match=r"^tokens is empty"):
            await whole(worker, [], SampleParams(1))
        return await whole(worker, [1], SampleParams(3, temperature=0))

    assert len(asyncio.run(ask())) == 3
    worker.close()


def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    worker = Worker(Engine(tiny_runner()))

    async def ask() -> None:
        outputs = worker.generate([1], SampleParams(120, seed=1))
        await anext(outputs)
        worker.close()
        with pytest.raises(ReplicaLostError, match="shut down"):
            async for _ in outputs:
                pass
        with pytest.raises(ReplicaLostError, match="shut down"):
            await whole(worker, [1], SampleParams(1))

    asyncio.run(ask())
    with pytest.raises(ReplicaLostError, match="shut down"):
        worker.check()
