"""What bench.kernels measures: real sizes of a step, large ones, odd ones; the ahead-of-time test compiles the same."""
from dataclasses import dataclass

import torch

from kernels import draw_markers, group_norm_silu, layer_norm_modulate, log_ratio, pair_reward, sde_step
from relations import MODALITIES, check_points


@dataclass
class Case:
    """One measurement: two functions of the same arguments, and the least bytes that must be moved."""

    label: str
    ref: object
    kernel: object
    args: tuple
    bytes: int = 0
    into: int = -1               # index of the argument that receives a gradient; -1: forward only
    launches: int = 1            # of the kernel, with what adds its partial sums
    cached: int = 0              # bytes that the L2 cache delivers
    recorded: bool = True        # tests compile it ahead of time and hold its counts


def make_rng(device, seed=0):
    """A generator on the device; None for tensors without data."""
    return None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)


def cut_size(n, cut):
    """A size, divided for a run without a GPU; at least 5."""
    return max(5, n // cut) if cut > 1 else n


def random_points(B, P, size, device):
    """Random points, (B, P, 2, 2) int32."""
    rng = make_rng(device)
    return torch.stack([torch.randint(n, (B, P, 2), generator=rng, device=device) for n in size], -1).int()


def pair_reward_cases(device, cut=1):
    """A step of two presets, large ones, an odd size, 10 M pairs; no side checks points: check_points_cases does."""
    for label, m, B, G, P, side, form, last in (
            ("step of paper, 8 x 512 px, P 40", "albedo", 1, 8, 40, 512, "hard", False),
            ("step of small, 128 x 128 px, P 64", "depth", 16, 8, 64, 128, "brier", False),
            ("large, 64 x 512 px, P 4096", "albedo", 8, 8, 4096, 512, "hard", False),
            ("large, channels_last", "albedo", 8, 8, 4096, 512, "hard", True),
            ("large, depth", "depth", 8, 8, 4096, 512, "soft", False),
            ("odd, 9 x 371 px, P 1271", "irradiance", 3, 3, 1271, 371, "soft", False),
            ("10 M pairs", "albedo", 8, 8, 156_250, 512, "hard", False)):
        C = MODALITIES[m].channels
        P = cut_size(P, cut)
        side = cut_size(side, cut)
        pred = torch.rand(B, G, C, side, side, generator=make_rng(device), device=device) / 4
        pred = pred.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if last else pred
        prob = torch.rand(B, P, generator=make_rng(device), device=device)
        args = pred, random_points(B, P, (side, side), device), prob, torch.full_like(prob, 1 / P), m, form, 0.1, 0
        once = min(2 * P * 32, side * side * 4) * B * G * (1 if last else C)    # a map is read once, then cached
        ranged = MODALITIES[m].rule == "nearer"
        least = once + (pred.nbytes if ranged else 0) + B * P * 24 + B * G * P * 4
        yield Case(label, _reward, pair_reward.pair_reward, args, least,
                   launches=1 + (P > pair_reward.BLOCK) + ranged, cached=2 * B * G * P * 32 * (1 if last else C))


def _reward(*args):
    return pair_reward.pair_reward_ref(*args)[1:]


def check_points_cases(device, cut=1):
    """What a step pays once to know that its points lie inside: no kernel, one wait for the GPU."""
    for P in (40, 156_250):
        args = "bench", random_points(8, cut_size(P, cut), (512, 512), device), (512, 512)
        yield Case(f"{8 * P:,} pairs", check_points, check_points, args, args[1].nbytes, launches=3)


def random_normal(*shape, device, seed=0):
    """Standard normal numbers of a shape."""
    return torch.randn(shape, generator=make_rng(device, seed), device=device)


def log_ratio_cases(device, cut=1):
    """512 MB of draws, 8 per state; and the latents of a group, per pixel."""
    for label, R, state, per_pixel in (("512 MB of draws", 4, (4, 1024, 1024), False),
                                       ("8 x 8 x 4 x 64 x 64, map", 8, (4, 64, 64), True)):
        state = state[0], *(cut_size(n, cut) for n in state[1:])
        x_next = random_normal(R, 8, *state, device=device)
        states = [random_normal(R, *state, device=device, seed=i) for i in range(4)]
        args = (x_next, *states, 0.9, -0.1, 0.4, per_pixel)
        n = x_next.nbytes + 4 * states[0].nbytes
        fns = log_ratio.log_ratio_kl_ref, log_ratio.log_ratio_kl
        yield Case(f"{label}, forward", *fns, args, n, launches=2 if per_pixel else 3)
        yield Case(f"{label}, + backward", *fns, args, 2 * n, into=2, launches=3 if per_pixel else 4)


def sde_step_cases(device, cut=1):
    """512 MB of noise, one draw per state; and 8 draws per latent."""
    for label, R, K, state in (("512 MB of noise", 8, 1, (4, 2048, 2048)), ("8 x 8 x 4 x 64 x 64", 8, 8, (4, 64, 64))):
        state = state[0], *(cut_size(n, cut) for n in state[1:])
        x, v = (random_normal(R, *state, device=device, seed=i) for i in range(2))
        eps = random_normal(R, K, *state, device=device, seed=2)
        yield Case(label, sde_step.sde_step_ref, sde_step.sde_step, (x, v, eps, 0.9, -0.1, 0.4),
                   3 * x.nbytes + 2 * eps.nbytes)


def draw_markers_cases(device, cut=1):
    """320 marked copies of 8 photos of 512 px in bf16; and an odd size."""
    for word, B, P, side in (("", 8, 40, 512), ("odd, ", 3, 7, 371)):
        side = cut_size(side, cut)
        rgb = torch.rand(B, 3, side, side, generator=make_rng(device), device=device)
        photo = torch.arange(B, device=device).repeat_interleave(P)
        mean, std = torch.full((2, 3, 1, 1), 0.4, device=device)
        args = rgb, random_points(B, P, (side, side), device).flatten(0, 1), photo, mean, std, torch.bfloat16
        yield Case(f"{word}{B * P} x {side} px", draw_markers.mark_photos_ref, draw_markers.mark_photos, args,
                   2 * B * P * 3 * side**2)


def group_norm_silu_cases(device, cut=1):
    """Maps of a ResNet block at 512 px: VAE decoder, one map; U-Net, 8 states, in both memory formats; an odd size."""
    for label, B, C, side, groups, last in (
            ("1 x 128 x 512 x 512", 1, 128, 512, 32, False), ("8 x 320 x 64 x 64", 8, 320, 64, 32, False),
            ("8 x 320 x 64 x 64, channels_last", 8, 320, 64, 32, True), ("odd, 3 x 70 x 37 x 37", 3, 70, 37, 5, False)):
        side = cut_size(side, cut)
        x = random_normal(B, C, side, side, device=device).bfloat16()
        x = x.to(memory_format=torch.channels_last) if last else x
        args = (x, random_normal(C, device=device), random_normal(C, device=device, seed=1), groups, 1e-5, x.dtype)
        fns = group_norm_silu.group_norm_silu_ref, group_norm_silu.group_norm_silu
        yield Case(f"{label}, forward", *fns, args, 3 * x.nbytes, launches=3, recorded=groups == 32)
        yield Case(f"{label}, + backward", *fns, args, 8 * x.nbytes, into=0, launches=7, recorded=groups == 32)


def layer_norm_modulate_cases(device, cut=1):
    """Tokens of preset small in a group's tail, 512 states; and an odd size. The stream is fp32, the condition bf16."""
    for label, B, L, D in (("512 x 256 x 384", 512, 256, 384), ("odd, 3 x 37 x 371", 3, 37, 371)):
        x = random_normal(cut_size(B, cut), cut_size(L, cut), D, device=device)
        scale, shift = random_normal(len(x), 1, 2 * D, device=device, seed=1).bfloat16().chunk(2, -1)
        args = x, scale, shift, 1e-5, torch.bfloat16
        fns = layer_norm_modulate.layer_norm_modulate_ref, layer_norm_modulate.layer_norm_modulate
        n = x.numel()
        even = D % 16 == 0
        yield Case(f"{label}, forward", *fns, args, 6 * n, recorded=even)
        yield Case(f"{label}, + backward", *fns, args, 16 * n, into=0, launches=4, recorded=even)


OPS = dict(check_points=check_points_cases, pair_reward=pair_reward_cases, sde_step=sde_step_cases,
           log_ratio=log_ratio_cases, draw_markers=draw_markers_cases, group_norm_silu=group_norm_silu_cases,
           layer_norm_modulate=layer_norm_modulate_cases)
