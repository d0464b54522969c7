"""Marigold in plain torch: the SD2 U-Net, VAE and scheduler of the public weights, behind the predictor interface.

state      latents of all targets side by side, (B, 4 n, h/8, w/8); condition: the photo's latent (B, 4, h/8, w/8)
native     x_vp = alpha x0 + sigma eps, alpha^2 = abar;  network output v_vp = alpha eps - sigma x0
ours       x_t = (1 - t) x0 + t eps with t = sigma / (alpha + sigma): x_t = x_vp / (alpha + sigma),
           1 / (alpha + sigma) = hypot(1 - t, t), and v = eps - x0. An Euler step in t is DDIM (eta = 0) exactly, and
           grpo.flow_eta_step is DDIM with noise: one core step serves both families, nobody branches on the model
spaces     native maps are what diffusers returns: IID targets in the space model_index.json declares (lighting: linear;
           appearance albedo: sRGB), depth [0, 1] 0 near, normals [-1, 1] x right, y up, z toward the viewer.
           `decode` gives the encodings of relations.MODALITIES: albedo and irradiance sRGB-encoded; an up-to-scale
           shading is encoded as it is, not divided by its maximum: one pixel must not move all others
Module names follow the checkpoints' keys. Source: Marigold (Ke et al. 2024; arXiv 2505.09358 for IID), Stable Diffusion
2 (Rombach et al. 2022), zero-terminal SNR (Lin et al. 2023). Weights: OpenRAIL++-M.
"""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import lora
from runtime import hub_folder, load_strict
from scenes import srgb_encode

LATENT_SCALE = 0.18215
MODALITY = {"albedo": "albedo", "shading": "irradiance", "irradiance": "irradiance", "depth": "depth",
            "normals": "normal"}                                                # target name: modality
PIPELINES = {"MarigoldIntrinsicsPipeline": None, "MarigoldDepthPipeline": ["depth"],
             "MarigoldNormalsPipeline": ["normals"]}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHTS = "diffusion_pytorch_model"

# what config files may say besides the sizes that the constructors read; anything else is refused by name
UNET = dict(
    act_fn="silu", center_input_sample=False, downsample_padding=1, dropout=0.0, dual_cross_attention=False,
    flip_sin_to_cos=True, freq_shift=0, mid_block_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn",
    only_cross_attention=False, resnet_time_scale_shift="default", resnet_out_scale_factor=1.0,
    time_embedding_type="positional", transformer_layers_per_block=1, use_linear_projection=True, conv_in_kernel=3,
    conv_out_kernel=3, norm_eps=1e-5, attention_type="default", addition_embed_type_num_heads=64,
    upcast_attention=None, sample_size=None, in_channels=None, out_channels=None, down_block_types=None,
    up_block_types=None, block_out_channels=None, layers_per_block=None, cross_attention_dim=None,
    attention_head_dim=None, norm_num_groups=None)                              # None: any value
VAE_ = dict(
    act_fn="silu", in_channels=3, out_channels=3, scaling_factor=LATENT_SCALE, use_quant_conv=True,
    use_post_quant_conv=True, mid_block_add_attention=True, force_upcast=None, sample_size=None,
    down_block_types=None, up_block_types=None, block_out_channels=None, layers_per_block=None, latent_channels=4,
    norm_num_groups=None)
SCHEDULER = dict(
    prediction_type="v_prediction", clip_sample=False, thresholding=False, num_train_timesteps=None, beta_start=None,
    beta_end=None, beta_schedule="scaled_linear", rescale_betas_zero_snr=None, timestep_spacing=None,
    set_alpha_to_one=None, steps_offset=None, clip_sample_range=None, dynamic_thresholding_ratio=None,
    sample_max_value=None, skip_prk_steps=None)


def check_config(config, known, what):
    """Refuse by name what this file does not implement. raises ValueError."""
    for key, value in config.items():
        if key.startswith("_") or not value and key not in known:               # new options that are off
            continue
        if key not in known or (known[key] is not None and value != known[key]):
            want = repr(known[key]) if key in known else "no such option"
            raise ValueError(f"marigold: {what} has {key} = {value!r}, which is not implemented; want {want}")


