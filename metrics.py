"""Scores of predicted maps: numpy in, float (or a map) out. No model, no file, no implicit colour conversion.

Protocols: depth and normals after Marigold (and DSINE); WHDR after Bell et al. 2014 (IIW sec. 3.5); MAW after
Wu et al. 2023; LMSE after Grosse et al. 2009; CIEDE2000 after Sharma et al. 2005. Declared ours: si_mse,
whdr_from_gt, normals_from_depth and depth_normal_consistency (the paper names the measure, no focal length,
alignment or mask), high_frequency_energy, bootstrap_interval.

Conventions owned here: sums run in float64; mask True (non-zero) = valid; a prediction is refused when any
value is not finite, ground truth only inside the mask; refusals are ValueErrors that say got, want, do.
"""
import numpy as np

MAW_SIZE = (240, 320)      # rows, columns on which MAW compares
ADOBE_TO_SRGB = np.array([[1.39835574, -0.39835574, 0.0],   # linear Adobe RGB (1998) -> linear sRGB: equal
                          [0.0, 1.0, 0.0],                  # white, red and blue, so only green moves
                          [0.0, -0.04292898, 1.04292898]])
SRGB_TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375],  # linear sRGB -> CIE XYZ, D65, 2 degree observer
                        [0.2126729, 0.7151522, 0.0721750],
                        [0.0193339, 0.1191920, 0.9503041]])
MIN_DEPTH = 1e-6           # floor of a prediction before logarithms and ratios (Marigold)
MIN_LIGHTNESS = 1e-10      # floor of a reflectance before ratios (IIW)
BLOCK = 1 << 17            # elements that depth metrics read at a time: float64 copies of them stay in the cache
RANK = 1e-10               # spread relative to size below which a predicted depth is constant
AXES = tuple((x, y, z) for x in (1, -1) for y in (1, -1) for z in (1, -1))   # sign choices of a normal frame


def _refuse(what, got, want, do):
    raise ValueError(f"metrics.{what} failed: got {got}, want {want}; {do}.")


def _finite(what, pred):
    pred = np.asarray(pred)
    if not np.isfinite(pred).all():
        _refuse(what, f"{np.count_nonzero(~np.isfinite(pred))} non-finite values in the prediction",
                "finite numbers", "fix the predictor")
    return pred.astype(np.float64)


def _same_shape(what, pred, gt):
    pred, gt = _finite(what, pred), np.asarray(gt).astype(np.float64)
    if pred.shape != gt.shape:
        _refuse(what, f"a prediction of shape {pred.shape}", f"the ground truth's {gt.shape}",
                "resize the prediction first")
    return pred, gt


def _valid(what, pred, gt, mask):
    """Check and select: maps (H, W), (H, W, C) or (C, H, W), mask (H, W) or their shape -> two (n, ...)."""
    pred, gt = _same_shape(what, pred, gt)
    mask = np.asarray(mask).astype(bool)
    if mask.shape not in (pred.shape, pred.shape[:2]) and mask.shape == pred.shape[-2:]:
        pred, gt = np.moveaxis(pred, 0, -1), np.moveaxis(gt, 0, -1)
    if mask.shape not in (pred.shape, pred.shape[:2]):
        _refuse(what, f"a mask of shape {mask.shape}", f"one that fits {pred.shape}", "load it again")
    if not mask.any():
        _refuse(what, "an empty mask", "at least one valid pixel", "leave this image out and count it")
    pred, gt = pred[mask], gt[mask]
    if not np.isfinite(gt).all():
        _refuse(what, "non-finite ground truth in the mask", "finite numbers", "mask those pixels out")
    return pred, gt


