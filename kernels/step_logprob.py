"""Log-density of one exploration step, log N(x_next; mean, std^2), averaged over elements or over channels.

math       logp = -avg((x_next - mean)^2) / (2 std^2) - log std - log(2 pi) / 2
           step_logprob: avg over all n = C h w elements; step_logprob_map: over the n = C channels of a pixel
gradient   dlogp/dmean = (x_next - mean) / (n std^2);  x_next and std are data, not parameters
why fused  bf16 bytes per element, counted: forward 36 eager (casts, difference, square, mean), 4 fused;
           backward about 30 eager, 6 fused; and no fp32 residual is kept for backward
source     exploration step of ReasonX (arXiv 2512.04222), Gaussian as in Flow-GRPO (arXiv 2505.05470)

Both forms are one kernel pair on (B, C, P): the map sums the C axis of each of its P pixels, the scalar form
is C = 1, P = n and also sums each block. C is a constexpr, since
a model has one. Accumulation is fp32, or fp64 when x_next or mean is.
"""
import math

import torch
from torch.autograd.function import once_differentiable

from . import on, tl, triton

BLOCK = 1024                                           # fixed: autotuning it would change the summation order
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _acc_dtype(x_next, mean):
    return torch.promote_types(torch.promote_types(x_next.dtype, mean.dtype), torch.float32)


def _square_ref(x_next, mean, std):
    """Squared residual and std in the accumulation dtype, std with one axis for the batch or none."""
    acc = _acc_dtype(x_next, mean)
    return (x_next.detach().to(acc) - mean.to(acc)).square(), std.detach().to(mean.device, acc)


def step_logprob_ref(x_next, mean, std):
    """Plain torch. The definition; every other path must match it."""
    sq, std = _square_ref(x_next, mean, std)                           # (B, C, h, w)
    return -0.5 * sq.flatten(1).mean(1) / std.square() - std.log() - HALF_LOG_2PI


def step_logprob_map_ref(x_next, mean, std):
    """Plain torch. The definition of the per-pixel form; its mean over pixels is step_logprob."""
    sq, std = _square_ref(x_next, mean, std)                           # (B, C, h, w)
    std = std.reshape(-1, 1, 1)                                        # (B or 1, 1, 1)
    return -0.5 * sq.mean(1) / std.square() - std.log() - HALF_LOG_2PI


@triton.jit
def _residual(x_next_ptr, mean_ptr, offset, ok, ACC: tl.constexpr):
    x_next = tl.load(x_next_ptr + offset, mask=ok, other=0.0).to(ACC)  # (BLOCK,)
    mean = tl.load(mean_ptr + offset, mask=ok, other=0.0).to(ACC)      # (BLOCK,)
    return x_next - mean                                               # (BLOCK,) masked lanes are 0


@triton.jit
def _step_logprob_fwd_kernel(
    x_next_ptr, mean_ptr,                                 # (B, C, P)
    weight_ptr, log_norm_ptr, out_ptr,                    # (B,), (B,), (B, P) if MAP else (B, n_parts)
    P, n_parts,
    C: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = part * BLOCK + tl.arange(0, BLOCK)                           # (BLOCK,)
    ok = col < P
    sumsq = tl.zeros((BLOCK,), ACC)
    for c in range(C):
        r = _residual(x_next_ptr, mean_ptr, (row * C + c) * P + col, ok, ACC)
        sumsq += r * r
    if MAP:
        logp = tl.load(log_norm_ptr + row) - tl.load(weight_ptr + row) * sumsq
        tl.store(out_ptr + row * P + col, logp, mask=ok)
    else:
        tl.store(out_ptr + row * n_parts + part, tl.sum(sumsq, 0))     # partial sums, added in torch


@triton.jit
def _step_logprob_bwd_kernel(
    x_next_ptr, mean_ptr, dmean_ptr,                      # (B, C, P)
    weight_ptr, g_ptr,                                    # (B,), (B, P) if MAP else (B,)
    P,
    C: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)               # (BLOCK,)
    ok = col < P
    if MAP:
        g = tl.load(g_ptr + row * P + col, mask=ok, other=0.0)         # (BLOCK,)
    else:
        g = tl.load(g_ptr + row)
    slope = 2 * tl.load(weight_ptr + row) * g                          # 1 / (n std^2), times what flows in
    for c in range(C):
        offset = (row * C + c) * P + col
        r = _residual(x_next_ptr, mean_ptr, offset, ok, ACC)
        tl.store(dmean_ptr + offset, (slope * r).to(dmean_ptr.dtype.element_ty), mask=ok)


class _StepLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_next, mean, std, per_pixel):
        B, C, P = mean.shape
        acc = _acc_dtype(x_next, mean)
        n_parts = triton.cdiv(P, BLOCK)
        std = std.to(mean.device, acc).expand(B)
        weight = 0.5 / ((C if per_pixel else P) * std.square())        # (B,)
        log_norm = -std.log() - HALF_LOG_2PI                           # (B,)
        out = mean.new_empty(B, P if per_pixel else n_parts, dtype=acc)
        ACC = tl.float64 if acc == torch.float64 else tl.float32
        ctx.meta = dict(C=C, MAP=per_pixel, BLOCK=BLOCK, ACC=ACC)
        ctx.save_for_backward(x_next, mean, weight)
        _step_logprob_fwd_kernel[(B, n_parts)](x_next, mean, weight, log_norm, out, P, n_parts, **ctx.meta)
        return out if per_pixel else log_norm - weight * out.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x_next, mean, weight = ctx.saved_tensors
        B, C, P = mean.shape
        dmean = torch.empty_like(mean)
        grid = (B, triton.cdiv(P, BLOCK))
        _step_logprob_bwd_kernel[grid](x_next, mean, dmean, weight, g.contiguous(), P, **ctx.meta)
        return None, dmean, None, None


