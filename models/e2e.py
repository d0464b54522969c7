"""Marigold E2E-FT: depth or normals in one deterministic step, from a U-Net of Marigold's layout.

rule      latent 0, timestep 999 (trailing), empty prompt; the map is x0 itself: x0 = -sqrt(1 - abar_999) v
ours      Marigold's flow with one step from t = sigma / (alpha + sigma) to t = 0, started at 0. The last level of the
          schedule is set to a clean latent, so nothing is left of it in the map. In GRPO this is the one transition:
          exploration adds noise of std --noise to the latent, whose spread the VAE's scale makes about 1; the policy
          does not move it
axes      its normals point x left: x is negated
depth     known up to scale and shift: a photo's map is stretched to [0, 1]
target    no file of the authors says whether a network gives depth or normals: PUBLISHED does, or reasonx.json
Source: Fine-Tuning Image-Conditional Diffusion Models is Easier than You Think (Martin Garcia et al. 2024).
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from models.card import Card
from models.diffusers_files import FAMILY, pipeline_folder, read_part
from models.latent_flow import LatentFlow, kind_of
from runtime import files

NAME = "e2e-ft"
TARGETS = ("depth", "normals")
PUBLISHED = {f"GonzaloMG/{base}-e2e-ft-{target}": target
             for base in ("marigold", "stable-diffusion") for target in TARGETS}
WANT = " or ".join(f'{{"family": "{NAME}", "target": "{target}"}}' for target in TARGETS)


class E2E(LatentFlow):
    """An E2E-FT network as a predictor; arguments as of LatentFlow. target: one of TARGETS."""

    forced = dict(timestep_spacing="trailing", set_alpha_to_one=True)
    card = Card("Marigold E2E-FT", "other",
                "\nWeights: those of the base model; see its page. The authors' code is Apache-2.0.\n",
                "diffusers; one step from a zero latent at timestep 999, x0 = -sqrt(1 - abar) v is decoded")

    def __init__(self, unet, vae, schedule, text, about, source=None, target=""):
        if target not in TARGETS:
            raise ValueError(f"predictor: got target {target!r} of an E2E-FT network; want {' or '.join(TARGETS)}")
        super().__init__(unet, vae, schedule, text, about, source, ((target,),), {})
        self.steps = 1

    def times(self, T):
        """One step, whatever T."""
        return super().times(1)

    def start(self, noise, T):
        """Zero: nothing but the photo decides the map."""
        return torch.zeros_like(noise)

    def _sample(self, x, cond, steps, quirk, run=0):
        return super()._sample(torch.zeros_like(x), cond, 1, quirk, run)

    def _native(self, z, target):
        if kind_of(target) == "distance":
            return super()._native(z, target)
        x = unit(self._decoded(z))
        return torch.cat((-x[:, :1], x[:, 1:]), 1)

    def _full_size(self, members, target, size):
        one = members[:1]                                                       # all are the same
        if kind_of(target) == "distance":
            low, high = one.aminmax()
            one = (one - low) / (high - low).clamp_min(1e-12)
        full = F.interpolate(one, size, mode="bilinear", antialias=True)
        return full if kind_of(target) == "distance" else unit(full).clamp(-1, 1)

    @classmethod
    def _load(cls, path, dtype):
        return super()._load(path, dtype, target=PUBLISHED.get(str(path)) or read_target(pipeline_folder(path)))

    def save(self, folder, **facts):
        """As LatentFlow.save, and the file that says what the network gives."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / FAMILY, dict(family=NAME, target=self.targets[0]))
        super().save(folder, **facts)


def unit(x):
    """Vectors (B, 3, H, W) divided by their length plus 1e-5, as the authors do."""
    return x / (x.norm(dim=1, keepdim=True) + 1e-5)


def read_target(folder):
    """What the user's reasonx.json says of a folder. raises FileNotFoundError; ValueError: other words."""
    said = read_part(folder / FAMILY)
    if said.get("family") != NAME or said.get("target") not in TARGETS:
        files.refuse(folder / FAMILY, f"{said}", WANT, "write one of them")
    return said["target"]
