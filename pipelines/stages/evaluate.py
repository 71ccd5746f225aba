"""Checkpoint in, scores out: bits per byte on held-out documents, exact match on held-out questions.

gzip and xz, each file alone, stand beside ours: what a general compressor makes of the same text.
"""

import gzip
import json
import lzma
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from nanochat import checkpoint
from nanochat.data import heldout_batches
from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.eval.bits import bits_per_byte, sum_nats
from nanochat.shards import read_documents
from nanochat.tokenizer import Vocabulary
from pipelines.artifacts import Dir
from pipelines.runner import Job, Progress
from pipelines.spec import Evaluate, Place

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Part:
    """What one worker found; sums, so that any number of workers gives the same total."""

    nats: float
    text_bytes: int
    gzip_bytes: int
    xz_bytes: int
    plain_bytes: int  # of the documents that were compressed
    answers: list[dict[str, Any]]


def run(spec: Evaluate, job: Job) -> dict[str, float]:
    """Scores the model on what `data` held out, spread over `place.workers` Ray tasks."""
    place = job.step.place
    task = ray.remote(_part).options(num_cpus=place.cpus, num_gpus=1 if place.gpu else 0)
    waiting = [task.remote(spec, job.inputs["model"], job.inputs["data"], place, rank) for rank in range(place.workers)]
    parts: list[Part] = []
    while waiting:
        ready, waiting = ray.wait(waiting)
        parts += ray.get(ready)
        job.say(Progress(done=len(parts), total=place.workers, unit="part", numbers={}))
    metrics = {"val_bpb": bits_per_byte(sum(p.nats for p in parts), sum(p.text_bytes for p in parts))}
    plain = sum(p.plain_bytes for p in parts)
    if plain:
        metrics["gzip_bpb"] = 8 * sum(p.gzip_bytes for p in parts) / plain
        metrics["xz_bpb"] = 8 * sum(p.xz_bytes for p in parts) / plain
    answers = sorted((a for p in parts for a in p.answers), key=lambda a: int(a["number"]))
    if answers:
        metrics["exact_match"] = sum(a["right"] for a in answers) / len(answers)
        metrics["questions"] = len(answers)
        job.out.put(ANSWERS, "".join(json.dumps(a) + "\n" for a in answers).encode())
    job.out.put("scores.json", json.dumps(metrics, indent=1).encode())
    return metrics


def _part(spec: Evaluate, model_dir: Dir, data: Dir, place: Place, rank: int) -> Part:
    """This worker's share of the rows, of the documents and of the questions."""
    torch.set_num_threads(place.cpus)
    device = torch.device("cuda" if place.gpu else "cpu")
    vocabulary = Vocabulary.load(model_dir)
    model = checkpoint.load_model(model_dir, torch.float32, device)
    names = data.list("heldout-")
    rows = heldout_batches(data, names, model.config.context, place.micro_batch, rank, place.workers)
    nats, text_bytes = sum_nats(model, rows)
    documents = [d for number, d in enumerate(read_documents(data, names)) if number % place.workers == rank]
    chats = bool(documents) and documents[0].mask is not None
    texts = [] if chats else [vocabulary.decode_bytes(d.tokens[1:]) for d in documents]
    return Part(
        nats=nats,
        text_bytes=text_bytes,
        gzip_bytes=sum(len(gzip.compress(t, 9)) for t in texts),
        xz_bytes=sum(len(lzma.compress(t, preset=9)) for t in texts),
        plain_bytes=sum(map(len, texts)),
        answers=_answers(spec, model, vocabulary, data, place, rank) if chats else [],
    )


def _answers(
    spec: Evaluate, model: Any, vocabulary: Vocabulary, data: Dir, place: Place, rank: int
) -> list[dict[str, Any]]:
    """Greedy answers to this worker's share of `spec.examples` questions, spread evenly over the held-out ones."""
    documents = list(read_documents(data, data.list("heldout-")))
    picked = np.unique(np.linspace(0, len(documents) - 1, spec.examples).astype(int))[rank :: place.workers]
    begin, end = vocabulary.special["<|assistant_start|>"], vocabulary.special["<|assistant_end|>"]
    engine = Engine(model, max_batch=8, kv_tokens=8 * model.config.context)
    asked: dict[int, dict[str, Any]] = {}
    for number in picked.tolist():
        tokens = [int(t) for t in documents[number].tokens]
        turn = len(tokens) - tokens[::-1].index(begin)
        if turn + spec.max_reply_tokens > model.config.context:
            continue  # no room for the answer
        request = engine.add(
            tokens[:turn], SampleParams(max_tokens=spec.max_reply_tokens, temperature=0.0, stop=(end,))
        )
        asked[request] = {
            "number": number,
            "name": documents[number].name,
            "question": vocabulary.decode(tokens[1:turn]),
            "wanted": vocabulary.decode([t for t in tokens[turn:] if t != end]),
            "tokens": [],
        }
    open_requests = set(asked)
    while open_requests:
        for output in engine.step():
            asked[output.id]["tokens"] += output.tokens
            if output.finish is not None:
                open_requests.discard(output.id)
    for answer in asked.values():
        answer["said"] = vocabulary.decode([t for t in answer.pop("tokens") if t != end])
        answer["right"] = answer["said"] == answer["wanted"]
    return list(asked.values())