def _rows(what, pred, gt, mask):
    """Blocks of whole rows, valid elements only, float64: a large map is read once, in the cache, and never copied."""
    pred, gt, mask = np.asarray(pred), np.asarray(gt), np.asarray(mask)
    if pred.shape != gt.shape or pred.shape != mask.shape:                      # a refusal, or shapes of si_mse
        yield _valid(what, pred, gt, mask)
        return
    height, found = max(1, BLOCK // max(1, pred[0].size)), False
    for i in range(0, len(pred), height):
        p, g, ok = pred[i:i + height], gt[i:i + height], mask[i:i + height].astype(bool)
        if not np.isfinite(p).all():
            _finite(what, pred)                                                 # refuses with the count
        if ok.any():
            p, g, found = p[ok].astype(np.float64), g[ok].astype(np.float64), True
            if not np.isfinite(g).all():
                _refuse(what, "non-finite ground truth in the mask", "finite numbers", "mask those pixels out")
            yield p, g
    if not found:
        _refuse(what, "an empty mask", "at least one valid pixel", "leave this image out and count it")


def align_depth(pred, gt, mask, max_res=None):
    """Least-squares scale and shift from predicted to true depth (Marigold, util/alignment).

    pred, gt   (H, W) depth, any unit; mask (H, W)
    max_res    mirrors the ETH3D quirk: when max(H, W) > max_res, only the *columns* are subsampled (nearest,
               by max_res / max(H, W)) before the fit; every row takes part
    returns    (scale, shift): scale * pred + shift ~ gt. A constant prediction c gets the
               minimum-norm (c, 1) mean(g) / (c^2 + 1).
               A negative scale means inverse depth: the caller must report it
    """
    pred, gt, mask = np.asarray(pred), np.asarray(gt), np.asarray(mask)
    if pred.ndim != 2:
        _refuse("align_depth", f"a prediction of shape {pred.shape}", "(H, W)", "drop the channel axis")
    if max_res is not None and max(pred.shape) > max_res and pred.shape == gt.shape == mask.shape:
        factor, width = max_res / max(pred.shape), pred.shape[1]
        cols = (np.arange(int(width * factor)) * np.float32(1 / factor)).astype(int).clip(0, width - 1)
        if not np.isfinite(pred).all():
            _finite("align_depth", pred)                                        # refuses with the count
        pred, gt, mask = pred[:, cols], gt[:, cols], mask[:, cols]
    n, mp, mg, pp, pg = 0, 0.0, 0.0, 0.0, 0.0                                   # centred sums, merged block by block
    for p, g in _rows("align_depth", pred, gt, mask):
        k, bp, bg = len(p), p.mean(), g.mean()
        p, g, dp, dg = p - bp, g - bg, bp - mp, bg - mg
        pp, pg = pp + p @ p + dp * dp * n * k / (n + k), pg + p @ g + dp * dg * n * k / (n + k)
        n, mp, mg = n + k, mp + dp * k / (n + k), mg + dg * k / (n + k)
    if pp <= n * (RANK * (mp * mp + 1)) ** 2:                                   # constant: minimum norm
        return float(mp * mg / (mp * mp + 1)), float(mg / (mp * mp + 1))
    return float(pg / pp), float(mg - pg / pp * mp)


def depth_metrics(pred, gt, mask):
    """Depth errors of a prediction that is already aligned and clipped to the data set's range (Marigold).

    pred, gt   (H, W) in one unit, gt > 0 where the mask is True; pred is floored at 1e-6 here
    returns    dict of floats: abs_rel, delta1..3 (shares, strict <), rmse (unit of gt), log10, silog (x100)
    """
    n, total = 0, np.zeros(8)                     # abs_rel, delta1..3, squared error, |log|, log, log^2
    for p, g in _rows("depth_metrics", pred, gt, mask):
        if (g <= 0).any():
            _refuse("depth_metrics", f"true depth {g.min():g} in the mask", "depth > 0", "mask it out")
        p = np.maximum(p, MIN_DEPTH)
        error, ratio = p - g, p / g
        log = np.log(ratio)
        ratio = np.maximum(ratio, g / p)
        total += [(np.abs(error) / g).sum(), *((ratio < 1.25 ** k).sum() for k in (1, 2, 3)),
                  error @ error, np.abs(log).sum(), log.sum(), log @ log]
        n += len(p)
    abs_rel, delta1, delta2, delta3, square, log_abs, log, log_square = (float(x) for x in total / n)
    return dict(abs_rel=abs_rel, delta1=delta1, delta2=delta2, delta3=delta3, rmse=square ** 0.5,
                log10=log_abs / float(np.log(10)), silog=100 * max(0.0, log_square - log * log) ** 0.5)


def _unit(n):
    """(3, H, W) -> unit vectors; zero vectors stay zero."""
    length = np.linalg.norm(n, axis=0)
    return n / np.where(length > 0, length, 1)


def normal_error(pred, gt):
    """Angle between normals (Marigold, DSINE); both are renormalised.

    pred, gt   (3, H, W) in one frame; a zero vector in gt = invalid
    returns    (H, W) degrees in [0, 180], NaN where gt is invalid; a zero predicted vector counts as 90
    """
    pred, gt = _same_shape("normal_error", pred, gt)
    if pred.ndim != 3 or pred.shape[0] != 3:
        _refuse("normal_error", f"shape {pred.shape}", "(3, H, W)", "move the channel axis to the front")
    if not np.isfinite(gt).all():
        _refuse("normal_error", "non-finite ground truth", "zero vectors at invalid pixels", "fix the reader")
    valid = gt.any(0)
    if not valid.any():
        _refuse("normal_error", "no valid true normal", "at least one", "leave this image out and count it")
    cos = (_unit(pred) * _unit(gt)).sum(0).clip(-1, 1)
    return np.where(valid, np.degrees(np.arccos(cos)), np.nan)


def axis_errors(pred, gt, limit=20000):
    """Mean angle for each of the 8 sign choices of the predicted axes: the guard against a wrong frame.

    pred, gt   (3, H, W), zero = invalid in either; limit: about as many pixels take part (every k-th row and column)
    returns    dict (sx, sy, sz) -> degrees; (1, 1, 1) is the prediction as it is. None without a pixel valid in both
    """
    pred, gt = _same_shape("axis_errors", pred, gt)
    step = max(1, int((pred[0].size / limit) ** 0.5))
    pred, gt = pred[:, ::step, ::step], gt[:, ::step, ::step]
    valid = pred.any(0) & gt.any(0)
    if not valid.any():
        return None
    part = (_unit(pred) * _unit(gt))[:, valid]                                  # (3, n)
    return {a: float(np.degrees(np.arccos((np.array(a) @ part).clip(-1, 1))).mean()) for a in AXES}


def _darker(l1, l2, delta):
    """IIW's three-way rule on lightness: "1" (point 1 is darker), "2" or "E" (about equal)."""
    l1, l2 = max(MIN_LIGHTNESS, l1), max(MIN_LIGHTNESS, l2)
    return "1" if l2 / l1 > 1 + delta else "2" if l1 / l2 > 1 + delta else "E"


def _reflectance(what, image):
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3:
        _refuse(what, f"shape {image.shape}", "(H, W, 3) without alpha", "convert to RGB first")
    if image.dtype.kind == "u":
        _refuse(what, f"{image.dtype} values", "linear floating point", "scale and decode sRGB first")
    return _finite(what, image)


def whdr(reflectance, judgements, delta=0.1):
    """Weighted human disagreement rate of one image (Bell et al. 2014, sec. 3.5; their whdr.py).

    reflectance  (H, W, 3) float, *linear* (scores on sRGB-encoded values are another metric; say which)
    judgements   parsed IIW JSON. Skipped: darker not in 1/2/E, weight null or <= 0, a point not opaque
    returns      float in [0, 1], or None when nothing is left
    raises       ValueError: coordinates outside [0, 1), unknown point ids, missing keys, values of another type
    """
    image = _reflectance("whdr", reflectance)
    try:
        return _whdr(image, judgements, delta)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        _refuse("whdr", f"judgements of another form ({type(error).__name__}: {error})", "a parsed IIW file",
                "fetch the JSON again")


def _whdr(image, judgements, delta):
    for key in ("intrinsic_points", "intrinsic_comparisons"):
        if key not in judgements:
            _refuse("whdr", f"judgements without {key!r}", "a parsed IIW file", "check the path of the JSON")
    lightness, points = image.mean(2), {}
    H, W = lightness.shape
    for p in judgements["intrinsic_points"]:
        if not (0 <= p["x"] < 1 and 0 <= p["y"] < 1):
            _refuse("whdr", f"point {p['id']} at x {p['x']}, y {p['y']}", "[0, 1)", "correct the JSON")
        points[p["id"]] = bool(p["opaque"]), lightness[int(p["y"] * H), int(p["x"] * W)]
    wrong = total = 0.0
    for c in judgements["intrinsic_comparisons"]:
        weight = c["darker_score"]
        if weight is None or weight <= 0 or c["darker"] not in ("1", "2", "E"):
            continue
        if not np.isfinite(weight):
            _refuse("whdr", f"weight {weight} in a comparison", "a finite number", "correct the JSON")
        for key in ("point1", "point2"):
            if c[key] not in points:
                _refuse("whdr", f"unknown {key} id {c[key]}", "an id in intrinsic_points", "correct the JSON")
        (opaque1, l1), (opaque2, l2) = points[c["point1"]], points[c["point2"]]
        if opaque1 and opaque2:
            wrong += weight * (_darker(l1, l2, delta) != c["darker"])
            total += weight
    return float(wrong / total) if total > 0 else None


def whdr_from_gt(pred, gt, points, delta=0.1):
    """WHDR-style disagreement with labels from true albedo by the same rule, unweighted. Ours: no human data.

    pred, gt   (H, W, 3) float, *linear*; points (P, 2, 2) integer (row, col) pairs
    returns    share of pairs labelled differently, in [0, 1]
    """
    pred, gt = _reflectance("whdr_from_gt", pred), _reflectance("whdr_from_gt", gt)
    pred, gt = _same_shape("whdr_from_gt", pred, gt)
    points = np.asarray(points)
    if points.ndim != 3 or points.shape[1:] != (2, 2) or len(points) == 0 or points.dtype.kind not in "iu":
        _refuse("whdr_from_gt", f"points {points.dtype} {points.shape}", "integer (P, 2, 2)", "sample pairs")
    if (points < 0).any() or (points >= pred.shape[:2]).any():
        _refuse("whdr_from_gt", "a point outside the map", f"(row, col) in {pred.shape[:2]}", "sample again")
    light = [m.mean(2)[points[..., 0], points[..., 1]] for m in (pred, gt)]    # (P, 2) each
    return float(np.mean([_darker(*p, delta) != _darker(*g, delta) for p, g in zip(*light, strict=True)]))


def _shrink(n, n_out):
    """(n_out, n) weights of Pillow's BILINEAR: a triangle as wide as the output pixel, normalised."""
    scale = n / n_out
    distance = np.arange(n)[None] + 0.5 - (np.arange(n_out)[:, None] + 0.5) * scale
    weight = np.maximum(0, 1 - np.abs(distance) / max(scale, 1))
    return weight / weight.sum(1, keepdims=True)


def _maw(what, pred, mask, colors):
    """MAW's regions -> predicted mean (K, 3) and true colour (K, 3), both linear sRGB, pixel counts (K,)."""
    pred, mask, colors = np.asarray(pred), np.asarray(mask), np.asarray(colors, np.float64)
    if pred.ndim != 3 or pred.shape[2] != 3 or pred.dtype != np.uint8:
        _refuse(what, f"a prediction {pred.dtype} {pred.shape}", "uint8 (H, W, 3) sRGB", "encode it first")
    if mask.ndim != 2 or colors.ndim != 2 or colors.shape[1] != 3 or not np.isfinite(colors).all():
        _refuse(what, f"mask {mask.shape}, colors {colors.shape}", "(H, W), finite (K, 3)", "check meta.csv")
    (h, w), (H, W) = MAW_SIZE, mask.shape
    rows, cols = (((np.arange(n) + 0.5) * N / n).astype(int) for n, N in ((h, H), (w, W)))
    small = mask[rows][:, cols]                                                # (h, w) nearest
    labels, n_full = np.unique(small[small != 0]), len(np.unique(mask[mask != 0]))
    if not len(labels) == n_full == len(colors) > 0:
        _refuse(what, f"{n_full} labels, {len(labels)} after the resize, {len(colors)} colours",
                "equal numbers above 0", "check that mask and colours belong together")
    # two passes, each rounded to 8 bits as Pillow does; columns first
    pred = np.floor(np.einsum("ow,hwc->hoc", _shrink(pred.shape[1], w), pred, optimize=True) + 0.5)
    pred = np.floor(np.einsum("oh,hwc->owc", _shrink(pred.shape[0], h), pred, optimize=True) + 0.5) / 255
    linear = np.where(pred > 0.04045, ((pred + 0.055) / 1.055) ** 2.4, pred / 12.92)
    mean = np.stack([linear[small == k].mean(0) for k in labels])
    return mean, (colors @ ADOBE_TO_SRGB.T).clip(0, 1), np.array([(small == k).sum() for k in labels])


def maw_intensity(pred, mask, colors):
    """MAW intensity error of one image: one scale per image, squared error of mean intensity, area-weighted.

    pred     (H, W, 3) uint8 sRGB at any size; mask (H, W) labels, 0 = none; both are brought to 240 x 320
    colors   (K, 3) linear Adobe RGB, by ascending label
    returns  float (not x100)
    """
    m, g, weight = _maw("maw_intensity", pred, mask, colors)
    m, g = m.mean(1), g.mean(1)                                                # (K,)
    theta = (weight * m * g).sum() / max((weight * m * m).sum(), 1e-6)
    return float((weight * (theta * m - g) ** 2).sum() / weight.sum())


def maw_chromaticity(pred, mask, colors):
    """MAW chromaticity error of one image: CIEDE2000 after scaling each label to the true mean intensity.

    Arguments as in maw_intensity; returns a float in CIEDE2000 units, weighted by area.
    """
    m, g, weight = _maw("maw_chromaticity", pred, mask, colors)
    theta = m.mean(1) * g.mean(1) / np.maximum(m.mean(1) ** 2, 1e-6)
    error = ciede2000(linear_to_lab((theta[:, None] * m).clip(0, 1)), linear_to_lab(g))
    return float((weight * error).sum() / weight.sum())


def linear_to_lab(rgb):
    """(..., 3) linear sRGB in [0, 1] -> CIELAB, white D65."""
    t = np.asarray(rgb, np.float64) @ SRGB_TO_XYZ.T / SRGB_TO_XYZ.sum(1)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def ciede2000(lab1, lab2):
    """Colour difference CIEDE2000, unit weights (Sharma et al. 2005): (..., 3) x (..., 3) -> (...)."""
    (L1, a1, b1), (L2, a2, b2) = (np.moveaxis(np.asarray(lab, np.float64), -1, 0) for lab in (lab1, lab2))
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1 + 0.5 * (1 - np.sqrt(c7 / (c7 + 25.0 ** 7)))
    c1, c2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = h2 - h1 - 360 * np.sign(h2 - h1) * (np.abs(h2 - h1) > 180)
    dL, dC, dH = L2 - L1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))     # dH is 0 for grays
    L, C, total = (L1 + L2) / 2, (c1 + c2) / 2, h1 + h2
    h = np.where(np.abs(h1 - h2) <= 180, total / 2, np.where(total < 360, total / 2 + 180, total / 2 - 180))
    h = np.where(c1 * c2 == 0, total, h)                                       # one hue is undefined (0)
    T = 1 + sum(w * np.cos(np.radians(k * h + offset))
                for w, k, offset in ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63)))
    sL = 1 + 0.015 * (L - 50) ** 2 / np.sqrt(20 + (L - 50) ** 2)
    sC, sH = 1 + 0.045 * C, 1 + 0.015 * C * T
    rotation = -np.sin(np.radians(60 * np.exp(-((h - 275) / 25) ** 2)))
    rotation = rotation * 2 * np.sqrt(C ** 7 / (C ** 7 + 25.0 ** 7))
    light, chroma, hue = dL / sL, dC / sC, dH / sH
    return np.sqrt(np.maximum(0, light ** 2 + chroma ** 2 + hue ** 2 + rotation * chroma * hue))


