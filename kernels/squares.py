"""Exploration noise that is one number per square of k x k pixels of the state (ours); plain torch, no Triton kernel.

math       eps' = mean of eps over the square x sqrt(number of its pixels): unit variance, one number per square
why        a coarse change of the map has k times the signal of one at a pixel
"""
import torch
import torch.nn.functional as F


def square_means(z, side):
    """Means over squares of `side` pixels, smaller at the border: (..., h, w) -> (..., ceil(h / k), ceil(w / k))."""
    flat = F.avg_pool2d(z.flatten(0, -3)[:, None], side, ceil_mode=True)[:, 0]
    return flat.view(*z.shape[:-2], *flat.shape[-2:])


def fill_squares(eps, squares):
    """White noise gathered in squares of squares[r] pixels in row r: their means, scaled to unit variance.

    eps (R, K, c, h, w) standard normal, squares (R,) int64 on the CPU -> the same shape; side 1 stays as it is
    """
    *_, h, w = eps.shape
    for k in squares.unique().tolist():
        if k > 1:
            rows = (squares == k).nonzero()[:, 0].to(eps.device)
            high, wide = (torch.tensor([min(k, n - i) for i in range(0, n, k)], device=eps.device) for n in (h, w))
            noise = square_means(eps[rows], k) * (high[:, None] * wide).sqrt()
            eps = eps.index_copy(0, rows, noise.repeat_interleave(k, -1).repeat_interleave(k, -2)[..., :h, :w])
    return eps


AOT = []                          # nothing to compile
