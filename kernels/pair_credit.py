"""Per-pixel advantage of local credit: each pair's group-centred agreement, splatted around its two points.

math       adv[g, p] = weight[p] (agree[g, p] - mean over the group); exactly 0 for a pair the group agrees on
           out[g, y, x] = h w / 2  sum over the pairs' points k of  adv[g, k] R[k, y] C[k, x]
           R[k, y] = exp(-(y - row_k)^2 / (2 width^2)), scaled to sum 1 over the h rows;  C likewise over columns
gradient   none: an advantage is a constant of the loss
cost       R and C are made once per photo and point; all states of a photo are then one product, (G h, 2 P) by
           (2 P, w): no atomics, so the same bits each run
source     ours: the reward of ReasonX (arXiv 2512.04222) is a sum of known per-pair terms

Plain torch, no Triton kernel: what is left after the profiles is a matrix product, which the library does best.
"""
import math

import torch
import torch.nn.functional as F


def pair_credit(agree, weight, pts, size, width):
    """Per-pixel advantage: every pair's group-centred agreement, splatted around its two points.

    agree    (B, G, P)    agreement of each pair in [0, 1]
    weight   (B, P)       share of each pair in the reward, rows sum to 1
    pts      (B, P, 2, 2) integer pixels (row, col) of the state;  size (h, w) of the state
    width    px, standard deviation of the Gaussian; inf spreads each pair over the whole map
    returns  (B, G, h, w). Its mean over pixels is the group-centred reward at any width. At width inf it is constant
             over pixels: the scalar advantage with norm "none". A pair on which the whole group agrees gives exactly 0
    raises   ValueError for shapes that do not fit or a width that is not positive
    """
    B, G, P = agree.shape
    h, w = size
    if not width > 0:
        raise ValueError(f"pair_credit: got width {width}, want width > 0")
    if weight.shape != (B, P) or pts.shape != (B, P, 2, 2):
        raise ValueError(f"pair_credit: got weight {tuple(weight.shape)} and pts {tuple(pts.shape)}, "
                         f"want {(B, P)} and {(B, P, 2, 2)}")
    unanimous = (agree == agree[:, :1]).all(1, keepdim=True)
    adv = (agree - agree.mean(1, keepdim=True)).masked_fill(unanimous, 0.0) * weight[:, None]  # (B, G, P)
    if math.isinf(width):
        return adv.sum(-1)[..., None, None].expand(B, G, h, w)
    row = _profile(h, pts[..., 0].to(adv.dtype), width)                                        # (B, P, 2, h)
    col = _profile(w, pts[..., 1].to(adv.dtype), width)                                        # (B, P, 2, w)
    row = (h * w / 2) * row[:, None] * adv[..., None, None]                                    # (B, G, P, 2, h)
    return torch.einsum("bgpkh,bpkw->bghw", row, col)


def _profile(n, centre, width):
    """Gaussian of sum 1 around each centre at the n pixels of a side: (..., n)."""
    apart = torch.arange(n, device=centre.device) - centre[..., None]
    value = torch.exp(apart.square() / (-2 * width**2))
    value = value / value.sum(-1, keepdim=True)
    # nothing below the smallest normal number: a CPU multiplies by such numbers many times slower
    return F.threshold(value, torch.finfo(value.dtype).tiny, 0.0)
