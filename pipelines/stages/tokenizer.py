"""Documents in, vocabulary out."""

from collections.abc import Iterator

import ray

from nanochat.tokenizer import tiktoken_vocabulary, train_vocabulary
from pipelines.artifacts import Dir
from pipelines.runner import Job
from pipelines.sources import SourceFile, holdout_score, read
from pipelines.spec import MAX_HOLDOUT, Tokenizer


def run(spec: Tokenizer, job: Job) -> dict[str, float]:
    """Trains on the first `max_bytes` of text that no stage may hold out, or takes tiktoken's own vocabulary."""
    if spec.encoding is not None:
        vocabulary = tiktoken_vocabulary(spec.encoding)
        vocabulary.save(job.out)
        return {"vocabulary_size": vocabulary.size}
    task = ray.remote(_train).options(num_cpus=job.step.place.cpus)
    return dict(ray.get(task.remote(job.source("source"), spec.max_bytes, spec.size, job.out)))


def _train(files: list[SourceFile], max_bytes: int, size: int, out: Dir) -> dict[str, float]:
    texts = Texts(files, max_bytes)
    vocabulary = train_vocabulary(texts, size)
    vocabulary.save(out)
    return {"vocabulary_size": vocabulary.size, "text_bytes": texts.bytes}


class Texts:
    """The first documents of a source that may be trained on, up to `max_bytes`; counts the bytes it gave."""

    def __init__(self, files: list[SourceFile], max_bytes: int) -> None:
        self.files = files
        self.max_bytes = max_bytes
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            for document in read(file, "text"):
                if holdout_score(document.text) < MAX_HOLDOUT:
                    continue
                size = len(document.text.encode())
                if self.bytes + size > self.max_bytes:
                    return
                self.bytes += size
                yield document.text
