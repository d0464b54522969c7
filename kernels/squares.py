"""Exploration noise that is one number per square of k x k pixels of the state (ours); plain torch, no Triton kernel.

math       eps' = mean of eps over the square x sqrt(number of its pixels): unit variance, one number per square
why        a coarse change of the map has k times the signal of one at a pixel
"""
import torch
import torch.nn.functional as F

from . import send


def square_means(z, side):
    """Means over squares of `side` pixels, smaller at the border: (..., h, w) -> (..., ceil(h / k), ceil(w / k))."""
    flat = F.avg_pool2d(z.flatten(0, -3)[:, None], side, ceil_mode=True)[:, 0]
    return flat.view(*z.shape[:-2], *flat.shape[-2:])


def rows_by_side(squares, device):
    """Rows with squares of the same side: list of (side, numbers of the rows on a device), for squares (R,) on the CPU.

    One copy to a GPU, which is not waited for
    """
    sides, counts = squares.unique(return_counts=True)
    rows = send(squares.argsort(stable=True), device)
    return list(zip(sides.tolist(), rows.split(counts.tolist()), strict=True))


def fill_squares(eps, squares):
    """White noise gathered in squares of squares[r] pixels in row r: their means, scaled to unit variance.

    eps (R, K, c, h, w) standard normal, squares (R,) int64 on the CPU -> the same shape; side 1 stays as it is
    """
    *_, h, w = eps.shape
    for k, rows in rows_by_side(squares, eps.device):
        if k > 1:
            high, wide = (torch.arange(n, 0, -k, device=eps.device).clamp_max(k) for n in (h, w))
            noise = square_means(eps[rows], k) * (high[:, None] * wide).sqrt()
            eps = eps.index_copy(0, rows, noise.repeat_interleave(k, -1).repeat_interleave(k, -2)[..., :h, :w])
    return eps


AOT = []                          # nothing to compile
