"""Agreement with the judge and reward of a group of maps at thousands of point pairs, read straight from the maps.

math       m = margin by the modality's rule (relations.py owns formulas and thresholds), relation -1, 0 or +1, p = prob
           hard, confidence  agree = 1/2 + relation sign(2 p - 1) / 2 (their weights differ)
           soft              agree = 1/2 + tanh(m / tau) (2 p - 1) / 2
           brier             agree = 1 - (tanh(m / tau) - (2 p - 1))^2 / 4
           reward = sum over pairs of weight agree. A pair without an answer (p is NaN) counts as p = 1/2, weight 0
gradient   none needed: the reward scores samples. A call that needs a gradient uses the reference, which has one
why fused  eager gathers (B, G, P, 2, C), then reads it back in a dozen small kernels; here each map value goes from
           the map to a register. Bytes: a 32-byte sector per point and channel (NCHW) or per point (channels_last),
           from the L2 cache: the programs of one map run side by side. 16 of points, 8 of answer and weight a pair
           (once per group, then cached), 4 of agreement, 1 of relation where it is asked for
launches   one for P <= BLOCK; a larger P needs a second, which adds the partial rewards, and rule nearer needs one more
           for the range of each map, which reads it once
source     reward and relations of ReasonX (arXiv 2512.04222)

Accumulation is fp32, or fp64 when pred is.
"""
import torch
from torch import Tensor

from relations import LUMA, MODALITIES, RULES, SAME_ALBEDO, harden

from . import acc_dtype, exact_div, exact_sqrt, launch, tl, triton, triton_dtype, uses_triton

FORMS = ("hard", "confidence", "soft", "brier")
BLOCK = 256                                            # pairs of a program; fixed: it decides the summation order
FUSED = ("nearer", "facing", "brighter", "same", "more")    # rules of relations.RULES that the kernel knows
PARTS = 16                                             # programs that find the range of one map
RANGE_BLOCK = 1024                                     # pixels that such a program reads at a time


def soften(m, tau):
    """tanh(margin / tau) in (-1, 1), 0 where the margin is not finite; differentiable, tau in the margin's unit."""
    return torch.where(m.isfinite(), m / tau, 0.0).tanh()


def pair_reward_ref(pred, pts, prob, weight, modality, form="soft", tau=0.1, window=0):
    """Plain torch. The definition; every other path must match it."""
    acc = acc_dtype(pred)
    row = MODALITIES[modality]
    pred, prob, weight = (z.to(acc) for z in (pred, prob, weight))
    known = prob.isfinite()
    answer = (2 * prob - 1).where(known, 0.0)[:, None]                                         # (B, 1, P)
    m = RULES[row.rule](pred, pts[:, None], window)                                            # (B, G, P)
    rel = harden(m, row) if form in ("hard", "confidence") else None
    if rel is not None:
        agree = 0.5 + 0.5 * rel * answer.sign()
    elif form == "soft":
        agree = 0.5 + 0.5 * soften(m, tau) * answer
    else:
        agree = 1 - 0.25 * (soften(m, tau) - answer).square()
    return rel, agree, (agree * weight.where(known, 0.0)[:, None]).sum(-1)


@triton.jit
def _points(pts_ptr, pair, ok, BLOCK: tl.constexpr):
    """Row and column of the red points, then of the green ones: 16 bytes of int32 a pair, in one load."""
    four = tl.load(pts_ptr + (pair[:, None] * 4 + tl.arange(0, 4)[None]), mask=ok[:, None], other=0)    # (BLOCK, 4)
    rows, cols = tl.split(tl.reshape(four, (BLOCK, 2, 2)))             # (BLOCK, 2) each, red and green
    y0, y1 = tl.split(rows)                                            # (BLOCK,)
    x0, x1 = tl.split(cols)
    return y0, x0, y1, x1


