"""Mutated files through every reader of files from outside: a valid result or one line, in time, within memory.

    python tests/fuzz.py --n 20000 --seed 0            every reader, its share of the inputs
    python tests/fuzz.py --reader judge --n 500        one of them
Each input is a small whole file with one to four mutations: bytes anywhere, and by structure (values of a JSON or of a
safetensors, npy or tar header, chunks of a PNG with their checksum mended, sizes of a JPEG). It passes when the reader
returns, or raises what command.run_command prints as one line; not when it raises anything else, takes more than
SECONDS, or asks for more than MEMORY beyond what the process had. A failure prints reader, seed and traceback.
"""
import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import chat
import numpy as np
import odd_files
import official
import torch
from PIL import Image
from test_marigold import SMALL, VAE_CONFIG, ZERO_SNR, fill, index_of, text_parts, unet_config

import judge
from data import formats, photos, pictures, pools, prepare, questions
from data.bank import Bank
from evaluation import benchmark_table, benchmarks, predictions
from models import lora, marigold
from models.diffusers_files import EMPTY, embed_prompts
from models.dit import DiT, DiTConfig
from models.schedule import Schedule
from models.sd2 import VAE, UNet
from predictor import load_predictor, photo_maps
from relations import MODALITIES
from runtime.config import UserError
from runtime.files import read_tensors, write_tensors

SECONDS, MEMORY = 10, 2 << 30         # of one input: CPU time (six times as much by the clock), bytes of address space
USER = (UserError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError,
        benchmark_table.MissingData)
NUMBERS = (0, 1, -1, 2, 7, 255, 256, 65535, 65536, 99_999, 10**6, 2**31 - 1, -2**31, 2**32 - 1, 2**63, 10**12)
TYPES = ((b"F4", 8), (b"F8_E4M3", 4), (b"F8_E5M2", 4), (b"F8_E8M0", 4), (b"F6_E2M3", 16 / 3), (b"C64", 0.5),
         (b"BF16", 2), (b"F64", 0.5), (b"U16", 2), (b"I64", 0.5), (b"BOOL", 4), (b"U8", 1), (b"F99", 1))
VALUES = (*NUMBERS, None, True, False, "", "a", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\u2028\n", [], {},
          [[]], {"a": 1}, 0.5, -0.5, 1e308, float("nan"), float("inf"), "x" * 5000, [0] * 1000, ["a"],
          "flash_attention_2", "evil/kernels", {"auto_map": {"AutoConfig": "evil.Evil"}})


class Slow(BaseException):
    """Raised by the alarm; no reader may catch it."""


# mutations --------------------------------------------------------------------------------------------------------

def spoil(content, rng):
    """One mutation of bytes, whatever they mean."""
    b, n = bytearray(content), len(content)
    at, span = rng.randrange(n + 1), rng.choice((1, 2, 4, 8, 64, 512))
    kind = rng.randrange(9)
    if kind == 0 and n:
        b[at % n] ^= 1 << rng.randrange(8)
    elif kind == 1:
        b[at:at + span] = rng.randbytes(span)
    elif kind == 2:
        del b[at:]
    elif kind == 3:
        del b[at:at + span]
    elif kind == 4:
        b[at:at] = b[at:at + span]
    elif kind == 5:
        b[at:at] = rng.randbytes(span)
    elif kind == 6:
        b[at:at + span] = bytes([rng.choice((0, 1, 127, 128, 255))]) * span
    elif kind == 7:
        number = rng.choice(NUMBERS)
        width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
        b[at:at + width] = (number % (1 << 8 * width)).to_bytes(width, order)
    else:
        other = rng.randrange(n + 1)
        b[at:at + span] = b[other:other + span]
    return bytes(b)


