"""From a checked request to pieces of text: prompts to tokens, tokens to the backend, its tokens back to text.

Knows no HTTP and neither of OpenAI's two answer shapes. A reply that a stop string ended is not told to the engine as
long as others of the same request run; what still comes of it is dropped.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nanochat.chat import render_prompt
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from pipelines.service.protocol import ApiError, Ask, Backend, Card, ChatAsk, CompletionAsk, ReplicaLostError
from pipelines.service.text import TextStream

HEALTH_TIMEOUT_S = 10
HEARD_S = 5  # a backend that gave a token so shortly ago is healthy


class Vocab(Protocol):
    """What the service needs of a vocabulary."""

    @property
    def special(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode_bytes(self, tokens: list[int]) -> bytes: ...

    def token_bytes(self) -> npt.NDArray[np.int32]: ...


@dataclass(frozen=True, slots=True)
class Said:
    """A token of a reply, where its log-probability was asked for."""

    token: int
    logprob: float
    top: dict[int, float]
    offset: int  # characters of the reply before the one in which it begins


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one choice."""

    index: int
    text: str
    tokens: int  # drawn for it
    said: list[Said]  # the tokens whose text is shown with it
    finish: str | None


class Service:
    """Answers requests over any backend."""

    def __init__(self, backend: Backend, vocab: Vocab, card: Card) -> None:
        self.backend, self.vocab, self.card = backend, vocab, card
        sizes = vocab.token_bytes()
        self.vocab_size = len(sizes)
        self._longest_token = int(sizes.max())  # bytes
        self._stop = tuple(sorted(vocab.special.values()))  # none of them is text, so each ends a reply
        self._heard = float("-inf")  # when the backend last gave a token

    def chat(self, ask: ChatAsk) -> list[int]:
        """Tokens of the chat. Raises ApiError 400 if they leave no room for a reply, without encoding a huge chat."""
        self._check_size(sum(len(message["content"].encode()) for message in ask.messages), "messages")
        return self._checked(render_prompt(self.vocab, ask.messages), "messages")

    def prompts(self, ask: CompletionAsk) -> list[list[int]]:
        """Tokens of each prompt: a text's behind <|bos|>, as a document of training begins. Raises as `chat` does."""
        return [self._prompt(prompt) for prompt in ask.prompts]

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._check_size(len(prompt.encode()), "prompt")
            return self._checked([self.vocab.special["<|bos|>"], *self.vocab.encode(prompt)], "prompt")
        for token in prompt:
            if token >= self.vocab_size:
                said = f"prompt holds {token!r:.80}; the vocabulary has the ids 0 to {self.vocab_size - 1}"
                raise ApiError(400, said, param="prompt")
        return self._checked(prompt, "prompt")

    def _check_size(self, size: int, param: str) -> None:
        """size: bytes."""
        if size > self._longest_token * self.card.context:
            raise self._too_long(f"at least {size // self._longest_token}", param)

    def _checked(self, tokens: list[int], param: str) -> list[int]:
        if len(tokens) >= self.card.context:
            raise self._too_long(str(len(tokens)), param)
        return tokens

    def _too_long(self, tokens: str, param: str) -> ApiError:
        said = (
            f"this model's context is {self.card.context} tokens and the {param} have {tokens}; "
            f"shorten them to {self.card.context - 1} or fewer"
        )
        return ApiError(400, said, param=param, code="context_length_exceeded")

    async def replies(self, prompts: list[list[int]], ask: Ask) -> AsyncGenerator[Delta, None]:
        """All choices as they are made, prompt p's reply i as choice p * n + i; the last piece of each has `finish`.

        Closing the generator cancels the request.
        """
        each = [self._replies(prompt, ask, number * ask.params.n) for number, prompt in enumerate(prompts)]
        async with aclosing(each[0] if len(each) == 1 else _merged(each)) as deltas:
            async for delta in deltas:
                yield delta

    async def _replies(self, prompt: list[int], ask: Ask, first: int) -> AsyncGenerator[Delta, None]:
        most = min(ask.params.max_tokens, self.card.context - len(prompt))
        params = replace(ask.params, stop=self._stop, max_tokens=most)
        replies = {index: _Reply(self.vocab, ask, first + index) for index in range(params.n)}
        async with aclosing(self.backend.generate(prompt, params)) as outputs:
            async for output in outputs:
                self._heard = time.monotonic()
                if output.index not in replies:
                    continue
                delta = replies[output.index].take(output)
                if delta.finish:
                    del replies[output.index]
                yield delta
                if not replies:
                    return
        raise ReplicaLostError("the reply broke off")

    async def alive(self) -> None:
        """A real forward pass, or one just now. Raises TimeoutError or what the backend raises."""
        if time.monotonic() - self._heard < HEARD_S:
            return
        prompt = [self.vocab.special["<|bos|>"], random.randrange(self.vocab_size)]  # so none that failover refuses
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                async with aclosing(self.backend.generate(prompt, SampleParams(1, temperature=0))) as outputs:
                    async for _ in outputs:
                        self._heard = time.monotonic()
        except TimeoutError:
            raise TimeoutError(f"no replica answered within {HEALTH_TIMEOUT_S} s") from None


class _Reply:
    """One choice while it grows."""

    def __init__(self, vocab: Vocab, ask: Ask, index: int) -> None:
        self._vocab, self._index = vocab, index
        self._text = TextStream(ask.stop)
        self._logprobs = ask.params.logprobs is not None
        self._shown = 0  # characters
        self._hidden: deque[Said] = deque()  # their text is held back

    def take(self, output: Output) -> Delta:
        """The piece that these tokens add. Tokens behind a stop string count for nothing."""
        if output.finish == "timeout":
            raise ApiError(504, "the reply took longer than the service allows", code="timeout")
        fresh, tokens = "", 0
        for place, token in enumerate(output.tokens):
            tokens += 1
            if output.finish == "stop" and place == len(output.tokens) - 1:
                break  # a special token, which is no text
            if self._logprobs:
                said = Said(token, output.logprobs[place], output.top[place], self._text.decoded)
                self._hidden.append(said)
            fresh += self._text.push(self._vocab.decode_bytes([token]))
            if self._text.stopped:
                break
        finish: str | None = "stop" if self._text.stopped else output.finish
        if finish:
            fresh += self._text.push(b"", last=True)
        self._shown += len(fresh)
        return Delta(self._index, fresh, tokens, self._uncovered(finish), finish)

    def _uncovered(self, finish: str | None) -> list[Said]:
        """The tokens that begin in what is shown by now; at the end of a whole reply all."""
        everything = finish is not None and not self._text.stopped
        said = []
        while self._hidden and (everything or self._hidden[0].offset < self._shown):
            said.append(self._hidden.popleft())
        return said


async def _merged(sources: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """What any of them yields, as it comes. The first that fails ends all."""
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(maxsize=len(sources))

    async def drain(source: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(source):
                async for delta in source:
                    await queue.put(delta)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