def lmse(pred, gt, mask, window, stride):
    """Local mean squared error (Grosse et al. 2009): one scale per window, residual energy over true energy.

    pred, gt   (H, W) grey, or (H, W, 3) with one scale for the three channels (ARAP); linear
    window     k: only full k x k windows count, every `stride` pixels; scale 0 where sum p^2 <= 1e-5
    returns    float >= 0; Grosse averages this over shading and reflectance (k = 20, stride 10)
    """
    _valid("lmse", pred, gt, mask)                                             # refusals only
    pred, gt, mask = np.asarray(pred, np.float64), np.asarray(gt, np.float64), np.asarray(mask).astype(bool)
    H, W = mask.shape[:2]
    if mask.shape != pred.shape[:2] or not 1 <= window <= min(H, W) or stride < 1:
        _refuse("lmse", f"maps {pred.shape}, window {window}, stride {stride}",
                "(H, W[, 3]) with 1 <= window <= min(H, W), stride >= 1", "choose a smaller window")
    residual = energy = 0.0
    for i in range(0, H - window + 1, stride):
        for j in range(0, W - window + 1, stride):
            block = np.s_[i:i + window, j:j + window]
            p, g = pred[block][mask[block]], gt[block][mask[block]]
            pp = (p * p).sum()
            residual += np.square(g - (p * g).sum() / pp * p if pp > 1e-5 else g).sum()
            energy += (g * g).sum()
    if energy <= 0:
        _refuse("lmse", "windows without true energy", "a non-zero map", "leave this image out and count it")
    return float(residual / energy)


