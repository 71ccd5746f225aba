"""What a caller's open requests hear: one message brings what a step has made for all of them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeAlias

from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output

Heard: TypeAlias = tuple[int, Output | Exception]  # a request's number, and what there is for it


@dataclass(frozen=True, slots=True)
class Request:
    """As a gateway asks a replica. number: its own.  admitted: as Backend.generate."""

    number: int
    tokens: list[int]
    params: SampleParams
    admitted: bool = False


class Calls:
    """The open requests of one caller. For one event loop.

    What lies there when a request's reader wakes is handed on as one piece, so the first token goes out at once and a
    slow reader gets larger pieces.
    """

    def __init__(self) -> None:
        self._queues: dict[int, asyncio.Queue[Output | Exception]] = {}
        self._numbers = count()

    def open(self) -> int:
        """A new request's number."""
        number = next(self._numbers)
        self._queues[number] = asyncio.Queue()
        return number

    def close(self, number: int) -> None:
        """Nobody reads this request any more."""
        self._queues.pop(number, None)

    def hear(self, message: Sequence[Heard]) -> None:
        """Hands out a message; what is for a closed request is dropped."""
        for number, item in message:
            if number in self._queues:
                self._queues[number].put_nowait(item)

    async def outputs(self, number: int, replies: int) -> AsyncGenerator[Output, None]:
        """What comes for a request until all its replies have ended. Raises what came instead."""
        queue = self._queues[number]
        while replies:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            for output in _joined([item for item in items if isinstance(item, Output)]):
                replies -= output.finish is not None
                yield output
            if replies and isinstance(items[-1], Exception):
                raise items[-1]


def _joined(outputs: list[Output]) -> list[Output]:
    """Several outputs of one request as one for each of its replies."""
    if len(outputs) < 2:
        return outputs
    replies: dict[int, list[Output]] = {}
    for output in outputs:
        replies.setdefault(output.index, []).append(output)
    return [
        replace(
            parts[-1],
            tokens=[token for part in parts for token in part.tokens],
            logprobs=[logprob for part in parts for logprob in part.logprobs],
            top=[top for part in parts for top in part.top],
        )
        for parts in replies.values()
    ]
