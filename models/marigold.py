"""Marigold in plain torch: pipeline and files of the public weights, behind the predictor interface.

state      latents of all targets side by side, (B, 4 n, h/8, w/8); condition: the photo's latent (B, 4, h/8, w/8)
native     x_vp = alpha x0 + sigma eps, alpha^2 = abar;  network output v_vp = alpha eps - sigma x0
ours       x_t = (1 - t) x0 + t eps with t = sigma / (alpha + sigma): x_t = x_vp / (alpha + sigma),
           1 / (alpha + sigma) = hypot(1 - t, t), and v = eps - x0. An Euler step in t is exactly DDIM (eta = 0), and
           exploration "ddim" is DDIM with noise, so the sampler of predictor.py serves this family too
spaces     native maps are what diffusers returns: IID targets in the space model_index.json declares (lighting: linear;
           appearance albedo: sRGB), depth [0, 1] 0 near, normals [-1, 1] x right, y up, z toward the viewer.
           `decode` gives the encodings of relations.MODALITIES: albedo and irradiance sRGB-encoded. A shading, known up
           to scale, is encoded without dividing by its maximum: else one pixel would change all others
Networks: sd2.py; noise levels: schedule.py. Source: Marigold (Ke et al. 2024; arXiv 2505.09358 for IID), Stable
Diffusion 2 (Rombach et al. 2022), zero-terminal SNR (Lin et al. 2023). Weights: OpenRAIL++-M.
"""
import functools
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from models import checkpoint, lora
from models.schedule import Schedule, flow_time
from models.sd2 import LATENT_SCALE, VAE, UNet
from relations import srgb_encode
from runtime import files
from runtime.weights import bounded_integer, hub_folder, load_strict, plain_config

MODALITY = {"albedo": "albedo", "shading": "irradiance", "irradiance": "irradiance", "depth": "depth",
            "normals": "normal"}                                                # target name: modality
PIPELINES = {"MarigoldIntrinsicsPipeline": None, "MarigoldDepthPipeline": ["depth"],
             "MarigoldNormalsPipeline": ["normals"]}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHTS = "diffusion_pytorch_model"
EDGE = 1 << 12                         # px, largest processing resolution


