"""The one list of stages that can be run.

Adding a stage: a class in spec.py, a file here, a line here. A function is named, not imported, so that `plan` needs
neither torch nor Ray.
"""

from pipelines.spec import Evaluate, Export, Pretrain, Sft, Tokenize, Tokenizer

STAGES: dict[type, str] = {
    Tokenizer: "pipelines.stages.tokenizer:run",
    Tokenize: "pipelines.stages.tokenize:run",
    Pretrain: "pipelines.stages.pretrain:run",
    Sft: "pipelines.stages.sft:run",
    Evaluate: "pipelines.stages.evaluate:run",
    Export: "pipelines.stages.export:run",
}
