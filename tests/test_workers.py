"""How many workers there are changes nothing: the same shards, the same weights, the same losses.

`one` builds all with one worker. `more` builds the same in another home: shards and `base` with two workers each, and
`chat` with four; that `chat` begins with the weights of two workers, which the second test says are the same.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.commands import TINY, left_over, nanochat, plan

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS = 10
WORDS = [a + b for a in "bdfklmnpst" for b in ("ar", "el", "in", "ost", "um")]


def sentences(draw: random.Random, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two small sources, a model of seconds in fp32, and place for one thread a worker."""
    folder, draw = tmp_path_factory.mktemp("sources"), random.Random(1)
    texts = [{"text": sentences(draw, 400)} for _ in range(300)]
    chats = [
        {
            "messages": [  # answers of 1 to 30 words, so that what counts is spread unevenly
                {"role": "user", "content": sentences(draw, 8)},
                {"role": "assistant", "content": sentences(draw, draw.choice((2, 30)))},
            ]
        }
        for _ in range(450)
    ]
    for name, documents in (("texts", texts), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    return {
        **TINY,
        "vocabulary.size": "320",
        "vocabulary.source": str(folder / "texts.jsonl"),
        "corpus.source": str(folder / "texts.jsonl"),
        "corpus.shard_bytes": "60_000",
        "dialogues.source": str(folder / "chats.jsonl"),
        "dialogues.shard_bytes": "4_000",
        "base.precision": "fp32",
        "base.batch_tokens": "1024",  # 8 rows: two workers take one micro-batch each, one worker takes two
        "base.tokens": str(STEPS * 1024),
        "chat.precision": "fp32",
        "chat.batch_tokens": "1024",
        "chat.epochs": "1",
        "place.default.cpus": "1",
        "place.default.micro_batch": "4",
    }


Built = dict[str, dict[str, Any]]  # stage -> its manifest, with its folder in "path"


def build(home: Path, settings: dict[str, str], **workers: int) -> Built:
    """Builds up to `chat`, with one worker where no other number is given."""
    places = {f"place.{stage}.workers": str(count) for stage, count in workers.items()}
    done = nanochat(home, "run", settings | places, "--only", "chat", "--json")
    assert done.returncode == 0, done.stderr
    assert left_over(home) == []
    built = {}
    for name, step in plan(home, settings).items():
        if step["state"] == "built":
            folder = Path(step["path"])
            built[name] = json.loads((folder.parent / "manifest.json").read_text()) | {"path": folder}
    assert all(built[name]["made"]["place"]["workers"] == count for name, count in workers.items())
    return built


def hashes(manifest: dict[str, Any], ending: str) -> dict[str, str]:
    """sha256 of the files of an artifact, by name."""
    return {f["path"]: f["sha256"] for f in manifest["files"] if f["path"].endswith(ending)}


def losses(manifest: dict[str, Any]) -> list[float]:
    return [json.loads(line)["loss"] for line in (manifest["path"] / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("one"), settings)


@pytest.fixture(scope="module")
def more(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("more"), settings, corpus=2, dialogues=2, base=2, chat=4)


@pytest.mark.parametrize("stage", ["corpus", "dialogues"])
def test_shards_are_the_same_bytes(one: Built, more: Built, stage: str) -> None:
    shards = hashes(one[stage], ".parquet")
    assert len([name for name in shards if name.startswith("train-")]) >= 3
    assert any(name.startswith("heldout-") for name in shards)
    assert shards == hashes(more[stage], ".parquet")


def test_two_workers_are_two_accumulation_steps_bit_for_bit(one: Built, more: Built) -> None:
    assert len(losses(one["base"])) == STEPS
    assert losses(one["base"]) == losses(more["base"])
    assert hashes(one["base"], "model.safetensors") == hashes(more["base"], "model.safetensors")


def test_four_workers_have_the_losses_of_one(one: Built, more: Built) -> None:
    expected = losses(one["chat"])
    assert len(expected) >= 8
    assert losses(more["chat"]) == pytest.approx(expected, rel=1e-5, abs=0)


def test_three_workers_have_the_losses_of_one(one: Built, settings: dict[str, str], tmp_path: Path) -> None:
    """8 rows of masked chats are shared as 2, 3 and 3."""
    store = one["chat"]["path"].parents[2]
    copy = tmp_path / ".cache/nanochat-ray"
    shutil.copytree(store, copy)
    shutil.rmtree(copy / one["chat"]["path"].parent.relative_to(store))
    three = build(tmp_path, settings, chat=3)
    assert three["chat"]["made"]["started"] != one["chat"]["made"]["started"]
    assert losses(three["chat"]) == pytest.approx(losses(one["chat"]), rel=1e-5, abs=0)
