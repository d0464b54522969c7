"""Photos: reading any of them as sRGB, finding them in a folder, cutting them to size.

rgb       (3, H, W) float32, sRGB-encoded in [0, 1], upright
errors    ValueError (bad content) or FileNotFoundError (missing), one line: got, want, do. Paths are printed with repr,
          so a newline in a name stays inside the line
"""
import hashlib
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import formats, headers
from relations import NAMES
from runtime.files import DamageGuard, Refusal, is_twin, limit, refuse
from runtime.ranks import rank

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jpe", ".jfif", ".mpo", ".gif",
              *[".avif"] * formats.HAS_AVIF)
FOREIGN = tuple(".heic .heif .hif .avif .jxl .jp2 .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .psd .exr .hdr .svg".split())
SYSTEM = {"@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information"}
MAPS = (*NAMES, "depth_colour", "shading", "residual", "material")              # what our files of maps are named for
SMALLEST = 8                                    # px: a photo with a shorter side is refused
# of a gray TIFF, by kind of number and bits: the values that may stand for full light
FULL = {("uint", 12): (4095,), ("uint", 16): (65535,), ("int", 8): (127,), ("int", 16): (255, 32767),
        ("uint", 32): (255, 65535, 2**32 - 1), ("int", 32): (255, 65535, 2**31 - 1), ("float", 32): (1, 255, 65535)}


def open_image(path, max_pixels=None):
    """Decode one image file completely.

    returns  PIL image, EXIF orientation applied; info["wide"]: the file holds several channels of 16 bits; of a TIFF
             info["samples"]: its (kind of number, bits), and info["negative"]: 0 is white and Pillow keeps it so
    raises   FileNotFoundError; ValueError: damaged, no image, below 8 x 8, above max_pixels (None: --max-pixels)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"photos.py: no file {str(path)!r}; want an existing image; check the path")
    where = f"photos.py: cannot read {str(path)!r}"
    most = 8 * (max_pixels or limit["pixels"]) + (1 << 20)                        # bytes: 16-bit RGBA, 1 MB of metadata
    if path.stat().st_size > most:
        refuse(where, f"{path.stat().st_size} bytes", f"at most {most}", "remove it, or raise --max-pixels")
    return _open_content(path.read_bytes(), where, max_pixels)


def _open_content(content, where, max_pixels=None):
    image, wide = formats.open_picture(content, where, SMALLEST, max_pixels)
    image.info["wide"] = wide
    with DamageGuard(where, "a damaged image", "a whole one"):
        if image.format == "TIFF":
            kind = {1: "uint", 2: "int", 3: "float"}[image.tag_v2.get(339, (1,))[0]]
            image.info["samples"] = kind, image.tag_v2.get(258, (1,))[0]
            image.info["negative"] = image.tag_v2.get(262) == 0 and image.mode in ("I", "F", "I;16", "I;16B")
        turn = headers.read_turn(image)
        image = image if turn is None else image.transpose(turn)
    return image


def _gray_light(image, where):
    """A gray image of other than 8 unsigned bits as a share of full light: (H, W) float32 in [0, 1].

    What stands for full light is the first value of FULL that is large enough. raises ValueError where that is not
    clear: a negative or a NaN, or nothing as bright as a sixteenth of it
    """
    kind = image.info.get("samples", ("uint", 16))                              # a PNG
    pixels = np.asarray(image)
    if kind == ("int", 8):
        pixels = pixels.view(np.int8)
    if kind == ("uint", 32):
        pixels = pixels.view(np.uint32)
    low = float(pixels.min())
    high = float(pixels.max())
    choices = FULL.get(kind, (65535,))
    full = next((x for x in choices if high <= x), 0)
    unclear = len(choices) > 1 and full > 1 and 0 < high < full / 16
    if not (low >= 0 and full) or unclear:                                      # also refuses NaN
        refuse(where, f"{image.mode} values {low:g}..{high:g} ({kind[0]}, {kind[1]} bits)",
               " or ".join(f"0..{x}" for x in choices) + " with something bright in it", "convert it to 8 or 16 bits")
    light = pixels.astype(np.float32)
    light /= full
    return 1 - light if image.info.get("negative") else light


def read_rgb(path, max_pixels=None):
    """Read any photo as sRGB.

    path     jpg, png, webp, bmp, tiff, gif, avif: RGB, gray, palette, bilevel, CMYK, 16-bit gray (over 65535), gray
             TIFF of other numbers (FULL), EXIF orientation applied, transparency composited on white, first picture
             only; no colour management. A 16-bit *RGB* PNG is read with 8 bits: fine for photos, not for measured data
    returns  (3, H, W) float32 in [0, 1]
    raises   FileNotFoundError; ValueError for a file that is damaged, no image, below 8 x 8, above max_pixels
             (None: --max-pixels)
    """
    return _as_rgb(open_image(path, max_pixels), f"photos.py: cannot read {str(path)!r}")


def decode_photo(content, name):
    """As read_rgb, of a file's bytes; errors call it `name`."""
    where = f"photos.py: cannot read {name!r}"
    return _as_rgb(_open_content(content, where), where)


