"""Agreement with the judge and reward of a group of maps at thousands of point pairs, read straight from the maps.

math       m = margin by the modality's rule (relations.py owns formulas and thresholds), relation -1, 0 or +1, p = prob
           hard   agree = 1/2 + relation sign(2 p - 1) / 2
           soft   agree = 1/2 + tanh(m / tau) (2 p - 1) / 2
           brier  agree = 1 - (tanh(m / tau) - (2 p - 1))^2 / 4
           reward = sum over pairs of weight agree. Only hard reads the relation, so only hard computes it
gradient   none needed: the reward scores samples. A call that needs a gradient uses the reference, which has one
why fused  eager gathers (B, G, P, 2, C), then reads it back in a dozen small kernels; here each map value goes from
           the map to a register. Limit: one 32-byte sector per point and channel (NCHW), per point (channels_last)
source     reward and relations of ReasonX (arXiv 2512.04222)

One launch for P <= BLOCK; a larger P needs a second, which adds the partial rewards, and rule nearer needs one more for
the range of each map. Accumulation is fp32, or fp64 when pred is.
"""
from dataclasses import replace

import torch

from relations import LUMA, MODALITIES, SAME_ALBEDO, check_points, relation, soft_relation

from . import acc_dtype, exact_div, exact_sqrt, tl, triton, triton_dtype, uses_triton

FORMS = ("hard", "soft", "brier")
BLOCK = 256                                            # pairs of a program; fixed: it decides the summation order
FUSED = ("nearer", "facing", "brighter", "same", "more")    # rules of relations.RULES that the kernel knows
PARTS = 16                                             # programs that find the range of one map
RANGE_BLOCK = 1024                                     # pixels that such a program reads at a time


def pair_reward_ref(pred, pts, prob, weight, modality, form="soft", tau=0.1, window=0):
    """Plain torch. The definition; every other path must match it."""
    acc = acc_dtype(pred)
    pred, prob, weight = (z.to(acc) for z in (pred, prob, weight))
    answer = (2 * prob - 1)[:, None]                                                           # (B, 1, P)
    rel = None
    if form == "hard":
        rel = relation(pred, pts[:, None], modality, window)                                   # (B, G, P)
        agree = 0.5 + 0.5 * rel * answer.sign()
    else:
        vote = soft_relation(pred, pts[:, None], modality, tau, window)                        # (B, G, P)
        agree = 0.5 + 0.5 * vote * answer if form == "soft" else 1 - 0.25 * (vote - answer).square()
    return rel, agree, (agree * weight[:, None]).sum(-1)


