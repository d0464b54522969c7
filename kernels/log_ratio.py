"""Log-ratio of a recorded step under the new and the old policy, and KL of the new policy to the reference.

math       mean = A x + B v;  d = mean - mean_old;  r = x_next - mean_old
           log_ratio = avg(d (2 r - d)) / (2 std^2) = log N(x_next; mean, std^2) - log N(x_next; mean_old, std^2)
           kl = avg(B^2 (v - v_ref)^2) / (2 std^2), over all n = C h w elements
           avg over all n elements, or over the C channels of each pixel
gradient   dlog_ratio/dv = B (x_next - mean) / (n std^2);  dkl/dv = B^2 (v - v_ref) / (n std^2);  none into v_ref, x,
           x_next, mean_old
why fused  fp32 bytes per element, K samples: eager forward 72 + 48 K, here 16 + 4 K; no residual is kept. What does
           not depend on the sample is read and computed once for up to DRAWS samples
           Subtracting two log-densities loses digits (an ulp is 1e-7 of their size); this form is exactly 0 at d = 0
launches   forward one, and two that add partial sums (one for the average over channels); backward one
source     exploration step of ReasonX (arXiv 2512.04222), KL as in Flow-GRPO (arXiv 2505.05470), there without |dt|

One kernel pair for both averages: (R, K, C, P) with P pixels; the scalar form is C = 1, P = n.
"""
import torch
from torch import Tensor

from . import acc_dtype, launch, tl, triton, triton_dtype, uses_triton_with_floats
from .sde_step import linear_mean

BLOCK = 1024                                           # fixed: it decides the summation order
DRAWS = 8                                              # samples of a state that a program takes at a time, at most
WARPS = 8                                              # of the forward: 4 elements of a draw a thread, one 16-byte load


def log_ratio_kl_ref(x_next, x, v, mean_old, v_ref, A, B, std, per_pixel=False):
    """Plain torch. The definition; every other path must match it."""
    acc = acc_dtype(x_next, x, v)
    x_next, x, mean_old, v_ref = (z.detach().to(acc) for z in (x_next, x, mean_old, v_ref))
    v = v.to(acc)
    d = (A * x + B * v - mean_old)[:, None]                             # (R, 1, C, h, w)
    term = d * (2 * (x_next - mean_old[:, None]) - d)                   # (R, K, C, h, w)
    log_ratio = (term.mean(2) if per_pixel else term.flatten(2).mean(2)) / (2 * std**2)
    return log_ratio, (B * (v - v_ref)).square().flatten(1).mean(1) / (2 * std**2)


@triton.jit
def _log_ratio_fwd_kernel(
    x_next_ptr,                                           # (R, K, C, P) by strides
    x_ptr, v_ptr, mean_old_ptr, v_ref_ptr,                # (R, C, P)
    out_ptr, kl_ptr,                                      # (R, K, P) if MAP else (R, K, n_parts); (R, n_parts)
    K, P, n_parts, stride_r, stride_k, A, B, scale, kl_scale,
    C: tl.constexpr, MAP: tl.constexpr, DRAWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    col = part * BLOCK + tl.arange(0, BLOCK)                            # (BLOCK,)
    ok = col < P
    x_next_ptr += row * stride_r
    for first in range(0, K, DRAWS):
        k = first + tl.arange(0, DRAWS)[:, None]                        # (DRAWS, 1)
        here = (k < K) & ok[None]                                       # (DRAWS, BLOCK)
        total = tl.zeros((DRAWS, BLOCK), ACC)
        apart = tl.zeros((BLOCK,), ACC)
        for c in range(C):
            at = (row * C + c) * P + col
            x = tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC)
            v = tl.load(v_ptr + at, mask=ok, other=0.0).to(ACC)
            mean_old = tl.load(mean_old_ptr + at, mask=ok, other=0.0).to(ACC)
            gap = v - tl.load(v_ref_ptr + at, mask=ok, other=0.0).to(ACC)
            d = linear_mean(x, v, A, B, BLOCK, ACC) - mean_old          # masked lanes are 0
            drawn = tl.load(x_next_ptr + k.to(tl.int64) * stride_k + (c * P + col)[None], mask=here, other=0.0)
            total += d[None] * (2 * (drawn.to(ACC) - mean_old[None]) - d[None])
            apart += gap * gap
        if MAP:
            tl.store(out_ptr + (row * K + k) * P + col[None], total * scale, mask=here)
        else:
            draw = first + tl.arange(0, DRAWS)
            tl.store(out_ptr + (row * K + draw) * n_parts + part, tl.sum(total, 1) * scale, mask=draw < K)
        tl.store(kl_ptr + row * n_parts + part, tl.sum(apart, 0) * kl_scale)  # the same each time; added in torch


