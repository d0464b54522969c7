"""Bytes to arrays: a folder or a tar read by relative name, and the file formats the benchmarks are stored in.

A tar is indexed once and read in place; nothing is unpacked or written. Members that are links, or whose names are
absolute or contain "..", are ignored. Every decoder takes (content, where): the bytes, and the name that its errors
print. Errors are ValueErrors that say got, want, do. An image of more pixels than `--max-pixels` is refused before
memory for its pixels is allocated.
OpenEXR: scan lines, no compression, ZIPS or ZIP, half, float and uint (file layout: openexr.com).
"""
import csv
import functools
import importlib.util
import io
import math
import os
import posixpath
import struct
import tarfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.headers import count_scans, drop_notes, name_format
from runtime.files import DamageGuard, is_twin, limit, refuse

HAS_AVIF = importlib.util.find_spec("PIL._avif") is not None                    # a Pillow may be built without it
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF",      # never EPS: Pillow starts another program to decode it
            *["AVIF"] * HAS_AVIF)
SCANS = 20                                       # most scans of a large JPEG (10 are usual); each reads all pixels
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
EXR_MAGIC = 20000630
EXR_FLAGS = {0x200: "tiles", 0x800: "deep data", 0x1000: "several parts"}    # version flags that are not implemented
EXR_LINES = {0: 1, 2: 1, 3: 16}                  # compression (none, ZIPS, ZIP): scan lines of a block
EXR_TYPES = {0: "<u4", 1: "<f2", 2: "<f4"}       # pixel type (uint, half, float): numpy's dtype
EXR_LINE = 1 << 24                               # bytes, longest scan line


@functools.lru_cache(1 << 16)
def _plain(name):
    """A relative name without "./", or None when it leads out of its folder."""
    path = PurePosixPath(name)
    return None if "\0" in name or path.is_absolute() or ".." in path.parts or not path.parts else str(path)


class _CappedReads(io.FileIO):
    """A tar file of which at most 1 MB is read at once: a false size in a header cannot allocate gigabytes."""

    def read(self, size=-1):
        return super().read(min(size, 1 << 20) if size >= 0 else 1 << 20)


class Files:
    """Read-only access by relative name to a folder or to an uncompressed tar.

    path     folder or tar file; names are relative to it, or to a folder inside it (`under`); none is a twin
             (files.is_twin)
    raises   FileNotFoundError: no such folder or file; ValueError: not a tar, or a compressed one
    """

    def __init__(self, path):
        self.path = Path(path)
        self.prefix = ""
        self.index = None                                                       # of a tar: name -> (offset, bytes)
        self.fd = -1                                                            # of a tar: its open file
        if self.path.is_dir():
            return
        if not self.path.is_file():
            raise FileNotFoundError(f"no {str(path)!r}; want a folder or a tar; check the path")
        damage = DamageGuard(self.path, "a file that is no plain tar", "a folder or an uncompressed .tar",
                             "decompress or unpack it")
        with damage, _CappedReads(self.path) as file, tarfile.open(None, "r:", file) as tar:
            self.index = self._members(tar)
        self.fd = os.open(self.path, os.O_RDONLY)

    def _members(self, tar):
        """Names, offsets and sizes of the plain files. Offsets must grow: a cyclic index would never end."""
        found = {}
        last = -1
        for m in tar:
            if m.size < 0 or m.offset <= last:
                refuse(self.path, f"a member of {m.size} bytes at {m.offset}", "one after the other")
            last = m.offset
            if m.isreg() and not m.issparse() and _plain(m.name) and not is_twin(m.name):
                found[_plain(m.name)] = m.offset_data, m.size
        return found

    def __del__(self):
        if self.fd >= 0:
            os.close(self.fd)

    def under(self, prefix):
        """The same files with names relative to a folder inside."""
        other = Files.__new__(Files)
        other.path = self.path
        other.prefix = posixpath.join(self.prefix, _plain(prefix) or "")
        other.index = self.index
        other.fd = os.dup(self.fd) if self.fd >= 0 else -1
        return other

    def _full(self, name):
        plain = _plain(name)
        if plain is None:
            refuse(f"{self.path}: {name!r}", "a name that leaves the folder", "a relative name", "correct the list")
        return posixpath.join(self.prefix, plain)

    def where(self, name):
        """Full name of a file, for messages."""
        return f"{self.path}{':' if self.index is not None else '/'}{self._full(name)}"

    def size(self, name):
        """Bytes of a file, -1 where there is none."""
        full = self._full(name)
        if self.index is not None:
            return self.index.get(full, (0, -1))[1]
        path = os.path.join(self.path, full)
        if is_twin(full) or not os.path.isfile(path):                           # also for a name too long to exist
            return -1
        return os.stat(path).st_size

    def place(self, name):
        """Identity of an existing file: device, inode and member of a tar. Two names of one file have the same."""
        full = self._full(name)
        about = (self.path if self.index is not None else self.path / full).stat()
        return about.st_dev, about.st_ino, full if self.index is not None else ""

    def stamp(self, name):
        """Size and time of change of a file, to notice that it has changed; None where there is none."""
        path = self.path if self.index is not None else self.path / self._full(name)
        return (self.size(name), path.stat().st_mtime_ns) if self.size(name) >= 0 else None

    def read(self, name):
        """All bytes of a file. raises FileNotFoundError; ValueError when a tar ends before the file does."""
        full = self._full(name)
        if self.size(name) < 0:
            raise FileNotFoundError(f"no {self.where(name)}; want this file; fetch it")
        if self.index is None:
            return (self.path / full).read_bytes()
        start, size = self.index[full]
        parts = []
        got = 0
        while got < size and (part := os.pread(self.fd, min(size - got, 1 << 26), start + got)):
            parts.append(part)
            got += len(part)
        if got != size:
            refuse(self.where(name), f"{got} bytes before the tar ends", f"{size}")
        return b"".join(parts)


