"""A modality is a row of relations.MODALITIES: every column does what it says, and one more row goes through it all."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from expect import seeded
from test_layout import SOURCES
from test_train import TINY

import grpo
from data import pictures, questions
from data.maps import center_map
from kernels import pair_reward as kernel
from models.dit import DiT, to_state
from relations import MODALITIES, RULES, Modality, at_points, margin, relation

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extend.md"
NAME = "roughness"
ABOUT_DATA = {"benchmark_report", "benchmark_table", "benchmarks", "predictions", "protocols", "marigold"}
ANSWERS = ("The red point is it.", "The green point is it.")
KIND = dict(nearer="distance", facing="vector", brighter="colour", same="colour", more="scalar")


def row(rule="more", **columns):
    """A row of the table, of a modality that the project does not have."""
    return Modality(**dict(kind=KIND.get(rule, "scalar"), rule=rule, dead=0.05, tau=0.3, encoding="", question="Which?",
                           answers=ANSWERS) | columns)


def written_out(rule, values, p, dead):
    """Relation of one pair on one map (H, W, C), numpy, by the formula of the module docstring."""
    red, green = (values[tuple(x)] for x in p)
    if rule == "same":
        return 1 if np.sqrt(((red - green) ** 2).sum()) < 0.05 else -1
    if rule == "nearer":
        gap = (green[0] - red[0]) / (values.max() - values.min())
    if rule == "facing":
        gap = (red[2] - green[2]) / 2
    if rule == "brighter":
        gap = (red - green) @ np.array([0.299, 0.587, 0.114])
    if rule == "more":
        gap = red[0] - green[0]
    return 0 if abs(gap) < dead else 1 if gap > 0 else -1


@pytest.mark.parametrize("rule", RULES)
def test_a_row_of_any_rule_is_compared_by_its_formula(monkeypatch, rule):
    new = row(rule, dead=0.0 if rule == "same" else 0.05)
    monkeypatch.setitem(MODALITIES, NAME, new)
    maps = torch.rand(2, new.channels, 12, 9, generator=seeded(0), dtype=torch.float64) / (8 if rule == "same" else 1)
    pts = torch.stack([torch.randint(n, (2, 300, 2), generator=seeded(n)) for n in (12, 9)], -1)
    want = [[written_out(rule, one.movedim(0, -1).numpy(), p, new.dead) for p in some.tolist()]
            for one, some in zip(maps, pts, strict=True)]
    assert relation(maps, pts, NAME).tolist() == want
    assert {x for some in want for x in some} == ({1, -1} if new.yes_no else {1, 0, -1})


def test_the_table_knows_which_questions_are_yes_or_no():
    assert [m for m, one in MODALITIES.items() if one.yes_no] == ["albedo"]
    assert all(one.rule in RULES for one in MODALITIES.values())
    assert {m: one.channels for m, one in MODALITIES.items()} == dict(depth=1, normal=3, albedo=3, irradiance=3)


def test_the_four_rows_have_the_softness_and_noise_of_the_presets():
    assert [one.tau for one in MODALITIES.values()] == [0.4, 0.5, 0.05, 0.25]
    assert [m for m, one in MODALITIES.items() if one.white] == ["albedo"]


def reward_case(new):
    """Maps (1, 2, C, 8, 8), points and probabilities of a row."""
    pred = torch.rand(1, 2, new.channels, 8, 8, generator=seeded(1))
    return pred, torch.randint(8, (1, 30, 2, 2), generator=seeded(2)), torch.rand(1, 30, generator=seeded(3))


@pytest.mark.parametrize("reward", ["soft", "brier"])
def test_tau_of_the_row_is_the_softness_of_its_rewards(monkeypatch, reward):
    new = row(tau=0.7)
    monkeypatch.setitem(MODALITIES, NAME, new)
    pred, pts, prob = reward_case(new)
    cfg = SimpleNamespace(reward=reward, balance=1, window=0, dead_zone="half")
    agree = grpo.agreement(pred, pts, prob, NAME, cfg)[0]
    vote = torch.tanh(margin(pred, pts[:, None], NAME) / 0.7)
    answer = 2 * prob[:, None] - 1
    want = (1 + vote * answer) / 2 if reward == "soft" else 1 - (vote - answer) ** 2 / 4
    torch.testing.assert_close(agree, want, rtol=0, atol=1e-6)


def test_only_answers_to_a_yes_no_question_are_balanced(monkeypatch):
    cfg = SimpleNamespace(reward="hard", balance=1)
    prob = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    for rule, want in (("more", [1 / 4] * 4), ("same", [1 / 2, 1 / 6, 1 / 6, 1 / 6])):
        monkeypatch.setitem(MODALITIES, NAME, row(rule))
        torch.testing.assert_close(grpo.pair_weights(prob, NAME, cfg), torch.tensor([want]))


def test_a_white_row_never_explores_in_squares(monkeypatch):
    monkeypatch.setitem(MODALITIES, NAME, row(white=True))
    draw = SimpleNamespace(batch=50, integers=lambda n, shape, axis: torch.randint(n, shape, generator=seeded(0)))
    batch = SimpleNamespace(cfg=SimpleNamespace(noise_blocks=(2, 4)), draw=draw, modalities=("depth", NAME))
    depth, new = grpo.draw_squares(batch).view(2, 50).tolist()
    assert set(depth) == {2, 4} and set(new) == {1}


def test_questions_of_every_yes_no_row_are_balanced(monkeypatch):
    monkeypatch.setitem(MODALITIES, NAME, row("same"))
    rows = [dict(id=f"{m}{i}", modality=m, first=i < 3) for m in ("depth", "albedo", NAME) for i in range(10)]
    kept = [(r["modality"], r["first"]) for r in questions.balance(rows, 0)]
    assert [kept.count((m, w)) for m in ("depth", "albedo", NAME) for w in (True, False)] == [3, 7, 3, 3, 3, 3]


@pytest.mark.parametrize("kind", ["vector", "colour", "scalar"])
def test_a_state_of_any_kind_decodes_to_its_map(monkeypatch, kind):
    monkeypatch.setitem(MODALITIES, NAME, row(kind=kind))
    value = torch.rand(2, MODALITIES[NAME].channels, 8, 8, generator=seeded(0))
    value = torch.nn.functional.normalize(value, dim=1) if kind == "vector" else value
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    state = to_state({NAME: value}, mask, NAME)
    assert state.shape == (2, 3, 8, 8) and (center_map(value, kind, mask) == state).all()
    torch.testing.assert_close(DiT.decode(None, state, NAME), value, rtol=0, atol=1e-6)


def test_a_scalar_map_is_written_as_gray_and_shown_as_gray(monkeypatch, tmp_path):
    monkeypatch.setitem(MODALITIES, NAME, row())
    value = torch.rand(1, 6, 5, generator=seeded(0)).numpy()
    npy, png = pictures.save_map(tmp_path, "a", NAME, value)
    from PIL import Image
    assert (np.load(npy) == value).all() and Image.open(png, formats=["PNG"]).mode == "L"
    assert pictures.picture_of(NAME, value).shape == (3, 6, 5)
    with pytest.raises(ValueError, match=r"got \(3, 6, 5\) for 'roughness'; want \(1, H, W\)"):
        pictures.save_map(tmp_path, "a", NAME, np.repeat(value, 3, 0))


@pytest.mark.parametrize("form, window", [("hard", 0), ("soft", 1), ("brier", 0)])
@pytest.mark.parametrize("rule", kernel.FUSED)
def test_the_kernel_follows_the_rule_not_the_name(triton_path, monkeypatch, rule, form, window):
    new = row(rule, dead=0.0 if rule == "same" else 0.05)
    monkeypatch.setitem(MODALITIES, NAME, new)
    pred, pts, prob = reward_case(new)
    args = pred, pts, prob, torch.full_like(prob, 1 / 30), NAME, form, 0.3, window
    for got, want in zip(kernel.pair_reward(*args, form == "hard"), kernel.pair_reward_ref(*args), strict=True):
        assert got is want or torch.allclose(got.float(), want.float(), rtol=0, atol=2e-6)


def test_a_rule_of_ones_own_runs_in_torch_and_is_refused_by_name_on_the_triton_path(triton_path, monkeypatch):
    def redder(maps, pts, window):
        red, green = at_points(maps, pts, window)[..., 0].unbind(-1)
        return red - green

    monkeypatch.setitem(RULES, "redder", redder)
    new = row("redder", kind="colour")
    monkeypatch.setitem(MODALITIES, NAME, new)
    pred, pts, prob = reward_case(new)
    args = pred, pts, prob, torch.full_like(prob, 1 / 30), NAME, "hard"
    with pytest.raises(ValueError, match="got rule 'redder', want one of .*more; use --kernels torch"):
        kernel.pair_reward(*args)
    assert torch.equal(kernel.pair_reward_ref(*args)[0], relation(pred, pts[:, None], NAME))


def test_what_is_special_about_a_modality_is_asked_of_the_table():
    """No branch on a modality's name, but for the layouts and protocols of published data and weights."""
    branch = re.compile(r'(==|!=|\bin|\bif) *[(\[{]?"(' + "|".join(MODALITIES) + ')"')
    found = [f"{p.relative_to(ROOT)}: {line.strip()}" for p in SOURCES if p.stem not in ABOUT_DATA
             for line in p.read_text().splitlines() if branch.search(line)]
    assert found == []


