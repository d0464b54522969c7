"""Small benchmarks in their official layouts, made of procedural scenes, and perfect predictions of them.

make(bench, root, n) writes the first n images of the official list (all of MIT's, MAW's) and returns their items;
answer(bench, root, folder, items) writes predictions in Marigold's naming that equal the truth of make.
"""
import functools
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import torch
from PIL import Image

from data.pools import ScenePool
from evaluation import benchmark_table, benchmarks, predictions
from evaluation.colour import ADOBE_TO_SRGB
from relations import srgb_decode, srgb_encode

SIDE = 64


@functools.cache
def pool():
    """Three scenes: rgb, normal, albedo, irradiance (3, H, W), depth (H, W) with inf as 0, mask (H, W)."""
    maps = {k: v.numpy() for k, v in ScenePool("synthetic", "test", 3, SIDE).all().items()}
    maps["mask"][:, :, :6, :7] = False                                          # a hole that no scanner saw
    maps["depth"] = np.where(maps["mask"], maps["depth"], 0)[:, 0].clip(0, 60)
    maps["mask"] = maps["mask"][:, 0]
    maps["normal"] = maps["normal"] * maps["mask"][:, None]
    return maps


def bench_of(dataset, task=""):
    return benchmark_table.choose_benchmarks(dataset, task)[0]


def linear(x):
    return srgb_decode(torch.from_numpy(np.asarray(x, np.float64))).numpy()


def encode(x):
    return srgb_encode(torch.from_numpy(np.asarray(x, np.float64))).numpy()


