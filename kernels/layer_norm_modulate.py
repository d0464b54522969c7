"""LayerNorm without weights, then scale and shift of the condition, in the dtype that the next layer multiplies.

math       xhat = (x - mean) / sqrt(var + eps) over the width of a token;  y = xhat (1 + scale) + shift
           scale and shift are an image's; 1 + scale is rounded to their dtype, as torch rounds it
gradient   dshift = sum g, dscale = sum g xhat, over the tokens of an image;  d = g (1 + scale)
           dx = rstd (d - avg d - xhat avg(d xhat)), avg over the width
why fused  bytes per element, x in fp32 and y in bf16 as under autocast: eager 30 forward (norm, product, sum, cast) and
           50 backward; here 6 and 10, and nothing but x is kept. torch.compile: 6 and 16, since its sums over tokens
           read x and g again
launches   one forward; backward one, and two that add partial sums and round them
source     adaLN of DiT (Peebles and Xie 2023)

No atomics: the same bits each run. The backward pass computes mean and rstd again, from the row that it holds.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from . import acc_dtype, launch, tl, triton, triton_dtype, uses_triton_with_floats

TILE = 4096                                            # elements of a tile; fixed: it decides the summation order
STEPS = 4                                              # tiles of a program of the backward pass
WARPS = 8                                              # 16 elements of a tile a thread
WIDEST = 4096                                          # a row that a program holds


def layer_norm_modulate_ref(x, scale, shift, eps, dtype):
    """Plain torch. The definition; every other path must match it."""
    return (F.layer_norm(x.to(acc_dtype(x)), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(dtype)


@triton.jit
def _normalise(x_ptr, at, ok, D, eps, ACC: tl.constexpr):
    """Rows (ROWS, WIDTH) with mean 0 and variance 1, 0 outside; 1 / their standard deviation (ROWS, 1)."""
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC)
    d = tl.where(ok, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(d * d, 1) / D + eps)[:, None]
    return d * rstd, rstd


@triton.jit
def _load_gain(scale_ptr, c, D, ACC: tl.constexpr):
    """1 + scale, rounded to its dtype: (WIDTH,)."""
    scale = tl.load(scale_ptr + c, mask=c < D, other=0.0)
    return (scale.to(ACC) + 1).to(scale_ptr.dtype.element_ty).to(ACC)


@triton.jit
def _modulate_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr,                   # (B, L, D), (B, D) by rows x2, (B, L, D)
    L, D, stride_scale, stride_shift, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    ok = (row < L) & (c < D)[None]                                      # (ROWS, WIDTH)
    at = (image * L + row) * D + c[None]
    xhat, rstd = _normalise(x_ptr, at, ok, D, eps, ACC)
    gain = _load_gain(scale_ptr + image * stride_scale, c, D, ACC)
    shift = tl.load(shift_ptr + image * stride_shift + c, mask=c < D, other=0.0).to(ACC)
    tl.store(y_ptr + at, (xhat * gain[None] + shift[None]).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _modulate_bwd_kernel(
    g_ptr, x_ptr, scale_ptr, dx_ptr, part_ptr,            # (B, L, D) x2, (B, D) by rows, (B, L, D), (B, n_parts, 2, D)
    L, D, stride_scale, eps,
    STEPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    c = tl.arange(0, WIDTH)
    gain = _load_gain(scale_ptr + image * stride_scale, c, D, ACC)
    dscale = tl.zeros((WIDTH,), ACC)
    dshift = tl.zeros((WIDTH,), ACC)
    for i in range(STEPS):
        row = (part * STEPS + i) * ROWS + tl.arange(0, ROWS)[:, None]
        ok = (row < L) & (c < D)[None]                                  # (ROWS, WIDTH)
        at = (image * L + row) * D + c[None]
        xhat, rstd = _normalise(x_ptr, at, ok, D, eps, ACC)
        g = tl.load(g_ptr + at, mask=ok, other=0.0).to(ACC)
        d = g * gain[None]
        tilt = (tl.sum(d * xhat, 1) / D)[:, None]
        dx = rstd * (d - (tl.sum(d, 1) / D)[:, None] - xhat * tilt)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        dscale += tl.sum(g * xhat, 0)
        dshift += tl.sum(g, 0)
    out_ptr = part_ptr + (image * tl.num_programs(1) + part) * 2 * D + c
    tl.store(out_ptr, dscale, mask=c < D)
    tl.store(out_ptr + D, dshift, mask=c < D)


def _takes_triton(x):
    return uses_triton_with_floats(x) and x.shape[-1] <= WIDEST and x.numel() > 0


def _rows(z):
    """Scale or shift (B, 1, D) as rows whose elements lie side by side; a chunk of a matrix is one already."""
    z = z[:, 0]
    return z if z.stride(1) == 1 else z.contiguous()


def _tile(x):
    """Constants of a launch on x."""
    width = triton.next_power_of_2(x.shape[-1])
    return dict(ROWS=max(1, TILE // width), WIDTH=width, ACC=triton_dtype(acc_dtype(x)), num_warps=WARPS)


@torch.library.custom_op("reasonx::layer_norm_modulate", mutates_args=())
def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if not _takes_triton(x):
        return layer_norm_modulate_ref(x, scale, shift, eps, dtype).contiguous()
    x = x.contiguous()
    B, L, D = x.shape
    scale = _rows(scale)
    shift = _rows(shift)
    tile = _tile(x)
    y = torch.empty_like(x, dtype=dtype)
    launch(_modulate_kernel, (B, triton.cdiv(L, tile["ROWS"])), x, scale, shift, y, L, D, scale.stride(0),
           shift.stride(0), eps, **tile)
    return y


@_layer_norm_modulate.register_fake
def _(x, scale, shift, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("reasonx::layer_norm_modulate_backward", mutates_args=())
def _layer_norm_modulate_backward(g: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    g = g.contiguous()
    x = x.contiguous()
    B, L, D = x.shape
    scale = _rows(scale)
    tile = _tile(x)
    n_parts = triton.cdiv(L, STEPS * tile["ROWS"])
    part = x.new_empty(B, n_parts, 2, D, dtype=acc_dtype(x))
    dx = torch.empty_like(x)
    launch(_modulate_bwd_kernel, (B, n_parts), g, x, scale, dx, part, L, D, scale.stride(0), eps, STEPS=STEPS, **tile)
    return dx, part.sum(1)


@_layer_norm_modulate_backward.register_fake
def _(g, x, scale, eps):
    return x.new_empty(x.shape), x.new_empty(len(x), 2, x.shape[-1], dtype=acc_dtype(x))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _differentiate(ctx, g):
    """Gradients of the kernel, or torch's own of the definition."""
    x, scale, shift = ctx.saved_tensors
    if _takes_triton(x):
        dx, sums = _layer_norm_modulate_backward(g, x, scale, ctx.rest[0])
        dscale, dshift = sums.to(scale.dtype).chunk(2, 1)
        return dx, dscale, dshift.to(shift.dtype), None, None
    with torch.enable_grad():
        leaves = [z.detach().requires_grad_() for z in (x, scale, shift)]
        grads = torch.autograd.grad(layer_norm_modulate_ref(*leaves, *ctx.rest), leaves, g)
    return *grads, None, None


_layer_norm_modulate.register_autograd(_differentiate, setup_context=_save)


def layer_norm_modulate(x, scale, shift, eps, dtype):
    """LayerNorm of tokens, modulated by their image's condition.

    x             (B, L, D)   tokens
    scale, shift  (B, 1, D)   of each image
    eps                       added to the variance
    returns       (B, L, D)   in `dtype`; statistics and arithmetic in fp32, fp64 for fp64
    raises        ValueError  when the shapes do not fit
    """
    if x.ndim != 3 or not scale.shape == shift.shape == (len(x), 1, x.shape[2]):
        raise ValueError(f"layer_norm_modulate: got x {tuple(x.shape)}, scale {tuple(scale.shape)}, shift "
                         f"{tuple(shift.shape)}; want (B, L, D) and two of (B, 1, D)")
    return _layer_norm_modulate(x, scale, shift, float(eps), dtype)
