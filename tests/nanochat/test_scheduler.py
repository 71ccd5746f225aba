"""Who gets what in a step, seen by the runner, and what the engine counts of it."""

from collections.abc import Callable
from typing import Any

import pytest

from nanochat.engine import engine as engine_module
from nanochat.engine.engine import Engine
from nanochat.engine.runner import BLOCK, Batch
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Histogram
from tests.nanochat.runners import NullRunner
from tests.nanochat.sizes import VOCAB, small

CONFIG = small(context=1024)


class Bench:
    """An engine over a runner that computes nothing, with a clock that the test moves."""

    def __init__(self, blocks: int = 200, **settings: Any) -> None:
        self.runner = NullRunner(CONFIG, VOCAB, blocks)
        self.now = 0.0
        self.engine = Engine(self.runner, clock=lambda: self.now, **settings)

    def ask(self, size: int, token: int = 2, **params: Any) -> int:
        """A prompt of its own for each token; the reply is 1, 1, 1 ..."""
        tokens = [token] * size
        return self.engine.add(tokens, SampleParams(**{"max_tokens": 10, "temperature": 0, **params}))

    def step(self) -> tuple[Batch | None, list[Output]]:
        before = len(self.runner.steps)
        outputs = self.engine.step()
        return (self.runner.steps[-1] if len(self.runner.steps) > before else None), outputs

    def until(self, done: Callable[[], bool]) -> list[Output]:
        outputs = []
        while not done():
            outputs += self.step()[1]
        return outputs

    def finish(self) -> list[Output]:
        return self.until(lambda: self.stats.num_requests_running + self.stats.num_requests_waiting == 0)

    @property
    def stats(self) -> Any:
        return self.engine.stats()


def test_a_long_prompt_never_starves_a_reply() -> None:
    bench = Bench(step_tokens=32)
    replies = [bench.ask(5, token, max_tokens=100) for token in (2, 3, 4)]
    bench.step()
    long = bench.ask(900, 5, max_tokens=1)
    for _ in range(31):  # 29 tokens of the prompt a step
        batch, outputs = bench.step()
        assert batch is not None
        assert batch.counts.tolist()[:3] == [1, 1, 1]
        assert len(batch.tokens) == 32
        assert [output.id for output in outputs] == replies
    _, outputs = bench.step()
    assert outputs[-1].id == long


def test_prompts_are_served_in_order_of_arrival_and_share_what_is_left() -> None:
    bench = Bench(step_tokens=50)
    for token, size in enumerate((30, 45, 10), 2):
        bench.ask(size, token)
    shares = []
    for _ in range(3):
        batch, _ = bench.step()
        assert batch is not None
        shares.append(list(zip(batch.past.tolist(), batch.counts.tolist(), strict=True)))
    assert shares == [[(0, 30), (0, 20)], [(30, 1), (20, 25), (0, 10)], [(31, 1), (45, 1), (10, 1)]]


def test_at_most_max_batch_run_and_the_others_wait_in_order() -> None:
    bench = Bench(max_batch=2)
    ids = [bench.ask(5, token, max_tokens=token) for token in range(2, 8)]
    ends = []
    while bench.stats.num_requests_running + bench.stats.num_requests_waiting:
        batch, outputs = bench.step()
        assert batch is not None
        assert len(batch.counts) <= 2
        ends += [output.id for output in outputs if output.finish]
    assert ends == ids


def test_logits_are_asked_for_only_where_a_token_is_drawn() -> None:
    bench = Bench(step_tokens=20)
    bench.ask(50)
    wanted = []
    for _ in range(4):
        batch, _ = bench.step()
        assert batch is not None
        wanted.append(batch.wanted.tolist())
    assert wanted == [[], [], [9], [0]]


