"""Reading the public benchmarks: where their files are, how they are decoded and masked.

`find_data` opens a folder or tar, `list_items` lists its images by the official list, `load_sample` reads one image
with its ground truth. The rules follow the official code (benchmark_table.py). They were tested on made-up files; the
only real data that we had were one DIODE frame and IIW's schema.

item      dict role -> relative name of a file; its "name" is the image's name in results
sample    name; photos [(3, H, W) float32 sRGB in [0, 1]]; and, by task, depth (H, W) float32 metres with mask
          (H, W) bool; normal (3, H, W), 0 = invalid; judgements (IIW's JSON); labels, colors (MAW);
          albedo, shading, residual (3, H, W) *linear* with masks of their shape; lights (MIT's photos, linear);
          size (H, W) of the maps that are compared
"""
import os
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from data import formats
from data.photos import find_images, read_rgb
from evaluation import metrics, surface
from evaluation.benchmark_table import MIT_LIGHTS, MissingData, missing_page
from relations import srgb_encode
from runtime.files import decode_json

LISTS = Path(__file__).parent / "lists"
ETH3D_SIZE = (4032, 6048)             # rows, columns of every depth map; the files have no header
KITTI_SIZE = (352, 1216)              # bottom-aligned, horizontally centred crop
DIODE_CAMERA = (886.81, 927.06, 512.0, 384.0)   # fx, fy, cx, cy in pixels
MIT_OBJECTS = ("box cup1 cup2 dinosaur panther squirrel sun teabag2 "
               "deer frog1 frog2 paper1 paper2 raccoon teabag1 turtle").split()
LMSE_WINDOWS = 20, 10                 # pixels: side, step
FRAME_MARGIN = 5.0                    # degrees, as surface.AXIS_MARGIN, for one image: normals of its depth are noisy


def read_list(name):
    """Names of a list file in order: [(name, has ground truth)] (the format: evaluation/lists/SOURCE.md)."""
    found = []
    for line in (LISTS / name).read_text().splitlines():
        pattern, *values = line.split()
        found += [(pattern.replace("*", v.rstrip("!")), not v.endswith("!")) for v in values]
    return found


def swap_parts(name, old, new):
    """Replace the last occurrence of each part of a photo's name, to get the names of the files beside it."""
    for a, b in zip([old] if isinstance(old, str) else old, [new] if isinstance(new, str) else new, strict=True):
        if a:
            head, found, tail = name.rpartition(a)
            if not found:
                raise ValueError(f"{name!r}: got a name without {a!r}; want one of the official list; correct it")
            name = head + b + tail
    return name


def _item(bench, name):
    item = dict(rgb=name, **{role: swap_parts(name, old, new) for role, old, new in bench.files})
    if bench.dataset == "kitti":                                                # day/drive/image_02/data/X.png
        _, drive, camera, _, frame = PurePosixPath(name).parts
        item["depth"] = f"{drive}/proj_depth/groundtruth/{camera}/{frame}"
    if bench.dataset == "eth3d":                                                # rgb/SCENE/images/dslr_images/X.JPG
        scene = PurePosixPath(name).parts[1]
        photo = PurePosixPath(name).name
        item["depth"] = f"depth/{scene}_dslr_depth/{scene}/ground_truth_depth/dslr_images/{photo}"
    return dict(item, name=name)


def list_items(bench, files):
    """Every image of the official protocol, in its order: a list of dict role -> relative name."""
    if bench.dataset == "mit":
        return [_item(bench, f"{tag}/{'diffuse' if bench.task == 'lmse' else 'light01'}.png") for tag in MIT_OBJECTS]
    if bench.dataset == "maw":
        return _maw_items(files)
    found = [_item(bench, name) for name, known in read_list(bench.list_file) if known]
    if len(found) != bench.count:
        raise ValueError(f"evaluation/lists/{bench.list_file}: got {len(found)} images with truth, want {bench.count}; "
                         "restore it")
    return found


def _maw_items(files):
    meta = "labels/meta.csv"
    if files.size(meta) < 0:
        return [dict(name=meta, rgb=meta)]                                      # reported as the missing file
    rows = formats.decode_table(files.read(meta), files.where(meta), "\t")
    if not rows:
        raise ValueError(f"{files.where(meta)}: got no line, want one for each photo; fetch it again")
    for line, row in enumerate(rows, 1):
        if len(row) != 6:
            raise ValueError(f"{files.where(meta)} line {line}: got {len(row)} columns, want 6 separated by tabs; "
                             "fetch it again")
    photos = [f"images_png/{r[2]}/{r[3]}.png" for r in rows]                    # results are kept by name
    times = Counter(photos)
    return [dict(name=p if times[p] == 1 else f"{p} {r[0]} {r[1]}", rgb=p, colors=f"labels/{r[0]}",
                 mask=f"labels/{r[1]}") for p, r in zip(photos, rows, strict=True)]


