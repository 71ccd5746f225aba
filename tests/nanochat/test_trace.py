"""How much of a real stream of requests is found in the cache, against an ideal one."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from nanochat.config import ModelConfig
from nanochat.engine.engine import Engine
from nanochat.engine.runner import BLOCK
from nanochat.engine.sampler import SampleParams
from tests.nanochat.runners import NullRunner
from tests.reference.lru import lru_hits

TRACE = Path(__file__).parents[3] / "shared/data/traces/mooncake_conversation.jsonl.gz"
VOCAB = 4096
CONTEXT = 4096


def share_of_ideal(requests: list[tuple[list[int], int]], share: float, step_tokens: int = 512) -> float:
    """requests: (ids of blocks, tokens of the reply). share: blocks of the cache, of all different ones."""
    ids = [ids for ids, _ in requests]
    blocks = max(int(share * len({id for request in ids for id in request})), CONTEXT // BLOCK)
    config = ModelConfig(depth=1, context=CONTEXT, head_dim=8, aspect=8)
    engine = Engine(NullRunner(config, VOCAB, blocks), max_batch=8, step_tokens=step_tokens)
    left = set()
    for blocks_of, reply in requests:
        tokens = [token for id in blocks_of for token in np.random.default_rng(id).integers(2, VOCAB, BLOCK).tolist()]
        left.add(engine.add(tokens, SampleParams(max_tokens=reply, temperature=0)))
    while left:
        left -= {output.id for output in engine.step() if output.finish}
    stats = engine.stats()
    assert stats.prefix_cache_queries == BLOCK * sum(map(len, ids))
    assert stats.computed_tokens >= stats.prefix_cache_queries - stats.prefix_cache_hits
    found = stats.prefix_cache_hits / BLOCK / lru_hits(ids, blocks)
    print(f"{blocks} blocks: {stats.prefix_cache_hits / BLOCK:.0f} hits, {found:.3f} of the ideal")
    return found


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_a_real_trace_finds_nine_tenths_of_what_an_ideal_cache_would(share: float) -> None:
    if not TRACE.exists():
        pytest.skip(f"{TRACE} is not there")
    with gzip.open(TRACE, "rt") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(500), strict=False)]
    scale = 512 // BLOCK  # the trace's blocks are of 512 tokens
    requests = [(row["hash_ids"], max(row["output_length"] // scale, 1)) for row in rows]
    assert share_of_ideal(requests, share) >= 0.9


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_so_do_chats_with_common_system_prompts(share: float) -> None:
    draw = random.Random(2)
    fresh = iter(range(1_000_000))
    systems = [[next(fresh) for _ in range(size)] for size in (3, 8, 20)]
    chats: list[list[int]] = []
    requests = []
    for _ in range(300):
        if len(chats) < 40 or draw.random() < 0.3:
            chats.append(list(draw.choice(systems)))
        chat = draw.choice(chats[-40:])
        chat += [next(fresh) for _ in range(draw.randint(1, 6))]
        requests.append((list(chat), draw.randint(1, 20)))
    assert share_of_ideal(requests, share) >= 0.9
