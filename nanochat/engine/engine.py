"""Many requests, one model: the four calls on which streaming, HTTP and threads are built.

Requests run in the order they came, each with a cache and a forward pass of its own, so none can change another's
tokens. Knows no threads: whoever makes an Engine calls it from one thread.
"""

import secrets
from collections import deque
from collections.abc import Iterable

import torch

from nanochat.attention import Cache
from nanochat.engine.sampler import SampleParams, choose
from nanochat.engine.sequence import Output, Sequence, Stats
from nanochat.model import GPT


class Engine:
    """At most `max_batch` requests run at a time, and at most `kv_tokens` tokens of cache are reserved for them.

    stop: tokens that end a reply whose own parameters name none.
    """

    def __init__(self, model: GPT, *, max_batch: int = 8, kv_tokens: int = 16_384, stop: Iterable[int] = ()) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; at least 1 request must be able to run")
        if kv_tokens < 2:
            raise ValueError(f"kv_tokens is {kv_tokens}; a prompt and a reply need at least 2")
        self._model = model
        self._max_batch = max_batch
        self._kv_tokens = kv_tokens
        self._stop = frozenset(stop)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # in the order they came
        self._next_id = 0
        self._prompt_tokens = 0
        self._new_tokens = 0

    def add(self, tokens: list[int], params: SampleParams) -> int:
        """Queues a request and returns its id. Raises ValueError that names what is wrong with it."""
        context, vocab_size = self._model.config.context, self._model.vocab_size
        if not tokens:
            raise ValueError("tokens is empty; a prompt needs at least 1 token")
        for name, ids in (("tokens", tokens), ("stop", params.stop)):
            wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
            if wrong is not None:
                raise ValueError(f"{name} holds {wrong}; the vocabulary has the ids 0 to {vocab_size - 1}")
        if len(tokens) >= context:
            raise ValueError(
                f"tokens are {len(tokens)}; the context is {context}, so a prompt has at most {context - 1}"
            )
        capacity = min(len(tokens) + params.max_tokens, context)
        if capacity > self._kv_tokens:
            raise ValueError(
                f"max_tokens is {params.max_tokens}; with {len(tokens)} prompt tokens that needs {capacity} tokens of "
                f"cache, and there are {self._kv_tokens}"
            )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        stop = frozenset(params.stop) or self._stop
        self._waiting.append(Sequence(self._next_id, list(tokens), params, seed, stop, capacity))
        self._next_id += 1
        return self._next_id - 1

    def step(self) -> list[Output]:
        """Lets in what fits and draws one token for every running request. [] when there is nothing to do."""
        self._admit()
        outputs = []
        for sequence in list(self._running.values()):
            token, logprob = self._draw(sequence)
            finish = sequence.append(token)
            self._new_tokens += 1
            if finish:
                del self._running[sequence.id]
            outputs.append(Output(sequence.id, [token], [logprob], finish))
        return outputs

    def cancel(self, id: int) -> None:
        """Forgets a request and frees its cache. Nothing happens if it has ended already."""
        if not 0 <= id < self._next_id:
            raise ValueError(f"id is {id}; no request has it")
        self._running.pop(id, None)
        self._waiting = deque(sequence for sequence in self._waiting if sequence.id != id)

    def stats(self) -> Stats:
        """Load and work done."""
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_reserved=self._reserved(),
            kv_tokens=self._kv_tokens,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
        )

    def _reserved(self) -> int:
        return sum(sequence.capacity for sequence in self._running.values())

    def _admit(self) -> None:
        """First come, first served: nothing passes a large request that does not fit yet."""
        while self._waiting and len(self._running) < self._max_batch:
            if self._reserved() + self._waiting[0].capacity > self._kv_tokens:
                return
            sequence = self._waiting.popleft()
            sequence.cache = Cache(self._model.config, 1, sequence.capacity, self._model.dtype, self._model.device)
            self._running[sequence.id] = sequence

    @torch.inference_mode()
    def _draw(self, sequence: Sequence) -> tuple[int, float]:
        """The next token and its log-probability; the cache then holds every token before it."""
        assert sequence.cache is not None, "a running request has a cache"
        fresh = sequence.reply[-1:] or sequence.prompt
        if not sequence.reply:
            self._prompt_tokens += len(fresh)
        hidden = self._model(torch.tensor([fresh], device=self._model.device), sequence.cache)  # (1, T, C)
        logits = self._model.logits(hidden[0, -1]).float().cpu().numpy()  # (V,)
        return choose(logits, sequence.params, sequence.seed, sequence.tokens)
