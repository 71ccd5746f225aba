"""How weights move: Muon for the matrices inside blocks, AdamW for embedding and head; or AdamW for all.

Weight decay is decoupled and acts on every weight. State is kept by parameter name, so it fits any number of ranks.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from nanochat.config import OptimConfig
from nanochat.model import GPT
from nanochat.schedule import momentum

# Quintic Newton-Schulz of https://kellerjordan.github.io/posts/muon/: it does not converge to 1 but moves every
# singular value into about (0.7, 1.2), chosen to lift small ones fastest.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
BETAS = (0.8, 0.95)
EPS = 1e-10
RATE_WIDTH = 768  # the width for which embed_lr and head_lr are given

Named = list[tuple[str, nn.Parameter]]


class Part(Protocol):
    """An algorithm and the weights it moves."""

    def step(self, scale: float, step: int) -> None:
        """Move the weights by their gradients; scale: share of the learning rate; step: 0-based."""

    def state(self) -> dict[str, Tensor]:
        """By name; the tensors themselves."""


class Optimizer:
    """Moves a model's weights by their gradients, each with the algorithm it belongs to."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = list(parts)
        self._steps = torch.zeros((), dtype=torch.int64)  # done so far

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Move all weights; scale: the share of the full learning rate (`schedule.rate`)."""
        for part in self._parts:
            part.step(scale, int(self._steps))
        self._steps += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a later process needs to go on, by name; the tensors themselves, not copies."""
        state = {"steps": self._steps}
        for part in self._parts:
            state |= part.state()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy such a state in. ValueError names every tensor that is missing, unknown or of another shape."""
        copy_in(self.state_dict(), state)


class Muon:
    """Momentum, orthogonalised: a matrix moves by the U V^T of its averaged gradient's U S V^T.

    https://kellerjordan.github.io/posts/muon/. Matrices of one shape are iterated on together. dtype: of the iteration.
    """

    def __init__(self, matrices: Named, config: OptimConfig, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self._groups: dict[torch.Size, Named] = {}
        for name, weight in matrices:
            self._groups.setdefault(weight.shape, []).append((name, weight))
        self._averages = {
            shape: torch.zeros((len(group), *shape), device=group[0][1].device) for shape, group in self._groups.items()
        }

    def step(self, scale: float, step: int) -> None:
        config = self._config
        rate, beta = config.matrix_lr * scale, momentum(step, config)
        for shape, group in self._groups.items():
            gradient = torch.stack([gradient_of(weight) for _, weight in group])  # (n, rows, columns)
            average = self._averages[shape].lerp_(gradient, 1 - beta)
            update = orthogonal(gradient.lerp_(average, beta).to(self._dtype))  # Nesterov's look ahead
            size = max(1.0, shape[0] / shape[1]) ** 0.5
            for (_, weight), move in zip(group, update, strict=True):
                weight.mul_(1 - rate * config.weight_decay).add_(move, alpha=-rate * size)

    def state(self) -> dict[str, Tensor]:
        return {
            f"momentum.{name}": average
            for shape, group in self._groups.items()
            for (name, _), average in zip(group, self._averages[shape], strict=True)
        }


class AdamW:
    """https://arxiv.org/abs/1711.05101, by torch's fused kernel. rates: full learning rate of each weight.

    The kernel itself, since torch.optim.AdamW loads torch's compiler: 60 MB and two seconds.
    """

    def __init__(self, weights: Named, rates: Iterable[float], weight_decay: float) -> None:
        self._weights, self._rates, self._decay = weights, list(rates), weight_decay
        self._averages = [(torch.zeros_like(weight), torch.zeros_like(weight)) for _, weight in weights]
        self._steps = [torch.zeros((), device=weight.device) for _, weight in weights]

    def step(self, scale: float, step: int) -> None:
        for (_, weight), rate, (first, second), steps in zip(
            self._weights, self._rates, self._averages, self._steps, strict=True
        ):
            steps += 1
            torch._fused_adamw_(
                [weight],
                [gradient_of(weight)],
                [first],
                [second],
                [],
                [steps],
                lr=rate * scale,
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=self._decay,
                eps=EPS,
                amsgrad=False,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for (name, _), (first, second), steps in zip(self._weights, self._averages, self._steps, strict=True):
            state |= {f"step.{name}": steps, f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second}
        return state


def orthogonal(gradient: Tensor) -> Tensor:
    """(n, rows, columns) -> about U V^T of each one's singular value decomposition, in the same dtype."""
    a, b, c = NEWTON_SCHULZ
    tall = gradient.shape[-2] > gradient.shape[-1]
    x = gradient.mT if tall else gradient
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def muon(model: GPT, config: OptimConfig, precision: str) -> list[Part]:
    """Muon for the matrices inside blocks, AdamW for embedding and head."""
    matrices, rest = _split(model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return [Muon(matrices, config, dtype), AdamW(rest, _end_rates(model, config), config.weight_decay)]


def adamw(model: GPT, config: OptimConfig, precision: str) -> list[Part]:
    """AdamW for all, in fp32 whatever the precision."""
    matrices, rest = _split(model)
    rates = [config.matrix_lr] * len(matrices) + _end_rates(model, config)
    return [AdamW(matrices + rest, rates, config.weight_decay)]


OPTIMIZERS: dict[str, Callable[[GPT, OptimConfig, str], list[Part]]] = {"muon": muon, "adamw": adamw}


def build_optimizer(model: GPT, config: OptimConfig, precision: str) -> Optimizer:
    """The optimizer that `config` names. precision: "bf16" or "fp32", of Muon's iteration."""
    return Optimizer(OPTIMIZERS[config.name](model, config, precision))


def copy_in(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy given tensors into those of the same names. ValueError lists all that do not fit, before any is changed."""
    check_shapes(*({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (own, given)))
    for name, tensor in own.items():
        tensor.copy_(given[name])


def check_shapes(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError lists all given names and shapes that are not `own`."""
    faults = [f"{name} is missing" for name in sorted(own.keys() - given.keys())]
    faults += [f"{name} is unknown here" for name in sorted(given.keys() - own.keys())]
    for name in sorted(own.keys() & given.keys()):
        if own[name] != given[name]:
            faults.append(f"{name} has shape {given[name]}, not {own[name]}")
    if faults:
        raise ValueError("the tensors do not fit: " + "; ".join(faults))


def gradient_of(weight: nn.Parameter) -> Tensor:
    """The gradient a backward pass has left; every weight has one in training."""
    assert weight.grad is not None, "a weight has no gradient; call backward before the optimizer's step"
    return weight.grad


def _split(model: GPT) -> tuple[Named, Named]:
    """Matrices inside blocks; embedding and head."""
    named = list(model.named_parameters())
    return [p for p in named if p[0].startswith("model.layers.")], [
        p for p in named if not p[0].startswith("model.layers.")
    ]


def _end_rates(model: GPT, config: OptimConfig) -> list[float]:
    """Learning rates of embedding and head, in the model's order."""
    factor = (model.config.width / RATE_WIDTH) ** -0.5
    return [config.embed_lr * factor, config.head_lr * factor]
