"""Where a prompt goes, and what that is worth against simpler policies in a simulated service."""

import hashlib
import random
import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import pytest

from nanochat.engine.runner import BLOCK as ENGINE_BLOCK
from pipelines.service import prefixes
from pipelines.service.prefixes import BLOCK, REPLY_COST, REPLY_TOKENS, Ledger, Prefixes, ledger_of

NAMES = ("a", "b", "c")


def some(tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(32_000) for _ in range(tokens)]


def test_a_block_is_the_engines() -> None:
    assert BLOCK == ENGINE_BLOCK


def test_a_chat_goes_where_its_beginning_lies() -> None:
    known = Prefixes()
    chat = some(400)
    known.note(chat, "b")
    assert known.choose([*chat, *some(50, 1)], dict.fromkeys(NAMES, 0))[0] == "b"
    assert known.choose([*chat[:-1], *some(50, 1)], dict.fromkeys(NAMES, 0))[0] == "b"
    assert known.choose([1, *chat], dict.fromkeys(NAMES, 0))[0] != "b"  # nothing of it is the beginning


@pytest.mark.parametrize(("load", "first"), [(383, "b"), (384, "a"), (385, "a")])
def test_it_moves_when_waiting_costs_more_than_computing_anew(load: int, first: str) -> None:
    known = Prefixes()
    chat = some(384 + 7)  # 24 full blocks
    known.note(chat, "b")
    assert known.choose(chat, {"a": 0, "b": load})[0] == first  # at 384 it is a tie: the least loaded


def test_equal_replicas_take_turns() -> None:
    known = Prefixes()
    chosen = []
    for seed in range(9):
        prompt = some(40, seed)
        chosen.append(known.choose(prompt, dict.fromkeys(NAMES, 0))[0])
        known.note(prompt, chosen[-1])
    assert Counter(chosen) == dict.fromkeys(NAMES, 3)


def test_what_is_noted_is_known_and_what_is_old_or_gone_is_not() -> None:
    known = Prefixes(blocks=10)
    old, new = some(80, 1), some(80, 2)
    assert known.note(old, "a") == 80
    assert known.note([*old, 1, 2, 3], "a") == 3
    assert known.note(new, "a") == 80
    assert known.note(old, "a") == 0  # 5 + 5 blocks
    assert known.note(some(32, 3), "a") == 32  # the two last blocks of `new` go
    assert known.note(new[:48], "a") == 0
    assert known.note(new, "a") == 32
    known.forget("a")
    assert known.note(new, "a") == 80


def test_a_block_means_nothing_without_those_before_it() -> None:
    known = Prefixes()
    p, q, r, s = (some(BLOCK, seed) for seed in range(4))
    known.note([*p, *q], "a")
    known.note([*r, *s], "a")
    assert known.note([*p, *s], "a") == BLOCK


def test_a_ledger_counts_what_is_open() -> None:
    ledger = Ledger()
    ledger.update(NAMES)
    prompt = some(100)
    ledger.began(("me", 1))
    replica = ledger.place(("me", 1), prompt, 20, 3, frozenset())
    assert replica is not None
    assert ledger.loads()[replica] == 100 + REPLY_COST * 3 * 20  # three replies
    ledger.began(("me", 2))
    assert ledger.place(("me", 2), prompt, 1000, 1, frozenset({"a", "b", "c"} - {replica})) == replica
    assert ledger.loads()[replica] == 100 + REPLY_COST * 60 + 4 + REPLY_COST * REPLY_TOKENS  # 96 are known
    ledger.heard(("me", 1))
    assert ledger.loads()[replica] == REPLY_COST * 60 + 4 + REPLY_COST * REPLY_TOKENS
    ledger.ended(("me", 1))
    ledger.ended(("me", 2))
    ledger.ended(("me", 2))
    assert ledger.loads() == dict.fromkeys(NAMES, 0)


