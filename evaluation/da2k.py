"""DA-2K: which of two points of a photo is closer? For judges and for predictors, by scene type.

annotations.json  {image: [{"point1": [row, col], "point2": [row, col], "closer_point": "point1"}, ...], ...}; point1
                  is always the closer one, so which point is red is drawn, from the seed and the image's name
scene type        the folder below images/ (or the image's own): indoor, outdoor, ...
judge             is asked twice, the second time with the colours exchanged; the mean is its answer. It sees a square:
                  two points in one cell of it cannot be told apart. Such a pair is counted, and is wrong
predictor         the smaller depth at the point's pixel is closer: the order alone, so nothing is aligned
figures           over pairs; a tie is wrong; what a judge does not know (NaN) counts as `unknown` and nowhere else.
                  Intervals are bootstrapped over images, since the pairs of an image depend on each other
Source: DA-2K.md of DepthAnything/Depth-Anything-V2. No official evaluation code exists.
"""
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from data import formats
from data.photos import read_rgb, resize, square_points
from evaluation import predictions
from evaluation.benchmark_table import DA2K, MissingData, missing_page
from evaluation.intervals import bootstrap_interval, verdict
from evaluation.reliability import average_orders
from evaluation.report import compared_paths, format_interval, print_table
from evaluation.scores import HEURISTICS, device_of
from judge import load_judge
from relations import NAMES, margin
from runtime.files import decode_json, path_inside, refuse
from runtime.ranks import generator, pick_device

ANNOTATIONS = "annotations.json"
ALL = "all"
KEYS = {"point1", "point2", "closer_point"}


@dataclass(frozen=True)
class Pairs:
    """The pairs of one image."""

    name: str                # of the image, relative to the folder
    scene: str               # scene type
    pts: torch.Tensor        # (P, 2, 2) int64 (row, col) px of the image, red first
    first: np.ndarray        # (P,) bool: red is closer


def scene_type(name):
    """Scene type of an image's name: "images/indoor/1.jpg" -> "indoor"."""
    parts = PurePosixPath(name).parts[:-1]
    return parts[1] if len(parts) > 1 and parts[0] == "images" else parts[-1] if parts else "other"


def _read_point(value, where):
    numbers = isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value)
    if not numbers or not all(math.isfinite(x) and 0 <= x < 1 << 24 for x in value):
        refuse(where, f"a point {str(value)[:60]}", "[row, col] in pixels", "correct the file")
    return [int(x) for x in value]


def draw_order(name, pairs, where, seed):
    """Pairs of an image: its annotations, checked, each with red and green exchanged at random."""
    if not isinstance(pairs, list) or not pairs:
        refuse(where, f"{str(pairs)[:60]}", "a list of pairs", "correct the file")
    pts = []
    for k, pair in enumerate(pairs):
        place = f"{where} pair {k}"
        if not isinstance(pair, dict) or not pair.keys() >= KEYS:
            refuse(place, f"{str(pair)[:60]}", f"an object with {', '.join(sorted(KEYS))}", "correct the file")
        if pair["closer_point"] not in ("point1", "point2"):
            refuse(place, f"closer_point {str(pair['closer_point'])[:60]!r}", "point1 or point2", "correct the file")
        near = pair["closer_point"]
        far = "point2" if near == "point1" else "point1"
        pts.append([_read_point(pair[key], f"{place}, {key}") for key in (near, far)])
        if pts[-1][0] == pts[-1][1]:
            refuse(place, f"the point {pts[-1][0]} twice", "two points", "correct the file")
    rng = generator(seed, int(hashlib.sha256(name.encode()).hexdigest()[:15], 16))
    first = torch.rand(len(pts), generator=rng) < 0.5
    pts = torch.tensor(pts)
    return Pairs(name, scene_type(name), torch.where(first[:, None, None], pts, pts.flip(1)), first.numpy())


