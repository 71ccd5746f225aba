"""Forward and backward of a micro-batch on a CPU in bf16, without autograd: torch's products, our loops between them.

The same function as `GPT` and autograd compute (`nanochat.train.backward`), which it is tested against. It rounds less
often, since between two products numbers stay in fp32, and its memory is used again, step after step.
"""

# B rows of T tokens, N = B T, C width, H query heads, K key heads, G = H / K, D head size, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanochat.data import Batch
from nanochat.kernels import Kernels
from nanochat.model import GPT, Block, Linear, rotary_table
from nanochat.optim import gradient_of
from nanochat.products import add_bmm, addmm, bmm, mm

QUERIES = 256  # tokens whose scores are made at a time: keys after the last of them are left out
KEPT = 512  # tokens of a row up to which the chances of attention are kept for the backward pass, not made again
HEAD_ROWS = 512  # positions whose logits exist at a time
BF16 = torch.bfloat16

Final = Callable[[nn.Parameter], None]  # is told of each weight whose gradient a backward pass has done with
Mark = Callable[[str], None]  # is told which part of a step is over, see nanochat/clock.py


@dataclass(frozen=True, eq=False)
class Layer:
    """A block's weights in bf16 while a micro-batch goes through, and what its backward pass needs."""

    block: Block
    qkv: Tensor  # (H + 2 K) D, C
    out: Tensor
    fc1: Tensor
    fc2: Tensor
    x: Tensor  # N, C: what came in
    q: Tensor  # B K, T G, D
    k: Tensor  # B K, T, D
    v: Tensor
    factors: Tensor  # N, H + K
    y: Tensor  # N, H D: attention's result
    middle: Tensor  # N, C: after attention
    hidden: Tensor  # N, 4 C: after ReLU
    chances: Sequence[Tensor]  # of each block of queries: B K, R G, E


