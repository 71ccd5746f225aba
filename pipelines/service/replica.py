"""One copy of the model behind Ray Serve: tokens in, tokens out. Text and HTTP are the gateway's.

deploy.py makes a deployment of it; the class itself needs no Ray.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import torch

from nanochat.checkpoint import load_model
from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output, Stats
from nanochat.files import Files
from pipelines.service.worker import Worker
from pipelines.spec import Capacity

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Replica:
    """Loads a bundle and runs one engine in a thread."""

    def __init__(self, files: Files, dtype: str, capacity: Capacity) -> None:
        if capacity.gpu is None:
            torch.set_num_threads(capacity.cpus)
        model = load_model(files, DTYPES[dtype], "cpu" if capacity.gpu is None else "cuda")
        self._worker = Worker(Engine(model, max_batch=capacity.max_batch, kv_tokens=capacity.kv_tokens))

    async def generate(self, tokens: list[int], params: SampleParams) -> AsyncGenerator[Output, None]:
        """As Backend.generate."""
        async with aclosing(self._worker.generate(tokens, params)) as outputs:
            async for output in outputs:
                yield output

    def stats(self) -> Stats:
        """The engine's load."""
        return self._worker.stats()

    def check_health(self) -> None:
        """Serve asks this every few seconds and replaces the replica if it raises."""
        self._worker.check()
