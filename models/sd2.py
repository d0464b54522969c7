"""The U-Net and the VAE of Stable Diffusion 2, in plain torch, under the key names of their checkpoints.

U-Net   v prediction from a state, a timestep and a text embedding; skips by concatenation, attention in most stages
VAE     8 x smaller sides, 4 latent channels; latents here are unscaled means, times LATENT_SCALE in pipelines
No config file says this: GroupNorm eps is 1e-6 in the transformers and the whole VAE, 1e-5 in the U-Net's resnets;
`attention_head_dim` is the number of heads. Source: Stable Diffusion (Rombach et al. 2022); layout of diffusers' files.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.norms import norm_silu

LATENT_SCALE = 0.18215

# options of config files with the value that is implemented (None: any); other values and options are refused
UNET_CONFIG = dict(
    act_fn="silu", center_input_sample=False, downsample_padding=1, dropout=0.0, dual_cross_attention=False,
    flip_sin_to_cos=True, freq_shift=0, mid_block_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn",
    only_cross_attention=False, resnet_time_scale_shift="default", resnet_out_scale_factor=1.0,
    time_embedding_type="positional", transformer_layers_per_block=1, use_linear_projection=True, conv_in_kernel=3,
    conv_out_kernel=3, norm_eps=1e-5, attention_type="default", addition_embed_type_num_heads=64,
    upcast_attention=None, sample_size=None, in_channels=None, out_channels=None, down_block_types=None,
    up_block_types=None, block_out_channels=None, layers_per_block=None, cross_attention_dim=None,
    attention_head_dim=None, norm_num_groups=None)
VAE_CONFIG = dict(
    act_fn="silu", in_channels=3, out_channels=3, scaling_factor=LATENT_SCALE, use_quant_conv=True,
    use_post_quant_conv=True, mid_block_add_attention=True, force_upcast=None, sample_size=None,
    down_block_types=None, up_block_types=None, block_out_channels=None, layers_per_block=None, latent_channels=4,
    norm_num_groups=None)
NETWORK_NEEDS = ("block_out_channels", "layers_per_block", "norm_num_groups")


def check_config(config, known, what, needs):
    """Refuse an option or a value that is not implemented, and a config without one of `needs`.

    config  dict;  known  option -> the one value that is implemented, None: any;  what  its name in messages
    raises  ValueError
    """
    missing = [key for key in needs if config.get(key) is None]
    if missing:
        raise ValueError(f"predictor: {what} has no {missing[0]}; want a complete config; download it again")
    for key, value in config.items():
        if key.startswith("_") or not value and key not in known:               # an unknown option that is off
            continue
        if key not in known or (known[key] is not None and value != known[key]):
            want = repr(known[key]) if key in known else "no such option"
            raise ValueError(f"predictor: {what} has {key} = {value!r}, which is not implemented; want {want}")


class Resnet(nn.Module):
    """Two 3 x 3 convolutions with a residual; `emb` (B, E) is added between them when the block was built for it."""

    def __init__(self, cin, cout, groups, eps, emb=0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps)
        self.norm2 = nn.GroupNorm(groups, cout, eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if emb:
            self.time_emb_proj = nn.Linear(emb, cout)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x, emb=None):                                             # (B, cin, h, w) -> (B, cout, h, w)
        h = self.conv1(norm_silu(self.norm1, x))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv2(norm_silu(self.norm2, h)) + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of tokens (B, L, D) to context (B, S, C)."""

    def __init__(self, width, heads, context=None, bias=False):
        super().__init__()
        if type(heads) is not int or heads < 1 or width % heads:
            raise ValueError(f"marigold: unet/config.json has attention_head_dim {heads!r} for {width} channels; want "
                             "a number of heads that divides them")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k, self.to_v = (nn.Linear(context or width, width, bias=bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def _split(self, z):                                                        # (B, L, D) -> (B, heads, L, d)
        return z.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context=None):
        context = x if context is None else context
        q = self._split(self.to_q(x))
        k = self._split(self.to_k(context))
        v = self._split(self.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v)
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
        self.attn1 = Attention(width, heads)
        self.attn2 = Attention(width, heads, context)
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
        self.proj_in = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, context)])

    def forward(self, x, context):                                              # (B, D, h, w)
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))               # (B, h*w, D)
        h = self.proj_out(self.transformer_blocks[0](h, context))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Resample(nn.Module):
    """Halve (stride 2) or double (nearest, to `size`) a feature map, then a 3 x 3 convolution."""

    def __init__(self, width, down, asymmetric=False):
        super().__init__()
        self.down = down
        self.asymmetric = asymmetric                                            # the VAE pads right and bottom only
        self.conv = nn.Conv2d(width, width, 3, 2 if down else 1, 0 if asymmetric else 1)

    def forward(self, x, size=None):
        if self.asymmetric:
            x = F.pad(x, (0, 1, 0, 1))
        elif not self.down:
            x = F.interpolate(x, size or [2 * n for n in x.shape[2:]], mode="nearest")
        return self.conv(x)


