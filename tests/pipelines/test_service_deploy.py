"""What `serve` refuses before Ray is started, what it says of the bundle, and the service on a real Ray Serve."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest

from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from pipelines.artifacts import BrokenArtifactError, open_store
from pipelines.load import load
from pipelines.plan import plan
from pipelines.service.bundle import RefusedError, find_bundle
from pipelines.service.deploy import Wish, check_port, example, serve
from pipelines.service.replica import IDLE_S
from tests.program import SERVE, Program, family, free_port, started, wait_until_gone
from tests.served import REPLY_TOKENS, build, write_file
from tests.serving import spoken, sse, tiny_runner

HELLO = [{"role": "user", "content": "Hi"}]


def test_the_card_tells_where_the_model_comes_from(tmp_path: Path) -> None:
    loaded = write_file(tmp_path)
    bundle = find_bundle(loaded, build(loaded))
    steps = {step.name: step for step in plan(loaded)}
    card = bundle.card
    assert (card.id, card.context, card.max_reply_tokens, card.temperature) == ("tiny-base", 128, REPLY_TOKENS, 0.8)
    assert card.created == 1_795_348_800  # 2026-11-22T12:00:00Z
    assert card.lineage == {
        "key": steps["bundle"].key,
        "address": steps["bundle"].address,
        "inputs": {name: steps[name].address for name in ("vocabulary", "corpus", "base")},
        "commit": "abc1234",
        "dirty": False,
        "scores": {"base_report": {"val_bpb": 1.25}},
    }
    assert bundle.dtype == "fp32"


def test_a_bundle_that_is_not_built_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = write_file(tmp_path)
    store = open_store(loaded.profile.store, loaded.base)
    assert serve(loaded, store, Wish(once=True)) == 1
    expected = f"the bundle 'bundle' is not built yet; build it: nanochat run {loaded.path} --profile here\n"
    assert capsys.readouterr().err == expected


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    loaded = write_file(tmp_path)
    store = build(loaded)
    weights = next(tmp_path.rglob("data-*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BrokenArtifactError, match=re.escape(str(weights))):
        serve(loaded, store, Wish(once=True))


def test_a_file_without_a_service_is_refused(tmp_path: Path) -> None:
    loaded = write_file(tmp_path)
    text = loaded.path.read_text()
    loaded.path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("service:")))
    with pytest.raises(RefusedError, match="has no `service:`") as refused:
        find_bundle(load(loaded.path, "here"), build(loaded))
    assert refused.value.code == 2


def test_a_cache_smaller_than_one_chat_is_refused(tmp_path: Path) -> None:
    loaded = write_file(tmp_path)
    store = build(loaded)
    small = load(loaded.path, "here", ["serve.kv_tokens=100"])
    with pytest.raises(RefusedError, match=r"serve\.kv_tokens is 100; .* use 128 or more") as refused:
        find_bundle(small, store)
    assert refused.value.code == 2


def test_a_port_in_use_is_refused_before_ray_is_imported(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        loaded = write_file(tmp_path, port)
        build(loaded)
        code = (
            "import sys; from pathlib import Path; from pipelines.artifacts import open_store; "
            "from pipelines.load import load; from pipelines.service.deploy import Wish, serve; "
            f"loaded = load(Path({str(loaded.path)!r}), 'here'); "
            "code = serve(loaded, open_store(loaded.profile.store, loaded.base), Wish(once=True)); "
            "assert not {'ray', 'torch'} & set(sys.modules); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    said = f"port {port} of 127.0.0.1 is in use by another program; end that, or choose another port: --set serve.port="
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def test_other_hosts_and_ports_that_cannot_be_used() -> None:
    check_port("127.0.0.1", free_port())
    with pytest.raises(RefusedError, match=r"port 8000 of 192\.0\.2\.1 cannot be used"):
        check_port("192.0.2.1", 8000)  # an address for documentation: no machine has it


def test_a_rollback_needs_a_service_that_is_up(tmp_path: Path) -> None:
    write_file(tmp_path)
    command = [sys.executable, *SERVE, str(tmp_path / "tiny.yaml"), "--profile", "here", "--rollback"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("--rollback is for a service that is up: say on which Ray, as in RAY_ADDRESS=auto ")


def test_a_ray_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_file(tmp_path)
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, *SERVE, str(tmp_path / "tiny.yaml"), "--profile", "here", "--stop"]
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"RAY_ADDRESS is {address}, and no Ray is there: Connection refused\n"


def seed_of_a_long_reply() -> int:
    """A seed with which the random model says as much as it may."""
    for seed in range(10_000):
        params = SampleParams(REPLY_TOKENS, temperature=0.8, seed=seed, stop=tuple(range(256, 265)))
        worker = Engine(tiny_runner())
        worker.add([256, 257, *b"Hi", 258, 259], params)
        while outputs := worker.step():
            if outputs[0].finish == "length":
                return seed
    raise AssertionError("no seed gives a long reply")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with started(tmp_path_factory.mktemp("serve"), once=False) as program:
        program.wait("RAY_ADDRESS")
        yield program


@pytest.mark.ray
@pytest.mark.slow
def test_the_official_client_through_ray_serve(program: Program) -> None:
    api = openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0, timeout=60)
    whole = api.chat.completions.create(model="tiny-base", messages=HELLO, seed=5, max_tokens=30)
    stream = list(api.chat.completions.create(model="tiny-base", messages=HELLO, seed=5, max_tokens=30, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
    assert stream[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(model="tiny-base", messages=[{"role": "user", "content": "x" * 200}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-5")
    assert httpx.get(f"{program.url}/health").json() == {"status": "ok", "model": "tiny-base"}
    assert httpx.post(f"{program.url}/v1/chat/completions", content=b"[" * 200_000).status_code == 400
    assert httpx.post(f"{program.url}/v1/chat/completions", content=b" " * 2_000_000).status_code == 413
    assert "<title>nanochat</title>" in httpx.get(program.url).text
    several = api.completions.create(model="tiny-base", prompt=["Hi", "Yo"], n=2, seed=5, max_tokens=5, logprobs=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert 'vllm:request_success_total{engine="0",' in httpx.get(f"{program.url}/metrics").text


@pytest.mark.ray
@pytest.mark.slow
def test_what_the_user_reads_is_only_ours(program: Program) -> None:
    lines = "".join(program.lines).splitlines()
    assert lines[0] == f"tiny-base is up at {program.url} - the chat page; Ctrl-C ends it"
    assert lines[2] == "> Hello?"
    assert "> Who?" in lines
    text = "\n".join(lines)
    assert example(program.url, "tiny-base") in text
    for chatter in ("INFO", "WARNING", "ray", "Ray", "\x1b["):
        assert chatter not in text


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_replica_is_replaced_and_what_it_said_is_continued(program: Program) -> None:
    body = {"model": "tiny-base", "messages": HELLO, "stream": True, "seed": seed_of_a_long_reply()}
    url = f"{program.url}/v1/chat/completions"
    whole = spoken(httpx.post(url, json=body, timeout=60).text)
    [replica] = [pid for pid, name in family(program.process.pid).items() if "ServeReplica:nanochat:Replica-" in name]
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        os.kill(replica, signal.SIGKILL)
        text += "".join(pieces)
    assert sse(text)[-1] == "[DONE]", text
    assert spoken(text) == whole


def pipes(pid: int) -> set[str]:
    """Those that a process has open."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(os.readlink(path))
    return {name for name in found if name.startswith("pipe:")}


