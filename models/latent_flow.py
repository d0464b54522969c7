"""Photo to maps in the latent space of Stable Diffusion 2, as a rectified flow behind the predictor interface.

state      latents of the maps of one run side by side, (B, 4 n, h/8, w/8); condition: the photo's latent, (B, 4, ...)
native     x_vp = alpha x0 + sigma eps, alpha^2 = abar;  network output v_vp = alpha eps - sigma x0
ours       x_t = (1 - t) x0 + t eps with t = sigma / (alpha + sigma): x_t = x_vp / (alpha + sigma),
           1 / (alpha + sigma) = hypot(1 - t, t), and v = eps - x0. An Euler step in t is exactly DDIM (eta = 0), and
           exploration "ddim" is DDIM with noise, so the sampler of predictor.py serves these families too
runs       targets whose latents are denoised together, told one text. Marigold: one run of all its targets; RGB-X: a
           run of its own for each
spaces     native maps are as the pipelines give them: colours in the space that `properties` declare, depth [0, 1]
           0 near, normals [-1, 1] x right, y up, z toward the viewer. `decode` gives the encodings of
           relations.MODALITIES: colours sRGB-encoded. A shading, known up to scale, is encoded without dividing by its
           maximum: else one pixel would change all others
Networks: sd2.py; noise levels: schedule.py; files: diffusers_files.py. Families: marigold.py, e2e.py, rgbx.py.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from models import lora
from models.card import model_card
from models.diffusers_files import (
    EMPTY,
    INDEX,
    copy_components,
    embed_prompts,
    pipeline_folder,
    read_networks,
    read_part,
    write_networks,
    write_prompts,
)
from models.schedule import Schedule, flow_time
from models.sd2 import LATENT_SCALE
from relations import MODALITIES, NAMES, srgb_encode
from runtime import files
from runtime.weights import bounded_integer

MODALITY = {"albedo": "albedo", "shading": "irradiance", "irradiance": "irradiance", "depth": "depth",
            "normals": "normal"}                                                # target name: modality
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
EDGE = 1 << 12                         # px, largest processing resolution


class LatentFlow(nn.Module):
    """A pipeline as a predictor (see the module docstring and predictor.py for the interface).

    schedule    Schedule;  text  (runs, tokens, C) embedding of each run's prompt
    about       contents of model_index.json;  source  folder it came from
    runs        tuple of tuples of target names
    properties  dict target -> dict with prediction_space "linear" or "srgb" (where it is not said: srgb)
    """

    lora_targets = LORA_TARGETS
    exploration = "ddim"
    replays = False
    encodes_alike = True               # the VAE is frozen
    prompts = EMPTY
    forced = {}                        # options of the scheduler that the family sets, whatever its file says
    photo_first = True                 # order of the U-Net's input: photo, state
    default_size = 768                 # px, longer side that the network sees, where the index does not say
    default_steps = 4
    card = None                        # models.card.Card

    def __init__(self, unet, vae, schedule, text, about, source, runs, properties):
        super().__init__()
        self.unet = unet
        self.vae = vae.requires_grad_(False)
        self.schedule = schedule
        self.about = about
        self.source = source
        self.runs = runs
        self.properties = properties
        self.targets = sum(runs, ())
        self.register_buffer("text", text, persistent=False)
        n = 4 * len(runs[0])
        got = (unet.config["in_channels"], unet.config["out_channels"])
        if not self.targets or got != (n + 4, n):
            raise ValueError(f"predictor: targets {runs[0]} with a U-Net of {got[0]} -> {got[1]} channels; want "
                             f"{n + 4} -> {n}: four for each target and four for the photo")
        # modality: its target, the run, the place in the run
        self.places = {MODALITY[name]: (name, k, place) for k, run in enumerate(runs)
                       for place, name in enumerate(run) if name in MODALITY}
        self.modalities = tuple(self.places)
        # modalities that one walk gives
        self.walks = tuple(filter(None, (tuple(m for m in self.places if self.places[m][1] == k)
                                         for k in range(len(runs)))))
        run_of = torch.tensor([self.places.get(m, ("", 0, 0))[1] for m in NAMES])
        self.register_buffer("run_of", run_of, persistent=False)                # (len(NAMES),) run of each modality
        self.size = bounded_integer(about.get("default_processing_resolution") or self.default_size, 1, EDGE,
                                    "default_processing_resolution", f"predictor: {INDEX}")
        self.steps = about.get("default_denoising_steps") or self.default_steps
        self.multiple = vae.scale
        self.vae_tile = 0

    @property
    def network(self):
        """The module that is fine-tuned."""
        return self.unet

    @property
    def cfg(self):
        """What the files say of the networks and the sampler."""
        return self.about, self.schedule.config, self.unet.config, self.vae.config, self.runs

    def checkpointing(self, on):
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.unet.checkpointing = on

    def shape(self, rgb):
        """Shape (c, h, w) of the state for photos (B, 3, H, W)."""
        return 4 * len(self.runs[0]), *(n // self.multiple for n in rgb.shape[-2:])

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
            raise ValueError(f"predictor: got a {rgb.shape[-2]} x {rgb.shape[-1]} px image; want both sides a multiple "
                             f"of {self.multiple}")
        return self._photo_latent(self._pixels(rgb))

    def velocity(self, x, t, cond, modality=None):
        """v = eps - x0 of one run's targets at once: x (B, 4n, h, w), t (B,) in [0, 1], cond (B, 4, h, w). fp32.

        modality  a name, or (B,) index in NAMES of each state; where there is one run it does not matter
        The U-Net gets the nearest of its 1000 timesteps; the noise levels are those of t itself.
        """
        t = t.double()
        index = (self.schedule.times_on(t.device)[None] - t[:, None]).abs().argmin(1)
        norm = torch.hypot(1 - t, t)
        x = x.float() / _as_map(norm)                                           # x_vp
        v = self._native_velocity(x, index, cond, self._text_of(modality))
        return _as_map((2 * t - 1) / norm) * x + _as_map(1 / norm) * v          # (sigma - alpha) x + (alpha + sigma) v

    @torch.no_grad()
    def decode(self, x, modality, cond=None):
        """Map of the modality table from a state at the final time: (B, 4n, h, w) -> (B, C, 8h, 8w)."""
        if modality not in self.modalities:
            raise ValueError(f"predictor: this model predicts {', '.join(self.targets)}; got modality {modality!r}")
        t = flow_time(self.schedule.final)
        target, _, place = self.places[modality]
        native = self._native((x / math.hypot(1 - t, t))[:, 4 * place:4 * place + 4], target)
        return self._encoded(native, target)

    def loss(self, maps, modalities, draw):
        """Supervised loss on scenes with ground truth (--replay): not offered. raises ValueError."""
        raise ValueError("predictor: --replay needs ground truth for every target of the pipeline, which the "
                         "procedural scenes do not have; use --replay 0")

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

    def predict(self, image, steps=None, latents=None, processing_res=None, generator=None, ensemble=1, quirk=True):
        """What the family's own pipeline returns with output_type="np".

        image    (H, W, 3) uint8 sRGB;  steps  denoising steps (None: the model's);  latents (E, 4n, h, w) initial noise
        processing_res  px, longer side the network sees (None: the model's; 0: the photo's own);  ensemble  E
        quirk    True: a step ends where diffusers ends it (see Schedule.steps); False: at the next visited timestep
        returns  dict target -> (H, W, C) float32 in the pipeline's own colour space
        raises   ValueError for another image shape or dtype, or latents of another shape
        """
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"predictor: got an image {image.shape} {image.dtype}; want (H, W, 3) uint8")
        rgb = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        maps = self._predict(rgb, steps, latents, processing_res, generator, ensemble, quirk)
        return {k: v.permute(1, 2, 0).numpy() for k, v in maps.items()}

    @torch.no_grad()
    def _predict(self, rgb, steps, latents, processing_res, rng, ensemble, quirk):
        device = self.text.device
        x, (h, w) = self._fit(self._pixels(rgb).to(device), self.size if processing_res is None else processing_res)
        cond = self._photo_latent(x)                                            # (1, 4, h/8, w/8)
        want = (ensemble, *self.shape(x))
        if latents is None:
            latents = torch.randn(want, generator=rng, device="cpu" if rng is None else rng.device)
        if tuple(latents.shape) != want:
            raise ValueError(f"predictor: got latents {tuple(latents.shape)}; want {want}")
        out = {}
        for k, run in enumerate(self.runs):
            z = torch.cat([self._sample(one.to(device), cond, steps or self.steps, quirk, k)
                           for one in latents.split(1)])
            for place, name in enumerate(run):
                members = self._native(z[:, 4 * place:4 * place + 4], name)[:, :, :h, :w]          # (E, C, h, w)
                out[name] = self._full_size(members, name, rgb.shape[2:])[0].cpu()
        return out

    def _sample(self, x, cond, steps, quirk, run=0):
        """DDIM, eta 0, in native variables (DDIM eq. 12): noise (1, 4n, h, w) -> clean latents, scaled."""
        for t, abar, abar_s in self.schedule.steps(steps, quirk):
            v = self._native_velocity(x, t, cond, self.text[run:run + 1])
            a = math.sqrt(abar)
            s = math.sqrt(1 - abar)
            x = x.float()
            x = math.sqrt(abar_s) * (a * x - s * v) + math.sqrt(1 - abar_s) * (s * x + a * v)
        return x

    @property
    def _dtype(self):
        return self.vae.quant_conv.weight.dtype

    def _pixels(self, rgb):
        """Photos (B, 3, H, W) sRGB [0, 1] as the VAE takes them, [-1, 1]."""
        return 2 * rgb - 1

    def _photo_latent(self, x):
        return torch.cat([self.vae.encode(one) for one in x.to(self._dtype).split(1)]) * LATENT_SCALE

    def _fit(self, x, edge):
        """Pixels (1, 3, H, W) at the size the network sees, padded; and the size (h, w) before padding.

        raises  ValueError: the short side would vanish
        """
        if edge:
            x = F.interpolate(x, self._small(x.shape[2:], edge), mode="bilinear", antialias=True)
        h, w = x.shape[2:]
        m = self.multiple
        return F.pad(x, (0, -w % m, 0, -h % m), mode="replicate"), (h, w)

    def _small(self, size, edge, multiple=1):
        """(H, W) with the longer side at `edge`, both floored to a multiple."""
        small = [n * edge // max(size) // multiple * multiple for n in size]
        if 0 in small:
            files.refuse(f"predictor at --processing-res {edge}", f"a {size[0]} x {size[1]} px photo, whose short side "
                         "would vanish", "a less elongated one", "cut it, or use a larger --processing-res")
        return small

    def _text_of(self, modality):
        """The prompt of states: (1, tokens, C) of all, or (B, tokens, C)."""
        if len(self.runs) == 1:
            return self.text
        if isinstance(modality, str):
            return self.text[self.places[modality][1]][None]
        return self.text[self.run_of[modality]]

    def _native_velocity(self, x, t, cond, text):
        """v_vp of x_vp (B, 4n, h, w) at timesteps t, fp32."""
        parts = (cond, x) if self.photo_first else (x, cond)
        return self.unet(torch.cat([z.to(self._dtype) for z in parts], 1), t, text).float()

    def _native(self, z, target):
        """Clean latent (B, 4, h, w), scaled -> native map (B, C, 8h, 8w), fp32."""
        x = self._decoded(z)
        if kind_of(target) == "vector":
            return F.normalize(x.clamp(-1, 1), dim=1, eps=1e-6)
        if kind_of(target) == "distance":
            x = x.mean(1, keepdim=True)
        return (x.clamp(-1, 1) + 1) / 2

    def _decoded(self, z):
        return self.vae.decode((z / LATENT_SCALE).to(self._dtype), self.vae_tile).float()

    def _full_size(self, members, target, size):
        """One map (1, C, H, W) of an ensemble (E, C, h, w)."""
        full = F.interpolate(combine_members(members, target), size, mode="bilinear")
        return F.normalize(full, dim=1, eps=1e-6) if kind_of(target) == "vector" else full

    def _encoded(self, native, target):
        linear = self.properties.get(target, {}).get("prediction_space", "srgb") == "linear"
        return srgb_encode(native.clamp(0, 1)) if linear else native

    @classmethod
    def load(cls, path, dtype=torch.float32):
        """Open a diffusers-layout folder or hub id; fp32 or fp16 files, weights kept in `dtype`.

        raises  FileNotFoundError: a file is missing; ValueError: what is not implemented, or keys that do not fit
        """
        with files.DamageGuard(f"predictor: {path}", "a checkpoint that cannot be read", "a whole diffusers folder",
                               keep=(ValueError, FileNotFoundError)):
            return cls._load(path, dtype)

    @classmethod
    def _load(cls, path, dtype, **more):
        folder = pipeline_folder(path)
        about = read_part(folder / INDEX)
        unet, vae = read_networks(folder, dtype)
        schedule = Schedule(read_part(folder / "scheduler" / "scheduler_config.json"), **cls.forced)
        text = embed_prompts(folder, cls.prompts, unet.config["cross_attention_dim"]).to(dtype)
        return cls(unet, vae, schedule, text, about, folder, **more).eval()

    def save(self, folder, **facts):
        """Write the diffusers layout (adapters merged), a model card, and the adapters alone in PEFT layout.

        facts  lines of the model card: base, trained_on, command, commit, ...
        raises OSError naming the file; each file is whole, the old one or the new one
        """
        folder = Path(folder)
        write_networks(folder, self.unet, self.vae, lora.merged_state(self.unet))
        write_prompts(folder, self.prompts, self.text)
        (folder / "scheduler").mkdir(exist_ok=True)
        files.write_json(folder / "scheduler" / "scheduler_config.json", self.schedule.config)
        if self.source:
            copy_components(Path(self.source), folder)
        lora.write_adapters(self.unet, folder / "lora", base=str(facts.get("base", "")))
        files.write_text(folder / "README.md", model_card(self.card, self._card_lines(), facts))
        files.write_json(folder / INDEX, self.about)                            # last: a folder without it is refused

    def _card_lines(self):
        """What the model card says of the network."""
        spaces = ", ".join(f"{k}: {self.properties.get(k, {}).get('prediction_space', 'see above')}"
                           for k in self.targets)
        return {"targets": ", ".join(self.targets), "colour space": spaces,
                "processing resolution": f"{self.size} px, longer side", "denoising steps": self.steps}


def _as_map(z):
    """(B,) -> (B, 1, 1, 1), float32."""
    return z.float().view(-1, 1, 1, 1)


def kind_of(target):
    """Kind of a target's map, as in the modality table; a target that is no modality is a colour."""
    return MODALITIES[MODALITY[target]].kind if target in MODALITY else "colour"


def combine_members(members, target):
    """One map of an ensemble (E, C, h, w) -> (1, C, h, w), as Marigold's pipelines combine them.

    vectors: per pixel the member closest to the mean direction. colours: per-pixel median. distances: each member is
    fitted to the first one by scale and shift, then the median (differs: diffusers optimises all fits jointly)
    """
    if len(members) == 1:
        return members
    if kind_of(target) == "vector":
        mean = F.normalize(members.mean(0, keepdim=True), dim=1, eps=1e-6)
        closest = (mean * members).sum(1, keepdim=True).argmax(0, keepdim=True)
        return members.gather(0, closest.expand(-1, 3, -1, -1))
    if kind_of(target) == "distance":
        first = members[0].flatten().double()
        flat = members.flatten(1).double()
        centred = flat - flat.mean(1, keepdim=True)
        goal = first - first.mean()
        scale = (centred * goal).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp_min(1e-12)
        fitted = centred * scale + first.mean()
        return fitted.float().view_as(members).median(0, keepdim=True).values.clamp(0, 1)
    return members.median(0, keepdim=True).values
