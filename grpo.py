"""What a group of sampled maps teaches: reward, credit, advantage, clipped loss and KL. No models inside.

A step of Algorithm 1 is four calls, in this order: sample_groups, score, advantage, policy_gradient.

agreement   of a map with the judge at a pair, p the judge's probability of the first answer (ReasonX reward):
                reward      map says                 agreement                        dead zone (relations.py)
                hard        relation (paper)         1/2 + relation sign(2p - 1) / 2  --dead-zone: one half, or skipped
                confidence  relation                 as hard, weighted by |2p - 1|    as hard
                soft        tanh(margin / tau)       1/2 + vote (2p - 1) / 2          none: the margin counts
                brier       tanh(margin / tau)       1 - (vote - (2p - 1))^2 / 4      none: the margin counts
            brier is a proper score: best when the map is as sure as the judge
credit      the reward is a sum of known per-pair terms, so it can be given back whole or in place:
                global  A[g] = centred reward of sample g, one number (paper)
                pair    A[g, y, x]: each pair's centred agreement, splatted around its two points (kernels/pair_credit)
log-ratio   = d (2 (x_next - mean_old) - d) / (2 std^2), d = mean - mean_old, the MEAN over elements, in fp32 or fp64:
            exactly 0 while the policy is the old one
KL          = (mean - mean_ref)^2 / (2 std^2), mean over elements: contains |dt| (Flow-GRPO's published code omits it)
squares     with noise that is one number per square of k x k pixels, density and ratio are those of the squares' means:
            a coarse change of the map has k times the signal. The KL stays that of white noise and holds all of v
Source: ReasonX (arXiv 2512.04222) sec. 3.2, Flow-GRPO (arXiv 2505.05470), DDPO for the likelihood-ratio form.
"""
from dataclasses import dataclass

import torch

from kernels import send
from kernels.log_ratio import log_ratio_kl
from kernels.pair_credit import pair_credit
from kernels.pair_reward import pair_reward
from kernels.squares import rows_by_side, square_means
from predictor import plan_walk, rollout
from relations import MODALITIES, NAMES, check_points
from runtime.ranks import autocast, mean_over_ranks

CREDIT_WIDTH = 1 / 32             # of the splat around a point, as a share of the state's width; at least one pixel
GAP = 0.1                         # most that two computations of a velocity in bf16 differ, relative (eager, CPU: 0)