def si_mse(pred, gt, mask):
    """Scale-invariant MSE, ours: one least-squares scale over valid pixels and channels, mean squared error.

    pred, gt   (H, W, 3) (also (H, W), (C, H, W)), *linear*; mask (H, W). An all-zero prediction keeps scale 0
    """
    p, g = _valid("si_mse", pred, gt, mask)
    pp = (p * p).sum()
    return float(np.square((p * g).sum() / pp * p - g if pp > 0 else g).mean())


def psnr(pred, gt, mask):
    """Peak signal-to-noise ratio of valid elements, dB, data range 1; inf for equal maps. Shapes: si_mse."""
    mse = np.square(np.subtract(*_valid("psnr", pred, gt, mask))).mean()
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
    pred, gt = _same_shape("ssim", pred, gt)
    if pred.ndim == 2:
        pred, gt = pred[None], gt[None]
    elif pred.ndim == 3 and pred.shape[2] <= 4:
        pred, gt = np.moveaxis(pred, 2, 0), np.moveaxis(gt, 2, 0)
    if pred.ndim != 3 or pred.shape[0] > 4 or min(pred.shape[1:]) < 11:
        _refuse("ssim", f"shape {pred.shape}", "at most 4 channels and sides >= 11", "use larger maps")
    if not np.isfinite(gt).all():
        _refuse("ssim", "non-finite ground truth", "finite numbers", "set invalid pixels to 0 in both maps")
    mu_p, mu_g = _blur(pred), _blur(gt)
    var, cov = _blur(pred * pred + gt * gt) - mu_p ** 2 - mu_g ** 2, _blur(pred * gt) - mu_p * mu_g
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    score = (2 * mu_p * mu_g + c1) * (2 * cov + c2) / ((mu_p ** 2 + mu_g ** 2 + c1) * (var + c2))
    if valid is not None:
        score = score[:, _blur(np.asarray(valid, float)[None])[0] > 1 - 1e-9]   # the smallest weight is 1e-6
    if score.size == 0:
        _refuse("ssim", "no window of 11 x 11 valid pixels", "one", "leave this image out and count it")
    return float(score.mean())


