"""Which bundle a pipeline file serves, whether it can be served, and what clients may know of it.

Needs neither torch nor Ray, so that a refusal costs no time.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast

from pipelines.artifacts import Dir, Manifest, Store
from pipelines.load import Loaded
from pipelines.plan import Step, plan
from pipelines.service.protocol import Card
from pipelines.spec import Evaluate, Export


class RefusedError(RuntimeError):
    """The service cannot be started. One sentence for a person, and the exit code that says whose fault it is."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Bundle:
    """What a replica loads and a gateway shows. Can be pickled."""

    card: Card
    files: Dir
    dtype: Literal["bf16", "fp32"]  # how the weights are stored, and computed with unless the profile says otherwise


def find_bundle(loaded: Loaded, store: Store) -> Bundle:
    """The bundle of the file's service, every byte of it verified.

    Raises RefusedError, BrokenArtifactError or StoreError.
    """
    service = loaded.pipeline.service
    if service is None:
        raise RefusedError(2, f"{loaded.path} has no `service:`; add `service: {{model: STAGE}}` with an export stage")
    steps = plan(loaded, only=service.model)
    step = steps[-1]
    try:
        manifest = store.read(step.address)
    except FileNotFoundError:
        command = f"nanochat run {loaded.path} --profile {loaded.profile_name}"
        raise RefusedError(1, f"the bundle {step.name!r} is not built yet; build it: {command}") from None
    store.verify(manifest)
    spec = cast(Export, step.spec)  # load lets a service name nothing else
    files = store.data(step.address)
    with files.open("config.json") as file:
        context = int(json.load(file)["max_position_embeddings"])
    kv_tokens = loaded.profile.serve.kv_tokens
    if kv_tokens < context:
        said = f"serve.kv_tokens is {kv_tokens}; one chat can fill the model's context, so use {context} or more"
        raise RefusedError(2, f"{loaded.path}: profiles.{loaded.profile_name}.{said}")
    card = Card(
        id=f"{loaded.pipeline.name}-{spec.model}",
        created=int(datetime.fromisoformat(manifest.made["started"]).timestamp()),
        context=context,
        max_reply_tokens=service.max_reply_tokens,
        temperature=service.temperature,
        lineage=_lineage(loaded, store, steps, manifest),
    )
    return Bundle(card, files, spec.dtype)


def _lineage(loaded: Loaded, store: Store, steps: list[Step], manifest: Manifest) -> dict[str, Any]:
    """Where the model comes from, and the scores of it and of what it was made from."""
    above = {step.name for step in steps}
    scores = {}
    for step in plan(loaded):
        if isinstance(step.spec, Evaluate) and step.spec.model in above and store.state(step.address) == "built":
            scores[step.name] = store.read(step.address).metrics
    return {
        "key": manifest.key,
        "address": manifest.address,
        "inputs": {step.name: step.address for step in steps[:-1]},
        "commit": manifest.made.get("commit"),
        "dirty": manifest.made.get("dirty"),
        "scores": scores,
    }