class Marigold(nn.Module):
    """A Marigold pipeline as a predictor (see the module docstring and predictor.py for the interface).

    about   contents of model_index.json;  text  (1, 2, C) embedding of the empty prompt;  source  folder it came from
    """

    lora_targets = LORA_TARGETS
    exploration = "ddim"
    replays = False

    def __init__(self, unet, vae, schedule, text, about, source=None):
        super().__init__()
        self.unet = unet
        self.vae = vae.requires_grad_(False)
        self.schedule = schedule
        self.about = about
        self.source = source
        self.register_buffer("text", text, persistent=False)
        kind = about.get("_class_name")
        if kind not in PIPELINES:
            raise ValueError(f"marigold: model_index.json has _class_name = {kind!r}, which is not implemented; want "
                             f"one of {', '.join(PIPELINES)}")
        if kind == "MarigoldNormalsPipeline" and not about.get("use_full_z_range", True):
            raise ValueError("marigold: model_index.json has use_full_z_range = False, which is not implemented")
        self.properties = about.get("target_properties") or {}
        self.targets = tuple(PIPELINES[kind] or self.properties.get("target_names", ()))
        n = 4 * len(self.targets)
        got = (unet.config["in_channels"], unet.config["out_channels"])
        if not self.targets or got != (n + 4, n):
            raise ValueError(f"marigold: targets {self.targets} with a U-Net of {got[0]} -> {got[1]} channels; want "
                             f"{n + 4} -> {n}: four for each target and four for the photo")
        self.modalities = tuple(MODALITY[name] for name in self.targets if name in MODALITY)
        self.size = bounded_integer(about.get("default_processing_resolution") or 768, 1, EDGE,
                                          "default_processing_resolution", "marigold: model_index.json")
        self.steps = about.get("default_denoising_steps") or 4
        self.multiple = vae.scale
        self.vae_tile = 0

    @property
    def network(self):
        """The module that is fine-tuned."""
        return self.unet

    @property
    def cfg(self):
        """What the files say of the networks and the sampler."""
        return self.about, self.schedule.config, self.unet.config, self.vae.config

    def checkpointing(self, on):
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.unet.checkpointing = on

    def shape(self, rgb):
        """Shape (c, h, w) of the state for photos (B, 3, H, W)."""
        return 4 * len(self.targets), *(n // self.multiple for n in rgb.shape[-2:])

    def times(self, T):
        """Our times of the visited timesteps and of the final noise level: T + 1 floats, descending."""
        steps = self.schedule.steps(T)
        return [flow_time(abar) for _, abar, _ in steps] + [flow_time(steps[-1][2])]

    def start(self, noise, T):
        """State at times(T)[0] from standard normal noise; the noise itself if terminal SNR is zero."""
        t = self.times(T)[0]
        return noise * math.hypot(1 - t, t)

    @torch.no_grad()
    def encode(self, rgb):
        """Condition of photos: (B, 3, H, W) sRGB [0, 1] -> (B, 4, H/8, W/8). raises ValueError: sides not x 8."""
        if any(n % self.multiple for n in rgb.shape[-2:]):
            raise ValueError(f"marigold: got a {rgb.shape[-2]} x {rgb.shape[-1]} px image; want both sides a multiple "
                             f"of {self.multiple}")
        x = (2 * rgb - 1).to(self._dtype)
        return torch.cat([self.vae.encode(one) for one in x.split(1)]) * LATENT_SCALE

    def velocity(self, x, t, cond, modality=None):
        """v = eps - x0 of all targets at once: x (B, 4n, h, w), t (B,) in [0, 1], cond (B, 4, h, w). fp32.

        The U-Net gets the nearest of its 1000 timesteps; the noise levels are those of t itself.
        """
        t = t.double()
        index = (self.schedule.t.to(t.device, non_blocking=True)[None] - t[:, None]).abs().argmin(1)
        norm = torch.hypot(1 - t, t)
        x = x.float() / _as_map(norm)                                           # x_vp
        v = self.unet(torch.cat((cond.to(self._dtype), x.to(self._dtype)), 1), index, self.text).float()
        return _as_map((2 * t - 1) / norm) * x + _as_map(1 / norm) * v          # (sigma - alpha) x + (alpha + sigma) v

    @torch.no_grad()
    def decode(self, x, modality, cond=None):
        """Map of the modality table from a state at the final time: (B, 4n, h, w) -> (B, C, 8h, 8w)."""
        if modality not in self.modalities:
            raise ValueError(f"marigold: this model predicts {', '.join(self.targets)}; got modality {modality!r}")
        t = flow_time(self.schedule.final)
        k = [MODALITY.get(name) for name in self.targets].index(modality)
        native = self._native((x / math.hypot(1 - t, t))[:, 4 * k:4 * k + 4], self.targets[k])
        return self._encoded(native, self.targets[k])

    def loss(self, maps, modalities, draw):
        """Supervised loss on scenes with ground truth (--replay): not offered. raises ValueError."""
        raise ValueError("marigold: --replay needs ground truth for every target of the pipeline, which the procedural "
                         "scenes do not have; use --replay 0")

    def photo_maps(self, rgb, processing_res=0, steps=0, seed=0, ensemble=1):
        """Native maps of one photo.

        rgb             (3, H, W) sRGB [0, 1], any size
        processing_res  px, longer side that the network sees; steps: denoising steps; 0: the pipeline's defaults
        ensemble        number of maps that are combined; seed: of their noise
        returns         dict target -> (C, H, W) float32 on the CPU
        """
        rng = torch.Generator().manual_seed(seed)
        return self._predict(rgb[None], steps, None, processing_res or None, rng, ensemble, quirk=False)

    def convert_maps(self, native):
        """Native maps -> dict modality -> (C, H, W) in the encodings of relations.MODALITIES.

        Further targets (residual, material) keep their names and are sRGB-encoded where they are linear.
        """
        return {MODALITY.get(k, k): self._encoded(v, k) for k, v in native.items()}

    @property
    def _dtype(self):
        return self.vae.quant_conv.weight.dtype

    def _native(self, z, target):
        """Clean latent (B, 4, h, w), scaled -> native map (B, C, 8h, 8w), fp32."""
        x = self.vae.decode((z / LATENT_SCALE).to(self._dtype), self.vae_tile).float()
        if target == "normals":
            return F.normalize(x.clamp(-1, 1), dim=1, eps=1e-6)
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
        quirk    True: a step ends where diffusers ends it (see Schedule.steps); False: at the next visited timestep
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
        device = self.text.device
        edge = self.size if processing_res is None else processing_res
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
            out[name] = (F.normalize(full, dim=1, eps=1e-6) if name == "normals" else full)[0].cpu()
        return out

    def _sample(self, x, cond, steps, quirk):
        """DDIM, eta 0, in native variables (DDIM eq. 12): noise (1, 4n, h, w) -> clean latents, scaled."""
        for t, abar, abar_s in self.schedule.steps(steps, quirk):
            v = self.unet(torch.cat((cond, x.to(self._dtype)), 1), t, self.text).float()
            a = math.sqrt(abar)
            s = math.sqrt(1 - abar)
            x = x.float()
            x = math.sqrt(abar_s) * (a * x - s * v) + math.sqrt(1 - abar_s) * (s * x + a * v)
        return x

    @classmethod
    def load(cls, path, dtype=torch.float32):
        """Open a diffusers-layout folder or hub id; fp32 or fp16 files, weights kept in `dtype`.

        raises  FileNotFoundError: a file is missing; ValueError: what is not implemented, or keys that do not fit
        """
        with files.DamageGuard(f"marigold: {path}", "a checkpoint that cannot be read", "a whole diffusers folder",
                                keep=(ValueError, FileNotFoundError)):
            return cls._load(path, dtype)

    @classmethod
    def _load(cls, path, dtype):
        folder = hub_folder(path, ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*",
                                         f"unet/{WEIGHTS}*.safetensors*", f"vae/{WEIGHTS}*.safetensors*",
                                         "text_encoder/model*.safetensors*", "empty_text_embedding.safetensors"])
        about = _read_config(folder / "model_index.json")
        if about.get("_class_name") not in PIPELINES:                           # before any weights are read
            raise ValueError(f"marigold: model_index.json in {folder} has _class_name = {about.get('_class_name')!r}, "
                             f"which is not implemented; want one of {', '.join(PIPELINES)}")
        parts = []
        for kind, name in ((UNet, "unet"), (VAE, "vae")):
            with torch.device("meta"):
                model = kind(_read_config(folder / name / "config.json"))
            state = checkpoint.read_weights(folder / name, WEIGHTS)
            old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}    # of older VAE files
            for key in [k for k in state if k.split(".")[-2] in old]:
                head, name_, leaf = key.rsplit(".", 2)
                state[f"{head}.{old[name_]}.{leaf}"] = state.pop(key)
            state = {k: state.pop(k).to(dtype) for k in list(state)}            # one copy in memory, not two
            load_strict(model, state, folder / name, assign=True)
            parts.append(model)
        schedule = Schedule(_read_config(folder / "scheduler" / "scheduler_config.json"))
        text = empty_prompt(folder, parts[0].config["cross_attention_dim"]).to(dtype)
        return cls(*parts, schedule, text, about, folder).eval()

    def save(self, folder, **about):
        """Write the diffusers layout (adapters merged), a model card, and the adapters alone in PEFT layout.

        about  lines of the model card: base, trained_on, command, commit, ...
        raises OSError naming the file; each file is whole, the old one or the new one
        """
        folder = Path(folder)
        for name, module, state in (("unet", self.unet, lora.merged_state(self.unet)),
                                    ("vae", self.vae, self.vae.state_dict())):
            files.write_weights(folder / name / f"{WEIGHTS}.safetensors", state)
            checkpoint.keep_one_set(folder / name, WEIGHTS)
            files.write_json(folder / name / "config.json", module.config)
        files.write_weights(folder / "empty_text_embedding.safetensors", dict(empty_text_embedding=self.text.float()))
        (folder / "scheduler").mkdir(exist_ok=True)
        files.write_json(folder / "scheduler" / "scheduler_config.json", self.schedule.config)
        for name in ("text_encoder", "tokenizer"):
            if self.source and (self.source / name).is_dir() and self.source != folder:
                _copy_component(self.source / name, folder / name)
        if lora.adapters(self.unet):
            lora.save_adapter(self.unet, folder / "lora", base=str(about.get("base", "")))
        else:
            for name in checkpoint.ADAPTER:                                     # of what was saved here before
                (folder / "lora" / name).unlink(missing_ok=True)
        files.write_text(folder / "README.md", self._card(about))
        files.write_json(folder / "model_index.json", self.about)               # last: a folder without it is refused

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


