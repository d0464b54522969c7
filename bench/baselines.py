"""Two losses that are not reinforcement learning, to compare with: same batches, same predictor, same trainer.

ranking     minus the reward itself (--reward soft, brier) through a differentiable one-step prediction x_0 = x_t - t v
            from a state of the policy's own ODE, with an anchor |v - v_ref|^2 weighted by kl_weight. No sampling
            noise, no group: what a judge's answers are worth by plain backpropagation
supervised  flow matching on the photos' true maps, which procedural photos have: the upper reference
Each takes the place of grpo.policy_gradient in train.train_grpo, and `sample_nothing` that of grpo.sample_groups.
"""
import itertools

import torch

from grpo import Conditioned, agreement
from relations import NAMES
from train import supervised_loss


def sample_nothing(actor, batch):
    """In place of grpo.sample_groups: no maps and no transitions, since these losses need none."""
    return {}, []


def ranking_loss(policy, reference, batch):
    """Ranking loss of the judge's answers through a one-step prediction.

    policy, reference  grpo.Conditioned;  batch  grpo.Batch
    returns            a scalar with gradient, dict of what the log shows
    """
    cfg = batch.cfg
    net = policy.net
    M = len(batch.modalities)
    B = len(batch.rgb)
    grid = net.times(cfg.sample_steps)
    at = batch.draw.integer(cfg.sample_steps)
    with torch.no_grad():
        shape = M, batch.draw.batch, *net.shape(batch.rgb)
        noise = batch.draw.normal(shape, batch.rgb.device, axis=1).flatten(0, 1)
        x = net.start(noise, cfg.sample_steps)
        for t, s in itertools.pairwise(grid[:at + 1]):
            x = x + (s - t) * policy.velocities(x, t)
        v_ref = reference.velocities(x, grid[at])
    v = policy.velocities(x, grid[at])
    anchor = (v - v_ref).square().mean()
    loss = 0.0
    stats = {}
    for m, part in zip(batch.modalities, (x - grid[at] * v).split(B), strict=True):
        with batch.autocast():
            pred = net.decode(part, m).float()[:, None]                         # (B, 1, C, H, W)
        reward = agreement(pred, batch.pts, batch.prob[..., NAMES.index(m)], m, cfg)[2].mean()
        loss = loss - 2 * reward
        stats[f"reward/{m}"] = reward.detach()
    return loss / M + cfg.kl_weight * anchor, {"policy/anchor": anchor.detach(), **stats}


def ranking_gradient(nets, batch, transitions, advantage, run, update=0):
    """Gradient of `ranking_loss`; arguments and returns as grpo.policy_gradient."""
    policy = Conditioned(nets.policy, batch)
    with torch.no_grad():
        reference = Conditioned(nets.reference, batch)
    loss, stats = ranking_loss(policy, reference, batch)
    run.backward(loss)
    policy.end_backward()
    return stats | {"loss": loss.detach()}


def supervised_gradient(truth):
    """A gradient as grpo.policy_gradient, of flow matching on the true maps of the photos: truth a pools.ScenePool."""
    def gradient(nets, batch, transitions, advantage, run, update=0):
        loss = supervised_loss(nets.policy, truth.pick(batch.places, batch.rgb.device), batch)
        run.backward(loss)
        return {"loss/flow": loss.detach(), "loss": loss.detach()}
    return gradient