@triton.jit
def _value(map_ptr, row, col, H, W, stride_h, stride_w, ok, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Mean of the window around a point, cut at the border; WINDOW 0 is the pixel itself."""
    total = tl.zeros(row.shape, ACC)
    for down in range(-WINDOW, WINDOW + 1):
        for right in range(-WINDOW, WINDOW + 1):
            y = row + down
            x = col + right
            inside = ok & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            at = y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
            total += tl.load(map_ptr + at, mask=inside, other=0.0).to(ACC)
    rows = tl.minimum(row + WINDOW, H - 1) - tl.maximum(row - WINDOW, 0) + 1
    cols = tl.minimum(col + WINDOW, W - 1) - tl.maximum(col - WINDOW, 0) + 1
    return exact_div(total, (rows * cols).to(ACC))                     # (BLOCK,)


@triton.jit
def _difference(map_ptr, y0, x0, y1, x1, H, W, stride_h, stride_w, ok, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Value at the red point minus value at the green one: (BLOCK,)."""
    return (_value(map_ptr, y0, x0, H, W, stride_h, stride_w, ok, WINDOW, ACC)
            - _value(map_ptr, y1, x1, H, W, stride_h, stride_w, ok, WINDOW, ACC))


@triton.jit
def _range_kernel(
    pred_ptr, low_ptr, high_ptr,                          # (B, G, 1, H, W), (B*G, PARTS), (B*G, PARTS)
    G, n, W, stride_b, stride_g, stride_h, stride_w,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    bg = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    map_ptr = pred_ptr + bg // G * stride_b + bg % G * stride_g
    inf = float("inf")
    low = tl.full((BLOCK,), inf, ACC)
    high = tl.full((BLOCK,), -inf, ACC)
    for start in range(part * BLOCK, n, PARTS * BLOCK):
        i = start + tl.arange(0, BLOCK)                                # (BLOCK,)
        at = (i // W).to(tl.int64) * stride_h + (i % W).to(tl.int64) * stride_w
        z = tl.load(map_ptr + at, mask=i < n, other=inf).to(ACC)       # masked lanes count as not finite
        finite = tl.abs(z) < inf
        low = tl.minimum(low, tl.where(finite, z, inf))
        high = tl.maximum(high, tl.where(finite, z, -inf))
    tl.store(low_ptr + bg * PARTS + part, tl.min(low, 0))
    tl.store(high_ptr + bg * PARTS + part, tl.max(high, 0))


@triton.jit
def _pair_reward_kernel(
    pred_ptr, pts_ptr, prob_ptr, weight_ptr,              # (B, G, C, H, W) by strides, (B, P, 2, 2), (B, P) x2
    low_ptr, high_ptr,                                    # (B*G, PARTS), read by rule nearer alone
    rel_ptr, agree_ptr, part_ptr,                         # (B*G, P), written for hard alone; (B*G, P); (B*G, n_parts)
    G, P, H, W, n_parts, stride_b, stride_g, stride_c, stride_h, stride_w,
    RULE: tl.constexpr, FORM: tl.constexpr, TAU: tl.constexpr, WINDOW: tl.constexpr,
    DEAD: tl.constexpr, SAME: tl.constexpr, LUMA_R: tl.constexpr, LUMA_G: tl.constexpr, LUMA_B: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    bg = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = bg // G
    pair = part * BLOCK + tl.arange(0, BLOCK)                          # (BLOCK,)
    ok = pair < P
    point = pts_ptr + (b * P + pair) * 4
    y0 = tl.load(point, mask=ok, other=0).to(tl.int32)                 # (BLOCK,) red
    x0 = tl.load(point + 1, mask=ok, other=0).to(tl.int32)
    y1 = tl.load(point + 2, mask=ok, other=0).to(tl.int32)             # (BLOCK,) green
    x1 = tl.load(point + 3, mask=ok, other=0).to(tl.int32)
    map_ptr = pred_ptr + b * stride_b + bg % G * stride_g
    if RULE == "facing":
        map_ptr += 2 * stride_c                                        # toward the camera; x and y are not read
    d0 = _difference(map_ptr, y0, x0, y1, x1, H, W, stride_h, stride_w, ok, WINDOW, ACC)
    if RULE == "nearer":
        part_of_map = bg * PARTS + tl.arange(0, PARTS)
        extent = tl.max(tl.load(high_ptr + part_of_map), 0) - tl.min(tl.load(low_ptr + part_of_map), 0)
        margin = exact_div(-d0, tl.maximum(extent, 1e-12) + tl.zeros_like(d0))
    elif RULE == "facing":
        margin = d0 * 0.5
    elif RULE == "more":
        margin = d0
    else:
        map_ptr += stride_c
        d1 = _difference(map_ptr, y0, x0, y1, x1, H, W, stride_h, stride_w, ok, WINDOW, ACC)
        map_ptr += stride_c
        d2 = _difference(map_ptr, y0, x0, y1, x1, H, W, stride_h, stride_w, ok, WINDOW, ACC)
        if RULE == "brighter":
            margin = d0 * LUMA_R + d1 * LUMA_G + d2 * LUMA_B
        else:
            margin = SAME - exact_sqrt(d0 * d0 + d1 * d1 + d2 * d2)

    finite = tl.abs(margin) < float("inf")                             # (BLOCK,) False for NaN too
    answer = 2 * tl.load(prob_ptr + b * P + pair, mask=ok, other=0.5).to(ACC) - 1
    if FORM == "hard":
        rel = tl.where(margin > 0, 1, tl.where((margin < 0) | (RULE == "same"), -1, 0))
        rel = tl.where(finite & (tl.abs(margin) >= DEAD), rel, 0)
        tl.store(rel_ptr + bg * P + pair, rel.to(tl.int8), mask=ok)
        vote = rel.to(ACC)
        answer = tl.where(answer > 0, 1.0, tl.where(answer < 0, -1.0, answer))
    else:
        decay = tl.exp(-2 * tl.abs(margin) / TAU)                      # tanh is odd: 1 - decay over 1 + decay
        vote = tl.where(margin > 0, 1 - decay, decay - 1) / (1 + decay)
        vote = tl.where(finite, vote, 0.0)
    if FORM == "brier":
        agree = 1 - 0.25 * (vote - answer) * (vote - answer)
    else:
        agree = 0.5 + 0.5 * vote * answer
    tl.store(agree_ptr + bg * P + pair, agree, mask=ok)
    weight = tl.load(weight_ptr + b * P + pair, mask=ok, other=0.0).to(ACC)
    tl.store(part_ptr + bg * n_parts + part, tl.sum(agree * weight, 0))  # partial sums, added in torch


def _launch(pred, pts, prob, weight, row, form, tau, window):
    if row.rule not in FUSED:
        raise ValueError(f"pair_reward: got rule {row.rule!r}, want one of {', '.join(FUSED)}; use --kernels torch")
    B, G, _, H, W = pred.shape
    P = pts.shape[1]
    acc = acc_dtype(pred)
    ACC = triton_dtype(acc)
    stride_b, stride_g, stride_c, stride_h, stride_w = pred.stride()
    n_parts = triton.cdiv(P, BLOCK)
    agree = pred.new_empty(B, G, P, dtype=acc)
    part = pred.new_empty(B, G, n_parts, dtype=acc)
    rel = pred.new_empty(B, G, P, dtype=torch.int8) if form == "hard" else None
    low = high = part                                                  # a pointer that is not read unless nearer
    if row.rule == "nearer":
        low, high = pred.new_empty(2, B * G, PARTS, dtype=acc)
        _range_kernel[(B * G, PARTS)](pred, low, high, G, H * W, W, stride_b, stride_g, stride_h, stride_w,
                                      PARTS=PARTS, BLOCK=RANGE_BLOCK, ACC=ACC)
    _pair_reward_kernel[(B * G, n_parts)](
        pred, pts.contiguous(), prob.contiguous(), weight.contiguous(), low, high,
        agree if rel is None else rel, agree, part,                    # the first is not written unless hard
        G, P, H, W, n_parts, stride_b, stride_g, stride_c, stride_h, stride_w,
        **_constants(row), FORM=form, TAU=float(tau), WINDOW=window, ACC=ACC)
    return rel, agree, part[..., 0] if n_parts == 1 else part.sum(-1)


def _constants(row):
    """Rule, thresholds and weights of a relations.Modality, as the kernel wants them."""
    return dict(RULE=row.rule, DEAD=row.dead, SAME=SAME_ALBEDO, LUMA_R=LUMA[0], LUMA_G=LUMA[1], LUMA_B=LUMA[2],
                PARTS=PARTS, BLOCK=BLOCK)


def pair_reward(pred, pts, prob, weight, modality, form="soft", tau=0.1, window=0, check=True):
    """Compare maps with a judge's answers at point pairs (ReasonX, reward).

    pred      (B, G, C, H, W)  maps of one modality in its encoding, any strides; nothing is copied
    pts       (B, P, 2, 2)     integer (row, col), red first, shared by the group
    prob      (B, P)           the judge's probability of the first answer
    weight    (B, P)           share of each pair in the reward
    form      which agreement: "hard", "soft" or "brier" (see the module docstring)
    tau       softness of "soft" and "brier", in the unit of the margin
    window    radius in px of the mean that is read at a point
    check     False: the caller has checked that the points lie inside (the check waits for the GPU)
    returns   relation int8 (B, G, P) for "hard" and None for the other forms; agreement (B, G, P) in [0, 1] and
              reward (B, G), both fp32, or fp64 for fp64 maps
    raises    ValueError       shapes that do not fit, unknown modality or form, points outside the map; on a GPU a rule
                               that the kernel does not know
    """
    if form not in FORMS:
        raise ValueError(f"pair_reward: got form {form!r}, want one of {', '.join(FORMS)}")
    if modality not in MODALITIES:
        raise ValueError(f"pair_reward: got modality {modality!r}, want one of {', '.join(MODALITIES)}")
    B = len(pred)
    row = MODALITIES[modality]
    C = row.channels
    if pred.ndim != 5 or pred.shape[2] != C:
        raise ValueError(f"pair_reward: got pred {tuple(pred.shape)}, want (B, G, {C}, H, W) for {modality!r}")
    if pts.ndim != 4 or pts.shape[0] != B or pts.shape[2:] != (2, 2):
        raise ValueError(f"pair_reward: got pts {tuple(pts.shape)}, want ({B}, P, 2, 2)")
    for name, z in (("prob", prob), ("weight", weight)):
        if z.shape != pts.shape[:2]:
            raise ValueError(f"pair_reward: got {name} {tuple(z.shape)}, want {tuple(pts.shape[:2])}, one per pair")
    if check:
        check_points("pair_reward", pts, pred.shape[-2:])
    wants_gradient = torch.is_grad_enabled() and pred.requires_grad
    if not uses_triton(pred) or wants_gradient or not pred.numel() or not pts.numel():
        return pair_reward_ref(pred, pts, prob, weight, modality, form, tau, window)
    return _launch(pred.detach(), pts, prob.detach(), weight.detach(), row, form, tau, window)


SIZES = {k: "i32" for k in ("G", "P", "H", "W", "n_parts", "n", "stride_b", "stride_g", "stride_c", "stride_h",
                            "stride_w")}
TYPES = {"pred_ptr": "*bf16", "pts_ptr": "*i64", "prob_ptr": "*fp32", "weight_ptr": "*fp32", "low_ptr": "*fp32",
         "high_ptr": "*fp32", "rel_ptr": "*i8", "agree_ptr": "*fp32", "part_ptr": "*fp32", **SIZES}
AOT = [  # (kernel, argument types, constexprs); compiled for each target in tests/test_aot.py
    (_range_kernel, TYPES, dict(PARTS=PARTS, BLOCK=RANGE_BLOCK, ACC=tl.float32)),
    *((_pair_reward_kernel, TYPES, dict(**_constants(MODALITIES[m]), FORM=form, TAU=0.1, WINDOW=window, ACC=tl.float32))
      for m, form, window in (("depth", "hard", 1), ("normal", "soft", 0), ("albedo", "brier", 0),
                              ("irradiance", "soft", 2))),
    (_pair_reward_kernel, TYPES, dict(**_constants(replace(MODALITIES["depth"], rule="more")), FORM="hard", TAU=0.1,
                                      WINDOW=0, ACC=tl.float32)),
]
