"""Maps in the range that networks learn, and how maps of one photo agree: depth and normals, colours and the photo."""
import torch
import torch.nn.functional as F

from relations import srgb_decode

COUPLES = {  # setting of runtime.config.Config that weighs their agreement: two modalities
    "depth_normal": ("depth", "normal"),
    "shading": ("albedo", "irradiance"),
}


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


def depth_normal_agreement(depth, normal):
    """Agreement of depth (..., 1, H, W) and normals (..., 3, H, W) at each pixel: (..., H, W), (1 + cos) / 2 in [0, 1].

    The border, where depth has no normal, takes its neighbour's value.
    """
    made = normals_from_depth(*assumed_camera(depth[..., 0, :, :]))             # (..., 3, H - 2, W - 2)
    cos = (made * normal[..., 1:-1, 1:-1]).sum(-3)
    return F.pad((0.5 + 0.5 * cos).flatten(0, -3)[:, None], (1, 1, 1, 1), "replicate").view(
        *depth.shape[:-3], *depth.shape[-2:])


def photo_agreement(albedo, irradiance, rgb):
    """Agreement of albedo x irradiance with the photo at each pixel, linear, up to one scale per sample.

    albedo, irradiance (..., 3, H, W), rgb broadcast to them, all sRGB-encoded [0, 1]
    returns  (..., H, W) in [0, 1]: 1 - |a - b| / (a + b), mean over channels
    """
    made = srgb_decode(albedo) * srgb_decode(irradiance)
    photo = srgb_decode(rgb)
    axes = (-3, -2, -1)
    made = made * ((made * photo).sum(axes, keepdim=True) / made.square().sum(axes, keepdim=True).clamp_min(1e-12))
    return 1 - ((made - photo).abs() / (made + photo).clamp_min(1e-6)).mean(-3)


def consistency(maps, rgb, modality, cfg):
    """Rewards of maps that fit each other, which need no judge: list of (name, weight, agreement (B, G, H, W)).

    maps  dict modality -> (B, G, C, H, W): sample g of one modality is held against sample g of the other
    rgb   (B, 3, H, W);  cfg  weights depth_normal and shading of runtime.config.Config: [] while they are 0
    """
    found = []
    if cfg.depth_normal and modality in COUPLES["depth_normal"]:
        found.append(("depth_normal", cfg.depth_normal, depth_normal_agreement(maps["depth"], maps["normal"])))
    if cfg.shading and modality in COUPLES["shading"]:
        found.append(("shading", cfg.shading, photo_agreement(maps["albedo"], maps["irradiance"], rgb[:, None])))
    return found
