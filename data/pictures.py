"""Pictures that are written or shown: PNG files, the .npy and PNG of a predicted map, the colour map, panels.

Every file is written atomically (files.write_bytes). Paths in messages are printed with repr.
"""
import base64
import hashlib
import io
import itertools
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.photos import resize_long
from relations import MODALITIES
from runtime.files import write_bytes

# colour map, near to far: pale yellow, orange, red, plum, violet, indigo, navy, near black; luma falls evenly
ANCHORS = np.array([[254, 246, 190], [253, 205, 106], [243, 150, 70], [216, 96, 86],
                    [165, 62, 118], [108, 44, 124], [56, 28, 98], [16, 12, 44]]) / 255


def _levels(x):
    """An array in [0, 1] as 8 bit."""
    return np.round(np.clip(np.asarray(x, np.float64), 0, 1) * 255).astype(np.uint8)


def png_bytes(image):
    """A PIL image, or a (3, H, W) or (H, W) array in [0, 1] as 8 bit, as a PNG file's bytes."""
    if not isinstance(image, Image.Image):
        pixels = _levels(image)
        image = Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0).copy())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def png_address(image):
    """data: address that holds all of what png_bytes takes."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def save_png(path, image):
    """Write what png_bytes takes, atomically; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, png_bytes(image))
    return path


def row_of(name):
    """Row of the modality table; of a photo, and of what is no modality (Marigold's residual), a plain colour's."""
    return MODALITIES.get(name, MODALITIES["albedo"])


def save_map(out_dir, name, modality, array, native=None):
    """Write OUT/NAME_MODALITY.npy (float32, native space) and PNGs to look at; returns the list of paths.

    array    in the encoding of relations.MODALITIES; (H, W) will do for one channel. Other names are colours
    native   the map in the model's own space, for the .npy, where that differs (Marigold's linear albedo); None: array
    PNG      distance: 16 bit, the map's min..max -> 0..65535, and NAME_depth_colour.png; vector (n + 1) / 2; colour and
             scalar 8 bit, clipped. It is the HyperSim-style layout, so pools.read_scene can read the folder
    name     may contain sub-folders; it must not lead out of out_dir
    """
    array = np.asarray(array, np.float32)
    stem = Path(out_dir, f"{name}_{modality}")
    array = array[None] if array.ndim == 2 else array
    native = array if native is None else np.asarray(native, np.float32)
    row = row_of(modality)
    if array.ndim != 3 or array.shape[0] != row.channels:
        raise ValueError(f"pictures.py: save_map got {array.shape} for {modality!r}; want ({row.channels}, H, W); "
                         "check the modality")
    if not (np.isfinite(array).all() and np.isfinite(native).all()):
        raise ValueError(f"pictures.py: save_map got non-finite {modality!r} for {name!r}; want finite; fix it")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"pictures.py: save_map got name {name!r}; want one inside {str(out_dir)!r}; drop '..'")
    buffer = io.BytesIO()
    np.save(buffer, native)
    files = [Path(f"{stem}.npy"), Path(f"{stem}.png")]
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(files[0], buffer.getvalue())
    if row.kind == "distance":
        span = np.ptp(array.astype(np.float64)) or 1.0
        levels = np.round((array[0] - float(array.min())) / span * 65535).astype(np.uint16)
        save_png(files[1], Image.fromarray(levels))
        return files + [save_png(f"{stem}_colour.png", picture_of(modality, array))]
    save_png(files[1], array[0] if row.kind == "scalar" else picture_of(modality, array))
    return files


def colour_map(t):
    """(H, W) numbers in [0, 1] -> (3, H, W) float64 in [0, 1]: 0 is the bright end of the table, 1 the dark end."""
    knots = np.linspace(0, 1, len(ANCHORS))
    return np.stack([np.interp(t, knots, ANCHORS[:, c]) for c in range(3)])


def colour_depth(depth):
    """(H, W) or (1, H, W) depth, lower = closer -> (3, H, W) float32 in [0, 1]: near is bright, far dark.

    Stretched between the 2 % and 98 % quantiles; a constant map is the middle of the table.
    """
    depth = np.asarray(depth, np.float64).reshape(np.shape(depth)[-2:])
    low, high = np.quantile(depth, [0.02, 0.98])
    t = np.clip((depth - low) / (high - low), 0, 1) if high > low else np.full(depth.shape, 0.5)
    return colour_map(t).astype(np.float32)


def picture_of(modality, array):
    """A map in native space -> (3, H, W) picture: depth in colours, vectors (n + 1) / 2, scalars gray, others as is."""
    kind = row_of(modality).kind
    if kind == "distance":
        return colour_depth(array)
    if kind == "scalar":
        return np.repeat(array, 3, 0)
    return (array + 1) / 2 if kind == "vector" else array


def panel(images, columns=5):
    """Grid of labelled pictures -> PIL image.

    images   [(label, (3, h, w) array in [0, 1])]; a map below 128 px is enlarged by a whole factor (nearest)
    columns  tiles per row; tiles are as large as the largest picture, labels that do not fit are cut
    """
    tiles = []
    for label, x in images:
        x = _levels(x).transpose(1, 2, 0)
        factor = -(-128 // min(x.shape[:2])) if min(x.shape[:2]) < 128 else 1
        # the default font has Latin letters only
        tiles.append((" ".join(str(label).split()).encode("ascii", "replace").decode(),
                      Image.fromarray(x.repeat(factor, 0).repeat(factor, 1))))
    if not tiles or columns < 1:
        raise ValueError(f"pictures.py: panel got {len(tiles)} images, {columns} columns; want >= 1; add one")
    columns = min(columns, len(tiles))
    gap = 4                                                                       # px between tiles
    head = 16                                                                     # px of a label
    width, height = (max(t.size[k] for _, t in tiles) for k in (0, 1))
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + head + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, (label, tile) in enumerate(tiles):
        x = gap + i % columns * (width + gap)
        y = gap + i // columns * (height + head + gap)
        while label and draw.textlength(label) > width:
            label = label[:-1]
        draw.text((x, y + 1), label, fill="black")
        grid.paste(tile, (x, y + head))
    return grid


def save_maps(out, name, rgb, maps, native):
    """Write all maps of a photo: save_map of each, and NAME_panel.png of the photo and them.

    rgb     (3, H, W) in [0, 1];  maps, native  dict name -> (C, H, W), in the modality table's encoding and the model's
    """
    for (m, value), own in zip(maps.items(), native.values(), strict=True):
        save_map(out, name, m, value.numpy(), own.numpy())
    shown = {k: torch.from_numpy(picture_of(k, v.numpy())) for k, v in dict(photo=rgb, **maps).items()}
    tiles = [(k, resize_long(v, min(512, max(v.shape[-2:]))).numpy()) for k, v in shown.items()]
    save_png(Path(out) / f"{name}_panel.png", panel(tiles))


def output_name(path, done):
    """Name of a photo's maps from its relative path, unlike those in `done`: a.jpg, a.png and folders stay apart."""
    name = "_".join(path.with_suffix("").parts)
    if len(os.fsencode(name)) > 200:                                            # a file name may have 255 bytes
        name = f"{name[:40]}_{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    choices = itertools.chain((name, f"{name}_{path.suffix[1:]}"), (f"{name}_{k}" for k in itertools.count(2)))
    return next(choice for choice in choices if choice not in done)