def normals_from_depth(depth, fx, fy, cx, cy):
    """Normals of a depth map by central differences and a cross product (details ours).

    depth            (H, W) planar z > 0; a shift changes the result, a scale does not
    fx, fy, cx, cy   pinhole camera in pixels, integer pixel centres
    returns          (3, H, W) unit, x right, y up, z toward the viewer; zero vector where a pixel or one
                     of its four neighbours is missing, non-finite or <= 0
    """
    depth = np.asarray(depth, np.float64)
    if depth.ndim != 2 or min(depth.shape) < 3:
        _refuse("normals_from_depth", f"shape {depth.shape}", "(H, W), sides >= 3", "drop the channel axis")
    if not (fx > 0 and fy > 0):
        _refuse("normals_from_depth", f"focal lengths {fx}, {fy}", "pixels > 0", "give this image's camera")
    H, W = depth.shape
    known = np.isfinite(depth) & (depth > 0)
    z = np.where(known, depth, 1.0)
    point = np.stack([(np.arange(W) - cx) / fx * z, (cy - np.arange(H)[:, None]) / fy * z, -z])    # (3, H, W)
    right = point[:, 1:-1, 2:] - point[:, 1:-1, :-2]
    up = point[:, :-2, 1:-1] - point[:, 2:, 1:-1]
    ok = known[1:-1, 1:-1] & known[1:-1, 2:] & known[1:-1, :-2] & known[:-2, 1:-1] & known[2:, 1:-1]
    out = np.zeros((3, H, W))
    out[:, 1:-1, 1:-1] = _unit(np.cross(right, up, axis=0)) * ok
    return out


