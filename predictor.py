"""A predictor turns a photo into intrinsic maps; here are its samplers, its noisy rollout, and maps of your own photos.

time        x_t = (1 - t) x_0 + t x_1, v = x_1 - x_0; one step goes from t to s < t, dt = s - t < 0
step        x_next = A x + B v + std eps: every step below is linear, so three numbers describe it
ODE         A = 1, B = dt, std = 0
Flow-GRPO   sigma_t = a sqrt(t / (1 - t));  std = sigma_t sqrt(|dt|)
            mean = x + [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt
DDIM / eta  std = eta sqrt((1-abar_s)/(1-abar_t) (1 - abar_t/abar_s))
            mean = sqrt(abar_s) x0 + sqrt(1-abar_s-std^2) eps
t = 1       is singular in the first form: the next grid value stands in for t in the denominator
s = 0       is deterministic (x_0-hat) and is not trained: its noise would stay in the map
squares     noise may be one number per square of k x k pixels of the state: coarse exploration (ours)
rollout     `full` (paper): every step but the last is stochastic. `branch`: the group shares noise and an ODE prefix,
            one step is stochastic, an ODE tail finishes. `window`: K such steps in a row

Source: ReasonX (arXiv 2512.04222) sec. 3.2, Flow-GRPO (arXiv 2505.05470) eq. 9, DDIM (arXiv 2010.02502) eq. 12, 16.
"""
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.photos import find_images, read_rgb, readable_photos, resize_long
from data.pictures import output_name, save_maps
from kernels.sde_step import sde_step
from kernels.squares import fill_squares
from models.copies import use_half
from models.depth import open_depth
from models.dit import DiT
from models.pipelines import open_pipeline
from models.schedule import check_times, eta_coefficients, eta_factors
from models.wrapper import wrap
from relations import MODALITIES
from runtime.command import run_command
from runtime.flags import Parser
from runtime.ranks import pick_device
from runtime.weights import RULES, add_flip, open_own, read_spec


def flow_coefficients(t, s, a, t_next=None):
    """A, B, std of one Euler-Maruyama step with Flow-GRPO's noise (Flow-GRPO eq. 9): Python floats.

    t, s     0 <= s < t <= 1;  a >= 0 noise scale
    t_next   stand-in for t in the denominator when t == 1 (default: s)
    returns  std is already times sqrt(|dt|); a = 0 or s = 0 is the ODE step, std 0
    raises   ValueError when not 0 <= s < t <= 1
    """
    check_times("flow_coefficients", t, s)
    dt = s - t
    if a == 0 or s == 0:
        return 1.0, dt, 0.0
    room = 1 - (t if t < 1 else (s if t_next is None else t_next))              # 1 - t of sigma_t's denominator
    drift = a * a / (2 * room)                                                  # sigma_t^2 / (2t)
    return 1 + dt * drift, dt * (1 + drift * (1 - t)), a * math.sqrt(t / room * -dt)


COEFFICIENTS = {"flow": flow_coefficients, "ddim": eta_coefficients}


def _take_step(x, v, eps, A, B, std):
    """Next state, mean and 0-dim std in fp32, fp64 for fp64 states: (B, ...) each."""
    x = x if x.dtype == torch.float64 else x.float()
    v = v if v.dtype == torch.float64 else v.float()
    mean = A * x + B * v
    x_next = mean + std * eps if std else mean
    return x_next, mean, torch.tensor(std, dtype=mean.dtype, device=mean.device)


def flow_sde_step(x, v, t, s, a, eps, t_next=None):
    """One Flow-GRPO step from t to s < t; see flow_coefficients.

    x, v, eps  (B, ...)  state at t, velocity, standard normal noise
    returns    x_next (B, ...), mean (B, ...), std 0-dim
    """
    return _take_step(x, v, eps, *flow_coefficients(t, s, a, t_next))


