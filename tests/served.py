"""A pipeline file whose bundle is built without running it: random weights, a vocabulary of bytes."""

from pathlib import Path

import torch

from nanochat.checkpoint import save_model
from nanochat.model import GPT
from nanochat.tokenizer import SPECIAL, SPLIT, Vocabulary
from pipelines.artifacts import Manifest, Store, open_store
from pipelines.load import Loaded, load
from pipelines.plan import Step, plan
from tests.serving import CARD, tiny_model

REPLY_TOKENS = 100
FILE = """
name: tiny
stages:
  vocabulary: {kind: tokenizer, source: a.txt, size: 265}
  corpus: {kind: tokenize, tokenizer: vocabulary, source: a.txt, format: text}
  base:
    kind: pretrain
    data: corpus
    model: {depth: DEPTH, context: 128, head_dim: 8, aspect: 16}
    tokens: TOKENS
    batch_tokens: 128
  base_report: {kind: evaluate, model: base, data: corpus}
  bundle: {kind: export, model: base, dtype: fp32}
service: {model: bundle, max_reply_tokens: MOST}
profiles:
  here:
    store: store
    serve: {port: PORT, replicas: REPLICAS, max_batch: 4, kv_tokens: 512}
"""


def write_file(folder: Path, port: int = 8000, *, tokens: int = 1280, replicas: int = 1, depth: int = 1) -> Loaded:
    """The pipeline file, loaded; nothing is built. tokens: of its training; with other ones it is another bundle."""
    path, said = folder / "tiny.yaml", FILE
    words = {"PORT": port, "MOST": REPLY_TOKENS, "REPLICAS": [replicas, replicas], "DEPTH": depth, "TOKENS": tokens}
    for word, value in words.items():
        said = said.replace(word, str(value))
    path.write_text(said)
    return load(path, "here")


def build(loaded: Loaded, *, scale: float = 1.0, depth: int = 1) -> Store:
    """Commits the bundle and the report of `loaded`. scale: of the last layer's weights.  depth: as in the file."""
    store = open_store(loaded.profile.store, loaded.base)
    for step in plan(loaded):
        if step.name == "bundle":
            _commit(store, loaded, step, model=tiny_model(depth, scale), metrics={"logit_difference": 0.0})
        if step.name == "base_report":
            _commit(store, loaded, step, metrics={"val_bpb": 1.25})
    return store


def _commit(store: Store, loaded: Loaded, step: Step, *, metrics: dict[str, float], model: GPT | None = None) -> None:
    out, _ = store.begin(step.address)
    if model is not None:
        save_model(out, model, torch.float32)
        ranks = {bytes([byte]): byte for byte in range(256)}
        Vocabulary(SPLIT, ranks, {name: 256 + number for number, name in enumerate(SPECIAL)}).save(out)
    addresses = {other.name: other.address for other in plan(loaded)}
    manifest = Manifest(
        name=step.name,
        kind=step.kind,
        makes=step.spec.makes,
        key=step.key,
        data=out.part,
        recipe=step.recipe,
        inputs={field: addresses[name] for field, name in step.inputs.items()},
        files=out.written(),
        pipeline=loaded.pipeline.name,
        profile=loaded.profile_name,
        metrics=metrics,
        made={"commit": "abc1234", "dirty": False, "started": "2026-11-22T12:00:00+00:00"},
    )
    assert CARD.context == 128, "the model of tests/serving.py has the context of FILE"
    store.commit(manifest)
