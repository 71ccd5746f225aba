"""The peer's side of the decoding benchmark: transformers' NanoChatForCausalLM with the same weights.

Treated as well as it can be: inference mode, no generate() around the loop, logits of the last position only, the
most likely token taken on the device, nothing waited for between steps.
"""

import time
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat.bench.measure import DTYPES
from nanochat.bench.setup import Load, Run, Setup
from nanochat.checkpoint import transformers_config
from nanochat.engine.runner import Precision
from nanochat.machine import process_peak_bytes

CacheKind = Literal["dynamic", "static"]
CACHES: tuple[CacheKind, ...] = ("dynamic", "static")
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")


class Transformers:
    """The peer with its model, in `setup.precision`."""

    def __init__(self, setup: Setup) -> None:
        from transformers import NanoChatConfig, NanoChatForCausalLM, logging

        logging.disable_progress_bar()
        torch.set_num_threads(setup.threads)
        self._setup, dtype = setup, DTYPES[setup.precision]
        told = transformers_config(setup.config, setup.vocab_size, dtype)
        with setup.weights() as weights:
            self._model = NanoChatForCausalLM.from_pretrained(
                None,
                config=NanoChatConfig(**told),
                state_dict={name: weight.to(dtype) for name, weight in weights.items()},
                dtype=dtype,
            )
        self._model.eval().to(setup.device)

    @torch.inference_mode()
    def decode(self, load: Load, kind: CacheKind) -> Run:
        """The prompts in one batch, then `load.new` steps."""
        tokens = load.prompts(self._setup.vocab_size).to(self._setup.device)
        cache = self._cache(kind, load.prompt + load.new)
        began = self._now()
        tokens = first = self._next(tokens, cache)
        at_first = self._now()
        for _ in range(load.new):
            tokens = self._next(tokens, cache)
        seconds = self._now() - at_first
        drawn = load.batch * load.new
        return Run(
            first=first.flatten().tolist(),
            first_s=[at_first - began] * load.batch,
            seconds=seconds,
            drawn=drawn,
            held=load.batch * (load.prompt + 1) + (drawn - load.batch) / 2,
        )

    @torch.inference_mode()
    def brief(self, load: Load, kind: CacheKind) -> tuple[float, float]:
        """tokens/s of the prompts and of the steps after them, in short: `load.new` steps twice, the better counts."""
        tokens = load.prompts(self._setup.vocab_size).to(self._setup.device)
        cache = self._cache(kind, load.prompt + 2 * load.new + 1)
        began = self._now()
        tokens = self._next(tokens, cache)
        prefill = load.batch * load.prompt / (self._now() - began)
        tokens = self._next(tokens, cache)
        rates = []
        for _ in range(2):
            began = self._now()
            for _ in range(load.new):
                tokens = self._next(tokens, cache)
            rates.append(load.batch * load.new / (self._now() - began))
        return prefill, max(rates)

    def told(self) -> dict[str, str]:
        """Which version it is."""
        import transformers

        return {"version": transformers.__version__}

    def peak(self) -> dict[str, int]:
        """Most memory so far."""
        peaks = {"peak_bytes": process_peak_bytes()}
        if self._setup.device == "cuda":
            peaks["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
        return peaks

    def _next(self, tokens: Tensor, cache: Any) -> Tensor:
        """tokens (B, T) -> (B, 1), the most likely next ones."""
        out = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        likeliest: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return likeliest

    def _cache(self, kind: CacheKind, tokens: int) -> Any:
        from transformers import DynamicCache, StaticCache

        if kind == "static":
            return StaticCache(self._model.config, max_cache_len=tokens)
        return DynamicCache(config=self._model.config)

    def _now(self) -> float:
        if self._setup.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