def _as_rgb(image, where):
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or image.info.get("samples") == ("int", 8):
        return torch.from_numpy(_gray_light(image, where)).expand(3, -1, -1).contiguous()
    with DamageGuard(where, "a damaged image", "a whole one"):
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        rgb = torch.empty(3, image.height, image.width)
        for k in range(3):                                                        # one at a time: it may be large
            rgb[k] = torch.from_numpy(np.array(image.getchannel(k)))
    return rgb.div_(255)


def photo_size(path):
    """(H, W) of a photo as read_rgb returns it, from its header alone. raises as read_rgb."""
    image, _ = formats.open_picture(Path(path).read_bytes(), f"photos.py: cannot read {str(path)!r}", decode=False)
    return image.size if headers.read_turn(image) in headers.SIDEWAYS else image.size[::-1]


def _root(images):
    """The folder that names of photos are relative to: `images`, or the folder of that one file."""
    return Path(images).parent if Path(images).is_file() else Path(images)


def photo_paths(images, names):
    """Paths of photos from their names in `Photos(images)`; names of procedural ones (images "") stay as they are."""
    return [str(_root(images) / name) for name in names] if images else names


def is_own_picture(name, beside):
    """Whether a picture is a map, panel or chart that this program wrote, by its name and the names beside it.

    beside  the names of its folder. A map has its .npy beside it, or its photo where data.prepare wrote it
    """
    stem, _, ending = name.rpartition(".")
    if ending != "png":
        return False
    for m in (*MAPS, "panel"):
        photo = stem.removesuffix(f"_{m}")
        if photo != stem:
            arrays = [f"{photo}_{k}.npy" for k in (NAMES if m == "panel" else [m.removesuffix("_colour")])]
            return f"{photo}_rgb.png" in beside or not beside.isdisjoint(arrays)
    return stem == "panel" and "report.json" in beside


def _walk(folder, out, left_out):
    """Yield (path, whether it is below `out`) of every file under a folder; hidden and system ones go to left_out."""
    written = Path(out or folder).resolve()
    if Path(folder).resolve() not in written.parents:                           # the photos may be there too
        written = None
    seen = set()
    for root, dirs, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:                                                          # a link loop
            dirs.clear()
            continue
        seen.add(real)
        hidden = [n for n in (*dirs, *files) if n.startswith(".") or n.lower() in SYSTEM]
        dirs[:] = sorted(set(dirs).difference(hidden))
        left_out += [Path(root, n) for n in hidden if not is_twin(n)
                     and (n not in files or Path(n).suffix.lower() in EXTENSIONS)]
        yield root, sorted(set(files).difference(hidden)), written and Path(real).is_relative_to(written)


def find_images(folder, out=None, say=True):
    """Sorted paths of all photos under a folder (recursive, links followed once), or the one file named.

    out      folder that the command writes to: pictures below it are left out, unless it is the folder itself
    say      True: what was left out is counted on stderr: pictures of ours (is_own_picture, out), hidden and system
             files and folders, formats that are not read. Twins (files.is_twin) do not exist
    raises   FileNotFoundError for a missing folder or when there is no file with one of EXTENSIONS
    """
    folder = Path(folder)
    want = f"want {', '.join(e[1:] for e in EXTENSIONS)} files"
    if folder.is_file() and folder.suffix.lower() in EXTENSIONS:
        return [folder]
    if not folder.is_dir():
        got = "not an image file" if folder.exists() else "no such folder"
        if folder.is_file():
            with open(folder, "rb") as file:
                got = f"{headers.name_format(file.read(64))[0]} ({got})"
        raise FileNotFoundError(f"photos.py: {str(folder)!r} is {got}; {want} or a folder; check the path")
    found = []
    left = {"pictures that this program wrote": [], "hidden or system files and folders": [],
            "pictures of formats that are not read": []}
    own, hidden, foreign = left.values()
    for root, names, is_output in _walk(folder, out, hidden):
        beside = set(names)
        for name in names:
            suffix = Path(name).suffix.lower()
            place = found if suffix in EXTENSIONS else foreign if suffix in FOREIGN else None
            if place is found and (is_output or is_own_picture(name, beside)):
                place = own
            if place is not None:
                place.append(Path(root, name))
    words = ", ".join(f"{len(paths)} {what} (first: {str(paths[0].relative_to(folder))!r})"
                      for what, paths in left.items() if paths)
    if not found:
        raise FileNotFoundError(f"photos.py: no image in {str(folder)!r}"
                                f"{' but ' * bool(words)}{words}; {want}; check the folder")
    if words and say and rank() == 0:
        print(f"photos.py: left out in {str(folder)!r}: {words}", file=sys.stderr)
    return sorted(found)


