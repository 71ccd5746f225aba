"""From the bytes of a body to a checked request, or to OpenAI's 400 with the parameter at fault.

What is not supported is refused by name, never ignored. All faults that the classes of requests.py find are told at
once; `param` is the first.
"""

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nanochat.chat import Message, check_messages
from nanochat.engine.sampler import SampleParams
from pipelines.service.protocol import ApiError, Card, ChatAsk, CompletionAsk, no_such_model
from pipelines.service.requests import (
    COMPLETION_TOKENS,
    LABELS,
    MOST_CHOICES,
    MOST_DEPTH,
    MOST_PROMPTS,
    MOST_STOP_CHARACTERS,
    MOST_STOPS,
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    NEUTRAL_OF_MESSAGE,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
)

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "n")
# Of a field with several forms, pydantic tells what is wrong with each of them; one sentence says more.
FORMS = {
    "stop": f"a string of 1 to {MOST_STOP_CHARACTERS} characters, or a list of at most {MOST_STOPS} of them",
    "content": "a text, or a list of parts like {'type': 'text', 'text': '...'}; only text is supported",
    "prompt": f"a text, a list of token ids, or a list of 1 to {MOST_PROMPTS} texts or lists of token ids; none empty",
}

Request = TypeVar("Request", ChatRequest, CompletionRequest)


def parse_chat(body: bytes, card: Card) -> ChatAsk:
    """The body of a chat completion. Raises ApiError: 400 with the parameter at fault, or 404 for another model."""
    data = _json(body)
    request = _request(ChatRequest, data, NEUTRAL_CHAT, card)
    if request.top_logprobs is not None and not request.logprobs and request.top_logprobs != 0:
        raise ApiError(400, "top_logprobs is only allowed where logprobs is true", param="top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    messages = _messages(request.messages)
    name = "max_completion_tokens" if request.max_tokens is None else "max_tokens"
    asked = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both", param="max_tokens")
    most = _most(name, asked, card, card.max_reply_tokens)
    stream, usage = _streaming(request)
    return ChatAsk(_params(request, most, logprobs, card), _stops(request), stream, usage, messages)


def parse_completion(body: bytes, card: Card) -> CompletionAsk:
    """The body of a (legacy) completion. Raises ApiError as parse_chat does."""
    data = _json(body)
    request = _request(CompletionRequest, data, NEUTRAL_COMPLETION, card)
    prompts = _prompts(request.prompt)
    replies = request.n or 1
    if request.best_of not in (None, replies):
        said = f"best_of is {request.best_of}; this service makes no more replies than it answers with, so use n"
        raise ApiError(400, said, param="best_of", code="unsupported_parameter")
    if len(prompts) * replies > MOST_CHOICES:
        said = f"{len(prompts)} prompts with n {replies} are {len(prompts) * replies} choices; {MOST_CHOICES} at most"
        raise ApiError(400, said, param="n")
    most = _most("max_tokens", request.max_tokens, card, COMPLETION_TOKENS)
    stream, usage = _streaming(request)
    return CompletionAsk(_params(request, most, request.logprobs, card), _stops(request), stream, usage, prompts)


def _json(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from error
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # a number of thousands of digits, NaN or Infinity
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(data).__name__}")
    _check_depth(data)
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested too deeply: more than {MOST_DEPTH} lists and objects in each other")


def _check_depth(data: object) -> None:
    level = [data]
    for _ in range(MOST_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise _too_deep()


def _request(kind: type[Request], data: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]], card: Card) -> Request:
    spoken = {}
    for name, value in data.items():
        if name in kind.model_fields:
            spoken[name] = value
        elif name in LABELS or (name in neutral and value is None):
            continue
        elif name not in neutral:
            raise ApiError(400, f"unknown parameter: {name!r:.100}", param=name[:100], code="unknown_parameter")
        elif not any(_same(value, one) for one in neutral[name]):
            said = f"{name} is not supported by this service; leave it out"
            raise ApiError(400, said, param=name, code="unsupported_parameter")
    try:
        request = kind.model_validate(spoken)
    except ValidationError as error:
        raise _said(error.errors(include_url=False, include_context=False)) from error
    if request.model != card.id:
        raise no_such_model(request.model, card.id)
    return request


def _same(value: object, neutral: object) -> bool:
    """Whether two values are the same in JSON: 0 and 0.0 are, 0 and false are not."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _said(errors: list[ErrorDetails]) -> ApiError:
    """What pydantic found, in one sentence for each field."""
    found: dict[str, str] = {}
    for error in errors:
        path, form = _place(error["loc"])
        if error["type"] == "missing":
            said = f"{path} is missing"
        elif error["type"] == "extra_forbidden":
            said = f"{path} is unknown"
        elif form:
            said = f"{path} must be {FORMS[form]}"
        else:
            said = f"{path} is {error['input']!r:.80}; {error['msg'].replace('Input', 'it', 1)}"
        found.setdefault(path, said)
    param = str(errors[0]["loc"][0]) if errors[0]["loc"] else None
    return ApiError(400, "; ".join(list(found.values())[:5]), param=param)


def _place(loc: tuple[int | str, ...]) -> tuple[str, str | None]:
    """Where in the body, as JavaScript writes it; and the field, if it has several forms, at which that ends."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        if part in FORMS:
            return path, str(part)
    return path, None


def _messages(said: list[ChatMessage]) -> list[Message]:
    """The chat, each message's content as one text."""
    plain: list[dict[str, object]] = []
    for number, message in enumerate(said):
        for name, value in (message.model_extra or {}).items():
            if not any(_same(value, neutral) for neutral in NEUTRAL_OF_MESSAGE):
                wrong = f"messages[{number}].{name} is not supported by this service; leave it out"
                raise ApiError(400, wrong, param="messages", code="unsupported_parameter")
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        plain.append({"role": "system" if message.role == "developer" else message.role, "content": text})
    try:
        messages = check_messages(plain)
        if messages[-1]["role"] != "user":
            raise ValueError(f"the last message is the {messages[-1]['role']}'s; an answer needs a user's to answer")
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
    return messages


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _most(name: str, asked: int | None, card: Card, default: int) -> int:
    """The most tokens of a reply."""
    if asked is None:
        return min(default, card.max_reply_tokens)
    if asked > card.max_reply_tokens:
        said = f"{name} is {asked}; this service allows {card.max_reply_tokens} at most"
        raise ApiError(400, said, param=name)
    return asked


def _params(request: ChatRequest | CompletionRequest, most: int, logprobs: int | None, card: Card) -> SampleParams:
    params: dict[str, Any] = {"temperature": card.temperature}
    params |= {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
    if params.get("seed", 0) < 0:
        params["seed"] += 2**64  # OpenAI's seeds are signed
    try:
        return SampleParams(max_tokens=most, logprobs=logprobs, **params)
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from error


def _stops(request: ChatRequest | CompletionRequest) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def _streaming(request: ChatRequest | CompletionRequest) -> tuple[bool, bool]:
    options = request.stream_options
    if options is None:
        return bool(request.stream), False
    if not request.stream:
        raise ApiError(400, "stream_options is only allowed where stream is true", param="stream_options")
    if options.include_obfuscation:
        said = "stream_options.include_obfuscation is not supported by this service; leave it out"
        raise ApiError(400, said, param="stream_options", code="unsupported_parameter")
    return True, bool(options.include_usage)
