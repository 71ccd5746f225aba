"""What is measured: a service that is there, asked who it is; or one of our own, made for the measurement."""

import argparse
import contextlib
import io
import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

import httpx
import torch
from safetensors.torch import save_file

from nanochat.bench.setup import RandomWeights
from nanochat.checkpoint import CONFIG, MODEL, transformers_config
from nanochat.config import ModelConfig
from nanochat.engine.runner import BLOCK
from nanochat.tokenizer import SPECIAL, SPLIT, Vocabulary
from pipelines.artifacts import LocalStore
from pipelines.bench.asked import Load, prompt_words
from pipelines.bench.load import Target
from pipelines.ray_local import ray_running
from pipelines.service.bundle import Bundle
from pipelines.service.protocol import Card
from pipelines.spec import Capacity, GpuName

PROBE_TIMEOUT_S = 30
BYTES = 256
ASCII = 128
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST_WORD = 8  # tokens, for the two questions that tell how many a word has


class TargetError(RuntimeError):
    """The service cannot be measured. One sentence for a person."""


@dataclass(frozen=True)
class Limits:
    """What the service says that it takes; None where it says nothing."""

    context: int | None
    most_new: int | None


def probe(args: argparse.Namespace) -> tuple[Target, Limits]:
    """Asks the service at `args.url` for its model, and then for one token. Raises TargetError."""
    url = args.url.rstrip("/").removesuffix("/v1")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise TargetError(f"{args.url} is no address; it begins with http:// or https://")
    headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=PROBE_TIMEOUT_S, trust_env=False) as http:
            card = _card(http, args.model)
            target = Target(
                url=url,
                model=str(card["id"]),
                vocabulary=args.vocabulary or BYTES,
                chat=args.chat,
                key=args.key,
                temperature=args.temperature,
                ignore_eos=args.ignore_eos,
                timeout_s=args.timeout,
            )
            if target.chat:
                target = replace(target, words=_words(http, target, args.prompt))
            else:
                _post(http, "/v1/completions", {"model": target.model, "prompt": [1, 2, 3], "max_tokens": 1})
    except httpx.ConnectError as error:
        raise TargetError(f"nobody answers at {url} ({error}); start the service, or leave out the URL") from error
    except httpx.HTTPError as error:
        raise TargetError(f"{url} does not answer: {error or type(error).__name__}") from error
    return target, Limits(card.get("context_length") or card.get("max_model_len"), card.get("max_reply_tokens"))


def _card(http: httpx.Client, wanted: str | None) -> dict[str, Any]:
    """The model that is asked."""
    answer = http.get("/v1/models")
    try:
        models = answer.raise_for_status().json()["data"]
        names = [str(model["id"]) for model in models]
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        said = f"{http.base_url} answers /v1/models with {answer.status_code} {_said(answer)}"
        raise TargetError(f"{said}; that is no service of OpenAI's shape, or it wants a --key") from error
    if not names:
        raise TargetError(f"{http.base_url} lists no model at /v1/models, so there is nothing to ask")
    if wanted is not None and wanted not in names:
        raise TargetError(f"--model is {wanted!r}, but {http.base_url} has {', '.join(names)}")
    return cast(dict[str, Any], models[names.index(wanted or names[0])])


def _post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(path, json=body)
    if answer.is_error:
        hint = "" if "chat" in path else "; with --chat it is asked in words"
        raise TargetError(f"{http.base_url}{path} answers {answer.status_code} {_said(answer)}{hint}")
    return cast(dict[str, Any], answer.json())