def read_first_rgb(folder, out=None):
    """The first photo of a folder that can be read, as read_rgb returns it. out: of find_images.

    raises   FileNotFoundError (find_images); ValueError when none can be read: it says what is wrong with the first
    """
    error = None
    for path in find_images(folder, out, say=False):
        try:
            return read_rgb(path)
        except (ValueError, OSError) as problem:
            error = error or problem
    raise ValueError(f"photos.py: no image in {str(folder)!r} can be read (first: {error})")


def readable_photos(paths, skipped, read=read_rgb):
    """Photos of paths, read one by one: (path, read(path)).

    read     of a path; raises Refusal or OSError for a photo that it cannot use, which is skipped
    skipped  list to which (path, reason) of each skipped one is added; it is named on stderr as well
    """
    for path in paths:
        try:
            yield path, read(path)
        except (Refusal, OSError) as error:
            reason = str(error) if repr(str(path)) in str(error) else f"{str(path)!r}: {error}"
            skipped.append((path, reason))
            tqdm.write(f"skipped: {reason}", file=sys.stderr)


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


def square_points(pts, size, side, grid=1):
    """Points (..., 2) of a photo of size (H, W) px in its copy of side x side px: centres of grid x grid cells."""
    return pts * side // torch.tensor(size) // grid * grid + grid // 2


def resize_mode(kind):
    """How `resize` treats a map of Modality.kind: no depth or vector is averaged across an edge."""
    return "nearest" if kind in ("distance", "vector") else "antialias"


def resize_long(rgb, long_edge, multiple=1):
    """(3, H, W) in [0, 1] -> longer side about long_edge, aspect kept, sides multiples of `multiple`."""
    scale = long_edge / max(rgb.shape[1:])
    height, width = (max(1, int(n * scale / multiple + 0.5)) * multiple for n in rgb.shape[1:])
    return resize(rgb, height, width)


def as_bytes(rgb, size):
    """(3, H, W) in [0, 1] -> (3, size, size) uint8: `fit_square`, rounded. Judges and policies read photos so."""
    return (fit_square(rgb, size) * 255).round().to(torch.uint8)


def pixel_digest(rgb):
    """Digest of a photo's pixels, (3, H, W) in [0, 1], at 8 bits: 16 hex digits. Names and files do not matter."""
    pixels = (rgb * 255).round().to(torch.uint8)
    return hashlib.blake2b(pixels.numpy().tobytes() + str(tuple(rgb.shape)).encode(), digest_size=8).hexdigest()


class Photos:
    """All photos of a folder in memory, uint8, each read once: `size`^2 x 3 bytes per photo.

    folder    searched by find_images; size: side of the square that `fit_square` cuts, pixels
    limit     stop after this many readable ones; 0: all;  out: of find_images
    seen      side, pixels, at which a judge sees them; 0: size
    .names    paths relative to the folder, in the order of the rows of .images (n, 3, size, size) uint8
    .seen     (n, 3, seen, seen) uint8, the same squares; where the sides are equal it is .images itself
    .digests  pixel_digest of each
    .skipped  [(path, reason)] of files that could not be read; each is also named on stderr
    raises    FileNotFoundError (find_images); ValueError when none is readable
    """

    def __init__(self, folder, size, limit=0, out=None, seen=0):
        paths = find_images(folder, out)
        root = _root(folder)
        most = min(limit or len(paths), len(paths))
        self.images, self.seen = (torch.zeros(most, 3, side, side, dtype=torch.uint8) for side in (size, seen or size))
        self.names = []
        self.digests = []
        self.skipped = []
        bar = tqdm(paths, desc="photos", leave=False, disable=len(paths) < 50)
        for path, rgb in itertools.islice(readable_photos(bar, self.skipped), most):
            self.images[len(self.names)] = as_bytes(rgb, size)
            if seen not in (0, size):
                self.seen[len(self.names)] = as_bytes(rgb, seen)
            self.digests.append(pixel_digest(rgb))
            self.names.append(str(path.relative_to(root)))
        if not self.names:
            raise ValueError(f"photos.py: none of {len(paths)} images in {str(folder)!r} could be read "
                             f"(first: {self.skipped[0][1]})")
        if self.skipped:
            print(f"photos.py: skipped {len(self.skipped)} of {len(paths)} in {str(folder)!r}", file=sys.stderr)
        self.images = self.images[:len(self.names)]
        self.seen = self.images if self.seen.shape[1:] == self.images.shape[1:] else self.seen[:len(self.names)]

    def __len__(self):
        return len(self.names)

    def batch(self, index):
        """(B,) integer tensor -> (B, 3, size, size) float32 in [0, 1]."""
        return self.images[index].float() / 255