@triton.jit
def _log_ratio_bwd_kernel(
    x_next_ptr,                                           # (R, K, C, P) by strides
    x_ptr, v_ptr, v_ref_ptr, dv_ptr,                      # (R, C, P)
    g_ptr, g_kl_ptr,                                      # (R, K, P) if MAP else (R, K); (R,)
    K, P, stride_r, stride_k, A, B, slope, kl_slope,
    C: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)                # (BLOCK,)
    ok = col < P
    g_kl = tl.load(g_kl_ptr + row).to(ACC) * kl_slope
    for c in range(C):
        at = (row * C + c) * P + col
        v = tl.load(v_ptr + at, mask=ok, other=0.0).to(ACC)
        mean = linear_mean(tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC), v, A, B, BLOCK, ACC)
        pull = tl.zeros((BLOCK,), ACC)
        drawn_ptr = x_next_ptr + row * stride_r + c * P
        for k in range(K):
            drawn = tl.load(drawn_ptr + col, mask=ok, other=0.0).to(ACC)
            if MAP:
                g = tl.load(g_ptr + (row * K + k) * P + col, mask=ok, other=0.0).to(ACC)       # (BLOCK,)
            else:
                g = tl.load(g_ptr + row * K + k).to(ACC)
            pull += g * (drawn - mean)
            drawn_ptr += stride_k
        gap = v - tl.load(v_ref_ptr + at, mask=ok, other=0.0).to(ACC)
        tl.store(dv_ptr + at, (pull * slope + gap * g_kl).to(dv_ptr.dtype.element_ty), mask=ok)


def _takes_triton(x_next, x, v):
    return all(map(uses_triton_with_floats, (x_next, x, v))) and x_next.numel() > 0


def _flatten(x_next, states, per_pixel):
    """Draws (R, K, C, P), rows by strides, and contiguous states (R, C, P): pixels, or one channel of all elements."""
    start = 3 if per_pixel else 2
    drawn = x_next.flatten(start)
    drawn = drawn if drawn.stride(-1) == 1 and (start == 2 or drawn.stride(2) == drawn.shape[3]) else drawn.contiguous()
    states = [z.contiguous().flatten(start - 1) for z in states]
    if per_pixel:
        return drawn, states
    return drawn.unsqueeze(2), [z.unsqueeze(1) for z in states]


def _scales(states, std, B, per_pixel):
    """Factors of the two sums: of the log-ratio, of the KL."""
    _, C, P = states[0].shape
    return 0.5 / std**2 / (C if per_pixel else C * P), 0.5 * (B / std) ** 2 / (C * P)


@torch.library.custom_op("reasonx::log_ratio_kl", mutates_args=())
def _log_ratio_kl(x_next: Tensor, x: Tensor, v: Tensor, mean_old: Tensor, v_ref: Tensor, A: float, B: float,
                  std: float, per_pixel: bool) -> tuple[Tensor, Tensor]:
    if not _takes_triton(x_next, x, v):
        return log_ratio_kl_ref(x_next, x, v, mean_old, v_ref, A, B, std, per_pixel)
    drawn, states = _flatten(x_next, (x, v, mean_old, v_ref), per_pixel)
    R, K, C, P = drawn.shape
    acc = acc_dtype(x_next, x, v)
    n_parts = triton.cdiv(P, BLOCK)
    out = v.new_empty(R, K, P if per_pixel else n_parts, dtype=acc)
    kl = v.new_empty(R, n_parts, dtype=acc)
    launch(_log_ratio_fwd_kernel, (R, n_parts), drawn, *states, out, kl, K, P, n_parts, drawn.stride(0),
           drawn.stride(1), A, B, *_scales(states, std, B, per_pixel), C=C, MAP=per_pixel,
           DRAWS=min(DRAWS, triton.next_power_of_2(K)), BLOCK=BLOCK, ACC=triton_dtype(acc), num_warps=WARPS)
    return out.unflatten(2, x_next.shape[3:]) if per_pixel else out.sum(-1), kl.sum(-1)


