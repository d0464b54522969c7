"""protocols.py: each task's score against a closed form or a slow loop, and what is refused or reported."""
import itertools
import json
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from official import bench_of
from PIL import Image

from evaluation import benchmark_table, metrics, protocols, surface
from evaluation.intervals import bootstrap_interval
from relations import srgb_decode

SHARED = Path(__file__).parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)


def depth_sample(H=40, W=50):
    depth = RNG.uniform(1, 9, (H, W)).astype(np.float32)
    mask = RNG.random((H, W)) < 0.7
    return dict(name="a.png", photos=[torch.rand(3, H, W)], depth=np.where(mask, depth, 0), mask=mask, size=(H, W))


# depth ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset", ["nyuv2", "kitti", "eth3d", "scannet", "diode"])
def test_a_prediction_that_is_affine_in_depth_is_perfect(dataset):
    sample = depth_sample()
    got = protocols.score_prediction(bench_of(dataset), [dict(depth=0.1 * sample["depth"] - 3)], sample)
    assert got["abs_rel"] < 1e-5 and got["delta1"] == 1 and got["scale"] == pytest.approx(10, rel=1e-4)


def test_the_prediction_is_clipped_to_the_range_after_the_fit_and_before_the_metric():
    sample = depth_sample()
    pred = sample["depth"] + RNG.normal(0, 0.5, sample["depth"].shape)
    pred[::7, ::7] -= 12
    bench = bench_of("diode")
    p, g = pred[sample["mask"]], sample["depth"][sample["mask"]].astype(float)
    s, t = np.polyfit(p, g, 1)
    fitted = np.clip(s * p + t, 0.6, 350)
    assert (s * p + t < 0.6).any()                                              # the clip acts
    got = protocols.score_prediction(bench, [dict(depth=pred)], sample)
    assert got["abs_rel"] == pytest.approx(np.mean(np.abs(fitted - g) / g), rel=1e-4)
    assert got["rmse"] == pytest.approx(np.sqrt(np.mean((fitted - g) ** 2)), rel=1e-4)
    assert got["delta1"] == pytest.approx(np.mean(np.maximum(fitted / g, g / fitted) < 1.25), abs=2 / g.size)


def test_only_eth3d_fits_on_a_subsampled_grid(monkeypatch):
    seen = []
    real = metrics.align_depth
    monkeypatch.setattr(metrics, "align_depth", lambda *a: seen.append(a[3]) or real(*a))
    for dataset in ("nyuv2", "kitti", "eth3d", "scannet", "diode"):
        sample = depth_sample()
        protocols.score_prediction(bench_of(dataset), [dict(depth=sample["depth"])], sample)
    assert seen == [None, None, 1024, None, None]


def test_inverse_depth_is_reported_with_the_first_file():
    bench, sample = bench_of("nyuv2"), depth_sample()
    rows = [protocols.score_prediction(bench, [dict(depth=d)], sample)
            for d in (sample["depth"], 1 / np.maximum(sample["depth"], 0.5))]
    lines = protocols.find_problems(bench, rows, ["good.png", "bad.png"])
    assert len(lines) == 1 and "1 of 2 fitted scales are negative" in lines[0] and "bad.png" in lines[0]
    flat = protocols.score_prediction(bench, [dict(depth=np.full(sample["depth"].shape, -0.5))], sample)
    assert protocols.find_problems(bench, [flat], ["flat.png"]) == []                # wrong, but not inverse depth
    assert protocols.find_problems(bench, rows[:1], ["good.png"]) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e31])
def test_a_prediction_that_is_not_finite_is_refused_with_the_image(value):
    sample = depth_sample()
    pred = sample["depth"].copy()
    pred[3, 4] = value
    with pytest.raises(ValueError, match="a.png: got 1 values in the predicted depth that are non-finite or"):
        protocols.score_prediction(bench_of("nyuv2"), [dict(depth=pred)], sample)


def test_a_prediction_of_another_size_is_refused():
    with pytest.raises(ValueError, match="a.png: got a predicted depth of 8 x 8 pixels, want 50 x 40; resize"):
        protocols.score_prediction(bench_of("nyuv2"), [dict(depth=np.ones((8, 8)))], depth_sample())
    with pytest.raises(ValueError, match="crop it: the last 352 rows, the centre 1216 columns"):
        protocols.score_prediction(bench_of("kitti"), [dict(depth=np.ones((375, 1242)))], depth_sample(352, 1216))


