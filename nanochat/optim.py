"""How weights move: Muon for the matrices inside blocks, AdamW for embedding and head; or AdamW for all.

Weight decay is decoupled and acts on every weight. State is kept by parameter name, so it fits any number of ranks. It
may be sharded (ZeRO-1, https://arxiv.org/abs/1910.02054): each rank keeps the state of its share of the weights, moves
that share, and gets the other weights from those that moved them. Muon's shares are matrices, AdamW's are rows.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from nanochat.config import OptimConfig
from nanochat.model import GPT
from nanochat.parallel import Pending, Ranks
from nanochat.products import through_fp32
from nanochat.schedule import momentum

# Quintic Newton-Schulz of https://kellerjordan.github.io/posts/muon/: it does not converge to 1 but moves every
# singular value into about (0.7, 1.2), chosen to lift small ones fastest.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
BETAS = (0.8, 0.95)
EPS = 1e-10
RATE_WIDTH = 768  # the width for which embed_lr and head_lr are given
INSIDE = "model.layers."  # how the names of the matrices inside blocks begin
ROWS = "@"  # between a tensor's name and the first of the rows that a rank keeps of it

Named = list[tuple[str, nn.Parameter]]
Shape = tuple[int, ...]


class Part(Protocol):
    """An algorithm and the weights it moves."""

    def step(self, scale: float, step: int) -> list[Pending]:
        """Move the weights by their gradients; scale: share of the learning rate; step: 0-based.

        Returns what to wait for: until then other ranks' shares of the weights may not be there.
        """

    def state(self) -> dict[str, Tensor]:
        """What this rank keeps, by name; the tensors themselves. Of some rows of a tensor: <name>@<first row>."""

    def shapes(self) -> dict[str, Shape]:
        """Of the whole state, that of all ranks."""


class Optimizer:
    """Moves a model's weights by their gradients, each with the algorithm it belongs to."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = list(parts)
        self._steps = torch.zeros((), dtype=torch.int64)  # done so far
        self._pending: list[Pending] = []

    @property
    def steps(self) -> int:
        """How many times the weights have moved."""
        return int(self._steps)

    def step(self, scale: float) -> None:
        """Move all weights; scale: the share of the full learning rate (`schedule.rate`)."""
        self.begin_step(scale)
        self.end_step()

    @torch.no_grad()
    def begin_step(self, scale: float) -> None:
        """Move this rank's share of the weights, and begin to give it to the other ranks."""
        for part in self._parts:
            self._pending += part.step(scale, self.steps)
        self._steps += 1

    def end_step(self) -> None:
        """Wait for the shares of the other ranks."""
        for wait in self._pending:
            wait()
        self._pending.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a later process needs to go on, by name; the tensors themselves, not copies.

        If the state is sharded, what this rank keeps of it; `merged` makes a whole one of all ranks'.
        """
        state = {"steps": self._steps}
        for part in self._parts:
            state |= part.state()
        return state

    @torch.no_grad()
    def load_state_dict(self, whole: Mapping[str, Tensor]) -> None:
        """Copy this rank's part of a whole state in.

        ValueError names every tensor that is missing, unknown or of another shape.
        """
        shapes: dict[str, Shape] = {"steps": ()}
        for part in self._parts:
            shapes |= part.shapes()
        check_shapes(shapes, {name: tuple(tensor.shape) for name, tensor in whole.items()})
        for key, tensor in self.state_dict().items():
            name, _, first = key.partition(ROWS)
            given = whole[name]
            tensor.copy_(given[int(first) : int(first) + len(tensor)] if first else given)


class Muon:
    """Momentum, orthogonalised: a matrix moves by the U V^T of its averaged gradient's U S V^T.

    https://kellerjordan.github.io/posts/muon/. Matrices of one shape are iterated on together. dtype: of the iteration.
    """

    def __init__(self, matrices: Named, config: OptimConfig, dtype: torch.dtype, ranks: Ranks) -> None:
        self._config, self._dtype, self._ranks = config, dtype, ranks
        self._groups: dict[torch.Size, Named] = {}
        for name, weight in matrices:
            self._groups.setdefault(weight.shape, []).append((name, weight))
        self._mine = {
            shape: _take(group, share(len(group), ranks.rank, ranks.world, turn))
            for turn, (shape, group) in enumerate(self._groups.items())
        }
        self._averages = {
            shape: torch.zeros((len(mine), *shape), device=self._groups[shape][0][1].device)
            for shape, mine in self._mine.items()
        }

    def step(self, scale: float, step: int) -> list[Pending]:
        pending = []
        for turn, (shape, group) in enumerate(self._groups.items()):
            if self._mine[shape]:
                self._move(shape, scale, step)
            for owner in range(self._ranks.world):
                given = _take(group, share(len(group), owner, self._ranks.world, turn))
                pending += [self._ranks.start_copy(weight, owner) for _, weight in given]
        return pending

    def _move(self, shape: torch.Size, scale: float, step: int) -> None:
        config = self._config
        rate, beta = config.matrix_lr * scale, momentum(step, config)
        mine = self._mine[shape]
        gradient = torch.stack([gradient_of(weight) for _, weight in mine])  # (n, rows, columns)
        average = self._averages[shape].lerp_(gradient, 1 - beta)
        update = orthogonal(gradient.lerp_(average, beta).to(self._dtype))  # Nesterov's look ahead
        size = max(1.0, shape[0] / shape[1]) ** 0.5
        for (_, weight), move in zip(mine, update, strict=True):
            weight.mul_(1 - rate * config.weight_decay).add_(move, alpha=-rate * size)

    def state(self) -> dict[str, Tensor]:
        return {
            f"momentum.{name}": average
            for shape, mine in self._mine.items()
            for (name, _), average in zip(mine, self._averages[shape], strict=True)
        }

    def shapes(self) -> dict[str, Shape]:
        return {f"momentum.{name}": tuple(shape) for shape, group in self._groups.items() for name, _ in group}


class AdamW:
    """https://arxiv.org/abs/1711.05101, by torch's fused kernel. rates: full learning rate of each weight.

    The kernel itself, since torch.optim.AdamW loads torch's compiler: 60 MB and two seconds.
    """

    def __init__(self, weights: Named, rates: Iterable[float], weight_decay: float, ranks: Ranks) -> None:
        self._weights, self._rates, self._decay, self._ranks = weights, list(rates), weight_decay, ranks
        self._mine = [self._rows(number, ranks.rank) for number in range(len(weights))]
        self._averages = [
            (torch.zeros_like(weight[mine]), torch.zeros_like(weight[mine]))
            for (_, weight), mine in zip(weights, self._mine, strict=True)
        ]
        self._steps = [torch.zeros((), device=weight.device) for _, weight in weights]

    def step(self, scale: float, step: int) -> list[Pending]:
        pending = []
        for number, (_, weight) in enumerate(self._weights):
            self._steps[number] += 1
            if len(self._averages[number][0]):
                self._move(number, scale)
            for owner in range(self._ranks.world):
                rows = weight[self._rows(number, owner)]
                if len(rows):
                    pending.append(self._ranks.start_copy(rows, owner))
        return pending

    def _move(self, number: int, scale: float) -> None:
        (_, weight), mine, (first, second) = self._weights[number], self._mine[number], self._averages[number]
        torch._fused_adamw_(
            [weight[mine]],
            [gradient_of(weight)[mine]],
            [first],
            [second],
            [],
            [self._steps[number]],
            lr=self._rates[number] * scale,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self._decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )

    def _rows(self, number: int, rank: int) -> slice:
        """Of a weight, those that are a rank's."""
        rows = share(len(self._weights[number][1]), rank, self._ranks.world, number)
        return slice(rows.start, rows.stop)

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        zipped = zip(self._weights, self._mine, self._averages, self._steps, strict=True)
        for (name, weight), mine, (first, second), steps in zipped:
            state[f"step.{name}"] = steps
            which = "" if len(first) == len(weight) else f"{ROWS}{mine.start}"
            if len(first):
                state |= {f"exp_avg.{name}{which}": first, f"exp_avg_sq.{name}{which}": second}
        return state

    def shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for name, weight in self._weights:
            shapes[f"step.{name}"] = ()
            shapes |= {f"{what}.{name}": tuple(weight.shape) for what in ("exp_avg", "exp_avg_sq")}
        return shapes


