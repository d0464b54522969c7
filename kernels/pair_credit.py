"""Per-pixel advantage of local credit: each pair's group-centred agreement, splatted around its two points.

math       adv[g, p] = weight[p] (agree[g, p] - mean over the group); exactly 0 for a pair the group agrees on
           out[g, y, x] = h w / 2  sum over the pairs' points k of  adv[g, k] R[k, y] C[k, x]
           R[k, y] = exp(-(y - row_k)^2 / (2 width^2)), scaled to sum 1 over the h rows;  C likewise over columns
gradient   none: an advantage is a constant of the loss
why fused  eager stores two Gaussians per point and sample, (B, G, P, 2, h) and (B, P, 2, w); here they live in
           registers. Each tile of the map adds up all points itself, so sums have one order and need no atomics
source     ours: the reward of ReasonX (arXiv 2512.04222) is a sum of known per-pair terms
"""
import math

import torch

from relations import check_points

from . import tl, triton, triton_dtype, uses_triton

TILE = 32                                              # pixels of a side of a program's part of the map
BLOCK = 32                                             # points of a step; fixed: it decides the summation order


def pair_credit_ref(agree, weight, pts, size, width):
    """Plain torch. The definition; every other path must match it."""
    h, w = size
    unanimous = (agree == agree[:, :1]).all(1, keepdim=True)
    adv = (agree - agree.mean(1, keepdim=True)).masked_fill(unanimous, 0.0) * weight[:, None]  # (B, G, P)
    if math.isinf(width):
        return adv.sum(-1)[..., None, None].expand(*adv.shape[:2], h, w)

    def profile(n, centre):
        apart = torch.arange(n, device=pts.device) - centre[..., None]
        return torch.exp(-apart.square() / (2 * width**2))

    row = profile(h, pts[..., 0].to(adv.dtype))                                                # (B, P, 2, h)
    col = profile(w, pts[..., 1].to(adv.dtype))                                                # (B, P, 2, w)
    row = row / row.sum(-1, keepdim=True)
    col = col / col.sum(-1, keepdim=True)
    row = (h * w / 2) * row[:, None] * adv[..., None, None]                                    # (B, G, P, 2, h)
    return torch.einsum("bgpkh,bpkw->bghw", row, col)


@triton.jit
def _profile(centre, start, n, INV: tl.constexpr, TILE: tl.constexpr):
    """Gaussian around each centre at the TILE pixels from `start`, 0 beyond the map: (TILE, BLOCK)."""
    at = start + tl.arange(0, TILE)[:, None]                           # (TILE, 1)
    apart = at.to(centre.dtype) - centre[None]                         # (TILE, BLOCK)
    return tl.where(at < n, tl.exp(-apart * apart * INV), 0.0)


@triton.jit
def _total(centre, n, INV: tl.constexpr, TILE: tl.constexpr):
    """Sum of each centre's Gaussian over the n pixels of a side: (BLOCK,)."""
    total = tl.zeros_like(centre)
    for start in range(0, n, TILE):
        total += tl.sum(_profile(centre, start, n, INV, TILE), 0)
    return total


