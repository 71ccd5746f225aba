"""The words of a pipeline file: one class for each `kind:`, and nothing that runs.

`stages` says what is computed. Everything in it, and nothing else, names an artifact.
`profiles` says where and how. It never names an artifact, except through `set`.

This module imports neither torch nor Ray, so a laptop can read, check and plan any file.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from nanochat.config import ModelConfig, OptimConfig

Kind = Literal["vocabulary", "token_shards", "checkpoint", "report", "bundle"]

# Documents whose hash falls in the lowest 5% are never used to train a vocabulary, so that a corpus may hold out
# any share up to this one without the two stages having to agree.
MAX_HOLDOUT = 0.05


@dataclass(frozen=True)
class Needs:
    """Marks a field that names another stage, and says what that stage must make."""

    kind: Kind
    format: Literal["text", "chat"] | None = None  # of the documents in token shards; None: either


Vocabulary = Annotated[str, Needs("vocabulary")]
Shards = Annotated[str, Needs("token_shards")]
TextShards = Annotated[str, Needs("token_shards", "text")]
ChatShards = Annotated[str, Needs("token_shards", "chat")]
Checkpoint = Annotated[str, Needs("checkpoint")]
Bundle = Annotated[str, Needs("bundle")]


class Spec(BaseModel):
    """Frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StageSpec(Spec):
    """What every stage declares about itself."""

    makes: ClassVar[Kind]
    version: ClassVar[int]  # raise it when the stage's code changes what it makes
    draws: ClassVar[bool] = False  # whether the pipeline's seed decides what it makes
    later: ClassVar[dict[str, object]] = {}  # settings added since: path -> the value that changes nothing


class Tokenizer(StageSpec):
    """Documents in, vocabulary out: byte-level BPE trained on them, or one that tiktoken ships."""

    makes: ClassVar[Kind] = "vocabulary"
    version: ClassVar[int] = 1

    kind: Literal["tokenizer"]
    source: str | None = None  # path, s3:// or hf:// glob, or python-stdlib
    size: int | None = Field(None, ge=265, le=1_000_000)  # tokens, the nine special ones included
    encoding: Literal["r50k_base", "cl100k_base"] | None = None  # instead of source and size
    max_bytes: PositiveInt = 2_000_000_000  # of text to train on
    revision: str | int | None = None  # change it to accept a source that changed

    @model_validator(mode="after")
    def _one_way(self) -> "Tokenizer":
        if (self.size is None) == (self.encoding is None):
            raise ValueError(
                "give `size` (a vocabulary is trained on `source`) or `encoding` (tiktoken's own), not both"
            )
        if self.size is not None and self.source is None:
            raise ValueError("`source` is missing: a vocabulary of `size` tokens is trained on it")
        return self


class Tokenize(StageSpec):
    """Documents or chats in, token shards out (Ray Data)."""

    makes: ClassVar[Kind] = "token_shards"
    version: ClassVar[int] = 1

    kind: Literal["tokenize"]
    tokenizer: Vocabulary
    source: str  # path, s3:// or hf:// glob, python-stdlib or python-stdlib-questions
    format: Literal["text", "chat"]
    shard_bytes: PositiveInt = 250_000_000  # of text in a shard
    holdout: float = Field(0.01, gt=0, le=MAX_HOLDOUT)  # share of the documents kept for evaluation
    revision: str | int | None = None  # change it to accept a source that changed


class Pretrain(StageSpec):
    """Token shards in, base checkpoint out (Ray Train, DDP)."""

    makes: ClassVar[Kind] = "checkpoint"
    version: ClassVar[int] = 1
    draws: ClassVar[bool] = True
    later: ClassVar[dict[str, object]] = {"mask_documents": False}

    kind: Literal["pretrain"]
    data: TextShards
    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    tokens: PositiveInt
    batch_tokens: PositiveInt = 524_288
    precision: Literal["bf16", "fp32"] = "bf16"
    mask_documents: bool = False  # a token sees its own document only, not the others that share its row

    @model_validator(mode="after")
    def _whole_rows(self) -> "Pretrain":
        if self.batch_tokens % self.model.context:
            near = max(1, round(self.batch_tokens / self.model.context)) * self.model.context
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}, not a multiple of the context {self.model.context}; use {near}"
            )
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens is {self.tokens}, less than one batch of {self.batch_tokens}")
        return self


