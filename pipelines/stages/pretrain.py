"""Token shards in, base checkpoint out."""

from nanochat.data import build_index
from nanochat.tokenizer import Vocabulary
from pipelines.runner import Job
from pipelines.spec import Pretrain
from pipelines.stages._fit import Fit, fit


def run(spec: Pretrain, job: Job) -> dict[str, float]:
    """Trains a model from nothing on `spec.tokens` tokens, as many epochs as that takes."""
    shards = job.inputs["data"]
    vocabulary = Vocabulary.load(shards)
    task = Fit(
        model=spec.model,
        vocab_size=vocabulary.size,
        start=None,
        shards=shards,
        index=build_index(shards, shards.list("train-"), spec.model.context, chat=False),
        steps=spec.tokens // spec.batch_tokens,
        batch_tokens=spec.batch_tokens,
        optim=spec.optim,
        precision=spec.precision,
        seed=job.seed,
        mask_documents=spec.mask_documents,
    )
    metrics = fit(job, task)
    vocabulary.save(job.out)
    return metrics