# the example of docs/extend.md, typed into a copy of the project ------------------------------------------

def apply_page(tree):
    """Do in a copy of the project what the page's diff says."""
    diff = re.search(r"```diff\n(.*?)```", PAGE.read_text(), re.S)[1]
    for part in re.split(r"^--- ", diff, flags=re.M)[1:]:
        name, *hunks = re.split(r"\n(?:@@.*\n)?(?=@@)|\n@@.*\n", part.strip("\n"))
        path = tree / name
        text = path.read_text()
        for hunk in hunks:
            lines = hunk.splitlines()
            before, after = ("\n".join(x[1:] for x in lines if x[0] in keep) for keep in (" -", " +"))
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        path.write_text(text)


@pytest.fixture(scope="module")
def fifth(tmp_path_factory):
    """What fifth_modality.py found in a process of its own, in a copy of the project with the page's edit."""
    tree = tmp_path_factory.mktemp("project")
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, tree)
        if path.name in ("kernels", "runtime", "data", "models", "evaluation"):
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    apply_page(tree)
    out = tree / "out"
    out.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(PYTHONPATH=str(tree))
    script = ROOT / "tests" / "fifth_modality.py"
    done = subprocess.run([sys.executable, str(script), NAME, str(out), *TINY], cwd=tree, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "found.json").read_text())