def open_picture(content, where, smallest=1, max_pixels=None, decode=True):
    """Decode the first picture of a file with Pillow -> (image, wide); wide: it has several channels of 16 bits.

    decode    False: only its header, which knows size, mode and orientation

    content   bytes. Before they are decoded, three limits are checked: sides of at least `smallest` px, at most
              `max_pixels` pixels (None: --max-pixels), at most SCANS scans of a large JPEG
    """
    most = limit["pixels"] if max_pixels is None else max_pixels
    with DamageGuard(where, "a damaged image", "a whole one"):
        try:
            image = Image.open(io.BytesIO(drop_notes(content)), formats=PICTURES)
        except UnidentifiedImageError:
            got, do = name_format(content)
            refuse(where, got, "jpg, png or webp", do)
        width, height = image.size
        if min(width, height) < smallest or width * height > most:
            refuse(where, f"{width} x {height} pixels", f"sides >= {smallest} and at most {most} pixels in all",
                   "resize or remove it, or raise --max-pixels")
        scans = content.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
        scans = count_scans(content) if scans > SCANS else scans                # slower: where one starts and ends
        if scans > SCANS and scans * width * height > SCANS * limit["pixels"] // 10:
            refuse(where, f"a JPEG of {scans} scans of {width} x {height} pixels", f"at most {SCANS}", "save it again")
        wide = image.mode not in ("I", "I;16", "I;16B", "F") and any("16" in str(t[3]) for t in image.tile)
        if decode:
            with image:
                image.load()
    return image, wide


def decode_rgb(content, where):
    """8-bit photo or map -> (H, W, 3) uint8; gray is repeated. Refuses alpha, palettes and 16-bit colour."""
    image, wide = open_picture(content, where)
    if wide:
        refuse(where, "a 16-bit RGB image, which would be cut to 8 bits", "8 bits a channel", "convert it")
    clear = "transparency" in image.info                                        # a PNG's tRNS
    if image.mode not in ("RGB", "L") or clear:
        refuse(where, f"a {image.mode} image" + " with a transparent colour" * clear,
                "8-bit RGB or gray without alpha", "convert it")
    return np.asarray(image.convert("RGB"))


