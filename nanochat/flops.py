"""Floating-point operations of the model, counted from its sizes; without torch, so that the planner can."""

from nanochat.config import ModelConfig


def matrix_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Weights that a token is multiplied with: all but the embedding, which is looked up."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.key_heads)
    mlp = 2 * config.width * 4 * config.width
    return config.depth * (attention + mlp) + vocab_size * config.width


def parameters(config: ModelConfig, vocab_size: int) -> int:
    """All weights."""
    return matrix_parameters(config, vocab_size) + vocab_size * config.width


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Of one training step, forward and backward, per token of a full context.

    6 for each weight, and 12 * width * context for the two products of attention in each layer, as nanochat and PaLM
    (https://arxiv.org/abs/2204.02311, appendix B) count: the causal half that is not computed is counted too.
    """
    return 6 * matrix_parameters(config, vocab_size) + 12 * config.depth * config.width * config.context
