"""Marigold in plain torch: the public pipelines of its v1-0 and v1-1 weights.

One run denoises all targets together, told the empty prompt; the photo's latent stands first in the U-Net's input.
Native maps are what diffusers returns: IID targets in the space that model_index.json declares (lighting: linear;
appearance albedo: sRGB). All else is latent_flow.py.
Source: Marigold (Ke et al. 2024; arXiv 2505.09358 for IID), Stable Diffusion 2 (Rombach et al. 2022), zero-terminal
SNR (Lin et al. 2023). Weights: OpenRAIL++-M.
"""
from models.card import Card
from models.diffusers_files import INDEX
from models.latent_flow import LatentFlow

PIPELINES = {"MarigoldIntrinsicsPipeline": None, "MarigoldDepthPipeline": ("depth",),
             "MarigoldNormalsPipeline": ("normals",)}                           # class: targets; None: the index says


class Marigold(LatentFlow):
    """A Marigold pipeline as a predictor; arguments as of LatentFlow.

    raises  ValueError: another pipeline, an option that is not implemented
    """

    def __init__(self, unet, vae, schedule, text, about, source=None):
        kind = about.get("_class_name")
        if kind not in PIPELINES:
            raise ValueError(f"predictor: {INDEX} has _class_name = {kind!r}, which is not implemented; want "
                             f"one of {', '.join(PIPELINES)}")
        if kind == "MarigoldNormalsPipeline" and not about.get("use_full_z_range", True):
            raise ValueError(f"predictor: {INDEX} has use_full_z_range = False, which is not implemented")
        properties = about.get("target_properties") or {}
        targets = PIPELINES[kind] or tuple(properties.get("target_names", ()))
        super().__init__(unet, vae, schedule, text, about, source, (targets,), properties)

    @property
    def card(self):
        """See LatentFlow."""
        return Card("Marigold", "openrail++", "\nWeights: CreativeML OpenRAIL++-M, as the base model.\n",
                    f"diffusers.{self.about['_class_name']}.from_pretrained")