class Sft(StageSpec):
    """Base checkpoint and chat shards in, chat checkpoint out (Ray Train, DDP)."""

    makes: ClassVar[Kind] = "checkpoint"
    version: ClassVar[int] = 1
    draws: ClassVar[bool] = True

    kind: Literal["sft"]
    start: Checkpoint
    data: ChatShards
    optim: OptimConfig = OptimConfig(matrix_lr=0.004, embed_lr=0.04, head_lr=0.0008, warmdown=1.0)
    epochs: PositiveFloat = 1.0
    batch_tokens: PositiveInt = 262_144
    precision: Literal["bf16", "fp32"] = "bf16"


class Evaluate(StageSpec):
    """Checkpoint in, scores out: bits per byte on held-out documents, exact match on held-out questions."""

    makes: ClassVar[Kind] = "report"
    version: ClassVar[int] = 1

    kind: Literal["evaluate"]
    model: Checkpoint
    data: Shards  # whose held-out documents are scored
    examples: PositiveInt = 200  # held-out questions that are answered, where `data` holds chats
    max_reply_tokens: PositiveInt = 64


class Export(StageSpec):
    """Checkpoint in, servable bundle out: weights, sizes, tokenizer, chat template. Loads in transformers."""

    makes: ClassVar[Kind] = "bundle"
    version: ClassVar[int] = 1

    kind: Literal["export"]
    model: Checkpoint
    dtype: Literal["bf16", "fp32"] = "bf16"


Stage = Annotated[Tokenizer | Tokenize | Pretrain | Sft | Evaluate | Export, Field(discriminator="kind")]
GpuName = Literal["H200", "H100", "A100", "L4"]


class Service(Spec):
    """What clients of the chat service see. It makes no artifact, so it is not a stage."""

    model: Bundle
    max_reply_tokens: PositiveInt = 1024
    temperature: float = Field(0.8, ge=0)  # used where a request names none; 0 is greedy


def _some_workers(workers: int | tuple[int, int]) -> int | tuple[int, int]:
    fewest, most = workers if isinstance(workers, tuple) else (workers, workers)
    if fewest < 1:
        raise ValueError(f"must be greater than 0, but it is {fewest}")
    if fewest > most:
        raise ValueError(f"is [{fewest}, {most}], but the fewest come first; write [{most}, {fewest}]")
    return workers


class Nccl(Spec):
    """How GPUs exchange gradients, where NCCL's own choice is not wanted."""

    algorithm: Literal["ring", "tree", "nvls"] | None = None  # of a sum; NCCL chooses by size and links, as a rule well
    interface: str | None = Field(None, min_length=1)  # networks between machines: eth0, eth for all that begin so, or
    # ^lo,docker for all but those; NCCL's own choice is right where there is one


