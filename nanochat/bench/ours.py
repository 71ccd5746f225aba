"""Our side of the decoding benchmark, in a process of its own: the engine, asked for replies and timed."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.bench.setup import Load, Run, Setup
from nanochat.bench.texts import Row, text_rows
from nanochat.engine.engine import Engine
from nanochat.engine.runner import BLOCK, Batch, make_runner
from nanochat.engine.sampler import SampleParams
from nanochat.machine import process_peak_bytes


class Ours:
    """An engine with its model."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._setup = setup
        with setup.weights() as weights:
            self._runner = make_runner(
                setup.config,
                setup.vocab_size,
                weights,
                kv_tokens=setup.kv_tokens,
                precision=setup.precision,
                device=setup.device,
                threads=setup.threads,
                deterministic=setup.deterministic,
                native=setup.native,
            )
        self._engine = self._new_engine(setup.batch)

    def told(self) -> dict[str, Any]:
        """What the runner says about itself."""
        runner = self._runner
        return {
            "runner": type(runner).__name__,
            "deterministic": runner.deterministic,
            "weight_bytes": runner.weight_bytes,
        }

    def decode(self, load: Load) -> Run:
        """All requests come at once; when each has its first token, `load.new` steps are timed."""
        engine, before = self._engine, self._engine.stats()
        prompts = load.prompts(self._setup.vocab_size).tolist()
        params = SampleParams(max_tokens=self._setup.config.context - load.prompt, temperature=0)
        began = time.perf_counter()
        tokens: dict[int, list[int]] = {engine.add(prompt, params): [] for prompt in prompts}
        first_s: dict[int, float] = {}
        while len(first_s) < load.batch:
            for id, drawn in self._step():
                tokens[id] += drawn
                first_s.setdefault(id, time.perf_counter() - began)
        at_first = sum(map(len, tokens.values()))
        after, start = engine.stats(), time.perf_counter()
        for _ in range(load.new):
            for id, drawn in self._step():
                tokens[id] += drawn
        seconds = time.perf_counter() - start
        for id in tokens:
            engine.cancel(id)
        count = sum(map(len, tokens.values())) - at_first
        return Run(
            first=[reply[0] for reply in tokens.values()],
            first_s=[first_s[id] for id in tokens],
            seconds=seconds,
            drawn=count,
            held=load.batch * load.prompt + at_first + (count - load.batch) / 2,
            cached=after.prefix_cache_hits - before.prefix_cache_hits,
            preempted=engine.stats().num_preemptions - before.num_preemptions,
        )

    def chat(self, turns: int, asked: int, answered: int, seed: int) -> list[tuple[float, int]]:
        """Of each turn: seconds to its first token, and tokens whose keys it computed.

        A turn asks so many random tokens after all that was said before, and gets so many for an answer.
        """
        draw, engine = np.random.default_rng(seed), self._new_engine(1)
        text: list[int] = []
        found = []
        for _ in range(turns):
            text += draw.integers(self._setup.vocab_size, size=asked).tolist()
            before, end, first_s = engine.stats().computed_tokens, len(text) + answered, 0.0
            began = time.perf_counter()
            engine.add(list(text), SampleParams(max_tokens=answered, temperature=0))
            while len(text) < end:
                for output in engine.step():
                    first_s = first_s or time.perf_counter() - began
                    text += output.tokens
            found.append((first_s, engine.stats().computed_tokens - before))
        return found

    def differing(self, requests: int, longest: int, new: int) -> dict[str, float]:
        """Share of requests that get other tokens among many than alone; half are greedy, half are drawn by seed.

        longest: tokens of the longest prompt.
        """
        draw = np.random.default_rng(0)
        asked = [
            (
                draw.integers(self._setup.vocab_size, size=draw.integers(1, longest + 1)).tolist(),
                SampleParams(max_tokens=new, temperature=float(number % 2), seed=number),
            )
            for number in range(requests)
        ]
        alone = [self._replies(self._new_engine(1), [one])[0] for one in asked]
        among = self._replies(self._new_engine(self._setup.batch), asked)
        other = [a != b for a, b in zip(alone, among, strict=True)]
        return {
            "all": sum(other) / len(other),
            "greedy": sum(other[::2]) / len(other[::2]),
            "seeded": sum(other[1::2]) / max(1, len(other[1::2])),
        }

    def bits(self, texts: Sequence[Path], vocabulary: Path) -> tuple[float, int]:
        """Nats of the texts' targets, and their bytes."""
        nats, size = 0.0, 0
        for row in text_rows(texts, vocabulary, self._setup.config.context):
            costs = self._nats(row)
            nats += float(costs[row.sizes > 0].sum())
            size += int(row.sizes.sum())
        return nats, size

    def peak(self) -> dict[str, int]:
        """Most memory so far."""
        peaks = {"peak_bytes": process_peak_bytes()}
        if self._setup.device == "cuda":
            peaks["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
        return peaks

    def _new_engine(self, batch: int) -> Engine:
        return Engine(
            self._runner, max_batch=batch, step_tokens=self._setup.step_tokens, speculate=self._setup.speculate
        )

    def _step(self) -> Iterator[tuple[int, list[int]]]:
        """Tokens that a step drew for each request. RuntimeError if one of them ended: then nothing is measured."""
        for output in self._engine.step():
            if output.finish is not None:
                raise RuntimeError(f"a request ended with reason {output.finish!r} while it was measured")
            yield output.id, output.tokens

    def _replies(self, engine: Engine, asked: Iterable[tuple[list[int], SampleParams]]) -> list[list[int]]:
        replies: dict[int, list[int]] = {engine.add(*one): [] for one in asked}
        ended = 0
        while ended < len(replies):
            for output in engine.step():
                replies[output.id] += output.tokens
                ended += output.finish is not None
        return list(replies.values())

    def _nats(self, row: Row) -> np.ndarray:
        """(T,) float64, by the runner alone."""
        count = len(row.tokens)
        batch = Batch(
            tokens=row.tokens,
            counts=np.array([count], dtype=np.int32),
            past=np.zeros(1, dtype=np.int32),
            tables=np.arange(-(-count // BLOCK), dtype=np.int32)[None],
            wanted=np.arange(count, dtype=np.int32),
        )
        logits = self._runner.forward(batch).double().cpu()  # (T, V)
        chosen = logits.gather(1, torch.from_numpy(row.targets)[:, None]).squeeze(1)
        return (logits.logsumexp(1) - chosen).numpy()