def open_pairs(path, limit, seed):
    """All annotated images, at most `limit` (0: all) of those whose file is there.

    returns  folder, list of Pairs, number of annotated images
    raises   MissingData: no data, or an image is missing and there is no limit; Refusal: annotations of another form
    """
    if not path:
        raise MissingData("--dataset da2k needs --data DIR with its files", missing_page(DA2K))
    place = next((Path(path, r) for r in (".", *DA2K.roots) if Path(path, r, ANNOTATIONS).is_file()), None)
    if place is None:
        raise MissingData(f"--data {path}: got no {ANNOTATIONS}, want the unpacked folder of DA-2K", missing_page(DA2K))
    where = str(place / ANNOTATIONS)
    found = decode_json((place / ANNOTATIONS).read_bytes(), where)
    if not isinstance(found, dict) or not found:
        refuse(where, f"{str(found)[:60]}", "an object that names images", "fetch it again")
    images = [draw_order(name, pairs, f"{where}: {name}", seed) for name, pairs in found.items()]
    missing = [p.name for p in images if not path_inside(place, p.name, where).is_file()]
    if missing and (not limit or len(missing) == len(images)):
        raise MissingData(f"--data {path}: got {len(images) - len(missing)} of {len(images)} images of da2k (first "
                          f"missing: {missing[0]}), want all; --limit N takes what is there",
                          missing_page(DA2K, missing))
    lost = set(missing)
    return place, [p for p in images if p.name not in lost][:limit or None], len(images)


def check_inside(place, pairs, size):
    """Refuse points outside a photo of size (H, W) px: Refusal."""
    if (pairs.pts >= torch.tensor(size)).any():
        refuse(f"{place / pairs.name}", f"a point {pairs.pts.amax((0, 1)).tolist()}",
               f"row < {size[0]}, col < {size[1]}", "fetch image and annotations again")


def ask_both(judge, rgb, pts, name):
    """Probability that red is closer, as drawn and with the colours exchanged: two (P,) float64 numpy, NaN: unknown.

    rgb  (3, S, S);  pts  (P, 2, 2) in its pixels;  name  path of the photo
    The one place that exchanges the colours here: a judge that asks in both orders by itself needs one question
    """
    rgb = rgb[None].to(device_of(judge))
    depth = NAMES.index("depth")
    return [judge.ask(rgb, p[None].to(rgb.device), [name], ("depth",))[0, :, depth].double().cpu().numpy()
            for p in (pts, pts.flip(1))]


def judge_pairs(judge, place, images):
    """Answers of a judge to all pairs: dict of arrays over pairs (see `pair_figures`)."""
    rows = []
    for pairs in tqdm(images, desc="da2k judge", unit="photo", disable=len(images) < 8):
        rgb = read_rgb(place / pairs.name)
        size = tuple(rgb.shape[1:])
        check_inside(place, pairs, size)
        pts = square_points(pairs.pts, size, judge.size, judge.grid)
        apart = (pts[:, 0] != pts[:, 1]).any(-1).numpy()
        one, two = np.full((2, len(pts)), 0.5)                                  # in one cell: neither
        if apart.any():
            square = resize(rgb, judge.size, judge.size)
            one[apart], two[apart] = ask_both(judge, square, pts[torch.from_numpy(apart)], str(place / pairs.name))
        sign = np.where(pairs.first, 1, -1)
        rows.append(dict(judge=sign * (average_orders(one, two, False) - 0.5), drawn=sign * (one - 0.5),
                         exchanged=-sign * (two - 0.5), one_cell=~apart))
    return {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}


def predictor_pairs(bench, source, place, images):
    """Margins by which the right point is closer in a source's depth maps: (pairs,) float64."""
    files = formats.Files(place)
    out = []
    for pairs in tqdm(images, desc="da2k maps", unit="photo", disable=len(images) < 8):
        sample = source.read(bench, files, dict(name=pairs.name, rgb=pairs.name))
        check_inside(place, pairs, sample["size"])
        depth = torch.from_numpy(np.ascontiguousarray(source.predict(bench, sample)[0]["depth"])).double()
        if tuple(depth.shape) != tuple(sample["size"]) or not depth.isfinite().all():
            refuse(f"{source.label}: {pairs.name}", f"a depth map {tuple(depth.shape)}, or values that are not finite",
                   f"finite values, {tuple(sample['size'])}", "save it again")
        out.append(np.where(pairs.first, 1, -1) * margin(depth[None], pairs.pts, "depth").numpy())
    return np.concatenate(out)


def image_means(values, photo):
    """Mean and number of the known values of each photo that has some: values (n,), photo (n,) -> two (photos,)."""
    known = ~np.isnan(values)
    n = np.bincount(photo[known], minlength=int(photo.max()) + 1)
    total = np.bincount(photo[known], values[known], len(n))
    return total[n > 0] / n[n > 0], n[n > 0]


