"""The sampler's rules (sampler.py) for logits on a GPU: all rows at once, and only what was drawn is copied back.

256 rows of 32,768 logits are 34 MB: taken to the CPU, they would cost more than the model's own step. Works on any
device of torch; float64 throughout, as on the CPU, though sums in another order may differ in their last bits.
"""

# R rows, F of them that are filtered by rank, V vocabulary

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanochat.engine.sampler import Draw, Drawn, SampleParams, Uniform

HEAD = 1024  # tokens among which the last one that top_k and top_p keep is looked for first


@torch.inference_mode()
def sample_on_device(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn | None]:
    """As `sampler.sample`. logits: (R, V) fp32."""
    highest, tokens = logits.max(dim=1)  # of equal ones the lowest id
    sound = highest.isfinite() & (logits.amin(dim=1) > -torch.inf)
    rows = [row for row, draw in enumerate(draws) if draw.params.temperature > 0 or draw.params.repetition_penalty != 1]
    if rows:
        chosen = [draws[row] for row in rows]
        scores = _penalised(logits[_on(logits, rows)].double(), chosen)
        tokens[_on(logits, rows)] = torch.where(
            _on(logits, [draw.params.temperature > 0 for draw in chosen]),
            _drawn(scores, chosen),
            scores.argmax(dim=1),
        )
    ids = torch.where(sound, tokens, -1).tolist()  # the one copy, where no log-probabilities are asked for
    drawn = [Drawn(id, None, {}) if id >= 0 else None for id in ids]
    asked = [row for row, token in enumerate(drawn) if token and draws[row].params.logprobs is not None]
    if asked:
        _add_logprobs(logits[_on(logits, asked)], [(drawn[row], draws[row].params) for row in asked])
    return drawn


def _on(like: Tensor, values: list[int] | list[bool] | list[float]) -> Tensor:
    """(R,) on the device; floats as float64."""
    dtype = torch.float64 if values and isinstance(values[0], float) else None
    return torch.tensor(values, dtype=dtype, device=like.device)


def _penalised(scores: Tensor, draws: list[Draw]) -> Tensor:
    for row, draw in zip(scores, draws, strict=True):
        penalty = draw.params.repetition_penalty
        if penalty != 1:
            seen = torch.from_numpy(np.asarray(draw.seen, dtype=np.int64)).to(scores.device)
            old = row[seen]
            row[seen] = torch.where(old < 0, old * penalty, old / penalty)
    return scores


def _drawn(scores: Tensor, draws: list[Draw]) -> Tensor:
    """(R, V) fp64 -> the token of each row, (R,); of no meaning in a row that is greedy."""
    number = Uniform()
    numbers = _on(scores, [number(draw.seed, draw.position) for draw in draws])
    temperatures = _on(scores, [float(draw.params.temperature) or 1.0 for draw in draws])
    tops = scores.amax(dim=1, keepdim=True)
    weights = ((scores - tops) / temperatures[:, None]).exp_()
    ranked = [
        row
        for row, draw in enumerate(draws)
        if (draw.params.top_k or scores.shape[1]) < scores.shape[1]
        or (draw.params.top_p is not None and draw.params.top_p < 1)
    ]
    if ranked:
        at = _on(scores, ranked)
        weights[at] *= _kept(scores[at], weights[at], temperatures[at], [draws[row].params for row in ranked])
    least = _on(scores, [float(draw.params.min_p or 0) for draw in draws])
    weights *= weights >= least[:, None]
    below = weights.cumsum(dim=1)
    possible = weights > 0
    hit = possible & (below > (numbers * below[:, -1])[:, None])  # a weight of 0 is passed over whatever sums do
    last = scores.shape[1] - 1 - possible.flip(1).int().argmax(dim=1)
    return torch.where(hit.any(dim=1), hit.int().argmax(dim=1), last)


def _kept(scores: Tensor, weights: Tensor, temperatures: Tensor, params: list[SampleParams]) -> Tensor:
    """Which tokens top_k and top_p keep, (F, V): the first so many by rank, equal ones by id."""
    size = scores.shape[1]
    most = _on(scores, [min(one.top_k or size, size) for one in params])
    shares = _on(scores, [1.0 if one.top_p is None else float(one.top_p) for one in params])
    for width in (min(HEAD, size), size):
        best = scores.topk(width, dim=1).values  # descending
        below = ((best - best[:, :1]) / temperatures[:, None]).exp_().cumsum(dim=1)
        totals = torch.where(
            most < size, below.gather(1, (most - 1).clamp(max=width - 1)[:, None])[:, 0], weights.sum(1)
        )
        goals = shares * totals
        reaching = (most == size) & (below[:, -1] >= goals)
        if width == size or bool(((most <= width) | reaching).all()):
            break
    reached = 1 + (below < goals[:, None]).sum(dim=1)
    counts = torch.where(shares < 1, torch.minimum(reached, most), most)
    edges = best.gather(1, (counts - 1).clamp(max=width - 1)[:, None])  # the last score that is kept
    equal = scores == edges
    above = scores > edges
    return above | (equal & (equal.cumsum(dim=1) <= (counts - above.sum(dim=1))[:, None]))


def _add_logprobs(logits: Tensor, asked: list[tuple[Drawn | None, SampleParams]]) -> None:
    """Fills in what was asked for. logits: (R, V), those of the rows asked for."""
    scores = logits.double()
    scores = scores - scores.logsumexp(dim=1, keepdim=True)
    tokens = _on(logits, [drawn.token for drawn, _ in asked if drawn])
    own = scores.gather(1, tokens[:, None])[:, 0].tolist()
    count = min(max(params.logprobs or 0 for _, params in asked), logits.shape[1])
    # Equal scores rank by id: as whole numbers in the order of the scores, the ids below them, all are different.
    bits = logits.contiguous().view(torch.int32).long()
    order = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    keys = (order << 32) - torch.arange(logits.shape[1], device=logits.device)
    likeliest = keys.topk(count, dim=1).indices
    values = scores.gather(1, likeliest).tolist()
    for (drawn, params), logprob, ids, ranked in zip(asked, own, likeliest.tolist(), values, strict=True):
        assert drawn, "only sound rows are asked for"
        drawn.logprob = logprob
        drawn.top = dict(zip(ids[: params.logprobs], ranked[: params.logprobs], strict=True))
