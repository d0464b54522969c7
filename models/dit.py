"""A rectified-flow diffusion transformer that turns a photo into one intrinsic map per call.

    x_t = (1 - t) x_0 + t x_1,   v = dx/dt = x_1 - x_0,   x_0 a map, x_1 noise; sampling walks t from 1 to 0
    v(x, t) = c_skip x + c_out F(c_in x, t, photo, modality)         F: the network, unit-variance target
    var = (1-t)^2 s^2 + t^2,  c_skip = (t - (1-t) s^2) / var,  c_out = s / sqrt(var),  c_in = 1 / sqrt(var)

A photo encoder runs once per photo and is shared by the samples of a group; a smaller denoiser runs at every step.
Maps live in pixel space as 3 channels in [-1, 1] (maps.center_map); a map of one channel is repeated.
Depth is affine-invariant: 0 near .. 1 far after the 2 % and 98 % quantiles of the valid pixels.
Source: ours. PRISM, the paper's rectified-flow base model, has no public code or weights (differs). The c_* are the
variance-preserving coefficients of EDM (Karras et al. 2022) for this path.
"""
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.maps import center_map
from kernels import send
from models import lora
from models.norms import norm_modulate
from models.positions import grid_positions
from models.schedule import uniform_times
from relations import MODALITIES, NAMES
from runtime.files import read_json, read_tensors, refuse, write_json, write_tensors
from runtime.ranks import mean_over_ranks
from runtime.weights import LAYERS, bounded_integer, load_strict

DATA_STD = 0.5                     # s, standard deviation of maps in [-1, 1]
ARCHITECTURE = "reasonx-dit"
LARGEST = 1 << 12                  # largest value of each size in predictor.json


