"""Depth and normal networks of transformers, which map a photo straight to a map (predictor.MapPredictor).

depth     "planar z up to scale and shift, 0 near": metres as they are; a disparity or inverse depth d as -d, which
          keeps its order and every relation, and gives d back to an evaluation in disparity
pixels    prepared here, since most processors need torchvision: as preprocessor_config.json says, else as the table
size      the map has the photo's size: the network's is resized, bilinear
training  a head's last ReLU gives way to the identity: equal where it was positive; below, order and a gradient
Source: transformers' modeling and image_processing files; models/depth_families.py says what is special in each.
"""
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

from models import checkpoint, lora
from models.card import Card, model_card
from models.depth_families import AFFINE, SIGN, UNUSED, check_model_type, find_family
from relations import MODALITIES
from runtime.files import DamageGuard, read_json, refuse, replace_files, write_json
from runtime.weights import bounded_integer, hub_folder, plain_config, refuse_flip, remove_flip

ABOUT = ["config.json", "model_index.json", "predictor.json"]    # what a hub id is: read before its weights
PATTERNS = ["*.json", "*.safetensors", "README.md"]
EDGE = 1 << 12                        # px, longest side of the photos it is made for
CARD_BYTES = 1 << 16                  # of a model card that are read
UNKNOWN_STEPS = ("do_center_crop", "do_flip_channel_order", "do_grayscale", "do_crop_margin")