def item_files(item):
    """Names of the files of an item."""
    return [name for role, name in item.items() if role != "name"]


def is_complete(files, item):
    """Whether all files of an item are there."""
    return all(files.size(name) >= 0 for name in item_files(item))


def _prefer_npy(files, item):
    """The item with each .exr replaced by the .npy of the same name where there is one."""
    return {role: f[:-4] + ".npy" if role != "name" and f.endswith(".exr") and files.size(f[:-4] + ".npy") >= 0 else f
            for role, f in item.items()}


def find_data(bench, path, out=None):
    """Open the data: the folder or tar under `path` that holds most of the official files -> (Files, items, missing).

    out      folder that the command writes to, whose pictures are no photos
    missing  names of files that are not there, in list order
    raises   MissingData with the page when nothing is there; ValueError for a path that is no folder or tar
    """
    if not path:
        raise MissingData(f"--dataset {bench.dataset} needs --data DIR with its files", missing_page(bench))
    if not os.path.exists(path):
        raise MissingData(f"--data {path}: got no such folder or tar, want the files of {bench.dataset}",
                          missing_page(bench))
    if bench.dataset == "photos":
        root = Path(path) if Path(path).is_dir() else Path(path).parent
        return formats.Files(root), [_item(bench, str(p.relative_to(root))) for p in find_images(path, out)], []
    best = None                                                                 # (complete images, files, items)
    top = formats.Files(path)
    places = [top] if top.index is None else [top, *(top.under(r) for r in bench.roots if not r.endswith(".tar"))]
    for root in bench.roots if top.index is None else ():
        inside = Path(path, root)
        if inside.is_dir() or inside.is_file():
            places.append(formats.Files(inside))
    for files in places:
        found = [_prefer_npy(files, item) for item in list_items(bench, files)]
        n = sum(is_complete(files, item) for item in found)
        if best is None or n > best[0]:
            best = n, files, found
    n, files, found = best
    missing = [name for item in found for name in item_files(item) if files.size(name) < 0]
    missing = list(dict.fromkeys(missing))
    if n == 0:
        raise MissingData(f"--data {path}: got none of the {len(found)} images of {bench.dataset} "
                          f"(first missing: {missing[0]})", missing_page(bench, missing))
    return files, found, missing


def _photo(files, item):
    """The photo of an item: (3, H, W) float32 tensor in [0, 1]."""
    pixels = formats.decode_rgb(files.read(item["rgb"]), files.where(item["rgb"]))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous().float().div_(255)


def _three_channels(files, name):
    """Linear colours or normals, .exr or .npy -> (3, H, W) float32."""
    decode = formats.decode_exr if name.endswith(".exr") else formats.decode_npy
    array = decode(files.read(name), files.where(name)).astype(np.float32, copy=False)
    if not array.size or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{files.where(name)}: got shape {array.shape}, want (H, W, 3); fetch it again")
    return array.transpose(2, 0, 1)


def _same_size(where, got, want):
    if tuple(got) != tuple(want):
        raise ValueError(f"{where}: got {got[1]} x {got[0]} pixels, want {want[1]} x {want[0]} as the others; "
                         "fetch it again")


def load_sample(bench, files, item, axes=False):
    """One image with its ground truth (see `sample` above). axes: compare true normals with their depth, if any.

    raises   FileNotFoundError, ValueError (a damaged file, an empty mask, another size, wrong axes)
    """
    sample = _LOADERS[bench.task](bench, files, item)
    if axes and bench.dataset == "diode" and bench.task == "normal":
        _check_axes(files, item, sample)
    return dict(sample, name=item["name"])


