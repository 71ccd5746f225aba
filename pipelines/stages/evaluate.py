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
from nanochat.eval.answer import greedy_answers
from nanochat.eval.bits import bits_per_byte, sum_nats
from nanochat.model import GPT
from nanochat.shards import Doc, read_documents
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
    """Scores the model on what `data` held out, spread over `place.most_workers` Ray tasks."""
    place = job.step.place
    task = ray.remote(_part).options(num_cpus=place.cpus, num_gpus=1 if place.gpu else 0)
    world = place.most_workers
    waiting = [task.remote(spec, job.inputs["model"], job.inputs["data"], place, rank) for rank in range(world)]
    parts: list[Part] = []
    while waiting:
        ready, waiting = ray.wait(waiting)
        parts += ray.get(ready)
        job.say(Progress(done=len(parts), total=world, unit="part", numbers={}))
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
    rows = heldout_batches(data, names, model.config.context, place.micro_batch, rank, place.most_workers)
    nats, text_bytes = sum_nats(model, rows)
    documents = list(read_documents(data, names))
    chats = documents[0].mask is not None
    texts = [] if chats else [vocabulary.decode_bytes(d.tokens[1:]) for d in documents[rank :: place.most_workers]]
    return Part(
        nats=nats,
        text_bytes=text_bytes,
        gzip_bytes=sum(len(gzip.compress(t, 9)) for t in texts),
        xz_bytes=sum(len(lzma.compress(t, preset=9)) for t in texts),
        plain_bytes=sum(map(len, texts)),
        answers=_answers(spec, model, vocabulary, documents, (rank, place.most_workers)) if chats else [],
    )


def _answers(
    spec: Evaluate, model: GPT, vocabulary: Vocabulary, documents: list[Doc], share: tuple[int, int]
) -> list[dict[str, Any]]:
    """Answers to this worker's part of `spec.examples` questions, spread evenly over the held-out chats.

    share: rank and number of workers. The last turn of a chat is asked; those that leave no room for it are not.
    """
    begin, end = vocabulary.special["<|assistant_start|>"], vocabulary.special["<|assistant_end|>"]
    picked = np.unique(np.linspace(0, len(documents) - 1, spec.examples).astype(int))
    chats = [(int(number), [int(t) for t in documents[number].tokens]) for number in picked[share[0] :: share[1]]]
    turns = [(number, tokens, len(tokens) - tokens[::-1].index(begin)) for number, tokens in chats]
    asked = [turn for turn in turns if turn[2] + spec.max_reply_tokens <= model.config.context]
    said = greedy_answers(model, [tokens[:turn] for _, tokens, turn in asked], spec.max_reply_tokens, end)
    answers = []
    for (number, tokens, turn), reply in zip(asked, said, strict=True):
        wanted = [t for t in tokens[turn:] if t != end]
        answers.append(
            {
                "number": number,
                "name": documents[number].name,
                "question": vocabulary.decode([t for t in tokens[:turn] if t not in vocabulary.special.values()]),
                "wanted": vocabulary.decode(wanted),
                "said": vocabulary.decode(reply),
                "right": reply == wanted,
            }
        )
    return answers
