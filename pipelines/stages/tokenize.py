"""Documents or chats in, token shards out.

A shard is a run of consecutive documents of the source, cut where `shard_bytes` of text are full. Where shards begin
is known before any token is made, so the shards are the same bytes whatever the workers; Ray Data spreads them, one
shard an item.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import ray
import ray.data

from nanochat.chat import render_chat
from nanochat.shards import Doc, write_shard
from nanochat.tokenizer import Vocabulary
from pipelines.artifacts import Dir
from pipelines.documents import Format
from pipelines.ray_local import end_data_helpers
from pipelines.runner import Job, Progress, StageFailed
from pipelines.sources import SourceFile, holdout_score, read, sizes
from pipelines.spec import Tokenize


@dataclass(frozen=True)
class Span:
    """Documents start..stop of one source file."""

    file: SourceFile
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One shard: its number, and where its documents lie."""

    number: int
    spans: tuple[Span, ...]


def run(spec: Tokenize, job: Job) -> dict[str, float]:
    """Writes train-*.parquet and heldout-*.parquet, and a copy of the vocabulary they were made with."""
    files = job.source("source")
    place = job.step.place
    measure = ray.remote(_measure).options(num_cpus=place.cpus)
    measured = ray.get([measure.remote(file, spec.format) for file in files])
    shards = cut(files, [bytes_ for bytes_, _ in measured], spec.shard_bytes)
    held = sum(int((scores < spec.holdout).sum()) for _, scores in measured)
    documents = sum(len(scores) for _, scores in measured)
    if not 0 < held < documents:
        raise StageFailed(
            job.step.name,
            f"holdout {spec.holdout} keeps {held} of {documents} documents for evaluation; "
            "change it so that some are held out and some are not",
        )
    Vocabulary.load(job.inputs["tokenizer"]).save(job.out)
    totals: dict[str, float] = {"documents": documents, "heldout_documents": held}
    for done, row in enumerate(_on_ray(spec, job, shards).iter_rows(), 1):
        for name in ("tokens", "heldout_tokens", "text_bytes"):
            totals[name] = totals.get(name, 0) + row[name]
        job.say(Progress(done=done, total=len(shards), unit="shard", numbers={}))
    end_data_helpers()
    if spec.format == "text":  # of a chat, only what the assistant says is counted in bytes
        totals["bytes_per_token"] = totals["text_bytes"] / (totals["tokens"] + totals["heldout_tokens"])
    return totals


def cut(files: list[SourceFile], sizes_: list[np.ndarray], shard_bytes: int) -> list[Shard]:
    """Shards of at least `shard_bytes` of text, of whole documents in the order of the source.

    sizes_: for each file, (documents,) bytes of text of each. The last shard may be smaller.
    """
    shards: list[Shard] = []
    spans: list[Span] = []
    full = 0
    for file, bytes_ in zip(files, sizes_, strict=True):
        start = 0
        for number, size in enumerate(bytes_.tolist()):
            full += size
            if full >= shard_bytes:
                shards.append(Shard(len(shards), (*spans, Span(file, start, number + 1))))
                spans, start, full = [], number + 1, 0
        if start < len(bytes_):
            spans.append(Span(file, start, len(bytes_)))
    if spans:
        shards.append(Shard(len(shards), tuple(spans)))
    return shards


def _measure(file: SourceFile, format_: Format) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of text and hold-out score of each document of a file."""
    pairs = list(sizes(file, format_))
    return np.array([b for b, _ in pairs], dtype=np.int64), np.array([s for _, s in pairs])


def _on_ray(spec: Tokenize, job: Job, shards: list[Shard]) -> Any:
    """A dataset with one row for each finished shard, in whatever order they finish."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    place = job.step.place
    numbers = ray.data.from_items([{"number": shard.number} for shard in shards], override_num_blocks=len(shards))
    return numbers.map_batches(
        partial(one_shard, spec, shards, job.inputs["tokenizer"], job.out),
        batch_size=1,
        num_cpus=place.cpus,
        compute=ray.data.TaskPoolStrategy(size=place.most_workers),
    )


def one_shard(
    spec: Tokenize, shards: list[Shard], vocabulary_dir: Dir, out: Dir, batch: dict[str, Any]
) -> dict[str, list[int]]:
    """Writes the shard whose number is the only row of the batch. Returns what it holds, as one row."""
    vocabulary = Vocabulary.load(vocabulary_dir)
    shard = shards[int(batch["number"][0])]
    totals = {"tokens": 0, "heldout_tokens": 0, "text_bytes": 0}
    held_out: list[Doc] = []

    def training() -> Iterator[Doc]:
        for doc, held in _documents(spec, vocabulary, shard):
            totals["heldout_tokens" if held else "tokens"] += len(doc.tokens)
            totals["text_bytes"] += doc.bytes
            if held:
                held_out.append(doc)
            else:
                yield doc

    documents = training()
    first = next(documents, None)  # all documents of a small shard may be held out
    if first is not None:
        write_shard(out, f"train-{shard.number:05d}.parquet", chain([first], documents), vocabulary.size)
    if held_out:
        write_shard(out, f"heldout-{shard.number:05d}.parquet", held_out, vocabulary.size)
    return {name: [value] for name, value in totals.items()}


def _documents(spec: Tokenize, vocabulary: Vocabulary, shard: Shard) -> Iterator[tuple[Doc, bool]]:
    """The documents of a shard, tokenized, and whether each is held out."""
    bos = vocabulary.special["<|bos|>"]
    for span in shard.spans:
        for source in read(span.file, spec.format, span.start, span.stop):
            if spec.format == "text":
                tokens = [bos, *vocabulary.encode(source.text)]
                doc = Doc(tokens=tokens, bytes=len(source.text.encode()), name=source.name)
                yield doc, holdout_score(source.text) < spec.holdout
            else:
                tokens, mask = render_chat(vocabulary, source.messages)
                said = sum(len(m["content"].encode()) for m in source.messages if m["role"] == "assistant")
                doc = Doc(tokens=tokens, bytes=said, mask=mask, name=source.name)
                yield doc, holdout_score(source.question) < spec.holdout