def decode_gray(content, where):
    """8- or 16-bit gray image -> (H, W) uint8 or uint16 (bilevel as 0, 255)."""
    image, _ = open_picture(content, where)
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in ("L", "I", "I;16", "I;16B"):
        refuse(where, f"a {image.mode} image", "8- or 16-bit gray", "fetch the original file")
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        refuse(where, f"values {pixels.min()}..{pixels.max()}", "8- or 16-bit gray", "fetch the original file")
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16)


def decode_png_linear(content, where):
    """8- or 16-bit PNG, gray or RGB -> (H, W) or (H, W, 3) float32 in [0, 1], values as stored.

    Pillow keeps one byte of each 16-bit RGB sample, so such a file is decoded twice: for the high and the low bytes.
    """
    image, wide = open_picture(content, where)
    if image.mode not in ("RGB", "L", "I", "I;16", "I;16B", "1"):
        refuse(where, f"a {image.mode} image", "8- or 16-bit gray or RGB", "fetch the original file")
    if not wide:
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
        stored = pixels.astype(np.float32)
        stored /= 255 if pixels.dtype == np.uint8 else 65535                    # in place: it may be large
        return stored
    low = Image.open(io.BytesIO(drop_notes(content)), formats=PICTURES)
    low.tile = [(*tile[:3], "RGB;16L") for tile in low.tile]     # reads the low byte of each big-endian sample
    stored = np.asarray(image).astype(np.float32)
    del image
    stored *= 256
    stored += np.asarray(low)
    stored /= 65535
    return stored


def decode_npy(content, where):
    """.npy of numbers -> array. Pickled objects are refused, and arrays that are larger than the file."""
    stream = io.BytesIO(content)
    with DamageGuard(where, "a damaged .npy", "a plain array of numbers"):
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
    left = len(content) - stream.tell()
    size = math.prod(shape)
    if dtype.kind not in "fiub":
        refuse(where, f"{dtype}", "a plain array of numbers")
    if min(shape, default=0) < 0 or size * dtype.itemsize > left:
        refuse(where, f"a damaged .npy ({left} bytes of an array {shape} of {dtype})", "a whole one")
    array = np.frombuffer(content, dtype, size, stream.tell())
    return array.reshape(shape, order="F" if fortran else "C").copy()


def read_map(files, name, channels):
    """One saved map of `files` -> (channels, H, W) float array as stored; an 8-bit .png of a colour is over 255.

    raises   FileNotFoundError; Refusal: another number of channels, another type, alpha, 16 bits
    """
    where = files.where(name)
    if name.endswith(".png"):
        return decode_rgb(files.read(name), where).transpose(2, 0, 1) / 255.0
    array = decode_npy(files.read(name), where)
    if array.ndim == 2 and channels == 1:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] != channels and array.shape[2] == channels:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != channels or array.size == 0:
        refuse(where, f"shape {array.shape}", f"({channels}, H, W)", "save it again")
    if array.dtype.kind != "f":
        refuse(where, f"{array.dtype} values", "floating point", "save it again")
    return array


def decode_floats(content, where, shape):
    """Headerless little-endian float32, row-major (ETH3D's depth) -> float32 of this shape, writable."""
    want = 4 * int(np.prod(shape))
    if len(content) != want:
        refuse(where, f"{len(content)} bytes", f"{want} ({' x '.join(map(str, shape))} float32 without a header)")
    return np.frombuffer(content, "<f4").reshape(shape).copy()