def _check(name, x_next, mean, std):
    shape = tuple(mean.shape)
    if x_next.shape != shape:
        raise ValueError(f"{name}: got x_next {tuple(x_next.shape)}, want {shape}, the shape of mean")
    if std.ndim and std.shape != shape[:1]:
        raise ValueError(f"{name}: got std {tuple(std.shape)}, want () or {shape[:1]}, one per image")


def step_logprob(x_next, mean, std):
    """Log-density of a denoising step under the current mean.

    x_next, mean  (B, ...)     state drawn, mean of the step, two axes or more; only mean receives a gradient
    std           (B,) or ()   standard deviation, > 0 (not checked: the check would wait for the GPU)
    returns       (B,)         log-density, mean over elements; fp32, fp64 for fp64 states
    raises        ValueError   when the shapes do not fit
    """
    _check("step_logprob", x_next, mean, std)
    if mean.ndim < 2:
        raise ValueError(f"step_logprob: got mean {tuple(mean.shape)}, want (B, ...) with two axes or more")
    if not on(mean) or not mean.numel():
        return step_logprob_ref(x_next, mean, std)
    x_next, mean = (z.contiguous().flatten(1).unsqueeze(1) for z in (x_next.detach(), mean))   # (B, 1, C*h*w)
    return _StepLogprob.apply(x_next, mean, std.detach(), False)


def step_logprob_map(x_next, mean, std):
    """Log-density of a denoising step at each pixel, for credit that is local.

    x_next, mean  (B, C, h, w)  state drawn, mean of the step; only mean receives a gradient
    std           (B,) or ()    standard deviation, > 0 (not checked: the check would wait for the GPU)
    returns       (B, h, w)     log-density, mean over channels; fp32, fp64 for fp64 states
    raises        ValueError    when the shapes do not fit
    """
    _check("step_logprob_map", x_next, mean, std)
    if mean.ndim != 4:
        raise ValueError(f"step_logprob_map: got mean {tuple(mean.shape)}, want (B, C, h, w)")
    if not on(mean) or not mean.numel():
        return step_logprob_map_ref(x_next, mean, std)
    B, C, h, w = mean.shape
    x_next, mean = (z.contiguous().flatten(2) for z in (x_next.detach(), mean))                # (B, C, h*w)
    return _StepLogprob.apply(x_next, mean, std.detach(), True).unflatten(1, (h, w))


STATE = {"x_next_ptr": "*bf16", "mean_ptr": "*bf16"}
ROWS = {"weight_ptr": "*fp32", "P": "i32"}
FWD = {**STATE, **ROWS, "log_norm_ptr": "*fp32", "out_ptr": "*fp32", "n_parts": "i32"}
BWD = {**STATE, **ROWS, "dmean_ptr": "*bf16", "g_ptr": "*fp32"}
AOT = [  # (kernel, argument types, constexprs); compiled for each target in tests/test_aot.py
    (kernel, types, dict(C=C, MAP=C > 1, BLOCK=BLOCK, ACC=tl.float32))
    for kernel, types in ((_step_logprob_fwd_kernel, FWD), (_step_logprob_bwd_kernel, BWD))
    for C in (1, 4)                                                    # the scalar form, the map of a latent
]
