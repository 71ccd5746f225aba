"""Many requests, one model: the four calls on which streaming, HTTP and threads are built.

A step: the scheduler hands out tokens, the runner computes them, the sampler draws, the sequences grow. What a
sequence gets depends on nothing but its own tokens and seed, whatever else runs (exactly so if the runner is
deterministic). Knows no threads: whoever makes an Engine calls it from one thread.
"""

# N sequences, T tokens, R wanted rows, as in runner.py

import secrets
import time
from array import array
from collections.abc import Callable, Collection, Iterable

import numpy as np

from nanochat.engine.blocks import BlockPool
from nanochat.engine.runner import BLOCK, Batch, Ints, Runner
from nanochat.engine.sampler import Draw, Drawn, SampleParams, sample
from nanochat.engine.scheduler import Scheduler
from nanochat.engine.sequence import Finish, Output, Sequence
from nanochat.engine.speculate import Lookup
from nanochat.engine.stats import Counters, Stats


class Engine:
    """At most `max_batch` replies are made at a time, and at most `step_tokens` tokens computed in a step.

    stop: tokens that end a reply whose own parameters name none.  speculate: the most tokens that are drafted for a
    sequence and step; 0: none.  clock: seconds, for timeouts and what is counted.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch: int = 8,
        step_tokens: int = 512,
        stop: Iterable[int] = (),
        speculate: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        least = {"max_batch": (max_batch, 1), "step_tokens": (step_tokens, 1), "speculate": (speculate, 0)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name} is {value}; it must be {minimum} or more")
        self._runner, self._clock, self._speculate = runner, clock, speculate
        self._stop = frozenset(stop)
        self._checked("stop", self._stop)
        self._kv_tokens = runner.blocks * BLOCK
        self.scheduler = Scheduler(
            BlockPool(runner.blocks),
            max_batch=max_batch,
            step_tokens=step_tokens,
            speculate=speculate,
            longest=min(runner.config.context, self._kv_tokens),
        )
        self._open: dict[int, list[Sequence]] = {}  # a request's replies that have not ended
        self._next_id = self._next_order = 0
        self._counters = Counters()

    def add(self, tokens: list[int], params: SampleParams) -> int:
        """Queues a request and returns its id. Raises ValueError that names what is wrong with it."""
        context = self._runner.config.context
        if not len(tokens):
            raise ValueError("tokens is empty; a prompt needs at least 1 token")
        prompt = self._checked("tokens", tokens)
        self._checked("stop", params.stop)
        if len(tokens) >= context:
            raise ValueError(
                f"tokens are {len(tokens)}; the context is {context}, so a prompt has at most {context - 1}"
            )
        if len(tokens) > self._kv_tokens:
            raise ValueError(f"tokens are {len(tokens)}; the cache holds {self._kv_tokens}, so shorten the prompt")
        if params.max_tokens > context:
            raise ValueError(f"max_tokens is {params.max_tokens}; the context is {context}, so ask for at most that")
        seed = secrets.randbits(64) if params.seed is None else params.seed
        stop = frozenset(params.stop) or self._stop
        capacity = min(len(tokens) + params.max_tokens, context, self._kv_tokens + 1)  # the last one needs no keys
        now = self._clock()
        replies = []
        for index in range(params.n):
            ids = np.zeros(capacity, np.int32)
            ids[: len(tokens)] = prompt
            replies.append(
                Sequence(
                    id=self._next_id,
                    index=index,
                    order=self._next_order,
                    params=params,
                    seed=seed + index,
                    stop=stop,
                    ids=ids,
                    prompt=len(tokens),
                    arrived=now,
                    known=len(tokens),
                )
            )
            self._next_order += 1
            self.scheduler.add(replies[-1])
        self._open[self._next_id] = replies
        self._next_id += 1
        return self._next_id - 1

    def step(self) -> list[Output]:
        """Computes the tokens of one step; says what came of it: nothing, as long as prompts are not complete.

        Without a request it returns [] at once.
        """
        now = self._clock()
        outputs = [self._output(sequence, [], "timeout", now) for sequence in self.scheduler.expired(now)]
        chunks, copies = self.scheduler.plan()
        if not chunks:
            assert not self._open, "requests are open and nothing can run"
            return outputs
        for source, target in copies:
            self._runner.copy(source, target)
        for sequence in chunks:
            if sequence.scheduled is None:
                self._counters.began(sequence, now)
        batch, draws = _batch(chunks, self.scheduler.tables)
        self._counters.step(len(batch.tokens), len(chunks))
        drawn = sample(self._runner.forward(batch), draws)
        now = self._clock()
        row = 0
        for sequence, tokens in chunks.items():
            end = sequence.computed + tokens
            if end < sequence.known:  # more of the prompt is to come
                sequence.computed = end
                self.scheduler.pool.note(sequence)
                continue
            rows = end - sequence.known + 1
            outputs.append(self._grow(sequence, drawn[row : row + rows], now))
            row += rows
        return outputs

    def cancel(self, id: int) -> None:
        """Forgets a request and frees its cache. Nothing happens if it has ended already."""
        if not 0 <= id < self._next_id:
            raise ValueError(f"id is {id}; no request has it")
        for sequence in self._open.pop(id, ()):
            self.scheduler.remove(sequence)

    def stats(self) -> Stats:
        """Load and work done; a snapshot."""
        scheduler = self.scheduler
        pool = scheduler.pool
        return Stats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            kv_cache_usage_perc=1 - pool.free / pool.size,
            kv_tokens=self._kv_tokens,
            prefix_cache_queries=scheduler.queries,
            prefix_cache_hits=scheduler.hits,
            num_preemptions=scheduler.preemptions,
            **self._counters.values(),
        )

    def _checked(self, name: str, ids: Collection[int]) -> Ints:
        size = self._runner.vocab_size
        try:
            found = np.asarray(array("i", list(ids)))
        except (TypeError, OverflowError):  # no whole number, or one beyond any vocabulary
            found = None
        if found is None or (len(found) and found.view(np.uint32).max() >= size):
            wrong = next(t for t in ids if not isinstance(t, (int, np.integer)) or not 0 <= t < size)
            raise ValueError(f"{name} holds {wrong!r:.80}; the vocabulary has the ids 0 to {size - 1}")
        return found

    def _grow(self, sequence: Sequence, drawn: list[Drawn | None], now: float) -> Output:
        """Appends the tokens of the draft that are right, and the one after them.

        drawn: what follows the last known token, and what follows each token of the draft.
        """
        start, ids = sequence.known, sequence.ids
        kept: list[Drawn] = []
        finish: Finish | None = None
        right = 0  # tokens of the draft
        for place, item in enumerate(drawn, start):
            if item is None:
                finish = "error"
                break
            agrees = len(kept) + 1 < len(drawn) and int(ids[place]) == item.token
            right += agrees
            ids[place] = item.token
            kept.append(item)
            if item.token in sequence.stop:
                finish = "stop"
            elif place + 1 == len(ids):
                finish = "length"
            if finish or not agrees:
                break
        sequence.known += len(kept)
        sequence.computed = start + right
        if self._speculate:
            self._learn(sequence, kept, len(drawn) - 1, right)
        if kept:
            self._counters.drew(sequence, len(kept), now)
        if finish is None and sequence.computed >= sequence.mark:
            self.scheduler.pool.note(sequence)
        return self._output(sequence, kept, finish, now)

    def _learn(self, sequence: Sequence, kept: list[Drawn], drafted: int, right: int) -> None:
        """Tells a sequence's lookup what came, and what its draft was worth."""
        if sequence.lookup is None:
            sequence.lookup = Lookup(sequence.ids[: sequence.known].tolist(), self._speculate)
        else:
            sequence.lookup.extend([item.token for item in kept])
        if drafted:
            sequence.lookup.judged(drafted, right)
            self._counters.spec_decode_num_draft_tokens += drafted
            self._counters.spec_decode_num_accepted_tokens += right

    def _output(self, sequence: Sequence, kept: list[Drawn], finish: Finish | None, now: float) -> Output:
        """What a step added to a sequence; ends it if that was the last."""
        if finish:
            if finish != "error":
                self.scheduler.pool.note(sequence)
            self.scheduler.remove(sequence, spoilt=finish == "error")
            self._counters.ended(sequence, finish, now)
            replies = self._open[sequence.id]
            replies.remove(sequence)
            if not replies:
                del self._open[sequence.id]
        tokens = [item.token for item in kept]
        if sequence.params.logprobs is None:
            return Output(sequence.id, tokens, [], [], finish, sequence.index)
        logprobs = [item.logprob for item in kept if item.logprob is not None]
        return Output(sequence.id, tokens, logprobs, [item.top for item in kept], finish, sequence.index)


def _batch(chunks: dict[Sequence, int], tables: Ints) -> tuple[Batch, list[Draw]]:
    """The tokens of a step for the runner, and what is to be drawn from the wanted rows."""
    total = sum(chunks.values())
    tokens = np.empty(total, np.int32)
    past, slots, wanted, draws = [], [], [], []
    longest = at = 0
    for sequence, count in chunks.items():
        start, known, ids = sequence.computed, sequence.known, sequence.ids
        end = start + count
        tokens[at : at + count] = ids[start:end]
        past.append(start)
        slots.append(sequence.slot)
        longest = max(longest, end)
        for place in range(known, end + 1):  # of the token to be drawn
            wanted.append(at + place - 1 - start)
            draws.append(Draw(sequence.params, sequence.seed, place, ids[:place]))  # type: ignore[arg-type]  # an array
        at += count
    batch = Batch(
        tokens=tokens,
        counts=np.array(list(chunks.values()), np.int32),
        past=np.array(past, np.int32),
        tables=np.ascontiguousarray(tables[slots, : -(-longest // BLOCK)]),
        wanted=np.array(wanted, np.int32),
    )
    return batch, draws
