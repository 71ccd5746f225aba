"""Who gets how many tokens of the next step. Policy only: it knows no model, and computes nothing.

There is no prefill and no decode: a sequence has known tokens (prompt, reply, draft) and computed ones, and a step
hands out a budget of tokens so that the second catch up with the first. Chunked prefill, reuse of cached blocks and
speculation all follow from it.  Source: vLLM's scheduler (v1).

Running sequences are older than all waiting ones. Whoever lacks one token comes first, so a long prompt never starves
a reply; then prompts, in order of arrival; then whoever waits, in order of arrival; where few run, drafts get what is
left. Without a free block, the youngest running sequence gives up its own and waits again, unless it is itself the one
that needs it: then it pauses. So the oldest always goes on, and there is no step without work while there is work.
"""

import heapq
from collections import OrderedDict

import numpy as np

from nanochat.engine.blocks import TOKEN_BYTES, BlockPool, common_tokens, parent_digest
from nanochat.engine.runner import BLOCK, Ints
from nanochat.engine.sequence import Sequence

# Sequences in a step up to which drafts are made. A further row costs about 0.05 steps (docs/LOG.md), so among four
# sequences a fifth of a token: the price at which a lookup guesses (speculate.PRICE).
FEW = 4


class Scheduler:
    """Keeps the waiting and the running sequences, and their block tables.

    longest: the most tokens that a sequence can have, prompt and reply.
    """

    def __init__(self, pool: BlockPool, *, max_batch: int, step_tokens: int, speculate: int, longest: int) -> None:
        self.pool = pool
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()  # by order of arrival
        self.running: dict[int, Sequence] = {}  # by order of arrival
        self.tables: Ints = np.zeros((max_batch, -(-longest // BLOCK)), np.int32)  # a row for each running sequence
        self.queries = self.hits = self.preemptions = 0  # tokens looked for and found in the cache; sequences
        self._max_batch, self._step_tokens, self._speculate = max_batch, step_tokens, speculate
        self._slots = list(range(max_batch - 1, -1, -1))
        self._deadlines: list[tuple[float, int]] = []  # a heap; order of arrival of those who have one
        # The step that is being planned:
        self._left = 0  # tokens of the budget
        self._tight = False  # a sequence had to wait for a block, or to give up its own
        self._chunks: dict[Sequence, int] = {}
        self._copies: list[tuple[int, int]] = []
        self._coming: dict[bytes, list[tuple[Sequence, int]]] = {}  # digest -> who computes what follows, up to where

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        self.waiting[sequence.order] = sequence
        if sequence.params.timeout_s is not None:
            heapq.heappush(self._deadlines, (sequence.arrived + sequence.params.timeout_s, sequence.order))

    def remove(self, sequence: Sequence, *, spoilt: bool = False) -> None:
        """Forgets a sequence and frees its blocks. spoilt: others must not use them."""
        if self.waiting.pop(sequence.order, None) is None:
            del self.running[sequence.order]
            self._release(sequence, spoilt=spoilt)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose time is up."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order = heapq.heappop(self._deadlines)
            sequence = self.running.get(order) or self.waiting.get(order)
            if sequence is not None:
                late.append(sequence)
        return late

    def plan(self) -> tuple[dict[Sequence, int], list[tuple[int, int]]]:
        """The tokens that each sequence gets in this step, and the blocks to be copied before it, in order.

        A sequence that gets more than it lacks has a draft behind its known tokens.
        """
        self._left, self._tight = self._step_tokens, False
        self._chunks, self._copies, self._coming = {}, [], {}
        running = list(self.running.values())
        behind = []
        for sequence in running:
            if sequence.known - sequence.computed > 1:
                behind.append(sequence)
            elif self._left and sequence.order in self.running:
                self._give(sequence, 1)
        for sequence in behind:
            if self._left and sequence.order in self.running:
                self._catch_up(sequence)
        while self.waiting and self._left and not self._tight and len(self.running) < self._max_batch:
            sequence = next(iter(self.waiting.values()))
            if not self.pool.fits(sequence):
                break
            self._admit(sequence)
        if self._speculate and self._left and len(self._chunks) <= FEW:
            self._draft()
        return self._chunks, self._copies

    def _give(self, sequence: Sequence, tokens: int) -> None:
        """Hands out budget, as far as there are blocks for it."""
        tokens = min(tokens, self._left)
        room = len(sequence.blocks) * BLOCK - sequence.computed
        if room < tokens:
            room = self.pool.grow(sequence, tokens)
            while not room and self._preempt_younger(sequence):
                room = self.pool.grow(sequence, tokens)
        if room:
            self._chunks[sequence] = tokens = min(tokens, room)
            self._left -= tokens
        else:
            self._tight = True

    def _catch_up(self, sequence: Sequence) -> None:
        """Gives a part of the prompt, after all that can be had from the cache."""
        if sequence.computed == len(sequence.blocks) * BLOCK:
            before = sequence.computed
            self.pool.match(sequence)
            comes = self._comes(sequence)
            if not comes and (copy := self.pool.match_part(sequence)):
                self._copies.append(copy)
            if not sequence.preempted:
                sequence.cached += sequence.computed - before
                self.hits += sequence.computed - before
            if comes:
                return
        self._give(sequence, sequence.known - sequence.computed)
        end = sequence.computed + self._chunks.get(sequence, 0)
        for place in range(sequence.computed // BLOCK, -(-end // BLOCK)):
            self._coming.setdefault(parent_digest(sequence, place), []).append((sequence, end))

    def _comes(self, sequence: Sequence) -> bool:
        """Whether another sequence computes this one's next block in this very step, or the rest of its prompt."""
        start = sequence.computed
        wanted = sequence.ids[start : min(start + BLOCK, sequence.known - 1)].tobytes()
        if not wanted or not self._coming:
            return False
        others = self._coming.get(parent_digest(sequence, len(sequence.blocks)), [])
        return any(
            common_tokens(other.ids[start : min(start + BLOCK, end)].tobytes(), wanted) * TOKEN_BYTES == len(wanted)
            for other, end in others
        )

    def _admit(self, sequence: Sequence) -> None:
        del self.waiting[sequence.order]
        self.running[sequence.order] = sequence
        sequence.slot = self._slots.pop()
        sequence.row = self.tables[sequence.slot]
        if not sequence.preempted:
            self.queries += sequence.prompt
        self._catch_up(sequence)

    def _preempt_younger(self, sequence: Sequence) -> bool:
        """Takes the blocks of the youngest sequence; False if that is this one."""
        victim = next(reversed(self.running.values()))
        if victim is sequence:
            return False
        del self.running[victim.order]
        self._left += self._chunks.pop(victim, 0)
        self._release(victim)
        victim.preempted = True
        self.waiting[victim.order] = victim
        self.waiting.move_to_end(victim.order, last=False)
        self.preemptions += 1
        self._tight = True
        return True

    def _release(self, sequence: Sequence, *, spoilt: bool = False) -> None:
        self.pool.release(sequence, spoilt=spoilt)
        self._slots.append(sequence.slot)
        sequence.row, sequence.slot = None, -1

    def _draft(self) -> None:
        """Guesses the next tokens of sequences that catch up, as far as budget and free blocks go."""
        for sequence, tokens in self._chunks.items():
            most = min(self._speculate, self._left, sequence.capacity - sequence.known - 1)
            if most < 1 or sequence.lookup is None or sequence.computed + tokens < sequence.known:
                continue
            draft = sequence.lookup.propose()[:most]
            room = self.pool.grow(sequence, tokens + len(draft)) - tokens
            if room > 0:
                sequence.ids[sequence.known : sequence.known + room] = draft[:room]
                self._chunks[sequence] = tokens + room
                self._left -= room