def test_an_empty_mask_is_refused_with_the_image():
    sample = depth_sample()
    sample["mask"][:] = False
    with pytest.raises(ValueError, match="a.png: .*empty mask"):
        protocols.score_prediction(bench_of("nyuv2"), [dict(depth=sample["depth"])], sample)


# normals ----------------------------------------------------------------------------------------------------------

def unit(*shape):
    n = RNG.normal(size=(3, *shape)) + [[[0.4]], [[0.8]], [[1.5]]]
    return n / np.linalg.norm(n, axis=0)


def normal_sample(hole=True):
    normal = unit(20, 30)
    normal[:, :5] *= not hole
    return dict(name="n.png", photos=[torch.rand(3, 20, 30)], normal=normal, size=(20, 30))


def test_angles_are_averaged_over_valid_pixels_with_strict_thresholds():
    sample = normal_sample()
    turn = np.radians(20)
    pred = np.where(sample["normal"].any(0), sample["normal"], 1.0)
    side = np.cross(pred, [[[0.0]], [[1.0]], [[0.0]]], axis=0)
    side /= np.linalg.norm(side, axis=0)
    pred = np.cos(turn) * pred + np.sin(turn) * side                            # 20 degrees everywhere
    got = protocols.score_prediction(bench_of("nyuv2", "normal"), [dict(normal=3 * pred)], sample)
    assert got["mean"] == pytest.approx(20, abs=1e-5) and got["pixels"] == 15 * 30
    assert (got["within_11.25"], got["within_22.5"], got["within_30"]) == (0, 1, 1)


def test_the_pooled_mean_weighs_images_by_their_pixels():
    bench = bench_of("nyuv2", "normal")
    rows = [dict(mean=10.0, pixels=300, axes=None, median=1.0, within_30=1.0),
            dict(mean=40.0, pixels=100, axes=None, median=1.0, within_30=1.0)]
    values, weights = protocols.metric_values(bench, rows), protocols.image_weights("pooled", rows)
    assert values["mean"].mean() == 25 and np.average(values["pooled"], weights=weights) == 17.5
    assert bootstrap_interval(values["pooled"], weights=weights)[0] == 17.5
    assert bootstrap_interval(np.full(2, 10.0), weights=weights) == (10, 10, 10)    # no spread, unequal images
    assert (protocols.image_weights("mean", rows) == 1).all()


@pytest.mark.parametrize("signs", surface.AXES)
def test_the_best_of_the_eight_sign_choices_is_found(signs):
    sample, bench = normal_sample(), bench_of("nyuv2", "normal")
    pred = np.where(sample["normal"].any(0), sample["normal"], 1.0) * np.reshape(signs, (3, 1, 1))
    rows = [protocols.score_prediction(bench, [dict(normal=pred)], sample)]
    axes = protocols.mean_axes(rows)
    assert min(axes, key=axes.get) == signs and axes[signs] < 1e-4
    assert axes[1, 1, 1] == pytest.approx(rows[0]["mean"], abs=2)               # a subsample of the same pixels
    lines = protocols.find_problems(bench, rows, ["n.png"])
    x, y, z = ("-" if s < 0 else "+" for s in signs)
    assert lines == [] if signs == (1, 1, 1) else f"normal axes: ({x}x, {y}y, {z}z) fits the ground truth" in lines[0]


def test_a_flip_that_is_better_by_a_degree_over_the_set_is_reported():
    axes = dict.fromkeys(surface.AXES, 40.0)
    row = {(1, 1, 1): 20.0, (-1, 1, 1): 19.0}
    rows = [dict(axes=[{**axes, **row}[a] for a in surface.AXES])]
    line, = protocols.find_problems(bench_of("nyuv2", "normal"), rows, ["n.png"])
    assert "(-x, +y, +z) fits the ground truth at 19.0" in line and "either may be the wrong one" in line
    row[-1, 1, 1] = 19.7                                                        # as good: says nothing
    rows = [dict(axes=[{**axes, **row}[a] for a in surface.AXES])]
    assert protocols.find_problems(bench_of("nyuv2", "normal"), rows, ["n.png"]) == []


# albedo -----------------------------------------------------------------------------------------------------------

