"""Tiny random depth and normal networks of transformers, one of each row of models/depth_families.py.

Random networks of this size are degenerate (a disparity of 0..1e-7, a metric depth at its limit), so their weights are
scaled, and the last layer's shifted, until the map has a spread.
"""
import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import BeitConfig, Dinov2Config

NECK = dict(reassemble_factors=[4, 2, 1, 0.5], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8)
LAYERS = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2)


def dinov2(**changes):
    return Dinov2Config(**LAYERS, **dict(image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], apply_layernorm=False,
                                         reshape_hidden_states=False, mlp_ratio=2) | changes)


def anything(kind, **changes):
    config = getattr(transformers, f"{kind}Config")
    return config(backbone_config=dinov2(), reassemble_hidden_size=16, head_hidden_size=8, patch_size=14, **NECK,
                  **changes)


def dpt(**changes):
    return transformers.DPTConfig(**LAYERS, intermediate_size=32, image_size=64, patch_size=16,
                                  backbone_out_indices=[0, 1, 2, 3], **NECK | changes)


def dpt_dinov2():
    return transformers.DPTConfig(backbone_config=dinov2(), use_bias_in_fusion_residual=False,
                                  **NECK)


def zoe(bins=1):
    eye = BeitConfig(**LAYERS, intermediate_size=32, image_size=64, patch_size=16, use_relative_position_bias=True,
                     reshape_hidden_states=False, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
    names = [dict(n_bins=8, min_depth=0.001, max_depth=10.0, name="nyu"),
             dict(n_bins=8, min_depth=0.001, max_depth=80.0, name="kitti")]
    route = dict(num_patch_transformer_layers=4, patch_transformer_hidden_size=128,
                 patch_transformer_intermediate_size=32, patch_transformer_num_attention_heads=4) if bins > 1 else {}
    return transformers.ZoeDepthConfig(backbone_config=eye, bottleneck_features=8, num_attractors=[4, 4, 4, 1],
                                       bin_embedding_dim=8, num_relative_features=8, bin_configurations=names[:bins],
                                       **NECK, **route)


def depth_pro():
    eye = dict(model_type="dinov2", **LAYERS, patch_size=8, image_size=32, mlp_ratio=2)
    return transformers.DepthProConfig(
        patch_size=32, fusion_hidden_size=16, intermediate_hook_ids=[2, 1], intermediate_feature_dims=[8, 8],
        scaled_images_feature_dims=[8, 8, 8], use_fov_model=False, image_model_config=eye, patch_model_config=eye,
        fov_model_config=eye)


def glpn():
    return transformers.GLPNConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1, 1, 2, 2],
                                   mlp_ratios=[2] * 4, decoder_hidden_size=8)


def tips():
    eye = transformers.CONFIG_MAPPING["tipsv2_vision_model"](
        **LAYERS, intermediate_size=32, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], apply_layernorm=True,
        reshape_hidden_states=False)
    return transformers.Tipsv2DptConfig(backbone_config=eye, num_depth_bins=16, num_labels=4, **NECK)


def sapiens(**changes):
    head = dict(upsample_out_channels=[16, 12, 8, 8], use_pixel_shuffle=True, upsample_kernel_sizes=[3] * 4,
                conv_out_channels=[8], conv_kernel_sizes=[3])
    return transformers.Sapiens2Config(
        **LAYERS, intermediate_size=32, image_size=[64, 48], patch_size=16, num_register_tokens=2, use_gated_mlp=True,
        num_key_value_attention_heads=1, num_first_full_attention_layers=1, num_last_full_attention_layers=1,
        num_labels=3, head_config=head, **changes)


NETWORKS = {  # name: class, function that makes its config, (height, width) px of a photo
    "anything": ("DepthAnythingForDepthEstimation", lambda: anything("DepthAnything"), (56, 70)),
    "metric": ("DepthAnythingForDepthEstimation",
               lambda: anything("DepthAnything", depth_estimation_type="metric", max_depth=20), (56, 70)),
    "prompt": ("PromptDepthAnythingForDepthEstimation", lambda: anything("PromptDepthAnything"), (56, 70)),
    "dpt": ("DPTForDepthEstimation", dpt, (64, 64)),
    "dpt_dinov2": ("DPTForDepthEstimation", dpt_dinov2, (56, 70)),
    "zoe": ("ZoeDepthForDepthEstimation", zoe, (64, 96)),
    "zoe_two": ("ZoeDepthForDepthEstimation", lambda: zoe(2), (64, 96)),
    "depth_pro": ("DepthProForDepthEstimation", depth_pro, (128, 128)),
    "glpn": ("GLPNForDepthEstimation", glpn, (64, 96)),
    "tips": ("Tipsv2DptForDensePrediction", tips, (56, 56)),
}
OTHERS = {"sapiens": ("Sapiens2ForNormalEstimation", sapiens, (64, 48))}     # normals alone
PROCESSORS = {
    "anything": "DPTImageProcessorPil", "metric": "DPTImageProcessorPil", "dpt_dinov2": "DPTImageProcessorPil",
    "prompt": "PromptDepthAnythingImageProcessorPil", "dpt": "DPTImageProcessorPil", "zoe": "ZoeDepthImageProcessorPil",
    "zoe_two": "ZoeDepthImageProcessorPil", "glpn": "GLPNImageProcessorPil"}


def make(name):
    """A tiny random network in eval mode."""
    kind, config, _ = (NETWORKS | OTHERS)[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config()).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.normal_(0, (1.2 if p.ndim == 4 else 1) / p[0].numel() ** 0.5)
            if name == "depth_pro":
                model.head.layers[4].bias.fill_(0.3)
    return model


@functools.cache
def folder(name):
    """A folder of one, as transformers writes it."""
    path = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    make(name).save_pretrained(path)
    return path
