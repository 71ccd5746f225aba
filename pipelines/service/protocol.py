"""What the parts of the service say to each other: who answers, what is served, what a checked request holds.

No HTTP, no Ray, no torch. OpenAI's words are in requests.py (what a client may say) and answers.py (what it hears).
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Protocol

from nanochat.chat import Message
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output

if TYPE_CHECKING:
    from nanochat.engine.stats import Stats


class Backend(Protocol):
    """What answers: an engine in a thread of this process, or one of many behind Ray Serve."""

    def generate(
        self, tokens: list[int], params: SampleParams, *, admitted: bool = False
    ) -> AsyncGenerator[Output, None]:
        """Outputs of one request: of each of its n replies the last has `finish`. Closing the iterator cancels it.

        admitted: it was let in before and is continued, so no queue is too long for it.
        Raises OverloadedError; ReplicaLostError if whoever answers is gone.
        """

    async def stats(self) -> "list[Stats]":
        """Load and work of every engine that can answer; raises ReplicaLostError if none says."""


class ReplicaLostError(RuntimeError):
    """The process that was answering is gone."""


def error_type(status: int) -> str:
    """OpenAI's name for the kind of error."""
    return {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")


class ApiError(Exception):
    """An answer in OpenAI's error shape. retry_after_s: when it may be otherwise."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s
        self.body = {
            "error": {
                "message": message,
                "type": error_type(status),
                "param": param,
                "code": code,
            }
        }


class OverloadedError(ApiError):
    """No room for one more request. waits: what does already."""

    def __init__(self, waits: str, retry_after_s: float) -> None:
        wait = max(1, ceil(retry_after_s))
        super().__init__(429, f"{waits}; ask again in {wait} s", code="overloaded", retry_after_s=wait)
        self._made_of = waits, retry_after_s

    def __reduce__(self) -> tuple[type["OverloadedError"], tuple[str, float]]:
        """A replica's error is unpickled by the gateway; Exception's own way would pass the message alone."""
        return type(self), self._made_of


@dataclass(frozen=True, slots=True)
class Answer:
    """What a replica says to a request: its own name, and why it does not take it."""

    replica: str
    error: OverloadedError | None = None


@dataclass(frozen=True)
class Card:
    """What clients may know of the model that is served."""

    id: str
    created: int  # seconds since 1970
    context: int  # tokens
    max_reply_tokens: int
    temperature: float  # used where a request names none
    lineage: dict[str, Any]  # key, inputs, git commit, scores

    def shown(self) -> dict[str, Any]:
        """As `GET /v1/models/{id}` answers."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat-ray",
            "context_length": self.context,
            "max_reply_tokens": self.max_reply_tokens,
            "temperature": self.temperature,
            "lineage": self.lineage,
        }


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request: what both endpoints have."""

    params: SampleParams
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool  # a last event of the stream holds the usage


@dataclass(frozen=True, slots=True)
class ChatAsk(Ask):
    """A checked request for the next message of a chat."""

    messages: list[Message]


@dataclass(frozen=True, slots=True)
class CompletionAsk(Ask):
    """A checked request for what follows each of some texts."""

    prompts: list[str] | list[list[int]]


def no_such_model(asked: str, served: str) -> ApiError:
    """The error for a name that is not served."""
    said = f"the model {asked!r:.100} does not exist; this service has {served!r}"
    return ApiError(404, said, param="model", code="model_not_found")
