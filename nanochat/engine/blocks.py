"""Which block of the cache holds what, who uses it, and which is given up next.

A full block is found by a hash over its tokens and all before them, so a common beginning of two sequences lies in the
cache once. Below whole blocks, a sequence takes over or copies the block that begins with most of its next tokens: a
chat's next turn computes nothing twice. Blocks that nobody uses stay until room is needed, the oldest go first.
Knows no model and no policy. Hash chain and free list in eviction order: vLLM; leaves before their parents: SGLang.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from hashlib import blake2b

import numpy as np

from nanochat.engine.runner import BLOCK
from nanochat.engine.sequence import Sequence

ROOT = b""  # the parent of first blocks
TOKEN_BYTES = 4


class BlockPool:
    """Every block is blank (nothing in it that anybody could find), idle (findable, unused) or held by sequences."""

    def __init__(self, blocks: int) -> None:
        assert blocks > 0, "a cache without blocks"
        self.size = blocks
        self._holders = [0] * blocks
        self._blank = list(range(blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the next to be given up first
        self._full: dict[bytes, int] = {}  # digest of a full block -> the one block that holds it
        self._digest: list[bytes] = [ROOT] * blocks  # of each block in _full, else ROOT
        self._parent: list[bytes] = [ROOT] * blocks
        self._content: list[bytes] = [b""] * blocks  # tokens of a findable block that is not being filled
        self._children: dict[bytes, list[tuple[bytes, int]]] = {}  # digest -> (content, block) of what follows, sorted
        self._filling: dict[bytes, dict[int, Sequence]] = {}  # digest -> blocks that follow, and who fills them

    @property
    def free(self) -> int:
        """Blocks that a sequence could have."""
        return len(self._blank) + len(self._idle)

    def grow(self, sequence: Sequence, tokens: int) -> int:
        """Gives blocks for so many tokens more; returns for how many of them there is room now."""
        room = len(sequence.blocks) * BLOCK - sequence.computed
        while room < tokens and (block := self._take()) is not None:
            _append(sequence, [block])
            room += BLOCK
        return min(room, tokens)

    def fits(self, sequence: Sequence) -> bool:
        """Whether a sequence without blocks could have all that its known tokens need."""
        shared = self._next(sequence)
        idle = sum(not self._holders[block] for block in shared)
        return -(-sequence.known // BLOCK) - len(shared) <= self.free - idle

    def match(self, sequence: Sequence) -> None:
        """Gives the full blocks that hold what comes next in the sequence, but never its last known token."""
        if found := self._next(sequence):
            for block in found:
                self._hold(block)
            _append(sequence, found)
            sequence.computed += len(found) * BLOCK
            sequence.sealed += len(found)
            sequence.mark = 0

    def match_part(self, sequence: Sequence) -> tuple[int, int] | None:
        """Gives a block that begins with what comes next; call it when `match` finds no more.

        Returns (source, target) if the runner has to copy one block into another for that before the step.
        """
        assert sequence.computed == len(sequence.blocks) * BLOCK, "the sequence has a block to fill"
        end = min(sequence.computed + BLOCK, sequence.known - 1)
        if end == sequence.computed:
            return None
        wanted = sequence.ids[sequence.computed : end].tobytes()
        source, common = self._closest(parent_digest(sequence, len(sequence.blocks)), wanted)
        if not common:
            return None
        target = self._take_over(source, common)
        if target is None:
            if source in self._idle:
                self._idle.move_to_end(source)
            target = self._take()
        if target is None:
            return None
        _append(sequence, [target])
        sequence.computed += common
        sequence.mark = 0
        return (source, target) if source != target else None  # its own source: nobody has written to it yet

    def note(self, sequence: Sequence) -> None:
        """Makes what is computed findable; to be called when `computed` reaches `mark`."""
        while (sequence.sealed + 1) * BLOCK <= sequence.computed:
            self._seal(sequence, sequence.sealed)
            sequence.sealed += 1
        sequence.mark = sequence.computed + 1
        if sequence.computed % BLOCK:
            parent, block = parent_digest(sequence, sequence.sealed), sequence.blocks[sequence.sealed]
            self._filling.setdefault(parent, {})[block] = sequence
            sequence.mark = (sequence.sealed + 1) * BLOCK

    def release(self, sequence: Sequence, *, spoilt: bool = False) -> None:
        """Takes all blocks from a sequence. spoilt: nobody is to find them any more."""
        held = sequence.computed - sequence.sealed * BLOCK  # tokens in the block that is being filled
        for place in reversed(range(len(sequence.blocks))):  # the deepest is given up first
            block = sequence.blocks[place]
            if place == sequence.sealed:
                self._unfill(sequence, block)
            if spoilt:
                self._forget(block)
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._content[block]:
                self._idle[block] = None
            elif place == sequence.sealed and held > 0 and not spoilt:
                self._leave(sequence, block)
            else:
                self._blank.append(block)
        if sequence.row is not None:
            sequence.row[: len(sequence.blocks)] = 0
        sequence.blocks.clear()
        sequence.sealed = sequence.computed = sequence.mark = 0

    def check(self, running: list[Sequence]) -> None:
        """Asserts what holds between steps; for tests."""
        held = [block for sequence in running for block in sequence.blocks]
        assert all(self._holders[block] == held.count(block) for block in range(self.size)), "holders are miscounted"
        places = [*self._blank, *self._idle, *set(held)]
        assert sorted(places) == list(range(self.size)), "a block is nowhere, or in two places"
        assert all(self._digest[block] == digest for digest, block in self._full.items()), "a digest names two blocks"
        listed = {block: content for kin in self._children.values() for content, block in kin}
        assert listed == {block: self._content[block] for block in range(self.size) if self._content[block]}
        assert not any(self._content[block] for block in self._blank), "a blank block can be found"
        assert all(self._content[block] for block in self._idle), "an idle block cannot be found"
        filled = {block: owner for blocks in self._filling.values() for block, owner in blocks.items()}
        assert all(filled[block] in running and self._holders[block] == 1 for block in filled), "nobody fills a block"
        for sequence in running:
            assert len(sequence.blocks) == len(set(sequence.blocks)), "a sequence has a block twice"
            assert len(sequence.blocks) * BLOCK >= sequence.computed, "a sequence has too few blocks"
            assert sequence.row is not None
            assert sequence.row.tolist()[: len(sequence.blocks)] == sequence.blocks, "a row is not its sequence's"
            assert not sequence.row[len(sequence.blocks) :].any(), "a row is not padded with 0"

    def _next(self, sequence: Sequence) -> list[int]:
        """Full blocks that hold what comes after the sequence's own, but never its last known token."""
        first, end = len(sequence.blocks), (sequence.known - 1) // BLOCK
        found = []
        for digest in _digests(sequence, end)[first:end]:
            block = self._full.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def _take(self) -> int | None:
        """A block that nobody uses and nobody will find: blank, else the one that was not needed for longest."""
        if self._blank:
            block = self._blank.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def _hold(self, block: int) -> None:
        if not self._holders[block]:
            del self._idle[block]
        self._holders[block] += 1

    def _take_over(self, block: int, common: int) -> int | None:
        """The block itself, to be filled further, if nobody uses it and all of its tokens are wanted."""
        if len(self._content[block]) != common * TOKEN_BYTES:  # one that is in use is full, or not listed
            return None
        self._hold(block)
        self._forget(block)
        return block

    def _closest(self, parent: bytes, wanted: bytes) -> tuple[int, int]:
        """The block after `parent` that begins with most of the wanted tokens, and how many; (-1, 0) if none does."""
        kin = self._children.get(parent, [])
        place = bisect_left(kin, (wanted, -1))  # of a sorted list, the longest common beginning is beside it
        near = [(block, common_tokens(content, wanted)) for content, block in kin[max(place - 1, 0) : place + 1]]
        for block, owner in self._filling.get(parent, {}).items():
            near.append((block, common_tokens(_partial(owner), wanted)))
        return max(near, key=lambda found: found[1], default=(-1, 0))

    def _seal(self, sequence: Sequence, place: int) -> None:
        """A block of the sequence is full: others may find it. If another holds the same, that one is used."""
        block, digest = sequence.blocks[place], _digests(sequence, place + 1)[place]
        self._unfill(sequence, block)
        twin = self._full.get(digest)
        if twin is None:
            self._full[digest] = block
            self._digest[block] = digest
            self._list(block, parent_digest(sequence, place), sequence.ids[place * BLOCK :][:BLOCK].tobytes())
        elif twin != block:
            self._hold(twin)
            self._holders[block] -= 1
            self._blank.append(block)
            sequence.blocks[place] = twin
            if sequence.row is not None:
                sequence.row[place] = twin

    def _leave(self, sequence: Sequence, block: int) -> None:
        """Keeps a partly filled block that its sequence leaves, unless another block begins with the same tokens."""
        parent, content = parent_digest(sequence, sequence.sealed), _partial(sequence)
        kin = self._children.get(parent, [])
        place = bisect_left(kin, (content, -1))
        if place < len(kin) and kin[place][0].startswith(content):
            other = kin[place][1]
            if other in self._idle:
                self._idle.move_to_end(other)
            self._blank.append(block)
        else:
            self._list(block, parent, content)
            self._idle[block] = None

    def _list(self, block: int, parent: bytes, content: bytes) -> None:
        self._parent[block], self._content[block] = parent, content
        insort(self._children.setdefault(parent, []), (content, block))

    def _forget(self, block: int) -> None:
        """Nobody finds the block any more."""
        if self._digest[block]:
            del self._full[self._digest[block]]
            self._digest[block] = ROOT
        if self._content[block]:
            kin = self._children[self._parent[block]]
            del kin[bisect_left(kin, (self._content[block], block))]
            if not kin:
                del self._children[self._parent[block]]
            self._content[block] = b""

    def _unfill(self, sequence: Sequence, block: int) -> None:
        if not self._filling:
            return
        parent = parent_digest(sequence, sequence.sealed)
        blocks = self._filling.get(parent)
        if blocks is not None and blocks.get(block) is sequence:
            del blocks[block]
            if not blocks:
                del self._filling[parent]


