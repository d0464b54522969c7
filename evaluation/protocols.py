"""How one prediction of one benchmark image is scored, averaged and shown; the paper's numbers to compare with.

pred     list, one dict per photo of the sample: depth (H, W); normal (3, H, W); albedo, irradiance, residual
         (3, H, W) *linear*. numpy, the sample's size
values   dict metric -> float of one image; None: this image has no such number (IIW without a usable comparison)
differs: Marigold's code sums in float32, skips missing predictions and lets a NaN into the mean. Here sums are float64,
         and whatever is missing, empty or non-finite is an error. No LPIPS
"""
import itertools

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.maps import assumed_camera
from data.pictures import colour_map
from evaluation import benchmarks, metrics, surface
from evaluation.alignment import fit_depth
from evaluation.benchmark_table import PLAIN
from evaluation.colour import ADOBE_TO_SRGB
from relations import srgb_encode

# task: {metric: (text, sign of the good direction, factor between the mean and the printed number)}
MEASURES = {
    "depth": {"abs_rel": ("AbsRel", -1, 1), "delta1": ("delta1, max ratio < 1.25", 1, 1),
              "delta2": ("delta2, < 1.25^2", 1, 1), "delta3": ("delta3, < 1.25^3", 1, 1), "rmse": ("RMSE, m", -1, 1),
              "log10": ("log10", -1, 1), "silog": ("SILog x100", -1, 1)},
    "normal": {"mean": ("mean angle, degrees, mean over images (Marigold)", -1, 1),
               "pooled": ("mean angle, degrees, all pixels pooled (DSINE)", -1, 1),
               "within_11.25": ("pixels under 11.25 degrees, %", 1, 100), "within_22.5": ("under 22.5, %", 1, 100),
               "within_30": ("under 30, %", 1, 100), "median": ("median angle per image, degrees", -1, 1)},
    "whdr": {"whdr10_linear": ("WHDR 10 %, linear (official), %", -1, 100),
             "whdr10_srgb": ("WHDR 10 %, sRGB-encoded, %", -1, 100),
             "whdr20_linear": ("WHDR 20 %, linear, %", -1, 100),
             "whdr20_srgb": ("WHDR 20 %, sRGB-encoded, %", -1, 100)},
    "maw": {"intensity": ("albedo intensity x100", -1, 100), "chromaticity": ("albedo chromaticity, CIEDE2000", -1, 1)},
    "lmse": {"lmse": ("LMSE, half shading, half reflectance", -1, 1), "lmse_albedo": ("LMSE of reflectance", -1, 1),
             "lmse_shading": ("LMSE of shading", -1, 1)},
    "lights": {"consistency": ("1 - cos^2 between lightings, albedo (ours)", -1, 1),
               "photos": ("the same of the photos themselves", 0, 1)},
    "iid": {f"{m}_{k}": (f"{k.upper()} of {m}{', dB' if k == 'psnr' else ''}", 1, 1)
            for m in ("albedo", "shading", "residual") for k in ("psnr", "ssim")},
    "surface": {"rmse": ("RMSE, derived against predicted normals (ours)", -1, 1),
                "ssim": ("SSIM of the same (ours)", 1, 1),
                "valid": ("pixels with a derived normal, border apart, %", 0, 100)},
}
PAPER = {  # ReasonX (arXiv 2512.04222), tables and project page: metric -> [(base, number of base, number of base-X)]
    ("iiw", "whdr"): {k: [("PRISM", a, b), ("Marigold", c, d)]               # the paper does not name the colour space
                      for s in ("linear", "srgb")
                      for k, a, b, c, d in ((f"whdr10_{s}", 17.2, 12.9, 16.7, 15.2),
                                            (f"whdr20_{s}", 15.9, 11.9, 14.8, 14.0))},
    ("maw", "maw"): {"intensity": [("PRISM", .71, .43), ("Marigold", .49, .41)]},
    ("eth3d", "depth"): {"abs_rel": [("PRISM", .142, .077)], "delta1": [("PRISM", .836, .950)]},
    ("nyuv2", "depth"): {"abs_rel": [("PRISM", .061, .053)], "delta1": [("PRISM", .922, .958)]},
    ("nyuv2", "normal"): {"mean": [("PRISM", 16.1, 15.7)]},
    ("diode", "normal"): {"mean": [("PRISM", 14.6, 14.5)]},
    ("photos", "surface"): {"rmse": [("PRISM, ETH3D", .146, .099), ("PRISM, COCO", .202, .137)]},
}
THRESHOLDS = (11.25, 22.5, 30)        # degrees, strict
LARGEST = 1e30                    # largest predicted value: the square of a larger one overflows float32
MIN_VALID = 0.95                  # share of pixels with a derived normal; below it a warning is printed


