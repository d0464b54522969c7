"""Formulas that the code no longer computes by themselves, as oracles."""
import math

import torch

from predictor import flow_sde_step


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
    x, v = (z if z.dtype == torch.float64 else z.float() for z in (x, v))
    if not 0 <= s < t <= 1:
        raise ValueError("want 0 <= s < t <= 1")
    std = eta * s / t * math.sqrt(max(0.0, t**2 - ((1 - t) / (1 - s) * s) ** 2))
    mean = (1 - s) * (x - t * v) + math.sqrt(max(0.0, s**2 - std**2)) * (x + (1 - t) * v)
    return mean + std * eps, mean, torch.tensor(std, dtype=mean.dtype)


def flow_euler_step(x, v, t, s, a, eps, t_next=None):
    """Flow-GRPO's step, written out: drift correction by sigma_t, then Euler-Maruyama."""
    dt = s - t
    room = 1 - (t if t < 1 else (s if t_next is None else t_next))
    sigma2 = a * a * t / room
    mean = x + dt * (v + sigma2 / (2 * t) * (x + (1 - t) * v))
    std = math.sqrt(sigma2 * -dt)
    return mean + std * eps, mean, torch.tensor(std, dtype=mean.dtype)


def agreement(rel, answer):
    """Share of pairs on which two sets of answers agree; a 0 on either side counts one half: (..., P) x2 -> (...)."""
    return (0.5 + 0.5 * rel.float() * answer.float()).mean(-1)


STEPS = {"flow": flow_sde_step, "ddim": flow_eta_step}
WRITTEN_OUT = {"flow": flow_euler_step, "ddim": flow_eta_step}
