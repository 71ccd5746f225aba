"""Who is let in, against what then happened: the real engine and scheduler with a runner that only takes time."""

import pickle
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import ModelConfig
from nanochat.engine.engine import Engine
from nanochat.engine.runner import BLOCK, Batch
from nanochat.engine.sampler import SampleParams
from pipelines.service.admission import Admission, Forecast, Ticket
from pipelines.service.protocol import OverloadedError
from tests.nanochat.runners import NullRunner

STEP_S, TOKEN_S, STEP_TOKENS = 0.01, 0.0006, 512  # near to a model of depth 12 on two cores
CONTEXT, MAX_WAIT_S = 1024, 10.0


class TimedRunner(NullRunner):
    """A forward pass moves the clock."""

    def __init__(self, kv_tokens: int) -> None:
        super().__init__(ModelConfig(depth=1, context=CONTEXT, head_dim=8, aspect=16), 300, kv_tokens // BLOCK)
        self.now, self.slower = 0.0, 1.0

    def clock(self) -> float:
        return self.now

    def forward(self, batch: Batch) -> object:  # type: ignore[override]
        self.now += self.slower * (STEP_S + TOKEN_S * len(batch.tokens))
        self.steps.clear()
        return super().forward(batch)


@dataclass(frozen=True)
class Case:
    """A kind of traffic. Tokens of prompts and replies are exponential, with these means."""

    prompt: int = 60
    reply: int = 60
    places: int = 8
    kv_tokens: int = 16_384
    again: float = 0.0  # part of the work that is done again after a preemption, which no forecast sees

    def arrivals(self, rate: float, seconds: float, seed: int) -> Iterator[tuple[float, int, int]]:
        """(seconds, prompt, reply): a Poisson process."""
        draw, at = random.Random(seed), 0.0
        while (at := at + draw.expovariate(rate)) < seconds:
            prompt, reply = draw.expovariate(1 / self.prompt), draw.expovariate(1 / self.reply)
            yield at, min(CONTEXT // 2, 1 + int(prompt)), min(CONTEXT // 2, 1 + int(reply))


@dataclass
class Fate:
    """What became of a request."""

    asked: float
    prompt: int
    forecast: Forecast
    ticket: Ticket | None = None
    refused: OverloadedError | None = None
    first_s: float | None = None  # from being asked to the first token


@dataclass
class Simulation:
    """A replica in simulated time."""

    case: Case
    max_wait_s: float = MAX_WAIT_S
    max_queued_tokens: int | None = None
    fates: list[Fate] = field(default_factory=list)
    ended: int = 0

    def __post_init__(self) -> None:
        self.runner = TimedRunner(self.case.kv_tokens)
        self.engine = Engine(
            self.runner,  # type: ignore[arg-type]
            max_batch=self.case.places, step_tokens=STEP_TOKENS, clock=self.runner.clock,
        )  # fmt: skip
        self.admission = Admission(
            places=self.case.places,
            kv_tokens=self.case.kv_tokens,
            step_tokens=STEP_TOKENS,
            max_wait_s=self.max_wait_s,
            max_queued_tokens=self.max_queued_tokens,
        )
        self.open: dict[int, Fate] = {}
        self._words = random.Random(5)

    def ask(self, prompt: int, reply: int, asked: float | None = None) -> Fate:
        fate = Fate(self.runner.now if asked is None else asked, prompt, self.admission.forecast(prompt))
        self.fates.append(fate)
        try:
            fate.ticket = self.admission.admit(prompt)
        except OverloadedError as error:
            fate.refused = error
            return fate
        tokens = [self._words.randrange(256) for _ in range(prompt)]
        self.open[self.engine.add(tokens, SampleParams(reply, temperature=0))] = fate
        return fate

    def step(self) -> None:
        began = self.runner.now
        for output in self.engine.step():
            fate = self.open[output.id]
            assert fate.ticket is not None
            if fate.first_s is None:
                fate.first_s = self.runner.now - fate.asked
            fate.ticket.answered()
            if output.finish:
                fate.ticket.ended()
                del self.open[output.id]
                self.ended += 1
        self.admission.stepped(self.engine.stats(), self.runner.now - began)

    def run(self, rate: float, seconds: float, seed: int, *, empty: bool = True) -> list[Fate]:
        """Traffic from now on. empty: until all have their replies."""
        start, before = self.runner.now, len(self.fates)
        coming = [(start + at, *sizes) for at, *sizes in self.case.arrivals(rate, seconds, seed)]
        coming.reverse()
        while coming or (empty and self.open):
            if not self.open:
                self.runner.now = max(self.runner.now, coming[-1][0])
            while coming and coming[-1][0] <= self.runner.now:
                asked, prompt, reply = coming.pop()
                self.ask(prompt, reply, asked)
            if self.open:
                self.step()
        return self.fates[before:]


CASES = {
    "even": Case(),
    "cache is small": Case(kv_tokens=1024, again=0.15),
    "prompts": Case(prompt=400, reply=5),
    "replies": Case(reply=200),
    "many places": Case(reply=150, places=32),
}


def capacity(case: Case) -> float:
    """Requests a second of an engine that never lacks any."""
    simulation = Simulation(case, max_wait_s=1e9, max_queued_tokens=10**9)
    simulation.run(1e6, 3e-4, 1)
    return simulation.ended / simulation.runner.now


@pytest.fixture(scope="module", params=CASES)
def loaded(request: pytest.FixtureRequest) -> tuple[Case, float]:
    case = CASES[request.param]
    return case, capacity(case)


def firsts(fates: list[Fate]) -> np.ndarray:
    return np.array([fate.first_s for fate in fates if fate.first_s is not None])


@pytest.mark.parametrize("load", [0.5, 0.9, 2, 10])
def test_first_tokens_come_when_they_were_forecast(loaded: tuple[Case, float], load: float) -> None:
    case, most = loaded
    simulation = Simulation(case, max_wait_s=20)
    simulation.run(most / 2, 30, seed=2)  # something is measured
    fates = [fate for fate in simulation.run(most * load, 60, seed=3) if fate.ticket]
    actual, forecast = firsts(fates), np.array([fate.forecast.seconds for fate in fates])
    late = actual - np.array([fate.forecast.at_most_s for fate in fates])
    error = np.abs(actual - forecast).mean()
    print(
        f"{case} at {load}: {len(fates)} let in; first token after {actual.mean():.2f} s on average, "
        f"forecast {forecast.mean():.2f}, mean error {error:.2f}; {(late > 0).mean():.2%} over the bound"
    )
    assert error < 0.05 + (0.25 + case.again) * actual.mean()
    assert abs(actual.mean() - forecast.mean()) < 0.05 + (0.15 + case.again) * actual.mean()
    assert (late > STEP_S + TOKEN_S * STEP_TOKENS).mean() < 0.02 + case.again / 2


def test_at_half_load_nobody_is_refused(loaded: tuple[Case, float]) -> None:
    case, most = loaded
    fates = Simulation(case).run(most / 2, 60, seed=4)  # nothing was measured before
    assert not [fate for fate in fates if fate.refused]


def test_in_a_flood_those_let_in_keep_their_latency(loaded: tuple[Case, float]) -> None:
    case, most = loaded
    simulation = Simulation(case)
    simulation.run(most / 2, 30, seed=5)
    began, ended = simulation.runner.now, simulation.ended
    fates = simulation.run(most * 10, 60, seed=6, empty=False)
    served = (simulation.ended - ended) / (simulation.runner.now - began)
    waited = firsts(fates)
    print(
        f"{case}: {len(fates)} asked, {served:.2f} of {most:.2f} a second served, "
        f"first token at most {waited.max():.2f} s"
    )
    assert waited.max() < MAX_WAIT_S + STEP_S + TOKEN_S * STEP_TOKENS
    assert served > 0.9 * most, "a queue that is kept short must not leave places empty"
    let_in = [fate.prompt for fate in fates if fate.ticket]
    asked = [fate.prompt for fate in fates]
    assert len(let_in) < 0.3 * len(asked)
    assert np.mean(let_in) == pytest.approx(np.mean(asked), rel=0.15), "long prompts are let in as often as short ones"


def test_a_flood_before_anything_was_measured_is_bounded_by_its_tokens() -> None:
    simulation = Simulation(Case())
    fates = [simulation.ask(60, 20) for _ in range(1000)]
    let_in = sum(fate.ticket is not None for fate in fates)
    assert let_in == Case.kv_tokens // 60 + 1
    few = Simulation(Case(), max_queued_tokens=60)
    assert [few.ask(61, 1).refused is None for _ in range(3)] == [True, False, False], "nobody is before the first"


def test_requests_between_two_steps_count_at_once() -> None:
    simulation = Simulation(Case())
    simulation.run(3, 30, seed=7)
    fates = [simulation.ask(60, 60) for _ in range(1000)]
    bounds = [fate.forecast.at_most_s for fate in fates if fate.ticket]
    assert bounds == sorted(bounds)
    assert len(set(bounds)) > 10
    assert max(bounds) <= MAX_WAIT_S
    assert fates[-1].refused


def test_an_idle_engine_refuses_nobody_whatever_was_measured() -> None:
    simulation = Simulation(Case(kv_tokens=1024), max_wait_s=0.001)
    simulation.runner.slower = 1000
    simulation.run(1, 5, seed=8)
    assert simulation.ask(CONTEXT - 1, 1).ticket
    simulation.step()
    assert simulation.ask(1, 1).refused, "somebody is before it"
    for fate in simulation.open.values():  # the client leaves; no step follows
        assert fate.ticket
        fate.ticket.leave()
    simulation.open.clear()
    assert simulation.ask(CONTEXT - 1, 1).ticket


def test_a_slow_time_is_forgotten() -> None:
    simulation = Simulation(Case())
    simulation.run(3, 20, seed=9)
    simulation.runner.slower = 50
    slow = simulation.run(3, 100, seed=10)
    simulation.runner.slower = 1
    assert any(fate.refused for fate in slow)
    simulation.run(3, 60, seed=11)
    assert not any(fate.refused for fate in simulation.run(3, 60, seed=12))
    fates = simulation.run(6, 60, seed=13)
    assert np.mean([fate.forecast.seconds for fate in fates]) < 1.25 * firsts(fates).mean()


def test_cached_prompts_are_cheap() -> None:
    forecasts = []
    for cached in (True, False):
        simulation = Simulation(Case(kv_tokens=2048), max_queued_tokens=10**6)
        for number in range(220):
            tokens = [0 if cached and number > 20 else number, *range(256), *range(255)]
            id = simulation.engine.add(tokens, SampleParams(2, temperature=0))
            forecast = simulation.admission.forecast(512)
            simulation.open[id] = Fate(simulation.runner.now, 512, forecast, simulation.admission.admit(512))
            while simulation.open:
                simulation.step()
        simulation.ask(512, 1)
        forecasts.append(simulation.admission.forecast(512).seconds)
    assert forecasts[0] < forecasts[1] / 3


def test_who_comes_back_when_told_to_is_let_in_soon() -> None:
    tries = []
    for seed in range(13, 23):
        simulation = Simulation(Case())
        simulation.run(3, 30, seed=seed)
        while (refused := simulation.ask(60, 60).refused) is None:
            pass
        count = 1
        while refused is not None:
            count += 1
            assert refused.retry_after_s is not None
            again = simulation.runner.now + refused.retry_after_s
            while simulation.runner.now < again:
                simulation.step()
            refused = simulation.ask(60, 60).refused
        tries.append(count)
    assert np.mean(tries) < 4, tries


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_everybody_who_leaves_is_forgotten(data: st.DataObject) -> None:
    admission = Admission(places=2, kv_tokens=10**6, step_tokens=512, max_wait_s=10)
    open_: list[Ticket] = []
    for number in range(data.draw(st.integers(0, 30))):
        if not open_ or data.draw(st.booleans()):
            open_.append(admission.admit(number + 1, data.draw(st.integers(1, 4))))
            continue
        ticket = data.draw(st.sampled_from(open_))
        {"answered": ticket.answered, "ended": ticket.ended, "leave": ticket.leave}[
            data.draw(st.sampled_from(["answered", "ended", "leave"]))
        ]()
    for ticket in open_:
        ticket.leave()
        ticket.ended()  # its last token was on its way
    found = []
    for _ in range(4):
        forecast = admission.forecast(1)
        found.append((forecast.waiting_tokens, forecast.ends))
        admission.admit(1)
    assert found == [(1, 0), (2, 0), (3, 1), (4, 2)]


def test_threads_lose_no_count() -> None:
    admission = Admission(places=10**6, kv_tokens=10**9, step_tokens=512, max_wait_s=10)

    def come_and_go() -> None:
        for _ in range(2000):
            ticket = admission.admit(3, 2)
            ticket.answered()
            ticket.ended()
            ticket.leave()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forecast = admission.forecast(1)
    assert (forecast.waiting_tokens, forecast.ends) == (1, 0)


def test_the_error_crosses_processes_and_says_when_to_come_back() -> None:
    error = OverloadedError("9 requests wait already", 2.3)
    again = pickle.loads(pickle.dumps(error))
    for one in (error, again):
        assert (one.status, one.code, one.retry_after_s) == (429, "overloaded", 3)
        assert one.body["error"]["message"] == str(one) == "9 requests wait already; ask again in 3 s"