@dataclass
class Batch:
    """M modalities of this rank's B photos, and what the judge says of their pairs. Rows are modality-major: (M*B)."""

    rgb: torch.Tensor        # (B, 3, H, W) sRGB [0, 1]
    places: torch.Tensor     # (B,) of the photos among all
    photos: list             # B names
    modalities: tuple        # M names
    index: torch.Tensor      # (M*B,) number of each row's modality in relations.MODALITIES
    pts: torch.Tensor        # (B, P, 2, 2) int32
    prob: torch.Tensor       # (B, P, len(NAMES)) of the first answer
    cfg: object              # runtime.config.Config
    draw: object             # ranks.Draw: the random numbers of the step
    cond: object = None      # (B, ...) of an encoder that is frozen, once it has been run

    def autocast(self):
        """A fresh context for forward passes; what needs no gradient keeps its 16-bit weights till the end of it."""
        return autocast(self.cfg.precision, self.rgb.device, not (self.cfg.checkpointing and torch.is_grad_enabled()))

    def encode(self, net):
        """Condition of the photos; all copies of a network share that of a frozen encoder."""
        with self.autocast():
            cond = net.encode(self.rgb) if self.cond is None else self.cond
        self.cond = cond if net.encodes_alike else None
        return cond

    def portions(self, n):
        """Slices of n states in portions of cfg.micro: the same in rollout and update, hence a ratio of 1."""
        size = self.cfg.micro or n
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def draw_batch(photos, modalities, cfg, draw, device):
    """Draw this rank's photos of a step, their pairs, and the modalities.

    photos   data.bank.Judgements;  modalities  of the predictor;  draw  ranks.Draw
    returns  Batch
    raises   ValueError  a point outside its photo
    """
    places = draw.integers(len(photos.rgb), (draw.batch,))
    chosen = places[:, None], draw.choices(cfg.bank_pairs, cfg.pairs)
    one = draw.integer(len(modalities))
    names = modalities if cfg.modalities == "joint" else modalities[one:one + 1]
    size = photos.rgb.shape[-2:]
    pts = photos.pts[chosen]
    if cfg.jitter > 1:                                                          # the answer holds around the point too
        near = draw.integers(cfg.jitter, (draw.batch, *pts.shape[1:]))
        pts = (pts + near - cfg.jitter // 2).clamp_min(0).minimum(torch.tensor(size) - 1)
    check_points("grpo.draw_batch", pts, size)
    index = torch.tensor([NAMES.index(m) for m in names]).repeat_interleave(len(places))
    return Batch(send(photos.rgb[places], device).float() / 255, places, [photos.names[i] for i in places], names,
                 send(index, device), send(pts.int(), device), send(photos.prob[chosen], device), cfg, draw)


class Conditioned:
    """A network that has seen the photos of a batch, encoded once: velocities of any states of its rows."""

    def __init__(self, net, batch):
        self.net = net
        self.batch = batch
        self._encoded = torch.cat([batch.encode(net)] * len(batch.modalities))  # (M*B, ...)
        self.cond = self._encoded.detach().requires_grad_(self._encoded.requires_grad)

    def velocity(self, x, t, part, n):
        """v of states x (N, c, h, w) at time t (float), fp32. part: slice of their places among n, a row's together."""
        row = torch.arange(part.start, part.stop, device=x.device) // (n // len(self.batch.index))
        with self.batch.autocast():
            times = torch.full((len(x),), t, device=x.device)
            return self.net.velocity(x, times, self.cond[row], self.batch.index[row]).float()

    def velocities(self, x, t):
        """v of all states, portion by portion."""
        return torch.cat([self.velocity(x[part], t, part, len(x)) for part in self.batch.portions(len(x))])

    def end_backward(self):
        """Send what the velocities' gradients have gathered through the photo encoder, once."""
        if self._encoded.requires_grad:
            self._encoded.backward(self.cond.grad)


def draw_squares(batch):
    """Side of the squares that share exploration noise, drawn for each row: (M*B,) int64; 1 where it must be white."""
    sizes = torch.tensor(batch.cfg.noise_blocks)
    sides = sizes[batch.draw.integers(len(sizes), (len(batch.modalities), batch.draw.batch), axis=1)]
    sides[[MODALITIES[m].white for m in batch.modalities]] = 1
    return sides.flatten()


@torch.no_grad()
def sample_groups(actor, batch):
    """Sample a group of G maps per photo and modality with the noisy sampler.

    returns  dict modality -> maps (B, G, C, H, W) in its encoding; list of predictor.Transition, (M*B) rows
    """
    cfg = batch.cfg
    M = len(batch.modalities)
    B = len(batch.rgb)
    net = Conditioned(actor, batch)
    exploration = actor.exploration if cfg.exploration == "auto" else cfg.exploration

    def normal(shape):                                                          # (K, N, ...): N states of M*B rows
        K, N, *rest = shape
        whole = K, M, batch.draw.batch, N // (M * B), *rest
        return batch.draw.normal(whole, batch.rgb.device, axis=2).reshape(shape)

    noise = normal((1, M * B, *actor.shape(batch.rgb)))[0]                      # a group shares it: (M*B, c, h, w)
    squares = draw_squares(batch)
    plan = plan_walk(actor.times(cfg.sample_steps), cfg.noisy_steps, exploration, cfg.noise, batch.draw,
                     cfg.tail)
    with batch.autocast():                                                      # what trains is cast once, not T times
        x0, transitions = rollout(net.velocities, actor.start(noise, cfg.sample_steps), plan, cfg.group, normal,
                                  squares)
    maps = {}
    for m, part, cond in zip(batch.modalities, x0.split(B), net.cond.split(B), strict=True):
        with batch.autocast():                                                  # only the drawn modality is decoded
            maps[m] = actor.decode(part.flatten(0, 1), m, cond).float().unflatten(0, (B, cfg.group))
    return maps, transitions


@dataclass
class Score:
    """What the judge's answers make of a group's maps of one modality."""

    agree: torch.Tensor      # (B, G, P) agreement of each pair in [0, 1]
    weight: torch.Tensor     # (B, P) share of each pair in the reward, rows sum to 1 (or are all 0)
    reward: torch.Tensor     # (B, G) their weighted sum


def normalize_rows(weight):
    """Weights (B, P) >= 0 scaled to rows that sum to 1, without their NaN; a row of zeros stays."""
    return weight / weight.nansum(1, keepdim=True).clamp_min(1e-6)


def pair_weights(prob, modality, cfg):
    """Share of each pair in the reward: prob (B, P) of the first answer -> (B, P), rows sum to 1 (or are all 0).

    A pair without an answer (NaN) has none.
    """
    known = prob.isfinite()
    weight = known / known.sum(1, keepdim=True).clamp_min(1)
    if cfg.balance and MODALITIES[modality].yes_no:                             # both answers carry half of the reward
        weight = (0.5 * (normalize_rows(prob) + normalize_rows(1 - prob))).where(known, 0.0)
    if cfg.reward == "confidence":
        weight = normalize_rows(weight * (2 * prob - 1).abs().where(known, 0.0))
    return weight


def agreement(pred, pts, prob, modality, cfg):
    """Agreement of each sample's map with the judge (ReasonX reward; table in the module docstring).

    pred     (B, G, C, H, W) in the modality's encoding;  pts (B, P, 2, 2) its pixels;  prob (B, P) of the first answer
    returns  agree (B, G, P) in [0, 1], weight (B, P) of each pair, reward (B, G) = their weighted sum
    differs: the paper does not say what a pair in the dead zone counts. Here one half, like an unsure answer;
    or --dead-zone skip: as much as the sample's other pairs on average, so that the reward is the mean over those
    """
    weight = pair_weights(prob, modality, cfg)
    skip = cfg.reward in ("hard", "confidence") and cfg.dead_zone == "skip"
    rel, agree, reward = pair_reward(pred, pts, prob, weight, modality, cfg.reward, MODALITIES[modality].tau,
                                     relation=skip)
    if skip:
        share = weight[:, None] * (rel != 0)                                    # (B, G, P)
        others = (agree * share).sum(-1, keepdim=True) / share.sum(-1, keepdim=True)        # NaN: the map answers none
        agree = torch.where(rel == 0, others.nan_to_num(0.5), agree)
        reward = (agree * weight[:, None]).sum(-1)
    return agree, weight, reward


def score(maps, batch, modality):
    """g_m answers the judge's question from each map; the reward is where the two agree.

    maps     dict modality -> (B, G, C, H, W), of which `modality` is scored;  returns  Score
    """
    cfg = batch.cfg
    prob = batch.prob[..., NAMES.index(modality)]
    return Score(*agreement(maps[modality], batch.pts, prob, modality, cfg))


def is_unanimous(reward):
    """Groups whose samples got the same reward, but for the rounding of a sum over pairs: (B, G) -> (B,) bool."""
    return (reward - reward[:, :1]).abs().amax(1) < 1e-6


def group_advantage(reward, norm="group"):
    """Centre rewards in their group and scale them (ReasonX eq. for A_i; GRPO).

    reward   (B, G) in [0, 1]
    norm     "group": by the group's population std (paper); "global": by the std over all centred rewards; "none"
    returns  (B, G), zero mean per row; a unanimous row (equal to 1e-6) is exactly zero, not rounding noise scaled up
    raises   ValueError when G < 2 or norm is unknown
    """
    if reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(f"grpo.group_advantage: got rewards {tuple(reward.shape)}; want (B, G) with G >= 2")
    centred = (reward - reward.mean(1, keepdim=True)).masked_fill(is_unanimous(reward)[:, None], 0.0)
    return scale_credit(centred, norm)


def scale_credit(credit, norm):
    """Centred credit (B, G, ...) divided by its rms in each group, over all rows of all ranks, or not; 0 stays 0."""
    if norm not in ("group", "global", "none"):
        raise ValueError(f"grpo.scale_credit: got norm {norm!r}; want group, global or none")
    if norm == "none":
        return credit
    square = credit.square().mean(tuple(range(0 if norm == "global" else 1, credit.ndim)), keepdim=True)
    rms = (mean_over_ranks(square) if norm == "global" else square).sqrt()
    return torch.where(rms > 0, credit / rms.clamp_min(1e-12), 0.0)


def advantage(scored, batch, transitions):
    """Advantage relative to the group: one number per sample (paper), or one per pixel of the state.

    scored   dict modality -> Score
    returns  (M*B, G) for --credit global, else (M*B, G, h, w), for all transitions; None when nothing is scored
    """
    cfg = batch.cfg
    rows = []
    for one in scored.values():
        if cfg.credit == "global":
            rows.append(group_advantage(one.reward, cfg.norm))
        else:
            size = transitions[0].x.shape[-2:]
            pts = batch.pts * size[1] // batch.rgb.shape[-1]                    # photo pixels -> pixels of the state
            local = pair_credit(one.agree, one.weight, pts, size, max(1.0, CREDIT_WIDTH * size[1]))
            rows.append(scale_credit(local, cfg.norm))
    return torch.cat(rows) if rows else None


def clipped_loss(logp, logp_old, advantage, clip):
    """Clipped policy objective, to be minimised: mean of -min(rho A, clip(rho, 1 - clip, 1 + clip) A) (PPO eq. 7).

    logp, logp_old  (B,) or per pixel, or their difference and 0;  advantage: the same shape
    returns a scalar; at rho = 1 its value is -mean(A)
    """
    ratio = (logp - logp_old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def square_log_ratio(v, step, side, per_pixel):
    """Log-ratio of a transition whose noise is one number per square of `side` pixels: that of the squares' means.

    returns (R, K), or per square (R, K, ceil(h / k), ceil(w / k)) if per_pixel; exactly 0 while v is step.v
    """
    noise = square_means(step.x_next - step.mean[:, None], side)
    change = square_means(v - step.v, side)
    zero = torch.zeros_like(change)                                             # the same around a mean of zero
    return log_ratio_kl(noise, zero, change, zero, zero, 0.0, step.B, step.std, per_pixel)[0]


def step_loss(v, v_ref, step, advantage, clip, kl_weight):
    """Loss of one trained step: clipped objective plus kl_weight times the KL to the reference.

    v, v_ref   (R, c, h, w) velocity of the policy (with gradient) and of the reference at step.x
    step       predictor.Transition
    advantage  (R, K), or (R, K, h, w) for credit per pixel
    returns    scalar loss, dict of 0-dim diagnostics (ratio_min, ratio_max, clip_frac, kl)
    """
    per_pixel = advantage.ndim > 2
    log_ratio, kl = log_ratio_kl(step.x_next, step.x, v, step.mean, v_ref, step.A, step.B, step.std, per_pixel)
    policy = 0.0
    outside = 0.0
    ratios = []
    for k, rows in rows_by_side(step.squares, v.device):
        part = log_ratio[rows]
        credit = advantage[rows]
        if k > 1:
            part = square_log_ratio(v[rows], step.cut(rows), k, per_pixel)
            credit = square_means(credit, k) if per_pixel else credit
        share = len(rows) / len(v)
        ratio = part.detach().exp()
        policy = policy + share * clipped_loss(part, 0.0, credit, clip)
        outside = outside + share * ((ratio - 1).abs() > clip).float().mean()
        ratios += ratio.min(), ratio.max()
    kl = kl.mean()
    ratios = torch.stack(ratios)
    return policy + kl_weight * kl, dict(ratio_min=ratios.min(), ratio_max=ratios.max(), kl=kl.detach(),
                                         clip_frac=outside)


def policy_gradient(nets, batch, transitions, advantage, run, update=0):
    """Gradient of the clipped objective plus beta times KL to the reference: the mean over the trained steps.

    nets     .policy, .reference;  advantage  of `advantage`
    run      its `backward` gathers the gradient portion by portion, so one portion is in memory; its `bound` stops all
    update   number of this update since the rollout. At the first one the policy as it is now counts as the one that
             acted, which may round otherwise (--compile, a GPU): the run stops when they are further apart than that
    returns  dict of what the log shows; policy/gap is the distance of the two velocities, relative to their length
    """
    cfg = batch.cfg
    policy = Conditioned(nets.policy, batch)
    with torch.no_grad():
        reference = Conditioned(nets.reference, batch)
    loss = 0.0
    found = []
    for step in transitions:
        n = len(step.x)
        credit = advantage if n == len(batch.index) else advantage.flatten(0, 1)[:, None]
        for part in batch.portions(n):
            v = policy.velocity(step.x[part], step.t, part, n)
            with torch.no_grad():
                v_ref = reference.velocity(step.x[part], step.t, part, n)
            rows = step.cut(part, step.squares[part])
            gap = {}
            if update == 0:
                gap = dict(gap=(v.detach() - rows.v).norm() / rows.v.norm().clamp_min(1e-12))
                rows = rows.with_velocity(v.detach())
                step.v[part] = rows.v
                step.mean[part] = rows.mean
            term, stats = step_loss(v, v_ref, rows, credit[part], cfg.clip, cfg.kl_weight)
            share = term * ((part.stop - part.start) / n / len(transitions))
            run.backward(share)
            loss = loss + share.detach()
            found.append(stats | gap)
    policy.end_backward()
    ends = dict(ratio_min=torch.amin, ratio_max=torch.amax, gap=torch.amax)
    stats = {}
    for k in found[0]:
        values = [one[k] for one in found]
        stats[f"policy/{k}"] = ends[k](torch.stack(values)) if k in ends else sum(values) / len(values)
    most = GAP if cfg.compile or batch.rgb.device.type == "cuda" else 0
    if update == 0:
        run.bound(stats["policy/gap"], most, "the ratio is not 1 before the first update: rollout and update computed "
                  f"velocities {{:.2g}} apart, want {most:g}")
    return dict(loss=loss, **stats)