class Stage(nn.Module):
    """One resolution of the U-Net or VAE: resnets, each followed by attention if `make_attention` is given, a resample.

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
        check_config(config, UNET_CONFIG, "unet/config.json", NETWORK_NEEDS + (
            "in_channels", "out_channels", "cross_attention_dim", "attention_head_dim", "down_block_types",
            "up_block_types"))
        self.config = config
        self.checkpointing = False
        widths = config["block_out_channels"]
        groups = config["norm_num_groups"]
        eps = config.get("norm_eps", 1e-5)
        heads = config["attention_head_dim"]                                    # the number of heads, despite its name
        heads = [heads] * len(widths) if isinstance(heads, int) else heads
        depth = config["layers_per_block"]
        emb = 4 * widths[0]
        down = [{"CrossAttnDownBlock2D": True, "DownBlock2D": False}.get(kind) for kind in config["down_block_types"]]
        up = [{"CrossAttnUpBlock2D": True, "UpBlock2D": False}.get(kind) for kind in config["up_block_types"]]
        if None in (*down, *up) or len(down) != len(widths) or len(up) != len(widths):
            raise ValueError(f"predictor: unet/config.json has blocks {config['down_block_types']}, "
                             f"{config['up_block_types']}; want (CrossAttn)DownBlock2D and (CrossAttn)UpBlock2D, "
                             f"{len(widths)} each")

        def attention(i):
            return lambda: SpatialTransformer(widths[i], heads[i], config["cross_attention_dim"], groups)

        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(widths[0], emb), "linear_2": nn.Linear(emb, emb)})
        self.down_blocks = nn.ModuleList()
        last = widths[0]
        skips = [widths[0]]
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
                x = stage.upsamplers[0](x, skips[-1].shape[2:])                 # the next skip's size, which may be odd
        return self.conv_out(norm_silu(self.conv_norm_out, x))


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
        self.down = down
        widths = config["block_out_channels"]
        groups = config["norm_num_groups"]
        depth = config["layers_per_block"]
        z = config["latent_channels"]
        order = list(range(len(widths))) if down else list(range(len(widths)))[::-1]
        first = widths[order[0]]
        last = widths[order[-1]]
        self.conv_in = nn.Conv2d(3 if down else z, first, 3, padding=1)
        stages = nn.ModuleList()
        width = first
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
        x = self._mid(x) if self.down else x
        with torch.autocast(x.device.type, enabled=False):                      # 16 bits are too coarse near black
            return self.conv_out(F.silu(self.conv_norm_out(x.to(self.conv_out.weight.dtype))))


class VAE(nn.Module):
    """The autoencoder of Stable Diffusion, 8 x smaller sides; latents here are unscaled."""

    def __init__(self, config):
        super().__init__()
        check_config(config, VAE_CONFIG, "vae/config.json", NETWORK_NEEDS + ("latent_channels",))
        blocks = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
        if blocks - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
            raise ValueError(f"predictor: vae/config.json has blocks {sorted(blocks)}, which are not implemented; want "
                             "DownEncoderBlock2D and UpDecoderBlock2D")
        self.config = config
        z = config["latent_channels"]
        self.encoder = Coder(config, True)
        self.decoder = Coder(config, False)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, image):
        """Mean of the latent: (B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8)."""
        return self.quant_conv(self.encoder(image)).chunk(2, 1)[0]

    def decode(self, z, tile=0):
        """(B, 4, h, w) -> (B, 3, 8h, 8w), one sample at a time.

        tile  side in latent pixels of overlapping tiles, blended linearly, for small GPUs; 0: no tiles. Each tile is
              normalised by its own statistics, so a tiled map differs slightly
        """
        if not tile or max(z.shape[2:]) <= tile:
            return self._decode(z)
        stride = max(1, tile * 3 // 4)
        scale = self.scale
        out = 0
        total = 0
        size = [n * scale for n in z.shape[2:]]
        corners = [[*range(0, max(n - tile, 0), stride), max(n - tile, 0)] for n in z.shape[2:]]
        for top in corners[0]:
            for left in corners[1]:
                part = self._decode(z[..., top:top + tile, left:left + tile])
                ramp = [torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).to(z) for n in part.shape[2:]]
                weight = ramp[0][:, None] * ramp[1]                             # highest in the middle of a tile
                pad = (left * scale, size[1] - left * scale - part.shape[3],
                       top * scale, size[0] - top * scale - part.shape[2])
                out = out + F.pad(part * weight, pad)
                total = total + F.pad(weight, pad)
        return out / total

    def _decode(self, z):
        return torch.cat([self.decoder(self.post_quant_conv(one)) for one in z.split(1)])

    @property
    def scale(self):
        """Pixels per latent pixel."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)