def _load_depth(bench, files, item):
    where = files.where(item["depth"])
    mask = None
    if bench.dataset == "eth3d":
        depth = formats.decode_floats(files.read(item["depth"]), where, ETH3D_SIZE)
        depth[np.isposinf(depth)] = 0
    elif bench.dataset == "diode":
        depth, mask = _diode_depth(files, item["depth"], item["mask"])
    else:
        depth = formats.decode_gray(files.read(item["depth"]), where)
        if depth.dtype != np.uint16:
            raise ValueError(f"{where}: got 8-bit depth, want 16 bits, {bench.scale:g} a metre; fetch it again")
        depth = depth.astype(np.float32) / np.float32(bench.scale)
    rgb = _photo(files, item)
    _same_size(where, depth.shape, rgb.shape[1:])
    if bench.dataset == "kitti":
        h, w = KITTI_SIZE
        H, W = depth.shape
        if H < h or W < w:
            raise ValueError(f"{where}: got {W} x {H} pixels, want at least {w} x {h}; fetch it again")
        left = int((W - w) / 2)
        depth, rgb = (x[..., H - h:, left:left + w] for x in (depth, rgb))
    if mask is None:
        mask = valid_depth(bench, depth)
    if not mask.any():
        raise ValueError(f"{where}: got an empty mask, want at least one pixel with a depth in "
                         f"{bench.range[0]:g}..{bench.range[1]:g} m; fetch it again")
    return dict(photos=[rgb], depth=depth, mask=mask, size=depth.shape)


def _diode_depth(files, depth_name, mask_name):
    """DIODE's depth, (H, W) float32 metres, and its mask, (H, W) bool, finite and above 0 inside it."""
    depth, mask = (formats.decode_npy(files.read(n), files.where(n)) for n in (depth_name, mask_name))
    depth, mask = (x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x for x in (depth, mask))
    for name, x in ((depth_name, depth), (mask_name, mask)):
        if x.ndim != 2:
            raise ValueError(f"{files.where(name)}: got shape {x.shape}, want one value per pixel; fetch it again")
    if not np.isfinite(mask).all():
        raise ValueError(f"{files.where(mask_name)}: got non-finite values, want 0 or 1; fetch it again")
    _same_size(files.where(mask_name), mask.shape, depth.shape)
    depth = depth.astype(np.float32)
    mask = mask.astype(bool)
    if not (depth[mask] > 0).all() or not np.isfinite(depth[mask]).all():
        raise ValueError(f"{files.where(depth_name)}: got a depth in the mask that is not finite or not above 0, want "
                         "metres; fetch it again")
    return depth, mask


def valid_depth(bench, depth):
    """Pixels that count: strictly inside the range, and inside the crop of NYUv2 or KITTI."""
    mask = (depth > bench.range[0]) & (depth < bench.range[1])
    crop = np.zeros_like(mask)
    H, W = depth.shape
    if bench.dataset == "nyuv2":
        crop[45:471, 41:601] = True
    elif bench.dataset == "kitti":
        crop[int(0.3324324 * H):int(0.91351351 * H), int(0.0359477 * W):int(0.96405229 * W)] = True
    else:
        crop[:] = True
    return mask & crop


def _load_normal(bench, files, item):
    where = files.where(item["normal"])
    normal = _three_channels(files, item["normal"])
    rgb = _photo(files, item)
    _same_size(where, normal.shape[1:], rgb.shape[1:])
    if not np.isfinite(normal).all():
        raise ValueError(f"{where}: got non-finite normals, want zero vectors at invalid pixels; set them to zero")
    if not normal.any():
        raise ValueError(f"{where}: got an empty mask (all normals zero), want at least one; fetch it again")
    return dict(photos=[rgb], normal=normal, size=normal.shape[1:])


def _check_axes(files, item, sample):
    depth_name, mask_name = (swap_parts(item["rgb"], ".png", end) for end in ("_depth.npy", "_depth_mask.npy"))
    if files.size(depth_name) < 0 or files.size(mask_name) < 0:
        return
    depth, mask = _diode_depth(files, depth_name, mask_name)
    _same_size(files.where(depth_name), depth.shape, sample["size"])
    derived = surface.valid_normals(np.where(mask, depth, 0), *DIODE_CAMERA)
    wrong = surface.wrong_axes(surface.axis_errors(derived, sample["normal"]), "normals of its depth", FRAME_MARGIN)
    if wrong:
        raise ValueError(f"{files.where(item['normal'])}: {wrong}")


def _check_truth(where, measure, *args):
    """Compute a measure on the truth: an error of the measure is raised with the name of the file."""
    try:
        measure(*args)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _load_whdr(bench, files, item):
    rgb = _photo(files, item)
    judgements = decode_json(files.read(item["judgements"]), files.where(item["judgements"]))
    _check_truth(files.where(item["judgements"]), metrics.whdr, np.ones((8, 8, 3)), judgements)
    return dict(photos=[rgb], judgements=judgements, size=tuple(rgb.shape[1:]))


def _load_maw(bench, files, item):
    rgb = _photo(files, item)
    colors = formats.decode_npy(files.read(item["colors"]), files.where(item["colors"]))
    labels = formats.decode_gray(files.read(item["mask"]), files.where(item["mask"]))
    black = np.zeros((*metrics.MAW_SIZE, 3), np.uint8)
    _check_truth(files.where(item["mask"]), metrics.maw_intensity, black, labels, colors)
    return dict(photos=[rgb], colors=colors, labels=labels, size=tuple(rgb.shape[1:]))


