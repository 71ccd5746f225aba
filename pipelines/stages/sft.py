"""Base checkpoint and chat shards in, chat checkpoint out."""

import math

from nanochat import checkpoint
from nanochat.data import build_index
from nanochat.tokenizer import Vocabulary
from pipelines.runner import Job, StageFailed
from pipelines.spec import Sft
from pipelines.stages._fit import Fit, fit


def run(spec: Sft, job: Job) -> dict[str, float]:
    """Trains the base model on what the assistant says in the chats; only that counts in the loss."""
    shards, start = job.inputs["data"], job.inputs["start"]
    vocabulary = Vocabulary.load(start)
    if Vocabulary.load(shards) != vocabulary:
        raise StageFailed(
            job.step.name,
            "its chats were tokenized with another vocabulary than its base model; "
            "let both `tokenize` stages name the same tokenizer",
        )
    model, _ = checkpoint.read_config(start)
    index = build_index(shards, shards.list("train-"), model.context, chat=True)
    rows = max(1, spec.batch_tokens // model.context)
    task = Fit(
        model=model,
        vocab_size=vocabulary.size,
        start=start,
        shards=shards,
        index=index,
        steps=max(1, math.ceil(spec.epochs * index.rows / rows)),
        batch_tokens=rows * model.context,
        optim=spec.optim,
        precision=spec.precision,
        seed=job.seed,
    )
    metrics = fit(job, task)
    vocabulary.save(job.out)
    return metrics