def test_the_youngest_gives_up_its_blocks_and_says_nothing_twice() -> None:
    bench = Bench(blocks=6, max_batch=3)  # three prompts of 2 blocks, and each will need a third
    ids = [bench.ask(20, token, max_tokens=28) for token in (2, 3, 4)]
    outputs = bench.finish()
    assert bench.stats.num_preemptions == 1  # its two blocks are enough for the others
    assert [output.id for output in outputs if output.finish] == ids
    for id in ids:
        assert sum(len(output.tokens) for output in outputs if output.id == id) == 28
    assert bench.stats.generation_tokens == 3 * 28


def test_the_youngest_pauses_when_it_is_itself_the_one_without_a_block() -> None:
    bench = Bench(blocks=4, max_batch=2)
    first, second = bench.ask(30, 2, max_tokens=18), bench.ask(20, 3, max_tokens=28)
    outputs = bench.finish()
    assert [output.id for output in outputs if output.finish] == [first, second]
    assert bench.stats.num_preemptions <= 1
    assert bench.stats.computed_tokens <= 30 + 17 + 20 + 27 + 48  # at most one of them once more


def test_a_prompt_that_does_not_fit_yet_waits_and_nothing_passes_it() -> None:
    bench = Bench(blocks=10, max_batch=8)
    first = bench.ask(100, 2, max_tokens=5)
    large, small_one = bench.ask(100, 3, max_tokens=5), bench.ask(5, 4, max_tokens=2)
    started: list[int] = []
    for output in bench.finish():
        started += [output.id] if output.id not in started else []
    assert started == [first, large, small_one]
    assert bench.stats.num_preemptions == 0


@pytest.mark.parametrize("running", [True, False])
def test_time_runs_out_by_the_given_clock(running: bool) -> None:
    bench = Bench(max_batch=1)
    other = bench.ask(5, 3, max_tokens=900)
    if running:
        bench.engine.cancel(other)
    late = bench.ask(5, 2, timeout_s=2.5, max_tokens=900)
    bench.until(lambda: bench.stats.generation_tokens >= 5)
    bench.now = 2.4
    assert not any(output.finish for output in bench.step()[1])
    bench.now = 2.5
    _, outputs = bench.step()
    assert outputs[0] == Output(late, [], finish="timeout")
    assert bench.stats.request_success["timeout"] == 1
    assert bench.stats.num_requests_waiting == 0
    assert all(output.id != late for output in bench.step()[1])


def test_a_request_that_ended_in_time_does_not_time_out() -> None:
    bench = Bench()
    bench.ask(5, timeout_s=1.0, max_tokens=2)
    bench.finish()
    bench.now = 5.0
    assert bench.step()[1] == []


class Guess:
    """Drafts what a reply of NullRunner will be: right for `right` tokens, then wrong."""

    right = 2

    def __init__(self, tokens: list[int], most: int) -> None:
        self.most = most
        self.seen = list(tokens)
        self.judgements: list[tuple[int, int]] = []
        made.append(self)

    def extend(self, tokens: list[int]) -> None:
        self.seen += tokens

    def propose(self) -> list[int]:
        return ([1] * self.right + [9] * 50)[: self.most]

    def judged(self, drafted: int, accepted: int) -> None:
        self.judgements.append((drafted, accepted))


made: list[Guess] = []


@pytest.fixture
def _guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr(engine_module, "Lookup", Guess)


@pytest.mark.usefixtures("_guesses")
def test_a_draft_gives_as_many_tokens_as_are_right_and_one_more() -> None:
    bench = Bench(speculate=4)
    bench.ask(20, max_tokens=12)
    sizes = [len(output.tokens) for output in bench.finish()]
    assert sizes == [1, 3, 3, 3, 2]
    assert [len(batch.tokens) for batch in bench.runner.steps] == [20, 5, 5, 5, 2]  # never beyond max_tokens
    assert bench.stats.spec_decode_num_draft_tokens == 13
    assert bench.stats.spec_decode_num_accepted_tokens == 7
    [guess] = made
    assert guess.judgements == [(4, 2), (4, 2), (4, 2), (1, 1)]
    assert guess.seen == [2] * 20 + [1] * 12
    assert bench.ask(20 + 12 - 1, 2) == 1  # the wrong tokens of drafts were not kept as content
    bench.finish()
    assert bench.stats.prefix_cache_hits == 20


