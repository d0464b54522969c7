"""GroupNorm and SiLU of a feature map in 16 bits: statistics and arithmetic in fp32, in either memory layout.

math       mean, var over a group's channels and all pixels;  rstd = 1 / sqrt(var + eps);  xhat = (x - mean) rstd
           h = weight xhat + bias;  s = sigmoid(h);  y = h s
gradient   dh = g s (1 + h (1 - s));  dbias = sum dh, dweight = sum dh xhat, over images and pixels
           dx = rstd (weight dh - avg(weight dh) - xhat avg(weight dh xhat)), avg over a group
why fused  bytes per bf16 element: eager autocast 28 forward (cast, norm, SiLU, cast; each reads once), 40 backward, 8
           kept for it; here 6, 10 and 2. torch.compile: 6 forward; 16 backward, channels last 26: it stores dh in fp32
launches   forward three: moments of tiles, of groups, the map. Backward three, and one that adds the images' sums
source     GroupNorm (Wu and He 2018) and SiLU as the ResNet blocks of Stable Diffusion have them

Tiles keep mean and sum of squares around it, so a mean far from 0 costs no digits. No atomics: the same bits each run.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from . import acc_dtype, launch, tl, triton, triton_dtype, uses_triton_with_floats

TILE = 4096                                            # elements of a program; fixed: it decides the summation order
CHANNELS = 64                                          # of a tile, channels last: 128 bytes of a pixel
PIXELS = 1024                                          # of a tile, channels first
WARPS = 8                                              # of a tile: 16 elements a thread, two 16-byte loads


def group_norm_silu_ref(x, weight, bias, groups, eps, dtype):
    """Plain torch. The definition; every other path must match it."""
    acc = acc_dtype(x)
    return F.silu(F.group_norm(x.to(acc), groups, weight.to(acc), bias.to(acc), eps)).to(dtype)


@triton.jit
def _locate(S, C, BS: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr):
    """This program's image, its channels (BC,), and the tile (BS, BC): places in memory, and which exist."""
    image = tl.program_id(2).to(tl.int64)
    s = tl.program_id(0) * BS + tl.arange(0, BS)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    at = s * C + c[None] if LAST else c[None] * S + s
    return image, c, image * S * C + at, (s < S) & (c < C)[None]


@triton.jit
def _moments_kernel(
    x_ptr, part_ptr,                                      # (B, S, C) or (B, C, S); (B, 2, n_parts, C)
    S, C, n_parts,
    BS: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):
    image, c, at, ok = _locate(S, C, BS, BC, LAST)
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC)                 # (BS, BC)
    part = tl.program_id(0)
    mean = tl.sum(x, 0) / tl.minimum(S - part * BS, BS)                 # (BC,)
    d = tl.where(ok, x - mean[None], 0.0)
    out_ptr = part_ptr + (image * 2 * n_parts + part) * C + c
    tl.store(out_ptr, mean, mask=c < C)
    tl.store(out_ptr + n_parts * C, tl.sum(d * d, 0), mask=c < C)


@triton.jit
def _statistics_kernel(
    part_ptr, mean_ptr, rstd_ptr,                         # (B, 2, n_parts, C), (B, groups) x2
    S, C, n_parts, eps,
    SPAN: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BS: tl.constexpr, ACC: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    k = tl.arange(0, WIDTH)[None]
    start_ptr = part_ptr + image * 2 * n_parts * C + group * SPAN + k   # (1, WIDTH)
    total = tl.zeros((PARTS, WIDTH), ACC)
    for first in range(0, n_parts, PARTS):
        p = first + tl.arange(0, PARTS)[:, None]                        # (PARTS, 1)
        ok = (p < n_parts) & (k < SPAN)
        total += tl.minimum(S - p * BS, BS) * tl.load(start_ptr + p * C, mask=ok, other=0.0)
    mean = tl.sum(total) / (S * SPAN)
    total = tl.zeros((PARTS, WIDTH), ACC)
    for first in range(0, n_parts, PARTS):
        p = first + tl.arange(0, PARTS)[:, None]
        ok = (p < n_parts) & (k < SPAN)
        d = tl.load(start_ptr + p * C, mask=ok, other=0.0) - mean
        square = tl.load(start_ptr + (n_parts + p) * C, mask=ok, other=0.0)
        total += tl.where(ok, square + tl.minimum(S - p * BS, BS) * d * d, 0.0)
    at = image * tl.num_programs(1) + group
    tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, 1 / tl.sqrt(tl.sum(total) / (S * SPAN) + eps))


