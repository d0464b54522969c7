"""Formulas that the code no longer computes by themselves, as oracles."""
import math

import torch

from predictor import eta_coefficients, flow_sde_step


def row_std(std, like):
    """A standard deviation given as a number, 0-dim, (B,) or (B, 1, ...) -> 0-dim or (B,), in the dtype of `like`."""
    std = torch.as_tensor(std, dtype=like.dtype, device=like.device)
    return std.flatten() if std.ndim else std


def square_residual(x_next, mean, std):
    acc = torch.promote_types(torch.promote_types(x_next.dtype, mean.dtype), torch.float32)
    return (x_next.detach().to(acc) - mean.to(acc)).square(), row_std(std, mean.to(acc))


def log_prob(x_next, mean, std):
    """Log-density of a step: (B, ...) x2, std > 0 one number or one a row -> (B,), mean over elements."""
    square, std = square_residual(x_next, mean, std)
    return -0.5 * square.flatten(1).mean(1) / std.square() - std.log() - 0.5 * math.log(2 * math.pi)


def log_prob_map(x_next, mean, std):
    """The same at each pixel: (B, C, h, w) x2 -> (B, h, w), mean over channels."""
    square, std = square_residual(x_next, mean, std)
    std = std.view(-1, 1, 1) if std.ndim else std
    return -0.5 * square.mean(1) / std.square() - std.log() - 0.5 * math.log(2 * math.pi)


def gaussian_kl(mean, mean_ref, std):
    """KL(N(mean, std) || N(mean_ref, std)): (B, ...) x2, std > 0 a number or one a row -> (B,), mean over elements."""
    return (mean - mean_ref).square().flatten(1).mean(1) / (2 * row_std(std, mean).square())


def flow_eta_step(x, v, t, s, eta, eps, t_next=None):
    """The DDIM/eta step on a rectified flow, written out: x0 and noise of the state, then the DDIM mean."""
    x = x if x.dtype == torch.float64 else x.float()
    v = v if v.dtype == torch.float64 else v.float()
    std = eta_coefficients(t, s, eta)[2]
    mean = (1 - s) * (x - t * v) + math.sqrt(max(0.0, s**2 - std**2)) * (x + (1 - t) * v)
    return mean + std * eps, mean, torch.tensor(std, dtype=mean.dtype)


def agreement(rel, answer):
    """Share of pairs on which two sets of answers agree; a 0 on either side counts one half: (..., P) x2 -> (...)."""
    return (0.5 + 0.5 * rel.float() * answer.float()).mean(-1)


STEPS = {"flow": flow_sde_step, "ddim": flow_eta_step}