@pytest.mark.usefixtures("_guesses")
def test_a_stop_token_ends_a_reply_inside_a_draft() -> None:
    bench = Bench(speculate=4)
    bench.ask(20, stop=(1,))
    [output] = bench.finish()
    assert (output.tokens, output.finish) == ([1], "stop")
    made.clear()
    bench.ask(20, 3, max_tokens=2)
    assert [output.tokens for output in bench.finish()] == [[1], [1]]


@pytest.mark.usefixtures("_guesses")
def test_drafts_take_what_is_left_of_the_budget_and_never_anothers_block() -> None:
    bench = Bench(speculate=8, step_tokens=6)
    bench.ask(4, 2, max_tokens=300)
    bench.step()
    bench.ask(30, 3)
    batch, _ = bench.step()
    assert batch is not None
    assert batch.counts.tolist() == [1, 5]  # the prompt of another comes before a draft
    tight = Bench(blocks=4, speculate=8, max_batch=2)
    for token in (2, 3):
        tight.ask(20, token, max_tokens=12)
    tight.finish()
    assert tight.stats.num_preemptions == 0


@pytest.mark.usefixtures("_guesses")
@pytest.mark.parametrize(("replies", "rows"), [(4, 4 * 3), (5, 5)])
def test_drafts_are_made_where_few_run(replies: int, rows: int) -> None:
    bench = Bench(speculate=2)
    for token in range(2, 2 + replies):
        bench.ask(5, token, max_tokens=50)
    bench.step()
    batch, _ = bench.step()
    assert batch is not None
    assert len(batch.tokens) == rows


def test_times_and_sizes_are_counted_by_the_clock() -> None:
    bench = Bench(max_batch=1, step_tokens=16)
    bench.ask(20, 2, max_tokens=3)
    bench.ask(5, 3, max_tokens=1)
    for _ in range(8):
        bench.now += 1.0
        bench.step()
    stats = bench.stats
    # Clock 1: 16 tokens of the first; 2, 3, 4: its reply; 5: the second, which then ends.
    assert stats.request_queue_time_seconds.sum == 1 + 5
    assert stats.request_prefill_time_seconds.sum == 1 + 0
    assert stats.time_to_first_token_seconds.sum == 2 + 5
    assert stats.inter_token_latency_seconds.sum == 2
    assert stats.request_decode_time_seconds.sum == 2 + 0
    assert stats.e2e_request_latency_seconds.sum == 4 + 5
    assert (stats.request_prompt_tokens.sum, stats.request_generation_tokens.sum) == (25, 4)
    assert (stats.iteration_tokens_total.sum, sum(stats.iteration_tokens_total.counts)) == (16 + 4 + 1 + 1 + 5, 5)
    assert stats.num_sequences.sum == 5
    assert (stats.prompt_tokens, stats.generation_tokens, stats.computed_tokens) == (25, 4, 27)
    assert stats.request_success == {"stop": 0, "length": 2, "timeout": 0, "error": 0}


def test_a_snapshot_does_not_change() -> None:
    bench = Bench()
    before = bench.stats
    bench.ask(20)
    bench.finish()
    assert before.computed_tokens == sum(before.iteration_tokens_total.counts) == 0
    assert before.request_success["length"] == 0


def test_cache_usage_is_what_running_sequences_hold() -> None:
    bench = Bench(blocks=10)
    assert bench.stats.kv_tokens == 10 * BLOCK
    bench.ask(30, max_tokens=2)
    bench.step()
    assert bench.stats.kv_cache_usage_perc == pytest.approx(0.2)
    bench.finish()
    assert bench.stats.kv_cache_usage_perc == 0


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 1, 1], 12.0)
