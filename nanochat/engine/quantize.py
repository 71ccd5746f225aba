"""Matrices in int8: whole numbers times one scale for each output channel, symmetric around zero."""

import torch
from torch import Tensor


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) floats -> (out, in) int8 within 127 of zero, and (out,) fp32 scales; their product is next to `weight`.

    A channel of zeros has scale 0.
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    whole = weight.div(torch.where(scale > 0, scale, 1.0)[:, None]).round_()
    return whole.to(torch.int8), scale