def depth_normal_consistency(depth, normal, fx, fy, cx=None, cy=None, mask=None):
    """RMSE between normals derived from predicted depth and predicted normals. Ours.

    depth    (H, W) predicted planar z, aligned by the caller (a shift bends the surface), > 0 where used
    normal   (3, H, W) x right, y up, z toward the viewer; renormalised here
    cx, cy   principal point in pixels, default the image centre; mask (H, W), default all
    returns  float in [0, 2 / sqrt 3]: root of the mean over pixels *and* the three components
    """
    H, W = np.asarray(depth).shape
    normal = _unit(_finite("depth_normal_consistency", normal))
    if normal.shape != (3, H, W):
        _refuse("depth_normal_consistency", f"normals {normal.shape}", f"{(3, H, W)}", "resize one of them")
    cx, cy = (W - 1) / 2 if cx is None else cx, (H - 1) / 2 if cy is None else cy
    derived = normals_from_depth(depth, fx, fy, cx, cy)
    valid = derived.any(0) & (True if mask is None else np.asarray(mask).astype(bool))
    if not valid.any():
        _refuse("depth_normal_consistency", "no pixel with five valid depths", "one", "check depth > 0")
    return float(np.sqrt(np.square(derived - normal)[:, valid].mean()))


def high_frequency_energy(maps):
    """Mean squared 4-neighbour Laplacian inside a (C, H, W) map: an off-reward sign of added noise. Ours."""
    x = _finite("high_frequency_energy", maps)
    if x.ndim != 3 or min(x.shape[1:]) < 3:
        _refuse("high_frequency_energy", f"shape {x.shape}", "(C, H, W), sides >= 3", "add the channel axis")
    around = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    return float(np.square(around - 4 * x[:, 1:-1, 1:-1]).mean())