class Place(Spec):
    """Where one stage runs: `workers` Ray actors, each with `cpus` and at most one GPU."""

    # A number, or [fewest, most]: a training stage then goes on with as many as there is room for at the time.
    workers: Annotated[int | tuple[int, int], AfterValidator(_some_workers)] = 1
    cpus: PositiveInt = 1  # for each worker
    gpu: GpuName | None = None
    micro_batch: PositiveInt = 8  # sequences in one forward pass of one worker
    retries: int = Field(0, ge=0)  # worker failures to survive before the stage fails
    checkpoint_s: PositiveFloat = 60  # seconds between two checkpoints of a training stage
    parallel: Literal["ddp", "zero1"] = "ddp"  # of training: zero1 also splits the optimizer's state over the workers
    nccl: Nccl | None = None  # of training on GPUs
    profile: tuple[PositiveInt, PositiveInt] | None = None  # first and last step of training to trace, by rank 0

    @property
    def most_workers(self) -> int:
        """How many there are where there is room for all."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @model_validator(mode="after")
    def _survives(self) -> "Place":
        if isinstance(self.workers, tuple) and not self.retries:
            raise ValueError(
                "workers may shrink, but retries is 0, so that the first lost worker would end the stage; "
                "give `retries` the number of losses to survive"
            )
        if self.nccl is not None and self.gpu is None:
            raise ValueError("nccl is how GPUs exchange gradients, but there is no `gpu` here; leave it out")
        return self


class Capacity(Spec):
    """How much of the service runs: replicas, each with `cpus` and at most one GPU."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65_535)
    replicas: tuple[PositiveInt, PositiveInt] = (1, 1)  # fewest, most
    cpus: PositiveInt = 1
    gpu: GpuName | None = None
    max_batch: PositiveInt = 8  # sequences decoded together in one replica
    step_tokens: PositiveInt = 128  # most tokens computed in a step: more, and prompts are read sooner; fewer, and
    # replies that run are not held up by them
    kv_tokens: PositiveInt = 16_384  # tokens of KV cache in one replica
    precision: Literal["fp32", "bf16", "int8"] | None = None  # of the weights in memory; None: as the bundle has them
    speculate: int = Field(4, ge=0, le=16)  # most tokens guessed ahead where that pays; 0: never
    max_wait_s: PositiveFloat = 10.0  # for a first token; a request that would wait longer is told when to ask again
    max_queued_tokens: PositiveInt | None = None  # of prompts that wait at a replica; None: as many as kv_tokens
    keys: str | None = None  # file of who may ask, made with `nanochat key`; None: everybody who can connect


class Profile(Spec):
    """Where a pipeline runs, and the few settings that are changed for that place."""

    store: str  # directory or s3:// prefix of the artifacts
    cluster: str | None = None  # ray_cluster.yaml or KubeRay file of the place
    place: dict[str, Place] = {}  # stage -> Place; "default" is for the stages not named
    serve: Capacity = Capacity()
    set: dict[str, object] = {}  # "stage.field.field" -> value; these DO change artifacts

    @field_validator("store")
    @classmethod
    def _known_kind(cls, store: str) -> str:
        if not store.strip() or store == "s3://" or ("://" in store and not store.startswith("s3://")):
            raise ValueError(f"store is {store!r}; write a folder or s3://BUCKET/PREFIX")
        return store


# A stage's name is part of `set` paths and of addresses. These mean something else in `--set` and in `place`.
RESERVED = ("default", "place", "serve", "store")
StageName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]


class Pipeline(Spec):
    """A whole pipeline file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    seed: int = Field(0, ge=0, lt=2**63)
    stages: dict[StageName, Stage]
    service: Service | None = None
    profiles: dict[str, Profile]


def needs_of(spec: BaseModel) -> dict[str, tuple[str, Kind]]:
    """The stages `spec` builds on: field -> (name of the stage, what it must make)."""
    named = {field: (getattr(spec, field), needs.kind) for field, needs in needed_fields(type(spec)).items()}
    return {field: (name, kind) for field, (name, kind) in named.items() if name is not None}


def needed_fields(kind: type[BaseModel]) -> dict[str, Needs]:
    """The fields of a class that name another stage, and what that stage must make."""
    found: dict[str, Needs] = {}
    for field, info in kind.model_fields.items():
        marks = [*info.metadata, *(m for arg in get_args(info.annotation) for m in get_args(arg))]
        for mark in marks:
            if isinstance(mark, Needs):
                found[field] = mark
    return found


def stage_classes() -> dict[str, type[StageSpec]]:
    """kind, as in the file -> its class."""
    classes = get_args(get_args(Stage)[0])
    return {get_args(c.model_fields["kind"].annotation)[0]: c for c in classes}