@dataclass
class DiTConfig:
    """Sizes of the network."""

    size: int = 32           # px, side of the square photos it is trained on
    patch: int = 4           # px, side of a token
    width: int = 128
    encoder_layers: int = 4  # photo encoder, once per photo
    layers: int = 3          # denoiser, once per step and sample
    heads: int = 4

    @classmethod
    def of(cls, settings):
        """The sizes among the settings of a run (runtime.config.Config)."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})


class Block(nn.Module):
    """Pre-norm transformer block; `cond` (B, D) modulates it (adaLN-Zero of DiT) when the block was built for it."""

    def __init__(self, width, heads, conditional):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=not conditional) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulate = nn.Linear(width, 6 * width) if conditional else None
        if conditional:
            nn.init.zeros_(self.modulate.weight)
            nn.init.zeros_(self.modulate.bias)

    def attend(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D))

    def forward(self, x, cond=None):                                            # x (B, L, D)
        if self.modulate is None:
            x = x + self.attend(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(cond)[:, None].chunk(6, -1)
        x = x + gate1 * self.attend(norm_modulate(self.norm1, x, scale1, shift1))
        return x + gate2 * self.mlp(norm_modulate(self.norm2, x, scale2, shift2))


class DiT(nn.Module):
    """Rectified-flow DiT, RGB-conditioned, one modality per call (see the module docstring)."""

    modalities = NAMES
    exploration = "flow"
    lora_targets = ("qkv", "out")
    replays = True
    encodes_alike = False                                                       # the encoder trains
    walks = tuple((m,) for m in NAMES)

    def __init__(self, cfg=None, seed=0):
        super().__init__()
        self.cfg = cfg = cfg or DiTConfig()
        self.size = cfg.size
        self.multiple = cfg.patch
        self.recompute = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(cfg)

    def _build(self, cfg):
        token = 3 * cfg.patch**2
        self.rgb_in = nn.Linear(token, cfg.width)
        self.x_in = nn.Linear(token, cfg.width)
        self.encoder = nn.ModuleList(Block(cfg.width, cfg.heads, False) for _ in range(cfg.encoder_layers))
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, True) for _ in range(cfg.layers))
        self.time = nn.Sequential(nn.Linear(64, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        self.modality = nn.Embedding(len(NAMES), cfg.width)
        self.norm = nn.LayerNorm(cfg.width)
        self.head = nn.Linear(cfg.width, token)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _tokens(self, image):
        """(B, 3, H, W) -> (B, L, 3 * patch^2)."""
        p = self.cfg.patch
        B, C, H, W = image.shape
        if H % p or W % p:
            raise ValueError(f"predictor: got a {H} x {W} px image; want both sides a multiple of {p}")
        return image.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, H // p * (W // p), -1)

    def _image(self, tokens, size):
        p = self.cfg.patch
        H, W = size
        return tokens.view(-1, H // p, W // p, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, H, W)

    @property
    def network(self):
        """The module that is fine-tuned."""
        return self

    def checkpointing(self, on):
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.recompute = on

    def _run(self, block, *args):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def shape(self, rgb):
        """Shape (c, h, w) of the state x for photos rgb (B, 3, H, W)."""
        return 3, *rgb.shape[-2:]

    def times(self, T):
        """Uniform grid of T + 1 times from 1 to 0."""
        return uniform_times(T)

    def start(self, noise, T):
        """State at the first time from standard normal noise: the noise itself."""
        return noise

    def loss(self, maps, modalities, draw):
        """Supervised loss on scenes with ground truth; see flow_loss."""
        return flow_loss(self, maps, modalities, draw)

    def encode(self, rgb):
        """Condition of a photo: (B, 3, H, W) sRGB [0, 1] -> (B, L, D). Sides must be multiples of the patch."""
        H, W = rgb.shape[-2:]
        x = self.rgb_in(self._tokens(2 * rgb - 1))
        x = x + grid_positions(H // self.cfg.patch, W // self.cfg.patch, self.cfg.width, x.device)
        for block in self.encoder:
            x = self._run(block, x)
        return x

    def velocity(self, x, t, cond, modality):
        """v = dx/dt.

        x (B, 3, H, W) state; t (B,) in [0, 1]; cond (B, L, D) from encode; modality: name, or (B,) index in NAMES
        """
        if isinstance(modality, str):
            modality = torch.full((len(x),), NAMES.index(modality), device=x.device)
        t = t.to(x.dtype)
        freq = torch.exp(torch.arange(32, device=x.device) / 32 * 6.9)          # 1 .. 1000 rad per unit time
        wave = t[:, None] * freq
        c = F.silu(self.time(torch.cat((wave.sin(), wave.cos()), 1)) + self.modality(modality))
        s2 = DATA_STD**2
        tt = t.view(-1, 1, 1, 1)
        var = (1 - tt).square() * s2 + tt.square()
        h = self.x_in(self._tokens(x * var.rsqrt())) + cond
        for block in self.blocks:
            h = self._run(block, h, c)
        out = self._image(self.head(self.norm(h)), x.shape[-2:])
        return (tt - (1 - tt) * s2) / var * x + DATA_STD * var.rsqrt() * out

    def decode(self, x, modality, cond=None):
        """Map of the modality table from a clean state: (B, 3, H, W) -> (B, C, H, W)."""
        row = MODALITIES[modality]
        if row.kind == "vector":
            return F.normalize(x, dim=1, eps=1e-6)
        x = x.mean(1, keepdim=True) if row.channels == 1 else x
        return ((x + 1) / 2).clamp(0, 1)

    def convert_maps(self, maps):
        """Maps in the encodings of relations.MODALITIES: they already are."""
        return maps

    def save(self, folder, **about):
        """Write predictor.safetensors (adapters merged), then predictor.json (architecture, sizes, `about`)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "predictor.safetensors", {k: v.cpu() for k, v in lora.merged_state(self).items()})
        write_json(folder / "predictor.json", dict(architecture=ARCHITECTURE, config=asdict(self.cfg), **about))
        (folder / "model_index.json").unlink(missing_ok=True)                   # of a Marigold: it would be opened

    @classmethod
    def load(cls, folder):
        """Open a folder written by `save`.

        raises  FileNotFoundError: no predictor.json or weights there;
                ValueError: another architecture, missing or surplus keys
        """
        folder = Path(folder)
        for name in ("predictor.json", "predictor.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"predictor.load_predictor: got no {name} in {folder}; want a folder written "
                                        "by `python train.py` (out/mini/base or out/mini/grpo), or a Marigold folder")
        about = read_json(folder / "predictor.json")
        state = read_tensors(folder / "predictor.safetensors")
        if about.get("architecture") != ARCHITECTURE:
            made_by = str(about.get("made_by", ""))[:80]
            own = f", or its class on the command line: {made_by}={folder}" if made_by else ""
            raise ValueError(f"predictor.load_predictor: got architecture {str(about.get('architecture'))[:80]!r} in "
                             f"{folder}; want {ARCHITECTURE!r}{own}")
        with torch.device("meta"):                                              # before any memory is asked for
            model = cls(_sizes(about.get("config"), folder))
        load_strict(model, {k: v.float() for k, v in state.items()}, folder, assign=True)
        return model.eval()


