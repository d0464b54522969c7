"""What the bytes of a picture say before it is decoded: its format, the scans of the first one, which way is up.

A file may hold more than a picture: a video behind a phone's photo, further pictures, notes. Only the first picture and
its orientation are wanted; whatever else there is is passed over.
"""
import contextlib
import re
import zlib

from PIL import Image

from runtime.files import BROKEN

ORIENTATION = 0x0112                             # EXIF tag
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}           # EXIF orientation: what puts the picture upright
SIDEWAYS = {TURNS[k] for k in (5, 6, 7, 8)}      # that exchange width and height
PNG = b"\x89PNG\r\n\x1a\n"
NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")     # chunks of a PNG that change no pixel
UPRIGHT = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")    # keys of notes that may hold an orientation
NOTE = 1 << 20                                   # bytes of a note that is read; a longer one is passed over
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")    # of a JPEG: with a length, or its end; not in its data
HEIC = "a HEIC picture", "convert it to JPEG, with the package pillow-heif for example"
AVIF = "an AVIF picture that this Pillow does not read", "fetch it again, or install Pillow 11.3 or later"
TIFF = ("a TIFF that Pillow does not read (damaged, or of floating-point colour, for example)",
        "save it with 8 or 16 bits a channel")
JXL = "a JPEG XL picture", "convert it to JPEG, with the package pillow-jxl-plugin for example"
JP2 = "a JPEG 2000 picture", "convert it to PNG with Pillow"
RAW = "a camera's raw file", "develop it to JPEG, with the package rawpy for example"
PAGE = "a web page, not a picture", "fetch the picture again"
FOREIGN = (  # offset, bytes there: what the file is, what to do
    (4, b"ftypheic", HEIC), (4, b"ftypheix", HEIC), (4, b"ftyphevc", HEIC), (4, b"ftyphevx", HEIC),
    (4, b"ftypheim", HEIC), (4, b"ftypheis", HEIC), (4, b"ftypmif1", HEIC), (4, b"ftypmsf1", HEIC),
    (4, b"ftypavif", AVIF), (4, b"ftypavis", AVIF), (4, b"ftypcrx ", RAW), (0, b"FUJIFILMCCD-RAW", RAW),
    (0, b"IIRO", RAW), (0, b"IIRS", RAW), (0, b"IIU\0", RAW), (8, b"CR\2\0", RAW), (0, b"FOVb", RAW),
    (4, b"ftyp", ("a video", "take a frame of it as a photo")),
    (0, b"\xff\x0a", JXL), (0, b"\0\0\0\x0cJXL ", JXL), (0, b"\0\0\0\x0cjP  ", JP2), (0, b"\xff\x4f\xff\x51", JP2),
    (0, b"8BPS", ("a Photoshop file", "export it as PNG")),
    (0, b"\x76\x2f\x31\x01", ("an OpenEXR picture", "convert it to an 8-bit PNG")),
    (0, b"#?", ("a Radiance HDR picture", "convert it to an 8-bit PNG")),
    (0, b"%PDF", ("a PDF file", "export its pictures")), (0, b"%!PS", ("a PostScript file", "convert it to PNG")),
    (0, b"II*\0", TIFF), (0, b"MM\0*", TIFF), (0, b"\0\x05\x16\x07", ("macOS's notes about another file", "remove it")),
    (0, b"version https://git-lfs", ("a pointer to a picture that Git LFS keeps", "git lfs pull")),
    (0, b"<!DOCTYPE", PAGE), (0, b"<!doctype", PAGE), (0, b"<html", PAGE), (0, b"<HTML", PAGE),
    (0, b"<svg", ("an SVG drawing", "convert it to PNG")), (0, b"<?xml", ("an SVG or XML file", "convert it to PNG")),
    (0, b"PK\3\4", ("a zip archive", "unpack it")))


def name_format(content):
    """What a file that Pillow does not know is, in words, and what to do: (got, do). content: bytes, at least 32."""
    if not content.strip(b"\0"):
        return ("an empty file", "fetch it again") if not content else ("a file of zeros alone", "fetch it again")
    found = (words for at, magic, words in FOREIGN if content.startswith(magic, at))
    return next(found, ("a damaged file or one that is not an image", "remove it"))


def count_scans(content):
    """Scans of the first picture of a JPEG; pictures and films behind its end, and in its notes, are not looked at."""
    scans = 0
    at = 2
    while found := MARKER.search(content, at):
        kind = found[1][0]
        at = found.end()
        if kind == 0xD9:                                                        # end of the picture
            break
        scans += kind == 0xDA
        at += max(2, int.from_bytes(content[at:at + 2], "big"))
    return scans


def _is_wanted(kind, body):
    """Whether a note of a PNG may hold an orientation and is short, unzipped too."""
    if not body.startswith(UPRIGHT) or len(body) > NOTE:
        return False
    text = body.partition(b"\0")[2]
    if kind != b"zTXt":
        return kind == b"tEXt" or text[:1] == b"\0"                             # an iTXt that is not zipped
    with contextlib.suppress(zlib.error):
        return len(zlib.decompressobj().decompress(text[1:], NOTE + 1)) <= NOTE
    return False


def drop_notes(content):
    """A PNG without its texts and its colour profile, of any length; those that may hold an orientation stay.

    Other files come back as they are, and so does what follows a chunk that is cut off.
    """
    if not content.startswith(PNG):
        return content
    kept = []
    start = at = len(PNG)                                                       # start: of what is not yet kept
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at:at + 4], "big")
        if content[at + 4:at + 8] in NOTES and not _is_wanted(content[at + 4:at + 8], content[at + 8:end - 4]):
            kept.append(content[start:at])
            start = end
        at = end
    return b"".join((PNG, *kept, content[start:])) if kept else content


def read_turn(image):
    """What puts an opened picture upright, of Image.Transpose, or None. Of its EXIF only the orientation is read."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except BROKEN:                                                              # notes that cannot be read say nothing
        return None
