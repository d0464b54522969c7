"""Photos: reading any of them as sRGB, finding them in a folder, cutting them to size.

rgb       (3, H, W) float32, sRGB-encoded in [0, 1], upright
errors    ValueError (bad content) or FileNotFoundError (missing), one line: got, want, do. Paths are printed with repr,
          so a newline in a name stays inside the line
"""
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from data import formats
from runtime.files import DamageGuard, limit, refuse

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SMALLEST = 8                                    # px: a photo with a shorter side is refused


def open_image(path, max_pixels=None):
    """Decode one image file completely.

    returns  PIL image, EXIF orientation applied; info["wide"]: the file holds several channels of 16 bits
    raises   FileNotFoundError; ValueError: damaged, no image, below 8 x 8, above max_pixels (None: --max-pixels)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"photos.py: no file {str(path)!r}; want an existing image; check the path")
    where = f"photos.py: cannot read {str(path)!r}"
    most = 8 * (max_pixels or limit["pixels"]) + (1 << 20)                        # bytes: 16-bit RGBA, 1 MB of metadata
    if path.stat().st_size > most:
        refuse(where, f"{path.stat().st_size} bytes", f"at most {most}", "remove it, or raise --max-pixels")
    image, wide = formats.open_picture(path.read_bytes(), where, SMALLEST, max_pixels)
    with DamageGuard(where, "a damaged image", "a whole one"):
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
    image = open_image(path, max_pixels)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.float32) / 65535
        if not (gray.min() >= 0 and gray.max() <= 1):                             # also refuses NaN
            raise ValueError(f"photos.py: cannot read {str(path)!r}: got {image.mode} values outside 0..65535, "
                             "want 8- or 16-bit; convert it")
        return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
    with DamageGuard(f"photos.py: cannot read {str(path)!r}", "a damaged image", "a whole one"):
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
        raise FileNotFoundError(f"photos.py: {str(folder)!r} is {got}; {want} or a folder; check the path")
    found = []
    seen = set()
    for root, dirs, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:                                                          # a link loop
            dirs.clear()
            continue
        seen.add(real)
        dirs.sort()
        found += [Path(root, f) for f in files if Path(f).suffix.lower() in EXTENSIONS]
    if not found:
        raise FileNotFoundError(f"photos.py: no image in {str(folder)!r}; {want}; check the folder")
    return sorted(found)


def read_first_rgb(folder):
    """The first photo of a folder that can be read, as read_rgb returns it.

    raises   FileNotFoundError (find_images); ValueError when none can be read: it says what is wrong with the first
    """
    error = None
    for path in find_images(folder):
        try:
            return read_rgb(path)
        except (ValueError, OSError) as problem:
            error = error or problem
    raise ValueError(f"photos.py: no image in {str(folder)!r} can be read (first: {error})")


def readable_photos(paths, skipped):
    """Photos of paths, read one by one: (path, rgb (3, H, W)).

    skipped  list to which (path, reason) of each that cannot be read is added; it is named on stderr as well
    """
    for path in paths:
        try:
            yield path, read_rgb(path)
        except (ValueError, OSError) as error:
            skipped.append((path, str(error)))
            tqdm.write(f"skipped: {error}", file=sys.stderr)


def resize(x, height, width, mode="antialias"):
    """(C, h, w) -> (C, height, width); "antialias" for colours, "nearest" for measured values and masks."""
    if x.shape[1:] == (height, width):
        return x
    if mode == "nearest":
        return F.interpolate(x[None].float(), (height, width), mode="nearest-exact")[0].to(x.dtype)
    return F.interpolate(x[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)


def fit_square(x, size, mode="antialias"):
    """(C, H, W) -> (C, size, size): centred square crop, then `resize` in the same two modes."""
    H, W = x.shape[1:]
    side = min(H, W)
    top = (H - side) // 2
    left = (W - side) // 2
    return resize(x[:, top:top + side, left:left + side], size, size, mode)


def resize_long(rgb, long_edge, multiple=1):
    """(3, H, W) in [0, 1] -> longer side about long_edge, aspect kept, sides multiples of `multiple`."""
    scale = long_edge / max(rgb.shape[1:])
    height, width = (max(1, int(n * scale / multiple + 0.5)) * multiple for n in rgb.shape[1:])
    return resize(rgb, height, width)


def as_bytes(rgb, size):
    """(3, H, W) in [0, 1] -> (3, size, size) uint8: `fit_square`, rounded. Judges and policies read photos so."""
    return (fit_square(rgb, size) * 255).round().to(torch.uint8)


class Photos:
    """All photos of a folder in memory, uint8, each read once: `size`^2 x 3 bytes per photo.

    folder    searched by find_images; size: side of the square that `fit_square` cuts, pixels
    limit     stop after this many readable ones; 0: all
    .names    paths relative to the folder, in the order of the rows of .images (n, 3, size, size) uint8
    .skipped  [(path, reason)] of files that could not be read; each is also named on stderr
    raises    FileNotFoundError (find_images); ValueError when none is readable
    """

    def __init__(self, folder, size, limit=0):
        paths = find_images(folder)
        root = Path(folder)
        root = root.parent if root.is_file() else root
        self.images = torch.zeros(min(limit or len(paths), len(paths)), 3, size, size, dtype=torch.uint8)
        self.names = []
        self.skipped = []
        bar = tqdm(paths, desc="photos", leave=False, disable=len(paths) < 50)
        for path, rgb in itertools.islice(readable_photos(bar, self.skipped), len(self.images)):
            self.images[len(self.names)] = as_bytes(rgb, size)
            self.names.append(str(path.relative_to(root)))
        if not self.names:
            raise ValueError(f"photos.py: none of {len(paths)} images in {str(folder)!r} could be read "
                             f"(first: {self.skipped[0][1]})")
        if self.skipped:
            print(f"photos.py: skipped {len(self.skipped)} of {len(paths)} in {str(folder)!r}", file=sys.stderr)
        self.images = self.images[:len(self.names)]

    def __len__(self):
        return len(self.names)

    def batch(self, index):
        """(B,) integer tensor -> (B, 3, size, size) float32 in [0, 1]."""
        return self.images[index].float() / 255
