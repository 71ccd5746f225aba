"""What a client hears, in OpenAI's words: the types of every answer, and how replies become them.

The OpenAPI document is made from these types. A token whose bytes are no text of their own is written as OpenAI does:
`\\xe2\\x82` in chats, `bytes:\\xe2\\x82` in completions; a special token by its name, without bytes.
"""

import json
import time
import uuid
from collections.abc import Iterable
from typing import Any, Literal, NotRequired, Protocol

from typing_extensions import TypedDict

from pipelines.service.protocol import Card
from pipelines.service.replies import Delta, Said, Vocab

Reason = Literal["stop", "length"]


class Usage(TypedDict):
    """Tokens read and drawn. The token that ended a reply counts as drawn; a prompt counts once for all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(TypedDict):
    """A token that could have come, and the model's own log-probability of it."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of the tokens that are shown."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(TypedDict):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatDelta(TypedDict, total=False):
    """What an event adds to a message."""

    role: Literal["assistant"]
    content: str


class ChatChunkChoice(TypedDict):
    """A piece of one answer to a chat."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class TextLogprobs(TypedDict):
    """Log-probabilities of the tokens that are shown; text_offset counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    """One text that follows a prompt; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason | None


class _Answer(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str  # the bundle's key: with it a seed means the same


class ChatCompletion(_Answer):
    """The whole answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(_Answer):
    """An event of its stream. The last before [DONE] holds the usage and no choice, where it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class Completion(_Answer):
    """The whole answer of POST /v1/completions; also an event of its stream."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class Shape(Protocol):
    """One of the two ways to tell replies."""

    def whole(self, deltas: list[list[Delta]], read: int) -> Any:
        """The answer in one piece, from the pieces of each choice. read: tokens of the prompts."""

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Choices of the events with which choice `index` begins."""

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """Choices of the events that a piece becomes."""

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """What the answer and every event of a stream have."""


class Tokens:
    """How tokens are written."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._names = {token: name for name, token in vocab.special.items()}

    def written(self, token: int, prefix: str = "") -> tuple[str, list[int] | None]:
        """Its text and its bytes. prefix: of what is no text."""
        if token in self._names:
            return self._names[token], None
        data = self._vocab.decode_bytes([token])
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in data), list(data)


class ChatShape:
    """Chat completions."""

    def __init__(self, card: Card, tokens: Tokens, logprobs: int | None) -> None:
        self._tokens, self._wanted = tokens, logprobs is not None
        self._head = _head(card, "chatcmpl")

    def head(self, *, chunk: bool) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if chunk else "chat.completion"}

    def whole(self, deltas: list[list[Delta]], read: int) -> ChatCompletion:
        choices: list[ChatChoice] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": _text(pieces), "refusal": None},
                "logprobs": self._logprobs(_said(pieces)) if self._wanted else None,
                "finish_reason": _reason(pieces),
            }
            for index, pieces in enumerate(deltas)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(read, _drawn(deltas))}  # type: ignore[typeddict-item]

    def begin(self, index: int) -> list[dict[str, Any]]:
        return [_chat_choice(index, {"role": "assistant", "content": ""})]

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        found = []
        if delta.text or delta.said:
            logprobs = self._logprobs(delta.said) if self._wanted else None
            found.append(_chat_choice(delta.index, {"content": delta.text}, logprobs))
        if delta.finish:
            found.append(_chat_choice(delta.index, {}, None, delta.finish))
        return found

    def _logprobs(self, said: Iterable[Said]) -> ChatLogprobs:
        return {
            "content": [
                {
                    **self._likely(one.token, one.logprob),
                    "top_logprobs": [self._likely(token, logprob) for token, logprob in one.top.items()],
                }
                for one in said
            ],
            "refusal": None,
        }

    def _likely(self, token: int, logprob: float) -> TopLogprob:
        text, data = self._tokens.written(token)
        return {"token": text, "bytes": data, "logprob": logprob}


class TextShape:
    """(Legacy) completions. Events and the whole answer look alike."""

    def __init__(self, card: Card, tokens: Tokens, logprobs: int | None) -> None:
        self._tokens, self._most = tokens, logprobs
        self._head = _head(card, "cmpl")

    def head(self, *, chunk: bool) -> dict[str, Any]:
        return {**self._head, "object": "text_completion"}

    def whole(self, deltas: list[list[Delta]], read: int) -> Completion:
        choices = [
            self._choice(index, _text(pieces), _said(pieces), _reason(pieces)) for index, pieces in enumerate(deltas)
        ]
        return {**self._head, "object": "text_completion", "choices": choices, "usage": usage(read, _drawn(deltas))}  # type: ignore[typeddict-item]

    def begin(self, index: int) -> list[dict[str, Any]]:
        return []

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        if not (delta.text or delta.said or delta.finish):
            return []
        return [dict(self._choice(delta.index, delta.text, delta.said, delta.finish))]

    def _choice(self, index: int, text: str, said: list[Said], finish: Any) -> TextChoice:
        logprobs = None if self._most is None else self._logprobs(said)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, said: list[Said]) -> TextLogprobs:
        def text(token: int) -> str:
            return self._tokens.written(token, "bytes:")[0]

        top = [{text(token): value for token, value in [*one.top.items(), (one.token, one.logprob)]} for one in said]
        return {
            "tokens": [text(one.token) for one in said],
            "token_logprobs": [one.logprob for one in said],
            "top_logprobs": top if self._most else None,
            "text_offset": [one.offset for one in said],
        }


def usage(read: int, drawn: int) -> Usage:
    """read: tokens of the prompts.  drawn: of all choices."""
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


def event(data: Any) -> bytes:
    """As a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _head(card: Card, kind: str) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": card.id,
        "system_fingerprint": card.lineage["key"],
    }


def _chat_choice(
    index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _drawn(deltas: list[list[Delta]]) -> int:
    return sum(delta.tokens for pieces in deltas for delta in pieces)


def _text(pieces: list[Delta]) -> str:
    return "".join(piece.text for piece in pieces)


def _said(pieces: list[Delta]) -> list[Said]:
    return [one for piece in pieces for one in piece.said]


def _reason(pieces: list[Delta]) -> Any:
    return pieces[-1].finish
