"""alignment.py and eval.py --align: the three fits against plain numpy, what is printed, what is refused."""
import dataclasses
import json

import numpy as np
import official
import pytest
import tiny_depth
import torch
from official import bench_of
from test_predictions import numbers, refusal, rewrite

import eval as evaluation
from evaluation import alignment, benchmarks, predictions, protocols
from evaluation.benchmark_table import ALIGNMENTS, align_benchmark
from models.dit import DiT, DiTConfig
from models.wrapper import wrap
from predictor import load_predictor, predict_photo

CLOSE = dict(rel=2e-5, abs=2e-6)  # maps are float32
RNG = np.random.default_rng(0)


def scene(shape=(40, 50), low=0.7, high=20.0):
    """A sample whose depth is log-uniform in low .. high metres, a tenth of it invalid."""
    depth = np.exp(RNG.uniform(np.log(low), np.log(high), shape)).astype(np.float32)
    mask = RNG.random(shape) > 0.1
    depth[~mask] = 0
    return dict(name="a.png", photos=[np.zeros((3, *shape), np.float32)], depth=depth, mask=mask, size=shape)


def inverse(depth):
    return 1 / np.where(depth > 0, depth, 1)


def score(align, pred, sample, means=None, dataset="diode", **changes):
    bench = dataclasses.replace(align_benchmark(bench_of(dataset, "depth"), align), **changes)
    sample = sample | (dict(means=means) if means else {})
    return protocols.score_prediction(bench, [dict(depth=np.asarray(pred, np.float32))], sample)


def errors(fitted, sample):
    """AbsRel, RMSE, delta1 as their definitions read."""
    p, g = fitted[sample["mask"]].astype(float), sample["depth"][sample["mask"]].astype(float)
    return dict(abs_rel=np.mean(abs(p - g) / g), rmse=np.sqrt(np.mean((p - g) ** 2)),
                delta1=np.mean(np.maximum(p / g, g / p) < 1.25))


def marigold_disparity(disparity, sample, low, high):
    """Marigold's evaluation of a disparity, written from its description."""
    depth, mask = sample["depth"].astype(float), sample["mask"]
    ok = mask & (disparity > 0)
    design = np.stack([disparity[ok], np.ones(ok.sum())], 1)
    (s, t), *_ = np.linalg.lstsq(design, 1 / depth[ok], rcond=None)
    found = 1 / np.maximum(s * disparity + t, 1e-3)
    return np.maximum(np.clip(found, low, high), 1e-6)


# the fits ---------------------------------------------------------------------------------------------------------

def test_an_affine_disparity_is_recovered_exactly_and_the_depth_fit_does_not():
    sample = scene()
    disparity = 3 * inverse(sample["depth"]) + 0.5
    got = score("disparity", -disparity, sample, "disparity")
    assert got["abs_rel"] == pytest.approx(0, abs=2e-6) and got["scale"] == pytest.approx(1 / 3, rel=1e-4)
    assert got["align"] == "disparity" and got["delta1"] == 1
    assert score("depth", -disparity, sample, "disparity")["abs_rel"] > 0.1


def test_a_noisy_disparity_gets_the_numbers_of_marigolds_evaluation():
    sample = scene()
    disparity = inverse(sample["depth"]) - 0.1 + 0.03 * RNG.standard_normal(sample["size"])
    assert (disparity[sample["mask"]] < 0).any()                                # left out of the fit, not of the score
    want = errors(marigold_disparity(disparity, sample, 0.6, 350), sample)
    got = score("disparity", -disparity, sample, "disparity")
    assert {k: got[k] for k in want} == pytest.approx(want, **CLOSE)


@pytest.mark.parametrize("dataset, low, high", [("diode", 0.6, 350), ("nyuv2", 1e-3, 10), ("eth3d", 1e-5, np.inf)])
def test_the_result_is_clipped_to_the_range_of_the_data_set(dataset, low, high):
    sample = scene(low=2, high=9)
    disparity = inverse(sample["depth"])
    disparity[0, :4] = 50, 80, -5, -9                                           # too close; behind the floor of 1e-3
    sample["mask"][0, :4] = False
    bench = align_benchmark(bench_of(dataset, "depth"), "disparity")
    fitted, _ = alignment.fit_depth(bench, -disparity.astype(np.float32), sample | dict(means="disparity"))
    np.testing.assert_allclose(fitted[0, :4], np.clip([1 / 50, 1 / 80, 1000, 1000], low, high), rtol=1e-4)


