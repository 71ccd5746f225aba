"""Where a prompt is answered soonest: which replica has computed which beginnings, and how much work each has.

A prompt costs a replica the tokens that it does not find in its cache, and it waits for the tokens before it; it goes
where the sum is least. So a chat stays where it is until the others have so much less to do that computing all of it
anew is cheaper, and a beginning that everybody uses spreads over all replicas by itself.
Knows what this process has sent, no more: a hint that costs time when it is wrong, never a token. No Ray, no torch.
Cost in tokens instead of a threshold on the match: Preble, Srivatsa et al. 2024; chains of hashes: vLLM.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

BLOCK = 16  # tokens; the engine's, which to import would mean to load torch
BLOCKS = 1_024  # of a replica's cache, until it is known
REPLY_TOKENS = 64  # of a reply, until some have been seen
SMOOTHING = 0.02  # the share of the newest reply in the mean
REPLY_COST = 3  # of a token drawn, in tokens of a prompt: 645 against 2,113 tokens/s at depth 12 and batch 8

Key = tuple[str, int]  # a client and its number for a request


class Prefixes:
    """What replicas have computed lately. blocks: of one's cache; the oldest are forgotten here as they are there."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        self.blocks = blocks
        self._known: dict[str, OrderedDict[int, None]] = {}  # replica -> digests, the next to be forgotten first
        self._turn: dict[str, int] = {}  # replica -> when it was last given something
        self._turns = 0

    def choose(self, tokens: Sequence[int], loads: Mapping[str, float]) -> list[str]:
        """The replicas, the one that has answered soonest first. loads: tokens that each has to compute."""
        digests = _digests(tokens)
        cost = {replica: load - BLOCK * self._common(digests, replica) for replica, load in loads.items()}
        return sorted(loads, key=lambda replica: (cost[replica], loads[replica], self._turn.get(replica, 0)))

    def note(self, tokens: Sequence[int], replica: str) -> int:
        """A replica computes these tokens now. Returns how many of them it does not know yet."""
        digests = _digests(tokens)
        common = self._common(digests, replica)
        known = self._known.setdefault(replica, OrderedDict())
        for digest in reversed(digests):  # leaves are forgotten before what they hang on
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > self.blocks:
            known.popitem(last=False)
        self._turns += 1
        self._turn[replica] = self._turns
        return len(tokens) - BLOCK * common

    def forget(self, replica: str) -> None:
        """It is gone."""
        self._known.pop(replica, None)
        self._turn.pop(replica, None)

    def _common(self, digests: Sequence[int], replica: str) -> int:
        """Blocks at the beginning that a replica knows."""
        known = self._known.get(replica, ())
        return next((place for place, digest in enumerate(digests) if digest not in known), len(digests))


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    tokens: Sequence[int] = ()
    replica: str | None = None  # None: on its way to one
    tried: frozenset[str] = frozenset()  # replicas that it was placed on
    prompt: float = 0.0  # tokens that its replica has to compute before the first one comes
    reply: float = 0.0  # what the tokens cost that are expected after it


class Ledger:
    """The work of a deployment's replicas, as far as one process has sent it. Any thread may call.

    The process says when a request begins and ends, the router in it where the request goes. What is placed counts
    at once, not when the replica has answered: a burst would go to one replica as a whole.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prefixes = Prefixes()
        self._loads: dict[str, float] = {}  # of every replica that takes requests
        self._open: dict[Key, _Open] = {}
        self._reply_tokens = float(REPLY_TOKENS)

    def size(self, kv_tokens: int) -> None:
        """A replica's cache holds so many tokens."""
        self._prefixes.blocks = max(kv_tokens // BLOCK, 1)

    def update(self, replicas: Iterable[str]) -> None:
        """These take requests now, and no others."""
        with self._lock:
            now = set(replicas)
            for replica in self._loads.keys() - now:
                del self._loads[replica]
                self._prefixes.forget(replica)
            for replica in now - self._loads.keys():
                self._loads[replica] = 0.0

    def serves(self, replica: str) -> bool:
        """Whether it takes requests. One that does not, but lives, ends what it has begun."""
        with self._lock:
            return replica in self._loads

    def loads(self) -> dict[str, float]:
        """Work that every replica has, in tokens of prompts."""
        with self._lock:
            return dict(self._loads)

    def began(self, key: Key) -> None:
        """A request is about to be sent. What is placed without that is not counted, for nobody says when it ends."""
        with self._lock:
            self._open[key] = _Open()

    def place(self, key: Key, tokens: Sequence[int], most: int, n: int, refused: frozenset[str]) -> str | None:
        """The replica for a request with n replies of at most so many tokens; None: there is none.

        One that has refused it, or where it was placed since it began, is chosen only if there is no other.
        """
        with self._lock:
            self._take_off(key)
            request = self._open.get(key)
            if request is not None:
                refused |= request.tried
            loads = {replica: load for replica, load in self._loads.items() if replica not in refused} or self._loads
            if not loads:
                return None
            replica = self._prefixes.choose(tokens, loads)[0]
            prompt = self._prefixes.note(tokens, replica)
            if request is not None:
                reply = REPLY_COST * n * min(most, self._reply_tokens)
                self._open[key] = _Open(tokens, replica, refused | {replica}, prompt, reply)
                self._loads[replica] += prompt + reply
            return replica

    def heard(self, key: Key) -> None:
        """A first token has come: the prompt is computed."""
        with self._lock:
            request = self._open.get(key)
            if request is not None and request.replica in self._loads:
                self._loads[request.replica] -= request.prompt
                request.prompt = 0.0

    def ended(self, key: Key, replies: Sequence[Sequence[int]] = ()) -> None:
        """A request has ended, however. replies: the tokens of each; a chat's next turn begins with one of them."""
        with self._lock:
            self._take_off(key)
            request = self._open.pop(key, None)
            if request is None or not any(replies):
                return
            for reply in replies:
                self._reply_tokens += SMOOTHING * (len(reply) - self._reply_tokens)
                if request.replica in self._loads:
                    self._prefixes.note([*request.tokens, *reply], request.replica)

    def _take_off(self, key: Key) -> None:
        """What a request costs is no load any more."""
        request = self._open.get(key)
        if request is not None and request.replica in self._loads:
            self._loads[request.replica] -= request.prompt + request.reply
            request.prompt = request.reply = 0.0


_LEDGERS: "WeakValueDictionary[tuple[str, str], Ledger]" = WeakValueDictionary()
_LEDGERS_LOCK = threading.Lock()


def ledger_of(app: str, deployment: str) -> Ledger:
    """The ledger of a deployment in this process, as long as somebody holds it.

    Serve makes the router itself and hands it to nobody, so it and the gateway meet here.
    """
    with _LEDGERS_LOCK:
        return _LEDGERS.setdefault((app, deployment), Ledger())


def _digests(tokens: Sequence[int]) -> list[int]:
    """Each names a full block and all before it. If two are alike by accident that costs a little time, no more."""
    digests, parent = [], 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        parent = hash((parent, *tokens[end - BLOCK : end]))
        digests.append(parent)
    return digests