class FastBackward:
    """Adds a micro-batch's share of the gradient to the weights' own, as `nanochat.train.backward` does."""

    def __init__(self, model: GPT, kernels: Kernels, mark: Mark | None = None) -> None:
        config = model.config
        self._model, self._do = model, kernels
        self._mark: Mark = mark or ignore
        self._final: Final = ignore
        self._heads, self._key_heads, self._size = config.heads, config.key_heads, config.head_dim
        self._cos, self._sin = (table.flatten(1) for table in rotary_table(config.context, config.head_dim))
        self._rooms: dict[str, Tensor] = {}
        self._shape = (0, 0)

    @torch.no_grad()
    def __call__(self, batch: Batch, count: int, final: Final | None = None) -> Tensor:
        """The sum of the micro-batch's nats; the gradient is that of this sum divided by `count`."""
        self._final = final or ignore
        rows, tokens = self._shape = batch.tokens.shape[0], batch.tokens.shape[1]
        n, width = rows * tokens, self._model.config.width
        ids = batch.tokens.flatten()
        first = None if batch.segments is None else _begins(batch.segments)
        raw, x = self._room("raw", n, width), self._room("x", n, width)
        self._do("embed", self._model.model.embed_tokens.weight, ids, raw, n, width)
        self._do("norm", raw, x, n, width)
        layers = []
        for number, block in enumerate(self._model.model.layers):
            layers.append(self._layer(block, number, x))  # type: ignore[arg-type]
            x = self._room(f"x after {number}", n, width)
            self._forward(layers[-1], x, first)
        gradient = self._room("gradient", n, width)
        self._do("norm", x, gradient, n, width)
        nats = self._head(gradient, batch.targets.flatten(), count)
        self._mark("forward")  # with the head's backward pass, which is done on the way
        self._do("norm_back", x, gradient, None, gradient, n, width)
        for layer in reversed(layers):
            self._backward(layer, gradient, first)
        self._do("norm_back", raw, gradient, None, gradient, n, width)
        self._embed_back(ids, gradient)
        self._mark("backward")
        return nats

    def _room(self, name: str, *sizes: int, dtype: torch.dtype = BF16) -> Tensor:
        """Memory of that name, as it was left. Fresh memory costs more than what is computed in it."""
        shape = torch.Size(sizes)
        size = shape.numel() * dtype.itemsize
        room = self._rooms.get(name)
        if room is None or len(room) < size:
            room = self._rooms[name] = torch.empty(size, dtype=torch.uint8)
        return room[:size].view(dtype).view(shape)

    def _layer(self, block: Block, number: int, x: Tensor) -> Layer:
        rows, tokens = self._shape
        heads, key_heads, size, width = self._heads, self._key_heads, self._size, self._model.config.width
        n, group = rows * tokens, heads // key_heads

        def room(name: str, *sizes: int, dtype: torch.dtype = BF16) -> Tensor:
            return self._room(f"{name} of {number}", *sizes, dtype=dtype)

        attention, mlp = block.self_attn, block.mlp
        qkv = room("qkv", (heads + 2 * key_heads) * size, width)
        for part, linear in zip(self._three(qkv), (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
            part.copy_(linear.weight)
        keeper = number if tokens <= KEPT else 0  # else all layers share one, and it is made again
        return Layer(
            block=block,
            qkv=qkv,
            out=room("out", width, heads * size).copy_(attention.o_proj.weight),
            fc1=room("fc1", 4 * width, width).copy_(mlp.fc1.weight),
            fc2=room("fc2", width, 4 * width).copy_(mlp.fc2.weight),
            x=x,
            q=room("q", rows * key_heads, tokens * group, size),
            k=room("k", rows * key_heads, tokens, size),
            v=room("v", rows * key_heads, tokens, size),
            factors=room("factors", n, heads + key_heads, dtype=torch.float32),
            y=room("y", n, heads * size),
            middle=room("middle", n, width),
            hidden=room("hidden", n, 4 * width),
            chances=[
                self._room(f"chances at {begin} of {keeper}", rows * key_heads, (end - begin) * group, end)
                for begin, end in self._blocks()
            ],
        )

    def _forward(self, layer: Layer, result: Tensor, first: Tensor | None) -> None:
        """layer.x -> result (N, C)."""
        n, width = layer.x.shape
        normed, qkv = self._room("normed", n, width), self._room("three", n, len(layer.qkv))
        self._do("norm", layer.x, normed, n, width)
        mm(normed, layer.qkv.T, out=qkv)
        self._do(
            "split_heads",
            *(qkv, self._cos, self._sin, layer.q, layer.k, layer.v, layer.factors),
            sizes=self._head_sizes(),
        )
        y = self._room("heads", *layer.q.shape)
        for number, (begin, end) in enumerate(self._blocks()):
            chances = self._chances(layer, number, first)
            bmm(chances, layer.v[:, :end], self._queries(y, begin, end))
        self._do("swap", y, layer.y, sizes=self._swap_sizes())
        addmm(layer.x, layer.y, layer.out.T, out=layer.middle)
        self._do("norm", layer.middle, normed, n, width)
        square = self._room("square", n, 4 * width)
        mm(normed, layer.fc1.T, out=layer.hidden)
        self._do("relu", layer.hidden, square, square.numel())
        addmm(layer.middle, square, layer.fc2.T, out=result)

    def _backward(self, layer: Layer, gradient: Tensor, first: Tensor | None) -> None:
        """gradient (N, C): by the block's result; becomes that by what came in."""
        n, width = layer.x.shape
        attention, mlp = layer.block.self_attn, layer.block.mlp
        normed, d_normed = self._room("normed", n, width), self._room("d_normed", n, width)
        square, d_hidden = self._room("square", n, 4 * width), self._room("d_hidden", n, 4 * width)
        mm(gradient, layer.fc2, out=d_hidden)
        self._do("relu_back", layer.hidden, d_hidden, square, square.numel())
        self._add((mlp.fc2,), gradient, square)
        self._do("norm", layer.middle, normed, n, width)
        self._add((mlp.fc1,), d_hidden, normed)
        mm(d_hidden, layer.fc1, out=d_normed)
        self._do("norm_back", layer.middle, d_normed, gradient, gradient, n, width)

        d_y, d_heads = self._room("d_y", *layer.y.shape), self._room("d_heads", *layer.q.shape)
        self._add((attention.o_proj,), gradient, layer.y)
        mm(gradient, layer.out, out=d_y)
        rows, key_heads, tokens, inner = self._swap_sizes()
        self._do("swap", d_y, d_heads, sizes=(rows, tokens, key_heads, inner))
        d_qkv = self._room("three", n, len(layer.qkv))
        self._attention_back(layer, d_heads, d_qkv, first)
        self._do("norm", layer.x, normed, n, width)
        self._add((attention.q_proj, attention.k_proj, attention.v_proj), d_qkv, normed)
        mm(d_qkv, layer.qkv, out=d_normed)
        self._do("norm_back", layer.x, d_normed, gradient, gradient, n, width)

    def _attention_back(self, layer: Layer, d_heads: Tensor, d_qkv: Tensor, first: Tensor | None) -> None:
        """d_heads (B K, T G, D): by attention's result -> d_qkv (N, (H + 2 K) D)."""
        d_q, d_k = self._room("d_q", *layer.q.shape), self._room("d_k", *layer.k.shape)
        d_v = self._room("d_v", *layer.v.shape)
        blocks = list(enumerate(self._blocks()))
        for number, (begin, end) in reversed(blocks):  # the last one reaches all keys
            again = self._shape[1] > KEPT
            chances = self._chances(layer, number, first) if again else layer.chances[number]
            q, d_y = self._queries(layer.q, begin, end), self._queries(d_heads, begin, end)
            d_scores = self._room("d_scores", *chances.shape)
            bmm(d_y, layer.v[:, :end].mT, d_scores)
            self._do("softmax_back", chances, d_scores, self._size**-0.5, sizes=self._block_sizes(begin, end))
            bmm(d_scores, layer.k[:, :end], self._queries(d_q, begin, end))
            last = number == len(blocks) - 1
            for to, left, right in ((d_k, d_scores, q), (d_v, chances, d_y)):
                if last:
                    bmm(left.mT, right, to)
                else:
                    add_bmm(left.mT, right, to[:, :end])
        self._do(
            "split_heads_back",
            *(layer.q, layer.k, d_q, d_k, d_v, self._cos, self._sin, layer.factors, d_qkv),
            sizes=self._head_sizes(),
        )

    def _head(self, hidden: Tensor, targets: Tensor, count: int) -> Tensor:
        """hidden (N, C) is replaced by its gradient; returns the sum of the nats."""
        linear = self._model.lm_head
        n, width = hidden.shape
        weight = self._room("d_hidden", *linear.weight.shape).copy_(linear.weight)
        d_weight = self._room("d_scores", *weight.shape, dtype=torch.float32).zero_()
        part = self._room("d_weight", *weight.shape)
        nats, shares = (self._room(name, n, dtype=torch.float32) for name in ("nats", "shares"))
        scaled = self._room("normed", n, width)
        for begin in range(0, n, HEAD_ROWS):
            at = slice(begin, min(begin + HEAD_ROWS, n))
            logits = self._room("square", at.stop - begin, len(weight))
            mm(hidden[at], weight.T, out=logits)
            self._do("cross_entropy", logits, targets[at], nats[at], shares[at], *logits.shape)
            shares[at] /= count
            self._do("scale_rows", hidden[at], shares[at], scaled[at], len(logits), width)
            mm(logits.T, scaled[at], out=part)
            self._do("add", d_weight, part, part.numel())
            mm(logits, weight, out=hidden[at])
            self._do("scale_rows", hidden[at], shares[at], hidden[at], len(logits), width)
        gradient_of(linear.weight).add_(d_weight)
        self._final(linear.weight)
        return nats.sum(dtype=torch.float64)

    def _embed_back(self, ids: Tensor, gradient: Tensor) -> None:
        weight = self._model.model.embed_tokens.weight
        d_weight = self._room("d_scores", *weight.shape, dtype=torch.float32).zero_()
        self._do("embed_back", gradient, ids, d_weight, *gradient.shape)
        gradient_of(weight).add_(d_weight)
        self._final(weight)

    def _add(self, linears: Sequence[Linear], d_result: Tensor, x: Tensor) -> None:
        """Adds d_result^T x to the gradient of matrices that are one above the other.

        A micro-batch is added at once, so that sums over micro-batches and over ranks have the same order.
        """
        product = self._room("d_weight", d_result.shape[1], x.shape[1])
        mm(d_result.T, x, out=product)
        for linear, part in zip(linears, torch.split(product, [len(linear.weight) for linear in linears]), strict=True):
            self._do("add", gradient_of(linear.weight), part, part.numel())
            self._final(linear.weight)

    def _chances(self, layer: Layer, number: int, first: Tensor | None) -> Tensor:
        """Of one block of queries, into its place in `layer.chances`."""
        begin, end = self._blocks()[number]
        chances = layer.chances[number]
        bmm(self._queries(layer.q, begin, end), layer.k[:, :end].mT, chances)
        self._do("softmax", chances, first, self._size**-0.5, sizes=self._block_sizes(begin, end))
        return chances

    def _blocks(self) -> list[tuple[int, int]]:
        """First and last + 1 of each block of queries."""
        tokens = self._shape[1]
        return [(begin, min(begin + QUERIES, tokens)) for begin in range(0, tokens, QUERIES)]

    def _queries(self, x: Tensor, begin: int, end: int) -> Tensor:
        """(B K, T G, D) -> (B K, R G, D), those of the tokens begin to end."""
        group = self._heads // self._key_heads
        return x[:, begin * group : end * group]

    def _three(self, x: Tensor) -> tuple[Tensor, ...]:
        """Rows of queries, keys and values."""
        key_rows = self._key_heads * self._size
        return torch.split(x, [self._heads * self._size, key_rows, key_rows])

    def _head_sizes(self) -> tuple[int, ...]:
        return (*self._shape, self._key_heads, self._heads // self._key_heads, self._size)

    def _swap_sizes(self) -> tuple[int, int, int, int]:
        rows, tokens = self._shape
        return rows, self._key_heads, tokens, self._heads // self._key_heads * self._size

    def _block_sizes(self, begin: int, end: int) -> tuple[int, ...]:
        rows, tokens = self._shape
        group = self._heads // self._key_heads
        return self._key_heads, tokens, begin, group, (end - begin) * group, end, rows * self._key_heads


def ignore(_: object) -> None:
    """A `Final` or `Mark` of somebody who does not want to know."""


def _begins(segments: Tensor) -> Tensor:
    """(B, T) -> (B, T) int32: where the segment of each token begins. A segment's tokens follow one another."""
    place = torch.arange(segments.shape[1], dtype=torch.int32).expand(segments.shape).clone()
    same = segments[:, 1:] == segments[:, :-1]
    place[:, 1:][same] = 0
    return place.cummax(dim=1).values.contiguous()