@triton.jit
def _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, image, c, C, SPAN: tl.constexpr, ACC: tl.constexpr):
    """Of each channel: mean and rstd of its group, and h = scale x + shift. Each (1, BC)."""
    at = image * (C // SPAN) + c // SPAN
    mean = tl.load(mean_ptr + at, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + at, mask=c < C, other=0.0)
    scale = rstd * tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)
    shift = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC) - mean * scale
    return mean[None], rstd[None], scale[None], shift[None]


@triton.jit
def _map_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, y_ptr,     # x, y as above; (C,) x2; (B, groups) x2
    S, C,
    SPAN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):
    image, c, at, ok = _locate(S, C, BS, BC, LAST)
    mean, rstd, scale, shift = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, image, c, C, SPAN, ACC)
    h = tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC) * scale + shift
    tl.store(y_ptr + at, (h * tl.sigmoid(h)).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _slope(g, h):
    """Gradient at h = GroupNorm(x), of g at SiLU(h)."""
    s = tl.sigmoid(h)
    return g * s * (1 + h * (1 - s))


@triton.jit
def _sums_kernel(
    g_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, part_ptr,   # part: (B, 2, n_parts, C)
    S, C, n_parts,
    SPAN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):
    image, c, at, ok = _locate(S, C, BS, BC, LAST)
    mean, rstd, scale, shift = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, image, c, C, SPAN, ACC)
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC)
    dh = _slope(tl.load(g_ptr + at, mask=ok, other=0.0).to(ACC), x * scale + shift)     # masked lanes are 0
    out_ptr = part_ptr + (image * 2 * n_parts + tl.program_id(0)) * C + c
    tl.store(out_ptr, tl.sum(dh, 0), mask=c < C)
    tl.store(out_ptr + n_parts * C, tl.sum(dh * (x - mean) * rstd, 0), mask=c < C)


@triton.jit
def _averages_kernel(
    part_ptr, weight_ptr, each_ptr, average_ptr,          # (B, 2, n_parts, C), (C,), (B, 2, C), (B, 2, groups)
    S, C, n_parts,
    SPAN: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)                   # image and kind of sum: dbias, dweight
    group = tl.program_id(1)
    k = tl.arange(0, WIDTH)
    total = tl.zeros((PARTS, WIDTH), ACC)
    for first in range(0, n_parts, PARTS):
        p = first + tl.arange(0, PARTS)[:, None]
        ok = (p < n_parts) & (k < SPAN)[None]
        total += tl.load(part_ptr + (row * n_parts + p) * C + (group * SPAN + k)[None], mask=ok, other=0.0)
    each = tl.sum(total, 0)                                             # (WIDTH,)
    tl.store(each_ptr + row * C + group * SPAN + k, each, mask=k < SPAN)
    weight = tl.load(weight_ptr + group * SPAN + k, mask=k < SPAN, other=0.0).to(ACC)
    tl.store(average_ptr + row * tl.num_programs(1) + group, tl.sum(each * weight) / (S * SPAN))


@triton.jit
def _dx_kernel(
    g_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, average_ptr, dx_ptr,
    S, C,
    SPAN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):
    image, c, at, ok = _locate(S, C, BS, BC, LAST)
    mean, rstd, scale, shift = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, image, c, C, SPAN, ACC)
    groups = C // SPAN
    of_ptr = average_ptr + image * 2 * groups + c // SPAN
    level = tl.load(of_ptr, mask=c < C, other=0.0)[None]                # avg(weight dh)
    tilt = tl.load(of_ptr + groups, mask=c < C, other=0.0)[None]        # avg(weight dh xhat)
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(ACC)
    dh = _slope(tl.load(g_ptr + at, mask=ok, other=0.0).to(ACC), x * scale + shift)
    dx = scale * dh - rstd * (level + (x - mean) * rstd * tilt)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)