def _as_map(z):
    """(B,) -> (B, 1, 1, 1), float32."""
    return z.float().view(-1, 1, 1, 1)


def _ensemble(members, target):
    """One map of an ensemble (E, C, h, w) -> (1, C, h, w), as the pipelines combine them.

    normals: per pixel the member closest to the mean direction. IID targets: per-pixel median. depth: each member is
    fitted to the first one by scale and shift, then the median (differs: diffusers optimises all fits jointly)
    """
    if len(members) == 1:
        return members
    if target == "normals":
        mean = F.normalize(members.mean(0, keepdim=True), dim=1, eps=1e-6)
        closest = (mean * members).sum(1, keepdim=True).argmax(0, keepdim=True)
        return members.gather(0, closest.expand(-1, 3, -1, -1))
    if target == "depth":
        first = members[0].flatten().double()
        flat = members.flatten(1).double()
        centred = flat - flat.mean(1, keepdim=True)
        goal = first - first.mean()
        scale = (centred * goal).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp_min(1e-12)
        fitted = centred * scale + first.mean()
        return fitted.float().view_as(members).median(0, keepdim=True).values.clamp(0, 1)
    return members.median(0, keepdim=True).values


def empty_prompt(folder, width):
    """Embedding of the empty prompt, (1, 2, width): read from the folder, or computed by its text encoder."""
    cached = folder / "empty_text_embedding.safetensors"
    if cached.is_file():
        text = files.read_tensors(cached).get("empty_text_embedding")
        if text is None:
            files.refuse(cached, "no empty_text_embedding", "that tensor")
    else:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
        if not (folder / "text_encoder" / "config.json").is_file() or not (folder / "tokenizer").is_dir():
            raise FileNotFoundError(f"marigold: got no text_encoder and tokenizer in {folder}; want the whole "
                                    "diffusers folder (or its empty_text_embedding.safetensors)")
        config = CLIPTextConfig.from_dict(_read_config(folder / "text_encoder" / "config.json"))
        state = checkpoint.read_weights(folder / "text_encoder", "model")
        encoder = checkpoint.build_network(CLIPTextModel, config, state, folder / "text_encoder", torch.float32)
        for path in files.find_files(folder / "tokenizer", "*.json"):           # before transformers reads hostile JSON
            files.read_json(path)
        ids = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)("", return_tensors="pt")
        with torch.no_grad():
            text = encoder(ids.input_ids).last_hidden_state
    if text.ndim != 3 or text.shape[::2] != (1, width):
        raise ValueError(f"marigold: the empty prompt's embedding in {folder} is {tuple(text.shape)}; "
                         f"want (1, tokens, {width})")
    return text


def _read_config(path):
    if not path.is_file():
        raise FileNotFoundError(f"marigold: got no {path.name} in {path.parent}; want a diffusers-layout folder, such "
                                "as a download of prs-eth/marigold-iid-lighting-v1-1")
    return plain_config(files.read_json(path), path)


def _copy_component(source, target):
    """Copy a component's folder; weights that exist in fp16 alone are renamed, so that no `variant` is needed."""
    target.mkdir(parents=True, exist_ok=True)
    copied = set()
    for path in files.find_files(source, "*"):
        plain = path.name.replace(".fp16.", ".")
        if path.suffix in (".json", ".txt", ".safetensors") and (
                plain == path.name or not (source / plain).is_file()):
            files.replace_file(target / plain, functools.partial(shutil.copyfile, path))
            copied.add(plain)
    for name in set(checkpoint.set_files(target, "model")) - copied:            # of what was saved here before
        (target / name).unlink(missing_ok=True)
