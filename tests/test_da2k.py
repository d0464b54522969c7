"""da2k.py: pairs of DA-2K in its published format, judges and predictors on them, what is refused."""
import json

import numpy as np
import pytest
import torch
from expect import enter
from PIL import Image
from test_predictions import numbers, refusal

import eval as evaluation
from evaluation import da2k

MODULE = '''
import torch
import torch.nn as nn
from relations import NAMES, at_points

ASKED = []

class Bright:
    """Knows that what is brighter is closer."""
    size, grid, bias, knows = 16, 2, 0.0, True
    def digest(self): return "bright"
    def ask(self, rgb, pts, names=None, modalities=None):
        ASKED.append((names, modalities, pts.clone()))
        prob = torch.full((*pts.shape[:2], len(NAMES)), torch.nan)
        light = at_points(rgb, pts).mean(-1)
        prob[..., 0] = torch.sigmoid(20 * (light[..., 0] - light[..., 1]) + self.bias)
        return prob.where(torch.tensor(self.knows), torch.nan)

class Biased(Bright):
    bias = 100.0

class Unsure(Bright):
    knows = False

class Depth(nn.Module):
    modalities = ("depth",)
    size = 32
    sign = -1
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
    def predict(self, rgb, modality):
        return self.sign * self.one * rgb.mean(1, keepdim=True)

class Reversed(Depth):
    sign = 1
'''
SIZES = {"images/indoor/a.jpg": (90, 120), "images/indoor/b.png": (64, 48), "images/outdoor/c.jpg": (40, 200)}
CLOSE_BY = "images/outdoor/c.jpg"  # holds a pair that one cell of the judge covers


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with DA-2K, whose photos are bright (close) at the left, and with judges and networks."""
    enter(monkeypatch, tmp_path, pairs=MODULE)
    found = {}
    rng = np.random.default_rng(0)
    for name, (h, w) in SIZES.items():
        path = tmp_path / "DA-2K" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        light = np.where(np.arange(w) < w // 2, 220, 40).astype(np.uint8)
        Image.fromarray(np.broadcast_to(light[None, :, None], (h, w, 3)).copy()).save(path)
        found[name] = [{"point1": [int(rng.integers(h)), int(rng.integers(w // 2 - 12))],
                        "point2": [int(rng.integers(h)), int(rng.integers(w // 2 + 12, w))], "closer_point": "point1"}
                       for _ in range(8)]
    found[CLOSE_BY].append({"point1": [4, 99], "point2": [4, 101], "closer_point": "point1"})
    found[CLOSE_BY].append({"point1": [10, 2], "point2": [11, 3], "closer_point": "point1"})
    (tmp_path / "DA-2K" / "annotations.json").write_text(json.dumps(found))
    return tmp_path


def flags(*more):
    return ["--dataset", "da2k", "--data", ".", "--out", "out", *more]


def edit(desk, change):
    path = desk / "DA-2K" / "annotations.json"
    found = json.loads(path.read_text())
    changed = change(found)
    path.write_text(json.dumps(found if changed is None else changed))


# the pairs --------------------------------------------------------------------------------------------------------

def test_which_point_is_red_is_drawn_and_depends_on_seed_and_image_alone(desk):
    _, images, n = da2k.open_pairs(".", 0, 0)
    _, again, _ = da2k.open_pairs(".", 0, 0)
    _, other, _ = da2k.open_pairs(".", 0, 1)
    assert n == 3 and [p.scene for p in images] == ["indoor", "indoor", "outdoor"]
    first = np.concatenate([p.first for p in images])
    assert 0.2 < first.mean() < 0.8 and not np.array_equal(first, np.concatenate([p.first for p in other]))
    assert all(torch.equal(a.pts, b.pts) for a, b in zip(images, again, strict=True))
    listed = json.loads((desk / "DA-2K" / "annotations.json").read_text())
    for p in images:
        near, far = (torch.tensor([row[k] for row in listed[p.name]]) for k in ("point1", "point2"))
        red = torch.where(torch.tensor(p.first)[:, None], near, far)
        assert torch.equal(p.pts[:, 0], red) and torch.equal(p.pts.sum(1), near + far)
    edit(desk, lambda found: {k: found[k] for k in [CLOSE_BY]})
    assert np.array_equal(da2k.open_pairs(".", 0, 0)[1][0].first, images[2].first)


def test_closer_point_2_is_understood(desk):
    pair = dict(point1=[1, 2], point2=[3, 4], closer_point="point2")
    pairs = da2k.draw_order("a.jpg", [pair] * 40, "a", 0)
    assert {tuple(red.tolist()) for red in pairs.pts[torch.tensor(pairs.first), 0]} == {(3, 4)}
    assert pairs.scene == "other"


# judges -----------------------------------------------------------------------------------------------------------

def test_a_knowing_judge_is_right_by_scene_and_one_cell_is_counted_as_wrong(desk, capsys):
    got = numbers(desk, *flags("--judge", "pairs:Bright"))["judge"]
    rows = got["scenes"]
    assert list(rows) == ["indoor", "outdoor", "all"]
    assert rows["indoor"]["accuracy"] == rows["indoor"]["drawn"] == rows["indoor"]["exchanged"] == 1
    assert (rows["indoor"]["images"], rows["indoor"]["pairs"], rows["indoor"]["one_cell"]) == (2, 16, 0)
    assert (rows["outdoor"]["pairs"], rows["outdoor"]["one_cell"], rows["outdoor"]["undecided"]) == (10, 1, 0)
    assert rows["outdoor"]["accuracy"] == pytest.approx(0.9) and rows["outdoor"]["asked"] == 1
    assert rows["all"]["accuracy"] == pytest.approx(25 / 26)
    assert rows["all"]["low"] == pytest.approx(0.9) and rows["all"]["high"] == 1          # bootstrapped over images
    assert rows["outdoor"]["low"] is None and got["mean_of_scenes"] == pytest.approx(0.95)
    out = capsys.readouterr().out
    assert "both orders of the colours averaged" in out and "in one cell" in out and "3 images evaluated of 3" in out
    import pairs
    (names, modalities, one), (_, _, two) = pairs.ASKED[:2]
    assert names == ["DA-2K/images/indoor/a.jpg"] and modalities == ("depth",) and torch.equal(one, two.flip(2))


def test_points_are_scaled_to_the_square_of_the_judge(desk):
    numbers(desk, *flags("--judge", "pairs:Bright"))
    import pairs
    _, images, _ = da2k.open_pairs(".", 0, 0)
    for pair, asked in zip(images[0].pts.tolist(), pairs.ASKED[0][2][0].tolist(), strict=True):
        assert asked == [[r * 16 // 90 // 2 * 2 + 1, c * 16 // 120 // 2 * 2 + 1] for r, c in pair]


def test_a_judge_that_always_says_red_is_right_by_chance_in_one_order_and_never_on_average(desk):
    row = numbers(desk, *flags("--judge", "pairs:Biased"))["judge"]["scenes"]["indoor"]
    assert row["drawn"] + row["exchanged"] == 1 and 0 < row["drawn"] < 1
    assert row["accuracy"] == 0 and row["undecided"] == 16


def test_what_a_judge_does_not_know_counts_nowhere(desk):
    row = numbers(desk, *flags("--judge", "pairs:Unsure"))["judge"]["scenes"]["indoor"]
    assert row["unknown"] == 16 and row["n"] == 0 and row["accuracy"] is None


# predictors -------------------------------------------------------------------------------------------------------

def test_a_predictor_is_compared_image_by_image(desk, capsys):
    got = numbers(desk, *flags("--checkpoint", "pairs:Depth", "--compare", "pairs:Reversed"))
    rows = got["predictor"]["scenes"]
    assert "judge" not in got and rows["indoor"]["accuracy"] == 1 and rows["indoor"]["base"] == 0
    assert rows["indoor"]["change"] == 1 and rows["indoor"]["verdict"] == "better" and rows["indoor"]["ties"] == 0
    assert rows["outdoor"]["pairs"] == 10 and rows["outdoor"]["ties"] <= 2
    assert "lower point" in capsys.readouterr().out


def test_saved_maps_are_scored_and_disparities_the_other_way(desk):
    for name, (h, w) in SIZES.items():
        path = desk / "maps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.parent / f"{path.stem}_depth.npy", np.broadcast_to(np.arange(w, dtype=np.float32), (h, w)))
    depth = numbers(desk, *flags("--pred-dir", "maps"))["predictor"]["scenes"]["all"]
    other = numbers(desk, *flags("--pred-dir", "maps", "--align", "disparity"))["predictor"]["scenes"]["all"]
    assert depth["accuracy"] == 1 and other["accuracy"] == 0


# refusals ---------------------------------------------------------------------------------------------------------

def first_pair(**changes):
    def change(found):
        found["images/indoor/a.jpg"][0] |= changes
    return change


@pytest.mark.parametrize("change, word", [
    (lambda found: [], "got [], want an object that names images"),
    (lambda found: found.update({"images/indoor/a.jpg": []}), "a.jpg: got [], want a list of pairs"),
    (lambda found: found.update({"images/indoor/a.jpg": [[1, 2]]}), "pair 0: got [1, 2], want an object with"),
    (lambda found: found["images/indoor/a.jpg"][0].pop("point2") and None, "want an object with closer_point, point1"),
    (first_pair(closer_point="A"), "closer_point 'A', want point1 or point2"),
    (first_pair(point1=[1]), "point1: got a point [1], want [row, col]"),
    (first_pair(point2=[1, "2"]), "point2: got a point [1, '2']"),
    (first_pair(point2=[-1, 2]), "point2: got a point [-1, 2]"),
    (first_pair(point1=[5, 5], point2=[5, 5]), "got the point [5, 5] twice, want two points"),
    (first_pair(point1=[90, 5]), "want row < 90, col < 120"),
    (lambda found: found.update({"../a.jpg": found["images/indoor/a.jpg"]}), "'../a.jpg', want a path inside")])
def test_bad_annotations_are_one_line(desk, capsys, change, word):
    edit(desk, change)
    line = refusal(capsys, *flags("--judge", "pairs:Bright"))
    assert word in line and "DA-2K" in line


def test_annotations_that_are_no_json_are_one_line(desk, capsys):
    (desk / "DA-2K" / "annotations.json").write_text("{")
    assert "a file that is not JSON" in refusal(capsys, *flags("--judge", "pairs:Bright"))


def page(capsys, *argv):
    with pytest.raises(SystemExit, match="2"):
        evaluation.main([*map(str, argv)])
    return capsys.readouterr().err


def test_missing_data_says_what_to_fetch(desk, capsys):
    assert "DA-2K.zip" in page(capsys, "--dataset", "da2k") and "Apache-2.0" in page(capsys, "--dataset", "da2k")
    (desk / "DA-2K" / CLOSE_BY).unlink()
    assert "got 2 of 3 images of da2k" in page(capsys, *flags())
    got = numbers(desk, *flags("--judge", "pairs:Bright", "--limit", 9))
    assert got["n"] == 2 and got["expected"] == 3 and got["partial"]
    assert list(got["judge"]["scenes"]) == ["indoor", "all"]


def test_data_are_checked_and_listed(desk, capsys):
    evaluation.main(flags("--check-data"))
    evaluation.main(["--list-datasets"])
    out = capsys.readouterr().out
    assert "3 of 3 images with 26 pairs decoded, none is bad" in out and "da2k            pairs" in out
    (desk / "DA-2K" / CLOSE_BY).write_bytes(b"junk")
    assert "c.jpg" in refusal(capsys, *flags("--check-data"))


def test_flags_that_do_not_fit_are_refused(capsys):
    assert "--panels belongs to" in refusal(capsys, *flags("--panels", 2))
    assert "--align disparity belongs to" in refusal(capsys, *flags("--align", "disparity"))
