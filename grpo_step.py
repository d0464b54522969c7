"""One step of GRPO on a predictor: the rows it learns from, exploration against the judge, the surrogate loss.

A row is a photo in one modality. Every rank draws the random numbers of the whole batch and takes its share
(runtime.py), so any number of processes takes the same step.
"""
import torch

import grpo
import rewards
import runtime
from predictor import NAMES


class Rows:
    """The (modality, photo) rows of one step: M modalities of B photos, modality-major; this rank's of `batch` photos.

    rgb (B, 3, H, W); picked (B,) their places; names: M modalities; index (M*B,) modality of each row;
    pts (B, P, 2, 2); prob (B, P, 4)
    """

    def __init__(self, cfg, modalities, photos, bank_pts, bank_prob, batch, rng, device):
        picked = self.picked = runtime.share(torch.randint(len(photos), (batch,), generator=rng))
        n = cfg.bank_pairs if cfg.mine else cfg.pairs
        chosen = runtime.share(torch.stack([torch.randperm(cfg.bank_pairs, generator=rng)[:n] for _ in range(batch)]))
        one = int(torch.randint(len(modalities), (1,), generator=rng))
        self.rgb = photos[self.picked].to(device).float() / 255
        self.names = modalities if cfg.modalities == "joint" else modalities[one:one + 1]
        self.index = torch.tensor([NAMES.index(m) for m in self.names], device=device).repeat_interleave(
            len(picked))
        self.pts = bank_pts[picked[:, None], chosen].to(device)
        self.prob = bank_prob[picked[:, None], chosen].to(device)
        if cfg.jitter > 1:                                                      # the answer holds around the point too
            near = runtime.share(torch.randint(cfg.jitter, (batch, *self.pts.shape[1:]), generator=rng))
            last = torch.tensor(self.rgb.shape[-2:], device=device) - 1
            self.pts = (self.pts + near.to(device) - cfg.jitter // 2).clamp_min(0).minimum(last)
        self.cfg, self.micro = cfg, cfg.micro

    @property
    def amp(self):
        """A fresh context for forward passes of the networks."""
        return runtime.autocast(self.cfg.precision, self.rgb.device, not self.cfg.checkpointing)

    def normal(self, shape, rng):
        """Standard normal numbers (K, N, ...) for N states, k a row, as their places in the whole batch have them."""
        (K, N, *rest), M, B = shape, len(self.names), len(self.rgb)
        drawn = runtime.normal((K, M, B * runtime.world(), N // (M * B), *rest), rng, self.rgb.device)
        return runtime.share(drawn, 2).reshape(shape)

    def encode(self, net):
        """Condition of every row: (M*B, ...)."""
        with self.amp:
            cond = net.encode(self.rgb)
        return torch.cat([cond] * len(self.names))

    def parts(self, n):
        """Indices of n states in portions of cfg.micro: rollout and update see the same batches, hence a ratio of 1."""
        return torch.arange(n, device=self.index.device).split(self.micro or n)

    def velocity(self, net, cond, x, t, part, n):
        """v of states x (N, c, h, w) at time t (float); part (N,): their places among all n, a row's side by side."""
        row = part // (n // len(self.index))
        with self.amp:
            return net.velocity(x, torch.full((len(x),), t, device=x.device), cond[row], self.index[row]).float()

    def all_velocities(self, net, cond, x, t):
        """v of all states, portion by portion."""
        return torch.cat([self.velocity(net, cond, x[part], t, part, len(x)) for part in self.parts(len(x))])


STOCHASTIC = dict(full=lambda cfg: cfg.sample_steps - 1, branch=lambda cfg: 1, window=lambda cfg: cfg.stochastic)


def noise_blocks(cfg, names, B, rng):
    """Side of the squares that share exploration noise, drawn for each row: (M*B,) int64.

    White for albedo: whether two colours are the same is a matter of fine differences, which coarse noise drowns.
    """
    sizes = torch.tensor([int(k) for k in cfg.noise_blocks.split(",")])
    drawn = sizes[torch.randint(len(sizes), (len(names), B * runtime.world()), generator=rng)]      # for all ranks
    drawn[[m == "albedo" for m in names]] = 1
    return runtime.share(drawn, 1).flatten()


@torch.no_grad()
def explore(policy, rows, cfg, step, rng, check=lambda values: None):
    """Sample a group per row, compare it with the judge.

    check    called with what must be finite: dict name -> (B, ...)
    returns  trained steps; the advantage of each, (M*B, G) or (M*B, G, h, w); dict of reward statistics
    """
    cond, B, starts = rows.encode(policy), len(rows.rgb), 1 if cfg.init_noise == "shared" else cfg.group
    noise = rows.normal((starts, len(rows.index), *policy.shape(rows.rgb)), rng)
    noise = noise[0] if starts == 1 else noise.transpose(0, 1)                  # (M*B, c, h, w) or (M*B, G, c, h, w)
    with rows.amp:                                                              # what trains is cast once, not T times
        x0, taken = grpo.rollout(lambda x, t: rows.all_velocities(policy, cond, x, t),
                                 policy.start(noise, cfg.sample_steps), policy.times(cfg.sample_steps), cfg.group,
                                 STOCHASTIC[cfg.rollout](cfg), step, cfg.noise, rng, cfg.tail,
                                 noise_blocks(cfg, rows.names, B, rng), lambda shape: rows.normal(shape, rng))
    size, pred, credit, stats, checked = x0.shape[-2:], {}, {}, {}, {}          # x0 (M*B, G, c, h, w)
    for m, part in zip(rows.names, x0.split(B), strict=True):
        with rows.amp:                                                          # only the drawn modality is decoded
            pred[m] = policy.decode(part.flatten(0, 1), m).float().unflatten(0, (B, cfg.group))     # (B, G, C, H, W)
        agree, weight, reward = rewards.judged(pred[m], rows.pts, rows.prob[..., NAMES.index(m)], m, cfg)
        checked |= {f"{m} map": pred[m], f"{m} reward": reward}
        stats |= {f"reward/{m}": reward.mean(), f"reward/{m}_spread": reward.std(1, correction=0).mean(),
                  f"reward/{m}_unanimous": grpo.is_unanimous(reward).float().mean()}
        pts = rows.pts
        if cfg.mine:
            agree, weight, pts = rewards.mine(agree, weight, pts, cfg.pairs)
        pts = pts * size[1] // rows.rgb.shape[-1]                               # photo pixels -> pixels of the state
        levels = [one.s if cfg.credit_growth else 0.0 for one in taken]         # one splat serves steps of one width
        of = {level: rewards.advantage(agree, weight, pts, size, level, cfg) for level in dict.fromkeys(levels)}
        credit[m] = [of[level] for level in levels]
    check(checked)
    for name, share, between, agree in rewards.consistency(pred, rows.rgb, cfg):
        extra = share * rewards.map_advantage(agree, size, cfg)
        credit |= {m: [adv + extra for adv in credit[m]] for m in between}
        stats[f"reward/{name}"] = agree.mean()
    advantage = [torch.cat(parts) for parts in zip(*credit.values(), strict=True)]
    return taken, advantage, stats | {"reward": mean([stats[f"reward/{m}"] for m in rows.names])}


def surrogate(policy, ref, rows, taken, advantage, cfg, step, backward, anchor=False):
    """Loss of the trained steps (mean); its gradient is gathered portion by portion, so one portion is in memory.

    taken, advantage  of `explore`
    backward  called with each portion's share of the loss
    anchor    True: the policy as it is now counts as the one that acted, which may round otherwise (--compile, a GPU);
              `taken` is changed, and `policy/gap` is the distance of the two velocities, relative to their length
    returns   the loss, and what the log shows of it
    """
    cond, loss, parts = rows.encode(policy), 0.0, []
    leaf = cond.detach().requires_grad_(cond.requires_grad)                     # the photo encoder is walked back once
    with torch.no_grad():
        cond_ref = rows.encode(ref)
    for one, credit in zip(taken, advantage, strict=True):
        n = len(one.x)
        credit = credit if n == len(rows.index) else credit.flatten(0, 1)[:, None]
        for part in rows.parts(n):
            v = rows.velocity(policy, leaf, one.x[part], one.t, part, n)
            with torch.no_grad():
                v_ref = rows.velocity(ref, cond_ref, one.x[part], one.t, part, n)
            mine = one.rows(part)
            if anchor:
                gap = (v.detach() - mine.v).norm() / mine.v.norm().clamp_min(1e-12)
                mine = grpo.acted(mine, v.detach(), step, cfg.noise)
                one.v[part], one.mean[part] = mine.v, mine.mean
            term, stats = grpo.step_loss(v, v_ref, mine, step, cfg.noise, credit[part], cfg.clip, cfg.kl_weight)
            stats |= dict(gap=gap) if anchor else {}
            share = term * (len(part) / n / len(taken))
            backward(share)
            loss = loss + share.detach()
            parts.append(stats)
    if cond.requires_grad:
        cond.backward(leaf.grad)
    return loss, {f"policy/{k}": f(torch.stack([p[k] for p in parts])) for k, f in dict(
        ratio_min=torch.amin, ratio_max=torch.amax, clip_frac=mean, kl=mean, gap=torch.amax).items() if k in parts[0]}


def mean(values):
    """Mean of a list of numbers or tensors."""
    return sum(values) / len(values)
