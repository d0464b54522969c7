"""Readers and writers: photos, HyperSim-style scene folders, predicted maps.

sample    rgb (3, H, W) float32, sRGB-encoded in [0, 1]; where known also depth (1, H, W), lower = closer, up
          to scale and shift; normal (3, H, W) unit, x right, y up, z toward the camera, 0 = invalid; albedo,
          irradiance (3, H, W) sRGB-encoded in [0, 1]; mask (1, H, W) bool, True = valid
refusals  ValueError (bad content) or FileNotFoundError (missing), one line: got, want, do. Paths are printed
          with repr, so a newline in a name stays inside the line
writes    to a temporary name, then os.replace: an interrupted run leaves no half file under a final name
"""
import functools
import io
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import formats
import scenes
from untrusted import Refusing, limit, refuse

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SMALLEST = 8                                    # px: a photo with a shorter side is refused
MAPS = ("rgb", "depth", "normal", "albedo", "irradiance")
# colour map, near to far: pale yellow, orange, red, plum, violet, indigo, navy, near black; luma falls evenly
ANCHORS = np.array([[254, 246, 190], [253, 205, 106], [243, 150, 70], [216, 96, 86],
                    [165, 62, 118], [108, 44, 124], [56, 28, 98], [16, 12, 44]]) / 255


