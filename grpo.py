"""Group-relative policy optimisation of a diffusion sampler (GRPO with Flow-GRPO's exploration). No models inside.

time        x_t = (1 - t) x_0 + t x_1, v = x_1 - x_0; one step goes from t to s < t, dt = s - t < 0
Flow-GRPO   sigma_t = a sqrt(t / (1 - t));  std = sigma_t sqrt(|dt|)
            mean = x + [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt
DDIM / eta  std = eta sqrt((1-abar_s)/(1-abar_t) (1 - abar_t/abar_s))
            mean = sqrt(abar_s) x0 + sqrt(1-abar_s-std^2) eps
t = 1       is singular in the first form: the next grid value stands in for t in the denominator
s = 0       is deterministic (x_0-hat) and is not trained: its noise would stay in the map
log p       = -(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2, MEAN over elements, fp32 (or fp64) always
log-ratio   = d (2 (x_next - mean_old) - d) / (2 std^2), d = mean - mean_old: exactly 0 while the policy is the old one
KL          = (mean - mean_ref)^2 / (2 std^2), mean over elements: contains |dt| (Flow-GRPO's published code omits it)
blocks      with noise that is one number per square of k x k pixels, density and ratio are those of the squares' means:
            a coarse change of the map has k times the signal. The KL stays that of white noise and holds all of v
reward      of sample g: mean over pairs of the agreement of relation(map_g) with the judge
credit      one advantage per sample (paper), or one per pixel that weighs the log-ratio there (rewards.py)
rollout     `full` (paper): every step but the last is stochastic. `branch`: the group shares noise and an ODE prefix,
            one step is stochastic, an ODE tail finishes; only that step is trained, and its state is shared, so its
            update costs 1/G. `window`: K such steps in a row.
Source: ReasonX (arXiv 2512.04222) sec. 3.2, Flow-GRPO (arXiv 2505.05470), DDPO for the likelihood-ratio form.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kernels.log_ratio import log_ratio_kl
from kernels.sde_step import sde_step
from kernels.step_logprob import step_logprob


def _fp32(x):
    return x if x.dtype == torch.float64 else x.float()


def flow_sde_step(x, v, t, s, a, eps, t_next=None):
    """One Euler-Maruyama step with Flow-GRPO's noise (Flow-GRPO eq. 9).

    x, v, eps  (B, ...)  state at t, velocity, standard normal noise;  t, s floats, 0 <= s < t <= 1;  a >= 0 noise scale
    t_next     stand-in for t in the denominator when t == 1 (default: s)
    returns    x_next (B, ...), mean (B, ...), std 0-dim, times sqrt(|dt|); a = 0 or s = 0 is the ODE step, std 0
    raises     ValueError when not 0 <= s < t <= 1
    """
    if not 0 <= s < t <= 1:
        raise ValueError(f"grpo.flow_sde_step: got t = {t}, s = {s}; want 0 <= s < t <= 1 "
                         "(sampling walks t from 1 to 0)")
    x, v = _fp32(x), _fp32(v)
    dt = s - t
    if a == 0 or s == 0:
        mean = x + dt * v
        return mean, mean, torch.zeros((), dtype=x.dtype, device=x.device)
    room = 1 - (t if t < 1 else (s if t_next is None else t_next))              # 1 - t of sigma_t's denominator
    mean = x + dt * (v + a * a / (2 * room) * (x + (1 - t) * v))
    std = torch.tensor(a * math.sqrt(t / room * -dt), dtype=x.dtype, device=x.device)
    return mean + std * eps, mean, std


def _eta_step(x0, noise, signal, level, signal_s, level_s, eta, eps):
    """DDIM step between (signal, level) pairs x = signal x0 + level noise; coefficients are Python floats (fp64)."""
    gap = max(0.0, level**2 - (signal / signal_s * level_s) ** 2) if signal_s > 0 else 0.0
    var = min(eta**2 * level_s**2 / level**2 * gap, level_s**2)
    mean = signal_s * x0 + math.sqrt(max(0.0, level_s**2 - var)) * noise
    std = torch.tensor(math.sqrt(var), dtype=x0.dtype, device=x0.device)
    return mean + std * eps, mean, std


def ddim_sde_step(x, v, abar_t, abar_s, eta, eps):
    """One DDIM step with noise eta, for v-prediction: v = sqrt(abar) noise - sqrt(1 - abar) x0 (DDIM eq. 12, 16).

    x, v, eps       (B, ...);  abar_t < abar_s floats or 0-dim tensors in [0, 1]; abar_t = 0 (zero-terminal SNR) is fine
    returns         x_next, mean (B, ...), std 0-dim; abar_s = 1 is deterministic (std 0)
    raises          ValueError when not 0 <= abar_t < abar_s <= 1
    Coefficients are computed in fp64 and radicands clamped: in fp32 eta = 1 with abar_t = 0 rounds below zero.
    """
    abar_t, abar_s = float(abar_t), float(abar_s)
    if not 0 <= abar_t < abar_s <= 1:
        raise ValueError(f"grpo.ddim_sde_step: got abar_t = {abar_t}, abar_s = {abar_s}; "
                         "want 0 <= abar_t < abar_s <= 1")
    x, v = _fp32(x), _fp32(v)
    signal, level = math.sqrt(abar_t), math.sqrt(1 - abar_t)
    return _eta_step(signal * x - level * v, level * x + signal * v, signal, level,
                     math.sqrt(abar_s), math.sqrt(1 - abar_s), eta, eps)


def flow_eta_step(x, v, t, s, eta, eps, t_next=None):
    """The DDIM/eta step on a rectified flow (signal 1 - t, noise level t): same arguments as flow_sde_step."""
    if not 0 <= s < t <= 1:
        raise ValueError(f"grpo.flow_eta_step: got t = {t}, s = {s}; want 0 <= s < t <= 1")
    x, v = _fp32(x), _fp32(v)
    return _eta_step(x - t * v, x + (1 - t) * v, 1 - t, t, 1 - s, s, eta, eps)


STEPS = {"flow": flow_sde_step, "ddim": flow_eta_step}


def coefficients(step, t, s, noise):
    """Floats A, B, std of a step: all are linear, mean = A x + B v, so A and B are the means of (1, 0) and (0, 1)."""
    one_x, one_v = torch.eye(2, dtype=torch.float64)
    _, mean, std = step(one_x, one_v, t, s, noise, torch.zeros(2, dtype=torch.float64))
    return *mean.tolist(), float(std)


def _row_std(std, like):
    """A standard deviation given as a number, 0-dim, (B,) or (B, 1, ...) -> 0-dim or (B,), in the dtype of `like`."""
    std = torch.as_tensor(std, dtype=like.dtype, device=like.device)
    return std.flatten() if std.ndim else std


def log_prob(x_next, mean, std):
    """Log-density of a step: (B, ...) x2, std > 0 one number or one a row -> (B,), mean over elements.

    The gradient goes into mean only: x_next and std are data.
    """
    return step_logprob(x_next, mean, _row_std(std, mean))


def gaussian_kl(mean, mean_ref, std):
    """KL(N(mean, std) || N(mean_ref, std)): (B, ...) x2, std > 0 a number or one a row -> (B,), mean over elements."""
    return (mean - mean_ref).square().flatten(1).mean(1) / (2 * _row_std(std, mean).square())


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
    if norm not in ("group", "global", "none"):
        raise ValueError(f"grpo.group_advantage: got norm {norm!r}; want group, global or none")
    unanimous = is_unanimous(reward)[:, None]
    adv = (reward - reward.mean(1, keepdim=True)).masked_fill(unanimous, 0.0)
    if norm == "none":
        return adv
    scale = adv.square().mean(1, keepdim=True).sqrt() if norm == "group" else adv.square().mean().sqrt()
    return torch.where(scale > 0, adv / scale.clamp_min(1e-12), 0.0)


def clipped_loss(logp, logp_old, advantage, clip):
    """Clipped policy objective, to be minimised: mean of -min(rho A, clip(rho, 1 - clip, 1 + clip) A) (PPO eq. 7).

    logp, logp_old  (B,) or per pixel, or their difference and 0;  advantage: the same shape
    returns a scalar; at rho = 1 its value is -mean(A)
    """
    ratio = (logp - logp_old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


@dataclass
class Step:
    """One stochastic step that will be trained. R rows share a state; K samples leave each row (branch: K = G)."""

    t: float
    s: float
    x: torch.Tensor          # (R, c, h, w) state at t
    x_next: torch.Tensor     # (R, K, c, h, w)
    mean: torch.Tensor       # (R, c, h, w) of the policy that acted
    std: float
    v: torch.Tensor          # (R, c, h, w) of the policy that acted
    block: torch.Tensor      # (R,) px, side of the squares that shared their noise

    def rows(self, part):
        """The step of some rows only (index)."""
        cut = {k: getattr(self, k)[part] for k in ("x", "x_next", "mean", "v")}
        return replace(self, block=self.block[part.to(self.block.device)], **cut)


def acted(taken, v, step, noise):
    """The recorded step with v as the velocity, and its mean as the mean, of the policy that acted.

    For a rollout by a network that rounds otherwise than the one in training: the draws stay, the ratio is exactly 1.
    """
    A, B, std = coefficients(step, taken.t, taken.s, noise)
    return replace(taken, v=v, mean=sde_step(taken.x, v, taken.x[:, None], A, B, std)[1])


def block_means(z, block):
    """Means over squares of `block` pixels, smaller at the border: (..., h, w) -> (..., ceil(h / k), ceil(w / k))."""
    flat = F.avg_pool2d(z.flatten(0, -3)[:, None], block, ceil_mode=True)[:, 0]
    return flat.view(*z.shape[:-2], *flat.shape[-2:])


def in_squares(eps, block):
    """White noise gathered in squares of block[r] pixels in row r: their means, scaled to unit variance.

    eps (R, K, c, h, w) standard normal, block (R,) int64 on the CPU -> the same shape; block 1 stays as it is
    """
    *_, h, w = eps.shape
    for k in block.unique().tolist():
        if k > 1:
            rows = (block == k).nonzero()[:, 0].to(eps.device)
            high, wide = (torch.tensor([min(k, n - i) for i in range(0, n, k)], device=eps.device) for n in (h, w))
            draw = block_means(eps[rows], k) * (high[:, None] * wide).sqrt()
            eps = eps.index_copy(0, rows, draw.repeat_interleave(k, -1).repeat_interleave(k, -2)[..., :h, :w])
    return eps


@torch.no_grad()
def rollout(velocity, x, grid, group, stochastic, step, noise, rng, tail=0, block=None, normal=None):
    """Sample a group of maps per row: an ODE prefix, `stochastic` consecutive SDE steps, an ODE tail.

    velocity    (x (N, c, h, w), t float) -> v; the N / R samples of a row lie side by side
    x           (R, c, h, w) initial state shared by a group, or (R, G, c, h, w) one of each sample
    grid        T + 1 descending times, the predictor's own
    stochastic  K in 1 .. T - 1, in a place drawn from rng. T - 1: every step but the last (`full`, paper); 1: `branch`
    step        one of STEPS.values();  noise: its scale (a or eta)
    tail        steps from the last stochastic state to the map, at most those of the grid; 0: those of the grid
    block       (R,) px of the state, side of the squares in which a row's noise is one number; None: 1, white (paper)
    normal      shape (K, N, c, h, w) of the noise of N states -> standard normal numbers; default: drawn from rng
    returns     x_0 (R, G, c, h, w), list of K Steps
    raises      ValueError  K or T out of range
    """
    T, R, shared = len(grid) - 1, len(x), x.ndim == 4
    if T < 2 or not 0 < stochastic < T:
        raise ValueError(f"grpo.rollout: got {stochastic} stochastic of {T} steps; want 1 to T - 1 "
                         "(the last step is deterministic) and T >= 2")
    first = int(torch.randint(T - stochastic, (1,), generator=rng))
    last = first + stochastic
    left = min(tail or T, T - last)
    walk = [*grid[:last], *(grid[last + (T - last) * k // left] for k in range(left + 1))]
    steps, x, normal = [], x if shared else x.flatten(0, 1), normal or (lambda shape: torch.randn(shape, generator=rng))
    block = torch.ones(R, dtype=torch.int64) if block is None else block
    for i, (t, s) in enumerate(zip(walk, walk[1:], strict=False)):
        v = velocity(x, t)
        if not first <= i < last:
            x = x + (s - t) * v
            continue
        many = group if shared and i == first else 1                            # a shared state branches here
        size = block.repeat_interleave(len(x) // R)                             # of the squares, per state
        eps = in_squares(normal((many, *x.shape)).to(x.device).transpose(0, 1), size)
        A, B, std = coefficients(step, t, s, noise)
        x_next, mean, _ = sde_step(x, v, eps, A, B, std)                        # (R, K, c, h, w)
        steps.append(Step(t, s, x, x_next, mean, std, v, size))
        x = x_next.flatten(0, 1)
    return x.unflatten(0, (R, group)), steps


def block_ratio(v, taken, k, B, local):
    """Log-ratio of a step whose noise is one number per square of k pixels: that of the squares' means.

    returns (R, K), or per square (R, K, ceil(h / k), ceil(w / k)) if local; exactly 0 while v is taken.v
    """
    drawn, moved = (block_means(z, k) for z in (taken.x_next - taken.mean[:, None], _fp32(v) - _fp32(taken.v)))
    zero = torch.zeros_like(moved)                                              # the same around a mean of zero
    return log_ratio_kl(drawn, zero, moved, zero, zero, 0.0, B, float(taken.std), local)[0]


def step_loss(v, v_ref, taken, step, noise, advantage, clip, kl_weight):
    """Loss of one trained step: clipped objective plus kl_weight times the KL to the reference.

    v, v_ref   (R, c, h, w) velocity of the policy (with gradient) and of the reference at taken.x
    advantage  (R, K) scalar credit, or (R, K, h, w) per-pixel credit
    returns    scalar loss, dict of 0-dim diagnostics (ratio_min, ratio_max, clip_frac, kl)
    """
    A, B, _ = coefficients(step, taken.t, taken.s, noise)
    local, policy, ratios, outside = advantage.ndim > 2, 0.0, [], 0.0
    log_ratio, kl = log_ratio_kl(taken.x_next, taken.x, v, taken.mean, v_ref, A, B, float(taken.std), local)
    for k in taken.block.unique().tolist():
        rows = (taken.block == k).nonzero()[:, 0].to(v.device)
        if k == 1:
            part, credit = log_ratio[rows], advantage[rows]
        else:
            part = block_ratio(v[rows], taken.rows(rows), k, B, local)
            credit = block_means(advantage[rows], k) if local else advantage[rows]
        share, ratio = len(rows) / len(v), part.detach().exp()
        policy = policy + share * clipped_loss(part, 0.0, credit, clip)
        ratios += ratio.min(), ratio.max()
        outside = outside + share * ((ratio - 1).abs() > clip).float().mean()
    kl, ratios = kl.mean(), torch.stack(ratios)
    return policy + kl_weight * kl, dict(ratio_min=ratios.min(), ratio_max=ratios.max(), kl=kl.detach(),
                                         clip_frac=outside)
