"""One copy of the model behind Ray Serve: tokens in, tokens out. Text and HTTP are the gateway's.

deploy.py makes a deployment of it; the class itself needs no Ray.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import torch

from nanochat.checkpoint import open_weights
from nanochat.engine.engine import Engine
from nanochat.engine.runner import Precision, make_runner
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from nanochat.files import Files
from pipelines.service.worker import Worker
from pipelines.spec import Capacity


class Replica:
    """Loads a bundle and runs one engine in a thread."""

    def __init__(self, files: Files, precision: Precision, capacity: Capacity) -> None:
        torch.set_num_threads(capacity.cpus)
        with open_weights(files) as (config, vocab_size, weights):
            runner = make_runner(
                config,
                vocab_size,
                weights,
                kv_tokens=capacity.kv_tokens,
                precision=capacity.precision or precision,
                device="cpu" if capacity.gpu is None else "cuda",
                threads=capacity.cpus,
            )
        self._worker = Worker(Engine(runner, max_batch=capacity.max_batch, speculate=capacity.speculate))

    async def generate(self, tokens: list[int], params: SampleParams) -> AsyncGenerator[Output, None]:
        """As Backend.generate."""
        async with aclosing(self._worker.generate(tokens, params)) as outputs:
            async for output in outputs:
                yield output

    def stats(self) -> Stats:
        """The engine's load."""
        return self._worker.load()

    def check_health(self) -> None:
        """Serve asks this every few seconds and replaces the replica if it raises."""
        self._worker.check()