def _open(path, max_pixels=None):
    """Decode one image file completely -> PIL image, EXIF orientation applied, info["wide"] as in formats."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data.py: no file {str(path)!r}; want an existing image; check the path")
    where = f"data.py: cannot read {str(path)!r}"
    most = 8 * (max_pixels or limit["pixels"]) + (1 << 20)                        # 16-bit RGBA, and what describes it
    if path.stat().st_size > most:
        refuse(where, f"{path.stat().st_size} bytes", f"at most {most}", "remove it, or raise --max-pixels")
    image, wide = formats.open_picture(path.read_bytes(), where, SMALLEST, max_pixels)
    with Refusing(where, "a damaged image", "a whole one"):
        ImageOps.exif_transpose(image, in_place=True)
    image.info["wide"] = wide
    return image


def read_rgb(path, max_pixels=None):
    """Read any photo as sRGB.

    path     jpg, png, webp, bmp, tiff: RGB, gray, palette, bilevel, CMYK, 16-bit gray (over 65535), EXIF
             orientation applied, transparency composited on white, first frame only; no colour management.
             A 16-bit *RGB* PNG is read by Pillow with 8 bits: fine for photos, not for measured data
    returns  (3, H, W) float32 in [0, 1]
    raises   FileNotFoundError; ValueError for a file that is damaged, no image, below 8 x 8, above max_pixels
             (None: --max-pixels)
    """
    image = _open(path, max_pixels)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.float32) / 65535
        if not (gray.min() >= 0 and gray.max() <= 1):                             # also refuses NaN
            raise ValueError(f"data.py: cannot read {str(path)!r}: got {image.mode} values outside 0..65535, "
                             "want 8- or 16-bit; convert it")
        return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
    with Refusing(f"data.py: cannot read {str(path)!r}", "a damaged image", "a whole one"):
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        rgb = torch.empty(3, image.height, image.width)
        for k in range(3):                                                        # one at a time: it may be large
            rgb[k] = torch.from_numpy(np.array(image.getchannel(k)))
    return rgb.div_(255)


def find_images(folder):
    """Sorted paths of all images under a folder (recursive, links followed once), or the one file named.

    raises   FileNotFoundError for a missing folder or when there is no file with one of EXTENSIONS
    """
    folder = Path(folder)
    want = f"want {', '.join(e[1:] for e in EXTENSIONS)} files"
    if folder.is_file() and folder.suffix.lower() in EXTENSIONS:
        return [folder]
    if not folder.is_dir():
        got = "not an image file" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"data.py: {str(folder)!r} is {got}; {want} or a folder; check the path")
    found, seen = [], set()
    for root, dirs, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:                                                          # a link loop
            dirs.clear()
            continue
        seen.add(real)
        dirs.sort()
        found += [Path(root, f) for f in files if Path(f).suffix.lower() in EXTENSIONS]
    if not found:
        raise FileNotFoundError(f"data.py: no image in {str(folder)!r}; {want}; check the folder")
    return sorted(found)


def first_readable(folder):
    """The first image of a folder that can be read, or the error of the first that cannot. raises as read_rgb."""
    error = None
    for path in find_images(folder):
        try:
            return read_rgb(path)
        except (ValueError, OSError) as problem:
            error = error or problem
    raise ValueError(f"data.py: no image in {str(folder)!r} can be read (first: {error})")


def _resize(x, height, width, mode="antialias"):
    """(C, h, w) -> (C, height, width); "antialias" for colours, "nearest" for measured values and masks."""
    if x.shape[1:] == (height, width):
        return x
    if mode == "nearest":
        return F.interpolate(x[None].float(), (height, width), mode="nearest-exact")[0].to(x.dtype)
    return F.interpolate(x[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)


def _square(x):
    """Largest centred square of (C, H, W)."""
    side, (H, W) = min(x.shape[1:]), x.shape[1:]
    return x[:, (H - side) // 2:(H - side) // 2 + side, (W - side) // 2:(W - side) // 2 + side]


def fit(x, size, mode="antialias"):
    """(C, H, W) -> (C, size, size): centred square crop; colours in [0, 1] antialiased, measured values "nearest"."""
    return _resize(_square(x), size, size, mode)


def resize_long(rgb, long_edge, multiple=1):
    """(3, H, W) in [0, 1] -> longer side about long_edge, aspect kept, sides multiples of `multiple`."""
    scale = long_edge / max(rgb.shape[1:])
    height, width = (max(1, int(n * scale / multiple + 0.5)) * multiple for n in rgb.shape[1:])
    return _resize(rgb, height, width)


def as_bytes(rgb, size):
    """(3, H, W) in [0, 1] -> (3, size, size) uint8: `fit`, rounded. What judges and policies see of a photo."""
    return (fit(rgb, size) * 255).round().to(torch.uint8)


class Photos:
    """All photos of a folder in memory, uint8, each read once: `size`^2 x 3 bytes per photo.

    folder    searched by find_images; size: side of the square that `fit` cuts, pixels
    limit     stop after this many readable ones; 0: all
    .names    paths relative to the folder, in the order of the rows of .images (n, 3, size, size) uint8
    .skipped  [(path, reason)] of files that could not be read; each is also named on stderr
    raises    FileNotFoundError (find_images); ValueError when none is readable
    """

    def __init__(self, folder, size, limit=0):
        paths, root = find_images(folder), Path(folder)
        root = root.parent if root.is_file() else root
        self.images = torch.zeros(min(limit or len(paths), len(paths)), 3, size, size, dtype=torch.uint8)
        self.names, self.skipped = [], []
        for path in tqdm(paths, desc="photos", leave=False, disable=len(paths) < 50):
            if len(self.names) == len(self.images):
                break
            try:
                rgb = read_rgb(path)
            except (ValueError, OSError) as error:
                self.skipped.append((path, str(error)))
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            self.images[len(self.names)] = as_bytes(rgb, size)
            self.names.append(str(path.relative_to(root)))
        if not self.names:
            raise ValueError(f"data.py: none of {len(paths)} images in {str(folder)!r} could be read "
                             f"(first: {self.skipped[0][1]})")
        if self.skipped:
            print(f"data.py: skipped {len(self.skipped)} of {len(paths)} in {str(folder)!r}", file=sys.stderr)
        self.images = self.images[:len(self.names)]

    def __len__(self):
        return len(self.names)

    def batch(self, index):
        """(B,) integer tensor -> (B, 3, size, size) float32 in [0, 1]."""
        return self.images[index].float() / 255


def list_scenes(folder):
    """Sorted scene ids of a HyperSim-style folder (ID_rgb.png, ...); any one map makes a scene."""
    folder = Path(folder)
    ids = {p.name[:-len(f"_{m}.png")] for m in MAPS for p in folder.glob(f"*_{m}.png")}
    if not ids:
        got = "no scene in" if folder.is_dir() else "no folder"
        raise FileNotFoundError(f"data.py: {got} {str(folder)!r}; want ID_rgb.png, ...; check the path")
    return sorted(ids)


def _read_map(folder, scene, name):
    """One map of a scene -> (C, H, W) float32 in [0, 1], as stored."""
    path = Path(folder, f"{scene}_{name}.png")
    if not path.is_file():
        raise FileNotFoundError(f"data.py: no {path.name} beside the maps of {scene} in {str(folder)!r}; "
                                "want one file per modality (README, Data)")
    image = _open(path)
    modes = ("L", "I;16", "I") if name == "depth" else ("RGB",)
    if image.mode not in modes or (name != "depth" and image.info["wide"]):
        got = "16-bit RGB (Pillow would cut it to 8)" if image.mode in modes else f"mode {image.mode}"
        raise ValueError(f"data.py: {str(path)!r} got {got}, want "
                         f"{'8- or 16-bit gray' if name == 'depth' else '8-bit RGB'}; convert it")
    pixels = np.asarray(image).astype(np.float32) / (65535 if image.mode.startswith("I") else 255)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def read_scene(folder, scene, size=None):
    """Read one HyperSim-style scene (the released judge's layout) as a sample dict.

    size     None = as stored; else centred square crop, colours antialiased, depth, normal and mask nearest:
             no depth is averaged across an edge
    returns  rgb, depth, normal, albedo, irradiance, mask. depth is stored value / range, in [0, 1], affine
             per image; normals are renormalised. mask is False where the stored normal is zero (0, 0, 0 or
             mid-gray): there depth reads as closest, and normal is set to the zero vector
    raises   FileNotFoundError for a missing map; ValueError for another mode or different sizes
    """
    maps = {m: _read_map(folder, scene, m) for m in MAPS}
    H, W = maps["rgb"].shape[1:]
    for m, x in maps.items():
        if x.shape[1:] != (H, W):
            raise ValueError(f"data.py: {scene}_{m}.png in {str(folder)!r} got {x.shape[2]} x {x.shape[1]} "
                             f"pixels, want {W} x {H} as {scene}_rgb.png; export all maps at one size")
    normal = 2 * maps["normal"] - 1
    length = normal.norm(dim=0, keepdim=True)                                     # (1, H, W)
    mask = maps["normal"].any(0, keepdim=True) & (length > 0.05)    # mid-gray (127, 128) decodes to < .01
    maps["normal"], maps["mask"] = torch.where(mask, normal / length.clamp_min(0.05), 0.0), mask
    if size is not None:
        mode = {"depth": "nearest", "normal": "nearest", "mask": "nearest"}
        maps = {m: _resize(_square(x), size, size, mode.get(m, "antialias")) for m, x in maps.items()}
    return maps


def read_scene_folder(folder, size=None):
    """Yield (id, sample) for every scene of a folder, sorted by id; see list_scenes and read_scene."""
    for scene in list_scenes(folder):
        yield scene, read_scene(folder, scene, size)


def _write(path, content):
    """Bytes to a file, atomically; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{os.getpid()}.partial"
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_png(path, image):
    """Write a PIL image, or a (3, H, W) or (H, W) array in [0, 1] as 8 bit, atomically; returns the path."""
    if not isinstance(image, Image.Image):
        pixels = np.round(np.clip(np.asarray(image, np.float64), 0, 1) * 255).astype(np.uint8)
        image = Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0).copy())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    _write(Path(path), buffer.getvalue())
    return Path(path)