def encode_clipped(linear):
    """Linear -> sRGB-encoded, both clipped to [0, 1]: float64 numpy."""
    return srgb_encode(torch.from_numpy(np.clip(np.asarray(linear, np.float64), 0, 1))).numpy()


def score_depth(bench, pred, sample):
    """Depth errors, how it was aligned, and the fitted scale (negative: the other way round; 0: a constant)."""
    fitted, scale = fit_depth(bench, pred[0]["depth"], sample)
    if scale < 0 and np.ptp(fitted[sample["mask"]]) <= 1e-5 * np.abs(fitted).max():
        scale = 0.0
    return dict(metrics.depth_metrics(fitted, sample["depth"], sample["mask"]), scale=scale, align=bench.align)


def score_normal(bench, pred, sample):
    """Angular errors, the number of pixels behind them, and the mean angle of each of the 8 sign choices."""
    angle = metrics.normal_error(pred[0]["normal"], sample["normal"])
    angle = angle[np.isfinite(angle)]
    axes = surface.axis_errors(pred[0]["normal"], sample["normal"]) or {}
    return dict(mean=float(angle.mean()), pixels=len(angle), median=float(np.median(angle)),
                **{f"within_{a:g}": float((angle < a).mean()) for a in THRESHOLDS},
                axes=[axes.get(a) for a in surface.AXES])


def score_whdr(bench, pred, sample):
    """WHDR at both thresholds in both colour spaces; None where no comparison counts."""
    linear = pred[0]["albedo"].transpose(1, 2, 0)
    spaces = {"linear": linear, "srgb": encode_clipped(linear)}
    return {f"whdr{100 * d:.0f}_{space}": metrics.whdr(image, sample["judgements"], d)
            for d in (0.1, 0.2) for space, image in spaces.items()}


def score_maw(bench, pred, sample):
    """Intensity and chromaticity errors against measured albedo."""
    image = np.round(encode_clipped(pred[0]["albedo"]) * 255).astype(np.uint8).transpose(1, 2, 0)
    return dict(intensity=metrics.maw_intensity(image, sample["labels"], sample["colors"]),
                chromaticity=metrics.maw_chromaticity(image, sample["labels"], sample["colors"]))


def score_lmse(bench, pred, sample):
    """LMSE of gray reflectance and shading."""
    out = {}
    for m, name in (("albedo", "albedo"), ("shading", "irradiance")):
        p, g = (65535 / 255 * x.mean(0) for x in (pred[0][name], sample[m]))    # official unit: 16 bits over 255
        out[f"lmse_{m}"] = metrics.lmse(p, g, sample["mask"], *benchmarks.LMSE_WINDOWS)
    return dict(lmse=(out["lmse_albedo"] + out["lmse_shading"]) / 2, **out)


def disagreement(maps, mask):
    """Mean over pairs of maps of 1 - cos^2 over the mask: 0 = equal up to one scale. [(3, H, W)] -> float."""
    flat = [np.asarray(x, np.float64)[:, mask].ravel() for x in maps]
    norms = [x @ x for x in flat]
    return float(np.mean([1 - (a @ b) ** 2 / (p * q) if p * q > 0 else 1.0
                          for (a, p), (b, q) in itertools.combinations(zip(flat, norms, strict=True), 2)]))


