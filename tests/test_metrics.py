"""metrics.py against ten-line loops, closed forms and published values; every refusal says got, want, do."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import colour, intervals, metrics, surface

DATA = Path(__file__).parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)
# Sharma et al. 2005, table 1: Lab, Lab, CIEDE2000 to four decimals; hue wraps, grays, near-black, large steps
SHARMA = [
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, 3.1571, -77.2803), (50, 0, -82.7485), 2.8615),
    ((50, 2.8361, -74.0200), (50, 0, -82.7485), 3.4412),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, -1, 2), (50, 0, 0), 2.3669),
    ((50, 2.4900, -0.0010), (50, -2.4900, 0.0009), 7.1792),
    ((50, 2.4900, -0.0010), (50, -2.4900, 0.0010), 7.1792),
    ((50, 2.4900, -0.0010), (50, -2.4900, 0.0011), 7.2195),
    ((50, -0.0010, 2.4900), (50, 0.0009, -2.4900), 4.8045),
    ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
    ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ((50, 2.5, 0), (61, -5, 29), 22.8977),
    ((50, 2.5, 0), (56, -27, -3), 31.9030),
    ((50, 2.5, 0), (58, 24, 15), 19.4535),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((63.0109, -31.0961, -5.8663), (62.8187, -29.7946, -4.0864), 1.2630),
    ((6.7747, -0.2908, -2.4247), (5.8714, -0.0985, -2.2286), 0.6377),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]


def full(shape):
    return np.ones(shape, bool)


def refused(call, *words):
    """The call raises one line with every word, a 'want' and a next action after ';'."""
    with pytest.raises(ValueError) as e:
        call()
    text = str(e.value)
    assert "\n" not in text and " failed: got " in text and ", want " in text and "; " in text
    for w in words:
        assert w in text


# depth

def test_align_recovers_an_affine_map_and_equals_lstsq():
    gt, mask = RNG.uniform(1, 9, (20, 30)), RNG.random((20, 30)) > 0.3
    s, t = metrics.align_depth((gt - 3) / 2, gt, mask)
    assert np.allclose((s, t), (2, 3))
    pred = RNG.random((20, 30)).astype(np.float32)
    A = np.stack([pred[mask].astype(float), np.ones(mask.sum())], 1)
    assert np.allclose(metrics.align_depth(pred, gt, mask), np.linalg.lstsq(A, gt[mask], rcond=None)[0])


@pytest.mark.parametrize("c", [0.0, 0.1, 0.5, 7.0])
def test_a_constant_prediction_gets_the_minimum_norm_solution(c):
    gt = RNG.uniform(1, 9, (50, 60))
    want = np.array([c, 1]) * gt.mean() / (c * c + 1)
    got = metrics.align_depth(np.full((50, 60), c, np.float32), gt, full((50, 60)))
    assert np.allclose(got, want, atol=1e-6)


def test_inverse_depth_shows_as_a_negative_scale():
    gt = RNG.uniform(1, 9, (20, 30))
    assert metrics.align_depth(1 / gt, gt, full((20, 30)))[0] < 0


@pytest.mark.parametrize("shape", [(40, 63), (63, 40), (37, 71)])
def test_max_res_subsamples_only_the_columns_as_torch_does(shape):
    pred, gt, mask = RNG.random(shape), RNG.uniform(1, 5, shape), RNG.random(shape) > 0.2
    factor = 32 / max(shape)
    down = torch.nn.Upsample(scale_factor=factor, mode="nearest")     # on (1, H, W): the last axis only
    p, g, m = (down(torch.from_numpy(x.astype(float))[None])[0].numpy() for x in (pred, gt, mask))
    assert p.shape == (shape[0], int(shape[1] * factor))
    assert metrics.align_depth(pred, gt, mask, max_res=32) == metrics.align_depth(p, g, m > 0)
    assert metrics.align_depth(pred, gt, mask, max_res=max(shape)) == metrics.align_depth(pred, gt, mask)


def test_depth_metrics_equal_a_loop():
    pred, gt, mask = RNG.uniform(1, 5, (9, 7)), RNG.uniform(1, 5, (9, 7)), RNG.random((9, 7)) > 0.4
    rel, d1, sq, lg, logs = [], [], [], [], []
    for i, j in zip(*np.nonzero(mask), strict=True):
        p, g = pred[i, j], gt[i, j]
        rel.append(abs(p - g) / g)
        d1.append(max(p / g, g / p) < 1.25)
        sq.append((p - g) ** 2)
        lg.append(abs(np.log10(p) - np.log10(g)))
        logs.append(np.log(p) - np.log(g))
    out = metrics.depth_metrics(pred, gt, mask)
    want = dict(abs_rel=np.mean(rel), delta1=np.mean(d1), rmse=np.mean(sq) ** 0.5, log10=np.mean(lg),
                silog=100 * np.std(logs))
    assert {k: out[k] for k in want} == pytest.approx(want)
    assert out["delta1"] <= out["delta2"] <= out["delta3"] and set(out) == set(want) | {"delta2", "delta3"}


def test_delta_is_strict_and_the_floor_keeps_logs_finite():
    gt = np.full((2, 2), 4.0)
    assert metrics.depth_metrics(gt * 1.25, gt, full((2, 2)))["delta1"] == 0
    assert np.isfinite(list(metrics.depth_metrics(gt * 0 - 1, gt, full((2, 2))).values())).all()


# normals

def test_normal_error_is_the_angle_and_nan_where_gt_is_zero():
    angle = np.radians([[0, 10, 90], [180, 45, 30]])
    pred = 3 * np.stack([np.sin(angle), 0 * angle, np.cos(angle)])
    gt = np.zeros_like(pred)
    gt[2] = 0.5
    gt[:, 1, 2] = 0
    out = metrics.normal_error(pred, gt)
    assert np.allclose(out.ravel()[:5], [0, 10, 90, 180, 45]) and np.isnan(out[1, 2])
    assert metrics.normal_error(pred * 0, gt)[0, 0] == 90


# WHDR

def scene_points():
    points = [dict(id=i, x=x, y=y, opaque=o) for i, (x, y, o) in enumerate(
        [(0.0, 0.0, True), (0.99, 0.2, True), (0.5, 0.5, True), (0.3, 0.99, None), (0.7, 0.1, False)])]
    rows = [(0, 1, "1", 1.0), (1, 2, "E", 0.5), (2, 0, "2", 0.3), (0, 3, "E", 9.0), (4, 1, "1", 9.0),
            (0, 1, "E", None), (0, 1, "E", -1.0), (0, 2, None, 9.0), (1, 2, "?", 9.0), (2, 1, "2", 0.8)]
    return dict(intrinsic_points=points, intrinsic_comparisons=[
        dict(point1=a, point2=b, darker=d, darker_score=w) for a, b, d, w in rows])


def whdr_loop(image, judgements, delta):
    points = {p["id"]: p for p in judgements["intrinsic_points"]}
    wrong = total = 0.0
    for c in judgements["intrinsic_comparisons"]:
        a, b = points[c["point1"]], points[c["point2"]]
        if c["darker_score"] is None or c["darker_score"] <= 0 or c["darker"] not in ("1", "2", "E"):
            continue
        if not (a["opaque"] and b["opaque"]):
            continue
        H, W = image.shape[:2]
        la, lb = (max(1e-10, image[int(p["y"] * H), int(p["x"] * W)].mean()) for p in (a, b))
        label = "1" if lb / la > 1 + delta else ("2" if la / lb > 1 + delta else "E")
        total += c["darker_score"]
        wrong += c["darker_score"] * (label != c["darker"])
    return wrong / total


@pytest.mark.parametrize("delta", [0.1, 0.2])
def test_whdr_equals_a_ten_line_loop(delta):
    for _ in range(20):
        image = RNG.uniform(0, 1, (11, 17, 3)) ** 0.3
        want = whdr_loop(image, scene_points(), delta)
        assert metrics.whdr(image, scene_points(), delta) == pytest.approx(want)


def test_whdr_without_usable_judgements_is_none():
    judged = scene_points()
    judged["intrinsic_comparisons"] = judged["intrinsic_comparisons"][3:9]
    assert metrics.whdr(np.ones((4, 4, 3)), judged) is None


def test_whdr_of_the_fixture_photo():
    folder = DATA / "iiw_fixture"
    if not folder.is_dir():
        pytest.skip("shared data is absent")
    rgb = np.asarray(Image.open(folder / "63508.png")) / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    judged = json.loads((folder / "63508.json").read_text())
    assert metrics.whdr(linear, judged, 0.1) == pytest.approx(0.7122507122507123, abs=1e-12)


def test_whdr_from_gt_is_zero_for_a_scaled_map_and_counts_a_planted_error():
    gt = np.full((4, 4, 3), 0.5)
    gt[0] = 0.2
    pts = np.array([[[0, 0], [3, 3]], [[3, 3], [0, 1]], [[1, 1], [2, 2]], [[0, 0], [0, 3]]])
    assert metrics.whdr_from_gt(3 * gt, gt, pts) == 0
    assert metrics.whdr_from_gt(np.ones_like(gt), gt, pts) == 0.5
    pred = gt.copy()
    pred[1, 1] = 0.56                                            # ratio 1.12 at (1,1)-(2,2): "2", not "E"
    assert metrics.whdr_from_gt(pred, gt, pts) == 0.25 and metrics.whdr_from_gt(pred, gt, pts, 0.2) == 0


# MAW

@pytest.mark.parametrize("lab1, lab2, want", SHARMA)
def test_ciede2000_on_published_pairs(lab1, lab2, want):
    assert colour.ciede2000(lab1, lab2) == pytest.approx(want, abs=5e-5)
    assert colour.ciede2000(lab2, lab1) == pytest.approx(want, abs=5e-5)


def test_lab_of_white_gray_and_red():
    lab = colour.linear_to_lab([[1, 1, 1], [0, 0, 0], [0.2, 0.2, 0.2], [1, 0, 0]])
    assert np.allclose(lab[0], (100, 0, 0), atol=0.01) and np.allclose(lab[1], 0, atol=1e-6)
    assert np.allclose(lab[2, 1:], 0, atol=0.01)                                # the official matrix is rounded
    assert np.allclose(lab[3], (53.24, 80.09, 67.20), atol=0.03)    # published Lab (D65) of sRGB red


def test_adobe_matrix_is_that_of_the_primaries_but_for_the_official_rounding():
    def to_xyz(primaries):
        x, y = np.array(primaries).T
        m = np.stack([x / y, np.ones(3), (1 - x - y) / y])
        white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
        return m * np.linalg.solve(m, white)
    srgb, adobe = ([(0.64, 0.33), green, (0.15, 0.06)] for green in ((0.30, 0.60), (0.21, 0.71)))
    assert np.allclose(np.linalg.solve(to_xyz(srgb), to_xyz(adobe)), colour.ADOBE_TO_SRGB, atol=2e-4)


# intensity and chromaticity by the published evaluation's own formulas and the package it uses (colour-science 0.4.7)
OFFICIAL = [(0.04258900897576621, 15.538667338495127), (0.06353395671918319, 26.352035198804383),
            (0.09167172912691504, 24.23083606272464), (0.04779712249188254, 39.680338463459556)]


@pytest.mark.parametrize("seed", range(4))
def test_maw_is_the_published_evaluations(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(20, 256, (240, 320, 3)).astype(np.uint8)
    mask = rng.integers(0, 4, (24, 32)).astype(np.uint8).repeat(10, 0).repeat(10, 1)
    image = (image // 4 + rng.integers(0, 192, (4, 3))[mask]).astype(np.uint8)
    colors = rng.uniform(.02, .95, (3, 3))
    assert metrics.maw_intensity(image, mask, colors) == pytest.approx(OFFICIAL[seed][0], rel=1e-12)
    assert metrics.maw_chromaticity(image, mask, colors) == pytest.approx(OFFICIAL[seed][1], rel=1e-12)


@pytest.mark.parametrize("shape", [(480, 640), (333, 517), (100, 90), (240, 320)])
def test_maw_resize_is_pillows(shape):
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    mask = RNG.integers(0, 3, (24, 32), dtype=np.uint8).repeat(30, 0).repeat(25, 1)
    colors = np.array([[0.5, 0.4, 0.3], [0.1, 0.2, 0.3]])
    small = np.asarray(Image.fromarray(image).resize((320, 240), Image.BILINEAR))
    labels = np.asarray(Image.fromarray(mask).resize((320, 240), Image.NEAREST))
    for score in (metrics.maw_intensity, metrics.maw_chromaticity):
        # Pillow's 22-bit weights may round a pixel the other way: one level in a few of thousands of pixels
        assert score(image, mask, colors) == pytest.approx(score(small, labels, colors), rel=1e-4)


def maw_case():
    mask = np.zeros((240, 320), np.uint8)
    mask[:100], mask[150:] = 3, 7
    srgb = np.zeros((240, 320, 3), np.uint8)
    srgb[:100], srgb[150:] = (200, 120, 60), (90, 100, 110)
    s = srgb[[0, 200], 0] / 255
    colors = ((s + 0.055) / 1.055) ** 2.4 @ np.linalg.inv(colour.ADOBE_TO_SRGB).T
    return srgb, mask, colors


def test_maw_is_zero_for_a_prediction_equal_up_to_scale():
    srgb, mask, colors = maw_case()
    assert metrics.maw_intensity(srgb, mask, colors * 0.7) == pytest.approx(0, abs=1e-12)
    assert metrics.maw_chromaticity(srgb, mask, colors * [[0.9], [0.4]]) == pytest.approx(0, abs=1e-5)
    assert metrics.maw_intensity(srgb, mask, colors * [[0.9], [0.4]]) > 1e-4
    assert metrics.maw_chromaticity(srgb[..., ::-1], mask, colors) > 10


def test_maw_intensity_equals_its_formula():
    srgb, mask, _ = maw_case()
    colors = np.array([[0.3, 0.3, 0.3], [0.1, 0.1, 0.1]])
    s = srgb[[0, 200], 0] / 255
    m = (((s + 0.055) / 1.055) ** 2.4).mean(1)
    g, w = np.array([0.3, 0.1]), np.array([100, 90])
    theta = (w * m * g).sum() / (w * m * m).sum()
    want = (w * (theta * m - g) ** 2).sum() / w.sum()
    assert metrics.maw_intensity(srgb, mask, colors) == pytest.approx(want, rel=1e-4)    # gray to 1e-4: the rounding


# image scores

def test_lmse_equals_a_loop_and_forgives_one_scale_per_window():
    pred, gt, mask = RNG.random((20, 24)), RNG.random((20, 24)), RNG.random((20, 24)) > 0.2
    pred[:8, :8] = 1e-4                                          # sum p^2 <= 1e-5: scale 0
    top = bottom = 0.0
    for i in range(0, 20 - 8 + 1, 4):
        for j in range(0, 24 - 8 + 1, 4):
            p, g, m = (x[i:i + 8, j:j + 8] for x in (pred, gt, mask))
            a = (p * g * m).sum() / (p * p * m).sum() if (p * p * m).sum() > 1e-5 else 0
            top, bottom = top + (m * (g - a * p) ** 2).sum(), bottom + (m * g * g).sum()
    assert metrics.lmse(pred, gt, mask, 8, 4) == pytest.approx(top / bottom)
    assert metrics.lmse(2 * gt, gt, mask, 8, 4) == pytest.approx(0, abs=1e-12)
    rgb = RNG.random((20, 24, 3))
    assert metrics.lmse(0.3 * rgb, rgb, mask, 16, 8) == pytest.approx(0, abs=1e-12)


def test_si_mse_ignores_one_scale_and_equals_the_closed_form():
    p, g, mask = RNG.random((6, 5, 3)), RNG.random((6, 5, 3)), RNG.random((6, 5)) > 0.3
    assert metrics.si_mse(0.2 * g, g, mask) == pytest.approx(0, abs=1e-15)
    a, b = p[mask].ravel(), g[mask].ravel()
    want = ((b @ b) - (a @ b) ** 2 / (a @ a)) / len(a)
    assert metrics.si_mse(p, g, mask) == pytest.approx(want)
    assert metrics.si_mse(p.transpose(2, 0, 1), g.transpose(2, 0, 1), mask) == pytest.approx(want)
    assert metrics.si_mse(0 * p, g, mask) == pytest.approx((b @ b) / len(b))


@pytest.mark.parametrize("gt", [np.zeros((4, 5, 3)), np.full((4, 5, 3), 0.3), np.full((4, 5, 3), [0.1, 0.5, 0.9])])
def test_si_mse_of_a_constant_truth_is_no_score(gt):
    refused(lambda: metrics.si_mse(RNG.random((4, 5, 3)), gt, full((4, 5))), "everywhere", "one that varies")
    gt[0, 0] += 1
    assert metrics.si_mse(RNG.random((4, 5, 3)), gt, full((4, 5))) > 0
    mask = full((4, 5))
    mask[0, 0] = False                                                          # only valid pixels count
    refused(lambda: metrics.si_mse(gt, gt, mask), "everywhere")


def test_psnr_closed_form_and_mask():
    gt = np.full((4, 5, 3), 0.5)
    pred = gt + 0.1
    mask = full((4, 5))
    assert metrics.psnr(pred, gt, mask) == pytest.approx(20)
    pred[0, 0], mask[0, 0] = 9, False
    assert metrics.psnr(pred, gt, mask) == pytest.approx(20)
    assert metrics.psnr(gt, gt, mask) == float("inf")


def test_ssim_equals_a_direct_loop():
    x, y = RNG.random((14, 13)), RNG.random((14, 13))
    w = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    w = np.outer(w, w) / w.sum() ** 2
    scores = []
    for i in range(4):
        for j in range(3):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, c = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            under = (ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)
            scores.append((2 * ma * mb + 1e-4) * (2 * c + 9e-4) / under)
    assert metrics.ssim(x, y) == pytest.approx(np.mean(scores))
    assert metrics.ssim(x, x) == pytest.approx(1)
    rgb, other = np.stack([x, y, x]), np.stack([y, y, x])
    want = (np.mean(scores) + 2) / 3
    assert metrics.ssim(rgb, other) == pytest.approx(want)
    assert metrics.ssim(rgb.transpose(1, 2, 0), other.transpose(1, 2, 0)) == pytest.approx(want)


# geometry

def plane(normal, fx=50.0, fy=60.0, cx=15.5, cy=11.5, shape=(24, 32)):
    """Planar z of the plane n . X = -2 seen by a pinhole camera (x right, y up, z toward the viewer)."""
    v, u = np.mgrid[:shape[0], :shape[1]]
    ray = np.stack([(u - cx) / fx, (cy - v) / fy, -np.ones(shape)])
    return -2 / np.tensordot(normal, ray, 1)


@pytest.mark.parametrize("n", [(0, 0, 1), (0.3, 0, 1), (0, 0.3, 1), (-0.2, -0.4, 1)])
def test_normals_of_a_plane_are_exact_in_our_frame(n):
    n = np.array(n) / np.linalg.norm(n)
    depth = plane(n)
    assert (depth > 0).all()
    out = surface.valid_normals(depth, 50, 60, 15.5, 11.5)
    assert np.allclose(out[:, 1:-1, 1:-1], n[:, None, None])
    assert not out[:, 0].any() and not out[:, :, -1].any()
    normal = np.broadcast_to(n[:, None, None], out.shape)
    assert surface.depth_normal_consistency(depth, normal, 50, 60) == pytest.approx(0, abs=1e-7)
    assert surface.depth_normal_consistency(depth, -normal, 50, 60) == pytest.approx(2 / 3 ** 0.5)


def test_one_bad_depth_invalidates_five_pixels():
    depth = plane(np.array([0, 0, 1.0]))
    depth[10, 10], depth[5, 20] = np.nan, 0
    out = surface.valid_normals(depth, 50, 60, 15.5, 11.5)
    assert (~out[:, 1:-1, 1:-1].any(0)).sum() == 10


def test_derived_normals_agree_with_a_real_scene():
    folder = DATA / "hypersim_scenes"
    if not folder.is_dir():
        pytest.skip("shared data is absent")
    depth = np.asarray(Image.open(folder / "scene_001_depth.png")).astype(float)
    normal = np.asarray(Image.open(folder / "scene_001_normal.png")).transpose(2, 0, 1) / 127.5 - 1
    # the stored depth is affine: a few shifts are tried, and no flip of an axis may do better than our frame
    camera = 443.4, 591.2, 255.5, 255.5
    derived = [surface.valid_normals(depth / 65535 + t, *camera) for t in (0.3, 1, 2)]

    def median(flip):
        turned = normal * np.reshape(flip, (3, 1, 1))
        return min(np.nanmedian(metrics.normal_error(turned, d)) for d in derived)

    ours = median((1, 1, 1))
    assert all(ours < median(f) for f in ((-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, 1)))


def test_high_frequency_energy_of_a_ramp_is_zero_and_of_a_spike_is_known():
    ramp = np.add.outer(np.arange(6.0), 2 * np.arange(7))[None]
    assert metrics.high_frequency_energy(ramp) == pytest.approx(0, abs=1e-20)
    spike = np.zeros((1, 7, 7))
    spike[0, 3, 3] = 1
    assert metrics.high_frequency_energy(spike) == pytest.approx((16 + 4) / 25)


def test_bootstrap_covers_the_mean_and_pairs_remove_common_spread():
    a = RNG.normal(5, 3, 200)
    mean, low, high = intervals.bootstrap_interval(a, n=500)
    assert mean == pytest.approx(a.mean()) and low < mean < high
    # the normal interval is +-1.96 s / sqrt(N); 500 resamples give its ends to about 10 %
    assert (high - low) / (2 * 1.96 * a.std() / 200 ** 0.5) == pytest.approx(1, abs=0.2)
    assert intervals.bootstrap_interval(a, a + 1, n=100) == pytest.approx((1, 1, 1))
    assert intervals.bootstrap_interval(a, 0.9 * a, n=100, relative=True) == pytest.approx((-0.1, -0.1, -0.1))
    assert intervals.bootstrap_interval(a, n=50, seed=3) == intervals.bootstrap_interval(a, n=50, seed=3)


# refusals

ONES, RGB, BAD = np.ones((12, 12)), np.ones((12, 12, 3)), np.full((12, 12), np.nan)


@pytest.mark.parametrize("call", [metrics.align_depth, metrics.depth_metrics, metrics.si_mse, metrics.psnr])
def test_map_scores_refuse_empty_mask_non_finite_and_other_shapes(call):
    refused(lambda: call(ONES, ONES, np.zeros((12, 12), bool)), "empty mask")
    refused(lambda: call(BAD, ONES, full((12, 12))), "non-finite", "prediction")
    refused(lambda: call(ONES, BAD, full((12, 12))), "ground truth")
    refused(lambda: call(ONES, np.ones((12, 13)), full((12, 12))), "(12, 12)", "(12, 13)")
    refused(lambda: call(ONES, ONES, full((12, 13))), "mask", "(12, 13)")


@pytest.mark.parametrize("call, word", [
    (lambda: metrics.align_depth(ONES[None], ONES[None], full((1, 12, 12))), "(1, 12, 12)"),
    (lambda: metrics.align_depth(BAD, ONES, full((12, 12)), max_res=6), "non-finite"),
    (lambda: metrics.depth_metrics(ONES, 0 * ONES, full((12, 12))), "true depth 0"),
    (lambda: metrics.normal_error(ONES, ONES), "(3, H, W)"),
    (lambda: metrics.normal_error(np.ones((3, 4, 4)), np.zeros((3, 4, 4))), "no valid true normal"),
    (lambda: metrics.normal_error(np.ones((3, 4, 4)), np.full((3, 4, 4), np.nan)), "zero vector"),
    (lambda: metrics.whdr(np.ones((4, 4, 4)), scene_points()), "alpha"),
    (lambda: metrics.whdr(np.ones((4, 4, 3), np.uint16), scene_points()), "uint16"),
    (lambda: metrics.whdr(np.full((4, 4, 3), np.inf), scene_points()), "non-finite"),
    (lambda: metrics.whdr(RGB, {}), "intrinsic_points"),
    (lambda: metrics.whdr(RGB, [1, 2]), "intrinsic_points"),
    (lambda: metrics.whdr(RGB, 3), "another form"),
    (lambda: metrics.ssim(ONES, ONES, ONES.cumsum(0) > 2), "no window"),
    (lambda: metrics.whdr_from_gt(RGB, RGB, np.zeros((0, 2, 2), int)), "(0, 2, 2)"),
    (lambda: metrics.whdr_from_gt(RGB, RGB, np.full((1, 2, 2), 12)), "outside"),
    (lambda: metrics.whdr_from_gt(RGB, RGB, np.full((1, 2, 2), -1)), "outside"),
    (lambda: metrics.maw_intensity(RGB, ONES, np.ones((1, 3))), "float64"),
    (lambda: metrics.maw_chromaticity(RGB.astype(np.uint8), ONES, np.ones((2, 3))), "1 labels"),
    (lambda: metrics.maw_intensity(RGB.astype(np.uint8), 0 * ONES, np.ones((0, 3))), "0 labels"),
    (lambda: metrics.maw_intensity(RGB.astype(np.uint8), ONES, np.ones(3)), "colors (3,)"),
    (lambda: metrics.lmse(ONES, ONES, full((12, 12)), 20, 10), "window 20"),
    (lambda: metrics.lmse(ONES, 0 * ONES, full((12, 12)), 4, 2), "energy"),
    (lambda: metrics.ssim(np.ones((10, 10)), np.ones((10, 10))), "(1, 10, 10)"),
    (lambda: metrics.ssim(ONES, BAD), "ground truth"),
    (lambda: metrics.ssim(BAD, ONES), "non-finite"),
    (lambda: surface.valid_normals(ONES[None], 1, 1, 0, 0), "(1, 12, 12)"),
    (lambda: surface.valid_normals(ONES, 0, 1, 0, 0), "focal"),
    (lambda: surface.depth_normal_consistency(ONES, ONES, 1, 1), "normals (12, 12)"),
    (lambda: surface.depth_normal_consistency(0 * ONES, np.ones((3, 12, 12)), 1, 1), "five valid"),
    (lambda: metrics.high_frequency_energy(ONES), "(C, H, W)"),
    (lambda: intervals.bootstrap_interval([1.0, 2.0], [1.0]), "pair"),
    (lambda: intervals.bootstrap_interval([]), "(0,)"),
    (lambda: intervals.bootstrap_interval([1.0, -1.0], [1.0, 2.0], relative=True), "relative"),
])
def test_other_refusals(call, word):
    refused(call, word)


@pytest.mark.parametrize("change, word", [
    (lambda j: j["intrinsic_points"][0].update(x=1.0), "point 0"),
    (lambda j: j["intrinsic_points"][1].update(y=-0.1), "point 1"),
    (lambda j: j["intrinsic_comparisons"][0].update(point2=77), "77"),
    (lambda j: j["intrinsic_comparisons"][0].update(darker_score=float("inf")), "inf"),
    (lambda j: j["intrinsic_comparisons"][0].pop("darker_score"), "KeyError: 'darker_score'"),
    (lambda j: j["intrinsic_comparisons"][0].update(darker_score="0.5"), "another form"),
    (lambda j: j["intrinsic_points"][0].pop("opaque"), "KeyError: 'opaque'"),
    (lambda j: j["intrinsic_points"][0].update(x=None), "another form"),
    (lambda j: j["intrinsic_points"].append(3), "another form"),
    (lambda j: j.update(intrinsic_points=None), "another form"),
])
def test_whdr_refuses_bad_judgements(change, word):
    judged = scene_points()
    change(judged)
    refused(lambda: metrics.whdr(RGB, judged), word)
