"""Asks a chat service of OpenAI's shape over HTTP and yields the answer as it comes."""

import ipaddress
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import httpx

from nanochat.chat import Message

CONNECT_TIMEOUT_S = 5
SILENCE_TIMEOUT_S = 300  # a queue may be long
KEY_VARIABLE = "NANOCHAT_API_KEY"  # of the environment; read by the command line


class ServiceError(RuntimeError):
    """The service cannot be reached, refuses, or breaks off. One sentence for a person."""


@dataclass(frozen=True, slots=True)
class End:
    """How an answer ended."""

    finish: str
    prompt_tokens: int
    reply_tokens: int


class Client:
    """A connection to one service. Use it in a `with` statement. key: where the service wants one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise ServiceError(f"{url} is no address: {error}") from error
        timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        # A proxy of the environment is for other hosts.
        self._http = httpx.Client(
            base_url=self.url, timeout=timeout, trust_env=not _is_loopback(host), headers=_headers(key)
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def healthy(self) -> bool:
        """Whether a replica answered a real forward pass."""
        try:
            return self._http.get("/health").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def model(self) -> dict[str, Any]:
        """The card of the model that is served. Raises ServiceError."""
        try:
            answer = self._http.get("/v1/models")
            if answer.is_error:
                raise ServiceError(_said(answer))
            return cast(dict[str, Any], answer.json()["data"][0])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ServiceError(f"{self.url} answers, but it is no chat service") from error

    def ask(self, model: str, messages: list[Message], **settings: Any) -> Iterator[str | End]:
        """Pieces of the answer's text, then an End. Closing the iterator stops the answer. Raises ServiceError."""
        body = {"model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        finish, usage, done = "", {"prompt_tokens": 0, "completion_tokens": 0}, False
        try:
            with self._http.stream("POST", "/v1/chat/completions", json={**body, **settings}) as answer:
                if answer.is_error:
                    answer.read()
                    raise ServiceError(_said(answer))
                for line in answer.iter_lines():
                    data = line.removeprefix("data: ")
                    if not line.startswith("data: ") or (done := data == "[DONE]"):
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise ServiceError(event["error"]["message"])
                    usage = event.get("usage") or usage
                    for choice in event["choices"]:
                        finish = choice["finish_reason"] or finish
                        if text := choice["delta"].get("content"):
                            yield text
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not done:
            raise ServiceError(f"{self.url} broke off in the middle of the answer")
        yield End(finish, usage["prompt_tokens"], usage["completion_tokens"])

    def _unreachable(self, error: httpx.HTTPError) -> ServiceError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServiceError(f"nobody answers at {self.url}; start the service: nanochat serve FILE --profile P")
        if isinstance(error, httpx.UnsupportedProtocol):
            return ServiceError(f"{self.url} is no address; it begins with http:// or https://")
        return ServiceError(f"{self.url} broke off: {error or type(error).__name__}")


def _headers(key: str | None) -> dict[str, str]:
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ServiceError(f"the key in {KEY_VARIABLE} has characters that no key has; set it anew")
    return {"Authorization": f"Bearer {key}"}


def _said(answer: httpx.Response) -> str:
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        return f"{answer.url.copy_with(path='/')} wants a key that it knows: set {KEY_VARIABLE} to yours"
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"{answer.url} answered {answer.status_code} {answer.reason_phrase}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
