"""How a predicted depth map is brought to metres before it is scored: scale and shift in one of three spaces.

    depth        truth      ~ scale x + shift   least squares
    disparity    1 / truth  ~ scale x + shift   least squares where x > 0; clipped at 1e-3, inverted
    log-ransac   log truth  ~ scale x + shift   RANSAC, then least squares on the pixels that its best line explains;
                                                clipped at 1 km

and then the clip to the data set's range, and to 1e-6. x is the map in that space, as far as its meaning is known:

    the network's depth is      depth    disparity    log-ransac
    metres m                    m        1 / m        log m
    disparity d, inverse depth  -d       d            -log d
    depth up to scale p         p        refused      p, taken as log depth
    a saved map p               p        p            p, taken as log depth

Maps arrive here as everywhere, larger is farther: a disparity as -d. A negative scale means that the map runs the
other way. Numbers of two alignments are not comparable.
Source: Marigold's script/depth/eval.py (depth, disparity).
differs: log-ransac is named after what Marigold V2 reports, of which no code was at hand. Ours are: plain logarithms,
no early end, a fixed seed, a count on SAMPLE pixels, and the clip at 1 km, without which one pixel decides ETH3D's
mean. TRIALS and the threshold, the median absolute deviation of the truth, are those of scikit-learn's RANSACRegressor
as depth papers call it
"""
import math

import numpy as np

from evaluation import metrics
from evaluation.benchmark_table import PLAIN
from models.depth_families import AFFINE, SIGN

MIN_DISPARITY = 1e-3              # 1/m, floor before the inversion (Marigold); log-ransac gives no larger depth either
TRIALS = 1000                     # lines that RANSAC tries
SAMPLE = 10_000                   # pixels, evenly spaced, on which the lines are compared
BLOCK = 50                        # lines at a time
SEED = 0


def read_space(pred, means, align):
    """A map as x of the module docstring -> (x (H, W), pixels that may be fitted: (H, W) bool, or True).

    pred   (H, W), larger is farther;  means  a key of depth_families.SIGN;  align  of benchmark_table.ALIGNMENTS
    """
    if align == PLAIN or means == AFFINE:
        return np.asarray(pred), True
    sign = SIGN[means]
    value = sign * np.asarray(pred, np.float32)                                 # metres, or a disparity
    known = value > 0
    value = np.maximum(value, np.float32(metrics.MIN_DEPTH)) if align == "log-ransac" or sign > 0 else value
    if align == "log-ransac":
        return sign * np.log(value), known
    return (value if sign < 0 else 1 / value), known


def find_line(x, y):
    """The line through two of the points that most points lie near -> (scale, shift, threshold).

    x, y   (n,) float64; near: within the median absolute deviation of y. Of two lines with equally many points the
           one with smaller residuals wins. None of the lines is vertical: (0, median of y) if all of x are equal
    """
    middle = np.median(y)
    threshold = max(float(np.median(np.abs(y - middle))), 1e-6)
    pairs = np.random.default_rng(SEED).integers(0, len(x), (TRIALS, 2))
    pairs = pairs[x[pairs[:, 0]] != x[pairs[:, 1]]]
    best = (0, 0.0, 0.0, float(middle))                                         # points near, -residuals, scale, shift
    for i in range(0, len(pairs), BLOCK):
        a, b = pairs[i:i + BLOCK].T
        scale = (y[b] - y[a]) / (x[b] - x[a])
        shift = y[a] - scale * x[a]
        error = np.abs(scale[:, None] * x + shift[:, None] - y)                 # (BLOCK, n)
        near = error <= threshold
        rows = zip(near.sum(1), -(error * near).sum(1), scale, shift, strict=True)
        best = max(best, *rows)
    return float(best[2]), float(best[3]), threshold


def near_line(x, y, ok):
    """Pixels of ok (H, W) that the line of `find_line` explains; x, y (H, W)."""
    place = np.flatnonzero(ok)
    place = place[:: -(-len(place) // SAMPLE)]
    scale, shift, threshold = find_line(*(v.ravel()[place].astype(np.float64) for v in (x, y)))
    return ok & (np.abs(scale * x + shift - y) <= threshold)


def fit_depth(bench, pred, sample):
    """A prediction aligned as bench.align says and clipped to the range -> ((H, W) float32 metres, fitted scale).

    pred    (H, W), larger is farther
    sample  depth (H, W) metres, mask (H, W), means: a key of depth_families.SIGN (absent: AFFINE)
    raises  ValueError: no pixel may be fitted
    """
    x, known = read_space(pred, sample.get("means", AFFINE), bench.align)
    ok = sample["mask"]
    target = sample["depth"]
    if bench.align != PLAIN:
        ok = np.asarray(ok, bool) & known
        if not ok.any():
            metrics.reject(f"--align {bench.align}", "no predicted value above 0 at a pixel with truth",
                           "at least one", "use another --align, or other maps")
        change = np.reciprocal if bench.align == "disparity" else np.log
        target = change(np.asarray(target, np.float32), out=np.ones(ok.shape, np.float32), where=ok)
    if bench.align == "log-ransac":
        ok = near_line(x, target, ok)
    scale, shift = metrics.align_depth(x, target, ok, bench.max_res or None)
    fitted = np.float32(scale) * np.asarray(x, np.float32) + np.float32(shift)
    if bench.align == "disparity":
        fitted = 1 / np.maximum(fitted, np.float32(MIN_DISPARITY))
    elif bench.align == "log-ransac":
        fitted = np.exp(fitted.clip(math.log(metrics.MIN_DEPTH), -math.log(MIN_DISPARITY)))
    return np.clip(fitted, max(bench.range[0], metrics.MIN_DEPTH), bench.range[1], out=fitted), scale