def save_map(out_dir, name, modality, array, native=None):
    """Write OUT/NAME_MODALITY.npy (float32, native space) and PNGs to look at; returns the list of paths.

    array    depth (1, H, W) or (H, W); normal (3, H, W) in [-1, 1]; others (3, H, W) sRGB in [0, 1]
    native   what the .npy holds where the model's own space is another (Marigold's linear albedo); None: array
    PNG      depth: 16 bit, the map's min..max -> 0..65535, and NAME_depth_colour.png; normal (n + 1) / 2;
             others 8-bit sRGB, clipped. This is the HyperSim-style layout, so a folder of them reads back
    name     may hold sub-folders, never a way out of out_dir
    """
    array, stem = np.asarray(array, np.float32), Path(out_dir, f"{name}_{modality}")
    array = array[None] if array.ndim == 2 else array
    native = array if native is None else np.asarray(native, np.float32)
    if array.ndim != 3 or array.shape[0] != (1 if modality == "depth" else 3):
        raise ValueError(f"data.py: save_map got {array.shape} for {modality!r}; want (1, H, W) for 'depth', "
                         f"(3, H, W) for others; check the modality")
    if not (np.isfinite(array).all() and np.isfinite(native).all()):
        raise ValueError(f"data.py: save_map got non-finite {modality!r} for {name!r}; want finite; fix it")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"data.py: save_map got name {name!r}; want one inside {str(out_dir)!r}; drop '..'")
    buffer = io.BytesIO()
    np.save(buffer, native)
    files = [Path(f"{stem}.npy"), Path(f"{stem}.png")]
    _write(files[0], buffer.getvalue())
    if modality == "depth":
        span = np.ptp(array.astype(np.float64)) or 1.0
        levels = np.round((array[0] - float(array.min())) / span * 65535).astype(np.uint16)
        save_png(files[1], Image.fromarray(levels))
        return files + [save_png(f"{stem}_colour.png", colourise(array))]
    save_png(files[1], (array + 1) / 2 if modality == "normal" else array)
    return files


