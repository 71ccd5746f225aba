"""The engine without a service around it, under the same load, in a process of its own: what HTTP and Ray cost."""

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType

from nanochat.engine.runner import Precision
from nanochat.engine.sampler import SampleParams
from nanochat.files import Files
from pipelines.bench.asked import Load, prompt_tokens
from pipelines.bench.outcome import Outcome, Reply
from pipelines.service.loading import load_engine
from pipelines.spec import Capacity

LONGEST_SLEEP_S = 0.05  # so that Ctrl-C is heard


@dataclass(frozen=True, kw_only=True)
class BareSetup:
    """A bundle, and how much of a machine its engine gets."""

    files: Files
    dtype: Precision
    capacity: Capacity
    vocabulary: int  # random ids are below
    temperature: float = 0.0


class Bare:
    """One engine, made as a replica makes it."""

    def __init__(self, setup: BareSetup) -> None:
        signal.signal(signal.SIGINT, self._interrupt)
        self._setup, capacity = setup, setup.capacity
        self._interrupted = False
        self._engine = load_engine(setup.files, setup.dtype, capacity)

    def pid(self) -> int:
        """Of this process; SIGINT to it ends the load that runs."""
        return os.getpid()

    def run(self, load: Load) -> Outcome:
        """The load, to the end of its last reply."""
        self._interrupted = False
        replies: list[Reply] = []
        running: dict[int, Reply] = {}
        began, cpu_s, window_s = time.perf_counter(), time.process_time(), load.seconds or 0.0
        while not self._interrupted:
            now = time.perf_counter() - began
            while self._due(load, len(replies), len(running), now):
                self._add(load, len(replies), now, running, replies)
            if load.clients and len(running) < load.clients and load.seconds is None:
                window_s = window_s or now
            if not running:
                if not self._to_come(load, len(replies)):
                    break
                time.sleep(min(LONGEST_SLEEP_S, max(0.0, load.asked[len(replies)].at_s - now)))
                continue
            outputs = self._engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                reply = running[output.id]
                reply.times.extend([now] * len(output.tokens))
                reply.tokens += len(output.tokens)
                if output.finish:
                    reply.end_s = now
                    del running[output.id]
        for id in running:
            self._engine.cancel(id)
        wall_s = time.perf_counter() - began
        cut = self._interrupted or not load.clients
        return Outcome(
            replies=[reply for reply in replies if reply.end_s],
            window_s=max(wall_s if cut else window_s, 1e-9),
            closed=load.clients is not None,
            cpu_s=time.process_time() - cpu_s,
            wall_s=wall_s,
            interrupted=self._interrupted,
        )

    def _due(self, load: Load, number: int, running: int, now: float) -> bool:
        """Whether the request of this number is to be asked now."""
        if load.clients:
            return running < load.clients and load.more(number, now)
        return number < len(load.asked) and load.asked[number].at_s <= now

    def _to_come(self, load: Load, number: int) -> bool:
        return not load.clients and number < len(load.asked)

    def _add(self, load: Load, number: int, now: float, running: dict[int, Reply], replies: list[Reply]) -> None:
        one = load.nth(number)
        params = SampleParams(max_tokens=one.new, temperature=self._setup.temperature)
        id = self._engine.add(prompt_tokens(load, number, self._setup.vocabulary), params)
        due_s = now if load.clients else one.at_s
        running[id] = Reply(one.prompt, one.new, due_s, sent_s=now)
        replies.append(running[id])

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._interrupted = True
