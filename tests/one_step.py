"""One GRPO step as train.train_grpo takes it: the four calls of grpo.py on photos and answers of one's own."""
from dataclasses import replace
from types import SimpleNamespace

import torch

import grpo
from data.bank import Judgements
from evaluation.watch import reward_statistics
from runtime.ranks import Draw


def batch_of(cfg, policy, rgb, pts, prob, rng, device="cpu"):
    """A batch of cfg.batch photos, drawn from rgb (n, 3, S, S) uint8 with their pts (n, P, 2, 2) and prob (n, P, 4)."""
    judged = Judgements(rgb, pts, prob, [f"photo {i}" for i in range(len(rgb))])
    return grpo.draw_batch(judged, policy.modalities, cfg, Draw(rng, cfg.batch), torch.device(device))


def explore(actor, batch, rng):
    """Sample, score, credit: transitions, advantage, what the log shows of the rewards."""
    batch = replace(batch, draw=Draw(rng, batch.draw.batch))
    maps, transitions = grpo.sample_groups(actor, batch)
    scored = {m: grpo.score(maps, batch, m) for m in maps}
    return transitions, grpo.advantage(scored, batch, transitions), reward_statistics(scored)


class Gather:
    """Stands in for a Run: `backward` gathers the gradient, `bound` keeps what Run reads at the update."""

    def __init__(self):
        self.losses = []
        self.bounds = []

    def backward(self, loss):
        self.losses.append(loss.detach())
        loss.backward()

    def bound(self, values, most, text):
        self.bounds.append((values, most))
        if not values.is_cuda:
            assert values <= most, text.format(float(values))


def learn(policy, reference, batch, transitions, advantage, update=1, run=None):
    """Gather the gradient of an update; returns the log. At update 0 the policy counts as the one that acted."""
    nets = SimpleNamespace(policy=policy, reference=reference)
    return grpo.policy_gradient(nets, batch, transitions, advantage, run or Gather(), update)