def _layout(x):
    """Memory format in which a map is read and written: channels last where it is stored so."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _plan(x, groups):
    """Sizes and grids of the launches on a map: (S, C, n_parts), grid of tiles, constants of tiles, of groups."""
    B, C = x.shape[:2]
    S = x[0, 0].numel()
    last = _layout(x) == torch.channels_last
    BC = min(CHANNELS, triton.next_power_of_2(C)) if last else TILE // min(PIXELS, triton.next_power_of_2(S))
    BC = min(BC, triton.next_power_of_2(C))
    BS = min(TILE // BC, triton.next_power_of_2(S))
    n_parts = triton.cdiv(S, BS)
    span = C // groups
    width = triton.next_power_of_2(span)
    acc = triton_dtype(acc_dtype(x))
    tiles = dict(BS=BS, BC=BC, LAST=last, ACC=acc, num_warps=WARPS)
    merge = dict(SPAN=span, WIDTH=width, PARTS=min(max(1, 1024 // width), triton.next_power_of_2(n_parts)), ACC=acc)
    return (S, C, n_parts), (n_parts, triton.cdiv(C, BC), B), tiles, merge


@torch.library.custom_op("reasonx::group_norm_silu", mutates_args=())
def _group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
                     dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(x)
    form = _layout(x)
    if not uses_triton_with_floats(x) or not x.numel():
        mean, rstd = x.new_zeros(2, len(x), groups, dtype=acc)          # the definition's gradient needs none
        y = group_norm_silu_ref(x, weight, bias, groups, eps, dtype)
        return y.contiguous(memory_format=form), mean, rstd.clone()
    x = x.contiguous(memory_format=form)
    mean = x.new_empty(len(x), groups, dtype=acc)
    rstd = torch.empty_like(mean)
    sizes, grid, tiles, merge = _plan(x, groups)
    part = x.new_empty(len(x), 2, sizes[2], sizes[1], dtype=acc)
    y = torch.empty_like(x, dtype=dtype, memory_format=form)
    launch(_moments_kernel, grid, x, part, *sizes, **tiles)
    launch(_statistics_kernel, (len(x), groups), part, mean, rstd, *sizes, eps, BS=tiles["BS"], **merge)
    launch(_map_kernel, grid, x, weight, bias, mean, rstd, y, *sizes[:2], SPAN=merge["SPAN"], **tiles)
    return y, mean, rstd


@_group_norm_silu.register_fake
def _(x, weight, bias, groups, eps, dtype):
    mean = x.new_empty(len(x), groups, dtype=acc_dtype(x))
    return torch.empty_like(x, dtype=dtype, memory_format=_layout(x)), mean, torch.empty_like(mean)


@torch.library.custom_op("reasonx::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
                              groups: int) -> tuple[Tensor, Tensor]:
    form = _layout(x)
    g, x = (z.contiguous(memory_format=form) for z in (g, x))
    sizes, grid, tiles, merge = _plan(x, groups)
    B = len(x)
    part = mean.new_empty(B, 2, sizes[2], sizes[1])
    each = mean.new_empty(B, 2, sizes[1])
    average = mean.new_empty(B, 2, groups)
    dx = torch.empty_like(x, memory_format=form)
    read = g, x, weight, bias, mean, rstd
    launch(_sums_kernel, grid, *read, part, *sizes, SPAN=merge["SPAN"], **tiles)
    launch(_averages_kernel, (2 * B, groups), part, weight, each, average, *sizes, **merge)
    launch(_dx_kernel, grid, *read, average, dx, *sizes[:2], SPAN=merge["SPAN"], **tiles)
    return dx, each.sum(0)                                              # dbias and dweight (2, C)


@_group_norm_silu_backward.register_fake
def _(g, x, weight, bias, mean, rstd, groups):
    return torch.empty_like(x, memory_format=_layout(x)), mean.new_empty(2, x.shape[1])


def _save(ctx, inputs, output):
    x, weight, bias, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _differentiate(ctx, g, *_):
    """Gradients of the kernel, or torch's own of the definition."""
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if uses_triton_with_floats(x) and x.numel():
        dx, (dbias, dweight) = _group_norm_silu_backward(g, x, weight, bias, mean, rstd, ctx.rest[0])
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None
    with torch.enable_grad():
        leaves = [z.detach().requires_grad_() for z in (x, weight, bias)]
        grads = torch.autograd.grad(group_norm_silu_ref(*leaves, *ctx.rest), leaves, g)
    return *grads, None, None, None


_group_norm_silu.register_autograd(_differentiate, setup_context=_save)


def group_norm_silu(x, weight, bias, groups, eps, dtype):
    """SiLU of GroupNorm, in the dtype that the next layer reads.

    x             (B, C, H, W)  in either memory format, which the result keeps
    weight, bias  (C,)          of the norm
    groups, eps                 number of groups, which divides C; added to the variance
    returns       (B, C, H, W)  in `dtype`; statistics and arithmetic in fp32, fp64 for fp64
    raises        ValueError    when the shapes do not fit
    """
    C = x.shape[1] if x.ndim == 4 else 0
    if not C or C % groups or weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(f"group_norm_silu: got x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias "
                         f"{tuple(bias.shape)}, {groups} groups; want (B, C, H, W), (C,), (C,), a divisor of C")
    return _group_norm_silu(x, weight, bias, groups, float(eps), dtype)[0]
