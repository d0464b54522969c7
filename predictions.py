"""Predictions of benchmark images, from a network or from saved maps, scored one by one and kept on disk.

Every image's values are appended to OUT/eval/*.jsonl as soon as they are known; the file's name is a digest of the
data, the predictions, the settings and the scoring code, so the same command goes on where it was killed and no
other command picks up its numbers.
"""
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import benchmarks
import formats
import protocols
from photos import resize_long
from predictor import load_predictor, predict_photo
from relations import srgb_decode
from runtime import pick_device


@dataclass(frozen=True)
class Source:
    """Where predictions come from: a network, or a folder of saved maps.

    label    for the tables
    lacks    (bench, items) -> why it cannot be evaluated, or ""
    key      (bench, items) -> text that changes whenever the maps may
    read     (bench, files, item) -> sample, called in a second thread
    predict  (bench, sample) -> pred of protocols.py;  saved: the maps are another method's files
    """

    label: str
    lacks: Callable
    key: Callable
    read: Callable
    predict: Callable
    saved: bool = False


def weights_key(policy):
    """Digest of a network: its configuration; names, shapes and about 4096 evenly spaced values of every tensor."""
    config = (getattr(policy, "cfg", None) or
              (policy.about, policy.schedule.config, policy.unet.config, policy.vae.config))
    h = hashlib.sha256(repr(config).encode())
    for name, x in {**policy.state_dict(), **dict(policy.named_buffers())}.items():     # the empty prompt is no state
        flat = x.detach().flatten()
        h.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        h.update(flat[::max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
    return h.hexdigest()


def photo_maps(policy, rgb, processing_res, args, wanted, size):
    """Maps of one photo at another size: the one place where a benchmark calls a predictor.

    rgb (3, H, W) sRGB in [0, 1];  returns dict modality -> (C, *size) float32 numpy in the modality's encoding
    """
    with torch.no_grad():
        maps = predict_photo(policy, rgb, processing_res or max(rgb.shape[-2:]), args.denoise_steps or 0, args.seed,
                             args.ensemble_size)
        return {m: (maps[m] if maps[m].shape[-2:] == size else
                    F.interpolate(maps[m][None].float(), size, mode="bilinear", align_corners=False)[0]).numpy()
                for m in wanted}


def linear(maps, space):
    """The arrays protocols.py wants: albedo and irradiance made linear, depth without its channel axis."""
    out = {}
    for m, x in maps.items():
        if m in ("albedo", "irradiance") and space == "srgb":
            x = srgb_decode(torch.from_numpy(np.asarray(x, np.float64))).numpy()
        out[m] = x[0] if m == "depth" else x
    return out


def network(path, args):
    """Predictions of a checkpoint.

    differs: photos are reduced to the processing resolution once, in the reading thread, and the maps enlarged from
    there: a 4032 x 6048 photo never exists next to its maps.
    """
    policy = load_predictor(path).to(pick_device("auto", "eval.py"))
    trained = getattr(getattr(policy, "cfg", None), "size", None)              # px, of our DiT; None: the protocol's

    def resolution(bench):
        return next(r for r in (args.processing_res, trained, bench.processing_res) if r is not None)

    def lacks(bench, items):
        less = [m for m in bench.needs if m not in policy.modalities]
        return less and f"{path} predicts {', '.join(policy.modalities)}; want {', '.join(less)} too"

    def read(bench, files, item):
        sample, res = benchmarks.load(bench, files, item, axes=True), resolution(bench)
        sample["photos"] = [resize_long(x, res) if 0 < res < max(x.shape[1:]) else x for x in sample["photos"]]
        return sample

    def maps(bench, sample):
        wanted = [m for m in (*bench.needs, *bench.also) if m in policy.modalities]
        return [linear(photo_maps(policy, x, resolution(bench), args, wanted, tuple(sample["size"])), "srgb")
                for x in sample["photos"]]

    steps = args.denoise_steps or getattr(policy, "steps", 10)
    settings = f"{steps} steps, ensemble {args.ensemble_size}, seed {args.seed}, "
    edge = next((r for r in (args.processing_res, trained) if r is not None), None)
    settings += "long edge " + ("of the protocol" if edge is None else f"{edge} px" if edge else "of the photo")
    return Source(f"{path}: {settings}", lacks, lambda bench, items: weights_key(policy) + settings, read, maps)


def folder(path, args):
    """Predictions that another method saved, in Marigold's naming (benchmarks.prediction_file)."""
    saved = formats.Files(path)

    def names(bench, item):
        """Where the maps of each photo of an item are expected: [{modality: file}]."""
        return [{m: benchmarks.prediction_file(bench, saved, photo, m) for m in (*bench.needs, *bench.also)}
                for photo in (item["rgb"], *(item[k] for k in benchmarks.MIT_LIGHTS[1:] if k in item))]

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
        sample = benchmarks.load(bench, files, item, axes=True)
        own = {files.place(f) for role, f in item.items() if role != "name"}
        sample["saved"] = []
        for maps in names(bench, item):
            maps = {m: f for m, f in maps.items() if m in bench.needs or saved.size(f) >= 0}
            for f in maps.values():
                if saved.place(f) in own:
                    raise ValueError(f"{saved.where(f)}: got a file of {bench.dataset} itself as a prediction, want "
                                     "another folder in --pred-dir")
            sample["saved"].append(linear({m: benchmarks.read_prediction(saved, f, m) for m, f in maps.items()},
                                          space(bench)))
        return sample

    label = f"maps in {path} (colours {args.pred_space or 'sRGB-encoded, linear for hypersim'})"
    return Source(label, lacks, key, read, lambda bench, sample: sample["saved"], saved=True)


def source_of(path, args):
    """A predictor's folder or hub id, or a folder or tar of saved maps."""
    there = Path(path)
    maps = there.is_file() or (there.is_dir() and not any((there / n).exists() for n in ("predictor.json",
                                                                                         "model_index.json")))
    return folder(path, args) if maps else network(path, args)


def results_file(bench, source, files, items, out):
    """JSONL of results per image; its name changes with the data, the predictions, the settings and this code."""
    code = [(Path(__file__).parent / f"{name}.py").read_text()
            for name in ("metrics", "protocols", "benchmarks", "formats", "predictions", "predictor", "marigold",
                         "schedule", "sd2", "photos", "relations")]
    stamps = [[files.stamp(f) for role, f in item.items() if role != "name"] for item in items]
    key = hashlib.sha256(repr((code, stamps, files.where("x"), source.key(bench, items))).encode()).hexdigest()[:16]
    return Path(out, "eval", f"{bench.dataset}-{bench.task}-{key}.jsonl")


def read_results(bench, path):
    """Finished images of a results file: dict name -> values; it is cut before the first line that is not whole."""
    if not path.is_file():
        return {}
    rows, lines = [], path.read_bytes().splitlines()
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break                                                               # killed while writing it
    rows = protocols.finished(bench, rows)
    if len(rows) < len(lines):
        print(f"{path}: got {len(lines)} lines, the first {len(rows)} whole; going on after them")
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(part, path)
    return {row.pop("name"): row for row in rows}


def evaluate_images(bench, source, files, items, path):
    """Values per image, resumed from `path`; the next image is read while this one is predicted and scored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_results(bench, path)
    left = [item for item in items if item["name"] not in done]
    if len(left) < len(items):
        print(f"{bench.dataset}: {len(items) - len(left)} of {len(items)} images are already in {path}")
    with ThreadPoolExecutor(1) as pool, open(path, "a") as log:
        waiting = [pool.submit(source.read, bench, files, left[0])] if left else []
        for i in tqdm(range(len(left)), desc=f"{bench.dataset} {bench.task}", disable=len(left) < 3):
            sample = waiting.pop().result()
            waiting = [pool.submit(source.read, bench, files, left[i + 1])] if i + 1 < len(left) else []
            row = protocols.score(bench, source.predict(bench, sample), sample)
            log.write(json.dumps(dict(name=left[i]["name"], **row)) + "\n")
            log.flush()
            done[left[i]["name"]] = row
    return [done[item["name"]] for item in items]