@pytest.mark.ray
@pytest.mark.slow
def test_replica_and_gateway_share_two_pipes_while_a_reply_runs_and_none_afterwards(program: Program) -> None:
    body = {"model": "tiny-base", "messages": HELLO, "stream": True, "seed": seed_of_a_long_reply()}
    names = {
        name.split("nanochat:")[-1][:7]: pid for pid, name in family(program.process.pid).items() if "nanochat:" in name
    }
    gateway, replica = names["Gateway"], names["Replica"]
    time.sleep(IDLE_S * 2 + 1)  # streams of requests before have ended
    before = pipes(gateway), pipes(replica)
    with httpx.stream("POST", f"{program.url}/v1/chat/completions", json=body, timeout=60) as answer:
        pieces = answer.iter_text()
        next(pieces)
        assert len((pipes(gateway) - before[0]) & (pipes(replica) - before[1])) == 2
        assert "[DONE]" in "".join(pieces)
    time.sleep(IDLE_S * 2 + 1)
    assert (pipes(gateway), pipes(replica)) == before


@pytest.mark.ray
@pytest.mark.slow
def test_a_flood_is_answered_or_told_to_come_back(program: Program) -> None:
    body = {"model": "tiny-base", "messages": HELLO, "seed": seed_of_a_long_reply()}
    url = f"{program.url}/v1/chat/completions"

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=200)) as client:
            return await asyncio.gather(*(client.post(url, json=body) for _ in range(200)))

    answers = asyncio.run(flood())
    kinds = {answer.status_code for answer in answers}
    assert kinds == {200, 429}, {answer.text for answer in answers if answer.status_code not in (200, 429)}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers if answer.is_success}) == 1
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_ends_it_and_leaves_nothing(program: Program) -> None:
    pids = set(family(program.process.pid))
    assert len(pids) > 4
    program.process.send_signal(signal.SIGINT)
    assert program.process.wait(60) == 0
    wait_until_gone(pids)
    assert "".join(program.lines).endswith("\nended\n")


