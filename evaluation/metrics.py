"""Scores of predicted maps: numpy in, float (or a map) out. No model, no file, no implicit colour conversion.

Protocols: depth and normals after Marigold (and DSINE); WHDR after Bell et al. 2014 (IIW sec. 3.5); MAW after
Wu et al. 2023; LMSE after Grosse et al. 2009. Ours: si_mse, whdr_from_gt, high_frequency_energy.

Conventions owned here: sums run in float64; mask True (non-zero) = valid; no value of a prediction may be NaN or
infinite, and none of the ground truth inside the mask. Each refusal is a ValueError that says got, want, do.
"""
import numpy as np

from evaluation.colour import ADOBE_TO_SRGB, ciede2000, linear_to_lab

MAW_SIZE = (240, 320)      # rows, columns on which MAW compares
MIN_DEPTH = 1e-6           # floor of a prediction before logarithms and ratios (Marigold)
MIN_LIGHTNESS = 1e-10      # floor of a reflectance before ratios (IIW)
BLOCK = 1 << 17            # elements that depth metrics read at a time: their float64 copies fit in the cache
RANK = 1e-10               # a predicted depth whose spread relative to its size is smaller counts as constant


def reject(measure, got, want, do):
    """Raise the error of a measure about its input: one line that says got, want, do."""
    raise ValueError(f"{measure} failed: got {got}, want {want}; {do}.")


def check_finite(measure, pred):
    """A prediction as float64. raises ValueError, naming the measure, when a value is not finite."""
    pred = np.asarray(pred)
    if not np.isfinite(pred).all():
        reject(measure, f"{np.count_nonzero(~np.isfinite(pred))} non-finite values in the prediction",
               "finite numbers", "fix the predictor")
    return pred.astype(np.float64)


def check_shapes(measure, pred, gt):
    """Prediction and truth as float64. raises ValueError when the shapes differ or the prediction is not finite."""
    pred = check_finite(measure, pred)
    gt = np.asarray(gt).astype(np.float64)
    if pred.shape != gt.shape:
        reject(measure, f"a prediction of shape {pred.shape}", f"the ground truth's {gt.shape}",
               "resize the prediction first")
    return pred, gt


def _valid(measure, pred, gt, mask):
    """Check and select: maps (H, W), (H, W, C) or (C, H, W), mask (H, W) or their shape -> two (n, ...)."""
    pred, gt = check_shapes(measure, pred, gt)
    mask = np.asarray(mask).astype(bool)
    if mask.shape not in (pred.shape, pred.shape[:2]) and mask.shape == pred.shape[-2:]:
        pred, gt = (np.moveaxis(x, 0, -1) for x in (pred, gt))
    if mask.shape not in (pred.shape, pred.shape[:2]):
        reject(measure, f"a mask of shape {mask.shape}", f"one that fits {pred.shape}", "load it again")
    if not mask.any():
        reject(measure, "an empty mask", "at least one valid pixel", "leave this image out and count it")
    pred, gt = (x[mask] for x in (pred, gt))
    if not np.isfinite(gt).all():
        reject(measure, "non-finite ground truth in the mask", "finite numbers", "mask those pixels out")
    return pred, gt


def is_constant(gt):
    """Whether valid values (n,) or colours (n, C) of a true map are all alike: a fit then errs by nothing, unearned."""
    return len(gt) > 0 and not np.ptp(gt, axis=0).any()


