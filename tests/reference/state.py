"""What an optimizer's state takes, as a formula."""

Shape = tuple[int, ...]


def state_bytes(shapes: dict[str, Shape], name: str, rank: int = 0, world: int = 1) -> int:
    """Of a rank, from the shapes of the weights (`model.weight_shapes`) alone, sharded over `world` ranks.

    4 bytes for each number of Muon's matrices, 8 for each of AdamW's rows.
    """
    matrices = [shape for weight, shape in shapes.items() if weight.startswith("model.layers.")]
    ends = [shape for weight, shape in shapes.items() if not weight.startswith("model.layers.")]
    by_rows = ends if name == "muon" else matrices + ends
    size = 8 + 4 * len(by_rows)  # the counts of steps
    for turn, (rows, columns) in enumerate(by_rows):
        size += 8 * columns * _share(rows, (rank + turn) % world, world)
    if name == "muon":
        for turn, shape in enumerate(dict.fromkeys(matrices)):
            size += 4 * shape[0] * shape[1] * _share(matrices.count(shape), (rank + turn) % world, world)
    return size


def _share(count: int, place: int, world: int) -> int:
    return count * (place + 1) // world - count * place // world
