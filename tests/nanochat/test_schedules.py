"""Random schedules: whatever else runs, whatever is cached, cut, drafted or pre-empted, every reply is the reference's.

A schedule is a function of its number: requests of a few common texts come and go at random moments, with all kinds of
parameters, chats go on, some are cancelled or run out of time, and the cache is often too small for all of them.
"""

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from nanochat.engine.engine import Engine
from nanochat.engine.runner import BLOCK, Batch, Runner, make_runner
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.model import GPT
from tests.nanochat.runners import PlainRunner, check
from tests.nanochat.sizes import VOCAB, filled, small
from tests.reference.generate import generate

MODEL = filled(small(2, depth=1), std=0.5)
PARAMS = [
    SampleParams(max_tokens=9, temperature=0),
    SampleParams(max_tokens=24, temperature=0),
    SampleParams(max_tokens=17, temperature=0, repetition_penalty=1.3, stop=(7, 11, 30)),
    SampleParams(max_tokens=1, seed=3),
    SampleParams(max_tokens=14, seed=4, stop=(1, 2, 3, 4, 5)),
    SampleParams(max_tokens=20, seed=2**64 - 1, temperature=0.6, n=2),
    SampleParams(max_tokens=12, seed=5, top_k=5, top_p=0.9),
    SampleParams(max_tokens=12, seed=6, min_p=0.1, repetition_penalty=0.8, n=3),
    SampleParams(max_tokens=30, seed=7, temperature=0.1),  # repeats itself, so drafts come true
    SampleParams(max_tokens=10, seed=8, temperature=1.7, top_p=0.5, logprobs=2),
    SampleParams(max_tokens=128, temperature=0),  # up to the end of the context or of the cache
]


class Remembered:
    """The model, asked once for each text."""

    config = MODEL.config

    def __init__(self) -> None:
        self._logits: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, tokens: Tensor, rows: Any) -> Tensor:
        key = tuple(tokens[0].tolist())
        if key not in self._logits:
            self._logits[key] = MODEL.logits(MODEL(tokens, rows)[:, -1:])
        return self._logits[key]

    def logits(self, found: Tensor) -> Tensor:
        return found


ORACLE: GPT = Remembered()  # type: ignore[assignment]


@cache
def expected(prompt: tuple[int, ...], params: SampleParams, index: int) -> list[int]:
    return generate(ORACLE, list(prompt), params, index)


def texts() -> list[list[int]]:
    """Some repeat themselves."""
    draw = random.Random(1)
    plain = [[draw.randrange(VOCAB) for _ in range(100)] for _ in range(3)]
    return [*plain, plain[0][:20] + plain[1], plain[0][:7] * 14, [5, 5, 6] * 33]


TEXTS = texts()