def score_lights(bench, pred, sample):
    """How much the albedo of one object changes with the lighting, and how much its photos do."""
    return dict(consistency=disagreement([p["albedo"] for p in pred], sample["mask"]),
                photos=disagreement(sample["lights"], sample["mask"]))


def iid_pair(bench, m, pred, sample):
    """Prediction and truth of one map in the space they are compared in -> two (3, H, W), mask of their shape."""
    p, g = (np.asarray(x, np.float64) for x in (pred, sample[m]))
    if bench.dataset == "interiorverse":
        return encode_clipped(p), g ** (1 / 2.2), np.ones(g.shape, bool)
    ok = sample[f"{m}_mask"]
    if m == "albedo":
        return p.clip(0) ** (1 / 2.2), g ** (1 / 2.2), ok
    pp = p[ok] @ p[ok]
    scale = p[ok] @ g[ok] / pp if pp > 0 else 0.0
    bright = float(np.quantile((0.3 * g[0] + 0.59 * g[1] + 0.11 * g[2])[ok[0]], 0.9))
    stretch = 0.8 / bright if bright >= 1e-4 else 0.0
    return (stretch * scale * p).clip(0, 1), (stretch * g).clip(0, 1), ok


def score_iid(bench, pred, sample):
    """PSNR on valid elements and SSIM with invalid elements at 0, of every map that truth and prediction share.

    differs: a black truth of a map whose scale is fitted gives no number; the official code gives an infinite PSNR
    """
    out = {}
    for m, name in (("albedo", "albedo"), ("shading", "irradiance"), ("residual", "residual")):
        if m in sample and name in pred[0]:
            p, g, ok = iid_pair(bench, m, pred[0][name], sample)
            fitted = bench.dataset == "hypersim" and m != "albedo"
            if fitted and not g[ok].any():                                      # the scale 0 is right, unearned
                out[f"{m}_psnr"] = out[f"{m}_ssim"] = None
                continue
            out[f"{m}_psnr"] = metrics.psnr(p, g, ok)
            out[f"{m}_ssim"] = metrics.ssim(np.where(ok, p, 0), np.where(ok, g, 0))
    return out


def score_surface(bench, pred, sample):
    """Predicted normals against those of the predicted depth, seen by maps.assumed_camera."""
    normal = np.asarray(pred[0]["normal"], np.float64)
    z, *camera = assumed_camera(np.asarray(pred[0]["depth"], np.float64))
    derived = surface.valid_normals(z, *camera)
    ok = derived.any(0)
    a, b = ((x + 1) / 2 for x in (derived, metrics.unit_vectors(normal)))
    return dict(rmse=surface.depth_normal_consistency(z, normal, *camera), ssim=metrics.ssim(a, b, ok),
                valid=float(ok[1:-1, 1:-1].mean()))


_SCORES = {"depth": score_depth, "normal": score_normal, "whdr": score_whdr, "maw": score_maw, "lmse": score_lmse,
           "lights": score_lights, "iid": score_iid, "surface": score_surface}


def score_prediction(bench, pred, sample):
    """Every number of one image (`values` above). raises ValueError, naming the image."""
    for one in pred:
        for m, x in one.items():
            if x.shape[-2:] != tuple(sample["size"]) and bench.task != "maw":
                h, w = sample["size"]
                do = (f"crop it: the last {h} rows, the centre {w} columns" if bench.dataset == "kitti" else
                      "resize it to the ground truth")
                raise ValueError(f"{sample['name']}: got a predicted {m} of {x.shape[-1]} x {x.shape[-2]} pixels, want "
                                 f"{w} x {h}; {do}")
            if not max(float(x.max()), -float(x.min())) <= LARGEST:             # true for a NaN too
                bad = np.count_nonzero(~(np.abs(x.astype(np.float64)) <= LARGEST))
                raise ValueError(f"{sample['name']}: got {bad} values in the predicted {m} that are non-finite or "
                                 f"beyond {LARGEST:g}, want finite numbers; fix the predictor")
    try:
        return _SCORES[bench.task](bench, pred, sample)
    except ValueError as error:
        raise ValueError(f"{sample['name']}: {error}") from None