@pytest.mark.ray
@pytest.mark.slow
def test_once_answers_and_ends_by_itself(tmp_path: Path) -> None:
    with started(tmp_path, once=True) as program:
        program.wait("tiny-base is up")
        pids = set(family(program.process.pid))
        assert program.process.wait(90) == 0
    wait_until_gone(pids)
    text = "".join(program.lines)
    assert text.count(" tokens/s)") == 2
    assert "graceful_shutdown" not in text


LAYERS = 24
LEAVE = """
import dataclasses, sys, time
from pathlib import Path
import httpx
from ray import serve
from pipelines.load import load
from pipelines.artifacts import open_store
from pipelines.ray_local import ray_running
from pipelines.service.bundle import RefusedError, find_bundle
from pipelines.service.deploy import deployed
# One reply after the other, and many layers: all sixteen must take longer than it takes to hear that a client left.
loaded, seed = load(Path(sys.argv[1]), "here", ["serve.max_batch=1"]), int(sys.argv[2])
bundle, capacity = find_bundle(loaded, open_store(loaded.profile.store, loaded.base)), loaded.profile.serve
body = {"model": "tiny-base", "messages": [{"role": "user", "content": "Hi"}], "seed": seed, "n": 16}
with ray_running(None, 2):
    with deployed(bundle, capacity) as url:
        replica = serve.get_deployment_handle("Replica-1", "nanochat")
        whole = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()["usage"]["completion_tokens"]
        for stream, patience_s in ((True, 60), (False, 0.05)):
            before = replica.stats.remote().result()
            try:
                asked, path = {**body, "stream": stream}, url + "/v1/chat/completions"
                with httpx.stream("POST", path, json=asked, timeout=patience_s) as answer:
                    next(answer.iter_text())
            except httpx.ReadTimeout:
                pass
            time.sleep(1.5)
            after = replica.stats.remote().result()
            assert (after.num_requests_running, after.num_requests_waiting) == (0, 0), after
            assert after.generation_tokens - before.generation_tokens < 0.7 * whole, (whole, before, after)
    try:
        with deployed(dataclasses.replace(bundle, dtype="int3"), capacity):
            raise AssertionError("it came up")
    except RefusedError as error:
        said = "the service did not come up: ValueError: precision is 'int3'; use 'fp32', 'bf16' or 'int8'"
        assert str(error) == said, error
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_client_that_leaves_frees_its_replica_and_a_bad_replica_is_named(tmp_path: Path) -> None:
    loaded = write_file(tmp_path, free_port(), depth=LAYERS)
    build(loaded, depth=LAYERS)
    command = [sys.executable, "-c", LEAVE, str(loaded.path), str(seed_of_a_long_reply())]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