@triton.jit
def _pair_credit_kernel(
    agree_ptr, weight_ptr, pts_ptr, out_ptr,              # (B, G, P), (B, P), (B, P, 2, 2), (B, G, h, w)
    G, P, h, w,
    INV: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    bg = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(w, TILE)
    top = tl.program_id(1) // across * TILE
    left = tl.program_id(1) % across * TILE
    b = bg // G
    member = tl.arange(0, GROUP)[:, None]                              # (GROUP, 1), GROUP >= G a power of 2
    acc = tl.zeros((TILE, TILE), ACC)
    for start in range(0, 2 * P, BLOCK):
        k = start + tl.arange(0, BLOCK)                                # (BLOCK,) points, two per pair
        ok = k < 2 * P
        pair = k // 2
        here = ok[None] & (member < G)                                 # (GROUP, BLOCK)
        all_agree = tl.load(agree_ptr + (b * G + member) * P + pair[None], mask=here, other=0.0).to(ACC)
        agree = tl.load(agree_ptr + bg * P + pair, mask=ok, other=0.0).to(ACC)
        differ = tl.sum(((all_agree != agree[None]) & here).to(tl.int32), 0) > 0
        adv = tl.where(differ, agree - tl.sum(all_agree, 0) / G, 0.0)  # (BLOCK,)
        adv *= tl.load(weight_ptr + b * P + pair, mask=ok, other=0.0).to(ACC)
        row = tl.load(pts_ptr + (b * P * 2 + k) * 2, mask=ok, other=0).to(ACC)
        col = tl.load(pts_ptr + (b * P * 2 + k) * 2 + 1, mask=ok, other=0).to(ACC)
        adv = adv / (_total(row, h, INV, TILE) * _total(col, w, INV, TILE))
        rows = _profile(row, top, h, INV, TILE) * adv[None]            # (TILE, BLOCK)
        cols = _profile(col, left, w, INV, TILE)                       # (TILE, BLOCK)
        acc += tl.dot(rows, tl.trans(cols), input_precision="ieee", out_dtype=ACC)
    y = top + tl.arange(0, TILE)[:, None]
    x = left + tl.arange(0, TILE)[None]
    scale = h * w * 0.5
    tl.store(out_ptr + (bg * h + y) * w + x, acc * scale, mask=(y < h) & (x < w))


def pair_credit(agree, weight, pts, size, width, check=True):
    """Per-pixel advantage: every pair's group-centred agreement, splatted around its two points.

    agree    (B, G, P)    agreement of each pair in [0, 1]
    weight   (B, P)       share of each pair in the reward, rows sum to 1
    pts      (B, P, 2, 2) pixels of the state;  size (h, w) of the state
    width    px, standard deviation of the Gaussian; inf spreads each pair over the whole map
    check    False: the caller has checked that the points lie inside (the check waits for the GPU)
    returns  (B, G, h, w). Its mean over pixels is the group-centred reward at any width. At width inf it is constant
             over pixels: the scalar advantage with norm "none". A pair on which the whole group agrees gives exactly 0
    raises   ValueError for points outside the state or a width that is not positive
    """
    B, G, P = agree.shape
    h, w = size
    if not width > 0:
        raise ValueError(f"pair_credit: got width {width}, want width > 0")
    if weight.shape != (B, P) or pts.shape != (B, P, 2, 2):
        raise ValueError(f"pair_credit: got weight {tuple(weight.shape)} and pts {tuple(pts.shape)}, "
                         f"want {(B, P)} and {(B, P, 2, 2)}")
    if check:
        check_points("pair_credit", pts, size)
    if not uses_triton(agree) or math.isinf(width) or not agree.numel():
        return pair_credit_ref(agree, weight, pts, size, width)
    out = agree.new_empty(B, G, h, w)
    ACC = triton_dtype(agree.dtype)
    _pair_credit_kernel[(B * G, triton.cdiv(h, TILE) * triton.cdiv(w, TILE))](
        agree.detach().contiguous(), weight.detach().contiguous(), pts.contiguous(), out, G, P, h, w,
        INV=1 / (2 * width**2), GROUP=triton.next_power_of_2(G), TILE=TILE, BLOCK=BLOCK, ACC=ACC)
    return out


TYPES = {"agree_ptr": "*fp32", "weight_ptr": "*fp32", "pts_ptr": "*i64", "out_ptr": "*fp32",
         "G": "i32", "P": "i32", "h": "i32", "w": "i32"}
AOT = [  # (kernel, argument types, constexprs); compiled for each target in tests/test_aot.py
    (_pair_credit_kernel, TYPES, dict(INV=0.5, GROUP=8, TILE=TILE, BLOCK=BLOCK, ACC=tl.float32)),
]