def whole_rows(bench, rows):
    """Rows up to the first one that belongs to another benchmark or lacks a value that another row has."""
    known = MEASURES[bench.task].keys() | {"name", "scale", "align", "pixels", "axes"}
    wanted = {"depth": known - {"pixels", "axes"}, "normal": known - {"pooled", "scale", "align"},
              "iid": {"name", "albedo_psnr", "albedo_ssim"}}.get(bench.task, MEASURES[bench.task].keys() | {"name"})
    wanted = wanted.union(*(known & row.keys() for row in rows if isinstance(row, dict)))

    def is_whole(row):
        return isinstance(row, dict) and wanted <= row.keys() and isinstance(row["name"], str)

    return list(itertools.takewhile(is_whole, rows))


def metric_values(bench, rows):
    """Values per image of every metric that some image has: dict metric -> (n,) float, NaN where an image has none."""
    rows = [dict(r, pooled=r["mean"]) if "pixels" in r else r for r in rows]
    return {k: np.array([np.nan if r.get(k) is None else r[k] for r in rows], float)
            for k in MEASURES[bench.task] if any(r.get(k) is not None for r in rows)}


def paper_numbers(bench, name):
    """ReasonX's numbers of a metric, [(base, number of base, of base-X)]; none beside another alignment than theirs."""
    return PAPER.get((bench.dataset, bench.task), {}).get(name, []) if bench.align == PLAIN else []


def image_weights(name, rows):
    """Weight of each image in the mean of a metric: its pixels in the pooled one, else 1."""
    return np.array([r["pixels"] if name == "pooled" else 1.0 for r in rows])


def find_problems(bench, rows, names):
    """Warnings that the means do not show: negative fitted scales, missing normals, a sign choice that fits better."""
    out = []
    negative = [n for n, r in zip(names, rows, strict=True) if r.get("scale", 1) < 0]
    if negative:
        other = "depth, not disparity" if bench.align == "disparity" else "inverse depth"
        out.append(f"{len(negative)} of {len(rows)} fitted scales are negative: there the prediction looks like "
                   f"{other} (first: {negative[0]})")
    holes = [(n, r["valid"]) for n, r in zip(names, rows, strict=True) if r.get("valid", 1) < MIN_VALID]
    if holes:
        out.append(f"{len(holes)} of {len(rows)} depth maps give normals on less than {100 * MIN_VALID:.0f} % of their "
                   f"pixels, only these count (first: {holes[0][0]}, {100 * holes[0][1]:.1f} %); want 1 + 2 depth > 0")
    wrong = surface.wrong_axes(mean_axes(rows), "ground truth")
    return [*out, wrong] if wrong else out


def mean_axes(rows):
    """Mean over images of the angle of each sign choice, or None."""
    known = [r["axes"] for r in rows if r.get("axes") and None not in r["axes"]]
    return dict(zip(surface.AXES, np.mean(known, 0).tolist(), strict=True)) if known else None


