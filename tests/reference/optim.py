"""Muon once more: one matrix at a time, in float64, with a true singular value decomposition."""

import numpy as np

from nanochat.config import OptimConfig


class SlowMuon:
    """What Newton-Schulz approximates. Its updates differ from Muon's by the singular values alone."""

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.average: np.ndarray | float = 0.0
        self.steps = 0

    def direction(self, gradient: np.ndarray) -> np.ndarray:
        """What is orthogonalised: the gradient, looking ahead along its running average."""
        beta = self.config.momentum
        if self.steps < 300:
            beta = 0.85 + (self.config.momentum - 0.85) * self.steps / 300
        self.steps += 1
        self.average = beta * self.average + (1 - beta) * gradient
        return beta * self.average + (1 - beta) * gradient

    def update(self, gradient: np.ndarray) -> np.ndarray:
        """What is added to the weight, for singular values of exactly 1."""
        rows, columns = gradient.shape
        u, _, vt = np.linalg.svd(self.direction(gradient), full_matrices=False)
        return -self.config.matrix_lr * max(1.0, rows / columns) ** 0.5 * u @ vt
