"""Consistency of depth and normals of one surface, and a check that normals are given in our camera frame.

The paper names the measure but no focal length, alignment or mask: those are ours. Conventions of metrics.py.
"""
import numpy as np
import torch

from data.maps import normals_from_depth
from evaluation.metrics import check_finite, check_shapes, reject, unit_vectors

AXES = tuple((x, y, z) for x in (1, -1) for y in (1, -1) for z in (1, -1))   # sign choices of a normal frame
AXIS_MARGIN = 0.5                 # degrees by which another sign choice must fit better before the axes count as wrong


def axis_errors(pred, gt, limit=20000):
    """Mean angle for each of the 8 sign choices of the predicted axes, to detect a wrong frame.

    pred, gt   (3, H, W), zero = invalid in either; limit: about so many pixels are used (every k-th row and column)
    returns    dict (sx, sy, sz) -> degrees; (1, 1, 1) is the prediction as it is. None when no pixel is valid in both
    """
    pred, gt = check_shapes("surface.axis_errors", pred, gt)
    step = max(1, int((pred[0].size / limit) ** 0.5))
    pred, gt = (x[:, ::step, ::step] for x in (pred, gt))
    valid = pred.any(0) & gt.any(0)
    if not valid.any():
        return None
    part = (unit_vectors(pred) * unit_vectors(gt))[:, valid]                    # (3, n)
    return {a: float(np.degrees(np.arccos((np.array(a) @ part).clip(-1, 1))).mean()) for a in AXES}


def wrong_axes(errors, other, margin=AXIS_MARGIN):
    """A warning when another of the 8 sign choices fits `other` better by the margin, else "".

    errors  of `axis_errors`;  other  what the normals were compared with, in words
    """
    best = min(errors, key=errors.get) if errors else None
    if not best or errors[best] >= errors[1, 1, 1] - margin:
        return ""
    x, y, z = ("-" if s < 0 else "+" for s in best)
    return (f"got wrong normal axes: ({x}x, {y}y, {z}z) fits the {other} at {errors[best]:.1f} degrees, as stored "
            f"{errors[1, 1, 1]:.1f}; want x right, y up, z to the viewer in both; either may be the wrong one (files "
            "in DSINE's frame need (-x, +y, +z)): flip those signs there")


def valid_normals(depth, fx, fy, cx, cy):
    """Normals of a depth map with holes: maps.normals_from_depth in float64.

    depth            (H, W) planar z, > 0 and finite where it is known; a shift changes the result, a scale does not
    fx, fy, cx, cy   pinhole camera in pixels, integer pixel centres
    returns          (3, H, W) unit, x right, y up, z toward the viewer; zero vector at the border and where a pixel
                     or one of its four neighbours is not known
    """
    depth = np.asarray(depth, np.float64)
    if depth.ndim != 2 or min(depth.shape) < 3:
        reject("surface.valid_normals", f"shape {depth.shape}", "(H, W), sides >= 3", "drop the channel axis")
    if not (fx > 0 and fy > 0):
        reject("surface.valid_normals", f"focal lengths {fx}, {fy}", "pixels > 0", "give this image's camera")
    known = np.isfinite(depth) & (depth > 0)
    z = torch.from_numpy(np.where(known, depth, 1.0))
    ok = known[1:-1, 1:-1] & known[1:-1, 2:] & known[1:-1, :-2] & known[:-2, 1:-1] & known[2:, 1:-1]
    return np.pad(normals_from_depth(z, fx, fy, cx, cy).numpy() * ok, ((0, 0), (1, 1), (1, 1)))


def depth_normal_consistency(depth, normal, fx, fy, cx=None, cy=None):
    """RMSE between normals derived from predicted depth and predicted normals. Ours.

    depth    (H, W) predicted planar z, aligned by the caller (a shift bends the surface), > 0 where used
    normal   (3, H, W) x right, y up, z toward the viewer; renormalised here
    cx, cy   principal point in pixels, default the image centre
    returns  float in [0, 2 / sqrt 3]: root of the mean over pixels *and* the three components
    """
    H, W = np.asarray(depth).shape
    normal = unit_vectors(check_finite("surface.depth_normal_consistency", normal))
    if normal.shape != (3, H, W):
        reject("surface.depth_normal_consistency", f"normals {normal.shape}", f"{(3, H, W)}", "resize one of them")
    cx = (W - 1) / 2 if cx is None else cx
    cy = (H - 1) / 2 if cy is None else cy
    derived = valid_normals(depth, fx, fy, cx, cy)
    valid = derived.any(0)
    if not valid.any():
        reject("surface.depth_normal_consistency", "no pixel with five valid depths", "one", "check depth > 0")
    return float(np.sqrt(np.square(derived - normal)[:, valid].mean()))