def ddim_sde_step(x, v, abar_t, abar_s, eta, eps):
    """One DDIM step with noise eta, for v-prediction: v = sqrt(abar) noise - sqrt(1 - abar) x0 (DDIM eq. 12, 16).

    x, v, eps       (B, ...);  abar_t < abar_s floats or 0-dim tensors in [0, 1]; abar_t = 0 (zero-terminal SNR) is fine
    returns         x_next, mean (B, ...), std 0-dim; abar_s = 1 is deterministic (std 0)
    raises          ValueError when not 0 <= abar_t < abar_s <= 1
    """
    abar_t, abar_s = float(abar_t), float(abar_s)
    if not 0 <= abar_t < abar_s <= 1:
        raise ValueError(f"predictor.ddim_sde_step: got abar_t = {abar_t}, abar_s = {abar_s}; "
                         "want 0 <= abar_t < abar_s <= 1")
    signal = math.sqrt(abar_t)
    level = math.sqrt(1 - abar_t)
    signal_s, keep, std = eta_factors(signal, level, math.sqrt(abar_s), math.sqrt(1 - abar_s), eta)
    A = signal_s * signal + keep * level                                        # x0 = signal x - level v
    B = keep * signal - signal_s * level                                        # noise = level x + signal v
    return _take_step(x, v, eps, A, B, std)


@dataclass
class Leg:
    """One step of a planned walk: mean A x + B v, standard deviation std (0: deterministic)."""

    t: float
    s: float
    A: float
    B: float
    std: float


@dataclass
class Transition(Leg):
    """One stochastic step that will be trained. R rows share a state; K samples leave each row (branch: K = G)."""

    x: torch.Tensor          # (R, c, h, w) state at t
    x_next: torch.Tensor     # (R, K, c, h, w)
    mean: torch.Tensor       # (R, c, h, w) of the policy that acted
    v: torch.Tensor          # (R, c, h, w) of the policy that acted
    squares: torch.Tensor    # (R,) px, side of the squares that shared their noise

    def cut(self, rows, squares=None):
        """The transition of some rows only (slice or index), and their squares."""
        return replace(self, squares=squares, **{k: getattr(self, k)[rows] for k in ("x", "x_next", "mean", "v")})

    def with_velocity(self, v):
        """The transition with v as the velocity, and its mean as the mean, of the policy that acted; the draws stay.

        For a rollout by a network that rounds otherwise than the one in training: the ratio is exactly 1.
        """
        mean = sde_step(self.x, v, self.x[:, None], self.A, self.B, self.std)[1]
        return replace(self, v=v, mean=mean)