def _words(http: httpx.Client, target: Target, prompt: int) -> tuple[float, float]:
    """Tokens of a chat without a word, and of a word: from two chats, shorter than `prompt` tokens."""
    many = max(8, prompt // LONGEST_WORD)
    few = many // 2
    at_few, at_many = (_prompt_tokens(http, target, prompt_words(Load(asked=()), 0, words)) for words in (few, many))
    each = (at_many - at_few) / (many - few)
    return at_few - each * few, each


def _prompt_tokens(http: httpx.Client, target: Target, said: str) -> int:
    """How many tokens the service sees in a chat."""
    body = {"model": target.model, "max_tokens": 1, "messages": [{"role": "user", "content": said}]}
    try:
        return int(_post(http, "/v1/chat/completions", body)["usage"]["prompt_tokens"])
    except (LookupError, TypeError, ValueError) as error:
        raise TargetError(f"{http.base_url} does not say how many tokens a chat has (usage.prompt_tokens)") from error


def _said(answer: httpx.Response) -> str:
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return str(answer.json()["error"]["message"])[:200]
    return answer.text[:200]


@dataclass(frozen=True)
class Own:
    """A bundle of random weights, and the capacity with which it is served."""

    bundle: Bundle
    capacity: Capacity
    vocabulary: int  # ids below are text


@contextmanager
def own_bundle(args: argparse.Namespace) -> Iterator[Own]:
    """Made for the block. args: config, vocabulary, precision, max_batch, replicas, threads."""
    with tempfile.TemporaryDirectory() as folder:
        files, _ = LocalStore(Path(folder)).begin("bundle/random")
        dtype: Literal["bf16", "fp32"] = "fp32" if args.precision == "fp32" else "bf16"
        path = Path(folder) / MODEL
        save_file(_weights(args.config, args.vocabulary, dtype), path)
        files.put(MODEL, path)
        path.unlink()
        told = transformers_config(args.config, args.vocabulary, torch.float32 if dtype == "fp32" else torch.bfloat16)
        files.put(CONFIG, json.dumps(told).encode())
        _vocabulary(args.vocabulary).save(files)
        card = Card("random", 0, args.config.context, args.config.context, 0.0, {"key": "random"})
        yield Own(Bundle(card, files, dtype), _capacity(args), args.vocabulary - len(SPECIAL))


@contextmanager
def served(own: Own, address: str | None) -> Iterator[str]:
    """The bundle's service on a Ray of this machine, or on the one at `address`; yields its URL."""
    from pipelines.service.deploy import deployed  # a service that is there needs none of this

    cpus = 2 * own.capacity.replicas[1] * own.capacity.cpus + 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_running(address, cpus))
        url = stack.enter_context(deployed(own.bundle, own.capacity))
        try:
            yield url
        finally:
            with contextlib.redirect_stdout(io.StringIO()):  # what Ray prints when it is told to end
                stack.close()


def _weights(config: ModelConfig, vocab_size: int, dtype: str) -> dict[str, torch.Tensor]:
    """Random ones with which a greedy reply never ends by itself, and each token of it is text.

    A token whose row of the head is 0 has the logit 0, and of thousands of others one is always above that.
    """
    weights = {name: weight.clone() for name, weight in RandomWeights(config, vocab_size).items()}
    head = weights["lm_head.weight"]
    head[ASCII:BYTES] = 0  # the bytes of which characters are made
    head[-len(SPECIAL) :] = 0
    return {name: weight if dtype == "fp32" else weight.bfloat16() for name, weight in weights.items()}


def _vocabulary(size: int) -> Vocabulary:
    """Bytes, then made-up words of four letters with a space in front."""
    ranks = {bytes([byte]): byte for byte in range(BYTES)}
    each = len(LETTERS)
    for number in range(size - BYTES - len(SPECIAL)):
        word = "".join(LETTERS[number // each**place % each] for place in range(4))
        ranks[f" {word}".encode()] = len(ranks)
    return Vocabulary(SPLIT, ranks, {name: len(ranks) + number for number, name in enumerate(SPECIAL)})


def _capacity(args: argparse.Namespace) -> Capacity:
    blocks = -(-args.config.context // BLOCK) + 1
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return Capacity(
        port=port,
        replicas=(args.replicas, args.replicas),
        cpus=args.threads,
        gpu=_gpu(args.device),
        max_batch=args.max_batch,
        step_tokens=args.step_tokens,
        kv_tokens=args.max_batch * blocks * BLOCK,
        precision=args.precision,
        speculate=0,  # random weights soon repeat themselves, and then every guess is right
    )


def _gpu(device: str) -> Any:
    """As a pipeline file names it; None for a CPU."""
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    known = [gpu for gpu in get_args(GpuName) if gpu in name]
    if not known:
        raise TargetError(f"this GPU is a {name}; a service can be deployed on {', '.join(get_args(GpuName))}")
    return known[0]
