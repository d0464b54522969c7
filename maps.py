"""What whole maps say of each other: normals of a depth map, its agreement with normals, of maps with their photo."""
import torch
import torch.nn.functional as F

from scenes import srgb_decode


def depth_normals(depth):
    """Unit normals of relative depth maps, for z = 1 + 2 d and a focal length of the longer side.

    depth    (..., 1, H, W) in [0, 1];  returns (..., 3, H - 2, W - 2): x right, y up, z toward the camera
    """
    H, W = depth.shape[-2:]
    z, focal = 1 + 2 * depth[..., 0, :, :], max(H, W)
    x = (torch.arange(W, device=z.device) - (W - 1) / 2) / focal * z
    y = (torch.arange(H, device=z.device)[:, None] - (H - 1) / 2) / focal * z
    point = torch.stack((x, -y, -z), -3)                                        # (..., 3, H, W)
    right = point[..., 1:-1, 2:] - point[..., 1:-1, :-2]
    up = point[..., :-2, 1:-1] - point[..., 2:, 1:-1]
    return F.normalize(torch.linalg.cross(right, up, dim=-3), dim=-3, eps=1e-12)


def depth_normal_agreement(depth, normal):
    """Agreement of depth (..., 1, H, W) and normals (..., 3, H, W) at each pixel: (..., H, W), (1 + cos) / 2 in [0, 1].

    The border, where depth has no normal, takes its neighbour's value.
    """
    cos = (depth_normals(depth) * normal[..., 1:-1, 1:-1]).sum(-3)
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
