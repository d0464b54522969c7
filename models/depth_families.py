"""What is special about each depth and normal class of transformers: one table, read by models/depth.py.

means       disparity, inverse depth: larger is closer. metres, depth up to scale: larger is farther
ends        the ReLU at the end of a head, which clips at 0. Its zeros tie and have no gradient
x_sign      of normals: 1 where x points right, -1 where it points left (ours: right); 0 where nothing published says
            which: the user does (--flip-x)
fit         how a photo gets the size that the network takes:
            sides     each side to its nearest multiple
            square    a square as large as the longer side, at its nearest multiple
            fixed     always a square of `size`: other sizes give maps of another scale
            canvas    as large as fits into the processor's height x width, black around it
Source: the modeling and image_processing files of transformers 5.24. Directions: models' papers and authors
(docs/models.md says where each was read).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import transformers

from runtime.files import refuse

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                         # mean, std of pixels in [0, 1]
HALF = (0.5,) * 3, (0.5,) * 3
PLAIN = (0.0,) * 3, (1.0,) * 3
BICUBIC = dict(mode="bicubic", antialias=True)
BILINEAR = dict(mode="bilinear", antialias=True)
ALIASED = dict(mode="bilinear")
CORNERS = dict(mode="bilinear", align_corners=True)
# times it, the smaller values of a map are closer
AFFINE = "depth up to scale"          # what a depth means where nothing else is said
SIGN = {"disparity": -1, "inverse depth": -1, AFFINE: 1, "metres": 1}
# weights of the first fusion layer that nothing reaches; older checkpoints lack them
UNUSED = r"neck\.fusion_stage\.layers\.0\.residual_layer1\."
# ends of the paths of an attention's linear layers, under the names of any version
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "attention.query", "attention.key", "attention.value",
             "attention.output.dense", "self.query", "self.key", "self.value")
# of Sapiens2
GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _patch(config):
    side = config.patch_size
    return side if isinstance(side, int) else side[0]


def _backbone_patch(config):
    return _patch(config.backbone_config)


@dataclass(frozen=True)
class DepthFamily:
    """A row. The functions are of the network's configuration object."""

    model_type: str
    kind: str                             # class of transformers
    means: str                            # what its depth is, a key of SIGN
    pixels: tuple                         # mean, std
    size: int | Callable                  # px, longer side of the photos it is made for; canvas: height, width
    multiple: Callable                    # px, of which sides must be multiples
    resample: dict                        # arguments of F.interpolate
    end: str = ""                         # path of the ReLU at the end, "" where there is none
    when: Callable = lambda config: True  # whether the row holds for a configuration
    modalities: tuple = ("depth",)
    x_sign: int = 1
    fit: str = "sides"
    whole: Callable = round               # of a side over the multiple
    pad: bool = False                     # reflect the photo's border, as ZoeDepth does
    alone: bool = False                   # one photo at a time: the map of a photo depends on the others in its batch
    attention: str | None = None          # "eager": torch has another kernel for a learned bias when it has a gradient
    lora_targets: tuple = ATTENTION       # those that the network has


def _depth_anything(model_type, kind, size):
    """Rows of a class with Depth Anything's head: a ReLU for relative depth, a sigmoid for metres."""
    shared = dict(pixels=IMAGENET, size=size, multiple=_backbone_patch, resample=BICUBIC)
    # a prompt in metres scales the output of the other class and does not turn it round
    relative = "disparity" if model_type == "depth_anything" else "depth up to scale"
    return (
        DepthFamily(model_type, kind, relative, end="head.activation2",
                    when=lambda config: config.depth_estimation_type == "relative", **shared),
        DepthFamily(model_type, kind, "metres", when=lambda config: config.depth_estimation_type == "metric", **shared))


_TIPS = dict(model_type="tipsv2_dpt", means="metres", pixels=PLAIN, size=448, multiple=_backbone_patch,
             resample=BILINEAR, x_sign=-1, fit="square")
_ZOE = dict(model_type="zoedepth", kind="ZoeDepthForDepthEstimation", means="metres", pixels=HALF, size=512,
            multiple=lambda config: 32, resample=CORNERS, pad=True, attention="eager")

DEPTH_FAMILIES = (
    *_depth_anything("depth_anything", "DepthAnythingForDepthEstimation", 518),
    *_depth_anything("prompt_depth_anything", "PromptDepthAnythingForDepthEstimation", 756),
    DepthFamily("dpt", "DPTForDepthEstimation", "disparity", HALF, 384, _patch, BICUBIC, "head.head.5", fit="square",
                when=lambda config: config.backbone_config is None),
    DepthFamily("dpt", "DPTForDepthEstimation", "metres", IMAGENET, 518, _backbone_patch, BICUBIC, "head.head.5",
                when=lambda config: getattr(config.backbone_config, "model_type", "") == "dinov2"),
    DepthFamily(**_ZOE, when=lambda config: len(config.bin_configurations) == 1),
    DepthFamily(**_ZOE, when=lambda config: len(config.bin_configurations) > 1, alone=True),
    DepthFamily("depth_pro", "DepthProForDepthEstimation", "inverse depth", HALF, lambda config: 4 * _patch(config),
                lambda config: 1, ALIASED, "head.layers.5", fit="fixed"),
    DepthFamily("glpn", "GLPNForDepthEstimation", "metres", PLAIN, 640, lambda config: 32, BILINEAR, whole=math.floor),
    DepthFamily(kind="Tipsv2DptForDensePrediction", modalities=("depth", "normal"), **_TIPS),
    DepthFamily(kind="Tipsv2DptForDepthEstimation", **_TIPS),
    DepthFamily(kind="Tipsv2DptForNormalEstimation", modalities=("normal",), **_TIPS),
    DepthFamily("sapiens2", "Sapiens2ForNormalEstimation", "", IMAGENET, lambda config: config.image_size, _patch,
                BILINEAR, modalities=("normal",), x_sign=0, fit="canvas", lora_targets=GATED),
)
MODEL_TYPES = tuple(dict.fromkeys(row.model_type for row in DEPTH_FAMILIES))
REFUSED = {"chmv2": "a map of canopy height, which is no depth"}


def check_model_type(config, where):
    """Refuse a config.json (a dict) whose class is not in the table, before anything is made of it. raises Refusal."""
    name = config.get("model_type")
    known = f"one of {', '.join(MODEL_TYPES)} (docs/models.md)"
    if name in REFUSED:
        refuse(where, f"model_type {name!r}: {REFUSED[name]}", known, "use another model")
    if name not in MODEL_TYPES:
        refuse(where, f"model_type {str(name)[:80]!r}", known, "write a class of your own around it (docs/extend.md)")
    if name not in transformers.CONFIG_MAPPING:
        refuse(where, f"model_type {name!r}, which transformers {transformers.__version__} does not know",
               "a later version", "pip install -U transformers")


def find_family(config, where):
    """The row of a configuration object. raises Refusal: a known model_type in a form that is not in the table."""
    named = config.architectures or [""]
    for row in DEPTH_FAMILIES:
        if row.model_type == config.model_type and named[0] in ("", row.kind) and row.when(config):
            return row
    kinds = sorted({row.kind for row in DEPTH_FAMILIES if row.model_type == config.model_type})
    backbone = getattr(getattr(config, "backbone_config", None), "model_type", "none")
    refuse(where, f"architecture {named[0]!r} with backbone {backbone!r}", f"{' or '.join(kinds)} in a form of "
           "docs/models.md", "write a class of your own around it (docs/extend.md)")