def parent_digest(sequence: Sequence, place: int) -> bytes:
    """Names all tokens before a block."""
    return _digests(sequence, place)[place - 1] if place else ROOT


def common_tokens(a: bytes, b: bytes) -> int:
    """How many tokens two pieces of text begin with alike."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // TOKEN_BYTES
    differ = np.frombuffer(a, np.int32, size // TOKEN_BYTES) != np.frombuffer(b, np.int32, size // TOKEN_BYTES)
    return int(differ.argmax())


def _append(sequence: Sequence, blocks: list[int]) -> None:
    if sequence.row is not None:
        count = len(sequence.blocks)
        sequence.row[count : count + len(blocks)] = blocks
    sequence.blocks += blocks


def _digests(sequence: Sequence, count: int) -> list[bytes]:
    """Names, of at least so many full blocks, each one's tokens and all before them."""
    digests, size = sequence.digests, BLOCK * TOKEN_BYTES
    if len(digests) < count:
        assert count * BLOCK <= sequence.known, "not all tokens of the block are known"
        tokens = sequence.ids[len(digests) * BLOCK : count * BLOCK].tobytes()
        for at in range(0, len(tokens), size):
            parent = digests[-1] if digests else ROOT
            digests.append(blake2b(parent + tokens[at : at + size], digest_size=16).digest())
    return digests


def _partial(sequence: Sequence) -> bytes:
    """The computed tokens of the block that a sequence fills."""
    return sequence.ids[sequence.sealed * BLOCK : sequence.computed].tobytes()
