"""Predictions of benchmark images, from a network or from saved maps, scored one by one and kept on disk.

Every image's values are appended to OUT/eval/*.jsonl as soon as they are known. The file's name is a digest of the
data, the predictions, the settings and the code. So the same command continues where it was killed, and a command with
other settings, data or code never reads these numbers.
"""
import contextlib
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import relations
from data import formats
from data.photos import resize_long
from data.pictures import row_of
from evaluation import benchmarks, protocols
from evaluation.benchmark_table import MIT_LIGHTS
from models.depth_families import AFFINE, SIGN
from predictor import load_predictor, predict_photo
from relations import srgb_decode
from runtime.ahead import work_ahead
from runtime.files import read_log, write_rows
from runtime.ranks import pick_device


@dataclass(frozen=True)
class Source:
    """Where predictions come from: a network, or a folder of saved maps.

    label    its name in tables
    lacks    (bench, items) -> why it cannot be evaluated, or ""
    key      (bench, items) -> text that differs when the maps may differ
    read     (bench, files, item) -> sample, called in a second thread
    predict  (bench, sample) -> pred of protocols.py
    saved    True: the maps are files that another method wrote
    """

    label: str
    lacks: Callable
    key: Callable
    read: Callable
    predict: Callable
    saved: bool = False


def weights_key(policy):
    """Digest of a network: its configuration; names, shapes and about 4096 evenly spaced values of every tensor."""
    h = hashlib.sha256(repr(policy.cfg).encode())
    for name, x in {**policy.state_dict(), **dict(policy.named_buffers())}.items():     # not all buffers are state
        flat = x.detach().flatten()
        h.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        h.update(flat[::max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
    return h.hexdigest()


def maps_at_size(policy, rgb, processing_res, args, wanted, size):
    """Maps of one photo, resized to `size`; benchmarks call a predictor here alone.

    rgb      (3, H, W) sRGB in [0, 1]; wanted: modalities; size (H, W)
    args     of the command line: denoise_steps, ensemble_size, seed
    returns  dict modality -> (C, *size) float32 numpy in the modality's encoding
    """
    with torch.no_grad():
        maps = predict_photo(policy, rgb, processing_res or max(rgb.shape[-2:]), args.denoise_steps or 0, args.seed,
                             args.ensemble_size)
        return {m: (maps[m] if maps[m].shape[-2:] == size else
                    F.interpolate(maps[m][None].float(), size, mode="bilinear", align_corners=False)[0]).numpy()
                for m in wanted}


def linear_arrays(maps, space, sign=1):
    """Maps in the form that protocols.py reads: albedo and irradiance linear, depth without its channel axis.

    space  "srgb" or "linear": the space of the albedo and irradiance in `maps`
    sign   of the depth: -1 turns a disparity, so that larger is farther
    """
    out = {}
    for m, x in maps.items():
        if m in ("albedo", "irradiance") and space == "srgb":
            x = srgb_decode(torch.from_numpy(np.asarray(x, np.float64))).numpy()
        out[m] = x if m != "depth" else x[0] if sign > 0 else -x[0]
    return out


def network_source(path, args):
    """Predictions of a checkpoint. args: of the command line: processing_res, denoise_steps, ensemble_size, seed.

    differs: photos are reduced to the processing resolution once, in the thread that reads them, and the maps are
    enlarged from there, so a 4032 x 6048 photo and its maps are never in memory together.
    """
    policy = load_predictor(path).to(pick_device("auto", "eval.py"))
    means = getattr(policy, "depth_means", AFFINE)
    trained = None if hasattr(policy, "photo_maps") else policy.size            # px; None: the protocol's
    edge = trained if args.processing_res is None else args.processing_res

    def resolution(bench):
        return bench.processing_res if edge is None else edge

    def lacks(bench, items):
        less = [m for m in bench.needs if m not in policy.modalities]
        if not less and bench.align == "disparity" and bench.task == "depth" and means == AFFINE:
            return (f"{path} predicts depth up to scale and shift, which --align disparity cannot fit; want --align "
                    "depth for all that is compared")
        return less and f"{path} predicts {', '.join(policy.modalities)}; want {', '.join(less)} too"

    def read(bench, files, item):
        sample = benchmarks.load_sample(bench, files, item, axes=True) | dict(means=means)
        res = resolution(bench)
        sample["photos"] = [resize_long(x, res) if 0 < res < max(x.shape[1:]) else x for x in sample["photos"]]
        return sample

    def maps(bench, sample):
        wanted = [m for m in (*bench.needs, *bench.also) if m in policy.modalities]
        return [linear_arrays(maps_at_size(policy, x, resolution(bench), args, wanted, tuple(sample["size"])), "srgb")
                for x in sample["photos"]]

    steps = args.denoise_steps or getattr(policy, "steps", 10)
    settings = f"{steps} steps, ensemble {args.ensemble_size}, seed {args.seed}, "
    settings += "long edge " + ("of the protocol" if edge is None else f"{edge} px" if edge else "of the photo")

    def key(bench, items):
        return weights_key(policy) + settings + means

    return Source(f"{path}: {settings}", lacks, key, read, maps)


def prediction_file(bench, files, name, modality):
    """Name of the saved map of a photo: the first accepted name that exists, else the first accepted name.

    depth    pred_STEM.npy (NYUv2: pred_0001.npy), normals STEM.npy, IID STEM_albedo.npy, STEM_shading.npy (Marigold's)
    others   STEM_MODALITY.npy; albedo and shading also .png; IIW and MAW also STEM-r.png (Bell et al.) and STEM.png
    """
    place = PurePosixPath(name).parent
    stem = PurePosixPath(name).stem
    if bench.task == "depth":
        return str(place / f"pred_{stem.split('_')[1] if bench.prediction == 'rgb_id' else stem}.npy")
    if bench.task == "normal":
        return str(place / f"{stem}.npy")
    ending = "shading" if bench.task == "iid" and modality == "irradiance" else modality
    accepted = [f"{stem}_{ending}.npy"]
    if modality in ("albedo", "irradiance"):
        accepted.append(f"{stem}_{ending}.png")
    if bench.task in ("whdr", "maw"):
        accepted += [f"{stem}-r.png", f"{stem}.npy", f"{stem}.png"]
    names = [str(place / n) for n in accepted]
    return next((n for n in names if files.size(n) >= 0), names[0])


def saved_source(path, args):
    """Predictions that another method saved, in Marigold's naming (prediction_file).

    args  of the command line: pred_space, align. With --align disparity the depth files hold disparities
    """
    saved = formats.Files(path)

    def names(bench, item):
        """Where the maps of each photo of an item are expected: [{modality: file}]."""
        return [{m: prediction_file(bench, saved, photo, m) for m in (*bench.needs, *bench.also)}
                for photo in (item["rgb"], *(item[k] for k in MIT_LIGHTS[1:] if k in item))]

    def lacks(bench, items):
        photos = [files for item in items for files in names(bench, item)]
        wanted = {m for files in photos for m, f in files.items() if m in bench.needs or saved.size(f) >= 0}
        absent = [files[m] for files in photos for m in files if m in wanted and saved.size(files[m]) < 0]
        total = len(photos) * len(wanted)
        return absent and (f"{path}: got no prediction for {len(absent)} of {total} maps of {bench.dataset} (first: "
                           f"{absent[0]}), want all; predict them too")

    def key(bench, items):
        return str(Path(path).resolve()) + str([[saved.stamp(f) for f in files.values()]
                                                for item in items for files in names(bench, item)]) + space(bench)

    def space(bench):
        return args.pred_space or ("linear" if bench.dataset == "hypersim" else "srgb")

    def read(bench, files, item):
        means = "disparity" if bench.align == "disparity" else AFFINE
        sample = benchmarks.load_sample(bench, files, item, axes=True) | dict(means=means)
        own = {files.place(f) for f in benchmarks.item_files(item)}
        sample["saved"] = []
        for maps in names(bench, item):
            maps = {m: f for m, f in maps.items() if m in bench.needs or saved.size(f) >= 0}
            for f in maps.values():
                if saved.place(f) in own:
                    raise ValueError(f"{saved.where(f)}: got a file of {bench.dataset} itself as a prediction, want "
                                     "another folder in --pred-dir")
            maps = {m: formats.read_map(saved, f, row_of(m).channels) for m, f in maps.items()}
            sample["saved"].append(linear_arrays(maps, space(bench), SIGN[means]))
        return sample

    def maps(bench, sample):
        return sample["saved"]

    label = f"maps in {path} (colours {args.pred_space or 'sRGB-encoded, linear for hypersim'})"
    label += {"disparity": ", disparities", "log-ransac": ", taken as log depth"}.get(args.align, "")
    return Source(label, lacks, key, read, maps, saved=True)


NETWORK_FILES = ("predictor.json", "model_index.json", "config.json")          # one lies in a predictor's folder


def find_source(path, args):
    """Source of a path: a predictor's folder or hub id, or a folder or tar of saved maps."""
    there = Path(path)
    maps = there.is_file() or (there.is_dir() and not any((there / n).exists() for n in NETWORK_FILES))
    return saved_source(path, args) if maps else network_source(path, args)


def project_source():
    """Source text of this module and of all project modules that it uses, directly or indirectly: dict by name."""
    root = Path(relations.__file__).parent
    installed = Path(sysconfig.get_path("purelib"))                             # may be inside the root
    found = {}
    waiting = [sys.modules[__name__]]
    while waiting:
        module = waiting.pop()
        folders = Path(getattr(module, "__file__", None) or "/").parents
        if root not in folders or installed in folders or module.__name__ in found:
            continue
        found[module.__name__] = inspect.getsource(module)
        for value in vars(module).values():
            waiting.append(value if inspect.ismodule(value) else sys.modules.get(getattr(value, "__module__", None)))
    return found


CODE = sorted(project_source().items())   # read at import: the code that runs, even when the files change meanwhile


def results_file(bench, source, files, items, out):
    """Path of the JSONL file of values per image; its name is a digest (see the module docstring)."""
    stamps = [[files.stamp(f) for f in benchmarks.item_files(item)] for item in items]
    parts = CODE, stamps, files.where("x"), source.key(bench, items), bench.align
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return Path(out, "eval", f"{bench.dataset}-{bench.task}-{key}.jsonl")


def read_results(bench, path):
    """Values of the images in a file: dict name -> values. The file is cut before the first incomplete line."""
    if not path.is_file():
        return {}
    n = len(path.read_bytes().splitlines())
    rows = read_log(path)
    other = [r["align"] for r in rows if isinstance(r, dict) and r.get("align", bench.align) != bench.align]
    if other:
        raise ValueError(f"{path}: got numbers of --align {other[0]}, want {bench.align}; remove the file")
    rows = protocols.whole_rows(bench, rows)
    if len(rows) < n:
        print(f"{path}: got {n} lines, the first {len(rows)} whole; going on after them")
    write_rows(path, rows)
    return {row.pop("name"): row for row in rows}


def evaluate_images(bench, source, files, items, path):
    """Values per image, continued from `path`. The next image is read while this one is predicted and scored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_results(bench, path)
    left = [item for item in items if item["name"] not in done]
    if len(left) < len(items):
        print(f"{bench.dataset}: {len(items) - len(left)} of {len(items)} images are already in {path}")
    samples = work_ahead(lambda item: source.read(bench, files, item), left, depth=1, threads=1)
    bar = tqdm(left, desc=f"{bench.dataset} {bench.task}", disable=len(left) < 3)
    with contextlib.closing(samples), open(path, "a") as log:
        for item, sample in zip(bar, samples, strict=True):
            row = protocols.score_prediction(bench, source.predict(bench, sample), sample)
            log.write(json.dumps(dict(name=item["name"], **row)) + "\n")
            log.flush()
            done[item["name"]] = row
    return [done[item["name"]] for item in items]