def test_on_eth3d_the_disparity_is_fitted_on_the_columns_of_nearest_downsampling():
    sample = scene((12, 70))
    disparity = inverse(sample["depth"]) + 0.05 * RNG.standard_normal(sample["size"])
    small = torch.nn.Upsample(scale_factor=32 / 70, mode="nearest")
    d, g, m = (small(torch.tensor(np.asarray(x, np.float64))[None])[0].numpy()
               for x in (disparity, sample["depth"], sample["mask"]))
    assert d.shape == (12, 32)
    ok = (m > 0) & (d > 0)
    s, t = np.polyfit(d[ok], 1 / g[ok], 1)
    want = errors(np.clip(1 / np.maximum(s * disparity + t, 1e-3), 1e-5, None), sample)
    got = score("disparity", -disparity, sample, "disparity", "eth3d", max_res=32)
    assert {k: got[k] for k in want} == pytest.approx(want, **CLOSE)
    assert score("disparity", -disparity, sample, "disparity", "eth3d", max_res=0)["abs_rel"] != got["abs_rel"]


def test_ransac_in_log_depth_ignores_three_outliers_in_ten():
    sample = scene((100, 120))
    log = 0.2 * np.log(np.where(sample["mask"], sample["depth"], 1)) + 3
    wrong = RNG.random(log.shape) < 0.3
    pred = np.where(wrong, RNG.uniform(8, 12, log.shape), log)
    bench = align_benchmark(bench_of("diode"), "log-ransac")
    fitted, scale = alignment.fit_depth(bench, pred.astype(np.float32), sample)
    good = sample["mask"] & ~wrong
    np.testing.assert_allclose(fitted[good], sample["depth"][good], rtol=2e-5)
    assert scale == pytest.approx(5, rel=1e-5)
    again, _ = alignment.fit_depth(bench, pred.astype(np.float32), sample)
    assert np.array_equal(fitted, again)
    s, t = np.polyfit(pred[sample["mask"]], np.log(sample["depth"][sample["mask"]]), 1)
    assert np.abs(np.exp(s * pred + t)[good] / sample["depth"][good] - 1).mean() > 0.3      # least squares does not


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("means, make", [("metres", lambda g: 1.7 * g), ("inverse depth", lambda g: -0.4 / g)])
def test_metres_and_inverse_depth_are_exact_in_the_spaces_that_know_them(align, means, make):
    sample = scene()
    got = score(align, make(np.where(sample["mask"], sample["depth"], 1)), sample, means)
    exact = align != "depth" or means == "metres"
    assert (got["abs_rel"] < 2e-5) == exact and (got["scale"] > 0)


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_a_constant_map_is_scored_and_is_not_called_the_other_way_round(align):
    got = score(align, np.full((40, 50), -0.5), scene(), "disparity")
    assert got["scale"] >= 0 and np.isfinite(got["abs_rel"])


def test_a_disparity_that_is_nowhere_positive_is_refused():
    with pytest.raises(ValueError, match="a.png: --align disparity failed: got no predicted value above 0"):
        score("disparity", np.ones((40, 50)), scene(), "disparity")


# networks ---------------------------------------------------------------------------------------------------------

def test_a_network_of_disparities_is_fitted_in_its_own_disparity(tmp_path):
    bench, path = align_benchmark(bench_of("diode"), "disparity"), tiny_depth.folder("anything")
    item, = official.make(bench, tmp_path, 1)
    files, _, _ = benchmarks.find_data(bench, tmp_path)
    source = predictions.network_source(path, evaluation.arguments("--dataset diode --processing-res 56".split()))
    sample = source.read(bench, files, item)
    got = protocols.score_prediction(bench, source.predict(bench, sample), sample)
    with torch.no_grad():
        disparity = -predict_photo(load_predictor(str(path)), sample["photos"][0], 56)["depth"]
    assert sample["means"] == "disparity" and (disparity > 0).float().mean() > 0.5
    disparity = torch.nn.functional.interpolate(disparity[None], (64, 64), mode="bilinear")[0, 0].numpy().astype(float)
    want = errors(marigold_disparity(disparity, sample, 0.6, 350), sample)
    assert {k: got[k] for k in want} == pytest.approx(want, rel=1e-4)