def test_a_reply_belongs_to_the_next_turns_beginning() -> None:
    ledger = Ledger()
    ledger.update(["a", "b"])
    prompt, reply = some(64, 1), some(640, 2)
    ledger.began(("me", 1))
    replica = ledger.place(("me", 1), prompt, 1, 1, frozenset())
    ledger.ended(("me", 1), [reply])
    ledger.began(("me", 2))
    ledger.place(("me", 2), some(300, 3), 1, 1, frozenset({"a", "b"} - {replica}))  # more than the prompt costs anew
    ledger.began(("me", 3))
    assert ledger.place(("me", 3), [*prompt, *reply, *some(20, 4)], 1, 1, frozenset()) == replica


def test_replies_teach_how_long_replies_are() -> None:
    ledger = Ledger()
    ledger.update(["a"])
    for number in range(500):
        ledger.began(("me", number))
        ledger.place(("me", number), [1], 10_000, 1, frozenset())
        ledger.ended(("me", number), [[1] * 300])
    ledger.began(("me", -1))
    ledger.place(("me", -1), [], 10_000, 1, frozenset())
    assert ledger.loads()["a"] == pytest.approx(REPLY_COST * 300, rel=0.01)


def test_who_has_refused_or_was_tried_is_chosen_last() -> None:
    ledger = Ledger()
    ledger.update(NAMES)
    prompt = some(500)
    tried = []
    ledger.began(("me", 1))
    for _ in NAMES:
        tried.append(ledger.place(("me", 1), prompt, 20, 1, frozenset()))
    assert sorted(map(str, tried)) == sorted(NAMES)
    assert ledger.place(("me", 1), prompt, 20, 1, frozenset()) in NAMES
    ledger.ended(("me", 1))
    assert ledger.loads() == dict.fromkeys(NAMES, 0)
    ledger.began(("me", 2))
    assert ledger.place(("me", 2), prompt, 20, 1, frozenset({"a", "c"})) == "b"
    assert ledger.place(("me", 2), prompt, 20, 1, frozenset(NAMES)) in NAMES


def test_replicas_come_and_go_with_requests_open() -> None:
    ledger = Ledger()
    assert ledger.place(("me", 1), [1], 20, 1, frozenset()) is None
    ledger.update(["a"])
    ledger.began(("me", 1))
    ledger.place(("me", 1), some(100), 20, 1, frozenset())
    ledger.update(["b"])
    assert (ledger.serves("a"), ledger.serves("b")) == (False, True)
    ledger.heard(("me", 1))
    ledger.ended(("me", 1), [[1, 2]])
    assert ledger.loads() == {"b": 0}
    ledger.place(("me", 2), some(100), 20, 1, frozenset())  # ended, or never begun, when the router got to it
    assert ledger.loads() == {"b": 0}
    ledger.update([])
    ledger.update(["b"])
    ledger.began(("me", 3))
    ledger.place(("me", 3), some(100), 1, 1, frozenset())
    assert ledger.loads() == {"b": 100 + REPLY_COST}  # nothing of it is known any more


def test_gateway_and_router_meet_and_nothing_stays() -> None:
    ledger = ledger_of("app", "Replica")
    assert ledger_of("app", "Replica") is ledger
    assert ledger_of("next", "Replica") is not ledger
    del ledger
    assert not list(prefixes._LEDGERS)


def test_many_threads_leave_nothing_behind() -> None:
    ledger = Ledger()
    ledger.update(NAMES)

    def work(client: str) -> None:
        for number in range(300):
            key = (client, number)
            ledger.began(key)
            ledger.place(key, some(50, number % 7), 20, 1, frozenset())
            ledger.heard(key)
            ledger.ended(key)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.loads() == dict.fromkeys(NAMES, 0)


# A service of three replicas that compute 100 tokens a step each. What lies in their caches is written down anew here.

CACHE = 1_500  # blocks


@dataclass
class Asked:
    """A prompt on its way, and how many turns are to follow."""

    number: int
    prompt: list[int]
    turns: int
    left: int = 0  # tokens to compute


