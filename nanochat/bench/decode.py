"""Decoding speed: tokens/s of the Engine when several requests arrive at once, with random weights and prompts.

A reply's first token belongs to the prefill, which is timed apart. No baseline yet: `baseline` and `ratio` are null
until the issue on decoding speed brings one.

    nanochat bench decode [--json]       or, where there is only torch: python -m nanochat.bench.decode
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from nanochat.bench.measure import DTYPES, Measurement, measurement, parse, parser, show, whole
from nanochat.config import ModelConfig
from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.flops import parameters
from nanochat.model import GPT

VOCABULARY, CONTEXT = 8192, 512
PROMPT, NEW = 256, 32  # tokens


def main(argv: Sequence[str] | None = None) -> int:
    """The verb `nanochat bench decode`."""
    options = parser("decode", "Tokens/s of the engine's greedy replies to random prompts.")
    options.add_argument("--depth", type=whole, default=6, help="layers, each 64 wide (default: %(default)s)")
    options.add_argument(
        "--batch", type=whole, nargs="+", default=[1, 8, 32], help="requests at once (default: 1 8 32)"
    )
    options.add_argument("--runs", type=whole, default=3, help="times each case is measured (default: %(default)s)")
    args = parse(options, argv)
    show(measure(args), as_json=args.json)
    return 0


def measure(args: argparse.Namespace) -> Iterator[Measurement]:
    """One measurement for each batch size."""
    config = ModelConfig(depth=args.depth, context=CONTEXT, head_dim=64)
    model = random_model(config, DTYPES[args.precision], args.device)
    replies(model, 1)  # warm-up
    for batch in args.batch:
        prefill, decode = zip(*(replies(model, batch) for _ in range(args.runs)), strict=True)
        more = {
            "parameters": parameters(config, VOCABULARY),
            "vocabulary": VOCABULARY,
            "batch": batch,
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "prefill_tokens_per_s": statistics.median(prefill),
        }
        yield measurement("decode", f"depth {args.depth}, batch {batch}", decode, args, more)


def random_model(config: ModelConfig, dtype: torch.dtype, device: str) -> GPT:
    """Weights in `dtype`, as a server keeps them."""
    model = GPT(config, VOCABULARY, dtype)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=config.width**-0.5, generator=generator)
    return model.to(device, dtype)


def replies(model: GPT, batch: int) -> tuple[float, float]:
    """Asks `batch` requests at once; tokens/s of the prefill, and of the tokens after it."""
    engine = Engine(model, max_batch=batch, kv_tokens=batch * (PROMPT + NEW))
    prompts = torch.randint(VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).tolist()
    began = time.perf_counter()
    waiting = {engine.add(prompt, SampleParams(max_tokens=NEW, temperature=0)) for prompt in prompts}
    while waiting:  # for its first token
        waiting -= {output.id for output in engine.step()}
    first, drawn = time.perf_counter(), engine.stats().new_tokens
    while engine.step():
        pass
    seconds = time.perf_counter() - first
    return batch * PROMPT / (first - began), (engine.stats().new_tokens - drawn) / seconds


if __name__ == "__main__":
    raise SystemExit(main())