class Own(torch.nn.Module):
    modalities, size = ("depth",), 16

    def predict(self, rgb, modality):
        return rgb[:, :1]


def test_a_class_of_the_users_says_what_its_depth_means():
    network = Own()
    network.net = torch.nn.Linear(1, 1)
    assert wrap(network, "my:Own").depth_means == "depth up to scale"
    network.depth_means = "disparity"
    assert wrap(network, "my:Own").depth_means == "disparity"
    network.depth_means = "mm"
    with pytest.raises(ValueError, match="got depth_means 'mm'; want one of disparity, inverse depth"):
        wrap(network, "my:Own")


# the command ------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """Data of NYUv2, saved disparities, and the flags of the command."""
    bench = bench_of("nyuv2")
    items = official.make(bench, tmp_path / "data", 3)
    official.answer(bench, tmp_path / "maps", items)
    for i, item in enumerate(items):
        name = predictions.prediction_file(bench, benchmarks.formats.Files(tmp_path / "maps"), item["rgb"], "depth")
        depth = official.depth_of(bench, i)
        np.save(tmp_path / "maps" / name, np.where(depth > 0, 5 * inverse(depth) + 1, 0).astype(np.float32))
    return ["--dataset", "nyuv2", "--data", tmp_path / "data", "--out", tmp_path / "out", "--limit", 3, "--pred-dir",
            tmp_path / "maps"]


def test_a_folder_of_disparities_is_scored_and_every_number_says_how(folder, tmp_path, capsys):
    got = numbers(tmp_path, *folder, "--align", "disparity", "--panels", 1)
    out = capsys.readouterr().out
    assert got["align"] == "disparity" and got["warnings"] == [] and "least squares in disparity" in got["protocol"]
    assert got["metrics"]["abs_rel"]["value"] == pytest.approx(0, abs=1e-5)
    for name, row in got["metrics"].items():
        assert row["align"] == "disparity" and row["paper"] == []               # the paper's are aligned in depth
        assert f"{protocols.MEASURES['depth'][name][0]}, aligned in disparity" in out
    assert "nyuv2, depth, aligned in disparity\n" in out and ", disparities\n" in out and "PRISM" not in out
    line = refusal(capsys, *folder)
    assert "3 of 3 fitted scales are negative" in line and "--align disparity" in line


def test_a_folder_of_depths_is_refused_as_disparities(folder, tmp_path, capsys):
    for path in (tmp_path / "maps").rglob("*.npy"):
        rewrite(0, lambda x: 1 / np.maximum(x, 0.1))(0, path)
    line = refusal(capsys, *folder, "--align", "disparity")
    assert "looks like depth, not disparity" in line and "--align depth" in line


def test_two_alignments_never_meet(folder, tmp_path, capsys):
    DiT(DiTConfig(size=16, width=32, encoder_layers=1, layers=1, heads=2)).save(tmp_path / "base")
    line = refusal(capsys, *folder, "--align", "disparity", "--compare", tmp_path / "base")
    assert "depth up to scale and shift, which --align disparity cannot fit" in line
    assert "got --dataset nyuv2, task normal; want a benchmark of depth" in refusal(
        capsys, *folder, "--align", "disparity", "--task", "normal")
    assert "belongs to a benchmark of depth" in refusal(capsys, "--dataset", "wild", "--align", "disparity")
    numbers(tmp_path, *folder, "--align", "disparity")
    path, = (tmp_path / "out" / "eval").glob("*.jsonl")
    rows = [json.loads(line) | dict(align="depth") for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refusal(capsys, *folder, "--align", "disparity")
    assert f"{path}: got numbers of --align depth, want disparity; remove the file" in line


def test_each_alignment_has_results_of_its_own(folder, tmp_path):
    bench = bench_of("nyuv2")
    files, items, _ = benchmarks.find_data(bench, tmp_path / "data")
    source = predictions.saved_source(tmp_path / "maps", evaluation.arguments(["--dataset", "nyuv2"]))
    paths = {predictions.results_file(align_benchmark(bench, a), source, files, items[:3], tmp_path)
             for a in ALIGNMENTS}
    assert len(paths) == len(ALIGNMENTS)
