"""Requests made up from the OpenAPI document: no 500, and the document and the service say the same.

schemathesis asks the whole app, in this process, over a real engine. The seed is fixed: a failure comes again.
"""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from openapi_spec_validator import validate
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from nanochat.engine.engine import Engine
from pipelines.service.openapi import document
from pipelines.service.parse import parse_chat, parse_completion
from pipelines.service.protocol import ApiError, Card
from pipelines.service.requests import MOST_DEPTH
from pipelines.service.web import make_app
from pipelines.service.worker import Worker
from tests.serving import CARD, ByteVocabulary, sse, tiny_runner

pytestmark = pytest.mark.filterwarnings("ignore")  # schemathesis warns of what it cannot generate from
DOCUMENT = document(CARD, 265)
HELLO = [{"role": "user", "content": "Hi"}]
CHECKS = [response_schema_conformance, content_type_conformance, status_code_conformance]
PATHS = [(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item]
PARSERS: dict[str, Callable[[bytes, Card], object]] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
}
# What a schema cannot say is said in words, and so are its refusals.
WORDS = (
    "is only allowed where",
    "not both",
    "no more replies than it answers with",
    "choices; ",
    "where 'user' is due",
    "where 'assistant' is due",
    "messages holds no user message",
    "the last message is",
    f"more than {MOST_DEPTH} lists and objects",
    "surrogate",
)


def strategy(app: FastAPI, method: str, path: str, mode: GenerationMode) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)[path][method].as_strategy(generation_mode=mode)


def fuzzing(examples: int) -> Any:
    return settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip


@pytest.fixture(scope="module")
def app() -> Any:
    worker = Worker(Engine(tiny_runner(), max_batch=8))
    yield make_app(worker, ByteVocabulary(), CARD)
    worker.close()


def test_the_document_is_an_openapi_document() -> None:
    validate(DOCUMENT)


def asked(case: schemathesis.Case) -> int:
    """The code of the answer; it is as the document says."""
    answer = case.call()
    assert answer.status_code < 500, answer.text
    case.validate_response(answer, checks=CHECKS)
    if answer.headers["content-type"][0].startswith("text/event-stream"):
        chunk = DOCUMENT["paths"][case.path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
        check = validator(chunk["properties"]["data"]["anyOf"][1]["contentSchema"])
        *events, done = sse(answer.text)
        assert done == "[DONE]"
        for event in events:
            check.validate(json.loads(event))
    return answer.status_code


def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]})


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("method", "path"), PATHS)
def test_no_request_is_a_500(app: FastAPI, method: str, path: str, mode: GenerationMode) -> None:
    if mode == GenerationMode.NEGATIVE and "requestBody" not in DOCUMENT["paths"][path][method.lower()]:
        pytest.skip("nothing in it could be wrong")

    codes = set()

    @seed(1)
    @fuzzing(40 if method == "POST" else 5)
    @given(case=strategy(app, method, path, mode))
    def ask(case: schemathesis.Case) -> None:
        codes.add(asked(case))
        if isinstance(case.body, dict) and "messages" in case.body:
            case.body["messages"] = HELLO  # whose turn it is cannot be made up from a schema
            codes.add(asked(case))

    ask()
    if mode == GenerationMode.POSITIVE:
        assert 200 in codes or "{" in path
    else:
        assert codes & {400, 404}


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", list(PARSERS))
def test_the_document_and_the_parser_agree(app: FastAPI, path: str, mode: GenerationMode) -> None:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    check = validator(schema)
    seen = {True: 0, False: 0}

    @seed(2)
    @fuzzing(150 if mode == GenerationMode.POSITIVE else 60)
    @given(case=strategy(app, "POST", path, mode))
    def ask(case: schemathesis.Case) -> None:
        if not isinstance(case.body, dict):
            return
        for data in (case.body, {**case.body, "messages": HELLO}):
            if path == "/v1/completions" and "messages" in data and "messages" not in case.body:
                continue
            allowed = check.is_valid(data)
            try:
                PARSERS[path](json.dumps(data).encode(), CARD)
                said = None
            except ApiError as error:
                said = str(error)
            seen[said is None] += 1
            if allowed:
                assert said is None or any(words in said for words in WORDS), (data, said)
            else:
                assert said is not None, data

    ask()
    assert seen[mode == GenerationMode.POSITIVE] > 30, "too few requests of the kind that is tested"


@pytest.mark.parametrize("path", list(PARSERS))
def test_a_limit_of_the_document_is_where_the_parser_has_it(path: str) -> None:
    """Each number's bound, and the first value beyond it."""
    name = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = DOCUMENT["components"]["schemas"][name.rpartition("/")[2]]["properties"]
    plain = {"model": CARD.id, "prompt": "a"} if "prompt" in fields else {"model": CARD.id, "messages": HELLO}
    helps: dict[str, dict[str, Any]] = {"top_logprobs": {"logprobs": True}}
    checked = 0
    for field, schema in fields.items():
        for form in schema.get("anyOf", ()):
            for bound, step in (("minimum", -1), ("maximum", 1)):
                if bound not in form or field == "best_of":
                    continue
                data = {**plain, **helps.get(field, {}), field: form[bound]}
                PARSERS[path](json.dumps(data).encode(), CARD)
                with pytest.raises(ApiError) as caught:
                    PARSERS[path](json.dumps({**data, field: form[bound] + step}).encode(), CARD)
                assert caught.value.body["error"]["param"] == field
                checked += 1
    assert checked >= 16