def _rows(measure, pred, gt, mask):
    """Yield blocks of whole rows, their valid elements as float64, so that a large map is never copied as a whole."""
    pred, gt, mask = (np.asarray(x) for x in (pred, gt, mask))
    if pred.shape != gt.shape or pred.shape != mask.shape:                      # _valid refuses, or knows the shapes
        yield _valid(measure, pred, gt, mask)
        return
    height = max(1, BLOCK // max(1, pred[0].size))
    found = False
    for i in range(0, len(pred), height):
        p, g, ok = (x[i:i + height] for x in (pred, gt, mask))
        ok = ok.astype(bool)
        if not np.isfinite(p).all():
            check_finite(measure, pred)                                         # raises, with the number of values
        if ok.any():
            found = True
            p, g = (x[ok].astype(np.float64) for x in (p, g))
            if not np.isfinite(g).all():
                reject(measure, "non-finite ground truth in the mask", "finite numbers", "mask those pixels out")
            yield p, g
    if not found:
        reject(measure, "an empty mask", "at least one valid pixel", "leave this image out and count it")


def align_depth(pred, gt, mask, max_res=None):
    """Least-squares scale and shift from predicted to true depth (Marigold, util/alignment).

    pred, gt   (H, W) depth, any unit; mask (H, W)
    max_res    as in Marigold's code for ETH3D: when max(H, W) > max_res, the *columns* alone are subsampled (nearest,
               by max_res / max(H, W)) before the fit, the rows are not
    returns    (scale, shift): scale * pred + shift ~ gt. A constant prediction c gets the minimum-norm solution
               (c, 1) mean(g) / (c^2 + 1). A negative scale means inverse depth: the caller must report it
    """
    pred, gt, mask = (np.asarray(x) for x in (pred, gt, mask))
    if pred.ndim != 2:
        reject("metrics.align_depth", f"a prediction of shape {pred.shape}", "(H, W)", "drop the channel axis")
    if max_res is not None and max(pred.shape) > max_res and pred.shape == gt.shape == mask.shape:
        factor = max_res / max(pred.shape)
        width = pred.shape[1]
        cols = (np.arange(int(width * factor)) * np.float32(1 / factor)).astype(int).clip(0, width - 1)
        if not np.isfinite(pred).all():
            check_finite("metrics.align_depth", pred)                           # raises, with the number of values
        pred, gt, mask = (x[:, cols] for x in (pred, gt, mask))
    n = 0
    mp = mg = pp = pg = 0.0                                                     # means and centred sums so far
    for p, g in _rows("metrics.align_depth", pred, gt, mask):
        k = len(p)
        bp, bg = (x.mean() for x in (p, g))                                     # means of the block
        dp = bp - mp
        dg = bg - mg
        p = p - bp
        g = g - bg
        pp = pp + p @ p + dp * dp * n * k / (n + k)
        pg = pg + p @ g + dp * dg * n * k / (n + k)
        mp += dp * k / (n + k)
        mg += dg * k / (n + k)
        n += k
    if pp <= n * (RANK * (mp * mp + 1)) ** 2:                                   # constant: minimum norm
        return float(mp * mg / (mp * mp + 1)), float(mg / (mp * mp + 1))
    return float(pg / pp), float(mg - pg / pp * mp)


def depth_metrics(pred, gt, mask):
    """Depth errors of a prediction that is already aligned and clipped to the data set's range (Marigold).

    pred, gt   (H, W) in one unit, gt > 0 where the mask is True; pred is floored at 1e-6 here
    returns    dict of floats: abs_rel, delta1..3 (shares, strict <), rmse (unit of gt), log10, silog (x100)
    """
    n = 0
    total = np.zeros(8)                           # abs_rel, delta1..3, squared error, |log|, log, log^2
    for p, g in _rows("metrics.depth_metrics", pred, gt, mask):
        if (g <= 0).any():
            reject("metrics.depth_metrics", f"true depth {g.min():g} in the mask", "depth > 0", "mask it out")
        p = np.maximum(p, MIN_DEPTH)
        error = p - g
        ratio = p / g
        log = np.log(ratio)
        ratio = np.maximum(ratio, g / p)
        total += [(np.abs(error) / g).sum(), *((ratio < 1.25 ** k).sum() for k in (1, 2, 3)),
                  error @ error, np.abs(log).sum(), log.sum(), log @ log]
        n += len(p)
    abs_rel, delta1, delta2, delta3, square, log_abs, log, log_square = (float(x) for x in total / n)
    return dict(abs_rel=abs_rel, delta1=delta1, delta2=delta2, delta3=delta3, rmse=square ** 0.5,
                log10=log_abs / float(np.log(10)), silog=100 * max(0.0, log_square - log * log) ** 0.5)


def unit_vectors(n):
    """Normals (3, H, W) at length 1; zero vectors stay zero."""
    length = np.linalg.norm(n, axis=0)
    return n / np.where(length > 0, length, 1)


def normal_error(pred, gt):
    """Angle between normals (Marigold, DSINE); both are renormalised.

    pred, gt   (3, H, W) in one frame; a zero vector in gt = invalid
    returns    (H, W) degrees in [0, 180], NaN where gt is invalid; a zero predicted vector counts as 90
    """
    pred, gt = check_shapes("metrics.normal_error", pred, gt)
    if pred.ndim != 3 or pred.shape[0] != 3:
        reject("metrics.normal_error", f"shape {pred.shape}", "(3, H, W)", "move the channel axis to the front")
    if not np.isfinite(gt).all():
        reject("metrics.normal_error", "non-finite ground truth", "zero vectors at invalid pixels", "fix the reader")
    valid = gt.any(0)
    if not valid.any():
        reject("metrics.normal_error", "no valid true normal", "at least one", "leave this image out and count it")
    cos = (unit_vectors(pred) * unit_vectors(gt)).sum(0).clip(-1, 1)
    return np.where(valid, np.degrees(np.arccos(cos)), np.nan)


def _darker(l1, l2, delta):
    """IIW's three-way rule on lightness: "1" (point 1 is darker), "2" or "E" (about equal)."""
    l1, l2 = (max(MIN_LIGHTNESS, x) for x in (l1, l2))
    return "1" if l2 / l1 > 1 + delta else "2" if l1 / l2 > 1 + delta else "E"


def _reflectance(measure, image):
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3:
        reject(measure, f"shape {image.shape}", "(H, W, 3) without alpha", "convert to RGB first")
    if image.dtype.kind == "u":
        reject(measure, f"{image.dtype} values", "linear floating point", "scale and decode sRGB first")
    return check_finite(measure, image)


def whdr(reflectance, judgements, delta=0.1):
    """Weighted human disagreement rate of one image (Bell et al. 2014, sec. 3.5; their whdr.py).

    reflectance  (H, W, 3) float, *linear* (scores on sRGB-encoded values are another metric; say which)
    judgements   parsed IIW JSON. Skipped: darker not in 1/2/E, weight null or <= 0, a point not opaque
    returns      float in [0, 1], or None when nothing is left
    raises       ValueError: coordinates outside [0, 1), unknown point ids, missing keys, values of another type
    """
    image = _reflectance("metrics.whdr", reflectance)
    try:
        return _whdr(image, judgements, delta)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        reject("metrics.whdr", f"judgements of another form ({type(error).__name__}: {error})", "a parsed IIW file",
               "fetch the JSON again")


def _whdr(image, judgements, delta):
    for key in ("intrinsic_points", "intrinsic_comparisons"):
        if key not in judgements:
            reject("metrics.whdr", f"judgements without {key!r}", "a parsed IIW file", "check the path of the JSON")
    points = {}                                                                 # id: opaque, lightness
    lightness = image.mean(2)
    H, W = lightness.shape
    for p in judgements["intrinsic_points"]:
        if not (0 <= p["x"] < 1 and 0 <= p["y"] < 1):
            reject("metrics.whdr", f"point {p['id']} at x {p['x']}, y {p['y']}", "[0, 1)", "correct the JSON")
        points[p["id"]] = bool(p["opaque"]), lightness[int(p["y"] * H), int(p["x"] * W)]
    wrong = total = 0.0
    for c in judgements["intrinsic_comparisons"]:
        weight = c["darker_score"]
        if weight is None or weight <= 0 or c["darker"] not in ("1", "2", "E"):
            continue
        if not np.isfinite(weight):
            reject("metrics.whdr", f"weight {weight} in a comparison", "a finite number", "correct the JSON")
        for key in ("point1", "point2"):
            if c[key] not in points:
                reject("metrics.whdr", f"unknown {key} id {c[key]}", "an id in intrinsic_points", "correct the JSON")
        opaque1, l1 = points[c["point1"]]
        opaque2, l2 = points[c["point2"]]
        if opaque1 and opaque2:
            wrong += weight * (_darker(l1, l2, delta) != c["darker"])
            total += weight
    return float(wrong / total) if total > 0 else None


def whdr_from_gt(pred, gt, points, delta=0.1):
    """WHDR-style disagreement with labels from true albedo by the same rule, unweighted. Ours: no human data.

    pred, gt   (H, W, 3) float, *linear*; points (P, 2, 2) integer (row, col) pairs
    returns    share of pairs labelled differently, in [0, 1]
    """
    pred, gt = (_reflectance("metrics.whdr_from_gt", x) for x in (pred, gt))
    pred, gt = check_shapes("metrics.whdr_from_gt", pred, gt)
    points = np.asarray(points)
    if points.ndim != 3 or points.shape[1:] != (2, 2) or len(points) == 0 or points.dtype.kind not in "iu":
        reject("metrics.whdr_from_gt", f"points {points.dtype} {points.shape}", "integer (P, 2, 2)", "sample pairs")
    if (points < 0).any() or (points >= pred.shape[:2]).any():
        reject("metrics.whdr_from_gt", "a point outside the map", f"(row, col) in {pred.shape[:2]}", "sample again")
    light = [m.mean(2)[points[..., 0], points[..., 1]] for m in (pred, gt)]    # (P, 2) each
    return float(np.mean([_darker(*p, delta) != _darker(*g, delta) for p, g in zip(*light, strict=True)]))


def _shrink(n, n_out):
    """(n_out, n) weights of Pillow's BILINEAR: a triangle as wide as the output pixel, normalised."""
    scale = n / n_out
    distance = np.arange(n)[None] + 0.5 - (np.arange(n_out)[:, None] + 0.5) * scale
    weight = np.maximum(0, 1 - np.abs(distance) / max(scale, 1))
    return weight / weight.sum(1, keepdims=True)


def _maw(measure, pred, mask, colors):
    """MAW's regions -> predicted mean (K, 3) and true colour (K, 3), both linear sRGB, pixel counts (K,)."""
    pred, mask = (np.asarray(x) for x in (pred, mask))
    colors = np.asarray(colors, np.float64)
    if pred.ndim != 3 or pred.shape[2] != 3 or pred.dtype != np.uint8:
        reject(measure, f"a prediction {pred.dtype} {pred.shape}", "uint8 (H, W, 3) sRGB", "encode it first")
    if mask.ndim != 2 or colors.ndim != 2 or colors.shape[1] != 3 or not np.isfinite(colors).all():
        reject(measure, f"mask {mask.shape}, colors {colors.shape}", "(H, W), finite (K, 3)", "check meta.csv")
    h, w = MAW_SIZE
    H, W = mask.shape
    rows, cols = (((np.arange(n) + 0.5) * N / n).astype(int) for n, N in ((h, H), (w, W)))
    small = mask[rows][:, cols]                                                # (h, w) nearest
    labels = np.unique(small[small != 0])
    n_full = len(np.unique(mask[mask != 0]))
    if not len(labels) == n_full == len(colors) > 0:
        reject(measure, f"{n_full} labels, {len(labels)} after the resize, {len(colors)} colours",
               "equal numbers above 0", "check that mask and colours belong together")
    # two passes, each rounded to 8 bits as Pillow does; columns first
    pred = np.floor(np.einsum("ow,hwc->hoc", _shrink(pred.shape[1], w), pred, optimize=True) + 0.5)
    pred = np.floor(np.einsum("oh,hwc->owc", _shrink(pred.shape[0], h), pred, optimize=True) + 0.5) / 255
    linear = np.where(pred > 0.04045, ((pred + 0.055) / 1.055) ** 2.4, pred / 12.92)
    mean = np.stack([linear[small == k].mean(0) for k in labels])
    count = np.array([(small == k).sum() for k in labels])
    return mean, (colors @ ADOBE_TO_SRGB.T).clip(0, 1), count


def maw_intensity(pred, mask, colors):
    """MAW intensity error of one image: one scale per image, squared error of mean intensity, area-weighted.

    pred     (H, W, 3) uint8 sRGB at any size; mask (H, W) labels, 0 = none; both are brought to 240 x 320
    colors   (K, 3) linear Adobe RGB, by ascending label
    returns  float (not x100)
    """
    m, g, weight = _maw("metrics.maw_intensity", pred, mask, colors)
    m, g = (x.mean(1) for x in (m, g))                                         # (K,)
    theta = (weight * m * g).sum() / max((weight * m * m).sum(), 1e-6)
    return float((weight * (theta * m - g) ** 2).sum() / weight.sum())


def maw_chromaticity(pred, mask, colors):
    """MAW chromaticity error of one image: CIEDE2000 after scaling each label to the true mean intensity.

    Arguments as in maw_intensity; returns a float in CIEDE2000 units, weighted by area.
    """
    m, g, weight = _maw("metrics.maw_chromaticity", pred, mask, colors)
    theta = m.mean(1) * g.mean(1) / np.maximum(m.mean(1) ** 2, 1e-6)
    error = ciede2000(linear_to_lab((theta[:, None] * m).clip(0, 1)), linear_to_lab(g))
    return float((weight * error).sum() / weight.sum())


def lmse(pred, gt, mask, window, stride):
    """Local mean squared error (Grosse et al. 2009): one scale per window, residual energy over true energy.

    pred, gt   (H, W) grey, or (H, W, 3) with one scale for the three channels (ARAP); linear
    window     k: only full k x k windows count, every `stride` pixels; scale 0 where sum p^2 <= 1e-5
    returns    float >= 0; Grosse averages this over shading and reflectance (k = 20, stride 10)
    """
    _valid("metrics.lmse", pred, gt, mask)                                     # raises for maps that do not fit
    pred, gt = (np.asarray(x, np.float64) for x in (pred, gt))
    mask = np.asarray(mask).astype(bool)
    H, W = mask.shape[:2]
    if mask.shape != pred.shape[:2] or not 1 <= window <= min(H, W) or stride < 1:
        reject("metrics.lmse", f"maps {pred.shape}, window {window}, stride {stride}",
               "(H, W[, 3]) with 1 <= window <= min(H, W), stride >= 1", "choose a smaller window")
    residual = energy = 0.0
    for i in range(0, H - window + 1, stride):
        for j in range(0, W - window + 1, stride):
            block = np.s_[i:i + window, j:j + window]
            p, g = (x[block][mask[block]] for x in (pred, gt))
            pp = (p * p).sum()
            residual += np.square(g - (p * g).sum() / pp * p if pp > 1e-5 else g).sum()
            energy += (g * g).sum()
    if energy <= 0:
        reject("metrics.lmse", "windows without true energy", "a non-zero map", "leave this image out and count it")
    return float(residual / energy)


def si_mse(pred, gt, mask):
    """Scale-invariant MSE, ours: one least-squares scale over valid pixels and channels, mean squared error.

    pred, gt   (H, W, 3) (also (H, W), (C, H, W)), *linear*; mask (H, W). An all-zero prediction keeps scale 0
    raises     ValueError: a truth of one value, which no skill is needed to fit
    """
    p, g = _valid("metrics.si_mse", pred, gt, mask)
    if is_constant(g):
        reject("metrics.si_mse", f"a true map of one value ({g.flat[0]:g}) everywhere", "one that varies",
               "leave this image out and count it")
    pp = (p * p).sum()
    return float(np.square((p * g).sum() / pp * p - g if pp > 0 else g).mean())


def psnr(pred, gt, mask):
    """Peak signal-to-noise ratio of valid elements, dB, data range 1; inf for equal maps. Shapes: si_mse."""
    mse = np.square(np.subtract(*_valid("metrics.psnr", pred, gt, mask))).mean()
    return float(-10 * np.log10(mse)) if mse > 0 else float("inf")


def _blur(x):
    """(C, H, W) -> (C, H-10, W-10): normalised Gaussian, 11 taps, sigma 1.5, no padding."""
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    taps /= taps.sum()
    H, W = x.shape[-2:]
    x = sum(w * x[:, k:k + H - 10] for k, w in enumerate(taps))
    return sum(w * x[:, :, k:k + W - 10] for k, w in enumerate(taps))


def ssim(pred, gt, valid=None):
    """Structural similarity (Wang et al. 2004): Gaussian window 11, sigma 1.5, data range 1, K = .01, .03.

    pred, gt   (H, W), (H, W, C) or (C, H, W) with C <= 4, sides >= 11; mean over full windows and channels
    Invalid pixels: the caller sets them to 0 in both maps (Marigold IID), or only windows inside `valid` (H, W) count
    """
    pred, gt = check_shapes("metrics.ssim", pred, gt)
    if pred.ndim == 2:
        pred, gt = (x[None] for x in (pred, gt))
    elif pred.ndim == 3 and pred.shape[2] <= 4:
        pred, gt = (np.moveaxis(x, 2, 0) for x in (pred, gt))
    if pred.ndim != 3 or pred.shape[0] > 4 or min(pred.shape[1:]) < 11:
        reject("metrics.ssim", f"shape {pred.shape}", "at most 4 channels and sides >= 11", "use larger maps")
    if not np.isfinite(gt).all():
        reject("metrics.ssim", "non-finite ground truth", "finite numbers", "set invalid pixels to 0 in both maps")
    mu_p, mu_g = (_blur(x) for x in (pred, gt))
    var = _blur(pred * pred + gt * gt) - mu_p ** 2 - mu_g ** 2
    cov = _blur(pred * gt) - mu_p * mu_g
    c1, c2 = (k ** 2 for k in (0.01, 0.03))
    score = (2 * mu_p * mu_g + c1) * (2 * cov + c2) / ((mu_p ** 2 + mu_g ** 2 + c1) * (var + c2))
    if valid is not None:
        score = score[:, _blur(np.asarray(valid, float)[None])[0] > 1 - 1e-9]   # the smallest weight is 1e-6
    if score.size == 0:
        reject("metrics.ssim", "no window of 11 x 11 valid pixels", "one", "leave this image out and count it")
    return float(score.mean())


def high_frequency_energy(maps):
    """Mean squared 4-neighbour Laplacian inside a (C, H, W) map: it shows noise that the reward does not see. Ours."""
    x = check_finite("metrics.high_frequency_energy", maps)
    if x.ndim != 3 or min(x.shape[1:]) < 3:
        reject("metrics.high_frequency_energy", f"shape {x.shape}", "(C, H, W), sides >= 3", "add the channel axis")
    around = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    return float(np.square(around - 4 * x[:, 1:-1, 1:-1]).mean())
