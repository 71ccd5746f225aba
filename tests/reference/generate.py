"""Generation as one would explain it: the whole text through the model for every token, sampling in plain Python.

No cache, no batch, no speculation, no numpy but for its Philox. Slow on purpose.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from nanochat.attention import Rows
from nanochat.engine.sampler import SampleParams
from nanochat.model import GPT


@torch.inference_mode()
def generate(model: GPT, prompt: list[int], params: SampleParams, index: int = 0) -> list[int]:
    """Reply number `index` of the n, its stop token included."""
    assert 0 <= index < params.n
    reply: list[int] = []
    while len(reply) < params.max_tokens and len(prompt) + len(reply) < model.config.context:
        text = [*prompt, *reply]
        logits = model.logits(model(torch.tensor([text]), Rows()))[0, -1].tolist()
        reply.append(pick(logits, params, len(text), text, index))
        if reply[-1] in params.stop:
            break
    return reply


def pick(logits: list[float], params: SampleParams, position: int, seen: Sequence[int] = (), index: int = 0) -> int:
    """One token: filter, then walk along the weights until the random number is used up."""
    scores = penalised(logits, params, seen)
    if params.temperature == 0:
        return scores.index(max(scores))
    assert params.seed is not None
    weights = weights_of(scores, params)
    random = np.random.Generator(np.random.Philox(key=params.seed + index, counter=position)).random()
    left = random * math.fsum(weights)
    for token, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return token
    return max(token for token, weight in enumerate(weights) if weight)


def penalised(logits: list[float], params: SampleParams, seen: Sequence[int]) -> list[float]:
    """Tokens that were there become less likely."""
    penalty, there = params.repetition_penalty, set(seen)
    return [
        logit if token not in there else logit * penalty if logit < 0 else logit / penalty
        for token, logit in enumerate(logits)
    ]


def weights_of(scores: list[float], params: SampleParams) -> list[float]:
    """Weight of each token, 0 where top_k, top_p or min_p rule it out."""
    top = max(scores)
    weights = [math.exp((score - top) / params.temperature) for score in scores]
    ranked = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    kept = ranked[: params.top_k]
    if params.top_p is not None:
        total, taken, few = math.fsum(weights[token] for token in kept), 0.0, []
        for token in kept:
            few.append(token)
            taken += weights[token]
            if taken >= params.top_p * total:
                break
        kept = few
    if params.min_p is not None:
        least = params.min_p * max(weights)
        kept = [token for token in kept if weights[token] >= least]
    inside = set(kept)
    return [weight if token in inside else 0.0 for token, weight in enumerate(weights)]


def logprobs_of(logits: list[float], count: int) -> tuple[list[float], list[int]]:
    """The model's own log-probabilities, and its `count` likeliest tokens."""
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(logit - top) for logit in logits))
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    return [logit - total for logit in logits], ranked[:count]