def test_whdr_of_the_iiw_fixture_is_the_known_number():
    folder = SHARED / "iiw_fixture"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    rgb = torch.from_numpy(np.asarray(Image.open(folder / "63508.png").convert("RGB")) / 255.0).permute(2, 0, 1)
    sample = dict(name="63508.png", photos=[rgb], size=rgb.shape[1:],
                  judgements=json.loads((folder / "63508.json").read_text()))
    got = protocols.score_prediction(bench_of("iiw"), [dict(albedo=srgb_decode(rgb).numpy())], sample)
    assert got["whdr10_linear"] == pytest.approx(0.7122507122507123, abs=1e-12)
    assert set(got) == {f"whdr{d}_{s}" for d in (10, 20) for s in ("linear", "srgb")}


def iiw_sample(l1, l2, darker, **change):
    """Two points on a two-pixel albedo and one judgement."""
    points = [dict(id=1, x=0.1, y=0.5, opaque=True), dict(id=2, x=0.9, y=0.5, opaque=True)]
    row = dict(point1=1, point2=2, darker=darker, darker_score=1.0)
    points[1].update({k: v for k, v in change.items() if k in ("x", "y", "id", "opaque")})
    row.update({k: v for k, v in change.items() if k in row})
    albedo = np.broadcast_to(np.array([l1, l2])[None, None], (3, 2, 2))
    return albedo, dict(name="i.png", photos=[torch.zeros(3, 2, 2)], size=(2, 2),
                        judgements=dict(intrinsic_points=points, intrinsic_comparisons=[row]))


def whdr_of(*args, **change):
    albedo, sample = iiw_sample(*args, **change)
    return protocols.score_prediction(bench_of("iiw"), [dict(albedo=albedo)], sample)


def test_the_colour_space_decides_near_the_threshold():
    got = whdr_of(0.5, 0.59, "1")                                               # 18 % in linear, 8 % encoded
    assert (got["whdr10_linear"], got["whdr20_linear"]) == (0, 1)
    assert (got["whdr10_srgb"], got["whdr20_srgb"]) == (1, 1)


@pytest.mark.parametrize("darker, change", [
    ("2", dict(darker_score=None)), ("2", dict(darker_score=0)), ("2", dict(opaque=None)), (None, {})])
def test_an_image_whose_judgements_do_not_count_has_no_number_and_leaves_the_mean(darker, change):
    rows = [whdr_of(0.5, 0.9, "1"), whdr_of(0.5, 0.9, darker, **change)]
    assert rows[1]["whdr10_linear"] is None
    values = protocols.metric_values(bench_of("iiw"), rows)["whdr10_linear"]
    assert values[0] == 0 and np.isnan(values[1])


@pytest.mark.parametrize("change, word", [
    (dict(x=1.0), r"x 1.0, .*want \[0, 1\)"), (dict(y=1.2), "y 1.2"), (dict(id=3), "unknown point2 id 2")])
def test_bad_judgements_are_refused_with_the_image(change, word):
    with pytest.raises(ValueError, match=f"i.png: .*{word}"):
        whdr_of(0.5, 0.9, "1", **change)


def test_maw_of_the_measured_colours_is_zero_and_one_scale_is_free(tmp_path):
    image, labels, colours = official.patches()
    sample = dict(name="m.png", photos=[torch.zeros(3, 240, 320)], size=(240, 320), labels=labels, colors=colours)
    albedo = official.linear(image.transpose(2, 0, 1) / 255)
    got = protocols.score_prediction(bench_of("maw"), [dict(albedo=albedo)], sample)
    half = protocols.score_prediction(bench_of("maw"), [dict(albedo=0.5 * albedo)], sample)
    assert got["intensity"] < 1e-10 and got["chromaticity"] < 1e-4
    assert half["intensity"] < 1e-5                                             # 8-bit rounding of the darker map
    shuffled = protocols.score_prediction(bench_of("maw"), [dict(albedo=albedo[::-1])], sample)
    assert shuffled["chromaticity"] > 3


def test_maw_labels_that_do_not_match_the_colours_are_refused():
    image, labels, colours = official.patches()
    sample = dict(name="m.png", photos=[torch.zeros(3, 240, 320)], size=(240, 320), labels=labels, colors=colours[:2])
    with pytest.raises(ValueError, match="m.png: .*3 labels, 3 after the resize, 2 colours"):
        pred = dict(albedo=official.linear(image.transpose(2, 0, 1) / 255))
        protocols.score_prediction(bench_of("maw"), [pred], sample)