class Checked:
    """A runner that refuses a batch against the rules."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.computed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, batch: Batch) -> Tensor:
        check(batch, self.blocks, self.config.context)
        self.computed += len(batch.tokens)
        return self._runner.forward(batch)


@dataclass
class Asked:
    """A request, and what came of it; replies by index."""

    prompt: list[int]
    params: SampleParams
    replies: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    cancelled: bool = False

    @property
    def open(self) -> bool:
        return not self.cancelled and len(self.ends) < self.params.n


class Schedule:
    """One engine and all that happens to it. Time is counted in steps."""

    def __init__(self, number: int, kind: str) -> None:
        draw = self.draw = random.Random(number)
        blocks = draw.choice([3, 4, 6, 9, 40])
        self.runner = Checked(runner_of(kind, blocks))
        self.stop = (VOCAB - 1,) if draw.random() < 0.3 else ()
        self.step_tokens = draw.choice([1, 2, 7, 16, 33, 512])
        self.engine = Engine(
            self.runner,
            max_batch=draw.randint(1, 8),
            step_tokens=self.step_tokens,
            stop=self.stop,
            speculate=draw.choice([0, 0, 1, 3, 8]),
            clock=lambda: float(self.steps),
        )
        self.room = blocks * BLOCK  # tokens of the cache
        self.left = draw.randint(2, 8)  # requests still to come
        self.steps = self.work = 0
        self.asked: dict[int, Asked] = {}

    def run(self) -> Counter[str]:
        """Everything to its end; how often what happened."""
        while self.left or any(asked.open for asked in self.asked.values()):
            while self.left and (self.draw.random() < 0.4 or not any(asked.open for asked in self.asked.values())):
                text, tail = self.draw.choice(TEXTS), self.draw.choice(TEXTS)
                self.ask(text[: self.draw.choice([0, 12, 16, 17, 32, 40])] + tail[: self.draw.choice([1, 9])])
            alive = [id for id, asked in self.asked.items() if asked.open]
            if alive and self.draw.random() < 0.01:
                self.cancel(self.draw.choice(alive))
            self.step()
        return self.judged()

    def ask(self, prompt: list[int]) -> None:
        self.left -= 1
        timeout_s = self.draw.randint(1, 30) if self.draw.random() < 0.06 else None
        params = self.draw.choice(PARAMS)
        prompt = prompt[: min(self.room, MODEL.config.context - 1)]
        id = self.engine.add(prompt, replace(params, timeout_s=timeout_s))
        self.asked[id] = Asked(prompt, params)
        self.work += params.n * min(len(prompt) + params.max_tokens, MODEL.config.context)

    def cancel(self, id: int) -> None:
        self.engine.cancel(id)
        self.engine.cancel(id)  # twice is no error
        self.asked[id].cancelled = True

    def step(self) -> None:
        computed = self.runner.computed
        outputs = self.engine.step()
        self.steps += 1
        assert self.runner.computed - computed <= self.step_tokens, "a step went beyond its budget"
        timed_out = any(output.finish == "timeout" for output in outputs)
        idle = not any(asked.open for asked in self.asked.values())
        assert self.runner.computed > computed or timed_out or idle, "a step computed nothing"
        assert len({(output.id, output.index) for output in outputs}) == len(outputs), "two outputs for one reply"
        for output in outputs:
            self.take(output)
        self.engine.scheduler.pool.check(list(self.engine.scheduler.running.values()))

    def take(self, output: Output) -> None:
        asked = self.asked[output.id]
        assert asked.open, "a request went on after its end"
        assert output.index not in asked.ends, "a reply went on after its end"
        assert output.tokens or output.finish in ("timeout", "error"), "an output says nothing"
        assert len(output.logprobs) == len(output.top) == (asked.params.logprobs is not None) * len(output.tokens)
        reply = asked.replies.setdefault(output.index, [])
        reply += output.tokens
        if output.finish:
            asked.ends[output.index] = output.finish
            if output.finish == "stop" and self.left and self.draw.random() < 0.7:
                self.ask([*asked.prompt, *reply, *self.draw.choice(TEXTS)[:2]])  # the chat's next turn

    def judged(self) -> Counter[str]:
        for asked in self.asked.values():
            params = asked.params if asked.params.stop else replace(asked.params, stop=self.stop)
            for index in range(params.n):
                reply, end = asked.replies.get(index, []), asked.ends.get(index)
                most = min(params.max_tokens, self.room + 1 - len(asked.prompt))
                if end not in ("stop", "length"):
                    assert end == "timeout" or asked.cancelled
                    most = len(reply)
                whole = expected(tuple(asked.prompt), replace(params, max_tokens=most), index) if most else []
                assert reply == whole, (asked, index)
                if end in ("stop", "length"):
                    assert end == ("stop" if whole[-1] in params.stop else "length")
        stats, pool = self.engine.stats(), self.engine.scheduler.pool
        assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_cache_usage_perc) == (0, 0, 0)
        pool.check([])
        assert pool.free == pool.size, "a block is still held"
        ends = Counter(end for asked in self.asked.values() for end in asked.ends.values())
        assert +Counter(stats.request_success) == ends
        assert stats.generation_tokens == sum(len(r) for asked in self.asked.values() for r in asked.replies.values())
        assert stats.computed_tokens == self.runner.computed
        assert self.steps <= 2 * self.work, "too many steps for the work"
        return ends + Counter(
            requests=len(self.asked),
            tokens=stats.generation_tokens,
            hits=stats.prefix_cache_hits,
            preemptions=stats.num_preemptions,
            accepted=stats.spec_decode_num_accepted_tokens,
            drafted=stats.spec_decode_num_draft_tokens,
            cancelled=sum(asked.cancelled for asked in self.asked.values()),
        )


def runner_of(kind: str, blocks: int) -> Runner:
    if kind == "plain":
        return PlainRunner(MODEL, blocks)
    return make_runner(
        MODEL.config,
        VOCAB,
        MODEL.state_dict(),
        kv_tokens=blocks * BLOCK,
        precision="fp32",
        deterministic=True,
        native=kind == "fastest",
    )


@pytest.mark.parametrize(
    ("kind", "schedules"), [pytest.param("fastest", 500, marks=pytest.mark.slow), ("torch", 60), ("plain", 60)]
)
def test_every_reply_of_every_schedule_is_the_references(kind: str, schedules: int) -> None:
    seen: Counter[str] = Counter()
    for number in range(schedules):
        try:
            seen += Schedule(number, kind).run()
        except AssertionError as error:
            raise AssertionError(f"schedule {number}: {error}") from error
    print(kind, dict(seen))
    for event in ("stop", "length", "timeout", "cancelled", "hits", "preemptions", "accepted"):
        assert seen[event] >= schedules // 10, f"the schedules hardly try {event}: {seen}"
