"""bench/ablate.py: rows, equal compute, intervals, photos for the same gain, table, plot; baselines.py and plots.py."""
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import test_train
import torch

from bench import ablate
from evaluation import plots
from predictor import load_predictor
from runtime.config import Config, UserError

QUICK = ["--seeds", "0", "--points", "2", "--device", "cpu", "--set"]
SMALL = [f"{k.replace('-', '_')}={v}" for k, v in zip(
    *[iter(x.removeprefix("--") for x in test_train.TINY)] * 2, strict=True) if k not in ("threads", "device", "steps")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ablation of five rows at toy size, on the base, judge and bank of the toy run."""
    out = tmp_path_factory.mktemp("ablate")
    run = test_train.tiny_run(tmp_path_factory.getbasetemp())
    for part in ("base", "judge", "bank"):
        shutil.copytree(run / part, out / "seed0" / part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate.flops_per_step, "__defaults__", (2,))              # counting is slow; two steps of eight
        ablate.main(["--out", str(out), "--steps", "4", "--rows", "paper", "all", "all, oracle judge", "ranking loss",
                     "supervised", *QUICK, *SMALL])
    return out


def result(folder):
    return json.loads((folder / "ablation.json").read_text())


# rows -------------------------------------------------------------------------------------------------------------

def test_every_row_adds_its_own_flags_to_the_row_above_and_the_first_is_the_papers_estimator():
    rows = ablate.rows_of()
    assert list(rows)[:9] == ["paper", "+branch", "+pair", "+soft", "+joint", "+blocks", "+brier", "+jitter", "all"]
    for (above, _), (name, more) in zip(ablate.STEPS, ablate.STEPS[1:], strict=False):
        assert rows[name] == {**rows[above], **more} and more.items() - rows[above].items()
    paper = Config()                                                            # the defaults are the paper's
    assert {k: getattr(paper, k) for k in rows["paper"]} == rows["paper"]


def test_rows_share_base_judge_and_bank_and_have_their_own_folder():
    args = ablate.arguments(["--out", "o"])
    configs = {row: ablate.row_config(args, row, 3) for row in ablate.rows_of()}
    assert {(c.policy, c.bank, c.seed) for c in configs.values()} == {("o/seed3/base", "o/seed3/bank", 3)}
    assert len({c.out for c in configs.values()}) == len(configs)
    assert {row for row, c in configs.items() if c.judge == "oracle"} == {"all, oracle judge"}
    ours = {k: v for k, v in asdict(configs["all"]).items() if k != "out"}
    assert all(asdict(configs[row]).items() >= ours.items() for row in ("ranking loss", "supervised"))


def test_an_unknown_flag_of_a_row_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        ablate.arguments(["--set", "nonsense=1"])
    assert stop.value.code == 2 and "--set nonsense=1; want FLAG=VALUE" in capsys.readouterr().err


# a toy ablation ---------------------------------------------------------------------------------------------------

def test_rows_take_the_steps_that_cost_what_all_costs(folder):
    flops = {row: one["flops"] for row, one in json.loads((folder / "seed0" / "flops.json").read_text()).items()}
    assert all(f > 0 for f in flops.values()) and flops["supervised"] < flops["all"]
    for row, (run,) in result(folder)["runs"].items():
        assert run["steps"] == max(1, round(4 * flops["all"] / flops[row])), row
        assert run["photos"] == run["steps"] * run["key"]["settings"]["batch"]


def test_full_rollouts_of_the_paper_cost_more_a_photo_than_branches(folder):
    flops = {row: one["flops"] for row, one in json.loads((folder / "seed0" / "flops.json").read_text()).items()}
    assert flops["paper"] > flops["all"] / 4                                    # one modality against four


def test_every_row_is_scored_on_held_out_scenes_and_drawn(folder):
    got = result(folder)
    for row, (run,) in got["runs"].items():
        assert set(run["wild"]) == set(run["synthetic"]) and run["curve"], row
        assert all(p["photos"] > 0 and p["seconds"] > 0 for p in run["curve"])
        assert np.isclose(got["means"][row]["wild/depth/abs_rel"][0], run["wild"]["depth/abs_rel"]["change"])
    text = (folder / "ablation.md").read_text()
    assert all(f"| {row} |" in text for row in got["runs"]) and "seconds" in text
    tree = ElementTree.parse(folder / "ablation.svg")
    drawn = "".join(tree.getroot().itertext())
    assert all(row in drawn for row in got["runs"]) and "photos seen" in drawn and "seconds" in drawn


@pytest.mark.parametrize("row", ["all", "ranking-loss", "supervised"])
def test_every_method_moves_the_policy(folder, row):
    before, after = (load_predictor(folder / "seed0" / p) for p in ("base", f"{row}/grpo"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_running_again_reads_what_is_there(folder, monkeypatch):
    monkeypatch.setattr(ablate.train, "train_grpo", lambda *args: pytest.fail("trained again"))
    before = (folder / "ablation.md").read_text()
    ablate.main(["--out", str(folder), "--steps", "4", "--rows", "paper", "all", *QUICK, *SMALL])
    after = (folder / "ablation.md").read_text()
    assert after.splitlines() == before.splitlines()[:4]
    with pytest.raises(UserError, match="holds figures of other settings"):
        ablate.main(["--out", str(folder), "--steps", "4", "--rows", "paper", "all", "--split", "val", *QUICK, *SMALL])


def test_the_last_row_of_the_chain_is_all_but_for_its_learning_rate():
    args = ablate.arguments([])
    last, ours = (ablate.asdict(ablate.row_config(args, row, 0)) for row in (ablate.STEPS[-1][0], "all"))
    assert {k for k in ours if ours[k] != last[k]} == {"lr", "out", "exploration"}   # auto is flow for our predictor


# figures ----------------------------------------------------------------------------------------------------------

def test_the_interval_over_seeds_is_students():
    values = [-0.1, -0.2, -0.15]
    mean, half = ablate.interval(values)
    assert mean == pytest.approx(-0.15) and half == pytest.approx(4.303 * 0.05 / math.sqrt(3))
    assert math.isnan(ablate.interval([1.0])[1])


def test_photos_for_a_change_are_interpolated_between_evaluations():
    curve = [dict(photos=100, m=-0.1), dict(photos=200, m=-0.3)]
    assert ablate.photos_for(curve, "m", -0.05) == 100                          # nothing is known before
    assert ablate.photos_for(curve, "m", -0.2) == pytest.approx(150)
    assert ablate.photos_for(curve, "m", -0.4) is None


def test_fewer_photos_compares_the_best_of_the_paper_with_the_first_time_of_all():
    runs = {"paper": [dict(curve=[dict(photos=500, m=-0.1), dict(photos=1000, m=-0.05)]),
                      dict(curve=[dict(photos=500, m=0.1)])],
            "all": [dict(curve=[dict(photos=100, m=-0.2)]), dict(curve=[dict(photos=100, m=-0.2)])]}
    assert ablate.fewer_photos(runs, "m") == [pytest.approx(5.0), None]


# plots ------------------------------------------------------------------------------------------------------------

def test_a_plot_is_one_svg_whose_points_lie_where_the_values_are():
    text = plots.figure([("a < b", "x", [plots.Line("one", [0, 1, 2], [0.0, -5.0, -10.0]),
                                         plots.Line("two & more", [0, 2], [0.0, 5.0])]),
                         ("second", "y", [plots.Line("one", [0, 4], [1.0, 2.0])])], columns=2)
    tree = ElementTree.fromstring(text)
    paths = [p for p in tree.iter() if p.tag.endswith("polyline")]
    assert len(paths) == 3 and {p.get("stroke") for p in paths[::2]} == {paths[0].get("stroke")}
    points = np.array([[float(v) for v in p.split(",")] for p in paths[0].get("points").split()])
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) > 0).all()      # down the page is less
    assert np.allclose(points[1], points[[0, 2]].mean(0), atol=0.06)
    words = list(tree.itertext())
    assert words.count("two & more") == 1 and "a < b" in words


@pytest.mark.parametrize("low, high", [(0, 1), (-13.2, 4.1), (0, 2800), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    got = plots.ticks(low, high)
    assert 1 <= len(got) <= 6 and all(low - 1e-6 <= t <= high + 1e-6 for t in got)


def test_nothing_of_an_ablation_needs_the_network_or_a_picture_library():
    source = Path(plots.__file__).read_text()
    assert "http" not in source.replace("http://www.w3.org/2000/svg", "") and "matplotlib" not in source


