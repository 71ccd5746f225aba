"""A bundle's engine, as a replica runs it."""

from itertools import count

import torch

from nanochat.checkpoint import open_weights
from nanochat.engine.engine import Engine
from nanochat.engine.runner import Precision, make_runner
from nanochat.engine.sampler import SampleParams
from nanochat.files import Files
from pipelines.spec import Capacity

SMOKE_TOKENS = 8


def load_engine(files: Files, dtype: Precision, capacity: Capacity) -> Engine:
    """On so many threads and so much cache. Raises ValueError for weights that do not fit the bundle's config."""
    torch.set_num_threads(capacity.cpus)
    with open_weights(files) as (config, vocab_size, weights):
        runner = make_runner(
            config,
            vocab_size,
            weights,
            kv_tokens=capacity.kv_tokens,
            precision=capacity.precision or dtype,
            device="cpu" if capacity.gpu is None else "cuda",
            threads=capacity.cpus,
        )
    return Engine(runner, max_batch=capacity.max_batch, step_tokens=capacity.step_tokens, speculate=capacity.speculate)


def smoke(engine: Engine) -> None:
    """A real reply before anybody is let in. Raises RuntimeError where the weights give no finite logits."""
    engine.add([0], SampleParams(SMOKE_TOKENS, temperature=0))
    for _ in count():
        for output in engine.step():
            if output.finish == "error":
                raise RuntimeError("the model's logits are not finite: the weights of this bundle are broken")
            if output.finish:
                return