def _sizes(found, folder):
    """DiTConfig of what predictor.json says. raises ValueError: other names, sizes out of range or that do not fit."""
    where = f"predictor.load_predictor: {folder}"
    known = {f.name for f in fields(DiTConfig)}
    if not isinstance(found, dict) or set(found) - known:
        raise ValueError(f"predictor.load_predictor: got config {found} in {folder}; "
                         f"want the sizes {', '.join(sorted(known))}")
    cfg = DiTConfig(**found)
    for name, value in asdict(cfg).items():
        bounded_integer(value, 1, LAYERS if "layers" in name else LARGEST, name, where)
    if cfg.width % (4 * cfg.heads) or cfg.size % cfg.patch:
        refuse(where, f"width {cfg.width}, heads {cfg.heads}, size {cfg.size}, patch {cfg.patch}",
               "a width in multiples of 4 heads, a size in multiples of the patch", "use another checkpoint")
    return cfg


def to_state(maps, mask, modality):
    """Training target of a modality: maps in physical units -> state in [-1, 1].

    maps     dict of (B, C, H, W) (depth in metres, may be inf where invalid); mask (B, 1, H, W) bool
    returns  (B, 3, H, W); invalid pixels hold 0
    """
    x = center_map(maps[modality], MODALITIES[modality].kind, mask)
    return torch.where(mask, x.expand(-1, 3, -1, -1), 0.0)


def flow_loss(policy, maps, modalities, draw):
    """Flow-matching loss of several modalities of the same photos: mean |v - (x_1 - x_0)|^2 over valid pixels.

    maps     dict with rgb (B, 3, H, W), mask (B, 1, H, W) and the modalities' maps of this rank's photos
    draw     ranks.Draw of the step;  returns a scalar
    """
    rgb = maps["rgb"]
    mask = maps["mask"]
    cond = policy.encode(rgb).repeat(len(modalities), 1, 1)                     # (M*B, L, D)
    x0 = torch.cat([to_state(maps, mask, m) for m in modalities])               # (M*B, 3, H, W)
    index = send(torch.tensor([NAMES.index(m) for m in modalities]).repeat_interleave(len(rgb)), rgb.device)
    batch = len(modalities), draw.batch
    t = torch.sigmoid(draw.normal(batch, rgb.device, axis=1).flatten())         # logit-normal
    x1 = draw.normal((*batch, *x0.shape[1:]), rgb.device, axis=1).flatten(0, 1)
    tt = t.view(-1, 1, 1, 1)
    v = policy.velocity((1 - tt) * x0 + tt * x1, t, cond, index)
    ok = mask.repeat(len(modalities), 1, 1, 1)
    return ((v - (x1 - x0)).square() * ok).sum() / mean_over_ranks(3.0 * ok.sum()).clamp_min(1)
