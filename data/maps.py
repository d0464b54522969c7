"""Maps in the range that networks learn, and the normals of a depth map."""
import torch
import torch.nn.functional as F


def relative_depth(depth, mask):
    """Depth in the modality table's encoding: 0 at the 2 % and 1 at the 98 % quantile of the valid pixels, clipped.

    depth (B, 1, H, W) metres, may be inf where invalid; mask (B, 1, H, W) bool;  returns (B, 1, H, W) in [0, 1]
    """
    valid = depth.masked_fill(~mask, torch.nan).flatten(1)
    low, high = (torch.nanquantile(valid, q, 1).view(-1, 1, 1, 1) for q in (0.02, 0.98))
    return ((depth - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)


def center_map(x, kind, mask):
    """A map as networks learn it, in [-1, 1]: (B, C, H, W), one of Modality.kind, mask (B, 1, H, W) -> (B, C, H, W)."""
    x = relative_depth(x, mask) if kind == "distance" else x
    return x if kind == "vector" else 2 * x - 1


def assumed_camera(depth):
    """z = 1 + 2 d of relative depth (..., H, W), focal length = longer side, centred (ours): (z, fx, fy, cx, cy)."""
    H, W = depth.shape[-2:]
    return 1 + 2 * depth, max(H, W), max(H, W), (W - 1) / 2, (H - 1) / 2


def normals_from_depth(z, fx, fy, cx, cy):
    """Unit normals of planar z (..., H, W) > 0 by central differences: (..., 3, H - 2, W - 2), camera frame (ours).

    fx, fy, cx, cy  pinhole camera in px, integer pixel centres. Adding to z bends the surface, scaling it does not.
    """
    H, W = z.shape[-2:]
    x = (torch.arange(W, dtype=z.dtype, device=z.device) - cx) / fx * z
    y = (torch.arange(H, dtype=z.dtype, device=z.device)[:, None] - cy) / fy * z
    point = torch.stack((x, -y, -z), -3)                                        # (..., 3, H, W)
    right = point[..., 1:-1, 2:] - point[..., 1:-1, :-2]
    up = point[..., :-2, 1:-1] - point[..., 2:, 1:-1]
    return F.normalize(torch.linalg.cross(right, up, dim=-3), dim=-3, eps=1e-30)
