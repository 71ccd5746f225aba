"""The whole life under `laptop`, as a user types it, and what is true of what comes out.

One quickstart (minutes) serves all tests here: what it built is looked at, run again, changed, and asked.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer

from nanochat.attention import Rows
from nanochat.chat import render_prompt
from nanochat.checkpoint import load_model, open_weights
from nanochat.engine.engine import Engine
from nanochat.engine.runner import make_runner
from nanochat.engine.sampler import SampleParams
from nanochat.files import Folder
from nanochat.tokenizer import Vocabulary
from pipelines import stdlib
from tests.commands import ROOT, TINY, environment, left_over, nanochat, plan

pytestmark = [pytest.mark.life, pytest.mark.ray]


@pytest.fixture(scope="module")
def bundle(life: dict[str, Any]) -> Path:
    return Path(plan(life["home"], {})["bundle"]["path"])


def report(home: Path) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads(nanochat(home, "report", {}, "--json").stdout)["stages"]
    return stages


def test_the_model_is_better_than_compressors_and_answers(life: dict[str, Any]) -> None:
    stages = report(life["home"])
    scores = stages["base_report"]["metrics"]
    assert scores["val_bpb"] < 1.50
    assert scores["val_bpb"] < scores["xz_bpb"] < scores["gzip_bpb"]
    assert stages["base"]["metrics"]["waste"] < 0.05
    lines = life["said"].splitlines()
    asked = [number for number, line in enumerate(lines) if line.startswith("> ")]
    assert len(asked) == 2
    assert all(lines[number + 1].strip() for number in asked), "an answer is empty"
    assert "Traceback" not in life["errors"]  # pip may warn of its own there
    assert "ray::" not in life["errors"]


def test_the_report_is_one_page_with_curves_and_lineage(life: dict[str, Any]) -> None:
    page = (life["clone"] / "speedrun-laptop.html").read_text()
    assert "<svg" in page
    assert all(step["key"] in page for step in plan(life["home"], {}).values())
    addresses = re.findall(r"https?://[^\"'<> ]*", page)
    assert {a for a in addresses if not a.startswith("http://www.w3.org/")} == set(), "the page loads something"


def test_the_same_command_again_builds_nothing(life: dict[str, Any]) -> None:
    done = nanochat(life["home"], "run", {}, "--json")
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["event"] for line in done.stdout.splitlines()} == {"built"}


def test_a_changed_chat_setting_rebuilds_chat_and_what_follows(life: dict[str, Any]) -> None:
    steps = plan(life["home"], {"chat.epochs": "0.05", "chat_report.examples": "8"})
    states = {name: step["state"] for name, step in steps.items()}
    assert {n for n, s in states.items() if s == "missing"} == {"chat", "chat_report", "bundle"}
    assert any("epochs 1.2 -> 0.05" in change for change in steps["chat"]["changes"]), steps["chat"]["changes"]
    done = nanochat(life["home"], "run", {"chat.epochs": "0.05", "chat_report.examples": "8"}, "--json")
    assert done.returncode == 0, done.stderr
    events = {row["stage"]: row["event"] for row in map(json.loads, done.stdout.splitlines())}
    assert {n for n, e in events.items() if e == "made"} == {"chat", "chat_report", "bundle"}


def test_the_bundle_is_the_same_model_in_transformers(bundle: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32, attn_implementation="sdpa").eval()
    ours = load_model(Folder(bundle), torch.float32)
    tokens = torch.randint(0, ours.vocab_size, (4, 256), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (ours.logits(ours(tokens, Rows())) - theirs(tokens).logits).abs().max().item()
    assert difference < 1e-5


def test_greedy_answers_are_the_same_in_transformers(bundle: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    vocabulary = Vocabulary.load(Folder(bundle))
    with open_weights(Folder(bundle)) as (config, vocab_size, weights):
        ours = make_runner(config, vocab_size, weights, kv_tokens=config.context, precision="fp32")
    for _, messages in list(stdlib.questions())[::400]:
        prompt = render_prompt(vocabulary, messages[:1])
        assert tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False) == prompt
        engine = Engine(ours, stop=[vocabulary.special["<|assistant_end|>"]])
        engine.add(prompt, SampleParams(max_tokens=24, temperature=0.0))
        said: list[int] = []
        finish = None
        while finish is None:
            for output in engine.step():
                said += output.tokens
                finish = output.finish
        generated = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=24,
            do_sample=False,
        )
        assert generated[0, len(prompt) :].tolist() == said


def test_int8_halves_the_matrices_and_keeps_the_bits(life: dict[str, Any]) -> None:
    steps = plan(life["home"], {})
    command = [sys.executable, "-m", "nanochat.bench.decode", "--trained", steps["base"]["path"], "--runs", "1"]
    command += ["--text", steps["corpus"]["path"], "--precision", "fp32", "bf16", "int8", "--json"]
    done = subprocess.run(command, env=environment(life["home"]), capture_output=True, text=True, check=True, cwd=ROOT)
    rows = {row["precision"]: row for row in map(json.loads, done.stdout.splitlines())}
    score = report(life["home"])["base_report"]["metrics"]["val_bpb"]
    assert rows["fp32"]["bits_per_byte"] == pytest.approx(score, rel=1e-5)  # sums in another order
    assert rows["bf16"]["bits_per_byte"] == pytest.approx(score, rel=2e-3)
    assert rows["int8"]["bits_per_byte"] <= 1.01 * rows["bf16"]["bits_per_byte"]
    assert rows["int8"]["weight_bytes"] < 0.52 * rows["bf16"]["weight_bytes"]  # scales beside the whole numbers


def test_token_ids_are_the_same_in_transformers(bundle: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, vocabulary = AutoTokenizer.from_pretrained(bundle), Vocabulary.load(Folder(bundle))
    texts = [text for _, text in stdlib.documents()]
    texts += [message["content"] for _, messages in stdlib.questions() for message in messages]
    random = np.random.default_rng(7)
    points = np.array([p for p in range(0x110000) if not 0xD800 <= p < 0xE000])
    texts += ["".join(map(chr, random.choice(points, random.integers(1, 24)))) for _ in range(10_000)]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == vocabulary.encode(text)


def test_the_life_on_s3(tmp_path: Path) -> None:
    import boto3

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        boto3.client(
            "s3",
            endpoint_url=keys["AWS_ENDPOINT_URL"],
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        ).create_bucket(Bucket="nanochat-test")
        os.environ.update(keys)
        sets = {**TINY, "store": "s3://nanochat-test/store", "base.tokens": "100_000"}
        done = nanochat(tmp_path, "run", sets, "--json")
        assert done.returncode == 0, done.stderr
        again = nanochat(tmp_path, "run", sets, "--json")
        assert {json.loads(line)["event"] for line in again.stdout.splitlines()} == {"built"}
    finally:
        for name in keys:
            os.environ.pop(name, None)
        server.stop()
    assert left_over(tmp_path) == []
