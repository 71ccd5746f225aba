"""Generation as one would explain it: the whole text through the model for every token, sampling in plain Python.

No cache, no batch, no numpy but for its Philox. Slow on purpose.
"""

import math

import numpy as np
import torch

from nanochat.attention import Rows
from nanochat.engine.sampler import SampleParams
from nanochat.model import GPT


@torch.inference_mode()
def generate(model: GPT, prompt: list[int], params: SampleParams) -> list[int]:
    """The reply, its stop token included."""
    reply: list[int] = []
    while len(reply) < params.max_tokens and len(prompt) + len(reply) < model.config.context:
        text = [*prompt, *reply]
        logits = model.logits(model(torch.tensor([text]), Rows()))[0, -1].tolist()
        reply.append(pick(logits, params, len(text)))
        if reply[-1] in params.stop:
            break
    return reply


def pick(logits: list[float], params: SampleParams, position: int) -> int:
    """One token: filter, then walk along the weights until the random number is used up."""
    if params.temperature == 0:
        return logits.index(max(logits))
    weights = weights_of(logits, params)
    left = np.random.Generator(np.random.Philox(key=params.seed, counter=position)).random() * math.fsum(weights)
    for token, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return token
    return max(token for token, weight in enumerate(weights) if weight)


def weights_of(logits: list[float], params: SampleParams) -> list[float]:
    """Weight of each token, 0 where top_k or top_p rule it out."""
    top = max(logits)
    weights = [math.exp((logit - top) / params.temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = ranked[: params.top_k]
    if params.top_p is not None:
        total, taken, few = math.fsum(weights[token] for token in kept), 0.0, []
        for token in kept:
            few.append(token)
            taken += weights[token]
            if taken >= params.top_p * total:
                break
        kept = few
    return [weight if token in kept else 0.0 for token, weight in enumerate(weights)]
