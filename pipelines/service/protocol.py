"""OpenAI's chat completions in words of ours: what a request may say, and the shape of every answer and error.

No HTTP and no Ray. What is not supported is refused by name, never ignored; the few settings of OpenAI's that change
nothing here are listed in NEUTRAL with the values at which they do.
Source: OpenAI's API reference, chat completions, as the `openai` client 2 and 3 speak it.
"""

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from nanochat.chat import Message, check_messages
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output

MAX_BODY_BYTES = 1 << 20
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256

# OpenAI's settings that are not supported here, and the values at which they ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
LABELS = {"metadata", "prompt_cache_key", "safety_identifier", "user"}  # say who asks; an answer never depends on them
SPOKEN = {
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
}


class Backend(Protocol):
    """What answers: an engine in a thread of this process, or one of many behind Ray Serve."""

    def generate(self, tokens: list[int], params: SampleParams) -> AsyncGenerator[Output, None]:
        """Outputs of one request, the last with `finish`. Closing the iterator cancels the request.

        Raises ReplicaLostError if whoever answers is gone.
        """


class ReplicaLostError(RuntimeError):
    """The process that was answering is gone."""


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {
                "message": message,
                "type": "invalid_request_error" if status < 500 else "server_error",
                "param": param,
                "code": code,
            }
        }


@dataclass(frozen=True, slots=True)
class Limits:
    """What the service adds to a request and what it allows."""

    model: str  # the one name that is served
    max_reply_tokens: int
    temperature: float  # used where a request names none


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request."""

    messages: list[Message]
    params: SampleParams
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool  # a last event of the stream holds the usage


def parse(body: bytes, limits: Limits) -> Ask:
    """A request's body as an Ask. Raises ApiError: 400 with the parameter at fault, or 404 for another model."""
    data = _json(body)
    _refuse_unsupported(data)
    if not isinstance(data.get("model"), str):
        raise ApiError(400, f"model is missing; this service has {limits.model!r}", param="model")
    if data["model"] != limits.model:
        raise no_such_model(data["model"], limits.model)
    stream, include_usage = _streaming(data)
    return Ask(_messages(data.get("messages")), _params(data, limits), _stops(data.get("stop")), stream, include_usage)


def no_such_model(asked: str, served: str) -> ApiError:
    """The error for a name that is not served."""
    said = f"the model {asked!r} does not exist; this service has {served!r}"
    return ApiError(404, said, param="model", code="model_not_found")


def usage(prompt_tokens: int, reply_tokens: int) -> dict[str, int]:
    """Tokens read and drawn. The token that ended the reply counts as drawn."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": reply_tokens,
        "total_tokens": prompt_tokens + reply_tokens,
    }


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
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits, NaN or Infinity
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(data).__name__}")
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if name in SPOKEN or name in LABELS or value is None:
            continue
        if name not in NEUTRAL:
            raise ApiError(400, f"unknown parameter: {name!r}", param=name, code="unknown_parameter")
        if not any(value == neutral and type(value) is type(neutral) for neutral in _numbers(NEUTRAL[name])):
            said = f"{name} is not supported by this service; leave it out"
            raise ApiError(400, said, param=name, code="unsupported_parameter")


def _numbers(values: tuple[object, ...]) -> tuple[object, ...]:
    """The values, whole numbers also as floats: 0 and 0.0 ask for the same."""
    return (*values, *(float(value) for value in values if type(value) is int))


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    try:
        messages = check_messages([_message(number, item) for number, item in enumerate(value)])
        if messages[-1]["role"] != "user":
            raise ValueError(f"the last message is the {messages[-1]['role']}'s; an answer needs a user's to answer")
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
    return messages


def _message(number: int, item: object) -> dict[str, object]:
    """One message with its content as one text."""
    where = f"messages[{number}]"
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be an object with `role` and `content`")
    for name, value in item.items():
        if name not in ("role", "content", "name") and value not in (None, [], ""):
            raise ValueError(f"{where}.{name} is not supported by this service")
    role = "system" if item.get("role") == "developer" else item.get("role")
    content = item.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{where}.content holds a part that is no text; only text is supported")
        content = "".join(part["text"] for part in content)
    return {"role": role, "content": content}


def _params(data: Mapping[str, Any], limits: Limits) -> SampleParams:
    name = "max_tokens" if data.get("max_tokens") is not None else "max_completion_tokens"
    if data.get("max_tokens") is not None and data.get("max_completion_tokens") is not None:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both", param="max_tokens")
    asked = data.get(name)
    params: dict[str, Any] = {"temperature": limits.temperature}
    params |= {key: data[key] for key in ("temperature", "top_k", "top_p", "seed") if data.get(key) is not None}
    params["max_tokens"] = limits.max_reply_tokens if asked is None else asked
    if isinstance(params.get("seed"), int) and -(2**63) <= params["seed"] < 0:
        params["seed"] += 2**64  # OpenAI's seeds are signed
    try:
        checked = SampleParams(**params)
    except ValueError as error:
        field = str(error).partition(" ")[0]
        said = str(error) if field != "max_tokens" else str(error).replace(field, name, 1)
        raise ApiError(400, said, param=name if field == "max_tokens" else field) from error
    if checked.max_tokens > limits.max_reply_tokens:
        said = f"{name} is {checked.max_tokens}; this service allows {limits.max_reply_tokens} at most"
        raise ApiError(400, said, param=name)
    if checked.temperature > 2:
        raise ApiError(400, f"temperature is {checked.temperature}; it must be a number, 0 to 2", param="temperature")
    return checked


def _stops(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ApiError(400, f"stop must be a string or a list of at most {MAX_STOPS}", param="stop")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            said = f"stop holds {stop!r:.80}; each must be a string of 1 to {MAX_STOP_CHARACTERS} characters"
            raise ApiError(400, said, param="stop")
    return tuple(stops)


def _streaming(data: Mapping[str, Any]) -> tuple[bool, bool]:
    stream, options = data.get("stream"), data.get("stream_options")
    if stream is not None and not isinstance(stream, bool):
        raise ApiError(400, f"stream is {stream!r:.80}; it must be true or false", param="stream")
    if options is None:
        return bool(stream), False
    if not stream:
        raise ApiError(400, "stream_options is only allowed where stream is true", param="stream_options")
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation") or not isinstance(value, bool | None):
            raise ApiError(400, f"stream_options.{name} is unknown or no boolean", param="stream_options")
        if name == "include_obfuscation" and value:
            raise ApiError(400, "stream_options.include_obfuscation is not supported", param="stream_options")
    return True, bool(options.get("include_usage"))