class DepthNetwork(nn.Module):
    """A network of transformers.

    model      of transformers;  family  its row of models.depth_families
    processor  dict, its preprocessor_config.json;  license  of the weights it began with, "" where unknown
    flip_x     "yes", "no": whether x of its normals is to be negated, where the family does not know
    """

    architecture = "transformers"

    def __init__(self, model, family, processor, license="", flip_x=""):
        super().__init__()
        self.model = model
        self.family = family
        self.processor = processor
        self.license = license
        self.modalities = family.modalities
        self.depth_means = family.means or AFFINE
        self.facts = dict(flip_x=flip_x) if flip_x else {}
        mean, std, self.sides = read_pixels(processor, family, model.config)
        self.size = max(self.sides)
        self.multiple = 1 if family.fit == "canvas" else family.multiple(model.config)
        x_sign = family.x_sign or (-1 if flip_x == "yes" else 1)
        self.register_buffer("x_sign", torch.tensor(float(x_sign)), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.clips = bool(family.end)
        if family.end:
            parent, _, name = family.end.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
        paths = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
        self.lora_targets = tuple(t for t in family.lora_targets if any(p.endswith(f".{t}") for p in paths))

    def begin_training(self):
        """Let values below 0 pass from now on."""
        self.clips = False

    def checkpointing(self, on):
        """Recompute the layers of the photo encoder in the backward pass. raises ValueError: the class cannot."""
        if on and not self.model.supports_gradient_checkpointing:
            raise ValueError(f"depth: {self.family.kind} cannot recompute activations; use --no-checkpointing")
        if on:
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable(dict(use_reentrant=False))
        for m in self.model.modules():                                          # a layer recomputes in training mode
            if hasattr(m, "gradient_checkpointing"):                            # alone; what lies in it stays as it is
                m.training = on

    def network_size(self, padded, size):
        """(height, width) px that the network gets for a photo of `size`, which has been padded to `padded`."""
        if self.family.fit == "fixed":
            return self.size, self.size
        if min(size) < self.multiple:
            raise ValueError(f"depth: got a photo of {size[0]} x {size[1]} px; want sides of at least {self.multiple} "
                             f"px, one patch of {self.family.kind}; use a larger --size")
        scale = max(n / p for n, p in zip(size, padded, strict=True))           # the one nearer 1: the aspect stays
        sides = [max(1, self.family.whole(p * scale / self.multiple)) * self.multiple for p in padded]
        return (max(sides),) * 2 if self.family.fit == "square" else tuple(sides)

    def size_on_canvas(self, size):
        """(height, width) px of a photo of `size` in the network's own height x width, its aspect kept."""
        scale = min(n / k for n, k in zip(self.sides, size, strict=True))
        return tuple(max(1, int(k * scale)) for k in size)

    def prepare(self, rgb):
        """What the network gets: (B, 3, H, W) sRGB [0, 1] -> pixels (B, 3, h, w), px that padding added (top, left)."""
        size = tuple(rgb.shape[-2:])
        margin = (0, 0)
        if self.family.fit == "canvas":
            h, w = self.size_on_canvas(size)
            top, left = margin = tuple((n - k) // 2 for n, k in zip(self.sides, (h, w), strict=True))
            if size != (h, w):
                rgb = F.interpolate(rgb, (h, w), **self.family.resample)
            rgb = F.pad(rgb, (left, self.sides[1] - w - left, top, self.sides[0] - h - top))
            return ((rgb - self.mean) / self.std).to(rgb.dtype), margin
        if self.family.pad:
            margin = tuple(int(3 * math.sqrt(n / 2)) for n in size)
            rgb = F.pad(rgb, (margin[1], margin[1], margin[0], margin[0]), mode="reflect")
        wanted = self.network_size(rgb.shape[-2:], size)
        if tuple(rgb.shape[-2:]) != wanted:
            rgb = F.interpolate(rgb, wanted, **self.family.resample)
        return ((rgb - self.mean) / self.std).to(rgb.dtype), margin

    def predict(self, rgb, modality):
        """Map (B, C, H, W) of photos (B, 3, H, W), sRGB [0, 1]: see the module docstring; normals are unit vectors."""
        parts = rgb.split(1) if self.family.alone else (rgb,)
        return torch.cat([self._predict(part, modality) for part in parts])

    def _predict(self, rgb, modality):
        pixels, margin = self.prepare(rgb)
        out = self.model(pixel_values=pixels)
        is_normal = MODALITIES[modality].kind == "vector"
        if is_normal:
            maps = F.normalize(out.normals.float(), dim=1)
        else:
            maps = out.predicted_depth.float()[:, None]
            maps = maps.clamp_min(0) if self.clips else maps
        maps = self._uncover(maps, tuple(rgb.shape[-2:]), margin)
        if not is_normal:
            return SIGN[self.family.means] * maps
        return F.normalize(torch.cat((self.x_sign * maps[:, :1], maps[:, 1:]), 1), dim=1)

    def _uncover(self, maps, size, margin):
        """What of the network's map (B, C, h, w) shows the photo, at its size (H, W). margin  of `prepare`"""
        top, left = margin
        h, w = size
        whole = h + 2 * top, w + 2 * left
        if self.family.fit == "canvas":
            h, w = self.size_on_canvas(size)
            whole = self.sides
        return resize_maps(resize_maps(maps, whole)[..., top:top + h, left:left + w], size)

    def save(self, folder):
        """Write what transformers opens (adapters merged), and the adapters alone in PEFT layout. raises OSError."""
        replace_files(folder, self._write, last="config.json", obsolete=checkpoint.set_files(folder, "model"))
        lora.write_adapters(self.model, folder / "lora", base=str(self.model.config.name_or_path))

    def _write(self, folder):
        state = {k: v.detach().cpu() for k, v in lora.merged_state(self.model).items()}
        self.model.save_pretrained(folder, state_dict=state)
        if self.processor:
            write_json(folder / "preprocessor_config.json", self.processor)

    def card(self, about):
        """Text of the model card. about: base, trained_on, ... of the run."""
        kind = self.family.kind
        kept = self.license or "not known here; that of the base model holds"
        card = Card(kind, self.license, f"- license of the weights: {kept}\n", f"transformers.{kind}.from_pretrained",
                    "transformers")
        closer = "closer" if SIGN.get(self.family.means, 1) < 0 else "farther"
        right = "right" if self.x_sign > 0 else "left"
        means = {"depth": ("depth", f"{self.family.means}, larger is {closer}"),
                 "normal": ("normals", f"x {right}, y up, z toward the camera")}
        base = dict(base=remove_flip(about["base"])) if "base" in about else {}
        return model_card(card, dict(means[m] for m in self.modalities), about | base)


def read_pixels(processor, family, config):
    """How pixels are prepared: mean and std of values in [0, 1], px of the sides of the photos it is made for.

    processor  dict, preprocessor_config.json; what it does not say is the family's
    raises     Refusal: a processor that cannot be reproduced
    """
    where = "preprocessor_config.json"
    steps = [name for name in UNKNOWN_STEPS if processor.get(name)]
    if steps:
        refuse(where, f"{steps[0]} = {processor[steps[0]]!r}", "scale, mean, std and size alone",
               "write a class of your own around it (docs/extend.md)")
    mean, std = family.pixels
    if processor.get("do_normalize", True):
        mean, std = (processor.get(k) or v for k, v in (("image_mean", mean), ("image_std", std)))
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    if not isinstance(factor, (int, float)) or not 0 < factor <= 1:
        refuse(where, f"rescale_factor = {factor!r}", "a number in 0..1")
    unit = 255 * factor                                                         # of a pixel of 1
    values = []
    for name, value in (("image_mean", mean), ("image_std", std)):
        value = value if isinstance(value, (list, tuple)) else [value] * 3
        if len(value) != 3 or not all(isinstance(x, (int, float)) and abs(x) < 1e4 for x in value):
            refuse(where, f"{name} = {value!r}", "three numbers")
        values.append([x / unit for x in value])
    if not min(values[1]) > 0:
        refuse(where, f"image_std = {std!r}", "numbers above 0")
    size = family.size(config) if callable(family.size) else family.size
    size = (processor.get("size") if family.fit != "fixed" else None) or size
    if isinstance(size, dict):
        size = [size[k] for k in ("height", "width") if k in size] or list(size.values())
    sides = [bounded_integer(n, 1, EDGE, "size", where) for n in (size if isinstance(size, (list, tuple)) else [size])]
    if family.fit == "canvas":
        sides = sides * 2 if len(sides) == 1 else sides
        patch = family.multiple(config)
        if len(sides) != 2 or any(n % patch for n in sides) or processor.get("do_pad") is False:
            refuse(where, f"size = {size}, do_pad = {processor.get('do_pad', True)}",
                   f"a height and a width, multiples of {patch} px, and photos that keep their aspect",
                   "write a class of your own around it (docs/extend.md)")
    return *values, tuple(sides)


def resize_maps(maps, size):
    """Maps (B, C, h, w) at another size (H, W), bilinear."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def read_flip(spec, folder, family):
    """What is known of x of a network's normals beside its family: "yes" (negate it), "no", "" where the family knows.

    spec    runtime.weights.Spec, which has what --flip-x says;  folder  whose predictor.json keeps it, once tuned
    raises  Refusal: neither says it, they differ, or the family knows better
    """
    path = folder / "predictor.json"
    kept = read_json(path).get("flip_x", "") if path.is_file() else ""
    where = f"depth: {spec.text}"
    if family.x_sign:
        refuse_flip(spec)
        return ""
    flip_x = spec.flip_x or kept
    if flip_x not in ("yes", "no"):
        refuse(where, "normals of which nothing published says whether x points right or left", "--flip-x yes or no",
               "look at a photo of a room with `predictor.py PHOTO --flip-x no`: a wall on its left must come out with "
               "x > 0 (red above 127); if it does not, the answer is yes")
    if kept not in ("", flip_x):
        refuse(where, f"--flip-x {flip_x} for a network that was tuned with --flip-x {kept}", "the same",
               "leave it out: it is kept there")
    return flip_x


def refuse_downloads(config, where):
    """Refuse a config (a dict) that names a backbone instead of holding it: transformers would fetch it."""
    for name, value in config.items():
        if name in ("backbone", "use_timm_backbone", "use_pretrained_backbone") and value:
            refuse(where, f"{name} = {str(value)[:80]!r}", "the backbone's own configuration", "use another checkpoint")
        if name == "model_type" and "timm" in str(value):
            refuse(where, f"model_type = {str(value)[:80]!r}", "a network of transformers", "use another checkpoint")
        if isinstance(value, dict):
            refuse_downloads(value, where)


def card_license(folder):
    """The license that a folder's README.md states in its head, "" where it states none."""
    path = folder / "README.md"
    if not path.is_file():
        return ""
    with open(path, "rb") as f:
        text = f.read(CARD_BYTES).decode(errors="replace")
    start, _, rest = text.partition("---")
    found = re.search(r"^license: *([\w.+-]{1,60}) *$", rest.partition("\n---")[0], re.MULTILINE)
    return found[1] if found and not start.strip() else ""


def open_depth(spec):
    """The network of a SPEC (runtime.weights.Spec) whose folder or hub id has a config.json; None: it has none.

    A pipeline of diffusers (model_index.json) is another kind too. What a hub id is, is read before its weights.
    raises  Refusal: a class that is not in the table, weights that do not fit; FileNotFoundError
    """
    folder = spec.folder or hub_folder(spec.text, ABOUT)
    if (folder / "model_index.json").is_file() or not (folder / "config.json").is_file():
        refuse_flip(spec)
        return None
    found = plain_config(read_json(folder / "config.json"), folder / "config.json")
    where = f"depth: {folder}"
    check_model_type(found, where)
    refuse_downloads(found, where)
    with DamageGuard(where, "a checkpoint that cannot be read", "a whole one"):
        config = transformers.CONFIG_MAPPING[found["model_type"]].from_dict(found)
        family = find_family(config, where)
        flip_x = read_flip(spec, folder, family)
        folder = spec.folder or hub_folder(spec.text, PATTERNS)
        path = folder / "preprocessor_config.json"
        processor = read_json(path) if path.is_file() else {}
        read_pixels(processor, family, config)                                  # before the weights
        state = checkpoint.read_weights(folder, "model")
        model = checkpoint.build_network(getattr(transformers, family.kind), config, state, folder, torch.float32,
                                         UNUSED, family.attention)
        model.config.name_or_path = spec.text
        return DepthNetwork(model, family, processor, card_license(folder), flip_x).eval()
