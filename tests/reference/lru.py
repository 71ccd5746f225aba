"""How often an ideal cache of whole blocks would have had what was asked for: one list, least recently used first."""

from collections import OrderedDict


def lru_hits(requests: list[list[int]], size: int) -> int:
    """Ids found, over all requests, one after the other; of each request the ids before the first that is missing."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for ids in requests:
        for id in ids:
            if id not in cache:
                break
            hits += 1
        for id in reversed(ids):  # what comes first in a request is kept longest
            cache[id] = None
            cache.move_to_end(id)
        while len(cache) > size:
            cache.popitem(last=False)
    return hits