def is_right(gap):
    """1 where the right point wins, 0 where not or at a tie, NaN where nothing is known: (n,) -> (n,) float64."""
    return np.where(np.isnan(gap), np.nan, gap > 0)


def accuracy_of(gap, photo):
    """Accuracy over pairs with its interval over images: dict accuracy, low, high, n (pairs known)."""
    values, weights = image_means(is_right(gap), photo)
    if not len(values):
        return dict(accuracy=math.nan, low=math.nan, high=math.nan, n=0)
    mean, low, high = bootstrap_interval(values, weights=weights) if len(values) > 1 else (values[0], *[math.nan] * 2)
    return dict(accuracy=float(mean), low=low, high=high, n=int(weights.sum()))


def pair_figures(answers, photo, lower):
    """Figures of a judge on pairs: dict.

    answers  judge, drawn, exchanged (n,): by how much the right point wins, mean and each order; one_cell (n,) bool
    photo    (n,) number of each pair's image;  lower  (n,) the same of the rule "the lower point is closer"
    """
    gap = answers["judge"]
    asked = np.where(answers["one_cell"], np.nan, gap)
    return accuracy_of(gap, photo) | dict(
        images=len(np.unique(photo)), pairs=len(gap), heuristic=accuracy_of(lower, photo)["accuracy"],
        **{k: accuracy_of(answers[k], photo)["accuracy"] for k in ("drawn", "exchanged")},
        asked=accuracy_of(asked, photo)["accuracy"], one_cell=int(answers["one_cell"].sum()),
        undecided=int((asked == 0).sum()), unknown=int(np.isnan(gap).sum()))


def compare_figures(gap, base, photo, lower):
    """Figures of a predictor on pairs, and of the one it is compared with (base: its gaps, or None): dict."""
    row = accuracy_of(gap, photo) | dict(images=len(np.unique(photo)), pairs=len(gap), ties=int((gap == 0).sum()),
                                         heuristic=accuracy_of(lower, photo)["accuracy"])
    if base is None:
        return row
    (new, weights), (old, _) = (image_means(is_right(x), photo) for x in (gap, base))
    change, low, high = bootstrap_interval(old, new, weights=weights) if len(new) > 1 else (new[0] - old[0],
                                                                                             *[math.nan] * 2)
    return row | dict(base=accuracy_of(base, photo)["accuracy"], change=float(change), change_low=low,
                      change_high=high, verdict=verdict(low, high, 1))


def by_scene(images, figures):
    """Figures of every scene type and of all pairs: dict. figures: of the places (n,) bool of some pairs -> dict."""
    scenes = np.array([p.scene for p in images for _ in p.first])
    names = sorted(set(scenes))
    return {s: figures(scenes == s) for s in names} | {ALL: figures(np.ones(len(scenes), bool))}


def _mean_of_scenes(table, key="accuracy"):
    return float(np.mean([row[key] for s, row in table.items() if s != ALL]))


def print_judge(table, head):
    """The table of a judge."""
    lines = [(s, f"{r['images']} images", str(r["pairs"]), f"{r['accuracy']:.3f}", format_interval(r["low"], r["high"]),
              *(f"{r[k]:.3f}" for k in ("heuristic", "drawn", "exchanged", "asked")),
              *(str(r[k]) for k in ("one_cell", "undecided", "unknown"))) for s, r in table.items()]
    print_table(f"{head}: both orders of the colours averaged", lines,
                ("scene type", "", "pairs", "judge", "95 %", "lower point", "as drawn", "exchanged", "asked only",
                 "in one cell", "undecided", "unknown"))
    print(f"  mean over scene types: {_mean_of_scenes(table):.3f}")


def print_predictor(table, head):
    """The table of a predictor, beside the one it is compared with."""
    lines = []
    for s, r in table.items():
        cells = [f"{r['accuracy']:.3f}", format_interval(r["low"], r["high"])]
        if "base" in r:
            change = format_interval(r["change_low"], r["change_high"])
            cells = [f"{r['base']:.3f}", cells[0], f"{r['change']:+.3f}", change, r["verdict"]]
        lines.append((s, f"{r['images']} images", str(r["pairs"]), *cells, f"{r['heuristic']:.3f}", str(r["ties"])))
    names = ("base", "X", "change", "95 %", "") if "base" in table[ALL] else ("predictor", "95 %")
    print_table(head, lines, ("scene type", "", "pairs", *names, "lower point", "ties"))
    print(f"  mean over scene types: {_mean_of_scenes(table):.3f}")