def spoil_value(value, rng):
    """A JSON value with one node changed, removed or doubled, or nested too deeply."""
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])
    value = json.loads(json.dumps(value))
    if not isinstance(value, (dict, list)) or not value:
        return rng.choice(VALUES)
    walk(value)
    node, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node += node
    elif kind == 2 and isinstance(node, dict):
        node[rng.choice(("quantization_config", "attn_implementation", "transformers_weights", "x", ""))] = node[key]
    elif kind == 3 and isinstance(node[key], int):
        node[key] = node[key] * rng.choice((-1, 2, 1000, 10**6)) + rng.choice((-1, 0, 1))
    elif kind == 4:
        source, other = rng.choice(places)
        node[key] = json.loads(json.dumps(source[other]))
    else:
        node[key] = rng.choice(VALUES)
    return value


def spoil_json(content, rng):
    if not rng.randrange(30):
        return b"[" * 50_000 if rng.randrange(2) else b'{"a":' * 50_000
    lines = content.split(b"\n") if content.count(b"\n{") else [content]
    k = rng.randrange(len(lines))
    try:
        lines[k] = json.dumps(spoil_value(json.loads(lines[k]), rng)).encode()
    except (ValueError, RecursionError):
        return spoil(content, rng)
    return b"\n".join(lines)


def spoil_png(content, rng):
    """Chunks changed, doubled, dropped or moved, checksums mended; sizes that announce a bomb."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at:at + 4], "big")
        chunks.append([content[at + 4:at + 8], content[at + 8:at + 8 + size]])
        at += 12 + size
    if not chunks:
        return spoil(content, rng)
    k, kind = rng.randrange(len(chunks)), rng.randrange(6)
    if kind == 0:
        wide = [rng.choice((1, 8, 9000, 20_000, 2**31 - 1, 0)) for _ in "WH"]
        chunks[0][1] = struct.pack(">II", *wide) + chunks[0][1][8:]
    elif kind == 1:
        chunks[k][1] = spoil(chunks[k][1], rng)
    elif kind == 2:
        chunks.insert(k, chunks[rng.randrange(len(chunks))])
    elif kind == 3:
        del chunks[k]
    elif kind == 4:
        name = rng.choice((b"iCCP", b"zTXt", b"iTXt", b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fcTL", b"gAMA"))
        bomb = b"k\0\0" + zlib.compress(bytes(rng.choice((10, 10**7))))
        chunks.insert(min(k + 1, len(chunks)), [name, rng.choice((bomb, rng.randbytes(12), b""))])
    else:
        chunks[k][0] = rng.choice(chunks)[0]
    return content[:8] + b"".join(chunk(*c) for c in chunks)


def chunk(name, body):
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def spoil_jpeg(content, rng):
    """Height and width of a frame header, or more scans."""
    found = [m.start() for m in re.finditer(rb"\xff[\xc0-\xc2]\0", content)]
    if found and rng.randrange(2):
        at = found[0] + 5
        return content[:at] + struct.pack(">HH", *(rng.choice((0, 1, 9000, 65_535)) for _ in "HW")) + content[at + 4:]
    at = content.rfind(b"\xff\xda")
    return content[:-2] + content[at:-2] * rng.choice((1, 20, 1000)) + content[-2:] if at > 0 else spoil(content, rng)


def spoil_tensors(content, rng):
    """The JSON header of a safetensors file, its length mended or not."""
    size = int.from_bytes(content[:8], "little")
    if rng.randrange(6) == 0 or 8 + size > len(content):
        length = rng.choice((0, 1, 10**8, 2**63, size + 1, size - 1)) % 2**64
        return length.to_bytes(8, "little") + content[8:]
    head = content[8:8 + size]
    if rng.randrange(6) == 0:                                                   # another dtype of as many bits, or not
        found = list(re.finditer(rb'"dtype":"(\w+)","shape":\[(\d+)', head))
        if found:
            at = rng.choice(found)
            name, more = rng.choice(TYPES)
            head = (head[:at.start(1)] + name + head[at.end(1):at.start(2)]
                    + str(int(int(at[2]) * more)).encode() + head[at.end(2):])
    else:
        head = spoil_json(head, rng)
    return len(head).to_bytes(8, "little") + head + content[8 + size:]


def spoil_npy(content, rng):
    """Shape, type or order of an npy header, its length mended."""
    size = int.from_bytes(content[8:10], "little")
    head = content[10:10 + size].decode("latin1")
    shape = "(" + "".join(f"{rng.choice(NUMBERS)}," for _ in range(rng.randrange(5))) + ")"
    head = re.sub(r"\([^)]*\)", shape, head) if rng.randrange(2) else re.sub(
        r"'descr': '[^']*'", f"'descr': {rng.choice(DTYPES)}", head)
    return content[:8] + len(head.encode("latin1")).to_bytes(2, "little") + head.encode("latin1") + content[10 + size:]


DTYPES = ("'|O'", "'<f2'", "'<f8'", "'>i8'", "'<c16'", "'|S100000'", "'<M8[s]'", "[('a', '<f4')]", "'|V0'", "'<U0'",
          "'|b1'", "('<f4', (1000000,))", "'<f16'", "'|S0'", "None", "1 + 1", "__import__('os')")


def spoil_tar(content, rng):
    """One field of one header, its checksum mended."""
    at = 512 * rng.randrange(max(1, len(content) // 512))
    b = bytearray(content)
    start, width = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (345, 155), (257, 8), (100, 8)))
    fields = (b"../../climbed", b"/absolute", b"a/../../b", b"\x80" + b"\xff" * 11, b"77777777777", b"-1", b"1", b"2",
              b"5", b"x", b"g", b"L", b"S", b"K", b"\xff" * 12, b"\x80" + bytes(9) + b"\2\0", b"", b"\xff\xfe.npy",
              rng.randbytes(12))
    b[at + start:at + start + width] = rng.choice(fields)[:width].ljust(width, b"\0")
    if len(b) >= at + 512:
        b[at + 148:at + 156] = b" " * 8
        b[at + 148:at + 156] = b"%06o\0 " % sum(b[at:at + 512])
    return bytes(b)


BY_NAME = {".json": spoil_json, ".jsonl": spoil_json, ".safetensors": spoil_tensors, ".npy": spoil_npy,
           ".tar": spoil_tar}


def mutate(name, content, rng):
    """One to four mutations, by structure or of bytes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        own = (spoil_png if content[:4] == b"\x89PNG" else spoil_jpeg if content[:2] == b"\xff\xd8" else
               BY_NAME.get(Path(name).suffix, spoil))
        content = (own if rng.randrange(3) else spoil)(content, rng)
    return content