def test_lmse_is_half_reflectance_half_shading_in_gray_windows_of_20():
    mask = RNG.random((43, 51)) < 0.8
    truth = {m: RNG.random((3, 43, 51)) for m in ("albedo", "shading")}
    pred = dict(albedo=RNG.random((3, 43, 51)), irradiance=RNG.random((3, 43, 51)))
    sample = dict(name="x", photos=[torch.zeros(3, 43, 51)], size=(43, 51), mask=mask, **truth)
    got = protocols.score_prediction(bench_of("mit"), [pred], sample)
    want = []
    for m, p in (("albedo", "albedo"), ("shading", "irradiance")):
        residual = energy = 0.0
        for i, j in itertools.product(range(0, 24, 10), range(0, 32, 10)):
            ok = mask[i:i + 20, j:j + 20]
            a, b = pred[p].mean(0)[i:i + 20, j:j + 20][ok], truth[m].mean(0)[i:i + 20, j:j + 20][ok]
            residual += ((b - (a @ b) / (a @ a) * a) ** 2).sum()
            energy += b @ b
        want.append(residual / energy)
    assert got["lmse_albedo"] == pytest.approx(want[0]) and got["lmse_shading"] == pytest.approx(want[1])
    assert got["lmse"] == pytest.approx(sum(want) / 2)


def test_consistency_is_zero_for_scaled_copies_and_one_for_albedos_without_overlap():
    mask = np.ones((4, 6), bool)
    one = RNG.random((3, 4, 6))
    assert protocols.disagreement([one, 0.2 * one, 5 * one], mask) < 1e-12
    left, right = np.zeros((2, 3, 4, 6))
    left[..., :3], right[..., 3:] = 1, 1
    assert protocols.disagreement([left, right], mask) == 1
    assert protocols.disagreement([left, right, left], mask) == pytest.approx(2 / 3)
    mask[:, 3:] = False
    assert protocols.disagreement([left + right, left], mask) < 1e-12            # only the mask counts


# maps -------------------------------------------------------------------------------------------------------------

def iid_sample():
    truth = {m: RNG.random((3, 24, 28)) for m in ("albedo", "shading", "residual")}
    masks = {f"{m}_mask": RNG.random((3, 24, 28)) < 0.9 for m in truth}
    return dict(name="h", photos=[torch.zeros(3, 24, 28)], size=(24, 28), **truth, **masks)


def test_iid_scores_follow_their_formulas():
    sample = iid_sample()
    pred = dict(albedo=RNG.random((3, 24, 28)), irradiance=RNG.random((3, 24, 28)), residual=RNG.random((3, 24, 28)))
    got = protocols.score_prediction(bench_of("hypersim"), [pred], sample)
    ok = sample["albedo_mask"]
    mse = np.mean((pred["albedo"][ok] ** (1 / 2.2) - sample["albedo"][ok] ** (1 / 2.2)) ** 2)
    assert got["albedo_psnr"] == pytest.approx(-10 * np.log10(mse))
    p, g, ok = pred["irradiance"], sample["shading"], sample["shading_mask"]
    scale = (p[ok] * g[ok]).sum() / (p[ok] ** 2).sum()
    bright = (0.3 * g[0] + 0.59 * g[1] + 0.11 * g[2])[ok[0]]
    stretch = 0.8 / np.quantile(bright, 0.9)
    p, g = np.clip(stretch * scale * p, 0, 1), np.clip(stretch * g, 0, 1)
    assert got["shading_psnr"] == pytest.approx(-10 * np.log10(np.mean((p[ok] - g[ok]) ** 2)))
    assert got["shading_ssim"] == pytest.approx(metrics.ssim(p * ok, g * ok))
    scaled = protocols.score_prediction(bench_of("hypersim"), [dict(pred, irradiance=7 * pred["irradiance"])], sample)
    assert scaled["shading_psnr"] == pytest.approx(got["shading_psnr"])
    assert scaled["albedo_psnr"] == got["albedo_psnr"]