def plan_walk(grid, stochastic, exploration, noise, draw, tail=0):
    """Plan a walk from noise to a map: an ODE prefix, `stochastic` consecutive noisy steps, an ODE tail.

    grid         T + 1 descending times, the predictor's own
    stochastic   K in 1 .. T - 1, in a place drawn from draw. T - 1: every step but the last (`full`, paper)
    exploration  one of COEFFICIENTS;  noise: its scale (a or eta);  draw  ranks.Draw
    tail         steps from the last noisy state to the map, at most those of the grid; 0: those of the grid
    returns      list of Leg
    raises       ValueError  K or T out of range
    """
    T = len(grid) - 1
    if T == 1:                                                                  # a network that maps a photo to a map
        return [Leg(*grid, 1.0, grid[1] - grid[0], noise)]
    if not 0 < stochastic < T:
        raise ValueError(f"predictor.plan_walk: got {stochastic} stochastic of {T} steps; want 1 to T - 1 "
                         "(the last step is deterministic)")
    first = draw.integer(T - stochastic)
    last = first + stochastic
    left = min(tail or T, T - last)
    times = [*grid[:last], *(grid[last + (T - last) * k // left] for k in range(left + 1))]
    legs = []
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        is_noisy = first <= i < last
        legs.append(Leg(t, s, *(COEFFICIENTS[exploration](t, s, noise) if is_noisy else (1.0, s - t, 0.0))))
    return legs


@torch.no_grad()
def rollout(velocity, x, plan, group, normal, squares=None):
    """Walk a plan: sample a group of maps per row and record the noisy steps.

    velocity  (x (N, c, h, w), t float) -> v; the N / R samples of a row lie side by side
    x         (R, c, h, w) initial state, shared by a group
    plan      list of Leg, at least one of them noisy: of `plan_walk`, or one step from a photo to its map
    normal    shape (K, N, c, h, w) of the noise of N states -> standard normal numbers
    squares   (R,) px of the state, side of the squares in which a row's noise is one number; None: 1, white (paper)
    returns   x_0 (R, G, c, h, w), list of Transition
    raises    ValueError  a plan without a noisy step
    """
    R = len(x)
    if not any(leg.std > 0 for leg in plan):
        raise ValueError(f"predictor.rollout: got a plan of {len(plan)} deterministic steps; want at least one noisy")
    squares = torch.ones(R, dtype=torch.int64) if squares is None else squares
    transitions = []
    for leg in plan:
        v = velocity(x, leg.t)
        if leg.std == 0:
            x = x + leg.B * v
            continue
        K = 1 if transitions else group                                         # the shared state branches here
        side = squares.repeat_interleave(len(x) // R)                           # per state
        eps = fill_squares(normal((K, *x.shape)).to(x.device).transpose(0, 1), side)
        x_next, mean = sde_step(x, v, eps, leg.A, leg.B, leg.std)               # (R, K, c, h, w)
        transitions.append(Transition(leg.t, leg.s, leg.A, leg.B, leg.std, x, x_next, mean, v, side))
        x = x_next.flatten(0, 1)
    return x.unflatten(0, (R, group)), transitions


class Predictor(Protocol):
    """A flow network of yours, a torch.nn.Module: these members. models/wrapper.py fills in what it leaves out.

    What it may add: encode(rgb) -> cond, called once a photo (else cond is the photo); shape(rgb) -> (c, h, w) of the
    state (3, H, W); times(T); start(noise, T); multiple, px, of which photo sides are multiples (1); exploration
    ("flow"); lora_targets (every linear layer); checkpointing(on); save(folder) with load(folder); depth_means
    """

    modalities: tuple        # of relations.NAMES
    size: int                # px, side of the photos it is made for

    def velocity(self, x, t, cond, modality):
        """v = x_1 - x_0 of states x (B, c, h, w) at times t (B,), given cond (B, ...), of a modality's name."""

    def decode(self, x, modality):
        """Map (B, C, H, W) in the encoding of relations.MODALITIES from a state at t = 0."""


class MapPredictor(Protocol):
    """A network of yours that maps a photo straight to a map: these members, and what Predictor may add."""

    modalities: tuple
    size: int

    def predict(self, rgb, modality):
        """Map (B, C, H, W) in the encoding of relations.MODALITIES of photos (B, 3, H, W), sRGB [0, 1]."""


def load_predictor(spec):
    """Open a predictor by its SPEC (runtime.weights.Spec): ours, diffusers' layout, a depth network, a class of yours.

    raises  FileNotFoundError: no such folder or file; ValueError: another architecture, keys or members that do not fit
    """
    found = read_spec(spec)
    network = open_own(found) if found.module else open_depth(found)
    if network is not None:
        return wrap(network, found.text)
    if found.hub or (found.folder / "model_index.json").is_file():
        return open_pipeline(found.text)
    return DiT.load(found.folder)


@torch.no_grad()
def sample_ode(policy, rgb, modality, steps, rng=None, noise=None, cond=None):
    """Deterministic Euler sampler: photos -> maps.

    rgb (B, 3, H, W); noise (B, c, h, w), standard normal (drawn from rng if None); returns (B, C, H, W)
    modality  a name, or several that one walk gives: a list of maps
    """
    names = (modality,) if isinstance(modality, str) else modality
    cond = policy.encode(rgb) if cond is None else cond
    noise = torch.randn(len(rgb), *policy.shape(rgb), generator=rng).to(rgb) if noise is None else noise
    x = policy.start(noise, steps)
    for t, s in itertools.pairwise(policy.times(steps)):
        x = x + (s - t) * policy.velocity(x, torch.full((len(x),), t, device=x.device), cond, names[0])
    return policy.decode(x, modality, cond) if names[0] == modality else [policy.decode(x, m, cond) for m in names]


def photo_maps(policy, rgb, processing_res=0, steps=0, seed=0, ensemble=1):
    """Maps of one photo (3, H, W) of any size, at its size, in the predictor's own space, combined over noise draws.

    processing_res  px, the long edge the network sees (0: what it was trained at);  steps (0: the model's own, or 10)
    ensemble        noise draws: the mean, or what a family with its own pipeline (Marigold) takes
    returns         dict target -> (C, H, W)
    """
    if hasattr(policy, "photo_maps"):
        return policy.photo_maps(rgb, processing_res, steps, seed, ensemble)
    small = resize_long(rgb, processing_res or policy.size, policy.multiple)[None].to(next(policy.parameters()))
    out = {}
    for m in policy.modalities:
        rng = torch.Generator().manual_seed(seed)
        maps = sample_ode(policy, small.expand(ensemble, -1, -1, -1), m, steps or 10, rng)
        maps = F.interpolate(maps.float().mean(0, keepdim=True).cpu(), rgb.shape[-2:], mode="bilinear")
        out[m] = (F.normalize(maps, dim=1, eps=1e-6) if MODALITIES[m].kind == "vector" else maps)[0]
    return out


def predict_photo(policy, rgb, processing_res=0, steps=0, seed=0, ensemble=1):
    """As photo_maps, in the encodings of relations.MODALITIES: dict modality -> (C, H, W)."""
    maps = policy.convert_maps(photo_maps(policy, rgb, processing_res, steps, seed, ensemble))
    return {m: maps[m] for m in policy.modalities}


def arguments(argv):
    """Parse and check the command line."""
    p = Parser(prog="predictor.py", allow_abbrev=False,
               description="Depth, normal, albedo and irradiance of your own photos.")
    p.add_argument("images", metavar="IMAGE_OR_DIR", help="a photo, or a folder of photos (searched recursively)")
    p.add_argument("--checkpoint", default="out/mini/grpo", metavar="SPEC",
                   help=f"predictor: {RULES} [out/mini/grpo]")
    p.flip()
    p.add_argument("--out", default="out/maps", help="folder of .npy (native space), .png, a panel a photo [out/maps]")
    p.add_argument("--processing-res", type=int, default=0,
                   help="px, long edge the network sees; 0: what it was trained at [0]")
    p.add_argument("--denoise-steps", type=int, default=0, help="sampling steps; 0: the model's own, 10 for ours [0]")
    p.add_argument("--ensemble-size", type=int, default=1, help="noise draws that are combined [1]")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise [0]")
    p.add_argument("--half", action="store_true", help="compute in 16 bits: fp16 on a GPU, bf16 on a CPU")
    p.add_argument("--vae-tile", type=int, default=0,
                   help="latent pixels, side of the tiles a VAE decodes on a small GPU; 0: whole [0]")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto]")
    p.limits()
    args = p.parse_args(argv)
    p.at_least(args, 0, "denoise_steps", "processing_res", "vae_tile")
    p.at_least(args, 1, "ensemble_size")
    return args


def main(argv=None):
    """Command line: maps of photos."""
    args = arguments(argv)
    paths = find_images(args.images, args.out)
    device = pick_device(args.device, "predictor.py")
    policy = load_predictor(add_flip(args.checkpoint, args.flip_x)).to(device)
    policy.vae_tile = args.vae_tile
    if args.half:
        use_half(policy, device)
    root = Path(args.images)
    skipped = []
    done = set()

    def read(path):
        rgb = read_rgb(path)
        return rgb, photo_maps(policy, rgb, args.processing_res, args.denoise_steps, args.seed, args.ensemble_size)
    many = readable_photos(tqdm(paths, desc="photos", disable=len(paths) < 3), skipped, read)
    for path, (rgb, native) in many if len(paths) > 1 else [(paths[0], read(paths[0]))]:
        maps = policy.convert_maps(native)
        name = output_name(path.relative_to(root) if root.is_dir() else Path(path.name), done)
        done.add(name)
        save_maps(args.out, name, rgb, maps, native)
    if not done:
        raise ValueError(f"none of {len(paths)} images in {args.images} could be used; want JPEG or PNG photos")
    print(f"{len(done)} of {len(paths)} photos -> {args.out}", f"({len(skipped)} skipped, named above)" * bool(skipped))


if __name__ == "__main__":
    run_command(main, "predictor.py")
