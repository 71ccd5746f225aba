"""Greedy answers to questions, for scores that compare them with what was wanted."""

from collections.abc import Sequence

import torch

from nanochat.engine.engine import Engine
from nanochat.engine.runner import make_runner
from nanochat.engine.sampler import SampleParams
from nanochat.model import GPT

BATCH = 8  # questions answered together


def greedy_answers(model: GPT, prompts: Sequence[list[int]], most: int, stop: int) -> list[list[int]]:
    """The tokens of each answer, without the `stop` token that ended it; at most `most` of each.

    Computed where the model is, in bf16 if it computes in bf16, else in fp32.
    ValueError for a prompt that leaves no room for a token (Engine.add).
    """
    runner = make_runner(
        model.config,
        model.vocab_size,
        model.state_dict(),
        kv_tokens=BATCH * model.config.context,
        precision="bf16" if model.dtype == torch.bfloat16 else "fp32",
        device=str(model.device),
    )
    engine = Engine(runner, max_batch=BATCH)
    params = SampleParams(max_tokens=most, temperature=0.0, stop=(stop,))
    answers: dict[int, list[int]] = {engine.add(prompt, params): [] for prompt in prompts}
    left = len(answers)
    while left:
        for output in engine.step():
            answers[output.id] += [token for token in output.tokens if token != stop]
            left -= output.finish is not None
    return list(answers.values())