def _error_picture(error, top):
    """(H, W) error, NaN where there is no truth -> (3, H, W') picture: 0 is bright, `top` or more dark, no truth gray.

    The colour bar at its right runs from 0 (bottom) to `top`.
    """
    H, W = error.shape
    known = np.isfinite(error)
    error = np.where(known, error, 0)
    bar = np.repeat(np.linspace(1, 0, H)[:, None], max(4, W // 24), 1)          # top of the bar = largest error
    both = np.concatenate([np.clip(error / max(top, 1e-12), 0, 1), np.zeros((H, 2)), bar], 1)
    colour = colour_map(both)
    colour[:, :, W:W + 2] = 1
    colour[:, :, :W][:, ~known] = 0.5
    return colour


def _depth_picture(depth, mask, low, high):
    t = np.where(mask, np.clip((depth - low) / max(high - low, 1e-6), 0, 1), 0)
    return colour_map(t) * mask


def _small(x, side=384):
    """Every k-th pixel of (..., H, W), so that the longer side is at most `side`."""
    k = -(-max(x.shape[-2:]) // side)
    return x[..., ::k, ::k]


def _comparisons(sample, albedo):
    """IIW's comparisons on the photo: green where the albedo agrees at 10 % (linear), red where it does not."""
    photo = _small(np.asarray(sample["photos"][0]))
    image = Image.fromarray((photo * 255).astype(np.uint8).transpose(1, 2, 0).copy())
    W, H = image.size
    draw = ImageDraw.Draw(image)
    points = {p["id"]: (p["x"] * W, p["y"] * H) for p in sample["judgements"]["intrinsic_points"]}
    for c in sample["judgements"]["intrinsic_comparisons"]:
        wrong = metrics.whdr(albedo.transpose(1, 2, 0), dict(sample["judgements"], intrinsic_comparisons=[c]), 0.1)
        if wrong is not None:
            draw.line([points[c["point1"]], points[c["point2"]]], fill="red" if wrong else "lime")
    return np.asarray(image).transpose(2, 0, 1) / 255


def result_pictures(bench, pred, sample):
    """Photo, truth, prediction, error map with its colour bar: [(label, (3, h, w) in [0, 1])]."""
    photo = ("photo", _small(np.asarray(sample["photos"][0])))
    one = pred[0]
    if bench.task == "depth":
        depth, mask = (_small(sample[k]) for k in ("depth", "mask"))
        fitted = _small(fit_depth(bench, one["depth"], sample)[0])
        low, high = np.quantile(depth[mask], [0.02, 0.98])
        error = np.where(mask, np.abs(fitted - depth) / np.where(mask, depth, 1), np.nan)
        return [photo, (f"truth {low:.2f}..{high:.2f} m", _depth_picture(depth, mask, low, high)),
                ("prediction, aligned", _depth_picture(fitted, np.ones_like(mask), low, high)),
                ("|p-g|/g, bar 0..0.5", _error_picture(error, 0.5))]
    if bench.task == "normal":
        truth, guess = (_small(x["normal"]) for x in (sample, one))
        angle = metrics.normal_error(guess, truth)
        unit = metrics.unit_vectors(guess)
        return [photo, ("truth", (truth + 1) / 2 * truth.any(0)), ("prediction", (unit + 1) / 2),
                ("angle, bar 0..60 deg", _error_picture(angle, 60))]
    if bench.task in ("lmse", "iid"):
        if bench.task == "iid":
            p, g, _ = iid_pair(bench, "albedo", one["albedo"], sample)
        else:                                                                   # each over its own 99 % quantile
            ok = sample["mask"]
            p, g = (x / max(float(np.quantile(x[:, ok], 0.99)), 1e-6) * ok for x in (one["albedo"], sample["albedo"]))
        p, g = (_small(x) for x in (p, g))
        error = _error_picture(np.abs(p - g).mean(0), 0.5)
        return [photo, ("true albedo", g), ("predicted albedo", p), ("|p-g|, bar 0..0.5", error)]
    if bench.task == "maw":
        labels = _small(sample["labels"])
        colors = np.asarray(sample["colors"], np.float64)
        truth = np.zeros((3, *labels.shape))
        for k, c in zip(np.unique(labels[labels != 0]), colors, strict=False):
            truth[:, labels == k] = encode_clipped(ADOBE_TO_SRGB @ c)[:, None]
        return [photo, ("measured albedo", truth), ("predicted albedo", _small(encode_clipped(one["albedo"])))]
    if bench.task == "whdr":
        return [photo, ("judgements: green agrees, red not", _comparisons(sample, one["albedo"])),
                ("predicted albedo", _small(encode_clipped(one["albedo"])))]
    if bench.task == "surface":
        derived = surface.valid_normals(*assumed_camera(np.asarray(one["depth"], np.float64)))
        angle = metrics.normal_error(one["normal"], derived)
        return [photo, ("normals of depth", _small((derived + 1) / 2)), ("normals", _small((one["normal"] + 1) / 2)),
                ("angle, bar 0..60 deg", _error_picture(_small(angle), 60))]
    return [photo, *[(f"albedo {i + 1}", _small(encode_clipped(p["albedo"]))) for i, p in enumerate(pred[:3])]]