@_log_ratio_kl.register_fake
def _(x_next, x, v, mean_old, v_ref, A, B, std, per_pixel):
    R, K, _, h, w = x_next.shape
    acc = acc_dtype(x_next, x, v)
    return v.new_empty((R, K, h, w) if per_pixel else (R, K), dtype=acc), v.new_empty(R, dtype=acc)


@torch.library.custom_op("reasonx::log_ratio_kl_backward", mutates_args=())
def _log_ratio_kl_backward(g: Tensor, g_kl: Tensor, x_next: Tensor, x: Tensor, v: Tensor, v_ref: Tensor, A: float,
                           B: float, std: float, per_pixel: bool) -> Tensor:
    drawn, states = _flatten(x_next, (x, v, v_ref), per_pixel)
    R, K, C, P = drawn.shape
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    scale, kl_scale = _scales(states, std, B, per_pixel)
    launch(_log_ratio_bwd_kernel, (R, triton.cdiv(P, BLOCK)), drawn, *states, dv, g.contiguous(), g_kl.contiguous(),
           K, P, drawn.stride(0), drawn.stride(1), A, B, 2 * B * scale, 2 * kl_scale, C=C, MAP=per_pixel, BLOCK=BLOCK,
           ACC=triton_dtype(acc_dtype(x_next, x, v)))
    return dv


@_log_ratio_kl_backward.register_fake
def _(g, g_kl, x_next, x, v, v_ref, A, B, std, per_pixel):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _differentiate(ctx, g, g_kl):
    """Gradient into v alone: of the kernel, or torch's own of the definition."""
    x_next, x, v, mean_old, v_ref = ctx.saved_tensors
    if _takes_triton(x_next, x, v):
        dv = _log_ratio_kl_backward(g, g_kl, x_next, x, v, v_ref, *ctx.rest)
    else:
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            dv = torch.autograd.grad(log_ratio_kl_ref(x_next, x, leaf, mean_old, v_ref, *ctx.rest), leaf, (g, g_kl))[0]
    return None, None, dv, *[None] * 6


_log_ratio_kl.register_autograd(_differentiate, setup_context=_save)


def log_ratio_kl(x_next, x, v, mean_old, v_ref, A, B, std, per_pixel=False):
    """Log-ratio of K recorded draws per state and KL to the reference; only v receives a gradient.

    x_next       (R, K, C, h, w)  recorded draws
    x, mean_old  (R, C, h, w)     state, and mean of the step under the policy that drew
    v, v_ref     (R, C, h, w)     velocity at x of the policy that is trained and of the reference
    A, B, std    floats           mean = A x + B v and standard deviation (> 0) of the step
    returns      log-ratio (R, K), mean over elements, or (R, K, h, w), mean over channels; KL (R,), mean over elements;
                 fp32, fp64 for fp64 states
    raises       ValueError       when the shapes do not fit
    """
    shapes = [tuple(z.shape) for z in (x, v, mean_old, v_ref)]
    if v.ndim != 4 or len(set(shapes)) > 1 or x_next.ndim != 5 or (len(x_next), *x_next.shape[2:]) != shapes[0]:
        raise ValueError(f"log_ratio_kl: got x_next {tuple(x_next.shape)}, x, v, mean_old, v_ref {shapes}; "
                         "want (R, K, C, h, w) and four of (R, C, h, w)")
    return _log_ratio_kl(x_next.detach(), x.detach(), v, mean_old.detach(), v_ref.detach(), float(A), float(B),
                         float(std), per_pixel)
