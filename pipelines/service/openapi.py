"""The service as an OpenAPI 3.1 document, made from the classes that check requests and the types that answers have.

What no JSON Schema can say (whose turn it is in a chat, settings that exclude each other, the context) is said in
words; a body that breaks it gets the same 400.
"""

from typing import Any

from pydantic import TypeAdapter

from pipelines.service.answers import ChatCompletion, ChatCompletionChunk, Completion
from pipelines.service.protocol import Card, error_type
from pipelines.service.requests import (
    LABELS,
    MOST_BODY_BYTES,
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    ChatRequest,
    CompletionRequest,
)

REF = "#/components/schemas/{model}"
ERRORS = {
    "400": "The body is no JSON, or says something that is not allowed or not supported.",
    "401": "The key is missing or not known.",
    "404": "Another model is served.",
    "405": "Another method is allowed here.",
    "408": "The body did not come.",
    "413": f"The body is larger than {MOST_BODY_BYTES} bytes.",
    "415": "The body is not application/json.",
    "429": "Too much waits already, or the key's limits are reached; ask again after Retry-After.",
    "431": "The headers are too large.",
    "500": "The service is at fault.",
    "503": "The replica that was answering is gone; ask again after Retry-After.",
    "504": "The reply took too long.",
}
OPEN_PATHS = ("/health",)  # for load balancers; what Prometheus reads wants a key, which it can send
NOT_OF_A_POST = ("401", "405")  # 401 only where keys are wanted, 405 by another method
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": sorted({error_type(int(status)) for status in ERRORS})},
                "param": {"type": ["string", "null"], "description": "The field of the body at fault."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(card: Card, vocab_size: int, *, keyed: bool = False) -> dict[str, Any]:
    """The document of the service of one model. keyed: it wants keys."""
    chat = _request(ChatRequest, NEUTRAL_CHAT, card)
    completion = _request(CompletionRequest, NEUTRAL_COMPLETION, card)
    _limit_tokens(completion, vocab_size)
    schemas: dict[str, Any] = {"Error": ERROR, "Model": _model(), "ChatRequest": chat, "CompletionRequest": completion}
    for answer in (ChatCompletion, ChatCompletionChunk, Completion):
        schemas[answer.__name__] = TypeAdapter(answer).json_schema(ref_template=REF)
    for schema in list(schemas.values()):
        schemas.update(schema.pop("$defs", {}))
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "nanochat-ray",
            "version": "1",
            "description": f"OpenAI's API over the model {card.id}. Stream events are those of OpenAI, [DONE] last.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _post("ChatRequest", "ChatCompletion", "ChatCompletionChunk")},
            "/v1/completions": {"post": _post("CompletionRequest", "Completion", "Completion")},
            "/v1/models": {"get": _get("The model that is served.", _json(_list("Model")))},
            "/v1/models/{name}": {
                "get": {
                    **_get("The model and where it comes from.", _json(_ref("Model")), "404"),
                    "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
                }
            },
            "/health": {
                "get": {
                    "summary": "Whether the model answers: a real forward pass.",
                    "responses": {
                        "200": _answer("It does.", _json(_health())),
                        "503": _answer("No.", _json(_health())),
                    },
                }
            },
            "/metrics": {
                "get": _get(
                    "For Prometheus, under vLLM's names.", {"text/plain": {"schema": {"type": "string"}}}, "503"
                )
            },
        },
        "components": {"schemas": schemas},
    }
    if keyed:
        _want_keys(made)
    return made


def _want_keys(made: dict[str, Any]) -> None:
    """Says which paths want a key."""
    made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in made["paths"].items():
        for operation in item.values():
            if path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = _answer(ERRORS["401"], _json(_ref("Error")))


def _request(kind: Any, neutral: dict[str, tuple[Any, ...]], card: Card) -> dict[str, Any]:
    """The class's schema with what it refuses by name, what it takes as a label, and the model's own limits."""
    schema: dict[str, Any] = kind.model_json_schema(ref_template=REF)
    fields = schema["properties"]
    fields["model"] = {"const": card.id}
    for name in ("max_tokens", "max_completion_tokens"):
        if name in fields:
            fields[name]["anyOf"][0]["maximum"] = card.max_reply_tokens
    fields |= {name: {"enum": [*values, None], "description": "Not supported."} for name, values in neutral.items()}
    fields |= {name: {"description": "A label; no answer depends on it."} for name in LABELS}
    return schema


def _limit_tokens(schema: Any, vocab_size: int) -> None:
    """Ids of tokens are those of the vocabulary."""
    for form in schema["properties"]["prompt"]["anyOf"]:
        items = form.get("items", {})
        for item in (items, items.get("items", {})):
            if item.get("type") == "integer":
                item["maximum"] = vocab_size - 1


def _model() -> dict[str, Any]:
    texts, counts = ("id", "owned_by"), ("created", "context_length", "max_reply_tokens")
    properties: dict[str, Any] = {name: {"type": "string"} for name in texts}
    properties |= {name: {"type": "integer"} for name in counts}
    properties |= {
        "object": {"const": "model"},
        "temperature": {"type": "number", "description": "Where a request names none."},
        "lineage": {"type": "object", "description": "Key, inputs, git commit and scores."},
    }
    return {"type": "object", "properties": properties, "required": [*properties]}


def _health() -> dict[str, Any]:
    properties = {"status": {"enum": ["ok", "down"]}, "model": {"type": "string"}, "why": {"type": "string"}}
    return {"type": "object", "properties": properties, "required": ["status", "model"]}


def _post(request: str, whole: str, event: str) -> dict[str, Any]:
    chunk = {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(event)}
    each = {
        "type": "object",
        "description": "One event; the last is [DONE], or an Error if the answer broke off.",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, chunk]}},
        "required": ["data"],
    }
    answer = {**_json(_ref(whole)), "text/event-stream": {"schema": each}}
    return {
        "requestBody": {"required": True, "content": _json(_ref(request))},
        "responses": {
            "200": _answer("The answer; events where `stream` is true.", answer),
            **{
                code: _answer(said, _json(_ref("Error"))) for code, said in ERRORS.items() if code not in ("401", "405")
            },
        },
    }


def _get(said: str, content: dict[str, Any], *errors: str) -> dict[str, Any]:
    failures = {code: _answer(ERRORS[code], _json(_ref("Error"))) for code in (*errors, "431", "500")}
    return {"summary": said, "responses": {"200": _answer(said, content), **failures}}


def _answer(said: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": said, "content": content}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": REF.format(model=name)}


def _list(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _ref(name)}},
        "required": ["object", "data"],
    }
