"""Bootstrap intervals over images, and the verdict that an interval gives on a change."""
import numpy as np

from evaluation.metrics import check_finite, reject


def bootstrap_interval(values_a, values_b=None, n=2000, seed=0, level=0.95, relative=False, weights=None):
    """Percentile bootstrap over images; with two lists, of the *paired* change from a to b.

    values_a   (N,) one number per image; values_b (N,) of the same images in the same order, or None
    relative   False: mean(b) - mean(a); True: mean(b) / mean(a) - 1 (both means over the same resample)
    weights    (N,) > 0, one per image: the mean of a resample is sum(weight value) / sum(weight); None: equal weights
    returns    (mean, low, high): mean(a) or the change on all images; `level` of the resamples lie inside
    """
    a = check_finite("intervals.bootstrap_interval", values_a)
    b = np.zeros_like(a) if values_b is None else check_finite("intervals.bootstrap_interval", values_b)
    w = np.ones_like(a) if weights is None else check_finite("intervals.bootstrap_interval", weights)
    if a.ndim != 1 or not a.shape == b.shape == w.shape or len(a) < 1 or not 0 < level < 1 or n < 1:
        reject("intervals.bootstrap_interval", f"values {a.shape}, {b.shape}, n {n}, level {level}",
               "two equal (N,) lists, n >= 1, 0 < level < 1", "pair the images by name first")
    if relative and (values_b is None or w @ a == 0):
        reject("intervals.bootstrap_interval", "no values_b, or mean(a) 0", "a relative change", "use relative=False")

    def change(i):                                                              # (..., N) indices of images
        first, second = ((w[i] * x[i]).sum(-1) / w[i].sum(-1) for x in (a, b))
        if values_b is None:
            return first
        return second / first - 1 if relative else second - first

    rng = np.random.default_rng(seed)
    rows = max(1, (1 << 20) // len(a))                                          # resamples at a time: 8 MB of indices
    with np.errstate(divide="ignore", invalid="ignore"):                        # a resample whose mean of a is 0
        draws = np.concatenate([change(rng.integers(0, len(a), (min(rows, n - k), len(a)))) for k in range(0, n, rows)])
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(change(slice(None))), float(low), float(high)


def verdict(low, high, better):
    """Verdict on a change from its interval: "better", "worse", or "same" when 0 lies inside or an end is not finite.

    better  sign of the good direction
    """
    if low * better > 0 and high * better > 0:
        return "better"
    if low * better < 0 and high * better < 0:
        return "worse"
    return "same"