def bootstrap_interval(values_a, values_b=None, n=2000, seed=0, level=0.95, relative=False, weights=None):
    """Percentile bootstrap over images; with two lists, of the *paired* change from a to b.

    values_a   (N,) one number per image; values_b (N,) of the same images in the same order, or None
    relative   False: mean(b) - mean(a); True: mean(b) / mean(a) - 1 (both means of one resample)
    weights    (N,) > 0 of the images, drawn with them: mean is sum(weight value) / sum(weight) of a resample [equal]
    returns    (mean, low, high): mean(a) or the change on all images; `level` of the resamples lie inside
    """
    a = _finite("bootstrap_interval", values_a)
    b = np.zeros_like(a) if values_b is None else _finite("bootstrap_interval", values_b)
    w = np.ones_like(a) if weights is None else _finite("bootstrap_interval", weights)
    if a.ndim != 1 or not a.shape == b.shape == w.shape or len(a) < 1 or not 0 < level < 1 or n < 1:
        _refuse("bootstrap_interval", f"values {a.shape}, {b.shape}, n {n}, level {level}",
                "two equal (N,) lists, n >= 1, 0 < level < 1", "pair the images by name first")
    if relative and (values_b is None or w @ a == 0):
        _refuse("bootstrap_interval", "no values_b, or mean(a) 0", "a relative change", "use relative=False")

    def change(i):                                                              # (..., N) indices of images
        first, second = ((w[i] * x[i]).sum(-1) / w[i].sum(-1) for x in (a, b))
        return first if values_b is None else second / first - 1 if relative else second - first

    rng, rows = np.random.default_rng(seed), max(1, (1 << 20) // len(a))        # resamples at a time: 8 MB of indices
    with np.errstate(divide="ignore", invalid="ignore"):                        # a resample whose mean of a is 0
        draws = np.concatenate([change(rng.integers(0, len(a), (min(rows, n - k), len(a)))) for k in range(0, n, rows)])
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(change(slice(None))), float(low), float(high)