def _mit_photo(files, name, mask):
    """One of MIT's photos, linear: (3, H, W) float32."""
    pixels = formats.decode_png_linear(files.read(name), files.where(name))
    _same_size(files.where(name), pixels.shape[:2], mask.shape)
    return np.broadcast_to(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1), (3, *mask.shape))


def _shown(photo, mask):
    """MIT's linear photo as the predictor sees it: over its 99 % quantile in the mask, clipped, sRGB-encoded."""
    top = max(float(np.quantile(photo[:, mask], 0.99)), 1e-6)
    return srgb_encode(torch.from_numpy(np.minimum(photo / top, 1)).float())


def _mit_mask(files, item):
    mask = formats.decode_png_linear(files.read(item["mask"]), files.where(item["mask"]))
    mask = (mask if mask.ndim == 2 else mask.max(2)) > 0
    if not mask.any():
        raise ValueError(f"{files.where(item['mask'])}: got an empty mask, want an object; fetch it again")
    return mask


def _load_lmse(bench, files, item):
    mask = _mit_mask(files, item)
    photo, albedo, shading = (_mit_photo(files, item[m], mask) for m in ("rgb", "albedo", "shading"))
    for m, x in (("albedo", albedo), ("shading", shading)):
        _check_truth(files.where(item[m]), metrics.lmse, x.mean(0), x.mean(0), mask, *LMSE_WINDOWS)
    return dict(photos=[_shown(photo, mask)], mask=mask, size=mask.shape, albedo=albedo, shading=shading)


def _load_lights(bench, files, item):
    mask = _mit_mask(files, item)
    names = [item["rgb"], *(item[k] for k in MIT_LIGHTS[1:])]
    lights = [_mit_photo(files, n, mask) for n in names]
    return dict(photos=[_shown(x, mask) for x in lights], mask=mask, size=mask.shape, lights=lights)


def _colours(where, x):
    bad = np.count_nonzero(~(x >= 0))
    if bad:
        raise ValueError(f"{where}: got {bad} values that are negative or no number, want linear colour; "
                         "fetch it again")


def _load_iid(bench, files, item):
    if bench.dataset == "interiorverse":
        photo, albedo = (_three_channels(files, item[m]).clip(0, 1) for m in ("rgb", "albedo"))
        for m, x in (("rgb", photo), ("albedo", albedo)):
            _colours(files.where(item[m]), x)
        rgb = torch.from_numpy(photo ** (1 / 2.2)).float()
        _same_size(files.where(item["albedo"]), albedo.shape[1:], rgb.shape[1:])
        return dict(photos=[rgb], albedo=albedo, size=albedo.shape[1:])
    rgb = _photo(files, item)
    truth = {m: _three_channels(files, item[m]) for m in ("albedo", "shading", "residual")}
    for m, x in truth.items():
        _same_size(files.where(item[m]), x.shape[1:], rgb.shape[1:])
    finite = {m: np.isfinite(x) for m, x in truth.items()}
    _colours(files.where(item["albedo"]), truth["albedo"][finite["albedo"]])
    masks = {f"{m}_mask": ok for m, ok in finite.items()}
    masks["albedo_mask"] = finite["albedo"] & (truth["albedo"] != 0).any(0)     # black means no surface
    for m in truth:
        if not masks[f"{m}_mask"].any():
            raise ValueError(f"{files.where(item[m])}: got an empty mask, want finite values; fetch it again")
    # differs: in the official code one value that is not finite makes the quantile, and so the whole image, NaN
    top = max(float(np.quantile(truth[m][finite[m]], 0.98)) for m in ("shading", "residual"))
    for m in ("shading", "residual"):
        truth[m] = np.where(finite[m], truth[m].clip(0, top) / max(top, 1e-12), 0)
    truth["albedo"] = np.where(finite["albedo"], truth["albedo"], 0)
    return dict(photos=[rgb], size=tuple(rgb.shape[1:]), **truth, **masks)


def _load_photo(bench, files, item):
    rgb = read_rgb(files.path / item["rgb"])
    return dict(photos=[rgb], size=tuple(rgb.shape[1:]))


_LOADERS = {"depth": _load_depth, "normal": _load_normal, "whdr": _load_whdr, "maw": _load_maw, "lmse": _load_lmse,
            "lights": _load_lights, "iid": _load_iid, "surface": _load_photo,
            "pairs": _load_photo}
