"""Pictures and tables as phones, cameras, scanners and spreadsheets write them: bytes, for tests and as fuzz seeds."""
import io
import struct
import zlib

import numpy as np

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 255, (24, 40, 3), dtype=np.uint8)
ORIENTATION, X_RESOLUTION, Y_RESOLUTION = 0x0112, 0x011A, 0x011B


def encoded(image, kind, **options):
    """Bytes of a picture in one of Pillow's formats."""
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def tiff(array, photometric=1, sample_format=None, bits=None):
    """Bytes of a plain gray TIFF, little-endian, one strip: (H, W) of any number type; photometric 0: 0 is white."""
    kind = dict(u=1, i=2, f=3)[array.dtype.kind] if sample_format is None else sample_format
    H, W = array.shape
    body = array.astype(array.dtype.newbyteorder("<")).tobytes() if bits != 12 else pack12(array)
    entries = [(256, 3, W), (257, 3, H), (258, 3, bits or 8 * array.itemsize), (259, 3, 1), (262, 3, photometric),
               (273, 4, 8 + 2 + 12 * 10 + 4), (277, 3, 1), (278, 3, H), (279, 4, len(body)), (339, 3, kind)]
    table = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + body


def pack12(array):
    """Pairs of 12-bit numbers in three bytes, as a 12-bit TIFF stores them."""
    a, b = array.reshape(-1, 2).astype(int).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def broken_exif():
    """An EXIF block with orientation 6, a signed rational -1 / 0 and a double that is NaN."""
    start = 8 + 2 + 3 * 12 + 4
    entries = (struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0), struct.pack("<HHII", X_RESOLUTION, 10, 1, start),
               struct.pack("<HHII", Y_RESOLUTION, 12, 1, start + 8))
    return (b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + b"".join(entries) + bytes(4) + struct.pack("<ii", -1, 0)
            + struct.pack("<d", float("nan")))


def motion_photo(jpeg, tail=3 << 20):
    """A phone's photo with a film behind it."""
    return jpeg + b"MotionPhoto_Data" + b"\0\0\0\x18ftypmp42" + RNG.bytes(tail)


def mpo(image, n=3):
    """A photo of several whole progressive pictures."""
    return encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)] * (n - 1), progressive=True)


def chunk(name, body):
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with(png, *chunks, last=False):
    """A PNG with further chunks (name, body) behind its header, or (last) behind its pixels."""
    at = len(png) - 12 if last else 33
    return png[:at] + b"".join(chunk(*c) for c in chunks) + png[at:]


LONG = bytes(RNG.integers(97, 100, 2 << 20, dtype=np.uint8))                    # 2 MB of text
NOTES = {"zTXt": b"Comment\0\0" + zlib.compress(LONG), "tEXt": b"Comment\0" + LONG,
         "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG), "iCCP": b"profile\0\0" + zlib.compress(LONG)}