# seeds and readers ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Reader:
    """share of the inputs; make(folder) writes whole files; read(folder, changed file) opens what lies there."""

    share: float
    make: callable
    read: callable


def encoded(image, kind, **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def make_pictures(folder):
    """Small pictures of every kind that is read, and of some that are not, all named .png."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 255, (16, 12, 3), dtype=np.uint8)
    color, gray, exif = Image.fromarray(rgb), Image.fromarray(rgb[..., 0]), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    wide = rgb.astype(np.uint16) * 257
    found = dict(
        png=encoded(color, "PNG", exif=exif), gray=encoded(gray, "PNG"),
        palette=encoded(color.convert("P"), "PNG", transparency=1), rgba=encoded(color.convert("RGBA"), "PNG"),
        bits=encoded(gray.convert("1"), "PNG"), wide=official.png16(wide), wide_gray=official.png16(wide[..., 0]),
        jpeg=encoded(color, "JPEG", exif=exif), progressive=encoded(color, "JPEG", progressive=True),
        cmyk=encoded(color.convert("CMYK"), "JPEG"), webp=encoded(color, "WEBP"),
        webp_clear=encoded(color.convert("RGBA"), "WEBP", lossless=True),
        tiff=encoded(color, "TIFF", compression="tiff_lzw"),
        tiff_float=encoded(Image.fromarray(rgb[..., 0] / np.float32(255)), "TIFF"),
        bmp=encoded(color, "BMP"), gif=encoded(color, "GIF"),
        apng=encoded(color, "PNG", save_all=True, append_images=[color.rotate(180)]),
        eps=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n%%EndComments\n(x) run\n",
        pfm=b"PF\n12 16\n-1.0\n" + bytes(12 * 16 * 12), pfm_gray=b"Pf\n12 16\n-1.0\n" + bytes(12 * 16 * 4))
    found |= {f"tiff_{k}": odd_files.tiff(array, photometric, bits=bits) for k, (array, photometric, bits) in dict(
        float=(rgb[..., 0].astype(np.float32), 0, None), int32=(rgb[..., 0] * np.int32(257), 1, None),
        uint32=(rgb[..., 0].astype(np.uint32) << 24, 1, None), int16=(rgb[..., 0] * np.int16(128), 1, None),
        int8=(rgb[..., 0].astype(np.int8) & 127, 1, None), negative=(wide[..., 0], 0, None),
        bits12=(wide[..., 0] >> 4, 1, 12)).items()}
    found |= {f"note_{name}_{last}": odd_files.png_with(found["png"], (name.encode(), note), last=last)
              for name, note in odd_files.NOTES.items() if name in ("zTXt", "iCCP") for last in (False, True)}
    found |= dict(
        motion=odd_files.motion_photo(found["progressive"], 1 << 16), mpo=odd_files.mpo(color),
        exif_broken=encoded(color, "JPEG", exif=odd_files.broken_exif()),
        exif_broken_png=encoded(color, "PNG", exif=odd_files.broken_exif()),
        xmp=odd_files.png_with(found["gray"], (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')),
        heic=b"\0\0\0\x18ftypheic" + bytes(90), page=b"<!DOCTYPE html><html></html>", empty=b"")
    if formats.HAS_AVIF:
        found["avif"] = encoded(color, "AVIF")
    for name, content in found.items():
        (folder / f"{name}.png").write_bytes(content)


def read_pictures(folder, path):
    """Every decoder of pictures, each by itself."""
    content = path.read_bytes()
    return [lambda: photos.read_rgb(path)] + [
        lambda decode=decode: decode(content, repr(str(path)))
        for decode in (formats.decode_rgb, formats.decode_gray, formats.decode_png_linear)]


def scene(folder, name="room.0"):
    maps = official.pool()
    for m in pools.MAPS:
        x = maps[m][0][..., :24, :24]
        x = (x + 1) / 2 if m == "normal" else x
        pictures.save_png(folder / f"{name}_{m}.png",
                      Image.fromarray((x.clip(0, 20) * 3000).astype(np.uint16)) if m == "depth" else x)


def make_arrays(folder):
    np.save(folder / "a.npy", np.arange(60, dtype=np.float32).reshape(4, 5, 3))
    np.save(folder / "fortran.npy", np.asfortranarray(np.arange(12.0).reshape(3, 4)))
    (folder / "python2.npy").write_bytes((folder / "a.npy").read_bytes().replace(b"(4, 5, 3)", b"(4L, 5,3)"))


def make_exr(folder):
    pixels = np.random.default_rng(0).random((20, 9, 3)).astype(np.float32)
    for k, (compression, half) in enumerate(((0, False), (2, True), (3, False))):
        (folder / f"{k}.exr").write_bytes(official.exr(pixels, compression, half))


def make_tar(folder):
    inside = folder / "inside"
    (inside / "sub").mkdir(parents=True)
    for name in ("a.npy", "._a.npy", "sub/naïve 写真\n.txt", "x" * 90 + ".bin", "sub/" + "y" * 120):
        (inside / name).write_bytes(b"content of " + name.encode())
    (inside / "link").symlink_to("/etc/passwd")
    for name, kind in (("gnu.tar", tarfile.GNU_FORMAT), ("pax.tar", tarfile.PAX_FORMAT)):
        with tarfile.open(folder / name, "w", format=kind) as tar:
            tar.add(inside, ".")
    shutil.rmtree(inside)


def read_tar(folder, path):
    def call():
        files = formats.Files(path)
        return [files.read(name) for name in files.index]
    return [call]


def make_benchmarks(folder):
    for bench in benchmark_table.BENCHMARKS:
        if bench.dataset not in ("kitti", "eth3d", "scannet"):
            official.make(bench, folder / bench.dataset, 1)


def read_benchmark(folder, path):
    """The image that the changed file belongs to, in each task of its data set, and itself as a saved prediction."""
    name = path.relative_to(folder).parts[0]

    def load(bench):
        files, items, _ = benchmarks.find_data(bench, folder / name)
        changed = path.relative_to(files.path).as_posix()
        for item in items:
            if benchmarks.is_complete(files, item) and (changed in item.values() or path.suffix == ".csv"):
                benchmarks.load_sample(bench, files, item, axes=True)
    calls = [lambda b=b: load(b) for b in benchmark_table.BENCHMARKS if b.dataset == name]
    if path.suffix in (".npy", ".png"):
        saved = formats.Files(path.parent)
        calls += [lambda n=n: formats.read_map(saved, path.name, n) for n in (1, 3)]
    return calls


def make_lists(folder):
    """Questions as JSON lines, a results file, a camera table, cached questions."""
    root = folder / "scenes"
    scene(root)
    rows = questions.build_questions(root, 2, 24, 0)
    questions.write_jsonl(rows, root, folder, 24, "q.jsonl")
    (folder / "cached.json").write_text(json.dumps(dict(key=[str(root), ["room.0"], 2, 24, 0, 1], rows=rows)))
    (folder / "results.jsonl").write_text("".join(
        json.dumps(dict(name=n, abs_rel=0.1, delta1=0.9, scale=1.0)) + "\n" for n in "abc"))
    head = ["scene_name", *(f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3))]
    table = (",".join(head) + "\nai_001_001," + ",".join("123456789") + "\n").encode()
    (folder / "cameras.csv").write_bytes(table)
    (folder / "marked.csv").write_bytes(b"\xef\xbb\xbf" + table)
    (folder / "semicolons.csv").write_bytes(table.replace(b",", b";"))


def read_lists(folder, path):
    def cached():
        rows = questions.load_questions(path, folder / "scenes", ["room.0"], 2, 24, 0)
        return questions.marked_photos(rows[:1], folder / "scenes", 24)

    def asked():
        return questions.marked_photos(questions.read_jsonl(path)[:2], folder, 24)
    bench = official.bench_of("nyuv2", "depth")
    if path.suffix == ".csv":
        return [lambda: prepare.read_cameras(path)]
    return {"q.jsonl": [asked], "cached.json": [cached],
            "results.jsonl": [lambda: predictions.read_results(bench, path)]}.get(
                path.name, [lambda: questions.draw_questions(folder / "scenes", "room.0", 2, 24, 0), asked])


def make_hypersim(folder):
    import h5py
    with h5py.File(folder / "a.hdf5", "w") as f:
        f.create_dataset("dataset", data=np.zeros((6, 5, 3), np.float16), compression="gzip")


class Mute:
    """A judge that answers one half."""

    size, grid = 16, 1

    def digest(self):
        return "mute"

    def ask(self, rgb, pts, names=None, modalities=None):
        return torch.full((*pts.shape[:2], len(MODALITIES)), 0.5)


PHOTOS = torch.arange(3 * 3 * 16 * 16, dtype=torch.int32).view(3, 3, 16, 16).remainder(251).to(torch.uint8)


def make_bank(folder):
    bank = Bank(folder, Mute())
    bank.fill(PHOTOS[:2], 4)
    bank.pack()
    bank.fill(PHOTOS[2:], 4)


def read_bank(folder, path):
    def call():
        pts, prob = Bank(folder, Mute()).fill(PHOTOS, 4)
        assert prob.shape == (3, 4, 4) and ((prob >= 0) & (prob <= 1)).all() and ((pts >= 0) & (pts < 16)).all()
    return [call]


def linears():
    return torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))


def make_adapter(folder):
    """Layer 0 is named as torch.compile does, layer 2 by its older name."""
    network = linears()
    lora.inject(network, ("0", "2"), 3, 6, 0.1, torch.Generator().manual_seed(0))
    lora.save_adapter(network, folder)
    path = folder / "adapter_model.safetensors"
    names = {".0.": "._orig_mod.0.", ".2.": ".old.2."}
    write_tensors(path, {re.sub(r"\.[02]\.", lambda m: names[m[0]], k): v for k, v in read_tensors(path).items()})


def predicted(policy):
    """Maps of a photo by a predictor that was opened."""
    if policy.size <= 64:
        policy.convert_maps(photo_maps(policy, torch.rand(3, 16, 12), steps=2))


def make_marigold(folder):
    """A small folder that computes the empty prompt itself, so that the text encoder is read too."""
    text_parts(folder / "text")
    parts = fill(UNet(unet_config(1) | SMALL)), fill(VAE(VAE_CONFIG | dict(layers_per_block=1)))
    text = embed_prompts(folder / "text", EMPTY, 12)
    model = marigold.Marigold(*parts, Schedule(ZERO_SNR), text, index_of("depth"), folder / "text")
    model.save(folder / "model")
    (folder / "model" / "README.md").unlink()
    shutil.rmtree(folder / "text")


def read_marigold(folder, path):
    """Every other time with the cached prompt, which is faster."""
    cached = folder / "model" / "empty_text_embedding.safetensors"
    encoder = path.parent.name in ("tokenizer", "text_encoder")

    def call():
        away = folder / "away"
        if encoder:
            cached.rename(away)
        try:
            return predicted(marigold.Marigold.load(folder / "model"))
        finally:
            if encoder:
                away.rename(cached)
    return [call]


def make_judges(folder):
    chat.write_original(folder / "original", lora=True, shards=2)
    judge.load_judge(folder / "original").save(folder / "native")
    chat.write_qwen(folder / "qwen", "qwen3_vl")
    chat.move_tokens(folder / "qwen")
    chat.write_original(folder / "shards", shards=2)                            # two sets: one file beside an index
    judge.load_judge(folder / "shards").model.save_pretrained(folder / "two")
    for path in (folder / "shards").iterdir():
        if not (folder / "two" / path.name).exists():
            shutil.copyfile(path, folder / "two" / path.name)
    (folder / "two" / "vocab.json").rename(folder / "two" / "._vocab.json")
    shutil.copyfile(folder / "native" / "tokenizer.json", folder / "two" / "tokenizer.json")
    shutil.rmtree(folder / "shards")
    (folder / "adapter").mkdir()
    model = judge.load_judge(folder / "native").model
    lora.inject(model, ("0.self_attn.q_proj",), 2, 4)
    lora.save_adapter(model, folder / "adapter", base=str(folder / "native"))


def read_judge(folder, path):
    place = folder / path.relative_to(folder).parts[0]
    def answers():
        opened = judge.load_judge(place)
        if opened.size <= 64:
            opened.ask(torch.zeros(1, 3, opened.size, opened.size), torch.zeros(1, 1, 2, 2, dtype=torch.long))
    return [lambda: judge.LazyJudge(place), answers]


H5PY = importlib.util.find_spec("h5py") is not None                             # only `data.prepare hypersim` needs it
READERS = {
    "pictures": Reader(6, make_pictures, read_pictures),
    "scenes": Reader(1, scene, lambda folder, path: [lambda: pools.read_scene(folder, "room.0", 16)]),
    "npy": Reader(4, make_arrays, lambda folder, path: [lambda: formats.decode_npy(path.read_bytes(), str(path))]),
    "exr": Reader(3, make_exr, lambda folder, path: [lambda: formats.decode_exr(path.read_bytes(), str(path))]),
    "tar": Reader(3, make_tar, read_tar),
    "benchmarks": Reader(0.5, make_benchmarks, read_benchmark),
    "lists": Reader(2, make_lists, read_lists),
    **({"hypersim": Reader(0.3, make_hypersim, lambda folder, path: [lambda: prepare.read_hdf5(path)])}
       if H5PY else {}),
    "bank": Reader(1.5, make_bank, read_bank),
    "adapter": Reader(2, make_adapter, lambda folder, path: [
        lambda: lora.load_adapter(linears(), folder, lambda name: name.removeprefix("old."))]),
    "predictor": Reader(1, lambda folder: DiT(DiTConfig(16, 8, 16, 1, 1, 2)).save(folder),
                        lambda folder, path: [lambda: predicted(load_predictor(folder))]),
    "marigold": Reader(0.15, make_marigold, read_marigold),
    "judge": Reader(0.25, make_judges, read_judge),
}


# running ----------------------------------------------------------------------------------------------------------

def pages(field):
    """Bytes of a line of /proc/self/status: VmSize, VmHWM."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@contextlib.contextmanager
def bounded():
    """No more address space than MEMORY beyond what there is; an alarm that raises Slow."""
    def ring(*_):
        raise Slow
    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {s: signal.signal(s, ring) for s in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_AS, (pages("VmSize") + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        for s, handler in handlers.items():
            signal.signal(s, handler)


def chain(error):
    """An error and those it was raised from or beside."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def alarm(seconds):
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)


def outcome(call):
    """"valid", "refused", or what is wrong. Memory that was refused to a reader is wrong, whatever it made of that."""
    alarm(SECONDS)
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            call()
        return "valid"
    except USER as error:
        alarm(0)
        if any(isinstance(e, MemoryError) or "allocate memory" in str(e) for e in chain(error)):
            return "memory: " + traceback.format_exc()
        return "refused" if " ".join(str(error).split()) else "no message: " + traceback.format_exc()
    except Slow:
        return f"more than {SECONDS} s: " + traceback.format_exc()
    except BaseException:  # noqa: BLE001  whatever else escapes is what is looked for
        return traceback.format_exc()
    finally:
        alarm(0)


def attack(name, n, seed, root):
    """n inputs to one reader: Counter of outcomes, list of (input number, file, what is wrong)."""
    reader, counts, wrong, slowest = READERS[name], Counter(), [], 0
    folder = Path(root, name)
    folder.mkdir()
    reader.make(folder)
    targets = sorted(p for p in folder.rglob("*") if p.is_file())
    whole = {p: p.read_bytes() for p in targets}
    for path in targets[:1]:                                                    # the seeds themselves are read
        for call in reader.read(folder, path):
            assert outcome(call) in ("valid", "refused"), (name, path, outcome(call))
    with bounded():
        for i in range(n):
            rng = random.Random(f"{seed} {name} {i}")
            path = rng.choice(targets)
            path.write_bytes(mutate(path.name, whole[path], rng))
            for call in reader.read(folder, path):
                began = time.monotonic()
                result = outcome(call)
                slowest = max(slowest, time.monotonic() - began)
                counts[result if result in ("valid", "refused") else "wrong"] += 1
                if result not in ("valid", "refused"):
                    wrong.append((i, path.relative_to(folder), result))
            for other, content in whole.items():
                if other is path or not other.is_file():
                    other.write_bytes(content)
    return counts, wrong, slowest


def run(n, seed=0, only="", report=print):
    """n inputs over the readers, by their shares: list of (reader, input number, file, what is wrong)."""
    total, failures = sum(r.share for r in READERS.values()), []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        for name, reader in READERS.items():
            if only in ("", name):
                began = time.monotonic()
                inputs = n if only else math.ceil(n * reader.share / total)
                counts, wrong, slowest = attack(name, inputs, seed, root)
                failures += [(name, *w) for w in wrong]
                took = f"{time.monotonic() - began:.0f} s, slowest {slowest:.2f} s"
                report(f"{name:11} {inputs:6} inputs: {dict(sorted(counts.items()))}, {took}, "
                       f"peak {pages('VmHWM') / 2**30:.2f} GiB", flush=True)
    return failures


if __name__ == "__main__":
    if not H5PY:
        print("hypersim    left out: h5py is not installed")
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=20000, help="inputs [20000]")
    p.add_argument("--seed", type=int, default=0, help="[0]")
    p.add_argument("--reader", default="", choices=("", *READERS), help="one reader [all]")
    p.add_argument("--show", type=int, default=5, help="failures printed per kind of error [5]")
    args = p.parse_args()
    torch.set_num_threads(1)
    found = run(args.n, args.seed, args.reader)
    kinds = Counter()
    for reader, i, path, what in found:
        kind = (reader, what.strip().splitlines()[-1][:80])
        kinds[kind] += 1
        if kinds[kind] <= args.show:
            print(f"\n{reader} input {i} ({path}), seed {args.seed}:")
            print(*(line[:200] for line in what.splitlines()[-20:]), sep="\n")
    print(f"{len(found)} failures of {len(kinds)} kinds")
    sys.exit(bool(found))