class Resnet(nn.Module):
    """Two 3 x 3 convolutions with a residual; `emb` (B, E) is added between them when the block was built for it."""

    def __init__(self, cin, cout, groups, eps, emb=0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, cin, eps), nn.GroupNorm(groups, cout, eps)
        self.conv1, self.conv2 = nn.Conv2d(cin, cout, 3, padding=1), nn.Conv2d(cout, cout, 3, padding=1)
        if emb:
            self.time_emb_proj = nn.Linear(emb, cout)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x, emb=None):                                             # (B, cin, h, w) -> (B, cout, h, w)
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of tokens (B, L, D) to context (B, S, C)."""

    def __init__(self, width, heads, context=None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k, self.to_v = (nn.Linear(context or width, width, bias=bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context=None):
        context = x if context is None else context
        split = lambda z: z.unflatten(-1, (self.heads, -1)).transpose(1, 2)     # noqa: E731  (B, heads, L, d)
        out = F.scaled_dot_product_attention(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)))
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """x GELU(gate), the exact GELU (erf)."""

    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, GEGLU."""

    def __init__(self, width, heads, context):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads, context)
        self.ff = nn.ModuleDict({"net": nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(),
                                                       nn.Linear(4 * width, width)])})

    def forward(self, x, context):                                              # (B, L, D), (B, S, C)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        h = self.norm3(x)
        for layer in self.ff["net"]:
            h = layer(h)
        return x + h


class SpatialTransformer(nn.Module):
    """A TransformerBlock over the pixels of a feature map, with a residual."""

    def __init__(self, width, heads, context, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, context)])

    def forward(self, x, context):                                              # (B, D, h, w)
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))               # (B, h*w, D)
        h = self.proj_out(self.transformer_blocks[0](h, context))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Resample(nn.Module):
    """Halve (stride 2) or double (nearest, to `size`) a feature map, then a 3 x 3 convolution."""

    def __init__(self, width, down, asymmetric=False):
        super().__init__()
        self.down, self.asymmetric = down, asymmetric                           # the VAE pads right and bottom only
        self.conv = nn.Conv2d(width, width, 3, 2 if down else 1, 0 if asymmetric else 1)

    def forward(self, x, size=None):
        if self.asymmetric:
            x = F.pad(x, (0, 1, 0, 1))
        elif not self.down:
            x = F.interpolate(x, size or [2 * n for n in x.shape[2:]], mode="nearest")
        return self.conv(x)


class Stage(nn.Module):
    """One resolution of the U-Net or VAE: resnets, an attention after each when `make_attention` is given, a resample.

    resample  name and module ("downsamplers" or "upsamplers", as in the checkpoints), or None
    """

    def __init__(self, widths, groups, eps, emb=0, make_attention=None, resample=None):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(cin, cout, groups, eps, emb) for cin, cout in widths)
        if make_attention:
            self.attentions = nn.ModuleList(make_attention() for _ in widths)
        if resample:
            setattr(self, resample[0], nn.ModuleList([resample[1]]))

    def layers(self):
        """Pairs (resnet, attention or None), in order."""
        return zip(self.resnets, getattr(self, "attentions", [None] * len(self.resnets)), strict=True)


