"""Log-ratio of a recorded step under the new and the old policy, and KL of the new policy to the reference.

math       mean = A x + B v;  d = mean - mean_old;  r = x_next - mean_old
           log_ratio = avg(d (2 r - d)) / (2 std^2) = log N(x_next; mean, std^2) - log N(x_next; mean_old, std^2)
           kl = avg(B^2 (v - v_ref)^2) / (2 std^2), over all n = C h w elements
           avg over all n elements, or over the C channels of each pixel
gradient   dlog_ratio/dv = B (x_next - mean) / (n std^2);  dkl/dv = B^2 (v - v_ref) / (n std^2);  none into v_ref, x,
           x_next, mean_old
why fused  fp32 bytes per element, K samples: eager forward 72 + 48 K, here 16 + 4 K; no residual is kept
           Subtracting two log-densities loses digits (an ulp is 1e-7 of their size); this form is exactly 0 at d = 0
source     exploration step of ReasonX (arXiv 2512.04222), KL as in Flow-GRPO (arXiv 2505.05470), there without |dt|

One kernel pair for both averages: (R, K, C, P) with P pixels; the scalar form is C = 1, P = n.
"""
import torch
from torch.autograd.function import once_differentiable

from . import acc_dtype, tl, triton, triton_dtype, uses_triton_with_floats
from .sde_step import linear_mean

BLOCK = 1024                                           # fixed: it decides the summation order


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
    C: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    col = part * BLOCK + tl.arange(0, BLOCK)                            # (BLOCK,)
    ok = col < P
    apart = tl.zeros((BLOCK,), ACC)
    for c in range(C):
        at = (row * C + c) * P + col
        gap = (tl.load(v_ptr + at, mask=ok, other=0.0).to(ACC) - tl.load(v_ref_ptr + at, mask=ok, other=0.0).to(ACC))
        apart += gap * gap
    tl.store(kl_ptr + row * n_parts + part, tl.sum(apart, 0) * kl_scale)  # partial sums, added in torch
    x_next_ptr += row * stride_r
    for k in range(K):
        total = tl.zeros((BLOCK,), ACC)
        for c in range(C):
            at = (row * C + c) * P + col
            mean_old = tl.load(mean_old_ptr + at, mask=ok, other=0.0).to(ACC)
            d = linear_mean(x_ptr, v_ptr, at, ok, A, B, BLOCK, ACC) - mean_old
            drawn = tl.load(x_next_ptr + c * P + col, mask=ok, other=0.0).to(ACC)
            total += d * (2 * (drawn - mean_old) - d)                   # masked lanes are 0
        if MAP:
            tl.store(out_ptr + (row * K + k) * P + col, total * scale, mask=ok)
        else:
            tl.store(out_ptr + (row * K + k) * n_parts + part, tl.sum(total, 0) * scale)
        x_next_ptr += stride_k


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
        mean = linear_mean(x_ptr, v_ptr, at, ok, A, B, BLOCK, ACC)
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
        gap = (tl.load(v_ptr + at, mask=ok, other=0.0).to(ACC) - tl.load(v_ref_ptr + at, mask=ok, other=0.0).to(ACC))
        tl.store(dv_ptr + at, (pull * slope + gap * g_kl).to(dv_ptr.dtype.element_ty), mask=ok)


class _LogRatioKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_next, x, v, mean_old, v_ref, A, B, std, per_pixel):
        R, K, C, P = x_next.shape
        acc = acc_dtype(x_next, x, v)
        n_parts = triton.cdiv(P, BLOCK)
        out = v.new_empty(R, K, P if per_pixel else n_parts, dtype=acc)
        kl = v.new_empty(R, n_parts, dtype=acc)
        ctx.meta = dict(C=C, MAP=per_pixel, BLOCK=BLOCK, ACC=triton_dtype(acc))
        ctx.scales = A, B, 0.5 / std**2 / (C if per_pixel else C * P), 0.5 * (B / std) ** 2 / (C * P)
        ctx.save_for_backward(x_next, x, v, v_ref)
        _log_ratio_fwd_kernel[(R, n_parts)](x_next, x, v, mean_old, v_ref, out, kl, K, P, n_parts, x_next.stride(0),
                                            x_next.stride(1), *ctx.scales, **ctx.meta)
        return out if per_pixel else out.sum(-1), kl.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_kl):
        x_next, x, v, v_ref = ctx.saved_tensors
        A, B, scale, kl_scale = ctx.scales
        _, K, _, P = x_next.shape
        dv = torch.empty_like(v)
        _log_ratio_bwd_kernel[(len(v), triton.cdiv(P, BLOCK))](
            x_next, x, v, v_ref, dv, g.contiguous(), g_kl.contiguous(), K, P, x_next.stride(0), x_next.stride(1),
            A, B, 2 * B * scale, 2 * kl_scale, **ctx.meta)
        return None, None, dv, None, None, None, None, None, None


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
    if not all(map(uses_triton_with_floats, (x_next, x, v))) or not x_next.numel():
        return log_ratio_kl_ref(x_next, x, v, mean_old, v_ref, A, B, std, per_pixel)
    start = 3 if per_pixel else 2
    drawn = x_next.detach().flatten(start)
    drawn = drawn if drawn.stride(-1) == 1 and (start == 2 or drawn.stride(2) == drawn.shape[3]) else drawn.contiguous()
    x, v, mean_old, v_ref = (z.contiguous().flatten(start - 1) for z in (x.detach(), v, mean_old.detach(),
                                                                        v_ref.detach()))
    if not per_pixel:                                                   # one channel of C h w pixels
        drawn, x, v, mean_old, v_ref = (z.unsqueeze(-2) for z in (drawn, x, v, mean_old, v_ref))
    log_ratio, kl = _LogRatioKL.apply(drawn, x, v, mean_old, v_ref, float(A), float(B), float(std), per_pixel)
    return log_ratio.unflatten(2, x_next.shape[3:]) if per_pixel else log_ratio, kl


STATES = {"x_next_ptr": "*fp32", "x_ptr": "*fp32", "v_ptr": "*fp32", "mean_old_ptr": "*fp32", "v_ref_ptr": "*fp32"}
OTHERS = {"out_ptr": "*fp32", "kl_ptr": "*fp32", "dv_ptr": "*fp32", "g_ptr": "*fp32", "g_kl_ptr": "*fp32",
          **{k: "i32" for k in ("K", "P", "n_parts", "stride_r", "stride_k")},
          **{k: "fp32" for k in ("A", "B", "scale", "kl_scale", "slope", "kl_slope")}}
AOT = [  # (kernel, argument types, constexprs); compiled for each target in tests/test_aot.py
    (kernel, {**STATES, **OTHERS}, dict(C=C, MAP=C > 1, BLOCK=BLOCK, ACC=tl.float32))
    for kernel in (_log_ratio_fwd_kernel, _log_ratio_bwd_kernel) for C in (1, 4)
]
