"""A prompt that takes down whoever answers it: two replicas are lost, then it is refused, and others are answered."""

import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.program import Program, family, started
from tests.serving import sse


@pytest.mark.ray
@pytest.mark.drill
def test_a_prompt_that_kills_two_replicas_is_refused_at_its_next_try(tmp_path: Path) -> None:
    with started(tmp_path, depth=12) as program:  # deep, so that it still speaks when its first words are read
        program.wait("RAY_ADDRESS")
        deadly = {"model": "tiny-base", "messages": [{"role": "user", "content": "die"}], "stream": True, "seed": 1}
        url, killed, text = f"{program.url}/v1/chat/completions", set[int](), ""
        with httpx.stream("POST", url, json=deadly, timeout=120) as answer:
            for piece in answer.iter_text():
                text += piece
                for pid in replicas(program) - killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        assert len(killed) == 2, text
        assert json.loads(sse(text)[-1])["error"]["type"] == "server_error"

        refused = httpx.post(url, json=deadly, timeout=120)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "prompt_refused"), refused.text
        harmless = {**deadly, "messages": [{"role": "user", "content": "live"}]}
        assert sse(httpx.post(url, json=harmless, timeout=120).text)[-1] == "[DONE]"
        assert len(replicas(program)) == 1


def replicas(program: Program) -> set[int]:
    named = family(program.process.pid).items()
    return {pid for pid, name in named if name.startswith("ray::ServeReplica:nanochat:Replica-")}