def stretch(x, size):
    """Nearest resize of the last two axes."""
    (h, w), (H, W) = x.shape[-2:], size
    return x[..., (np.arange(H) * h // H)[:, None], np.arange(W) * w // W]


def picture(x):
    return Image.fromarray((np.clip(x, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0).copy())


def save(path, content):
    """Bytes, a PIL image or an array (.npy) to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        content.save(path, **({"quality": 95} if path.suffix.lower() == ".jpg" else {}))


def png16(pixels, filters=(0, 1, 2, 3, 4)):
    """(H, W, 3) or (H, W) uint16 -> bytes of a PNG whose rows use the five filters in turn."""
    H, W = pixels.shape[:2]
    rows = pixels.astype(">u2").reshape(H, -1).view(np.uint8).astype(int)
    step, before, packed = (6 if pixels.ndim == 3 else 2), np.zeros(rows.shape[1], int), b""
    for y, row in enumerate(rows):
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        corner = np.concatenate([np.zeros(step, int), before[:-step]])
        p = left + before - corner
        near = np.stack([abs(p - left), abs(p - before), abs(p - corner)]).argmin(0)
        paeth = np.choose(near, [left, before, corner])
        kind = filters[y % len(filters)]
        packed += bytes([kind]) + ((row - (0, left, before, (left + before) // 2, paeth)[kind]) % 256).astype(
            np.uint8).tobytes()
        before = row

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    head = struct.pack(">IIBBBBB", W, H, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")


def exr(pixels, compression=3, half=False, names="BGR"):
    """(H, W, 3) -> bytes of a scan-line OpenEXR, channels in the alphabetical order of the format."""
    H, W = pixels.shape[:2]
    dtype, lines = np.dtype("<f2" if half else "<f4"), {0: 1, 2: 1, 3: 16}[compression]
    planes = [pixels[..., "RGB".index(c)].astype(dtype) for c in names]

    def attribute(name, kind, body):
        return name + b"\0" + kind + b"\0" + struct.pack("<i", len(body)) + body
    channels = b"".join(c.encode() + b"\0" + struct.pack("<iB3xii", 1 if half else 2, 0, 1, 1) for c in names) + b"\0"
    window = struct.pack("<4i", 5, 7, W + 4, H + 6)                             # not at the origin
    head = struct.pack("<ii", 20000630, 2) + attribute(b"channels", b"chlist", channels) + attribute(
        b"compression", b"compression", bytes([compression])) + attribute(b"dataWindow", b"box2i", window) + attribute(
        b"displayWindow", b"box2i", window) + b"\0"
    blocks = []
    for y in range(0, H, lines):
        raw = b"".join(p[k].tobytes() for k in range(y, min(H, y + lines)) for p in planes)
        body = raw
        if compression:
            values = np.frombuffer(raw, np.uint8)
            values = np.concatenate([values[0::2], values[1::2]]).astype(int)
            packed = zlib.compress(np.concatenate([values[:1], np.diff(values) + 128]).astype(np.uint8).tobytes())
            body = packed if len(packed) < len(raw) else raw
        blocks.append(struct.pack("<ii", y + 7, len(body)) + body)
    starts = len(head) + 8 * len(blocks) + np.concatenate([[0], np.cumsum([len(b) for b in blocks])[:-1]])
    return head + starts.astype("<u8").tobytes() + b"".join(blocks)


def tar_of(folder, path, prefix="./"):
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                tar.add(file, prefix + str(file.relative_to(folder)))
    return path


def depth_of(bench, i):
    """True depth as stored and read back, metres."""
    depth = pool()["depth"][i % 3]
    depth = stretch(depth, (375, 1242)) if bench.dataset == "kitti" else depth
    return np.round(depth * bench.scale) / bench.scale if bench.scale > 1 else depth


def judgements(albedo):
    """IIW's JSON whose answers follow from a linear (3, H, W) albedo by the rule at 10 %."""
    H, W = albedo.shape[1:]
    rng = np.random.default_rng(0)
    points = [dict(id=k, x=float(x), y=float(y), opaque=True) for k, (x, y) in enumerate(rng.random((24, 2)))]
    light = [max(1e-10, albedo.mean(0)[int(p["y"] * H), int(p["x"] * W)]) for p in points]
    rows = []
    for a, b in zip(range(0, 24, 2), range(1, 24, 2), strict=True):
        answer = "1" if light[b] / light[a] > 1.1 else "2" if light[a] / light[b] > 1.1 else "E"
        rows.append(dict(point1=a, point2=b, darker=answer, darker_score=1.0 + a))
    return dict(intrinsic_points=points, intrinsic_comparisons=rows)


def patches():
    """MAW: uint8 sRGB albedo (H, W, 3) of four flat quarters, their labels (H, W), linear Adobe RGB colours."""
    labels = np.kron(np.array([[1, 2], [3, 0]]), np.ones((120, 160))).astype(np.uint8)
    colours = np.array([[0, 0, 0], [90, 60, 40], [40, 100, 200], [180, 180, 170]], np.uint8)
    return colours[labels], labels, linear(colours[1:] / 255) @ np.linalg.inv(ADOBE_TO_SRGB).T


def lit(i, k):
    """MIT: linear reflectance (H, W, 3) and shading (H, W) of object i under light k, both in [0, .9]."""
    reflectance = 0.05 + 0.85 * linear(pool()["albedo"][i % 3]).transpose(1, 2, 0)
    shading = 0.1 + 0.8 * linear(pool()["irradiance"][(i + k) % 3]).mean(0) / (1 + k)
    return reflectance, shading


def sixteen(x):
    return png16(np.round(np.clip(x, 0, 1) * 65535).astype(np.uint16))


@functools.cache
def lit_photo(i, k):
    """16-bit PNG of object i of three under light k."""
    return sixteen(lit(i, 0)[0] * lit(i, k)[1][..., None])


def write_mit(root, item, i, task):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:-4, 8:-8] = 255
    save(root / item["mask"], Image.fromarray(mask))
    reflectance, shading = lit(i, 0)
    if task == "lmse":
        save(root / item["albedo"], sixteen(reflectance))
        save(root / item["shading"], sixteen(shading))
        save(root / item["rgb"], sixteen(reflectance * shading[..., None]))
    else:
        for k, name in enumerate([item["rgb"], *(item[m] for m in benchmark_table.MIT_LIGHTS[1:])]):
            save(root / name, lit_photo(i % 3, k))


def make(bench, root, n=3):
    """Write n images of a benchmark under root; returns their items."""
    maps = pool()
    if bench.dataset == "maw":
        return make_maw(root, n)
    if bench.dataset == "photos":
        for i in range(n):
            save(root / f"p{i}.png", picture(maps["rgb"][i % 3]))
        return [dict(rgb=f"p{i}.png", name=f"p{i}.png") for i in range(n)]
    items = benchmarks.list_items(bench, None)[:16 if bench.dataset == "mit" else n]
    for i, item in enumerate(items):
        rgb, j = picture(maps["rgb"][i % 3]), i % 3
        if bench.dataset == "mit":
            write_mit(root, item, i, bench.task)
            continue
        if bench.task == "depth":
            depth = depth_of(bench, i)
            rgb = picture(stretch(maps["rgb"][j], depth.shape))
            if bench.dataset == "eth3d":
                save(root / item["depth"], np.where(depth > 0, depth, np.inf).astype("<f4").tobytes())
            elif bench.dataset == "diode":
                save(root / item["depth"], depth[..., None].astype(np.float32))
                save(root / item["mask"], (depth > 0.6).astype(np.float32))
            else:
                save(root / item["depth"], Image.fromarray(np.round(depth * bench.scale).astype(np.uint16)))
        elif bench.task == "normal":
            save(root / item["normal"], maps["normal"][j].transpose(1, 2, 0).astype(np.float32))
        elif bench.task == "whdr":
            picture(maps["albedo"][j]).save(buffer := io.BytesIO(), "PNG")
            stored = np.asarray(Image.open(buffer)).transpose(2, 0, 1) / 255.0
            save(root / item["judgements"], json.dumps(judgements(linear(stored))).encode())
        elif bench.dataset == "interiorverse":
            save(root / item["albedo"], exr(linear(maps["albedo"][j]).transpose(1, 2, 0)))
            save(root / item["rgb"], exr(linear(maps["rgb"][j]).transpose(1, 2, 0), half=True))
            continue
        elif bench.dataset == "hypersim":
            for m, x in iid_truth(j).items():
                save(root / item[m], x.transpose(1, 2, 0))
        save(root / item["rgb"], rgb)
    return items


def iid_truth(j):
    """Hypersim: linear albedo, shading, residual (3, H, W) float64, with one black patch."""
    albedo, shading = linear(pool()["albedo"][j]), 3 * linear(pool()["irradiance"][j])
    albedo[:, :9, :5] = 0
    return dict(albedo=albedo, shading=shading, residual=0.2 * shading[::-1].copy())


def make_maw(root, n):
    image, labels, colours = patches()
    rows = []
    for i in range(n):
        save(root / f"images_png/scene_{i}/photo.png", Image.fromarray(image))
        save(root / f"labels/scene_{i}/photo_mask.png", Image.fromarray(labels))
        save(root / f"labels/scene_{i}/photo_colors.npy", colours)
        rows.append(f"scene_{i}/photo_colors.npy\tscene_{i}/photo_mask.png\tscene_{i}\tphoto\tscene_{i}/gt.png\tNone")
    save(root / "labels/meta.csv", ("\n".join(rows) + "\n").encode())
    return [dict(rgb=f"images_png/scene_{i}/photo.png", name=f"images_png/scene_{i}/photo.png") for i in range(n)]


def answer(bench, folder, items):
    """Perfect predictions: depth up to scale and shift, shading up to scale, the rest as it is."""
    files = benchmarks.formats.Files(folder) if folder.is_dir() else None
    if files is None:
        folder.mkdir(parents=True)
        files = benchmarks.formats.Files(folder)

    def put(name, m, x):
        save(folder / predictions.prediction_file(bench, files, name, m), np.asarray(x, np.float32))
    maps = pool()
    for i, item in enumerate(items):
        j, name = i % 3, item["rgb"]
        if bench.task == "depth":
            depth = depth_of(bench, i)
            if bench.dataset == "kitti":
                depth = depth[-352:, 13:1229]
            put(name, "depth", 0.05 * depth - 0.2)
        elif bench.task == "normal":
            put(name, "normal", np.where(maps["mask"][j], maps["normal"][j], 1))
        elif bench.task == "whdr":
            save(folder / f"{name[:-4]}_albedo.png", picture(maps["albedo"][j]))
        elif bench.task == "maw":
            save(folder / f"{name[:-4]}_albedo.png", Image.fromarray(patches()[0]))
        elif bench.task == "lmse":
            reflectance, shading = lit(i, 0)
            put(name, "albedo", 0.5 * reflectance.transpose(2, 0, 1))
            put(name, "irradiance", np.repeat(0.3 * shading[None], 3, 0))
        elif bench.task == "lights":
            for k, photo in enumerate([item["rgb"], *(item[m] for m in benchmark_table.MIT_LIGHTS[1:])]):
                put(photo, "albedo", (0.3 + 0.1 * k) * lit(i, 0)[0].transpose(2, 0, 1))
        elif bench.dataset == "interiorverse":
            put(name, "albedo", linear(maps["albedo"][j]) ** (1 / 2.2))
        elif bench.task == "iid":
            for m, x in iid_truth(j).items():
                put(name, "irradiance" if m == "shading" else m, x if m == "albedo" else 0.1 * x)
        else:
            put(name, "depth", (maps["depth"][j] - 1) / 2)
            put(name, "normal", maps["normal"][j] + [[[0]], [[0]], [[1e-3]]])
    return folder