def colourise(depth):
    """(H, W) or (1, H, W) depth, lower = closer -> (3, H, W) float32 in [0, 1]: near is bright, far dark.

    Stretched between the 2 % and 98 % quantiles; a constant map is the middle of the table.
    """
    depth = np.asarray(depth, np.float64).reshape(np.shape(depth)[-2:])
    low, high = np.quantile(depth, [0.02, 0.98])
    t = np.clip((depth - low) / (high - low), 0, 1) if high > low else np.full(depth.shape, 0.5)
    knots = np.linspace(0, 1, len(ANCHORS))
    return np.stack([np.interp(t, knots, ANCHORS[:, c]) for c in range(3)]).astype(np.float32)


def display(modality, array):
    """A map in native space -> (3, H, W) picture in [0, 1]: depth colourised, normals (n + 1) / 2, others as is."""
    return colourise(array) if modality == "depth" else (array + 1) / 2 if modality == "normal" else array


def panel(images, columns=5):
    """Grid of labelled pictures -> PIL image.

    images   [(label, (3, h, w) array in [0, 1])]; a map below 128 px is enlarged by a whole factor (nearest)
    columns  tiles per row; tiles are as large as the largest picture, labels that do not fit are cut
    """
    tiles = []
    for label, x in images:
        x = np.round(np.clip(np.asarray(x, np.float64), 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
        factor = -(-128 // min(x.shape[:2])) if min(x.shape[:2]) < 128 else 1
        # the default font holds Latin letters only
        tiles.append((" ".join(str(label).split()).encode("ascii", "replace").decode(),
                      Image.fromarray(x.repeat(factor, 0).repeat(factor, 1))))
    if not tiles or columns < 1:
        raise ValueError(f"data.py: panel got {len(tiles)} images, {columns} columns; want >= 1; add one")
    columns, gap, head = min(columns, len(tiles)), 4, 16                          # px
    width, height = (max(t.size[k] for _, t in tiles) for k in (0, 1))
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + head + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, (label, tile) in enumerate(tiles):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + head + gap)
        while label and draw.textlength(label) > width:
            label = label[:-1]
        draw.text((x, y + 1), label, fill="black")
        grid.paste(tile, (x, y + head))
    return grid


class ScenePool:
    """Procedural scenes in memory, rendered once: about 27 bytes per pixel and scene (float16 maps).

    domain, split  of scenes.py;  n scenes from the start of the split;  size px;  keys: which maps are kept
    device         where they are rendered, and kept if that is a GPU with room: at most ROOM of its free memory
    .maps          dict of (n, C, H, W) float16 tensors, mask bool
    """

    ROOM = 0.4

    KEYS = ("rgb", "depth", "normal", "albedo", "irradiance", "mask")

    def __init__(self, domain, split, n, size, keys=KEYS, device="cpu"):
        device, self.maps = torch.device(device), {}
        chunk = max(1, (512 * 32 * 32 if device.type == "cpu" else scenes.CHUNK["cuda"]) // size**2)
        for i in tqdm(range(0, n, chunk), desc=f"{domain} scenes", leave=False, disable=n <= 1000):
            maps = scenes.render(domain, scenes.scene_ids(split, min(chunk, n - i), i).to(device), size)
            maps = {k: maps[k] if k == "mask" else maps[k].half() for k in keys}
            if i == 0:
                home = self._home(n * sum(v[0].nbytes for v in maps.values()), device)
                self.maps = {k: v.new_empty(n, *v.shape[1:], device=home) for k, v in maps.items()}
            for k, v in maps.items():
                self.maps[k][i:i + len(v)].copy_(v)

    def _home(self, size, device):
        """Where maps of `size` bytes are kept."""
        if device.type == "cpu":
            return device
        torch.cuda.empty_cache()                                                  # a stage before left some behind
        return device if size <= self.ROOM * torch.cuda.mem_get_info(device)[0] else torch.device("cpu")

    def __len__(self):
        return len(next(iter(self.maps.values())))

    def pick(self, index, device="cpu"):
        """Maps of the scenes `index` (B,) as float32 on a device: dict of (B, C, H, W)."""
        if torch.is_tensor(index):
            index = index.to(next(iter(self.maps.values())).device, non_blocking=True)
        return {k: v[index].to(device) if v.dtype == torch.bool else v[index].to(device).float()
                for k, v in self.maps.items()}

    def all(self):
        """Maps of every scene, float32 on the CPU."""
        return self.pick(slice(None))


@functools.lru_cache(maxsize=6)
def scene_pool(*args, **kwargs):
    """ScenePool of the same arguments, rendered once per process."""
    return ScenePool(*args, **kwargs)


def scene_batch(folder, size):
    """All scenes of a HyperSim-style folder at one size, stacked: dict of (n, C, size, size)."""
    samples = [sample for _, sample in read_scene_folder(folder, size)]
    return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}
