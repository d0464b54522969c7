"""Marked, normalised copies of photos, written once in the dtype that the judge reads.

math       out[n, c] = (marked - mean[c]) / std[c];  marked = green where the green marker is, else red where the red
           one is, else photo;  marker: |dist - radius| <= line or dist <= dot, in px (relations.py owns the shape)
gradient   none needed. A call that needs a gradient uses the reference, which has one
why fused  eager passes over every copy six times (two wheres, difference, quotient, cast, the copy itself) and
           computes its masks in fp32 and int64; here each value is written once and the photo stays in cache
source     marker of the released judge of ReasonX (arXiv 2512.04222)

A photo of another size is resized by the caller: once per photo, not once per pair.
"""
import torch

import relations

from . import acc_dtype, exact_div, exact_sqrt, tl, triton, triton_dtype, uses_triton

BLOCK = 1024


def mark_photos_ref(rgb, pts, photo, mean, std, dtype):
    """Plain torch. The definition; every other path must match it."""
    marked = relations.draw_markers(rgb[photo], pts[:, None])[:, 0]    # (N, 3, H, W)
    return ((marked - mean) / std).to(dtype)


@triton.jit
def _marker(pts_ptr, row, col, radius, line, dot):
    """Pixels of the marker around a point: (BLOCK,) bool."""
    down = row - tl.load(pts_ptr).to(tl.int32)
    right = col - tl.load(pts_ptr + 1).to(tl.int32)
    dist = exact_sqrt((down * down + right * right).to(tl.float32))
    return (tl.abs(dist - radius) <= line) | (dist <= dot)


@triton.jit
def _mark_photos_kernel(
    rgb_ptr, pts_ptr, photo_ptr, mean_ptr, std_ptr, out_ptr,   # (B, 3, n), (N, 2, 2), (N,), (3,), (3,), (N, 3, n)
    n, W, radius, line, dot,
    RED: tl.constexpr, GREEN: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    copy = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)                 # (BLOCK,)
    ok = i < n
    red = _marker(pts_ptr + copy * 4, i // W, i % W, radius, line, dot)
    green = _marker(pts_ptr + copy * 4 + 2, i // W, i % W, radius, line, dot)
    photo = tl.load(photo_ptr + copy).to(tl.int64)
    for c in tl.static_range(3):
        value = tl.load(rgb_ptr + (photo * 3 + c) * n + i, mask=ok, other=0.0).to(ACC)
        value = tl.where(green, GREEN[c], tl.where(red, RED[c], value))
        scale = tl.load(std_ptr + c).to(ACC) + tl.zeros_like(value)
        value = exact_div(value - tl.load(mean_ptr + c).to(ACC), scale)
        tl.store(out_ptr + (copy * 3 + c) * n + i, value.to(out_ptr.dtype.element_ty), mask=ok)


def mark_photos(rgb, pts, photo, mean, std, dtype):
    """Draw each pair's red and green marker on its own copy of a photo and normalise it for the judge.

    rgb        (B, 3, H, W)  sRGB-encoded [0, 1], at the judge's size
    pts        (N, 2, 2)     integer (row, col), red first;  photo (N,) int64: the photo of each pair
    mean, std  (3, 1, 1)     what the judge subtracts and divides by
    returns    (N, 3, H, W)  in `dtype`; where the markers overlap, green is on top
    raises     ValueError    shapes that do not fit, points outside the photo
    """
    N = len(photo)
    if rgb.ndim != 4 or rgb.shape[1] != 3 or pts.shape != (N, 2, 2) or photo.ndim != 1:
        raise ValueError(f"mark_photos: got rgb {tuple(rgb.shape)}, pts {tuple(pts.shape)}, "
                         f"photo {tuple(photo.shape)}; want (B, 3, H, W), (N, 2, 2), (N,)")
    relations.check_points("mark_photos", pts, rgb.shape[-2:])
    if not uses_triton(rgb) or torch.is_grad_enabled() and rgb.requires_grad or not N or not rgb.numel():
        return mark_photos_ref(rgb, pts, photo, mean, std, dtype)
    H, W = rgb.shape[-2:]
    acc = acc_dtype(rgb, mean)
    out = rgb.new_empty(N, 3, H, W, dtype=dtype)
    _mark_photos_kernel[(N, triton.cdiv(H * W, BLOCK))](
        rgb.detach().contiguous(), pts.contiguous(), photo.contiguous(), mean.flatten(), std.flatten(), out, H * W, W,
        *relations.marker_size((H, W)), RED=relations.RED, GREEN=relations.GREEN, BLOCK=BLOCK,
        ACC=triton_dtype(acc))
    return out


AOT = [  # (kernel, argument types, constexprs); compiled for each target in tests/test_aot.py
    (_mark_photos_kernel, {"rgb_ptr": "*fp32", "pts_ptr": "*i64", "photo_ptr": "*i64", "mean_ptr": "*fp32",
                           "std_ptr": "*fp32", "out_ptr": "*bf16", "n": "i32", "W": "i32", "radius": "fp32",
                           "line": "fp32", "dot": "fp32"},
     dict(RED=relations.RED, GREEN=relations.GREEN, BLOCK=BLOCK, ACC=tl.float32)),
]
