"""What sampled maps are worth: agreement with the judge, consistency with each other, and who is credited for it.

agreement    relation(map) against the judge's answer, per pair. `hard` (paper), `soft`: tanh(margin / tau) against
             2p - 1, `confidence`: hard, each pair weighted by |2p - 1|, `brier`: 1 - (tanh(margin / tau) - (2p - 1))^2
             / 4, a proper score: best when the map is as sure as the judge, where soft wants every margin larger
credit       the reward is a sum of known per-pair terms, so it can be given back whole or in place:
             `global` (paper)  A[g] = centred reward of sample g, one number
             `pair`            A[g, y, x]: each pair's centred agreement, splatted around its two points
             `mix`             both; they have the same mean over the map, so the mixture has it too
width        of the splat: credit_width + credit_growth * noise level of the state that the credited step arrives at
             (a noisy state decides the layout, a clean one the detail)
mining       pairs on which the group agrees earn nothing; the bank has others, already answered
consistency  needs no judge (ReasonX names both as future work): normals of the depth map against the normals;
             albedo x irradiance, linear, against the photo, up to scale
"""
import torch
import torch.nn.functional as F

import grpo
import runtime
from kernels.pair_credit import pair_credit
from kernels.pair_reward import pair_reward
from relations import MODALITIES, srgb_decode

FORM = dict(hard="hard", confidence="hard", soft="soft", brier="brier")


def softness(cfg, modality):
    """--tau of a modality: one number for all, or one each in the order of MODALITIES."""
    values = [float(t) for t in cfg.tau.split(",")]
    return values[list(MODALITIES).index(modality) % len(values)]


def shares(weight):
    """Weights (B, P) >= 0 scaled to rows that sum to 1; a row of zeros stays."""
    return weight / weight.sum(1, keepdim=True).clamp_min(1e-6)


def pair_weights(prob, modality, cfg):
    """Share of each pair in the reward: prob (B, P) of the first answer -> (B, P), rows sum to 1 (or are all 0)."""
    weight = torch.full_like(prob, 1 / prob.shape[1])
    if cfg.balance and modality == "albedo":                                    # both answers carry half of the reward
        weight = 0.5 * (shares(prob) + shares(1 - prob))
    if cfg.reward == "confidence":
        weight = shares(weight * (2 * prob - 1).abs())
    return weight


def judged(pred, pts, prob, modality, cfg):
    """Agreement of each sample's map with the judge (ReasonX reward).

    pred     (B, G, C, H, W) in the modality's encoding;  pts (B, P, 2, 2) its pixels;  prob (B, P) of the first answer
    returns  agree (B, G, P) in [0, 1], weight (B, P) of each pair, reward (B, G) = their weighted sum
    """
    weight = pair_weights(prob, modality, cfg)
    _, agree, reward = pair_reward(pred, pts, prob, weight, modality, FORM[cfg.reward], softness(cfg, modality),
                                   cfg.window)
    return agree, weight, reward


def mine(agree, weight, pts, n):
    """The n pairs of each photo that split its group most (largest weighted variance), weights summing to 1 again.

    agree (B, G, P), weight (B, P), pts (B, P, 2, 2) -> the same three with n pairs
    """
    best = (agree.var(1, correction=0) * weight).topk(n, dim=1).indices         # (B, n)
    return (agree.gather(2, best[:, None].expand(-1, agree.shape[1], -1)), shares(weight.gather(1, best)),
            pts.gather(1, best[..., None, None].expand(-1, -1, 2, 2)))


def scaled(credit, norm):
    """Centred credit (B, G, ...) as an advantage: divided by its rms in each group, or over all rows of all ranks.

    norm  "group" (paper), "global" or "none"; zeros stay exactly 0
    """
    if norm == "none":
        return credit
    square = credit.square().mean(tuple(range(0 if norm == "global" else 1, credit.ndim)), keepdim=True)
    scale = (runtime.average(square) if norm == "global" else square).sqrt()
    return torch.where(scale > 0, credit / scale.clamp_min(1e-12), 0.0)


def local_advantage(credit, cfg):
    """Centred credit per pixel (B, G, h, w) as an advantage: mixed with its mean over the map if asked for, scaled."""
    if cfg.credit == "mix":
        credit = credit.lerp(credit.mean((2, 3), keepdim=True), cfg.credit_mix)
    return scaled(credit, cfg.norm)


def global_advantage(reward, cfg):
    """Rewards (B, G) as an advantage: centred in each group, scaled over all ranks where --norm asks for it."""
    return scaled(grpo.group_advantage(reward, "none"), cfg.norm)


def advantage(agree, weight, pts, size, level, cfg):
    """Advantage of a trained step.

    agree    (B, G, P), weight (B, P): see `judged`;  pts (B, P, 2, 2) pixels of the state;  size (h, w) of the state
    level    noise level in [0, 1] of the state that the step arrives at
    returns  (B, G) for --credit global, else (B, G, h, w)
    """
    if cfg.credit == "global":
        return global_advantage((agree * weight[:, None]).sum(-1), cfg)
    return local_advantage(pair_credit(agree, weight, pts, size, cfg.credit_width + cfg.credit_growth * level), cfg)


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
    made, photo = srgb_decode(albedo) * srgb_decode(irradiance), srgb_decode(rgb)
    axes = (-3, -2, -1)
    made = made * ((made * photo).sum(axes, keepdim=True) / made.square().sum(axes, keepdim=True).clamp_min(1e-12))
    return 1 - ((made - photo).abs() / (made + photo).clamp_min(1e-6)).mean(-3)


def consistency(pred, rgb, cfg):
    """Rewards of maps that fit each other: yields name, weight, the two modalities, agreement (B, G, H, W).

    pred  dict modality -> (B, G, C, H, W); sample g of one modality is held against sample g of the other
    rgb   (B, 3, H, W)
    """
    if cfg.depth_normal:
        names = ("depth", "normal")
        yield "depth_normal", cfg.depth_normal, names, depth_normal_agreement(*(pred[m] for m in names))
    if cfg.shading:
        names = ("albedo", "irradiance")
        yield "shading", cfg.shading, names, photo_agreement(*(pred[m] for m in names), rgb[:, None])


def map_advantage(agree, size, cfg):
    """Advantage of a consistency reward, credited like the judge's: agree (B, G, H, W) -> (B, G) or (B, G, h, w)."""
    if cfg.credit == "global":
        return global_advantage(agree.mean((2, 3)), cfg)
    return local_advantage(F.adaptive_avg_pool2d(agree - agree.mean(1, keepdim=True), size), cfg)