def decode_table(content, where, separator):
    """A UTF-8 table, with a byte-order mark or without -> its rows, lists of texts; blank lines are left out."""
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        rows = [row for row in csv.reader(text, delimiter=separator) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        refuse(where, f"no table ({error})", "UTF-8 text")
    if rows and len(rows[0]) == 1:
        other = max(SEPARATORS, key=rows[0][0].count)
        if other in rows[0][0] and other != separator:
            refuse(where, f"columns separated by {SEPARATORS[other]}", SEPARATORS[separator], "save it again")
    return rows


def _text(content, at):
    """Zero-terminated text -> (text, place after it)."""
    end = content.index(b"\0", at)
    return content[at:end].decode("latin1"), end + 1


def decode_exr(content, where):
    """OpenEXR image -> (H, W, 3) float32 by the channels R, G, B (or one channel three times)."""
    with DamageGuard(where, "a damaged EXR", "a whole one"):
        return _exr(content, where)


def _exr_header(content, where):
    """Header of an OpenEXR file: dict attribute -> bytes, [(channel, dtype)] in the file's order, offset of its end."""
    magic, version = struct.unpack_from("<ii", content)
    if magic != EXR_MAGIC:
        refuse(where, "a file that is no OpenEXR", "an .exr")
    for flag, what in EXR_FLAGS.items():
        if version & flag:
            refuse(where, f"an EXR with {what}", "scan lines", "convert it to .npy beside it")
    at = 8
    header = {}
    while content[at] != 0:
        key, at = _text(content, at)
        _, at = _text(content, at)
        size, = struct.unpack_from("<i", content, at)
        header[key] = content[at + 4:at + 4 + size]
        at += 4 + size
    channels = []                                                               # [(name, dtype)], alphabetical
    place = 0
    while header["channels"][place] != 0:
        name, place = _text(header["channels"], place)
        channels.append((name, np.dtype(EXR_TYPES[struct.unpack_from("<i", header["channels"], place)[0]])))
        place += 16
    return header, channels, at + 1


def _exr(content, where):
    header, channels, at = _exr_header(content, where)
    x0, y0, x1, y1 = struct.unpack("<4i", header["dataWindow"])
    W = x1 - x0 + 1
    H = y1 - y0 + 1
    kind = header["compression"][0]
    if kind not in EXR_LINES:
        refuse(where, f"EXR compression {kind}", "none, ZIPS or ZIP (0, 2, 3)", "convert it to .npy beside it")
    wanted = [n for c in "RGB" for n, _ in channels if n == c or n.endswith("." + c)]
    if len(wanted) != 3:
        if len(channels) != 1:
            refuse(where, f"EXR channels {[n for n, _ in channels]}", "R, G, B or a single one")
        wanted = 3 * [channels[0][0]]
    lines = EXR_LINES[kind]
    line = sum(W * t.itemsize for _, t in channels)                             # bytes of one scan line
    if W < 1 or H < 1 or H * line > 1100 * len(content):                        # zlib shrinks to 1 / 1032 at best
        refuse(where, f"a damaged EXR ({W} x {H} pixels in {len(content)} bytes)", "a whole one")
    if W * H > limit["pixels"] or line > EXR_LINE:
        refuse(where, f"{W} x {H} pixels of {len(channels)} channels", f"at most {limit['pixels']} pixels",
                "resize it, or raise --max-pixels")
    planes = np.zeros((H, W, 3), np.float32)
    places = {name: [i for i in range(3) if wanted[i] == name] for name in wanted}
    offsets = struct.unpack_from(f"<{-(-H // lines)}Q", content, at)
    for offset in offsets:
        y, size = struct.unpack_from("<ii", content, offset)
        y -= y0
        block = content[offset + 8:offset + 8 + size]
        rows = min(lines, H - y)
        if size < rows * line:                                                  # else stored without compression
            raw = np.frombuffer(zlib.decompressobj().decompress(block, rows * line + 1), np.uint8)
            raw = np.cumsum(raw, dtype=np.uint8)                                # stored: difference to the last, + 128
            raw[1::2] += 128
            block = np.empty_like(raw)
            half = (len(raw) + 1) // 2
            block[0::2] = raw[:half]
            block[1::2] = raw[half:]
            block = block.tobytes()
        if len(block) != rows * line or not 0 <= y < H:
            refuse(where, f"a damaged EXR: a block of {len(block)} bytes at line {y}", f"{rows * line}")
        for k in range(rows):
            place = k * line
            for name, dtype in channels:
                if name in places:
                    planes[y + k, :, places[name]] = np.frombuffer(block, dtype, W, place)
                place += W * dtype.itemsize
    return planes