def test_a_black_truth_of_a_fitted_map_gives_no_number():
    sample = iid_sample()
    pred = {m: RNG.random((3, 24, 28)) for m in ("albedo", "irradiance")}
    sample = dict(sample, shading=0 * sample["shading"])
    got = protocols.score_prediction(bench_of("hypersim"), [pred], sample)
    assert got["shading_psnr"] is None and got["shading_ssim"] is None and np.isfinite(got["albedo_psnr"])


def test_a_map_that_is_not_predicted_is_not_scored():
    got = protocols.score_prediction(bench_of("hypersim"), [dict(albedo=RNG.random((3, 24, 28)))], iid_sample())
    assert set(got) == {"albedo_psnr", "albedo_ssim"}


def test_depth_and_normals_of_one_plane_agree_at_the_declared_camera():
    H, W = 30, 40
    n = np.array([0.2, 0.3, 0.93])
    n /= np.linalg.norm(n)
    x, y = (np.arange(W) - (W - 1) / 2) / W, ((H - 1) / 2 - np.arange(H)[:, None]) / W
    z = 1.6 / (n[2] - n[0] * x - n[1] * y)
    sample = dict(name="p", photos=[torch.zeros(3, H, W)], size=(H, W))
    normal = np.broadcast_to(n[:, None, None], (3, H, W))
    good = protocols.score_prediction(bench_of("photos"), [dict(depth=(z - 1) / 2, normal=normal)], sample)
    other = normal * [[[-1]], [[1]], [[1]]]
    bad = protocols.score_prediction(bench_of("photos"), [dict(depth=(z - 1) / 2, normal=other)], sample)
    assert good["rmse"] < 1e-6 and good["ssim"] > 0.999 and bad["rmse"] == pytest.approx(2 * n[0] / 3 ** 0.5, rel=1e-3)


def test_depth_that_gives_no_normal_does_not_count_as_agreement():
    rng, (H, W) = np.random.default_rng(0), (40, 60)
    normal = rng.normal(size=(3, H, W))
    sample = dict(name="p", photos=[torch.zeros(3, H, W)], size=(H, W))
    depth = 0.5 + 0.01 * rng.random((H, W))
    whole = protocols.score_prediction(bench_of("photos"), [dict(depth=depth, normal=normal)], sample)
    depth[:, 20:] = -5
    part = protocols.score_prediction(bench_of("photos"), [dict(depth=depth, normal=normal)], sample)
    assert whole["valid"] == 1 and part["valid"] == pytest.approx(18 / 58)
    assert abs(part["ssim"]) < 0.1 and abs(whole["ssim"]) < 0.1                 # was 0.7: equal constants on both sides
    lines = protocols.find_problems(bench_of("photos"), [whole, part], ["a", "b"])
    assert len(lines) == 1 and "1 of 2" in lines[0] and "first: b, 31.0 %" in lines[0]
    depth[:, 5:] = -5
    with pytest.raises(ValueError, match="p: .*no window"):
        protocols.score_prediction(bench_of("photos"), [dict(depth=depth, normal=normal)], sample)


def test_the_error_picture_is_bright_at_zero_dark_at_the_top_and_gray_without_truth():
    error = np.array([[0.0, 0.5], [1.0, np.nan]])
    got = protocols._error_picture(np.kron(error, np.ones((4, 4))), 0.5)
    light = got.mean(0)[[0, 0, 4], [0, 4, 0]]
    assert light[0] > 0.8 and light[1] < 0.3 and light[2] == light[1]           # the scale ends at the top
    assert (got[:, 4:, 4:8] == 0.5).all()
    bar = got.mean(0)[:, -1]
    assert got.shape == (3, 8, 8 + 2 + 4) and bar[0] == light[1] and bar[-1] == light[0]


def test_the_papers_numbers_belong_to_metrics_that_exist():
    tasks = {(b.dataset, b.task) for b in benchmark_table.BENCHMARKS}
    for key, rows in protocols.PAPER.items():
        assert key in tasks and set(rows) <= set(protocols.MEASURES[key[1]])
    assert protocols.PAPER["eth3d", "depth"]["abs_rel"] == [("PRISM", .142, .077)]
    assert protocols.PAPER["iiw", "whdr"]["whdr20_srgb"] == [("PRISM", 15.9, 11.9), ("Marigold", 14.8, 14.0)]
    assert protocols.PAPER["nyuv2", "normal"]["mean"] == [("PRISM", 16.1, 15.7)]