class UNet(nn.Module):
    """The conditional U-Net of Stable Diffusion 2; `checkpointing` recomputes activations in the backward pass."""

    def __init__(self, config):
        super().__init__()
        check_config(config, UNET, "unet/config.json")
        self.config, self.checkpointing = config, False
        widths, groups, eps = config["block_out_channels"], config["norm_num_groups"], config.get("norm_eps", 1e-5)
        heads = config["attention_head_dim"]                                    # the number of heads, despite its name
        heads = [heads] * len(widths) if isinstance(heads, int) else heads
        context, depth, emb = config["cross_attention_dim"], config["layers_per_block"], 4 * widths[0]
        cross = lambda kind, known: {known[0]: True, known[1]: False}.get(kind)  # noqa: E731
        down = [cross(k, ("CrossAttnDownBlock2D", "DownBlock2D")) for k in config["down_block_types"]]
        up = [cross(k, ("CrossAttnUpBlock2D", "UpBlock2D")) for k in config["up_block_types"]]
        if None in (*down, *up) or len(down) != len(widths) or len(up) != len(widths):
            raise ValueError(f"marigold: unet/config.json has blocks {config['down_block_types']}, "
                             f"{config['up_block_types']}; want (CrossAttn)DownBlock2D and (CrossAttn)UpBlock2D, "
                             f"{len(widths)} each")
        attention = lambda i: lambda: SpatialTransformer(widths[i], heads[i], context, groups)  # noqa: E731

        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(widths[0], emb), "linear_2": nn.Linear(emb, emb)})
        self.down_blocks, last, skips = nn.ModuleList(), widths[0], [widths[0]]
        for i, width in enumerate(widths):
            ends = i == len(widths) - 1
            self.down_blocks.append(Stage(
                [(last if j == 0 else width, width) for j in range(depth)], groups, eps, emb,
                attention(i) if down[i] else None, None if ends else ("downsamplers", Resample(width, True))))
            skips += [width] * (depth if ends else depth + 1)
            last = width
        self.mid_block = Stage([(last, last)] * 2, groups, eps, emb)
        self.mid_block.attentions = nn.ModuleList([attention(-1)()])
        self.up_blocks = nn.ModuleList()
        for i in range(len(widths)):
            k = len(widths) - 1 - i
            self.up_blocks.append(Stage(
                [((last if j == 0 else widths[k]) + skips.pop(), widths[k]) for j in range(depth + 1)], groups, eps,
                emb, attention(k) if up[i] else None, ("upsamplers", Resample(widths[k], False)) if k else None))
            last = widths[k]
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps)
        self.conv_out = nn.Conv2d(widths[0], config["out_channels"], 3, padding=1)

    def _layer(self, resnet, attention, x, emb, context):
        def run(x, emb, context):
            x = resnet(x, emb)
            return x if attention is None else attention(x, context)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(run, x, emb, context, use_reentrant=False)
        return run(x, emb, context)

    def forward(self, x, t, context):
        """v prediction: x (B, c, h, w); t timestep, a number or (B,); context (B or 1, S, C) -> (B, c', h, w)."""
        half = self.conv_in.out_channels // 2
        freq = torch.exp(-math.log(1e4) / half * torch.arange(half, dtype=torch.float32, device=x.device))
        angle = torch.as_tensor(t, device=x.device).float().expand(len(x))[:, None] * freq
        wave = torch.cat((angle.cos(), angle.sin()), 1).to(x.dtype)
        emb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](wave)))    # (B, 4 * width)
        context = context.to(x.dtype).expand(len(x), -1, -1)
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down_blocks:
            for resnet, attention in stage.layers():
                x = self._layer(resnet, attention, x, emb, context)
                skips.append(x)
            if hasattr(stage, "downsamplers"):
                x = stage.downsamplers[0](x)
                skips.append(x)
        mid = self.mid_block
        x = self._layer(mid.resnets[0], mid.attentions[0], x, emb, context)
        x = self._layer(mid.resnets[1], None, x, emb, context)
        for stage in self.up_blocks:
            for resnet, attention in stage.layers():
                x = self._layer(resnet, attention, torch.cat((x, skips.pop()), 1), emb, context)
            if hasattr(stage, "upsamplers"):
                x = stage.upsamplers[0](x, skips[-1].shape[2:])                 # odd sizes: the next skip's
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class PixelAttention(Attention):
    """The VAE's single-head attention over the pixels of a feature map (B, D, h, w), with a residual."""

    def __init__(self, width, groups):
        super().__init__(width, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)

    def forward(self, x):
        h = super().forward(self.group_norm(x).flatten(2).transpose(1, 2))      # (B, h*w, D)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Coder(nn.Module):
    """Encoder (down=True) or decoder half of the VAE."""

    def __init__(self, config, down):
        super().__init__()
        widths, groups, depth = config["block_out_channels"], config["norm_num_groups"], config["layers_per_block"]
        z, self.down = config["latent_channels"], down
        order = list(range(len(widths))) if down else list(range(len(widths)))[::-1]
        first, last = widths[order[0]], widths[order[-1]]
        self.conv_in = nn.Conv2d(3 if down else z, first, 3, padding=1)
        stages, width = nn.ModuleList(), first
        for i in order:
            resample = None if i == order[-1] else (
                ("downsamplers", Resample(widths[i], True, asymmetric=True)) if down else
                ("upsamplers", Resample(widths[i], False)))
            n = depth if down else depth + 1
            stages.append(Stage([(width if j == 0 else widths[i], widths[i]) for j in range(n)], groups, 1e-6,
                                resample=resample))
            width = widths[i]
        setattr(self, "down_blocks" if down else "up_blocks", stages)
        deep = widths[-1]
        self.mid_block = Stage([(deep, deep)] * 2, groups, 1e-6)
        self.mid_block.attentions = nn.ModuleList([PixelAttention(deep, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, last, 1e-6)
        self.conv_out = nn.Conv2d(last, 2 * z if down else 3, 3, padding=1)

    def _mid(self, x):
        one, two = self.mid_block.resnets
        return two(self.mid_block.attentions[0](one(x)))

    def forward(self, x):
        x = self.conv_in(x)
        if not self.down:
            x = self._mid(x)
        for stage in self.down_blocks if self.down else self.up_blocks:
            for resnet in stage.resnets:
                x = resnet(x)
            for resample in (*getattr(stage, "downsamplers", ()), *getattr(stage, "upsamplers", ())):
                x = resample(x)
        return self.conv_out(F.silu(self.conv_norm_out(self._mid(x) if self.down else x)))


class VAE(nn.Module):
    """The autoencoder of Stable Diffusion, 8 x smaller sides; latents here are unscaled."""

    def __init__(self, config):
        super().__init__()
        check_config(config, VAE_, "vae/config.json")
        self.config, z = config, config["latent_channels"]
        self.encoder, self.decoder = Coder(config, True), Coder(config, False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def encode(self, image):
        """Mean of the latent: (B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8)."""
        return self.quant_conv(self.encoder(image)).chunk(2, 1)[0]

    def decode(self, z, tile=0):
        """(B, 4, h, w) -> (B, 3, 8h, 8w), one sample at a time.

        tile  side in latent pixels of overlapping tiles, blended linearly, for small GPUs; 0: whole. Tiles see their
              own normalisation statistics, so a tiled map differs slightly
        """
        whole = lambda z: self.decoder(self.post_quant_conv(z))                 # noqa: E731
        if not tile or max(z.shape[2:]) <= tile:
            return torch.cat([whole(one) for one in z.split(1)])
        stride, scale = max(1, tile * 3 // 4), self.scale
        out, total = 0, 0
        size = [n * scale for n in z.shape[2:]]
        corners = [[*range(0, max(n - tile, 0), stride), max(n - tile, 0)] for n in z.shape[2:]]
        for top in corners[0]:
            for left in corners[1]:
                part = torch.cat([whole(one) for one in z[..., top:top + tile, left:left + tile].split(1)])
                ramp = [torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).to(z) for n in part.shape[2:]]
                weight = ramp[0][:, None] * ramp[1]                             # highest in the middle of a tile
                pad = (left * scale, size[1] - left * scale - part.shape[3],
                       top * scale, size[0] - top * scale - part.shape[2])
                out, total = out + F.pad(part * weight, pad), total + F.pad(weight, pad)
        return out / total

    @property
    def scale(self):
        """Pixels per latent pixel."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)


class Schedule:
    """Noise levels of the 1000 training timesteps and the timesteps a sampler visits (scheduler_config.json)."""

    def __init__(self, config):
        check_config(config, SCHEDULER, "scheduler/scheduler_config.json")
        self.config = config
        n, self.spacing = config.get("num_train_timesteps", 1000), config.get("timestep_spacing", "leading")
        if self.spacing not in ("trailing", "leading"):
            raise ValueError(f"marigold: scheduler_config.json has timestep_spacing = {self.spacing!r}, which is not "
                             "implemented; want 'trailing' or 'leading'")
        root = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, n)
        alpha = np.sqrt(np.cumprod(1 - root**2))
        if config.get("rescale_betas_zero_snr"):                                # Lin et al. 2023, algorithm 1
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        self.abar = alpha**2                                                    # (1000,) float64, decreasing
        self.final = 1.0 if config.get("set_alpha_to_one", True) else float(self.abar[0])
        level = np.sqrt(1 - self.abar)
        self.t = torch.from_numpy(level / (alpha + level))                      # our time of each timestep, increasing

    def timesteps(self, T):
        """The T timesteps a sampler visits, descending. raises ValueError when T is not in 1 .. 1000."""
        n = len(self.abar)
        if not 1 <= T <= n:
            raise ValueError(f"marigold: got {T} denoising steps; want 1 .. {n}")
        if self.spacing == "leading":
            return [i * (n // T) + self.config.get("steps_offset", 0) for i in range(T)][::-1]
        return [int(i) - 1 for i in np.round(np.arange(n, 0, -n / T))]

    def steps(self, T, quirk=False):
        """(timestep, abar there, abar after the step) of each step; the last ends at the scheduler's final abar.

        quirk  diffusers ends each step at timestep - 1000 // T, which is not the next one when T does not divide 1000
        """
        visited, n = self.timesteps(T), len(self.abar)
        after = [t - n // T for t in visited] if quirk else [*visited[1:], -1]
        return [(t, float(self.abar[t]), float(self.abar[s]) if s >= 0 else self.final)
                for t, s in zip(visited, after, strict=True)]


class Marigold(nn.Module):
    """A Marigold pipeline as a predictor (see the module docstring and predictor.py for the interface).

    about   contents of model_index.json;  text  (1, 2, C) embedding of the empty prompt;  source  folder it came from
    """

    lora_targets = LORA_TARGETS

    def __init__(self, unet, vae, schedule, text, about, source=None):
        super().__init__()
        self.unet, self.vae, self.schedule = unet, vae.requires_grad_(False), schedule
        self.about, self.source = about, source
        self.register_buffer("text", text, persistent=False)
        kind = about.get("_class_name")
        if kind not in PIPELINES:
            raise ValueError(f"marigold: model_index.json has _class_name = {kind!r}, which is not implemented; want "
                             f"one of {', '.join(PIPELINES)}")
        if kind == "MarigoldNormalsPipeline" and not about.get("use_full_z_range", True):
            raise ValueError("marigold: model_index.json has use_full_z_range = False, which is not implemented")
        self.properties = about.get("target_properties") or {}
        self.targets = tuple(PIPELINES[kind] or self.properties.get("target_names", ()))
        n, got = 4 * len(self.targets), (unet.config["in_channels"], unet.config["out_channels"])
        if not self.targets or got != (n + 4, n):
            raise ValueError(f"marigold: targets {self.targets} with a U-Net of {got[0]} -> {got[1]} channels; want "
                             f"{n + 4} -> {n}: four for each target and four for the photo")
        self.modalities = tuple(MODALITY[name] for name in self.targets if name in MODALITY)
        self.size = about.get("default_processing_resolution") or 768
        self.steps = about.get("default_denoising_steps") or 4
        self.multiple, self.vae_tile, self.exploration = vae.scale, 0, "ddim"

    # ---- the predictor interface ------------------------------------------------------------------------------

    @property
    def network(self):
        """The module that is fine-tuned."""
        return self.unet

    def checkpointing(self, on):
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.unet.checkpointing = on

    def shape(self, rgb):
        """Shape (c, h, w) of the state for photos (B, 3, H, W)."""
        return 4 * len(self.targets), *(n // self.multiple for n in rgb.shape[-2:])

    def times(self, T):
        """Our times of the visited timesteps and of the final noise level: T + 1 floats, descending."""
        steps = self.schedule.steps(T)
        return [_time(abar) for _, abar, _ in steps] + [_time(steps[-1][2])]

    def start(self, noise, T):
        """State at times(T)[0] from standard normal noise: as it is when the schedule has zero terminal SNR."""
        t = self.times(T)[0]
        return noise * math.hypot(1 - t, t)

    @torch.no_grad()
    def encode(self, rgb):
        """Condition of photos: (B, 3, H, W) sRGB [0, 1] -> (B, 4, H/8, W/8). raises ValueError: sides not x 8."""
        if any(n % self.multiple for n in rgb.shape[-2:]):
            raise ValueError(f"marigold: got a {rgb.shape[-2]} x {rgb.shape[-1]} px image; want both sides a multiple "
                             f"of {self.multiple}")
        return self.vae.encode((2 * rgb - 1).to(self._dtype)) * LATENT_SCALE

    def velocity(self, x, t, cond, modality=None):
        """v = eps - x0 of all targets at once: x (B, 4n, h, w), t (B,) in [0, 1], cond (B, 4, h, w). fp32.

        The U-Net is told the nearest of its 1000 timesteps; noise levels follow t exactly.
        """
        t = t.double()
        index = (self.schedule.t.to(t.device)[None] - t[:, None]).abs().argmin(1)
        norm = torch.hypot(1 - t, t)
        as_map = lambda z: z.float().view(-1, 1, 1, 1)                          # noqa: E731
        x = x.float() / as_map(norm)                                            # x_vp
        v = self.unet(torch.cat((cond.to(self._dtype), x.to(self._dtype)), 1), index, self.text).float()
        return as_map((2 * t - 1) / norm) * x + as_map(1 / norm) * v            # (sigma - alpha) x + (alpha + sigma) v

    @torch.no_grad()
    def decode(self, x, modality):
        """Map of the modality table from a state at the final time: (B, 4n, h, w) -> (B, C, 8h, 8w)."""
        if modality not in self.modalities:
            raise ValueError(f"marigold: this model predicts {', '.join(self.targets)}; got modality {modality!r}")
        t = _time(self.schedule.final)
        k = [MODALITY.get(name) for name in self.targets].index(modality)
        native = self._native((x / math.hypot(1 - t, t))[:, 4 * k:4 * k + 4], self.targets[k])
        return self._encoded(native, self.targets[k])

    def loss(self, maps, modalities, rng):
        """Supervised loss on scenes with ground truth (--replay): not offered. raises ValueError."""
        raise ValueError("marigold: --replay needs ground truth for every target of the pipeline, which the procedural "
                         "scenes have not; use --replay 0")

    def photo_maps(self, rgb, processing_res=0, steps=0, seed=0, ensemble=1):
        """Native maps of one photo (3, H, W) of any size: dict target -> (C, H, W); 0: the pipeline's defaults."""
        rng = torch.Generator().manual_seed(seed)
        return self._predict(rgb[None], steps, None, processing_res or None, rng, ensemble, quirk=False)

    def tabled(self, native):
        """Native maps -> dict modality -> (C, H, W) in the encodings of relations.MODALITIES; further targets keep
        their names (residual, material) and are sRGB-encoded where they are linear."""
        return {MODALITY.get(k, k): self._encoded(v, k) for k, v in native.items()}

    # ---- the pipeline ----------------------------------------------------------------------------------------

    @property
    def _dtype(self):
        return self.vae.quant_conv.weight.dtype

    def _native(self, z, target):
        """Clean latent (B, 4, h, w), scaled -> native map (B, C, 8h, 8w), fp32."""
        x = self.vae.decode((z / LATENT_SCALE).to(self._dtype), self.vae_tile).float()
        if target == "normals":
            return _unit(x.clamp(-1, 1))
        if target == "depth":
            x = x.mean(1, keepdim=True)
        return (x.clamp(-1, 1) + 1) / 2

    def _encoded(self, native, target):
        linear = self.properties.get(target, {}).get("prediction_space", "srgb") == "linear"
        return srgb_encode(native.clamp(0, 1)) if linear else native

    @torch.no_grad()
    def predict(self, image, steps=None, latents=None, processing_res=None, generator=None, ensemble=1, quirk=True):
        """What diffusers' pipeline returns with output_type="np".

        image    (H, W, 3) uint8 sRGB;  steps  denoising steps (None: the model's);  latents (E, 4n, h, w) initial noise
        processing_res  px, longer side the network sees (None: the model's; 0: the photo's own);  ensemble  E
        quirk    True: step ends as diffusers takes them (see Schedule.steps); False: the visited timesteps
        returns  dict target -> (H, W, C) float32 in the pipeline's own colour space
        raises   ValueError for another image shape or dtype, or latents of another shape
        """
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"marigold: got an image {image.shape} {image.dtype}; want (H, W, 3) uint8")
        rgb = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        maps = self._predict(rgb, steps, latents, processing_res, generator, ensemble, quirk)
        return {k: v.permute(1, 2, 0).numpy() for k, v in maps.items()}

    @torch.no_grad()
    def _predict(self, rgb, steps, latents, processing_res, rng, ensemble, quirk):
        H, W = rgb.shape[2:]
        device, edge = self.text.device, self.size if processing_res is None else processing_res
        x = (2 * rgb - 1).to(device)
        if edge:
            small = [n * edge // max(H, W) for n in (H, W)]
            if 0 in small:
                raise ValueError(f"marigold: got a {H} x {W} px photo at --processing-res {edge}: its short side would "
                                 "vanish; want a larger --processing-res")
            x = F.interpolate(x, small, mode="bilinear", antialias=True)
        h, w = x.shape[2:]
        m = self.multiple
        x = F.pad(x, (0, -w % m, 0, -h % m), mode="replicate").to(self._dtype)
        cond = self.vae.encode(x) * LATENT_SCALE                                # (1, 4, h/8, w/8)
        want = (ensemble, *self.shape(x))
        if latents is None:
            latents = torch.randn(want, generator=rng, device="cpu" if rng is None else rng.device)
        if tuple(latents.shape) != want:
            raise ValueError(f"marigold: got latents {tuple(latents.shape)}; want {want}")
        z = torch.cat([self._sample(one.to(device), cond, steps or self.steps, quirk) for one in latents.split(1)])
        out = {}
        for k, name in enumerate(self.targets):
            members = self._native(z[:, 4 * k:4 * k + 4], name)[:, :, :h, :w]   # (E, C, h, w)
            full = F.interpolate(_ensemble(members, name), (H, W), mode="bilinear")
            out[name] = (_unit(full) if name == "normals" else full)[0].cpu()
        return out

    def _sample(self, x, cond, steps, quirk):
        """DDIM, eta 0, in native variables (DDIM eq. 12): noise (1, 4n, h, w) -> clean latents, scaled."""
        for t, abar, abar_s in self.schedule.steps(steps, quirk):
            v = self.unet(torch.cat((cond, x.to(self._dtype)), 1), t, self.text).float()
            a, s = math.sqrt(abar), math.sqrt(1 - abar)
            x = x.float()
            x = math.sqrt(abar_s) * (a * x - s * v) + math.sqrt(1 - abar_s) * (s * x + a * v)
        return x

    # ---- files -----------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path, dtype=torch.float32):
        """Open a diffusers-layout folder or hub id; fp32 or fp16 files, weights kept in `dtype`.

        raises  FileNotFoundError: a file is missing; ValueError: what is not implemented, or keys that do not fit
        """
        folder = hub_folder(path, ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*",
                                   f"*/{WEIGHTS}*.safetensors", "text_encoder/model*.safetensors", "*.safetensors"])
        about = _json(folder / "model_index.json")
        if about.get("_class_name") not in PIPELINES:                           # before any weights are read
            raise ValueError(f"marigold: model_index.json in {folder} has _class_name = {about.get('_class_name')!r}, "
                             f"which is not implemented; want one of {', '.join(PIPELINES)}")
        parts = []
        for kind, name in ((UNet, "unet"), (VAE, "vae")):
            with torch.device("meta"):
                model = kind(_json(folder / name / "config.json"))
            state = _state(folder / name, WEIGHTS)
            old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}    # of older VAE files
            for key in [k for k in state if k.split(".")[-2] in old]:
                head, name_, leaf = key.rsplit(".", 2)
                state[f"{head}.{old[name_]}.{leaf}"] = state.pop(key)
            state = {k: state.pop(k).to(dtype) for k in list(state)}            # one copy in memory, not two
            load_strict(model, state, folder / name, assign=True)
            parts.append(model)
        schedule = Schedule(_json(folder / "scheduler" / "scheduler_config.json"))
        text = empty_prompt(folder, parts[0].config["cross_attention_dim"]).to(dtype)
        return cls(*parts, schedule, text, about, folder).eval()

    def save(self, folder, **about):
        """Write the diffusers layout (adapters merged), a model card, and the adapters alone in PEFT layout.

        about  lines of the model card: base, trained_on, command, commit, ...
        """
        folder = Path(folder)
        for name, module, state in (("unet", self.unet, lora.merged_state(self.unet)),
                                    ("vae", self.vae, self.vae.state_dict())):
            (folder / name).mkdir(parents=True, exist_ok=True)
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()},
                      folder / name / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
            (folder / name / "config.json").write_text(json.dumps(module.config, indent=1))
        save_file({"empty_text_embedding": self.text.detach().cpu().float().contiguous()},
                  folder / "empty_text_embedding.safetensors")
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(self.schedule.config, indent=1))
        (folder / "model_index.json").write_text(json.dumps(self.about, indent=1))
        for name in ("text_encoder", "tokenizer"):
            if self.source and (self.source / name).is_dir() and self.source != folder:
                _copy_component(self.source / name, folder / name)
        if lora.adapters(self.unet):
            lora.save_adapter(self.unet, folder / "lora", base=str(about.get("base", "")))
        (folder / "README.md").write_text(self._card(about))

    def _card(self, about):
        """Model card in the hub's format."""
        spaces = ", ".join(f"{k}: {self.properties.get(k, {}).get('prediction_space', 'see above')}"
                           for k in self.targets)
        facts = "".join(f"- {k.replace('_', ' ')}: {v}\n" for k, v in about.items() if v)
        base = f"base_model: {about['base']}\n" if about.get("base") else ""
        return (
            f"---\nlicense: openrail++\nlibrary_name: diffusers\n{base}---\n# Marigold, fine-tuned by ReasonX GRPO\n\n"
            f"- opens with diffusers.{self.about['_class_name']}.from_pretrained\n"
            f"- targets: {', '.join(self.targets)}\n- colour space: {spaces}\n"
            f"- processing resolution: {self.size} px, longer side\n- denoising steps: {self.steps}\n{facts}\n"
            "Weights: CreativeML OpenRAIL++-M, as the base model.\n")


