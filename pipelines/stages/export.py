"""Checkpoint in, servable bundle out: what the service loads, and what transformers loads."""

import json

import ray
import torch

from nanochat import checkpoint
from nanochat.attention import Rows
from nanochat.huggingface import huggingface_files
from nanochat.tokenizer import Vocabulary
from pipelines.artifacts import Dir
from pipelines.runner import Job, StageFailed
from pipelines.spec import Export

PROBE_TOKENS = 64
TOLERANCE = 1e-5  # fp32 logits of the bundle against those of the checkpoint at the bundle's precision


def run(spec: Export, job: Job) -> dict[str, float]:
    """Writes the bundle, reads it back, and compares logits. Raises StageFailed if they differ."""
    task = ray.remote(_export).options(num_cpus=job.step.place.cpus)
    difference = ray.get(task.remote(job.inputs["model"], job.out, spec.dtype))
    if not difference <= TOLERANCE:
        raise StageFailed(
            job.step.name,
            f"the bundle gives other logits than the checkpoint it was made from (difference {difference:.2e})",
        )
    return {"logit_difference": difference}


def _export(checkpoint_dir: Dir, out: Dir, dtype_name: str) -> float:
    """The largest difference of logits between the checkpoint, rounded to the bundle's dtype, and the bundle."""
    dtype = torch.bfloat16 if dtype_name == "bf16" else torch.float32
    vocabulary = Vocabulary.load(checkpoint_dir)
    model = checkpoint.load_model(checkpoint_dir, torch.float32)
    checkpoint.save_model(out, model, dtype)
    vocabulary.save(out)
    for name, data in huggingface_files(vocabulary, model.config.context).items():
        out.put(name, data)
    out.put("generation_config.json", json.dumps(_generation(vocabulary), indent=2).encode())

    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
        again = checkpoint.load_model(out, torch.float32)
        tokens = torch.arange(PROBE_TOKENS).remainder(vocabulary.size)[None]
        return (model.logits(model(tokens, Rows())) - again.logits(again(tokens, Rows()))).abs().max().item()


def _generation(vocabulary: Vocabulary) -> dict[str, object]:
    """What transformers' generate() needs to begin and to stop."""
    return {
        "bos_token_id": vocabulary.special["<|bos|>"],
        "eos_token_id": [vocabulary.special["<|assistant_end|>"], vocabulary.special["<|bos|>"]],
        "pad_token_id": vocabulary.special["<|bos|>"],
    }