@triton.jit
def _value(map_ptr, row, col, H, W, stride_h, stride_w, ok, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Value at a point, or mean of the window around it, cut at the border: (BLOCK,)."""
    if WINDOW == 0:
        at = row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w
        return tl.load(map_ptr + at, mask=ok, other=0.0).to(ACC)
    else:
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
        return exact_div(total, (rows * cols).to(ACC))


@triton.jit
def _difference(map_ptr, y0, x0, y1, x1, H, W, stride_h, stride_w, ok, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Value at the red point minus value at the green one: (BLOCK,)."""
    return (_value(map_ptr, y0, x0, H, W, stride_h, stride_w, ok, WINDOW, ACC)
            - _value(map_ptr, y1, x1, H, W, stride_h, stride_w, ok, WINDOW, ACC))


@triton.jit
def _range_kernel(
    pred_ptr, low_ptr, high_ptr,                          # (B, G, 1, H, W), (B*G, PARTS), (B*G, PARTS)
    G, n, W, stride_b, stride_g, stride_h, stride_w,
    FLAT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    bg = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    map_ptr = pred_ptr + bg // G * stride_b + bg % G * stride_g
    inf = float("inf")
    low = tl.full((BLOCK,), inf, ACC)
    high = tl.full((BLOCK,), -inf, ACC)
    for start in range(part * BLOCK, n, PARTS * BLOCK):
        i = start + tl.arange(0, BLOCK)                                # (BLOCK,)
        if FLAT:
            at = i.to(tl.int64) * stride_w
        else:
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
    rel_ptr, agree_ptr, part_ptr,                         # (B*G, P), written if RELATION; (B*G, P); (B*G, n_parts)
    G, P, H, W, n_parts, stride_b, stride_g, stride_c, stride_h, stride_w,
    RULE: tl.constexpr, FORM: tl.constexpr, RELATION: tl.constexpr, TAU: tl.constexpr, WINDOW: tl.constexpr,
    DEAD: tl.constexpr, SAME: tl.constexpr, LUMA_R: tl.constexpr, LUMA_G: tl.constexpr, LUMA_B: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    part = tl.program_id(0)                                            # the faster axis: one map stays in the cache
    bg = tl.program_id(1).to(tl.int64)
    b = bg // G
    pair = part * BLOCK + tl.arange(0, BLOCK)                          # (BLOCK,)
    ok = pair < P
    y0, x0, y1, x1 = _points(pts_ptr + b * P * 4, pair, ok, BLOCK)     # (BLOCK,) each
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
    prob = tl.load(prob_ptr + b * P + pair, mask=ok, other=0.5).to(ACC)
    known = tl.abs(prob) < float("inf")                                # the judge has answered
    answer = tl.where(known, 2 * prob - 1, 0.0)
    if FORM == "hard":
        rel = tl.where(margin > 0, 1, tl.where((margin < 0) | (RULE == "same"), -1, 0))
        rel = tl.where(finite & (tl.abs(margin) >= DEAD), rel, 0)
        if RELATION:
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
    weight = tl.load(weight_ptr + b * P + pair, mask=ok & known, other=0.0).to(ACC)
    tl.store(part_ptr + bg * n_parts + part, tl.sum(agree * weight, 0))  # partial sums, added in torch


def _launch(pred, pts, prob, weight, row, form, tau, window, relation):
    if row.rule not in FUSED:
        raise ValueError(f"pair_reward: got rule {row.rule!r}, want one of {', '.join(FUSED)}; use --kernels torch")
    B, G, _, H, W = pred.shape
    P = pts.shape[1]
    acc = acc_dtype(pred)
    ACC = triton_dtype(acc)
    stride_b, stride_g, stride_c, stride_h, stride_w = pred.stride()
    n_parts = triton.cdiv(P, BLOCK)
    rel = pred.new_empty(B, G, P if relation else 0, dtype=torch.int8)
    agree = pred.new_empty(B, G, P, dtype=acc)
    part = pred.new_empty(B, G, n_parts, dtype=acc)
    low = high = part                                                  # a pointer that is not read unless nearer
    if row.rule == "nearer":
        low, high = pred.new_empty(2, B * G, PARTS, dtype=acc)
        launch(_range_kernel, (B * G, PARTS), pred, low, high, G, H * W, W, stride_b, stride_g, stride_h, stride_w,
               FLAT=stride_h == W * stride_w, PARTS=PARTS, BLOCK=RANGE_BLOCK, ACC=ACC)
    launch(_pair_reward_kernel, (n_parts, B * G), pred, pts.int().contiguous(), prob.contiguous(), weight.contiguous(),
           low, high, rel, agree, part, G, P, H, W, n_parts, stride_b, stride_g, stride_c, stride_h, stride_w,
           RULE=row.rule, FORM="hard" if form == "confidence" else form, RELATION=relation, TAU=float(tau),
           WINDOW=window, DEAD=row.dead, SAME=SAME_ALBEDO, LUMA_R=LUMA[0], LUMA_G=LUMA[1], LUMA_B=LUMA[2],
           PARTS=PARTS, BLOCK=BLOCK, ACC=ACC)
    return rel, agree, part[..., 0] if n_parts == 1 else part.sum(-1)


@torch.library.custom_op("reasonx::pair_reward", mutates_args=())
def _pair_reward(pred: Tensor, pts: Tensor, prob: Tensor, weight: Tensor, modality: str, form: str, tau: float,
                 window: int, relation: bool) -> tuple[Tensor, Tensor, Tensor]:
    if uses_triton(pred) and pred.numel() and pts.numel():
        return _launch(pred, pts, prob, weight, MODALITIES[modality], form, tau, window, relation)
    rel, agree, reward = pair_reward_ref(pred, pts, prob, weight, modality, form, tau, window)
    return rel if relation else pred.new_empty(*agree.shape[:2], 0, dtype=torch.int8), agree, reward


@_pair_reward.register_fake
def _(pred, pts, prob, weight, modality, form, tau, window, relation):
    B, G = pred.shape[:2]
    P = pts.shape[1]
    acc = acc_dtype(pred)
    return (pred.new_empty(B, G, P if relation else 0, dtype=torch.int8), pred.new_empty(B, G, P, dtype=acc),
            pred.new_empty(B, G, dtype=acc))


def pair_reward(pred, pts, prob, weight, modality, form="soft", tau=0.1, window=0, relation=False):
    """Compare maps with a judge's answers at point pairs (ReasonX, reward).

    pred      (B, G, C, H, W)  maps of one modality in its encoding, any strides; nothing is copied
    pts       (B, P, 2, 2)     integer (row, col) inside the map (relations.check_points), red first, shared by the
                               group; int32 on a GPU, where other integers are copied
    prob      (B, P)           the judge's probability of the first answer, NaN: not known
    weight    (B, P)           share of each pair in the reward; not counted where prob is NaN
    form      which agreement: "hard", "confidence", "soft" or "brier" (see the module docstring)
    tau       softness of "soft" and "brier", in the unit of the margin
    window    radius in px of the mean that is read at a point
    relation  whether "hard" and "confidence" give the relation too
    returns   relation int8 (B, G, P), None unless asked for; agreement (B, G, P) in [0, 1] and reward (B, G), both
              fp32, or fp64 for fp64 maps
    raises    ValueError       shapes that do not fit, unknown modality or form, a relation asked of a form that has
                               none; on a GPU a rule that the kernel does not know
    """
    if form not in FORMS or relation and form not in FORMS[:2]:
        raise ValueError(f"pair_reward: got form {form!r}, want one of {', '.join(FORMS[:2] if relation else FORMS)}")
    if modality not in MODALITIES:
        raise ValueError(f"pair_reward: got modality {modality!r}, want one of {', '.join(MODALITIES)}")
    B = len(pred)
    C = MODALITIES[modality].channels
    if pred.ndim != 5 or pred.shape[2] != C:
        raise ValueError(f"pair_reward: got pred {tuple(pred.shape)}, want (B, G, {C}, H, W) for {modality!r}")
    if pts.ndim != 4 or pts.shape[0] != B or pts.shape[2:] != (2, 2):
        raise ValueError(f"pair_reward: got pts {tuple(pts.shape)}, want ({B}, P, 2, 2)")
    for name, z in (("prob", prob), ("weight", weight)):
        if z.shape != pts.shape[:2]:
            raise ValueError(f"pair_reward: got {name} {tuple(z.shape)}, want {tuple(pts.shape[:2])}, one per pair")
    if torch.is_grad_enabled() and pred.requires_grad:
        rel, agree, reward = pair_reward_ref(pred, pts, prob, weight, modality, form, tau, window)
    else:
        rel, agree, reward = _pair_reward(pred.detach(), pts, prob.detach(), weight.detach(), modality, form,
                                          float(tau), window, relation)
    return rel if relation else None, agree, reward