def chosen_parts(args):
    """What the command line asks for -> SPEC of a judge ("": none), paths of a predictor and of its base ("": none)."""
    named = bool(args.checkpoint or args.pred_dir or args.compare)
    judge = "" if args.judge == "none" else args.judge
    if not args.judge and not named and (Path(args.out) / "judge").is_dir():
        judge = Path(args.out) / "judge"
    return judge, *(compared_paths(args) if named or args.judge in ("", "none") else ("", ""))


def report_predictor(args, place, images, photo, lower, paths):
    """Print the table of a predictor; returns its numbers. paths: of it and of its base ("": none).

    raises  Refusal, ValueError: maps that do not fit
    """
    bench = replace(DA2K, align=args.align)
    sources = [(predictions.saved_source if args.pred_dir else predictions.find_source)(paths[0], args)]
    sources += [predictions.find_source(paths[1], args)] if paths[1] else []
    items = [dict(name=p.name, rgb=p.name) for p in images]
    reason = next((why for why in (s.lacks(bench, items) for s in sources) if why), "")
    if reason:
        raise ValueError(reason)
    gap, base = ([predictor_pairs(bench, s, place, images) for s in sources] + [None])[:2]
    table = by_scene(images, lambda on: compare_figures(gap[on], None if base is None else base[on], photo[on],
                                                        lower[on]))
    label, base_label = ([s.label for s in sources] + [None])[:2]
    print_predictor(table, f"da2k, predictor {label}" + (f"; base {base_label}" if base_label else ""))
    return dict(predictions=label, base=base_label, scenes=table, mean_of_scenes=_mean_of_scenes(table))


def report_answers(args, place, images, photo, lower, spec):
    """Print the table of a judge, a SPEC; returns its numbers."""
    judge = load_judge(spec, pick_device("auto", "eval.py"), text=args.text)
    answers = judge_pairs(judge, place, images)
    table = by_scene(images, lambda on: pair_figures({k: v[on] for k, v in answers.items()}, photo[on], lower[on]))
    print_judge(table, f"da2k, judge {spec}, {judge.size} px, cells of {judge.grid} px")
    return dict(judge=str(spec), size=judge.size, grid=judge.grid, scenes=table, mean_of_scenes=_mean_of_scenes(table))


def report_pairs(args):
    """Print the tables of --dataset da2k; returns every printed number as a dict.

    args    of the command line: data, limit, seed, judge, checkpoint, pred_dir, compare, out, check_data, and what
            predictions.py reads
    raises  MissingData; Refusal: annotations, images or maps that do not fit
    """
    place, images, n_expected = open_pairs(args.data, args.limit, args.seed)
    n = len(images)
    n_pairs = sum(len(p.first) for p in images)
    result = dict(dataset="da2k", n=n, expected=n_expected, pairs=n_pairs, partial=n != n_expected, seed=args.seed,
                  protocol=DA2K.protocol)
    if args.check_data:
        for pairs in tqdm(images, desc="decode", disable=n < 3):
            check_inside(place, pairs, read_rgb(place / pairs.name).shape[1:])
        print(f"da2k: {n} of {n_expected} images with {n_pairs} pairs decoded, none is bad")
        return result
    print(f"\nda2k: {n} images evaluated of {n_expected}, {n_pairs} pairs, seed {args.seed}"
          + f"   *** PARTIAL: {n} of {n_expected}, not the benchmark's number ***" * result["partial"]
          + f"\n  protocol: {DA2K.protocol}")
    photo = np.repeat(np.arange(n), [len(p.first) for p in images])
    sign = np.concatenate([np.where(p.first, 1, -1) for p in images])
    lower = sign * HEURISTICS["depth"][1](None, torch.cat([p.pts for p in images])).numpy()
    spec, *paths = chosen_parts(args)
    if paths[0]:
        result["predictor"] = report_predictor(args, place, images, photo, lower, paths)
    if spec:
        result["judge"] = report_answers(args, place, images, photo, lower, spec)
    return result