def _time(abar):
    """Our time t = sigma / (alpha + sigma) of a native noise level."""
    alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    return sigma / (alpha + sigma)


def _unit(normals):
    return normals / normals.norm(dim=1, keepdim=True).clamp_min(1e-6)


def _ensemble(members, target):
    """One map of an ensemble (E, C, h, w) -> (1, C, h, w), as the pipelines combine them.

    normals: per pixel the member closest to the mean direction; IID targets: per-pixel median. depth: each member is
    first fitted to the first by scale and shift, then the median (differs: diffusers optimises all fits jointly)
    """
    if len(members) == 1:
        return members
    if target == "normals":
        closest = (_unit(members.mean(0, keepdim=True)) * members).sum(1, keepdim=True).argmax(0, keepdim=True)
        return members.gather(0, closest.expand(-1, 3, -1, -1))
    if target == "depth":
        first, flat = members[0].flatten().double(), members.flatten(1).double()
        centred, goal = flat - flat.mean(1, keepdim=True), first - first.mean()
        scale = (centred * goal).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp_min(1e-12)
        fitted = centred * scale + first.mean()
        return fitted.float().view_as(members).median(0, keepdim=True).values.clamp(0, 1)
    return members.median(0, keepdim=True).values


def empty_prompt(folder, width):
    """Embedding of the empty prompt, (1, 2, width): cached in the folder, or computed by its text encoder."""
    cached = folder / "empty_text_embedding.safetensors"
    if cached.is_file():
        text = load_file(cached)["empty_text_embedding"]
    else:
        from transformers import CLIPTextModel, CLIPTokenizer
        if not (folder / "text_encoder" / "config.json").is_file() or not (folder / "tokenizer").is_dir():
            raise FileNotFoundError(f"marigold: got no text_encoder and tokenizer in {folder}; want the whole "
                                    "diffusers folder (or its empty_text_embedding.safetensors)")
        plain = (folder / "text_encoder" / "model.safetensors").is_file()
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", variant=None if plain else "fp16",
                                                local_files_only=True, use_safetensors=True, dtype=torch.float32)
        ids = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)("", return_tensors="pt")
        with torch.no_grad():
            text = encoder(ids.input_ids).last_hidden_state
    if text.ndim != 3 or text.shape[::2] != (1, width):
        raise ValueError(f"marigold: the empty prompt's embedding in {folder} is {tuple(text.shape)}; "
                         f"want (1, tokens, {width})")
    return text


def _json(path):
    if not path.is_file():
        raise FileNotFoundError(f"marigold: got no {path.name} in {path.parent}; want a diffusers-layout folder, such "
                                "as a download of prs-eth/marigold-iid-lighting-v1-1")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"marigold: {path} is not JSON ({error}); download it again") from None


def _state(folder, stem):
    """Tensors of STEM.safetensors or STEM.fp16.safetensors."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            try:
                return load_file(folder / name)
            except SafetensorError as error:
                raise ValueError(f"marigold: {folder / name} cannot be read ({error}); download it again") from None
    raise FileNotFoundError(f"marigold: got no {stem}[.fp16].safetensors in {folder}; want safetensors weights "
                            "(.bin files are pickles and are not read)")


def _copy_component(source, target):
    """Copy a component's folder; fp16-only weights get the plain name that opens without a variant."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(p for p in source.iterdir() if p.is_file() and p.suffix in (".json", ".txt", ".safetensors")):
        plain = path.name.replace(".fp16.", ".")
        if plain == path.name or not (source / plain).is_file():
            shutil.copyfile(path, target / plain)
