"""reliability.py: every question counts, confidence against accuracy, colour bias found, the command's tables."""
import json

import numpy as np
import pytest
import torch
from rooms import S

import eval as evaluation
from data import questions
from evaluation import reliability
from evaluation.scores import HEURISTICS
from judge import build_mini_judge
from models.mini_judge import MiniSizes

RULES = HEURISTICS


@pytest.fixture(scope="module")
def rows(rooms):
    return questions.build_questions(rooms, 4, S, 0)


class Rule:
    """A judge whose answer follows from where it finds the markers."""

    def __init__(self, answer, size=S):
        self.answer, self.size, self.mean = answer, size, torch.zeros(1)

    def score(self, images, modality):
        out = []
        for x in images:
            red = (x == torch.tensor([1., 0, 0]).view(3, 1, 1)).all(0).nonzero().float().mean(0)
            green = (x == torch.tensor([0, 1., 0]).view(3, 1, 1)).all(0).nonzero().float().mean(0)
            out.append(self.answer(red, green, modality))
        return torch.tensor(out)


def test_a_knowing_judge_is_right_and_consistent(rows, rooms):
    """Left is nearer and darker in these scenes; what it does not know it leaves undecided, and that counts."""
    def knows(red, green, m):
        return {"depth": 0.9, "irradiance": 0.1}.get(m, 0.5) if red[1] < green[1] else {
            "depth": 0.1, "irradiance": 0.9}.get(m, 0.5)
    got = reliability.judge_figures(Rule(knows), rows, rooms, RULES)
    for m in ("depth", "irradiance"):
        assert got[m]["accuracy"] == 1 and got[m]["inconsistent"] == 0 and abs(got[m]["ece"] - 0.1) < 1e-6
    assert got["normal"]["accuracy"] == 0 and got["normal"]["undecided"] == got["normal"]["n"]
    assert np.isnan(got["normal"]["released"]) and got["depth"]["released"] == 1


def test_a_judge_that_always_says_red_is_half_right_and_found_out(rows, rooms):
    got = reliability.judge_figures(Rule(lambda *_: 0.8), rows, rooms, RULES)
    for m in ("depth", "normal", "irradiance"):
        assert got[m]["accuracy"] == 0.5 and got[m]["inconsistent"] == got[m]["always_first"] == 1
        assert abs(got[m]["ece"] - 0.3) < 1e-6
    assert got["albedo"]["inconsistent"] == 0                                   # "same" both times is consistent
    average = reliability.judge_figures(Rule(lambda *_: 0.8), rows, rooms, RULES, swap_average=True)
    assert average["depth"]["undecided"] == average["depth"]["n"]


def test_the_mean_of_both_orders():
    got = reliability.average_orders(np.array([.9, .9]), np.array([.3, .3]), np.array([False, True]))
    np.testing.assert_allclose(got, [.8, .6])


def test_what_both_orders_are_worth(rows, rooms):
    """Left is nearer; this judge knows that and leans to red by .2 of probability: one order errs, both do not."""
    def leans(red, green, m):
        return {"depth": 0.6 if red[1] < green[1] else 0.4}.get(m, 0.5) + 0.2
    got = reliability.judge_figures(Rule(leans), rows, rooms, RULES)["depth"]["orders"]
    assert abs(got["bias"] - 0.4) < 1e-6 and abs(got["bias_size"] - 0.4) < 1e-6
    assert got["accuracy"] == dict(one=0.5, both=1.0, change=0.5, low=0.5, high=0.5)     # half of each scene's answers
    assert abs(got["brier"]["one"] - (.2**2 + .6**2) / 2) < 1e-6 and abs(got["brier"]["both"] - .4**2) < 1e-6
    assert abs(got["ece"]["both"] - 0.4) < 1e-6


def test_calibration_is_the_textbook_s():
    prob = np.array([.55, .55, .95, .95, .05, .8])
    first = np.array([True, False, True, True, True, True])
    ece, table = reliability.calibration(prob, first)
    assert [(round(b["low"], 2), b["n"]) for b in table] == [(.55, 2), (.8, 1), (.95, 3)]
    assert abs(ece - (2 * .05 + 1 * .2 + 3 * abs(2 / 3 - .95)) / 6) < 1e-9


def test_margins_hold_every_question(rows, rooms):
    got = reliability.judge_figures(Rule(lambda *_: 0.8), rows, rooms, RULES)
    assert all(sum(b["n"] for b in r["margins"]) == r["n"] for r in got.values())
    assert sum(r["n"] for r in got.values()) == len(rows)


def test_drawn_markers_cannot_be_exchanged(rows, rooms, tmp_path):
    path = questions.write_jsonl(rows[:4], rooms, tmp_path, S, "x.jsonl")
    lines = questions.read_jsonl(path)
    got = reliability.judge_figures(Rule(lambda *_: 0.8), lines, tmp_path, RULES)
    assert "inconsistent" not in got["depth"]
    with pytest.raises(ValueError, match="drawn markers"):
        reliability.judge_figures(Rule(lambda *_: 0.8), lines, tmp_path, RULES, swap_average=True)


def test_the_command_prints_and_writes_every_figure(rooms, tmp_path, capsys):
    build_mini_judge(MiniSizes(size=32, patch=4, width=32, vision_layers=1, text_layers=1, heads=2),
               torch.Generator().manual_seed(0)).save(tmp_path / "judge")
    evaluation.main(["--dataset", "judge", "--scenes", str(rooms), "--judge", str(tmp_path / "judge"), "--pairs", "2",
                     "--json", str(tmp_path / "j.json"), "--swap-average"])
    out = capsys.readouterr().out
    got = json.loads((tmp_path / "j.json").read_text())
    words = ("ECE", "inconsistent", "every question that it knows counts", "both orders", "reliability", "mean p - q")
    assert all(word in out for word in words)
    assert set(got["judge"]) == set(RULES) and f"judge: {got['n']} questions of {got['n']}" in out
    for row in got["judge"].values():
        assert f"{row['accuracy']:.3f}" in out and f"{row['orders']['brier']['both']:.4f}" in out


def test_scenes_are_asked_for_by_name(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--dataset", "judge"])
    assert stop.value.code == 2 and "--scenes DIR" in capsys.readouterr().err