def test_a_fifth_modality_has_relations(fifth):
    assert fifth["names"] == [*MODALITIES, NAME]
    sign = [[0 if abs(g) < 0.02 else 1 if g > 0 else -1 for g in gaps] for gaps in fifth["gaps"]]
    assert fifth["relation"] == sign and {x for one in sign for x in one} == {-1, 0, 1}


def test_a_fifth_modality_has_questions_with_true_balanced_answers(fifth):
    asked = fifth["questions"]
    assert len(asked["first"]) >= 4 and asked["first"] == [gap > 0 for gap in asked["gaps"]]
    assert 0 < sum(asked["first"]) < len(asked["first"]) and set(asked["read"]) == {NAME}


def test_a_judge_is_trained_on_a_fifth_question_and_answers_it(fifth):
    assert fifth["ask"]["shape"] == [2, 5, 5] and fifth["ask"]["lies_in_0_1"] and fifth["ask"]["alone"] < 1e-5


def test_a_bank_keeps_a_fifth_answer(fifth):
    assert fifth["bank"] == dict(shape=[4, 16, 5], asked=0)


def test_judges_and_predictors_of_four_modalities_are_refused_in_one_line(fifth):
    judge, predictor = fifth["refusals"]
    assert "want a judge that was trained on 'roughness'" in judge and "modality.weight" in predictor
    assert "\n" not in judge + predictor


def test_grpo_learns_from_a_fifth_answer(fifth):
    assert len(fifth["log"]) == 4
    for step in fifth["log"]:
        assert 0 < step[f"reward/{NAME}"] < 1 and step["policy/ratio_min"] == step["policy/ratio_max"] == 1
    assert 0 <= fifth["log"][-1][f"wild/{NAME}/pairs"] <= 1


def test_a_fifth_modality_is_in_every_table_and_among_the_maps_of_a_photo(fifth):
    assert all({f"{NAME}/abs_err", f"{NAME}/pairs"} <= set(table["metrics"]) for table in fifth["tables"])
    assert any({f"judge/{NAME}", f"heuristic/{NAME}"} <= set(table["judge"] or ()) for table in fifth["tables"])
    assert {f"photo_{NAME}.png", f"photo_{NAME}.npy", "photo_panel.png"} <= set(fifth["files"])
