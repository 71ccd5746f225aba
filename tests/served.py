"""A pipeline file whose bundle is built without running it: random weights, a vocabulary of bytes."""

from pathlib import Path

import torch

from nanochat.checkpoint import save_model
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
    model: {depth: 1, context: 128, head_dim: 8, aspect: 16}
    tokens: 1280
    batch_tokens: 128
  base_report: {kind: evaluate, model: base, data: corpus}
  bundle: {kind: export, model: base, dtype: fp32}
service: {model: bundle, max_reply_tokens: REPLY}
profiles:
  here:
    store: store
    serve: {port: PORT, max_batch: 4, kv_tokens: 512}
"""


def write_file(folder: Path, port: int = 8000) -> Loaded:
    """The pipeline file, loaded; nothing is built."""
    path = folder / "tiny.yaml"
    path.write_text(FILE.replace("PORT", str(port)).replace("REPLY", str(REPLY_TOKENS)))
    return load(path, "here")


def build(loaded: Loaded) -> Store:
    """Commits the bundle and the report of `loaded`."""
    store = open_store(loaded.profile.store, loaded.base)
    for step in plan(loaded):
        if step.name == "bundle":
            _commit(store, loaded, step, bundle=True, metrics={"logit_difference": 0.0})
        if step.name == "base_report":
            _commit(store, loaded, step, bundle=False, metrics={"val_bpb": 1.25})
    return store


def _commit(store: Store, loaded: Loaded, step: Step, *, bundle: bool, metrics: dict[str, float]) -> None:
    out, _ = store.begin(step.address)
    if bundle:
        save_model(out, tiny_model(), torch.float32)
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
