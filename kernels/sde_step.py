"""One exploration step: mean of the next state, and the next states drawn around it.

math       mean = A x + B v;  x_next = mean + std eps
gradient   none: a rollout keeps no graph. A call that needs a gradient uses the reference, which has one
why fused  fp32 bytes per element for one sample: eager 48 (two products, a sum, a product, a sum), here 20;
           K samples that share a state read x and v once
launches   one
source     every step of predictor.py is linear in x and v: Flow-GRPO (arXiv 2505.05470) eq. 9, DDIM (arXiv 2010.02502)

The mean is an explicit fma(A, x, B v), here and in log_ratio.py. So rollout and update compute the same bits, whatever
the compiler fuses, and the ratio is exactly 1 before the first update. States are fp32, or fp64 when x or v is.
"""
import torch
from torch import Tensor

from . import acc_dtype, launch, tl, triton, triton_dtype, uses_triton_with_floats

BLOCK = 1024                                           # elements of a program


def sde_step_ref(x, v, eps, A, B, std):
    """Plain torch. The definition; every other path must match it."""
    acc = acc_dtype(x, v)
    mean = A * x.to(acc) + B * v.to(acc)                                # (R, ...)
    return mean[:, None] + std * eps.to(acc), mean                      # (R, K, ...), (R, ...)


@triton.jit
def linear_mean(x, v, A, B, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """A x + B v, rounded the same way wherever it is computed: (BLOCK,)."""
    return tl.fma(tl.full((BLOCK,), A, ACC), x, tl.full((BLOCK,), B, ACC) * v)


@triton.jit
def _sde_step_kernel(
    x_ptr, v_ptr, eps_ptr,                                # (R, n) x2, (R, K, n) by strides
    x_next_ptr, mean_ptr,                                 # (R, K, n), (R, n)
    K, n, stride_r, stride_k, A, B, std,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)                            # (BLOCK,)
    ok = col < n
    x = tl.load(x_ptr + row * n + col, mask=ok, other=0.0).to(ACC)
    v = tl.load(v_ptr + row * n + col, mask=ok, other=0.0).to(ACC)
    mean = linear_mean(x, v, A, B, BLOCK, ACC)
    tl.store(mean_ptr + row * n + col, mean, mask=ok)
    eps_ptr += row * stride_r
    for k in range(K):
        eps = tl.load(eps_ptr + col, mask=ok, other=0.0).to(ACC)
        tl.store(x_next_ptr + (row * K + k) * n + col, mean + eps * std, mask=ok)
        eps_ptr += stride_k


@torch.library.custom_op("reasonx::sde_step", mutates_args=())
def _sde_step(x: Tensor, v: Tensor, eps: Tensor, A: float, B: float, std: float) -> tuple[Tensor, Tensor]:
    if not uses_triton_with_floats(x) or not uses_triton_with_floats(v) or not eps.numel():
        return sde_step_ref(x, v, eps, A, B, std)
    acc = acc_dtype(x, v)
    R, K = eps.shape[:2]
    n = x[0].numel()
    flat = eps.flatten(2)                                               # a view where a draw is contiguous
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    x_next = x.new_empty(eps.shape, dtype=acc)
    mean = x.new_empty(x.shape, dtype=acc)
    launch(_sde_step_kernel, (R, triton.cdiv(n, BLOCK)), x.contiguous(), v.contiguous(), flat, x_next, mean, K, n,
           flat.stride(0), flat.stride(1), A, B, std, BLOCK=BLOCK, ACC=triton_dtype(acc))
    return x_next, mean


@_sde_step.register_fake
def _(x, v, eps, A, B, std):
    acc = acc_dtype(x, v)
    return x.new_empty(eps.shape, dtype=acc), x.new_empty(x.shape, dtype=acc)


def sde_step(x, v, eps, A, B, std):
    """Draw K next states from each state.

    x, v     (R, ...)      state, velocity;  eps (R, K, ...) standard normal noise
    A, B     floats        coefficients of the mean;  std > 0 float, standard deviation
    returns  x_next (R, K, ...), mean (R, ...); fp32, fp64 for fp64
    raises   ValueError    when the shapes do not fit
    """
    if v.shape != x.shape or x.ndim < 2 or eps.ndim != x.ndim + 1 or (len(eps), *eps.shape[2:]) != tuple(x.shape):
        raise ValueError(f"sde_step: got x {tuple(x.shape)}, v {tuple(v.shape)}, eps {tuple(eps.shape)}; "
                         "want (R, ...), (R, ...), (R, K, ...)")
    if torch.is_grad_enabled() and (x.requires_grad or v.requires_grad):
        return sde_step_ref(x, v, eps, A, B, std)
    return _sde_step(x.detach(), v.detach(), eps.detach(), float(A), float(B), float(std))
