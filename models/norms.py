"""Norms of networks with what follows them: one kernel where kernels.fuses_layer says so, torch's layers elsewhere."""
import torch
import torch.nn.functional as F

from kernels import fuses_layer
from kernels.group_norm_silu import group_norm_silu
from kernels.layer_norm_modulate import layer_norm_modulate


def norm_silu(norm, x):
    """SiLU of an nn.GroupNorm: (B, C, h, w) -> the same; from its kernel in the dtype that autocast multiplies in."""
    if fuses_layer(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, dtype)
    return F.silu(norm(x))


def norm_modulate(norm, x, scale, shift):
    """nn.LayerNorm without weights, modulated: x (B, L, D), scale and shift (B, 1, D); dtype as of norm_silu."""
    if fuses_layer(x):
        return layer_norm_modulate(x, scale, shift, norm.eps, torch.get_autocast_dtype(x.device.type))
    return norm(x) * (1 + scale) + shift