@dataclass
class SimReplica:
    """Computes prompts one after another; replies cost nothing here."""

    cache: "OrderedDict[bytes, None]" = field(default_factory=OrderedDict)  # the oldest first
    queue: list[Asked] = field(default_factory=list)
    computed: int = 0

    def take(self, asked: Asked) -> int:
        """Returns how many tokens lay in the cache."""
        digest, chain = hashlib.md5(), []
        for token, end in zip(asked.prompt, range(1, len(asked.prompt) + 1), strict=True):
            digest.update(token.to_bytes(4))
            if end % BLOCK == 0:
                chain.append(digest.digest())
        hits = next((place for place, one in enumerate(chain) if one not in self.cache), len(chain)) * BLOCK
        for one in reversed(chain):
            self.cache[one] = None
            self.cache.move_to_end(one)
        while len(self.cache) > CACHE:
            self.cache.popitem(last=False)
        asked.left = len(asked.prompt) - hits
        self.computed += asked.left
        self.queue.append(asked)
        return hits

    def step(self) -> list[Asked]:
        """Returns those that are complete."""
        room, done = 100, []
        while self.queue and room:
            part = min(self.queue[0].left, room)
            room -= part
            self.queue[0].left -= part
            if not self.queue[0].left:
                done.append(self.queue.pop(0))
        return done


class Service:
    """Sends 60 chats of ten growing turns, 200 prompts that come once and 200 that begin with the same 160 tokens."""

    def __init__(self, policy: str, seed: int) -> None:
        self.policy, self.rng = policy, random.Random(seed)
        self.replicas = {name: SimReplica() for name in NAMES}
        self.ledger = Ledger()
        self.ledger.update(NAMES)
        self.ledger.size(CACHE * BLOCK)
        self.asked = self.hits = self.sent = self.now = 0
        self.coming: list[tuple[int, list[int], int]] = []  # when, prompt, turns after it
        system = self.fresh(160)
        for _ in range(60):
            self.coming.append((self.rng.randrange(150), self.fresh(self.rng.randint(20, 120)), 9))
        for _ in range(200):
            self.coming.append((self.rng.randrange(400), self.fresh(self.rng.randint(100, 300)), 0))
            self.coming.append((self.rng.randrange(400), [*system, *self.fresh(30)], 0))

    def fresh(self, tokens: int) -> list[int]:
        return [self.rng.randrange(32_000) for _ in range(tokens)]

    def choose(self, asked: Asked) -> str:
        if self.policy == "prefix":
            self.ledger.began(("me", asked.number))
            return self.ledger.place(("me", asked.number), asked.prompt, 1, 1, frozenset()) or ""
        if self.policy == "least loaded":
            return min(NAMES, key=lambda name: (sum(one.left for one in self.replicas[name].queue), self.rng.random()))
        return self.rng.choice(NAMES) if self.policy == "random" else NAMES[asked.number % len(NAMES)]

    def step(self) -> None:
        due = sorted(item for item in self.coming if item[0] <= self.now)
        self.coming = [item for item in self.coming if item[0] > self.now]
        for _, prompt, turns in due:
            asked = Asked(self.sent, prompt, turns)
            self.sent += 1
            self.asked += len(prompt)
            self.hits += self.replicas[self.choose(asked)].take(asked)
        for replica in self.replicas.values():
            for one in replica.step():
                self.ledger.ended(("me", one.number))
                if one.turns:
                    turn = [*one.prompt, *self.fresh(self.rng.randint(40, 160))]
                    self.coming.append((self.now + self.rng.randrange(5, 40), turn, one.turns - 1))
        self.now += 1


def simulate(policy: str, seed: int) -> tuple[float, float, float]:
    """Share of prompt tokens found in a cache, work of the busiest over the mean, steps until all is done."""
    service = Service(policy, seed)
    while service.coming or any(replica.queue for replica in service.replicas.values()):
        service.step()
    work = [replica.computed for replica in service.replicas.values()]
    return service.hits / service.asked, max(work) * len(work) / sum(work), service.now


@pytest.mark.parametrize("seed", [1, 2])
def test_more_is_found_than_with_any_simpler_policy_and_the_work_is_shared(seed: int) -> None:
    found = {policy: simulate(policy, seed) for policy in ("random", "turns", "least loaded", "prefix")}
    hits, imbalance, steps = found.pop("prefix")
    for policy, (others_hits, _, others_steps) in found.items():
        assert hits > others_hits + 0.1, (policy, hits, others_hits)
        assert steps <= others_steps * 1.02, (policy, steps, others_steps)
    assert imbalance < 1.25
