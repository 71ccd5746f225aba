"""Small models that several tests use."""

import torch

from nanochat.config import ModelConfig
from nanochat.model import GPT

VOCAB = 61


def small(kv_heads: int | None = None, *, depth: int = 2, context: int = 128) -> ModelConfig:
    """Four query heads of 8."""
    return ModelConfig(depth=depth, context=context, head_dim=8, aspect=32 // depth, kv_heads=kv_heads)


def filled(config: ModelConfig, seed: int = 3, dtype: torch.dtype = torch.float32, std: float = 0.3) -> GPT:
    """A model in which no weight is zero, so that every part of it counts."""
    model = GPT(config, VOCAB, dtype)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=std, generator=generator)
    return model


def some_tokens(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))
