"""What is not reinforcement learning, for honest comparison: two losses on the same rows, predictor and trainer.

ranking     minus the reward itself (--reward soft, brier) through a differentiable one-step prediction x_0 = x_t - t v
            from a state of the policy's own ODE, with an anchor |v - v_ref|^2 weighted by kl_weight. No sampling
            noise, no group: what a judge's answers are worth by plain backpropagation
supervised  flow matching on the photos' true maps, which procedural photos have: the upper reference
"""
import torch

import rewards
from predictor import NAMES


def ranking(policy, ref, rows, cfg, rng):
    """Ranking loss of the judge's answers through a one-step prediction.

    rows     grpo_step.Rows;  returns a scalar with gradient, dict of what the log shows
    """
    n, B = len(rows.index), len(rows.rgb)
    cond, grid = rows.encode(policy), policy.times(cfg.sample_steps)
    at = int(torch.randint(cfg.sample_steps, (1,), generator=rng))
    with torch.no_grad():
        cond_ref = rows.encode(ref)
        noise = rows.normal((1, n, *policy.shape(rows.rgb)), rng)[0]
        x = policy.start(noise, cfg.sample_steps)
        for t, s in zip(grid[:at], grid[1:at + 1], strict=True):
            x = x + (s - t) * rows.all_velocities(policy, cond, x, t)
        v_ref = rows.all_velocities(ref, cond_ref, x, grid[at])
    v = rows.all_velocities(policy, cond, x, grid[at])
    anchor, loss, stats = (v - v_ref).square().mean(), 0.0, {}
    for m, part in zip(rows.names, (x - grid[at] * v).split(B), strict=True):
        with rows.amp:
            pred = policy.decode(part, m).float()[:, None]                      # (B, 1, C, H, W)
        reward = rewards.judged(pred, rows.pts, rows.prob[..., NAMES.index(m)], m, cfg)[2].mean()
        loss, stats[f"reward/{m}"] = loss - 2 * reward, reward.detach()
    return loss / len(rows.names) + cfg.kl_weight * anchor, {"policy/anchor": anchor.detach(), **stats}


def supervised(policy, truth, rows, rng):
    """Flow-matching loss on the true maps of the photos: truth is their pools.ScenePool; returns as `ranking`."""
    with rows.amp:
        loss = policy.loss(truth.pick(rows.picked, rows.rgb.device), rows.names, rng)
    return loss, {"loss/flow": loss.detach()}


def loss(policy, ref, truth, rows, cfg, rng, backward):
    """One step of --method ranking or supervised: gathers the gradient; returns the loss, what the log shows of it."""
    value, stats = ranking(policy, ref, rows, cfg, rng) if cfg.method == "ranking" else supervised(
        policy, truth, rows, rng)
    backward(value)
    return value.detach(), stats