def orthogonal(gradient: Tensor) -> Tensor:
    """(n, rows, columns) -> about U V^T of each one's singular value decomposition, in the same dtype."""
    a, b, c = NEWTON_SCHULZ
    tall = gradient.shape[-2] > gradient.shape[-1]
    x = gradient.mT if tall else gradient
    if through_fp32(x):
        x = x.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(gradient.dtype)


def muon(model: GPT, config: OptimConfig, precision: str, ranks: Ranks) -> list[Part]:
    """Muon for the matrices inside blocks, AdamW for embedding and head.

    AdamW first: it is quick, and what it has moved is on its way to the other ranks while Muon computes.
    """
    matrices, rest = _split(model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ends = AdamW(rest, _end_rates(model, config), config.weight_decay, ranks)
    return [ends, Muon(matrices, config, dtype, ranks)]


def adamw(model: GPT, config: OptimConfig, precision: str, ranks: Ranks) -> list[Part]:
    """AdamW for all, in fp32 whatever the precision."""
    matrices, rest = _split(model)
    rates = [config.matrix_lr] * len(matrices) + _end_rates(model, config)
    return [AdamW(matrices + rest, rates, config.weight_decay, ranks)]


OPTIMIZERS: dict[str, Callable[[GPT, OptimConfig, str, Ranks], list[Part]]] = {"muon": muon, "adamw": adamw}


def build_optimizer(
    model: GPT, config: OptimConfig, precision: str, ranks: Ranks | None = None, shard: bool = False
) -> Optimizer:
    """The optimizer that `config` names. precision: "bf16" or "fp32", of Muon's iteration.

    shard: the state is split over `ranks`; all of them must then make each step.
    """
    parts = OPTIMIZERS[config.name](model, config, precision, ranks if shard and ranks else Ranks(0, 1))
    return Optimizer(parts)


def merged(pieces: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole state of an optimizer from what all ranks keep of it, in any order. ValueError if rows are missing."""
    whole: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for piece in pieces:
        for key, tensor in piece.items():
            name, _, first = key.partition(ROWS)
            if first:
                rows.setdefault(name, {})[int(first)] = tensor
            elif not torch.equal(whole.setdefault(name, tensor), tensor):
                raise ValueError(f"two parts of a state differ in {name}: they are not of one step of one run")
    for name, parts in rows.items():
        end = 0
        for begin in sorted(parts):
            if begin != end:
                raise ValueError(f"of {name} the rows {end} to {begin - 1} are missing; give the parts of all ranks")
            end += len(parts[begin])
        whole[name] = torch.cat([parts[begin] for begin in sorted(parts)])
    return whole


def share(count: int, rank: int, world: int, turn: int = 0) -> range:
    """Which of `count` things are a rank's, as evenly as can be. turn: moves who gets those that are left over."""
    place = (rank + turn) % world
    return range(count * place // world, count * (place + 1) // world)


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
    return [p for p in named if p[0].startswith(INSIDE)], [p for p in named if not p[0].startswith(INSIDE)]


def _take(named: Named, numbers: range) -> Named:
    return named[numbers.start : numbers.stop]


def _end_rates(model: GPT, config: OptimConfig) -> list[float]:
    """Learning rates of embedding and head, in the model's order."""
    factor = (model.config.width / RATE_WIDTH) ** -0.5
    return [config.embed_lr * factor, config.head_lr * factor]
