"""eval.py: pairs, scores of perfect and damaged maps, verdicts, heuristics, the command."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from data.pools import ScenePool, scene_batch
from data.questions import true_relations
from evaluation.report import compare_scores
from evaluation.scores import (
    HEURISTICS,
    METRICS,
    PAIRS,
    eval_pairs,
    judge_answers,
    judge_scores,
    predict_maps,
    score_maps,
)
from evaluation.watch import diagnose, drift
from relations import NAMES
from runtime.command import run_command

DATA = Path(__file__).parents[2] / "shared" / "data" / "hypersim_scenes"
QUICK = ["--images", "4", "--size", "16", "--denoise-steps", "1"]
BETTER = {name: row[-1] for name, row in METRICS.items()}


@pytest.fixture(scope="module")
def maps():
    return ScenePool("wild", "test", 6, 32).all()


@pytest.fixture(scope="module")
def pairs(maps):
    return eval_pairs(maps, 40, 1, 0)


def perfect(maps):
    """The true maps as a prediction: the sky, which has no depth, as far as the farthest surface."""
    pred = {m: maps[m].clone() for m in NAMES}
    far = maps["depth"].masked_fill(~maps["mask"], 0).amax((1, 2, 3), keepdim=True)
    pred["depth"] = torch.where(maps["mask"], maps["depth"], far)
    return pred


def noisy(maps, amount):
    rng = torch.Generator().manual_seed(0)
    out = {}
    for m, x in perfect(maps).items():
        spread = x.std() if m == "depth" else 1.0
        x = x + amount * spread * torch.randn(x.shape, generator=rng)
        out[m] = x if m in ("depth", "normal") else x.clamp(0, 1)
    return out


# pairs ------------------------------------------------------------------------------------------------------------

def test_pairs_are_deterministic_and_depend_on_the_seed(maps, pairs):
    again, other = eval_pairs(maps, 40, 1, 0), eval_pairs(maps, 40, 1, 1)
    for m in NAMES:
        assert all(torch.equal(a, b) for a, b in zip(pairs[m], again[m], strict=True))
        assert not torch.equal(pairs[m][0], other[m][0])


@pytest.mark.parametrize("m", NAMES)
@pytest.mark.parametrize("grid", [1, 4])
def test_the_truth_of_every_pair_is_its_relation_at_valid_pixels(maps, m, grid):
    pts, truth = eval_pairs(maps, 40, grid, 0)[m]
    assert pts.shape == (6, 40, 2, 2) and truth.shape == (6, 40) and (truth != 0).any(1).all()
    known = truth != 0
    want = true_relations(maps, pts)[..., NAMES.index(m)]
    assert torch.equal(truth[known], want[known])
    row, col = pts[known].unbind(-1)
    image = known.nonzero()[:, :1].expand(-1, 2)
    assert maps["mask"][image, 0, row, col].all() and (pts[known] % grid == grid // 2).all()


def test_albedo_pairs_are_at_most_half_same_and_half_different(pairs):
    truth = pairs["albedo"][1]
    assert ((truth > 0).sum(1) <= 20).all() and ((truth < 0).sum(1) <= 20).all()
    assert ((truth > 0).sum(1) == 20).any() and ((truth < 0).sum(1) == 20).any()


def test_a_pair_is_scored_once(pairs):
    for m in NAMES:
        pts, truth = pairs[m]
        for i in range(len(pts)):
            known = truth[i] != 0
            assert known[:known.sum()].all()                                    # known pairs stand first, in draw order


# scores -----------------------------------------------------------------------------------------------------------

def test_perfect_maps_score_perfectly(maps, pairs):
    got = score_maps(perfect(maps), maps, pairs)
    assert list(got) == list(METRICS) and all(v.shape == (6,) for v in got.values())
    for name, v in got.items():
        want = 1.0 if name.endswith("pairs") or name == "depth/delta1" else 0.0
        atol = 0.05 if name == "normal/angle" else 1e-6                         # degrees; maps are kept in fp16
        np.testing.assert_allclose(v, want, atol=atol, err_msg=name)


def test_the_more_noise_the_worse(maps, pairs):
    means = [{k: np.nanmean(v) for k, v in score_maps(noisy(maps, a), maps, pairs).items()} for a in (0.0, 0.1, 0.5)]
    for name, better in BETTER.items():
        values = [better * m[name] for m in means]
        assert values[0] > values[1] > values[2], name


def test_depth_is_scored_up_to_scale_and_shift(maps, pairs):
    pred = noisy(maps, 0.1)
    moved = pred | dict(depth=0.1 * pred["depth"] + 3)
    a, b = score_maps(pred, maps, pairs), score_maps(moved, maps, pairs)
    for name in ("depth/abs_rel", "depth/delta1", "depth/pairs"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3)


def test_what_stands_under_the_sky_does_not_count(maps, pairs):
    pred = noisy(maps, 0.1)
    assert not maps["mask"].all()
    moved = {m: torch.where(maps["mask"], x, 0.25) for m, x in pred.items()}
    a, b = score_maps(pred, maps, pairs), score_maps(moved, maps, pairs)
    for name in METRICS:
        if name != "depth/pairs":                                               # its dead zone is a share of the map
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)


def test_evaluation_draws_the_same_noise_for_every_predictor(maps):
    class Echo(torch.nn.Linear):
        """A predictor whose maps are its noise."""

        modalities = NAMES
        walks = tuple((m,) for m in NAMES)

        def times(self, T):
            return [1 - i / T for i in range(T)] + [0.0]

        def start(self, noise, T):
            return noise

        def encode(self, rgb):
            return rgb

        def shape(self, rgb):
            return 3, *rgb.shape[-2:]

        def velocity(self, x, t, cond, m):
            return torch.zeros_like(x)

        def decode(self, x, m, cond=None):
            return x
    first, second = (predict_maps(Echo(1, 1), maps["rgb"], 2, 0, batch=b) for b in (64, 4))
    assert all(torch.equal(first[m], second[m]) for m in NAMES) and first["depth"].std() > 0.9


# comparison -------------------------------------------------------------------------------------------------------

def values(level, n=20):
    rng = np.random.default_rng(0)
    return {name: level + 0.01 * rng.random(n) for name in METRICS}


def test_a_verdict_follows_the_direction_of_its_metric():
    rows = compare_scores(values(1.0), values(2.0))
    for name, better in BETTER.items():
        assert rows[name]["verdict"] == ("better" if better > 0 else "worse"), name
        row = rows[name]
        assert row["x"] > row["base"] and 0.9 < row["low"] <= row["change"] <= row["high"] < 1.1
    back = compare_scores(values(2.0), values(1.0))
    assert all(back[name]["verdict"] == ("worse" if better > 0 else "better") for name, better in BETTER.items())


def test_equal_predictors_are_the_same():
    assert {row["verdict"] for row in compare_scores(values(1.0), values(1.0)).values()} == {"same"}


def test_a_change_within_the_noise_is_the_same():
    base, new = values(1.0), values(1.0)
    rng = np.random.default_rng(1)
    for name in METRICS:
        new[name] = base[name] + 0.1 * rng.standard_normal(20)
        new[name] += base[name].mean() - new[name].mean()
    assert {row["verdict"] for row in compare_scores(base, new).values()} == {"same"}


def test_images_without_a_value_are_left_out_on_both_sides():
    base, new = values(1.0), values(2.0)
    base["albedo/pairs"][3] = np.nan
    row = compare_scores(base, new)["albedo/pairs"]
    assert np.isfinite([row["change"], row["low"], row["high"], row["base"], row["x"]]).all()
    assert row["verdict"] == "better"


def test_a_base_that_is_perfect_can_be_compared():
    base, new = values(1.0), values(2.0)
    base["albedo/whdr10"][:] = 0.0
    assert compare_scores(base, new)["albedo/whdr10"]["verdict"] in ("worse", "same")


# drift ------------------------------------------------------------------------------------------------------------

START = {"wild/depth_spread": 0.2, "wild/depth_high_frequency": 0.01, "wild/depth/abs_rel": 0.4,
         "synthetic/depth/abs_rel": 0.1, "synthetic/depth/pairs": 0.8, "reward/depth_spread": 0.01,
         "synthetic/albedo/whdr10": None}


@pytest.mark.parametrize("change, words", [
    ({"wild/depth_high_frequency": 0.05}, "wild/depth_high_frequency is 5 x what it was (--band 4)"),
    ({"wild/depth_spread": 0.04}, "wild/depth_spread is 0.2 x what it was"),
    ({"synthetic/depth/abs_rel": 0.16}, "synthetic/depth/abs_rel has grown from 0.1 to 0.16 (--forget 0.5)")])
def test_what_leaves_its_band_is_named(change, words):
    assert words in drift({**START, **change}, START, 4.0, 0.5)
    assert drift({**START, **change}, START, 0, 0) == ""


@pytest.mark.parametrize("change", [{}, {"wild/depth_high_frequency": 0.039}, {"wild/depth_spread": 0.051},
                                    {"synthetic/depth/abs_rel": 0.149}, {"wild/depth/abs_rel": 4.0},
                                    {"reward/depth_spread": 1.0}, {"synthetic/albedo/whdr10": 0.3},
                                    {"synthetic/depth/pairs": 0.1, "synthetic/depth/abs_rel": 0.01}])
def test_what_stays_inside_and_what_is_no_band_at_all_stops_nothing(change):
    """The truth of wild scenes must not steer a run; a higher pair accuracy is no error."""
    assert drift({**START, **change}, START, 4.0, 0.5) == ""


# judge and heuristics ---------------------------------------------------------------------------------------------

class Oracle(torch.nn.Linear):
    """A judge that knows the truth, or says yes to everything."""

    size, grid = 32, 1

    def __init__(self, maps, yes=False):
        super().__init__(1, 1)
        self.maps, self.yes = maps, yes

    def ask(self, rgb, pts, names=None, modalities=None):
        if self.yes:
            return torch.ones(*pts.shape[:2], 4)
        return 0.5 + 0.5 * true_relations(self.maps, pts).float()


def test_a_judge_that_knows_the_truth_is_always_right_and_so_are_the_true_maps(maps):
    got = judge_scores(judge_answers(Oracle(maps), maps, 0), maps, perfect(maps))
    assert all((got[f"{who}/{m}"] == 1).all() for m in NAMES for who in ("judge", "predictor"))


def test_a_judge_that_always_says_yes_is_at_chance_on_balanced_albedo(maps):
    truth = eval_pairs(maps, PAIRS, 1, 0)["albedo"][1]
    got = judge_scores(judge_answers(Oracle(maps, yes=True), maps, 0), maps, perfect(maps))["judge/albedo"]
    np.testing.assert_allclose(got, ((truth > 0).sum(1) / (truth != 0).sum(1)).numpy())
    half = PAIRS // 2
    assert (got[((truth > 0).sum(1) == half).numpy() & ((truth < 0).sum(1) == half).numpy()] == 0.5).all()


def test_judge_and_predictor_are_compared_on_pairs_the_judge_can_be_asked(maps, monkeypatch):
    judge, asked = Oracle(maps), []
    judge.grid = 4
    monkeypatch.setattr(judge, "ask", lambda rgb, pts, names: asked.append(pts) or Oracle.ask(judge, rgb, pts))
    judge_answers(judge, maps, 0)
    assert len(asked) == len(NAMES) and all((pts % 4 == 2).all() for pts in asked)


def test_each_heuristic_is_right_on_the_case_it_was_made_for():
    rgb = torch.full((1, 3, 8, 8), 0.2)
    rgb[0, :, 0, :] = 0.9                                                       # bright, gray
    rgb[0, :, 4, :] = torch.tensor([0.8, 0.1, 0.1])[:, None]                    # red paint
    top, low, red = [0, 1], [7, 1], [4, 1]
    pts = torch.tensor([[[low, top], [top, low], [top, red]]])
    sign = {m: (HEURISTICS[m][1](rgb, pts)[0] > 0).tolist() for m in NAMES}
    assert sign["depth"] == [True, False, False]                                # the lower pixel is closer
    assert sign["normal"] == [False, True, True]                                # the upper one faces the camera more
    assert sign["albedo"] == [True, True, False]                                # gray in light and shade is one paint
    assert sign["irradiance"] == [False, True, True]                            # the brighter pixel is more lit


def test_every_modality_has_a_heuristic_and_metrics_with_a_direction():
    assert set(HEURISTICS) == set(NAMES) and {name.split("/")[0] for name in METRICS} == set(NAMES)
    assert set(BETTER.values()) == {1, -1} and all(BETTER[f"{m}/pairs"] == 1 for m in NAMES)


# command ----------------------------------------------------------------------------------------------------------

def numbers(tmp_path, *argv):
    evaluation.main([*map(str, argv), "--json", str(tmp_path / "out.json")])

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")
    return json.loads((tmp_path / "out.json").read_text(), parse_constant=refuse)


def test_a_run_is_evaluated_before_and_after_with_its_judge(run, tmp_path, capsys):
    got = numbers(tmp_path, "--dataset", "wild", "--out", run, *QUICK)
    printed = capsys.readouterr().out
    assert got["dataset"] == "wild" and got["n"] == 4 and set(got["metrics"]) == set(METRICS)
    assert all({"base", "x", "change", "low", "high", "verdict"} <= set(row) for row in got["metrics"].values())
    assert {f"{who}/{m}" for m in NAMES for who in ("judge", "predictor", "heuristic")} == set(got["judge"])
    assert all(name in printed for name in METRICS)


def test_every_number_of_the_json_is_in_the_printed_table(run, tmp_path, capsys):
    got = numbers(tmp_path, "--dataset", "synthetic", "--checkpoint", run / "base", "--out", run, *QUICK)
    printed = capsys.readouterr().out
    assert set(got["metrics"]) == set(METRICS)
    for name, value in got["metrics"].items():
        assert f"{value:.4f}" in printed or f"{value:.2f}" in printed, name


def test_comparing_a_checkpoint_with_itself_changes_nothing(run, tmp_path):
    got = numbers(tmp_path, "--dataset", "broad", "--checkpoint", run / "base", "--compare", run / "base",
                  "--judge", "none", *QUICK)
    for row in got["metrics"].values():
        assert row["base"] == row["x"] and row["change"] == 0 and row["verdict"] == "same"
    assert "judge" not in got


def test_compare_takes_the_base_alone_or_the_base_and_the_new_one(run, tmp_path):
    one = numbers(tmp_path, "--dataset", "wild", "--checkpoint", run / "grpo", "--compare", run / "base",
                  "--judge", "none", *QUICK)
    two = numbers(tmp_path, "--dataset", "wild", "--compare", run / "base", run / "grpo", "--judge", "none", *QUICK)
    assert one == two


def test_the_same_command_prints_the_same_numbers_and_another_seed_others(run, tmp_path):
    command = ["--dataset", "wild", "--checkpoint", run / "grpo", "--judge", "none", *QUICK]
    one, two, other = (numbers(tmp_path, *command, "--seed", s) for s in (0, 0, 1))
    assert one == two and one["metrics"] != other["metrics"]


def write_scenes(folder, n=3, side=24):
    """A folder in the HyperSim-style layout, from procedural scenes."""
    pool = ScenePool("synthetic", "val", n, side).all()
    for i in range(n):
        z = pool["depth"][i, 0]
        levels = ((z - z.min()) / (z.max() - z.min()) * 65535).numpy().astype(np.uint16)
        pictures = {"depth": Image.fromarray(levels)}
        for m, x in (("rgb", pool["rgb"][i]), ("normal", (pool["normal"][i] + 1) / 2), ("albedo", pool["albedo"][i]),
                     ("irradiance", pool["irradiance"][i])):
            pictures[m] = Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())
        for m, picture in pictures.items():
            picture.save(folder / f"s{i}_{m}.png")


def test_a_folder_of_scenes_is_evaluated(run, tmp_path):
    write_scenes(tmp_path)
    got = numbers(tmp_path, "--dataset", "scenes", "--data", tmp_path, "--out", run, *QUICK)
    assert got["dataset"] == "scenes" and got["n"] == 3
    assert all(np.isfinite([row["base"], row["x"]]).all() for row in got["metrics"].values())


def test_the_hypersim_scenes_are_evaluated(run, tmp_path):
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}")
    got = numbers(tmp_path, "--dataset", "scenes", "--data", DATA, "--out", run, *QUICK)
    assert got["n"] == len(list(DATA.glob("*_rgb.png"))) > 0
    assert all(np.isfinite([row["base"], row["x"]]).all() for row in got["metrics"].values())


def test_perfect_maps_of_a_scene_folder_score_perfectly(tmp_path):
    write_scenes(tmp_path)
    maps = scene_batch(tmp_path, 24)
    maps["depth"] = maps["depth"] + 1
    got = score_maps(perfect(maps), maps, eval_pairs(maps, 40, 1, 0))
    assert all((got[f"{m}/pairs"] == 1).all() for m in NAMES) and got["depth/abs_rel"].max() < 1e-6


def test_a_truth_of_one_value_is_no_perfect_score(maps, pairs, capsys):
    maps = {k: v.clone() for k, v in maps.items()}
    maps["irradiance"][0] = 0
    maps["depth"][1] = 2.5
    maps["albedo"][2] = 0.5
    got = score_maps(noisy(maps, 0.1), maps, pairs)
    said = capsys.readouterr().out
    for name, k in (("irradiance/si_mse", 0), ("depth/abs_rel", 1), ("depth/delta1", 1), ("albedo/si_mse", 2)):
        assert np.isnan(got[name]).tolist() == [i == k for i in range(len(got[name]))]
        assert f"{name.split('/')[0]}: 1 of {len(got[name])} true maps are one value everywhere" in said


@pytest.mark.parametrize("argv, word", [
    (["--dataset", "scenes"], "--data"), (["--dataset", "scenes", "--data", "nowhere"], "nowhere"),
    (["--dataset", "moon"], "moon"), ([], "--dataset"), (["--dataset", "wild", "--no-such-flag"], "--no-such-flag"),
    (["--dataset", "wild", "--checkpoint", "nowhere"], "nowhere"),
    (["--dataset", "wild", "--compare", "nowhere"], "nowhere"),
    (["--dataset", "wild", "--judge", "nowhere"], "nowhere"), (["--dataset", "wild", "--images", "0"], "--images"),
    (["--dataset", "wild", "--denoise-steps", "0"], "--denoise-steps"), (["--dataset", "wild", "--size", "18"], "18")])
def test_a_bad_command_is_one_line_and_exit_code_two(run, capsys, argv, word):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: evaluation.main([*argv, "--out", str(run)] if "--dataset" in argv else argv), "eval.py")
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("eval.py: ") and word in lines[0]


def test_a_scene_folder_with_a_missing_map_is_refused_by_file_name(run, tmp_path, capsys):
    write_scenes(tmp_path)
    (tmp_path / "s1_albedo.png").unlink()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: evaluation.main(["--dataset", "scenes", "--data", str(tmp_path), "--out", str(run),
                                             *QUICK]), "eval.py")
    assert stop.value.code == 2 and "s1_albedo.png" in capsys.readouterr().err


def test_a_judge_of_another_image_size_is_refused(run, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: evaluation.main(["--dataset", "wild", "--out", str(run), "--images", "2", "--size", "24",
                                             "--denoise-steps", "1"]), "eval.py")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("eval.py: ") and "16" in line and "24" in line


def test_scenes_refuse_a_predictor_without_all_modalities(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.load_predictor(run / "base").__class__, "modalities", ("albedo",))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: evaluation.main(["--dataset", "wild", "--out", str(run), *QUICK]), "eval.py")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "a predictor of albedo; want one that has depth, normal, irradiance" in line


def test_diagnostics_are_finite_and_see_added_noise(run):
    """High-frequency energy of wild maps rises when a predictor adds noise to what it decodes."""
    policy = evaluation.load_predictor(run / "base")
    clean = diagnose(policy, 16, 2, n=4)
    real = policy.decode

    def grainy(x, m, cond=None):
        return real(x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), m)
    policy.decode = grainy
    noise = diagnose(policy, 16, 2, n=4)
    assert np.isfinite(list(clean.values())).all()
    assert noise["wild/albedo_high_frequency"] > clean["wild/albedo_high_frequency"]
